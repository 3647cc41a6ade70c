"""Load the user's data from a file, a folder (also of images) or a Hub name, as training and validation rows.

The library `datasets` reads the files. This module holds out validation rows if there are none, and raises an
InputError of one line for a file that cannot be read. The recipe tokenises texts.
"""

import codecs
import contextlib
import glob
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import huggingface_hub.constants
import numpy as np
import pandas as pd
import yaml
from datasets import Dataset, Features, Value
from datasets.data_files import FILES_TO_IGNORE, SPLIT_KEYWORDS
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.json.json import JsonConfig
from datasets.table import CastError
from huggingface_hub import DatasetCard

from gradacc_hf import embedded
from gradacc_hf.data.columns import file_rows
from gradacc_hf.data.mixed import (
    changed_columns,
    joined,
    mixed_columns,
    read_mixed_json,
    with_columns_of_file,
)
from gradacc_hf.data.reading import Reading, Source, counted
from gradacc_hf.errors import InputError, listed, refuse

BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
VALIDATION_SPLITS = ("validation", "valid", "val", "dev", "test")  # the first that exists is used
IMAGES = set(ImageFolder.EXTENSIONS)
_CSV: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}  # "None" and "NA" are texts, not nulls

Convert = Callable[[Dataset], tuple[Dataset, str | None]]
"""Rows as a file has them → rows as a task takes them, and the format for the plan, or None."""

_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}.*")  # SPLIT-00000-of-00001.parquet, as on the Hub
_NO_ROWS = ("corresponds to no data", "No columns to parse", "BatchSize must be")  # errors of the builders


@dataclass(frozen=True)
class Splits:
    """The training and validation rows of a run."""

    train: Dataset
    validation: Dataset
    held_out: bool  # whether validation rows were held out of the training rows
    source: str  # one sentence about the source of the validation rows
    reading: Reading = field(default_factory=Reading)


def load_data(
    train: str,
    validation: str | None = None,
    *,
    validation_fraction: float,
    seed: int,
    config_name: str | None = None,
    label_column: str | None = None,
    convert: Convert | None = None,
) -> Splits:
    """Read training and validation rows.

    Args:
        train: A CSV, JSON, JSONL or Parquet file, a folder of such files or of images, a Hub name, or
            `embedded:NAME`.
        validation: The same, or the name of a split of `train`. None: the first of VALIDATION_SPLITS that
            `train` has, or else held-out training rows.
        validation_fraction: The share of the rows to hold out (at least 1 row).
        seed: Draws these rows, and nothing else does.
        config_name: The configuration of a data set on the Hub, or of a folder in the Hub's layout.
        label_column: The first row of every label in this column is not held out.
        convert: Converts training and validation rows, before rows are held out.

    Raises:
        InputError: For files or names that cannot be read, and for data sets without rows.
    """
    reading = Reading()
    found = _read(train, "data.train", config_name, reading)
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
        rows, held = _hold_out(rows, validation_fraction, seed, label_column)
        source = f"validation: {len(held):,} of {number_of_rows:,} training rows, held out by seed {seed}"
    else:
        reading.leave_splits(found, used)
        found = _read(validation, "data.validation", config_name, reading)
        names = (split for split in (*VALIDATION_SPLITS, "train") if split in found.splits)
        used = {name := next(names, next(iter(found.splits)))}
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


def _converted(rows: Dataset, convert: Convert | None, reading: Reading) -> Dataset:
    rows, found = convert(rows) if convert else (rows, None)
    if found:
        reading.note("format", found)
    return rows


def _hold_out(rows: Dataset, fraction: float, seed: int, label_column: str | None) -> tuple[Dataset, Dataset]:
    """Return the remaining rows, and a `fraction` drawn by `seed`. The first row of each label remains."""
    number, kept = max(1, round(len(rows) * fraction)), np.zeros(len(rows), bool)
    if label_column in rows.column_names:
        first: dict[str, int] = {}
        for row, labels in enumerate(rows[label_column]):
            for label in labels if isinstance(labels, list) else [labels]:
                first.setdefault(str(label), row)
        kept[list(first.values())] = True
    shuffled = rows.shuffle(seed=seed, keep_in_memory=True)
    drawn = np.flatnonzero(~kept[file_rows(shuffled)])[:number]
    if not 0 < fraction < 1 or not len(drawn) or number >= len(rows):
        found = f"{fraction:g} of {len(rows):,} rows leaves nothing to train on or to hold out"
        refuse("data.validation_fraction", found, "between 0 and 1, or set data.validation")
    left = np.setdiff1d(np.arange(len(rows)), drawn)
    return shuffled.select(left), shuffled.select(drawn)


def _read(given: str, key: str, config_name: str | None, reading: Reading) -> Source:
    if given.startswith("embedded:"):
        name = given.removeprefix("embedded:")
        if name not in embedded.DATASETS:
            names = listed(f"embedded:{known}" for known in embedded.DATASETS)
            refuse(key, f"no {given!r}", f"the embedded data is {names}")
        return Source(given, dict(zip(("train", "validation"), embedded.load(name), strict=True)))
    path, kinds = Path(given).expanduser(), listed(BUILDERS)
    if path.is_dir() and given:
        return _read_folder(path, given, key, config_name, reading)
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix not in BUILDERS:
            refuse(key, f"{given!r} is a {suffix or 'file without extension'}", f"allowed: {kinds}")
        rows = read_file(path, key)
        return Source(given, {"train": rows}, {"train": [(str(path), len(rows))]})
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = get_close_matches(path.name, siblings, n=1)
    hint = f"did you mean {str(path.parent / close[0])!r}?" if close else f"give a {kinds} file, or a folder"
    if suffix in BUILDERS or given.count("/") > 1 or given[:1] in "./~":
        refuse(key, f"no file or folder {given!r}", hint)
    if given in _PACKAGED_DATASETS_MODULES:  # `datasets` would read all files in the current folder
        refuse(key, f"{given!r} is a kind of file", hint)
    found = embedded.hub_has(given, "dataset")
    try:
        with contextlib.nullcontext() if found else _offline():
            loaded = datasets.load_dataset(given, config_name)
    except Exception as error:
        if found:
            refuse(key, f"{given!r} on the Hub cannot be read: {_cause(error)}", "see data.config_name")
        where = "is not on the Hub" if found is False else "is not cached here, and the Hub does not answer"
        refuse(
            key,
            f"{given!r} is not a file or folder and {where}",
            hint + ("" if close else " or embedded:NAME"),
        )
    return Source(given, _by_name(loaded))


def _read_folder(path: Path, given: str, key: str, config_name: str | None, reading: Reading) -> Source:
    """Return the splits of a folder. Every file with data is read, or noted as not read."""
    there = [(p, is_hidden(p.relative_to(path))) for p in sorted(path.rglob("*")) if not p.is_dir()]
    found = [p for p, hidden in there if not hidden]
    files = [p for p in found if p.suffix.lower() in BUILDERS and p.name not in FILES_TO_IGNORE]
    if not files and any(p.suffix.lower() in IMAGES for p in found):
        return _read_images(key, given, path, found, reading)
    if not files:
        kinds = f"allowed: {listed(BUILDERS)}, or images in a folder for each label"
        refuse(key, f"no data file in {given!r}", kinds)
    if (script := path / f"{path.resolve().name}.py").is_file():
        refuse(key, f"found {script}, which makes the data and is not executed", "name the data files")
    about = _card(path, key)
    if config_name or about:
        where = [os.path.abspath(path)] + ([config_name] if config_name else [])  # "csv" is a builder's name
        with reading_errors(key, files):
            named = datasets.load_dataset_builder(*where).config.data_files or {}  # type: ignore[arg-type]
            of_splits = {str(name): [Path(p) for p in of_split] for name, of_split in named.items()}
            if not _names_files_only(about, of_splits):
                options = _CSV if {p.suffix.lower() for p in files} == {".csv"} else {}
                splits = _by_name(datasets.load_dataset(*where, **options))
                _note_not_read(path, there, of_splits, reading)
                of_all = {name: [(listed(of_splits[name]), len(rows))] for name, rows in splits.items()}
                return Source(given, splits, of_all)
    else:
        of_splits = files_of_splits(path, files)
    splits, rows_of = {}, {}
    for name, of_split in of_splits.items():
        parts = [(p, read_file(p, key)) for p in of_split]
        rows_of[name] = [(str(p), len(rows)) for p, rows in parts]
        splits[name], lines = joined(parts, key)
        for column, line in lines.items():
            reading.merged.setdefault(column, []).append(line)
    _note_not_read(path, there, of_splits, reading)
    return Source(given, splits, rows_of)


def _names_files_only(about: Any, of_splits: dict[str, list[Path]]) -> bool:
    """Whether a folder's description names files that `read_file` reads, without types and options."""
    keys = {name for config in about.get("configs", ()) for name in config}
    files = [p for of_split in of_splits.values() for p in of_split]
    return (
        "dataset_info" not in about
        and keys <= {"config_name", "data_files", "data_dir", "default"}
        and all(p.suffix.lower() in BUILDERS for p in files)
    )


def _note_not_read(
    folder: Path, there: Sequence[tuple[Path, bool]], of_splits: dict[str, list[Path]], reading: Reading
) -> None:
    """Note the files of a folder that are in no split; of hidden files, those with data."""
    read = {p.resolve() for of_split in of_splits.values() for p in of_split}
    left: list[tuple[Path, str]] = []
    for p, hidden in there:
        is_data = p.suffix.lower() in BUILDERS
        why = f"allowed: {listed(BUILDERS)}"
        if hidden or p.name in FILES_TO_IGNORE:
            why = "a hidden file" if hidden else "a description, not data"
        elif is_data:
            why = f"no split in its name, unlike in {listed(of_splits)}; to use it, set data.validation to it"
        if p.resolve() not in read and p.suffix != ".md" and (is_data or not hidden):
            left.append((p, why))
    left += [(p, "a link to a folder") for p in folder.rglob("*") if p.is_symlink() and p.is_dir()]
    reading.note_not_read(left)


def is_hidden(path: Path) -> bool:
    """Whether a file is hidden or in a hidden folder, so that `datasets` does not read it."""
    return any(part.startswith((".", "__")) for part in path.parts)


def files_of_splits(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Return the files of each split, named as `datasets` names them, in any case: Test.csv.

    The first of these names that any file has decides: data/SPLIT-00000-of-00001, a folder such as train/, a
    file such as train_1.csv. Without any, all files are training files.
    """
    places: list[list[list[str]]] = [[], [], []]  # by rule, by file: splits
    for path in (p.relative_to(folder) for p in files):
        shard = _SHARD.fullmatch(path.name) if path.parent == Path("data") else None
        places[0].append([shard[1]] if shard else [])
        places[1].append([split for part in path.parent.parts for split in _splits_in(part)])
        places[2].append(_splits_in(path.name))
    splits = next((place for place in places if any(place)), [["train"]] * len(files))
    names = dict.fromkeys(name for of_file in splits for name in of_file)
    return {name: [p for p, of_file in zip(files, splits, strict=True) if name in of_file] for name in names}


def _splits_in(name: str) -> list[str]:
    """Return the splits whose keyword is a word of this name of a file or folder."""
    words = re.split(r"[-._ 0-9]+", name.lower())
    return [str(split) for split, keywords in SPLIT_KEYWORDS.items() if {*keywords} & {*words}]


def read_file(path: Path, key: str) -> Dataset:
    """Return the rows of a file. Columns of a text file are texts; other columns keep their types."""
    suffix = path.suffix.lower()
    with reading_errors(key, [path]):
        if suffix == ".csv":
            names = dict.fromkeys(_header(path, key), Value("string"))
            options: dict[str, Any] = {"features": Features(names), **_CSV}
        else:
            is_json = suffix in (".json", ".jsonl") and hasattr(JsonConfig, "parse_agent_traces")
            options = {"parse_agent_traces": False} if is_json else {}
        load: Any = datasets.load_dataset
        where = {"train": glob.escape(str(path))}
        try:
            rows = load(BUILDERS[suffix], data_files=where, **options)["train"]
        except Exception:
            if suffix not in (".json", ".jsonl") or json_fault(path):
                raise
            rows = read_mixed_json(path)
        else:
            if suffix in (".json", ".jsonl") and (changed := changed_columns(rows)):
                rows = with_columns_of_file(rows, path, changed)
    if not len(rows):
        refuse(key, f"{path}: no rows", "give at least one in each file")
    return rows


def _header(path: Path, key: str) -> list[str]:
    """Return the names of the columns of a CSV file. Raise InputError if rows have more fields than names."""
    first = pd.read_csv(path, nrows=1, dtype=str, **_CSV)
    if not isinstance(first.index, pd.RangeIndex):
        refuse(key, f"{path}: rows have more fields than the header", "give every column a name")
    return list(first.columns)


@contextlib.contextmanager
def reading_errors(key: str, files: Sequence[Path]) -> Iterator[None]:
    """Turn an error about these files into an InputError of one line, and print no progress bars."""
    shown = listed(files[:3])
    try:
        for path in files:
            if path.stat().st_size == 0:
                refuse(key, f"{path} is empty", "give at least one row")
            if path.suffix.lower() != ".parquet":
                check_utf8(path, key)
    except OSError as error:
        refuse(key, f"cannot read {error.filename or shown}: {error.strerror}", "give a file you may read")
    try:
        with _quiet():
            yield
    except InputError:
        raise
    except Exception as error:
        cause = _cause(error)
        if any(sign in cause for sign in _NO_ROWS):
            refuse(key, f"{shown}: no rows", "give at least one in each file")
        for path in files:
            if path.suffix.lower() in (".json", ".jsonl") and (fault := json_fault(path)):
                refuse(key, f"{path}, {fault}", "one JSON object a line, or one list of objects")
        cause = cause.removeprefix("Error tokenizing data. C error: ").rstrip(".")
        commas = ", with commas between values" if files[0].suffix.lower() == ".csv" else ""
        refuse(key, f"{shown} cannot be read: {cause}", f"correct or leave out that part{commas}")


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
        with _quiet():
            splits = _by_name(datasets.load_dataset("imagefolder", data_dir=glob.escape(str(folder))))
    except Exception as error:
        cure = "put the images of each label in a separate folder"
        refuse(key, f"the images in {str(folder)!r} cannot be read: {_cause(error)}", cure)
    images = sum(p.suffix.lower() in IMAGES for p in found)
    if left := images - sum(map(len, splits.values())):
        reading.note("not read", f"{counted(left, 'image')} of {folder} in no split: {listed(splits)}")
    others = (p for p in found if p.suffix.lower() not in IMAGES and p.name not in FILES_TO_IGNORE)
    reading.note_not_read([(p, "not an image") for p in others])
    return Source(given, splits)


def _by_name(loaded: Any) -> dict[str, Dataset]:
    return {str(name): split for name, split in loaded.items()}


def check_utf8(path: Path, key: str) -> None:
    """Raise InputError with the line and the byte of the first character that is not UTF-8."""
    decoder, start, line = codecs.getincrementaldecoder("utf-8")(), 0, 1
    with path.open("rb") as file:
        while True:
            block = file.read(1 << 20)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line += block[: max(0, error.start - pending)].count(b"\n")
                found = f"{path} is not UTF-8: line {line:,}, byte {start - pending + error.start:,}"
                refuse(key, found, f"save it as UTF-8 (iconv -f latin1 -t utf8 {path.name})")
            if not block:
                return
            start, line = start + len(block), line + block.count(b"\n")


def json_fault(path: Path) -> str | None:
    """Return the place of the first line that is not a JSON object; None if there is none."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        json.loads(text)
        return None
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            return f"line {error.lineno:,}: {error.msg}"
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip() and not isinstance(json.loads(line), dict):
                return f"line {number:,}: not an object"
        except json.JSONDecodeError as error:
            return f"line {number:,}, column {error.colno}: {error.msg}"
    return None


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None and not isinstance(error, CastError):
        error = error.__cause__
    if isinstance(error, CastError):
        tables = f"{listed(error.table_column_names)} and {listed(error.requested_column_names)}"
        return f"its files have different columns, {tables}"
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Show no progress bars in this block, and no log lines about a file for which InputError is raised."""
    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Load from the cache only, as with HF_HUB_OFFLINE=1. Without it, each file takes 20 s of retries."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
