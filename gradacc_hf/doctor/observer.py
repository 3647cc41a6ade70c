"""What a training loop does, as it can be seen from outside: a list of windows with their micro-batches.

Takes the model and the optimizer of anybody's loop; listens to forwards, backwards, what changes gradients,
the optimizer's steps, and losses that are read. What is wrong with it is `findings.py`'s question; whether
the gradient is that of the window, `replay.py`'s.
"""

import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import GradientState
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

PACKAGE = str(Path(__file__).parent.parent)
LIBRARIES = tuple({os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")})
Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # of a forward: by position, by name
READS = ("item", "__float__", "__format__")  # of a tensor, as a number
UNSCALE = "_amp_foreach_non_finite_check_and_unscale_"
LOSSES = {  # functions of (prediction, target) with a mean, which a loop may call by itself
    *("cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div"),
    *("binary_cross_entropy", "binary_cross_entropy_with_logits", "poisson_nll_loss"),
}


@dataclass(frozen=True)
class Place:
    """A line of the user's."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{os.path.relpath(self.file)}:{self.line}"

    @property
    def code(self) -> str:
        """What stands there; "" where it cannot be read."""
        import linecache

        return linecache.getline(self.file, self.line).strip()


@dataclass(frozen=True)
class Forward:
    """The model was run, with these inputs; its outputs are not kept, which hold what is large."""

    inputs: Inputs
    loss: float | None  # that the model computed itself
    place: Place | None


@dataclass(frozen=True)
class OwnLoss:
    """A function of torch that made a loss of the model's output: `function(output, *others, **named)`."""

    function: Callable[..., torch.Tensor]
    others: tuple[Any, ...]
    named: dict[str, Any]
    shape: tuple[int, ...] | None  # of the output as it was given; None: not the output
    rows: tuple[int, ...]  # of the output as it came from the model, all but the last of its shape
    value: float


@dataclass(frozen=True)
class Read:
    """A loss that was read as a number."""

    value: float
    place: Place | None


@dataclass
class MicroBatch:
    """One backward. The norms are of all gradients that the optimizer will see, before and after it."""

    forwards: list[Forward]
    own_loss: OwnLoss | None
    divided_by: float | None  # what it had been, where that was seen
    place: Place | None
    norm_before: float
    norm_after: float
    lr: float
    synchronised: bool | None  # with other processes, by DDP
    data_pass: int  # how often the training data had been begun by then
    touched: list[tuple[str, Place | None]] = field(default_factory=list)  # then: what changed gradients

    @property
    def forward(self) -> Forward | None:
        """The one that it is of, where it is of one."""
        return self.forwards[0] if len(self.forwards) == 1 else None


@dataclass
class Window:
    """All backwards between two steps of the optimizer."""

    micro_batches: list[MicroBatch]
    norm_at_step: float
    lr: float
    place: Place | None  # of the step
    reads: list[Read]
    asked: int | None  # accumulation steps that Accelerate was asked for by then
    replay: Any = None
    norm_after_step: float | None = None  # when the next backward begins
    touched_after: list[tuple[str, Place | None]] = field(default_factory=list)  # after the step

    def __len__(self) -> int:
        return len(self.micro_batches)


class Watch:
    """Listens as long as it is `entered`; `windows` are those seen so far, `pending` the one not done.

    `at_step(window)` is called before each step of the optimizer; what it runs is not listened to. `doze`
    stops listening for a while; `woken` is called at its end. `begun`: loaders that are being read already.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Any,
        at_step: Callable[[Window], None],
        woken: Callable[[], None],
        begun: Sequence[DataLoader] = (),
    ):
        self.ddp = model if isinstance(model, DistributedDataParallel) else None
        self.model: torch.nn.Module = model.module if self.ddp is not None else model  # type: ignore[assignment]
        self.optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self.at_step, self.woken = at_step, woken
        self.windows: list[Window] = []
        self.pending: list[MicroBatch] = []
        self.lengths: list[int | None] = []  # micro-batches of each pass over the training data
        self.listening, self.wake_after = True, None  # micro-batches of a pass, where it dozes until then
        self.heard_in_pass = 0
        self.ends_short = False  # have the last examples of a pass a smaller batch to themselves?
        self.driver = ""  # whose backward it is, where it is not the loop's own
        self.autocast: torch.dtype | None = None  # in which the model computes, where it does so in another
        self._forwards: list[Forward] = []
        self._own_losses: list[OwnLoss] = []
        self._inside = 0  # of these: by the model itself
        self._output: Any = None  # of the latest forward, until its backward
        self._reads: list[Read] = []
        self._touched: list[tuple[str, Place | None]] = []
        self._begun = list(begun)
        self._training_data: DataLoader | None = None
        self._gradients: set[int] = set()
        self._unscaled: float | None = None  # their norm, where a scaler has, since the last backward
        self._is_elsewhere = False  # in what is not the loop's

    @property
    def hears(self) -> bool:
        """Does it listen, and is what runs now the loop's?"""
        return self.listening and not self._is_elsewhere

    @property
    def at_end(self) -> bool:
        """Is the pass over the data that is heard done?"""
        return bool(self.lengths) and self.heard_in_pass == self.lengths[-1]

    def parameters(self) -> list[torch.nn.Parameter]:
        """Those that the optimizer steps."""
        groups = self.optimizer.param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad]

    @contextmanager
    def entered(self) -> Iterator["Watch"]:
        """Listen in here."""
        hooks = [
            self.model.register_forward_hook(self._forward, with_kwargs=True),
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]
        try:
            with _Listener(self), loaders_begun(self._begins):
                yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _begins(self, loader: DataLoader) -> None:
        self._begun.append(loader)
        if loader is self._training_data:
            self.heard_in_pass = 0

    def doze(self, until: int) -> None:
        """Hear nothing until so many micro-batches of a pass over the data are done."""
        self.listening, self.wake_after = False, until

    @contextmanager
    def not_listening(self) -> Iterator[None]:
        """What is run in here is not the loop's."""
        before, self._is_elsewhere = self._is_elsewhere, True
        try:
            yield
        finally:
            self._is_elsewhere = before

    # What is heard

    def _forward(self, module: Any, inputs: tuple[Any, ...], named: dict[str, Any], outputs: Any) -> None:
        if not module.training or not torch.is_grad_enabled() or self._is_elsewhere:
            return
        self.heard_in_pass += 1
        if self.listening:
            self._output, self._inside = outputs, len(self._own_losses)
            loss = loss_in(outputs)
            value = None if loss is None else float(loss.detach())
            self._forwards.append(Forward((inputs, named), value, place()))

    def own_loss(
        self, function: Callable[..., Any], args: Sequence[Any], named: Mapping[str, Any], loss: torch.Tensor
    ) -> None:
        """A function of torch has made a loss."""
        if args and isinstance(args[0], torch.Tensor):
            output = self._output if isinstance(self._output, torch.Tensor) else logits_in(self._output)
            shape = tuple(args[0].shape) if output is not None and _are_same(output, args[0]) else None
            rows = tuple(output.shape[:-1]) if output is not None else ()
            value = float(loss.detach())
            self._own_losses.append(OwnLoss(function, tuple(args[1:]), dict(named), shape, rows, value))

    def read(self, value: float) -> None:
        """A tensor was read as a number."""
        if self.pending or self._forwards:
            self._reads.append(Read(value, place()))
        elif self.windows:  # after the step
            self.windows[-1].reads.append(Read(value, place()))

    def touches(self, tensor: Any) -> bool:
        """Is this a gradient that the optimizer will see?"""
        first = tensor[0] if isinstance(tensor, list | tuple) and tensor else tensor
        if not isinstance(first, torch.Tensor) or id(first) not in self._gradients:
            return False
        return any(p.grad is first for p in self.parameters())  # else it is another one's number by now

    def touched(self, how: str) -> None:
        """A gradient was changed, by this function."""
        here = (how, place())
        if not self._touched or self._touched[-1] != here:
            self._touched.append(here)

    def unscaled(self) -> None:
        """The scaler of fp16 has divided the gradients."""
        self._unscaled = self._norm()

    def backward(self, loss: torch.Tensor, run: Callable[[], Any]) -> Any:
        """A backward: `run` it between two looks at the gradients."""
        before, where = self._norm(), place()
        self._hand_over_touched()
        if not self.pending and self.windows and self.windows[-1].norm_after_step is None:
            self.windows[-1].norm_after_step = before
        self.driver = self.driver or driver()
        value, synchronised = float(loss.detach()), None
        if self.ddp is not None:
            synchronised = bool(self.ddp.require_backward_grad_sync)
        result, after = run(), self._norm()
        if not self._forwards and after == before:  # of something else
            self._own_losses = []
            return result
        if by_the_loop := self._own_losses[self._inside :]:  # then the model's own is not what goes backward
            self._own_losses = by_the_loop
            self._forwards = [replace(forward, loss=None) for forward in self._forwards]
        own = self._own_losses[-1] if len(self._own_losses) == 1 else None
        losses = [f.loss for f in self._forwards if f.loss is not None] if own is None else [own.value]
        is_sum = own is not None and own.named.get("reduction") == "sum"
        undivided = losses[0] if len(losses) == 1 and not is_sum else None
        self.pending.append(
            MicroBatch(
                forwards=self._forwards,
                own_loss=own,
                divided_by=undivided / value if undivided is not None and value else None,
                place=where,
                norm_before=before,
                norm_after=after,
                lr=float(self.optimizer.param_groups[0]["lr"]),
                synchronised=synchronised,
                data_pass=self._data_pass(),
            )
        )
        self._forwards, self._own_losses, self._inside, self._output = [], [], 0, None
        self._unscaled = None
        self._gradients = {id(p.grad) for p in self.parameters() if p.grad is not None}
        return result

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A step; the last backward of its window may be in a closure that it is given, as Lightning does."""
        closure = named.get("closure", args[1] if len(args) > 1 else None)
        if closure is None or not self.hears:
            return self._window_ends()
        has_ended = False

        def with_its_end() -> Any:
            nonlocal has_ended
            loss = closure()
            if not has_ended:  # some optimizers call it again and again
                has_ended = True
                self._window_ends()
            return loss

        return (optimizer, with_its_end, *args[2:]), {k: v for k, v in named.items() if k != "closure"}

    def _window_ends(self) -> None:
        if not self.hears or not self.pending:
            return
        self._hand_over_touched()
        if self._unscaled is not None:
            self.pending[-1].norm_after, self._unscaled = self._unscaled, None
        window = Window(
            micro_batches=self.pending,
            norm_at_step=self._norm(),
            lr=float(self.optimizer.param_groups[0]["lr"]),
            place=place(),
            reads=self._reads,
            asked=_asked_for(),
        )
        self.windows.append(window)
        self.pending, self._reads = [], []
        with self.not_listening():
            self.at_step(window)
        for micro_batch in window.micro_batches:  # what they hold is large
            micro_batch.forwards, micro_batch.own_loss = [], None

    def _after_step(self, *_: Any) -> None:
        self._touched.clear()  # by the step itself
        if self.wake_after is not None and self.heard_in_pass >= self.wake_after:
            self.listening, self.wake_after = True, None
            self._forwards, self._own_losses, self._reads, self.pending = [], [], [], []
            self.woken()

    def _hand_over_touched(self) -> None:
        if self.pending:
            self.pending[-1].touched += self._touched
        elif self.windows:
            self.windows[-1].touched_after += self._touched
        self._touched = []

    def _data_pass(self) -> int:
        """The loader that was begun last before the first backward has the training data."""
        if self._training_data is None and self._begun:
            self._training_data = self._begun[-1]
        begun = [loader for loader in self._begun if loader is self._training_data]
        self._begun = begun
        while len(self.lengths) < len(begun):
            try:
                self.lengths.append(len(begun[-1]))
                self.ends_short = _ends_short(begun[-1])
            except TypeError:  # of a stream
                self.lengths.append(None)
        return len(begun)

    @torch.no_grad()
    def _norm(self) -> float:
        """Of all gradients together; 0 where there is none."""
        with self.not_listening():
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            if any(g.dtype in (torch.float16, torch.bfloat16) for g in gradients):
                gradients = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
            return float(get_total_norm(gradients)) if gradients else 0.0


@contextmanager
def loaders_begun(hear: Callable[[DataLoader], None]) -> Iterator[None]:
    """In here, each loader that somebody begins to read is told of; not one to evaluate on."""
    begin = DataLoader.__iter__

    def begun(loader: DataLoader) -> Iterator[Any]:
        if torch.is_grad_enabled():
            hear(loader)
        return begin(loader)

    DataLoader.__iter__ = begun  # type: ignore[method-assign]
    try:
        yield
    finally:
        DataLoader.__iter__ = begin  # type: ignore[method-assign]


def _ends_short(loader: DataLoader) -> bool:
    size = getattr(loader, "batch_size", None) or getattr(loader.batch_sampler, "batch_size", None)
    return isinstance(size, int) and not loader.drop_last and len(loader.dataset) % size > 0  # type: ignore[arg-type]


class _Listener(TorchFunctionMode):
    """Hears of the functions of torch that tell something; all others pass."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, watch = kwargs or {}, self.watch
        if not watch.hears or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if func is torch.Tensor.backward:
            return watch.backward(args[0], lambda: func(*args, **kwargs))
        if name == "__set__" and getattr(func, "__self__", None) is torch.Tensor.grad:
            if args[1] is None and watch.touches(args[0].grad):
                watch.touched("zeroed")
        elif name.endswith("_") and not name.startswith("__") and args and watch.touches(args[0]):
            watch.touched(name)
        elif name == "linear" and torch.is_autocast_enabled(kind := args[0].device.type):
            watch.autocast = torch.get_autocast_dtype(kind)
        result = func(*args, **kwargs)
        if name == UNSCALE:
            watch.unscaled()
        if name in LOSSES and isinstance(result, torch.Tensor) and not result.ndim and result.requires_grad:
            watch.own_loss(func, args, kwargs, result)
        elif name in READS and isinstance(args[0], torch.Tensor) and args[0].numel() == 1:
            value = result if isinstance(result, float) else None
            if name == "__format__" and args[0].is_floating_point():
                value = float(args[0].detach())
            if value is not None:
                watch.read(value)
        return result


def _asked_for() -> int | None:
    """The accumulation steps that Accelerate was asked for, where there is one."""
    return GradientState().num_steps if GradientState._shared_state else None


def _are_same(output: torch.Tensor, prediction: torch.Tensor) -> bool:
    """Is this the output, maybe in another shape or format?"""
    if output.numel() != prediction.numel() or not prediction.ndim:
        return False
    return torch.equal(output.detach().float().flatten(), prediction.detach().float().flatten())


def loss_in(outputs: Any) -> torch.Tensor | None:
    """The loss that a model has computed itself, as transformers' do."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return loss if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None


def logits_in(outputs: Any) -> torch.Tensor | None:
    """The logits in the outputs of one of transformers' models."""
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    return found if isinstance(found, torch.Tensor) else None


def driver() -> str:
    """Whose loop runs here: "trainer" (transformers'), "accelerate", or ""."""
    found, frame = "", sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module == "transformers.trainer":
            return "trainer"
        if module == "accelerate.accelerator":
            found = "accelerate"
        frame = frame.f_back
    return found


def place() -> Place | None:
    """The line of the user's that has led here: the innermost frame outside of libraries."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((PACKAGE, "<")) and not os.path.realpath(file).startswith(LIBRARIES):
            return Place(file, frame.f_lineno)
        frame = frame.f_back
    return None
