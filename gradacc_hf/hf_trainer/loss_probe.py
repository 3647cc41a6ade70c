"""Micro-batches to ask a loss with, what it is a mean over; and what there is to choose from.

Takes collated batches as they come to a Trainer, cuts and changes them; running the loss on them is
`trainer.py`'s.
"""

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

import torch

from gradacc_hf.accumulation.loss_items import COUNTS, IGNORED, CountItems, resolve


def counts_to_choose_from(num_items: str | CountItems | None) -> dict[str, CountItems]:
    """The counts to choose from, by name."""
    if num_items is not None:
        return {num_items if isinstance(num_items, str) else "num_items": resolve(num_items)}
    return {
        "shift_labels": lambda batch: int((batch["shift_labels"] != IGNORED).sum()),
        **COUNTS,
        "examples": count_examples,
    }


def count_examples(batch: Mapping[str, Any]) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim)


def counts_in(count: CountItems, batch: Mapping[str, Any]) -> bool:
    try:
        return count(batch) >= 0
    except (KeyError, ValueError, IndexError, TypeError, AttributeError, RuntimeError):
        return False


def parts_of(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two parts of a batch and both together, which tell means over labels from means over rows.

    The first rows and the rest; but if all rows have equally many labels, a row, and the same with half of
    its labels ignored.
    """
    rows, labels = count_examples(batch), batch.get("labels")
    is_rows = {k for k, v in batch.items() if isinstance(v, torch.Tensor | list) and _len(v) == rows}
    if isinstance(labels, torch.Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        counts = (labels != IGNORED).sum(1)
        if len(counts.unique()) == 1 and int(counts[0]) > 1:
            one = {k: v[:1] if k in is_rows else v for k, v in batch.items()}
            there = (one["labels"][0] != IGNORED).nonzero().flatten()
            fewer = {**one, "labels": one["labels"].clone()}
            fewer["labels"][0, there[len(there) // 2 :]] = IGNORED
            both = {k: _together(v, fewer[k]) if k in is_rows else v for k, v in one.items()}
            return [one, fewer, both]
    cuts = (slice(0, max(1, rows // 2)), slice(rows // 2, rows))
    parts = [{k: v[cut] if k in is_rows else v for k, v in batch.items()} for cut in cuts]
    return [*parts, dict(batch)]


def _len(value: Any) -> int:
    return len(value) if isinstance(value, list) or value.ndim else -1


def _together(one: Any, other: Any) -> Any:
    return one + other if isinstance(one, list) else torch.cat([one, other])


def with_first_label(batch: Mapping[str, Any], label: torch.Tensor) -> dict[str, Any]:
    """The batch with this label at each first position."""
    labels = batch["labels"].clone()
    labels[..., 0] = label
    return {**batch, "labels": labels}


def off_mean(parts: Sequence[Mapping[str, Any]], losses: Sequence[float], count: CountItems) -> float:
    """How far the loss of two parts together is from the mean of theirs over these items, relative."""
    if not parts:
        return nan
    weighed = [(count(part), loss) for part, loss in zip(parts[:2], losses[:2], strict=True)]
    items = sum(items for items, _ in weighed)
    mean = sum(items * loss for items, loss in weighed if items) / items if items else nan
    return abs(mean - losses[2]) / (abs(losses[2]) or 1)
