"""The examples of each window, as numbers.

(number of examples, effective batch size, seed, epoch, window) → example indices. Neither the data nor the
hardware is an input, so neither can change the windows of a run. `streaming.py` is for data without a length.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np

EffectiveBatchSize = int | Callable[[int], int]


class WindowPlan:
    """The windows of every epoch, as example indices.

    The order of epoch e is a permutation drawn from (seed, e). Window t is a slice of the permutation.
    Memory: one permutation (4 bytes per example).

    Args:
        num_examples: Examples of the data set.
        effective_batch_size: A number, or a function of the number of the window in the whole run.
        seed: Seed of the permutations.
        shuffle: Whether to permute the examples.
        drop_last: Whether to leave out a partial last window.
    """

    def __init__(
        self,
        num_examples: int,
        effective_batch_size: EffectiveBatchSize,
        seed: int,
        shuffle: bool,
        drop_last: bool,
    ):
        check_seed(seed)
        self.num_examples, self.effective_batch_size = num_examples, effective_batch_size
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self._orders: dict[int, np.ndarray] = {}  # of the latest epoch only
        self._all_starts: dict[int, Sequence[int]] = {}

    def num_windows(self, epoch: int) -> int:
        """Return the number of windows in this epoch, with a partial last one unless `drop_last`."""
        return len(self.starts(epoch))

    def count_windows(self, epochs: Iterable[int]) -> int | None:
        """Return the number of windows in these epochs together."""
        return sum(map(self.num_windows, epochs))

    def is_over(self, epoch: int, window: int) -> bool:
        """Whether this window is beyond the last one of this epoch."""
        return window >= self.num_windows(epoch)

    def walk(self, epoch: int, start: int) -> Iterator[tuple[int, int]]:
        """Return the windows of this epoch from `start` on, as (epoch, window)."""
        return ((epoch, window) for window in range(start, self.num_windows(epoch)))

    def ahead(self, epoch: int, window: int, most: int) -> list[tuple[int, int]]:
        """Return up to `most` next windows: the rest of this epoch, then the next epoch."""
        return list(islice(chain(self.walk(epoch, window), self.walk(epoch + 1, 0)), most))

    def place(self, epoch: int, window: int) -> dict[str, Any]:
        """Return what a loader's `state_dict()` stores beside epoch, window and seed: nothing."""
        return {}

    def at(self, state: Mapping[str, Any]) -> "WindowPlan":
        """Return the plan of a loader's `state_dict()`. Raise ValueError if the plan has no such window."""
        if "stream" in state:
            raise ValueError(
                "the state is from a stream, but the data set has a length: load a state of the same data"
            )
        plan = self._anew(state["seed"])
        epoch, window = state["epoch"], state["window"]
        if not 0 <= window < plan.num_windows(epoch):
            raise ValueError(
                f"the state has window {window}, but epoch {epoch} has {plan.num_windows(epoch)} windows: "
                "load a state of the same data"
            )
        return plan

    def size(self, epoch: int, window: int) -> int:
        """Return the number of examples in this window."""
        return len(self.indices(epoch, window))

    def size_asked(self, epoch: int, window: int) -> int:
        """Return the number of examples that a full window would have in this place."""
        return self._size(self.number(epoch, window))

    def number(self, epoch: int, window: int) -> int:
        """Return the number of this window in the whole run."""
        return self._first_number(epoch) + window

    def examples_before(self, epoch: int, window: int) -> int:
        """Return the number of examples in all earlier windows of the run."""
        earlier = sum(self.num_examples - self.dropped(before) for before in range(epoch))
        if self.is_over(epoch, window):
            return earlier + self.num_examples - self.dropped(epoch)
        return earlier + self.starts(epoch)[window]

    def examples_of(self, windows: int) -> int:
        """Return the number of examples in the first `windows` windows of the run."""
        epoch = 0
        while windows >= self.num_windows(epoch):
            windows, epoch = windows - self.num_windows(epoch), epoch + 1
        return self.examples_before(epoch, windows)

    def resized(self, epoch: int, window: int) -> "WindowPlan":
        """Return this plan after a change of sizes from this window on."""
        return self._anew(self.seed)

    def _anew(self, seed: int) -> "WindowPlan":
        """Return a plan with the same settings, and with sizes and orders that are not yet computed."""
        return WindowPlan(self.num_examples, self.effective_batch_size, seed, self.shuffle, self.drop_last)

    def dropped(self, epoch: int) -> int:
        """Return the number of examples that `drop_last` leaves out of this epoch."""
        if not self.drop_last or not self.starts(epoch):
            return self.num_examples if self.drop_last else 0
        last = self.num_windows(epoch) - 1
        start = self.starts(epoch)[last]
        return max(0, self.num_examples - start - self.size_asked(epoch, last))

    def indices(self, epoch: int, window: int) -> np.ndarray:
        """Return the example indices of this window, over all processes."""
        start = self.starts(epoch)[window]
        size = self.size_asked(epoch, window)
        stop = min(start + size, self.num_examples)
        return self._order(epoch)[start:stop].astype(np.int64)

    def memory_bytes(self) -> int:
        """Return the bytes of the permutation."""
        return sum(order.nbytes for order in self._orders.values())

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders.clear()  # before the next permutation is drawn, so that only one is in memory
            order = np.arange(self.num_examples, dtype=np.int32 if self.num_examples < 2**31 else np.int64)
            if self.shuffle:
                np.random.default_rng([self.seed, epoch]).shuffle(order)
            self._orders = {epoch: order}
        return self._orders[epoch]

    def starts(self, epoch: int) -> Sequence[int]:
        """Return the position in the epoch of the first example of each window."""
        if epoch not in self._all_starts:
            self._all_starts[epoch] = self._find_starts(epoch)
        return self._all_starts[epoch]

    def _find_starts(self, epoch: int) -> Sequence[int]:
        if not callable(self.effective_batch_size):
            whole = self.num_examples - self.num_examples % self.effective_batch_size
            return range(0, whole if self.drop_last else self.num_examples, self.effective_batch_size)
        starts, start, number = [], 0, self._first_number(epoch)
        while start < self.num_examples:
            size = self._size(number + len(starts))
            if self.drop_last and start + size > self.num_examples:
                break
            starts.append(start)
            start += size
        return starts

    def _size(self, number: int) -> int:
        """Return the size of the window of this number, at most all examples."""
        return min(size_asked(self.effective_batch_size, number), self.num_examples)

    def _first_number(self, epoch: int) -> int:
        """Return the number in the whole run of the first window of this epoch."""
        return sum(self.num_windows(earlier) for earlier in range(epoch))


def size_asked(effective_batch_size: EffectiveBatchSize, number: int) -> int:
    """Return the effective batch size of the window of this number in the whole run.

    Raise ValueError if the function returns no valid size.
    """
    if not callable(effective_batch_size):
        return effective_batch_size
    size = effective_batch_size(number)
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
        raise ValueError(
            f"effective_batch_size({number}) returned {size!r}; it must return an integer of at least 1"
        )
    return int(size)


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that random generators do not accept."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"the seed is {seed!r}; it must be an integer of at least 0")
