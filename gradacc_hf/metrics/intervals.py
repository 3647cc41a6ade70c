"""Intervals of metrics by the percentile bootstrap over rows.

A resample draws as many rows as there are, with replacement, and the metrics are computed of each resample.
The 95 % interval of a metric reaches from the 2.5th to the 97.5th percentile of these values. Source: Efron
and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13. SciPy draws the resamples.

The interval covers the choice of the rows. It does not cover the seed of the training.
"""

import math
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import scipy.stats

CONFIDENCE = 0.95
RESAMPLES = 1000
SEED = 0

Interval = tuple[float, float]
"""The lower and the upper bound."""


def intervals(
    score: Callable[[np.ndarray], Mapping[str, float]],
    number: int,
    resamples: int = RESAMPLES,
    after_resample: Callable[[], None] = lambda: None,
) -> dict[str, Interval]:
    """Return the interval of each metric that all resamples have. The same rows give the same intervals.

    Args:
        score: numbers of rows, which repeat → metrics.
        number: the number of rows. A single row has no intervals.
        resamples: the number of resamples.
        after_resample: called after each resample, for a progress bar.
    """
    if number < 2:
        return {}
    names = [*score(np.arange(number))]

    def values(rows: np.ndarray) -> np.ndarray:
        found = score(rows)
        after_resample()
        return np.array([found.get(name, math.nan) for name in names], np.float64)

    with warnings.catch_warnings(action="ignore"):  # about metrics that a resample does not define
        result = scipy.stats.bootstrap(
            (np.arange(number),),
            values,
            n_resamples=resamples,
            vectorized=False,
            method="percentile",
            confidence_level=CONFIDENCE,
            rng=np.random.default_rng(SEED),
        )
    bounds = zip(names, *map(np.ndarray.tolist, result.confidence_interval), strict=True)
    return {name: (low, high) for name, low, high in bounds if math.isfinite(low) and math.isfinite(high)}


def mean_interval(
    sums: np.ndarray, resamples: int = RESAMPLES, after_resample: Callable[[], None] = lambda: None
) -> Interval | None:
    """Return the interval of a mean over items, by examples; None if it is not known.

    Args:
        sums: for each example, the sum over the items and the number of items (examples, 2).
        resamples, after_resample: as for `intervals`.
    """
    if not np.isfinite(sums).all() or not sums[:, 1].any():
        return None

    def score(rows: np.ndarray) -> dict[str, float]:
        total, items = sums[rows].sum(0)
        return {"mean": total / items if items else math.nan}

    return intervals(score, len(sums), resamples, after_resample).get("mean")
