"""Restore the attributes of objects that a trial forward may change."""

from typing import Any

import torch


class Attributes:
    """The attributes of an object: values, contents of lists and dicts, numbers of tensors.

    Args:
        holder: The object, such as a module. Parameters of modules are not copied.
    """

    def __init__(self, holder: Any):
        self._holder, self._values = holder, dict(vars(holder))
        self._contents = [(v, v.copy()) for v in self._values.values() if isinstance(v, list | dict)]
        inside = [t for held, _ in self._contents if isinstance(held, dict) for t in held.values()]
        self._tensors = [
            (tensor, tensor._version, tensor.detach().clone())
            for tensor in (*self._values.values(), *inside)
            if isinstance(tensor, torch.Tensor) and not tensor.requires_grad and not tensor.is_inference()
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Set the attributes back to their values at the time of the copy."""
        vars(self._holder).clear()
        vars(self._holder).update(self._values)
        for held, content in self._contents:
            held.clear()
            held.extend(content) if isinstance(held, list) else held.update(content)
        for tensor, version, before in self._tensors:
            if tensor._version != version:
                tensor.copy_(before)
