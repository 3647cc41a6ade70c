"""Compute a model in a longer precision for a while, without a change of the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

SHORTER = (torch.float32, torch.bfloat16, torch.float16)
MOST_PARAMETERS = 500_000_000
"""Parameters of a model above which a copy in float64 is too large."""


@contextmanager
def in_float64(model: torch.nn.Module) -> Iterator[None]:
    """Compute in float64 in the block, also where code casts to float32.

    A change of a part of another float32 tensor is lost, such as of a queue in an attribute.

    Raises:
        ValueError: a parameter is not a plain tensor of floating point, such as a quantised or sharded one;
            or the model is too large.
    """
    if sum(p.numel() for p in model.parameters()) > MOST_PARAMETERS:
        raise ValueError(f"more than {MOST_PARAMETERS:,} parameters, too many for a copy in float64")
    for name, parameter in model.named_parameters():
        plain = type(parameter) is torch.nn.Parameter and parameter.is_floating_point()
        if not plain or parameter.device.type in ("meta", "mps"):
            raise ValueError(f"{name} has no values in float64")
    with weights_held_in(model, torch.float64), _Float64():
        yield


@contextmanager
def weights_held_in(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hold shorter floating-point parameters and buffers in another dtype in the block.

    The modules hold copies meanwhile. The parameters themselves do not change, as optimizers and DDP refer to
    them. A change of the dtype of a parameter would remove the hooks by which DDP reduces gradients.
    """
    entries: list[tuple[dict[str, Any], str, torch.Tensor]] = [
        (tensors, name, tensor)
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None and tensor.dtype in SHORTER and tensor.dtype.itemsize < dtype.itemsize
    ]
    copies = {id(tensor): _copy(tensor, dtype) for _, _, tensor in entries}  # one for tied weights
    try:
        for tensors, name, tensor in entries:
            tensors[name] = copies[id(tensor)]
        _set_flat_weights(model)
        yield
    finally:
        for tensors, name, tensor in entries:
            tensors[name] = tensor
        _set_flat_weights(model)


def _set_flat_weights(model: torch.nn.Module) -> None:
    """Update the references to weights that LSTM and GRU hold beside their parameters."""
    for module in model.modules():
        if isinstance(module, torch.nn.RNNBase):
            names = module._flat_weights_names
            module._flat_weights = [getattr(module, name, None) for name in names]


def _copy(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    copy = tensor.detach().to(dtype, copy=True)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(copy, requires_grad=tensor.requires_grad)
    return copy


class _Float64(TorchDispatchMode):
    """Replace every shorter floating-point number by one in float64: inputs, casts and new tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace != "aten" or func._schema.is_mutable:
            return func(*args, **kwargs)
        if kwargs.get("dtype") in SHORTER:
            kwargs["dtype"] = torch.float64
        try:
            found = func(*tree_map(_longer, args), **tree_map(_longer, kwargs))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError):  # a kernel without float64, such as of experts
            found = func(*tree_map(_shorter, args), **tree_map(_shorter, kwargs))
        return tree_map(_longer, found)


def _longer(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.dtype in SHORTER else value


def _shorter(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.float64 else value
