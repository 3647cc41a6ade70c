"""The ways to accumulate that are compared: our loop, Accelerate's, transformers' Trainer, ExactTrainer.

Each takes an unprepared model and an optimizer, and trains one epoch on the examples in the order given, with
nothing beside it: no evaluation, saving or logging.
"""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from gradacc_hf.items import ComputeLoss, CountItems
from gradacc_hf.loop import train
from gradacc_hf.trainer import ExactTrainer
from gradacc_hf.windows import WindowLoader


def run_windows(model: Any, optimizer: Any, windows: WindowLoader, **more: Any) -> float:
    """Our loop, on an unprepared model; gives its seconds. `more` goes to `loop.train`."""
    model, optimizer = windows.accelerator.prepare(model, optimizer)
    started = time.perf_counter()
    list(train(model, optimizer, windows, accelerator=windows.accelerator, **more))
    return time.perf_counter() - started


def run_accelerate(model: Any, optimizer: Any, loader: DataLoader) -> None:
    """The loop of Accelerate's guide to gradient accumulation, as it stands there."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(loader))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()


class _Clock(TrainerCallback):
    """From the first window to the last: Trainer's setting up (0.3 s) would weigh on a fast device."""

    seconds = 0.0

    def on_train_begin(self, args, state, control, **_):
        self.seconds -= time.perf_counter()

    def on_train_end(self, args, state, control, **_):
        self.seconds += time.perf_counter()


class _OwnLoss:
    """A Trainer with a loss of one's own, in the way of transformers' guide: by overriding `compute_loss`."""

    own_loss: ComputeLoss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = self.own_loss(outputs, inputs)
        return (loss, outputs) if return_outputs else loss


class _TrainerWithLoss(_OwnLoss, Trainer):
    pass


class _ExactTrainerWithLoss(_OwnLoss, ExactTrainer):
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
    num_items: CountItems | None = None,
    **arguments: Any,
) -> float:
    """One epoch of Trainer, or of ExactTrainer, which takes `num_items`; gives its seconds.

    `compute_loss`: where it is not the model's own. `arguments` go to TrainingArguments.
    """
    arguments.setdefault("train_sampling_strategy", "sequential")
    arguments |= {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    arguments |= {"num_train_epochs": 1, "per_device_train_batch_size": size, "remove_unused_columns": False}
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(folder, dataloader_pin_memory=torch.cuda.is_available(), **arguments)
        settings._n_gpu = min(1, settings.n_gpu)  # else it would take micro-batches for all GPUs at once
        given: dict[str, Any] = {"train_dataset": examples, "optimizers": (optimizer, scheduler)}
        if exact:
            kind = ExactTrainer if compute_loss is None else _ExactTrainerWithLoss
            given["num_items"] = num_items
        else:
            kind = Trainer if compute_loss is None else _TrainerWithLoss
        trainer = kind(model, settings, collate, **given)
        trainer.own_loss = compute_loss  # type: ignore[attr-defined]
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock := _Clock())
        trainer.train()
        return clock.seconds
