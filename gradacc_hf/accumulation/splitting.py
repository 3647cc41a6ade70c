"""Split a window over processes into micro-batches, by length and budget.

Takes the lengths of a window's examples and a bound on a micro-batch. Returns, for every process, the
positions of the examples in each of its micro-batches. Pure functions of numbers, without torch, data or
model. `sampler.py` decides which examples make a window, `balancing.py` which process gets which of them.
`Window.weigh` (`window.py`) makes every split give the same gradient.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from gradacc_hf.accumulation.balancing import BALANCED, Run, Sorted, balance, deal, least_possible
from gradacc_hf.accumulation.memory_model import LONGEST, Lengths, MicroBatchMemory


@dataclass(frozen=True)
class Cost:
    """Predicted cost of a micro-batch, in tokens of a short example.

    `fixed + tokens × (1 + length / quadratic)`: a constant per forward and backward (launches, and writing
    the gradient of every parameter once more), the matrix products, and attention. The constants are those of
    a 22 M-parameter encoder on a CPU; only their order of magnitude matters for where the splits fall.
    `ON_GPU`: where thousands of tokens are done in the time that their kernels take to be launched.
    """

    fixed: float = 128.0
    quadratic: float = 768.0

    def __call__(self, rows, length):
        """Cost of `rows` examples padded to `length` tokens; numbers or arrays."""
        return self.fixed + rows * length * (1.0 + length / self.quadratic)


ON_CPU, ON_GPU = Cost(), Cost(fixed=4096.0)


def usual_cost(device: str) -> Cost:
    """Return the cost model of a "cpu" or "cuda" device, before a run has measured one."""
    return ON_GPU if device == "cuda" else ON_CPU


@dataclass(frozen=True)
class Bound:
    """The most that one micro-batch may hold. Give one size, or `max_tokens` and `max_bytes` together.

    Args:
        max_tokens: Padded tokens.
        micro_batch_size: Examples.
        max_bytes: Bytes that the whole training step of one process takes, as `memory` predicts.
        memory: Predicts bytes from rows and padded lengths; needed with `max_bytes`.

    Raises:
        ValueError: For no size, two sizes, or a size below 1.
    """

    max_tokens: int | None = None
    micro_batch_size: int | None = None
    max_bytes: int | None = None
    memory: MicroBatchMemory | None = None

    def __post_init__(self):
        sizes = ("max_tokens", "micro_batch_size", "max_bytes")
        given = {name: getattr(self, name) for name in sizes if getattr(self, name) is not None}
        if len(given) != 1 and set(given) != {"max_tokens", "max_bytes"}:
            raise ValueError(
                f"give max_tokens or micro_batch_size, one of the two; found {given or 'neither'}"
            )
        if (self.max_bytes is None) != (self.memory is None):
            raise ValueError("max_bytes needs memory=, by which the bytes of a micro-batch are predicted")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")

    def __str__(self) -> str:
        """For messages, after "at most"."""
        if self.micro_batch_size is not None:
            return f"{self.micro_batch_size} examples"
        tokens = f"{self.max_tokens:,} padded tokens" if self.max_tokens is not None else ""
        memory = f"{self.max_bytes / 2**20:,.0f} MiB, as predicted" if self.max_bytes is not None else ""
        return " and ".join(filter(None, (tokens, memory)))

    def max_rows(self, length: Lengths) -> int:
        """Return how many examples padded to `length` tokens fit; at least one, which cannot be split."""
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        rows = LONGEST if self.max_tokens is None else self.max_tokens // max(1, int(np.sum(length)))
        if self.memory is not None:
            assert self.max_bytes is not None
            rows = min(rows, self.memory.max_rows(length, self.max_bytes))
        return max(1, rows)

    def first_packed(self, until: np.ndarray, stop: int) -> int:
        """The first example that fits into one row with all up to `stop`; `until`: tokens before each."""
        if self.micro_batch_size is not None:
            return max(0, stop - self.micro_batch_size)
        return min(stop - 1, int(np.searchsorted(until, until[stop] - self._max_packed)))

    def cheapest_row(self, cost: Cost) -> float:
        """Tokens of the row in which a token costs least: where the constant costs as much as attention."""
        return min(math.sqrt(cost.fixed * cost.quadratic), self._max_packed)

    @cached_property
    def _max_packed(self) -> int:
        """How many tokens one row may have."""
        tokens = LONGEST if self.max_tokens is None else self.max_tokens
        if self.memory is None:
            return tokens
        assert self.max_bytes is not None
        return min(tokens, self.memory.max_length(self.max_bytes))

    def halved(self, examples: int, rows: int, lengths: Sequence[int]) -> "Bound":
        """One that holds half a micro-batch of so many examples, in `rows` padded to `lengths`."""
        if self.micro_batch_size is not None:
            return Bound(micro_batch_size=max(1, examples // 2))
        finer = replace(self, max_tokens=max(1, rows * sum(lengths) // 2))
        if self.memory is None:
            return finer
        half = (rows // 2, lengths) if rows > 1 else (1, [length // 2 for length in lengths])
        return replace(finer, max_bytes=min(self.max_bytes or 0, self.memory.bytes(*half)))

    def needs(self, rows: int, lengths: Sequence[int]) -> str:
        """What so many examples padded to `lengths` take, for messages: tokens, and bytes where predicted."""
        tokens = f"{rows * sum(lengths):,} padded tokens"
        if self.memory is None:
            return tokens
        return f"{tokens}, predicted to take {self.memory.bytes(rows, lengths) / 2**20:,.0f} MiB"

    def exceeded_by(self, length: Lengths) -> bool:
        """Does one example of `length` tokens take more than there is?"""
        if self.max_tokens is not None and int(np.sum(length)) > self.max_tokens:
            return True
        return self.memory is not None and self.memory.max_rows(length, self.max_bytes or 0) < 1


def split_window(
    lengths: Sequence[int] | np.ndarray,
    bound: Bound,
    num_processes: int = 1,
    cost: Cost = Cost(),
    packed: bool = False,
) -> list[list[np.ndarray]]:
    """Split a window of `len(lengths)` examples into `num_processes` lists of micro-batches.

    lengths: tokens (examples), or (examples, columns) as `bounding_lengths` gives them.

    Each micro-batch is an array of positions in `lengths`; every position comes exactly once. Processes get
    about equal cost, not equal counts, and a process's costliest micro-batch comes first, so that one too
    large for the memory shows at once. With fewer examples than processes some lists are empty. No
    micro-batch exceeds the bound unless a single example does. `packed`: a micro-batch is one row of all its
    examples' tokens, not as many rows as examples, padded to the longest.
    """
    if not len(lengths):
        return [[] for _ in range(num_processes)]
    columns = np.maximum(np.asarray(lengths).reshape(len(lengths), -1), 1)
    by_length = np.argsort(columns.sum(1), kind="stable")
    columns = columns[by_length]
    filled, slowest = [], math.inf
    if num_processes > 1 and not packed and len(columns):
        examples = _cheapest_split(columns, bound, cost)
        processes, slowest = balance(examples, num_processes)
        filled = [_most_expensive_first(by_length, runs, examples.cost) for runs in processes]
        if slowest <= BALANCED * least_possible(examples, num_processes):
            return filled
    dealt, slowest_dealt = [], 0.0
    for hand in deal(_alone(columns.sum(1), bound, cost, packed), num_processes):
        examples = _cheapest_split(columns[hand], bound, cost, packed)
        dealt.append(_most_expensive_first(by_length[hand], examples.cheapest_runs(), examples.cost_of_split))
        slowest_dealt = max(slowest_dealt, examples.least[-1])
    return filled if slowest <= slowest_dealt else dealt


def _alone(tokens: np.ndarray, bound: Bound, cost: Cost, packed: bool) -> list[float]:
    """What each example costs by itself; packed, its share of the cheapest row that it may be in."""
    if not packed:
        return (cost(1, tokens) - cost.fixed).tolist()
    row = np.maximum(tokens, bound.cheapest_row(cost))
    return (cost(1, row) * tokens / row).tolist()


def _most_expensive_first(
    positions: np.ndarray, runs: list[Run], cost: Callable[[Run], float]
) -> list[np.ndarray]:
    return [positions[start:stop] for start, stop in sorted(runs, key=cost, reverse=True)]


def _cheapest_split(columns: np.ndarray, bound: Bound, cost: Cost, packed: bool = False) -> Sorted:
    """Split examples, sorted by length, into micro-batches of the least summed cost.

    Dynamic programming over the start of the last micro-batch: `least[stop] = min over start of
    least[start] + cost(start:stop)`. In sorted order the optimal contiguous split is optimal among all
    splits, as swapping two examples between micro-batches makes neither shorter than its longest example.
    """
    n, lengths = len(columns), columns.sum(1)
    each, most = (cost(1, lengths) - cost.fixed).tolist(), [1] * n if packed else _most(columns, bound)
    least, begins = np.zeros(n + 1), [0] * (n + 1)
    rows = np.arange(n, 0.0, -1)  # rows[start - stop:] counts the examples in start:stop
    until = np.concatenate([[0], np.cumsum(lengths)])  # tokens of the examples before each
    for stop in range(1, n + 1):
        if packed:
            first = bound.first_packed(until, stop)
            totals = least[first:stop] + cost(1, until[stop] - until[first:stop]) - cost.fixed
        else:
            first = max(0, stop - most[stop - 1])
            totals = rows[n - stop + first :] * each[stop - 1]
            totals += least[first:stop]
        best = int(totals.argmin())
        least[stop], begins[stop] = totals[best] + cost.fixed, first + best
    return Sorted(each, most, cost.fixed, begins, least.tolist())


def _most(columns: np.ndarray, bound: Bound) -> list[int]:
    """For each example, how many a micro-batch may have that has it for its longest."""
    starts = np.flatnonzero((columns[1:] != columns[:-1]).any(1)) + 1
    starts = np.concatenate([np.arange(min(1, len(columns))), starts])
    rows = [min(bound.max_rows(columns[start]), len(columns)) for start in starts]
    return np.repeat(rows, np.diff(starts, append=len(columns))).tolist()


def bounding_lengths(tokens: np.ndarray) -> np.ndarray:
    """Tokens of a window, (examples, columns) → lengths by which any micro-batch of it keeps its bound.

    Columns are padded on their own, so that a micro-batch takes the longest anchor and the longest positive
    (or source and target), of different examples: no example says so much. Of examples sorted by their sum,
    this is the most of each column up to there.
    """
    if tokens.shape[1] == 1:
        return tokens
    order = np.argsort(tokens.sum(1), kind="stable")
    lengths = np.empty_like(tokens)
    lengths[order] = np.maximum.accumulate(tokens[order])
    return lengths


def padded_size(tokens: np.ndarray) -> int:
    """Tokens of a micro-batch's examples, (examples, columns) → with padding, each column to its longest."""
    return len(tokens) * int(tokens.max(0).sum())


def rounded_up(tokens: np.ndarray, multiple: int) -> np.ndarray:
    """Numbers of tokens, each up to the next multiple."""
    return -(-tokens // multiple) * multiple
