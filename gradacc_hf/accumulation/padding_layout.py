"""The order of the real tokens of a padded batch in a model that computes without padding.

A `PaddingLayout` is computed on the host from an attention mask of shape (batch, length). `pack` gathers the
real tokens of a padded tensor, and `unpack` puts them back. The packed tokens are ordered by groups: examples
of about one length, for which attention runs at once. A loader computes the layout beside training and hands
it over with `attach_layout`; `gradacc_hf.remove_padding` computes it otherwise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.accumulation.memory_model import LONGEST
from gradacc_hf.accumulation.splitting import Bound, Cost, split_window

# Cost of a group in pairs of tokens: the launches of a group take the time of `fixed` pairs.
GROUPS_ON_CPU = Cost(fixed=2_000.0, quadratic=1.0)
GROUPS_ON_GPU = Cost(fixed=500_000.0, quadratic=1.0)
_ATTACHED = "_gradacc_padding_layout"


@dataclass(frozen=True, eq=False)
class PaddingLayout:
    """The order of the real tokens of one padded batch.

    Attributes:
        shape: (batch, length) of the padded batch.
        side: Where the padding is: "right", "left", or "mixed". "row" stands for examples that a collate
            function has packed into one row of shape (1, tokens). The packed order is then the row's.
        groups: (examples, length of the longest) of each group, in packed order.
        rows: Row of each example in the padded batch, in the order of the groups.
        lengths: Real tokens of each example, in the order of the groups.
        tokens: Position in the flattened padded batch of each packed token.
        blocks: Position of each packed token in the concatenated groups, each padded to its longest example.
            None if the examples of each group have one length, so that no group has padding.
        offsets: Position of the first packed token of each example, and the number of tokens, in ascending
            order.
    """

    shape: tuple[int, int]
    side: str
    groups: tuple[tuple[int, int], ...]
    rows: torch.Tensor
    lengths: tuple[int, ...]
    tokens: torch.Tensor
    blocks: torch.Tensor | None
    offsets: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """The number of real tokens."""
        return len(self.tokens)

    @property
    def is_row(self) -> bool:
        """Whether the batch is one row of packed examples, without padding."""
        return self.side == "row"

    @property
    def block_sizes(self) -> list[int]:
        """The tokens of each group, with its padding."""
        return [rows * length for rows, length in self.groups]

    def read_positions(self, kind: str, labels: torch.Tensor) -> torch.Tensor | None:
        """Return the packed positions of tokens that a loss reads, or None for all tokens.

        Args:
            kind: "first" or "last" token of each example; "labelled" tokens, or the tokens "before labelled"
                ones.
            labels: Labels of the padded batch. Labels by token have shape (batch, length).
        """
        if kind in ("first", "last"):
            if self.is_row:
                return None
            return self.offsets[1:].long() - 1 if kind == "last" else self.offsets[:-1].long()
        if tuple(labels.shape) != self.shape:
            return None
        labelled = labels != IGNORED
        if kind == "before labelled":
            labelled = torch.nn.functional.pad(labelled[:, 1:], (0, 1))
        found = labelled.flatten()[self.tokens].nonzero()[:, 0]
        return found if len(found) else None

    def to(self, device: torch.device | str) -> "PaddingLayout":
        """Return the layout with its indices on a device."""
        if self.tokens.device == torch.device(device):
            return self
        indices = {name: getattr(self, name) for name in ("rows", "tokens", "blocks", "offsets")}
        moved = {n: None if t is None else t.to(device, non_blocking=True) for n, t in indices.items()}
        return replace(self, **moved)


def padding_layout(
    attention_mask: torch.Tensor | np.ndarray, cost: Cost | None = None
) -> PaddingLayout | None:
    """Return the layout of a batch, or None if it has no padding or an example without any real token.

    Args:
        attention_mask: Shape (batch, length), not 0 at real tokens. A mask on a GPU is copied to the host.
        cost: Cost of the attention of one group, in pairs of tokens. Default: by the device of the mask.
    """
    if cost is None:
        on_gpu = isinstance(attention_mask, torch.Tensor) and attention_mask.is_cuda
        cost = GROUPS_ON_GPU if on_gpu else GROUPS_ON_CPU
    device = attention_mask.device if isinstance(attention_mask, torch.Tensor) else "cpu"
    is_real: Any = attention_mask != 0
    real: np.ndarray = is_real.cpu().numpy() if isinstance(is_real, torch.Tensor) else is_real
    lengths = real.sum(1)
    if real.all() or not lengths.all():
        return None
    groups = split_window(lengths, Bound(max_tokens=LONGEST), cost=cost)[0]
    return _layout(real, lengths, groups).to(device)


def _layout(real: np.ndarray, lengths: np.ndarray, groups: Sequence[np.ndarray]) -> PaddingLayout:
    """Build the index arrays of these groups of rows."""
    rows = np.concatenate(groups)
    width = real.shape[1]
    row_of_token, column = np.nonzero(real[rows])
    tokens = rows[row_of_token] * width + column
    longest = np.array([lengths[group].max() for group in groups])
    blocks = None
    if any(lengths[group].min() < most for group, most in zip(groups, longest, strict=True)):
        row_lengths = lengths[rows]
        block_lengths = np.repeat(longest, [len(group) for group in groups])
        starts = np.cumsum(block_lengths) - block_lengths
        before = np.cumsum(row_lengths) - row_lengths
        blocks = torch.from_numpy(np.arange(len(tokens)) + np.repeat(starts - before, row_lengths))
    return PaddingLayout(
        shape=(real.shape[0], width),
        side=_side(real, lengths),
        groups=tuple((len(group), int(most)) for group, most in zip(groups, longest, strict=True)),
        rows=torch.from_numpy(rows),
        lengths=tuple(lengths[rows].tolist()),
        tokens=torch.from_numpy(tokens),
        blocks=blocks,
        offsets=_offsets(lengths[rows]),
    )


def row_layout(position_ids: torch.Tensor | np.ndarray, cost: Cost | None = None) -> PaddingLayout | None:
    """Return the layout of examples that are packed into one row, or None for a single example.

    Args:
        position_ids: Positions of the tokens, shape (1, tokens). They restart at each example. A tensor on a
            GPU is copied to the host.
        cost: As in `padding_layout`.
    """
    if cost is None:
        on_gpu = isinstance(position_ids, torch.Tensor) and position_ids.is_cuda
        cost = GROUPS_ON_GPU if on_gpu else GROUPS_ON_CPU
    device = position_ids.device if isinstance(position_ids, torch.Tensor) else "cpu"
    positions = (
        position_ids.cpu().numpy() if isinstance(position_ids, torch.Tensor) else np.asarray(position_ids)
    )[0]
    starts = np.concatenate([[0], np.flatnonzero(np.diff(positions) != 1) + 1])
    if len(starts) == 1:
        return None
    lengths = np.diff(np.append(starts, len(positions)))
    groups = split_window(lengths, Bound(max_tokens=LONGEST), cost=cost)[0]
    rows = np.concatenate(groups)
    longest = np.array([lengths[group].max() for group in groups])
    block_lengths = np.repeat(longest, [len(group) for group in groups])
    block_starts = np.empty_like(starts)
    block_starts[rows] = np.cumsum(block_lengths) - block_lengths
    tokens = np.arange(len(positions))
    return PaddingLayout(
        shape=(1, len(positions)),
        side="row",
        groups=tuple((len(group), int(most)) for group, most in zip(groups, longest, strict=True)),
        rows=torch.from_numpy(rows),
        lengths=tuple(lengths[rows].tolist()),
        tokens=torch.from_numpy(tokens),
        blocks=torch.from_numpy(tokens + np.repeat(block_starts - starts, lengths)),
        offsets=_offsets(lengths),
    ).to(device)


def _offsets(lengths: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def _side(real: np.ndarray, lengths: np.ndarray) -> str:
    first = np.arange(real.shape[1]) < lengths[:, None]
    if (real == first).all():
        return "right"
    return "left" if (real[:, ::-1] == first).all() else "mixed"


def layouts_of(batch: Mapping[str, Any], cost: Cost) -> dict[str, PaddingLayout]:
    """Return the layouts of a host batch, by the name of the attention mask.

    Targets without a mask have the layout under the name "labels", and packed examples under "position_ids".
    """
    if "attention_mask" not in batch and np.shape(batch.get("position_ids", ()))[:1] == (1,):
        layout = row_layout(batch["position_ids"], cost)
        return {} if layout is None else {"position_ids": layout}
    masks = {name: v for name, v in batch.items() if name.endswith("attention_mask") and v.ndim == 2}
    if "decoder_attention_mask" not in batch and _are_targets(batch.get("labels"), batch.get("input_ids")):
        masks["labels"] = target_mask(torch.as_tensor(batch["labels"]))
    found = {name: padding_layout(mask, cost) for name, mask in masks.items()}
    return {name: layout for name, layout in found.items() if layout is not None}


def _are_targets(labels: Any, inputs: Any) -> bool:
    """Whether labels are token numbers of a sequence of another length than the inputs."""
    shapes = [getattr(value, "shape", ()) for value in (labels, inputs)]
    return len(shapes[0]) == 2 and shapes[0] != shapes[1] and not torch.as_tensor(labels).is_floating_point()


def target_mask(labels: torch.Tensor) -> torch.Tensor:
    """Return the attention mask of targets (batch, length): 1 up to the last label of each row, then 0."""
    return (labels != IGNORED).long().flip(1).cummax(1).values.flip(1)


def attach_layout(mask: torch.Tensor, layout: PaddingLayout) -> None:
    """Hand a layout to the next forward with this mask, so that the forward does not wait for the device.

    Call it on the tensor that goes into the model, after the batch is on its device. A change of the tensor
    in place makes the layout void. A wrapper that copies inputs, such as DDP, drops the layout. The forward
    then computes the layout itself, with the same result, and waits for the device.

    Args:
        mask: The `attention_mask` or `decoder_attention_mask` of a batch. For targets without a mask, the
            `labels`, with the layout of `target_mask(labels)`. For packed examples, the `position_ids`.
        layout: The result of `padding_layout` or `row_layout`.
    """
    setattr(mask, _ATTACHED, (layout.to(mask.device), _version(mask)))


def attached_layout(mask: torch.Tensor) -> PaddingLayout | None:
    """Return the layout that a loader attached to a tensor, or None."""
    layout, version = getattr(mask, _ATTACHED, (None, None))
    if layout is None or version != _version(mask) or layout.shape != tuple(mask.shape):
        return None
    return layout


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def pack(padded: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return `padded[tokens]`: rows of a tensor at distinct positions."""
    return _Pack.apply(padded, tokens)


def unpack(packed: torch.Tensor, tokens: torch.Tensor, *shape: int) -> torch.Tensor:
    """Return a tensor of `shape` rows with `packed` at distinct flat positions, and zeros elsewhere."""
    return _Unpack.apply(packed, tokens, shape)


class _Pack(torch.autograd.Function):
    """`index_select`. As positions are distinct, the backward pass copies instead of adding up."""

    @staticmethod
    def forward(ctx: Any, padded: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens)
        ctx.size = len(padded)
        return padded.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _Unpack.apply(gradients[0], ctx.saved_tensors[0], (ctx.size,)), None


class _Unpack(torch.autograd.Function):
    """The inverse of `_Pack`."""

    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor, tokens: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        ctx.save_for_backward(tokens)
        ctx.dims = len(shape)
        padded = packed.new_zeros(*shape, *packed.shape[1:])  # not a view: FSDP2 warns of those
        padded.view(-1, *packed.shape[1:]).index_copy_(0, tokens, packed)
        return padded

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _Pack.apply(gradients[0].flatten(0, ctx.dims - 1), ctx.saved_tensors[0]), None, None
