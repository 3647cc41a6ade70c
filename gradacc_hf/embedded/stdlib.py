"""The documentation of Python's own standard library, read from its source: on every machine, licence PSF."""

import ast
import hashlib
import os
import platform
import sysconfig
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset

from gradacc_hf.errors import BadInput

DOCSTRINGS_FORMAT = 1  # raise it when what docstrings() gives changes: older cache files are then left alone
_COLUMNS = ["text", "module", "name", "source"]
_NOT_READ = {"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages"}


def docstrings() -> Dataset:
    """Every documented function and method of the running interpreter's standard library, each text once.

    Columns: `text` (the docstring), `module` (top-level), `name` (qualified), `source` (the function without
    its docstring). Nothing is imported; the order is fixed. Parsing takes seconds, so the result is kept in
    $XDG_CACHE_HOME/gradacc_hf or ~/.cache/gradacc_hf; a cache that cannot be used is ignored.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files: list[Path] = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _NOT_READ]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files.sort(key=Path.as_posix)
    if not files:
        raise BadInput(f"data.train: no source of Python's standard library in {root}; give a data file")
    seen = [platform.python_version(), DOCSTRINGS_FORMAT] + [(p.as_posix(), p.stat().st_size) for p in files]
    key = hashlib.sha256(repr(seen).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    cache = home / "gradacc_hf" / f"docstrings-{platform.python_version()}-{key}.parquet"
    try:
        table = pyarrow.parquet.read_table(cache, page_checksum_verification=True)
        if table.column_names == _COLUMNS:
            return Dataset(table)
    except (OSError, ValueError, pa.ArrowException):  # absent, damaged or not ours to read
        pass
    unique: dict[str, dict[str, str]] = {}
    for path in files:
        for row in _documented(path, path.relative_to(root).with_suffix("").parts):
            unique.setdefault(row["text"], row)
    table = pa.Table.from_pylist(list(unique.values()))
    _write_whole(table, cache)
    return Dataset(table)


def _documented(path: Path, parts: tuple[str, ...]) -> Iterator[dict[str, str]]:
    top = parts[0]
    try:
        with warnings.catch_warnings(action="ignore"):
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError):
        return
    lines = text.split("\n")  # as ast counts them: splitlines() would also split at a form feed
    nodes: list[tuple[ast.AST, str]] = [(tree, ".".join(parts).removesuffix(".__init__"))]
    while nodes:
        node, name = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (doc := ast.get_docstring(node)):
            yield dict(zip(_COLUMNS, (doc, top, name, _source(node, lines)), strict=True))
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
    """Which module is a docstring from: (train, validation) of `text` and `label`; the largest modules."""
    rows = docstrings().select_columns(["text", "module"]).rename_column("module", "label")
    labels = list(rows["label"])
    most = sorted(Counter(labels).items(), key=lambda item: (-item[1], item[0]))[:num_modules]
    chosen = {module for module, _ in most}
    return in_two(rows.select([i for i, label in enumerate(labels) if label in chosen], keep_in_memory=True))


def documented_functions() -> tuple[Dataset, Dataset]:
    """Every documented function: (train, validation) of `text`, `summary`, `source`, `name` and `module`.

    `summary` is the first line of the docstring `text`, a sentence by PEP 257; `source` is without docstring.
    """
    rows = docstrings()
    rows = rows.add_column("summary", [text.lstrip().partition("\n")[0] for text in rows["text"]])
    return in_two(rows)


def in_two(rows: Dataset) -> tuple[Dataset, Dataset]:
    """A text's sha256 decides where it goes (about 15 % to validation), so that it never moves."""
    parts: tuple[list[int], list[int]] = ([], [])
    for index, text in enumerate(rows["text"]):
        parts[int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) < 0.15 * 2**32].append(index)
    return rows.select(parts[0], keep_in_memory=True), rows.select(parts[1], keep_in_memory=True)
