"""Whether a validation set is large enough for its figures.

A note is due in two cases. The set has fewer than `LEAST_EXAMPLES`. Or the 95 % interval of the headline
metric is wider than the distance from the baseline.
"""

import math

LEAST_EXAMPLES = 100
SHARES = ("accuracy", "exact_match", "recall_at_1", "recall_at_10")
"""Metrics that are shares of examples, whose interval is known from the number of examples."""
STANDARD_ERRORS = 2 * 1.96
"""Width of the 95 % interval of a share, by the normal approximation."""


def width_of_share(metric: str, value: float, examples: int) -> float | None:
    """Return the width of the 95 % interval of a share of examples; None for other metrics."""
    if metric not in SHARES or not 0 <= value <= 1 or not examples:
        return None
    return STANDARD_ERRORS * math.sqrt(value * (1 - value) / examples)


def small_set_note(
    metric: str, value: float, examples: int, baseline: float | None = None, width: float | None = None
) -> str | None:
    """Return a line if a set of examples is too small for its figures, or None.

    Args:
        metric: the headline metric.
        value: its value.
        examples: the number of examples.
        baseline: the metric of the baseline, if it is known.
        width: the width of the 95 % interval; by default of a share, by the normal approximation.
    """
    if width is None:
        width = width_of_share(metric, value, examples)
    if examples < LEAST_EXAMPLES:
        plural = "s" * (examples != 1)
        return f"{examples:,} example{plural}: fewer than {LEAST_EXAMPLES} are too few for reliable figures"
    if width is None or baseline is None or not math.isfinite(width + value + baseline):
        return None
    gain = abs(value - baseline)
    if width <= gain:
        return None
    interval = f"the 95 % interval of {metric} is {width:.4f} wide, and the baseline is {gain:.4f} away"
    if 2 * gain <= width:  # the interval holds the baseline
        return f"{interval}: {examples:,} examples show no difference"
    return f"{interval}: evaluate more than {examples:,} examples"
