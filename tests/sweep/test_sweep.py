"""`gradacc sweep`: ordinary runs, each trained once, with one table and one plot."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from recipe_runs import load_recipe, run_recipe, with_defaults, write_rows
from rich.console import Console

from gradacc_hf.cli.runs import list_runs
from gradacc_hf.config.schema import BudgetConfig, Config, TrainConfig
from gradacc_hf.errors import InputError
from gradacc_hf.sweep.cli import Sweep, best_line, main, show_results, train_all, windows_of, without_resume
from gradacc_hf.sweep.page import plots_of, write_page
from gradacc_hf.sweep.runs import TrialResult
from gradacc_hf.sweep.space import Range, Space, folder_name, split, split_settings
from gradacc_hf.sweep.state import locked, open_folder, read_points, settings_of, write_points

TextClassification = load_recipe("text_classification").TextClassification
CONFIG = str(ROOT / "configs/text_classification_offline.yaml")
TYPES = {
    "optim.lr": float,
    "batch.effective": int | dict[int, int],
    "data.labels": str | list[str] | None,
    "model.name": str,
}


@pytest.mark.parametrize(
    ("words", "shared", "choices", "ranges"),
    [
        ("--optim.lr 1e-5,3e-5", "", {"optim.lr": ["1e-5", "3e-5"]}, {}),
        ("--optim.lr=1e-6..1e-4", "", {}, {"optim.lr": Range(1e-6, 1e-4, False)}),
        ("--batch.effective 16..64", "", {}, {"batch.effective": Range(16, 64, True)}),
        ("--model.name a/b,c", "", {"model.name": ["a/b", "c"]}, {}),
        ("--data.labels a,b", "--data.labels a,b", {}, {}),
        ("--optim.lr 1e-5 --train.eval_on_start", "--optim.lr 1e-5 --train.eval_on_start", {}, {}),
    ],
)
def test_lists_and_ranges_vary_and_the_rest_is_shared(words, shared, choices, ranges):
    assert split_settings(words.split(), TYPES) == (shared.split(), Space(choices, ranges))


def test_commas_inside_brackets_separate_nothing():
    assert split("{0: 32, 500: 64},16") == ["{0: 32, 500: 64}", "16"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--output.dir x", "--output.dir: found a setting of a single run; remove it; --output names"),
        ("--optim.lr 1e-5,1e-5", "--optim.lr: found 1e-5,1e-5; give each value once"),
        ("--optim.lr 1e-4..1e-6", "give the smaller end first"),
        ("--batch.effective 16..20.5", "give integers"),
        ("--model.name 1..2", "a range is for numbers"),
        ("--train.seed 1,2", "--train.seed: found several values; give --seeds"),
        ("--optim.lr 1e-6..1e-4", "--optim.lr: found a range, which needs --trials N"),
        ("", "gradacc sweep: no setting has several values"),
        ("--optim.lr 1e-5,3e-5 --trials 0", "--trials: found 0; allowed: 1 or more"),
        ("--optim.lr 1e-3,1.0e-3", "--optim.lr: found 1e-3,1.0e-3; give each value once"),
        ("--train.best_metric accuracy,loss", "--train.best_metric: found several values; give one"),
        ("--continue run --optim.lr 1,2", "--continue: found a setting of a single run"),
        ("--optim.lrr 1e-5,3e-5", "unknown key --optim.lrr"),
        ("--optim.lr 1e-5,x", "--optim.lr: found 'x'"),
        ("--batch.effective 4,9999999", "batch.effective: found 9999999"),
        ("--optim.lr 1e-5,3e-5 --resume here", "--resume: found here, which holds no sweep"),
    ],
)
def test_what_cannot_vary_is_one_line_before_anything_is_written(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        main(["--config", CONFIG, *words.split()])
    assert "\n" not in str(refused.value)
    assert [*tmp_path.rglob("*")] == []


def test_different_points_have_different_folders():
    points = [{"model.name": name} for name in ("a/b", "a-b", "x" * 200 + "1", "x" * 200 + "2")]
    assert len({folder_name(point) for point in points}) == len(points)
    assert folder_name({"optim.lr": "1e-05", "batch.effective": "16"}) == "lr-1e-05_effective-16"


@pytest.mark.parametrize(
    "point",
    [{"optim.lr": "1e-3", "output.push_to_hub": "x"}, {"optim.lr": "1"}, {"optim.lr": "1e-3 --x"}, {}, "x"],
)
def test_a_point_of_a_folder_that_is_not_in_the_space_is_refused(tmp_path, point):
    folder = open_folder(tmp_path / "sweep", None, [], {})
    space = Space({}, {"optim.lr": Range(1e-4, 1e-2, False)})
    write_points(folder, [{"optim.lr": "1e-3"}])
    assert read_points(folder, space) == [{"optim.lr": "1e-3"}]
    write_points(folder, [point])
    with pytest.raises(InputError, match="start the sweep again, in another folder"):
        read_points(folder, space)


def test_a_sweep_is_resumed_with_the_same_settings_by_one_process_at_a_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [settings_of(Config(train=TrainConfig(epochs=epochs))) for epochs in (0, 1, 2)]
    folder = open_folder(None, None, ["--x"], settings[1])
    with pytest.raises(InputError, match=r"other settings; its settings: --train\.epochs 1$"):
        open_folder(None, str(folder), ["--x"], settings[2])
    with pytest.raises(InputError, match=r"other settings; its settings: --x$"):
        open_folder(None, str(folder), ["--y"], settings[1])
    assert open_folder(None, "auto", ["--x"], settings[2]) != folder
    other = settings_of(Config(budget=BudgetConfig(memory="1GiB")))
    assert open_folder(None, "auto", ["--x"], other) == folder
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^--output: file/x cannot be made \(Not a directory\)"):
        open_folder(Path("file/x"), None, [], {})
    script = "import fcntl, time; file = open('.lock', 'a'); fcntl.lockf(file, fcntl.LOCK_EX);"
    command = [sys.executable, "-c", f"{script} print(flush=True); time.sleep(60)"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match=f"another sweep trains in {folder}"), locked(folder):
            pass
        other.kill()
    with locked(folder):
        pass


class InProcess:
    """Train the runs of a sweep in this process. The run `stop_at` gets a signal after its first window."""

    def __init__(self, capfd, stop_at=None):
        self.capfd, self.stop_at, self.started = capfd, stop_at, []

    def start(self, arguments, log, on_wait):
        self.started.append(log.stem)
        recipe = TextClassification
        if len(self.started) == self.stop_at:

            class Stopped(TextClassification):
                def validate(self, *arguments):
                    os.kill(os.getpid(), signal.SIGTERM)
                    return super().validate(*arguments)

            recipe = Stopped
        outcome = run_recipe(recipe, arguments, self.capfd)
        log.write_text(outcome.out + outcome.err)
        return outcome.code

    def is_stopped(self):
        return len(self.started) == self.stop_at

    def train(self, sweep, folder):
        return train_all(sweep, folder, self.start, self.is_stopped, lambda what, run: lambda: None)


@pytest.fixture
def flags(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = ["tea garden letter", "prize cash winner"]
    rows = [{"text": f"{texts[i % 2]} {i}", "label": "ab"[i % 2]} for i in range(40)]
    small = {"--model.name": tiny_bert, "--model.dropout": 0, "--data.max_length": 16, "--train.epochs": 2}
    small |= {
        "--data.train": write_rows("rows.jsonl", rows),
        "--output.tracker": "none",
        "--train.eval_every": 1,
    }
    small |= {"--train.best_metric": "accuracy", "--train.best_direction": "max", "--train.noise_every": 0}
    return [str(word) for word in with_defaults([], small)]


def test_an_interrupted_sweep_goes_on_where_it_stopped_and_ends_in_a_table_and_a_plot(flags, capfd):
    space = Space({"optim.lr": ["1e-9", "3e-3"], "batch.effective": ["8"]})
    sweep = Sweep(flags, space, range(2), None, "accuracy", "max")
    folder = open_folder(None, None, flags, {})
    assert folder == Path("runs/sweep-1")
    assert windows_of(sweep, TextClassification) == [10, 10]
    stopped = InProcess(capfd, stop_at=2)
    stopped.train(sweep, folder)
    states = {run.run.removeprefix(f"{folder}/"): run.state for run in list_runs(folder)}
    assert states == {"lr-1e-9_effective-8/seed-0": "finished", "lr-1e-9_effective-8/seed-1": "resumable"}
    assert open_folder(None, "auto", flags, {}) == open_folder(None, str(folder), flags, {}) == folder

    resumed = InProcess(capfd)
    results = sorted(resumed.train(sweep, folder), key=sweep.order)
    assert resumed.started == ["seed-1", "seed-0", "seed-1"]
    assert "after window 1" in (folder / "lr-1e-9_effective-8/seed-1.log").read_text()
    assert {run.state for run in list_runs(folder)} == {"finished"}
    assert [result.point["optim.lr"] for result in results] == ["3e-3", "1e-9"]
    best = json.loads((folder / "lr-3e-3_effective-8/seed-0/summary.json").read_text())["best"]["accuracy"]
    assert results[0].values[0] == best

    line = best_line(sweep, results)
    assert line.startswith("--optim.lr 3e-3 --batch.effective 8: accuracy ")
    page = write_page(folder, results, "accuracy", line, "gradacc sweep").read_text()
    assert page.count("<svg") == 1
    assert "<b>Best:</b> --optim.lr 3e-3 --batch.effective 8: accuracy" in page
    assert "lr-3e-3_effective-8/seed-1/report.html" in page
    for width in (80, 120):
        capfd.readouterr()
        show_results(sweep, results, Console(width=width, highlight=False))
        printed = capfd.readouterr().out
        assert max(map(len, printed.split("best  ")[0].splitlines())) <= width
        assert "2 of 2" in printed


@pytest.mark.parametrize(
    "words", ["--resume auto --trials 2", "--trials 2 --resume=x", "--trials 2 --resume x"]
)
def test_the_line_that_continues_keeps_the_other_flags(words):
    assert without_resume(words.split()) == ["--trials", "2"]


def test_a_signal_between_two_runs_starts_no_further_run(tmp_path):
    sweep = Sweep([], Space({"optim.lr": ["1", "2"]}), [0], None, "loss", "min")
    (result,) = train_all(sweep, tmp_path, pytest.fail, lambda: True, lambda what, run: lambda: None)
    assert result.values == ()


def test_a_run_that_fails_is_a_row_and_a_first_run_that_fails_ends_the_sweep(flags, capfd):
    folder = open_folder(None, None, flags, {})
    space = Space({"batch.effective": ["8", "999"]})
    results = InProcess(capfd).train(Sweep(flags, space, [0], None, "accuracy", "max"), folder)
    assert [bool(result.problem) for result in results] == [False, True]
    assert "batch.effective: found 999" in results[1].problem
    space = Space({"batch.effective": ["999", "8"]})
    sweep, folder = Sweep(flags, space, [0], None, "accuracy", "max"), open_folder(None, None, flags, {})
    with pytest.raises(InputError, match=r"batch\.effective: found 999"):
        InProcess(capfd).train(sweep, folder)


@pytest.mark.parametrize(
    ("points", "num_plots"),
    [
        ([{"optim.lr": f"1e-{i}"} for i in range(2, 12)], 1),
        ([{"optim.lr": f"1e-{i}", "optim.name": name} for i in (3, 4) for name in ("adamw", "sgd")], 1),
        ([{"optim.lr": f"1e-{i}", "batch.effective": str(i)} for i in range(2, 12)], 2),
    ],
)
def test_a_grid_is_one_plot_and_a_search_has_a_plot_for_each_setting(points, num_plots):
    results = [TrialResult(point, (), (0.5, 0.6), 1.0) for point in points]
    plots = plots_of(results, "accuracy")
    assert len(plots) == num_plots
    assert "accuracy" in plots[0]
    assert not any("mathdefault" in plot for plot in plots), "numbers, not formulas"


def test_optuna_chooses_points_of_a_range_and_chooses_the_same_again():
    pytest.importorskip("optuna", reason="needs the extra sweep")
    from gradacc_hf.sweep.search import next_point

    space = Space({"optim.name": ["adamw", "sgd"]}, {"optim.lr": Range(1e-6, 1e-2, False)})
    results = []
    for _ in range(30):
        point = next_point(space, results, "min", seed=0)
        assert point == next_point(space, results, "min", seed=0)
        lr = float(point["optim.lr"])
        assert 1e-6 <= lr <= 1e-2
        failed = point["optim.name"] == "sgd" and lr > 1e-3
        results.append((point, None if failed else abs(lr / 1e-4 - 1)))
    best = min((value, point["optim.lr"]) for point, value in results if value is not None)
    assert 5e-5 < float(best[1]) < 2e-4


@pytest.mark.slow
def test_ctrl_c_stops_the_command_and_its_own_line_continues_it(flags, tmp_path):
    flags[flags.index("--train.epochs") + 1] = "40"
    command = [sys.executable, "-m", "gradacc_hf", "sweep", "--config", CONFIG, *flags]
    command += ["--optim.lr", "1e-4,1e-3", "--batch.effective", "16"]
    history = tmp_path / "runs/sweep-1/lr-1e-4/seed-0/history.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        while not (history.is_file() and history.stat().st_size):
            assert running.poll() is None, running.stdout.read()
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        printed = running.communicate(timeout=300)[0]
    assert running.returncode == 128 + signal.SIGINT
    assert "SIGINT: stopping after this window" in printed
    assert "--resume runs/sweep-1" in printed
    windows = len(history.read_text().splitlines())
    done = subprocess.run([*command, "--resume", "auto"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"after window {windows}" in (tmp_path / "runs/sweep-1/lr-1e-4/seed-0.log").read_text()
    assert len(list_runs(Path("runs"))) == 2
