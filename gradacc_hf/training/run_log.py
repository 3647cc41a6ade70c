"""The log of a run: progress bar, experiment tracker, history.jsonl and summary.json.

`loop.py` yields one `WindowRecord` per window. Only the main process writes. Reports and comparisons read
history.jsonl and summary.json.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gradacc_hf.utils.files import write_whole
from gradacc_hf.utils.hardware import find_device

HISTORY = "history.jsonl"
TRACKED = ("loss", "grad_norm", "lr", "noise_scale", "update_ratio")
VERSIONS_OF = ("torch", "transformers", "accelerate", "datasets", "evaluate", "gradacc-hf")

FIGURES = (
    "windows",
    "skipped_windows",
    "examples",
    "items",
    "tokens",
    "padded_tokens",
    "padding",
    "seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "accumulation_steps",
    "processes",
    "precision",
    "versions",
)
"""Keys of a summary that `RunLog.summary` sets."""


@dataclass(frozen=True)
class WindowRecord:
    """The record of one window over all processes: a row of history.jsonl.

    Attributes:
        window: The number of the window in the run, from 1.
        epoch: The number of the pass over the data, from 0.
        loss: The mean over the items of the window.
        grad_norm: The norm of the gradient before clipping.
        lr: The learning rate of the step.
        examples: Examples of the window.
        items: Items of the window: the terms of the mean loss.
        tokens: Tokens of the window without padding, from the lengths.
        padded_tokens: Tokens of the window with padding.
        accumulation_steps: Micro-batches of the process with the most micro-batches.
        seconds: Time from the previous step to this one.
        skipped: Whether no step was taken: by the fp16 scaler, or for a loss or gradient that is not finite.
        noise_scale: The gradient noise scale so far, in examples. NaN without a measurement. Infinite where
            noise hides the mean gradient; null in JSON.
        noise_measured: Windows in which the noise scale was measured so far.
        update_ratio: ‖step‖ / ‖weights‖ of a sample of the weights; NaN where it is not measured.
        noise_low, noise_high: The bounds of the noise scale, with the confidence of
            `accumulation.noise_scale.CONFIDENCE`. An infinite bound is null in JSON.
        source_losses: The mean over the items of each source in the window, by name. Not in JSON if empty.
    """

    window: int
    epoch: int
    loss: float
    grad_norm: float
    lr: float
    examples: int
    items: float
    tokens: int
    padded_tokens: int
    accumulation_steps: int
    seconds: float
    skipped: bool
    noise_scale: float = math.nan
    noise_measured: int = 0
    update_ratio: float = math.nan
    noise_low: float = math.nan
    noise_high: float = math.nan
    source_losses: Mapping[str, float] = field(default_factory=dict)


class RunLog:
    """Show and store the progress of a run.

    Args:
        accelerator: the Accelerator of the run, whose trackers are used.
        total_windows: windows of the whole run; None if unknown.
        folder: the folder of the run; None stores nothing.
        windows_done: the window of the checkpoint that the run continues from. Later rows of the history are
            removed.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        total_windows: int | None,
        folder: Path | None = None,
        windows_done: int = 0,
    ):
        self.accelerator, self.total_windows, self.folder = accelerator, total_windows, folder
        self.windows_done = windows_done
        self.records: list[WindowRecord] = []
        self.console = Console(quiet=not accelerator.is_main_process, highlight=False)
        self._progress = Progress(
            TextColumn("window"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            refresh_per_second=2,
            disable=not self.console.is_terminal,
        )
        self._history = None

    def __enter__(self) -> "RunLog":
        if self.folder is not None:
            path = self.folder / HISTORY
            self.records = read_history(path, self.windows_done) if self.windows_done else []
            self.accelerator.wait_for_everyone()  # all processes have read the file before it changes
            if self.accelerator.is_main_process:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_whole(path, "".join(map(_row, self.records)))
                self._history = path.open("a", encoding="utf-8")
        self._progress.start()
        self._task = self._progress.add_task(
            "", total=self.total_windows, completed=self.windows_done, figures="–"
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._history is not None:
            self._history.close()

    @property
    def last_window(self) -> int:
        """The latest window of the run; 0 before the first."""
        return self.records[-1].window if self.records else 0

    def window(self, record: WindowRecord) -> None:
        """Record a trained window."""
        self.records.append(record)
        row = finite(asdict(record))
        if self._history is not None:
            self._history.write(_row(record))
            self._history.flush()
        tracked = {key: row[key] for key in TRACKED} | by_source("loss", row["source_losses"])
        self.accelerator.log(
            {f"train/{key}": value for key, value in tracked.items() if value is not None}, record.window
        )
        examples_per_second, tokens_per_second = (
            record.examples / record.seconds,
            record.tokens / record.seconds,
        )
        speed = f"{examples_per_second:.1f} examples/s · {tokens_per_second:,.0f} tokens/s"
        figures = f"{record.loss:.4f} · {speed}"
        self._progress.update(self._task, completed=record.window, figures=figures)
        total = self.total_windows  # if it is unknown, lines appear at 1, 2, … 10, 20, … 100, 200, …
        every = 10 ** (len(str(record.window)) - 1) if total is None else max(1, total // 10)
        if not self.console.is_terminal and (record.window % every == 0 or record.window == 1):
            of = "" if total is None else f"/{total}"
            parts = ", ".join(f"{name} {loss:.4f}" for name, loss in record.source_losses.items())
            loss = f"loss {record.loss:.4f}{f' ({parts})' if parts else ''}"
            self.console.print(f"window {record.window}{of} · {loss} · {speed}", soft_wrap=True)

    def expect(self, total_windows: int | None) -> None:
        """Set the number of windows of the whole run; None if unknown."""
        self.total_windows = total_windows
        self._progress.update(self._task, total=total_windows)

    def say(self, line: str) -> None:
        """Print a line on the main process, above the progress bar."""
        self.console.print(line, soft_wrap=True)

    def keep(self) -> None:
        """Flush the history to the disk, before a checkpoint relies on it."""
        if self._history is not None:
            os.fsync(self._history.fileno())

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Record the metrics of an evaluation that ran after the latest window."""
        window = self.last_window
        self.accelerator.log({f"eval/{key}": value for key, value in metrics.items()}, window)
        of_sources: dict[str, dict[str, float]] = {}
        for name, value in metrics.items():
            metric, _, source = name.partition("/")
            is_of_source = bool(source) and metric in metrics
            own = of_sources.setdefault(source if is_of_source else "", {})
            own[metric if is_of_source else name] = value
        for source, values in of_sources.items():
            head = f"  {source}" if source else f"after window {window}"
            self.console.print(f"{head}: {describe(values)}", soft_wrap=True)

    def summary(self, more: Mapping[str, Any], *, write: bool = True) -> dict[str, Any]:
        """Return the figures of the run.

        Args:
            more: further entries, under keys that are not in `FIGURES`.
            write: whether to write summary.json. Nothing is written without a folder.
        """
        records = self.records
        seconds = sum(record.seconds for record in records)
        tokens, padded = sum(r.tokens for r in records), sum(r.padded_tokens for r in records)
        steps = [record.accumulation_steps for record in records]
        summary = finite(
            {
                **more,
                "windows": len(records),
                "skipped_windows": sum(record.skipped for record in records),
                "examples": sum(record.examples for record in records),
                "items": sum(record.items for record in records),
                "tokens": tokens,
                "padded_tokens": padded,
                "padding": 1 - tokens / padded if padded else 0.0,
                "seconds": seconds,
                "tokens_per_second": tokens / seconds if seconds else 0.0,
                "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
                "accumulation_steps": {"min": min(steps), "mean": sum(steps) / len(steps), "max": max(steps)}
                if steps
                else None,
                "processes": self.accelerator.num_processes,
                "precision": {"no": "fp32"}.get(
                    self.accelerator.mixed_precision, self.accelerator.mixed_precision
                ),
                "versions": versions(),
            }
        )
        if write and self.folder is not None and self.accelerator.is_main_process:
            write_whole(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary


def read_history(path: Path, windows: int) -> list[WindowRecord]:
    """Return the rows of a history.jsonl up to a window, without incomplete rows."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line, object_hook=_with_nan)
            records.append(WindowRecord(**row))
    return [record for record in records if record.window <= windows]


def _with_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in values.items()}


def _row(record: WindowRecord) -> str:
    row = finite(asdict(record))
    if not row["source_losses"]:
        del row["source_losses"]
    return json.dumps(row) + "\n"


def by_source(metric: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a metric for each source, by metric and source: "loss/chats"."""
    return {f"{metric}/{name}": value for name, value in values.items()}


def describe(metrics: Mapping[str, float]) -> str:
    """Return metrics as one line of text."""
    numbers = {
        key: f"{value:.4f}" if isinstance(value, float) else str(value) for key, value in metrics.items()
    }
    return " · ".join(f"{key} {number}" for key, number in numbers.items())


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: allocated on its GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a run uses."""
    found = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # gradacc may run uninstalled
            found[name] = importlib.metadata.version(name)
    return found


def measured_with(device: str | None = None) -> dict[str, str]:
    """Return the environment of a measurement: versions, device name and number of threads.

    Args:
        device: "cpu" or "cuda"; by default the device that a run would use here.
    """
    device = device or find_device().kind
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return {**versions(), "device": name, "threads": str(torch.get_num_threads())}


def finite(values: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by None, and numbers of numpy and torch by Python's."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, list):
        return [finite(value) for value in values]
    values = values.item() if hasattr(values, "item") else values
    return None if isinstance(values, float) and not math.isfinite(values) else values
