"""Read one data file: its form is found in it, and `datasets` reads the rows as far as it goes."""

import codecs
import contextlib
import csv
import glob
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from datasets import Dataset, Features, Value
from datasets.data_files import SPLIT_KEYWORDS
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.json.json import JsonConfig
from datasets.table import CastError

from gradacc_hf.config.schema import SEPARATORS
from gradacc_hf.data.files import (
    BUILDERS,
    COLUMNS,
    JSONS,
    TABLES,
    TEXTS,
    UTF8,
    Form,
    encoding_fault,
    find_encoding,
    is_tagged,
    open_text,
    require_library,
    require_text,
    suffix_of,
)
from gradacc_hf.data.mixed import (
    changed_columns,
    is_json,
    lists_of_object,
    read_mixed_json,
    rows_as_dataset,
    rows_of_columns,
    with_columns_of_file,
)
from gradacc_hf.data.tables import find_separator, quotes_are_text, table_fault
from gradacc_hf.data.tagged_text import read_tagged
from gradacc_hf.errors import InputError, listed, refuse

pc: Any = pyarrow.compute  # the functions are made at import, so type checkers do not know them
CSV: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}  # "None" and "NA" are texts, not nulls

_NO_ROWS = ("corresponds to no data", "No columns to parse", "BatchSize must be")  # errors of the builders


def read_file(path: Path, key: str, given: Form | None = None) -> tuple[Dataset, Form]:
    """Return the rows of a file with one split, and its form.

    Columns of a table are texts, and other columns keep their types.
    """
    splits = read_splits(path, key, given)
    if len(splits) > 1:
        refuse(key, f"{path} has the splits {listed(splits)}", "name this file alone")
    return next(iter(splits.values()))


def read_splits(path: Path, key: str, given: Form | None = None) -> dict[str, tuple[Dataset, Form]]:
    """Return the rows of a file by split, most often "train" alone, and the form of the file.

    Args:
        path: A file with a suffix of `BUILDERS`.
        key: The setting that messages name.
        given: What settings state about the form.
    """
    is_tags = given is not None and given.word_columns is not None and is_tagged(path)
    form = _form(path, key, given or Form(), is_tags)
    with reading_errors(key, [path], form):
        suffix = suffix_of(path)
        if is_tags:
            rows, layout = read_tagged(path, key, form)
            found = {"train": (rows, replace(form, layout=layout))}
        elif suffix in TABLES:
            found = {"train": _read_table(path, key, form)}
        elif suffix in JSONS:
            found = _read_json(path, key, form)
        elif suffix == ".xlsx":
            found = {"train": _read_excel(path, key, form)}
        else:
            found = {"train": _read_arrow(path, form)}
    for rows, _ in found.values():
        if not len(rows):
            refuse(key, f"{path}: no rows", "give at least one in each file")
    return found


def _form(path: Path, key: str, given: Form, is_tags: bool = False) -> Form:
    """Return the form of a file. Only the settings that are for such files count."""
    suffix, form = suffix_of(path), Form()
    require_library(path, key)
    try:
        if not path.stat().st_size:
            refuse(key, f"{path} is empty", "give at least one row")
        if is_tags or suffix in TEXTS:
            require_text(path, key)
            form = replace(form, encoding=_encoding(given.encoding) or find_encoding(path, key))
        if is_tags:
            separator = SEPARATORS.get(given.separator or "", given.separator)
            return replace(form, separator=separator, word_columns=given.word_columns)
        if suffix in TABLES:
            assert form.encoding is not None
            found = SEPARATORS.get(given.separator or "", given.separator)
            form = replace(form, separator=found or find_separator(path, form.encoding))
    except UnicodeDecodeError:
        _refuse_encoding(path, key, form)
    except InputError:
        raise
    except Exception as error:  # libraries for compressed files have errors of several kinds
        found = getattr(error, "strerror", None) or cause_of(error)
        refuse(key, f"cannot read {path}: {found}", "give a file that you can read")
    if suffix in JSONS:
        return replace(form, rows_key=given.rows_key)
    return replace(form, sheet=given.sheet) if suffix == ".xlsx" else form


def _encoding(given: str | None) -> str | None:
    return UTF8 if given and codecs.lookup(given).name in ("utf-8", UTF8) else given


def _refuse_encoding(path: Path, key: str, form: Form) -> None:
    encoding = "UTF-8" if form.encoding in (None, UTF8) else form.encoding
    if fault := encoding_fault(path, encoding):
        cure = "save it as UTF-8, or set data.encoding to its encoding"
        refuse(key, f"{path} is not {encoding}: {fault}", cure)


def _load(builder: str, path: Path, **options: Any) -> Dataset:
    load: Any = datasets.load_dataset
    return load(builder, data_files={"train": glob.escape(str(path))}, **options)["train"]


def _read_arrow(path: Path, form: Form) -> tuple[Dataset, Form]:
    """Return the rows of a Parquet or Arrow file, without columns of types that `datasets` does not have."""
    builder = BUILDERS[suffix_of(path)]
    try:
        return _load(builder, path), form
    except Exception:
        schema: Any = pq.read_schema(path) if builder == "parquet" else []
        if not (odd := [column.name for column in schema if not _has_feature(column)]):
            raise
        read = pa.schema([column for column in schema if column.name not in odd], schema.metadata)
        options = {"columns": read.names, "features": Features.from_arrow_schema(read)}
        return _load(builder, path, **options), replace(form, without=listed(odd))


def _has_feature(column: pa.Field) -> bool:
    try:
        return bool(Features.from_arrow_schema(pa.schema([column])))
    except ValueError:
        return False


def _read_table(path: Path, key: str, form: Form) -> tuple[Dataset, Form]:
    """Return the rows of a table. Quotes that are part of the texts do not merge lines into a value."""
    try:
        rows = _load_table(path, key, form)
    except (pd.errors.ParserError, DatasetGenerationError):
        if not quotes_are_text(path, form):
            raise
    else:
        if not (_has_merged(rows, form) and quotes_are_text(path, form)):
            return rows, form
    form = replace(form, quotes="as text")
    return _load_table(path, key, form), form


def _has_merged(rows: Dataset, form: Form) -> bool:
    """Whether a value has both the separator and a line end."""
    signs = (form.separator, "\n")
    found = (pc.and_(*(pc.match_substring(column, sign) for sign in signs)) for column in rows.data.columns)
    return any(pc.any(of_column).as_py() for of_column in found)


def _load_table(path: Path, key: str, form: Form) -> Dataset:
    options = {**CSV, "sep": form.separator, "encoding": form.encoding if form.encoding != UTF8 else None}
    options["quoting"] = csv.QUOTE_NONE if form.quotes else csv.QUOTE_MINIMAL
    first = pd.read_csv(path, nrows=1, dtype=str, **options)
    if not isinstance(first.index, pd.RangeIndex):
        found = table_fault(path, form) or "has rows with more fields than the header"
        cure = "correct it, or give every column a name; one column of texts: --data.separator none"
        refuse(key, f"{path} {found}", cure)
    return _load("csv", path, features=Features(dict.fromkeys(first.columns, Value("string"))), **options)


def _read_json(path: Path, key: str, form: Form) -> dict[str, tuple[Dataset, Form]]:
    if (form.rows_key or suffix_of(path) == ".json") and (lists := _lists(path, key, form)) is not None:
        return {
            split: (rows_as_dataset(rows), replace(form, rows_key=name))
            for split, (name, rows) in lists.items()
        }
    if form.encoding != UTF8:
        return {"train": (read_mixed_json(path, form.encoding), form)}
    options = {"parse_agent_traces": False} if hasattr(JsonConfig, "parse_agent_traces") else {}
    try:
        rows = _load("json", path, **options)
    except Exception:
        if json_fault(path):
            raise
        rows = read_mixed_json(path)
    else:
        if changed := changed_columns(rows):
            rows = with_columns_of_file(rows, path, changed)
    return {"train": (rows, form)}


def _lists(path: Path, key: str, form: Form) -> dict[str, tuple[str, list[Any]]] | None:
    """Return the key and the rows of each split in a JSON file of one object; None for any other file."""
    whole = lists_of_object(path, form.encoding)
    if whole is None:
        return None
    found, lists = whole
    if (name := form.rows_key) is not None:
        if name not in lists:
            keys = f"{path} has no list of objects under {name!r}; found the keys {listed(found)}"
            refuse("data.rows_key", keys, f"allowed: {listed(lists) or 'null'}")
        return {"train": (name, lists[name])}
    if not lists:
        return {"train": (COLUMNS, rows)} if (rows := rows_of_columns(found)) else None
    if len(lists) == 1:
        return {"train": next(iter(lists.items()))}
    splits = {name: splits_in(name) for name in lists}
    if all(len(found) == 1 for found in splits.values()) and len({*map(str, splits.values())}) == len(lists):
        return {splits[name][0]: (name, rows) for name, rows in lists.items()}
    counts = listed(f"{name!r} ({len(rows):,})" for name, rows in lists.items())
    refuse(
        key,
        f"{path} has several lists of objects: {counts}",
        f"choose one, as --data.rows_key {next(iter(lists))}",
    )


def _read_excel(path: Path, key: str, form: Form) -> tuple[Dataset, Form]:
    """Return the rows of a sheet, by default the first. The values are texts, as in a CSV file."""
    with pd.ExcelFile(path) as book:
        names = [str(name) for name in book.sheet_names]
        name = form.sheet or names[0]
        if name not in names:
            refuse("data.sheet", f"{path} has no sheet {name!r}", f"allowed: {listed(names)}")
        frame = pd.read_excel(book, sheet_name=name, dtype=str, **CSV)
    others = [other for other in names if other != name]
    if frame.empty and others:
        found = f"{path}: sheet {name!r} has no rows; other sheets: {listed(others)}"
        refuse(key, found, f"to read another: --data.sheet {shlex.quote(others[0])}")
    frame.columns = frame.columns.map(str)
    features = Features(dict.fromkeys(frame.columns, Value("string")))
    form = replace(form, sheet=repr(name), other_sheets=None if form.sheet else listed(others) or None)
    return Dataset.from_pandas(frame, features, preserve_index=False), form


def splits_in(name: str) -> list[str]:
    """Return the splits whose keyword is a word of this name of a file, a folder or a list."""
    words = re.split(r"[-._ 0-9]+", name.lower())
    return [str(split) for split, keywords in SPLIT_KEYWORDS.items() if {*keywords} & {*words}]


@contextlib.contextmanager
def reading_errors(key: str, files: Sequence[Path], form: Form | None = None) -> Iterator[None]:
    """Turn an error about these files into an InputError of one line, and print no progress bars."""
    form = form or Form()
    try:
        with quiet():
            yield
    except InputError:
        raise
    except Exception as error:
        shown, cause = listed(files[:3]), cause_of(error)
        if any(sign in cause for sign in _NO_ROWS):
            refuse(key, f"{shown}: no rows", "give at least one in each file")
        for path in files:
            suffix = suffix_of(path)
            if suffix in TEXTS and isinstance(_root(error), UnicodeError):
                _refuse_encoding(path, key, form)
            elif suffix in JSONS and (fault := json_fault(path, form.encoding)):
                refuse(key, f"{path} {fault}", "one JSON object a line, or one list of objects")
            elif suffix in TABLES and (fault := table_fault(path, form)):
                refuse(key, f"{path} {fault}", "correct it, or set data.separator")
        refuse(key, f"{shown} cannot be read: {cause.rstrip('.')}", "correct or leave out that part")


def json_fault(path: Path, encoding: str | None = None) -> str | None:
    """Return the place of the first line that is not a JSON object; None if there is none."""
    with open_text(path, encoding) as file:
        first = next(filter(str.strip, file), "").lstrip()
        if first.startswith("[") or not is_json(first):
            file.seek(0)
            try:
                json.loads(file.read())
                return None
            except json.JSONDecodeError as error:
                if first.startswith("["):
                    return f"line {error.lineno:,}: {error.msg}"
        file.seek(0)
        for number, line in enumerate(file, start=1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number:,}: not an object"
            except json.JSONDecodeError as error:
                return f"line {number:,}, column {error.colno}: {error.msg}"
    return None


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None and not isinstance(error, CastError):
        error = error.__cause__
    return error


def cause_of(error: BaseException) -> str:
    """Return what an error of `datasets` is about, in one line."""
    error = _root(error)
    if isinstance(error, CastError):
        tables = f"{listed(error.table_column_names)} and {listed(error.requested_column_names)}"
        return f"its files have different columns, {tables}"
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
