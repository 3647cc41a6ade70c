"""Processes that are told to stop, killed or cut off, through launch.sh and Accelerate's launchers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import launch_fixtures
import psutil
import pytest
from conftest import ROOT
from launch_fixtures import RECIPE

# Fixtures.
venv, texts = launch_fixtures.venv, launch_fixtures.texts

WINDOWS = 400  # more than any of these runs gets to
SMALL = ("--batch.effective", 16, "--model.freeze", "[bert.*]", "--output.tracker", "none")
SMALL += ("--budget.max_tokens", 256, "--checkpoint.every", 5, "--train.epochs", 200)
SMALL += ("--train.eval_every", 0)
MEASUREMENTS_NEEDED = 120  # seconds


def begin(command, variables=(), **settings):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **dict(variables)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, **pipes, **settings)


def launcher(venv, run, texts, *more, windows=WINDOWS):
    command = [ROOT / "launch.sh", RECIPE, "--data.train", texts, *SMALL, "--train.max_windows", windows]
    return begin([*command, "--output.dir", run, *more], {"VENV": str(venv)})


def history(run):
    path = run / "history.jsonl"
    rows = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(row) for row in rows]


def until_windows(run, number, *processes):
    deadline = time.monotonic() + MEASUREMENTS_NEEDED
    while len(history(run)) < number:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0][-3000:]
        time.sleep(0.05)


def left_behind(run):
    return [p for p in psutil.process_iter(["cmdline"]) if str(run) in " ".join(p.info["cmdline"] or ())]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_launch_sh_passes_a_signal_on_waits_for_the_save_and_leaves_no_process_behind(
    venv,
    texts,
    tmp_path,
    processes,
    number,
):
    running = launcher(venv, run := tmp_path / "run", texts, "--processes", processes)
    until_windows(run, 7, running)
    running.send_signal(number)
    printed, _ = running.communicate(timeout=MEASUREMENTS_NEEDED)
    assert running.returncode == 128 + number, printed
    assert f"{number.name}: stopping after this window" in printed
    stopped = len(history(run))
    assert f"stopped after window {stopped} of {WINDOWS}, which is saved; to continue: " in printed
    command = (run / "TO_BE_RESUMED").read_text()
    go_on = f"{ROOT}/launch.sh {RECIPE} --resume {run} --processes {processes}\n"
    assert command.startswith("cd /")
    assert command.endswith(f" && {go_on}")
    assert (run / f"checkpoints/window-{stopped:08d}").is_dir()
    assert left_behind(run) == []
    if processes == 1:
        return
    resumed = launcher(venv, run, texts, "--resume", "auto", "--processes", 1)  # on another number
    until_windows(run, stopped + 3, resumed)
    assert not (run / "TO_BE_RESUMED").exists()
    resumed.send_signal(signal.SIGTERM)
    assert f"{run}, after window {stopped}" in resumed.communicate(timeout=MEASUREMENTS_NEEDED)[0]
    assert [row["window"] for row in history(run)] == list(range(1, len(history(run)) + 1))


def test_a_recipe_ends_with_a_launcher_that_is_killed_and_saves(texts, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [ROOT / "configs/accelerate/cpu.yaml", RECIPE, "--data.train", texts, *SMALL]
    running = begin([*command, "--train.max_windows", WINDOWS, "--output.dir", run])
    until_windows(run, 3, running)
    running.kill()
    deadline = time.monotonic() + MEASUREMENTS_NEEDED
    while left_behind(run):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (run / "TO_BE_RESUMED").exists()
    assert (run / f"checkpoints/window-{len(history(run)):08d}").is_dir()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def machine(rank, port, run, texts):
    """One of two, with a process each, as Accelerate launches them."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", 2, "--num_processes", 2]
    command += ["--config_file", ROOT / "configs/accelerate/cpu_2.yaml", "--machine_rank", rank]
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", port, RECIPE, "--data.train", texts]
    command += [*SMALL, "--train.max_windows", WINDOWS, "--output.dir", run, "--resume", "auto"]
    return begin(command, {"ACCELERATE_USE_CPU": "true"}, start_new_session=True)


@pytest.mark.slow
def test_machines_that_do_not_see_the_same_folder_end_with_one_line(texts, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/config.yaml").touch()
    port = free_port()
    both = [machine(rank, port, tmp_path / name, texts) for rank, name in enumerate(("there", "gone"))]
    printed, _ = both[0].communicate(timeout=MEASUREMENTS_NEEDED)
    both[1].communicate(timeout=MEASUREMENTS_NEEDED)
    assert "error: output.dir: the processes found different runs there (" in printed
    assert "all machines must share the folder" in printed
    assert [process.returncode for process in both] == [1, 1]


@pytest.mark.slow
def test_a_recipe_whose_launcher_is_killed_while_it_imports_ends_too(texts, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [ROOT / "configs/accelerate/cpu.yaml", RECIPE, "--data.train", texts, *SMALL]
    launched = begin([*command, "--train.max_windows", WINDOWS, "--output.dir", run := tmp_path / "run"])
    while not psutil.Process(launched.pid).children():
        time.sleep(0.05)
    time.sleep(0.5)  # of the seconds that its imports take
    launched.kill()
    launched.communicate(timeout=MEASUREMENTS_NEEDED)  # its output is open as long as the recipe runs
    assert left_behind(run) == []
    assert history(run) == []


@pytest.mark.slow
def test_when_one_of_two_machines_dies_the_other_ends_with_a_message_and_both_go_on(texts, tmp_path):
    run, port = tmp_path / "run", free_port()
    first, second = (machine(rank, port, run, texts) for rank in (0, 1))
    until_windows(run, 12, first, second)
    for process in psutil.Process(second.pid).children(recursive=True):
        process.kill()
    second.kill()
    died = time.monotonic()
    printed, _ = first.communicate(timeout=MEASUREMENTS_NEEDED)
    assert time.monotonic() - died < 60
    assert first.returncode == 1
    assert "error: process 0: another process or machine has ended (" in printed
    assert "start all processes again with --resume auto" in printed
    second.communicate()
    assert left_behind(run) == []
    before = len(history(run))
    port = free_port()
    first, second = (machine(rank, port, run, texts) for rank in (0, 1))
    until_windows(run, before + 3, first, second)
    for running in (first, second):
        for process in psutil.Process(running.pid).children():
            process.terminate()
    printed, _ = first.communicate(timeout=MEASUREMENTS_NEEDED)
    second.communicate(timeout=MEASUREMENTS_NEEDED)
    assert "which is saved; to continue: " in printed
    assert [row["window"] for row in history(run)] == list(range(1, len(history(run)) + 1))
    assert left_behind(run) == []


def test_several_processes_that_were_asked_for_and_not_started_are_an_error(texts, tmp_path):
    (config := tmp_path / "multi_cpu.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\n"
        "num_machines: 1\nmixed_precision: 'no'\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, RECIPE]
    printed, _ = begin([*command, "--data.train", texts, "--check"]).communicate(timeout=MEASUREMENTS_NEEDED)
    assert "accelerate launch started one process instead of several" in printed
    assert "configs/accelerate/cpu_2.yaml" in printed
