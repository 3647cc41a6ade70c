"""`gradacc ls` and `gradacc cp`."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gradacc_hf.cli import main as cli
from gradacc_hf.errors import InputError


def gradacc(*arguments):
    return subprocess.run(
        [Path(sys.executable).parent / "gradacc", *arguments], capture_output=True, text=True
    )


def test_ls_lists_every_recipe_with_its_configs():
    lines = dict(line.partition("  ")[::2] for line in gradacc("ls").stdout.splitlines())
    assert lines["text_classification"].split() == [
        "configs/text_classification.yaml",
        "configs/text_classification_offline.yaml",
        "configs/text_multi_label.yaml",
        "configs/text_regression.yaml",
    ]
    assert lines["image_classification"].split() == [
        "configs/image_classification.yaml",
        "configs/image_classification_offline.yaml",
    ]
    assert lines["contrastive"].split() == ["configs/contrastive.yaml", "configs/contrastive_offline.yaml"]
    assert "minimal" in lines


def test_every_config_names_a_recipe_that_is_there():
    files = list((cli.bundle_root() / "configs").glob("*.yaml"))
    assert sorted(file for name in cli.recipes() for file in cli.configs(name)) == sorted(files)


def test_a_copied_recipe_is_the_one_that_its_copied_config_names(tmp_path):
    assert gradacc("cp", "text_classification", str(tmp_path)).returncode == 0
    config = tmp_path / "configs/text_classification_offline.yaml"
    (line,) = [line for line in config.read_text().splitlines() if line.startswith("recipe:")]
    assert (config.parent / line.split()[1]).resolve() == (
        tmp_path / "recipes/text_classification.py"
    ).resolve()


@pytest.mark.parametrize("name", ["contrastive", "text_classification"])
def test_cp_says_how_the_copy_is_run(tmp_path, capsys, name):
    cli.copy_recipe(name, tmp_path)
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("run it: "))
    assert command[:2] == ["accelerate", "launch"]
    assert all(Path(file).is_file() for file in (command[2], command[4]))
    assert Path(command[4]).stem == f"{name}_offline"


def test_cp_ends_with_commands_of_the_task_that_need_no_network(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.copy_recipe("image_classification", Path())
    commands = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [command.split()[:2] for command in commands] == [
        ["gradacc", "data"],
        ["python", "recipes/image_classification.py"],
        ["accelerate", "launch"],
    ]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    for command in commands[:2]:
        subprocess.run(command, shell=True, check=True, env=environment, capture_output=True)
    assert Path("runs/image_classification_offline-1/summary.json").is_file()


def test_a_copied_lesson_runs(tmp_path):
    assert gradacc("cp", "lessons/when_to_step", str(tmp_path)).returncode == 0
    copy = tmp_path / "recipes/lessons/when_to_step.py"
    done = subprocess.run([sys.executable, copy], capture_output=True, text=True)
    assert "in gradacc               0.000 0.000 0.000" in done.stdout


def test_cp_overwrites_nothing(tmp_path):
    (tmp_path / "recipes").mkdir()
    (mine := tmp_path / "recipes/text_classification.py").write_text("mine")
    done = gradacc("cp", "text_classification", str(tmp_path))
    assert done.returncode == 2
    assert "nothing was copied, because these files exist: " in done.stderr
    assert mine.read_text() == "mine"
    assert not (tmp_path / "configs").exists()


def test_a_copy_that_cannot_be_written_leaves_no_file(tmp_path):
    (tmp_path / "configs").touch()
    with pytest.raises(InputError, match=r"^nothing was copied, because .*configs.* cannot be written"):
        cli.copy_recipe("text_classification", tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["configs"]


@pytest.mark.parametrize("name", ["nonsense", "../secrets"])
def test_an_unknown_recipe_is_one_line(tmp_path, name):
    done = gradacc("cp", name, str(tmp_path))
    assert done.returncode == 2
    known = ", ".join([*cli.recipes(), "and lessons/NAME"])
    assert done.stderr == f"error: no recipe '{name}'; allowed: {known}\n"
