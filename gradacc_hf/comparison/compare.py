"""Run the same training in several ways, and read the results.

`compare` starts each contender of `comparison/worker.py` in a separate process, in turns. All contenders get
the same examples in the same windows, the same settings, and micro-batches of the same memory. For contenders
that split by count, a micro-batch holds as many examples as fit the budget when padded to the longest. Each
run logs the loss of each window. ExactTrainer's time includes the probes of the first micro-batch. The result
is a folder of runs.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from gradacc_hf.comparison.worker import CONTENDERS, DOES_NOT_FIT, USUAL
from gradacc_hf.errors import InputError
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.utils.files import write_whole


@dataclass(frozen=True)
class ComparedRuns:
    """The runs of one contender. Tuples have one element per repeat, unless a comment states otherwise."""

    name: str
    gradient_errors: tuple[float, ...]  # of each window of the first repeat
    examples_per_second: tuple[float, ...]
    tokens_per_second: tuple[float, ...]
    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]  # empty on a GPU
    padding: float  # median
    training_memory_bytes: tuple[int, ...]  # peak of training, above the memory before
    losses: tuple[float, ...]  # of the last window
    metrics: dict[str, tuple[float, ...]]  # of the evaluation


def compare(
    settings: Sequence[str],
    folder: Path,
    contenders: Sequence[str] = USUAL,
    num_windows: int = 8,
    repeats: int = 3,
    on_run: Callable[[str], None] = lambda name: None,
    command: str = "",
) -> dict[str, ComparedRuns | str]:
    """Run all contenders `repeats` times, each time with a different seed.

    The runs of a repeat follow one another. Each repeat begins with a different contender.

    Args:
        settings: a recipe's command line.
        folder: a new folder for the runs.
        contenders: keys of `CONTENDERS`.
        num_windows: the number of windows in a run.
        repeats: the number of runs of each contender.
        on_run: called with a description before each run.
        command: the command line, for the summaries of the runs.

    Returns:
        The runs of each contender, or the reason why the contender failed.

    Raises:
        InputError: no contender can run.
    """
    recipe = load_recipe(settings)
    failed: dict[str, str] = {}
    for repeat in range(repeats):
        seed = recipe.config.train.seed + repeat
        turn = repeat % len(contenders)
        for name in (*contenders[turn:], *contenders[:turn]):
            if name in failed:
                continue
            on_run(f"{CONTENDERS[name]}, seed {seed}")
            run = folder / name / f"seed_{seed}"
            arguments = [name, str(run), str(num_windows), "no_errors" if repeat else "errors"]
            failure = _run_worker([*arguments, *settings, f"--train.seed={seed}"])
            if failure is None:
                _add_command(run, command)
            else:
                failed[name] = failure
    if len(failed) == len(contenders):
        each = "; ".join(f"{CONTENDERS[name]}: {reason}" for name, reason in failed.items())
        raise InputError(f"no contender could run: {each}")
    found = {name: read_compared_runs(folder / name) for name in contenders if name not in failed}
    return {name: failed.get(name) or found[name] for name in contenders}


def _run_worker(arguments: Sequence[str]) -> str | None:
    """Run a contender in a process. Return the reason of a failure, or None. InputError: bad settings."""
    command = [sys.executable, "-m", "gradacc_hf.comparison.worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    if done.returncode == 2:
        raise InputError(lines[-1].removeprefix("error: "))
    if done.returncode == DOES_NOT_FIT:
        return "does not fit in memory"
    return lines[-1] if done.returncode else None


def _add_command(run: Path, command: str) -> None:
    file = run / "summary.json"
    write_whole(file, json.dumps(json.loads(file.read_text()) | {"command": command}, indent=2) + "\n")


def read_compared_runs(folder: Path) -> ComparedRuns:
    """Read the runs of a contender from their files."""
    runs = sorted(folder.iterdir())
    summaries: list[dict[str, Any]] = [json.loads((run / "summary.json").read_text()) for run in runs]
    histories = [
        [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()] for run in runs
    ]
    metrics = [key for key in summaries[0]["eval"] if key != "window"]
    return ComparedRuns(
        name=summaries[0]["contender"],
        gradient_errors=tuple(
            row["gradient_error"] for rows in histories for row in rows if "gradient_error" in row
        ),
        examples_per_second=tuple(s["examples"] / s["seconds"] for s in summaries),
        tokens_per_second=tuple(s["tokens_per_second"] for s in summaries),
        seconds=tuple(s["seconds"] for s in summaries),
        cpu_seconds=tuple(s["cpu_seconds"] for s in summaries if s.get("cpu_seconds")),
        padding=median(s["padding"] for s in summaries),
        training_memory_bytes=tuple(s["training_memory_bytes"] for s in summaries),
        losses=tuple(history[-1]["loss"] for history in histories),
        metrics={key: tuple(s["eval"][key] for s in summaries) for key in metrics},
    )


def ratios(ours: ComparedRuns, other: ComparedRuns) -> list[float]:
    """Return the ratio of examples per second for each repeat."""
    return [a / b for a, b in zip(ours.examples_per_second, other.examples_per_second, strict=True)]


def cpu_ratios(ours: ComparedRuns, other: ComparedRuns) -> list[float]:
    """Return the ratio of examples per second of CPU time for each repeat; [] on a GPU."""
    return [b / a for a, b in zip(ours.cpu_seconds, other.cpu_seconds, strict=True)]
