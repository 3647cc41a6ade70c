"""Is accumulation exact? The one place with the whole-window reference gradient.

`whole_window_gradient` runs a window at once, with no accumulation, no weighing and no Accelerate: what every
split must give. `relative_error` is the measure: ‖g − reference‖ / ‖reference‖ over all parameters together,
≤ 1e-5 in float32.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from gradacc_hf.items import ComputeLoss, model_loss

Gradient = dict[str, torch.Tensor]

EXACT = 1e-5


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
    """‖gradient − reference‖ / ‖reference‖, over all parameters, in float64."""
    return _norm({name: gradient[name].double() - reference[name].double() for name in reference}) / _norm(
        reference
    )


def _norm(gradient: Gradient) -> float:
    return sum(float(g.double().square().sum()) for g in gradient.values()) ** 0.5


class RecordGradients(torch.optim.SGD):
    """An optimizer that changes nothing and keeps, for each step, the gradient that reached it."""

    def __init__(self, model: torch.nn.Module):
        super().__init__(model.parameters(), lr=0.0)
        self.model, self.gradients = model, []

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.gradients.append(read_gradient(self.model))
