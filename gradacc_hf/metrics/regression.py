"""Metrics of one predicted and one true number per row. SciPy computes the correlations."""

from typing import Any

import datasets
import evaluate
import numpy as np
import scipy.stats

from gradacc_hf.errors import InputError
from gradacc_hf.metrics.in_memory import InMemoryMetric

_INPUTS = """
Args:
    predictions: predicted numbers of shape (rows,).
    references: true numbers of shape (rows,).
"""


class _RegressionMetric(InMemoryMetric):
    def _info(self) -> evaluate.MetricInfo:
        column = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": column, "references": column}),
            reference_urls=["https://docs.scipy.org/doc/scipy/reference/stats.html"],
        )

    def check(self, predictions: Any, references: Any) -> None:
        """Raise InputError unless it has one number per row."""
        for name, values in (("predictions", predictions), ("references", references)):
            array = np.asarray(values)
            if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iuf":
                raise InputError(
                    f"{name}: found {array.dtype} of shape {array.shape}; allowed are numbers of shape "
                    "(rows,), at least one: take the only column of the logits first"
                )


class Pearson(_RegressionMetric):
    """The linear correlation of predicted and true numbers, −1 to 1.

    It is undefined for constant numbers and for NaN or ∞. It is 0 there, because evaluations cannot be ranked
    by NaN.
    """

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predictions, references = _as_float64(predictions, references)
        if _is_undefined(predictions) or _is_undefined(references):
            return {"pearsonr": 0.0}
        found: Any = scipy.stats.pearsonr(predictions, references)
        return {"pearsonr": float(found.statistic)}


class Spearman(_RegressionMetric):
    """The correlation of the ranks of predicted and true numbers, −1 to 1; 0 if it is undefined."""

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predictions, references = _as_float64(predictions, references)
        if _is_undefined(predictions) or _is_undefined(references):
            return {"spearmanr": 0.0}
        found: Any = scipy.stats.spearmanr(predictions, references)
        return {"spearmanr": float(found.statistic)}


class MeanSquaredError(_RegressionMetric):
    """The mean of the squared differences, from 0; NaN if a prediction is NaN."""

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predictions, references = _as_float64(predictions, references)
        return {"mse": float(np.square(predictions - references).mean())}


def _as_float64(*rows: Any) -> list[np.ndarray]:
    return [np.asarray(numbers, np.float64) for numbers in rows]


def _is_undefined(numbers: np.ndarray) -> bool:
    """Whether a correlation with these numbers is undefined: they are constant to rounding, or not finite.

    SciPy warns of constant numbers by the same test.
    """
    if not np.isfinite(numbers).all():
        return True
    spread = np.linalg.norm(numbers - numbers.mean())
    return bool(spread <= 1e-13 * abs(numbers.mean()))
