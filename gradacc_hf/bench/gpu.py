"""`gradacc bench gpu`: what removing padding gains on a GPU, within a time limit.

The run appends each result to runs/gpu-N/rows.jsonl as soon as it exists, as a line of JSON. The order is the
environment, checks of gradients (`gpu_checks.py`), and runs of contenders (`gpu_contenders.py`). Contenders
of a model take turns, and turn 0 warms up. A cell is a contender of a model in a precision: medians over its
turns. The time limit, Ctrl-C and SIGTERM end the run with a table of what there is.

MFU is the operations per second of forward and backward on real tokens, as a share of the GPU's peak.
`memory/trace.py` counts the operations, for all contenders alike: of the padded model, on each example alone.
"""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gradacc_hf.accumulation.accelerate_state import reset_settings
from gradacc_hf.bench.gpu_cells import Cell, cells_of, group_of, peak_of
from gradacc_hf.bench.gpu_checks import HEADS, Check, check_head, check_kernel
from gradacc_hf.bench.gpu_contenders import CONTENDERS, GpuModel, GpuWorkload, Turn
from gradacc_hf.bench.progress import Progress
from gradacc_hf.errors import GradaccError, InputError, one_line
from gradacc_hf.run.folder import next_folder
from gradacc_hf.training.lora import check_peft
from gradacc_hf.training.run_log import finite, measured_with
from gradacc_hf.utils.extras import require

MIB = 2**20
RAISE_AGAIN_SECONDS = 5.0  # a library may have swallowed the first exception of the time limit


@dataclass(frozen=True)
class GpuPlan:
    """The models, precisions and contenders of a run, in the order of the run."""

    models: tuple[GpuModel, ...]
    heads: tuple[tuple[str, str], ...] = HEADS
    precisions: tuple[str, ...] = ("bf16", "fp32")
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    longest: int = 512  # tokens of the longest example
    windows: int = 8  # of a turn
    turns: int = 3
    warm_up: int = 2  # windows; 0: no turn 0
    on_cpu: bool = False  # whether it may run without a GPU


FULL = GpuPlan(
    (
        GpuModel("MiniLM size", "minilm", 256, 16384),
        GpuModel("BERT-base size", "bert-base", 256, 16384),
        GpuModel("0.5 B decoder, LoRA 16", "decoder-0.5b", 128, 8192, lora=16, lean=True),
    )
)
TINY = GpuPlan(
    (
        GpuModel("tiny encoder", "tiny-encoder", 6, 64),
        GpuModel("tiny decoder, LoRA 4", "tiny-decoder", 6, 64, lora=4, lean=True),
    ),
    heads=HEADS[:1] + HEADS[-1:],
    longest=32,
    windows=1,
    turns=1,
    warm_up=0,
    on_cpu=True,
)


@dataclass(frozen=True)
class Environment:
    """The machine, and the peak of each precision: operations per second, and the source of the number."""

    seconds: float  # time limit
    measured_with: dict[str, str]
    peaks: dict[str, tuple[float, str]]


@dataclass(frozen=True)
class Note:
    """A reason why a model or a figure is missing."""

    model: str
    precision: str
    text: str


@dataclass(frozen=True)
class GpuResult:
    """All results. `stopped`: what ended the run early, or None."""

    file: str
    stopped: str | None
    peaks: dict[str, tuple[float, str]]
    checks: list[Check]
    cells: list[Cell]
    notes: list[Note]
    measured_with: dict[str, str]


class Stopped(BaseException):
    """The time limit has passed, or a signal has arrived. A base exception, so that no handler takes it."""


@dataclass
class RowLog:
    """The results so far, each also a line of JSON in a file, flushed at once."""

    file: Path
    rows: list[Any] = field(default_factory=list)

    def add(self, row: Any) -> None:
        """Append a row to the list and to the file."""
        self.rows.append(row)
        line = json.dumps({"row": type(row).__name__.lower(), **finite(asdict(row))})
        with self.file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def of(self, kind: type) -> list[Any]:
        """Return the rows of a kind, in order."""
        return [row for row in self.rows if isinstance(row, kind)]


def measure_gpu(seconds: float, plan: GpuPlan = FULL, progress: Progress = iter) -> GpuResult:
    """Run the plan until it is done, or until `seconds` have passed.

    Args:
        seconds: the time limit.
        plan: what to run.
        progress: wraps the models.

    Raises:
        InputError: there is no GPU, and the plan needs one.
    """
    if not (plan.on_cpu or torch.cuda.is_available()):
        raise InputError("bench gpu: found no CUDA GPU; allowed without one: --tiny, which runs on the CPU")
    rows, stopped = RowLog(next_folder("gpu") / "rows.jsonl"), None
    try:
        with time_limit(seconds):
            _measure(plan, rows, seconds, progress)
    except Stopped as reason:
        stopped = str(reason)
    reset_settings()
    peaks = [environment.peaks for environment in rows.of(Environment)]
    return GpuResult(
        str(rows.file),
        stopped,
        peaks[0] if peaks else {},
        rows.of(Check),
        cells_of(rows.of(Turn), peaks[0] if peaks else {}),
        rows.of(Note),
        measured_with(),
    )


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Stopped in the block after some seconds, on Ctrl-C and on SIGTERM. For the main thread."""
    causes = {
        signal.SIGALRM: f"time limit of {seconds:g} s",
        signal.SIGINT: "Ctrl-C",
        signal.SIGTERM: "SIGTERM",
    }

    def stop(number: int, frame: Any) -> None:
        raise Stopped(causes[signal.Signals(number)])

    before = {number: signal.signal(number, stop) for number in causes}
    signal.setitimer(signal.ITIMER_REAL, seconds, RAISE_AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _measure(plan: GpuPlan, rows: RowLog, seconds: float, progress: Progress) -> None:
    end = time.monotonic() + seconds
    reset_settings()
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    device = accelerator.device
    peaks = {precision: peak_of(precision, device) for precision in plan.precisions}
    rows.add(Environment(seconds, measured_with(), peaks))
    for head in plan.heads:
        rows.add(check_head(*head, accelerator))
    if device.type == "cuda":
        rows.add(check_kernel(device))
    groups = [(precision, model) for precision in plan.precisions for model in plan.models]
    for number, (precision, model) in enumerate(progress(groups)):
        until = time.monotonic() + (end - time.monotonic()) / (len(groups) - number)
        if model.lora and (reason := _why_no_lora()):
            rows.add(Note(model.name, precision, f"left out: {reason}"))
            continue
        try:
            work = GpuWorkload(model, precision, plan.longest, plan.windows, device)
        except Exception as error:  # out of memory, or anything that a library raises
            rows.add(
                Note(model.name, precision, f"left out: {type(error).__name__}: {one_line(error)[:300]}")
            )
            continue
        if work.problem:
            rows.add(Note(model.name, precision, f"no MFU and no prediction: {work.problem}"))
        _take_turns(plan, work, rows, until)
        for cell in cells_of(
            [row for row in rows.of(Turn) if group_of(row) == (model.name, precision)], peaks
        ):
            rows.add(cell)


def _take_turns(plan: GpuPlan, work: GpuWorkload, rows: RowLog, until: float) -> None:
    """Run each contender once per turn. No turn starts after `until`, except the first that counts."""
    failed = set()
    for turn in range(0 if plan.warm_up else 1, plan.turns + 1):
        if turn > 1 and time.monotonic() > until:
            text = f"{turn - 1} of {plan.turns} turns, because the other models need the time"
            rows.add(Note(work.model.name, work.precision, text))
            return
        first = turn % len(plan.contenders)
        for contender in (*plan.contenders[first:], *plan.contenders[:first]):
            if contender not in failed:
                ran = work.run(contender, turn, plan.windows if turn else plan.warm_up)
                rows.add(ran)
                failed |= {contender} if ran.failed else set()


def _why_no_lora() -> str | None:
    try:
        require("LoRA", "recipes", "peft")
        check_peft()
    except GradaccError as error:
        return one_line(error)
    return None


def print_gpu(result: GpuResult, console: Console) -> None:
    """Print the checks, a table for each model and precision, and what is missing."""
    table = Table("head", box=SIMPLE)
    for header in ("error, split", "without padding", ""):
        table.add_column(header, justify="right")
    for check in result.checks:
        errors = ("–" if error is None else f"{error:.0e}" for error in (check.split, check.without_padding))
        said = "failed" if check.failed else "" if check.exact else "not exact"
        table.add_row(check.head, *errors, said or ("refused" if check.refused else "exact"))
    console.print(table)
    for group in dict.fromkeys(map(group_of, result.cells)):
        console.print(", ".join(group))
        console.print(_cell_table([row for row in result.cells if group_of(row) == group]))
    for check in result.checks:
        if reason := check.failed or check.refused:
            console.print(f"{check.head}: {reason}")
    for cell in result.cells:
        if cell.failed:
            console.print(f"{CONTENDERS[cell.contender]}, {cell.model}, {cell.precision}: {cell.failed}")
    for note in result.notes:
        console.print(f"{note.model}, {note.precision}: {note.text}")
    for precision, (peak, source) in result.peaks.items():
        console.print(f"peak in {precision}: {peak / 1e12:,.1f} TFLOP per second ({source})")
    console.print(f"rows: {result.file}")
    if result.stopped:
        console.print(f"ended early: {result.stopped}")


def _cell_table(cells: list[Cell]) -> Table:
    table = Table("contender", box=SIMPLE)
    for header in ("tokens/s", "of dense", "MFU", "peak MiB", "predicted"):
        table.add_column(header, justify="right")
    for cell in cells:
        table.add_row(
            CONTENDERS[cell.contender],
            _text(cell.tokens_per_second, "{:,.0f}"),
            _text(cell.of_dense_limit, "{:.2f}"),
            _text(cell.mfu, "{:.1%}"),
            _text(cell.peak_bytes, "{:,.0f}", MIB),
            _text(cell.predicted_bytes, "{:,.0f}", MIB),
        )
    return table


def _text(value: float | None, form: str, unit: float = 1) -> str:
    return "–" if value is None else form.format(value / unit)
