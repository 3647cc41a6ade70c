"""gradacc_hf/README.md, the map of the package, names every package, and nothing that does not exist."""

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
    drawn = [[name.removesuffix(".py") for name in line.split()[1:]] for line in lines if "│" not in line]
    place = {name: number for number, names in enumerate(drawn) for name in names}
    layers = [re.split(r" [|:] ", layer) for layer in contract["layers"]]
    names = [name for layer in layers for name in layer]
    assert sorted(names) == sorted(place)
    assert [place[name] for name in names] == sorted(place[name] for name in names)


def test_the_map_fits_on_two_screens():
    assert len(MAP.splitlines()) < 100


def test_contributing_links_to_the_map():
    assert "(gradacc_hf/README.md)" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
