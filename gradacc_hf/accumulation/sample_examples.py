"""Examples of a data set that show most about a loss, for the preflight check."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from gradacc_hf.accumulation.collation import LocalWindows, MicroBatch
from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.accumulation.probe_rows import (
    MOST_LABELS,
    Mark,
    Rows,
    label_keys,
    labels_of,
    marks_of,
    most_different,
    tell_apart,
)

READ, MOST_READ = 64, 512
"""Examples to choose from: reading ends after so many without a new label, and after so many in all."""


def read_alone(windows: LocalWindows) -> tuple[list[MicroBatch], int | None]:
    """Read examples of the first windows that have items, each as a micro-batch.

    Reading ends after 64 examples without a new label, or after 512 if all have one label.

    Args:
        windows: The windows (`LocalWindows`), from the first on.

    Returns:
        The examples, and the length to which they are padded, or None.
    """
    found, pad_to, labels, latest, read = list[MicroBatch](), None, set[int](), 0, 0
    for number in windows.plan.walk(0, 0):
        split = windows.split(*number)
        if found and split.pad_to != pad_to:
            break  # padded to the longest example of another window
        pad_to = split.pad_to
        for index in split.indices:
            example = windows.collate(np.array([index]), 0, pad_to)
            if not example.num_items:
                continue
            read += 1
            if new := labels_by_row(example) - labels:
                labels, latest = labels | new, read
            if new or read <= READ:
                found.append(example)
            if read >= (MOST_READ if len(labels) == 1 else min(latest + READ, MOST_READ)):
                return found, pad_to
        if found and not isinstance(windows.tokens, np.ndarray):
            break  # a stream keeps only the examples of one window
    return found, pad_to


def labels_by_row(example: MicroBatch) -> set[int]:
    """Return the labels of an example, without labels by token."""
    names = [name for name in label_keys(example.batch, ()) if example.batch[name].ndim == 1]
    return labels_of(example.batch, names)


def count_labels(examples: Sequence[MicroBatch]) -> list[Counter[int]]:
    """Return how often each label occurs in each example; nothing if the labels are a vocabulary."""
    names = label_keys(examples[0].batch, ())
    found = [
        Counter(int(v) for name in names for v in example.batch[name].flatten().tolist() if v != IGNORED)
        for example in examples
    ]
    by_token = any(examples[0].batch[name].ndim > 1 for name in names)
    is_vocabulary = by_token and len(set().union(*found)) > MOST_LABELS
    return [Counter[int]() for _ in examples] if is_vocabulary else found


def different_examples(examples: Sequence[MicroBatch], most: int) -> list[MicroBatch]:
    """Choose examples with different labels, item counts and lengths; always a short and a long one.

    Where possible, no label has the same share of the items in all of them, so that its weight shows.
    """
    sizes = [
        (sum(v.numel() for v in each.batch.values() if isinstance(v, torch.Tensor)), each.num_items)
        for each in examples  # rows of one length differ by their items
    ]
    labels = count_labels(examples)
    rows = [
        Rows({"example": each, "counted": counted}, {}, frozenset(counted), frozenset(marks_of(each.batch)))
        for each, counted in zip(examples, labels, strict=True)
    ]
    chosen = [rows[i] for i in dict.fromkeys((sizes.index(min(sizes)), sizes.index(max(sizes))))]
    rest = [row for row in rows if row not in chosen]
    known = frozenset[int | Mark]().union(*(row.labels | row.marks for row in chosen))
    chosen += most_different(rest, _items, known, most - len(chosen))
    apart = list[Rows]()
    for label in sorted(set().union(*labels)):
        found = tell_apart([*chosen, *apart], rest, _items, partial(_items_of_label, label=label))
        apart += found[len(chosen) + len(apart) :]
    chosen = [*chosen[: max(2, most - len(apart))], *apart]
    return [row.values["example"] for row in chosen[:most]]


def _items(row: Mapping[str, Any]) -> int:
    return row["example"].num_items


def _items_of_label(row: Mapping[str, Any], label: int) -> int:
    return row["counted"][label]
