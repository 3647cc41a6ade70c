"""The runs of a sweep: ordinary runs of the recipe, each in its own process and folder.

A sweep that continues trains the runs without a summary, each from its last checkpoint.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from gradacc_hf.sweep.space import Point, folder_name

POLL = 0.2  # seconds between two looks at a process


@dataclass(frozen=True)
class TrialResult:
    """The runs of a point, one for each seed.

    point: the settings that vary.
    folders: the folders of the runs.
    values: the best value of the metric in each run that has ended.
    seconds: training time of these runs.
    problem: the reason why a run failed, or "".
    """

    point: Point
    folders: tuple[Path, ...]
    values: tuple[float, ...]
    seconds: float
    problem: str = ""

    @property
    def mean(self) -> float | None:
        """The mean over seeds; None if a run failed or is missing."""
        complete = not self.problem and len(self.values) == len(self.folders)
        return sum(self.values) / len(self.values) if complete else None


def folders_of(sweep: Path, point: Point, seeds: Sequence[int]) -> tuple[Path, ...]:
    """Return the folder of each run of a point."""
    return tuple(sweep / folder_name(point) / f"seed-{seed}" for seed in seeds)


def flags_of(point: Point, seed: int, folder: Path) -> list[str]:
    """Return the flags of a run. It continues if its folder holds a run that was interrupted."""
    varied = [f"--{name}={value}" for name, value in point.items()]
    return [*varied, f"--train.seed={seed}", f"--output.dir={folder}", "--resume=auto"]


def read_result(point: Point, folders: tuple[Path, ...], metric: str, problem: str = "") -> TrialResult:
    """Return the result of a point, from the summaries of the runs that have ended."""
    summaries = [summary for folder in folders if (summary := summary_of(folder))]
    values = [(summary.get("best") or {}).get(metric) for summary in summaries]
    known = tuple(float(value) for value in values if isinstance(value, int | float) and math.isfinite(value))
    if len(known) < len(summaries):
        problem = problem or f"no finite {metric}"
    return TrialResult(point, folders, known, sum(summary["seconds"] for summary in summaries), problem)


def summary_of(folder: Path) -> Mapping[str, Any]:
    """Return the summary of a run that has ended; empty for any other folder."""
    with suppress(OSError, ValueError):  # no summary, or a damaged one
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return summary if isinstance(summary, dict) else {}
    return {}


def last_error(log: Path) -> str:
    """Return the last line of a run's output that states an error, or the last line."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no output"])[-1]


class Processes:
    """Runs recipe files in processes, one after the other, and passes signals to them.

    Attributes:
        stopped_by: the signal that the sweep received; None without one.
    """

    def __init__(self, recipe: str):
        self.recipe = recipe
        self.stopped_by: signal.Signals | None = None
        self._running: subprocess.Popen[bytes] | None = None

    @contextmanager
    def receiving_signals(self) -> Iterator[None]:
        """Pass SIGINT and SIGTERM to the run that trains, inside the block."""
        before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def start(self, arguments: Sequence[str], log: Path, on_wait: Callable[[], Any]) -> int:
        """Run the recipe, and return the exit code. Call `on_wait` from time to time."""
        with log.open("ab") as output:
            self._running = subprocess.Popen(
                [sys.executable, self.recipe, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the sweep alone, which passes it on once
            )
            while (code := self._running.poll()) is None:
                on_wait()
                time.sleep(POLL)
            self._running = None
            return code

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = signal.Signals(number)
        os.write(
            2,
            f"\n{self.stopped_by.name}: stopping after this window; send it again to stop at once\n".encode(),
        )
        if self._running is not None:
            self._running.send_signal(number)
