"""Assign the examples of a window to processes: about equal cost, few micro-batches, little padding.

The input is the examples of a window sorted by length, and the cheapest split for a single process
(`Sorted`). The output is the micro-batches of each process, as runs (start, stop) of neighbours in the sorted
order. `splitting.py` computes the cost of an example and the bound of a micro-batch.
"""

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

BALANCED = 1.05  # × max(mean, most expensive example): cost of the slowest process that is good enough
PATIENCE = 1.1  # × cost of the slowest process so far: target at which the search for a better one ends
LONG_ONES = 0.6, 0.7  # shares of a process's target for the long examples, tried in turn
STEP = 1.005  # least factor by which the target rises

Run = tuple[int, int]


@dataclass(frozen=True)
class Sorted:
    """The examples of a window, shortest first, and the cheapest split for a single process.

    Attributes:
        each: For each example, the cost per row of a micro-batch in which it is the longest.
        most: For each example, the maximum rows of a micro-batch in which it is the longest.
        fixed: Cost of a micro-batch apart from the rows.
        begins: `begins[stop]` is the start of the last micro-batch in the cheapest split of examples before
            `stop`.
        least: `least[stop]` is the cost of the cheapest split of the examples before `stop`.
    """

    each: Sequence[float]
    most: Sequence[int]
    fixed: float
    begins: Sequence[int]
    least: Sequence[float]

    def cost(self, run: Run) -> float:
        """Return the cost of any micro-batch, padded."""
        start, stop = run
        return self.fixed + (stop - start) * self.each[stop - 1]

    def cheapest_runs(self) -> list[Run]:
        """Return the micro-batches of the cheapest split."""
        runs, stop = [], len(self.each)
        while stop:
            runs.append((self.begins[stop], stop))
            stop = self.begins[stop]
        return runs

    def cost_of_split(self, run: Run) -> float:
        """Return the cost of a micro-batch of the cheapest split, packed or not."""
        return self.least[run[1]] - self.least[run[0]]


def least_possible(examples: Sorted, num_processes: int) -> float:
    """Return a lower bound of the cost of the slowest process, given that no example can be split."""
    return max(examples.least[-1] / num_processes, examples.fixed + examples.each[-1])


def balance(examples: Sorted, num_processes: int) -> tuple[list[list[Run]], float]:
    """Return the micro-batches of each process, and the cost of the slowest process.

    All processes are filled up to a target cost. The target rises until all examples are assigned and the
    processes are balanced.
    """
    until = [0.0, *accumulate(examples.each)]
    most_expensive = examples.fixed + examples.each[-1]
    target, found, least = examples.least[-1] / num_processes, [], float("inf")
    while target < PATIENCE * least:
        missing = []
        for share in LONG_ONES:
            processes, left = _fill(examples, num_processes, target, share)
            missing.append(until[left[1]] - until[left[0]])
            if not missing[-1]:
                loads = [sum(map(examples.cost, runs)) for runs in processes]
                slowest = max(loads)
                balanced = slowest <= BALANCED * max(sum(loads) / num_processes, most_expensive)
                if balanced or slowest < least:
                    found, least = processes, slowest
                if balanced:
                    return found, least
        target = max(STEP * target, target + min(missing) / num_processes)
    return found, least


def _fill(examples: Sorted, num_processes: int, target: float, share: float) -> tuple[list[list[Run]], Run]:
    """Fill one process after the other up to `target`. Return the micro-batches and the remaining examples.

    Each process gets the longest remaining examples for a `share` of the target, then the shortest ones for
    the rest. Lengths are therefore similar within a micro-batch and mixed within a process. If long examples
    take longer than predicted, all processes are delayed equally.
    """
    each, most, fixed, begins = examples.each, examples.most, examples.fixed, examples.begins
    low, high = 0, len(each)
    processes = []
    for others in reversed(range(num_processes)):
        runs: list[Run] = []
        room, room_for_long = target, share * target
        spare = max(min(1, high - low), high - low - others)  # leave one example for each later process
        while spare:
            fit = min(int((room_for_long - fixed) / each[high - 1]), most[high - 1], spare)
            if fit < 1 and runs:
                break
            count, cheap = max(1, fit), high - begins[high]
            if cheap < count < _reach(examples, low, high, room_for_long):
                count = cheap
            runs.append((high - count, high))
            paid = examples.cost(runs[-1])
            high, spare, room, room_for_long = high - count, spare - count, room - paid, room_for_long - paid
        while spare and room >= fixed + each[low]:
            count = _short_ones(examples, low, spare, room)
            runs.append((low, low + count))
            low, spare, room = low + count, spare - count, room - examples.cost(runs[-1])
        processes.append(runs)
    return processes, (low, high)


def _reach(examples: Sorted, low: int, high: int, room: float) -> int:
    """Return how many of the longest examples fit into `room`, in the cheapest split."""
    stop = high
    while stop > low:
        start = max(low, examples.begins[stop])
        count = min(stop - start, int((room - examples.fixed) / examples.each[stop - 1]))
        if count < stop - start:
            return high - stop + max(0, count)
        room -= examples.cost((start, stop))
        stop = start
    return high - stop


def _short_ones(examples: Sorted, low: int, spare: int, room: float) -> int:
    """Return how many of the shortest examples make one micro-batch that fits into `room`.

    The padding of the micro-batch costs at most as much as another micro-batch would.
    """

    def too_many(count: int) -> bool:
        longest, fixed = examples.each[low + count - 1], examples.fixed
        padding = count * (longest - examples.each[low]) / 2
        return count > examples.most[low + count - 1] or fixed + count * longest > room or padding > fixed

    return max(1, bisect_left(range(1, spare + 1), True, key=too_many))


def deal(each: Sequence[float], num_processes: int) -> list[list[int]]:
    """Return ascending positions in `each` for every process.

    Examples are assigned in order of decreasing cost, each to the process with the least total (Graham 1969).
    With few examples per process, this can be better than runs of neighbours.
    """
    if num_processes == 1:
        return [list(range(len(each)))]
    load = [(0.0, process) for process in range(num_processes)]
    hands: list[list[int]] = [[] for _ in range(num_processes)]
    for place in reversed(range(len(each))):
        total, process = load[0]
        heapq.heapreplace(load, (total + each[place], process))
        hands[process].append(place)
    return [hand[::-1] for hand in hands]
