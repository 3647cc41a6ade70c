"""Load the user's data from a file, a folder (also of images) or a Hub name, as training and validation rows.

The library `datasets` reads the files. This module holds out validation rows if there are none, and raises an
InputError of one line for a file that cannot be read. The recipe tokenises texts.
"""

import codecs
import contextlib
import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import huggingface_hub.constants
import numpy as np
import pyarrow.compute
import yaml
from datasets import Dataset
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.table import CastError
from huggingface_hub import DatasetCard

from gradacc_hf import embedded
from gradacc_hf.data.columns import file_rows
from gradacc_hf.errors import listed, refuse

pc: Any = pyarrow.compute  # the functions are made at import, so type checkers do not know them
BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
VALIDATION_SPLITS = ("validation", "valid", "val", "dev", "test")  # the first that exists is used
IMAGES = set(ImageFolder.EXTENSIONS)
_CSV: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}  # "None" and "NA" are texts, not nulls

_NO_ROWS = ("corresponds to no data", "No columns to parse", "BatchSize must be")  # errors of the builders


@dataclass(frozen=True)
class Splits:
    """The training and validation rows of a run."""

    train: Dataset
    validation: Dataset
    held_out: bool  # whether validation rows were held out of the training rows
    source: str  # one sentence about the source of the validation rows


def load_data(
    train: str,
    validation: str | None = None,
    *,
    validation_fraction: float,
    seed: int,
    config_name: str | None = None,
    label_column: str | None = None,
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

    Raises:
        InputError: For files or names that cannot be read, and for data sets without rows.
    """
    splits = _read(train, "data.train", config_name)
    if "train" not in splits:
        refuse("data.train", f"{train!r} has no train split; found {listed(splits)}", "name the file itself")
    rows = splits["train"]
    held_out, source = False, f"validation: {validation}"
    if validation is None:
        name = next((split for split in VALIDATION_SPLITS if split in splits), None)
        if name is None:
            held_out, number_of_rows = True, len(rows)
            rows, held = _hold_out(rows, validation_fraction, seed, label_column)
            source = f"validation: {len(held):,} of {number_of_rows:,} training rows, held out by seed {seed}"
        else:
            held, source = splits[name], f"validation: the {name} split of {train}"
    elif validation in splits and not Path(validation).exists():
        held, source = splits[validation], f"validation: the {validation} split of {train}"
    else:
        others = _read(validation, "data.validation", config_name)
        held = others[
            next((split for split in (*VALIDATION_SPLITS, "train") if split in others), next(iter(others)))
        ]
    for key, given, split in (("data.train", train, rows), ("data.validation", validation or train, held)):
        if not len(split):
            refuse(key, f"{given!r} has no rows", "give at least one")
    return Splits(rows, held, held_out, source)


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


def _read(given: str, key: str, config_name: str | None) -> dict[str, Dataset]:
    if given.startswith("embedded:"):
        name = given.removeprefix("embedded:")
        if name not in embedded.DATASETS:
            names = listed(f"embedded:{known}" for known in embedded.DATASETS)
            refuse(key, f"no {given!r}", f"the embedded data is {names}")
        return dict(zip(("train", "validation"), embedded.load(name), strict=True))
    path, kinds = Path(given).expanduser(), listed(BUILDERS)
    if path.is_dir() and given:
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in BUILDERS and p.is_file())
        if not files and any(p.suffix.lower() in IMAGES for p in path.rglob("*")):
            return _read_images(key, path)
        if not files:
            refuse(
                key, f"no data file in {given!r}", f"allowed: {kinds}, or images in a folder for each label"
            )
        options = _CSV if {p.suffix.lower() for p in files} == {".csv"} else {}
        _check_card(path, key)
        where = [os.path.abspath(path)] + ([config_name] if config_name else [])  # "csv" is a builder's name
        return _read_files(key, files, *where, **options)
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix not in BUILDERS:
            refuse(key, f"{given!r} is a {suffix or 'file without extension'}", f"allowed: {kinds}")
        options = _CSV if suffix == ".csv" else {}
        return _read_files(
            key, [path], BUILDERS[suffix], data_files={"train": glob.escape(str(path))}, **options
        )
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
    return _by_name(loaded)


def _read_files(key: str, files: list[Path], *where: str, **options: Any) -> dict[str, Dataset]:
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
            loaded = datasets.load_dataset(*where, **options)
    except Exception as error:
        cause = _cause(error)
        if any(sign in cause for sign in _NO_ROWS):
            refuse(key, f"{shown}: no rows", "give at least one in each file")
        for path in files if len(files) > 1 else ():  # finds the damaged one
            _read(str(path), key, None)
        if files[0].suffix.lower() in (".json", ".jsonl") and (fault := _json_fault(files[0])):
            refuse(key, f"{files[0]}, {fault}", "one JSON object a line, or one list of objects")
        cause = cause.removeprefix("Error tokenizing data. C error: ").rstrip(".")
        commas = ", with commas between values" if files[0].suffix.lower() == ".csv" else ""
        refuse(key, f"{shown} cannot be read: {cause}", f"correct or leave out that part{commas}")
    splits = _by_name(loaded)
    if options and any("__index_level_0__" in split.column_names for split in splits.values()):
        refuse(key, f"{files[0]}: rows have more fields than the header", "give every column a name")
    return splits


def _check_card(folder: Path, key: str) -> None:
    """Raise InputError if the folder's own description names files elsewhere, which `datasets` would read."""
    for file in (folder / datasets.config.REPOCARD_FILENAME, folder / datasets.config.REPOYAML_FILENAME):
        named: list[str] = []
        with contextlib.suppress(Exception):  # `datasets` raises the error for a file that cannot be read
            text = file.read_text(encoding="utf-8")
            about = DatasetCard(text).data.to_dict() if file.suffix == ".md" else yaml.safe_load(text)
            where = [config.get(name) for config in about["configs"] for name in ("data_files", "data_dir")]
            named = [path for path in _texts(where) if _is_elsewhere(path)]
        if named:
            refuse(key, f"{file} names {named[0]!r}", "allowed are files in its folder")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(one)


def _is_elsewhere(path: str) -> bool:
    return "://" in path or Path(path).is_absolute() or ".." in Path(path).parts


def _read_images(key: str, folder: Path) -> dict[str, Dataset]:
    """Return rows with `image`, and `label` from the name of the folder. Folders above may name splits."""
    try:
        with _quiet():
            return _by_name(datasets.load_dataset("imagefolder", data_dir=glob.escape(str(folder))))
    except Exception as error:
        cure = "put the images of each label in a separate folder"
        refuse(key, f"the images in {str(folder)!r} cannot be read: {_cause(error)}", cure)


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


def _json_fault(path: Path) -> str | None:
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
