"""The training loop over windows, and evaluation over the same splits.

`iter_windows` is the loop of the README and yields a record of each window. `train` runs the loop to the end.
`evaluate` runs a model over data. `fine_tune` (`finetune.py`) adds evaluation, checkpoints and saving.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from gradacc_hf.accumulation.accelerate_state import check_prepared, check_prepared_model
from gradacc_hf.accumulation.batch_schedule import counts_examples
from gradacc_hf.accumulation.collation import MicroBatch
from gradacc_hf.accumulation.example_losses import ExampleItems, ExampleLosses
from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.look_ahead import look_ahead
from gradacc_hf.accumulation.loss_items import (
    ComputeLoss,
    as_window_loss,
    logits_of,
    losses_by_name,
    model_loss,
)
from gradacc_hf.accumulation.nonfinite import drop_non_finite, find_non_finite
from gradacc_hf.accumulation.oom import retry_on_oom
from gradacc_hf.accumulation.reference import as_number
from gradacc_hf.accumulation.validation import check_windows
from gradacc_hf.accumulation.window import Window
from gradacc_hf.errors import NonFiniteError
from gradacc_hf.training.bad_index import name_bad_index
from gradacc_hf.training.preflight import check_trainable, warn_of_untrained
from gradacc_hf.training.run_log import WindowRecord
from gradacc_hf.utils.logs import get_logger

logger = get_logger(__name__)

Rows = Sequence[Any] | np.ndarray
"""Predictions or references of a micro-batch, by row."""
Predict = Callable[[Any, Mapping[str, Any]], tuple[Rows, Rows]]


def logits_and_labels(outputs: Any, batch: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the predictions and references of a micro-batch by row: float32 logits and labels, in numpy.

    The logits are the output of this name, the first tensor of a tuple after the loss, or a tensor alone.
    """
    logits = logits_of(outputs)
    if logits is None or "labels" not in batch:
        raise ValueError("the model gives no logits, or the batch has no labels: pass predict= for this head")
    return logits.float().cpu().numpy(), batch["labels"].cpu().numpy()


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    windows: WindowLoader,
    *,
    accelerator: Accelerator,
    scheduler: Any = None,
    epochs: int = 1,
    max_windows: int | None = None,
    max_grad_norm: float = 0.0,
    compute_loss: ComputeLoss = model_loss,
    on_nonfinite: Literal["stop", "skip"] = "stop",
    windows_done: int = 0,
    on_window: Callable[[WindowRecord], None] | None = None,
) -> list[WindowRecord]:
    """Train a prepared model on all windows.

    Args:
        model: The prepared model.
        optimizer: The prepared optimizer.
        windows: The loader of the run.
        accelerator: The Accelerator of the run.
        scheduler: A learning rate scheduler, not prepared. It is stepped once per window.
        epochs: Passes over the data.
        max_windows: Maximum number of windows of the run; None for no maximum.
        max_grad_norm: Norm at which the gradient of a window is clipped; 0 does not clip.
        compute_loss: The loss; by default the loss of the model.
        on_nonfinite: Action for a window whose loss or gradient is not finite. Such a window never takes a
            step. "stop" puts the loader back before the window and raises NonFiniteError. "skip" continues.
        windows_done: Windows of the run before this call. `max_windows` includes them.
        on_window: Called with the record of each window.

    Returns:
        The record of each window.

    Raises:
        InputError: The model or the optimizer is not prepared, or cannot be trained (`check_trainable`).
        NonFiniteError: The loss or gradient of a window is not finite, with `on_nonfinite` "stop".
        OutOfMemoryError: No split of a window fits in memory.
    """
    warn_of_untrained(model, optimizer)
    records = []
    for record in iter_windows(
        model,
        optimizer,
        windows,
        accelerator=accelerator,
        scheduler=scheduler,
        epochs=epochs,
        max_windows=max_windows,
        max_grad_norm=max_grad_norm,
        compute_loss=compute_loss,
        on_nonfinite=on_nonfinite,
        windows_done=windows_done,
    ):
        records.append(record)
        if on_window is not None:
            on_window(record)
    return records


def iter_windows(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    windows: WindowLoader,
    *,
    accelerator: Accelerator,
    scheduler: Any = None,
    epochs: int = 1,
    max_windows: int | None = None,
    max_grad_norm: float = 0.0,
    compute_loss: ComputeLoss = model_loss,
    on_nonfinite: Literal["stop", "skip"] = "stop",
    windows_done: int = 0,
) -> Iterator[WindowRecord]:
    """Train a prepared model, one window per step of the iterator. Stop iterating to stop training.

    Args:
        model: The prepared model.
        optimizer: The prepared optimizer.
        windows: The loader of the run.
        accelerator: The Accelerator of the run.
        scheduler: A learning rate scheduler, not prepared. It is stepped once per window.
        epochs: Passes over the data.
        max_windows: Maximum number of windows of the run; None for no maximum.
        max_grad_norm: Norm at which the gradient of a window is clipped; 0 does not clip.
        compute_loss: The loss, a mean over the items of a micro-batch; by default the loss of the model.
        on_nonfinite: "stop" or "skip", as for `train`.
        windows_done: Windows of the run before this call. `max_windows` includes them.

    Yields:
        The record of each window, after the optimizer step.

    Raises:
        InputError, NonFiniteError, OutOfMemoryError: As for `train`.
    """
    check_windows(windows)
    check_prepared(accelerator, model, optimizer)
    check_trainable(model, optimizer, scheduler)
    if max_windows is not None and windows_done >= max_windows:
        return
    numbers, largest = count(windows_done + 1), max_grad_norm or math.inf
    for _ in range(windows.state_dict()["epoch"], epochs):
        started = time.perf_counter()
        for window in windows:  # one window is one optimizer step
            number = next(numbers)
            model.train()
            optimizer.train()  # type: ignore[attr-defined]  # Accelerate's; for a schedule-free one
            while not window.done:  # again, split finer, if memory runs out
                with retry_on_oom(window, model, optimizer), name_bad_index(model):
                    look_ahead(compute_loss, model, window)  # only for a loss over the whole window
                    for batch in window:  # this process's micro-batches
                        with accelerator.accumulate(model):
                            loss = compute_loss(model(**batch), batch)  # a mean over the micro-batch's items
                            accelerator.backward(window.weigh(loss))
                            if accelerator.sync_gradients:
                                norm = as_number(accelerator.clip_grad_norm_(model.parameters(), largest))
                                drop_non_finite(optimizer, norm, accelerator)  # such a gradient takes no step
                            optimizer.step()
                            optimizer.zero_grad()
            lr, mean = optimizer.param_groups[0]["lr"], window.loss
            # In fp16 the scaler checks the gradient, which may exceed the range of the format.
            finite = math.isfinite(norm if accelerator.scaler is None else mean)
            if not finite:
                where = find_non_finite(model, window, compute_loss)
                window.restore_buffers()
                _stop_or_skip(number, window, windows, where, on_nonfinite)
            windows.record_gradient_norm(window, norm)
            skipped = accelerator.optimizer_step_was_skipped or not finite
            if scheduler is not None and (not skipped or counts_examples(scheduler)):
                scheduler.step()
            yield _record(number, window, windows, mean, norm, lr, skipped, time.perf_counter() - started)
            if number == max_windows:
                return
            started = time.perf_counter()


def _record(
    number: int,
    window: Window,
    windows: WindowLoader,
    loss: float,
    norm: float,
    lr: float,
    skipped: bool,
    seconds: float,
) -> WindowRecord:
    noise_low, noise_high = windows.noise.interval
    return WindowRecord(
        window=number,
        epoch=window.epoch,
        loss=loss,
        grad_norm=norm,
        lr=lr,
        examples=len(window.indices),
        items=window.num_items,
        tokens=window.tokens,
        padded_tokens=window.padded_tokens,
        accumulation_steps=window.accumulation_steps,
        seconds=seconds,
        skipped=skipped,
        noise_scale=windows.noise.scale,
        noise_measured=windows.noise.measured,
        noise_low=noise_low,
        noise_high=noise_high,
        source_losses=window.source_losses,
    )


def _stop_or_skip(number: int, window: Window, windows: WindowLoader, where: str, on_nonfinite: str) -> None:
    what = f"window {number}: the loss or gradient is not finite: {where}"
    if on_nonfinite == "stop":
        windows.rewind_to(window)
        raise NonFiniteError(
            f"{what}; no step was taken: check these examples and leave them out (--data.leave_out), "
            "skip such windows (--train.on_nonfinite skip), or start again with a lower --optim.lr"
        )
    logger.warning(f"{what}; no step was taken, and the run continues")


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        loss: Mean over all items. NaN for a loss over a whole window, such as a contrastive loss.
        predictions: One per example, in the order of the data set.
        references: One per example, in the same order.
        source_losses: Mean over the items of each source, by name. Empty without sources.
    """

    loss: float
    predictions: list[Any]
    references: list[Any]
    source_losses: Mapping[str, float] = field(default_factory=dict)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    windows: WindowLoader,
    *,
    accelerator: Accelerator,
    compute_loss: ComputeLoss = model_loss,
    predict: Predict | None = logits_and_labels,
    sources: Sequence[str] | None = None,
) -> Evaluation:
    """Run a prepared model over all data of `windows`, without dropout. The accumulation state is unchanged.

    Args:
        model: The prepared model.
        windows: The loader of the data. Its position is unchanged.
        accelerator: The Accelerator of the run.
        compute_loss: The loss; by default the loss of the model. A `WindowLoss` gives NaN, as it has no loss
            per micro-batch.
        predict: (outputs, batch) → predictions and references by row; None computes only the loss.
        sources: The source of each example, for the loss of each. A micro-batch must be of one source.

    Losses of examples are added to `windows.example_losses`, if that is an array.

    Returns:
        The loss, predictions and references, the same in all processes.

    Raises:
        InputError: The model is not prepared, with FSDP or mixed precision.
    """
    check_windows(windows)
    check_prepared_model(accelerator, model)
    if accelerator.distributed_type != DistributedType.FSDP:
        # DDP's forward is collective, and processes have unequal numbers of micro-batches.
        model = accelerator.unwrap_model(model)
    training = model.training
    model.eval()
    rows: list[tuple[int, Any, Any]] = []
    here: dict[tuple[str, str], list[float]] = {}  # by source and loss: sum, items
    for micro_batch, batch in windows.micro_batches():
        apart = _losses_apart(windows, micro_batch, batch)
        with apart.active() if apart is not None else nullcontext():
            with name_bad_index(model):
                outputs = model(**batch)
            of_model = apart.calls if apart is not None else 0
            has_loss = micro_batch.num_items and as_window_loss(compute_loss) is None
            loss = compute_loss(outputs, batch) if has_loss else None
            if apart is not None:
                apart.forget_first(of_model)
        if loss is not None:
            _add_example_losses(windows, micro_batch, apart, loss)
            losses = losses_by_name(loss, micro_batch.items, "evaluate()")
            source = _source_of(micro_batch.indices, sources)
            for name, items in (micro_batch.items or {"": micro_batch.num_items}).items():
                if items:
                    sums = here.setdefault((source, name), [0.0, 0.0])
                    sums[0] += float(losses[name]) * items
                    sums[1] += items
        if predict and len(micro_batch.indices):  # an idle micro-batch has none; it runs only for collectives
            rows += zip(micro_batch.indices.tolist(), *predict(outputs, batch), strict=True)
    model.train(training)
    sums = gather_object([here])
    known = dict.fromkeys(sources or ())
    everything = {index: (prediction, reference) for index, prediction, reference in gather_object(rows)}
    return Evaluation(
        loss=_mean_loss(sums, None),
        predictions=[everything[index][0] for index in sorted(everything)],
        references=[everything[index][1] for index in sorted(everything)],
        source_losses={name: _mean_loss(sums, name) for name in known},
    )


def _losses_apart(
    windows: WindowLoader, micro_batch: MicroBatch, batch: Mapping[str, Any]
) -> ExampleLosses | None:
    """Return what finds the loss of each example of a micro-batch; None if the loader records none."""
    number = len(micro_batch.indices)
    if windows.example_losses is None or micro_batch.items or not number:
        return None
    lengths = windows.lengths[micro_batch.indices] if windows.pad_to == "nothing" else None
    each = np.ones(number), np.arange(number)  # every example is a separate source
    found = ExampleItems.of(micro_batch.batch, windows.count_items, *each, lengths)
    return ExampleLosses(found, batch, number, weighs=False)


def _add_example_losses(
    windows: WindowLoader, micro_batch: MicroBatch, apart: ExampleLosses | None, loss: Any
) -> None:
    """Add the losses and items of a micro-batch to `example_losses`; NaN where they are not known."""
    if apart is None or windows.example_losses is None:
        return
    if isinstance(loss, torch.Tensor):
        apart.record(loss, checks=True)
    windows.example_losses[micro_batch.indices, 0] += apart.parts.cpu().numpy() * micro_batch.num_items
    windows.example_losses[micro_batch.indices, 1] += apart.items


def _source_of(indices: np.ndarray, sources: Sequence[str] | None) -> str:
    """Return the source of all examples of a micro-batch. Raise ValueError if they have several."""
    if sources is None:
        return ""
    found = {str(sources[index]) for index in indices.tolist()}
    if len(found) > 1:
        raise ValueError(f"a micro-batch has examples of {sorted(found)}: let every window have one source")
    return found.pop()


def _mean_loss(sums: Sequence[Mapping[tuple[str, str], Sequence[float]]], source: str | None) -> float:
    """Return the mean of each loss over all processes, added; NaN without items.

    Args:
        sums: Of each process, by source and loss: the sum of the losses, and items.
        source: The source, or None for all.
    """
    means = []
    for name in dict.fromkeys(name for of_process in sums for _, name in of_process):
        parts = [
            part
            for of_process in sums
            for (of_source, of_loss), part in of_process.items()
            if of_loss == name and source in (None, of_source)
        ]
        if not parts:
            continue
        means.append(sum(loss for loss, _ in parts) / sum(items for _, items in parts))
    return sum(means) if means else math.nan
