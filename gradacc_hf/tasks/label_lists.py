"""Several labels a row, from the forms of tables: a column for each label, separated text, lists as text.

`targets.py` makes the targets of a model from lists of labels.
"""

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, List, Value

from gradacc_hf.data.columns import replace_columns, require_column
from gradacc_hf.data.files import FAULT
from gradacc_hf.errors import listed, refuse

SEPARATORS = (";", "|", ",")
"""Separators of labels in a text; the first that the training rows have is used."""
_TRUE, _FALSE = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")


@dataclass
class LabelLists:
    """Converts rows to lists of labels. The training rows, converted first, decide the separator.

    column: the column of the labels.
    columns: the columns of one label each; none if `column` has the labels.
    separator: between the labels of a text. None: found in the rows.
    """

    column: str
    columns: Sequence[str] = ()
    separator: str | None = None

    def __call__(self, rows: Dataset) -> tuple[Dataset, str | None]:
        """Return rows with lists of labels, and the form that the labels had; None if the rows stay."""
        if self.columns:
            return self._from_columns(rows), f"one column for each label: {listed(self.columns)}"
        if self.column not in rows.column_names:
            if len(found := [name for name in rows.column_names if _is_of_truth(rows, name)]) > 1:
                cure = f"for one column a label: --data.label_columns {','.join(found)}"
                refuse(
                    "data.label_column", f"no column {self.column!r}; found {listed(rows.column_names)}", cure
                )
            return rows, None
        if not _is_text(rows, self.column):
            return rows, None
        texts = [text.strip() for text in rows[self.column] if text]
        if self.separator is None and texts and all(text[:1] == "[" for text in texts):
            return self._from_texts(rows, _list), f"lists written as text in {self.column!r}"
        if self.separator is None:
            self.separator = next((sign for sign in SEPARATORS if any(sign in text for text in texts)), None)
        if self.separator is None:
            return rows, None
        how = f"labels in {self.column!r} separated by {self.separator!r} (data.label_separator)"
        return self._from_texts(rows, self._split), how

    def _split(self, text: str) -> list[str]:
        return [label.strip() for label in text.split(self.separator) if label.strip()]

    def _from_texts(self, rows: Dataset, read: Any) -> Dataset:
        found: list[list[Any] | None] = []
        faults: list[str | None] = []
        for text in rows[self.column]:
            labels = read(text) if text else None
            found.append(labels and list(dict.fromkeys(labels)) if read is not _list else labels)
            faults.append(
                f"column {self.column!r} is {text!r:.40}, not a list" if text and labels is None else None
            )
        numbers = all(type(label) in (int, bool) for labels in found for label in labels or ())
        if not numbers:
            found = [labels and [*map(str, labels)] for labels in found]
        kind = Value("int64" if numbers and any(found) else "string")
        return replace_columns(rows, (), {self.column: (found, List(kind)), FAULT: (faults, Value("string"))})

    def _from_columns(self, rows: Dataset) -> Dataset:
        for name in self.columns:
            require_column(rows, name, "data.label_columns")
        found, faults = [], []
        for values in zip(*(rows[name] for name in self.columns), strict=True):
            texts = [str(value).strip().lower() for value in values]
            odd = next((at for at, text in enumerate(texts) if text not in _TRUE + _FALSE), None)
            fault = None if odd is None else f"column {self.columns[odd]!r} is {values[odd]!r}, not 0 or 1"
            found.append([] if fault else [at for at, text in enumerate(texts) if text in _TRUE])
            faults.append(fault)
        labels = List(ClassLabel(names=list(self.columns)))
        added = {self.column: (found, labels), FAULT: (faults, Value("string"))}
        return replace_columns(rows, self.columns, added)


def _list(text: str) -> list[Any] | None:
    """Return a list that is written as in JSON or Python; None for any other text."""
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        is_list = isinstance(found, list) and all(isinstance(one, str | int | bool) for one in found)
        return found if is_list else None
    return None


def _is_text(rows: Dataset, column: str) -> bool:
    feature = rows.features[column]
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _is_of_truth(rows: Dataset, column: str) -> bool:
    """Whether all values of a column are 0 or 1, or false or true."""
    values = (
        {str(value).strip().lower() for value in rows.unique(column)} if _is_value(rows, column) else {""}
    )
    return bool(values) and values <= {*_TRUE, *_FALSE}


def _is_value(rows: Dataset, column: str) -> bool:
    feature = rows.features[column]
    return isinstance(feature, Value) and feature.dtype != "null"
