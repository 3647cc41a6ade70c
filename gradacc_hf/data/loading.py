"""Load the user's data from a file, a folder (also of images) or a Hub name, as training and validation rows.

`readers.py` reads each file. This module finds the files and their splits, and holds out validation rows if
there are none. The recipe tokenises texts.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import huggingface_hub.constants
import numpy as np
import yaml
from datasets import Dataset, DatasetDict
from datasets.data_files import FILES_TO_IGNORE
from datasets.fingerprint import Hasher
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import DatasetCard

from gradacc_hf import embedded
from gradacc_hf.data.columns import file_rows
from gradacc_hf.data.files import ALLOWED, TAGGED, Form, is_data
from gradacc_hf.data.looks_like import looks_like
from gradacc_hf.data.mixed import joined, mixed_columns
from gradacc_hf.data.places import folders, record_files
from gradacc_hf.data.readers import CSV, cause_of, quiet, read_file, read_splits, reading_errors, splits_in
from gradacc_hf.data.reading import FileRows, Reading, Source, counted
from gradacc_hf.errors import listed, refuse

VALIDATION_SPLITS = ("validation", "valid", "val", "dev", "test")  # the first that exists is used
METADATA, FILE_NAME = "metadata", "file_name"  # as `datasets` names a table of images and the column of paths
IMAGES = set(ImageFolder.EXTENSIONS)
Convert = Callable[[Dataset], tuple[Dataset, str | None]]
"""Rows as a file has them → rows as a task takes them, and the format for the plan, or None."""

_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}.*")  # SPLIT-00000-of-00001.parquet, as on the Hub


@dataclass(frozen=True)
class Splits:
    """The training and validation rows of a run."""

    train: Dataset
    validation: Dataset
    held_out: bool  # whether validation rows were held out of the training rows
    source: str  # one sentence about the source of the validation rows
    reading: Reading = field(default_factory=Reading)


def load_data(
    train: str | Sequence[str],
    validation: str | Sequence[str] | None = None,
    *,
    validation_fraction: float,
    seed: int,
    validation_split: str | None = None,
    config_name: str | None = None,
    label_column: str | None = None,
    convert: Convert | None = None,
    form: Form | None = None,
    together: Sequence[str] = (),
) -> Splits:
    """Read training and validation rows.

    Args:
        train: A data file (`files.BUILDERS`), a folder of such files or of images, a Hub name, or
            `embedded:NAME`. Several files are a list, names with commas between them, or a pattern such as
            `shards/*.jsonl`.
        validation: The same, or the name of a split of `train`. None: the first of VALIDATION_SPLITS that
            `train` has, or else held-out training rows.
        validation_fraction: The share of the rows to hold out (at least 1 row).
        seed: Draws these rows, and nothing else does.
        validation_split: The split of `validation`; by default the first of VALIDATION_SPLITS, or else train.
        config_name: The configuration of a data set on the Hub, or of a folder in the Hub's layout.
        label_column: The first row of every label in this column is not held out.
        convert: Converts training and validation rows, before rows are held out.
        form: What is stated about the files. The rest is found in them.
        together: Columns such as ("title", "context"). Rows with equal values are held out together, by the
            first column that has enough different values.

    Raises:
        InputError: For files or names that cannot be read, and for data sets without rows.
    """
    reading, form = Reading(), form or Form()
    train = train if isinstance(train, str) else ",".join(train)
    validation = validation if isinstance(validation, str | None) else ",".join(validation)
    found = _read(train, "data.train", config_name, reading, form)
    splits = found.splits
    if "train" not in splits:
        refuse("data.train", f"{train!r} has no train split; found {listed(splits)}", "name the file itself")
    rows, used = _converted(splits["train"], convert, reading), {"train"}
    reading.use_split(found, "train", "training")
    held_out, source = False, f"validation: {validation}"
    if validation is None:
        name = next((split for split in VALIDATION_SPLITS if split in splits), None)
    else:
        name = validation if validation in splits and not Path(validation).exists() else None
    if name is not None:
        held = _converted(splits[name], convert, reading)
        source = f"validation: the {name} split of {train}"
        used.add(name)
        reading.use_split(found, name, "validation")
    elif validation is None:
        held_out, number_of_rows = True, len(rows)
        reading.kept_together, groups = _groups(rows, together, validation_fraction)
        rows, held = _hold_out(rows, validation_fraction, seed, label_column, groups)
        source = f"validation: {len(held):,} of {number_of_rows:,} training rows, held out by seed {seed}"
        source += f", all rows of a {reading.kept_together} together" if reading.kept_together else ""
    else:
        reading.leave_splits(found, used)
        found = _read(validation, "data.validation", config_name, reading, form)
        used = {name := choose_split(found.splits, validation, validation_split)}
        held = _converted(found.splits[name], convert, reading)
        reading.use_split(found, name, "validation")
    reading.leave_splits(found, used)
    for key, given, split in (("data.train", train, rows), ("data.validation", validation or train, held)):
        if not len(split):
            refuse(key, f"{given!r} has no rows", "give at least one")
    for name, line in mixed_columns(rows, held).items():
        reading.merged.setdefault(name, []).append(line)
    reading.columns = [*dict.fromkeys((*rows.column_names, *held.column_names))]
    return Splits(rows, held, held_out, source, reading)


def choose_split(splits: Collection[str], validation: str, named: str | None) -> str:
    """Return the split of `data.validation` that is used: the named one, or else the first that it has."""
    if named not in (None, *splits):
        found = f"{validation!r} has no split {named!r}"
        refuse("data.validation_split", found, f"allowed: {listed(splits)}")
    names = (split for split in (*VALIDATION_SPLITS, "train") if split in splits)
    return named or next(names, next(iter(splits)))


def key_by_code(dataset: Dataset, *files: Path) -> Dataset:
    """Return a data set whose cached results of `map` are of these files of code, by default of gradacc's.

    `map` hashes imported functions by name. It would return results of an earlier version of gradacc.
    """
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in files] or [_code_of_package()]
    return Dataset(
        dataset.data,
        info=dataset.info.copy(),
        split=dataset.split,
        indices_table=dataset._indices,
        fingerprint=Hasher.hash((dataset._fingerprint, digests)),
    )


@cache
def _code_of_package() -> bytes:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


def _converted(rows: Dataset, convert: Convert | None, reading: Reading) -> Dataset:
    rows = key_by_code(rows)
    rows, found = convert(rows) if convert else (rows, None)
    if found:
        reading.note("format", found)
    return rows


def _groups(rows: Dataset, together: Sequence[str], fraction: float) -> tuple[str | None, np.ndarray]:
    """Return a column, and the group of each row by its values; None and a group for each row without one.

    The column is the first with values for two groups of validation rows, or else the last with two values.
    """
    found: tuple[str | None, np.ndarray] = (None, np.arange(len(rows)))
    for column in (name for name in together if name in rows.column_names):
        numbers: dict[str, int] = {}
        groups = np.array([numbers.setdefault(str(value), len(numbers)) for value in rows[column]])
        if len(numbers) > 1:
            found = column, groups
        if len(numbers) * fraction >= 2:
            break
    return found


def _hold_out(
    rows: Dataset, fraction: float, seed: int, label_column: str | None, groups: np.ndarray
) -> tuple[Dataset, Dataset]:
    """Return the remaining rows, and whole groups drawn by `seed` that have a `fraction` of the rows.

    The first row of each label remains.
    """
    number, kept = max(1, round(len(rows) * fraction)), np.zeros(len(rows), bool)
    if label_column in rows.column_names:
        first: dict[str, int] = {}
        for row, labels in enumerate(rows[label_column]):
            for label in labels if isinstance(labels, list) else [labels]:
                first.setdefault(str(label), row)
        kept[list(first.values())] = True
    shuffled = rows.shuffle(seed=seed, keep_in_memory=True)
    order = file_rows(shuffled)
    free = groups[order[~kept[order]]]
    turns = free[np.sort(np.unique(free, return_index=True)[1])]  # each group at its first row
    enough = np.searchsorted(np.cumsum(np.bincount(groups)[turns]), number) + 1
    drawn = np.flatnonzero(np.isin(groups[order], turns[:enough]))
    if not 0 < fraction < 1 or not len(drawn) or max(number, len(drawn)) >= len(rows):
        found = f"{fraction:g} of {counted(len(rows), 'row')} leaves nothing to train on or to hold out"
        if name := looks_like(rows.column_names):
            found += f" (it looks like {name})"
        elif len(rows) == 1:
            found += f" (it has {listed(rows.column_names)})"
        refuse("data.validation_fraction", found, "between 0 and 1, or set data.validation")
    left = np.setdiff1d(np.arange(len(rows)), drawn)
    return shuffled.select(left), shuffled.select(drawn)


def _read(given: str, key: str, config_name: str | None, reading: Reading, form: Form) -> Source:
    if given.startswith("embedded:"):
        name = given.removeprefix("embedded:")
        if name not in embedded.DATASETS:
            names = listed(f"embedded:{known}" for known in embedded.DATASETS)
            refuse(key, f"no {given!r}", f"the embedded data is {names}")
        return Source(given, dict(zip(("train", "validation"), embedded.load(name), strict=True)))
    path = Path(given).expanduser()
    if path.is_dir() and given:
        return _read_saved(path, given, key) or _read_folder(path, given, key, config_name, reading, form)
    if path.is_file():
        _check_suffix(path, key, form)
        found = read_splits(path, key, form)
        source = Source(given, {split: rows for split, (rows, _) in found.items()})
        for split, (rows, of_file) in found.items():
            record_files(rows, [(path, len(rows), of_file)])
            source.files[split] = [FileRows(str(path), len(rows), form=str(of_file))]
        return source
    if "," in given or glob.has_magic(given):
        files = [file for name in given.split(",") for file in named_files(name.strip(), key, reading, form)]
        rows, of_files = _read_files(files, key, reading, form)
        return Source(given, {"train": rows}, {"train": of_files})
    hint = _hint(path)
    if is_data(path, form) or given.count("/") > 1 or given[:1] in "./~":
        refuse(key, f"no file or folder {given!r}", hint)
    if given in _PACKAGED_DATASETS_MODULES:  # `datasets` would read all files in the current folder
        refuse(key, f"{given!r} is a kind of file", hint)
    found = embedded.hub_has(given, "dataset")
    try:
        with contextlib.nullcontext() if found else _offline():
            loaded = datasets.load_dataset(given, config_name)
    except Exception as error:
        if found:
            refuse(key, f"{given!r} on the Hub cannot be read: {cause_of(error)}", "see data.config_name")
        where = "is not on the Hub" if found is False else "is not cached here, and the Hub does not answer"
        refuse(
            key,
            f"{given!r} is not a file or folder and {where}",
            hint + (" or embedded:NAME" if hint.startswith("give") else ""),
        )
    return Source(given, _by_name(loaded))


def _hint(absent: Path) -> str:
    siblings = [p.name for p in absent.parent.iterdir()] if absent.parent.is_dir() else []
    close = get_close_matches(absent.name, siblings, n=1)
    return (
        f"did you mean {str(absent.parent / close[0])!r}?"
        if close
        else f"give a folder, or a file: {ALLOWED}"
    )


def _check_suffix(path: Path, key: str, form: Form) -> None:
    if not is_data(path, form):
        suffixes = "".join(path.suffixes[-2:]).lower()
        allowed = f"{listed(TAGGED)}, {ALLOWED}" if form.word_columns else ALLOWED
        refuse(key, f"{str(path)!r} is a {suffixes or 'file without extension'}", f"allowed: {allowed}")


def named_files(name: str, key: str, reading: Reading, form: Form = Form()) -> list[Path]:
    """Return the file of this name, or the data files that match it as a pattern, sorted."""
    path = Path(name).expanduser()
    if path.is_file():
        _check_suffix(path, key, form)
        return [path]
    if path.is_dir():
        refuse(key, f"{name!r} is a folder", f"name its files, such as {Path(name) / '*'}")
    if not glob.has_magic(name):
        refuse(key, f"no file {name!r}", _hint(path))
    found = [*map(Path, sorted(glob.glob(str(path), recursive=True)))]
    files = [p for p in found if p.is_file() and is_data(p, form) and not is_hidden(Path(p.name))]
    if not files:
        refuse(key, f"no data file matches {name!r}", f"allowed: {ALLOWED}")
    others = [p for p in found if p not in files]
    reading.note_not_read([(p, _why_not_read(p)) for p in others])
    return files


def _why_not_read(path: Path) -> str:
    return "a folder" if path.is_dir() else "a hidden file" if is_data(path) else f"allowed: {ALLOWED}"


def _read_files(
    files: Sequence[Path], key: str, reading: Reading, form: Form
) -> tuple[Dataset, list[FileRows]]:
    """Return the rows of several files as one data set, and what was read of each."""
    found = [(p, *read_file(p, key, form)) for p in files]
    rows, lines, classes = joined([(p, of_file) for p, of_file, _ in found])
    for column, line in lines.items():
        reading.merged.setdefault(column, []).append(line)
    reading.refused |= {column: (key, line, "write labels as text") for column, line in classes.items()}
    record_files(rows, [(p, len(of_file), found_form) for p, of_file, found_form in found])
    return rows, [FileRows(str(p), len(of_file), form=str(found_form)) for p, of_file, found_form in found]


def _read_saved(path: Path, given: str, key: str) -> Source | None:
    """Return the splits of a folder that `save_to_disk` wrote; None for other folders."""
    of_splits = path / datasets.config.DATASETDICT_JSON_FILENAME
    names = (datasets.config.DATASET_STATE_JSON_FILENAME, datasets.config.DATASET_INFO_FILENAME)
    if not of_splits.is_file() and not all((path / name).is_file() for name in names):
        return None
    with reading_errors(key, [path]):
        for file in (of_splits, *path.rglob(names[0])):
            named = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            where = [
                name
                for name in _texts([named.get("splits"), named.get("_data_files")])
                if _is_elsewhere(name)
            ]
            if where:
                refuse(key, f"{file} names {where[0]!r}", "allowed are files in its folder")
        loaded = datasets.load_from_disk(str(path))
    return Source(given, _by_name(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded})


def _read_folder(
    path: Path, given: str, key: str, config_name: str | None, reading: Reading, form: Form
) -> Source:
    """Return the splits of a folder. Every file with data is read, or noted as not read."""
    there = [(p, is_hidden(p.relative_to(path))) for p in sorted(path.rglob("*")) if not p.is_dir()]
    found = [p for p, hidden in there if not hidden]
    files = [p for p in found if is_data(p, form) and p.name not in FILES_TO_IGNORE]
    if not files and any(p.suffix.lower() in IMAGES for p in found):
        return _read_images(key, given, path, found, reading)
    if not files:
        kinds = f"allowed: {ALLOWED}, or images in a folder for each label"
        refuse(key, f"no data file in {given!r}", kinds)
    if (script := path / f"{path.resolve().name}.py").is_file():
        refuse(key, f"found {script}, which makes the data and is not executed", "name the data files")
    about = _card(path, key)
    if not (config_name or about) and {p.stem for p in files} == {METADATA} and any(map(_is_image, found)):
        return _read_images_of_table(path, given, key, found, files, reading, form)
    if config_name or about:
        where = [os.path.abspath(path)] + ([config_name] if config_name else [])  # "csv" is a builder's name
        with reading_errors(key, files):
            named = datasets.load_dataset_builder(*where).config.data_files or {}  # type: ignore[arg-type]
            of_splits = {str(name): [Path(p) for p in of_split] for name, of_split in named.items()}
            if not _names_files_only(about, of_splits):
                options = CSV if {p.suffix.lower() for p in files} == {".csv"} else {}
                splits = _by_name(datasets.load_dataset(*where, **options))
                _note_not_read(path, there, of_splits, reading)
                of_all = {
                    name: [FileRows(listed(of_splits[name]), len(rows))] for name, rows in splits.items()
                }
                return Source(given, splits, of_all)
    else:
        of_splits = files_of_splits(path, files)
    splits, rows_of = {}, {}
    for name, of_split in of_splits.items():
        splits[name], rows_of[name] = _read_files(of_split, key, reading, form)
    _note_not_read(path, there, of_splits, reading)
    return Source(given, splits, rows_of)


def _names_files_only(about: Any, of_splits: dict[str, list[Path]]) -> bool:
    """Whether a folder's description names files that `read_file` reads, without types and options."""
    keys = {name for config in about.get("configs", ()) for name in config}
    files = [p for of_split in of_splits.values() for p in of_split]
    return (
        "dataset_info" not in about
        and keys <= {"config_name", "data_files", "data_dir", "default"}
        and all(map(is_data, files))
    )


def _note_not_read(
    folder: Path, there: Sequence[tuple[Path, bool]], of_splits: dict[str, list[Path]], reading: Reading
) -> None:
    """Note the files of a folder that are in no split; of hidden files, those with data."""
    read = {p.resolve() for of_split in of_splits.values() for p in of_split}
    left: list[tuple[Path, str]] = []
    for p, hidden in there:
        has_data = is_data(p)
        why = f"allowed: {ALLOWED}"
        if hidden or p.name in FILES_TO_IGNORE:
            why = "a hidden file" if hidden else "a description, not data"
        elif has_data:
            why = f"no single split in its name, unlike in {listed(of_splits)}"
            why += "; to use it, set data.validation to it"
        if p.resolve() not in read and p.suffix != ".md" and (has_data or not hidden):
            left.append((p, why))
    left += [(p, "a link to a folder") for p in folder.rglob("*") if p.is_symlink() and p.is_dir()]
    reading.note_not_read(left)


def is_hidden(path: Path) -> bool:
    """Whether a file is hidden, in a hidden folder, or the mark of an open Excel file."""
    return any(part.startswith((".", "__", "~$")) for part in path.parts)


def files_of_splits(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Return the files of each split, named as `datasets` names them, in any case: Test.csv.

    The first of these names that any file has decides: data/SPLIT-00000-of-00001, a folder such as train/, a
    file such as train_1.csv. Without any, all files are training files. The innermost folder counts. A name
    with the words of several splits, such as train_test.csv, names none.
    """
    places: list[list[list[str]]] = [[], [], []]  # by rule, by file: splits
    for path in (p.relative_to(folder) for p in files):
        shard = _SHARD.fullmatch(path.name) if path.parent == Path("data") else None
        places[0].append([shard[1]] if shard else [])
        places[1].append(next(filter(None, map(_named_split, reversed(path.parent.parts))), []))
        places[2].append(_named_split(path.name))
    splits = next((place for place in places if any(place)), [["train"]] * len(files))
    names = dict.fromkeys(name for of_file in splits for name in of_file)
    return {name: [p for p, of_file in zip(files, splits, strict=True) if name in of_file] for name in names}


def _named_split(name: str) -> list[str]:
    found = splits_in(name)
    return found if len(found) == 1 else []


def _card(folder: Path, key: str) -> dict[str, Any]:
    """Return what the folder's own description states about data sets; empty without one.

    Raise InputError if it names files elsewhere, which `datasets` would read.
    """
    stated: dict[str, Any] = {}
    for file in (folder / datasets.config.REPOCARD_FILENAME, folder / datasets.config.REPOYAML_FILENAME):
        if not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8")
            if file.suffix == ".md" and not text.lstrip().startswith("---"):
                continue  # without metadata
            about = DatasetCard(text).data.to_dict() if file.suffix == ".md" else yaml.safe_load(text)
            stated |= {name: about[name] for name in ("configs", "dataset_info") if about.get(name)}
            where = [one.get(name) for one in about.get("configs", ()) for name in ("data_files", "data_dir")]
        except Exception:  # `datasets` raises the error for a file that cannot be read
            stated["dataset_info"], where = "unknown", []
        named = [path for path in _texts(where) if _is_elsewhere(path)]
        if named:
            refuse(key, f"{file} names {named[0]!r}", "allowed are files in its folder")
    return stated


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(one)


def _is_elsewhere(path: str) -> bool:
    return "://" in path or Path(path).is_absolute() or ".." in Path(path).parts


def _read_images(key: str, given: str, folder: Path, found: Sequence[Path], reading: Reading) -> Source:
    """Return rows with `image`, and `label` from the name of the folder. Folders above may name splits."""
    try:
        with quiet():
            splits = _by_name(datasets.load_dataset("imagefolder", data_dir=glob.escape(str(folder))))
    except Exception as error:
        cure = "put the images of each label in a separate folder"
        refuse(key, f"the images in {str(folder)!r} cannot be read: {cause_of(error)}", cure)
    if any("label" in rows.column_names for rows in splits.values()):
        reading.note("format", "images in a folder for each class")
    images = sum(p.suffix.lower() in IMAGES for p in found)
    if left := images - sum(map(len, splits.values())):
        reading.note("not read", f"{counted(left, 'image')} of {folder} in no split: {listed(splits)}")
    others = (p for p in found if p.suffix.lower() not in IMAGES and p.name not in FILES_TO_IGNORE)
    reading.note_not_read([(p, "not an image") for p in others])
    return Source(given, splits)


def _read_images_of_table(
    folder: Path,
    given: str,
    key: str,
    found: Sequence[Path],
    tables: Sequence[Path],
    reading: Reading,
    form: Form,
) -> Source:
    """Return the rows of tables that name images, as metadata.csv. Paths start at the table's folder."""
    splits, rows_of, named = {}, {}, {p.resolve() for p in tables}
    for split, of_split in files_of_splits(folder, tables).items():
        splits[split], rows_of[split] = _read_files(of_split, key, reading, form)
        if FILE_NAME not in splits[split].column_names:
            what = (
                f"{listed(of_split)} has no column {FILE_NAME!r}; found {listed(splits[split].column_names)}"
            )
            refuse(key, what, "name the images in it")
        rows = zip(folders(splits[split]), splits[split][FILE_NAME], strict=True)
        named |= {(at / name).resolve() for at, name in rows if at is not None and name}
    left = [p for p in found if p.resolve() not in named and p.name not in FILES_TO_IGNORE]
    no_row = f"in no row of {listed(tables)}"
    reading.note_not_read([(p, no_row if _is_image(p) else "not an image") for p in left])
    return Source(given, splits, rows_of)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGES


def _by_name(loaded: Any) -> dict[str, Dataset]:
    return {str(name): split for name, split in loaded.items()}


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Load from the cache only, as with HF_HUB_OFFLINE=1. Without it, each file takes 20 s of retries."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
