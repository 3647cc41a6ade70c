"""--resume, as a user of a recipe meets it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from datasets import Dataset, Image
from recipe_runs import load_recipe, summary, write_rows

from gradacc_hf.config.parser import read_command_line
from gradacc_hf.data.columns import integers_as_text
from gradacc_hf.run.fingerprint import fingerprint
from gradacc_hf.run.resolve import recorded_defaults

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
    assert again.out == "run has ended: there is nothing to resume (report: run/report.html)\n"


def test_a_run_of_0_1_0_whose_numbers_were_sorted_as_text_is_resumed(start, tmp_path):
    labelled = [{**row, "label": ["9", "10"][row["label"] == "odd"]} for row in rows()]
    settings = ["--data.train", write_rows(tmp_path / "rows.jsonl", labelled), "--output.dir", "run"]
    settings += ["--train.epochs", 3, "--budget.max_tokens", 400, "--checkpoint.every", 2]
    ToldToStop.windows = 0
    with integers_as_text():
        assert start(ToldToStop, *settings).code == 0
    outcome = start(TextClassification, *settings, "--resume", "auto")
    assert outcome.code == 0, outcome.err
    config = json.loads((tmp_path / "run/last/config.json").read_text())
    assert config["id2label"] == {"0": "10", "1": "9"}


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
        (["--optim.lr", 0.5], "optim.lr: found 0.5, but the run had 0.001; to resume from"),
        (["--batch.effective", 8], "batch.effective: found 8, but the run had 16"),
        (["--train.seed", 1], "train.seed: found 1, but the run had 0"),
        (["--data.train", "other.jsonl"], "data.train: the content has changed; to resume from"),
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
    assert "run, from the start: no checkpoint found" in outcome.out
    assert summary("run")["windows"] == 15


def test_a_run_that_has_ended_is_not_gone_on_with_other_settings(start, refused, stopped):
    settings, _ = stopped
    assert start(TextClassification, *settings, "--resume", "auto").code == 0
    line = refused(TextClassification, *settings, "--resume", "auto", "--train.max_windows", 20)
    assert "train.max_windows: found 20, and run has ended with None" in line


def test_a_setting_whose_default_has_changed_keeps_its_recorded_value(tmp_path):
    """A run of three epochs that was recorded with eval_every 0, the default of its time."""
    recorded = Path(__file__).parents[1] / "compatibility/run_0_1_0/stopped/config.yaml"
    of_its_time = recorded.read_text(encoding="utf-8").replace("eval_every: 3", "eval_every: 0")
    (tmp_path / "config.yaml").write_text(of_its_time)

    def kept(*flags):
        return recorded_defaults(read_command_line(["--data.train", "rows.jsonl", *flags]), tmp_path)

    assert kept() == {"train.eval_every": 0}
    assert kept("--train.eval_every", "0.25") == {}  # refused by its key, as before
    (tmp_path / "config.yaml").write_text(of_its_time.replace("eval_every: 0", "eval_every: null"))
    assert kept() == {}
    (tmp_path / "config.yaml").write_text(of_its_time.replace("  eval_every: 0\n", ""))
    assert kept() == {"train.eval_every": 0}


def test_of_two_runs_in_one_folder_the_second_is_refused(stopped, refused, tmp_path):
    settings, _ = stopped
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
    hold += "print(1, flush=True); time.sleep(60)"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "run/.lock")], stdout=subprocess.PIPE, text=True
    )
    try:
        other.stdout.readline()
        line = refused(TextClassification, *settings, "--resume", "auto")
        assert "output.dir: run: another run writes into it: wait until that run ends, stop it" in line
    finally:
        other.kill()
        other.wait()


def test_what_a_run_of_others_would_send_elsewhere_is_said_anew(stopped, tmp_path, capfd):
    config = (tmp_path / "run/config.yaml").read_text()
    config = config.replace("push_to_hub: null", "push_to_hub: someone/else")
    (tmp_path / "run/config.yaml").write_text(config.replace("tracker: none", "tracker: wandb"))
    found = read_command_line(["--resume", "run"], data=TextClassification.Data)
    assert found.output.push_to_hub is None
    assert found.output.tracker == "tensorboard"
    said = "output.push_to_hub: the value in run/config.yaml is ignored on resume: give the flag again"
    assert said in capfd.readouterr().err
    words = ["--resume", "run", "--output.push_to_hub", "mine"]
    assert read_command_line(words, data=TextClassification.Data).output.push_to_hub == "mine"


def test_images_are_known_by_their_content_not_their_names(tmp_path):
    def images(name, shade):
        (tmp_path / name).mkdir()
        PIL.Image.new("RGB", (4, 4), shade).save(tmp_path / name / "0.png")
        return Dataset.from_dict({"image": [str(tmp_path / name / "0.png")]}).cast_column("image", Image())

    one, moved, other = images("a", "red"), images("b", "red"), images("c", "blue")
    assert fingerprint(one) == fingerprint(moved)
    assert fingerprint(one) != fingerprint(other)
