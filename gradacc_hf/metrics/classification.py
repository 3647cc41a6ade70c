"""Metrics of a classifier, from one predicted and one true class id per row.

They are `evaluate.Metric`s (compute, add, add_batch, combine) computed by scikit-learn.
"""

import warnings
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from gradacc_hf.errors import InputError
from gradacc_hf.metrics.in_memory import InMemoryMetric

_INPUTS = """
Args:
    predictions: predicted class ids, whole numbers of shape (rows,).
    references: true class ids, whole numbers of shape (rows,).
"""


class _ClassificationMetric(InMemoryMetric):
    def _info(self) -> evaluate.MetricInfo:
        column = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": column, "references": column}),
            reference_urls=["https://scikit-learn.org/stable/modules/model_evaluation.html"],
        )

    def check(self, predictions: Any, references: Any) -> None:
        """Raise InputError for floats, which evaluate would truncate."""
        for name, values in (("predictions", predictions), ("references", references)):
            array = np.asarray(values)
            if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iub":
                raise InputError(
                    f"{name}: found {array.dtype} of shape {array.shape}; allowed are class ids, whole "
                    "numbers of shape (rows,), at least one: take the argmax of the logits first"
                )


class Accuracy(_ClassificationMetric):
    """The share of rows whose class is right, 0 to 1."""

    def _compute(self, predictions: Any, references: Any, normalize: bool = True) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions, normalize=normalize))}


class F1(_ClassificationMetric):
    """The mean over classes of the harmonic mean of precision and recall, 0 to 1 (`average="macro"`).

    Classes that occur neither in predictions nor in references are left out.
    """

    def _compute(self, predictions: Any, references: Any, average: Any = "macro") -> dict[str, Any]:
        silent: Any = 0  # scikit-learn's default gives the same score and a warning
        score = f1_score(references, predictions, average=average, zero_division=silent)
        return {"f1": score.tolist() if isinstance(score, np.ndarray) else float(score)}


class MatthewsCorrelation(_ClassificationMetric):
    """The correlation of predicted and true classes, −1 to 1; 0 when all predictions are one class."""

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        with warnings.catch_warnings(action="ignore"):  # about a single class, for which the score is 0
            return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
