"""Decide from a few losses what a loss is a mean over. Numbers only.

A loss is a mean over items if the loss of examples together is the mean of their single losses, weighted by
their items. A sample of losses answers yes, no, or cannot tell. If all single losses are alike, every
weighted mean of them is the same.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

LOSS_RTOL_FP64 = 1e-9
"""Largest relative difference between two losses that differ only by float64 rounding."""
LOSS_RTOL_FP32 = 2e-5
"""The same for float32."""
LOSS_RTOL_HALF = 4e-3
"""The same for bf16 and fp16."""
LARGEST_NOISE = 0.05
"""Relative noise of a loss above which the loss is not a mean."""
DECIDING = 3.0
"""Multiple of the tolerance by which two means must differ. Otherwise the sample cannot separate them."""


@dataclass(frozen=True)
class LossSample:
    """Losses of a few examples.

    Attributes:
        alone: Loss of each example alone (examples,). It may be NaN for an example without items.
        together: Loss of all examples in one batch.
        repeated: Loss of a batch that repeats the first example with items, or None. Every mean gives the
            loss of this example. The difference is noise.
        rtol: Largest relative difference that is rounding.
    """

    alone: np.ndarray
    together: float
    repeated: float | None = None
    rtol: float = LOSS_RTOL_FP32

    @cached_property
    def noise(self) -> float:
        """Relative difference between the loss of an example alone and of the same example repeated."""
        finite = self.alone[np.isfinite(self.alone)]
        if self.repeated is None or not len(finite):
            return 0.0
        difference = abs(self.repeated - finite[0])
        return float(difference / abs(finite[0])) if finite[0] else float(difference > 0)

    @property
    def tolerance(self) -> float:
        """Relative difference of losses that is rounding. More noise is not rounding."""
        return max(self.rtol, min(4 * self.noise, LOSS_RTOL_FP32))

    @property
    def is_usable(self) -> bool:
        """Whether the losses are finite and not 0. Otherwise the sample decides nothing."""
        return bool(self.together and np.isfinite(self.together) and np.isfinite(self.alone).any())

    def mean(self, items: np.ndarray) -> float:
        """Return the mean of the single losses, weighted by items (examples,); NaN without items."""
        items = np.asarray(items, float)
        here = items > 0
        return float(np.average(self.alone[here], weights=items[here])) if here.any() else float("nan")

    def deviation(self, items: np.ndarray) -> float:
        """Return the relative difference between the loss together and the mean weighted by items."""
        found = abs(self.mean(items) - self.together) / (abs(self.together) or 1.0)
        return found if np.isfinite(found) else float("inf")

    def fits(self, items: np.ndarray) -> bool:
        """Whether the loss together is the mean weighted by items."""
        return self.noise < LARGEST_NOISE and self.deviation(items) <= self.tolerance

    def separates(self, items: np.ndarray, others: np.ndarray) -> bool:
        """Whether the means weighted by two counts differ so much that at most one of them fits."""
        difference = abs(self.mean(items) - self.mean(others))
        return difference > DECIDING * self.tolerance * abs(self.together)

    def decides(self, items: np.ndarray) -> bool:
        """Whether a mean that gives double weight to one of the examples would show."""
        doubled = np.asarray(items, float) * (1 + np.eye(len(self.alone)))
        return any(self.separates(items, other) for other in doubled)
