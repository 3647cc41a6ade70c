"""What the README says runs, as it stands."""

import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from datasets import load_dataset

from gradacc_hf import WindowLoader, fine_tune
from gradacc_hf.cli import main as cli
from gradacc_hf.verification.tiny_models import build_head

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_loop_to_copy_runs_as_it_stands(tmp_path):
    (script := tmp_path / "loop.py").write_text(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line) for line in done.stdout.split()]
    assert len(losses) == 12
    assert sum(losses[-4:]) < sum(losses[:4])


def test_the_lines_about_streams_run_as_they_stand(tmp_path, monkeypatch):
    head, accelerator = build_head("sequence_classification", "bert"), Accelerator(cpu=True)
    rows = [json.dumps({**example, "labels": int(example["labels"])}) for example in head.examples([9] * 150)]
    (tmp_path / "big.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    names = {
        "load_dataset": load_dataset,
        "tokenize": lambda example: example,
        "WindowLoader": WindowLoader,
        "fine_tune": fine_tune,
        "collate": head.collate,
        "accelerator": accelerator,
        "model": head.model,
        "optimizer": torch.optim.AdamW(head.model.parameters(), lr=1e-3),
    }
    [lines] = re.findall(r"```python\n( +stream = .*?)```", README, re.DOTALL)
    exec(textwrap.dedent(lines), names)
    assert names["windows"].state_dict()["epoch"] == 1
    assert len(names["windows"]) == 3


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
    "README.md": r"( *)for batch in window:.*?scheduler\.step\(\)",
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


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?:recipes|configs|gradacc_hf)/[\w/.]+\.(?:py|yaml)", README)))
)
def test_a_path_that_the_readme_names_exists(path):
    assert (ROOT / path).is_file()


def test_nothing_but_what_was_asked_for_stands_at_the_top():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    top = {path.split("/")[0] for path in tracked if path and not path.startswith(".")}
    assert top <= {
        *("README.md", "pyproject.toml", "recipes", "gradacc_hf", "configs", "tests", "launch.sh"),
        *("LICENSE", "CONTRIBUTING.md", "constraints.txt"),
    }


def test_the_readme_of_the_recipes_has_a_row_and_a_prediction_for_each():
    text = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
    row = r"^\| \[`(\w+)`\]\((\w+)\.py\) \|.*\| \S+ [\d.]+ after \d+ windows \| [\d.]+ \| \d+ s¹? \|$"
    rows = re.findall(row, text, re.MULTILINE)
    names = sorted(name for name in cli.recipes() if cli.configs(name))
    assert sorted(rows) == [(name, name) for name in names]
    for name in names:
        assert f"gradacc predict runs/{name}_offline-1 " in text
