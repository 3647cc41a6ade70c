"""Columns of texts and labels: check them, and encode labels as class ids.

Rows are counted from 1 as in the user's file, also after a shuffle. `loading.py` reads files;
`tasks/targets.py` makes the targets of a task from labels.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import ClassLabel, Dataset, Features, Json, LargeList, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from datasets.table import InMemoryTable, concat_tables

from gradacc_hf.data.looks_like import looks_like
from gradacc_hf.data.places import other_sheets, places
from gradacc_hf.errors import listed, refuse

pc: Any = pyarrow.compute  # the functions are made at import, so type checkers do not know them
_AS_TEXT = ContextVar("_AS_TEXT", default=False)


def require_column(dataset: Dataset, column: str, key: str) -> None:
    """Raise InputError, naming the setting `key`, unless the data set has this column."""
    if column not in dataset.column_names:
        close = get_close_matches(column, dataset.column_names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"set {key} to one of them"
        name = looks_like(dataset.column_names)
        found = f"no column {column!r}; found {listed(dataset.column_names)}"
        if others := other_sheets(dataset):
            hint += f", or set data.sheet to a sheet that was not read: {others}"
        refuse(key, found + f" (it looks like {name})" * bool(name), hint)


def require_texts(dataset: Dataset, column: str, key: str = "data.text_column") -> None:
    """Raise InputError unless this is a column of texts. `text_problem` checks the rows."""
    require_column(dataset, column, key)
    feature = dataset.features[column]
    if isinstance(feature, Value) and feature.dtype not in ("string", "large_string", "null"):
        cure = (
            f'name a column of texts, or write its numbers as strings (JSONL: {{{json.dumps(column)}: "12"}})'
        )
        refuse(key, f"column {column!r} holds {feature.dtype}, not text", cure)


def text_problem(columns: Sequence[str]) -> Callable[[Mapping[str, Any]], str | None]:
    """Return a function for `check_rows` that finds the problem of a row with texts in these columns."""

    def problem(row: Mapping[str, Any]) -> str | None:
        for column in columns:
            text = row[column]
            if text is not None and not isinstance(text, str):
                return f"column {column!r}: {type(text).__name__}, not text"
            if not text or not text.strip():
                return f"column {column!r} is empty"
        return None

    return problem


def as_list(names: str | Sequence[str] | None) -> list[str]:
    """Return names in a list, or in a text with commas between them, as a list; empty for None."""
    return re.split(r"\s*,\s*", names.strip()) if isinstance(names, str) else list(names or ())


def require_fast(tokenizer: Any, name: str) -> None:
    """Raise InputError unless the tokenizer of the model `name` returns the positions of tokens in a text."""
    if not tokenizer.is_fast:
        found = f"the tokenizer of {name} does not return the positions of tokens in a text"
        refuse("model.name", found, "name a model with a fast tokenizer (tokenizer.json)")


def problems_of_tokens(tokens: Any, texts: int, special: int, max_length: int) -> list[str]:
    """Return the problem of each row of a batch of tokenised texts, "" if tokens are left of each text.

    A slow tokenizer does not return the text of each token. With it, tokens of one text are enough.

    Args:
        tokens: The batch, as the tokenizer returns it.
        texts: Texts of a row, 1 or 2.
        special: Special tokens around them.
        max_length: The length to which rows were truncated, for the message.
    """
    problems = []
    for row, ids in enumerate(tokens["input_ids"]):
        left = len({*tokens.sequence_ids(row)} - {None}) if tokens.is_fast else texts * (len(ids) > special)
        what = "its text" if texts == 1 else f"{'both' if not left else 'one'} of its texts"
        problems.append(
            "" if left == texts else f"no token of {what} is left, truncated to data.max_length {max_length}"
        )
    return problems


def texts_of(inputs: Sequence[Any], columns: Sequence[str]) -> list[list[str]]:
    """Return the texts of each column from rows or, for one column, from texts. Raise InputError."""
    problem = text_problem(columns)
    rows = [row if isinstance(row, Mapping) else {columns[0]: row} for row in inputs]
    for number, row in enumerate(rows, start=1):
        absent = [column for column in columns if column not in row]
        if absent or (found := problem(row)):
            what = f"no {absent[0]!r} among {listed(row)}" if absent else found
            refuse(f"input {number:,}", str(what), f"give texts as {listed(columns)}")
    return [[row[column] for row in rows] for column in columns]


def encode_labels(
    train: Dataset,
    validation: Dataset,
    label_column: str,
    key: str = "data.label_column",
    skipped: list[str] | None = None,
    names: Sequence[str] = (),
) -> tuple[Dataset, Dataset, list[str]]:
    """Replace the label column by `label`, class ids 0..K−1 (int64), and return the K names in that order.

    Labels are strings, integers, booleans or a ClassLabel. A ClassLabel keeps its names and their order;
    other labels are sorted, integers by size, also where they are text.

    Args:
        train: Training rows.
        validation: Validation rows.
        label_column: The column of the labels.
        key: The setting that messages name.
        skipped: Receives a line about each validation row whose label is not in training; these rows are left
            out. None: such a row is an error.
        names: The names in their order, if they are known. No training row has another label.

    Raises:
        InputError: For a row without label, a single class, numbers with a fraction, or an unknown validation
            label.
    """
    for split in (train, validation):
        require_column(split, label_column, key)
    texts, other = _label_texts(train, label_column, key), _label_texts(validation, label_column, key)
    present, feature = pc.unique(texts).to_pylist(), train.features[label_column]
    if len(present) < 2 and not names:
        refuse(key, f"one class only, {present[0]!r}, in the training rows", "at least two")
    bare: dict[str, str] = {}
    for label in present:
        if label != (other_label := bare.setdefault(label.strip(), label)):
            refuse(
                key, f"labels {other_label!r} and {label!r} differ in white space only", "write them alike"
            )
    of_data = list(feature.names) if isinstance(feature, ClassLabel) else in_order(present)
    names = list(names) or of_data
    known = pa.array(names, pa.large_string())
    ids, other_ids = pc.index_in(texts, known), pc.index_in(other, known)
    if other_ids.null_count:
        unknown = in_file_order(validation, np.flatnonzero(other_ids.is_null()))
        where = places(validation, file_rows(validation)[unknown], "validation")
        labels = [
            f"label {other[row].as_py()!r} of {place}" for row, place in zip(unknown, where, strict=True)
        ]
        validation = drop_unknown(validation, unknown, labels, key, skipped)
        other_ids = other_ids.drop_null()
    return _with_ids(train, label_column, ids), _with_ids(validation, label_column, other_ids), names


def in_order(labels: Sequence[str]) -> list[str]:
    """Return labels sorted: by size if all of them are integers without leading zeros, else as text."""
    by_size = all(re.fullmatch(r"0|-?[1-9][0-9]*", label) for label in labels) and not _AS_TEXT.get()
    return sorted(labels, key=int if by_size else None)


@contextmanager
def integers_as_text() -> Iterator[None]:
    """Sort labels as text in this block, also integers, as version 0.1.0 sorted strings of a JSONL file."""
    token = _AS_TEXT.set(True)
    try:
        yield
    finally:
        _AS_TEXT.reset(token)


def drop_unknown(
    validation: Dataset,
    rows: Sequence[int] | np.ndarray,
    labels: Sequence[str],
    key: str,
    skipped: list[str] | None,
) -> Dataset:
    """Return the validation rows without `rows`, whose `labels` are in no training row.

    A line about each goes to `skipped`. Raise InputError if `skipped` is None, or if no row is left.
    """
    found = [f"{label} is in no training row" for label in labels]
    if skipped is None:
        refuse(key, found[0], "add such rows to data.train, or leave them out: --data.on_bad_row skip")
    if len(rows) == len(validation):
        refuse(
            key, f"none of the {len(validation):,} validation rows can be used ({found[0]}, …)", "give others"
        )
    skipped += found
    return select_rows(validation, np.setdiff1d(np.arange(len(validation)), rows).tolist())


def _label_texts(dataset: Dataset, column: str, key: str) -> pa.Array:
    """Return every row's label as a string, so that 1, 1.0 and "1" are one class."""
    values, feature = dataset.data.column(column), dataset.features[column]
    if isinstance(feature, ClassLabel):  # −1 marks rows whose label is withheld
        values = pc.if_else(pc.less(values, 0), None, values)
    _refuse_null(dataset, column, key, pc.is_null(values))
    values = pa.concat_arrays(values.chunks).take(pa.array(file_rows(dataset)))
    if isinstance(feature, Json):
        return pa.array(_mixed_as_text(dataset, column, key), pa.large_string())
    if isinstance(feature, ClassLabel):
        return pa.array(feature.names, pa.large_string()).take(values)
    if pa.types.is_boolean(values.type):
        return pc.if_else(values, pa.scalar("True", pa.large_string()), "False")
    if pa.types.is_floating(values.type):
        whole = pc.and_(pc.less(pc.abs(values), 2.0**53), pc.equal(values, pc.floor(values)))
        if odd := in_file_order(dataset, np.flatnonzero(pc.invert(whole))):
            row = odd[0]
            found = f"column {column!r}, {_row(dataset, row)}: {values[row].as_py()}"
            refuse(
                key,
                found,
                "labels are classes, as strings or integers; to predict numbers: "
                "recipes/text_classification.py with data.problem regression",
            )
        values = values.cast(pa.int64())
    elif not (
        isinstance(feature, Value) and (pa.types.is_integer(values.type) or feature.dtype.endswith("string"))
    ):
        found = f"column {column!r} holds {getattr(feature, 'dtype', None) or type(feature).__name__}"
        several = "; for several labels a row: recipes/text_classification.py with data.problem multi_label"
        cure = "labels are all strings, or all integers, or all booleans"
        refuse(key, found, cure + several * is_list(feature))
    return values.cast(pa.large_string())


def _mixed_as_text(dataset: Dataset, column: str, key: str) -> list[str]:
    """Return labels of several types as text: 1 and 1.0 are "1"."""
    values = dataset[column][:]
    odd = [row for row, value in enumerate(values) if isinstance(value, list | dict)]
    if odd:
        row = in_file_order(dataset, odd)[0]
        found = f"column {column!r}, {_row(dataset, row)}: {values[row]!r:.40}"
        refuse(key, found, "labels are text or numbers")
    return [
        f"{value:.0f}" if isinstance(value, float) and value.is_integer() else str(value) for value in values
    ]


def _with_ids(dataset: Dataset, column: str, ids: pa.Array) -> Dataset:
    return with_label(dataset, column, ids.to_numpy(zero_copy_only=False).astype(np.int64))


def is_list(feature: Any) -> bool:
    """Whether this is the type of a column of lists."""
    return isinstance(feature, List | LargeList | list)


def class_names(dataset: Dataset, column: str) -> list[str] | None:
    """Return the names of the class ids in a column of lists; None if the column has no class ids."""
    element = dataset.features[column].feature
    return list(element.names) if isinstance(element, ClassLabel) else None


def labels_as_text(labels: Any, names: list[str] | None) -> list[str]:
    """Return a row's labels as strings: class ids by their `names`, ids without a name as numbers."""
    known = range(len(names or ()))
    return [names[label] if names and label in known else str(label) for label in labels or ()]


def with_label(dataset: Dataset, column: str, labels: np.ndarray) -> Dataset:
    """Replace the column by `label`: numbers of shape (rows,), or lists of numbers, (rows, numbers)."""
    rest = dataset.remove_columns([name for name in dataset.column_names if name in (column, "label")])
    return with_column(rest, "label", labels)


def with_column(dataset: Dataset, name: str, values: np.ndarray) -> Dataset:
    """Add a column of numbers or truth values: (rows,), or (rows, width) for lists.

    `add_column` would copy a shuffled data set and lose the row numbers of the file.
    """
    whole = np.zeros((len(dataset.data), *values.shape[1:]), values.dtype)
    whole[file_rows(dataset)] = values
    column, feature = pa.array(whole.ravel()), Value(str(values.dtype))
    if values.ndim == 2:
        width = values.shape[1]
        column, feature = pa.FixedSizeListArray.from_arrays(column, width), List(feature, length=width)
    info = dataset.info.copy()
    info.features = Features({**dataset.features, name: feature})
    return Dataset(
        concat_tables([dataset.data, InMemoryTable.from_arrays([column], names=[name])], axis=1),
        info=info,
        split=dataset.split,
        indices_table=dataset._indices,
        fingerprint=Hasher.hash((dataset._fingerprint, name, whole.tobytes())),
    )


def replace_columns(
    rows: Dataset, removed: Collection[str], added: Mapping[str, tuple[Sequence[Any], Any]]
) -> Dataset:
    """Return rows, in the order of the file, with columns removed, and others added or replaced.

    `added` has the values and the feature of each column by name.
    """
    values = {name: of_column for name, (of_column, _) in added.items()}
    found = Dataset.from_dict(values, Features({name: feature for name, (_, feature) in added.items()}))
    rest = rows.remove_columns([name for name in rows.column_names if name in removed or name in added])
    found = concatenate_datasets([rest, found], axis=1) if rest.column_names else found
    found.info.download_checksums = rows.info.download_checksums  # the files of the rows
    return found


def list_lengths(dataset: Dataset | Sequence[Any], column: str) -> np.ndarray:
    """Return the length of the list in each row. Lists of a data set are not read into Python."""
    if not isinstance(dataset, Dataset):
        return np.array([len(row[column]) for row in dataset])
    lengths = pc.list_value_length(dataset.data.column(column))
    return lengths.to_numpy()[file_rows(dataset)].astype(np.int64)


def select_rows(dataset: Dataset, rows: Sequence[int]) -> Dataset:
    """Select rows and keep their numbers in the file, which `Dataset.select` loses for a slice."""
    numbers = pa.array(file_rows(dataset)[np.asarray(rows, np.int64)], pa.uint64())
    return Dataset(
        dataset.data,
        info=dataset.info.copy(),
        split=dataset.split,
        indices_table=InMemoryTable.from_arrays([numbers], names=["indices"]),
        fingerprint=Hasher.hash((dataset._fingerprint, numbers.to_numpy().tobytes())),
    )


def file_rows(dataset: Dataset) -> np.ndarray:
    """Return the number in the file, from 0, of each row, also after a shuffle."""
    indices = dataset._indices
    return np.arange(len(dataset)) if indices is None else indices.column(0).to_numpy()


def in_file_order(dataset: Dataset, rows: Sequence[int] | np.ndarray) -> list[int]:
    """Return rows of a data set in the order in which the file has them."""
    return sorted(map(int, rows), key=file_rows(dataset).__getitem__)


def _row(dataset: Dataset, row: int) -> str:
    return places(dataset, [file_rows(dataset)[row]], "")[0]


def _refuse_null(dataset: Dataset, column: str, key: str, is_null: pa.ChunkedArray) -> None:
    empty = in_file_order(dataset, np.flatnonzero(is_null.to_numpy()[file_rows(dataset)]))
    if empty:
        found = f"column {column!r}, {_row(dataset, empty[0])} is empty, the first of {len(empty):,}"
        refuse(key, found, "fill them in or remove them")
