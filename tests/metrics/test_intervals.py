"""Bootstrap intervals of metrics: against a known distribution, and against the metrics of all rows."""

import numpy as np
import pytest
import scipy.stats

from gradacc_hf.metrics import load
from gradacc_hf.metrics.intervals import intervals, mean_interval
from gradacc_hf.recipe.scoring import ScoredRows


def test_the_interval_of_a_share_is_the_binomial_one():
    right = np.arange(400) < 300

    found = intervals(lambda rows: {"share": right[rows].mean()}, len(right), resamples=4000)

    known = scipy.stats.binom.interval(0.95, 400, 0.75)
    assert found["share"] == pytest.approx(np.array(known) / 400, abs=0.004)
    assert found == intervals(lambda rows: {"share": right[rows].mean()}, len(right), resamples=4000)


def test_about_95_of_100_intervals_contain_the_mean_of_the_population():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        values = rng.normal(1.0, 2.0, 60)
        low, high = mean_interval(np.stack([values, np.ones(60)], 1), resamples=200)
        hits += low <= 1.0 <= high
    assert 0.90 <= hits / 200 <= 0.98


def test_a_mean_over_items_weighs_each_example_by_its_items():
    sums = np.array([[10.0, 10], [0.0, 0], [90.0, 30]] * 20)
    low, high = mean_interval(sums)
    assert low < 100 / 40 < high
    assert mean_interval(np.array([[1.0, 1], [np.nan, 1]])) is None


def test_a_metric_that_a_resample_lacks_has_no_interval_and_a_single_row_has_none():
    def score(rows):
        return {"always": 1.0, **({"sometimes": 1.0} if 0 in rows else {})}

    assert intervals(score, 5, resamples=50).keys() == {"always"}
    assert intervals(score, 1) == {}


@pytest.mark.parametrize("name", ["accuracy", "f1", "pearsonr", "seqeval", "rouge", "sacrebleu", "squad"])
def test_a_metric_of_all_rows_at_once_equals_the_metric_of_added_rows(name):
    rng = np.random.default_rng(0)
    if name == "seqeval":
        rows = [[rng.choice(["O", "B-A", "I-A", "B-B", "E-B"], 9).tolist() for _ in range(30)] for _ in "pr"]
    elif name in ("rouge", "sacrebleu", "squad"):
        texts = [" ".join(rng.choice(["a", "tea", "in", "the", "garden"], 9)) for _ in range(60)]
        rows = [texts[:30], [[text] for text in texts[30:]]]
    else:
        rows = [rng.integers(0, 4, 30), rng.integers(0, 4, 30)]
    metric = load(name)
    for prediction, reference in zip(*rows, strict=True):
        metric.add_batch(predictions=[prediction], references=[reference])

    assert load(name).compute(predictions=rows[0], references=rows[1]) == pytest.approx(metric.compute())
    scored = ScoredRows(*rows, lambda p, r: load(name).compute(predictions=p, references=r))
    assert (
        intervals(scored.score, 30, resamples=20).keys()
        == load(name).compute(predictions=rows[0], references=rows[1]).keys()
    )
