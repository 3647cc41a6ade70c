"""Rows of micro-batches that show most about a loss: the most different ones, combined into one batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
import torch

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.accumulation.reference import EXACT

MOST_LABELS = 64
"""Different labels per token in a window above which the labels are a vocabulary, not classes."""
Mark = tuple[str, float]
USUAL_INPUTS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "pixel_values",
    "input_values",
)
MOST_MARKS = 32
"""Different numbers of an entry of a batch above which their signs are the marks."""


@dataclass(frozen=True, eq=False)
class Rows:
    """One or more rows of a micro-batch that stay together.

    Attributes:
        values: Values by name; the first dimension is the rows.
        shared: Values of the micro-batch that are not by row.
        labels: The different labels of the rows. Empty if labels are floats or a vocabulary.
        marks: What else may weigh the rows, from `marks_of`.
    """

    values: dict[str, Any]
    shared: dict[str, Any] = field(default_factory=dict)
    labels: frozenset[int] = frozenset()
    marks: frozenset[Mark] = frozenset()

    @property
    def batch(self) -> dict[str, Any]:
        """The rows as a micro-batch."""
        return {**self.shared, **self.values}

    @property
    def shapes(self) -> dict[str, Any]:
        """The shape of every value."""
        return {name: getattr(value, "shape", len(value)) for name, value in self.values.items()}


def label_keys(batch: Mapping[str, Any], label_names: Sequence[str]) -> list[str]:
    """Return the names of the integer labels in a batch; without a known name, of its integers by row."""
    integers = {
        name: value
        for name, value in batch.items()
        if isinstance(value, torch.Tensor) and value.ndim and not value.is_floating_point()
    }
    known = [name for name in dict.fromkeys([*label_names, "labels"]) if name in integers]
    spans = ("start_positions", "end_positions")
    if known or "start_positions" in batch:
        return [name for name in known if name not in spans]
    return [name for name, value in integers.items() if value.ndim == 1]


def labels_of(batch: Mapping[str, Any], names: Sequence[str]) -> set[int]:
    """Return the different labels of a batch, without the ignored label."""
    return {int(v) for name in names for v in torch.unique(batch[name]).tolist() if v != IGNORED}


def labels_of_window(
    batches: Sequence[Mapping[str, Any]], label_names: Sequence[str] = ()
) -> set[int] | None:
    """Return the different labels of the micro-batches of a window; None if they are a vocabulary."""
    names, found = label_keys(batches[0], label_names), set[int]()
    for batch in batches:
        found |= labels_of(batch, [name for name in names if name in batch])
    per_token = any(batches[0][name].ndim > 1 for name in names)
    return None if per_token and len(found) > MOST_LABELS else found


def marks_of(batch: Mapping[str, Any], label_names: Sequence[str] = ()) -> set[Mark]:
    """Return what may weigh rows besides integer labels, such as weights and masks, without usual inputs.

    A mark is the name of an entry of the batch, and a number of a row. Of many different numbers, it is the
    sign.
    """
    found: set[Mark] = set()
    labels = label_keys(batch, label_names)
    for entry, value in batch.items():
        if entry in USUAL_INPUTS or entry in labels:
            continue
        for name, numbers in _numbers(entry, value):
            marks = {(name, round(number, 4)) for number in numbers if number == number}
            if len(marks) > MOST_MARKS:
                marks = {(name, float(np.sign(number))) for _, number in marks}
            found |= marks
    return found


def _numbers(name: str, value: Any) -> Iterator[tuple[str, list[float]]]:
    """Yield names, and a number of each row: the value itself, or how many values count."""
    if isinstance(value, torch.Tensor) and value.ndim == 1:
        yield name, value.double().tolist()
    elif isinstance(value, torch.Tensor) and value.ndim:
        ignored = value == IGNORED
        yield name, ((value != 0) & (value == value) & ~ignored).flatten(1).sum(1).tolist()
        yield f"{name} ignored", ignored.flatten(1).sum(1).tolist()
    elif isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        for key in value[0] if value else ():  # such as the boxes of an image
            yield f"{name}.{key}", [_number(each.get(key)) for each in value]
    elif isinstance(value, list):
        yield name, [_number(each) for each in value]


def _number(value: Any) -> float:
    """Return a number itself, or the number of elements."""
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, torch.Tensor):
        return float(value) if value.ndim == 0 else value.numel()
    return len(value) if hasattr(value, "__len__") else 1


def num_rows(batch: Mapping[str, Any], names: Sequence[str] = ()) -> int:
    """Return the number of rows: the length of the labels, or of the first tensor; else 1."""
    values = [batch[name] for name in names] + list(batch.values())
    sizes = (len(value) for value in values if isinstance(value, torch.Tensor) and value.ndim)
    nested = (num_rows(value) for value in values if isinstance(value, Mapping))
    return next(chain(sizes, nested), 1)


def split_rows(batch: Mapping[str, Any], names: Sequence[str], pairs: bool = False) -> list[Rows]:
    """Split a micro-batch into single rows; or into pairs of a row and its counterpart in the second half."""
    rows = num_rows(batch, names)
    by_row = {name: value for name, value in batch.items() if _length(value) == rows}
    shared = {name: value for name, value in batch.items() if name not in by_row}
    half = rows // 2
    parts = [[i, i + half] for i in range(half)] if pairs else [[i] for i in range(rows)]
    found = []
    for part in parts:
        values = {name: _take(value, part) for name, value in by_row.items()}
        labels = labels_of(values, [name for name in names if name in values])
        found.append(Rows(values, shared, frozenset(labels), frozenset(marks_of(values, names))))
    return found


def _length(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return len(value) if value.ndim else -1
    return len(value) if isinstance(value, list) else -1


def _take(value: Any, part: list[int]) -> Any:
    return value[part] if isinstance(value, torch.Tensor) else [value[i] for i in part]


def row_of(batch: Mapping[str, Any], row: int, rows: int) -> dict[str, Any]:
    """Return a row of a batch of so many rows alone, with the padding of the batch."""
    return {name: _take(value, [row]) if _length(value) == rows else value for name, value in batch.items()}


Count = Callable[[Mapping[str, Any]], float]


def most_different(rows: Iterable[Rows], count: Count, known: Iterable[Any], most: int) -> list[Rows]:
    """Choose rows: the most and the fewest items, and as many new labels as possible.

    Args:
        rows: The rows to choose from. Rows without items are not chosen.
        count: Items of a batch.
        known: Labels and marks that need no row.
        most: Largest number of rows.
    """
    items = [(row, count(row.batch)) for row in rows]
    left = sorted((pair for pair in items if pair[1]), key=lambda pair: pair[1])
    chosen, new = [], set(known)
    while left and len(chosen) < most:
        gains = [len((row.labels | row.marks) - new) for row, _ in left]
        if max(gains) == 0 and len(chosen) >= min(4, most):
            break
        # Without a new label: the fewest items, then the most, in turns.
        position = gains.index(max(gains)) if max(gains) else -(len(chosen) % 2)
        row, _ = left.pop(position)
        chosen.append(row)
        new |= row.labels | row.marks
    return chosen


def tell_apart(chosen: list[Rows], rows: Iterable[Rows], count: Count, other: Count) -> list[Rows]:
    """Return the chosen rows, and one more if two counts have the same ratio in all of them.

    Args:
        chosen: Rows with items.
        rows: Rows to choose from, also rows without items.
        count: Items of a batch.
        other: Another count that applies to all rows.
    """
    ratio = other(chosen[0].batch) / count(chosen[0].batch)

    def is_off(row: Rows) -> bool:
        items = count(row.batch)
        return abs(other(row.batch) - ratio * items) > EXACT * max(items, 1)

    if any(is_off(row) for row in chosen):
        return chosen
    return chosen + list(islice(filter(is_off, rows), 1))


def groups_of_shapes(rows: Sequence[Rows], label_names: Sequence[str]) -> list[list[Rows]]:
    """Return groups of rows that combine into one batch: one group if attention masks mask the padding.

    Labels of different lengths combine.
    """
    if all("attention_mask" in row.values for row in rows):
        return [list(rows)] if rows else []
    groups = dict[str, list[Rows]]()
    for row in rows:
        longer = {name for name in label_names if getattr(row.values.get(name), "ndim", 1) > 1}
        shapes = {name: shape for name, shape in row.shapes.items() if name not in longer}
        groups.setdefault(str(shapes), []).append(row)
    return list(groups.values())


def variants(row: Rows, others: Sequence[Rows], label_names: Sequence[str]) -> list[Rows]:
    """Return copies of a row with other labels, for a row whose shape no other row has.

    Where labels are by token, the copies ignore a part of them. Otherwise they have the labels of other rows.
    """
    names = label_keys(row.batch, label_names)
    if by_token := [name for name in names if name in row.values and row.values[name].ndim > 1]:
        parts = ((0, 2), (1, 3))  # without the first half, without the last two thirds
        found = [{name: _ignored(row.values[name], *part) for name in by_token} for part in parts]
        return [_with(row, values, names) for values in found]
    floats = [n for n in dict.fromkeys([*label_names, "labels"]) if n in row.values and n not in names]
    found = list[Rows]()
    for other in others[:3]:
        values = {n: other.values[n] for n in (*names, *floats) if n in row.values and n in other.values}
        if values and all(value.shape == row.values[n].shape for n, value in values.items()):
            found.append(_with(row, values, names))
    return found


def relabelled(row: Rows, labels: Iterable[int], label_names: Sequence[str]) -> list[Rows]:
    """Return copies of a row whose last label is another one; none if labels are by row."""
    names = label_keys(row.batch, label_names)
    found = list[Rows]()
    for label in sorted(set(labels) - row.labels):
        copies = {name: row.values[name].clone() for name in names if row.values[name].ndim > 1}
        for copy in copies.values():
            if len(used := (copy != IGNORED).nonzero()):
                copy[tuple(used[-1])] = label
        found += [_with(row, copies, names)] if copies else []
    return found


def _ignored(labels: torch.Tensor, is_end: int, divisor: int) -> torch.Tensor:
    """Return labels by token without those before (0) or after (1) a share of the used labels."""
    used = (labels != IGNORED).nonzero()
    end = len(used) // divisor
    left, ignored = labels.clone(), used[end:] if is_end else used[:end]
    left[tuple(ignored.T)] = IGNORED
    return left


def _with(row: Rows, values: dict[str, Any], names: Sequence[str]) -> Rows:
    changed = {**row.values, **values}
    here = [name for name in names if name in changed]
    return Rows(changed, row.shared, frozenset(labels_of(changed, here)), frozenset(marks_of(changed, names)))


def combine(rows: Sequence[Rows], label_names: Sequence[str], pad_token_id: int) -> dict[str, Any]:
    """Return one batch of these rows. The first rows of all come first, then the second rows.

    Raises:
        ValueError: The rows have unequal shapes, and nothing masks the padding.
    """
    names = [name for name in rows[0].values if all(name in row.values for row in rows)]
    return {**rows[0].shared, **{name: _stack(rows, name, label_names, pad_token_id) for name in names}}


def _stack(rows: Sequence[Rows], name: str, label_names: Sequence[str], pad_token_id: int) -> Any:
    values = [row.values[name] for row in rows]
    if isinstance(values[0], list):
        return [value[i] for i in range(len(values[0])) for value in values]
    if len({value.shape for value in values}) > 1:
        values = _padded(rows, name, values, label_names, pad_token_id)
    return torch.stack(values, dim=1).flatten(0, 1)


def _padded(
    rows: Sequence[Rows], name: str, values: list[torch.Tensor], label_names: Sequence[str], pad_token_id: int
) -> list[torch.Tensor]:
    """Pad tensors to one shape, on the side where the attention masks of the rows are padded."""
    masks = [row.values.get("attention_mask") for row in rows]
    is_label = (name in label_names or name == "labels") and not values[0].is_floating_point()
    if (any(mask is None for mask in masks) and not is_label) or len({value.ndim for value in values}) > 1:
        raise ValueError(f"{name}: rows of unequal shape, and nothing masks the padding")
    left = any(bool((mask[..., 0] == 0).any()) for mask in masks if mask is not None)
    fill = IGNORED if is_label else pad_token_id if name.endswith("input_ids") else 0
    widest = [max(sizes) for sizes in zip(*(value.shape for value in values), strict=True)]
    found = []
    for value in values:
        padding: list[int] = []
        for size, width in zip(reversed(value.shape[1:]), reversed(widest[1:]), strict=True):
            padding += [width - size, 0] if left else [0, width - size]
        found.append(torch.nn.functional.pad(value, padding, value=fill))
    return found


def single(batch: Mapping[str, Any], row: int, rows: Sequence[Rows]) -> dict[str, Any]:
    """Return one of the combined rows alone, with the padding of `batch = combine(rows)`."""
    size, number = len(rows), _length(next(iter(rows[0].values.values())))
    part = [row + size * i for i in range(number)]
    names = [name for name in batch if name in rows[0].values]
    return {**batch, **{name: _take(batch[name], part) for name in names}}


def with_first_label(batch: Mapping[str, Any], label: torch.Tensor) -> dict[str, Any]:
    """Return the batch with this label at the first position of each row."""
    labels = batch["labels"].clone()
    labels[..., 0] = label
    return {**batch, "labels": labels}


def on_host(rows: Sequence[Rows]) -> list[Rows]:
    """Return the rows with tensors on the host."""

    def move(values: dict[str, Any]) -> dict[str, Any]:
        return {k: v.detach().cpu() if isinstance(v, torch.Tensor) else v for k, v in values.items()}

    shared = {id(row.shared): row.shared for row in rows}
    shared = {key: move(values) for key, values in shared.items()}  # once for all rows of a micro-batch
    return [Rows(move(row.values), shared[id(row.shared)], row.labels, row.marks) for row in rows]


def micro_batches_as_rows(
    micro_batches: Iterable[Mapping[str, Any]], names: Sequence[str], pairs: bool
) -> Iterator[Rows]:
    """Yield the rows of all micro-batches."""
    for batch in micro_batches:
        yield from split_rows(batch, [name for name in names if name in batch], pairs)
