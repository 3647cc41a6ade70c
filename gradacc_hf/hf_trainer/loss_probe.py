"""Micro-batches that reveal what a loss is a mean over, and the possible item counts.

The functions split and change collated batches, as a Trainer gets them. `trainer.py` computes the loss of the
results.
"""

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

import torch

from gradacc_hf.accumulation.loss_items import COUNTS, IGNORED, CountItems, resolve


def candidate_counts(num_items: str | CountItems | None) -> dict[str, CountItems]:
    """Return the possible item counts by name; only `num_items` if it is given."""
    if num_items is not None:
        return {num_items if isinstance(num_items, str) else "num_items": resolve(num_items)}
    return {
        "shift_labels": lambda batch: int((batch["shift_labels"] != IGNORED).sum()),
        **COUNTS,
        "examples": count_examples,
    }


def count_examples(batch: Mapping[str, Any]) -> int:
    """Return the number of rows of a batch."""
    return next(len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim)


def can_count(count: CountItems, batch: Mapping[str, Any]) -> bool:
    """Whether an item count applies to this batch."""
    try:
        return count(batch) >= 0
    except (KeyError, ValueError, IndexError, TypeError, AttributeError, RuntimeError):
        return False


def split_to_probe(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return two parts of a batch and both together, to distinguish means over labels from means over rows.

    The parts are the first half of the rows and the rest. If all rows have the same number of labels, the
    parts are one row, and the same row with half of the labels ignored.
    """
    rows, labels = count_examples(batch), batch.get("labels")
    by_row = {k for k, v in batch.items() if isinstance(v, torch.Tensor | list) and _num_rows(v) == rows}
    if isinstance(labels, torch.Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        counts = (labels != IGNORED).sum(1)
        if len(counts.unique()) == 1 and int(counts[0]) > 1:
            one = {k: v[:1] if k in by_row else v for k, v in batch.items()}
            labelled = (one["labels"][0] != IGNORED).nonzero().flatten()
            fewer = {**one, "labels": one["labels"].clone()}
            fewer["labels"][0, labelled[len(labelled) // 2 :]] = IGNORED
            both = {k: _concatenate(v, fewer[k]) if k in by_row else v for k, v in one.items()}
            return [one, fewer, both]
    halves = (slice(0, max(1, rows // 2)), slice(rows // 2, rows))
    parts = [{k: v[half] if k in by_row else v for k, v in batch.items()} for half in halves]
    return [*parts, dict(batch)]


def _num_rows(value: Any) -> int:
    return len(value) if isinstance(value, list) or value.ndim else -1


def _concatenate(one: Any, other: Any) -> Any:
    return one + other if isinstance(one, list) else torch.cat([one, other])


def with_first_label(batch: Mapping[str, Any], label: torch.Tensor) -> dict[str, Any]:
    """Return the batch with this label at the first position of each row."""
    labels = batch["labels"].clone()
    labels[..., 0] = label
    return {**batch, "labels": labels}


def deviation_from_mean(
    parts: Sequence[Mapping[str, Any]], losses: Sequence[float], count: CountItems
) -> float:
    """Return the relative difference between the loss of two parts together and the mean of their losses.

    Args:
        parts: the result of `split_to_probe`; without parts the result is NaN.
        losses: the loss of each part.
        count: the item count that weights the mean.
    """
    if not parts:
        return nan
    weighted = [(count(part), loss) for part, loss in zip(parts[:2], losses[:2], strict=True)]
    items = sum(items for items, _ in weighted)
    mean = sum(items * loss for items, loss in weighted if items) / items if items else nan
    return abs(mean - losses[2]) / (abs(losses[2]) or 1)
