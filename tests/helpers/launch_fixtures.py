"""Fixtures for tests of launch.sh: an installed environment, and a small data file."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

RECIPE = "recipes/text_classification.py"


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    """Return this environment with the stamp that ./launch.sh writes after an installation."""
    folder = tmp_path_factory.mktemp("venv")
    for part in ("bin", "lib", "pyvenv.cfg"):
        (folder / part).symlink_to(Path(sys.prefix) / part)
    wanted = subprocess.run(
        "cat pyproject.toml constraints.txt | cksum", shell=True, cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    (folder / ".gradacc-installed").write_text(f"{wanted} dev\n")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.csv"
    rows = [
        f"{'good' if i % 3 else 'bad'} words {'and more ' * (i % 11)},{'yes' if i % 3 else 'no'}"
        for i in range(60)
    ]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return path
