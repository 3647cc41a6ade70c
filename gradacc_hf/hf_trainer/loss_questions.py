"""The questions about a loss that a sample of rows answers: yes, no, or cannot tell.

Whether the loss uses the number of items that Trainer passes, the items of the mean, and whether all labels
count alike.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isclose, nan
from typing import Any, Literal, Protocol

import numpy as np
import torch

from gradacc_hf.accumulation.loss_items import IGNORED, CountItems
from gradacc_hf.accumulation.loss_samples import LOSS_RTOL_FP32, LossSample
from gradacc_hf.accumulation.oom import out_of_memory
from gradacc_hf.accumulation.probe_rows import Rows, combine, single, with_first_label
from gradacc_hf.accumulation.reference import EXACT
from gradacc_hf.hf_trainer.item_counts import can_count

HALVING_RTOL = 1e-6
"""Largest relative difference between a loss and twice its half. A division by twice the number is exact."""
COUNT_RTOL = 1e-3
"""Largest relative difference between a count of items and the divisor of a sum."""
SET_NUM_ITEMS = (
    "If it is a mean over other items, set num_items= to 'labels', 'next_token' or a function of the batch"
)


class Losses(Protocol):
    """Computes losses of micro-batches without dropout, the same in all processes."""

    counted: bool
    """Whether Trainer passes `num_items_in_batch`."""
    num_processes: int
    rtol: float
    """Largest relative difference between losses that is rounding."""

    def __call__(self, batch: Mapping[str, Any], number: float | None, seed: int = 0) -> float:
        """Return the loss that `compute_loss` gives for this number of items."""
        ...

    def across_processes(self, batch: Mapping[str, Any], number: float) -> float:
        """Return the loss with the factor of processes, if the loss has one."""
        ...

    def without_zeros(self) -> AbstractContextManager[Any]:
        """Set parameters that are all 0, as in a new head, to small numbers in the block."""
        ...


@dataclass(frozen=True)
class LossKind:
    """The kind of loss that `compute_loss` returns, as found by a probe.

    Attributes:
        count: Name of the item count of the mean.
        is_conclusive: Whether the losses could decide. If not, a later window is probed.
        is_sum: Whether the loss is a sum over items, divided by `num_items_in_batch`.
        uses_number: Whether the loss depends on `num_items_in_batch`.
        times_processes: Whether a sum is multiplied by the number of processes, as Trainer expects.
        others: Item counts that fit as well, and their ratio to `count` in the sample.
    """

    count: str
    is_conclusive: bool
    is_sum: bool = False
    uses_number: bool = False
    times_processes: bool = False
    others: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.is_sum:
            return f"a sum over items (counted as {self.count!r}), divided by num_items_in_batch"
        number = "uses" if self.uses_number else "does not use"
        return f"a mean over items (counted as {self.count!r}), and {number} num_items_in_batch"


@dataclass(frozen=True)
class Answer:
    """One line about a loss.

    Attributes:
        exact: Whether accumulation is exact.
        text: The line.
    """

    exact: Literal["yes", "no", "cannot tell"]
    text: str


@dataclass(frozen=True)
class Result:
    """The answers of a sample.

    Attributes:
        kind: The kind of loss.
        labels: Labels that the sample compared with each other.
        answer: A line about the loss.
        fails_alone: Whether single rows have no loss. They may belong together in pairs.
    """

    kind: LossKind
    labels: frozenset[int]
    answer: Answer
    fails_alone: bool = False


class Questions:
    """Ask what kind of loss a sample of rows shows.

    Args:
        rows: The rows, of one shape or with masked padding.
        counts: The possible item counts by name, the most likely first.
        losses: Computes losses.
        label_names: Names of the labels in a batch.
        pad_token_id: Fills `input_ids` behind shorter rows.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        counts: Mapping[str, CountItems],
        losses: Losses,
        label_names: Sequence[str],
        pad_token_id: int,
    ):
        self.rows, self.losses = rows, losses
        self.batch = combine(rows, label_names, pad_token_id)
        self.is_split = bool(rows[0].values)
        self.parts = [single(self.batch, i, rows) if self.is_split else self.batch for i in range(len(rows))]
        repeated = [replace(rows[0], values={k: self.parts[0][k] for k in rows[0].values if k in self.batch})]
        self.repeated = combine(repeated * len(rows), label_names, pad_token_id)
        names = [name for name, count in counts.items() if can_count(count, self.batch)]
        self.items = {name: np.array([counts[name](part) for part in self.parts], float) for name in names}
        self.number = float(counts[names[0]](self.batch)) or 1.0
        self.totals = {name: float(counts[name](self.batch)) for name in names}

    def ask(self) -> Result:
        """Return what the sample shows."""
        try:
            return self._answer()
        except Exception as error:  # a loss that needs more than these rows, such as pairs of them
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
            kind = self._kind(next(iter(self.items)), nan)
            result = self._cannot_tell(kind, f"it fails for single rows ({type(error).__name__})")
            return replace(result, fails_alone=True)

    def _answer(self) -> Result:
        counted, number = self.losses.counted, self.number
        once = self.losses(self.batch, number if counted else None)
        twice = self.losses(self.batch, 2 * number) if counted else once
        divided = 2 * (once - twice)  # sum / number, where the loss is sum / number + rest
        again = self.losses(self.batch, number) if counted else once
        noise = 4 * abs(again - once)  # of sums in an undefined order, on a GPU
        if abs(divided) > max(HALVING_RTOL * abs(once), 2 * noise):
            return self._of_sum(once, divided)
        if not self.is_split:
            kind = self._kind(self._unshifted[0], once)
            return self._cannot_tell(kind, "the rows of a micro-batch cannot be separated")
        return self._of_mean(once)

    # ---- a loss that divides by num_items_in_batch ----

    def _of_sum(self, once: float, divided: float) -> Result:
        rest = once - divided
        is_sum = bool(once) and abs(rest) <= HALVING_RTOL * abs(once)
        try:
            mean = self.losses(self.batch, None)
        except Exception:  # a loss that needs the number
            mean = nan
        mean = nan if mean == rest else mean
        times_processes = self._times_processes(once)
        divisor = self.number * divided / (mean - rest)
        totals, processes = {name: self.totals[name] for name in self._unshifted}, self.losses.num_processes
        off = {name: abs(total / divisor - 1) for name, total in totals.items()}
        each = {name: abs(total * processes / divisor - 1) for name, total in totals.items()}
        if min(off.values()) > COUNT_RTOL >= min(each.values()):
            off, times_processes = each, True  # the loss includes the factor of processes
        nearest = min(off.values())
        fits = [name for name in off if not off[name] > max(2 * nearest, LOSS_RTOL_FP32 / 10)]
        others = {} if np.isnan(mean) else dict.fromkeys(fits[1:], 1.0)
        known = {"is_sum": is_sum, "uses_number": True, "times_processes": times_processes, "others": others}
        kind = self._kind(fits[0], once, **known)
        if not kind.is_conclusive:
            return self._cannot_tell(kind, f"it is {once}")
        if off[kind.count] > COUNT_RTOL:
            return self._no(kind)
        alone = np.array([self.losses(part, self.number) for part in self.parts])
        halves = np.array([self.losses(part, 2 * self.number) for part in self.parts])
        sums, rests = 2 * (alone - halves), 2 * halves - alone
        items = self.items[kind.count]
        off_sum = abs(np.nansum(sums) - divided)
        off_rest = abs(np.nansum(rests * items) / items.sum() - rest) if not is_sum and items.sum() else 0.0
        if max(off_sum, off_rest) > self.losses.rtol * abs(once):
            return self._no(kind)
        return self._yes(kind, self._labels)

    def _times_processes(self, once: float) -> bool:
        if self.losses.num_processes == 1:
            return False
        return not isclose(
            self.losses.across_processes(self.batch, self.number), once, rel_tol=LOSS_RTOL_FP32
        )

    # ---- a mean over the micro-batch ----

    def _of_mean(self, once: float) -> Result:
        sample = self._sample(once)
        if not sample.is_usable:
            result = self._cannot_tell(self._kind(self._unshifted[0], once), f"it is {once}")
            return replace(result, fails_alone=not np.isfinite(sample.alone).any())
        if self._decides(sample):
            return self._of_sample(sample)
        with self.losses.without_zeros():
            return self._of_sample(self._sample(self._loss(self.batch)))

    def _of_sample(self, sample: LossSample) -> Result:
        fits = [name for name in self._unshifted if sample.fits(self.items[name])]
        if not fits:
            usual = [name for name in self._unshifted if "other than" not in name]
            nearest = min(usual, key=lambda name: sample.deviation(self.items[name]))
            kind = self._kind(nearest, sample.together)
            first = self._loss(self.parts[0])
            if np.isfinite(first) and self._loss(self.parts[0], seed=1) != first:
                return self._cannot_tell(kind, "it draws random numbers")
            return self._no(kind)
        items = self.items[fits[0]]
        others = {name: float(self.items[name].sum() / items.sum()) for name in fits[1:]}
        kind = self._kind(fits[0], sample.together, others=others)
        if not self._decides(sample):
            kind = replace(kind, is_conclusive=False)
            return self._cannot_tell(kind, f"the losses of {len(self.rows)} examples are all alike")
        if tied := [
            name for name, ratio in kind.others.items() if not self._proportional(name, items, ratio)
        ]:
            kind = replace(kind, is_conclusive=False)
            return self._cannot_tell(kind, f"the items may be {kind.count!r} or {tied[0]!r}")
        return self._of_labels(kind, sample, items) if len(self._labels) > 1 else self._yes(kind, frozenset())

    def _of_labels(self, kind: LossKind, sample: LossSample, items: np.ndarray) -> Result:
        """Compare the weights of labels: a label whose weight would not show, in a pair of rows."""
        hidden = frozenset()
        if all(len(row.labels) <= 1 for row in self.rows):  # else labels by token, which every row mixes
            hidden = frozenset(sample.hidden_labels(items, [row.labels for row in self.rows]))
        for label in sorted(hidden):
            pair, counts = self._pair(label, sample, items)
            if not pair.fits(counts):
                return self._no(kind)
            if pair.decides(counts):
                hidden -= {label}
        if hidden:
            text = f"a weight of label {min(hidden)} would not show"
            return self._cannot_tell(kind, text, self._labels - hidden)
        return self._yes(kind, self._labels)

    def _pair(self, label: int, sample: LossSample, items: np.ndarray) -> tuple[LossSample, np.ndarray]:
        """Compare a row of this label with the row whose loss differs most. Return sample and items."""
        row = next(i for i, each in enumerate(self.rows) if label in each.labels)
        both = [row, sample.partner(row, items)]
        names = [name for name in self.rows[0].values if name in self.batch]
        rows = [Rows({n: self.parts[i][n] for n in names}, self.rows[0].shared) for i in both]
        return sample.pair(*both, together=self._loss(combine(rows, (), 0))), items[both]

    def _loss(self, batch: Mapping[str, Any], seed: int = 0) -> float:
        try:
            return self.losses(batch, None, seed)
        except Exception:  # a loss that needs the number of items, and does not divide by it
            return self.losses(batch, self.number, seed)

    def _sample(self, together: float) -> LossSample:
        alone = np.array([self._loss(part) for part in self.parts])
        return LossSample(alone, together, self._loss(self.repeated), self.losses.rtol)

    def _decides(self, sample: LossSample) -> bool:
        return len(self.rows) == 1 or any(sample.decides(items) for items in self.items.values())

    def _proportional(self, name: str, items: np.ndarray, ratio: float) -> bool:
        return bool((abs(self.items[name] - ratio * items) <= EXACT * np.maximum(items, 1)).all())

    @cached_property
    def _labels(self) -> frozenset[int]:
        return frozenset().union(*(row.labels for row in self.rows))

    @cached_property
    def _unshifted(self) -> list[str]:
        """Names of the counts that apply: not "labels" if the head shifts labels, else not "next_token"."""
        labels, names = self.batch.get("labels"), list(self.items)
        if not isinstance(labels, torch.Tensor) or labels.ndim < 2 or labels.is_floating_point():
            return [name for name in names if name != "next_token"] or names
        used = labels[labels != IGNORED]
        if not used.numel() or used.min() == used.max():
            return names
        ends = [with_first_label(self.batch, label) for label in (used.min(), used.max())]
        shifts = self._loss(ends[0]) == self._loss(ends[1])  # the first label has no effect
        wrong = "labels" if shifts else "next_token"
        return [name for name in names if not name.startswith(wrong)] or names

    # ---- answers ----

    def _kind(self, count: str, once: float, **known: Any) -> LossKind:
        return LossKind(count, is_conclusive=bool(once and np.isfinite(once)), **known)

    def _yes(self, kind: LossKind, labels: frozenset[int]) -> Result:
        return Result(kind, labels, Answer("yes", f"the loss of a micro-batch is {kind}"))

    def _no(self, kind: LossKind) -> Result:
        text = (
            f"the loss of a micro-batch is not a mean over its items, counted as {kind.count!r}: "
            f"accumulation is not exact. {SET_NUM_ITEMS}"
        )
        return Result(kind, self._labels, Answer("no", text))

    def _cannot_tell(self, kind: LossKind, why: str, labels: frozenset[int] = frozenset()) -> Result:
        text = (
            "cannot tell whether the loss of a micro-batch is a mean over its items, counted as "
            f"{kind.count!r}: {why}. Accumulation may not be exact. {SET_NUM_ITEMS}"
        )
        return Result(kind, labels, Answer("cannot tell", text))


def same_shapes(rows: Sequence[Rows]) -> list[Rows]:
    """Return the rows that combine into one batch: all, or those like the first if nothing masks padding."""
    try:
        combine(rows, (), 0)
        return list(rows)
    except (ValueError, RuntimeError, IndexError):
        return [row for row in rows if row.shapes == rows[0].shapes]
