"""The gradient noise scale: the noise of a window's gradient, and advice on the window size.

`noise_probe.py` measures the norms. `batch_schedule.py` has sizes that follow the noise scale.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

HORIZON = 64  # windows over which a noise scale is smoothed
MEASUREMENTS_NEEDED = 3  # measurements before any advice


@dataclass(frozen=True)
class SmallBatch:
    """The gradient of some examples of a window: number of examples, and norm of the mean gradient."""

    examples: int
    grad_norm: float


@dataclass
class NoiseScale:
    """The gradient noise scale tr(Σ) / |G|², in examples: the size beyond which larger windows save little.

    G is the mean gradient, Σ the covariance of the gradient of one example. The gradient g of B examples has
    E|g|² = |G|² + tr(Σ)/B. Two sizes b < B give both unknowns: tr(Σ) = (|g_b|² − |g_B|²) / (1/b − 1/B), and
    |G|² = |g_B|² − tr(Σ)/B. Both are smoothed before the division: tr(Σ) over the windows with both norms,
    |g_B|² over all windows.

    Source: McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", equation 2.8 and appendix
    A.1. The small batch may be part of the large one: the expectations are the same.

    Attributes:
        horizon: Time constant of the smoothing, in windows. Infinite gives the plain mean.
        measured: Windows with both norms.
    """

    horizon: float = HORIZON
    measured: int = 0
    _noise: float = 0.0  # weighted sum of tr(Σ)
    _noise_weight: float = 0.0  # sum of these weights
    _square: float = 0.0  # weighted sum of |g_B|²
    _inverse: float = 0.0  # weighted sum of 1/B
    _weight: float = 0.0  # sum of these weights

    def record(self, examples: int, grad_norm: float, small: SmallBatch | None = None) -> None:
        """Record a window.

        Args:
            examples: Examples of the window.
            grad_norm: Norm of the gradient before clipping.
            small: The gradient of a random part of the window, if it was measured.
        """
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
        """Whether any window has been recorded."""
        return self._weight > 0

    @property
    def scale(self) -> float:
        """The noise scale in examples. NaN if not measured; infinite if the noise hides the gradient."""
        if not self._noise_weight:
            return math.nan
        noise = self._noise / self._noise_weight
        signal = (self._square - noise * self._inverse) / self._weight
        if noise <= 0:
            return 0.0
        return noise / signal if signal > 0 else math.inf

    def state_dict(self) -> dict[str, float]:
        """Return the state as numbers."""
        return asdict(self)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "NoiseScale":
        """Return the noise scale of a `state_dict`."""
        return cls(**state)


def in_words(noise_scale: float, size: int, measured: int) -> str:
    """Return advice on the window size, with the number of measurements; "" without a noise scale."""
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
