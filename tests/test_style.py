"""The rules of CONTRIBUTING that a program can check, for the whole package and all tests."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "gradacc_hf"
TESTS = ROOT / "tests"
MAX_FUNCTION_LINES = 80
TOP_LEVEL_FILES = {
    "__init__.py",
    "__main__.py",
    "py.typed",
    "errors.py",
    "lessons.py",
    "README.md",
    "CHANGELOG.md",
}
SHARED_TEST_FOLDERS = {"helpers", "compatibility", "distributed", "recipes"}
THIRD_PARTY_PRIVATES = {
    "_attn_implementation",  # transformers.PreTrainedConfig
    "_dynamo",  # torch
    "_fingerprint",  # datasets.Dataset
    "_local_scalar_dense",  # torch.ops.aten
    "_mixed_precision",  # accelerate.state.AcceleratorState
    "_per_optimizer_states",  # torch.amp.GradScaler
    "_n_gpu",  # transformers.TrainingArguments
    "_optimizers",  # accelerate.Accelerator
    "_reset_state",  # accelerate.state
    "_schedulers",  # accelerate.Accelerator
    "_shared_state",  # accelerate.state
}


def parsed(folder: Path) -> Iterator[tuple[str, ast.Module]]:
    """Yield the path and the syntax tree of each Python file in a folder."""
    for path in sorted(folder.rglob("*.py")):
        if "recipes_0_1_0" not in path.parts:  # copies of released files
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def report(found: dict[str, object]) -> str:
    """Return the findings, one per line."""
    return "\n".join(["", *(f"{name} {what}" for name, what in sorted(found.items()))])


def test_no_function_is_longer_than_80_lines():
    long = {
        f"{file}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for file, tree in parsed(PACKAGE)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert not long, report(long)


def test_a_class_name_stands_for_one_class():
    places = defaultdict(list)
    for file, tree in parsed(PACKAGE):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{file}:{node.lineno}")
    repeated = {name: ", ".join(where) for name, where in places.items() if len(where) > 1}
    assert not repeated, report(repeated)


def test_the_top_level_holds_packages_and_a_few_files():
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    files = {path.name for path in entries if path.is_file()}
    assert files - TOP_LEVEL_FILES == set()
    folders = [path for path in entries if path.is_dir() and any(path.rglob("*.py"))]
    assert [path.name for path in folders if not (path / "__init__.py").exists()] == []


def test_no_test_reaches_into_private_attributes():
    found = {
        f"{file}:{node.lineno} {ast.unparse(node)}"
        for file, tree in parsed(TESTS)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.endswith("__")
        and node.attr not in THIRD_PARTY_PRIVATES
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }
    assert not found, report(dict.fromkeys(found, ""))


def test_no_test_imports_private_names_of_the_package():
    found = {
        f"{file}:{node.lineno} {name.name}"
        for file, tree in parsed(TESTS)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gradacc_hf")
        for name in node.names
        if name.name.startswith("_") and not name.name.endswith("__")
    }
    assert not found, report(dict.fromkeys(found, ""))


def test_the_folders_of_the_tests_are_those_of_the_package():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    folders = {path.parent.relative_to(TESTS).parts[0] for path in TESTS.glob("*/**/*.py")}
    assert folders - packages - SHARED_TEST_FOLDERS == set()


def test_no_test_file_imports_another_test_file():
    """Shared code is in tests/helpers. The check reads lines, to include scripts in strings."""
    names = {path.stem for path in TESTS.rglob("test_*.py")}
    assert "test_style" in names
    found = {
        f"{path.relative_to(ROOT)}:{number}": line.strip()
        for path in sorted(TESTS.rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.match(r"\s*(from|import)\s", line) and names & {*re.findall(r"\w+", line)}
    }
    assert not found, report(found)
