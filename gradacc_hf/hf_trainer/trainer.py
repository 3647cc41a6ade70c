"""`ExactTrainer`: the Trainer of transformers, with exact gradient accumulation.

Two lines of a script change: the import and the class name. For another subclass of Trainer (of trl, or your
own), put `ExactTrainerMixin` before it. `gradient_accumulation_steps` then gives the gradient of the whole
window, on one process or many, for every head whose loss is a mean over items.

Trainer passes the number of items of the window to the head, and expects the head to divide a sum of losses
by this number. Most heads ignore the number. ExactTrainer therefore probes the loss on rows of the first
window, and again in a window that raises a new question (`loss_probe.py`). If the loss uses the number,
Trainer is exact and nothing changes. Any other loss is a mean over the micro-batch. ExactTrainer weighs it by
the share of the window's items in the micro-batch.
"""

import copy
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedModel, Trainer, __version__
from transformers.utils import logging

from gradacc_hf.accumulation.loss_items import CountItems
from gradacc_hf.accumulation.oom import out_of_memory
from gradacc_hf.accumulation.probe_rows import Rows, on_host
from gradacc_hf.accumulation.router_loss import RouterLoss, router_loss_of
from gradacc_hf.hf_trainer.item_counts import count_examples
from gradacc_hf.hf_trainer.loss_probe import LossProbe
from gradacc_hf.hf_trainer.loss_questions import Answer
from gradacc_hf.hf_trainer.outputs import for_trainer
from gradacc_hf.hf_trainer.trainer_losses import TrainerLosses
from gradacc_hf.padding.removal import remove_padding_in_all
from gradacc_hf.utils.hardware import refuse_place
from gradacc_hf.utils.logs import info
from gradacc_hf.utils.memory import release_memory
from gradacc_hf.utils.modeling import train_batch_norms

if TYPE_CHECKING:
    from datasets import Dataset as DatasetOfRows
    from torch.utils.data import Dataset, IterableDataset
    from transformers import (
        BaseImageProcessor,
        DataCollator,
        EvalPrediction,
        FeatureExtractionMixin,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
        TrainingArguments,
    )

logger = logging.get_logger(__name__)

DIVISOR_OF_WEIGHT_0 = inf
"""Divides the loss of a micro-batch with weight 0.

Trainer only divides losses: by `num_items_in_batch`, or by `current_gradient_accumulation_steps`. A finite
loss divided by infinity is 0, and so is the gradient.
"""


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
        padding_free: whether to compute the layers without padding (`gradacc_hf.remove_padding`). The model
            is checked with the first micro-batch of the first process.
        **kwargs: keyword arguments of the Trainer.

    Raises:
        ValueError: the set-up cannot be exact or was never tested. Examples are several GPUs in one process,
            processes that share a model, DeepSpeed, and an old transformers. In training: a micro-batch is
            not a mapping.
        PaddingNotRemovableError: in training, with `padding_free`: the model is not exact without padding.
    """

    def __init__(
        self,
        *args: Any,
        num_items: str | CountItems | None = None,
        padding_free: bool = False,
        **kwargs: Any,
    ):
        self._num_items, self._padding_free = num_items, padding_free
        super().__init__(*args, **kwargs)
        self._probe, self._reported = self._new_probe(), set()
        self._losses: TrainerLosses | None = None
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
        self._probe, self._reported, self._losses = self._new_probe(), set(), None
        try:
            return super().train(*args, **kwargs)
        finally:
            if (router_loss := self._router_loss) is not None:
                router_loss.forget()

    def _new_probe(self) -> LossProbe:
        names = getattr(self, "label_names", None) or ()
        return LossProbe(self._num_items, names, getattr(self.model, "config", None))

    @property
    def items_found(self) -> str | None:
        """The items of the mean loss that the probe found, such as "labels"; None before the first window."""
        return None if self._probe.kind is None else self._probe.kind.count

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
        if self._padding_free and self._probe.kind is None:
            model: Any = self.model_wrapped
            remove_padding_in_all(model, self._prepare_inputs(dict(micro_batches[0])), self.accelerator)
        asks = self._probe.asks(micro_batches, int(self.state.epoch or 0))
        items, asks = self._add_up_items(micro_batches, asks)
        for attempt in (1, 2) if asks else ():  # the first sample may show what to look for
            self._probe_loss(micro_batches, num_items_of_trainer is not None)
            differs = self._probe.differs(micro_batches)
            items, is_open = self._add_up_items(micro_batches, bool(differs))
            if not is_open:
                break
            if attempt == 2:
                self._report(self._probe.leave_open(differs))
        self._replace_without_items(micro_batches, items)
        # Without a known end of the epoch, Trainer steps only after the expected number of micro-batches.
        missing = num_batches - len(micro_batches)
        micro_batches += missing * micro_batches[-1:]
        items += missing * [0.0]
        self._items_of_micro_batches = deque(items)
        self._look_ahead(micro_batches, items)
        return micro_batches, num_items_of_trainer

    @property
    def _router_loss(self) -> RouterLoss | None:
        return None if self.model is None else router_loss_of(self.model)

    def _look_ahead(self, micro_batches: Sequence[Mapping[str, Any]], items: Sequence[float]) -> None:
        """Run the first pass of the router loss, if `router_loss_over_window` is on for the model."""
        router_loss, model, kind = self._router_loss, self.model_wrapped, self._probe.kind
        if router_loss is None or model is None or kind is None:
            return
        weights = [self._processes * (bool(n) if kind.is_sum else n / self._total) for n in items]
        model.train()
        with self.compute_loss_context_manager():
            router_loss.look_ahead(model, map(self._prepare_inputs, map(dict, micro_batches)), weights)

    def _replace_without_items(self, micro_batches: list[Any], items: list[float]) -> None:
        """Replace micro-batches of weight 0 whose mean over no items may be NaN, as NaN / infinity is NaN."""
        assert self._probe.kind is not None
        if self._probe.kind.is_sum or all(items) or not any(items):
            return
        other = next(batch for batch, number in zip(micro_batches, items, strict=True) if number)
        for place, number in enumerate(items):
            if not number:
                micro_batches[place] = other

    def _add_up_items(
        self, micro_batches: Sequence[Mapping[str, Any]], asks: bool
    ) -> tuple[list[float], bool]:
        """Count the items of the window. Return the items by micro-batch, and whether any process `asks`."""
        items = [self._count(batch) if self._probe.kind else 0.0 for batch in micro_batches]
        sums = torch.tensor([sum(items), asks], dtype=torch.float32, device=self.args.device)
        anywhere: Any = sums
        if self.accelerator.num_processes > 1:
            anywhere = self.accelerator.reduce(sums, reduction="sum")
        self._items = (anywhere if self._processes > 1 else sums)[0]
        self._total = float(self._items)
        return items, bool(anywhere[1])

    def _count(self, batch: Mapping[str, Any]) -> float:
        assert self._probe.kind is not None
        try:
            return float(self._probe.counts[self._probe.kind.count](batch))
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
        items, kind = self._items_of_micro_batches.popleft(), self._probe.kind
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
            inputs = inputs if items else self._with_items(inputs)
            return super().training_step(model, inputs, number)

    def _with_items(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs with labels that all count, so that the loss is finite."""
        names = {"labels", "start_positions", "end_positions", *self.label_names}
        return {
            name: torch.zeros_like(value) if name in names and isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }

    def compute_loss(self, model, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as Trainer does, also from an object, a loss alone, or (logits, loss)."""
        compute: Any = super().compute_loss
        usual = isinstance(self.model, PreTrainedModel)  # its outputs are a mapping
        if usual or getattr(compute, "__func__", None) is not Trainer.compute_loss:
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
        if self._evaluating and number is not None and self._probe.kind is not None:
            return torch.full_like(torch.as_tensor(number), sum(map(self._count, batch_samples)))
        return number

    # ---- the probe: find the kind of loss ----

    def _probe_loss(self, micro_batches: Sequence[Mapping[str, Any]], counted: bool) -> None:
        """Probe `compute_loss` without dropout on a few rows of the window, and log what is new.

        Forwards may be collective. All processes therefore probe the same rows, and use the losses of the
        first process.
        """
        model: Any = self.model_wrapped
        if self._probe.kind is None:
            warn_of_batch_norm(model)
        if self._losses is None or self._losses.counted != counted:
            self._losses = TrainerLosses(self, counted, self._processes)
        metrics = copy.deepcopy(getattr(self, "_metrics", None))  # forwards of trl's Trainers append to it

        def rows(pairs: bool = False) -> list[Rows]:
            own = self._probe.rows(micro_batches, pairs)
            if self.accelerator.num_processes == 1:
                return own
            of_processes = gather_object([own])
            return self._probe.choose(list(chain(*of_processes)), max(map(len, of_processes)))

        # The same micro-batch in all processes.
        first = broadcast_object_list(on_host([Rows({}, dict(micro_batches[0]))]))[0].batch
        answer = failure = None
        try:
            with self._losses.ready(first):
                answer = self._learn(rows(), self._losses, lambda: rows(pairs=True), first)
        except RuntimeError as error:
            if not out_of_memory(error) or self._probe.kind is None:
                raise
            failure = error
        finally:
            if metrics is not None:
                self._metrics = metrics
        if failure is not None:  # the states of the optimizer fill the memory by now
            self._probe.stop()
            release_memory()
            logger.warning("The loss is not checked again, as memory ran out in a check")
        self._report(answer)

    def _learn(
        self,
        sample: list[Rows],
        losses: TrainerLosses,
        in_pairs: Callable[[], list[Rows]],
        whole: Mapping[str, Any],
    ) -> Answer | None:
        """Probe a sample of rows; of fewer rows if memory runs out in a single process."""
        while True:
            try:
                return self._probe.learn(sample, losses, in_pairs, whole)
            except RuntimeError as error:
                if not out_of_memory(error) or len(sample) < 4 or self.accelerator.num_processes > 1:
                    raise
            sample = sample[: len(sample) // 2]

    def _report(self, answer: Answer | None) -> None:
        """Log what the probe found, each line once per training."""
        if answer is not None and self.is_world_process_zero() and answer.text not in self._reported:
            self._reported.add(answer.text)
            line = f"{type(self).__name__}: {answer.text}"
            info(logger, line) if answer.exact == "yes" else logger.warning(line)

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
        padding_free: whether to compute the layers without padding.

    Raises:
        ValueError, PaddingNotRemovableError: as `ExactTrainerMixin`.
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
            padding_free: bool = False,
        ) -> None: ...


def _signature() -> inspect.Signature:
    """Return the signature of Trainer with the arguments of `ExactTrainerMixin` added."""
    trainer, mixin = inspect.signature(Trainer), inspect.signature(ExactTrainerMixin)
    added = [mixin.parameters[name] for name in ("num_items", "padding_free")]
    return trainer.replace(parameters=[*trainer.parameters.values(), *added])


ExactTrainer.__signature__ = _signature()  # type: ignore[attr-defined]


def warn_of_batch_norm(model: torch.nn.Module) -> None:
    """Warn of modules that normalise over the micro-batch."""
    if norms := train_batch_norms(model):
        logger.warning(
            f"BatchNorm ({norms[0]}, …) mixes the examples of a micro-batch: accumulation cannot be exact"
        )


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
