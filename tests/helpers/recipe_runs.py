"""For the tests of recipes: loading one, a tiny model for it, and its command line in this process."""

import importlib.util
import json
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT

from gradacc_hf.accumulation.accelerate_state import reset_accelerate
from gradacc_hf.cli import main as cli
from gradacc_hf.config.parser import read_command_line
from gradacc_hf.embedded import minilm_path
from gradacc_hf.run.runner import run


def load_recipe(name):
    """The module of recipes/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_recipe(recipe_class, *arguments):
    """The recipe with these settings, as its command line reads them."""
    return recipe_class(read_command_line([*map(str, arguments)], data=recipe_class.Data))


def with_defaults(arguments, defaults):
    """The settings of a command line, with those of `defaults` that it does not give."""
    return [word for flag in defaults.items() if flag[0] not in arguments for word in flag] + [*arguments]


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A BERT of 2 layers with MiniLM's tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,  # losses that differ from example to example
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Outcome:
    """How a command line ended, and what it said."""

    code: int
    out: str
    err: str


def run_recipe(recipe_class, arguments, capfd):
    """Run the command line of a recipe in this process, as the first one of the process."""
    capfd.readouterr()
    reset_accelerate()
    code = 0
    try:
        run(recipe_class, [str(word) for word in arguments])
    except SystemExit as end:
        code = end.code
    return Outcome(code, *capfd.readouterr())


def run_file(path, *arguments):
    """Run a recipe file as `python FILE` does, in this process. Raise SystemExit if it ends with an error."""
    reset_accelerate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        patch.setattr(sys, "path", [str(Path(path).resolve().parent), *sys.path])
        runpy.run_path(str(path), run_name="__main__")


@pytest.fixture
def start(tiny_bert, capfd, tmp_path, monkeypatch):
    """A recipe's command line in this process and an empty folder; a small run where nothing else is said."""
    monkeypatch.chdir(tmp_path)

    def start(recipe_class, *arguments):
        small = {"--model.name": tiny_bert, "--model.dropout": 0, "--data.max_length": 32}
        small |= {"--batch.effective": 16, "--optim.lr": 1e-3, "--output.tracker": "none"}
        return run_recipe(recipe_class, with_defaults(arguments, small), capfd)

    return start


@pytest.fixture
def refused(start):
    """The one line with which a recipe refuses this."""

    def refused(recipe_class, *arguments):
        outcome = start(recipe_class, *arguments)
        assert outcome.code == 2, outcome.out
        assert outcome.err.startswith("error: ")
        assert outcome.err.count("\n") == 1
        return outcome.err

    return refused


def write_rows(path, rows):
    """A JSONL file of these rows."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(path)


def summary(folder):
    """What a run left in figures."""
    return json.loads(Path(folder, "summary.json").read_text())


@pytest.fixture
def gradacc(monkeypatch, capfd):
    """The command line in this process: its exit code, output and errors."""

    def gradacc(*words):
        monkeypatch.setattr(sys, "argv", ["gradacc", *map(str, words)])
        capfd.readouterr()
        reset_accelerate()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()

    return gradacc
