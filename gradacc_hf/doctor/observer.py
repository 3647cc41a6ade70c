"""Observe a training loop from outside, and write a `LoopRecord`.

`Observer` takes the model and one optimizer of the loop. Hooks on these two objects report forwards and
steps; the listener of the thread (`listener.py`) reports everything else. A backward belongs to the window of
each optimizer whose parameters it reaches. `examination.py` runs at the end of each window.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from gradacc_hf.accumulation.accelerate_state import requested_steps
from gradacc_hf.doctor.dropout import Key, hold_dropout, release_dropout
from gradacc_hf.doctor.frames import (
    StartedLoader,
    driver,
    is_in_optimizer,
    sampling_strategy,
    schedule_length,
    schedule_lines,
    user_line,
)
from gradacc_hf.doctor.gradients import GradientWatch, Subject
from gradacc_hf.doctor.listener import LOSSES, Roots, Subscriber, subscribed, thread_listener
from gradacc_hf.doctor.passes import DataPasses, Progress
from gradacc_hf.doctor.record import (
    LOSS_RTOL_16_BIT,
    LOSS_RTOL_FP32,
    MODEL,
    MODEL_WITH_NUMBER,
    Discarded,
    Forward,
    LoopRecord,
    LossRead,
    ObservedMicroBatch,
    ObservedWindow,
    Place,
    TorchLoss,
)
from gradacc_hf.doctor.terms import BackwardLosses, TermWatch
from gradacc_hf.doctor.windows import has_leaked, own_backwards
from gradacc_hf.utils.modeling import BATCH_NORMS

TERM_RTOL = 10 * LOSS_RTOL_FP32  # relative difference of a loss and the sum of its terms
MAX_PENDING = 4096  # backwards without a step, after which the loop has no windows
MAX_LATER = 400  # backwards after the observed windows, in which a leak of the last window is looked for


@dataclass(frozen=True)
class Attention:
    """The decision after a window: observe the next one (the default), pause, or stop.

    resume_at: number of micro-batches in the pass after which to observe again; None for no pause.
    stop: whether enough was observed.
    """

    resume_at: int | None = None
    stop: bool = False


class Observer(Subscriber):
    """Fills the record while it is `attached`. Dropout is off while it observes.

    examine: called with the complete window before each step of the optimizer; returns how to continue.
    finished: called once, when enough was observed or `stop` is called.
    found_later: called if a window after the observed ones is irregular; None not to look at later windows.
    started: loaders whose iteration has already begun.
    """

    def __init__(
        self,
        subject: Subject,
        record: LoopRecord,
        examine: Callable[[ObservedWindow, Progress], Attention],
        finished: Callable[[], None],
        found_later: Callable[[], None] | None = None,
        started: Sequence[StartedLoader] = (),
    ):
        self._subject, self._record = subject, record
        self._examine, self._finished, self._found_later = examine, finished, found_later
        self._passes = DataPasses(record, started)
        self._gradients, self._terms = GradientWatch(subject), TermWatch()
        self._is_observing = self._is_over = self._is_later = False
        self._is_in_step = self._has_begun = False
        self._num_later = 0
        self._resume_at: int | None = None
        self._dropout: list[Key] = []
        self._trains = False  # whether a forward was in training mode
        self._since = 0  # losses computed before the latest forward
        self._output: Any = None  # of the latest forward, until its backward
        self._unscaled_norm: float | None = None  # set if a gradient scaler ran since the last backward
        self._keeps_others = False  # whether another optimizer steps between a backward and this step
        self._others: list[tuple[torch.nn.Parameter, torch.Tensor]] = []  # its weights, at the first backward
        self._forget()

    def _forget(self) -> None:
        self._pending: list[ObservedMicroBatch] = []
        self._lost: tuple[
            ObservedMicroBatch, ...
        ] = ()  # backwards zeroed before the window, of later windows
        self._forwards: list[Forward] = []
        self._reads: list[LossRead] = []
        self._scaled: list[
            tuple[weakref.ref, tuple[float, ...]]
        ] = []  # losses, and their factors, last first

    @property
    def is_listening(self) -> bool:
        """Whether the loop is being observed, not paused."""
        return self._is_observing or self._is_later

    @property
    def is_waiting(self) -> bool:
        """Whether backwards were observed that no step has followed, and observing continues."""
        return not self._is_over and bool(self._pending)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Observe the loop in the `with` block."""
        model, optimizer = self._subject.model, self._subject.optimizer
        self._observe()
        hooks = [
            model.register_forward_pre_hook(self._before_forward),
            model.register_forward_hook(self._forward, with_kwargs=True),
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        try:
            with subscribed(self):
                yield
        finally:
            self._is_later = False
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
        self._forget()
        self._is_later = self._found_later is not None and self._may_leak()
        self._finished()

    def _may_leak(self) -> bool:
        """Whether a later window can continue in the next pass unnoticed: the end of the data is unknown."""
        record = self._record
        weights = {round(m.terms[0].weight, 6) for w in record.full for m in w.micro_batches if m.terms}
        is_regular = len(weights) == 1 and all(window.is_intact for window in record.full)
        return record.steps > 1 and not record.pass_lengths and is_regular

    def _observe(self) -> None:
        self._is_observing, self._resume_at = True, None
        self._dropout = hold_dropout(self._subject.model)

    def _pause(self, resume_at: int | None = None) -> None:
        self._is_observing, self._resume_at = False, resume_at
        release_dropout(self._dropout)
        self._dropout = []

    # Events

    def loader_started(self, loader: StartedLoader) -> None:
        """Count a pass over the data."""
        self._passes.loader_started(loader)

    def _before_forward(self, module: Any, inputs: Any) -> None:
        self._since = self._terms.num_seen

    def _forward(self, module: Any, inputs: tuple[Any, ...], named: dict[str, Any], outputs: Any) -> None:
        self._trains |= module.training
        is_evaluation = self._trains and not module.training
        if is_evaluation or not torch.is_grad_enabled() or thread_listener().is_paused:
            return
        self._output, loss = outputs, loss_in(outputs)
        if not self._is_observing or self._is_in_step:
            return
        with thread_listener().paused():  # the loop does not read the loss here
            if loss is not None and is_in_transform(loss):
                return
            value = None if loss is None else float(loss.detach())
            if loss is not None:
                numbers = [each for each in (*inputs, *named.values()) if is_number(each)]
                self._terms.output_loss(loss, self._since, has_number=bool(numbers))
        detached = _detached(inputs), {name: _detached(each) for name, each in named.items()}
        self._forwards.append(Forward(detached, value, user_line()))

    def loss_computed(
        self, function: Callable[..., Any], args: Sequence[Any], named: Mapping[str, Any], loss: torch.Tensor
    ) -> None:
        """Watch a loss."""
        if is_in_transform(loss):
            return
        recomputed = None
        is_known = getattr(function, "__name__", "") in LOSSES and args and isinstance(args[0], torch.Tensor)
        if is_known and self._is_observing:
            output = self._output if isinstance(self._output, torch.Tensor) else logits_in(self._output)
            shape = tuple(args[0].shape) if output is not None and _are_same(output, args[0]) else None
            rows = tuple(output.shape[:-1]) if output is not None else ()
            others = tuple(_detached(each) for each in args[1:])
            recomputed = TorchLoss(function, others, dict(named), shape, rows, float(loss.detach()))
        self._terms.loss_computed(function, args, named, loss, recomputed)

    def loss_scaled(self, factor: float, loss: torch.Tensor, scaled: torch.Tensor) -> None:
        """Record a number by which a loss was multiplied."""
        self._scaled.append((weakref.ref(scaled), (factor, *self._factors_of(loss))))

    def number_read(self, value: float) -> None:
        """Record a tensor that was read as a number."""
        if not self._is_observing or is_in_optimizer():
            return
        if self._pending or self._forwards:
            self._reads.append(LossRead(value, user_line()))
        elif self._record.windows:  # after the step
            self._record.windows[-1].reads.append(LossRead(value, user_line()))

    def tensor_changed(self, tensor: Any, how: str) -> None:
        """Record a change of the optimizer's gradients or weights."""
        if self._is_observing and not self._is_in_step:
            self._gradients.changed(tensor, how)
        elif self._is_later and "zero" in how and self._pending:
            first = tensor[0] if isinstance(tensor, list | tuple) and tensor else tensor
            if isinstance(first, torch.Tensor) and self._gradients.is_gradient(first):
                self._lost, self._pending = tuple(self._pending), []

    def gradient_replaced(self, parameter: torch.Tensor) -> None:
        """Record a gradient that the loop sets."""
        if self._is_observing and any(parameter is p for p in self._subject.parameters()):
            self._gradients.gradient_changed("replaced")

    def autocast_used(self, dtype: torch.dtype) -> None:
        """Record the type of autocast."""
        self._record.autocast = dtype

    def gradients_unscaled(self) -> None:
        """Measure the gradients that a scaler has divided."""
        if self._is_observing:
            self._unscaled_norm = self._gradients.norm()
            self._gradients.forget()

    def backward(self, roots: Roots, run: Callable[[], Any]) -> Any:
        """Record a backward that reaches the optimizer, with the norm of the gradients before and after."""
        for loss, gradient in roots:
            if gradient not in (0, 1):
                self.loss_scaled(gradient, loss, loss)
        place, state = user_line(), self._gradients.state()
        before = self._gradients.norm() if self._is_observing else math.nan
        with self._terms.during_backward():
            result = run()
        if self._gradients.state() == state:  # the backward of another model
            for loss, _ in roots:
                self._drop_factors_of(loss)
            return result
        of_roots = [self._factors_of(loss) for loss, _ in roots]
        root_factors = tuple(f for f in of_roots[0] if all(f in each for each in of_roots)) if roots else ()
        value = sum(float(loss.detach()) * gradient for loss, gradient in roots) if roots else None
        losses = self._terms.take(value, self._tolerance())
        if self._is_in_step:  # an optimizer with a closure evaluates it again
            windows = self._record.windows
            if windows and windows[-1].norm_after_step is None:
                windows[-1].norm_after_step = before
        elif self._is_observing:
            self._hand_over_touched()
            self._append(losses, place, before, self._gradients.norm(), root_factors)
        else:
            self._append(losses, place, math.nan, math.nan, root_factors)
            self._num_later += 1
        self._scaled = []
        return result

    def _factors_of(self, loss: torch.Tensor) -> tuple[float, ...]:
        """The numbers by which a whole loss was multiplied, last first."""
        return next((factors for scaled, factors in reversed(self._scaled) if scaled() is loss), ())

    def _drop_factors_of(self, loss: torch.Tensor) -> None:
        """Drop the numbers by which another model's loss was multiplied."""
        chain = self._factors_of(loss)
        parts = [chain[start:] for start in range(len(chain))]
        self._scaled = [
            (scaled, factors)
            for scaled, factors in self._scaled
            if scaled() is not loss and not (scaled() is None and factors in parts)
        ]

    def _tolerance(self) -> float:
        return TERM_RTOL if self._record.autocast is None else LOSS_RTOL_16_BIT

    def _append(
        self,
        losses: BackwardLosses,
        place: Place | None,
        before: float,
        after: float,
        root_factors: tuple[float, ...],
    ) -> None:
        if self._keeps_others and self._is_observing and not self._pending:
            self._others = self._gradients.other_weights()
        if not self._record.driver:
            self._record.driver, self._record.sampling = driver(), sampling_strategy()
        ddp, terms = self._subject.ddp, losses.terms
        only = terms[0] if losses.is_complete and len(terms) == 1 else None
        forwards = self._forwards
        if only is None or only.function not in (
            MODEL,
            MODEL_WITH_NUMBER,
        ):  # the loss of the model is then unused
            forwards = [replace(forward, loss=None) for forward in forwards]
        micro_batch = ObservedMicroBatch(
            forwards=forwards,
            torch_loss=losses.torch_losses[0] if only is not None else None,
            divided_by=1 / only.weight if only is not None and not only.is_sum else None,
            place=place,
            norm_before=before,
            norm_after=after,
            lr=self._lr(),
            synchronised=None if ddp is None else bool(ddp.require_backward_grad_sync),
            data_pass=self._passes.number(),
            terms=terms,
            is_complete=losses.is_complete,
            factors=tuple(factors[0] for _, factors in self._scaled),
            root_factors=root_factors,
            weights_version=self._gradients.follow_weights(),
            model_version=self._gradients.model_version() if self._is_observing else 0,
        )
        self._pending.append(micro_batch)
        self._forwards, self._output, self._unscaled_norm = [], None, None
        self._gradients.after_backward()
        if len(self._pending) > MAX_PENDING:
            self.stop()

    # Steps

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """End the window, or wrap the closure: in Lightning, it runs the last backward of the window."""
        self._has_begun = True
        closure = named.get("closure", args[1] if len(args) > 1 else None)
        if closure is None or not self._is_observing or thread_listener().is_paused:
            self._end_window()
            self._is_in_step = self._is_observing
            return None

        def closure_with_end() -> Any:
            loss = closure()
            if not self._is_in_step:  # some optimizers call it several times
                self._end_window()
                self._is_in_step = True
            return loss

        return (optimizer, closure_with_end, *args[2:]), {k: v for k, v in named.items() if k != "closure"}

    def _end_window(self) -> None:
        if thread_listener().is_paused or not self.is_listening:
            return
        if not self._pending:
            self._record.unseen_steps += bool(self._is_observing and not self._record.windows)
            self._record.optimizer = type(self._subject.optimizer).__name__
            return
        if self._is_later:
            self._end_later_window()
            return
        self._hand_over_touched()
        window = self._window()
        record = self._record
        if record.windows and record.windows[-1].norm_after_step is None:
            record.windows[-1].norm_after_step = window.micro_batches[0].norm_before
        record.windows.append(window)
        record.optimizer = type(self._subject.optimizer).__name__
        modules = self._subject.model.modules()
        record.has_batch_norm |= any(isinstance(m, BATCH_NORMS) and m.training for m in modules)
        if record.schedule_length is None:
            record.schedule_length = schedule_length(self._subject.optimizer)
        if not record.schedule.stepped:
            record.schedule = schedule_lines(self._subject.optimizer)
        self._forget()
        with thread_listener().paused():
            attention = self._examine(window, self._passes.progress())
            for micro_batch in window.micro_batches:  # free their large tensors
                micro_batch.forwards, micro_batch.torch_loss = [], None
            window.before_change, window.other_weights = None, ()
            self._gradients.forget()
            if attention.stop:
                self.stop()
            elif attention.resume_at is not None:
                self._pause(attention.resume_at)

    def _window(self) -> ObservedWindow:
        """The window of the pending backwards."""
        gradients, last, unscaled = self._gradients, self._pending[-1], 1.0
        if self._unscaled_norm is not None:
            is_known = 0 < last.norm_after < math.inf
            now, self._unscaled_norm = self._unscaled_norm / gradients.clipped_scaled, None
            unscaled, last.norm_after = now / last.norm_after if is_known else math.nan, now
        norm = gradients.norm()
        change = gradients.change(norm)
        own, discarded = own_backwards(self._pending, self._record.windows, change.is_set)
        versions, weights = {m.model_version for m in own}, {m.weights_version for m in own}
        weights_changed = versions != {gradients.model_version()}
        others, self._others = self._others, []
        self._keeps_others = (
            weights_changed and len(versions) == 1 and weights == {gradients.follow_weights()}
        )
        return ObservedWindow(
            micro_batches=own,
            norm_at_step=norm,
            lr=self._lr(),
            place=user_line(),
            reads=self._reads,
            requested_steps=requested_steps(),
            change=change,
            before_change=gradients.before_change,
            unscaled=unscaled,
            weights_changed=weights_changed,
            other_weights=others if self._keeps_others else (),
            discarded=discarded,
        )

    def _end_later_window(self) -> None:
        record, last = self._record, self._pending[-1]
        window = ObservedWindow(self._pending, math.nan, last.lr, user_line(), [], None)
        if 0 < len(self._lost) < record.steps:
            window.discarded.append(Discarded("dropped", self._lost))
        is_regular = not window.discarded and not has_leaked(window, record.full, record.steps)
        self._forget()
        if is_regular and self._num_later < MAX_LATER:
            return
        self._is_later = False
        if not is_regular and self._found_later is not None:
            record.later.append(window)
            with thread_listener().paused():
                self._found_later()

    def _after_step(self, *_: Any) -> None:
        if not self._has_begun:  # observing began inside of this step, in a closure
            self._forget()
        self._is_in_step = self._has_begun = False
        self._gradients.touched.clear()  # the step itself made these changes
        self._gradients.follow_weights()
        if self._resume_at is not None and self._passes.progress().batches >= self._resume_at:
            self._forget()
            self._observe()

    def _hand_over_touched(self) -> None:
        touched, self._gradients.touched = self._gradients.touched, []
        if self._pending:
            self._pending[-1].touched += touched
        elif self._record.windows:
            self._record.windows[-1].touched_after += touched

    def _lr(self) -> tuple[float, ...]:
        return tuple(float(group["lr"]) for group in self._subject.optimizer.param_groups)


def _detached(value: Any) -> Any:
    """The value without the graph that made it, which the loop frees in its backward."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        return value.detach()
    return tuple(map(_detached, value)) if type(value) is tuple else value


def _are_same(output: torch.Tensor, prediction: torch.Tensor) -> bool:
    """Whether the prediction is the output, in any shape or type."""
    if output.numel() != prediction.numel() or not prediction.ndim:
        return False
    return torch.equal(output.detach().float().flatten(), prediction.detach().float().flatten())


def is_in_transform(loss: torch.Tensor) -> bool:
    """Whether a loss is inside of a transform like torch.func.vmap, where it has no single value."""
    try:
        loss.detach().item()
    except RuntimeError:
        return True
    return False


def is_number(value: Any) -> bool:
    """Whether an input of a forward is a number, such as the number of items of the window."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.ndim
    return isinstance(value, int | float) and not isinstance(value, bool)


def loss_in(outputs: Any) -> torch.Tensor | None:
    """The loss that a model computed itself: in a mapping, an attribute, a tuple, or as the only output."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if type(outputs) in (tuple, list, torch.Tensor):
        some = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        numbers = [each for each in some if isinstance(each, torch.Tensor) and not each.ndim]
        is_loss = len(numbers) == 1 and (numbers[0].requires_grad or not torch.is_grad_enabled())
        loss = numbers[0] if is_loss else None
    return loss if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None


def logits_in(outputs: Any) -> torch.Tensor | None:
    """The logits in the outputs of a model: of transformers, or the first tensor of a tuple."""
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if type(outputs) in (tuple, list):
        found = next((each for each in outputs if isinstance(each, torch.Tensor) and each.ndim > 1), None)
    return found if isinstance(found, torch.Tensor) else None
