"""Metrics of rows with any number of labels."""

from typing import Any

import datasets
import evaluate
import numpy as np

from gradacc_hf.errors import InputError
from gradacc_hf.metrics.in_memory import InMemoryMetric

_INPUTS = """
Args:
    predictions: 1 for each label predicted for a row, else 0, of shape (rows, labels).
    references: 1 for each true label of a row, else 0, of the same shape.
"""


class MultiLabelMetric(InMemoryMetric):
    """Scores of sets of labels, each 0 to 1.

    exact_match: the share of rows whose labels are all right.
    f1_micro: F1 over all labels of all rows.
    f1_macro: the mean F1 over labels, without labels that are neither predicted nor true.
    """

    def _info(self) -> evaluate.MetricInfo:
        column = datasets.List(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": column, "references": column}),
            reference_urls=["https://scikit-learn.org/stable/modules/model_evaluation.html"],
        )

    def check(self, predictions: Any, references: Any) -> None:
        """Raise InputError unless it has 0 or 1 for each row and label."""
        for name, values in (("predictions", predictions), ("references", references)):
            array = np.asarray(values)
            if array.ndim != 2 or array.size == 0 or not np.isin(array, (0, 1)).all():
                raise InputError(
                    f"{name}: found {array.dtype} of shape {array.shape}; allowed are 0 and 1 of shape "
                    "(rows, labels), at least one row: compare the logits with 0 first"
                )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predictions, references = np.asarray(predictions), np.asarray(references)
        hits = (predictions & references).sum(0)  # scikit-learn would read a single label as two classes
        total = predictions.sum(0) + references.sum(0)
        there = total > 0
        return {
            "exact_match": float((predictions == references).all(1).mean()),
            "f1_micro": float(2 * hits.sum() / max(1, total.sum())),
            "f1_macro": float((2 * hits[there] / total[there]).mean()) if there.any() else 0.0,
        }
