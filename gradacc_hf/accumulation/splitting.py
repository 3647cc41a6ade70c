"""Split a window over processes into micro-batches, by length and budget.

The input is the lengths of the examples of a window and a bound on a micro-batch. The output is, for every
process, the positions of the examples in each micro-batch. All functions are pure functions of numbers,
without torch, data or model. `sampler.py` chooses the examples of a window. `balancing.py` assigns them to
processes. `Window.weigh` (`window.py`) makes every split give the same gradient.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from gradacc_hf.accumulation.balancing import BALANCED, Run, Sorted, balance, deal, least_possible
from gradacc_hf.accumulation.memory_model import LONGEST, Lengths, MicroBatchMemory

SHARE_ROUNDING = 1e-9  # of sums of shares
PADDED_ROWS = 2  # rows of a micro-batch without padding in the layers, as a multiple of those with padding


@dataclass(frozen=True)
class Cost:
    """Predicted cost of a micro-batch, in tokens of a short example.

    The cost is `fixed + tokens × (1 + length / quadratic)`. The three terms are a constant per forward and
    backward (kernel launches, and one more write of all gradients), the matrix products, and attention. The
    default constants are from a 22 M-parameter encoder on a CPU. Only the order of magnitude matters for the
    split. In `ON_GPU` the constant is larger: a GPU computes thousands of tokens in the time of the launches.

    Args:
        fixed: Constant cost of a micro-batch, in tokens.
        quadratic: Length at which attention costs as much as the matrix products, in tokens.
    """

    fixed: float = 128.0
    quadratic: float = 768.0

    def __call__(self, rows, length):
        """Return the cost of `rows` examples padded to `length` tokens; numbers or arrays."""
        return self.fixed + rows * length * (1.0 + length / self.quadratic)


ON_CPU, ON_GPU = Cost(), Cost(fixed=4096.0)


def usual_cost(device: str) -> Cost:
    """Return the default cost model of a "cpu" or "cuda" device."""
    return ON_GPU if device == "cuda" else ON_CPU


@dataclass(frozen=True)
class Bound:
    """The upper limit of one micro-batch. Give one size, or `max_tokens` and `max_bytes` together.

    Args:
        max_tokens: Padded tokens.
        micro_batch_size: Examples.
        max_bytes: Bytes of a whole training step in one process, as predicted by `memory`.
        memory: Predicts bytes from rows and padded lengths. Needed with `max_bytes`.

    Raises:
        ValueError: No size, two sizes, or a size below 1.
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
                f"set max_tokens or micro_batch_size, one of the two; found {given or 'neither'}"
            )
        if (self.max_bytes is None) != (self.memory is None):
            raise ValueError("max_bytes needs memory=, which predicts the bytes of a micro-batch")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")

    def __str__(self) -> str:
        return self.text()

    def text(self, tokens_are: str = "padded tokens") -> str:
        """Return the bound for a message, after the words "at most". Without padding, tokens are "tokens"."""
        if self.micro_batch_size is not None:
            return f"{self.micro_batch_size} examples"
        tokens = f"{self.max_tokens:,} {tokens_are}" if self.max_tokens is not None else ""
        memory = f"{self.max_bytes / 2**20:,.0f} MiB (predicted)" if self.max_bytes is not None else ""
        return " and ".join(filter(None, (tokens, memory)))

    def max_rows(self, length: Lengths) -> int:
        """Return how many examples padded to `length` tokens fit: at least 1, which cannot be split."""
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        rows = LONGEST if self.max_tokens is None else self.max_tokens // max(1, int(np.sum(length)))
        if self.memory is not None:
            assert self.max_bytes is not None
            rows = min(rows, self.memory.max_rows(length, self.max_bytes))
        return max(1, rows)

    def first_packed(self, until: np.ndarray, stop: int) -> int:
        """Return the first example that fits into one packed row with all later examples before `stop`.

        Args:
            until: For each example, the tokens of all earlier examples.
            stop: Position after the last example of the row.
        """
        if self.micro_batch_size is not None:
            return max(0, stop - self.micro_batch_size)
        return min(stop - 1, int(np.searchsorted(until, until[stop] - self._max_packed)))

    def shares(self, tokens: np.ndarray) -> np.ndarray:
        """Return the share of a micro-batch without padding that each example takes up (examples,).

        Examples fit into one micro-batch if their shares add up to at most 1.

        Args:
            tokens: Tokens of the examples, (examples, columns).
        """
        if self.micro_batch_size is not None:
            return np.full(len(tokens), 1.0 / self.micro_batch_size)
        found = np.zeros(len(tokens))
        if self.max_tokens is not None:
            found = tokens.sum(1) / self.max_tokens
        if self.memory is not None:
            assert self.max_bytes is not None
            different, inverse = np.unique(tokens, axis=0, return_inverse=True)
            rows = [self.memory.max_rows(lengths, self.max_bytes) for lengths in different]
            found = np.maximum(found, (1.0 / np.maximum(rows, 0.5))[inverse.ravel()])
        return found

    def holds_without_padding(self, tokens: np.ndarray) -> bool:
        """Whether a micro-batch without padding in the layers keeps the bound, where the rest stays padded.

        Args:
            tokens: Tokens of the examples, (examples, columns).
        """
        if len(tokens) > PADDED_ROWS * self.max_rows(tokens.max(0)):
            return False
        return self.memory is None or self.memory.bytes_without_padding(tokens) <= (self.max_bytes or 0)

    def cheapest_row(self, cost: Cost) -> float:
        """Return the length of a packed row with the least cost per token: constant cost equals attention."""
        return min(math.sqrt(cost.fixed * cost.quadratic), self._max_packed)

    @cached_property
    def _max_packed(self) -> int:
        """The maximum tokens of one row."""
        tokens = LONGEST if self.max_tokens is None else self.max_tokens
        if self.memory is None:
            return tokens
        assert self.max_bytes is not None
        return min(tokens, self.memory.max_length(self.max_bytes))

    def halved(self, examples: int, rows: int, lengths: Sequence[int], half_bytes: int = 0) -> "Bound":
        """Return a bound for half of a micro-batch.

        Args:
            examples: Examples of the micro-batch.
            rows: Rows of the micro-batch.
            lengths: Padded tokens of each column.
            half_bytes: Bytes of half of the micro-batch, if it has no padding and bytes are predicted.
        """
        if self.micro_batch_size is not None:
            return Bound(micro_batch_size=max(1, examples // 2))
        finer = replace(self, max_tokens=max(1, rows * sum(lengths) // 2))
        if self.memory is None:
            return finer
        half = (rows // 2, lengths) if rows > 1 else (1, [length // 2 for length in lengths])
        return replace(finer, max_bytes=min(self.max_bytes or 0, half_bytes or self.memory.bytes(*half)))

    def needs(self, rows: int, lengths: Sequence[int]) -> str:
        """Return the size of `rows` examples padded to `lengths`, for a message: tokens, predicted bytes."""
        tokens = f"{rows * sum(lengths):,} padded tokens"
        if self.memory is None:
            return tokens
        return f"{tokens}, predicted to take {self.memory.bytes(rows, lengths) / 2**20:,.0f} MiB"

    def exceeded_by(self, length: Lengths) -> bool:
        """Whether one example of `length` tokens alone exceeds the bound."""
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

    Each micro-batch is an array of positions in `lengths`. Every position occurs exactly once. Processes get
    about equal cost, not equal counts. The most expensive micro-batch of a process comes first, so that
    memory runs out at once if it is too large. With fewer examples than processes, some lists are empty. No
    micro-batch exceeds the bound unless a single example does.

    Args:
        lengths: Tokens (examples), or (examples, columns) from `bounding_lengths`.
        bound: The upper limit of one micro-batch.
        num_processes: Number of processes.
        cost: The cost model.
        packed: Whether a micro-batch is one row with the tokens of all examples. Otherwise it has one row per
            example, padded to the longest.
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


def split_without_padding(
    tokens: np.ndarray, bound: Bound, num_processes: int = 1, cost: Cost = Cost()
) -> list[list[np.ndarray]]:
    """Split a window for a model that computes no padding: as few micro-batches as fit, of about equal size.

    The micro-batches of a process have its examples in the order of the window. They are therefore random
    samples of the window, not sorted by length. Where few examples are much longer than others, micro-batches
    are filled from the longest example on, so that embeddings and head compute little padding.

    Args:
        tokens: Tokens of the examples, (examples, columns).
        bound: The upper limit of one micro-batch.
        num_processes: Number of processes.
        cost: The cost model.

    Returns:
        As `split_window`.
    """
    lengths = np.maximum(tokens, 1).sum(1)
    each, by_length = cost(1, lengths) - cost.fixed, np.argsort(lengths, kind="stable")
    hands = deal(each[by_length].tolist(), num_processes) if len(tokens) else [[]] * num_processes
    return [_equal_parts(np.sort(by_length[hand]), tokens, bound) for hand in hands]


def _equal_parts(positions: np.ndarray, tokens: np.ndarray, bound: Bound) -> list[np.ndarray]:
    """Split positions into few parts that keep the bound.

    The parts are consecutive and about equal, unless first-fit decreasing needs fewer. It does where examples
    are almost as large as a micro-batch, or much longer than others.
    """
    if not len(positions):
        return []
    shares = bound.shares(tokens)
    share, fitted = shares[positions], None
    middles, parts = np.cumsum(share) - share / 2, max(1, math.ceil(share.sum() - SHARE_ROUNDING))
    while fitted is None or parts <= len(fitted):
        number = np.floor(middles * parts / share.sum()).astype(int)  # of the part of each example
        if np.bincount(number, share).max() <= 1 + SHARE_ROUNDING:
            split = np.split(positions, np.flatnonzero(np.diff(number)) + 1)
            if all(len(part) == 1 or bound.holds_without_padding(tokens[part]) for part in split):
                return split
        fitted = fitted or _first_fit(positions, tokens, shares, bound)
        parts += 1
    return fitted


def _first_fit(
    positions: np.ndarray, tokens: np.ndarray, shares: np.ndarray, bound: Bound
) -> list[np.ndarray]:
    """Split positions by first-fit decreasing (Johnson 1973); each part is in ascending order."""
    parts = list[list[int]]()
    free, rows_left = np.zeros(0), np.zeros(0)  # of each part
    for position in positions[np.argsort(-shares[positions], kind="stable")]:
        fits = np.flatnonzero((free >= shares[position] - SHARE_ROUNDING) & (rows_left > 0))
        part = next((i for i in fits if bound.holds_without_padding(tokens[[*parts[i], position]])), None)
        if part is None:
            part = len(parts)
            parts.append([])
            free = np.append(free, 1.0)
            rows_left = np.append(rows_left, PADDED_ROWS * bound.max_rows(tokens[position]))
        parts[part].append(int(position))
        free[part] -= shares[position]
        rows_left[part] -= 1
    return [np.sort(part) for part in parts]


def _alone(tokens: np.ndarray, bound: Bound, cost: Cost, packed: bool) -> list[float]:
    """Return the cost of each example alone. If packed: its share of the cheapest possible row."""
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
    least[start] + cost(start:stop)`. The optimal contiguous split in sorted order is optimal among all
    splits: for given sizes of the micro-batches, sorted order minimises the longest length of each.
    """
    n, lengths = len(columns), columns.sum(1)
    each, most = (cost(1, lengths) - cost.fixed).tolist(), [1] * n if packed else _most(columns, bound)
    least, begins = np.zeros(n + 1), [0] * (n + 1)
    rows = np.arange(n, 0.0, -1)  # rows[start - stop:] counts the examples in start:stop
    until = np.concatenate([[0], np.cumsum(lengths)])  # until[i]: tokens of the examples before i
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
    """Return, for each example, the maximum rows of a micro-batch in which it is the longest."""
    starts = np.flatnonzero((columns[1:] != columns[:-1]).any(1)) + 1
    starts = np.concatenate([np.arange(min(1, len(columns))), starts])
    rows = [min(bound.max_rows(columns[start]), len(columns)) for start in starts]
    return np.repeat(rows, np.diff(starts, append=len(columns))).tolist()


def bounding_lengths(tokens: np.ndarray) -> np.ndarray:
    """Return lengths with which every micro-batch of a window keeps the bound: (examples, columns).

    Columns, such as anchor and positive or source and target, are padded separately. A micro-batch can have
    the longest anchor from one example and the longest positive from another. Sorted by total length, each
    example therefore gets the maximum of each column over all examples up to it.
    """
    if tokens.shape[1] == 1:
        return tokens
    order = np.argsort(tokens.sum(1), kind="stable")
    lengths = np.empty_like(tokens)
    lengths[order] = np.maximum.accumulate(tokens[order])
    return lengths


def padded_size(tokens: np.ndarray) -> int:
    """Return the padded tokens of a micro-batch, from the tokens (examples, columns) of its examples."""
    return len(tokens) * int(tokens.max(0).sum())


def padded_alone(tokens: np.ndarray, multiple: int, together: bool = False) -> np.ndarray:
    """Return the padded lengths of an example alone, from tokens (examples, columns).

    Args:
        tokens: Tokens of the examples.
        multiple: Lengths are rounded up to a multiple of it.
        together: Whether all columns of an example have the length of the longest.
    """
    padded = tokens if multiple == 1 else -(-tokens // multiple) * multiple
    return np.repeat(padded.max(1, keepdims=True), padded.shape[1], axis=1) if together else padded
