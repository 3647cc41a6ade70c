"""Small changes to a model: dropout, gradient checkpointing, BatchNorm."""

import re
from typing import Any

import torch

BATCH_NORMS = torch.nn.modules.batchnorm._BatchNorm
RANDOM = r"drop|jitter|mask_(time|feature)_prob"  # fields of modules and configs that hold a probability


def checkpoint_activations(model: Any) -> None:
    """Recompute the activations of a model in the backward pass (`budget.gradient_checkpointing`)."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # the name since transformers 5.23
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def disable_dropout(model: torch.nn.Module) -> list[tuple[Any, str, float]]:
    """Set every probability to drop, mask or jitter to 0, in the modules and in their configs.

    Return (object, attribute name, previous value) for each change.
    """
    removed = []
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    for holder in (*model.modules(), *configs):
        for name, value in list(vars(holder).items()):
            of_dropout = name == "p" and isinstance(holder, torch.nn.modules.dropout._DropoutNd)
            if isinstance(value, float) and value and (of_dropout or re.search(RANDOM, name)):
                removed.append((holder, name, value))
                setattr(holder, name, 0.0)
    return removed


class BufferSnapshot:
    """A copy of the floating-point buffers of a model. Forwards of BatchNorm change them."""

    def __init__(self, model: torch.nn.Module):
        self._buffers = [(b, b.clone()) for b in model.buffers() if b.is_floating_point()]

    @torch.no_grad()
    def restore(self) -> None:
        """Set the buffers back to their values at the time of the copy."""
        for buffer, before in self._buffers:
            buffer.copy_(before)
