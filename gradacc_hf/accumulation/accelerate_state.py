"""All access to private or mutable state of Accelerate. No other module accesses it.

The state is `Accelerator.step`, `GradientState.plugin_kwargs`, `Accelerator.ddp_handler`, the lists of
prepared objects (`_models`, `_optimizers`, `_schedulers`), and the state that all Accelerators of a process
share.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from gradacc_hf.errors import InputError

FINE_TUNE_PREPARES = (
    "fine_tune prepares the model and the optimizer itself: leave out accelerator.prepare, or use train, "
    "which takes prepared ones"
)


class AccumulationSteps:
    """Accelerate's accumulation state during one pass over the micro-batches of a window.

    A context manager that restores the state at the end. `begin` sets the state before each micro-batch. If a
    loop left a pass, the garbage collector may end it during a later pass. The later pass then restores the
    state from before both.

    Args:
        accelerator: The Accelerator of the run.
        num_steps: Micro-batches of this process in the window.
        sync_each_batch: Whether gradients are reduced after each micro-batch, not only after the last.

    """

    _hook: ClassVar[Any] = None
    """The hook that counts steps. It is never removed: torch.compile recompiles when the hooks change."""
    _open: ClassVar[list["AccumulationSteps"]] = []
    """The passes that have begun and not ended, the oldest first. All share Accelerate's settings."""

    def __init__(self, accelerator: Accelerator, num_steps: int, sync_each_batch: bool):
        self._accelerator = accelerator
        self._settings = accelerator.gradient_state.plugin_kwargs
        self._for_window = {
            "num_steps": num_steps,
            # Accelerate treats a prepared loader that was left in the last batch as ended. `accumulate`
            # would then synchronise every micro-batch. Only the window defines the end here.
            "sync_with_dataloader": False,
            "sync_each_batch": sync_each_batch,
        }
        self._early: dict[int, tuple[str, int]] = {}  # by id of the optimizer: its class, and early steps
        self._in_time: set[int] = set()  # ids of the optimizers that stepped after the last micro-batch

    def __enter__(self) -> "AccumulationSteps":
        if AccumulationSteps._hook is None:
            AccumulationSteps._hook = register_optimizer_step_pre_hook(_count_step)
        self._settings_before, self._step_before = dict(self._settings), self._accelerator.step
        self._open.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        later = self._open[self._open.index(self) + 1 :]
        self._open.remove(self)
        if later:
            later[0]._settings_before = self._settings_before
        else:
            self._settings.clear()
            self._settings.update(self._settings_before)
        on_the_same = [steps for steps in later if steps._accelerator is self._accelerator]
        if on_the_same:
            on_the_same[0]._step_before = self._step_before
        else:
            self._accelerator.step = self._step_before

    def begin(self, position: int) -> None:
        """Set the state for the micro-batch at `position`, as another loader may have run in between."""
        self._settings.update(self._for_window)
        self._accelerator.step = position

    def count_entries(self, position: int) -> int:
        """Return how often `accelerator.accumulate` was entered since `begin(position)`."""
        return self._accelerator.step - position

    @property
    def early_steps(self) -> tuple[str, int]:
        """The class of an unprepared optimizer that stepped before the last micro-batch, and its steps.

        ("", 0) without one. If nothing was prepared, and another optimizer waits for the last micro-batch,
        the early steps are deliberate.
        """
        accelerator = self._accelerator
        if not (accelerator._optimizers or accelerator._models) and self._in_time - self._early.keys():
            return "", 0
        return max(self._early.values(), key=lambda steps: steps[1], default=("", 0))

    def count_step(self, optimizer: Optimizer) -> None:
        """Count a step of any optimizer of the process."""
        # The pass may be left, and the state reset since.
        if getattr(self._accelerator.gradient_state, "sync_gradients", True):
            self._in_time.add(id(optimizer))
        elif _trains_the_model(self._accelerator, optimizer):
            _, steps = self._early.get(id(optimizer), ("", 0))
            self._early[id(optimizer)] = type(optimizer).__name__, steps + 1


def _count_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling() and AccumulationSteps._open:
        AccumulationSteps._open[-1].count_step(optimizer)


def _trains_the_model(accelerator: Accelerator, optimizer: Optimizer) -> bool:
    """Whether an optimizer holds weights of the prepared optimizers; without these, of prepared models.

    True if nothing was prepared.
    """
    trained = {id(weight) for weight in prepared_parameters(accelerator)}
    if not accelerator._optimizers:
        trained = {id(weight) for model in accelerator._models for weight in model.parameters()}
    weights = (weight for group in optimizer.param_groups for weight in group["params"])
    return not trained or any(id(weight) in trained for weight in weights)


def forwards_are_collective(accelerator: Accelerator) -> bool:
    """Whether all processes must run each forward together (FSDP)."""
    return accelerator.distributed_type == DistributedType.FSDP


def zero_prepared_gradients(accelerator: Accelerator) -> None:
    """Drop the gradients of all prepared optimizers, even inside a window, where Accelerate would not."""
    for optimizer in accelerator._optimizers:
        optimizer.optimizer.zero_grad()


def prepared_parameters(accelerator: Accelerator) -> list[torch.nn.Parameter]:
    """Return the parameters of all prepared optimizers, each once."""
    groups = [group for optimizer in accelerator._optimizers for group in optimizer.param_groups]
    return list({id(p): p for group in groups for p in group["params"]}.values())


def prepared_schedulers(accelerator: Accelerator) -> list[Any]:
    """Return the prepared learning rate schedulers, unwrapped."""
    return [getattr(scheduler, "scheduler", scheduler) for scheduler in accelerator._schedulers]


def forget_prepared_optimizers(accelerator: Accelerator) -> None:
    """Remove the prepared optimizers from an Accelerator."""
    accelerator._optimizers.clear()


def check_prepared(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any) -> None:
    """Raise InputError for a model or an optimizer that did not go through `accelerator.prepare`."""
    if not isinstance(optimizer, AcceleratedOptimizer):
        raise InputError(
            f"optimizer: found an unprepared {type(optimizer).__name__}; write "
            "`model, optimizer = accelerator.prepare(model, optimizer)` before the loop"
        )
    wrapped = _without_compile(model) is not _unwrapped(accelerator, model)
    synchronises = accelerator.num_processes == 1 or forwards_are_collective(accelerator) or wrapped
    if not (synchronises and _was_prepared(accelerator, model)):
        raise InputError(
            f"model: found an unprepared {type(model).__name__}; write "
            "`model, optimizer = accelerator.prepare(model, optimizer)` before the loop"
        )


def check_prepared_model(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Raise InputError for an unprepared model if an evaluation needs a prepared one.

    FSDP and mixed precision need one. An unprepared model ignores mixed precision.
    """
    if accelerator.mixed_precision == "no" and not forwards_are_collective(accelerator):
        return
    if not _was_prepared(accelerator, model):
        raise InputError(
            f"model: found an unprepared {type(model).__name__}; write `model = accelerator.prepare(model)` "
            "before the evaluation"
        )


def _without_compile(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model inside a wrapper of torch.compile, of the whole model or of its blocks."""
    return getattr(model, "_orig_mod", model)


def _unwrapped(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module:
    """Return the model without wrappers. The list of Accelerate has models from before torch.compile."""
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def _is_listed(accelerator: Accelerator, model: torch.nn.Module) -> bool:
    bare = _unwrapped(accelerator, model)
    return any(bare is _unwrapped(accelerator, prepared) for prepared in accelerator._models)


def _was_prepared(accelerator: Accelerator, model: torch.nn.Module) -> bool:
    # The mark survives `accelerator.free_memory()`, which empties the list.
    return getattr(model, "_is_accelerate_prepared", False) or _is_listed(accelerator, model)


# Models that `check_unprepared` has passed. On one process, fine_tune leaves them listed as prepared. The
# set allows a second fine_tune of the same model.
_passed: "weakref.WeakSet[torch.nn.Module]" = weakref.WeakSet()


def check_unprepared(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any) -> None:
    """Raise InputError for a model or an optimizer that went through `accelerator.prepare`."""
    if isinstance(optimizer, AcceleratedOptimizer):
        raise InputError(f"optimizer: found a prepared optimizer; {FINE_TUNE_PREPARES}")
    bare = _unwrapped(accelerator, model)
    if _without_compile(model) is not bare:
        raise InputError(f"model: found a model wrapped in {type(model).__name__}; {FINE_TUNE_PREPARES}")
    if bare not in _passed and _is_listed(accelerator, model):
        raise InputError(f"model: found a prepared {type(model).__name__}; {FINE_TUNE_PREPARES}")
    _passed.add(bare)


def find_unused_parameters(accelerator: Accelerator) -> None:
    """Make DDP search for parameters without a gradient, in models that are prepared later."""
    handler: Any = accelerator.ddp_handler or DistributedDataParallelKwargs()
    handler.find_unused_parameters = True
    accelerator.ddp_handler = handler


def forget_model(accelerator: Accelerator, model: Any) -> None:
    """Leave a prepared model out of checkpoints of an Accelerator."""
    accelerator._models.remove(model)


def requested_steps() -> int | None:
    """Return the accumulation steps that are set in Accelerate; None without Accelerate."""
    return GradientState().num_steps if GradientState._shared_state else None


def reset_settings() -> None:
    """Reset the precision and plugins for the next Accelerator of this process. The processes stay."""
    AcceleratorState._reset_state()


def reset_accelerate() -> None:
    """Reset all state, so that the next Accelerator of this process is like the first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextmanager
def preserve_accelerate_state() -> Iterator[None]:
    """Restore the shared state of all Accelerators at the end of the block. TrainingArguments clears it."""
    states = (AcceleratorState, PartialState, GradientState)
    before = [dict(state._shared_state) for state in states]
    try:
        yield
    finally:
        for state, values in zip(states, before, strict=True):
            state._shared_state.clear()
            state._shared_state.update(values)
