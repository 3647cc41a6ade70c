"""The questions about a loss that a sample of rows answers: yes, no, or cannot tell.

Whether the loss uses the number of items that Trainer passes, the items of the mean, and whether all labels
count alike.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import isclose, nan
from typing import Any, Literal, Protocol

import numpy as np
import torch

from gradacc_hf.accumulation.loss_items import IGNORED, CountItems
from gradacc_hf.accumulation.loss_samples import LOSS_RTOL_FP32, LossSample
from gradacc_hf.accumulation.oom import out_of_memory
from gradacc_hf.accumulation.probe_rows import Rows, combine, label_keys, single, with_first_label
from gradacc_hf.accumulation.reference import EXACT
from gradacc_hf.hf_trainer.item_counts import can_count, count_twice

HALVING_RTOL = 1e-6
"""Largest relative difference between a loss and twice its half. A division by twice the number is exact."""
COUNT_RTOL = 1e-3
"""Largest relative difference between a count of items and the divisor of a sum."""


class Losses(Protocol):
    """Computes losses of micro-batches without dropout, the same in all processes."""

    counted: bool
    """Whether Trainer passes `num_items_in_batch`."""
    num_processes: int

    @property
    def rtol(self) -> float:
        """Largest relative difference between losses that is rounding."""
        ...

    @property
    def doubt(self) -> str:
        """The reason why these losses may differ from the losses in training; "" if there is none."""
        ...

    def __call__(self, batch: Mapping[str, Any], number: float | None, seed: int = 0) -> float:
        """Return the loss that `compute_loss` gives for this number of items."""
        ...

    def across_processes(self, batch: Mapping[str, Any], number: float) -> float:
        """Return the loss with the factor of processes, if the loss has one."""
        ...

    def without_zeros(self) -> AbstractContextManager[Any]:
        """Set parameters that are all 0, as in a new head, to small numbers in the block."""
        ...

    def gradient_error(
        self, batch: Mapping[str, Any], parts: Sequence[tuple[float, Mapping[str, Any]]], number: float | None
    ) -> float | None:
        """Return the relative error of the sum of weight × gradient of the parts; None if unknown."""
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
        counts: New item counts among the others of `kind`.
        weighed: Labels with the weight of the others.
    """

    kind: LossKind
    labels: frozenset[int]
    answer: Answer
    fails_alone: bool = False
    counts: dict[str, CountItems] = field(default_factory=dict)
    weighed: frozenset[int] = frozenset()


class _LossFails(Exception):
    """The loss cannot be computed for a batch."""


class Questions:
    """Ask what kind of loss a sample of rows shows.

    Args:
        rows: The rows, of one shape or with masked padding.
        counts: The possible item counts by name, the most likely first.
        losses: Computes losses.
        label_names: Names of the labels in a batch.
        pad_token_id: Fills `input_ids` behind shorter rows.
        weighed: Labels whose weight needs no check.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        counts: Mapping[str, CountItems],
        losses: Losses,
        label_names: Sequence[str],
        pad_token_id: int,
        weighed: Collection[int] = (),
    ):
        self.weighed = frozenset(weighed)
        self.rows, self.counts, self.losses = rows, counts, losses
        self._number_of_mean: float | None = None  # for a mean that needs `num_items_in_batch`
        self.batch = combine(rows, label_names, pad_token_id)
        self.label_names = label_keys(self.batch, label_names)
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
            result = self._answer()
            if result.answer.exact == "yes" and (doubt := self.losses.doubt):
                kind = replace(result.kind, is_conclusive=False)
                return replace(result, kind=kind, answer=cannot_tell(kind, doubt, self.label_names))
            return result
        except _LossFails as error:  # a loss that needs more than these rows, such as pairs of them
            kind = self._kind(next(iter(self.items)), nan)
            result = self._cannot_tell(kind, f"it fails for single rows ({error})")
            return replace(result, fails_alone=True)

    def _answer(self) -> Result:
        counted, number = self.losses.counted, self.number
        once = self._compute(self.batch, number if counted else None)
        twice = self._compute(self.batch, 2 * number) if counted else once
        divided = 2 * (once - twice)  # sum / number, where the loss is sum / number + rest
        again = self._compute(self.batch, number) if counted else once
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
            mean = self._compute(self.batch, None)
        except _LossFails:  # a loss that needs the number
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
        alone = np.array([self._compute(part, self.number) for part in self.parts])
        halves = np.array([self._compute(part, 2 * self.number) for part in self.parts])
        sums, rests = 2 * (alone - halves), 2 * halves - alone
        items = self.items[kind.count]
        off_sum = abs(np.nansum(sums) - divided)
        off_rest = abs(np.nansum(rests * items) / items.sum() - rest) if not is_sum and items.sum() else 0.0
        if max(off_sum, off_rest) > max(self.losses.rtol, HALVING_RTOL) * abs(once):
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
        usual = [name for name in self._unshifted if " than " not in name and " twice" not in name]
        usual = usual or self._unshifted
        nearest = min(usual, key=lambda name: sample.deviation(self.items[name]))
        fits = [name for name in self._unshifted if sample.fits(self.items[name])]
        if not fits and sample.deviation(self.items[nearest]) <= LOSS_RTOL_FP32:
            # Such as a mean that adds 1e-8 to its divisor.
            error = self._gradient_error(nearest)
            fits = [nearest] if error is not None and error <= EXACT else []
        if not fits:
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
            name for name, ratio in kind.others.items() if not _proportional(self.items[name], items, ratio)
        ]:
            kind = replace(kind, is_conclusive=False)
            return self._cannot_tell(kind, f"the items may be {kind.count!r} or {tied[0]!r}")
        error = self._gradient_error(kind.count)
        if error is not None and error > EXACT:
            return self._no(kind)
        if self._padding_changes(sample):
            return self._no(kind, "padding changes it, so micro-batches of other lengths have other losses")
        return self._of_labels(kind, sample, items)

    def _padding_changes(self, sample: LossSample) -> bool:
        """Whether the row with the most padding has another loss without padding."""
        mask = self.batch.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or len(mask) != len(self.parts):
            return False
        row = int(mask.sum(1).argmin())
        real = mask[row] != 0
        if real.all() or not real.any():
            return False
        part = self.parts[row]
        labels = [part[name] for name in self.label_names if _has_columns(part[name], mask)]
        if any(bool((value[:, ~real] != IGNORED).any()) for value in labels):
            return False  # labels of another sequence, such as of a decoder
        short = {
            name: value[:, real] if _has_columns(value, mask) and not name.startswith("decoder_") else value
            for name, value in part.items()
        }
        try:
            loss = self._loss(short)
        except _LossFails:  # an input that depends on the padded length
            return False
        return not isclose(loss, sample.alone[row], rel_tol=max(sample.tolerance, LOSS_RTOL_FP32))

    def _gradient_error(self, name: str) -> float | None:
        """Return the relative error of the gradient from single rows weighted by items; None if unknown."""
        weights = self.items[name] / self.items[name].sum()
        weighted = [(weight, part) for weight, part in zip(weights, self.parts, strict=True) if weight]
        return self.losses.gradient_error(self.batch, weighted, self._number_of_mean)

    def _of_labels(self, kind: LossKind, sample: LossSample, items: np.ndarray) -> Result:
        """Check for each label whether the losses would show a double weight of the label.

        Where all rows have the same share of the label, the weight has no effect. It remains a possible count
        of items until a micro-batch has another share.
        """
        hidden, possible, counts = set[int](), dict(kind.others), dict[str, CountItems]()
        weighed = set[int]()
        for label in sorted(self._labels - self.weighed):
            if not self._counts(kind.count, label):
                continue
            twice = partial(count_twice, count=self.counts[kind.count], names=self.label_names, label=label)
            doubled = np.array([twice(part) for part in self.parts], float)
            ratio = float(doubled.sum() / items.sum())
            if _proportional(doubled, items, ratio):
                name = f"{kind.count} with label {label} twice"
                possible[name], counts[name] = ratio, twice
            elif sample.separates(items, doubled):
                weighed.add(label)
            else:
                hidden.add(label)
        kind = replace(kind, others=possible)
        if hidden:
            text = f"a weight of label {min(hidden)} would not show"
            result = self._cannot_tell(kind, text, self._labels - hidden)
        else:
            result = self._yes(kind, self._labels if len(self._labels) > 1 else frozenset())
        return replace(result, counts=counts, weighed=frozenset(weighed))

    def _counts(self, name: str, label: int) -> bool:
        """Whether a count counts this label."""
        labels = {n: torch.full_like(self.batch[n], label) for n in self.label_names}
        return bool(self.counts[name]({**self.batch, **labels}))

    def _compute(self, batch: Mapping[str, Any], number: float | None, seed: int = 0) -> float:
        try:
            return self.losses(batch, number, seed)
        except Exception as error:
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
            raise _LossFails(type(error).__name__) from error

    def _loss(self, batch: Mapping[str, Any], seed: int = 0) -> float:
        if self._number_of_mean is None:
            try:
                return self._compute(batch, None, seed)
            except _LossFails:  # a loss that needs the number of items, and does not divide by it
                loss = self._compute(batch, self.number, seed)
                self._number_of_mean = self.number
                return loss
        return self._compute(batch, self._number_of_mean, seed)

    def _sample(self, together: float) -> LossSample:
        alone = np.array([self._loss(part) for part in self.parts])
        return LossSample(alone, together, self._loss(self.repeated), self.losses.rtol)

    def _decides(self, sample: LossSample) -> bool:
        return any(sample.decides(items) for items in self.items.values())

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
        first = (used.min(), used.max(), torch.tensor(IGNORED))
        try:
            losses = {self._loss(with_first_label(self.batch, label)) for label in first}
        except _LossFails:  # it reads −100 as a label
            losses = set[float]()
        shifts = len(losses) == 1  # the first label has no effect
        wrong = "labels" if shifts else "next_token"
        return [name for name in names if not name.startswith(wrong)] or names

    # ---- answers ----

    def _kind(self, count: str, once: float, **known: Any) -> LossKind:
        return LossKind(count, is_conclusive=bool(once and np.isfinite(once)), **known)

    def _yes(self, kind: LossKind, labels: frozenset[int]) -> Result:
        return Result(kind, labels, Answer("yes", f"the loss of a micro-batch is {kind}"))

    def _no(self, kind: LossKind, why: str = "") -> Result:
        text = (
            f"the loss of a micro-batch is not a mean over its items, counted as {kind.count!r}: "
            f"accumulation is not exact. {set_num_items(self.label_names)}"
        )
        if why:
            text = f"the loss of a micro-batch is not exact in accumulation: {why}"
        return Result(kind, self._labels, Answer("no", text))

    def _cannot_tell(self, kind: LossKind, why: str, labels: frozenset[int] = frozenset()) -> Result:
        return Result(kind, labels, cannot_tell(kind, why, self.label_names))


def set_num_items(label_names: Sequence[str]) -> str:
    """Return the advice for a loss with other items, with the names of labels that the batch has."""
    allowed = "a function of the batch"
    if "labels" in label_names:
        allowed = f"'labels', 'next_token' or {allowed}"
    elif label_names:
        allowed += f", such as lambda batch: int((batch[{label_names[0]!r}] != -100).sum())"
    return f"If it is a mean over other items, such as with class weights, set num_items= to {allowed}"


def cannot_tell(kind: LossKind, why: str, label_names: Sequence[str]) -> Answer:
    """Return the line for a sample that cannot decide."""
    text = (
        "cannot tell whether the loss of a micro-batch is a mean over its items, counted as "
        f"{kind.count!r}: {why}. Accumulation may not be exact. {set_num_items(label_names)}"
    )
    return Answer("cannot tell", text)


def _has_columns(value: Any, mask: torch.Tensor) -> bool:
    """Whether the second dimension of a value is the tokens of the mask."""
    return isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[1] == mask.shape[1]


def _proportional(items: np.ndarray, others: np.ndarray, ratio: float) -> bool:
    return bool((abs(items - ratio * others) <= EXACT * np.maximum(others, 1)).all())
