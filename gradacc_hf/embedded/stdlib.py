"""The documentation of Python's standard library, read from its source (licence PSF)."""

import ast
import hashlib
import os
import platform
import sysconfig
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset

from gradacc_hf.errors import InputError

DOCSTRINGS_FORMAT = 1  # raise it when the rows of docstrings() change: older cache files are then unused
_COLUMNS = ["text", "module", "name", "source"]
_NOT_READ = {"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages"}


def docstrings() -> Dataset:
    """Return every documented function and method of the standard library, each text once.

    Columns: `text` (the docstring), `module` (top-level), `name` (qualified), `source` (the function without
    the docstring). Nothing is imported, and the order is fixed. Parsing takes seconds, so `read_library`
    caches the result.
    """
    return read_library("docstrings", DOCSTRINGS_FORMAT, _COLUMNS, _documented)


Row = dict[str, Any]
ReadFile = Callable[[str, ast.Module, tuple[str, ...]], Iterator[Row]]
"""(source of a module, its syntax tree, ("email", "mime", "text")) → rows, each with a `text`."""


def read_library(name: str, version: int, columns: Sequence[str], read: ReadFile) -> Dataset:
    """Return the rows that `read` finds in the standard library, each `text` once, in a fixed order.

    They are cached as NAME-….parquet in $XDG_CACHE_HOME/gradacc_hf or ~/.cache/gradacc_hf until the library
    or `version` changes. A cache that cannot be used is ignored. Raise InputError if Python has no source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files: list[Path] = []
    for folder, inner, names in os.walk(root):
        inner[:] = [inside for inside in inner if inside not in _NOT_READ]
        files += [Path(folder, file) for file in names if file.endswith(".py")]
    files.sort(key=Path.as_posix)
    if not files:
        raise InputError(f"data.train: no source of Python's standard library in {root}; give a data file")
    seen = [platform.python_version(), version] + [(p.as_posix(), p.stat().st_size) for p in files]
    key = hashlib.sha256(repr(seen).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    cache = home / "gradacc_hf" / f"{name}-{platform.python_version()}-{key}.parquet"
    try:
        table = pyarrow.parquet.read_table(cache, page_checksum_verification=True)
        if table.column_names == list(columns):
            return Dataset(table)
    except (OSError, ValueError, pa.ArrowException):  # missing, damaged or not readable
        pass
    unique: dict[str, Row] = {}
    for path in files:
        try:
            with warnings.catch_warnings(action="ignore"):
                text = path.read_text(encoding="utf-8")
                tree = ast.parse(text)
        except (OSError, SyntaxError, ValueError):
            continue
        for row in read(text, tree, path.relative_to(root).with_suffix("").parts):
            unique.setdefault(row["text"], row)
    table = pa.Table.from_pylist(list(unique.values()))
    _write_whole(table, cache)
    return Dataset(table)


def _documented(text: str, tree: ast.Module, parts: tuple[str, ...]) -> Iterator[Row]:
    lines = text.split("\n")  # as ast counts lines: splitlines() would also split at a form feed
    nodes: list[tuple[ast.AST, str]] = [(tree, ".".join(parts).removesuffix(".__init__"))]
    while nodes:
        node, name = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (doc := ast.get_docstring(node)):
            yield dict(zip(_COLUMNS, (doc, parts[0], name, _source(node, lines)), strict=True))
        inner = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
        nodes += [(c, f"{name}.{c.name}" if isinstance(c, _NAMED) else name) for c in reversed(inner)]


_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _source(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    doc = node.body[0]
    first, last = doc.lineno - 1, doc.end_lineno or doc.lineno
    kept = lines[node.lineno - 1 : first] + lines[last : node.end_lineno]
    return "\n".join(line.removeprefix(kept[0][: node.col_offset]) for line in kept).rstrip()


def _write_whole(table: pa.Table, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    except OSError:
        return
    try:
        with os.fdopen(descriptor, "wb") as file:
            pyarrow.parquet.write_table(table, file, compression="zstd", write_page_checksum=True)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)


def docstring_modules(num_modules: int = 12) -> tuple[Dataset, Dataset]:
    """Return (train, validation) of docstrings as `text` and modules as `label`, of the largest modules."""
    rows = docstrings().select_columns(["text", "module"]).rename_column("module", "label")
    labels = list(rows["label"])
    most = sorted(Counter(labels).items(), key=lambda item: (-item[1], item[0]))[:num_modules]
    chosen = {module for module, _ in most}
    return in_two(rows.select([i for i, label in enumerate(labels) if label in chosen], keep_in_memory=True))


def documented_functions() -> tuple[Dataset, Dataset]:
    """Return (train, validation) of `text`, `summary`, `source`, `name` and `module` of documented functions.

    `summary` is the first line of the docstring `text`, a sentence by PEP 257. `source` has no docstring. No
    summary or source of validation is in training. Each summary of validation occurs once.
    """
    rows = docstrings()
    rows = rows.add_column("summary", [text.lstrip().partition("\n")[0] for text in rows["text"]])
    train, validation = in_two(rows)
    sources, summaries, unseen = set(train["source"]), set(train["summary"]), []
    for index, (source, summary) in enumerate(zip(validation["source"], validation["summary"], strict=True)):
        if source not in sources and summary not in summaries:
            unseen.append(index)
            summaries.add(summary)
    return train, validation.select(unseen, keep_in_memory=True)


def in_two(rows: Dataset, by: str = "text") -> tuple[Dataset, Dataset]:
    """Split rows by the sha256 of the column `by`, 15 % to validation, so that a row never changes sides."""
    parts: tuple[list[int], list[int]] = ([], [])
    for index, text in enumerate(rows[by]):
        parts[int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) < 0.15 * 2**32].append(index)
    return rows.select(parts[0], keep_in_memory=True), rows.select(parts[1], keep_in_memory=True)
