"""--resume, as a user of a recipe meets it."""

import os
import shutil
import signal

import pytest
import torch
from recipe_runs import load_recipe, summary, write_rows

TextClassification = load_recipe("text_classification").TextClassification
STOP = 5  # the window in which the first run is told to stop


class ToldToStop(TextClassification):
    """Label a text, until it is told to stop."""

    windows = 0

    def loss(self, outputs, batch):
        ToldToStop.windows += torch.is_grad_enabled()
        if ToldToStop.windows == STOP:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(outputs, batch)


def rows(first="a word"):
    texts = [first, *(f"some {i} words" for i in range(1, 80))]
    return [{"text": text, "label": "even" if i % 2 else "odd"} for i, text in enumerate(texts)]


@pytest.fixture
def stopped(start, tmp_path):
    """The settings of a run that was told to stop, in this folder."""
    settings = ["--data.train", write_rows(tmp_path / "rows.jsonl", rows()), "--output.dir", "run"]
    settings += ["--train.epochs", 3, "--budget.max_tokens", 400, "--checkpoint.every", 2]
    ToldToStop.windows = 0
    outcome = start(ToldToStop, *settings)
    assert outcome.code == 0, outcome.err
    done = int(outcome.out.partition("stopped after window ")[2].split()[0])
    assert done < 15
    return settings, done


def test_a_run_goes_on_with_another_budget_and_then_has_come_to_its_end(start, stopped, tmp_path):
    settings, done = stopped
    assert (tmp_path / "run/TO_BE_RESUMED").exists()
    settings[settings.index("--budget.max_tokens") + 1] = 200
    outcome = start(TextClassification, *settings, "--resume", "auto")
    assert outcome.code == 0, outcome.err
    assert f"resume                run, after window {done}" in outcome.out
    assert summary("run")["windows"] == 15
    assert not (tmp_path / "run/TO_BE_RESUMED").exists()
    again = start(TextClassification, *settings, "--resume", "auto")
    assert again.code == 0
    assert again.out == "run has come to its end: nothing to go on with (its report: run/report.html)\n"


def test_the_folder_alone_says_what_to_go_on_with_also_where_the_data_have_moved(start, stopped, tmp_path):
    _, done = stopped
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved.jsonl")
    outcome = start(TextClassification, "--resume", "run", "--data.train", tmp_path / "moved.jsonl")
    assert outcome.code == 0, outcome.err
    assert f"run, after window {done}" in outcome.out


def test_without_a_run_auto_begins_one_in_a_folder_of_its_own_and_goes_on_there(start, stopped, tmp_path):
    settings, _ = stopped
    unnamed = [word for word in settings if word not in ("--output.dir", "run")]
    ToldToStop.windows = 0
    assert start(ToldToStop, *unnamed, "--resume", "auto").code == 0
    assert (tmp_path / "runs/run-1/TO_BE_RESUMED").exists()
    outcome = start(TextClassification, *unnamed, "--resume", "auto")
    assert "runs/run-1, after window" in outcome.out
    assert summary("runs/run-1")["windows"] == 15
    assert start(TextClassification, *unnamed, "--resume", "auto", "--train.max_windows", 1).code == 0
    assert summary("runs/run-2")["windows"] == 1


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["--optim.lr", 0.5], "optim.lr: found 0.5, and the run had 0.001; to go on from"),
        (["--batch.effective", 8], "batch.effective: found 8, and the run had 16"),
        (["--train.seed", 1], "train.seed: found 1, and the run had 0"),
        (["--data.train", "other.jsonl"], "data.train: not those of before; to go on from"),
        (["--resume", "nowhere"], "--config: found 'nowhere/config.yaml'"),
    ],
)
def test_what_would_change_the_mathematics_is_refused_by_its_key(refused, stopped, changes, line, tmp_path):
    settings, _ = stopped
    write_rows(tmp_path / "other.jsonl", rows(first="another word"))
    words = {**dict(zip(settings[::2], settings[1::2], strict=True)), "--resume": "auto"}
    words |= dict(zip(changes[::2], changes[1::2], strict=True))
    if words["--resume"] != "auto":
        del words["--output.dir"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert line in refused(TextClassification, *(word for setting in words.items() for word in setting))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_run_without_checkpoint_starts_anew_in_its_folder(start, stopped, tmp_path):
    settings, _ = stopped
    shutil.rmtree(tmp_path / "run/checkpoints")
    outcome = start(TextClassification, *settings, "--resume", "auto")
    assert "run, from the start: it has no checkpoint" in outcome.out
    assert summary("run")["windows"] == 15
