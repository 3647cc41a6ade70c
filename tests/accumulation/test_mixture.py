"""Windows of a mixture: the share of each source, resuming, and the loss of each source."""

from math import ceil

import numpy as np
import pytest
from accelerate import Accelerator

from gradacc_hf import WindowLoader, train
from gradacc_hf.accumulation.batch_schedule import ScheduledBatch
from gradacc_hf.accumulation.mixture import MixedPlan, Sources
from gradacc_hf.accumulation.reference import RecordGradients
from gradacc_hf.verification.tiny_models import build_head


def mixed_plan(sizes, shares, batch, seed=0, **more):
    names = [str(source) for source, size in enumerate(sizes) for _ in range(size)]
    shares = {str(source): share for source, share in enumerate(shares)}
    settings = {"shuffle": True, "drop_last": False, **more}
    return MixedPlan(Sources.of(names, shares, len(names)), batch, seed, **settings)


def counts_of(plan, epochs):
    """Return the examples of each source in each window."""
    windows = [window for epoch in range(epochs) for window in plan.walk(epoch, 0)]
    number = len(plan.sources.names)
    return np.array(
        [np.bincount(plan.sources.of_examples[plan.indices(*w)], minlength=number) for w in windows]
    )


@pytest.mark.parametrize("seed", range(60))
def test_every_window_and_every_run_of_windows_holds_the_shares_to_the_nearest_example(seed):
    draw = np.random.default_rng(seed)
    number = int(draw.integers(2, 9))
    sizes = draw.integers(1, 90, number)
    shares = [int(share) for share in draw.choice([1, 1, 2, 3, 5, 10, int(draw.integers(1, 100))], number)]
    batch = int(draw.integers(1, min(70, sizes.sum()) + 1))
    counts = counts_of(mixed_plan(sizes, shares, batch, seed), epochs=3)
    assert (counts.sum(1) == batch).all(), "every window is full"
    assert len(counts) == 3 * ceil(sizes.sum() / batch)
    exact = np.array(shares) / sum(shares)
    assert (abs(counts - batch * exact) < 1 - 1e-9).all()
    so_far = batch * np.arange(1, len(counts) + 1)[:, None] * exact
    assert (abs(counts.cumsum(0) - so_far) < 1 - 1e-9).all()


def test_a_source_without_further_examples_starts_again_in_another_order():
    plan = mixed_plan([30, 7], [3, 1], 8)
    seen = np.concatenate(
        [plan.indices(epoch, w) for epoch in range(3) for w in range(plan.num_windows(epoch))]
    )
    for members in (range(30), range(30, 37)):
        drawn = [index for index in seen.tolist() if index in members]
        passes = [drawn[start : start + len(members)] for start in range(0, len(drawn), len(members))]
        whole = [one for one in passes if len(one) == len(members)]
        assert all(sorted(one) == list(members) for one in whole)
        assert len(whole) > 1
    assert {*mixed_plan([30, 7], [3, 1], 8, seed=1).indices(0, 0)} != {*plan.indices(0, 0)}


def test_windows_do_not_depend_on_the_order_in_which_they_are_read():
    plan, other = (mixed_plan([50, 20, 9], ["0.5", 0.3, 0.2], 7) for _ in range(2))
    windows = [(epoch, window) for epoch in range(3) for window in range(plan.num_windows(epoch))]
    forward = [plan.indices(*window).tolist() for window in windows]
    assert [other.indices(*window).tolist() for window in reversed(windows)] == forward[::-1]
    resumed = other.at({"seed": 0, "epoch": 2, "window": 3})
    assert resumed.indices(2, 3).tolist() == plan.indices(2, 3).tolist()
    assert plan.examples_before(2, 3) == 7 * (2 * plan.num_windows(0) + 3)


def test_sizes_of_windows_may_change():
    plan = mixed_plan([60, 40], [1, 2], ScheduledBatch({0: 6, 4: 9, 9: 30}))
    counts = counts_of(plan, epochs=3)
    assert counts[:10].tolist() == [[2, 4]] * 4 + [[3, 6]] * 5 + [[10, 20]]


def test_without_shuffling_sources_are_read_in_their_order():
    plan = mixed_plan([4, 4], [1, 1], 4, shuffle=False)
    assert [plan.indices(0, window).tolist() for window in range(2)] == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_drop_last_leaves_out_the_window_that_all_examples_do_not_fill():
    assert mixed_plan([10, 5], [1, 1], 4, drop_last=True).num_windows(0) == 3
    assert mixed_plan([10, 5], [1, 1], 4).num_windows(0) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sources": ["a"]}, "sources has 1 names for 4 examples"),
        ({"sources": ["a"] * 4, "shares": {"a": 1, "b": 1}}, "differ in 'b'"),
        ({"sources": ["a"] * 4, "shares": {"a": 0}}, "the weight of source 'a' is 0"),
        ({"sources": ["a"] * 4, "shares": {"a": float("nan")}}, "the weight of source 'a' is nan"),
        ({"shares": {"a": 1}}, "shares needs sources="),
        ({"weights": [1, 2]}, r"weights has shape \(2,\)"),
        ({"weights": [1, 2, -1, 1]}, "the weight of example 2 is -1"),
        ({"weights": [1, float("nan"), 1, 1]}, "the weight of example 1 is nan"),
    ],
)
def test_sources_and_weights_that_do_not_fit_are_refused(given, message):
    data = [{"labels": 0}] * 4
    with pytest.raises(ValueError, match=message):
        WindowLoader(data, 2, accelerator=Accelerator(cpu=True), micro_batch_size=1, **given)


def test_a_stream_has_no_sources():
    with pytest.raises(ValueError, match="not for a stream"):
        WindowLoader(_Stream(), 2, accelerator=Accelerator(cpu=True), weights=[1.0], max_tokens=4)


class _Stream:
    def __iter__(self):
        yield {"labels": 0}


@pytest.mark.parametrize("kind", ["causal_lm", "sequence_classification"])
def test_the_loss_of_each_source_is_the_mean_over_its_items(kind):
    accelerator, head = Accelerator(cpu=True), build_head(kind, "gpt2")
    examples = head.examples(np.random.default_rng(3).integers(3, 30, 25).tolist())
    sources = ["chats"] * 18 + ["alpaca"] * 7
    windows = WindowLoader(
        examples,
        8,
        accelerator=accelerator,
        collate_fn=head.collate,
        num_items=head.num_items,
        max_tokens=64,
        sources=sources,
        shares={"chats": 3, "alpaca": 1},
    )
    model, optimizer = accelerator.prepare(head.model, RecordGradients(head.model))
    records = train(model, optimizer, windows, accelerator=accelerator)
    assert len(records) == 4
    for record in records:
        indices = windows.plan.indices(0, record.window - 1)
        assert [sources[i] for i in indices].count("alpaca") == 2
        total = 0.0
        for name, found in record.source_losses.items():
            batches = [head.collate([examples[i]]) for i in indices if sources[i] == name]
            items = [windows.count_items(batch) for batch in batches]
            losses = [float(model(**batch).loss.detach()) for batch in batches]
            assert found == pytest.approx(np.average(losses, weights=items), rel=1e-5)
            total += found * sum(items)
        assert total / record.items == pytest.approx(record.loss, rel=1e-5)


def test_a_loss_of_its_own_has_no_losses_by_source():
    accelerator, head = Accelerator(cpu=True), build_head("sequence_classification", "gpt2")
    windows = WindowLoader(
        head.examples([5] * 8),
        4,
        accelerator=accelerator,
        collate_fn=head.collate,
        micro_batch_size=2,
        sources=["a", "b"] * 4,
    )
    model, optimizer = accelerator.prepare(head.model, RecordGradients(head.model))

    def own_loss(outputs, batch):
        return 2 * outputs.loss

    [first, _] = train(model, optimizer, windows, accelerator=accelerator, compute_loss=own_loss)
    assert first.source_losses == {}
