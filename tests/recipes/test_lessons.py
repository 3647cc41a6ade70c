"""Every lesson shows what it says: which way is right, which is wrong, and by how much."""

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import gradacc_hf
from gradacc_hf import lessons
from gradacc_hf.accumulation.reference import EXACT
from gradacc_hf.cli import main as cli
from gradacc_hf.doctor.script import run_script
from gradacc_hf.errors import InputError
from gradacc_hf.utils.paths import bundle_root

FOLDER = bundle_root() / "recipes/lessons"
README = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def shown(capsys, tmp_path):
    """Run a lesson with its plot; give its figures and what it printed, without the last line."""

    def run(name):
        figures = lessons.run(name, plot := tmp_path / "plot.svg")
        *lines, last, path = capsys.readouterr().out.splitlines()
        assert path == str(plot)
        assert last.startswith("In gradacc: "), "a lesson ends with gradacc's feature that does it"
        assert ElementTree.parse(plot).getroot().tag.endswith("svg")
        return figures, lines

    return run


def test_eight_samples(shown):
    found, lines = shown("eight_samples")
    assert found["step ratio"] == pytest.approx(4)
    assert "The classic program never divides by 4: its first step is 4.00 times as long." in lines
    largest = max(map(abs, found["closed form"]))
    assert found["error"] < EXACT * largest
    assert found["divided"] == pytest.approx(found["closed form"], abs=EXACT * largest)
    far = [
        max(abs(a - b) for a, b in zip(found[w], found["label"], strict=True)) for w in ("classic", "gradacc")
    ]
    assert far[0] > 20, "four times too long a step turns the model round"
    assert far[1] < 8
    assert lines[1].split() == ["[1.0,", "2.0]", *(f"{found[way][0]:.3f}" for way in list(found)[:6])]


def test_when_to_step(shown):
    found, _ = shown("when_to_step")
    assert {name: way["updates"] for name, way in found.items()} == {
        "every 4": 1,
        "in gradacc": 1,
        "every 1": 4,
        "every 1, zeroing every 4": 4,
    }
    assert found["every 4"]["error"] < EXACT
    assert found["in gradacc"]["error"] < EXACT
    assert 0.01 < found["every 1"]["error"] < 0.5
    assert found["every 1, zeroing every 4"]["error"] > 1


def test_when_to_zero(shown):
    found, _ = shown("when_to_zero")
    assert found["after the step"]["error"] < EXACT
    assert found["in gradacc"]["error"] < EXACT
    assert max(found["before every backward"]["lengths"]) < 0.6, "a quarter of the window, more or less"
    assert found["never"]["lengths"][0] == pytest.approx(1), "the first window is right either way"
    assert min(found["never"]["lengths"][1:]) > 2


def test_pipeline_trace(shown):
    found, lines = shown("pipeline_trace")
    assert found["gradacc"] < EXACT
    assert found["plain"] > 1e-3, "the examples left over leak into the next epoch"
    assert lines[0] == "plain: 250 batches of 4 per epoch, 62 steps; 2 batches fill no window"
    assert lines[2] == "gradacc: (1000, 10) examples -> 63 windows, the last with 8"
    assert found["loss"] == sorted(found["loss"], reverse=True)
    assert found["accuracy"][-1] > 0.9
    assert [line.split()[0] for line in lines[-6:-2]] == ["Linear", "ReLU", "Linear", "Softmax"]


def test_unequal_items(shown):
    found, lines = shown("unequal_items")
    assert found["mean of means"]["error"] > 0.5
    assert abs(found["mean of means"]["loss"] - found["at once"]["loss"]) > 0.01
    assert lines[0].endswith("in micro-batches of 3 + 33 + 6 + 21:")
    for way in ("by tokens", "gradacc"):
        assert found[way]["error"] < EXACT
        assert found[way]["loss"] == pytest.approx(found["at once"]["loss"], rel=EXACT)


@pytest.mark.slow
def test_sixteen_to_sixtyfour(shown):
    found, _ = shown("sixteen_to_sixtyfour")
    for max_norm in (torch.inf, 0.1):
        assert found["gradacc", max_norm]["error"] < EXACT
        assert 0.01 < found["16 × 4", max_norm]["error"] < 0.1, "40 of 1,000 rows are dropped"
    assert found["gradacc, clipping each", 0.1]["error"] > 0.01, "on the very same examples"
    assert all(found["16", torch.inf]["losses"] < found["16 × 4", torch.inf]["losses"]), (
        "four times the steps"
    )
    accuracies = [found[way, torch.inf]["accuracy"].mean() for way in ("16", "16 × 4", "gradacc")]
    assert max(accuracies) - min(accuracies) < 0.01


def test_batch_norm(shown):
    found, _ = shown("batch_norm")
    for norm in ("LayerNorm", "GroupNorm"):
        assert max(error for errors in found[norm] for error in errors) < EXACT
    plain, through_gradacc, first_example = found["BatchNorm"]
    assert plain == sorted(plain), "the smaller the micro-batch, the worse"
    assert plain[0] > 0.01
    assert through_gradacc == pytest.approx(plain, rel=1e-3), "no accumulation can help"
    assert min(first_example) > 0.1


def test_not_quite_the_same(shown):
    found, _ = shown("not_quite_the_same")
    for name in ("SGD", "AdamW"):
        steps, errors = zip(*(found[name, way] for way in ("64", "16 × 4", "gradacc", "16")), strict=True)
        assert steps == (10, 10, 10, 40)
        assert max(errors[:3]) < EXACT
        assert errors[3] > 0.3, "four times the steps go another way"
    assert found[1] > 0.1
    assert found[1000] < found[1] / 10, "dropout's draws agree on average"


def test_learning_rate(shown):
    found, _ = shown("learning_rate")
    assert found["error"] < EXACT
    first = {name: losses[0] for name, losses in found.items() if name != "error"}
    assert first["64, 0.1"] > 1.15 * first["16, 0.1"], "a quarter of the steps lags behind"
    assert first["64, 0.1 × 4"] == pytest.approx(first["16, 0.1"], rel=0.05), "four times the rate catches up"
    assert first["64, 0.1 × 4"] < first["64, 0.1 × sqrt 4"] < first["64, 0.1"]
    assert first["64, 1.0 × 4"] > 3 * first["64, 1.0"], "at a large rate the rule overshoots"
    assert max(found["64, 1.0 × 4, warm-up"][2:]) > 1, "and this warm-up puts it off"


def test_memory(shown):
    found, _ = shown("memory")
    once, *accumulated, with_gradacc = found.values()
    for parts in accumulated:
        assert parts["gradients"] == parts["parameters"] == once["parameters"]
        assert parts["optimizer"] == once["optimizer"] == pytest.approx(2 * once["parameters"], rel=0.01)
    assert once["gradients"] < 0.5 * once["parameters"], "the peak comes before most of them exist"
    activations = [parts["activations"] for parts in (once, *accumulated)]
    assert all(later < 0.62 * earlier for earlier, later in pairwise(activations))
    assert with_gradacc == pytest.approx(found["4 × 8"], rel=1e-3)


def test_time(shown):
    found, _ = shown("time")
    assert max(way["error"] for way in found.values()) < EXACT
    assert {way["tokens"] for (_, kind), way in found.items() if kind == "alike"} == {64 * 32}
    assert found["gradacc", "unequal"]["tokens"] < 0.3 * found["1 × 64", "unequal"]["tokens"]
    # No time is asserted but the grossest: 64 passes for the tokens of one.
    assert found["64 × 1", "alike"]["ratio"] > 1.5


def test_mixed_precision(shown):
    found, _ = shown("mixed_precision")
    assert found["float32"]["error"] < EXACT
    assert found["float32"]["zeros"] == 0
    assert found["bf16"]["error"] < 2**-6
    assert found["bf16, gradacc"]["error"] < 2**-6
    assert found["fp16"]["error"] < 2**-9
    assert found["fp16"]["zeros"] == 0
    assert found["fp16, no scaler"]["zeros"] > 0.3, "small gradients underflow"
    for mistake in ("no scaler", "unscaled after the first"):
        assert found[f"fp16, {mistake}"]["error"] > 0.1
    assert found["fp16, clipped while scaled"]["error"] > 0.99, "next to nothing is left"


def test_bf16_weights(shown):
    found, lines = shown("bf16_weights")
    assert found["in bf16"] == sorted(found["in bf16"]), "the more micro-batches, the worse"
    assert found["in bf16"][-1] > 5 * found["in bf16"][0]
    for way in ("in float32", "in gradacc"):
        assert max(found[way]) == found[way][0] == found["in bf16"][0], "never worse than at once"
    assert found["in gradacc"] == pytest.approx(found["in float32"], rel=0.01)
    assert [line.split()[0] for line in lines[1:]] == ["1", "4", "16", "64", "256"]


def test_synchronise_once(shown):
    found, _ = shown("synchronise_once")
    assert {name: way["reduces"] for name, way in found.items()} == {
        "each micro-batch": 4,
        "once": 1,
        "gradacc": 1,
    }
    assert max(way["error"] for way in found.values()) < EXACT


def test_contrastive(shown):
    found, _ = shown("contrastive")
    cached = [error for name, error in found.items() if name.endswith("cached")]
    assert len(cached) == 5
    assert max(cached) < EXACT
    accumulated = [found[f"{64 // size} × {size}"] for size in (32, 16, 8)]
    assert accumulated == sorted(accumulated)
    assert accumulated[0] > 0.2


NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


def test_the_path_leads_through_every_lesson_once():
    assert sorted(lessons.names()) == NAMES
    assert len(NAMES) == 15


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_is_short_stands_alone_and_its_question_is_in_the_readme(name):
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 90
    assert f"gradacc lessons {name}. The doctor finds: " in text
    assert lessons.question(name) in README
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
    assert imported <= {"torch", "accelerate", "gradacc_hf", *sys.stdlib_module_names}
    public = re.findall(r"^from gradacc_hf import (.+)$", text, re.MULTILINE)
    assert [name for line in public for name in line.split(", ") if name not in gradacc_hf.__all__] == []
    assert "from gradacc_hf." not in text


@pytest.mark.parametrize("name", NAMES)
def test_every_lesson_has_a_test(name):
    assert f"test_{name}" in globals()


def test_a_lesson_runs_by_its_path_beside_one_called_time():
    done = subprocess.run([sys.executable, "when_to_zero.py"], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "in gradacc               1.00       1.00       1.00       1.00" in done.stdout


def test_lessons_follow_one_another_in_one_process_whatever_the_environment_says(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    before = dict(os.environ)
    assert lessons.run("when_to_step")["in gradacc"]["error"] < EXACT
    assert lessons.run("mixed_precision")["bf16, gradacc"]["error"] > EXACT
    assert dict(os.environ) == before, "a lesson leaves the environment as it was"


LONG = ("learning_rate", "sixteen_to_sixtyfour", "not_quite_the_same", "pipeline_trace", "batch_norm")
LONG += ("bf16_weights", "when_to_zero")  # a quarter of a minute or more under the doctor


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in NAMES]
)
def test_the_doctor_finds_what_a_lesson_shows(name, tmp_path):
    path = FOLDER / f"{name}.py"
    says = re.search(r"The doctor finds: ([^.]+)\.\n", path.read_text(encoding="utf-8"))[1]
    if name == "synchronise_once":  # the two processes that it starts
        command = [
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "-m",
            "gradacc_hf",
            "doctor",
        ]
        done = subprocess.run(
            [sys.executable, "-m", *command, path, tmp_path], capture_output=True, text=True
        )
        found = set(re.findall(r"^[✗·] (\w+):", done.stdout, re.MULTILINE))
    else:
        diagnoses = run_script(path, [], say=lambda said: None)
        assert diagnoses
        found = {finding.name for diagnosis in diagnoses for finding in diagnosis.findings}
    assert found == (set() if says == "nothing" else set(re.split(r",\s", says)))


def test_gradacc_lessons_lists_them_with_their_questions(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gradacc", "lessons"])
    cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == lessons.names()
    assert all(line.endswith("?") for line in lines)


def test_a_lesson_runs_from_the_command_line(tmp_path):
    command = [
        Path(sys.executable).parent / "gradacc",
        "lessons",
        "when_to_step",
        "--plot",
        tmp_path / "plot.svg",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "plot.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.svg"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], r"lesson: found 'nonsense'; there are: eight_samples, .*"),
        (["../minimal"], r"lesson: found '../minimal'; there are: .*"),
        (["batch_norm", "memory"], r"unrecognized arguments: memory \(see gradacc --help\)"),
        (["batch_norm", "--plot"], r"argument --plot: expected one argument \(see gradacc lessons --help\)"),
        (["--plot", "a.svg"], r"--plot needs the name of a lesson: .*"),
        (["batch_norm", "--plot", "a.png"], r"--plot: found a.png; allowed: a file that ends in .svg"),
        (
            ["batch_norm", "--plot", "there.svg"],
            r"--plot: there.svg exists already; give another name, or move it",
        ),
        (
            ["batch_norm", "--plot", "no/a.svg"],
            r"--plot: no/a.svg cannot be written \(No such file or directory\); .*",
        ),
        (
            ["batch_norm", "--plot", "there.svg/a.svg"],
            r"--plot: .* cannot be written \(Not a directory\); .*",
        ),
        (
            ["batch_norm", "--plot", f"{'a' * 300}.svg"],
            r"--plot: a+.svg cannot be written \(File name too long\); .*",
        ),
    ],
)
def test_a_wrong_argument_is_one_line_and_nothing_is_run(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("there.svg").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["gradacc", "lessons", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"error: {message}\n", err)
    assert [path.name for path in tmp_path.iterdir()] == ["there.svg"]
    assert Path("there.svg").read_text() == "mine"


def test_a_lesson_under_a_launcher_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="run `gradacc lessons` without one"):
        lessons.run("when_to_step")
    assert capsys.readouterr().out == ""


def test_the_reader_of_the_output_may_leave():
    program = f"{Path(sys.executable).parent / 'gradacc'} lessons | head -1"
    done = subprocess.run(program, shell=True, capture_output=True, text=True)
    assert done.stdout == "eight_samples         Why accumulate?\n"
    assert done.stderr == ""
