"""Compute losses and gradients of a few rows as a Trainer does, for the probe of the loss."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import isnan
from typing import Any

import torch
from accelerate.utils import DistributedType, broadcast, extract_model_from_parallel

from gradacc_hf.accumulation.loss_modes import MODES, LossMode, find_mode
from gradacc_hf.accumulation.oom import out_of_memory
from gradacc_hf.accumulation.reference import full_float32, in_dtype_of
from gradacc_hf.accumulation.router_loss import without_router_loss
from gradacc_hf.utils.attributes import Attributes
from gradacc_hf.utils.modeling import (
    BufferSnapshot,
    nonlinear_hooks,
    small_instead_of_zero,
    smallest_parameters,
    uncompiled,
    without_autocast,
)
from gradacc_hf.utils.rng import preserve_rng_state

MOST_IN_GRADIENT = 1_000_000
"""Numbers of the gradient that is compared."""


class TrainerLosses:
    """Computes losses of a Trainer without dropout. Every process gets the losses of the first.

    Args:
        trainer: The Trainer, in training.
        counted: Whether Trainer passes `num_items_in_batch`.
        num_processes: Processes over which the items of a window are counted.
    """

    def __init__(self, trainer: Any, counted: bool, num_processes: int):
        self.trainer, self.counted, self.num_processes = trainer, counted, num_processes
        self.model: Any = trainer.model_wrapped
        self._is_sharded = trainer.accelerator.distributed_type == DistributedType.FSDP
        if not self._is_sharded:
            self.model = extract_model_from_parallel(self.model, keep_torch_compile=False)
        kinds = {p.dtype for p in self.model.parameters()}
        self._is_half = not kinds <= {torch.float32, torch.float64}
        if self._is_sharded:
            self._is_half |= trainer.args.bf16 or trainer.args.fp16
        self._mode: LossMode | None = None
        self._hooked: list[str] = []
        self._changes = self._repeats_inputs = self._has_dropout = False

    @property
    def rtol(self) -> float:
        """Largest relative difference between losses that is rounding."""
        return (self._mode or MODES[-1]).rtol(self._is_half)

    @property
    def doubt(self) -> str:
        """The reason why these losses may differ from the losses in training; "" if there is none."""
        if self._changes:
            return "in training mode, it changes from call to call"
        if self._repeats_inputs and self._has_dropout:
            return "it runs the model twice on the same inputs, and the check is without dropout"
        if self._hooked:
            return f"a hook of {self._hooked[0]} changes the gradient of each micro-batch"
        return ""

    @contextmanager
    def ready(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Prepare the model in the block. Restore everything that forwards change, except for parameters.

        Args:
            batch: A micro-batch to try, the same in all processes.
        """
        number = 1.0 if self.counted else None
        modules = [value for value in vars(self.trainer).values() if isinstance(value, torch.nn.Module)]
        if not self._is_sharded:
            modules.append(self.model)
        holders = {id(m): m for module in modules for m in module.modules() if not self._is_sharded}
        if self._mode is None and not self._is_sharded:
            self._hooked = nonlinear_hooks(self.model)
        attributes = [Attributes(each) for each in (self.trainer, self.trainer.state, *holders.values())]
        buffers = BufferSnapshot(self.model) if self._is_sharded else None
        try:
            self.trainer.log = lambda *_, **__: None
            autocast = nullcontext() if self._is_sharded else without_autocast(self.model)
            off = without_router_loss(self.model)
            with autocast, off, uncompiled(self.model), preserve_rng_state(), full_float32(), torch.no_grad():
                if self._mode is None:
                    self._mode, self._changes = find_mode(
                        self.model,
                        lambda seed: self(batch, number, seed),
                        self._is_half,
                        allows_float64=not self._is_sharded,
                    )
                with self._mode.of(self.model) as self._has_dropout:
                    yield
        finally:
            if buffers is not None:
                buffers.restore()
            for each in attributes:
                each.restore()

    # ---- losses and gradients ----

    def __call__(self, batch: Mapping[str, Any], number: float | None, seed: int = 0) -> float:
        """Return the loss that `compute_loss` gives for this number of items.

        If it fails in any process, raise in all of them.
        """
        return self._of_all(lambda: self._loss(batch, number, seed))

    def across_processes(self, batch: Mapping[str, Any], number: float) -> float:
        """Return the loss with the factor of processes, if the loss has one."""
        return self._of_all(lambda: self._loss(batch, number if self.counted else None, across=True))

    def without_zeros(self) -> AbstractContextManager[None]:
        """Set parameters that are all 0 to small random numbers in the block."""
        return small_instead_of_zero(self.model)

    def gradient_error(
        self, batch: Mapping[str, Any], parts: Sequence[tuple[float, Mapping[str, Any]]], number: float | None
    ) -> float | None:
        """Return the relative error of a sum of gradients; None if it cannot be computed, or not in float64.

        Args:
            batch: The rows in one batch. The gradient of its loss is the reference.
            parts: Weights and parts of the batch.
            number: Number of items that the loss needs, if any.
        """
        if self._mode is None or not self._mode.float64:  # else rounding may be the error
            return None
        chosen = list(smallest_parameters(self.model, MOST_IN_GRADIENT).values())

        def gradient(part: Mapping[str, Any]) -> torch.Tensor:
            with torch.enable_grad():
                found = torch.autograd.grad(self._loss(part, number), chosen, allow_unused=True)
            zeros = zip(found, chosen, strict=True)
            return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zeros])

        def error() -> torch.Tensor:
            reference = gradient(batch)
            sums = sum((weight * gradient(part) for weight, part in parts), torch.zeros_like(reference))
            return (sums - reference).norm() / reference.norm()

        try:
            found = self._of_all(error)
        except Exception:  # such as memory, or a loss without a gradient
            return None
        return None if isnan(found) else found

    def _loss(
        self, batch: Mapping[str, Any], number: float | None, seed: int = 0, across: bool = False
    ) -> torch.Tensor:
        trainer = self.trainer
        torch.manual_seed(seed)  # a model may draw random numbers
        inputs = trainer._prepare_inputs(dict(batch))
        if self._mode is None or self._mode.float64:
            inputs = in_dtype_of(self.model, inputs)
        num_items = None if number is None else torch.tensor(number, device=trainer.args.device)
        watch = self.model.register_forward_pre_hook(self._watch([]), with_kwargs=True)
        try:
            with trainer._average_tokens_across_devices(across), trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(self.model, inputs, num_items_in_batch=num_items)
        finally:
            watch.remove()
        return torch.as_tensor(loss, device=trainer.args.device).reshape(())

    def _watch(self, seen: list[list[int]]) -> Callable[[Any, tuple, dict[str, Any]], None]:
        """Return a hook that notes whether the model runs twice on the same inputs for a loss."""

        def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            values = [v.data_ptr() for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
            self._repeats_inputs |= bool(values) and values in seen
            seen.append(values)

        return note

    def _of_all(self, compute: Callable[[], torch.Tensor]) -> float:
        """Return the number of the first process.

        Raises:
            Exception: the computation failed here, or memory ran out or it failed in another process.
        """
        accelerator, failure, number = self.trainer.accelerator, None, torch.zeros(())
        try:
            number = compute().detach()
        except Exception as error:
            failure = error
        if accelerator.num_processes == 1:
            if failure is not None:
                raise failure
            return float(number)
        is_full = isinstance(failure, RuntimeError) and out_of_memory(failure)
        flags = torch.tensor([failure is not None, is_full], dtype=torch.float32, device=accelerator.device)
        failed, full = accelerator.reduce(flags, reduction="sum").tolist()
        if full:
            raise failure if is_full and failure else torch.OutOfMemoryError("CUDA out of memory elsewhere")
        if failed:
            raise failure or RuntimeError("the loss failed in another process")
        found: Any = broadcast(number.to(accelerator.device, torch.float64).clone())
        return float(found)
