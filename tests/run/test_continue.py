"""`gradacc continue`: a run that has ended is trained further, exactly from its last state."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from conftest import ROOT
from recipe_runs import load_recipe, run_recipe, summary, write_rows

from gradacc_hf.accumulation.accelerate_state import reset_accelerate
from gradacc_hf.run.runner import run

TextClassification = load_recipe("text_classification").TextClassification
WINDOWS = 5  # of an epoch: 72 training rows in windows of 16


@pytest.fixture(scope="module")
def flags(tiny_bert, tmp_path_factory):
    """The settings of a small run with dropout, without a schedule."""
    texts = (f"some {number} words" for number in range(80))
    rows = [{"text": text, "label": "even" if i % 2 else "odd"} for i, text in enumerate(texts)]
    data = write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)
    words = ["--data.train", data, "--model.name", tiny_bert, "--model.dropout", 0.1]
    words += [
        "--batch.effective",
        16,
        "--budget.max_tokens",
        200,
        "--optim.lr",
        1e-3,
        "--data.max_length",
        32,
    ]
    words += ["--optim.scheduler", "constant", "--train.noise_every", 1]
    return [*words, "--output.tracker", "none"]


@pytest.fixture(scope="module")
def one_epoch(flags, tmp_path_factory):
    """A run of one epoch that has ended."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(TextClassification, [*map(str, flags), "--output.dir", str(folder)])
    reset_accelerate()
    return folder


@pytest.fixture
def folder(one_epoch, tmp_path, monkeypatch):
    """A copy of the run, as "run" in the current folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(one_epoch, tmp_path / "run").relative_to(tmp_path)


@pytest.fixture
def lengthened(gradacc):
    """What `gradacc continue` prints."""

    def lengthened(*words):
        code, out, err = gradacc("continue", *words)
        assert (code, err) == (0, "")
        return out

    return lengthened


def weights(folder):
    return safetensors.torch.load_file(Path(folder) / "last/model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def history(folder):
    rows = [json.loads(line) for line in (Path(folder) / "history.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("window", "epoch", "loss", "lr", "examples")} for row in rows]


def test_one_epoch_and_one_more_are_two_epochs_to_the_bit(folder, lengthened, flags, capfd):
    shutil.copytree(folder, "parts")
    before = weights(folder)
    two = ["--train.epochs", 2, "--train.eval_every", WINDOWS, "--output.dir", "two"]
    assert run_recipe(TextClassification, [*flags, *two], capfd).code == 0
    out = lengthened("run", "--train.epochs", "+1")
    assert f"continue              windows {WINDOWS + 1} to {2 * WINDOWS}\n" in out
    assert f"\nhead                  kept: the head of this run after window {WINDOWS}\n" in out
    lengthened("parts", "--train.max_windows", "+2")
    lengthened("parts", "--train.max_windows", "+3", "--optim.scheduler", "constant")
    assert not same(weights("run"), before)
    for other in ("run", "parts"):
        assert same(weights(other), weights("two"))
        assert history(other) == history("two")
    assert summary("run")["evaluations"] == summary("two")["evaluations"]
    assert yaml.safe_load(Path("run/config.yaml").read_text())["train"]["epochs"] == 2
    assert summary("parts")["continued_after"] == [5, 7]
    first, *parts = summary("parts")["command"].split(" && ")
    assert str(flags[1]) in first
    assert parts[0] == "gradacc continue parts --train.max_windows 7"
    assert parts[1] == "gradacc continue parts --train.max_windows 10 --optim.scheduler constant"


@pytest.mark.slow  # three launches
def test_two_processes_continue_to_the_bit(flags, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launch += [ROOT / "configs/accelerate/cpu_2.yaml"]
    recipe = [ROOT / "recipes/text_classification.py", *flags]
    for words in (
        [*recipe, "--train.epochs", 2, "--output.dir", "two"],
        [*recipe, "--output.dir", "parts"],
        ["-m", "gradacc_hf", "continue", "parts", "--train.epochs", "+1"],
    ):
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        subprocess.run([*map(str, [*launch, *words])], cwd=tmp_path, env=environment, check=True, timeout=300)
    assert summary(tmp_path / "parts")["processes"] == 2
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "two"))


def test_the_schedule_is_stretched_or_new_as_the_plan_says(folder, lengthened):
    out = lengthened("run", "--train.epochs", "+1", "--optim.scheduler", "linear", "--optim.lr", 1e-2)
    assert "linear, new from window 6; learning rate 0.01 at window 6, 0.002 at window 10" in out
    out = lengthened("run", "--train.epochs", "+1")
    assert "linear, stretched over windows 6 to 15; learning rate 0.005 at window 11, 0.001 at" in out
    wsd = ["--optim.scheduler", "wsd", "--optim.decay_ratio", 0.4, "--optim.min_lr_ratio", 0.5]
    out = lengthened("run", "--train.epochs", "+1", *wsd, "--optim.lr", 4e-3)
    assert "wsd, new from window 16; learning rate 0.004 at window 16, 0.00259 at window 20" in out
    rate = [row["lr"] for row in history("run")]
    assert rate[4:6] + rate[9:11] + rate[14:15] == pytest.approx([1e-3, 1e-2, 2e-3, 5e-3, 1e-3])
    assert rate[15:] == pytest.approx([4e-3, 4e-3, 4e-3, 4e-3, 4e-3 - 2e-3 * 0.5**0.5])


def test_a_continuation_that_was_killed_is_resumed_with_its_own_schedule(folder, lengthened, capfd):
    lengthened("run", "--train.epochs", "+1", "--optim.lr", 1e-2, "--optim.scheduler", "linear")
    ended = weights("run")
    shutil.rmtree("run/checkpoints/window-00000010")
    Path("run/summary.json").unlink()  # as a kill in the second epoch leaves the folder
    outcome = run_recipe(TextClassification, ["--resume", "run", "--optim.lr", 0.5], capfd)
    assert "optim.lr: found 0.5, but the run had 0.01" in outcome.err
    outcome = run_recipe(TextClassification, ["--resume", "run"], capfd)
    assert "resume                run, after window 5\n" in outcome.out
    assert same(weights("run"), ended)


def test_patience_is_counted_anew(folder, lengthened):
    stops = ["--train.eval_every", 1, "--train.early_stopping", 2, "--optim.lr", 1e-9]
    lengthened("run", "--train.epochs", 9, *stops)
    windows = summary("run")["windows"]
    assert 7 <= windows <= 10  # in the second epoch
    out = lengthened("run", "--train.epochs", "+1", "--check")
    assert f"continue              windows {windows + 1} to {3 * WINDOWS}\n" in out
    lengthened("run", "--train.max_windows", "+9", "--optim.lr", 1.0)
    assert summary("run")["windows"] == windows + 2


def test_what_cannot_be_continued_is_refused_in_one_line(folder, gradacc, tmp_path):
    shutil.rmtree(shutil.copytree("run", "bare") + "/checkpoints")
    Path(shutil.copytree("run", "half"), "summary.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for words, said in (
        (["run"], "--continue: run has ended after 5 windows, and no length is given; add --train.epochs +1"),
        (["run", "--train.epochs", "+x"], "--train.epochs: found '+x'; allowed: a total such as 3, or a"),
        (["run", "--train.epochs", "1"], "the run would have 5 windows, and it has ended after 5; give more"),
        (["run", "--train.epochs", "+1", "--batch.effective", "8"], "batch.effective: found 8, but the run"),
        (
            ["run", "--train.epochs", "+1", "--output.dir", "a"],
            "--output.dir: run is continued in its folder",
        ),
        (["bare", "--train.epochs", "+1"], "does not hold the state after the last window, 5; start a new"),
        (["half", "--train.epochs", "+1"], "half has not ended; resume it first: --resume half"),
        (["gone", "--train.epochs", "+1"], "gone: found no such folder"),
    ):
        code, _, err = gradacc("continue", *words)
        assert (code, err.count("\n"), err[:7]) == (2, 1, "error: "), err
        assert said in err
    code, out, _ = gradacc("continue", "run", "--help")
    assert (code, out[:6]) == (0, "usage:")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
