"""`ExactTrainer`: the Trainer of transformers, with exact gradient accumulation.

Two lines of a script change: the import and the class name. For another subclass of Trainer (of trl, or your
own), put `ExactTrainerMixin` before it. `gradient_accumulation_steps` then gives the gradient of the whole
window, on one process or many, for every head whose loss is a mean over items.

Trainer passes the number of items of the window to the head, and expects the head to divide a sum of losses
by this number. Most heads ignore the number. ExactTrainer therefore probes the loss once, on the first
micro-batch. If the loss uses the number, Trainer is exact and nothing changes. Any other loss is a mean over
the micro-batch. ExactTrainer weighs it by the share of the window's items in the micro-batch.
"""

import copy
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    can_count,
    candidate_counts,
    count_examples,
    deviation_from_mean,
    split_to_probe,
    with_first_label,
)
from gradacc_hf.hf_trainer.outputs import for_trainer
from gradacc_hf.utils.hardware import refuse_place
from gradacc_hf.utils.modeling import BATCH_NORMS
from gradacc_hf.utils.rng import preserve_rng_state

if TYPE_CHECKING:
    from datasets import Dataset as DatasetOfRows
    from torch.utils.data import Dataset, IterableDataset
    from transformers import (
        BaseImageProcessor,
        DataCollator,
        EvalPrediction,
        FeatureExtractionMixin,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
        TrainingArguments,
    )

logger = logging.get_logger(__name__)

LOSS_RTOL_FP32 = 2e-5
"""Largest relative difference between two losses that differ only by float32 rounding."""
HALVING_RTOL = 1e-6
"""The same for a loss and half of it. The value is smaller, as a division by twice the number is exact."""
SEPARABLE_RTOL_HALF = 3e-2
"""Replaces `SEPARABLE_RTOL` for weights in bf16 or fp16."""
DIVISOR_OF_WEIGHT_0 = inf
"""Divides the loss of a micro-batch with weight 0.

Trainer only divides losses: by `num_items_in_batch`, or by `current_gradient_accumulation_steps`. A finite
loss divided by infinity is 0, and so is the gradient.
"""


@dataclass(frozen=True)
class _LossKind:
    """The kind of loss that `compute_loss` returns, as found by the probe of a micro-batch."""

    is_sum: bool
    """Whether the loss is a sum over items, divided by `num_items_in_batch`. If so, Trainer is exact."""
    times_processes: bool
    """Whether a sum is multiplied by the number of processes, as Trainer expects."""
    count: str
    """Name of the item count of the mean."""
    is_conclusive: bool
    """Whether the result is used for later windows. After a loss of 0 or NaN the next window is probed."""


_Base = Trainer if TYPE_CHECKING else object


class ExactTrainerMixin(_Base):
    """Make the gradient accumulation of a Trainer exact: `class MyTrainer(ExactTrainerMixin, SomeTrainer)`.

    The mixin weighs losses in `training_step`. It has no effect on a Trainer whose `training_step` does not
    call `Trainer.training_step`. With `average_tokens_across_devices=False`, each process has a separate
    window, as in Trainer. The gradient of each process is then exact, and all processes have equal weight.

    Args:
        *args: positional arguments of the Trainer.
        num_items: "labels", "next_token", or a function from a batch to a number, as in `WindowLoader`.
            Needed only if the probe does not find the items of the mean loss.
        **kwargs: keyword arguments of the Trainer.

    Raises:
        ValueError: the set-up cannot be exact or was never tested. Examples are several GPUs in one process,
            processes that share a model, DeepSpeed, and an old transformers. In training: a micro-batch is
            not a mapping.
    """

    def __init__(self, *args: Any, num_items: str | CountItems | None = None, **kwargs: Any):
        self._counts = candidate_counts(num_items)
        super().__init__(*args, **kwargs)
        self._loss_kind: _LossKind | None = None
        self._evaluating = False
        refuse_unsupported(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does. Each call probes the loss again.

        Args:
            *args: positional arguments of `Trainer.train`.
            **kwargs: keyword arguments of `Trainer.train`.

        Returns:
            The `TrainOutput` of Trainer.
        """
        self._loss_kind = None
        return super().train(*args, **kwargs)

    @property
    def items_found(self) -> str | None:
        """The items of the mean loss that the probe found, such as "labels"; None before the first window."""
        return None if self._loss_kind is None else self._loss_kind.count

    # ---- a window: count the items ----

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple:
        """Return the micro-batches of a window, and count their items.

        The last, partial window of an iterable data set is filled up with micro-batches of weight 0.
        """
        read: Any = super().get_batch_samples
        micro_batches, num_items_of_trainer = read(epoch_iterator, num_batches, device)
        if not micro_batches:
            return micro_batches, num_items_of_trainer
        if not isinstance(micro_batches[0], Mapping):
            raise ValueError(
                f"ExactTrainer needs micro-batches that are mappings; {type(self).__name__} makes "
                f"{type(micro_batches[0]).__name__}s: use {type(self).__name__} without ExactTrainerMixin"
            )
        if self._loss_kind is None or not self._loss_kind.is_conclusive:
            self._loss_kind = self._probe_loss(micro_batches, num_items_of_trainer is not None)
        items = [self._count(batch) for batch in micro_batches]
        # Without a known end of the epoch, Trainer steps only after the expected number of micro-batches.
        missing = num_batches - len(micro_batches)
        micro_batches += missing * micro_batches[-1:]
        self._items_of_micro_batches = deque(items + missing * [0.0])
        total: Any = torch.tensor(sum(items), dtype=torch.float32, device=device)
        if self._processes > 1:
            total = self.accelerator.reduce(total, reduction="sum")
        self._items, self._total = total, float(total)
        return micro_batches, num_items_of_trainer

    def _count(self, batch: Mapping[str, Any]) -> float:
        assert self._loss_kind is not None
        try:
            return float(self._counts[self._loss_kind.count](batch))
        except ValueError as error:
            logger.warning_once(f"{error}; gradacc counts the examples of this micro-batch instead")
            return float(count_examples(batch))

    @property
    def _processes(self) -> int:
        """The number of processes over which the items of a window are counted."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Run the forward and backward of one micro-batch, weighed by its share of the items of the window.

        Args:
            model: the wrapped model.
            inputs: the micro-batch, a mapping.
            num_items_in_batch: Trainer's count of items, replaced by the count of this class.

        Returns:
            The part of the window's mean loss, a detached scalar. Trainer adds up the parts.
        """
        items, kind = self._items_of_micro_batches.popleft(), self._loss_kind
        assert kind is not None
        if kind.is_sum:  # the head divides the sum by the number of items
            self.loss_is_scaled_for_ga = kind.times_processes
            self.current_gradient_accumulation_steps = 1 / self._processes
            number = self._items if items else torch.full_like(self._items, DIVISOR_OF_WEIGHT_0)
            return super().training_step(model, inputs, number)
        # Trainer divides the loss by this number, which gives mean × items / total × processes.
        self.loss_is_scaled_for_ga = False
        self.current_gradient_accumulation_steps = (
            self._total / (items * self._processes) if items else DIVISOR_OF_WEIGHT_0
        )
        number = None if num_items_in_batch is None else torch.full_like(self._items, items or 1.0)
        with self._average_tokens_across_devices(False):
            inputs = inputs if items else _with_items(inputs)  # a finite loss, as NaN / infinity is NaN
            return super().training_step(model, inputs, number)

    def compute_loss(self, model, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as Trainer does, also from an object, a loss alone, or (logits, loss)."""
        compute: Any = super().compute_loss
        if getattr(compute, "__func__", None) is not Trainer.compute_loss:  # it may read other outputs
            return compute(model, *args, **kwargs)
        with for_trainer(model):
            return compute(model, *args, **kwargs)

    # ---- an evaluation: the loss of a micro-batch is the mean over its own items ----

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run Trainer's step, without multiplying the loss by the number of processes."""
        self._evaluating = True
        try:
            with self._average_tokens_across_devices(False):
                return super().prediction_step(*args, **kwargs)
        finally:
            self._evaluating = False

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        number = super()._get_num_items_in_batch(batch_samples, device)
        if self._evaluating and number is not None and self._loss_kind is not None:
            return torch.full_like(torch.as_tensor(number), sum(map(self._count, batch_samples)))
        return number

    # ---- the probe: find the kind of loss ----

    @torch.no_grad()
    def _probe_loss(self, micro_batches: Sequence[Mapping[str, Any]], counted: bool) -> _LossKind:
        """Probe `compute_loss` on a micro-batch without dropout.

        Forwards may be collective, so all processes run the same number of them. All use the result of the
        first process.
        """
        model: Any = self.model_wrapped
        norms = [name for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)]
        if norms:
            logger.warning(
                f"BatchNorm ({norms[0]}, …) mixes the examples of a micro-batch: accumulation cannot be exact"
            )
        modes = [(module, module.training) for module in model.modules()]
        metrics = copy.deepcopy(getattr(self, "_metrics", None))  # forwards of trl's Trainers append to it
        model.eval()
        try:
            with preserve_rng_state():
                try:
                    kind = self._find_kind(micro_batches, counted)
                except Exception:  # a model that computes its loss only in training mode
                    for module in model.modules():
                        module.training = not isinstance(module, BATCH_NORMS)
                    kind = self._find_kind(micro_batches, counted)
        finally:
            for module, training in modes:
                module.training = training
            if metrics is not None:
                self._metrics = metrics
        return broadcast_object_list([kind])[0]

    def _find_kind(self, micro_batches: Sequence[Mapping[str, Any]], counted: bool) -> _LossKind:
        """Find the kind of loss, from the losses with two numbers of items and of two parts of a batch."""
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
                parts = split_to_probe(batch)
                losses = [self._loss(part, None) for part in parts]
            except Exception:  # a loss that needs the number, or a batch without rows
                parts, losses = [], []
        again = self._loss(batch, number if counted else None) if self._processes > 1 else nan
        divided = 2 * (once - twice)  # sum / number, where the loss is sum / number + rest
        rest = once - divided
        is_sum = bool(once) and abs(rest) <= HALVING_RTOL * abs(once)
        times_processes = not isclose(again, once, rel_tol=LOSS_RTOL_FP32)
        if abs(divided) > HALVING_RTOL * abs(once):
            denominator = number * divided / (mean - rest)
            counts = {name: self._counts[name](batch) for name in names}
            off = {name: abs(counts[name] / denominator - 1) for name in names}
            each = {name: abs(counts[name] * self._processes / denominator - 1) for name in names}
            if min(off.values()) > SEPARABLE_RTOL >= min(each.values()):
                off, times_processes = each, True  # the loss includes the factor of processes
        else:
            off = {name: deviation_from_mean(parts, losses, self._counts[name]) for name in names}
        nearest = min(off.values())
        count = next(name for name in names if not off[name] > max(2 * nearest, LOSS_RTOL_FP32 / 10))
        self._warn_of_inexact(off[count], count, is_sum)
        return _LossKind(is_sum, times_processes, count, is_conclusive=bool(once) and isfinite(once))

    def _warn_of_inexact(self, off: float, count: str, is_sum: bool) -> None:
        """Warn if the loss deviates from the mean over the counted items, or if the deviation is unknown."""
        half = next(self.model.parameters()).dtype != torch.float32  # type: ignore[union-attr]
        unknown = isnan(off) and len(self._counts) > 1 and not is_sum
        if off > (SEPARABLE_RTOL_HALF if half else SEPARABLE_RTOL) or unknown:
            what = "could not be tested as a mean" if unknown else "is not a mean"
            logger.warning(
                f"the loss of a micro-batch {what} over its items, counted as {count!r}: accumulation may "
                "not be exact. If it is a mean over other items, set num_items= to 'labels', 'next_token' or "
                "a function of the batch"
            )

    def _loss(self, batch: Mapping[str, Any], number: float | None) -> float:
        torch.manual_seed(0)  # a model may draw random numbers in evaluation mode
        inputs = self._prepare_inputs(dict(batch))
        num_items = None if number is None else torch.tensor(number, device=self.args.device)
        with self.compute_loss_context_manager():
            model: Any = self.model_wrapped
            loss: Any = self.compute_loss(model, inputs, num_items_in_batch=num_items)
        return float(loss)

    def _possible_counts(self, batch: Mapping[str, Any], counted: bool) -> list[str]:
        """Return the names of the counts that apply to this batch, the most likely first."""
        labels, shifts = batch.get("labels"), getattr(self, "_loss_shifts_labels", False)
        if isinstance(labels, torch.Tensor) and labels.ndim > 1 and not labels.is_floating_point():
            used = labels[labels != IGNORED]
            with suppress(Exception):
                if used.numel() and used.min() != used.max():
                    ends = [with_first_label(batch, label) for label in (used.min(), used.max())]
                    losses = [self._loss(end, 1.0 if counted else None) for end in ends]
                    shifts = losses[0] == losses[1]  # the first label has no effect
        possible = [name for name, count in self._counts.items() if can_count(count, batch)]
        return [name for name in possible if name != ("labels" if shifts else "next_token")] or possible

    @contextmanager
    def _average_tokens_across_devices(self, value: bool) -> Iterator[None]:
        """Set the argument of Trainer in the block.

        With True, Trainer multiplies a loss by the number of processes whenever it has a number of items.
        It does so even if the loss does not use the number.
        """
        before = self.args.average_tokens_across_devices
        self.args.average_tokens_across_devices = value
        try:
            yield
        finally:
            self.args.average_tokens_across_devices = before


class ExactTrainer(ExactTrainerMixin, Trainer):
    """`transformers.Trainer` with exact gradient accumulation.

    Args:
        model: as in Trainer, like all further arguments except the last.
        args: the training arguments.
        data_collator: makes a micro-batch, a mapping, from a list of examples.
        train_dataset: the training examples.
        eval_dataset: the evaluation examples, or several data sets by name.
        processing_class: a tokenizer or processor. It is saved with the model.
        model_init: makes the model, if `model` is not given.
        compute_loss_func: computes the loss from (outputs, labels, num_items_in_batch), a scalar. It may
            ignore the number of items.
        compute_metrics: computes metrics from predictions.
        callbacks: callbacks of Trainer, such as `DoctorCallback`.
        optimizers: an optimizer and a scheduler.
        optimizer_cls_and_kwargs: an optimizer class and its arguments.
        preprocess_logits_for_metrics: reduces logits before they are kept for metrics.
        num_items: "labels", "next_token", or a function from a batch to a number, as in `WindowLoader`.
            Needed only if the probe does not find the items of the mean loss.

    Raises:
        ValueError: as `ExactTrainerMixin`.
    """

    if TYPE_CHECKING:  # at run time the arguments go to the installed Trainer as they are

        def __init__(
            self,
            model: PreTrainedModel | torch.nn.Module | None = None,
            args: TrainingArguments | None = None,
            data_collator: DataCollator | None = None,
            train_dataset: Dataset | IterableDataset | DatasetOfRows | None = None,
            eval_dataset: Dataset | dict[str, Dataset] | DatasetOfRows | None = None,
            processing_class: PreTrainedTokenizerBase
            | BaseImageProcessor
            | FeatureExtractionMixin
            | ProcessorMixin
            | None = None,
            model_init: Callable[..., PreTrainedModel] | None = None,
            compute_loss_func: Callable | None = None,
            compute_metrics: Callable[[EvalPrediction], dict] | None = None,
            callbacks: list[TrainerCallback] | None = None,
            optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = ...,
            optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
            preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
            *,
            num_items: str | CountItems | None = None,
        ) -> None: ...


def _signature() -> inspect.Signature:
    """Return the signature of Trainer with the argument of `ExactTrainerMixin` added."""
    trainer, mixin = inspect.signature(Trainer), inspect.signature(ExactTrainerMixin)
    return trainer.replace(parameters=[*trainer.parameters.values(), mixin.parameters["num_items"]])


ExactTrainer.__signature__ = _signature()  # type: ignore[attr-defined]


def _with_items(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs with labels that all count, so that the loss is finite."""
    return {
        name: torch.zeros_like(value) if name in ("labels", "start_positions", "end_positions") else value
        for name, value in inputs.items()
    }


def refuse_unsupported(trainer: Any) -> None:
    """Raise ValueError for a Trainer whose accumulation cannot be exact or was never tested."""
    if not hasattr(Trainer, "loss_is_scaled_for_ga"):
        raise ValueError(
            f"ExactTrainer needs a transformers whose Trainer has loss_is_scaled_for_ga; found {__version__}"
        )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"found {trainer.args.n_gpu} GPUs in one process (DataParallel), which splits micro-batches by "
            "itself: start one process per GPU (accelerate launch, torchrun), or use one GPU "
            "(CUDA_VISIBLE_DEVICES=0)"
        )
    refuse_place(trainer.accelerator.device.type, trainer.accelerator.distributed_type.value)
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if getattr(parallelism, "non_data_parallel_size", 1) > 1:
        raise ValueError(
            "processes that share a model (tensor, context or sequence parallel) would count the same "
            "examples twice: use data parallelism (DDP or FSDP) only"
        )
