"""The examples on which a model is checked with and without padding.

The sample has up to four examples of a batch, with two lengths or more and two examples of one length. Rows
are shortened where the batch has no such rows.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.accumulation.padding_layout import row_layout
from gradacc_hf.errors import InputError

ROWS = 4  # examples of the sample


def make_sample(batch: Mapping[str, Any], pad_token_id: int | None) -> dict[str, Any]:
    """Return a small batch that can decide: two lengths or more, and two examples of one length.

    Raises:
        InputError: There is no attention mask, or the examples are shorter than four tokens.
    """
    mask = batch.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 3):
        raise InputError("batch: no attention_mask of shape (batch, length); pass a padded batch")
    real = (mask != 0).reshape(len(mask), -1, mask.shape[-1]).any(1)
    lengths = real.sum(1).cpu().numpy()
    if lengths.max() < 4:
        raise InputError(f"batch: the longest example has {lengths.max()} tokens; allowed: 4 or more")
    order = np.argsort(-lengths, kind="stable")
    rows = order[np.linspace(0, len(order) - 1, min(ROWS, max(2, len(order)))).round().astype(int)]
    sample = {
        name: value[torch.as_tensor(rows, device=value.device)].clone()
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == len(mask)
        else value
        for name, value in batch.items()
    }
    targets = _sample_lengths(lengths[rows].tolist())
    for row, target in enumerate(targets):
        _shorten(sample, row, target, pad_token_id)
    if int((sample["attention_mask"] != 0).sum()) == mask.shape[-1]:  # such a batch stays padded
        for row, target in enumerate(targets):
            _shorten(sample, row, max(1, target - 1), pad_token_id)
    return sample


def with_gaps_in_labels(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample in which every second labelled token of a row has no label.

    If all tokens had labels, tokens before a label and tokens with a label would be the same. The loss would
    read almost all of them.
    """
    labels, mask = sample.get("labels"), sample["attention_mask"]
    if not isinstance(labels, torch.Tensor) or labels.shape != mask.shape or labels.is_floating_point():
        return dict(sample)
    labelled = labels != IGNORED
    return {**sample, "labels": labels.masked_fill(labelled & (labelled.cumsum(-1) % 2 == 0), IGNORED)}


def is_row_of_examples(batch: Mapping[str, Any]) -> bool:
    """Whether a collate function has packed the examples of a batch into one row."""
    positions = batch.get("position_ids")
    if batch.get("attention_mask") is not None or not isinstance(positions, torch.Tensor):
        return False
    return positions.ndim == 2 and len(positions) == 1 and row_layout(positions) is not None


def padded_batch(row: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the examples of a packed row as a padded batch of input ids, mask and labels."""
    starts = (row["position_ids"][0].diff() != 1).nonzero()[:, 0] + 1
    sizes = torch.tensor([0, *starts.tolist(), row["position_ids"].shape[1]]).diff().tolist()
    mask = [torch.ones(size, dtype=torch.long, device=starts.device) for size in sizes]
    columns = {"input_ids": (row["input_ids"][0].split(sizes), 0), "attention_mask": (mask, 0)}
    if isinstance(row.get("labels"), torch.Tensor) and row["labels"].shape == row["input_ids"].shape:
        columns["labels"] = row["labels"][0].split(sizes), IGNORED
    pad = torch.nn.utils.rnn.pad_sequence
    return {name: pad(list(parts), True, fill) for name, (parts, fill) in columns.items()}


def packed_row(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the examples of a padded batch in one row, with positions that restart at each example.

    The first token of an example has the label −100, as no token before it predicts it.
    """
    real = batch["attention_mask"] != 0
    positions = real.long().cumsum(1) - 1
    columns = {"input_ids": batch["input_ids"], "position_ids": positions}
    if "labels" in batch:
        columns["labels"] = batch["labels"].masked_fill(positions == 0, IGNORED)
    return {**{name: value[real][None] for name, value in columns.items()}, "use_cache": False}


def _sample_lengths(lengths: list[int]) -> list[int]:
    """Return lengths in descending order. Two differ, and two are equal if there are three."""
    targets = list(lengths)
    if targets[0] == targets[-1]:
        targets[-1] = max(2, targets[0] // 2)
    if len(targets) > 2 and len(set(targets)) == len(targets):
        targets[1] = targets[2]
    return targets


def _shorten(sample: dict[str, Any], row: int, target: int, pad_token_id: int | None) -> None:
    """Turn the last real tokens of a row into padding; with padding on the left, the first.

    The token at the end stays: it may be the separator that a head looks for.
    """
    mask = sample["attention_mask"]
    choices = mask[row].reshape(-1, mask.shape[-1])
    for choice, choice_mask in enumerate(choices):
        columns = torch.nonzero(choice_mask)[:, 0]
        if len(columns) <= target:
            continue
        on_left = bool(choice_mask[-1] != 0) and not bool(choice_mask[0] != 0)
        gone = columns[:-target] if on_left else columns[target:]
        old_end, new_end = (columns[0], columns[-target]) if on_left else (columns[-1], columns[target - 1])
        for name, value in sample.items():
            if not isinstance(value, torch.Tensor) or value.shape[: mask.ndim] != mask.shape:
                continue
            part = value[row] if mask.ndim == 2 else value[row, choice]
            if name == "input_ids":
                part[new_end] = part[old_end].clone()
                part[gone] = pad_token_id or 0
            elif name == "attention_mask":
                part[gone] = 0
            elif not value.is_floating_point() and (name == "labels" or bool((value == IGNORED).any())):
                part[gone] = IGNORED
        for name in ("start_positions", "end_positions"):
            if isinstance(sample.get(name), torch.Tensor) and not on_left:
                sample[name][row].clamp_(max=int(columns[target - 1]))
