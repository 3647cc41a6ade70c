"""Attention and mask functions for transformers that keep the examples of packed tokens apart.

transformers looks both up by the name in `config._attn_implementation`. `NAMES` holds the names of this
module, one for each attention that they run. Outside of a forward without padding, both pass their arguments
on unchanged.

In such a forward, the mask function returns a stand-in. The hooks of the layers (`hooks.py`) replace the
stand-in with a `PackedMask`, which the attention function reads. A `PackedMask` travels in the arguments of a
layer, so that gradient checkpointing finds it again in the backward pass.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gradacc_hf.accumulation.padding_layout import PaddingLayout, pack, unpack
from gradacc_hf.errors import PaddingNotRemovableError
from gradacc_hf.padding import variable_length

NAMES = {"sdpa": "gradacc_packed_sdpa", "eager": "gradacc_packed_eager"}
ORIGINAL = {ours: theirs for theirs, ours in NAMES.items()}


@dataclass(eq=False)
class PackedForward:
    """One forward of a stack of layers without padding.

    Attributes:
        stack: The stack of layers (`hooks.Stack`).
        layout: Positions of the real tokens in the batch.
        mask: Padding mask of the batch.
        encoder_mask: Padding mask of the sequence that a decoder attends to.
        read: Packed positions at which the end of the last layer runs, or None for all.
        masks: Stand-ins that the mask function has returned, with what they stand for. A stand-in is a tensor
            of the shape of a mask, as the model may read the shape before a layer gets it.
        packed: Padded argument of all layers, such as positions → its packed copy, by identity. The padded
            tensor is kept, too.
        calls: Calls of layers so far.
        is_packed: Whether a layer got packed hidden states.
        embeds: Whether the model computes its embeddings from input ids.
    """

    stack: Any
    layout: PaddingLayout
    mask: torch.Tensor
    encoder_mask: torch.Tensor | None = None
    read: torch.Tensor | None = None
    masks: list[tuple[torch.Tensor, "PackedMask"]] = field(default_factory=list)
    packed: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    calls: int = 0
    is_packed: bool = False
    embeds: bool = False

    @property
    def read_queries(self) -> torch.Tensor | None:
        """Packed positions of the only queries that this layer needs, one per example, or None for all."""
        return self.read if self.stack.read_queries and self.calls == self.stack.calls else None

    def mask_of(self, value: object) -> "PackedMask | None":
        """Return what a stand-in stands for; None for other values."""
        return next((mask for standin, mask in self.masks if standin is value), None)


class _Current(threading.local):
    forward: PackedForward | None = None
    keeps_padding = False
    labels: torch.Tensor | None = None
    """Labels of the forward, for a model that skips tokens which the loss does not read."""

    def __init__(self) -> None:
        self.around: list[tuple[torch.nn.Module, PackedForward | None]] = []
        """Models that have started or suspended a forward, each with the forward around it."""


@contextmanager
def with_padding() -> Iterator[None]:
    """Compute padded in the block, also where `remove_padding` is on."""
    before, CURRENT.keeps_padding = CURRENT.keeps_padding, True
    try:
        yield
    finally:
        CURRENT.keeps_padding = before


CURRENT = _Current()
"""The forward without padding that runs in this thread, if any."""


@dataclass(eq=False)
class PackedMask:
    """The replacement for a mask of shape (batch, 1, length of queries, length of keys).

    Attributes:
        kind: "full" or "causal", or "other" with `build`.
        layout: Layout of the queries.
        build: Returns the boolean mask of the padded batch.
        keys: Boolean padding mask of the keys, (batch, length of keys). None if no key is padding.
        of_groups: Masks of the groups, once they are computed.
        key_layout: Layout of packed keys of another sequence: the encoder's tokens in a decoder. None if the
            keys are those tokens padded, or the tokens of the queries.
    """

    kind: str
    layout: PaddingLayout
    build: Callable[[], torch.Tensor]
    keys: torch.Tensor | None
    of_groups: dict[bool, list[torch.Tensor | None]] = field(default_factory=dict)
    key_layout: PaddingLayout | None = None

    def group_masks(self, explicit: bool) -> list[torch.Tensor | None]:
        """Return a boolean mask for each group, or None where every pair (causal: every earlier one) attends.

        Args:
            explicit: Whether a causal mask is needed, because the attention has no such flag.
        """
        if explicit not in self.of_groups:
            real, tokens = self._blocks()
            masks, first = [], 0
            for (rows, length), is_real, positions in zip(self.layout.groups, real, tokens, strict=True):
                equal = min(self.layout.lengths[first : first + rows]) == length
                masks.append(self._group_mask(is_real[:, None, None, :], positions, equal, explicit))
                first += rows
            self.of_groups[explicit] = masks
        return self.of_groups[explicit]

    def query_masks(self) -> list[torch.Tensor | None]:
        """Return a boolean mask (examples, 1, 1, keys) for each group, for the read query of each example."""
        assert CURRENT.forward is not None
        kind = CURRENT.forward.stack.reads
        if self.kind == "causal":  # all keys are at the last token or before it
            if kind != "last":
                raise PaddingNotRemovableError("a causal model reads the first token alone")
            return replace(self, kind="full", of_groups={}).group_masks(explicit=True)
        masks, first = [], 0
        for (rows, _), mask in zip(self.layout.groups, self.group_masks(explicit=True), strict=True):
            if mask is not None and mask.shape[2] > 1:
                lengths = torch.tensor(self.layout.lengths[first : first + rows], device=mask.device)
                queries = lengths - 1 if kind == "last" else torch.zeros_like(lengths)
                mask = mask[torch.arange(rows, device=mask.device), :, queries][:, :, None]
            masks.append(mask)
            first += rows
        return masks

    def _blocks(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return, for each group, which tokens are real, and their flat positions: (examples, length)."""
        layout, sizes = self.layout, self.layout.block_sizes
        blocks = layout.blocks
        if blocks is None:
            real, tokens = torch.ones_like(layout.tokens, dtype=torch.bool), layout.tokens
        else:
            tokens = layout.tokens.new_zeros(sum(sizes)).index_copy_(0, blocks, layout.tokens)
            real = torch.zeros_like(tokens, dtype=torch.bool).index_fill_(0, blocks, True)
        return tuple(  # type: ignore[return-value]
            [part.view(group) for part, group in zip(torch.split(flat, sizes), layout.groups, strict=True)]
            for flat in (real, tokens)
        )

    def _group_mask(
        self, is_real: torch.Tensor, tokens: torch.Tensor, equal: bool, explicit: bool
    ) -> torch.Tensor | None:
        length = self.layout.shape[1]
        if self.kind == "full":
            return None if equal else is_real
        if self.kind == "causal":
            if not explicit:
                return None  # padding is behind the last token, where no real query attends
            width = tokens.shape[1]
            causal = torch.ones(width, width, dtype=torch.bool, device=tokens.device).tril()
            return causal.expand(len(tokens), 1, -1, -1)
        rows, columns = tokens[:, :1, None] // length, tokens % length
        mask = self.build()[rows, 0, columns[:, :, None], columns[:, None, :]][:, None]
        # Queries of padding attend to every real token: a query that attends to nothing would give NaN.
        return torch.where(is_real.transpose(2, 3), mask & is_real, is_real)


def _mask(original: str, **arguments: Any) -> Any:
    """Return the mask of `original`, or a stand-in during a forward without padding."""
    forward = CURRENT.forward
    if forward is None:
        return ALL_MASK_ATTENTION_FUNCTIONS[original](**arguments)
    function, keys = arguments["mask_function"], arguments.get("attention_mask")
    kind = {causal_mask_function: "causal", bidirectional_mask_function: "full"}.get(function, "other")
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    built: list[torch.Tensor] = []

    def build() -> torch.Tensor:
        if not built:
            built.append(sdpa_mask(**(arguments | skips)))  # type: ignore[arg-type]
        return built[0]

    shape = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
    device = forward.layout.tokens.device
    # Not a number: attention over a stand-in that a hook has not replaced fails, and is not wrong silently.
    standin = torch.full((), torch.nan, dtype=torch.float64, device=device).expand(shape)
    forward.masks.append((standin, PackedMask(kind, forward.layout, build, keys)))
    return standin


def _attention(
    original: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **arguments: Any,
) -> tuple[torch.Tensor, Any]:
    """Run the original attention: on each group of examples if the tokens are packed, else unchanged."""
    attend = _original_attention(original, module)
    if not isinstance(attention_mask, PackedMask):
        _check_not_packed(module, query)
        return attend(module, query, key, value, attention_mask, **arguments)
    return _attend_by_group(attend, original, module, query, key, value, attention_mask, arguments)


def _original_attention(original: str, module: torch.nn.Module) -> Callable[..., Any]:
    if original != "eager":
        return ALL_ATTENTION_FUNCTIONS[original]
    for base in type(module).__mro__:  # each modeling file has its own function
        function = getattr(sys.modules[base.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise PaddingNotRemovableError(f"{type(module).__name__} has no eager attention function")


def _check_not_packed(module: torch.nn.Module, query: torch.Tensor) -> None:
    forward = CURRENT.forward
    if forward is not None and query.shape[0] == 1 and query.shape[2] == forward.layout.num_tokens:
        raise PaddingNotRemovableError(
            f"{type(module).__name__} attends without a mask from transformers' mask functions"
        )


def _attend_packed(
    attend: Callable,
    original: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: PackedMask,
    arguments: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """Attend within each group of examples.

    Args:
        query: (1, heads, tokens, size), as `key` and `value`. Keys of another sequence may be padded:
            (batch, heads, length, size).
    """
    if arguments.get("position_bias") is not None:
        raise PaddingNotRemovableError(f"{type(module).__name__} computes its bias from packed positions")
    layout = mask.layout
    if mask.key_layout is not None:
        key, value = _padded_keys(key, mask.key_layout), _padded_keys(value, mask.key_layout)
    of_one_sequence = mask.key_layout is None and key.shape[2] == query.shape[2] and key.shape[0] == 1
    read = _read_queries(mask) if of_one_sequence else None
    is_causal = of_one_sequence and read is None and mask.kind == "causal" and original != "eager"
    by_kernel = of_one_sequence and read is None and original == "sdpa"
    if by_kernel and variable_length.takes(query, key, mask.kind, arguments.get("dropout", 0.0)):
        scale = arguments.get("scaling")
        return variable_length.attend(query, key, value, layout, is_causal, scale), None
    blocks, sizes = layout.blocks, layout.block_sizes
    if read is None:
        queries = _blocks(query, blocks, sizes, layout.groups)
    else:
        counts = [rows for rows, _ in layout.groups]
        queries = list(torch.split(pack(query[0].transpose(0, 1), read)[:, :, None], counts))
    if of_one_sequence:
        keys = _blocks(key, blocks, sizes, layout.groups)
        values = _blocks(value, blocks, sizes, layout.groups)
        explicit = original == "eager"
        masks = mask.group_masks(explicit) if read is None else mask.query_masks()
    elif mask.kind == "full" and key.shape[0] == layout.shape[0]:
        keys, values, masks = _other_sequence(key, value, mask)
    else:
        raise PaddingNotRemovableError(f"{type(module).__name__} attends to {tuple(key.shape)} keys")
    outputs = []
    for q, k, v, group_mask in zip(queries, keys, values, masks, strict=True):
        if original == "eager" and group_mask is not None:
            zero = torch.zeros((), dtype=q.dtype, device=q.device)
            group_mask = torch.where(group_mask, zero, torch.finfo(q.dtype).min)
        output = attend(module, q, k, v, group_mask, **(arguments | {"is_causal": is_causal}))[0]
        outputs.append(output.flatten(0, 1))
    joined = torch.cat(outputs)
    if read is not None:
        return unpack(joined, read, 1, layout.num_tokens), None
    if blocks is not None:
        joined = pack(joined, blocks)
    return joined[None], None


_attend_by_group: Any = torch.compiler.disable(_attend_packed)  # compiled, each batch would be a new program


def _read_queries(mask: PackedMask) -> torch.Tensor | None:
    """Return the packed positions of the only queries that a layer with this mask needs, or None for all."""
    forward = CURRENT.forward
    return forward.read_queries if forward is not None and forward.layout is mask.layout else None


def _blocks(
    states: torch.Tensor, blocks: torch.Tensor | None, sizes: list[int], groups: tuple[tuple[int, int], ...]
) -> list[torch.Tensor]:
    """Return (1, heads, tokens, size) as one (examples, heads, length, size) for each group.

    `split` has one concatenation as its backward pass, while slices would each fill a whole gradient.
    """
    tokens = states[0].transpose(0, 1)
    if blocks is not None:
        tokens = unpack(tokens, blocks, sum(sizes))
    return [
        part.unflatten(0, group).transpose(1, 2)
        for part, group in zip(torch.split(tokens, sizes), groups, strict=True)
    ]


def _padded_keys(states: torch.Tensor, layout: PaddingLayout) -> torch.Tensor:
    """Return (1, heads, tokens, size) as (batch, heads, length, size)."""
    return unpack(states[0].transpose(0, 1), layout.tokens, *layout.shape).transpose(1, 2)


def _other_sequence(
    key: torch.Tensor, value: torch.Tensor, mask: PackedMask
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor | None]]:
    """Return keys, values and masks for each group of queries, of a padded other sequence."""
    layout = mask.layout
    order = layout.rows
    counts = [rows for rows, _ in layout.groups]
    keys = torch.split(pack(key, order), counts)
    values = torch.split(pack(value, order), counts)
    if mask.keys is None:
        return list(keys), list(values), [None] * len(counts)
    masks = torch.split(mask.keys[order][:, None, None], counts)
    return list(keys), list(values), list(masks)


for _original, _ours in NAMES.items():
    AttentionInterface.register(_ours, partial(_attention, _original))
    AttentionMaskInterface.register(_ours, partial(_mask, _original))
