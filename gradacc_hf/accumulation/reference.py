"""The reference gradient of a window, and the error of other gradients.

`whole_window_gradient` computes the reference on the whole window at once: no accumulation, no weighing, no
Accelerate. Every split must give the same gradient. `relative_error` is ‖g − reference‖ / ‖reference‖ over
all parameters together. It must be at most 1e-5 in float32.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from gradacc_hf.accumulation.loss_items import ComputeLoss, model_loss, total_loss

Gradient = dict[str, torch.Tensor]

EXACT = 1e-5
WORST = 5  # parameters in `Comparison.worst`
TINY = 1e-300  # replaces a divisor of 0


def whole_window_gradient(
    model: torch.nn.Module, batch: Mapping[str, Any], compute_loss: ComputeLoss = model_loss
) -> Gradient:
    """Return the gradient of the mean loss of one batch that holds the whole window. Clear `.grad`."""
    model.zero_grad()
    total_loss(compute_loss(model(**batch), batch)).backward()
    gradient = read_gradient(model)
    model.zero_grad()
    return gradient


def read_gradient(model: torch.nn.Module, names: Collection[str] | None = None) -> Gradient:
    """Return a copy of `.grad` of trained parameters: unsharded, and zeros if there is none.

    Args:
        model: The model.
        names: Names of the parameters; by default all.
    """
    gradient = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (names is None or name in names):
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
            gradient[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    return gradient


def relative_error(gradient: Gradient, reference: Gradient) -> float:
    """Return ‖gradient − reference‖ / ‖reference‖ over all parameters, in float64; 0 if both are zero."""
    difference, size = math.hypot(*_differences(gradient, reference).values()), norm(reference)
    return difference / size if size else math.inf if difference else 0.0


def _differences(gradient: Gradient, reference: Gradient) -> dict[str, float]:
    """Return ‖g − r‖ of each parameter, in float64. One parameter at a time is in memory."""
    return {name: norm({name: gradient[name].double() - r.double()}) for name, r in reference.items()}


@dataclass(frozen=True)
class Comparison:
    """A gradient g compared with the reference r.

    Attributes:
        way: The way to accumulate that gave the gradient.
        error: ‖g − r‖ / ‖r‖.
        norm_ratio: ‖g‖ / ‖r‖.
        cosine: Cosine of the angle between g and r.
        worst: The parameters with the largest ‖g_p − r_p‖ / max(‖r_p‖, 1e-4 ‖r‖), with this value. The lower
            limit is for parameters whose gradient is only rounding, such as the bias of attention keys.
    """

    way: str
    error: float
    norm_ratio: float
    cosine: float
    worst: tuple[tuple[str, float], ...]

    @property
    def exact(self) -> bool:
        """Whether the error is at most `EXACT`. NaN is not."""
        return self.error <= EXACT

    @property
    def badness(self) -> float:
        """The error as a sort key, where NaN is worst."""
        return math.inf if math.isnan(self.error) else self.error


def compare(way: str, gradient: Gradient, reference: Gradient) -> Comparison:
    """Return the comparison of a gradient with the reference, in float64."""
    size, length = norm(reference) or TINY, norm(gradient)
    inner = sum(float((gradient[n].double() * r.double()).sum()) for n, r in reference.items())
    differences = _differences(gradient, reference)
    by_parameter = {
        name: differences[name] / max(norm({name: r}), 1e-4 * size, TINY) for name, r in reference.items()
    }
    worst = sorted(by_parameter.items(), key=lambda pair: -pair[1])[:WORST]
    return Comparison(
        way, relative_error(gradient, reference), length / size, inner / (length * size or 1), tuple(worst)
    )


def grad_norm(parameters: Iterable[torch.nn.Parameter]) -> float:
    """Return ‖gradient‖ over `.grad` of these parameters, including all shards."""
    return as_number(get_total_norm([p.grad for p in parameters if p.grad is not None]))


def as_number(norm: Any) -> float:
    """Return a norm as a number. The norm of sharded gradients is a sharded tensor."""
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def norm(gradient: Gradient) -> float:
    """Return ‖gradient‖ over all parameters, in float64."""
    return sum(float(g.double().square().sum()) for g in gradient.values()) ** 0.5


@contextmanager
def full_float32() -> Iterator[None]:
    """Turn off TF32 on GPUs in the block. By default, convolutions compute float32 products in TF32."""
    matmul, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolutions


def in_dtype_of(model: torch.nn.Module, batch: Any) -> Any:
    """Return a batch whose floating-point inputs are float64 if the weights are; else the same batch."""
    if next(model.parameters()).dtype != torch.float64:
        return batch
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }


class RecordGradients(torch.optim.SGD):
    """An optimizer that changes no weight and stores the gradient of each step."""

    def __init__(self, model: torch.nn.Module):
        super().__init__(model.parameters(), lr=0.0)
        self.model, self.gradients = model, []

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.gradients.append(read_gradient(self.model))
