"""Tuning finds the fastest micro-batch size on the first windows of a run, and nothing else changes."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from gradacc_hf import WindowLoader, fine_tune
from gradacc_hf.accumulation.memory_model import MicroBatchMemory
from gradacc_hf.accumulation.reference import EXACT, RecordGradients, relative_error
from gradacc_hf.accumulation.splitting import Bound, Cost
from gradacc_hf.training.autotune import Trial, Tuning, fit_cost, search, sizes_to_try
from gradacc_hf.verification.tiny_models import build_head

LENGTHS = np.random.default_rng(5).integers(3, 40, size=300).tolist()


class Noting(WindowLoader):
    """Record the examples in each window."""

    def __iter__(self):
        for window in super().__iter__():
            self.seen = [*getattr(self, "seen", []), window.indices.tolist()]
            yield window


def make_loader(**split):
    head = build_head("sequence_classification", "bert")
    accelerator = Accelerator(cpu=True)
    windows = Noting(head.examples(LENGTHS), 10, accelerator=accelerator, collate_fn=head.collate, **split)
    return head.model, windows


def run(tune, **split):
    """Train 30 windows; return the loader, the summary, gradients and indices."""
    model, windows = make_loader(**(split or {"max_tokens": 160}))
    recorder = RecordGradients(model)
    summary = fine_tune(model, recorder, windows, accelerator=windows.accelerator, tune=tune)
    return windows, summary, recorder.gradients, windows.seen


def answered(sizes, seconds, **settings):
    """Return the sizes that a search tries with these times. Sizes whose time does not count are negative."""
    trying, tried = search(sizes, **settings), []
    size, counts = next(trying)
    try:
        while True:
            tried.append(size if counts else -size)
            size, counts = trying.send(seconds[size] if counts else 99)
    except StopIteration:
        return tried


def test_all_sizes_are_tried_and_those_that_are_close_again():
    seconds = {4096: 1.25, 2048: 1.1, 1024: 1.0, 512: 1.2}
    expected = [-4096, 4096, 2048, 1024, 512, *2 * [2048, 1024]]
    assert answered([4096, 2048, 1024, 512], seconds) == expected


def test_on_a_gpu_the_first_window_of_each_size_counts_for_nothing():
    seconds = {4096: 1.0, 2048: 1.1, 1024: 1.4, 512: 1.2}
    expected = [-4096, 4096, -2048, 2048, -1024, 1024, *2 * [4096, 2048]]
    assert answered([4096, 2048, 1024, 512], seconds, sets_up_each=True) == expected


def test_sizes_below_one_that_is_hopeless_are_not_tried():
    assert answered([64, 32, 16, 8], {64: 1.0, 32: 2.0}) == [-64, 64, 32, 64, 64]


def test_the_cost_model_is_that_by_which_the_windows_took_so_long():
    truth, draw = Cost(fixed=300.0, quadratic=200.0), np.random.default_rng(0)
    trials = []
    for _ in range(8):
        pieces = [(int(rows), int(length)) for rows, length in draw.integers(1, 60, size=(5, 2))]
        tokens = sum(rows * length for rows, length in pieces)
        work = (len(pieces), tokens, sum(rows * length**2 for rows, length in pieces))
        trials.append(Trial(1, 0.003 * sum(float(truth(*piece)) for piece in pieces), 0.0, work))
    found = fit_cost(trials)
    assert (found.fixed, found.quadratic) == pytest.approx((300.0, 200.0))


def test_windows_that_do_not_tell_do_not_cut_into_crumbs():
    trials = [Trial(1, 0.01 * tokens, 0.0, (5, tokens, 40 * tokens)) for tokens in (300, 400, 500)]
    assert fit_cost(trials).fixed >= Cost().fixed / 2


@pytest.fixture(scope="module")
def tuned():
    return run(tune=True)


def test_a_run_that_tries_sizes_trains_the_same(tuned):
    windows, summary, gradients, indices = tuned
    _, untouched, expected, expected_indices = run(tune=False)
    assert indices == expected_indices  # each window once
    assert max(relative_error(*pair) for pair in zip(gradients, expected, strict=True)) < EXACT
    tried = {trial["max_tokens"] for trial in summary["tuning"]["trials"]}
    assert len(tried) >= 2
    assert windows.bound.max_tokens == summary["tuning"]["max_tokens"]
    assert windows.bound.max_tokens in tried
    assert summary["micro_batches"] == f"{windows.bound.max_tokens:,} padded tokens"
    assert untouched["tuning"] is None
    assert summary["first_window"] == untouched["first_window"]  # split as it ran, before other sizes


def test_the_choice_is_kept_where_a_run_goes_on(tuned):
    state = tuned[0].state_dict()
    _, again = make_loader(max_tokens=160)
    again.load_state_dict(state)
    assert (again.bound, again.cost) == (tuned[0].bound, tuned[0].cost)
    assert Tuning.of(again, 100) is None  # the loader is already tuned
    _, smaller = make_loader(max_tokens=50)
    smaller.load_state_dict(state)
    assert smaller.bound.max_tokens <= 50
    assert [piece.tolist() for piece in again.split(3, 0).processes[0]] == [
        piece.tolist() for piece in tuned[0].split(3, 0).processes[0]
    ]


def trying():
    """Return a loader, and the search for the size after two windows."""
    _, windows = make_loader(max_tokens=160)
    tuning = Tuning(windows, sizes_to_try(windows))
    for _ in range(2):
        next(iter(windows))
        tuning.record(1.0)
    return windows, tuning


def test_a_run_that_is_stopped_while_it_tries_keeps_what_it_may_take():
    windows, tuning = trying()
    assert windows.bound.max_tokens < 160 == windows.trial_bound.max_tokens
    assert tuning.said is None


def test_no_size_exceeds_the_memory():
    numbers = {"exponents": np.array([(1, 1)]), "activations": np.array([[10.0]]), "loss": np.zeros((1, 1))}
    memory = MicroBatchMemory(parameters=100, gradients=0, optimizer=0, **numbers)
    _, windows = make_loader(bound=Bound(max_bytes=100 + 10 * 90, memory=memory))
    sizes = sizes_to_try(windows)
    assert max(sizes) == 128  # larger sizes split like the memory bound of 90 tokens
    for size in sizes:
        cut = windows.with_bound(Bound(max_tokens=size, max_bytes=1000, memory=memory)).split(0, 0)
        for rows, lengths in (cut_shape for cut_shape in map(cut_of(windows), cut.processes[0])):
            assert rows * lengths[0] <= min(90, size)


def cut_of(windows):
    return lambda piece: windows.shape(piece)


@pytest.mark.parametrize(("max_tokens", "num_windows"), [(2, 100), (160, 8)])
def test_where_sizes_cut_alike_or_windows_are_few_nothing_is_tried(max_tokens, num_windows):
    _, windows = make_loader(max_tokens=max_tokens)
    assert Tuning.of(windows, num_windows) is None
    assert windows.bound == Bound(max_tokens=max_tokens)


def test_a_bound_in_examples_is_refused():
    with pytest.raises(ValueError, match="give the loader max_tokens"):
        run(tune=True, micro_batch_size=4)


def test_where_memory_runs_out_only_smaller_sizes_are_tried():
    windows, tuning = trying()
    windows.resplit(windows.bound.halved(8, 8, [40]))  # as after running out of memory
    largest = windows.bound.max_tokens
    next(iter(windows))
    tuning.record(1.0)
    assert tuning.trials == []
    assert windows.bound.max_tokens <= largest


def test_where_even_the_smallest_size_is_too_large_the_search_ends():
    _, windows = make_loader(max_tokens=160)
    tuning = Tuning(windows, sizes_to_try(windows))
    windows.resplit(windows.bound.halved(2, 2, [40]))
    tuning.record(1.0)
    assert "memory ran out" in tuning.said
    assert windows.bound == Bound(max_tokens=40)


def test_a_size_may_be_tried_with_workers():
    _, summary, _, indices = run(tune=True, max_tokens=160, num_workers=1)
    assert sorted(np.concatenate(indices)) == list(range(len(LENGTHS)))
    assert torch.isfinite(torch.tensor(summary["tuning"]["trials"][0]["seconds"]))
