"""THE loop: windows in, a fine-tuned model out.

`train` is the loop of the README with a record of each window; `evaluate` runs a model over data through the
same split; `fine_tune` is both with what a real run needs around them: DDP set up for the model at hand,
evaluation, early stopping, checkpoints, the best and the last model saved. Which examples and micro-batches:
`windows.py`. Files and progress: `runlog.py`.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, gather_object

from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.loss_items import ComputeLoss, model_loss
from gradacc_hf.accumulation.nonfinite import drop_non_finite, find_non_finite
from gradacc_hf.accumulation.oom import retry_on_oom
from gradacc_hf.accumulation.reference import as_number
from gradacc_hf.accumulation.window import Window
from gradacc_hf.errors import NonFiniteError
from gradacc_hf.training.run_log import WindowRecord

logger = get_logger(__name__)

Predict = Callable[[Any, Mapping[str, Any]], tuple[Sequence[Any], Sequence[Any]]]


def logits_and_labels(outputs: Any, batch: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Predictions and references of a micro-batch, row by row, as numpy arrays: float32 logits, labels."""
    if getattr(outputs, "logits", None) is None or "labels" not in batch:
        raise ValueError("the model gives no logits, or the batch has no labels: pass predict= for this head")
    return outputs.logits.float().cpu().numpy(), batch["labels"].cpu().numpy()


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
) -> Iterator[WindowRecord]:
    """Train a prepared model, one window per step of this iterator; stop iterating to stop training.

    `scheduler` is not prepared and is stepped once a window. `max_grad_norm` 0 does not clip. `windows_done`:
    by the run that goes on; `max_windows` counts them too. A window whose loss or gradient is not finite
    takes no step; `on_nonfinite` "stop" then raises NonFiniteError, with the loader where it was before.
    """
    if max_windows is not None and windows_done >= max_windows:
        return
    numbers, look_ahead = count(windows_done + 1), getattr(compute_loss, "look_ahead", _nothing)
    largest = max_grad_norm or math.inf
    for _ in range(windows.state_dict()["epoch"], epochs):
        started = time.perf_counter()
        for window in windows:  # one window is one optimizer step
            number = next(numbers)
            model.train()
            while not window.done:
                with retry_on_oom(window, model, optimizer):  # cut finer, where memory runs out
                    look_ahead(model, window)  # nothing, but for a loss of all its examples together
                    for batch in window:  # this process's micro-batches
                        with accelerator.accumulate(model):
                            loss = compute_loss(model(**batch), batch)  # a mean over the micro-batch's items
                            accelerator.backward(window.weigh(loss))
                            if accelerator.sync_gradients:
                                norm = as_number(accelerator.clip_grad_norm_(model.parameters(), largest))
                                drop_non_finite(optimizer, norm, accelerator)  # the step is none, then
                            optimizer.step()
                            optimizer.zero_grad()
            lr = optimizer.param_groups[0]["lr"]
            mean = window.loss
            # Under fp16, a gradient beyond what it can hold is the scaler's to judge.
            finite = math.isfinite(norm if accelerator.scaler is None else mean)
            if not finite:
                where = find_non_finite(model, window, compute_loss)
                window.restore_buffers()
                _stop_or_skip(number, window, windows, where, on_nonfinite)
            windows.record_gradient_norm(window, norm)
            skipped = accelerator.optimizer_step_was_skipped or not finite
            if scheduler is not None and (not skipped or getattr(scheduler, "by_examples", False)):
                scheduler.step()
            yield WindowRecord(
                window=number,
                epoch=window.epoch,
                loss=mean,
                grad_norm=norm,
                lr=lr,
                examples=len(window.indices),
                items=window.num_items,
                tokens=window.tokens,
                padded_tokens=window.padded_tokens,
                accumulation_steps=window.accumulation_steps,
                seconds=time.perf_counter() - started,
                skipped=skipped,
                noise_scale=windows.noise.scale,
                noise_measured=windows.noise.measured,
            )
            if number == max_windows:
                return
            started = time.perf_counter()


def _stop_or_skip(number: int, window: Window, windows: WindowLoader, where: str, on_nonfinite: str) -> None:
    what = f"window {number}: its loss or gradient is not finite: {where}"
    if on_nonfinite == "stop":
        windows.rewind_to(window)
        raise NonFiniteError(
            f"{what}; no step was taken: look at these examples and go on without them (--data.leave_out), "
            "or without such windows (--train.on_nonfinite skip), or begin anew with a lower --optim.lr"
        )
    logger.warning(f"{what}; no step was taken, and the run goes on")


def _nothing(model: torch.nn.Module, window: Window) -> None:
    """Most losses are means over examples that know nothing of each other."""


@dataclass(frozen=True)
class Evaluation:
    """`loss` is the mean over all items; the lists are by example, in the data set's order, each once."""

    loss: float
    predictions: list[Any]
    references: list[Any]


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    windows: WindowLoader,
    *,
    accelerator: Accelerator,
    compute_loss: ComputeLoss = model_loss,
    predict: Predict | None = logits_and_labels,
) -> Evaluation:
    """Run a prepared model over all data of `windows`, dropout off; no accumulation state is touched.

    `predict` None: for the loss alone, without predictions and references. A loss of all examples of a window
    together (`look_ahead`) is not one of micro-batches: it is NaN here.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        model = accelerator.unwrap_model(
            model
        )  # DDP's forward is collective, and processes have unequal counts
    training = model.training
    model.eval()
    rows: list[tuple[int, Any, Any]] = []
    loss_here, items_here = 0.0, 0.0
    for micro_batch, batch in windows.micro_batches():
        outputs = model(**batch)
        if micro_batch.num_items and not hasattr(compute_loss, "look_ahead"):
            loss_here += float(compute_loss(outputs, batch)) * micro_batch.num_items
            items_here += micro_batch.num_items
        if predict and len(micro_batch.indices):  # else it is run again only because the others wait
            rows += zip(micro_batch.indices.tolist(), *predict(outputs, batch), strict=True)
    model.train(training)
    sums = gather_object([(loss_here, items_here)])
    everything = {index: (prediction, reference) for index, prediction, reference in gather_object(rows)}
    items = sum(items for _, items in sums)
    return Evaluation(
        loss=sum(loss for loss, _ in sums) / items if items else math.nan,
        predictions=[everything[index][0] for index in sorted(everything)],
        references=[everything[index][1] for index in sorted(everything)],
    )
