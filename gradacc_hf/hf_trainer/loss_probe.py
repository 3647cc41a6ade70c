"""Determine the items that the loss of a Trainer is a mean over. The answer may be: cannot tell.

`LossProbe` compares the loss of a few rows in one batch with their single losses (`loss_questions.py`). Item
counts remain possible until they differ for a micro-batch. Labels count as alike once a sample has compared
them. A window with a new label, or with counts that differ for the first time, is therefore probed again.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from gradacc_hf.accumulation.loss_items import CountItems
from gradacc_hf.accumulation.probe_rows import (
    MOST_MARKS,
    Mark,
    Rows,
    groups_of_shapes,
    label_keys,
    labels_of_window,
    marks_of,
    micro_batches_as_rows,
    most_different,
    num_rows,
    on_host,
    relabelled,
    tell_apart,
    variants,
)
from gradacc_hf.accumulation.reference import EXACT
from gradacc_hf.hf_trainer.item_counts import can_count, candidate_counts
from gradacc_hf.hf_trainer.loss_questions import Answer, Losses, LossKind, Questions, Result, cannot_tell

MOST_ROWS = 16
"""Rows of a sample: at most 4 micro-batches, or one of 2 to 8 rows if labels are by token."""
MOST_KNOWN = 64
"""Labels that were compared, above which new labels open no question."""


@dataclass
class LossProbe:
    """The state of knowledge about the loss of a Trainer.

    Args:
        num_items: The item count, if the user gives it.
        label_names: Names of the labels in a batch.
        config: Config of the model, or None.
    """

    num_items: str | CountItems | None
    label_names: Sequence[str] = ()
    config: Any = None
    kind: LossKind | None = None
    known: set[int | Mark] = field(default_factory=set)
    """Labels and marks that a sample has compared with each other."""

    def __post_init__(self) -> None:
        self.counts = candidate_counts(self.num_items, self.label_names, self.config)
        self._names = [*self.label_names, "labels"]
        self._found_names = ["labels"]  # names of the labels that the latest window has
        self._reference: list[Rows] = []  # rows of the latest deciding sample
        self._tracks_labels = True
        self._weighed = set[int]()  # labels with the weight of the others
        self._windows = self._epoch = 0
        self._is_scheduled = False
        self._wait = self._gap = 0  # windows until the next probe of an open question
        self._is_closed = False  # the loss is not a mean, which no further window changes

    # ---- each window: is there a question? ----

    def asks(self, micro_batches: Sequence[Mapping[str, Any]], epoch: int = 0) -> bool:
        """Whether these micro-batches of a window open a question that earlier windows did not answer.

        Windows 4, 32, 256 … and the first of epochs 1, 2, 4, 8 … are probed in any case, as a loss may change
        in training.
        """
        self._windows += 1
        starts, self._epoch = epoch != self._epoch and not epoch & (epoch - 1), epoch
        self._is_scheduled = starts or self._windows in (4 * 8**power for power in range(12))
        if self._is_closed:
            return False
        if self._wait:
            self._wait -= 1
            return False
        if self.kind is None or not self.kind.is_conclusive or self._is_scheduled:
            return True
        labels, new_marks = self._labels(micro_batches), self._marks(micro_batches) - self.known
        # With one label alone, a window is exact for every weight of the label.
        new_labels = labels - self.known if len(labels | _labels_of(self._reference)) > 1 else ()
        return bool(new_labels or new_marks or self.differs(micro_batches))

    def differs(self, micro_batches: Sequence[Mapping[str, Any]]) -> str:
        """Return the name of a count that fits so far, and differs for a micro-batch; "" if none does."""
        if self.kind is None or not self.kind.is_conclusive:
            return ""
        return next((name for batch in micro_batches if (name := self._differs(batch))), "")

    def leave_open(self, name: str) -> Answer:
        """Return the line for a count that differs in the window, although no sample separates it."""
        assert self.kind is not None
        kind, self.kind = self.kind, replace(self.kind, is_conclusive=False)
        self._back_off()
        why = f"the items may be {kind.count!r} or {name or next(iter(kind.others))!r}"
        return cannot_tell(kind, why, self._found_names)

    def stop(self) -> None:
        """Ask nothing more."""
        self._is_closed = True

    def _back_off(self) -> None:
        self._gap = max(1, 2 * self._gap)  # ask again after 1 window, then 2, 4, …
        self._wait = self._gap - 1

    def _labels(self, micro_batches: Sequence[Mapping[str, Any]]) -> set[int]:
        """Return the different labels of the window; none if they are a vocabulary."""
        found = labels_of_window(micro_batches, self.label_names) if self._tracks_labels else set()
        self._tracks_labels &= found is not None and len(self.known) <= MOST_KNOWN
        return found or set()

    def _marks(self, micro_batches: Sequence[Mapping[str, Any]]) -> set[Mark]:
        """Return what else may weigh rows of the window; nothing of an entry with many known numbers."""
        found = set[Mark]().union(*(marks_of(batch, self.label_names) for batch in micro_batches))
        known = Counter(mark[0] for mark in self.known if isinstance(mark, tuple))
        return {mark for mark in found if known[mark[0]] < MOST_MARKS}

    def _differs(self, batch: Mapping[str, Any]) -> str:
        """Return the name of a count that fits so far, and differs for a micro-batch."""
        assert self.kind is not None
        if not self.kind.others or not can_count(self.counts[self.kind.count], batch):
            return ""
        items = self.counts[self.kind.count](batch)
        off = (
            name
            for name, ratio in self.kind.others.items()
            if can_count(self.counts[name], batch)
            and abs(self.counts[name](batch) - ratio * items) > EXACT * max(items, 1)
        )
        return next(off, "")

    def rows(self, micro_batches: Sequence[Mapping[str, Any]], pairs: bool = False) -> list[Rows]:
        """Return the rows of these micro-batches that decide most, on the host."""
        self._labels(micro_batches)
        names = self._found_names = label_keys(micro_batches[0], self.label_names)
        per_token = any(micro_batches[0][name].ndim > 1 for name in names)
        size = max(num_rows(batch, names) for batch in micro_batches)
        most = min(8, max(2, size)) if per_token or not names else min(MOST_ROWS, max(4, 4 * size))
        found = micro_batches_as_rows(micro_batches, names if self._tracks_labels else [], pairs)
        return on_host(self.choose(list(found), most))

    def choose(self, rows: Sequence[Rows], most: int) -> list[Rows]:
        """Return about `most` rows that decide most, such as of the rows of all processes.

        All of them combine into one batch.
        """
        possible = [c for c in self.counts.values() if rows and all(can_count(c, row.batch) for row in rows)]
        if self.kind is not None and self.counts[self.kind.count] in possible:
            possible.insert(0, self.counts[self.kind.count])
        count, *others = possible or [lambda batch: 1]
        labels = {known for known in self.known | _labels_of(rows) if isinstance(known, int)}
        found = list[Rows]()
        for group in groups_of_shapes(rows, self._names):
            chosen = most_different(group, count, self.known, most)
            more = list(group)
            if len(group) < len(rows):  # rows of other shapes may differ in what these have in common
                more += chain(*(variants(row, (), self._names) for row in chosen))
                more += relabelled(chosen[0], labels, self._names) if chosen else []
            for other in others if chosen else ():
                chosen = tell_apart(chosen, more, count, other)
            found = max(found, chosen, key=len)
        if len(with_items := [row for row in found if count(row.batch)]) == 1:
            found += variants(with_items[0], [row for row in rows if row is not with_items[0]], self._names)
            found += chain(*(variants(row, with_items, self._names) for row in found if not count(row.batch)))
        return found

    def learn(
        self,
        rows: Sequence[Rows],
        losses: Losses,
        in_pairs: Callable[[], Sequence[Rows]],
        whole: Mapping[str, Any],
    ) -> Answer | None:
        """Probe the loss with a sample of rows. Return what is new, or None.

        Args:
            rows: Rows from `rows`, of all processes.
            losses: Computes losses.
            in_pairs: Returns rows from `rows(pairs=True)`, for a loss that fails for single rows.
            whole: A micro-batch, for a loss that fails for pairs of rows, too.
        """
        counts, before = self.counts, self.kind
        if not rows:  # no row has items
            usual = "labels" if "labels" in self.counts else next(iter(self.counts))
            self.kind = before or LossKind(usual, is_conclusive=False)
            return None
        if before is not None and before.is_conclusive:
            rows = groups_of_shapes([*rows, *self._reference], self._names)[0]
            alike = len(_labels_of(rows)) < 2 and len({row.marks for row in rows}) < 2
            if alike and not self._is_scheduled and not self.differs([row.batch for row in rows]):
                return None  # with one label, a window is exact for every weight of the label
            counts = {name: self.counts[name] for name in (before.count, *before.others)}
        result = self._ask(rows, counts, losses)
        if result.fails_alone and (pairs := in_pairs()):
            result = self._ask(pairs, counts, losses)
        if result.fails_alone:  # such as images whose pixels are not by row
            result = self._ask([Rows({}, dict(whole))], counts, losses)
        self._is_closed = result.answer.exact == "no"
        self.known |= result.labels
        if result.answer.exact == "yes":
            self.known |= frozenset[Mark]().union(*(row.marks for row in rows))
        self.counts |= result.counts
        self._weighed |= result.weighed
        if result.answer.exact == "cannot tell":
            self._back_off()
        elif result.labels or not self._reference:
            self._reference = _of_different_labels(rows)
        if before is None or result.kind.is_conclusive or not before.is_conclusive:
            self.kind = result.kind
        return result.answer

    def _ask(self, rows: Sequence[Rows], counts: Mapping[str, CountItems], losses: Losses) -> Result:
        pad_token_id = getattr(self.config, "pad_token_id", None) or 0
        return Questions(rows, counts, losses, self._names, pad_token_id, self._weighed).ask()


def _labels_of(rows: Sequence[Rows]) -> frozenset[int]:
    return frozenset().union(*(row.labels for row in rows))


def _of_different_labels(rows: Sequence[Rows]) -> list[Rows]:
    """Return two rows, with different labels if possible."""
    other = next((row for row in rows[1:] if row.labels != rows[0].labels), None)
    return [rows[0], other] if other is not None else list(rows[:2])
