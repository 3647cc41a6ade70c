"""`gradacc runs` lists the runs below a folder, and is robust against broken and foreign files."""

import json
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
import yaml
from recipe_runs import load_recipe, write_rows
from rich.console import Console

from gradacc_hf.cli import runs as command
from gradacc_hf.cli.runs import list_runs
from gradacc_hf.errors import InputError


@pytest.fixture
def folder(start, tmp_path):
    """A folder that holds a real run two levels below."""
    rows = write_rows("rows.jsonl", [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(40)])
    settings = ["--data.train", rows, "--train.max_windows", 2, "--output.dir", "runs/group/a-10"]
    settings += ["--train.best_metric", "accuracy", "--train.best_direction", "max"]
    assert start(load_recipe("text_classification").TextClassification, *settings).code == 0
    return tmp_path / "runs"


def test_a_finished_run_is_listed_with_its_figures(folder, capfd):
    command.main([str(folder), "--json"])
    (run,) = json.loads(capfd.readouterr().out)
    summary = json.loads((folder / "group/a-10/summary.json").read_text())
    assert run["best"] == summary["best"]["accuracy"]
    assert run["seconds"] == pytest.approx(summary["seconds"])
    fields = ("recipe", "data", "metric", "effective_batch", "windows", "state", "note")
    wanted = ["text_classification", "rows.jsonl", "accuracy", 16, 2, "finished", ""]
    assert [run[name] for name in fields] == wanted


def test_broken_and_foreign_folders_are_listed_or_left_out_but_refuse_nothing(folder):
    for name in ("a-2", "broken"):
        shutil.copytree(folder / "group/a-10", folder / "group" / name)
    (folder / "group/a-2/summary.json").unlink()
    with (folder / "group/a-2/history.jsonl").open("a") as history:
        history.write('{"loss": 1, "sec')
    (folder / "group/broken/summary.json").write_text('{"windows": ')
    (folder / "group/broken/config.yaml").write_text("a: [")
    foreign = {"a": "x: [", "b": "- 1", "c": yaml.safe_dump({"model": {"name": "x"}}), "d": "\0"}
    for name, text in foreign.items():
        (folder / "foreign" / name).mkdir(parents=True)
        (folder / "foreign" / name / "config.yaml").write_text(text)
        (folder / "foreign" / name / "summary.json").write_text("[1]")
    (folder / "foreign/link").symlink_to(folder / "group")
    found = {run.run.removeprefix(f"{folder}/"): run for run in list_runs(folder)}
    states = {name: (run.state, run.windows) for name, run in found.items()}
    wanted = {"group/a-2": ("resumable", 2), "group/a-10": ("finished", 2), "group/broken": ("unfinished", 2)}
    assert list(states.items()) == list(wanted.items())
    assert "config.yaml: " in found["group/broken"].note
    assert "summary.json: " in found["group/broken"].note


def test_foreign_texts_reach_the_terminal_neither_as_commands_nor_a_million_times(tmp_path, capfd):
    (tmp_path / "a/logs/b").mkdir(parents=True)
    levels = "".join(f"{two}: &{two} [{', '.join([f'*{one}'] * 9)}]\n" for one, two in pairwise("abcdefghij"))
    own = 'batch: {effective: 8}\noptim: {}\ntrain: {}\nmodel: {name: "\\e[31m:smile:"}\n'
    own += f"recipe: {tmp_path}/a/evil.py\n"
    (tmp_path / "a/config.yaml").write_text(f"{own}a: &a [x]\n{levels}data: {{train: *j}}")
    command.show(list_runs(tmp_path), tmp_path, Console(width=80, highlight=False))
    printed = capfd.readouterr().out
    assert "–, �[31m:smile:, –" in printed.replace("evil", "–", 1)
    assert f"to continue a resumable run: python recipes/evil.py --resume {tmp_path}/a\n" in printed


def test_every_folder_of_runs_is_listed_whatever_its_name_and_the_command_names_the_recipe(
    folder, capfd, monkeypatch
):
    (folder / "group").rename(folder / "logs")
    (folder / "logs/a-10/summary.json").unlink()
    monkeypatch.chdir(folder)
    command.main(["."])
    printed = capfd.readouterr().out
    script = load_recipe("text_classification").__file__
    assert "logs/a-10  resumable" in printed
    assert printed.endswith(f"python {script} --resume logs/a-10\n")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, capfd):
    (tmp_path / "file").touch()  # root may read every folder
    assert list_runs(tmp_path / "file") == []
    assert capfd.readouterr().err == f"{tmp_path}/file: cannot be read (Not a directory)\n"


def test_a_run_that_another_process_writes_is_running(folder):
    (folder / "group/a-10/summary.json").unlink()
    script = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX);"
        "print('locked', flush=True); time.sleep(60)"
    )
    arguments = [sys.executable, "-c", script, folder / "group/a-10/.lock"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"locked\n"
        assert [run.state for run in list_runs(folder)] == ["running"]
        writer.kill()
    assert [run.state for run in list_runs(folder)] == ["resumable"]


@pytest.mark.parametrize("width", [80, 150])
def test_the_table_fits_the_terminal(folder, width, capfd):
    command.show(list_runs(folder), folder, Console(width=width, highlight=False))
    text = capfd.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    for word in ("group/a-10", "text_classification", "rows.jsonl", "accuracy", "16", "finished"):
        assert word in text


def test_a_folder_without_runs_is_said(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"runs: found no such folder; .* gradacc runs FOLDER"):
        command.main([])
    command.main(["."])
    assert capfd.readouterr().out == "no runs in .\n"
