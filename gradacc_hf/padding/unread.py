"""Compute the last layer only at the tokens that the loss reads.

After the last attention, no token depends on another one. The loss of a sequence classifier reads the first
token of each example, and the loss of a token classifier reads labelled tokens. The rest of the last layer,
its feed-forward part, runs at these tokens alone.

    last layer   attention ──► KeepRead     (1, real tokens, …) → (1, read tokens, …)
                 feed-forward, normalisation
                           ──► UnpackOutput (1, read tokens, …) → (batch, length, …), zeros elsewhere

Where the layer adds hidden states from before the attention at its end, `PackRead` and `UnpackRead` surround
the feed-forward part instead. They also surround linear layers beside the attention whose outputs are read at
these tokens alone, such as the projection of the queries. The attention then computes one query per example,
if the loss reads one token of each.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import ModuleList

from gradacc_hf.accumulation.padding_layout import pack, padding_layout, unpack
from gradacc_hf.errors import PaddingNotRemovableError
from gradacc_hf.padding.attention import CURRENT, PackedForward
from gradacc_hf.padding.hooks import Hook, Stack, arguments_by_name, each_tensor
from gradacc_hf.padding.probe import GROUPINGS, Probe

TOKENS_OF_ROWS = ("first", "last")
TOKENS_OF_LABELS = ("labelled", "before labelled")


@dataclass(eq=False)
class NoteLabels(Hook):
    """Hand the labels to the layers, also where a later hook takes them from the arguments."""

    @torch.compiler.disable
    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        labels = arguments_by_name(module, args, kwargs).get("labels")
        CURRENT.labels = labels if isinstance(labels, torch.Tensor) else None


@dataclass(eq=False)
class ForgetLabels(Hook):
    """Forget the labels at the end of the forward."""

    @torch.compiler.disable
    def __call__(self, module: Any, args: Any, output: Any) -> None:
        CURRENT.labels = None


@dataclass(eq=False)
class KeepRead(Hook):
    """Keep only the read tokens of a module's output."""

    def __call__(self, module: Any, args: tuple, output: Any) -> Any:
        forward = _forward(self.stack)
        return output if forward is None else each_tensor(output, partial(_packed, forward=forward))


@dataclass(eq=False)
class PackRead(Hook):
    """Give a module only the read tokens."""

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        forward = _forward(self.stack)
        if forward is None:
            return None
        packed = partial(_packed, forward=forward)
        return tuple(map(packed, args)), {name: packed(value) for name, value in kwargs.items()}


@dataclass(eq=False)
class UnpackRead(Hook):
    """Put the read tokens back among all real tokens, with zeros elsewhere."""

    def __call__(self, module: Any, args: tuple, output: Any) -> Any:
        forward = _forward(self.stack)
        if forward is None:
            return output
        read, size = forward.read, forward.layout.num_tokens

        def unpacked(value: torch.Tensor) -> torch.Tensor:
            if value.ndim != 3 or value.shape[:2] != (1, len(read)):
                return value
            return unpack(value[0], read, 1, size)

        return each_tensor(output, unpacked)


def _forward(stack: Stack) -> Any:
    """Return the forward that computes its last layer at read tokens now, or None."""
    forward = None if torch.compiler.is_compiling() else CURRENT.forward
    if forward is None or forward.stack is not stack or forward.calls != stack.calls:
        return None
    return forward if forward.read is not None else None


def _packed(value: Any, forward: PackedForward) -> Any:
    if not isinstance(value, torch.Tensor) or value.ndim != 3:
        return value
    if value.shape[:2] != (1, forward.layout.num_tokens):
        return value
    assert forward.read is not None
    return pack(value[0], forward.read)[None]


def skip_unread_tokens(probe: Probe, layer: torch.nn.Module, stack: Stack) -> bool:
    """Determine which tokens the loss reads, and compute the end of the last layer only at these.

    Args:
        probe: The probe of the model, which computes without padding.
        layer: The last layer.
        stack: The stack of the layer.

    Returns:
        Whether a part of the layer is skipped now, with the same loss and gradient.
    """
    labels = probe.sample.get("labels")
    if not isinstance(labels, torch.Tensor) or probe.is_sharded:
        return False
    seen = _WatchedLayer()
    with ExitStack() as added, suppress(PaddingNotRemovableError), probe.of_loss_alone(seen.watch(layer)):
        note, forget = NoteLabels(stack), ForgetLabels(stack)
        note.add(probe.model.register_forward_pre_hook, with_kwargs=True, prepend=True)
        forget.add(probe.model.register_forward_hook, always_call=True)
        added.callback(note.handle.remove)
        added.callback(forget.handle.remove)
        stack.reads = _kind(probe, labels, seen.read_tokens())
        if stack.reads and any(map(probe.is_exact_with, _cuts(stack, seen.parts))):
            _skip_queries(probe, layer, stack)
            added.pop_all()
            return True
        stack.reads = ""
    return False


class _WatchedLayer:
    """The outputs of a layer, and its parts in the order of their first calls."""

    def __init__(self) -> None:
        self.outputs: list[torch.Tensor] = []
        self.parts: list[torch.nn.Module] = []

    @contextmanager
    def watch(self, layer: torch.nn.Module) -> Iterator[None]:
        """Watch a layer in the block."""

        def keep(module: torch.nn.Module, args: tuple, output: Any) -> None:
            output = output if isinstance(output, torch.Tensor) else output[0]
            if isinstance(output, torch.Tensor) and output.requires_grad:  # not in a frozen encoder
                output.retain_grad()
                self.outputs.append(output)

        def note(module: torch.nn.Module, args: tuple) -> None:
            if module not in self.parts:
                self.parts.append(module)

        handles = [layer.register_forward_hook(keep)]
        handles += [part.register_forward_pre_hook(note) for part in _parts(layer)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def read_tokens(self) -> torch.Tensor:
        """Return at which tokens the last output has a gradient: boolean, (batch, length)."""
        gradient = self.outputs[-1].grad if self.outputs else None
        if gradient is None:
            raise PaddingNotRemovableError("the layers have no gradient")
        return (gradient != 0).flatten(2).any(2)


def _parts(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the parts of a module. The only layer in a group of layers stands for its own parts."""
    parts = [p for child in module.children() for p in (child if isinstance(child, ModuleList) else [child])]
    return _parts(parts[0]) if len(parts) == 1 else parts


def _kind(probe: Probe, labels: torch.Tensor, read: torch.Tensor) -> str:
    """Return the kind of tokens that the loss reads, or "" if it reads others, or all."""
    mask = probe.sample["attention_mask"]
    layout = padding_layout(mask.reshape(-1, mask.shape[-1]))
    if layout is None or layout.shape != tuple(read.shape):
        return ""
    by_token = labels.shape == read.shape and not labels.is_floating_point()
    read = read.flatten()[layout.tokens]
    for kind in TOKENS_OF_LABELS if by_token else TOKENS_OF_ROWS:
        chosen = torch.zeros_like(read)
        positions = layout.read_positions(kind, labels)
        if positions is not None and 1 < len(positions) < len(read):
            chosen[positions] = True
            if read.any() and not bool((read & ~chosen).any()):
                return kind
    return ""


def _cuts(stack: Stack, parts: list[torch.nn.Module]) -> Iterator[Callable[[], list[Hook]]]:
    """Yield functions that install hooks: after each part of a layer, then around each part alone."""
    weights = [sum(p.numel() for p in part.parameters()) for part in parts]
    for i, part in enumerate(parts):
        if sum(weights[i + 1 :]):
            yield partial(_keep_after, stack, part)
    for part in sorted(parts, key=lambda part: -weights[parts.index(part)]):
        yield partial(_surround, stack, part)


def _keep_after(stack: Stack, part: torch.nn.Module) -> list[Hook]:
    hook = KeepRead(stack)
    hook.add(part.register_forward_hook)
    return [hook]


def _skip_queries(probe: Probe, layer: torch.nn.Module, stack: Stack) -> None:
    """Skip unread tokens in linear layers and queries, too, as far as the result stays exact."""
    linears = _linears_of_read_tokens(probe, layer)

    def with_linears() -> list[Hook]:
        return [hook for linear in linears for hook in _surround(stack, linear)]

    stack.read_queries = stack.by_group and stack.reads in TOKENS_OF_ROWS
    if stack.read_queries and not probe.is_exact_with(with_linears, GROUPINGS):
        stack.read_queries = False
    if linears and not stack.read_queries:
        probe.is_exact_with(with_linears)


def _linears_of_read_tokens(probe: Probe, layer: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the linear layers over all real tokens whose outputs have a gradient at read tokens alone."""
    outputs: list[tuple[torch.nn.Module, torch.Tensor, torch.Tensor]] = []

    def keep(module: torch.nn.Module, args: tuple, output: Any) -> None:
        forward = CURRENT.forward
        if not isinstance(output, torch.Tensor) or not output.requires_grad:  # such as a router's tuple
            return
        if forward is None or forward.read is None:
            return
        if output.shape[:2] == (1, forward.layout.num_tokens):
            output.retain_grad()
            outputs.append((module, output, forward.read))

    linears = [part for part in layer.modules() if isinstance(part, torch.nn.Linear)]
    handles = [part.register_forward_hook(keep) for part in linears]
    try:
        probe.run()
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for module, output, read in outputs:
        gradient = None if output.grad is None else output.grad[0].index_fill(0, read, 0)
        if gradient is not None and not gradient.any():
            found.append(module)
    return found


def _surround(stack: Stack, part: torch.nn.Module) -> list[Hook]:
    before, after = PackRead(stack), UnpackRead(stack)
    before.add(part.register_forward_pre_hook, with_kwargs=True)
    after.add(part.register_forward_hook)
    return [before, after]
