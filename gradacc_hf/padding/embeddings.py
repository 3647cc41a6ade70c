"""Compute the embeddings without padding.

The hooks find the module that makes the input of the first layer, such as `BertEmbeddings`. They pack inside
it: token numbers, where they enter the lookups, or else hidden states, where they enter the normalisation.

    lookups              ◄── PackEntry   (batch, length) → (1, real tokens), or
    normalisation        ◄── PackEntry   (batch, length, size) → (1, real tokens, size)
    end of the module    ──► StandIn     (1, real tokens, size) → a stand-in of shape (batch, length, size)
    first layer          ──► PackInputs  replaces the stand-in with what it stands for

The stand-in is not a number everywhere. A model that computes something with it gets a wrong loss in the
check, and keeps padded embeddings.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gradacc_hf.padding.attention import CURRENT, PackedForward, with_padding
from gradacc_hf.padding.hooks import Hook, Stack, packed_tensor, stack_of
from gradacc_hf.padding.probe import Probe


@dataclass(eq=False)
class PackEntry(Hook):
    """Give a module packed arguments, if it runs before the layers."""

    def __call__(self, module: Any, args: tuple) -> tuple | None:
        forward = _forward(self.stack)
        if forward is None:
            return None
        pack = partial(packed_tensor, layout=forward.layout)
        return tuple(pack(value) if isinstance(value, torch.Tensor) else value for value in args)


@dataclass(eq=False)
class StandIn(Hook):
    """Put a tensor of the padded shape in the place of packed embeddings."""

    def __call__(self, module: Any, args: tuple, output: Any) -> Any:
        forward = _forward(self.stack)
        if forward is None or output.shape[:2] != (1, forward.layout.num_tokens):
            return output
        nothing = torch.full((), torch.nan, dtype=output.dtype, device=output.device)
        standin = nothing.expand(*forward.layout.shape, output.shape[-1])
        forward.packed[id(standin)] = (standin, output)
        return standin


def _forward(stack: Stack) -> PackedForward | None:
    """Return the forward without padding that has not come to its layers yet, or None."""
    forward = None if torch.compiler.is_compiling() else CURRENT.forward
    if forward is None or forward.stack is not stack or forward.calls or not forward.embeds:
        return None
    return None if forward.layout.is_row else forward


def pack_embeddings(probe: Probe, owner: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> bool:
    """Compute the embeddings of a stack without padding, if the result stays exact.

    Args:
        probe: The probe of the model, which computes its layers without padding.
        owner: The model class around the layers.
        layers: The layers of the stack.

    Returns:
        Whether embeddings are computed without padding now.
    """
    stack = stack_of(layers[0])
    if stack is None or not stack.by_group or probe.is_sharded:
        return False
    embeddings = _embeddings(probe, owner, layers)
    return embeddings is not None and any(map(probe.is_exact_with, _ways(stack, embeddings)))


def _embeddings(
    probe: Probe, owner: torch.nn.Module, layers: Sequence[torch.nn.Module]
) -> torch.nn.Module | None:
    """Return the module with lookups whose output is the input of the first layer, or None."""
    outputs: list[tuple[torch.nn.Module, Any]] = []
    found: list[torch.nn.Module] = []

    def keep(module: torch.nn.Module, args: tuple, output: Any) -> None:
        if not found:
            outputs.append((module, output))

    def look(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        found.extend(maker for maker, output in outputs if any(value is output for value in given))

    in_layers = {part for layer in layers for part in layer.modules()}
    makers = [part for part in owner.modules() if part not in in_layers and any(_lookups(part))]
    handles = [part.register_forward_hook(keep) for part in makers]
    handles.append(layers[0].register_forward_pre_hook(look, with_kwargs=True))
    try:
        with with_padding():
            probe.run_forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[-1] if found else None  # the outermost of them


def _lookups(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    return (part for part in module.modules() if isinstance(part, torch.nn.Embedding))


def _ways(stack: Stack, embeddings: torch.nn.Module) -> Iterator[Callable[[], list[Hook]]]:
    norms = [part for part in embeddings.modules() if "norm" in type(part).__name__.lower()]
    for entries in (list(_lookups(embeddings)), norms):
        if entries:
            yield partial(_install, stack, embeddings, entries)


def _install(stack: Stack, embeddings: torch.nn.Module, entries: Sequence[torch.nn.Module]) -> list[Hook]:
    hooks: list[Hook] = [PackEntry(stack) for _ in entries]
    for hook, entry in zip(hooks, entries, strict=True):
        hook.add(entry.register_forward_pre_hook)
    hooks.append(StandIn(stack))
    hooks[-1].add(embeddings.register_forward_hook)
    return hooks
