"""The windows of a stream: a sequence of examples of unknown length.

For `collation.py`, a `Stream` is the plan (as in `sampler.py`), the data set and the lengths in one. It holds
the examples of the current window and the examples that were read ahead. The index of an example is its
position in the stream.

The order of an epoch is a *block shuffle*. The stream is divided into blocks of `buffer_size` examples. Each
block is permuted by a draw from (seed, epoch, block). Window t is a slice of this order and may span several
blocks. Windows therefore depend only on the stream, the seed, the effective batch size and the buffer size.
Memory: the window and at most two blocks. A buffer that holds the whole stream gives the windows of a data
set with a length.
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

BUFFER_SIZE = 1000  # examples; the default of datasets
Measure = Callable[[Sequence[Any]], np.ndarray]
END = object()
LENGTH_UNKNOWN = "the length of a stream is unknown until it has been read to its end"


def is_stream(dataset: Any) -> bool:
    """Whether a data set can be iterated and has no length."""
    if isinstance(dataset, torch.utils.data.IterableDataset):  # torch gives it a __getitem__ that raises
        return True
    return hasattr(dataset, "__iter__") and not hasattr(dataset, "__len__")


class Stream:
    """The windows of every epoch of a stream, read in order, with the examples of the current windows.

    Args:
        dataset: The stream.
        effective_batch_size: A number, or a function of the number of the window in the whole run.
        seed: Seed of the block shuffle.
        shuffle: Whether to permute the blocks.
        drop_last: Whether to leave out a partial last window.
        buffer_size: Examples of a block.
        measure: examples → tokens (examples, columns).

    Attributes:
        check: Called with the tokens of each new block and the index of the first example in the block.
        keeps: Whether blocks stay in memory after their windows.
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
        self.keeps = False
        self.check: Callable[[np.ndarray, int], None] = lambda tokens, first: None
        self._measure = measure
        self._begin(0, number=0)

    # The interface of WindowPlan

    @property
    def num_examples(self) -> int:
        """Examples of the current epoch. Raise TypeError before the end of the epoch."""
        if self._num_examples is None:
            raise TypeError(LENGTH_UNKNOWN)
        return self._num_examples

    def num_windows(self, epoch: int) -> int:
        """Return the number of windows of the current epoch. Raise TypeError before the end of the epoch."""
        if epoch != self.epoch or self._num_examples is None:
            raise TypeError(LENGTH_UNKNOWN)
        return self._num_windows()

    def count_windows(self, epochs: Iterable[int]) -> int | None:
        """Return None: the length is unknown."""
        return None

    def dropped(self, epoch: int) -> int:
        """Return the number of examples that `drop_last` leaves out of this epoch; 0 while it is unknown."""
        if epoch != self.epoch or self._num_examples is None or not self.drop_last:
            return 0
        return self._num_examples - self._start(self._num_windows())

    def is_over(self, epoch: int, window: int) -> bool:
        """Whether this epoch is known to end before this window."""
        if epoch != self.epoch:
            return epoch < self.epoch
        return self._num_examples is not None and window >= self._num_windows()

    def walk(self, epoch: int, start: int) -> Iterator[tuple[int, int]]:
        """Yield the windows of an epoch from `start` on, and free the examples of earlier windows."""
        self._go_to(epoch, start)
        for window in count(start):
            if self.epoch != epoch:  # another walk has started a later epoch
                return
            self._let_go_before(window)
            if not self._reaches(window):
                return
            yield epoch, window

    def ahead(self, epoch: int, window: int, most: int) -> list[tuple[int, int]]:
        """Return up to `most` next windows that have been read, after reading at least one."""
        if epoch < self.epoch or (epoch == self.epoch and not self._reaches(window)):
            epoch, window = epoch + 1, 0
        if epoch != self.epoch:
            self._go_to(epoch, window)
        there = [window] if self._reaches(window) else []
        there += takewhile(self._is_held, range(window + 1, window + most))
        return [(epoch, number) for number in there]

    def indices(self, epoch: int, window: int) -> np.ndarray:
        """Return the example indices of this window, over all processes.

        Raise ValueError if the window has been freed or does not exist.
        """
        if epoch > self.epoch:
            self._go_to(epoch, window)
        if epoch < self.epoch or window < min(self._starts):
            raise ValueError(
                f"window {window} of epoch {epoch} is no longer in memory: a stream is read forward only"
            )
        if not self._reaches(window):
            raise ValueError(f"the stream has no window {window} in epoch {epoch}")
        places = range(self._start(window), min(self._start(window + 1), self._until))
        size = self.buffer_size
        return np.array([self._blocks[place // size].order[place % size] for place in places])

    def apart(self, epoch: int, window: int) -> "Stream":
        """Return a stream with a separate reader, from this window on. It shares the blocks in memory."""
        other = copy.copy(self)
        other._blocks, other._marks, other._starts = dict(self._blocks), dict(self._marks), dict(self._starts)
        other._reader = None
        other._go_to(epoch, window)
        return other

    def number(self, epoch: int, window: int) -> int:
        """Return the number of this window in the whole run."""
        return (self._first_number(epoch) or 0) + window

    def size_asked(self, epoch: int, window: int) -> int:
        """Return the number of examples that a full window would have in this place."""
        return size_asked(self.effective_batch_size, self.number(epoch, window))

    def resized(self, epoch: int, window: int) -> "Stream":
        """Return this stream after a change of sizes from this window on."""
        if epoch == self.epoch:
            self._starts = {number: start for number, start in self._starts.items() if number <= window}
        return self

    def place(self, epoch: int, window: int) -> dict[str, Any]:
        """Return what a loader's `state_dict()` stores beside epoch, window and seed, as plain data."""
        if epoch == self.epoch:
            number, start = self._number, self._start(window)
        else:
            number, start = self._first_number(epoch), 0
        mark = self._marks.get(start // self.buffer_size) if epoch == self.epoch else None
        return {
            "stream": {"buffer_size": self.buffer_size, "number": number, "examples": start, "mark": mark}
        }

    def at(self, state: Mapping[str, Any]) -> "Stream":
        """Go to the position of a loader's `state_dict()`. Raise ValueError for a state of other data."""
        place = state.get("stream")
        if place is None:
            raise ValueError(
                "the state is from a data set with a length, but this is a stream: load a state of the same "
                "data"
            )
        if place["buffer_size"] != self.buffer_size:
            raise ValueError(
                f"buffer_size is {self.buffer_size}, but the state was saved with {place['buffer_size']}: "
                "use the same, as the windows depend on it"
            )
        self.seed = state["seed"]
        self._begin(state["epoch"], place["number"])
        self._starts, block = {state["window"]: place["examples"]}, place["examples"] // self.buffer_size
        self._until = block * self.buffer_size
        if place["mark"] is not None:
            self._marks[block] = place["mark"]
        return self

    # The interface of a data set and its lengths

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return copies of examples in memory, as a collate function may change its arguments."""
        found = (self._block_of(index).examples[index % self.buffer_size] for index in indices)
        return [dict(example) if isinstance(example, dict) else example for example in found]

    def read_again(self, indices: Sequence[int] | np.ndarray) -> list[Any]:
        """Return examples of the current epoch from another reading, which starts at the beginning."""
        reader = _Reader(self.dataset, self.epoch, 0, None)
        reader.skip(first := int(min(indices)))
        examples = reader.read(int(max(indices)) + 1 - first)
        return [examples[index - first] for index in indices if index - first < len(examples)]

    @property
    def tokens(self) -> "Held":
        """Tokens of the examples in memory, (examples, columns)."""
        size = self.buffer_size
        return Held(lambda found: np.stack([self._block_of(i).tokens[i % size] for i in found.tolist()]))

    @property
    def held_examples(self) -> dict[int, int]:
        """Number of examples in memory, by block."""
        return {block: len(held.examples) for block, held in self._blocks.items()}

    def _block_of(self, index: int) -> "_Block":
        if index // self.buffer_size not in self._blocks:
            raise ValueError(f"example {index} is not in memory: a stream is read forward only")
        return self._blocks[index // self.buffer_size]

    # Reading

    def _begin(self, epoch: int, number: int | None) -> None:
        """Go to the start of an epoch, whose first window has this number in the run (None: unknown)."""
        self.epoch, self._number = epoch, number
        self._starts = {0: 0}  # window → position of its first example in the order of the epoch
        self._marks: dict[int, Any] = {0: None}  # block → state of the data set at the start of the block
        self._blocks: dict[int, _Block] = {}
        self._until = 0  # position after the last block that was read
        self._reader: _Reader | None = None  # reads from this position on
        self._num_examples: int | None = None  # examples of this epoch, once the end is reached

    def _go_to(self, epoch: int, window: int) -> None:
        if epoch != self.epoch or window < min(self._starts):
            self._begin(epoch, self._first_number(epoch))

    def _reaches(self, window: int) -> bool:
        """Read until this window is in memory. Return False if the epoch ends before it."""
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
                f"the stream gave no examples in epoch {self.epoch}: every iteration must give the same "
                "examples"
            )
        window, start = min(self._starts.items())
        if 0 < num_examples <= start:
            raise ValueError(
                f"the stream ended after {num_examples} examples, before window {window} of epoch "
                f"{self.epoch}: load a state of the same data"
            )
        size = self.effective_batch_size
        if not callable(size) and size > num_examples:
            raise ValueError(
                f"the effective batch size is {size}, but the stream has {num_examples} examples: set "
                f"effective_batch_size to at most {num_examples}"
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
                f"the size of window {window} of epoch {self.epoch} is unknown, as an earlier epoch is "
                "unfinished: set effective_batch_size to a number, or load a state_dict()"
            )
        return size_asked(self.effective_batch_size, (self._number or 0) + window)

    def _num_windows(self) -> int:
        """Return the number of windows of this epoch, whose end has been reached."""
        return next(window for window in count(min(self._starts)) if not self._is_held(window))

    def _first_number(self, epoch: int) -> int | None:
        """Return the number in the whole run of the first window of this epoch; None if unknown."""
        if epoch == 0:
            return 0
        if epoch == self.epoch:
            return self._number
        if epoch != self.epoch + 1 or self._number is None or self._num_examples is None:
            return None
        return self._number + self._num_windows()


@dataclass(frozen=True)
class Held:
    """Numbers of the examples in memory, with indexing and summing over columns as in an array."""

    look_up: Callable[[np.ndarray], np.ndarray]

    def __getitem__(self, indices: Any) -> Any:
        found = self.look_up(np.atleast_1d(indices))
        return found if np.ndim(indices) else found[0]

    def sum(self, axis: int) -> "Held":
        return Held(lambda indices: self.look_up(indices).sum(axis))


@dataclass(frozen=True)
class _Block:
    """Examples that are shuffled together.

    Attributes:
        examples: In the order of the stream.
        tokens: Of the examples, (examples, columns).
        order: Indices in the shuffled order.
    """

    examples: list[Any]
    tokens: np.ndarray
    order: np.ndarray


class _Reader:
    """Read the examples of one epoch, from the start or from a mark on, one example ahead.

    Attributes:
        at: Position in the epoch.
        mark: State of the data set, with which another reader starts at this position. None if the data set
            has no such state.
    """

    def __init__(self, dataset: Any, epoch: int, at: int, mark: Any):
        self._dataset, self._can_mark = of_its_own(dataset)
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
        """Return up to `most` next examples."""
        return list(self._take(most))

    def skip(self, most: int) -> None:
        """Read up to `most` examples and discard them."""
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


def of_its_own(dataset: Any) -> tuple[Any, bool]:
    """Return a data set with a separate position, and whether its `state_dict()` is exact.

    A data set with `apart()` returns such a copy itself.

    Data sets of `datasets` that derive from each other, such as `take` and `skip` of one, store positions in
    shared objects. This function copies the objects. A shuffle buffer of `datasets` has no exact state.
    """
    if hasattr(dataset, "apart"):
        return dataset.apart(), True
    module = sys.modules.get("datasets.iterable_dataset")  # without import, as datasets may be missing
    if module is None or not isinstance(dataset, module.IterableDataset):
        return dataset, False
    shuffles = False

    def copied(node: Any) -> Any:
        nonlocal shuffles
        shuffles = shuffles or isinstance(node, module.BufferShuffledExamplesIterable)
        node = copy.copy(node)
        if hasattr(node, "ex_iterable"):
            node.ex_iterable = copied(node.ex_iterable)
        if hasattr(node, "ex_iterables"):
            node.ex_iterables = [copied(one) for one in node.ex_iterables]
        return node

    own = object.__new__(type(dataset))  # copy.copy() would share all attributes
    vars(own).update(vars(dataset), _ex_iterable=copied(dataset._ex_iterable), _starting_state_dict=None)
    own._epoch = copy.deepcopy(dataset._epoch)
    return own, not shuffles
