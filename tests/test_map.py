"""The map of the package, gradacc_hf/README.md, names every package and only existing files.

Docstrings, comments and the other READMEs name only existing files, too.
"""

import ast
import re
import tomllib

from conftest import ROOT

PACKAGE = ROOT / "gradacc_hf"
MAP = (PACKAGE / "README.md").read_text(encoding="utf-8")


def test_every_package_has_a_line_and_a_place_in_the_drawing():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {*re.findall(r"^\| `(\w+)/` \|", MAP, re.MULTILINE)} == packages
    drawing = re.search(r"```\n(.*?)```", MAP, re.DOTALL)[1]
    for package in packages:
        assert re.search(rf"\b{package}\b", drawing), package


def test_every_path_in_the_map_exists():
    paths = re.findall(r"`([\w/]+(?:/|\.(?:py|j2)))`", MAP)
    assert len(paths) > 40
    missing = [path for path in paths if not (PACKAGE / path).exists() and not (ROOT / path).exists()]
    assert missing == []


def test_the_drawing_has_the_layers_of_the_contract_in_order():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = settings["tool"]["importlinter"]["contracts"][0]
    lines = re.search(r"```\n(.*?)```", MAP, re.DOTALL)[1].splitlines()
    drawn = [re.split(r"\s{2,}", line)[1:] for line in lines if "│" not in line]
    assert [place.replace(".py", "") for places in drawn for place in places] == contract["layers"]


def test_every_pair_of_a_file_and_a_name_in_the_tables_exists():
    rows = "\n".join(line for line in MAP.splitlines() if line.startswith("|"))
    pairs = re.findall(r"`([\w/]+\.py)`, `(\w+)`(?: and `(\w+)`)?", rows)
    assert len(pairs) > 10
    missing = []
    for path, *names in pairs:
        defined = names_defined_in(path)
        missing += [(path, name) for name in names if name and name not in defined]
    assert missing == []


def names_defined_in(path):
    """Return the functions, classes and constants of a module of the package."""
    nodes = ast.parse((PACKAGE / path).read_text(encoding="utf-8")).body
    named = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    constants = (target for node in nodes if isinstance(node, ast.Assign) for target in node.targets)
    return named | {target.id for target in constants if isinstance(target, ast.Name)}


def test_every_python_file_that_a_text_names_exists():
    """A name is a file in the same folder, or a path from gradacc_hf/ or the repository root."""
    texts = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "configs/README.md")]
    texts += [path for top in ("gradacc_hf", "recipes") for path in sorted((ROOT / top).rglob("*.py"))]
    texts += [path for top in ("gradacc_hf", "recipes") for path in sorted((ROOT / top).rglob("README.md"))]
    missing, found = [], 0
    for text in texts:
        for name in re.findall(r"`([\w./]+\.py)`", text.read_text(encoding="utf-8")):
            found += 1
            folders = (text.parent, PACKAGE, ROOT)
            is_placeholder = name.endswith("/NAME.py")
            if not is_placeholder and not any((folder / name).is_file() for folder in folders):
                missing.append((str(text.relative_to(ROOT)), name))
    assert found > 60
    assert missing == []


def test_the_map_fits_on_two_screens():
    assert len(MAP.splitlines()) < 100


def test_contributing_links_to_the_map():
    assert "(gradacc_hf/README.md)" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
