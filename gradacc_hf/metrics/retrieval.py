"""Metrics of a search, from the candidates found for each query, best first, and the right candidates.

Recall at k is the share of queries with a right candidate among the first k. MRR@10 is the mean of 1 / rank
of the first right candidate, 0 beyond the tenth (Craswell 2009; as in MS MARCO).
"""

import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from gradacc_hf.errors import InputError
from gradacc_hf.metrics.in_memory import InMemoryMetric

MAX_RANK = 10

_INPUTS = """
Args:
    predictions: ids of the candidates found, best first: whole numbers of shape (rows, 10 or fewer).
    references: ids of the right candidates: for each row a whole number, or a list of them.
"""


def chance(candidates: int, right: Sequence[int] = (1,)) -> dict[str, float]:
    """Return the expected metrics of this many candidates in random order.

    Args:
        candidates: the number of candidates.
        right: the number of right candidates of each query.
    """
    counts, queries = np.unique(np.asarray(right), return_counts=True)
    ranks = np.arange(1, min(MAX_RANK, candidates) + 1)
    first = [  # the probability that the first right candidate has a rank, (counts, ranks)
        [math.comb(candidates - rank, n - 1) / math.comb(candidates, n) for rank in ranks.tolist()]
        for n in counts.tolist()
    ]
    found = np.average(first, axis=0, weights=queries)
    return {
        "recall_at_1": float(found[0]),
        "recall_at_10": float(found.sum()),
        "mrr_at_10": float((found / ranks).sum()),
    }


class Retrieval(InMemoryMetric):
    """Recall at 1 and 10, and the mean reciprocal rank up to 10, each 0 to 1."""

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.List(ids), "references": datasets.List(ids)}),
        )

    def check(self, predictions: Any, references: Any) -> None:
        """Raise InputError unless it is a table of ids."""
        array = np.asarray(predictions)
        if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "iu" or array.shape[1] > MAX_RANK:
            raise InputError(
                f"predictions: found {array.dtype} of shape {array.shape}; allowed are ids of candidates, "
                f"whole numbers of shape (rows, at most {MAX_RANK}), at least one row"
            )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **more: Any) -> None:
        """Keep a batch until `compute`. A reference may be a whole number or a list."""
        right = [np.atleast_1d(row).tolist() for row in references]
        super().add_batch(predictions=np.asarray(predictions).tolist(), references=right, **more)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        hits = np.array([np.isin(found, right) for found, right in zip(predictions, references, strict=True)])
        hits &= hits.cumsum(1) == 1  # of several right candidates, the first counts
        ranks = np.arange(1, hits.shape[1] + 1)
        return {
            "recall_at_1": float(hits[:, 0].mean()),
            "recall_at_10": float(hits.any(1).mean()),
            "mrr_at_10": float((hits / ranks).sum(1).mean()),
        }
