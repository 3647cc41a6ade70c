"""`gradacc bench kills` and `damages`: resumed runs compared with an undisturbed run, bit by bit.

`measure_kills` starts a recipe's command line in a separate process, and kills it with SIGKILL in a random
phase: forward, backward, the optimizer's step, an evaluation, or the writing of a checkpoint.
`measure_damages` damages the newest checkpoint of a run in each way of `DAMAGES`, and resumes the run. Both
compare the saved weights, and the history without seconds. Runs have one process, on a CPU.
"""

import hashlib
import json
import mmap
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch.nn.modules.module import register_module_forward_pre_hook, register_module_full_backward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradacc_hf.bench.progress import Progress
from gradacc_hf.errors import InputError
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.recipe.loading import recipe_class_of
from gradacc_hf.run.runner import run
from gradacc_hf.training.checkpoint import FOLDER, NUMBERS, Checkpointer
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.utils.paths import bundle_root

PHASES = ("forward", "backward", "optimizer step", "evaluation", "writing a checkpoint")
BETWEEN = "between these"
MARKS = (BETWEEN, *PHASES)
SETTINGS = {
    "--config": str(bundle_root() / "configs/image_classification_offline.yaml"),
    "--model.dropout": 0.1,  # random numbers must be restored too
    "--train.max_windows": 60,
    "--train.eval_every": 7,
    "--checkpoint.every": 2,
    "--budget.max_tokens": 256,
    "--output.tracker": "none",
}
RUN_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class KillsResult:
    """Kills by phase, and the number of runs that equal the undisturbed run."""

    kills: dict[str, int]
    runs: int
    identical: int
    windows: int  # in a run
    measured_with: dict[str, str]


def measure_kills(number: int = 50, seed: int = 0, progress: Progress = iter) -> KillsResult:
    """Kill a run `number` times. When the run ends between kills, start another run."""
    draw, hit = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as temporary:
        undisturbed, attempts, identical = Path(temporary) / "undisturbed", Path(temporary) / "run", 0
        _start(undisturbed)
        expected, runs = _outcome(undisturbed), 0
        for _ in progress(range(number)):
            while (phase := _start(attempts, draw)) is None:
                runs, identical = runs + 1, identical + (_outcome(attempts) == expected)
                shutil.rmtree(attempts)
            hit[phase] += 1
        _start(attempts)
        runs, identical = runs + 1, identical + (_outcome(attempts) == expected)
    windows = int(SETTINGS["--train.max_windows"])
    return KillsResult({mark: hit[mark] for mark in MARKS}, runs, identical, windows, measured_with("cpu"))


def print_kills(result: KillsResult, console: Console) -> None:
    """Print a row for each phase."""
    table = Table("killed in", "times", box=SIMPLE)
    for phase, times in result.kills.items():
        table.add_row(phase, str(times))
    console.print(table)
    console.print(
        f"{sum(result.kills.values())} kills in {result.runs} runs of {result.windows} windows: "
        f"{result.identical} of {result.runs} ended with the weights and the history of an undisturbed run, "
        "bit for bit"
    )


@dataclass(frozen=True)
class DamagesResult:
    """One row for each damage to the newest checkpoint.

    A row holds the name, a line of the run, and whether the result equals the undisturbed run. The line names
    the window at which the run resumes, or the error. The result is None if the run does not resume.
    """

    rows: tuple[tuple[str, str, bool | None], ...]
    measured_with: dict[str, str]


def measure_damages(progress: Progress = iter) -> DamagesResult:
    """Damage the newest of two checkpoints of a killed run, and resume the run."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        names = ("undisturbed", "killed", "damaged")
        undisturbed, killed, damaged = (Path(temporary) / name for name in names)
        _start(undisturbed)
        expected = _outcome(undisturbed)
        _start(killed, random.Random(0), windows=(6, 7))
        assert len(list((killed / FOLDER).glob("window-*"))) == 2
        for name, damage in progress([("none", lambda folder: None), *DAMAGES.items()]):
            shutil.copytree(killed, damaged, symlinks=True)
            damage(sorted((damaged / FOLDER).glob("window-*"))[-1])
            line = _resume_and_read(damaged)
            ended = (damaged / "summary.json").is_file()
            rows.append((name, line, _outcome(damaged) == expected if ended else None))
            shutil.rmtree(damaged)
    return DamagesResult(tuple(rows), measured_with("cpu"))


def print_damages(result: DamagesResult, console: Console) -> None:
    """Print a row for each damage."""
    table = Table("damage to the newest checkpoint", "resuming", "same result", box=SIMPLE)
    for name, line, same in result.rows:
        table.add_row(name, line, {True: "yes", False: "NO", None: "refused"}[same])
    console.print(table)


def _first(folder: Path, ending: str) -> Path:
    return next(path for path in sorted(folder.iterdir()) if path.name.endswith(ending))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class _Mark:
    """A pickle whose loading creates a file."""

    def __reduce__(self):
        return os.system, ("touch $GRADACC_MARK",)


def _insert_code(folder: Path) -> None:
    """Replace a file by a pickle that runs code, and update the checksum."""
    torch.save(_Mark(), folder / NUMBERS)
    sums = json.loads((folder / "sha256.json").read_text())
    sums[NUMBERS] = hashlib.sha256((folder / NUMBERS).read_bytes()).hexdigest()
    (folder / "sha256.json").write_text(json.dumps(sums))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "weights truncated": lambda folder: _truncate(_first(folder, ".safetensors")),
    "a bit of the weights flipped": lambda folder: _flip_a_bit(_first(folder, ".safetensors")),
    "weights missing": lambda folder: _first(folder, ".safetensors").unlink(),
    "numbers truncated": lambda folder: _truncate(folder / NUMBERS),
    "random numbers missing": lambda folder: (folder / "random-0.pt").unlink(),
    "about.json with a bit flipped": lambda folder: _flip_a_bit(folder / "about.json"),
    "checksums truncated": lambda folder: _truncate(folder / "sha256.json"),
    "checksums missing": lambda folder: (folder / "sha256.json").unlink(),
    "an unexpected file": lambda folder: (folder / "more.safetensors").write_bytes(b""),
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "a pickle that runs code": _insert_code,
}


def _start(folder: Path, draw: random.Random | None = None, windows: tuple[int, int] = (0, 12)) -> str | None:
    """Start or resume the recipe's run in this folder. Return the phase in which the run was killed.

    Args:
        folder: the run's folder.
        draw: draws the phase, window and moment of the kill; None for an undisturbed run.
        windows: the range of the number of windows before the kill.

    Returns:
        The phase, or None if the run ended before the kill.

    Raises:
        InputError: the run failed.
    """
    marks = mmap.mmap(-1, 2)  # shared with the child: the phase, and the number of windows that have begun
    child = multiprocessing.get_context("fork").Process(target=partial(_run, folder, marks))
    child.start()
    phase = None
    if draw is not None:
        wanted, after = draw.randrange(1, len(MARKS)), draw.randrange(*windows)
        delay = 0.0 if MARKS[wanted] == "optimizer step" else draw.uniform(0, 0.02)  # a step is shorter
        while child.is_alive() and not (marks[0] == wanted and marks[1] >= after):
            time.sleep(0.0001)
        time.sleep(delay)
        if child.is_alive() and not (folder / "summary.json").exists():
            phase = MARKS[marks[0]]
            child.kill()
    child.join(RUN_TIMEOUT_SECONDS)
    if child.exitcode == -signal.SIGKILL and phase is not None:
        return phase
    if child.exitcode != 0:
        child.kill()
        raise InputError(f"bench kills: the run in {folder} ended with {child.exitcode}")
    return None


def _resume_and_read(folder: Path) -> str:
    """Resume a run. Return the line with the window at which the run resumes, or the error."""
    output, mark = folder.parent / "output.txt", folder.parent / "mark"
    os.environ["GRADACC_MARK"] = str(mark)
    child = multiprocessing.get_context("fork").Process(
        target=partial(_run, folder, mmap.mmap(-1, 2), output)
    )
    child.start()
    child.join(RUN_TIMEOUT_SECONDS)
    lines = output.read_text(encoding="utf-8").splitlines()
    if mark.exists():
        return "RAN THE CODE"
    found = [line for line in lines if line.startswith(("resume ", "error: "))]
    last = found[-1].replace(str(folder), "RUN").removeprefix("resume") if found else ""
    return " ".join(last.split())


def _run(folder: Path, marks: Any, output: Path | None = None) -> None:
    """Run the recipe's command line in this process, and write the phase to `marks`."""
    with (output or Path(os.devnull)).open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
        settings = {**SETTINGS, "--output.dir": folder, "--resume": "auto"}
        argv = [str(word) for setting in settings.items() for word in setting]
        with _marking(marks):
            run(_with_marked_evaluation(recipe_class_of(argv), marks), argv)
        sys.stdout.flush()


@contextmanager
def _marking(marks: Any) -> Iterator[None]:
    def mark(phase: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            if marks[0] != MARKS.index("evaluation"):
                marks[0] = MARKS.index(phase)

        return note

    def begun(*_: Any) -> None:
        mark(BETWEEN)()
        marks[1] = min(255, marks[1] + 1)

    save = Checkpointer.save

    def marked(*arguments: Any) -> Any:
        mark("writing a checkpoint")()
        try:
            return save(*arguments)
        finally:
            mark(BETWEEN)()

    hooks = [
        register_module_forward_pre_hook(mark("forward")),
        register_module_full_backward_pre_hook(mark("backward")),
        register_optimizer_step_pre_hook(mark("optimizer step")),
        register_optimizer_step_post_hook(begun),
    ]
    Checkpointer.save = marked  # type: ignore[method-assign]
    try:
        yield
    finally:
        Checkpointer.save = save
        for hook in hooks:
            hook.remove()


def _with_marked_evaluation(recipe: type[Recipe], marks: Any) -> type[Recipe]:
    """Return a subclass of the recipe that writes the phase of evaluations to `marks`."""

    class MarkedRecipe(recipe):
        def validate(self, *arguments: Any) -> dict[str, float]:
            marks[0] = MARKS.index("evaluation")
            try:
                return super().validate(*arguments)
            finally:
                marks[0] = 0

    return MarkedRecipe


def _outcome(run: Path) -> tuple[Any, ...]:
    """Return hashes of the saved weights, and the history without seconds."""
    weights = [(run / name / "model.safetensors").read_bytes() for name in ("best", "last")]
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    history = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    return *(hashlib.sha256(content).hexdigest() for content in weights), history
