"""Find the examples and the module that cause a loss or gradient that is not finite.

`Window.weigh` turns the gradient of such a loss into NaN. The gradient norm of the window is then NaN in all
processes. The training loop (`training/loop.py`) takes no step and calls `find_non_finite`.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from gradacc_hf.accumulation.accelerate_state import forwards_are_collective
from gradacc_hf.accumulation.loss_items import ComputeLoss, as_window_loss, total_loss
from gradacc_hf.accumulation.window import Window

SHOWN = 32  # most examples in a message


def drop_non_finite(optimizer: Any, norm: float, accelerator: Accelerator) -> None:
    """Drop gradients whose norm is not finite, so that the next step changes nothing.

    In fp16 the scaler skips such a step and lowers the scale.
    """
    if not math.isfinite(norm) and accelerator.scaler is None:
        optimizer.zero_grad()


def find_non_finite(model: torch.nn.Module, window: Window, compute_loss: ComputeLoss) -> str:
    """Run the micro-batches of a window again, and return the source of the first non-finite number.

    Collective. Weights and gradients do not change; buffers and random states do.
    """
    accelerator = window.accelerator
    together = forwards_are_collective(accelerator)
    bare = model if together else accelerator.unwrap_model(model)
    found, bad = None, 0
    for batch in window.forward_pass():
        if found is not None and not together:
            bad += _loss_is_bad(bare, batch, compute_loss)
            continue
        with _first_non_finite_output(bare) as modules, torch.set_grad_enabled(not together):
            outputs = bare(**batch)
            cause = f"first in the output of {modules[0]}" if modules else None
            if cause is None and as_window_loss(compute_loss) is None:
                loss = total_loss(compute_loss(outputs, batch))
                cause = _of_loss(bare, loss, look_at_gradient=not together)
        if cause is not None and found is None:
            found, bad = f"{_named(window.micro_batch.indices.tolist())}, {cause}", 1
    if found is not None and bad == len(window) > 1:
        found += "; all micro-batches are affected: the cause is the weights or --optim.lr, not the examples"
    everywhere = [cause for cause in gather_object([found]) if cause is not None]
    return everywhere[0] if everywhere else "only the sum of the micro-batches, none of them alone"


@torch.no_grad()
def _loss_is_bad(model: torch.nn.Module, batch: Mapping[str, Any], compute_loss: ComputeLoss) -> bool:
    outputs = model(**batch)
    if as_window_loss(compute_loss) is not None:
        return False
    return not math.isfinite(float(total_loss(compute_loss(outputs, batch))))


def _named(indices: list[int]) -> str:
    more = f" and {len(indices) - SHOWN} more" if len(indices) > SHOWN else ""
    return f"examples {indices[:SHOWN]}{more}"


def _of_loss(model: torch.nn.Module, loss: torch.Tensor, look_at_gradient: bool) -> str | None:
    if not math.isfinite(loss.item()):
        return f"their loss is {loss.item()}"
    if not look_at_gradient:
        return None
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    for name, gradient in reversed(list(zip(trained, gradients, strict=True))):  # order of the backward pass
        if gradient is not None and not gradient.isfinite().all():
            return f"first in the gradient of {name}"
    return None


@contextmanager
def _first_non_finite_output(model: torch.nn.Module) -> Iterator[list[str]]:
    """Yield a list that receives the name and class of the first module whose output is not finite."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
            # −∞ is allowed: masks contain it.
            if not found and any((t.isnan() | (t == math.inf)).any() for t in _tensors(outputs)):
                found.append(f"{name or 'the model'} ({type(module).__name__})")

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(outputs: Any) -> Iterator[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from _tensors(value)
    elif isinstance(outputs, (list, tuple)):
        for value in outputs:
            yield from _tensors(value)
