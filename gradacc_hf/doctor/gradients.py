"""The gradients of one optimizer: their norm, whether a backward reached them, and changes by the loop."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from gradacc_hf.doctor.frames import is_clipping, is_clipping_norm, user_line
from gradacc_hf.doctor.listener import UNSCALE, thread_listener
from gradacc_hf.doctor.record import LOSS_RTOL_FP32, GradientChange, GradientComparison, Place

GradientNow = Sequence[torch.Tensor | None]  # one gradient per parameter of the optimizer
SCALING = {"div_", "mul_", "__idiv__", "__itruediv__", "__imul__", "_foreach_div_", "_foreach_mul_"}
CHUNK_ELEMENTS = 2**16  # elements that are compared in float64 at a time


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
        """The parameters of the optimizer, also those frozen for now."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


@torch.no_grad()
def compare_gradients(gradient: GradientNow, other: GradientNow, clipped: float = 1.0) -> GradientComparison:
    """Compare the loop's gradient with another in float64; `clipped` is the factor of clipping to undo."""
    inner = mine = theirs = 0.0
    for g, o in zip(gradient, other, strict=True):
        some = g if g is not None and (o is None or g.device.type != "cpu") else o  # one may be on the host
        device = None if some is None else some.device
        for i in range(0, 0 if some is None else some.numel(), CHUNK_ELEMENTS):
            a, b = (
                None if each is None else each.flatten()[i : i + CHUNK_ELEMENTS].to(device).double()
                for each in (g, o)
            )
            a = None if a is None else a / clipped
            mine += float(a.square().sum()) if a is not None else 0.0
            theirs += float(b.square().sum()) if b is not None else 0.0
            inner += float(a @ b) if a is not None and b is not None else 0.0
    if not theirs or not mine:
        return GradientComparison(
            (mine**0.5) / (theirs**0.5) if theirs else float("inf"), 1.0 if mine == theirs else 0.0
        )
    return GradientComparison((mine / theirs) ** 0.5, inner / (mine * theirs) ** 0.5)


class GradientWatch:
    """Follows the gradients and the weights of one optimizer.

    before_change: copy of the gradient, on the host, before the loop changed it by hand; None if it did not.
        A scaling that comes first is included.
    touched: changes since the latest backward or step, with the line.
    weights_version: changes of the weights so far.
    clipped_scaled: factor of clipping since the latest backward, before a scaler divided the gradient.
    """

    def __init__(self, subject: Subject):
        self._subject = subject
        self._weights: tuple[Any, ...] = ()
        self._of_weights: set[int] = set()  # memory of the weights
        self._of_gradients: dict[int, torch.nn.Parameter] = {}  # memory of the gradients
        self.before_change: list[torch.Tensor | None] | None = None
        self.touched: list[tuple[str, Place | None]] = []
        self.weights_version = 0
        self.clipped_scaled = 1.0
        self._is_replaced = False  # whether a gradient is another tensor since the latest search
        self._chain: list[tuple[str, float]] = []  # kinds of changes, with the norm before each
        self._hand: tuple[Place | None, str] = (None, "")
        self._line: Place | None = None  # of the latest change by hand
        self._scaled, self._scales = 1.0, False  # factor of the lines that only scale; whether any scales

    def gradients(self) -> list[torch.Tensor | None]:
        """The gradient of each parameter."""
        return [p.grad for p in self._subject.parameters()]

    @torch.no_grad()
    def norm(self) -> float:
        """The norm of all gradients together; 0 if there is none."""
        with thread_listener().paused():
            gradients = [g for g in self.gradients() if g is not None]
            if any(g.dtype in (torch.float16, torch.bfloat16) for g in gradients):
                gradients = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
            norm = float(get_total_norm(gradients)) if gradients else 0.0
            if math.isinf(norm):  # squares of scaled gradients overflow in float32
                norm = math.hypot(
                    *(float(torch.linalg.vector_norm(g, dtype=torch.float64)) for g in gradients)
                )
            return norm

    def state(self) -> tuple[Any, ...]:
        """Identity and version of each gradient; a backward that reaches a parameter changes them."""
        return tuple(None if g is None else (id(g), g._version) for g in self.gradients())

    def follow_weights(self) -> int:
        """Count a change of the weights since the latest call. Return the number of changes so far."""
        now = _versions(self._subject.parameters())
        if self._weights and now != self._weights:
            self.weights_version += 1
        self._weights = now
        return self.weights_version

    def model_version(self) -> int:
        """A number that changes with any weight of the model, also when another optimizer steps."""
        return hash((self.follow_weights(), _versions(self._subject.model.parameters())))

    def other_weights(self) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Trained weights of the model that another optimizer has, each with a copy on the host."""
        mine = {id(p) for p in self._subject.parameters()}
        others = [p for p in self._subject.model.parameters() if p.requires_grad and id(p) not in mine]
        return [(p, p.detach().to("cpu", copy=True)) for p in others]

    def after_backward(self) -> None:
        """Start following changes of the gradients of this backward."""
        self._of_weights = {_storage(p) for p in self._subject.parameters()}
        self._find_gradients()
        self.clipped_scaled = 1.0
        self.forget()

    def _find_gradients(self) -> None:
        parameters, self._is_replaced = self._subject.parameters(), False
        self._of_gradients = {_storage(p.grad): p for p in parameters if p.grad is not None}

    def forget(self) -> None:
        """Forget changes by hand."""
        self.before_change, self._chain, self._hand = None, [], (None, "")
        self._scaled, self._scales = 1.0, False

    def changed(self, tensor: Any, how: str) -> None:
        """Record a change of a gradient or a weight that is about to happen."""
        first = tensor[0] if isinstance(tensor, list | tuple) and tensor else tensor
        if not isinstance(first, torch.Tensor):
            return
        if self.is_gradient(first):
            self.gradient_changed(how)
        elif _storage(first) in self._of_weights:
            self.weights_version += 1

    def is_gradient(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a gradient of the latest backward or set since, or a view of one."""
        if self._is_replaced:
            self._find_gradients()
        parameter = self._of_gradients.get(storage := _storage(tensor))
        return parameter is not None and parameter.grad is not None and _storage(parameter.grad) == storage

    def gradient_changed(self, how: str) -> None:
        """Record a change of a gradient that is about to happen."""
        here = (how, user_line())
        self._is_replaced |= how == "replaced"
        if not self.touched or self.touched[-1] != here:
            self.touched.append((f"clip: {how}" if is_clipping() else how, here[1]))
        if how == UNSCALE and self._chain:
            self.clipped_scaled = self.change(self.norm()).clip
        if "zero" in how or how == UNSCALE:
            return
        kind = "clip" if is_clipping_norm() else "hand"
        if not self._chain or self._chain[-1][0] != kind:
            self._chain.append((kind, self.norm()))
        if kind == "hand":
            self._changed_by_hand(here[1], how)

    def _changed_by_hand(self, line: Place | None, how: str) -> None:
        if self.before_change is None:
            self.before_change, self._hand = self._copies(), (line, how)
        elif line != self._line:  # the lines before may have scaled the gradient, as a division by the steps
            found = compare_gradients(self.gradients(), self.before_change)
            if found.ratio and GradientComparison(1.0, found.cosine).error() <= LOSS_RTOL_FP32:
                self._scaled *= found.ratio
                self.before_change = self._copies()
        self._line = line
        self._scales |= how in SCALING

    def _copies(self) -> list[torch.Tensor | None]:
        return [None if g is None else g.detach().to("cpu", copy=True) for g in self.gradients()]

    def change(self, norm: float) -> GradientChange:
        """The change since the latest backward. `norm`: the norm of the gradient now."""
        factors = {"clip": 1.0, "hand": 1.0}
        norms = [before for _, before in self._chain] + [norm]
        for (kind, before), after in zip(self._chain, norms[1:], strict=True):
            factors[kind] *= after / before if before else 1.0
        place, how = self._hand
        if self.before_change is None:
            return GradientChange(clip=factors["clip"])
        cosine = compare_gradients(self.gradients(), self.before_change).cosine
        is_scaled = GradientComparison(1.0, cosine).error() <= LOSS_RTOL_FP32
        scaled = None if self._scales and self._scaled == 1 else self._scaled
        return GradientChange(factors["hand"] if is_scaled else None, factors["clip"], place, how, scaled)


def _versions(parameters: Iterable[torch.nn.Parameter]) -> tuple[Any, ...]:
    return tuple((_storage(p), p._version) for p in parameters)


def _storage(tensor: torch.Tensor) -> int:
    """The address of the memory of a tensor, shared by its views; the identity if it has no memory."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):
        return id(tensor)
