"""`gradacc new` writes a recipe, two configs and a test, which pass as they are."""

import subprocess
import sys

import pytest

from gradacc_hf.cli.main import configs, recipes
from gradacc_hf.cli.new import main
from gradacc_hf.errors import InputError
from gradacc_hf.recipe.loading import load_recipe

RECIPES = [name for name in recipes() if configs(name)]


@pytest.mark.parametrize("like", RECIPES)
def test_every_recipe_can_be_the_beginning_of_a_new_one(tmp_path, capsys, like):
    main(["my_task", "--like", like, "--folder", str(tmp_path)])
    names = (
        "recipes/my_task.py",
        "configs/my_task_offline.yaml",
        "configs/my_task.yaml",
        "tests/test_my_task.py",
    )
    files = [tmp_path / name for name in names]
    *written, look, _, run, test = capsys.readouterr().out.splitlines()
    assert written == [*map(str, files)]
    assert look.endswith(f"gradacc data --config {files[1]}")
    assert run == f"run it: accelerate launch {files[0]} --config {files[1]} --budget auto"
    assert test.endswith(str(files[3]))
    for file in files[:3]:
        assert f"{like}.py" not in file.read_text()
        assert "launch.sh" not in file.read_text()
    for config in files[1:3]:
        assert type(load_recipe(["--config", str(config)])).__name__ == "MyTask"


@pytest.mark.parametrize(
    "like",
    [
        name if name == "image_classification" else pytest.param(name, marks=pytest.mark.slow)
        for name in RECIPES
    ],
)
def test_the_test_of_a_new_recipe_passes(tmp_path, like):
    main(["my_task", "--like", like, "--folder", str(tmp_path)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_my_task.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "3 passed" in done.stdout


@pytest.mark.parametrize(
    ("name", "like", "message"),
    [
        ("My-Task", "seq2seq", "NAME: found 'My-Task', no name of a module"),
        ("class", "seq2seq", "NAME: found 'class', no name of a module"),
        ("seq2seq", "seq2seq", "NAME: found 'seq2seq', the name of a recipe of gradacc"),
        ("recipe", "causal_lm", "the class Recipe is already used in recipes/causal_lm.py"),
        ("random", "seq2seq", "NAME: found 'random', the name of an installed module"),
        ("a" * 300, "seq2seq", "nothing was written, because "),
        ("my_task", "nonsense", "--like: found 'nonsense'; allowed: causal_lm"),
        ("my_task", "minimal", "gradacc cp minimal FOLDER copies it"),
    ],
)
def test_what_cannot_be_written_is_one_line(tmp_path, name, like, message):
    with pytest.raises(InputError) as refused:
        main([name, "--like", like, "--folder", str(tmp_path)])
    assert message in str(refused.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/my_task.yaml").write_text("mine")
    with pytest.raises(InputError, match="nothing was written, because these files exist: "):
        main(["my_task", "--like", "seq2seq", "--folder", str(tmp_path)])
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["my_task.yaml"]
