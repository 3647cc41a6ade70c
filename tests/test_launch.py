"""launch.sh: N processes asked for are N running, bad input is one line, no accelerate config leaks in."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

RECIPE = "recipes/text_classification.py"


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    """What ./launch.sh would have installed: this environment, with the stamp that says so."""
    folder = tmp_path_factory.mktemp("venv")
    for part in ("bin", "lib", "pyvenv.cfg"):
        (folder / part).symlink_to(Path(sys.prefix) / part)
    wanted = subprocess.run(
        "cat pyproject.toml constraints.txt | cksum", shell=True, cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    (folder / ".gradacc-installed").write_text(f"{wanted} dev\n")
    return folder


@pytest.fixture
def launch(venv, tmp_path):
    leak = tmp_path / "hf/accelerate/default_config.yaml"  # what `accelerate config` would have left
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


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.csv"
    rows = [
        f"{'good' if i % 3 else 'bad'} words {'and more ' * (i % 11)},{'yes' if i % 3 else 'no'}"
        for i in range(60)
    ]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return path


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
        (["recipes/nonsense.py"], "no recipe recipes/nonsense.py here; there are: "),
        (["--config", "x.yaml"], "the first argument is the recipe; found --config"),
        ([RECIPE, "--processes", "0"], "--processes: found '0'; allowed: 1 or more"),
        ([RECIPE, "--processes", "two"], "--processes: found 'two'"),
        (["--processes", "two", RECIPE], "--processes: found 'two'"),
        ([RECIPE, "--data.train", "x.csv", "--optim.lrr", "1"], "did you mean --optim.lr?"),
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


def test_fewer_processes_than_asked_for_is_an_error(texts):
    done = subprocess.run(
        [sys.executable, RECIPE, "--data.train", texts, "--check"],
        cwd=ROOT,
        env={**os.environ, "GRADACC_PROCESSES": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "2 processes were asked for and 1 are running" in done.stderr


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
        (["recipes/nonsense.py"], "no recipe recipes/nonsense.py here; there are: "),
        (["nonsense"], "no recipe nonsense here; there are: "),
        (["--config", "x.yaml"], "the first argument is the recipe; found --config"),
        ([RECIPE, "--processes"], "--processes: found ''; allowed: 1 or more"),
        (["--processes", "0", RECIPE], "--processes: found '0'; allowed: 1 or more"),
        ([RECIPE, "--config", "nowhere.yaml"], "--config: found 'nowhere.yaml', which is no file here"),
        ([RECIPE, "--config=nowhere.yaml"], "--config: found 'nowhere.yaml', which is no file here"),
        ([RECIPE, "--machines", "2"], "--machines 2 needs --main_address HOST or HOST:PORT"),
        ([RECIPE, "--machine_rank", "1"], "--machine_rank: found '1'; allowed: 0 to 0"),
        ([RECIPE, "--main_address", "--check"], "--main_address: found '--check'; allowed: HOST"),
        (["--processes", "2", "play"], "--processes is for a recipe; play takes none"),
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
        ["--processes", 2, RECIPE, "--check"],
        [RECIPE, "--processes=2", "--check"],
        [RECIPE, "--check", "--processes", 2],
        ["--machines=2", "--main_address", "localhost", RECIPE, "--machine_rank", 1, "--check"],
    ],
)
def test_its_flags_stand_before_or_after_the_recipe(launch, texts, arguments):
    done = launch(*arguments, "--data.train", texts, "--batch.effective", 8)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "check: this would run"


def without(*names, **more):
    """The environment variables without these, and with more."""
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
    used = f"using the active virtual environment {sys.prefix}, as it has gradacc-hf\n"
    assert done.stderr == ("" if Path(sys.prefix) == ROOT / ".venv" else used)


@pytest.fixture(scope="module")
def empty_venv(tmp_path_factory):
    """An environment without the package, and without pip."""
    folder = tmp_path_factory.mktemp("active") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder


def test_an_active_environment_without_the_package_is_left_alone(empty_venv, venv):
    """Here with VENV, so that nothing is installed; it is the environment that is used."""
    done = subprocess.run(
        [ROOT / "launch.sh", "ls"],
        env=without("PYTHON", VIRTUAL_ENV=str(empty_venv), VENV=str(venv)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_another_python_than_that_of_the_environment_is_one_line(venv, tmp_path):
    other = tmp_path / "python"  # says of itself that it is another version
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
        r"error: \S+ has Python 3\.\d+ and PYTHON=\S+ is 3\.99: remove that folder, or .*\n", done.stderr
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "extras"),
    [
        ([RECIPE], "recipes,report,offline"),
        (["lessons"], "recipes,report,offline"),
        (["play"], "recipes,report,offline,play"),
        (["test"], "dev"),
    ],
)
def test_it_installs_what_the_command_needs(tmp_path, arguments, extras):
    """With the real pip in a dry run: the third step fails, and leaves no stamp that says it is done."""
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
    steps = [line for line in done.stderr.splitlines() if re.match(r"\[\d/4\]", line)]
    assert [step[:5] for step in steps] == ["[1/4]", "[2/4]", "[3/4]"]
    assert f"gradacc-hf[{extras}]:" in steps[2]
    assert not (folder / ".gradacc-installed").exists()


def test_no_python_is_one_line(tmp_path):
    done = subprocess.run(
        [ROOT / "launch.sh"],
        env={**os.environ, "VENV": str(tmp_path / "none"), "PYTHON": "no-such-python"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no Python of at least 3.11 found (tried no-such-python)")


def test_the_lessons_are_listed_and_their_mistakes_are_one_line(launch, tmp_path):
    listed = launch("lessons", cwd=tmp_path)
    assert listed.stdout.startswith("eight_samples         Why accumulate?\n")
    wrong = launch("lessons", "nonsense", cwd=tmp_path)
    assert wrong.returncode == 2
    assert re.fullmatch(r"error: lesson: found 'nonsense'; there are: .*\n", wrong.stderr)
