"""The gradient of a whole window at once, which every split must give, and how far another is from it.

`whole_window_gradient` is the one reference: no accumulation, no weighing, no Accelerate. `relative_error` is
the measure: ‖g − reference‖ / ‖reference‖ over all parameters together, ≤ 1e-5 in float32.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from gradacc_hf.accumulation.loss_items import ComputeLoss, model_loss

Gradient = dict[str, torch.Tensor]

EXACT = 1e-5
WORST = 5  # parameters that a comparison names
TINY = 1e-300  # instead of 0, to divide by


def whole_window_gradient(
    model: torch.nn.Module, batch: Mapping[str, Any], compute_loss: ComputeLoss = model_loss
) -> Gradient:
    """The gradient of the mean loss of one batch that holds the whole window; `.grad` is left empty."""
    model.zero_grad()
    compute_loss(model(**batch), batch).backward()
    gradient = read_gradient(model)
    model.zero_grad()
    return gradient


def read_gradient(model: torch.nn.Module) -> Gradient:
    """A copy of every parameter's `.grad`, whole where it is sharded; zeros where there is none."""
    gradient = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
            gradient[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    return gradient


def relative_error(gradient: Gradient, reference: Gradient) -> float:
    """‖gradient − reference‖ / ‖reference‖, over all parameters, in float64; two zeros are the same."""
    difference = norm({name: gradient[name].double() - reference[name].double() for name in reference})
    size = norm(reference)
    return difference / size if size else math.inf if difference else 0.0


@dataclass(frozen=True)
class Comparison:
    """What one way accumulates against the reference, in the window where it is furthest off.

    `error` and `norm_ratio`: ‖g − r‖ / ‖r‖ and ‖g‖ / ‖r‖; `cosine` of the angle between them. `worst`:
    parameters by ‖g_p − r_p‖ / max(‖r_p‖, 1e-4 ‖r‖), as some (a key's bias) have no gradient but rounding.
    """

    way: str
    error: float
    norm_ratio: float
    cosine: float
    worst: tuple[tuple[str, float], ...]

    @property
    def exact(self) -> bool:
        """Is the error at most `EXACT`? NaN is not."""
        return self.error <= EXACT

    @property
    def badness(self) -> float:
        """The error, to be sorted by: NaN is worst."""
        return math.inf if math.isnan(self.error) else self.error


def compare(way: str, gradient: Gradient, reference: Gradient) -> Comparison:
    """All measures of how far a gradient is from the reference, in float64."""
    size, length = norm(reference) or TINY, norm(gradient)
    inner = sum(float((gradient[n].double() * r.double()).sum()) for n, r in reference.items())
    by_parameter = {
        name: norm({name: gradient[name].double() - r.double()}) / max(norm({name: r}), 1e-4 * size, TINY)
        for name, r in reference.items()
    }
    worst = sorted(by_parameter.items(), key=lambda pair: -pair[1])[:WORST]
    return Comparison(
        way, relative_error(gradient, reference), length / size, inner / (length * size or 1), tuple(worst)
    )


def grad_norm(parameters: Iterable[torch.nn.Parameter]) -> float:
    """‖gradient‖ over these parameters' `.grad`, of all shards where they are sharded."""
    return as_number(get_total_norm([p.grad for p in parameters if p.grad is not None]))


def as_number(norm: Any) -> float:
    """A norm as a number; that of sharded gradients is itself sharded."""
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def norm(gradient: Gradient) -> float:
    """‖gradient‖ over all parameters, in float64."""
    return sum(float(g.double().square().sum()) for g in gradient.values()) ** 0.5


@contextmanager
def full_float32() -> Iterator[None]:
    """In here a GPU multiplies float32 numbers as such, not as TF32: convolutions would, by default."""
    matmul, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolutions


def in_dtype_of(model: torch.nn.Module, batch: Any) -> Any:
    """Return a batch with its real inputs in float64 where the model's weights are; else as it is."""
    if next(model.parameters()).dtype != torch.float64:
        return batch
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }


class RecordGradients(torch.optim.SGD):
    """An optimizer that changes nothing and keeps, for each step, the gradient that reached it."""

    def __init__(self, model: torch.nn.Module):
        super().__init__(model.parameters(), lr=0.0)
        self.model, self.gradients = model, []

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.gradients.append(read_gradient(self.model))


SEPARABLE_RTOL = 1e-3  # relative; bf16 weights round to 2⁻⁸, padding and wrong items change a loss by more
