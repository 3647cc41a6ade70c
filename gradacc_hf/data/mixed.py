"""Columns whose values have several types, in one file or over several files.

`datasets` reads "1" beside 1 as a number, and a text such as 2020-01-01 as a date. Here values stay as they
are in the files: a column of one type has that type, and any other column holds JSON.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Json, Value, concatenate_datasets
from datasets.table import InMemoryTable

from gradacc_hf.errors import listed, refuse

pc: Any = pyarrow.compute  # the functions are made at import, so type checkers do not know them
KINDS = {str: "texts", bool: "truth values", int: "numbers", float: "numbers", type(None): "missing"}


def is_exact(dataset: Dataset) -> bool:
    """Whether the values of a JSON file are as in the file.

    Dates were texts. JSON that is not an object may have been a text, such as "1". Large numbers may have
    been integers.
    """
    leaves = (leaf for name in dataset.column_names for leaf in _leaves(dataset.data.column(name)))
    return all(map(_is_exact, leaves))


def _leaves(column: Any) -> Iterator[Any]:
    """Yield the arrays of values in a column, also inside lists and structures."""
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        if pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
            yield from _leaves(chunk.flatten())
        elif pa.types.is_struct(chunk.type):
            for values in chunk.flatten():
                yield from _leaves(values)
        else:
            yield chunk


def _is_exact(values: Any) -> bool:
    if isinstance(values.type, pa.JsonType):
        return all(text is None or text[:1] == "{" for text in values.storage.to_pylist())
    if pa.types.is_floating(values.type):
        return not pc.any(pc.greater_equal(pc.abs(values), 2.0**53)).as_py()
    return not pa.types.is_temporal(values.type)


def read_mixed_json(path: Path) -> Dataset:
    """Return the rows of a JSON file, read into memory with its values unchanged.

    NaN is a missing value, and integers of more than 64 bits are text.
    """
    text = path.read_text(encoding="utf-8-sig")
    texts = [text] if text.lstrip().startswith("[") else filter(str.strip, text.split("\n"))
    rows = [json.loads(one, parse_constant=_constant, parse_int=_integer) for one in texts]
    rows = rows[0] if rows and isinstance(rows[0], list) else rows
    rows = [row if isinstance(row, dict) else {"text": row} for row in rows]
    names = dict.fromkeys(name for row in rows for name in row)
    return dataset_of({name: as_column([row.get(name) for row in rows]) for name in names})


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)


def _integer(digits: str) -> int | str:
    return number if abs(number := int(digits)) < 2**63 else digits


def as_column(values: Sequence[Any]) -> tuple[pa.Array, Any]:
    """Return values as an Arrow array with its feature. JSON if no type of Arrow holds them unchanged."""
    try:
        column = pa.array(values)
        if column.to_pylist() == list(values):
            return column, Features.from_arrow_schema(pa.schema([("c", column.type)]))["c"]
    except pa.ArrowException:
        pass
    texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return pa.array(texts, pa.json_()), Json()


def dataset_of(columns: dict[str, tuple[Any, Any]]) -> Dataset:
    """Return a data set of columns, each an Arrow array with its feature."""
    features = Features({name: feature for name, (_, feature) in columns.items()})
    table = pa.table({name: column for name, (column, _) in columns.items()})
    return Dataset(InMemoryTable(table), info=DatasetInfo(features=features))


def mixed_columns(*splits: Dataset) -> dict[str, str]:
    """Return the columns whose values have several types that become one, with a line about each."""
    lines = {}
    for name in dict.fromkeys(name for split in splits for name in split.column_names):
        kinds: Counter[str] = Counter()
        for split in (split for split in splits if _has_scalars(split, name)):
            kinds.update(KINDS.get(type(value), "lists or objects") for value in split[name])
        if kinds.keys() & {*KINDS.values()} - {"missing"}:
            counts = listed(f"{number:,} {kind}" for kind, number in kinds.items())
            lines[name] = f'column {name!r} has {counts}; 1 and "1" are one value'
    return lines


def _has_scalars(split: Dataset, name: str) -> bool:
    """Whether a column holds JSON that is neither a list nor an object."""
    if not isinstance(split.features.get(name), Json):
        return False
    texts = (text for leaf in _leaves(split.data.column(name)) for text in leaf.storage.to_pylist())
    return any(text is not None and text[:1] not in "{[" for text in texts)


def joined(files: Sequence[tuple[Path, Dataset]], key: str) -> tuple[Dataset, dict[str, str]]:
    """Return the rows of several files, and a line about each column that not all of them have.

    Raises:
        InputError: If a column has class ids in one file and other values in another.
    """
    if len(files) == 1:
        return files[0][1], {}
    names = dict.fromkeys(name for _, rows in files for name in rows.column_names)
    parts, lines = [rows for _, rows in files], {}
    for name in names:
        if absent := [path.name for path, rows in files if name not in rows.column_names]:
            lines[name] = f"column {name!r} is empty for the rows of {listed(absent)}, which lack it"
        kinds = {path: rows.features[name] for path, rows in files if name in rows.column_names}
        if len({repr(kind) for kind in kinds.values()}) > 1:
            parts = _in_one_type(parts, name, kinds, key)
    return concatenate_datasets(parts), lines


def _in_one_type(parts: list[Dataset], name: str, kinds: dict[Path, Any], key: str) -> list[Dataset]:
    """Return the files with a column in a type that all of them can have."""
    found = [kind for kind in kinds.values() if kind != Value("null")]
    if any(isinstance(kind, ClassLabel) for kind in found):
        shown = listed(f"{getattr(kind, 'names', None) or kind} in {path}" for path, kind in kinds.items())
        refuse(key, f"column {name!r} has classes of different names: {shown}", "write labels as text")
    wanted = found[0] if len({repr(kind) for kind in found}) == 1 else None
    for prefix, common in (
        ("int", "int64"),
        (("int", "float"), "float64"),
        (("string", "large"), "large_string"),
    ):
        if wanted is None and all(
            isinstance(kind, Value) and kind.dtype.startswith(prefix) for kind in found
        ):
            wanted = Value(common)
    return [
        part
        if name not in part.column_names
        else part.cast_column(name, wanted)
        if wanted is not None
        else _replaced(part, name, part[name][:])
        for part in parts
    ]


def _replaced(part: Dataset, name: str, values: list[Any]) -> Dataset:
    texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    columns = {
        other: (part.data.column(other), part.features[other]) for other in part.column_names if other != name
    }
    return dataset_of({**columns, name: (pa.chunked_array([pa.array(texts, pa.json_())]), Json())})
