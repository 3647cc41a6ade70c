"""`ExactTrainer`: transformers' Trainer, with gradient accumulation that is exact.

For those who stay with Trainer. Two lines of a script change, the import and the name; for another subclass
of Trainer (trl's, your own), put `ExactTrainerMixin` before it. `gradient_accumulation_steps` then gives the
gradient of the whole window, on one process or many, for every head whose loss is a mean over items.

Trainer hands a head the window's number of items and trusts that it divides its sum of losses by it. Most
heads ignore the number. So the loss is asked, once, on the first micro-batch: a loss that heeds the number is
left to Trainer, which is right then; any other is a mean over its micro-batch, and is weighed by the
micro-batch's share of the window's items. Everything else is Trainer's.
"""

import copy
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf, isclose, isfinite, isnan, nan
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer, __version__
from transformers.utils import logging

from gradacc_hf.accumulation.loss_items import IGNORED, CountItems
from gradacc_hf.accumulation.reference import SEPARABLE_RTOL
from gradacc_hf.hf_trainer.loss_probe import (
    count_examples,
    counts_in,
    counts_to_choose_from,
    off_mean,
    parts_of,
    with_first_label,
)
from gradacc_hf.utils.hardware import refuse_place
from gradacc_hf.utils.modeling import BATCH_NORMS
from gradacc_hf.utils.rng import preserve_rng_state

logger = logging.get_logger(__name__)

SAME = 2e-5  # relative difference of two losses that is but rounding, in float32
HALVED = 1e-6  # the same of a loss and its half: dividing by twice as much is exact
COARSE = 3e-2  # instead of SEPARABLE_RTOL, for weights in bf16 or fp16


@dataclass(frozen=True)
class _Loss:
    """What the loss of `compute_loss` is, as found on a micro-batch."""

    sums: bool  # over its items, divided by the number that it is given: Trainer's own way is exact
    times_processes: bool  # a sum that was multiplied by the processes, as Trainer expects
    items: str  # the name of what counts what it is a mean over
    sure: bool  # not of a loss of 0, or NaN, which says nothing: it is asked again


_Base = Trainer if TYPE_CHECKING else object


class ExactTrainerMixin(_Base):
    """Makes a Trainer's `gradient_accumulation_steps` exact. To be named before the Trainer that it changes.

    `num_items`: what the loss is a mean over, where that is not found by itself: "labels", "next_token" or
    `batch -> number`, as in `WindowLoader`. Raises ValueError for what cannot be exact: several GPUs in one
    process (DataParallel), processes that share a model, DeepSpeed, micro-batches that are no mappings; where
    it has never been tried; and for a transformers that is too old. It weighs in `training_step`: a Trainer
    with its own, that does not call Trainer's, is not made exact.

    With `average_tokens_across_devices=False` a process's window is its own, as in Trainer: its gradient is
    exact, and the processes' mean weighs each alike.
    """

    def __init__(self, *args: Any, num_items: str | CountItems | None = None, **kwargs: Any):
        self._counts = counts_to_choose_from(num_items)
        super().__init__(*args, **kwargs)
        self._found: _Loss | None = None
        self._evaluating = False
        _refuse(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; what the loss is is asked anew."""
        self._found = None
        return super().train(*args, **kwargs)

    # ---- a window: what is counted ----

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple:
        """A window's micro-batches, counted; an iterable's last, partial window is filled up at weight 0."""
        read: Any = super().get_batch_samples
        micro_batches, theirs = read(epoch_iterator, num_batches, device)
        if not micro_batches:
            return micro_batches, theirs
        if not isinstance(micro_batches[0], Mapping):
            raise ValueError(
                f"ExactTrainer weighs micro-batches that are mappings; {type(self).__name__} makes them of "
                f"{type(micro_batches[0]).__name__}s: use it without ExactTrainerMixin"
            )
        if self._found is None or not self._found.sure:
            self._found = self._find_out(micro_batches, theirs is not None)
        items = [self._count(batch) for batch in micro_batches]
        # Trainer steps only after as many micro-batches as it expects, where it cannot know the epoch's end.
        missing = num_batches - len(micro_batches)
        micro_batches += missing * micro_batches[-1:]
        self._items_of_micro_batches = deque(items + missing * [0.0])
        total: Any = torch.tensor(sum(items), dtype=torch.float32, device=device)
        if self._processes > 1:
            total = self.accelerator.reduce(total, reduction="sum")
        self._items, self._total = total, float(total)
        return micro_batches, theirs

    def _count(self, batch: Mapping[str, Any]) -> float:
        assert self._found is not None
        try:
            return float(self._counts[self._found.items](batch))
        except ValueError as error:
            logger.warning_once(f"{error}; its examples are counted instead")
            return float(count_examples(batch))

    @property
    def _processes(self) -> int:
        """Over how many processes a window's items are counted."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward of one micro-batch, weighed; gives what Trainer logs: its part of the mean."""
        items, found = self._items_of_micro_batches.popleft(), self._found
        assert found is not None
        if found.sums:
            self.loss_is_scaled_for_ga = found.times_processes
            self.current_gradient_accumulation_steps = 1 / self._processes
            given = self._items if items else torch.full_like(self._items, inf)
            return super().training_step(model, inputs, given)
        # Trainer's own division, by another number: mean × items / total × processes.
        self.loss_is_scaled_for_ga = False
        self.current_gradient_accumulation_steps = self._total / (items * self._processes) if items else inf
        given = None if num_items_in_batch is None else torch.full_like(self._items, items or 1.0)
        with self._average_tokens_across_devices(False):
            inputs = inputs if items else _with_items(inputs)
            return super().training_step(model, inputs, given)

    # ---- an evaluation: a micro-batch's loss is the mean over its own items ----

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, but a loss that heeds no number of items is not multiplied by the processes."""
        self._evaluating = True
        try:
            with self._average_tokens_across_devices(False):
                return super().prediction_step(*args, **kwargs)
        finally:
            self._evaluating = False

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        theirs = super()._get_num_items_in_batch(batch_samples, device)
        if self._evaluating and theirs is not None and self._found is not None:
            return torch.full_like(torch.as_tensor(theirs), sum(map(self._count, batch_samples)))
        return theirs

    # ---- what is this loss? ----

    @torch.no_grad()
    def _find_out(self, micro_batches: Sequence[Mapping[str, Any]], counted: bool) -> _Loss:
        """Try `compute_loss` on a micro-batch, dropout off.

        Every process does as many forwards, as they may be collective, and goes by what the first finds.
        """
        model: Any = self.model_wrapped
        norms = [name for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)]
        if norms:
            logger.warning(f"BatchNorm ({norms[0]}, …) mixes the examples of a micro-batch: never exact")
        modes = [(module, module.training) for module in model.modules()]
        metrics = copy.deepcopy(getattr(self, "_metrics", None))  # of trl's Trainers, noted in each forward
        model.eval()
        try:
            with preserve_rng_state():
                try:
                    found = self._try(micro_batches, counted)
                except Exception:  # a model that gives its loss in training mode only
                    for module in model.modules():
                        module.training = not isinstance(module, BATCH_NORMS)
                    found = self._try(micro_batches, counted)
        finally:
            for module, training in modes:
                module.training = training
            if metrics is not None:
                self._metrics = metrics
        return broadcast_object_list([found])[0]

    def _try(self, micro_batches: Sequence[Mapping[str, Any]], counted: bool) -> _Loss:
        """Give the loss two numbers of items, and two parts of a micro-batch."""
        names = self._possible_counts(micro_batches[0], counted)
        batch = next((b for b in micro_batches if self._counts[names[0]](b)), micro_batches[0])
        number = float(self._counts[names[0]](batch)) or 1.0
        with self._average_tokens_across_devices(False):
            once, twice = (self._loss(batch, n if counted else None) for n in (number, 2 * number))
            try:
                mean = self._loss(batch, None)
            except Exception:  # a loss that needs the number
                mean = nan
            try:
                parts = parts_of(batch)
                losses = [self._loss(part, None) for part in parts]
            except Exception:  # the same, or a batch that is not rows
                parts, losses = [], []
        again = self._loss(batch, number if counted else None) if self._processes > 1 else nan
        heeded = 2 * (once - twice)  # of a loss that is sum / number + rest, the first
        rest = once - heeded
        sums = bool(once) and abs(rest) <= HALVED * abs(once)
        times_processes = not isclose(again, once, rel_tol=SAME)
        if abs(heeded) > HALVED * abs(once):
            denominator = number * heeded / (mean - rest)
            off = {name: abs(self._counts[name](batch) / denominator - 1) for name in names}
            each = {
                name: abs(self._counts[name](batch) * self._processes / denominator - 1) for name in names
            }
            if (
                min(off.values()) > SEPARABLE_RTOL >= min(each.values())
            ):  # it multiplies by the processes itself
                off, times_processes = each, True
        else:
            off = {name: off_mean(parts, losses, self._counts[name]) for name in names}
        nearest = min(off.values())
        items = next(name for name in names if not off[name] > max(2 * nearest, SAME / 10))
        coarse = next(self.model.parameters()).dtype != torch.float32  # type: ignore[union-attr]
        unknown = isnan(off[items]) and len(self._counts) > 1 and not sums
        if off[items] > (COARSE if coarse else SEPARABLE_RTOL) or unknown:
            what = "could not be tried as a mean" if unknown else "is not a mean"
            logger.warning(
                f"the loss of a micro-batch {what} over its items, counted as {items!r}: accumulation may "
                "not be exact. Where it is a mean over others, say which: num_items= 'labels', 'next_token' "
                "or a function of the batch"
            )
        return _Loss(sums, times_processes, items, sure=bool(once) and isfinite(once))

    def _loss(self, batch: Mapping[str, Any], number: float | None) -> float:
        torch.manual_seed(0)  # a model that draws in evaluation mode too draws alike
        inputs = self._prepare_inputs(dict(batch))
        given = None if number is None else torch.tensor(number, device=self.args.device)
        with self.compute_loss_context_manager():
            model: Any = self.model_wrapped
            loss: Any = self.compute_loss(model, inputs, num_items_in_batch=given)
        return float(loss)

    def _possible_counts(self, batch: Mapping[str, Any], counted: bool) -> list[str]:
        """The counts that find in this batch what they count, the likeliest first."""
        labels, shifts = batch.get("labels"), getattr(self, "_loss_shifts_labels", False)
        if isinstance(labels, torch.Tensor) and labels.ndim > 1 and not labels.is_floating_point():
            there = labels[labels != IGNORED]
            with suppress(Exception):
                if there.numel() and there.min() != there.max():
                    ends = [with_first_label(batch, label) for label in (there.min(), there.max())]
                    losses = [self._loss(end, 1.0 if counted else None) for end in ends]
                    shifts = losses[0] == losses[1]  # it never looks at the first label
        possible = [name for name, count in self._counts.items() if counts_in(count, batch)]
        return [name for name in possible if name != ("labels" if shifts else "next_token")] or possible

    @contextmanager
    def _average_tokens_across_devices(self, value: bool) -> Iterator[None]:
        """As Trainer multiplies a loss by the processes when it is given a number of items, heeded or not."""
        before = self.args.average_tokens_across_devices
        self.args.average_tokens_across_devices = value
        try:
            yield
        finally:
            self.args.average_tokens_across_devices = before


class ExactTrainer(ExactTrainerMixin, Trainer):
    """transformers.Trainer with exact gradient accumulation; arguments as Trainer's, and `num_items`."""


def _with_items(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs whose loss is finite, to be weighed 0: NaN × 0 is NaN."""
    return {
        name: torch.zeros_like(value) if name in ("labels", "start_positions", "end_positions") else value
        for name, value in inputs.items()
    }


def _refuse(trainer: Any) -> None:
    if not hasattr(Trainer, "loss_is_scaled_for_ga"):
        raise ValueError(
            f"ExactTrainer needs a transformers whose Trainer has loss_is_scaled_for_ga; found {__version__}"
        )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"{trainer.args.n_gpu} GPUs in one process (DataParallel) cut micro-batches unseen: start one "
            "process a GPU (accelerate launch, torchrun), or show one: CUDA_VISIBLE_DEVICES=0"
        )
    refuse_place(trainer.accelerator.device.type, trainer.accelerator.distributed_type.value)
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if getattr(parallelism, "non_data_parallel_size", 1) > 1:
        raise ValueError(
            "processes that share a model (tensor, context or sequence parallel) see the same examples, "
            "which would be counted twice: use data parallelism (DDP or FSDP) only"
        )
