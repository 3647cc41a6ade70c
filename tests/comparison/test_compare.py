"""All contenders train on the same examples in the same windows; reports are read from the runs' files."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from gradacc_hf.accumulation.reference import EXACT
from gradacc_hf.comparison import cli, worker
from gradacc_hf.comparison.cli import print_comparison
from gradacc_hf.comparison.compare import ComparedRuns, compare, ratios, read_compared_runs
from gradacc_hf.comparison.worker import CONTENDERS, STRATEGIES, WorkerRun, measure_errors, train_timed
from gradacc_hf.errors import InputError, OutOfMemoryError
from gradacc_hf.recipe.loading import load_recipe

RECIPE = """
from datasets import Dataset
from gradacc_hf.verification.tiny_models import build_head
from gradacc_hf.recipe.base import Recipe

class Tiny(Recipe):
    def datasets(self):
        head = build_head("token_classification", "bert")
        examples = Dataset.from_list(head.examples([3, 38, 7, 30, 9, 21, 5, 16] * 5))
        return examples, examples.select(range(4))

    def model(self):
        return build_head("token_classification", "bert", seed=self.config.train.seed).model

    def collate(self, examples, pad_to=None):
        return build_head("token_classification", "bert").collate(examples, pad_to)
"""
CONFIG = """
recipe: tiny.py
data: {train: none}
batch: {effective: 16}
optim: {lr: 0.001, scheduler: constant}
"""
TOKENS = ["--budget.max_tokens", "152"]  # 4 examples of 38 tokens


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "tiny.py").write_text(RECIPE)
    (folder / "tiny.yaml").write_text(CONFIG)
    return ["--config", str(folder / "tiny.yaml"), *TOKENS]


@pytest.fixture(scope="module")
def runs(settings, tmp_path_factory):
    """Every contender's first two windows, in this process."""
    folder = tmp_path_factory.mktemp("runs")
    seen = {}
    for name in CONTENDERS:
        run = WorkerRun(load_recipe(settings), 2)
        train_timed(run, name, folder / name / "seed_0")
        seen[name] = run.by_window()
        measure_errors(run, name, folder / name / "seed_0")
    return folder, seen


def test_all_see_the_same_examples_in_the_same_windows_but_who_sorts_across_them(runs):
    _, seen = runs

    def window(name, number):
        return sorted(str(example) for micro_batch in seen[name][number] for example in micro_batch)

    for name in CONTENDERS:
        same = [window(name, number) == window("ours", number) for number in range(2)]
        assert same == [name not in STRATEGIES] * 2
    assert sorted(window("trainer_by_length", 0) + window("trainer_by_length", 1)) == sorted(
        window("ours", 0) + window("ours", 1)
    )


def test_micro_batches_take_equal_memory(runs):
    folder, seen = runs
    assert {len(micro_batch) for window in seen["trainer"] for micro_batch in window} == {4}
    for name in set(CONTENDERS) - {"at_once", "trainer_batch_rebalance", "exact_trainer_batch_rebalance"}:
        for window in seen[name]:
            most = 2 * 152 if name == "ours" else 152  # of what stays padded, such as embeddings
            assert all(len(p) * max(len(e["input_ids"]) for e in p) <= most for p in window)
            assert all(sum(len(e["input_ids"]) for e in p) <= 152 for p in window)
    assert read_compared_runs(folder / "ours").padding < read_compared_runs(folder / "trainer").padding


def test_the_gradients_of_ours_exact_trainer_and_at_once_are_exact_and_the_others_are_not(runs):
    folder, _ = runs
    worst = {name: max(read_compared_runs(folder / name).gradient_errors) for name in CONTENDERS}
    assert {name for name, error in worst.items() if error <= EXACT} == {
        *("ours", "ours_padded", "exact_trainer", "exact_trainer_batch_rebalance", "at_once"),
    }
    assert worst["trainer"] > 2
    assert 0.001 < worst["accelerate"] < 1


def test_exact_ways_log_the_same_losses_and_end_in_the_same_model(runs):
    folder, _ = runs
    found = {
        name: read_compared_runs(folder / name) for name in ("ours", "exact_trainer", "at_once", "trainer")
    }
    at_once = found["at_once"]
    for name in ("ours", "exact_trainer"):
        assert found[name].losses == pytest.approx(at_once.losses, rel=1e-5)
        assert found[name].metrics["loss"] == pytest.approx(at_once.metrics["loss"], rel=1e-5)
    assert found["trainer"].losses[0] > 3 * at_once.losses[0]


def test_a_run_leaves_what_a_report_reads(runs):
    folder, seen = runs
    for name in CONTENDERS:
        run = folder / name / "seed_0"
        rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
        summary = json.loads((run / "summary.json").read_text())
        assert [row["window"] for row in rows] == [1, 2]
        assert summary["contender"] == CONTENDERS[name]
        assert summary["examples"] == sum(row["examples"] for row in rows) == 32
        assert summary["tokens"] == sum(len(e["input_ids"]) for w in seen[name] for p in w for e in p)
        assert sum(row["seconds"] for row in rows) == pytest.approx(summary["seconds"])
        assert summary["first_window"] == [
            [len(e["input_ids"]) for e in micro_batch] for micro_batch in seen[name][0]
        ]
        assert summary["training_memory_bytes"] >= 0
        assert summary["cpu_seconds"] > 0
        assert (run / "config.yaml").exists()


def test_ratios_are_of_runs_that_ran_next_to_each_other():
    def contender(*speeds):
        return ComparedRuns("", (), speeds, speeds, speeds, speeds, 0.0, (), (), {})

    assert ratios(contender(8.0, 2.0), contender(2.0, 1.0)) == [4.0, 2.0]


def test_the_table_names_all_and_says_why_one_is_missing(runs):
    folder, _ = runs
    found = {name: read_compared_runs(folder / name) for name in CONTENDERS if name != "at_once"}
    console = Console(record=True, width=120)
    print_comparison({"at_once": "does not fit in memory", **found}, console)
    text = console.export_text()
    assert "at once was not compared: does not fit in memory" in text
    assert text.count("× as many examples per second as") == 7
    assert text.count("per second of CPU time: ") == 7
    assert [line.split()[0] for line in text.splitlines() if " exact " in line] == [
        "ExactTrainer",
        "ExactTrainer,",
        "gradacc",
        "gradacc,",
    ]
    assert not any(math.isnan(error) for contender in found.values() for error in contender.gradient_errors)


def gradacc(*arguments, cwd=None):
    command = [Path(sys.executable).parent / "gradacc", "compare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.mark.slow
def test_the_command_runs_contenders_in_turns_and_leaves_a_report(settings, tmp_path):
    arguments = [*settings, "--contenders", "trainer,ours", "--windows", "1", "--repeats", "1", "--json"]
    done = gradacc(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == ["trainer", "ours"]
    assert len(found["ours"]["examples_per_second"]) == 1
    report = (tmp_path / "runs/compare-1/report.html").read_text()
    assert "gradacc-hf" in report
    assert "gradacc compare --config" in report


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--windows", "3"], "--windows: found 3; allowed: 1 to 2, the full windows of an epoch"),
        (["--repeats", "0"], "--repeats: found 0; allowed: 1 or more"),
        (["--contenders", "ours,hers"], "--contenders: found 'ours,hers'; allowed: some of at_once, trainer"),
        (["--contenders", "ours,ours"], "each once"),
        (["--batch.size", "3"], "batch.size"),
        (
            ["--output.dir=x"],
            "--output.dir: found a setting that gradacc compare ignores; name the folder with",
        ),
        (["--continue", "run"], "--continue: found a setting that gradacc compare ignores; remove it"),
        (
            ["--windows", "1", "--output", "file/x"],
            r"--output: file/x cannot be made \(Not a directory\); give a folder",
        ),
        (
            ["--train.eval_every", "3"],
            "--train.eval_every: found a setting that gradacc compare ignores; remove",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_run(settings, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=message):
        cli.main([*settings, *more])
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_folder_that_is_there_is_refused(settings, tmp_path):
    with pytest.raises(InputError, match="exists; give a new folder"):
        cli.main([*settings, "--windows", "1", "--output", str(tmp_path)])


LARGE = """
    def loss(self, outputs, batch):
        import torch
        if len(batch["labels"]) >= 16:  # a window at once
            torch.empty(2**50)  # more than any machine has: what its allocator says
        return outputs.loss
"""
BROKEN = """
    def loss(self, outputs, batch):
        raise RuntimeError("broken")
"""


def recipe_with(more, folder):
    """Write the tiny recipe with a separate loss, and return its settings."""
    (folder / "tiny.py").write_text(RECIPE + more)
    (folder / "tiny.yaml").write_text(CONFIG)
    return ["--config", str(folder / "tiny.yaml"), *TOKENS]


def test_a_window_that_does_not_fit_at_once_leaves_errors_unmeasured_and_the_run_as_it_is(tmp_path):
    settings = recipe_with(LARGE, tmp_path)
    with pytest.raises(SystemExit) as left:
        worker.main(["ours", str(tmp_path / "ours/seed_0"), "1", "errors", *settings])
    assert left.value.code == 0
    found = read_compared_runs(tmp_path / "ours")
    assert found.gradient_errors == ()
    print_comparison({"ours": found}, console := Console(record=True, width=80))
    assert "not measured" in console.export_text()


def test_errors_are_measured_in_float32_whatever_the_budget_s_precision(settings, tmp_path):
    run = WorkerRun(load_recipe([*settings, "--budget.precision", "bf16"]), 1)
    for name in ("ours", "trainer", "exact_trainer", "accelerate"):
        train_timed(run, name, tmp_path / name / "seed_0")
    for name in ("ours", "exact_trainer"):
        measure_errors(run, name, tmp_path / name / "seed_0")
        assert max(read_compared_runs(tmp_path / name).gradient_errors) <= EXACT
    summary = json.loads((tmp_path / "trainer/seed_0/summary.json").read_text())
    assert summary["precision"] == "bf16"


def test_recipes_that_pad_alike_pad_alike_for_all(settings, tmp_path):
    recipe = load_recipe(settings)
    recipe.pad_to = "window"
    run = WorkerRun(recipe, 1)
    for name in ("ours", "exact_trainer"):
        train_timed(run, name, tmp_path / name / "seed_0")
        row = json.loads((tmp_path / name / "seed_0/history.jsonl").read_text())
        assert row["padded_tokens"] == 16 * 38  # the longest of all, which this window has


@pytest.mark.slow
def test_when_no_contender_can_run_it_is_one_line(tmp_path):
    settings = recipe_with(BROKEN, tmp_path)
    with pytest.raises(InputError, match="no contender could run: gradacc: RuntimeError: broken"):
        compare(settings, tmp_path / "runs", ["ours"], 1, 1)


def test_a_contender_that_does_not_fit_is_told_by_its_exit_code(tmp_path, capsys):
    settings = recipe_with(LARGE, tmp_path)
    with pytest.raises(SystemExit) as left:
        worker.main(["at_once", str(tmp_path / "run"), "1", "errors", *settings])
    assert left.value.code == worker.DOES_NOT_FIT
    assert "can't allocate memory" in capsys.readouterr().err


def test_an_example_that_does_not_fit_alone_is_told_by_the_same_exit_code(capsys):
    with pytest.raises(SystemExit) as left, worker.exit_if_out_of_memory(worker.DOES_NOT_FIT):
        raise OutOfMemoryError("out of memory on example 3 alone")
    assert left.value.code == worker.DOES_NOT_FIT
    assert "example 3 alone" in capsys.readouterr().err
