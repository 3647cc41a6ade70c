"""Restore the attributes of objects that a trial forward may change."""

from typing import Any

import torch

LARGEST = 1_000_000
"""Numbers of an integer tensor above which it holds quantised weights, which no forward changes."""


class Attributes:
    """The attributes of an object: values, contents of lists and dicts, numbers of tensors.

    Parameters are not copied, whether they are trained or frozen. Tensors inside lists are not either.
    Hooks of modules stay. Code that watches the forward may have added them.

    Args:
        holder: The object, such as a module with its buffers.
    """

    def __init__(self, holder: Any):
        self._holder = holder
        self._values = {name: value for name, value in vars(holder).items() if "hook" not in name}
        self._contents = [(v, v.copy()) for v in self._values.values() if isinstance(v, list | dict | set)]
        inside = [t for held, _ in self._contents if isinstance(held, dict) for t in held.values()]
        tensors = [t for t in (*self._values.values(), *inside) if _may_change(t)]
        self._tensors = [(tensor, tensor._version, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def restore(self) -> None:
        """Set the attributes back to their values at the time of the copy."""
        attributes = vars(self._holder)
        for name in [name for name in attributes if name not in self._values and "hook" not in name]:
            del attributes[name]
        attributes.update(self._values)
        for held, content in self._contents:
            held.clear()
            held.extend(content) if isinstance(held, list) else held.update(content)
        for tensor, version, before in self._tensors:
            if tensor._version != version:
                tensor.copy_(before)


def _may_change(value: Any) -> bool:
    """Whether a value is a tensor that a forward may change in place, such as a buffer."""
    if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
        return False
    if value.requires_grad or value.is_inference() or value.is_meta:
        return False
    return value.is_floating_point() or value.numel() <= LARGEST
