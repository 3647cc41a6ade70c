"""Observe a training loop from outside, and write a `LoopRecord`.

`Observer` takes the model and the optimizer of the loop. Hooks on these two objects report forwards and
steps; the listener of the thread (`listener.py`) reports everything else. `examination.py` runs at the end of
each window.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader

from gradacc_hf.accumulation.accelerate_state import requested_steps
from gradacc_hf.doctor.frames import driver, schedule_length, user_line
from gradacc_hf.doctor.listener import Subscriber, subscribed, thread_listener
from gradacc_hf.doctor.record import (
    Forward,
    LoopRecord,
    LossRead,
    ObservedMicroBatch,
    ObservedWindow,
    Place,
    TorchLoss,
)
from gradacc_hf.utils.modeling import disable_dropout


@dataclass(frozen=True)
class Subject:
    """The model and the optimizer of the loop, without the wrappers of Accelerate and DDP."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    ddp: DistributedDataParallel | None = None

    @classmethod
    def of(cls, model: torch.nn.Module, optimizer: Any) -> "Subject":
        """Unwrap a model and an optimizer."""
        ddp = model if isinstance(model, DistributedDataParallel) else None
        return cls(model if ddp is None else ddp.module, getattr(optimizer, "optimizer", optimizer), ddp)

    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that the optimizer steps."""
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]


@dataclass(frozen=True)
class Progress:
    """The position of the loop in a pass over the training data.

    forwards: micro-batches of this pass so far.
    length: micro-batches of a pass; None if unknown.
    ends_short: whether the last micro-batch of a pass has fewer examples.
    """

    forwards: int
    length: int | None
    ends_short: bool

    @property
    def is_at_end(self) -> bool:
        """Whether the pass is complete."""
        return self.length is not None and self.forwards == self.length


@dataclass(frozen=True)
class Attention:
    """The decision after a window: observe the next one (the default), pause, or stop.

    resume_at: number of micro-batches in the pass after which to observe again; None for no pause.
    stop: whether enough was observed.
    """

    resume_at: int | None = None
    stop: bool = False


class DataPasses:
    """Counts passes over the training data.

    The loader that started last before the first backward counts as the training loader.
    """

    def __init__(self, record: LoopRecord, started: Sequence[DataLoader]):
        self._record, self._started = record, list(started)
        self._training: DataLoader | None = None
        self._is_short = False
        self._forwards = 0

    def loader_started(self, loader: DataLoader) -> None:
        """An iteration over this loader begins."""
        self._started.append(loader)
        if loader is self._training:
            self._forwards = 0

    def forward(self) -> None:
        """A micro-batch goes through the model."""
        loader = self._training
        if loader is not None and loader.persistent_workers and self.progress().is_at_end:
            self.loader_started(loader)  # a later pass reuses the iterator, which sends no event
        self._forwards += 1

    def number(self) -> int:
        """Passes begun so far; 0 without a loader."""
        if self._training is None and self._started:
            self._training = self._started[-1]
        self._started = [loader for loader in self._started if loader is self._training]
        lengths = self._record.pass_lengths
        while len(lengths) < len(self._started):
            try:
                lengths.append(len(self._started[-1]))
                self._is_short = _ends_short(self._started[-1])
            except TypeError:  # a stream has no length
                lengths.append(None)
        return len(self._started)

    def progress(self) -> Progress:
        """The position of the loop in the current pass."""
        lengths = self._record.pass_lengths
        return Progress(self._forwards, lengths[-1] if lengths else None, self._is_short)


def _ends_short(loader: DataLoader) -> bool:
    size = getattr(loader, "batch_size", None) or getattr(loader.batch_sampler, "batch_size", None)
    return isinstance(size, int) and not loader.drop_last and len(loader.dataset) % size > 0  # type: ignore[arg-type]


class Observer(Subscriber):
    """Fills the record while it is `attached`. Dropout is off while it observes.

    examine: called with the complete window before each step of the optimizer; returns how to continue.
    finished: called once, when enough was observed or `stop` is called.
    started: loaders whose iteration has already begun.
    """

    def __init__(
        self,
        subject: Subject,
        record: LoopRecord,
        examine: Callable[[ObservedWindow, Progress], Attention],
        finished: Callable[[], None],
        started: Sequence[DataLoader] = (),
    ):
        self._subject, self._record = subject, record
        self._examine, self._finished = examine, finished
        self._passes = DataPasses(record, started)
        self._is_observing, self._is_over = False, False
        self._resume_at: int | None = None
        self._dropout: list[tuple[Any, str, float]] = []
        self._pending: list[ObservedMicroBatch] = []
        self._forwards: list[Forward] = []
        self._torch_losses: list[TorchLoss] = []
        self._num_inside = 0  # torch losses that the model itself computed
        self._output: Any = None  # of the latest forward, until its backward
        self._reads: list[LossRead] = []
        self._touched: list[tuple[str, Place | None]] = []
        self._gradient_ids: set[int] = set()
        self._unscaled_norm: float | None = None  # set if a gradient scaler ran since the last backward

    @property
    def is_listening(self) -> bool:
        """Whether the loop is being observed, not paused."""
        return self._is_observing

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Observe the loop in the `with` block."""
        model, optimizer = self._subject.model, self._subject.optimizer
        self._observe()
        hooks = [
            model.register_forward_hook(self._forward, with_kwargs=True),
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        try:
            with subscribed(self):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def stop(self, keep_unstepped: bool = False) -> None:
        """Stop observing. `keep_unstepped`: record the backwards that no step followed."""
        if self._is_over:
            return
        self._is_over = True
        if self._is_observing and keep_unstepped:
            self._record.unstepped = self._pending
        self._pause()
        self._finished()

    def _observe(self) -> None:
        self._is_observing, self._resume_at = True, None
        self._dropout = disable_dropout(self._subject.model)

    def _pause(self, resume_at: int | None = None) -> None:
        self._is_observing, self._resume_at = False, resume_at
        for holder, name, value in self._dropout:
            setattr(holder, name, value)
        self._dropout = []

    # Events

    def loader_started(self, loader: DataLoader) -> None:
        """Count a pass over the data."""
        self._passes.loader_started(loader)

    def _forward(self, module: Any, inputs: tuple[Any, ...], named: dict[str, Any], outputs: Any) -> None:
        if not module.training or not torch.is_grad_enabled() or thread_listener().is_paused:
            return
        self._passes.forward()
        if self._is_observing:
            self._output, self._num_inside = outputs, len(self._torch_losses)
            loss = loss_in(outputs)
            value = None if loss is None else float(loss.detach())
            self._forwards.append(Forward((inputs, named), value, user_line()))

    def loss_computed(
        self, function: Callable[..., Any], args: Sequence[Any], named: Mapping[str, Any], loss: torch.Tensor
    ) -> None:
        """Record the torch function that computed a loss."""
        if args and isinstance(args[0], torch.Tensor):
            output = self._output if isinstance(self._output, torch.Tensor) else logits_in(self._output)
            shape = tuple(args[0].shape) if output is not None and _are_same(output, args[0]) else None
            rows = tuple(output.shape[:-1]) if output is not None else ()
            value = float(loss.detach())
            self._torch_losses.append(TorchLoss(function, tuple(args[1:]), dict(named), shape, rows, value))

    def number_read(self, value: float) -> None:
        """Record a tensor that was read as a number."""
        if self._pending or self._forwards:
            self._reads.append(LossRead(value, user_line()))
        elif self._record.windows:  # after the step
            self._record.windows[-1].reads.append(LossRead(value, user_line()))

    def tensor_changed(self, tensor: Any, how: str) -> None:
        """Record a change of the optimizer's gradients."""
        if self._is_gradient(tensor):
            here = (how, user_line())
            if not self._touched or self._touched[-1] != here:
                self._touched.append(here)

    def _is_gradient(self, tensor: Any) -> bool:
        first = tensor[0] if isinstance(tensor, list | tuple) and tensor else tensor
        if not isinstance(first, torch.Tensor) or id(first) not in self._gradient_ids:
            return False
        return any(p.grad is first for p in self._subject.parameters())  # the id may have been reused

    def autocast_used(self, dtype: torch.dtype) -> None:
        """Record the type of autocast."""
        self._record.autocast = dtype

    def gradients_unscaled(self) -> None:
        """Measure the gradients that a scaler has divided."""
        self._unscaled_norm = self._norm()

    def backward(self, loss: torch.Tensor, run: Callable[[], Any]) -> Any:
        """Record a backward, with the norm of the gradients before and after it."""
        before, place, windows = self._norm(), user_line(), self._record.windows
        self._hand_over_touched()
        if not self._pending and windows and windows[-1].norm_after_step is None:
            windows[-1].norm_after_step = before
        self._record.driver = self._record.driver or driver()
        ddp, value = self._subject.ddp, float(loss.detach())
        synchronised = None if ddp is None else bool(ddp.require_backward_grad_sync)
        result, after = run(), self._norm()
        if not self._forwards and after == before:  # the backward of another model
            self._torch_losses = []
            return result
        torch_loss, undivided = self._loss_that_goes_backward()
        self._pending.append(
            ObservedMicroBatch(
                forwards=self._forwards,
                torch_loss=torch_loss,
                divided_by=undivided / value if undivided is not None and value else None,
                place=place,
                norm_before=before,
                norm_after=after,
                lr=self._lr(),
                synchronised=synchronised,
                data_pass=self._passes.number(),
            )
        )
        self._forwards, self._torch_losses, self._num_inside, self._output = [], [], 0, None
        self._unscaled_norm = None
        self._gradient_ids = {id(p.grad) for p in self._subject.parameters() if p.grad is not None}
        return result

    def _loss_that_goes_backward(self) -> tuple[TorchLoss | None, float | None]:
        """The torch loss if there is exactly one, and the loss before the loop divided it, or None."""
        if by_the_loop := self._torch_losses[self._num_inside :]:  # the loss of the model is then unused
            self._torch_losses = by_the_loop
            self._forwards = [replace(forward, loss=None) for forward in self._forwards]
        only = self._torch_losses[-1] if len(self._torch_losses) == 1 else None
        losses = [f.loss for f in self._forwards if f.loss is not None] if only is None else [only.value]
        is_sum = only is not None and only.named.get("reduction") == "sum"
        return only, losses[0] if len(losses) == 1 and not is_sum else None

    # Steps

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """End the window, or wrap the closure: in Lightning, it runs the last backward of the window."""
        closure = named.get("closure", args[1] if len(args) > 1 else None)
        if closure is None or not self._is_observing or thread_listener().is_paused:
            return self._end_window()
        has_ended = False

        def closure_with_end() -> Any:
            nonlocal has_ended
            loss = closure()
            if not has_ended:  # some optimizers call it several times
                has_ended = True
                self._end_window()
            return loss

        return (optimizer, closure_with_end, *args[2:]), {k: v for k, v in named.items() if k != "closure"}

    def _end_window(self) -> None:
        if not self._is_observing or thread_listener().is_paused or not self._pending:
            return
        self._hand_over_touched()
        if self._unscaled_norm is not None:
            self._pending[-1].norm_after, self._unscaled_norm = self._unscaled_norm, None
        window = ObservedWindow(
            micro_batches=self._pending,
            norm_at_step=self._norm(),
            lr=self._lr(),
            place=user_line(),
            reads=self._reads,
            requested_steps=requested_steps(),
        )
        record = self._record
        record.windows.append(window)
        if record.schedule_length is None:
            record.schedule_length = schedule_length(self._subject.optimizer)
        self._pending, self._reads = [], []
        with thread_listener().paused():
            attention = self._examine(window, self._passes.progress())
            for micro_batch in window.micro_batches:  # free their large tensors
                micro_batch.forwards, micro_batch.torch_loss = [], None
            if attention.stop:
                self.stop()
            elif attention.resume_at is not None:
                self._pause(attention.resume_at)

    def _after_step(self, *_: Any) -> None:
        self._touched.clear()  # the step itself made these changes
        if self._resume_at is not None and self._passes.progress().forwards >= self._resume_at:
            self._forwards, self._torch_losses, self._reads, self._pending = [], [], [], []
            self._observe()

    def _hand_over_touched(self) -> None:
        if self._pending:
            self._pending[-1].touched += self._touched
        elif self._record.windows:
            self._record.windows[-1].touched_after += self._touched
        self._touched = []

    def _lr(self) -> float:
        return float(self._subject.optimizer.param_groups[0]["lr"])

    @torch.no_grad()
    def _norm(self) -> float:
        """The norm of all gradients together; 0 if there is none."""
        with thread_listener().paused():
            gradients = [p.grad for p in self._subject.parameters() if p.grad is not None]
            if any(g.dtype in (torch.float16, torch.bfloat16) for g in gradients):
                gradients = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
            return float(get_total_norm(gradients)) if gradients else 0.0


def _are_same(output: torch.Tensor, prediction: torch.Tensor) -> bool:
    """Whether the prediction is the output, in any shape or type."""
    if output.numel() != prediction.numel() or not prediction.ndim:
        return False
    return torch.equal(output.detach().float().flatten(), prediction.detach().float().flatten())


def loss_in(outputs: Any) -> torch.Tensor | None:
    """The loss that a model computed itself, as models of transformers do."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return loss if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None


def logits_in(outputs: Any) -> torch.Tensor | None:
    """The logits in the outputs of a model of transformers."""
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    return found if isinstance(found, torch.Tensor) else None
