"""The split loses nothing, keeps the bound, balances processes, and is the cheapest there is."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradacc_hf.accumulation.memory_model import MicroBatchMemory
from gradacc_hf.accumulation.splitting import Bound, Cost, bounding_lengths, split_window

LENGTHS = st.lists(st.integers(1, 600), min_size=1, max_size=80)
BOUNDS = st.one_of(
    st.builds(lambda n: Bound(max_tokens=n), st.integers(1, 4096)),
    st.builds(lambda n: Bound(micro_batch_size=n), st.integers(1, 90)),
)


def total_cost(lengths, pieces, cost=Cost()):
    return sum(cost(len(piece), max(lengths[i] for i in piece)) for piece in pieces)


@settings(deadline=None, max_examples=300)
@given(LENGTHS, BOUNDS, st.integers(1, 9))
def test_every_example_comes_exactly_once_and_no_micro_batch_exceeds_the_bound(lengths, bound, num_processes):
    processes = split_window(lengths, bound, num_processes)
    assert len(processes) == num_processes
    pieces = [piece for process in processes for piece in process]
    assert sorted(np.concatenate(pieces).tolist()) == list(range(len(lengths)))
    for piece in pieces:
        longest = max(lengths[i] for i in piece)
        if bound.max_tokens is not None:
            assert len(piece) * longest <= bound.max_tokens or len(piece) == 1
        else:
            assert len(piece) <= bound.micro_batch_size


@settings(deadline=None, max_examples=300)
@given(LENGTHS, BOUNDS, st.integers(1, 9))
def test_the_slowest_process_has_at_most_the_mean_and_one_example_more(lengths, bound, num_processes):
    loads = [total_cost(lengths, process) for process in split_window(lengths, bound, num_processes)]
    assert max(loads) <= sum(loads) / num_processes + Cost()(1, max(lengths)) + 1e-6


def partitions(number, pieces=0, chosen=()):
    """All ways to put things into pieces, as each one's piece: Bell's number of them."""
    if len(chosen) == number:
        yield chosen
    else:
        for piece in range(pieces + 1):
            yield from partitions(number, max(pieces, piece + 1), (*chosen, piece))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=7), st.integers(1, 900))
def test_no_cut_of_any_kind_is_cheaper(lengths, max_tokens):
    bound = Bound(max_tokens=max_tokens)
    found = total_cost(lengths, split_window(lengths, bound)[0])
    for assignment in partitions(len(lengths)):
        pieces = [[i for i, p in enumerate(assignment) if p == piece] for piece in set(assignment)]
        if all(len(p) == 1 or len(p) * max(lengths[i] for i in p) <= max_tokens for p in pieces):
            assert found <= total_cost(lengths, pieces) + 1e-6


def test_the_costliest_micro_batch_comes_first():
    lengths = np.random.default_rng(0).integers(1, 500, size=64)
    (pieces,) = split_window(lengths, Bound(max_tokens=1024))
    costs = [Cost()(len(piece), lengths[piece].max()) for piece in pieces]
    assert costs == sorted(costs, reverse=True)


def test_the_order_of_the_window_does_not_change_what_is_padded():
    lengths = np.random.default_rng(0).integers(1, 500, size=64)
    shuffled = np.random.default_rng(1).permutation(lengths)
    shapes = [
        [(len(piece), int(values[piece].max())) for piece in split_window(values, Bound(max_tokens=1024))[0]]
        for values in (lengths, shuffled)
    ]
    assert shapes[0] == shapes[1]


def test_equal_lengths_are_cut_as_seldom_as_the_bound_allows():
    (pieces,) = split_window([10] * 16, Bound(micro_batch_size=5))
    assert sorted(map(len, pieces), reverse=True)[0] == 5
    assert len(pieces) == 4


def test_an_example_longer_than_the_bound_goes_alone():
    (pieces,) = split_window([5000, 5, 5, 5], Bound(max_tokens=64))
    assert [piece.tolist() for piece in pieces if 0 in piece] == [[0]]


def test_with_fewer_examples_than_processes_some_processes_have_none():
    assert [len(process) for process in split_window([3, 4], Bound(max_tokens=64), 5)] == [1, 1, 0, 0, 0]


def test_examples_without_tokens_are_split_too():
    (pieces,) = split_window([0, 0, 3], Bound(max_tokens=4))
    assert sorted(np.concatenate(pieces).tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"max_tokens": 4, "micro_batch_size": 4},
        {"max_tokens": 0},
        {"micro_batch_size": -1},
        {"max_tokens": 1.5},
        {"max_bytes": 100},
        {
            "max_tokens": 4,
            "memory": MicroBatchMemory(0, 0, 0, np.ones((1, 2)), np.ones((1, 1)), np.ones((1, 1))),
        },
    ],
)
def test_a_bound_that_cannot_work_is_refused(arguments):
    with pytest.raises(ValueError, match=r"max_tokens|micro_batch_size|max_bytes"):
        Bound(**arguments)


def test_planning_time_grows_about_linearly_with_the_window():
    lengths = np.random.default_rng(0).integers(1, 256, size=16_000)

    def seconds(size):
        times = []
        for _ in range(5):
            started = time.process_time()
            split_window(lengths[:size], Bound(max_tokens=4096))
            times.append(time.process_time() - started)
        return min(times)

    assert seconds(16_000) < 40 * seconds(1_000)  # 16 × if linear, 256 × if quadratic


def by_bytes(max_bytes, linear=100, quadratic=1, resident=1000):
    """rows × (linear × length + quadratic × length²) at one moment, half of it at another."""
    exponents = np.array([(0, 0), (1, 1), (1, 2)])
    activations = np.array([(500.0, linear, quadratic), (0.0, linear / 2, quadratic / 2)])
    memory = MicroBatchMemory(resident, 0, 0, exponents, activations, np.zeros((2, 3)))
    return Bound(max_bytes=max_bytes, memory=memory)


def test_one_budget_of_bytes_holds_for_one_long_example_and_for_many_short_ones():
    one_long = by_bytes(1).memory.bytes(1, 4096)
    many_short = by_bytes(1).memory.bytes(64, 64)
    assert many_short < one_long / 20  # as many tokens, and no attention over 4,096 of them
    bound = by_bytes(one_long)
    (pieces,) = split_window([4096] + [64] * 64, bound)
    assert [len(piece) for piece in pieces if 0 in piece] == [1]
    assert max(map(len, pieces)) == 64  # a bound of 4,096 tokens would hold as many, of 4,095 one fewer
    assert bound.max_rows(64) > 64
    assert by_bytes(one_long - 1).exceeded_by(4096)
    assert not bound.exceeded_by(4096)


@settings(deadline=None, max_examples=100)
@given(LENGTHS, st.integers(2_000, 2_000_000), st.booleans())
def test_no_micro_batch_is_predicted_to_take_more_than_there_is(lengths, max_bytes, packed):
    bound = by_bytes(max_bytes)
    (pieces,) = split_window(lengths, bound, packed=packed)
    assert sorted(np.concatenate(pieces).tolist()) == list(range(len(lengths)))
    for piece in pieces:
        inside = [lengths[i] for i in piece]
        rows, length = (1, sum(inside)) if packed else (len(piece), max(inside))
        assert bound.memory.bytes(rows, length) <= max_bytes or len(piece) == 1


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 3000), st.integers(2_000, 20_000_000))
def test_the_most_rows_that_fit_fit_and_one_more_does_not(length, max_bytes):
    memory = by_bytes(1).memory
    rows = memory.max_rows(length, max_bytes)
    assert rows == 0 or memory.bytes(rows, length) <= max_bytes + 1
    assert memory.bytes(rows + 1, length) > max_bytes
    longest = memory.max_length(max_bytes)
    assert memory.bytes(1, longest) <= max_bytes + 1
    assert memory.bytes(1, longest + 1) > max_bytes


def test_columns_padded_on_their_own_have_lengths_of_their_own():
    exponents = np.array([(0, 0, 0), (1, 1, 0), (1, 0, 1)])
    memory = MicroBatchMemory(0, 0, 0, exponents, np.array([(0.0, 10, 1)]), np.zeros((1, 3)))
    assert memory.bytes(2, (30, 5)) == 610
    assert memory.max_rows((30, 5), 1000) == 3


def test_several_processes_hold_buckets_or_shares():
    memory = MicroBatchMemory(800, 800, 1600, np.array([(1, 1)]), np.ones((1, 1)), np.zeros((1, 1)))
    assert memory.over_processes(1, sharded=False) is memory
    assert memory.over_processes(4, sharded=False).resident == 4000
    assert memory.over_processes(4, sharded=True, largest_layer=50).resident == (200 + 100) + (200 + 50) + 400
    whole = memory.over_processes(4, sharded=True, largest_layer=50, whole_gradients=True)
    assert whole.resident == (200 + 100) + 800 + 400


def test_half_of_what_was_too_large_fits_and_all_of_it_does_not():
    bound = by_bytes(10**9)
    half = bound.halved(8, 8, [100])
    assert (half.max_rows(100), bound.max_rows(100) > 8) == (4, True)
    packed = bound.halved(3, 1, [900])  # one row of three examples
    assert not packed.exceeded_by(450)
    assert packed.exceeded_by(451)
    assert Bound(max_tokens=4096).halved(8, 8, [60, 40]) == Bound(max_tokens=400)
    assert Bound(micro_batch_size=16).halved(9, 9, [60]) == Bound(micro_batch_size=4)


def test_columns_hold_their_bytes_though_different_examples_are_longest():
    exponents = np.array([(0, 0, 0), (1, 2, 0), (1, 0, 1)])
    memory = MicroBatchMemory(0, 0, 0, exponents, np.array([(0.0, 1, 50)]), np.zeros((1, 3)))
    tokens = np.random.default_rng(0).integers(1, 100, size=(200, 2))
    bound = Bound(max_bytes=40_000, memory=memory)
    for pieces in split_window(bounding_lengths(tokens), bound, 2):
        for piece in pieces:
            assert memory.bytes(len(piece), tokens[piece].max(0)) <= 40_000
