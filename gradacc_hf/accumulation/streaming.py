"""The windows of a stream: examples that come one after the other, in unknown number.

To `collation.py` a `Stream` is the plan (as in `sampler.py`), the data set and its lengths in one. It holds
the examples of the current window, and what it has read ahead. An example's index is its place in the stream.

The order of an epoch is a *block shuffle*: the stream is split into blocks of `buffer_size` examples, each of
which is permuted as (seed, epoch, block) draw it; window t is a slice of that order and may reach over
several blocks. So windows depend on the stream, the seed, the effective batch size and the buffer size alone,
and what is held are the window and at most two blocks. A buffer that holds the whole stream gives the windows
of a data set with a length.
"""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice, takewhile
from typing import Any

import numpy as np
import torch

from gradacc_hf.accumulation.sampler import EffectiveBatchSize, check_seed, size_asked

BUFFER_SIZE = 1000  # examples; as of datasets
Measure = Callable[[Sequence[Any]], np.ndarray]
END = object()
LENGTH_UNKNOWN = "the length of a stream is unknown until it has been read to its end"


def is_stream(dataset: Any) -> bool:
    """Whether a data set can be iterated and has no length."""
    if isinstance(dataset, torch.utils.data.IterableDataset):  # which has a __getitem__ that raises
        return True
    return hasattr(dataset, "__iter__") and not hasattr(dataset, "__len__")


class Stream:
    """The windows of every epoch of a stream, to be walked through in order, and the examples they need.

    measure: examples → their tokens (examples, columns). `check` is told the tokens of each block as it is
    read, and the index of its first example.
    """

    def __init__(
        self,
        dataset: Iterable[Any],
        effective_batch_size: EffectiveBatchSize,
        seed: int,
        shuffle: bool,
        drop_last: bool,
        buffer_size: int,
        measure: Measure,
    ):
        check_seed(seed)
        self.dataset, self.effective_batch_size, self.seed = dataset, effective_batch_size, seed
        self.shuffle, self.drop_last, self.buffer_size = shuffle, drop_last, buffer_size
        self.keeps = False  # what has been read, to be looked up when its window has gone by
        self.check: Callable[[np.ndarray, int], None] = lambda tokens, first: None
        self._measure = measure
        self._begin(0, number=0)

    # What WindowPlan does

    @property
    def num_examples(self) -> int:
        """In the epoch at hand. Raises TypeError before its end."""
        if self._num_examples is None:
            raise TypeError(LENGTH_UNKNOWN)
        return self._num_examples

    def num_windows(self, epoch: int) -> int:
        """Raises TypeError before the end of this epoch, and when it has gone by."""
        if epoch != self.epoch or self._num_examples is None:
            raise TypeError(LENGTH_UNKNOWN)
        return self._num_windows()

    def count_windows(self, epochs: Iterable[int]) -> int | None:
        """Return None: the length is unknown."""
        return None

    def dropped(self, epoch: int) -> int:
        """Examples that `drop_last` is known to leave out of this epoch."""
        if epoch != self.epoch or self._num_examples is None or not self.drop_last:
            return 0
        return self._num_examples - self._start(self._num_windows())

    def is_over(self, epoch: int, window: int) -> bool:
        """Whether the end of this epoch is known and lies before this window."""
        if epoch != self.epoch:
            return epoch < self.epoch
        return self._num_examples is not None and window >= self._num_windows()

    def walk(self, epoch: int, start: int) -> Iterator[tuple[int, int]]:
        """Yield the windows of an epoch from `start` on, with their examples; free those of earlier ones."""
        self._go_to(epoch, start)
        for window in count(start):
            if self.epoch != epoch:  # another walk has moved on
                return
            self._let_go_before(window)
            if not self._reaches(window):
                return
            yield epoch, window

    def ahead(self, epoch: int, window: int, most: int) -> list[tuple[int, int]]:
        """Of the next windows those that are at hand, to judge splits by; at least one is read."""
        if epoch < self.epoch or (epoch == self.epoch and not self._reaches(window)):
            epoch, window = epoch + 1, 0
        if epoch != self.epoch:
            self._go_to(epoch, window)
        there = [window] if self._reaches(window) else []
        there += takewhile(self._is_held, range(window + 1, window + most))
        return [(epoch, number) for number in there]

    def indices(self, epoch: int, window: int) -> np.ndarray:
        """Example indices of this window, over all processes. Raises ValueError for one that has gone by."""
        if epoch > self.epoch:
            self._go_to(epoch, window)
        if epoch < self.epoch or window < min(self._starts):
            raise ValueError(f"window {window} of epoch {epoch} has gone by: a stream is read forward only")
        if not self._reaches(window):
            raise ValueError(f"the stream has no window {window} in epoch {epoch}")
        places = range(self._start(window), min(self._start(window + 1), self._until))
        size = self.buffer_size
        return np.array([self._blocks[place // size].order[place % size] for place in places])

    def apart(self, epoch: int, window: int) -> "Stream":
        """Return a stream with its own reader, from this window on; it shares what this one holds."""
        other = copy.copy(self)
        other._blocks, other._marks, other._starts = dict(self._blocks), dict(self._marks), dict(self._starts)
        other._reader = None
        other._go_to(epoch, window)
        return other

    def number(self, epoch: int, window: int) -> int:
        """This window's number, over the whole run."""
        return (self._first_number(epoch) or 0) + window

    def size_asked(self, epoch: int, window: int) -> int:
        """Examples that this window would have if the stream did not end within it."""
        return size_asked(self.effective_batch_size, self.number(epoch, window))

    def resized(self, epoch: int, window: int) -> "Stream":
        """This stream, as sizes have changed from this window on."""
        if epoch == self.epoch:
            self._starts = {number: start for number, start in self._starts.items() if number <= window}
        return self

    def place(self, epoch: int, window: int) -> dict[str, Any]:
        """What tells the way to a window beside its numbers and the seed, as plain data."""
        if epoch == self.epoch:
            number, start = self._number, self._start(window)
        else:
            number, start = self._first_number(epoch), 0
        mark = self._marks.get(start // self.buffer_size) if epoch == self.epoch else None
        return {
            "stream": {"buffer_size": self.buffer_size, "number": number, "examples": start, "mark": mark}
        }

    def at(self, state: Mapping[str, Any]) -> "Stream":
        """Go to where a loader's `state_dict()` was taken. Raises ValueError where it is of other data."""
        place = state.get("stream")
        if place is None:
            raise ValueError(
                "the state is that of a data set with a length, and this is a stream: other data?"
            )
        if place["buffer_size"] != self.buffer_size:
            raise ValueError(
                f"buffer_size is {self.buffer_size}, and the state was taken with {place['buffer_size']}: "
                "windows depend on it, give the same"
            )
        self.seed = state["seed"]
        self._begin(state["epoch"], place["number"])
        self._starts, block = {state["window"]: place["examples"]}, place["examples"] // self.buffer_size
        self._until = block * self.buffer_size
        if place["mark"] is not None:
            self._marks[block] = place["mark"]
        return self

    # What a data set and its lengths do

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Examples at hand; copies, as a collate function may change what it is given."""
        found = (self._block_of(index).examples[index % self.buffer_size] for index in indices)
        return [dict(example) if isinstance(example, dict) else example for example in found]

    @property
    def tokens(self) -> "Held":
        """Of the examples at hand, (examples, columns)."""
        size = self.buffer_size
        return Held(lambda found: np.stack([self._block_of(i).tokens[i % size] for i in found.tolist()]))

    @property
    def held_examples(self) -> dict[int, int]:
        """Examples in memory, by block of `buffer_size` examples."""
        return {block: len(held.examples) for block, held in self._blocks.items()}

    def _block_of(self, index: int) -> "_Block":
        if index // self.buffer_size not in self._blocks:
            raise ValueError(f"example {index} is not at hand: a stream is read forward only")
        return self._blocks[index // self.buffer_size]

    # Reading

    def _begin(self, epoch: int, number: int | None) -> None:
        """At the start of an epoch whose first window is the run's `number`, of which nothing is read."""
        self.epoch, self._number = epoch, number
        self._starts = {0: 0}  # window → examples of the epoch's order before it
        self._marks: dict[int, Any] = {0: None}  # block → what takes a reader there
        self._blocks: dict[int, _Block] = {}
        self._until = 0  # examples of the epoch in these blocks, and before them
        self._reader: _Reader | None = None  # of what comes after them
        self._num_examples: int | None = None  # of this epoch, where its end has been seen

    def _go_to(self, epoch: int, window: int) -> None:
        if epoch != self.epoch or window < min(self._starts):
            self._begin(epoch, self._first_number(epoch))

    def _reaches(self, window: int) -> bool:
        """Read until this window is at hand; False where the epoch ends before it."""
        while self._num_examples is None and self._until < self._start(window + 1):
            self._read_block()
        return self._is_held(window)

    def _is_held(self, window: int) -> bool:
        start, stop = self._start(window), self._start(window + 1)
        is_partial = start < self._until < stop and self._num_examples is not None
        return stop <= self._until or (is_partial and not self.drop_last)

    def _read_block(self) -> None:
        first, block = self._until, self._until // self.buffer_size
        if self._reader is None:
            marked = max(known for known in self._marks if known <= block)
            self._reader = _Reader(self.dataset, self.epoch, marked * self.buffer_size, self._marks[marked])
            self._reader.skip(first - self._reader.at)
        if examples := self._reader.read(self.buffer_size):
            order = np.arange(first, first + len(examples))
            if self.shuffle:
                np.random.default_rng([self.seed, self.epoch, block]).shuffle(order)
            self._blocks[block] = _Block(examples, tokens := self._measure(examples), order)
            self.check(tokens, first)
            self._until = self._reader.at
            if self._reader.mark is not None:
                self._marks[block + 1] = self._reader.mark
        if not self._reader.has_more:
            self._ended(self._reader.at)

    def _ended(self, num_examples: int) -> None:
        self._num_examples, self._reader = num_examples, None
        if not num_examples:
            raise ValueError(
                f"the stream gave no examples in epoch {self.epoch}: it must give the same examples each "
                "time it is iterated over"
            )
        window, start = min(self._starts.items())
        if 0 < num_examples <= start:
            raise ValueError(
                f"the stream ended after {num_examples} examples, before window {window} of epoch "
                f"{self.epoch}: other data?"
            )
        size = self.effective_batch_size
        if not callable(size) and size > num_examples:
            raise ValueError(
                f"the effective batch size is {size}, and the stream ended after {num_examples} examples: "
                "give at most that"
            )

    def _let_go_before(self, window: int) -> None:
        first = self._start(window) // self.buffer_size
        if not self.keeps:
            self._blocks = {block: held for block, held in self._blocks.items() if block >= first}
            self._starts = {number: start for number, start in self._starts.items() if number >= window}
        self._marks = {block: mark for block, mark in self._marks.items() if not 0 < block < first}

    # Numbers of windows

    def _start(self, window: int) -> int:
        known = max(number for number in self._starts if number <= window)
        for number in range(known, window):
            self._starts[number + 1] = self._starts[number] + self._size(number)
        return self._starts[window]

    def _size(self, window: int) -> int:
        if self._number is None and callable(self.effective_batch_size):
            raise ValueError(
                f"the size of window {window} of epoch {self.epoch} depends on how many came before, and an "
                "earlier epoch was left before its end: give a number, or go to a state_dict()"
            )
        return size_asked(self.effective_batch_size, (self._number or 0) + window)

    def _num_windows(self) -> int:
        """Of this epoch, whose end has been seen."""
        return next(window for window in count(min(self._starts)) if not self._is_held(window))

    def _first_number(self, epoch: int) -> int | None:
        """The number, over the whole run, of this epoch's first window, where it is known."""
        if epoch == 0:
            return 0
        if epoch == self.epoch:
            return self._number
        if epoch != self.epoch + 1 or self._number is None or self._num_examples is None:
            return None
        return self._number + self._num_windows()


@dataclass(frozen=True)
class Held:
    """Numbers of the examples at hand, looked up by index and summed over columns as those of an array."""

    look_up: Callable[[np.ndarray], np.ndarray]

    def __getitem__(self, indices: Any) -> Any:
        found = self.look_up(np.atleast_1d(indices))
        return found if np.ndim(indices) else found[0]

    def sum(self, axis: int) -> "Held":
        return Held(lambda indices: self.look_up(indices).sum(axis))


@dataclass(frozen=True)
class _Block:
    """Examples that are shuffled together: as they came, with their tokens, and their indices in order."""

    examples: list[Any]
    tokens: np.ndarray
    order: np.ndarray


class _Reader:
    """Reads the examples of one epoch, from its start or from a mark on, and one further than it is asked.

    `at`: examples of the epoch before this place. `mark`: what takes another reader here without reading
    them; None where the data set has nothing that does.
    """

    def __init__(self, dataset: Any, epoch: int, at: int, mark: Any):
        self._dataset, self._can_mark = _of_its_own(dataset)
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(epoch)
        if mark is not None:
            self._dataset.load_state_dict(mark)
        self.at, self.mark = at, mark
        self._examples = iter(self._dataset)
        self._next = next(self._examples, END)

    @property
    def has_more(self) -> bool:
        return self._next is not END

    def read(self, most: int) -> list[Any]:
        """The next examples, so many where there are."""
        return list(self._take(most))

    def skip(self, most: int) -> None:
        """Read so many and throw them away."""
        for _ in self._take(most):
            pass

    def _take(self, most: int) -> Iterator[Any]:
        if not most or not self.has_more:
            return
        for example in chain([self._next], islice(self._examples, most - 1)):
            self.at += 1
            yield example
        self.mark = self._dataset.state_dict() if self._can_mark else None
        self._next = next(self._examples, END)


def _of_its_own(dataset: Any) -> tuple[Any, bool]:
    """Return a data set that keeps its own position, and whether its `state_dict()` is exact.

    Data sets that are made of one another (`take` and `skip` of one, say) note their positions in shared
    objects. Here these are copied. A shuffle buffer of `datasets` has no state.
    """
    theirs = sys.modules.get("datasets.iterable_dataset")  # no import: datasets may not be installed
    if theirs is None or not isinstance(dataset, theirs.IterableDataset):
        return dataset, False
    shuffles = False

    def copied(node: Any) -> Any:
        nonlocal shuffles
        shuffles = shuffles or isinstance(node, theirs.BufferShuffledExamplesIterable)
        node = copy.copy(node)
        if hasattr(node, "ex_iterable"):
            node.ex_iterable = copied(node.ex_iterable)
        if hasattr(node, "ex_iterables"):
            node.ex_iterables = [copied(one) for one in node.ex_iterables]
        return node

    own = object.__new__(type(dataset))  # copy.copy() of theirs shares all attributes
    vars(own).update(vars(dataset), _ex_iterable=copied(dataset._ex_iterable), _starting_state_dict=None)
    own._epoch = copy.deepcopy(dataset._epoch)
    return own, not shuffles
