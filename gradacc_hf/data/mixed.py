"""Columns whose values have several types, in one file or over several files.

`datasets` reads "1" beside 1 as a number, and a text such as 2020-01-01 as a date. Here values stay as they
are in the files: a column of one type has that type, and any other column holds JSON.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Json, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from datasets.table import InMemoryTable, concat_tables

from gradacc_hf.data.files import open_text
from gradacc_hf.errors import listed

pc: Any = pyarrow.compute  # the functions are made at import, so type checkers do not know them
KINDS = {str: "texts", bool: "truth values", int: "numbers", float: "numbers", type(None): "missing"}
ROWS_AT_ONCE = 1_000  # of a file, as Python objects


def changed_columns(dataset: Dataset) -> list[str]:
    """Return the columns of a JSON file whose values may differ from the file.

    Dates were texts. JSON that is not an object may have been a text, such as "1". Large numbers may have
    been integers.
    """
    names = dataset.column_names
    return [name for name in names if not all(map(_is_exact, _leaves(dataset.data.column(name))))]


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


def read_mixed_json(path: Path, encoding: str | None = None) -> Dataset:
    """Return the rows of a JSON file, read into memory with its values unchanged.

    NaN is a missing value, and integers of more than 64 bits are text.
    """
    return rows_as_dataset(_rows(path, encoding))


def rows_as_dataset(rows: Iterable[Any]) -> Dataset:
    """Return rows as a data set in memory, with their values unchanged."""
    return dataset_of(_read_columns(rows))


def with_columns_of_file(dataset: Dataset, path: Path, names: Sequence[str]) -> Dataset:
    """Return the rows of a JSON file with some columns as in the file. The others are not read again."""
    columns = _read_columns(_rows(path), names)
    table = pa.table({name: column for name, (column, _) in columns.items()})
    if len(table) != len(dataset):  # the file has rows that are not objects
        return read_mixed_json(path)
    info = dataset.info.copy()
    info.features = Features(
        {name: columns.get(name, (None, dataset.features[name]))[1] for name in dataset.features}
    )
    whole = concat_tables([dataset.data.drop(list(names)), InMemoryTable(table)], axis=1)
    return Dataset(
        whole.select(list(info.features)),
        info=info,
        split=dataset.split,
        fingerprint=Hasher.hash((dataset._fingerprint, [*names])),
    )


def _read_columns(
    all_rows: Iterable[Any], names: Sequence[str] = ()
) -> dict[str, tuple[pa.ChunkedArray, Any]]:
    """Return columns of JSON rows with their features, by default all. Few rows at a time are in Python.

    A row that is not an object is a text.
    """
    chunks: dict[str, list[pa.Array]] = {}
    number, left = 0, (row if isinstance(row, dict) else {"text": row} for row in all_rows)
    while rows := [*islice(left, ROWS_AT_ONCE)]:
        for name in names or dict.fromkeys(chain(chunks, *rows)):
            before = chunks.setdefault(name, [pa.nulls(number)] if number else [])
            before.append(_unchanged([row.get(name) for row in rows]))
        number += len(rows)
    return {name: _in_one_column(parts) for name, parts in chunks.items()}


def _rows(path: Path, encoding: str | None = None) -> Iterator[Any]:
    """Yield the rows of a file of JSON lines, or of one list."""
    with open_text(path, encoding) as file:
        first = next((line for line in file if line.strip()), "")
        is_list = first.lstrip().startswith("[")
        file.seek(0)
        for text in [file.read()] if is_list else filter(str.strip, file):
            found = parse_json(text)
            yield from found if isinstance(found, list) else [found]


def parse_json(text: str) -> Any:
    """Parse JSON. NaN is a missing value, and integers of more than 64 bits are text."""
    return json.loads(text, parse_constant=_constant, parse_int=_integer)


def lists_of_object(
    path: Path, encoding: str | None = None
) -> tuple[dict[str, Any], dict[str, list[Any]]] | None:
    """Return the object that a JSON file consists of, and the lists of objects in it, by key.

    None for a list, for JSON lines, and for a file that is not JSON. Only an object is read whole.
    """
    with open_text(path, encoding) as file:
        lines = filter(str.strip, file)
        first = next(lines, "")
        if not first.lstrip().startswith("{") or (next(lines, "") and is_json(first)):
            return None
    with open_text(path, encoding) as file:
        try:
            found = parse_json(file.read())
        except json.JSONDecodeError:
            return None
    lists = {
        key: value
        for key, value in found.items()
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
    }
    return found, lists


def rows_of_columns(found: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the rows of an object of columns, as `DataFrame.to_json` writes it; None for other objects."""
    columns = [column if isinstance(column, dict) else {} for column in found.values()]
    index = [*map(str, range(len(columns[0])))] if columns else []
    if not index or any([*column] != index for column in columns):
        return None
    return [{name: column[row] for name, column in zip(found, columns, strict=True)} for row in index]


def is_json(text: str) -> bool:
    """Whether a text is JSON."""
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)


def _integer(digits: str) -> int | str:
    return number if abs(number := int(digits)) < 2**63 else digits


def as_column(values: Sequence[Any]) -> tuple[pa.ChunkedArray, Any]:
    """Return values as an Arrow array with its feature. JSON if no type of Arrow holds them unchanged."""
    return _in_one_column([_unchanged(values)])


def _unchanged(values: Sequence[Any]) -> pa.Array:
    try:
        column = pa.array(values)
        if column.to_pylist() == list(values):
            return column
    except pa.ArrowException:
        pass
    except UnicodeEncodeError:  # half of a surrogate pair, such as of a truncated emoji, becomes "?"
        whole = json.dumps(values, ensure_ascii=False).encode(errors="replace")
        return _unchanged(json.loads(whole))
    return _as_json(values)


def _as_json(values: Sequence[Any]) -> pa.Array:
    texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return pa.array(texts, pa.json_())


def _in_one_column(chunks: Sequence[pa.Array]) -> tuple[pa.ChunkedArray, Any]:
    """Return parts of a column in one type, with its feature. JSON if no type of Arrow holds all of them."""
    schemas = [pa.schema([("c", chunk.type)]) for chunk in chunks]
    if not any(isinstance(chunk.type, pa.JsonType) for chunk in chunks):
        try:
            schema = pa.unify_schemas(schemas, promote_options="permissive")
            kind = schema.field("c").type
            parts = [chunk if chunk.type == kind else chunk.cast(kind) for chunk in chunks]
            if all(
                part is chunk or part.to_pylist() == chunk.to_pylist()
                for part, chunk in zip(parts, chunks, strict=True)
            ):
                return pa.chunked_array(parts, kind), Features.from_arrow_schema(schema)["c"]
        except pa.ArrowException:
            pass
    texts = [
        chunk if isinstance(chunk.type, pa.JsonType) else _as_json(chunk.to_pylist()) for chunk in chunks
    ]
    return pa.chunked_array(texts, pa.json_()), Json()


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
        if len(kinds) > 1 and kinds.keys() & {*KINDS.values()} - {"missing"}:
            counts = listed(f"{number:,} {kind}" for kind, number in kinds.items())
            lines[name] = f'column {name!r} has {counts}; 1 and "1" are one value'
    return lines


def _has_scalars(split: Dataset, name: str) -> bool:
    """Whether a column holds JSON that is neither a list nor an object."""
    if not isinstance(split.features.get(name), Json):
        return False
    texts = (text for leaf in _leaves(split.data.column(name)) for text in leaf.storage.to_pylist())
    return any(text is not None and text[:1] not in "{[" for text in texts)


def joined(files: Sequence[tuple[Path, Dataset]]) -> tuple[Dataset, dict[str, str], dict[str, str]]:
    """Return the rows of several files, and two kinds of lines, by column.

    A line of the first kind is about a column that not all files have. A line of the second kind is about a
    column with class ids in one file, and other values in another. Such a column is left out.
    """
    if len(files) == 1:
        return files[0][1], {}, {}
    names = dict.fromkeys(name for _, rows in files for name in rows.column_names)
    parts, lines, classes = [rows for _, rows in files], {}, {}
    for name in names:
        if absent := [path.name for path, rows in files if name not in rows.column_names]:
            lines[name] = f"column {name!r} is empty for the rows of {listed(absent)}, which lack it"
        kinds = {path: rows.features[name] for path, rows in files if name in rows.column_names}
        if len({repr(kind) for kind in kinds.values()}) > 1:
            if any(isinstance(kind, ClassLabel) for kind in kinds.values()):
                names_of = ((path, getattr(kind, "names", None) or kind) for path, kind in kinds.items())
                shown = listed(f"{found} in {path}" for path, found in names_of)
                classes[name] = f"column {name!r} has classes of different names: {shown}"
                parts = [part.remove_columns(name) if name in part.features else part for part in parts]
            else:
                parts = _in_one_type(parts, name, kinds)
    return concatenate_datasets(parts), lines, classes


def _in_one_type(parts: list[Dataset], name: str, kinds: dict[Path, Any]) -> list[Dataset]:
    """Return the files with a column in a type that all of them can have."""
    found = [kind for kind in kinds.values() if kind != Value("null")]
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
