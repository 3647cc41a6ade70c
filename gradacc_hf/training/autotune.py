"""Find the fastest micro-batch size on the first windows of a run, while training on them.

Every split of a window gives the same gradient, so every trial is also a normal training step. The cost model
of the split (`splitting.Cost`) is fitted to the same measured times.
"""

import math
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list

from gradacc_hf.accumulation.collation import Split
from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.splitting import ON_CPU, Bound, Cost

WINDOWS_NEEDED = 24  # a run with fewer windows tries no sizes: most windows should use the fastest
AHEAD = 8  # next windows that sizes are compared on
HOPELESS = 1.3  # if a size takes this many times the fastest time, smaller sizes are not tried
CLOSE = 1.15  # sizes up to this many times the fastest time are tried again
TURNS = 2, 8  # further trials of each close size: least, most
WORTH = 1.03  # speedup that a fitted cost model must predict to replace the current one
NEVER = 1e9  # tokens: `Cost.quadratic` if no quadratic cost was measured


@dataclass(frozen=True)
class Trial:
    """A window that was trained with one micro-batch size.

    Attributes:
        max_tokens: The size, in padded tokens per micro-batch.
        seconds: Time of the window.
        seconds_per_token: Time divided by the predicted cost of the examples without padding, so that windows
            can be compared.
        work: Micro-batches, padded tokens, and padded tokens × length, of the process with the most work.
        counts: Whether the time is used. It is not if the window also did one-time set-up.
    """

    max_tokens: int
    seconds: float
    seconds_per_token: float
    work: tuple[float, float, float]
    counts: bool = True


def sizes_to_try(windows: WindowLoader) -> list[int]:
    """Return sizes in padded tokens: powers of two, largest first, that split the next windows differently.

    The largest size is the bound, or the share of one process in a window if that is smaller. The smallest
    size still holds the longest example.
    """
    ahead = _ahead(windows)
    shapes = [windows.shape(split.indices, split.pad_to) for split in ahead]
    most = max(rows * sum(lengths) for rows, lengths in shapes) / windows.accelerator.num_processes
    if windows.bound.max_tokens is not None:
        most = min(most, windows.bound.max_tokens)
    longest = max(1, *(int(windows.lengths[split.indices].max()) for split in ahead))
    sizes: dict[int, int] = {}  # number of micro-batches → the smallest size that gives this number
    for exponent in range(math.ceil(math.log2(most)), math.floor(math.log2(longest)), -1):
        size = min(2**exponent, windows.bound.max_tokens or 2**exponent)
        splits = _ahead(windows.with_bound(_of_size(windows.bound, size)))
        sizes[sum(max(map(len, split.processes)) for split in splits)] = size
    return list(sizes.values())


def search(
    sizes: Sequence[int], turns: int = TURNS[0], sets_up_each: bool = False
) -> Generator[tuple[int, bool], float, None]:
    """Yield (size, whether the time counts) for each window to train, and receive its seconds per token.

    The search tries sizes from the largest down until one is hopeless. It then repeats the sizes close to the
    fastest.

    Args:
        sizes: The sizes, largest first.
        turns: How often a close size is repeated.
        sets_up_each: Whether the first time of every size does not count, as on a GPU, which loads other
            kernels for each size. Otherwise only the first time of the run does not count.
    """
    seconds: dict[int, list[float]] = {}
    for size in sizes:
        if sets_up_each or size == sizes[0]:
            yield size, False
        seconds[size] = [(yield size, True)]
        if seconds[size][0] > HOPELESS * _fastest(seconds):
            break
    for _ in range(turns):
        limit = CLOSE * _fastest(seconds)
        for size in [size for size in seconds if median(seconds[size]) <= limit]:
            seconds[size].append((yield size, True))


def _fastest(seconds: Mapping[int, Sequence[float]]) -> float:
    return min(map(median, seconds.values()))


def fit_cost(trials: Sequence[Trial], default: Cost = ON_CPU) -> Cost:
    """Fit a cost model to the times of these windows: least squares of relative errors, no negative term.

    The fixed cost is at least half of the default, as a smaller one would give tiny micro-batches.
    """
    from scipy.optimize import nnls  # late: it takes a second

    work, seconds = np.array([t.work for t in trials]), np.array([t.seconds for t in trials])
    (fixed, linear, quadratic), _ = nnls(work / seconds[:, None], np.ones(len(seconds)))
    if not linear:
        return default
    return Cost(max(fixed / linear, default.fixed / 2), min(linear / max(quadratic, 1e-30), NEVER))


class Tuning:
    """Try micro-batch sizes on the next windows of a loader.

    Call `record` with the seconds of each window. All processes use the seconds of process 0, and so choose
    the same size. When memory runs out, the search starts again with the sizes that fit.
    """

    @classmethod
    def of(cls, windows: WindowLoader, num_windows: int | None) -> "Tuning | None":
        """Return a search for a run of this many windows (None: unknown).

        Return None if the loader is already tuned, if the run has too few windows, or if all sizes give the
        same split.
        """
        if windows.bound.micro_batch_size is not None:
            raise ValueError("tune varies max_tokens: give the loader max_tokens, not micro_batch_size")
        least, most = TURNS
        num_windows = sys.maxsize if num_windows is None else num_windows
        a_size = 1 + least + _sets_up_each(windows)  # windows that one size needs
        sizes = sizes_to_try(windows)[: max(0, (num_windows // 2 - 1) // a_size)]
        if len(sizes) < 2 or windows.tuned:
            return None
        return cls(windows, sizes, min(most, max(least, num_windows // 4 // len(sizes) - 1)))

    def __init__(self, windows: WindowLoader, sizes: Sequence[int], turns: int = TURNS[0]):
        self.windows, self._turns = windows, turns
        self.said: str | None = None  # the result in one line; None while the search runs
        self._begin(sizes)

    def record(self, seconds: float) -> None:
        """Record the seconds of the latest window of the loader, and set the size of the next one."""
        windows = self.windows
        if windows.bound is not self._tried:
            fit = [size for size in self._sizes if size <= (windows.bound.max_tokens or 0)]
            if len(fit) > 1:
                self._begin(fit)
            else:
                windows.end_trials(tuned=False)
                self.said = f"micro-batches: at most {windows.limit}, as memory ran out; no others are tried"
            return
        seconds = broadcast_object_list([seconds])[0]
        split = windows.split(windows.epoch, windows.window - 1)
        assert self._tried.max_tokens is not None
        per_token = seconds / float(Cost(fixed=0)(1, windows.lengths[split.indices]).sum())
        work = _work(windows, split)
        self.trials.append(Trial(self._tried.max_tokens, seconds, per_token, work, self._counts))
        try:
            self._try(*self._search.send(per_token))
        except StopIteration:
            self._choose()

    def _begin(self, sizes: Sequence[int]) -> None:
        self.windows.begin_trials()
        self.bound = self._tried = self.windows.bound
        self.trials: list[Trial] = []
        self._sizes = sizes
        self._search = search(sizes, self._turns, _sets_up_each(self.windows))
        self._try(*next(self._search))

    def to_json(self) -> dict[str, Any]:
        """Return the entry of summary.json. `max_tokens` is None while the search runs."""
        return {
            "max_tokens": self.windows.bound.max_tokens if self.said is not None else None,
            "cost": asdict(self.windows.cost),
            "trials": [asdict(trial) for trial in self.trials],
        }

    def _try(self, size: int, counts: bool) -> None:
        self._counts = counts
        if size != self._tried.max_tokens:  # windows that workers have prepared stay valid for the same size
            self._tried = _of_size(self.bound, size)
            self.windows.resplit(self._tried)

    def _choose(self) -> None:
        """Choose the size with the least predicted time for the next windows.

        The prediction of each size is corrected by its median ratio of measured to predicted time.
        """
        trials = [trial for trial in self.trials if trial.counts]
        cost = fit_cost(trials, self.windows.cost)

        def ahead(size: int, split_by: Cost | None = None) -> float:
            loader = self.windows.with_bound(_of_size(self.bound, size), cost=split_by)
            return sum(_total(cost, _work(loader, split)) for split in _ahead(loader))

        predicted = {}
        for size in sorted({trial.max_tokens for trial in trials}):
            off = median(t.seconds / _total(cost, t.work) for t in trials if t.max_tokens == size)
            predicted[size] = off * ahead(size)
        best = min(predicted, key=lambda size: predicted[size])
        is_worth_it = ahead(best) > WORTH * ahead(best, cost)
        self.windows.resplit(_of_size(self.bound, best), cost if is_worth_it else None)
        self.windows.end_trials(tuned=True)
        others = ", ".join(
            f"{size:,} takes {seconds / predicted[best]:.2f} times as long"
            for size, seconds in predicted.items()
            if size != best
        )
        self.said = (
            f"micro-batches: at most {self.windows.limit} from the next window on, the fastest size tried "
            f"({others})"
        )


def _sets_up_each(windows: WindowLoader) -> bool:
    """Whether the first window of each size includes set-up, as on a GPU, which loads other kernels."""
    return windows.accelerator.device.type == "cuda"


def _of_size(bound: Bound, max_tokens: int) -> Bound:
    """Return the bound with this many padded tokens and the same bytes."""
    return replace(bound, max_tokens=max_tokens)


def _ahead(windows: WindowLoader) -> list[Split]:
    """Return the splits of the next windows. A stream gives only the windows that it has read."""
    return [windows.split(*number) for number in windows.plan.ahead(windows.epoch, windows.window, AHEAD)]


def _work(windows: WindowLoader, split: Split) -> tuple[float, float, float]:
    """Return `Trial.work` of a split."""
    found = []
    for process in split.processes:
        computed = [np.split(each, len(each)) if windows.padding_free else [each] for each in process]
        shapes = [windows.shape(indices, split.pad_to) for each in computed for indices in each]
        sizes = [(rows * sum(lengths), sum(lengths)) for rows, lengths in shapes]
        tokens, quadratic = sum(size for size, _ in sizes), sum(size * length for size, length in sizes)
        found.append((float(len(process)), float(tokens), float(quadratic)))
    return max(found, key=lambda work: _total(windows.cost, work))


def _total(cost: Cost, work: Sequence[float]) -> float:
    """Return the predicted cost of this work."""
    micro_batches, tokens, quadratic = work
    return cost.fixed * micro_batches + tokens + quadratic / cost.quadratic
