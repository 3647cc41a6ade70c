"""The possible item counts of the loss of a Trainer, by name."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from gradacc_hf.accumulation.loss_items import COUNTS, IGNORED, CountItems, resolve
from gradacc_hf.accumulation.probe_rows import num_rows

USUAL_IGNORED = (255, -1)
"""Labels besides −100 that losses often ignore: in segmentation, and in older code."""


def candidate_counts(
    num_items: str | CountItems | None, label_names: Sequence[str] = (), config: Any = None
) -> dict[str, CountItems]:
    """Return the possible item counts by name, the most likely first; only `num_items` if it is given.

    Args:
        num_items: "labels", "next_token", a function from a batch to a number, or None.
        label_names: Names of the labels in a batch.
        config: Config of the model. It may name further ignored labels.
    """
    if num_items is not None:
        return {num_items if isinstance(num_items, str) else "num_items": resolve(num_items)}
    counts: dict[str, CountItems] = {"shift_labels": partial(count_other, name="shift_labels"), **COUNTS}
    others = [name for name in label_names if name not in ("labels", "start_positions", "end_positions")]
    counts |= {name: partial(count_other, name=name) for name in others}
    counts["examples"] = count_examples
    named = ("semantic_loss_ignore_index", "ignore_index", "label_pad_token_id", "pad_token_id")
    ignored = [getattr(config, name, None) for name in named]
    for value in dict.fromkeys([*ignored, *USUAL_IGNORED]):
        if isinstance(value, int) and value != IGNORED:
            for name in ("labels", *others):
                counts[f"{name} other than {value}"] = partial(count_other, name=name, ignored=value)
            counts[f"next_token other than {value}"] = partial(
                count_other, name="labels", ignored=value, first=1
            )
    return counts


def count_other(batch: Mapping[str, Any], name: str, ignored: int = IGNORED, first: int = 0) -> int:
    """Count the integer labels of this name that are neither −100 nor `ignored`, from a position on."""
    labels = batch[name]
    if labels.is_floating_point() or (first and labels.ndim < 2):
        raise ValueError(f"{name}: no labels per position")
    labels = labels[..., first:]
    return int(((labels != IGNORED) & (labels != ignored)).sum())


def count_twice(batch: Mapping[str, Any], count: CountItems, names: Sequence[str], label: int) -> float:
    """Return the items of a count, where those with a label count twice."""
    return count(batch) + sum(int((batch[name] == label).sum()) for name in names)


def count_examples(batch: Mapping[str, Any]) -> int:
    """Return the number of rows of a batch."""
    return num_rows(batch)


def can_count(count: CountItems, batch: Mapping[str, Any]) -> bool:
    """Whether an item count applies to this batch."""
    try:
        return count(batch) >= 0
    except (KeyError, ValueError, IndexError, TypeError, AttributeError, RuntimeError):
        return False
