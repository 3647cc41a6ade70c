"""The gradient noise scale: how noisy a window's gradient is, and which window size that suggests.

`noise_probe.py` measures it. `batch_schedule.py` has window sizes that follow it.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from scipy.special import stdtrit

HORIZON = 64  # windows over which a noise scale is smoothed
NOISE_EVERY = 16  # windows between measurements in a long run
MEASUREMENTS_NEEDED = 3  # measurements, for a sentence about it
MEASUREMENTS_WANTED = 16  # measurements; shorter runs measure more often to reach this number
CONFIDENCE = 0.9  # share of intervals that contain the true noise scale
MUCH = 2.0  # a noise scale this many times as large as a window, or as small, gives advice


@dataclass(frozen=True)
class SmallBatch:
    """A random part of a window: the number of its examples, and the norm of their gradient."""

    examples: int
    grad_norm: float


@dataclass
class NoiseScale:
    """The gradient noise scale tr(Σ) / |G|², in examples: the size from which larger windows save little.

    G is the mean gradient, Σ the covariance of the gradients of examples. The gradient g of B examples has
    E|g|² = |G|² + tr(Σ)/B. Two sizes b < B give both: tr(Σ) = (|g_b|² − |g_B|²) / (1/b − 1/B), and
    |G|² = |g_B|² − tr(Σ)/B. Each is averaged before they are divided: tr(Σ) over the windows that have both
    norms, |g_B|² over all windows. The weight of a window falls by half in about two thirds of `horizon`
    windows. An infinite horizon gives the plain mean.

    Source: McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", equation 2.8 and appendix
    A.1. The small batch may be part of the large one: expectations are the same.

    The interval is Fieller's for ρ = N / Q, where N is the mean of tr(Σ) and Q the mean of |g_B|². It holds
    all ρ with (N − ρQ)² ≤ t² (V_N − 2ρ V_NQ + ρ² V_Q). V are the variances and the covariance of the two
    weighted means, over independent windows. t is Student's quantile with one degree of freedom less than
    Kish's effective number of measurements. The noise scale is ρ / (1 − ρ/B): infinite from ρ = B on. On
    sampled gradients, 85 to 92 % of the 90 % intervals contain the true value. The share is lowest for
    gradients of few dimensions (`tests/accumulation/test_noise_scale.py`).

    Source: Fieller 1954, "Some Problems in Interval Estimation"; Kish 1965, "Survey Sampling".
    """

    horizon: float = HORIZON
    measured: int = 0  # windows with both norms
    _noise: float = 0.0  # weighted sums over windows with both norms: of tr(Σ)
    _noise_weight: float = 0.0
    _square: float = 0.0  # weighted sums over all windows: of |g_B|²
    _inverse: float = 0.0  # of 1/B
    _weight: float = 0.0
    _noise_squared: float = 0.0  # for the interval, over windows with both norms: of tr(Σ)²
    _noise_times_square: float = 0.0  # of tr(Σ) |g_B|²
    _measured_square: float = 0.0  # of |g_B|²
    _noise_weight_squared: float = 0.0  # of the weights
    _square_squared: float = 0.0  # for the interval, over all windows: of |g_B|⁴
    _weight_squared: float = 0.0  # of the weights
    has_spread: bool = True  # whether all windows are in the sums for the interval

    def record(self, examples: int, grad_norm: float, small: SmallBatch | None = None) -> None:
        """Add a window.

        Args:
            examples: the size of the window.
            grad_norm: the norm of the gradient before clipping.
            small: the same for a random part of the window, where it was measured.
        """
        if not math.isfinite(grad_norm):
            return
        square = grad_norm**2
        self._fade(math.exp(-1 / self.horizon))
        self._square += square
        self._square_squared += square**2
        self._inverse += 1 / examples
        self._weight += 1
        self._weight_squared += 1
        if small is not None and small.examples < examples and math.isfinite(small.grad_norm):
            noise = (small.grad_norm**2 - square) / (1 / small.examples - 1 / examples)
            self._noise += noise
            self._noise_weight += 1
            self._noise_squared += noise**2
            self._noise_times_square += noise * square
            self._measured_square += square
            self._noise_weight_squared += 1
            self.measured += 1

    def _fade(self, factor: float) -> None:
        """Lower the weights of the windows so far."""
        for name in ("_noise", "_noise_weight", "_square", "_inverse", "_weight", "_noise_squared"):
            setattr(self, name, factor * getattr(self, name))
        for name in ("_noise_times_square", "_measured_square", "_square_squared"):
            setattr(self, name, factor * getattr(self, name))
        self._noise_weight_squared *= factor**2
        self._weight_squared *= factor**2

    @property
    def seen(self) -> bool:
        """Whether any window was recorded."""
        return self._weight > 0

    @property
    def scale(self) -> float:
        """The estimate, in examples. NaN without a measurement; infinite if noise hides the mean gradient."""
        if not self._noise_weight:
            return math.nan
        noise = self._noise / self._noise_weight
        signal = (self._square - noise * self._inverse) / self._weight
        if noise <= 0:
            return 0.0
        return noise / signal if signal > 0 else math.inf

    @property
    def interval(self) -> tuple[float, float]:
        """The bounds of the noise scale, in examples, with confidence `CONFIDENCE`.

        (0, infinity) where the measurements exclude no value; (NaN, NaN) without a measurement.
        """
        if not self._noise_weight:
            return math.nan, math.nan
        effective = self._noise_weight**2 / self._noise_weight_squared if self.has_spread else 0.0
        if self.measured < MEASUREMENTS_NEEDED or effective < 2:
            return 0.0, math.inf
        noise, square = self._noise / self._noise_weight, self._square / self._weight
        limit = float(stdtrit(effective - 1, (1 + CONFIDENCE) / 2)) ** 2
        of_noise, of_both, of_square = self._variances()
        # The bounds of ρ are the roots of quadratic · ρ² − 2 · linear · ρ + constant.
        quadratic = square**2 - limit * of_square
        linear = noise * square - limit * of_both
        constant = noise**2 - limit * of_noise
        discriminant = linear**2 - quadratic * constant
        if abs(discriminant) < 1e-12 * linear**2:  # both roots are equal but for rounding
            discriminant = 0.0
        if quadratic <= 0 or discriminant < 0:
            return 0.0, math.inf
        roots = [(linear + sign * math.sqrt(discriminant)) / quadratic for sign in (-1, 1)]
        low, high = (self._scale_of(root) for root in roots)
        return low, high

    def _variances(self) -> tuple[float, float, float]:
        """Return the variances of mean tr(Σ) and mean |g_B|², with their covariance between them."""
        noise, weight = self._noise / self._noise_weight, self._weight
        square, square_here = self._square / weight, self._measured_square / self._noise_weight
        few, many = self._noise_weight_squared / self._noise_weight**2, self._weight_squared / weight**2
        spread_of_noise = self._noise_squared / self._noise_weight - noise**2
        spread_of_both = self._noise_times_square / self._noise_weight - noise * square_here
        spread_of_square = self._square_squared / weight - square**2
        shared = self._noise_weight_squared / (self._noise_weight * weight)
        return (
            few / (1 - few) * max(0.0, spread_of_noise),
            shared / (1 - few) * spread_of_both,
            many / (1 - many) * max(0.0, spread_of_square),
        )

    def _scale_of(self, ratio: float) -> float:
        """Return the noise scale for ρ = tr(Σ) / |g_B|²."""
        rest = 1 - ratio * self._inverse / self._weight
        return 0.0 if ratio <= 0 else ratio / rest if rest > 0 else math.inf

    def state_dict(self) -> dict[str, float]:
        """Return all sums, as numbers."""
        return asdict(self)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "NoiseScale":
        """Return the noise scale of a `state_dict`. One of version 0.1 lacks the sums for the interval."""
        return cls(**{"has_spread": "_noise_squared" in state, **state})


def in_words(low: float, high: float, size: int, measured: int) -> str:
    """Return a line about windows of this size: advice, or that the measurements cannot decide.

    Args:
        low, high: the interval of the noise scale, in examples.
        size: examples of a window.
        measured: the number of measurements.

    Returns:
        The line; "" where nothing was measured.
    """
    if math.isnan(low) or not measured:
        return ""
    windows = f"windows of {size:,}"
    if low <= 0 and math.isinf(high):
        return (
            f"the gradient noise scale cannot be determined from {measured:,} measurements: no advice on "
            f"{windows}. Measure more often (--train.noise_every 1) or train longer"
        )
    basis = f"{CONFIDENCE:.0%} interval from {measured:,} measurements"
    return f"the gradient noise scale is {noise_range(low, high)} ({basis}): {_advice(low, high, size)}"


def _advice(low: float, high: float, size: int) -> str:
    windows = f"windows of {size:,}"
    if low > MUCH * size:
        return f"{windows} are much smaller. Larger windows would need fewer steps"
    if high < size / MUCH:
        return f"{windows} are much larger. Smaller windows would need fewer examples"
    if low >= size / MUCH and high <= MUCH * size:
        return f"{windows} are about as large, which balances steps and examples"
    if low >= size / MUCH:
        return f"{windows} are not too large. Whether larger windows would help cannot be decided"
    if high <= MUCH * size:
        return f"{windows} are not too small. Whether smaller windows would do cannot be decided"
    return f"no advice on {windows}, as smaller and larger ones may be better"


def noise_range(low: float, high: float) -> str:
    """Return an interval as text, such as "3 to 40 examples" or "at least 3 examples"."""
    if math.isinf(low):
        return "too large to measure"
    if high <= 0:
        return "below 1 example"
    if math.isinf(high):
        return f"at least {_number(low)} examples"
    return f"at most {_number(high)} examples" if low <= 0 else f"{_number(low)} to {_number(high)} examples"


def _number(value: float) -> str:
    """Return two digits: "0.83", "12", "1,200"."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"
