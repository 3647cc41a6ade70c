"""The compared ways to train: one large batch, Trainer, ExactTrainer, Accelerate and WindowLoader.

Each function takes an unprepared model and an optimizer, and trains one epoch on the examples in the given
order, without evaluation and saving. It returns the seconds and the loss of each window.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from gradacc_hf.accumulation.accelerate_state import preserve_accelerate_state
from gradacc_hf.accumulation.fp32_accumulation import accumulate_in_float32
from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.loss_items import ComputeLoss, CountItems, model_loss, total_loss
from gradacc_hf.hf_trainer.trainer import ExactTrainer
from gradacc_hf.training.distillation import Distillation
from gradacc_hf.training.loop import train


@dataclass(frozen=True)
class EpochResult:
    """The time and the losses of one epoch."""

    seconds: float
    """Time from the start of the first window to the end of the last window."""
    cpu_seconds: float
    """CPU time of all threads of the process in this time. Other programs hardly change it."""
    losses: list[float]
    """One loss per window."""


class _Stopwatch:
    """Measures the time since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def result(self, losses: list[float]) -> EpochResult:
        """Return the time until now, with these losses."""
        seconds, cpu_seconds = self._started
        return EpochResult(time.perf_counter() - seconds, time.process_time() - cpu_seconds, losses)


def run_windows(model: Any, optimizer: Any, windows: WindowLoader, **more: Any) -> EpochResult:
    """Train with the loop of `training/loop.py`; `more` are arguments of `train`."""
    accumulate_in_float32(model, optimizer)
    model, optimizer = windows.accelerator.prepare(model, optimizer)
    watch = _Stopwatch()
    records = train(model, optimizer, windows, accelerator=windows.accelerator, **more)
    return watch.result([record.loss for record in records])


def run_at_once(
    model: Any,
    optimizer: Any,
    windows: Iterable[Any],
    *,
    accelerator: Accelerator,
    scheduler: Any = None,
    max_grad_norm: float = 0.0,
    compute_loss: ComputeLoss = model_loss,
) -> EpochResult:
    """Train with each window as one large batch, in plain PyTorch."""
    model, losses = accelerator.prepare(model), []
    watch = _Stopwatch()
    for batch in windows:
        model.train()
        with accelerator.autocast():
            loss = total_loss(compute_loss(model(**batch), batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return watch.result(losses)


def run_accelerate(
    model: Any,
    optimizer: Any,
    loader: DataLoader,
    steps: int,
    scheduler: Any = None,
    max_grad_norm: float = 0.0,
    compute_loss: ComputeLoss = model_loss,
    **accelerator_arguments: Any,
) -> EpochResult:
    """Train with the loop of Accelerate's guide to accumulation; a window's loss is the mean of means."""
    accelerator = Accelerator(gradient_accumulation_steps=steps, **accelerator_arguments)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    losses, of_window = [], []
    watch = _Stopwatch()
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            loss = total_loss(compute_loss(model(**batch), batch))
            accelerator.backward(loss)
            of_window.append(loss.detach())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
                losses.append(float(sum(of_window)) / len(of_window))
                of_window.clear()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
    return watch.result(losses)


class _TrainerStopwatch(TrainerCallback):
    """Measure from the first window to the last, without the 0.3 s of Trainer's set-up."""

    def __init__(self):
        self.losses: list[float] = []

    def on_train_begin(self, args, state, control, **_):
        self.watch = _Stopwatch()

    def on_train_end(self, args, state, control, **_):
        self.result = self.watch.result(self.losses)

    def on_log(self, args, state, control, logs=None, **_):
        self.losses += [logs["loss"]] if logs and "loss" in logs else []


class CustomLossMixin:
    """Give a Trainer a different loss by overriding `compute_loss`, as in the guide of transformers."""

    custom_loss: ComputeLoss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = total_loss(self.custom_loss(outputs, inputs))
        return (loss, outputs) if return_outputs else loss


class _TrainerWithLoss(CustomLossMixin, Trainer):
    pass


class _ExactTrainerWithLoss(CustomLossMixin, ExactTrainer):
    pass


def run_trainer(
    model: Any,
    optimizer: Any,
    examples: Any,
    collate: Callable,
    size: int,
    scheduler: Any = None,
    compute_loss: ComputeLoss | None = None,
    exact: bool = False,
    num_items: str | CountItems | None = None,
    **arguments: Any,
) -> EpochResult:
    """Train with Trainer or ExactTrainer. The state of Accelerate is restored.

    Args:
        model: the model.
        optimizer: the optimizer.
        examples: the training data.
        collate: makes a batch of examples.
        size: examples of a micro-batch.
        scheduler: the learning rate scheduler.
        compute_loss: computes the loss from (outputs, batch); None for the loss of the model.
        exact: whether to use ExactTrainer.
        num_items: the items of a batch, for ExactTrainer.
        arguments: arguments of TrainingArguments.
    """
    arguments = {"train_sampling_strategy": "sequential", "logging_steps": 1, **arguments}
    arguments |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "num_train_epochs": 1}
    arguments |= {"per_device_train_batch_size": size, "remove_unused_columns": False}
    arguments.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    with tempfile.TemporaryDirectory() as folder, preserve_accelerate_state():
        settings = TrainingArguments(folder, **arguments)
        settings._n_gpu = min(1, settings.n_gpu)  # otherwise a micro-batch holds the examples of all GPUs
        given: dict[str, Any] = {"train_dataset": examples, "optimizers": (optimizer, scheduler)}
        if exact:
            kind = ExactTrainer if compute_loss is None else _ExactTrainerWithLoss
            given["num_items"] = num_items
        else:
            kind = Trainer if compute_loss is None else _TrainerWithLoss
        trainer = kind(model, settings, collate, **given)
        trainer.custom_loss = compute_loss  # type: ignore[attr-defined]
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch := _TrainerStopwatch())
        trainer.train()
    return watch.result


@torch.no_grad()
def custom_loss(model: torch.nn.Module, batch: Any, compute_loss: ComputeLoss) -> ComputeLoss | None:
    """Return `compute_loss`, or None if it equals the loss of the model, which Trainer uses by default."""
    if isinstance(compute_loss, Distillation):  # in evaluation mode, it is the loss of the model
        return compute_loss
    training = model.training
    model.eval()
    outputs = model(**batch)
    model.train(training)
    loss, ours = getattr(outputs, "loss", None), total_loss(compute_loss(outputs, batch))
    return None if loss is not None and torch.equal(loss, ours) else compute_loss
