"""Columns of texts and labels: what a classifier needs of them, and one line for those that are not so.

Rows are counted from 1 as in the user's file, also after a shuffle. Reading files is `data.py`'s.
"""

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import ClassLabel, Dataset, Features, Value
from datasets.fingerprint import Hasher
from datasets.table import InMemoryTable, concat_tables

from gradacc_hf.errors import listed, refuse

pc: Any = pyarrow.compute  # its functions are made at import: type checkers do not see them


def require_column(dataset: Dataset, column: str, key: str) -> None:
    """Raise BadInput, naming the setting `key`, unless the data set has this column."""
    if column not in dataset.column_names:
        close = get_close_matches(column, dataset.column_names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"set {key} to one of them"
        refuse(key, f"no column {column!r}; found {listed(dataset.column_names)}", hint)


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
        refuse(key, f"column {column!r} holds {feature.dtype}, not text", cure)
    for row, value in enumerate(dataset[column] if not isinstance(feature, Value) else ()):
        if not isinstance(value, str):
            found = f"column {column!r}, {_row(dataset, row)}: {type(value).__name__}, not text"
            refuse(key, found, "write every value as one string")


def texts_of(inputs: Sequence[Any], column: str, key: str = "data.text_column") -> list[str]:
    """The texts of what a model is asked: each input itself or, of a row, its `column`. Raises BadInput."""
    texts = []
    for one in inputs:
        if isinstance(one, Mapping) and column not in one:
            cure = f"the run read its texts from there ({key}): rename it"
            refuse("input", f"no column {column!r}; found {listed(one)}", cure)
        text = one[column] if isinstance(one, Mapping) else one
        if not isinstance(text, str):
            refuse("input", f"column {column!r} holds {json.dumps(text)}, not text", "write it as a string")
        texts.append(text)
    return texts


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
        refuse(key, f"one class only, {present[0]!r}, in the training rows", "at least two")
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
        refuse(key, found, "add such rows to data.train, or take it out of data.validation")
    return _with_label(train, label_column, ids), _with_label(validation, label_column, other_ids), names


def _label_texts(dataset: Dataset, column: str, key: str) -> pa.Array:
    """Every row's label as a string, so that 1, 1.0 and "1" are one class."""
    values, feature = dataset.data.column(column), dataset.features[column]
    if isinstance(feature, ClassLabel):  # −1 is how data sets mark rows whose label is withheld
        values = pc.if_else(pc.less(values, 0), None, values)
    _refuse_null(dataset, column, key, pc.is_null(values))
    values = pa.concat_arrays(values.chunks).take(pa.array(file_rows(dataset)))
    if isinstance(feature, ClassLabel):
        return pa.array(feature.names, pa.large_string()).take(values)
    if pa.types.is_boolean(values.type):
        return pc.if_else(values, pa.scalar("True", pa.large_string()), "False")
    if pa.types.is_floating(values.type):
        whole = pc.and_(pc.less(pc.abs(values), 2.0**53), pc.equal(values, pc.floor(values)))
        row = pc.index(whole, False).as_py()
        if row >= 0:
            found = f"column {column!r}, {_row(dataset, row)}: {values[row].as_py()}"
            refuse(
                key,
                found,
                "labels are classes, as strings or integers; regression is not what this recipe does",
            )
        values = values.cast(pa.int64())
    elif not (
        isinstance(feature, Value) and (pa.types.is_integer(values.type) or feature.dtype.endswith("string"))
    ):
        found = f"column {column!r} holds {getattr(feature, 'dtype', None) or type(feature).__name__}"
        refuse(key, found, "labels are all strings, or all integers, or all booleans")
    return values.cast(pa.large_string())


def _with_label(dataset: Dataset, column: str, ids: pa.Array) -> Dataset:
    """`add_column` would copy a shuffled data set, and lose which row of the file each row is."""
    rest = dataset.remove_columns([name for name in dataset.column_names if name in (column, "label")])
    whole = np.full(len(dataset.data), -1)
    whole[file_rows(dataset)] = ids.to_numpy(zero_copy_only=False)
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


def file_rows(dataset: Dataset) -> np.ndarray:
    indices = dataset._indices  # row numbers must be those of the file, also after a shuffle
    return np.arange(len(dataset)) if indices is None else indices.column(0).to_numpy()


def _row(dataset: Dataset, row: int) -> str:
    return f"row {file_rows(dataset)[row] + 1:,}"


def _refuse_null(dataset: Dataset, column: str, key: str, is_null: pa.ChunkedArray) -> None:
    empty = np.flatnonzero(is_null.to_numpy()[file_rows(dataset)])
    if len(empty):
        found = f"column {column!r}, {_row(dataset, int(empty[0]))} is empty, the first of {len(empty):,}"
        refuse(key, found, "fill them in or take them out")
