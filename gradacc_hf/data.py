"""Their data: a file, a folder or a Hub name → train and validation as `datasets.Dataset`.

`datasets` reads; what is added is a validation set where there is none, labels as class ids, and one line for
whoever gave a file that cannot be read (BadInput). Texts are tokenised by the recipe.
"""

import codecs
import contextlib
import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import datasets
import datasets.config
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import ClassLabel, Dataset, Features, Value
from datasets.fingerprint import Hasher
from datasets.table import CastError, InMemoryTable, concat_tables

from . import embedded
from .errors import BadInput

pc: Any = pyarrow.compute  # its functions are made at import: type checkers do not see them
BUILDERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
VALIDATION_SPLITS = ("validation", "valid", "val", "dev", "test")  # the first that there is
_CSV: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}  # "None" and "NA" are texts, not nulls

_NO_ROWS = ("corresponds to no data", "No columns to parse", "BatchSize must be")  # so says each builder


@dataclass(frozen=True)
class Splits:
    """What a run trains and evaluates on."""

    train: Dataset
    validation: Dataset
    held_out: bool  # validation was taken out of the training rows
    source: str  # one sentence: where validation came from


def load_data(
    train: str,
    validation: str | None = None,
    *,
    validation_fraction: float,
    seed: int,
    config_name: str | None = None,
    label_column: str | None = None,
) -> Splits:
    """Read `data.train` and `data.validation`: a CSV, JSON, JSONL or Parquet file, a folder of such files,
    a Hub name or `embedded:docstrings`; `validation` may also name a split of `train`.

    Without `validation`: the first of VALIDATION_SPLITS that `train` has, else `validation_fraction` of the
    rows (at least 1), drawn by `seed` alone; the first row of every label in `label_column` is not drawn.
    `config_name` is the Hub's, for data sets with several.
    """
    splits = _read(train, "data.train", config_name)
    if "train" not in splits:
        _refuse("data.train", f"{train!r} has no train split; found {_names(splits)}", "name the file itself")
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
            _refuse(key, f"{given!r} has no rows", "give at least one")
    return Splits(rows, held, held_out, source)


def _hold_out(rows: Dataset, fraction: float, seed: int, label_column: str | None) -> tuple[Dataset, Dataset]:
    """What is left, and a `fraction` of the rows, drawn by `seed`; of no label the first row is drawn."""
    number, kept = max(1, round(len(rows) * fraction)), np.zeros(len(rows), bool)
    if label_column in rows.column_names:
        first: dict[str, int] = {}
        for row, label in enumerate(rows[label_column]):
            first.setdefault(str(label), row)
        kept[list(first.values())] = True
    shuffled = rows.shuffle(seed=seed, keep_in_memory=True)
    drawn = np.flatnonzero(~kept[_file_rows(shuffled)])[:number]
    if not 0 < fraction < 1 or not len(drawn) or number >= len(rows):
        found = f"{fraction:g} of {len(rows):,} rows leaves nothing to train on or to hold out"
        _refuse("data.validation_fraction", found, "between 0 and 1, or set data.validation")
    left = np.setdiff1d(np.arange(len(rows)), drawn)
    return shuffled.select(left), shuffled.select(drawn)


def require_column(dataset: Dataset, column: str, key: str) -> None:
    """Raise BadInput, naming the setting `key`, unless the data set has this column."""
    if column not in dataset.column_names:
        close = get_close_matches(column, dataset.column_names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"set {key} to one of them"
        _refuse(key, f"no column {column!r}; found {_names(dataset.column_names)}", hint)


def check_texts(dataset: Dataset, column: str, key: str = "data.text_column") -> None:
    """Raise BadInput unless every row of the column is a string; rows count from 1, as in the file."""
    require_column(dataset, column, key)
    feature = dataset.features[column]
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        _refuse_null(dataset, column, key, pc.is_null(dataset.data.column(column)))
    elif isinstance(feature, Value):
        cure = (
            f'name a column of texts, or write its numbers as strings (JSONL: {{{json.dumps(column)}: "12"}})'
        )
        _refuse(key, f"column {column!r} holds {feature.dtype}, not text", cure)
    for row, value in enumerate(dataset[column] if not isinstance(feature, Value) else ()):
        if not isinstance(value, str):
            found = f"column {column!r}, {_row(dataset, row)}: {type(value).__name__}, not text"
            _refuse(key, found, "write every value as one string")


def encode_labels(
    train: Dataset, validation: Dataset, label_column: str, key: str = "data.label_column"
) -> tuple[Dataset, Dataset, list[str]]:
    """Replace the label column by `label`, class ids 0..K−1 (int64), and give the K names in that order.

    Labels are strings, integers, booleans or a ClassLabel, which keeps its own names and order; others are
    sorted, integers by size. Raises BadInput for a row without label, one class only, numbers with a
    fraction, and a validation label that training rows (or the ClassLabel) do not have.
    """
    for split in (train, validation):
        require_column(split, label_column, key)
    texts, other = _label_texts(train, label_column, key), _label_texts(validation, label_column, key)
    present, feature = pc.unique(texts).to_pylist(), train.features[label_column]
    if len(present) < 2:
        _refuse(key, f"one class only, {present[0]!r}, in the training rows", "at least two")
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    else:
        is_text = isinstance(feature, Value) and feature.dtype in ("string", "large_string", "bool")
        names = sorted(present, key=None if is_text else int)
    known = pa.array(names, pa.large_string())
    ids, other_ids = pc.index_in(texts, known), pc.index_in(other, known)
    if other_ids.null_count:
        row = pc.index(pc.is_null(other_ids), True).as_py()
        found = f"label {other[row].as_py()!r} of validation {_row(validation, row)} is in no training row"
        _refuse(key, found, "add such rows to data.train, or take it out of data.validation")
    return _with_label(train, label_column, ids), _with_label(validation, label_column, other_ids), names


def _label_texts(dataset: Dataset, column: str, key: str) -> pa.Array:
    """Every row's label as a string, so that 1, 1.0 and "1" are one class."""
    values, feature = dataset.data.column(column), dataset.features[column]
    if isinstance(feature, ClassLabel):  # −1 is how data sets mark rows whose label is withheld
        values = pc.if_else(pc.less(values, 0), None, values)
    _refuse_null(dataset, column, key, pc.is_null(values))
    values = pa.concat_arrays(values.chunks).take(pa.array(_file_rows(dataset)))
    if isinstance(feature, ClassLabel):
        return pa.array(feature.names, pa.large_string()).take(values)
    if pa.types.is_boolean(values.type):
        return pc.if_else(values, pa.scalar("True", pa.large_string()), "False")
    if pa.types.is_floating(values.type):
        whole = pc.and_(pc.less(pc.abs(values), 2.0**53), pc.equal(values, pc.floor(values)))
        row = pc.index(whole, False).as_py()
        if row >= 0:
            found = f"column {column!r}, {_row(dataset, row)}: {values[row].as_py()}"
            _refuse(
                key,
                found,
                "labels are classes, as strings or integers; regression is not what this recipe does",
            )
        values = values.cast(pa.int64())
    elif not (
        isinstance(feature, Value) and (pa.types.is_integer(values.type) or feature.dtype.endswith("string"))
    ):
        found = f"column {column!r} holds {getattr(feature, 'dtype', None) or type(feature).__name__}"
        _refuse(key, found, "labels are all strings, or all integers, or all booleans")
    return values.cast(pa.large_string())


def _with_label(dataset: Dataset, column: str, ids: pa.Array) -> Dataset:
    """`add_column` would copy a shuffled data set, and lose which row of the file each row is."""
    rest = dataset.remove_columns([name for name in dataset.column_names if name in (column, "label")])
    whole = np.full(len(dataset.data), -1)
    whole[_file_rows(dataset)] = ids.to_numpy(zero_copy_only=False)
    labels = InMemoryTable.from_arrays([pa.array(whole)], names=["label"])
    info = rest.info.copy()
    info.features = Features({**rest.features, "label": Value("int64")})
    return Dataset(
        concat_tables([rest.data, labels], axis=1),
        info=info,
        split=rest.split,
        indices_table=rest._indices,
        fingerprint=Hasher.hash((rest._fingerprint, whole.tobytes())),
    )


def _file_rows(dataset: Dataset) -> np.ndarray:
    indices = dataset._indices  # row numbers must be those of the file, also after a shuffle
    return np.arange(len(dataset)) if indices is None else indices.column(0).to_numpy()


def _row(dataset: Dataset, row: int) -> str:
    return f"row {_file_rows(dataset)[row] + 1:,}"


def _refuse_null(dataset: Dataset, column: str, key: str, is_null: pa.ChunkedArray) -> None:
    empty = np.flatnonzero(is_null.to_numpy()[_file_rows(dataset)])
    if len(empty):
        found = f"column {column!r}, {_row(dataset, int(empty[0]))} is empty, the first of {len(empty):,}"
        _refuse(key, found, "fill them in or take them out")


def _read(given: str, key: str, config_name: str | None) -> dict[str, Dataset]:
    if given.startswith("embedded:"):
        if given != "embedded:docstrings":
            _refuse(key, f"no {given!r}", "the embedded data is embedded:docstrings")
        return dict(zip(("train", "validation"), embedded.docstring_modules(), strict=True))
    path, kinds = Path(given).expanduser(), _names(BUILDERS)
    if path.is_dir() and given:
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in BUILDERS and p.is_file())
        if not files:
            _refuse(key, f"no data file in {given!r}", f"allowed: {kinds}")
        options = _CSV if {p.suffix.lower() for p in files} == {".csv"} else {}
        return _read_files(key, files, str(path), **options)
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix not in BUILDERS:
            _refuse(key, f"{given!r} is a {suffix or 'file without extension'}", f"allowed: {kinds}")
        options = _CSV if suffix == ".csv" else {}
        return _read_files(
            key, [path], BUILDERS[suffix], data_files={"train": glob.escape(str(path))}, **options
        )
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = get_close_matches(path.name, siblings, n=1)
    hint = f"did you mean {str(path.parent / close[0])!r}?" if close else f"give a {kinds} file, a folder"
    if suffix in BUILDERS or given.count("/") > 1 or given[:1] in "./~":
        _refuse(key, f"no file or folder {given!r}", hint)
    found = embedded.hub_has(given, "dataset")
    try:
        with contextlib.nullcontext() if found else _offline():
            loaded = datasets.load_dataset(given, config_name)
    except Exception as error:
        if found:
            _refuse(key, f"{given!r} on the Hub cannot be read: {_cause(error)}", "see data.config_name")
        where = "is not on the Hub" if found is False else "is not cached here, and the Hub does not answer"
        _refuse(
            key,
            f"{given!r} is no file or folder and {where}",
            hint + ("" if close else " or embedded:docstrings"),
        )
    return _by_name(loaded)


def _read_files(key: str, files: list[Path], *where: str, **options: Any) -> dict[str, Dataset]:
    shown = _names(files[:3])
    try:
        for path in files:
            if path.stat().st_size == 0:
                _refuse(key, f"{path} is empty", "give at least one row")
            if path.suffix.lower() != ".parquet":
                _check_utf8(path, key)
    except OSError as error:
        _refuse(key, f"cannot read {error.filename or shown}: {error.strerror}", "give a file you may read")
    try:
        with _quiet():
            loaded = datasets.load_dataset(*where, **options)
    except Exception as error:
        cause = _cause(error)
        if any(sign in cause for sign in _NO_ROWS):
            _refuse(key, f"{shown}: no rows", "give at least one in each file")
        for path in files if len(files) > 1 else ():  # which of them?
            _read(str(path), key, None)
        if files[0].suffix.lower() in (".json", ".jsonl") and (fault := _json_fault(files[0])):
            _refuse(key, f"{files[0]}, {fault}", "one JSON object a line, or one list of objects")
        cause = cause.removeprefix("Error tokenizing data. C error: ").rstrip(".")
        _refuse(key, f"{shown} cannot be read: {cause}", "mend or leave out that part")
    splits = _by_name(loaded)
    if options and any("__index_level_0__" in split.column_names for split in splits.values()):
        _refuse(key, f"{files[0]}: rows have more fields than the header", "give every column a name")
    return splits


def _by_name(loaded: Any) -> dict[str, Dataset]:
    return {str(name): split for name, split in loaded.items()}


def _check_utf8(path: Path, key: str) -> None:
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
                _refuse(key, found, f"save it as UTF-8 (iconv -f latin1 -t utf8 {path.name})")
            if not block:
                return
            start, line = start + len(block), line + block.count(b"\n")


def _json_fault(path: Path) -> str | None:
    """The first line that is not JSON, or not an object; None when that is not what is wrong."""
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
        tables = f"{_names(error.table_column_names)} and {_names(error.requested_column_names)}"
        return f"its files have different columns, {tables}"
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no log lines about a file of which BadInput tells."""
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
    """As HF_HUB_OFFLINE=1: what is cached loads at once, instead of after 20 s of retries a file."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _names(names: Any) -> str:
    return ", ".join(map(str, names))


def _refuse(key: str, found: str, allowed: str) -> NoReturn:
    raise BadInput(f"{key}: {found}; {allowed}") from None
