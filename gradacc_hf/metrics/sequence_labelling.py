"""Metrics of entities in sequences of tags. As in CoNLL, an entity is right if its type and both ends are."""

from collections.abc import Iterable
from typing import Any

import datasets
import evaluate
import numpy as np
from seqeval.metrics import f1_score, precision_score, recall_score

from gradacc_hf.errors import InputError
from gradacc_hf.metrics.in_memory import InMemoryMetric

_INPUTS = """
Args:
    predictions: the predicted tags of each sequence, lists of strings such as B-PER, I-PER and O.
    references: the true tags of each sequence, of the same lengths.
"""


class Seqeval(InMemoryMetric):
    """Precision, recall and F1 of entities of all types, 0 to 1, computed by seqeval as conlleval does."""

    def _info(self) -> evaluate.MetricInfo:
        column = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": column, "references": column}),
            reference_urls=["https://github.com/chakki-works/seqeval"],
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        for row, (predicted, true) in enumerate(zip(predictions, references, strict=True)):
            if len(predicted) != len(true):
                raise InputError(
                    f"sequence {row}: found {len(predicted)} tags; allowed: {len(true)}, one per true tag"
                )
            for tag in (*predicted, *true):
                if not is_scheme([tag]):
                    raise InputError(
                        f"sequence {row}: found {tag!r}; allowed: O, or one of BIESLU with a type: B-PER"
                    )
        scores = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
        settings: Any = {"zero_division": 0}  # undefined scores are 0, without seqeval's warning
        found, true = ([as_iobes(tags) for tags in rows] for rows in (predictions, references))
        return {name: float(np.asarray(score(true, found, **settings))) for name, score in scores.items()}


def is_scheme(tags: Iterable[str]) -> bool:
    """Whether these tags mark entities: O, and B-PER, I-PER, …. Parts of speech do not."""
    return all(tag == "O" or (tag[:1] in "BIESLU" and tag[1:2] == "-" and tag[2:]) for tag in tags)


def as_iobes(tags: Iterable[str]) -> list[str]:
    """Replace U and L of the BILOU scheme by S and E, which seqeval reads."""
    return [{"U": "S", "L": "E"}.get(tag[:1], tag[:1]) + tag[1:] for tag in tags]
