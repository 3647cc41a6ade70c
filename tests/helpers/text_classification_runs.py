"""Runs of the text classification recipe through its command line, in this process and an empty folder.

A test file that uses the fixtures binds their names: `start`, `datasets_cache` and `empty_folder`.
"""

import json
from pathlib import Path

import datasets.config
import numpy as np
import pandas as pd
import pytest
from recipe_runs import load_recipe, run_recipe

TextClassification = load_recipe("text_classification").TextClassification


@pytest.fixture(scope="session")
def datasets_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch, datasets_cache):
    """Start each test in an empty folder. The cache of `datasets` is elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", datasets_cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(datasets_cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def make_rows(number=150, labels=("ham", "spam"), seed=0):
    """Return texts of 1 to 500 words, most of them short. The words of a text fit its label."""
    rng = np.random.default_rng(seed)
    words = [
        ["tea", "garden", "letter", "morning"],
        ["prize", "cash", "winner", "click"],
        ["of", "in", "the", "a"],
    ]
    rows = []
    for i in range(number):
        kind, length = int(i % 3 == 0), int(np.clip(np.exp(rng.normal(2.5, 1.2)), 1, 200))
        chosen = rng.choice(words[kind] + words[2], length)
        rows.append({"text": " ".join(chosen), "label": labels[kind]})
    rows[1]["text"], rows[2]["text"] = "tea", "tea " * 500
    return rows


def write(path, rows):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(rows)
    match path.suffix:
        case ".csv":
            frame.to_csv(path, index=False)
        case ".jsonl":
            frame.to_json(path, orient="records", lines=True)
        case ".parquet":
            frame.to_parquet(path)
    return path


@pytest.fixture
def start(tiny_bert, capfd):
    """Run the command line of the recipe in this process. The defaults are small, without dropout."""

    def start(**flags):
        return run_recipe(TextClassification, arguments(tiny_bert, flags), capfd)

    return start


def arguments(tiny_bert, flags):
    """Return the arguments of a small run, and more flags.

    {"data__train": "a.csv", "check": True} becomes --data.train a.csv --check.
    """
    settings = {
        "model.name": tiny_bert,
        "model.dropout": 0,
        "data.max_length": 32,
        "batch.effective": 16,
        "optim.lr": 1e-3,
        "output.tracker": "none",
        **{key.replace("__", "."): value for key, value in flags.items()},
    }
    words = []
    for key, value in settings.items():
        if value is not None:
            words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return words


def history(folder):
    return [json.loads(line) for line in Path(folder, "history.jsonl").read_text().splitlines()]
