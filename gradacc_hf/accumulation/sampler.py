"""Which examples make a window: numbers only.

(number of examples, effective batch size, seed, epoch, window) → example indices. Neither the data nor the
hardware is an input, so neither can change a run's windows. Data without a length: `streaming.py`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np

EffectiveBatchSize = int | Callable[[int], int]


class WindowPlan:
    """The windows of every epoch, as example indices: a function of its arguments alone, never of the
    hardware.

    The order of epoch e is a permutation drawn from (seed, e); window t is a slice of it.
    `effective_batch_size` is a number, or a function of the window's number counted over the whole run.
    Memory: one permutation (4 bytes an example).
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
        self._orders: dict[int, np.ndarray] = {}  # the epoch at hand only
        self._all_starts: dict[int, Sequence[int]] = {}

    def num_windows(self, epoch: int) -> int:
        """Windows in this epoch; a partial last one counts unless `drop_last`."""
        return len(self.starts(epoch))

    def count_windows(self, epochs: Iterable[int]) -> int | None:
        """Windows of these epochs together."""
        return sum(map(self.num_windows, epochs))

    def is_over(self, epoch: int, window: int) -> bool:
        """Whether this epoch has no windows from this one on."""
        return window >= self.num_windows(epoch)

    def walk(self, epoch: int, start: int) -> Iterator[tuple[int, int]]:
        """The windows of this epoch from `start` on, as (epoch, window)."""
        return ((epoch, window) for window in range(start, self.num_windows(epoch)))

    def ahead(self, epoch: int, window: int, most: int) -> list[tuple[int, int]]:
        """The next windows, to judge splits by: the rest of this epoch, then those of the next one."""
        return list(islice(chain(self.walk(epoch, window), self.walk(epoch + 1, 0)), most))

    def place(self, epoch: int, window: int) -> dict[str, Any]:
        """What tells the way to a window beside its numbers and the seed: nothing."""
        return {}

    def at(self, state: Mapping[str, Any]) -> "WindowPlan":
        """The plan that a loader's `state_dict()` is of. Raises ValueError where it has no such window."""
        if "stream" in state:
            raise ValueError("the state is that of a stream, and the data set has a length: other data?")
        plan = WindowPlan(
            self.num_examples, self.effective_batch_size, state["seed"], self.shuffle, self.drop_last
        )
        epoch, window = state["epoch"], state["window"]
        if not 0 <= window < plan.num_windows(epoch):
            raise ValueError(
                f"window {window} is not one of the {plan.num_windows(epoch)} of epoch {epoch}: other data?"
            )
        return plan

    def size(self, epoch: int, window: int) -> int:
        """Examples in this window."""
        return len(self.indices(epoch, window))

    def size_asked(self, epoch: int, window: int) -> int:
        """Examples that this window would have if the epoch did not end within it."""
        return self._size(self.number(epoch, window))

    def number(self, epoch: int, window: int) -> int:
        """This window's number, over the whole run."""
        return self._first_number(epoch) + window

    def examples_before(self, epoch: int, window: int) -> int:
        """Examples in all windows before this one, over the whole run."""
        earlier = sum(self.num_examples - self.dropped(before) for before in range(epoch))
        if self.is_over(epoch, window):
            return earlier + self.num_examples - self.dropped(epoch)
        return earlier + self.starts(epoch)[window]

    def examples_of(self, windows: int) -> int:
        """Examples in the first so many windows of the run."""
        epoch = 0
        while windows >= self.num_windows(epoch):
            windows, epoch = windows - self.num_windows(epoch), epoch + 1
        return self.examples_before(epoch, windows)

    def resized(self, epoch: int, window: int) -> "WindowPlan":
        """This plan, as sizes have changed from this window on."""
        return WindowPlan(
            self.num_examples, self.effective_batch_size, self.seed, self.shuffle, self.drop_last
        )

    def dropped(self, epoch: int) -> int:
        """Examples that `drop_last` leaves out of this epoch."""
        if not self.drop_last or not self.starts(epoch):
            return self.num_examples if self.drop_last else 0
        last = self.num_windows(epoch) - 1
        start = self.starts(epoch)[last]
        return max(0, self.num_examples - start - self.size_asked(epoch, last))

    def indices(self, epoch: int, window: int) -> np.ndarray:
        """Example indices of this window, over all processes."""
        start = self.starts(epoch)[window]
        size = self.size_asked(epoch, window)
        stop = min(start + size, self.num_examples)
        return self._order(epoch)[start:stop].astype(np.int64)

    def memory_bytes(self) -> int:
        """What the plan holds: the permutation of the epoch at hand."""
        return sum(order.nbytes for order in self._orders.values())

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders.clear()  # before the next is drawn, so that there are never two
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
        """Examples of the window of this number; at most all."""
        return min(size_asked(self.effective_batch_size, number), self.num_examples)

    def _first_number(self, epoch: int) -> int:
        """The number, over the whole run, of this epoch's first window."""
        return sum(self.num_windows(earlier) for earlier in range(epoch))


def size_asked(effective_batch_size: EffectiveBatchSize, number: int) -> int:
    """Examples of the window of this number, counted over the whole run. Raises ValueError for no size."""
    if not callable(effective_batch_size):
        return effective_batch_size
    size = effective_batch_size(number)
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
        raise ValueError(
            f"effective_batch_size({number}) gave {size!r}; it must give an integer of at least 1"
        )
    return int(size)


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that no generator takes."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"the seed is {seed!r}; it must be an integer of at least 0")
