"""Find the fastest micro-batch size on the first windows of a run, while they are trained.

Every split of a window gives the same gradient, so a run can try sizes as it goes: no window is trained
twice, or in vain. The split's cost model (`splitting.Cost`) is fitted to the same seconds.
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

WINDOWS_NEEDED = 24  # of a run that tries sizes: most of it should have the fastest
AHEAD = 8  # windows that sizes are judged on, as they will be split
HOPELESS = 1.3  # times the fastest: smaller sizes are not tried
CLOSE = 1.15  # times the fastest: those sizes are tried again
TURNS = 2, 8  # so many times: at least, at most
WORTH = 1.03  # times as fast: what another cost model must promise to be taken
NEVER = 1e9  # tokens from which the quadratic cost would count, where none was seen


@dataclass(frozen=True)
class Trial:
    """A window that was trained with this size.

    `seconds_per_token`: of what its examples would cost without padding, so that windows compare. `work`:
    micro-batches, padded tokens, padded tokens × length, of the process with most of it. `counts`: else it
    has set up what the next ones find.
    """

    max_tokens: int
    seconds: float
    seconds_per_token: float
    work: tuple[float, float, float]
    counts: bool = True


def sizes_to_try(windows: WindowLoader) -> list[int]:
    """Return padded tokens of a micro-batch: powers of two, largest first, that split windows differently.

    From the bound or, where that is more, a process's share of a window, down to its longest example.
    """
    ahead = _ahead(windows)
    shapes = [windows.shape(split.indices, split.pad_to) for split in ahead]
    most = max(rows * sum(lengths) for rows, lengths in shapes) / windows.accelerator.num_processes
    if windows.bound.max_tokens is not None:
        most = min(most, windows.bound.max_tokens)
    longest = max(1, *(int(windows.lengths[split.indices].max()) for split in ahead))
    sizes: dict[int, int] = {}  # micro-batches → the smallest size that gives so many
    for exponent in range(math.ceil(math.log2(most)), math.floor(math.log2(longest)), -1):
        size = min(2**exponent, windows.bound.max_tokens or 2**exponent)
        splits = _ahead(windows.with_bound(_of_size(windows.bound, size)))
        sizes[sum(max(map(len, split.processes)) for split in splits)] = size
    return list(sizes.values())


def search(
    sizes: Sequence[int], turns: int = TURNS[0], sets_up_each: bool = False
) -> Generator[tuple[int, bool], float, None]:
    """Sizes to train a window with, one after the other; each is answered with what a token of it took.

    With each comes whether the answer counts. The first does not: it is what a run sets up once; with
    `sets_up_each`, the first of each size, for which a GPU loads other kernels. From the largest size down as
    long as that is not hopeless, then those that are close to the fastest, in turns.
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
    """The cost model by which these windows took so long: least squares of relative errors, no term below 0.

    The fixed cost is at least half the default's, as a smaller one makes tiny micro-batches.
    """
    from scipy.optimize import nnls  # late: it takes a second

    work, seconds = np.array([t.work for t in trials]), np.array([t.seconds for t in trials])
    (fixed, linear, quadratic), _ = nnls(work / seconds[:, None], np.ones(len(seconds)))
    if not linear:
        return default
    return Cost(max(fixed / linear, default.fixed / 2), min(linear / max(quadratic, 1e-30), NEVER))


class Tuning:
    """Try micro-batch sizes on a loader's next windows: `record` takes the seconds of each window.

    All processes decide alike, by the seconds of process 0. When memory runs out, the search starts again
    with the sizes below the one that was too large.
    """

    @classmethod
    def of(cls, windows: WindowLoader, num_windows: int | None) -> "Tuning | None":
        """Return a search for a run of this many windows (None: unknown).

        None where sizes are known, windows too few, or all sizes split alike.
        """
        if windows.bound.micro_batch_size is not None:
            raise ValueError(
                "tune: sizes are tried in tokens; give the loader max_tokens, not micro_batch_size"
            )
        least, most = TURNS
        num_windows = sys.maxsize if num_windows is None else num_windows
        a_size = 1 + least + _sets_up_each(windows)  # windows for it
        sizes = sizes_to_try(windows)[: max(0, (num_windows // 2 - 1) // a_size)]
        if len(sizes) < 2 or windows.tuned:
            return None
        return cls(windows, sizes, min(most, max(least, num_windows // 4 // len(sizes) - 1)))

    def __init__(self, windows: WindowLoader, sizes: Sequence[int], turns: int = TURNS[0]):
        self.windows, self._turns = windows, turns
        self.said: str | None = None  # what came of it, in a line
        self._begin(sizes)

    def record(self, seconds: float) -> None:
        """The loader's latest window took so long."""
        windows = self.windows
        if windows.bound is not self._tried:
            fit = [size for size in self._sizes if size <= (windows.bound.max_tokens or 0)]
            if len(fit) > 1:
                self._begin(fit)
            else:
                windows.end_trials(tuned=False)
                self.said = f"micro-batches: at most {windows.bound}, as memory ran out; no others are tried"
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
        """For the summary of a run; `max_tokens` is null while it is not known."""
        return {
            "max_tokens": self.windows.bound.max_tokens if self.said is not None else None,
            "cost": asdict(self.windows.cost),
            "trials": [asdict(trial) for trial in self.trials],
        }

    def _try(self, size: int, counts: bool) -> None:
        self._counts = counts
        if size != self._tried.max_tokens:  # else what workers hold ready need not be split again
            self._tried = _of_size(self.bound, size)
            self.windows.resplit(self._tried)

    def _choose(self) -> None:
        """By what each size is predicted to take for the windows ahead, and by how much it was off so far."""
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
            f"micro-batches: at most {best:,} padded tokens from the next window on, the fastest size tried "
            f"({others})"
        )


def _sets_up_each(windows: WindowLoader) -> bool:
    """Whether each size has its own set-up, as on a GPU, which loads other kernels."""
    return windows.accelerator.device.type == "cuda"


def _of_size(bound: Bound, max_tokens: int) -> Bound:
    """So many padded tokens, and no more bytes than before."""
    return replace(bound, max_tokens=max_tokens)


def _ahead(windows: WindowLoader) -> list[Split]:
    """The next windows, as they are split; of a stream, those at hand."""
    return [windows.split(*number) for number in windows.plan.ahead(windows.epoch, windows.window, AHEAD)]


def _work(windows: WindowLoader, split: Split) -> tuple[float, float, float]:
    """That of `Trial`."""
    found = []
    for process in split.processes:
        shapes = [windows.shape(indices, split.pad_to) for indices in process]
        sizes = [(rows * sum(lengths), sum(lengths)) for rows, lengths in shapes]
        tokens, quadratic = sum(size for size, _ in sizes), sum(size * length for size, length in sizes)
        found.append((float(len(sizes)), float(tokens), float(quadratic)))
    return max(found, key=lambda work: _total(windows.cost, work))


def _total(cost: Cost, work: Sequence[float]) -> float:
    """What micro-batches cost together: `cost`, of each."""
    micro_batches, tokens, quadratic = work
    return cost.fixed * micro_batches + tokens + quadratic / cost.quadratic
