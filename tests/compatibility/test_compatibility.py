"""What worked with version 0.1.0 still works: copies of its recipes, its runs, and its checkpoints.

`recipes_0_1_0/` and `run_0_1_0/` are as version 0.1.0 wrote them; README.md says how they were made.
"""

import ast
import json
import math
import random
import runpy
import shutil
import subprocess
import sys
from collections.abc import Set
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets.config
import PIL.Image
import pytest
import torch
import transformers
from safetensors.torch import load_file

from gradacc_hf.accumulation.accelerate_state import reset_accelerate

HERE = Path(__file__).parent
RECIPES = HERE / "recipes_0_1_0"
RUN = HERE / "run_0_1_0"
HISTORY_RTOL = 1e-5
WEIGHTS_RTOL, WEIGHTS_ATOL = 1e-4, 1e-5

pytestmark = pytest.mark.filterwarnings("ignore:.*gradacc_hf:DeprecationWarning")

MOVED = {
    "gradacc_hf.contrastive": "gradacc_hf.accumulation.gradient_cache",
    "gradacc_hf.items": "gradacc_hf.accumulation.loss_items",
    "gradacc_hf.labels": "gradacc_hf.data.columns",
    "gradacc_hf.loop": "gradacc_hf.training.loop",
    "gradacc_hf.tasks.joined": "gradacc_hf.tasks.encoder_decoder",
    "gradacc_hf.tasks.masked": "gradacc_hf.tasks.masked_head",
}
"""Old module paths that recipes of 0.1.0 import, and where their names are now."""


def imports_of_recipes():
    """Return the names that the recipes of 0.1.0 import from the package, by module."""
    found = {}
    for file in sorted(RECIPES.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gradacc_hf"):
                found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return found


IMPORTS = imports_of_recipes()


@dataclass
class Outcome:
    """The exit code of a command, and the text that it printed."""

    code: str | int | None
    out: str
    err: str


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Start each test in an empty folder; restore `sys.path`, which `gradacc predict` extends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def command(monkeypatch, capfd):
    """Run a file (`x.py`), or else a module (`gradacc_hf`), as `python` does, in this process."""

    def command(program, *words):
        monkeypatch.setattr(sys, "argv", [str(program), *map(str, words)])
        reset_accelerate()
        capfd.readouterr()
        code = 0
        try:
            if str(program).endswith(".py"):
                runpy.run_path(str(program), run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__")
        except SystemExit as end:
            code = end.code
        return Outcome(code, *capfd.readouterr())

    return command


def lines_of(file):
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def summary(folder):
    return json.loads(Path(folder, "summary.json").read_text(encoding="utf-8"))


# Imports

IMPORTING = """
import importlib, json, sys, warnings

imports, moved = json.loads(sys.argv[1])
found = {}
for path in moved.values():
    try:
        importlib.import_module(path)
    except ImportError:
        pass
for path, names in imports.items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = {}
        try:
            exec(compile(f"from {path} import {', '.join(names)}", "user.py", "exec"), values)
            new = importlib.import_module(moved.get(path, path))
            other = [name for name in names if values[name] is not getattr(new, name)]
            error = None
        except (ImportError, AttributeError) as problem:
            other, error = None, str(problem)
    said = [warning for warning in caught if issubclass(warning.category, DeprecationWarning)]
    said = [{"message": str(w.message), "file": w.filename} for w in said if "gradacc_hf" in str(w.message)]
    found[path] = {"warnings": said, "other": other, "error": error}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported():
    """Import in a new process what recipes import; return the warnings and errors by module."""
    given = json.dumps([{path: sorted(names) for path, names in IMPORTS.items()}, MOVED])
    done = subprocess.run([sys.executable, "-c", IMPORTING, given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_error_of_version_0_1_0_warns_of_its_new_name(imported):
    found = imported["gradacc_hf.errors"]
    assert (found["other"], found["error"]) == ([], None)
    assert found["warnings"][0]["file"] == "user.py"
    assert "gradacc_hf.InputError" in found["warnings"][0]["message"]


def test_moved_modules_are_those_that_a_recipe_imports():
    assert set(MOVED) <= set(IMPORTS)


@pytest.mark.parametrize("path", sorted(set(IMPORTS) - set(MOVED) - {"gradacc_hf.errors"}))
def test_an_import_that_stays_warns_of_nothing(imported, path):
    assert imported[path] == {"warnings": [], "other": [], "error": None}


# After the move: remove this mark, and correct the table MOVED where a path differs from it.
@pytest.mark.parametrize("path", MOVED)
def test_an_old_module_path_gives_the_same_names_and_warns_of_the_new_path(imported, path):
    """The warning names the line of the recipe; Python shows it by default only there."""
    found = imported[path]
    assert (found["other"], found["error"]) == ([], None)
    assert [warning["file"] for warning in found["warnings"]] == ["user.py"]
    assert MOVED[path] in found["warnings"][0]["message"]


# Recipes


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Save a Llama of 1 layer, with the tokenizer of `run_0_1_0/model` and a chat template."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    tokenizer = transformers.AutoTokenizer.from_pretrained(RUN / "model")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }} : {{ message.content }} [SEP] {% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def texts(number=24, length=8):
    draw = random.Random(0)
    return [
        " ".join(draw.choices(["tea", "garden", "value", "list", "the", "of"], k=length))
        for _ in range(number)
    ]


def chats():
    return [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text[:10]}]}
        for text in texts()
    ]


def questions():
    return [
        {
            "question": "what is it",
            "context": text,
            "answers": {"text": [text.split()[0]], "answer_start": [0]},
        }
        for text in texts()
    ]


def tagged():
    tags = {"tea": "B-DRINK", "garden": "B-PLACE"}
    rows = [text.split() for text in texts()]
    return [{"tokens": row, "tags": [tags.get(token, "O") for token in row]} for row in rows]


def column_rows(**columns):
    """Return rows whose columns hold a text, shortened to so many characters."""
    return [{name: text[:size] for name, size in columns.items()} for text in texts()]


@dataclass(frozen=True)
class Case:
    """A recipe on a task: its settings, its rows, and what `gradacc predict` is asked and answers."""

    rows: list[dict[str, Any]] | None = None
    flags: tuple[Any, ...] = ()
    asked: str | dict[str, str] = "the tea of the garden"
    answered: Set[str] = frozenset()


CASES = {
    "causal_lm": Case(chats(), ("--data.sample_tokens", 4), answered={"answer"}),
    "causal_lm, packed": Case(
        column_rows(prompt=20, completion=8),
        ("--data.packing", "true", "--data.sample_tokens", 4),
        answered={"answer"},
    ),
    "contrastive": Case(column_rows(anchor=12, positive=40), answered={"text", "found"}),
    "contrastive, negatives": Case(
        column_rows(anchor=12, positive=40, wrong=30),
        ("--data.negative_column", "wrong", "--data.symmetric", "false"),
        answered={"text", "found"},
    ),
    "image_classification": Case(
        flags=(
            "--model.name",
            "embedded:tiny_vit",
            "--data.train",
            "embedded:digits",
            "--budget.max_tokens",
            200,
        ),
        asked="image.png",
        answered={"label", "score"},
    ),
    "masked_lm": Case(column_rows(text=60), asked="the [MASK] of the garden", answered={"text", "fillings"}),
    "question_answering": Case(
        questions(),
        ("--data.doc_stride", 8),
        asked={"question": "what is it", "context": "tea of the garden"},
        answered={"answer", "answer_start", "score"},
    ),
    "seq2seq": Case(column_rows(source=60, target=12), ("--data.max_target_length", 8), answered={"output"}),
    "text_classification": Case(
        [{"text": text, "label": "tea" if "tea" in text else "none"} for text in texts(length=3)],
        answered={"label", "score"},
    ),
    "text_classification, pairs": Case(
        [{"text": text, "other": text[:9], "label": len(text) / 9} for text in texts()],
        ("--data.text_pair_column", "other", "--data.problem", "regression"),
        asked={"text": "the tea", "other": "the garden"},
        answered={"score"},
    ),
    "token_classification": Case(tagged(), answered={"tokens", "tags", "entities"}),
}


def test_every_recipe_of_0_1_0_is_tested():
    assert {file.stem for file in RECIPES.glob("*.py")} == {
        *(name.partition(",")[0] for name in CASES),
        "minimal",
        "compare_trainer",
    }


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_of_0_1_0_trains_and_predicts(command, name, tiny_llama, tmp_path):
    """The copy lies in a folder of its user, as `gradacc cp` writes it."""
    case, name = CASES[name], name.partition(",")[0]
    shutil.copy(RECIPES / f"{name}.py", tmp_path)
    settings = {
        "--model.name": tiny_llama if name == "causal_lm" else RUN / "model",
        "--data.train": "rows.jsonl",
        "--data.max_length": 32,
        "--batch.effective": 8,
        "--budget.max_tokens": 96,
        "--train.max_windows": 2,
        "--output.dir": "run",
        "--output.tracker": "none",
    }
    settings |= dict(zip(case.flags[::2], case.flags[1::2], strict=True))
    if case.rows is not None:
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in case.rows))
    trained = command(f"{name}.py", *(word for setting in settings.items() for word in setting))
    assert trained.code == 0, trained.err
    rows = lines_of("run/history.jsonl")
    assert [row["window"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert max(row["accumulation_steps"] for row in rows) > 1
    assert math.isfinite(summary("run")["eval"]["loss"])

    PIL.Image.new("L", (8, 8), 100).save("image.png")
    Path("asked.jsonl").write_text(json.dumps(case.asked) + "\n")
    said = command("gradacc_hf", "predict", "run", "--input", "asked.jsonl")
    assert (said.code, said.err) == (0, "")
    [answer] = map(json.loads, said.out.splitlines())
    assert set(answer) >= case.answered


@pytest.mark.parametrize("name", ["minimal", "compare_trainer"])
def test_a_loop_of_0_1_0_still_starts(command, name, tmp_path):
    shutil.copy(RECIPES / f"{name}.py", tmp_path)
    checked = command(f"{name}.py", "--check")
    assert (checked.code, checked.out) == (0, "check: this would run\n"), checked.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words", "said"),
    [("minimal", ["--max_windows", 1], "accuracy"), ("compare_trainer", ["--windows", 1], "windows")],
)
def test_a_loop_of_0_1_0_still_trains(command, name, words, said, tmp_path):
    shutil.copy(RECIPES / f"{name}.py", tmp_path)
    trained = command(f"{name}.py", *words)
    assert trained.code == 0, trained.err
    assert said in trained.out


# Runs and checkpoints


@pytest.fixture
def old_run(tmp_path):
    """Copy the runs of 0.1.0, their data and their recipe into the current folder."""
    shutil.copytree(RUN, tmp_path, dirs_exist_ok=True)
    shutil.copy(RECIPES / "text_classification.py", tmp_path)
    for file in ("stopped/config.yaml", "finished/config.yaml"):
        Path(file).write_text(Path(file).read_text().replace("PLACE", str(tmp_path)))


def assert_same_figures(found, expected):
    """Check that `found` has the figures of `expected`; it may have more."""
    if isinstance(expected, dict):
        assert set(found) >= set(expected)
        for key in expected:
            assert_same_figures(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same_figures(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=HISTORY_RTOL, nan_ok=True)
    else:
        assert found == expected


def test_a_stopped_run_of_0_1_0_ends_as_the_whole_run_of_0_1_0(command, old_run):
    before = lines_of("stopped/history.jsonl")
    resumed = command("text_classification.py", "--resume", "stopped", "--budget.padding_free", "off")
    assert resumed.code == 0, resumed.err
    assert "stopped, after window 8" in resumed.out
    found, expected = lines_of("stopped/history.jsonl"), lines_of("finished/history.jsonl")
    assert len(before) < len(found)
    intervals = [(row.pop("noise_low"), row.pop("noise_high")) for row in found]  # 0.1.0 records none
    assert set(intervals[: len(before)]) == {(None, None)}
    assert set(intervals[len(before) :]) == {(0.0, None)}, "no bounds without the early measurements"
    assert found[: len(before)] == before
    for rows in (found, expected):
        for row in rows:
            row.pop("seconds", None)
    assert_same_figures(found, expected)
    for key in ("windows", "eval", "best", "evaluations", "baseline", "examples", "items"):
        assert_same_figures(summary("stopped")[key], summary("finished")[key])
    # 0.1.0 recorded a split of the first window without the micro-batches for the noise scale.
    tokens = [sorted(chain.from_iterable(summary(run)["first_window"])) for run in ("stopped", "finished")]
    assert tokens[0] == tokens[1]
    for which in ("best", "last"):
        weights, right = (load_file(f"{run}/{which}/model.safetensors") for run in ("stopped", "finished"))
        assert weights.keys() == right.keys()
        for name in right:
            torch.testing.assert_close(weights[name], right[name], rtol=WEIGHTS_RTOL, atol=WEIGHTS_ATOL)
    assert not Path("stopped/TO_BE_RESUMED").exists()


WATCHED = """
import random, numpy, torch
from text_classification import TextClassification, run

class Watched(TextClassification):
    def loss(self, outputs, batch):
        name, keys, *rest = numpy.random.get_state()
        numbers = (name, torch.from_numpy(keys.astype("int64")), *rest)
        states.append({"torch": [torch.get_rng_state()], "python": random.getstate(), "numpy": numbers})
        return super().loss(outputs, batch)

states = []
run(Watched)
torch.save(states, "states.pt")
"""


def test_random_states_of_a_0_1_0_checkpoint_are_restored(command, old_run, monkeypatch):
    """Without dropout, nothing draws random numbers before the loss of the first micro-batch."""
    Path("watched.py").write_text(WATCHED)
    monkeypatch.syspath_prepend(Path().absolute())
    monkeypatch.delitem(sys.modules, "text_classification", raising=False)
    resumed = command("watched.py", "--resume", "stopped")
    del sys.modules["text_classification"]
    assert resumed.code == 0, resumed.err
    saved = torch.load(RUN / "stopped/checkpoints/window-00000008/random-0.pt", weights_only=True)
    torch.manual_seed(0)
    assert not torch.equal(saved["torch"][0], torch.get_rng_state())
    assert any(is_same_state(state, saved) for state in torch.load("states.pt", weights_only=True))


def is_same_state(state, saved):
    """Compare the random states of torch on the CPU, of Python and of numpy."""
    name, keys, *rest = state["numpy"]
    other_name, other_keys, *other_rest = saved["numpy"]
    return (
        torch.equal(state["torch"][0], saved["torch"][0])
        and state["python"] == saved["python"]
        and (name, rest) == (other_name, other_rest)
        and torch.equal(keys, other_keys)
    )


def test_a_finished_run_of_0_1_0_answers_as_it_did(command, old_run):
    said = command("gradacc_hf", "predict", "finished", "--input", "questions.txt")
    assert (said.code, said.err) == (0, "")
    assert_same_figures([json.loads(line) for line in said.out.splitlines()], lines_of("answers.jsonl"))


@pytest.mark.parametrize("run", ["finished", "stopped"])
def test_a_run_of_0_1_0_has_a_report(command, old_run, run):
    written = command("gradacc_hf", "report", run)
    assert written.code == 0, written.err
    assert "generator" in Path(run, "report.html").read_text(encoding="utf-8")


def test_a_run_of_0_1_0_that_has_ended_is_not_begun_again(command, old_run):
    said = command("text_classification.py", "--resume", "finished")
    assert said.code == 0, said.err
    assert "there is nothing to resume" in said.out
    assert lines_of("finished/history.jsonl") == lines_of(RUN / "finished/history.jsonl")
