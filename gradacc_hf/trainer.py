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
from math import inf, isclose, nan
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer, __version__
from transformers.utils import logging

from gradacc_hf.items import COUNTS, IGNORED, CountItems, resolve
from gradacc_hf.tryout import BATCH_NORMS, SEPARABLE

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class _Loss:
    """What the loss of `compute_loss` is, as found on a micro-batch.

    `sums`: it is the sum over its items divided by the number that it is given, so that Trainer's own way is
    exact; else it is a mean over its own items. `times_processes`: such a sum, that Trainer expects
    multiplied by the processes, was. `items`: the name of what counts them.
    """

    sums: bool
    times_processes: bool
    items: str


_Base = Trainer if TYPE_CHECKING else object


class ExactTrainerMixin(_Base):
    """Makes a Trainer's `gradient_accumulation_steps` exact. To be named before the Trainer that it changes.

    `num_items`: what the loss is a mean over, where that is not found by itself: "labels", "next_token" or
    `batch -> number`, as in `WindowLoader`. Raises ValueError for what cannot be exact: several GPUs in one
    process (DataParallel), and processes that share a model.

    With `average_tokens_across_devices=False` a process's window is its own, as in Trainer: its gradient is
    exact, and the processes' mean weighs each alike.
    """

    def __init__(self, *args: Any, num_items: str | CountItems | None = None, **kwargs: Any):
        self._counts = _counts(num_items)
        super().__init__(*args, **kwargs)
        self._found: _Loss | None = None
        self._items_of_micro_batches: deque[float] = deque()
        self._items = torch.tensor(0.0)  # of the window
        self._mean_of_its_own = False
        _refuse(self)

    # ---- a window: what is counted ----

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple:
        """A window's micro-batches, counted; an iterable's last, partial window is filled up at weight 0."""
        read: Any = super().get_batch_samples
        micro_batches, theirs = read(epoch_iterator, num_batches, device)
        if not micro_batches:
            return micro_batches, theirs
        if self._found is None:
            self._found = self._find_out(micro_batches, theirs is not None)
        items = [float(self._counts[self._found.items](batch)) for batch in micro_batches]
        # Trainer steps only after as many micro-batches as it expects, where it cannot know the epoch's end.
        missing = num_batches - len(micro_batches)
        micro_batches += missing * micro_batches[-1:]
        self._items_of_micro_batches = deque(items + missing * [0.0])
        total: Any = torch.tensor(sum(items), dtype=torch.float32, device=device)
        if self._processes > 1:
            total = self.accelerator.reduce(total, reduction="sum")
        self._items = total
        return micro_batches, theirs

    @property
    def _processes(self) -> int:
        """Over how many processes a window's items are counted."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward of one micro-batch, weighed; gives what Trainer logs: its part of the mean."""
        items, total, found = self._items_of_micro_batches.popleft(), self._items, self._found
        assert found is not None
        if found.sums:
            self.loss_is_scaled_for_ga = found.times_processes
            self.current_gradient_accumulation_steps = 1 / self._processes
            given = total if items else torch.full_like(total, inf)
            return super().training_step(model, inputs, given)
        # Trainer's own division, by another number: mean × items / total × processes.
        self.loss_is_scaled_for_ga = False
        self.current_gradient_accumulation_steps = float(total) / (items * self._processes) if items else inf
        given = None if num_items_in_batch is None else torch.full_like(total, items or 1.0)
        with self._average_tokens_across_devices(False):
            inputs = inputs if items else _with_items(inputs)
            return super().training_step(model, inputs, given)

    # ---- an evaluation: a micro-batch's loss is the mean over its own items ----

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; but a head's loss is its own mean, where Trainer's is × the processes for most heads."""
        self._mean_of_its_own = self.compute_loss_func is None
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self._mean_of_its_own = False

    def _get_num_items_in_batch(self, *args: Any) -> Any:
        return None if self._mean_of_its_own else super()._get_num_items_in_batch(*args)

    # ---- what is this loss? ----

    @torch.no_grad()
    def _find_out(self, micro_batches: Sequence[Mapping[str, Any]], counted: bool) -> _Loss:
        """Try `compute_loss` on a micro-batch, dropout off.

        Every process does the same forwards, as they may be collective, and goes by what the first finds.
        """
        model: Any = self.model_wrapped
        norms = [name for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)]
        if norms:
            logger.warning(f"BatchNorm ({norms[0]}, …) mixes the examples of a micro-batch: never exact")
        modes = [(module, module.training) for module in model.modules()]
        metrics = copy.deepcopy(getattr(self, "_metrics", None))  # of trl's Trainers, noted in each forward
        model.eval()
        try:
            with torch.random.fork_rng():
                found = self._try(micro_batches, counted)
        finally:
            for module, training in modes:
                module.training = training
            if metrics is not None:
                self._metrics = metrics
        return broadcast_object_list([found])[0]

    def _try(self, micro_batches: Sequence[Mapping[str, Any]], counted: bool) -> _Loss:
        """Give the loss numbers of items, halves of a micro-batch that has items, and labels to shift."""
        names = self._possible_counts(micro_batches[0], counted)
        batch = next((b for b in micro_batches if self._counts[names[0]](b)), micro_batches[0])
        with self._average_tokens_across_devices(False):
            by_one, by_two = (self._loss(batch, number if counted else None) for number in (1.0, 2.0))
            try:
                mean = self._loss(batch, None)
                halves = [(half, self._loss(half, None)) for half in _halves(batch)]
            except Exception:  # a compute_loss_func that needs the number, or a batch that is not rows
                mean, halves = nan, []
        again = self._loss(batch, 1.0 if counted else None) if self._processes > 1 else nan
        the_sum = 2 * (by_one - by_two)  # where a loss is sum / number + rest
        sums = isclose(the_sum, by_one, rel_tol=SAME)
        if abs(the_sum) > SAME * abs(by_one):  # the number is heeded, if not in all of the loss
            denominator = the_sum / (mean - (by_one - the_sum))
            off = {name: abs(self._counts[name](batch) / denominator - 1) for name in names}
        else:
            off = {name: _off_mean(mean, halves, self._counts[name]) for name in names}
        nearest = min(off.values())
        items = next(name for name in names if not off[name] > max(2 * nearest, SAME / 10))
        if off[items] > SEPARABLE:
            logger.warning(
                f"the loss of a micro-batch is not a mean over its items, counted as {items!r}: accumulation "
                "is not exact. Where it is a mean over others, say which: num_items= 'labels', 'next_token' "
                "or a function of the batch"
            )
        return _Loss(sums, times_processes=not isclose(again, by_one, rel_tol=SAME), items=items)

    def _loss(self, batch: Mapping[str, Any], number: float | None) -> float:
        inputs = self._prepare_inputs(dict(batch))
        given = None if number is None else torch.tensor(number, device=self.args.device)
        with self.compute_loss_context_manager():
            model: Any = self.model_wrapped
            loss: Any = self.compute_loss(model, inputs, num_items_in_batch=given)
        return float(loss)

    def _possible_counts(self, batch: Mapping[str, Any], counted: bool) -> list[str]:
        """The counts that find in this batch what they count, the likeliest first."""
        labels = batch.get("labels")
        shifts = getattr(self, "_loss_shifts_labels", False)
        if isinstance(labels, torch.Tensor) and labels.ndim > 1 and not labels.is_floating_point():
            first = torch.full_like(labels, IGNORED)
            first[..., 0] = labels[..., 0].clamp(min=0)
            with suppress(Exception):  # with no item left, the loss of a head that shifts is 0 or NaN
                shifts = not self._loss({**batch, "labels": first}, 1.0 if counted else None) > 0
        possible = [name for name, count in self._counts.items() if _counts_in(count, batch)]
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


SAME = 2e-5  # relative difference of two losses that is but rounding, in float32


def _counts(num_items: str | CountItems | None) -> dict[str, CountItems]:
    """The counts to choose from, by name."""
    if num_items is not None:
        return {num_items if isinstance(num_items, str) else "num_items": resolve(num_items)}
    return {
        "shift_labels": lambda batch: int((batch["shift_labels"] != IGNORED).sum()),
        **COUNTS,
        "examples": _examples,
    }


def _examples(batch: Mapping[str, Any]) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim)


def _counts_in(count: CountItems, batch: Mapping[str, Any]) -> bool:
    try:
        return count(batch) >= 0
    except (KeyError, ValueError, IndexError, TypeError, AttributeError):
        return False


def _halves(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first rows and the rest; of one row, that row twice."""
    rows = _examples(batch)
    cuts = (slice(0, max(1, rows // 2)), slice(rows // 2, rows))
    is_rows = {k for k, v in batch.items() if isinstance(v, torch.Tensor) and v.ndim and len(v) == rows}
    return [{k: v[cut] if k in is_rows else v for k, v in batch.items()} for cut in cuts]


def _off_mean(mean: float, halves: Sequence[tuple[Mapping[str, Any], float]], count: CountItems) -> float:
    """How far the loss of a micro-batch is from the mean of its halves' over these items, relative."""
    weighed = [(count(half), loss) for half, loss in halves]
    items = sum(items for items, _ in weighed)
    of_halves = sum(items * loss for items, loss in weighed if items) / items if items else nan
    return abs(of_halves - mean) / (abs(mean) or 1)


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
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if getattr(parallelism, "non_data_parallel_size", 1) > 1:
        raise ValueError(
            "processes that share a model (tensor, context or sequence parallel) see the same examples, "
            "which would be counted twice: use data parallelism (DDP or FSDP) only"
        )
