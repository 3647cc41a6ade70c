"""`gradacc bench experts`: router losses over the window and over each micro-batch, for every head with one.

The models are tiny, with random weights, on the CPU, in float32, without dropout. The coefficients of the
router losses are 0.5, so that an error shows. The reference is the gradient of the window in one batch. The
cost is a ratio of times: of a window with the router loss over the window, and over each micro-batch.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from accelerate import Accelerator
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.reference import EXACT, RecordGradients
from gradacc_hf.accumulation.router_loss import router_functions, router_loss_over_window
from gradacc_hf.bench.progress import Progress
from gradacc_hf.errors import HeadUnavailableError, InputError
from gradacc_hf.training.experts import COEFFICIENTS
from gradacc_hf.training.loop import train
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.utils.modeling import checkpoint_activations
from gradacc_hf.verification.exactness import verify
from gradacc_hf.verification.tiny_models import Head, build_head, model_types

KINDS = ("causal_lm", "seq2seq_lm")
FACTOR = 0.5  # of the router losses
LENGTHS = np.random.default_rng(3).integers(3, 40, size=16).tolist()
SPLITS = (3, 5)  # examples of a micro-batch, in a window of 16
LONG = np.random.default_rng(4).integers(100, 500, size=16).tolist()  # lengths of the timed window


@dataclass(frozen=True)
class ExpertsHead:
    """The relative errors of one head, the largest over both splits. NaN: not measured.

    Attributes:
        model_type: The model type of transformers, such as "mixtral".
        micro_batch: Of the loop, with the router loss of each micro-batch.
        window: Of the loop, with the router loss over the window.
        checkpointed: The same with gradient checkpointing.
        exact_trainer: Of ExactTrainer, with the router loss over the window.
        reason: Why there is no error.
    """

    model_type: str
    micro_batch: float = math.nan
    window: float = math.nan
    checkpointed: float = math.nan
    exact_trainer: float = math.nan
    reason: str = ""


@dataclass(frozen=True)
class ExpertsResult:
    """All heads with a router loss, and the cost of the first pass as ratios of times, in turns."""

    heads: tuple[ExpertsHead, ...]
    cost: tuple[float, ...]
    measured_with: dict[str, str]


def measure_experts(names: Sequence[str], repeats: int, progress: Progress = iter) -> ExpertsResult:
    """Measure these model types, or all with a router loss. Raises InputError for a name without one."""
    known = [(kind, name) for kind in KINDS for name in model_types(kind)]
    if unknown := set(names) - {name for _, name in known}:
        raise InputError(f"--only: found {sorted(unknown)[0]!r}; allowed: a causal or seq2seq model type")
    found = [_errors(*each) for each in progress([each for each in known if not names or each[1] in names])]
    heads = tuple(head for head in found if head is not None)
    if not heads:
        raise InputError(f"--only: {', '.join(names)} has no router loss")
    return ExpertsResult(heads, tuple(_cost() for _ in range(repeats)), measured_with("cpu"))


def _errors(kind: str, model_type: str) -> ExpertsHead | None:
    """Return the errors of a head; None for a head without a router loss."""
    try:
        head = _head(kind, model_type)
    except HeadUnavailableError:
        return None
    if not any(map(router_functions, head.model.modules())):
        return None
    head.model.config.output_router_logits = True
    micro_batch = math.nan
    with suppress(IndexError):  # transformers' function fails for a tiny model without a layer of experts
        micro_batch = max(_verify(head, size).loop.error for size in SPLITS)
    try:
        router_loss_over_window(head.model)
    except InputError as error:
        return ExpertsHead(model_type, micro_batch, reason=str(error))
    results = [_verify(head, size, trainer=True) for size in SPLITS]
    checkpointed = math.nan
    if head.model.supports_gradient_checkpointing:
        checkpoint_activations(head.model)
        checkpointed = max(_verify(head, size).loop.error for size in SPLITS)
    trainers = [result.exact_trainer.error if result.exact_trainer else math.nan for result in results]
    window = max(result.loop.error for result in results)
    reason = results[0].reasons[0].what if results[0].reasons else results[0].trainer_failed
    return ExpertsHead(model_type, micro_batch, window, checkpointed, max(trainers), reason)


def _head(kind: str, model_type: str) -> Head:
    head = build_head(kind, model_type)
    for name in COEFFICIENTS:
        if hasattr(head.model, name):
            setattr(head.model, name, FACTOR)
    return head


def _verify(head: Head, size: int, trainer: bool = False) -> Any:
    return verify(head.model, _windows(head, LENGTHS, micro_batch_size=size), trainer=trainer)


def _windows(head: Head, lengths: Sequence[int], **split: Any) -> WindowLoader:
    return WindowLoader(
        head.examples(lengths),
        len(lengths),
        accelerator=Accelerator(cpu=True),
        collate_fn=head.collate,
        num_items=head.num_items,
        pad_to="window",  # padding reaches the loss of some heads
        **split,
    )


def _cost() -> float:
    """Return the ratio of the times of one window, each the median of three, in turns."""
    trained = [_head("causal_lm", "mixtral") for _ in range(2)]
    trained[0].model.config.output_router_logits = True
    router_loss_over_window(trained[1].model)
    steps = [_step(head) for head in trained]
    times = [[_seconds(step) for step in steps] for _ in range(4)][1:]
    of_micro_batch, of_window = (median(column) for column in zip(*times, strict=True))
    return of_window / of_micro_batch


def _step(head: Head) -> Callable[[], None]:
    windows = _windows(head, LONG, micro_batch_size=4)
    model, optimizer = windows.accelerator.prepare(head.model, RecordGradients(head.model))

    def step() -> None:
        optimizer.optimizer.gradients.clear()
        train(model, optimizer, windows.copy(1), accelerator=windows.accelerator)

    return step


def _seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def print_experts(result: ExpertsResult, console: Console) -> None:
    """Print the table of all heads, and the cost."""
    table = Table("head", box=SIMPLE)
    for column in ("each micro-\nbatch", "window", "window, with\ncheckpointing", "window,\nExactTrainer"):
        table.add_column(column, justify="right")
    for head in result.heads:
        errors = (head.micro_batch, head.window, head.checkpointed, head.exact_trainer)
        table.add_row(head.model_type, *map(_error, errors))
    console.print("relative errors of the accumulated gradient, by what the router loss balances")
    console.print(table)
    for head in result.heads:
        if head.reason:
            console.print(f"{head.model_type}: {head.reason}")
    exact = sum(head.window <= EXACT and head.exact_trainer <= EXACT for head in result.heads)
    console.print(f"{exact} of {len(result.heads)} heads are exact with the router loss over the window")
    low, middle, high = (f(result.cost) for f in (min, median, max))
    console.print(f"time of a window of four micro-batches: {middle:.2f} × ({low:.2f} to {high:.2f})")


def _error(error: float) -> str:
    return "–" if math.isnan(error) else f"{error:.0e}"
