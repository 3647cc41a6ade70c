"""Dropout that several observers of the same modules turn off, and on again after the last of them."""

from typing import Any

import torch

from gradacc_hf.utils.modeling import disable_dropout

Key = tuple[int, str]  # identity of a module or config, and name of the attribute
_HELD: dict[Key, list[Any]] = {}  # number of observers, module or config, probability


def hold_dropout(model: torch.nn.Module) -> list[Key]:
    """Turn off dropout in a model. Return what `release_dropout` needs."""
    for holder, name, value in disable_dropout(model):
        _HELD[id(holder), name] = [0, holder, value]
    modules = list(model.modules())
    holders = {id(module) for module in modules}
    holders |= {id(module.config) for module in modules if hasattr(module, "config")}
    keys = [key for key in _HELD if key[0] in holders]
    for key in keys:
        _HELD[key][0] += 1
    return keys


def release_dropout(keys: list[Key]) -> None:
    """Turn dropout on again where no other observer holds it."""
    for key in keys:
        _HELD[key][0] -= 1
        count, holder, value = _HELD[key]
        if not count:
            setattr(holder, key[1], value)
            del _HELD[key]
