"""The windows of a mixture: every window holds the share of each source, to the nearest example.

With a constant effective batch size, each source gets its share of a window rounded down or up. After any
number of windows, its examples differ from its share of all examples by less than one. Sources whose share
is not whole compete for the remaining places of a window. They get them in the order of algorithm PF, which
is optimal (Baruah, Cohen, Plaxton and Varvel, "Proportionate progress", Algorithmica 15, 1996).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Any

import numpy as np

from gradacc_hf.accumulation.sampler import EffectiveBatchSize, WindowPlan

PASS_STREAM = 3  # seed part: other random numbers than the order's (seed, epoch)
SIGNS = 64  # windows that are compared to choose between sources


@dataclass(frozen=True)
class Sources:
    """The sources of a data set.

    Attributes:
        names: The name of each source.
        of_examples: The number of the source of each example (examples,).
        shares: Whole numbers in the ratio of the sources' shares; None if windows are not mixed.
    """

    names: tuple[str, ...]
    of_examples: np.ndarray
    shares: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls, names: Sequence[str], shares: Mapping[str, float | str] | None, num_examples: int
    ) -> "Sources":
        """Return the sources of examples, given the name of each. Raise ValueError if they do not fit."""
        if len(names) != num_examples:
            raise ValueError(f"sources has {len(names)} names for {num_examples} examples: give one for each")
        known = [*(shares or dict.fromkeys(names))]
        numbers = {name: number for number, name in enumerate(known)}
        if absent := sorted({*names} ^ {*known}):
            raise ValueError(f"sources and shares differ in {absent[0]!r}: give each source a share")
        of_examples = np.array([numbers[name] for name in names], np.int32)
        return cls(tuple(known), of_examples, None if shares is None else whole_shares(shares))

    @property
    def counts(self) -> np.ndarray:
        """The number of examples of each source (sources,)."""
        return np.bincount(self.of_examples, minlength=len(self.names))


def whole_shares(shares: Mapping[str, float | str]) -> tuple[int, ...]:
    """Return whole numbers in the same ratio. Raise ValueError for a share that is not above 0."""
    found = []
    for name, share in shares.items():
        try:
            found.append(Fraction(str(share)))
        except (ValueError, ZeroDivisionError):
            found.append(Fraction(0))
        if found[-1] <= 0:
            raise ValueError(f"the weight of source {name!r} is {share!r}: allowed is a number above 0")
    scale = lcm(*(share.denominator for share in found))
    return tuple(int(share * scale) for share in found)


class MixedPlan(WindowPlan):
    """The windows of a mixture, as example indices.

    An epoch has as many windows as the examples of all sources fill. All windows are full, because a source
    that has no examples left starts again, in another order. The order of pass p through source s is drawn
    from (seed, p, s). Passes continue over epochs.

    Args:
        sources: The sources, with shares.
        effective_batch_size, seed, shuffle, drop_last: As for `WindowPlan`. With `drop_last`, an epoch has
            one window less if the examples of all sources do not fill whole windows.
    """

    def __init__(
        self,
        sources: Sources,
        effective_batch_size: EffectiveBatchSize,
        seed: int,
        shuffle: bool,
        drop_last: bool,
    ):
        super().__init__(len(sources.of_examples), effective_batch_size, seed, shuffle, drop_last)
        self.sources = sources
        order = np.argsort(sources.of_examples, kind="stable")
        self._members = np.split(order, np.cumsum(sources.counts)[:-1])
        self._before = [np.zeros(len(sources.names), np.int64)]  # by window of the run: examples of sources
        self._lags = [0] * len(sources.names)  # before the next window, in parts of the sum of the shares
        self._latest: dict[int, tuple[int, np.ndarray]] = {}  # by source: a pass and its order

    def _anew(self, seed: int) -> "MixedPlan":
        return MixedPlan(self.sources, self.effective_batch_size, seed, self.shuffle, self.drop_last)

    def dropped(self, epoch: int) -> int:
        """Return 0: no example is left out, as passes continue over epochs."""
        return 0

    def examples_before(self, epoch: int, window: int) -> int:
        """Return the number of examples in all earlier windows of the run."""
        ends = [(before, self.num_windows(before)) for before in range(epoch)]
        return sum(self._examples_in(*end) for end in (*ends, (epoch, window)))

    def _examples_in(self, epoch: int, window: int) -> int:
        """Return the number of examples in the first windows of this epoch."""
        if not window:
            return 0
        return self.starts(epoch)[window - 1] + self.size_asked(epoch, window - 1)

    def indices(self, epoch: int, window: int) -> np.ndarray:
        """Return the example indices of this window, over all processes. An example may be there twice."""
        number = self.number(epoch, window)
        for later in range(len(self._before) - 1, number + 1):
            self._before.append(self._before[-1] + self._counts_of_next(self._size(later)))
        parts = zip(self._before[number].tolist(), self._before[number + 1].tolist(), strict=True)
        found = np.concatenate([self._take(source, *part) for source, part in enumerate(parts)])
        if self.shuffle:
            np.random.default_rng([self.seed, number, len(self._members), PASS_STREAM]).shuffle(found)
        return found.astype(np.int64)

    def memory_bytes(self) -> int:
        """Return the bytes of the examples of each source, and of their orders."""
        orders = [order for _, order in self._latest.values()]
        return sum(array.nbytes for array in (*self._members, *orders))

    def _take(self, source: int, start: int, stop: int) -> np.ndarray:
        """Return examples of a source by their position in all its passes."""
        parts, size = [], len(self._members[source])
        while start < stop:
            number, offset = divmod(start, size)
            parts.append(self._pass(source, number)[offset : offset + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts) if parts else self._members[source][:0]

    def _pass(self, source: int, number: int) -> np.ndarray:
        if not self.shuffle:
            return self._members[source]
        if self._latest.get(source, (None,))[0] != number:
            draw = np.random.default_rng([self.seed, number, source, PASS_STREAM])
            self._latest[source] = number, draw.permutation(self._members[source])
        return self._latest[source][1]

    def _counts_of_next(self, size: int) -> np.ndarray:
        """Return the examples of each source in the next window of the run, and update the lags.

        The lag of a source is its share of all windows so far, minus its examples. All numbers are whole, so
        that all processes and machines compute the same.
        """
        shares = self.sources.shares or ()
        whole = sum(shares)
        counts = [share * size // whole for share in shares]
        rest = [share * size % whole for share in shares]
        lags = [lag + part for lag, part in zip(self._lags, rest, strict=True)]
        free = size - sum(counts)

        def rank(source: int) -> tuple:
            lag, part = lags[source], rest[source]
            return lag >= whole, lag > 0 and part > 0, _signs(lag % whole, part, whole), lag, -source

        for source in sorted(range(len(shares)), key=rank, reverse=True)[:free] if free else ():
            counts[source] += 1
            lags[source] -= whole
        self._lags = lags
        return np.array(counts, np.int64)


def plan_of(sources: Sources | None, num_examples: int, *settings: Any) -> WindowPlan:
    """Return the plan of a mixture, or of examples without shares of sources."""
    if sources is None or sources.shares is None:
        return WindowPlan(num_examples, *settings)
    return MixedPlan(sources, *settings)


def _signs(position: int, step: int, whole: int) -> tuple[int, ...]:
    """Return the characteristic string of algorithm PF from the next window on.

    A sign is 0 if the lag reaches a whole example, 1 if it exceeds one, and else −1. The string ends at 0.
    """
    found: list[int] = []
    while len(found) < SIGNS and (not found or found[-1]):
        position += step
        found.append((position > whole) - (position < whole))
        position %= whole
    return tuple(found)
