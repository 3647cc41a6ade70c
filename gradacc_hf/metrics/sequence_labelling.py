"""Metrics of entities in sequences of tags. As in CoNLL, an entity is right if its type and both ends are."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import datasets
import evaluate
import numpy as np
from seqeval.metrics.sequence_labeling import get_entities

from gradacc_hf.errors import InputError
from gradacc_hf.metrics.in_memory import InMemoryMetric

ROWS_KEPT = 2**15  # rows whose counts are kept, as a bootstrap scores a row a thousand times

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
            for tag in {*predicted, *true}:
                if not is_scheme([tag]):
                    raise InputError(
                        f"sequence {row}: found {tag!r}; allowed: O, or one of BIESLU with a type: B-PER"
                    )
        pairs = zip(predictions, references, strict=True)
        right, found, true = np.sum([_counts_of_row(tuple(p), tuple(t)) for p, t in pairs], axis=0).tolist()
        return scores_of_counts(right, found, true)


def scores_of_counts(right: int, found: int, true: int) -> dict[str, float]:
    """Return precision, recall and F1; 0 where one is undefined.

    Args:
        right: Entities that were found and are right.
        found: Entities that were found.
        true: True entities.
    """
    return {
        "precision": right / max(1, found),
        "recall": right / max(1, true),
        "f1": 2 * right / max(1, found + true),
    }


def entities_of(tags: Iterable[str]) -> list[tuple[str, int, int]]:
    """Return the entities in a sequence of tags, as seqeval reads them: type, first and last token."""
    return get_entities(as_iobes(tags))


@lru_cache(ROWS_KEPT)
def _counts_of_row(predicted: tuple[str, ...], true: tuple[str, ...]) -> tuple[int, int, int]:
    """Return the entities that were found and are right, that were found, and that are true."""
    found, right = {*entities_of(predicted)}, {*entities_of(true)}
    return len(found & right), len(found), len(right)


def is_scheme(tags: Iterable[str]) -> bool:
    """Whether these tags mark entities: O, and B-PER, I-PER, …. Parts of speech do not."""
    return all(tag == "O" or (tag[:1] in "BIESLU" and tag[1:2] == "-" and tag[2:]) for tag in tags)


def as_iobes(tags: Iterable[str]) -> list[str]:
    """Replace U and L of the BILOU scheme by S and E, which seqeval reads."""
    return [{"U": "S", "L": "E"}.get(tag[:1], tag[:1]) + tag[1:] for tag in tags]
