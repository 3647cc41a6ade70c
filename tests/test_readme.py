"""The README is short, the loop and the diff in it run, and the links in it work on PyPI, too.

`tests/test_guides.py` tests what all guides share.
"""

import os
import re
import subprocess
import sys
import tomllib

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from guides import README, check_absolute, prose, read
from torch.utils.data import DataLoader

from gradacc_hf import WindowLoader
from gradacc_hf.bench.exactness import CONTENDERS, HEADS
from gradacc_hf.cli import main as cli
from gradacc_hf.verification.tiny_models import build_head

TEXT = read(README)


def test_the_loop_to_copy_runs_as_it_stands(tmp_path):
    (script := tmp_path / "loop.py").write_text(re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line) for line in done.stdout.split()]
    assert len(losses) == 12
    assert sum(losses[-4:]) < sum(losses[:4])


def test_the_minimal_recipe_is_short_and_runs():
    text = (ROOT / "recipes/minimal.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    done = subprocess.run(
        [sys.executable, ROOT / "recipes/minimal.py", "--max_windows", "1"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"accuracy 0\.\d+ on \d+ held-out docstrings", done.stdout)


LOOPS = {
    "README.md": r"( *)for batch in window:(?:(?!for batch).)*?scheduler\.step\(\)",  # not the diff
    "recipes/minimal.py": r"( *)for batch in window:.*?scheduler\.step\(\)",
    "gradacc_hf/training/loop.py": r"( *)for batch in window:.*?scheduler\.step\(\)",
}


def test_the_loop_is_the_same_in_the_readme_in_minimal_and_in_the_package():
    calls = []
    for file, pattern in LOOPS.items():
        loop = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), re.DOTALL)[0]
        calls.append(re.findall(r"\b(?:accelerator|optimizer|window|scheduler)\.\w+", loop))
    readme, minimal, package = calls
    assert readme == minimal
    assert [call for call in package if call in readme] == readme


DIFF = re.search(r"```diff\n(.*?)```", TEXT, re.DOTALL)[1].splitlines()


def test_the_diff_changes_three_lines():
    assert len([line for line in DIFF if line.startswith("-")]) == 3


@pytest.mark.parametrize("side", ["-", "+"])
def test_both_sides_of_the_diff_train(side):
    head, accelerator = build_head("sequence_classification", "bert"), Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(head.model, torch.optim.SGD(head.model.parameters(), lr=0.1))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    names = {"DataLoader": DataLoader, "WindowLoader": WindowLoader, "collate": head.collate, "model": model}
    names |= {"dataset": head.examples([9, 5] * 32), "accelerator": accelerator, "optimizer": optimizer}
    exec("\n".join(line[1:] for line in DIFF if not line or line[0] in f" {side}"), names)
    assert any((old != new).any() for old, new in zip(before, model.parameters(), strict=True))


# ---- the text ----


def test_the_readme_has_at_most_1000_words():
    """Words as `wc -w` counts them, without code blocks and HTML comments."""
    assert len(prose(README).split()) <= 1000


def test_a_newcomer_finds_the_loop_and_the_install_at_headings():
    headings = re.findall(r"^## (.+)$", prose(README), re.MULTILINE)
    assert headings[:3] == ["Install", "Which entry is for me?", "The loop to copy"]


def test_the_table_of_the_readme_is_the_one_that_is_measured():
    rows = re.findall(r"^\| .*\| \**(\d+) of 24\** \| \**(\d+) of 24\** \|", prose(README), re.MULTILINE)
    assert len(rows) == len(CONTENDERS)
    assert sum(len(model_types) for model_types in HEADS.values()) == 24


def test_figures_that_the_readme_quotes_stand_in_the_table_of_measurements():
    text = prose(README)
    [faster, grouped] = re.search(
        r"\[([\d.]+) times the examples.*?; ([\d.]+) times", text, re.DOTALL
    ).groups()
    rows = [
        line
        for line in read(ROOT / "gradacc_hf/bench/README.md").splitlines()
        if "relative to Trainer" in line
    ]
    assert [row.split("|")[2].split()[0] for row in rows] == [faster, grouped]


# ---- what is installed from it ----


def test_the_readme_on_pypi_has_no_relative_link():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    hook = settings["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    assert hook["fragments"] == [{"path": "README.md"}]
    text = TEXT
    for rule in hook["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    check_absolute(text, settings["project"]["urls"]["Homepage"])


def test_nothing_but_what_was_asked_for_stands_at_the_top():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    top = {path.split("/")[0] for path in tracked if path and not path.startswith(".")}
    assert top <= {
        *("README.md", "pyproject.toml", "recipes", "gradacc_hf", "configs", "tests", "launch.sh"),
        *("LICENSE", "CONTRIBUTING.md", "constraints.txt"),
    }


def test_every_recipe_has_a_measured_row_and_a_prediction():
    table = read(ROOT / "gradacc_hf/bench/README.md")
    row = r"^\| `(\w+)` \|.*\| \S+ [\d.]+ after \d+ windows \| [\d.]+ \| \d+ s \|$"
    names = sorted(name for name in cli.recipes() if cli.configs(name))
    assert sorted(re.findall(row, table, re.MULTILINE)) == names
    for name in names:
        assert f"gradacc predict runs/{name}_offline-1 " in read(ROOT / "recipes/README.md")
