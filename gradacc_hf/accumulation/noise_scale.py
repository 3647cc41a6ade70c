"""The gradient noise scale: how noisy a window's gradient is, and what that says about its size.

`noise_probe.py` measures, `batch_schedule.py` has sizes that follow.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

HORIZON = 64  # windows over which a noise scale is smoothed
MEASUREMENTS_NEEDED = 3  # measurements, for a sentence about it


@dataclass(frozen=True)
class SmallBatch:
    """What a window's gradient would be of some of its examples alone: their number, and its norm."""

    examples: int
    grad_norm: float


@dataclass
class NoiseScale:
    """The gradient noise scale tr(Σ) / |G|², in examples: the size from which larger windows save little.

    G is the mean gradient, Σ the covariance of an example's. The gradient g of B examples has E|g|² = |G|² +
    tr(Σ)/B, so that two sizes give both: tr(Σ) = (|g_b|² − |g_B|²) / (1/b − 1/B), |G|² = |g_B|² − tr(Σ)/B.
    Each is smoothed before they are divided: tr(Σ) over the windows that have both norms, |g_B|² over all.
    Weights fall by half in about two thirds of `horizon` windows; infinite: the plain mean.

    Source: McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", equation 2.8 and appendix
    A.1. The small batch may be part of the large one, as expectations do not ask.
    """

    horizon: float = HORIZON
    measured: int = 0  # windows with both norms
    _noise: float = 0.0  # sums, with weights: of tr(Σ)
    _noise_weight: float = 0.0
    _square: float = 0.0  # of |g_B|²
    _inverse: float = 0.0  # of 1/B
    _weight: float = 0.0

    def record(self, examples: int, grad_norm: float, small: SmallBatch | None = None) -> None:
        """A window's size and its gradient's norm before clipping; with that of a random part, if known."""
        if not math.isfinite(grad_norm):
            return
        fading = math.exp(-1 / self.horizon)
        self._square = fading * self._square + grad_norm**2
        self._inverse = fading * self._inverse + 1 / examples
        self._weight = fading * self._weight + 1
        self._noise, self._noise_weight = fading * self._noise, fading * self._noise_weight
        if small is not None and small.examples < examples and math.isfinite(small.grad_norm):
            noise = (small.grad_norm**2 - grad_norm**2) / (1 / small.examples - 1 / examples)
            self._noise, self._noise_weight = self._noise + noise, self._noise_weight + 1
            self.measured += 1

    @property
    def seen(self) -> bool:
        """Has any window been told of?"""
        return self._weight > 0

    @property
    def scale(self) -> float:
        """In examples. NaN where nothing was measured; infinite where the gradient is lost in its noise."""
        if not self._noise_weight:
            return math.nan
        noise = self._noise / self._noise_weight
        signal = (self._square - noise * self._inverse) / self._weight
        if noise <= 0:
            return 0.0
        return noise / signal if signal > 0 else math.inf

    def state_dict(self) -> dict[str, float]:
        """All of it, as numbers."""
        return asdict(self)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "NoiseScale":
        """The one that `state_dict` was taken of."""
        return cls(**state)


def in_words(noise_scale: float, size: int, measured: int) -> str:
    """What windows of so many examples gain or lose by it, and from how many measurements that is known."""
    windows = f"windows of {size:,}"
    if math.isnan(noise_scale):
        return ""
    if noise_scale <= 0:
        return f"the noise scale is below what {windows} can measure: smaller windows would do"
    if math.isinf(noise_scale):
        return f"the noise scale is beyond what {windows} can measure: larger windows would still help"
    ratio = noise_scale / size
    known = f"the gradient noise scale is about {noise_scale:,.0f} examples ({measured:,} measurements): "
    if ratio > 2:
        return f"{known}{windows} are {ratio:.0f} × smaller; larger windows would still help"
    if ratio < 0.5:
        return f"{known}{windows} are {1 / ratio:,.0f} × larger; you pay for averaging"
    return f"{known}{windows} are about as large, where time and examples are well spent"
