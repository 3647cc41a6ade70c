"""torch.compile for micro-batches of many shapes: layer by layer, in place.

`compile_layers` compiles only the repeated layers of a model. They share one compiled version for any number
of examples and tokens, and a second one for a single example. A whole model would take minutes to compile,
and again for some shapes. The model keeps its class, and the weights keep their names.

Source: "Reducing torch.compile cold start compilation time with regional compilation", in PyTorch's recipes.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from gradacc_hf.errors import one_line
from gradacc_hf.utils.hardware import say


def compile_layers(model: torch.nn.Module) -> None:
    """Compile the repeated layers of a model in place, or the whole model if no layer is repeated.

    The layers are compiled at the first micro-batch. If that fails, the run prints one line and continues
    uncompiled.
    """
    repeated = [layers for layers in model.modules() if isinstance(layers, torch.nn.ModuleList)]
    inside = {id(module) for layers in repeated for layer in layers for module in layer.modules()}
    outermost = [layer for layers in repeated if id(layers) not in inside for layer in layers]
    chosen = outermost or [model]

    def give_up(error: RuntimeError) -> None:
        name = type(chosen[0]).__name__
        say(f"budget.compile: {name} cannot be compiled and runs uncompiled ({one_line(error)[:200]})")
        for module in chosen:
            module._compiled_call_impl = None

    for module in chosen:
        _compile(module, give_up)
    _train_without_cache(model)


def _train_without_cache(model: torch.nn.Module) -> None:
    """Turn off the key-value cache in training.

    The layers of a decoder index the cache by their number, so each layer would be compiled separately.
    """

    def without(module: Any, inputs: Any, named: dict[str, Any]) -> Any:
        return (inputs, {"use_cache": False, **named}) if module.training else None

    for module in model.modules():
        if "use_cache" in inspect.signature(module.forward).parameters:
            module.register_forward_pre_hook(without, with_kwargs=True)
            return


def _compile(module: Any, give_up: Callable[[RuntimeError], None]) -> None:
    from torch._dynamo.exc import TorchDynamoException  # late: slow to import
    from torch._inductor.exc import CppCompileError

    module.compile(dynamic=True)
    compiled = module._compiled_call_impl

    def call(*inputs: Any, **named: Any) -> Any:
        if module._compiled_call_impl is not None:
            try:
                return compiled(*inputs, **named)
            except (TorchDynamoException, CppCompileError) as error:  # raised before anything is computed
                give_up(error)
        return module._call_impl(*inputs, **named)

    module._compiled_call_impl = call
