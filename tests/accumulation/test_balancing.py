"""Processes get about equal cost in few micro-batches; a loader holds what `gradacc bench balance` says."""

import json
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
from rich.console import Console

from gradacc_hf.accumulation.balancing import BALANCED
from gradacc_hf.accumulation.splitting import Bound, Cost, split_window
from gradacc_hf.bench.balance import (
    BalanceResult,
    Lengths,
    count_collectives,
    grow_by_data,
    grow_by_processes,
    print_balance,
    process_costs,
    simulate,
    strided,
    unevenness,
)

BOUND = Bound(max_tokens=2048)
LONG_TAILED = np.random.default_rng(0).lognormal(3.4, 1.0, size=20_000).clip(1, 2000).astype(int)
SIZES = [
    (8, 16, 40),
    (8, 64, 20),
    (64, 16, 10),
    (64, 64, 4),
    (1024, 16, 1),
]  # processes, examples each, windows


def windows_of(processes, examples_each, count):
    draw = np.random.default_rng([processes, examples_each])
    return [draw.choice(LONG_TAILED, processes * examples_each, replace=False) for _ in range(count)]


@pytest.mark.parametrize(("processes", "examples_each", "count"), SIZES)
def test_the_slowest_process_costs_little_more_than_the_mean_or_the_dearest_example(
    processes, examples_each, count
):
    for window in windows_of(processes, examples_each, count):
        split = split_window(window, BOUND, processes)
        assert unevenness(process_costs(split, window), window) <= BALANCED


@pytest.mark.parametrize(("processes", "examples_each", "count"), SIZES)
def test_a_strided_assignment_is_uneven_and_slower(processes, examples_each, count):
    for window in windows_of(processes, examples_each, count):
        theirs = process_costs(strided(window, BOUND, processes), window)
        ours = process_costs(split_window(window, BOUND, processes), window)
        assert unevenness(theirs, window) > BALANCED
        assert max(ours) < max(theirs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("processes", "examples_each"), [(3, 1), (8, 16), (64, 16), (64, 2)])
def test_every_process_has_something_and_every_example_comes_once(processes, examples_each, packed):
    (window,) = windows_of(processes, examples_each, 1)
    split = split_window(window, BOUND, processes, packed=packed)
    assert all(len(process) for process in split)
    pieces = [piece for process in split for piece in process]
    assert sorted(np.concatenate(pieces).tolist()) == list(range(len(window)))
    for piece in pieces:
        tokens = window[piece].sum() if packed else len(piece) * window[piece].max()
        assert tokens <= 2048 or len(piece) == 1


def test_packed_rows_are_balanced_too():
    for window in windows_of(8, 16, 20):
        split = split_window(window, BOUND, 8, packed=True)
        costs = [sum(Cost()(1, window[piece].sum()) for piece in process) for process in split]
        assert unevenness(costs, window) <= BALANCED


def test_a_cost_model_that_is_wrong_about_long_examples_makes_all_processes_late_alike():
    wrong = Cost(quadratic=400)
    for window in windows_of(64, 64, 4):
        split = split_window(window, BOUND, 64)
        assert unevenness(process_costs(split, window, wrong), window, wrong) < 1.15


def test_a_process_has_few_micro_batches_where_examples_dealt_by_length_have_many():
    for window in windows_of(64, 16, 5):
        ours = split_window(window, BOUND, 64)
        by_length = np.argsort(window)
        dealt = [by_length[process::64] for process in range(64)]
        theirs = [[hand[piece] for piece in split_window(window[hand], BOUND)[0]] for hand in dealt]
        assert max(map(len, ours)) < max(map(len, theirs))
        assert sum(process_costs(ours, window)) < 0.85 * sum(process_costs(theirs, window))


def test_a_window_for_1024_processes_is_planned_in_a_moment():
    (window,) = windows_of(1024, 16, 1)
    started = time.process_time()
    split_window(window, BOUND, 1024)
    assert time.process_time() - started < 2  # about 0.3


def test_a_loader_holds_8_bytes_an_example_and_never_more():
    found = grow_by_data(1_000_000)
    assert found.permutation_bytes == 4_000_000
    assert found.lengths_bytes < 4_100_000
    assert found.most_bytes < 8_100_000


def test_the_tables_are_whole_in_100_columns_and_the_result_is_json():
    lengths = Lengths("drawn", LONG_TAILED, 2048)
    by_processes = replace(grow_by_processes(lengths, 8), collectives={"all_gather": 1, "all_reduce": 3})
    result = BalanceResult(
        sizes={"drawn": (20_000, 50.0, 150.0, 2000, 2048)},
        balances=(replace(simulate(lengths, 8, 16, 2), plan_ms=1234.5, processes=1024),),
        by_data=(replace(grow_by_data(10_000), examples=10**9, most_bytes=16 * 10**9),),
        by_processes=(by_processes,),
        measured_with={},
    )
    assert result.balances[0].worst <= BALANCED < result.balances[0].strided_worst
    console = Console(record=True, width=100)
    print_balance(result, console)
    text = console.export_text()
    assert "…" not in text
    assert "within 1.05" in text
    json.dumps(asdict(result))


@pytest.mark.slow
def test_a_window_on_two_processes_needs_the_collectives_that_the_table_says():
    counts = count_collectives()
    assert counts["all_gather"] == 1  # numbers of items
    assert 2 <= counts["all_reduce"] <= 6  # the loss, and gradients in buckets
    assert counts.get("broadcast", 0) <= 1
    assert set(counts) <= {"all_gather", "all_reduce", "broadcast"}
