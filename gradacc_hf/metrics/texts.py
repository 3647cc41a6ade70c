"""Metrics of texts, from a predicted text per row and a list of right texts. The best match counts.

They are `evaluate.Metric`s: SQuAD's own definition, and ROUGE and BLEU by rouge-score and sacrebleu.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import datasets
import evaluate
import numpy as np

from gradacc_hf.errors import InputError
from gradacc_hf.metrics.in_memory import InMemoryMetric

ROUGE = ("rouge1", "rouge2", "rougeL")
ROWS_KEPT = 2**15  # rows whose scores are kept, as a bootstrap scores a row a thousand times

_INPUTS = """
Args:
    predictions: predicted texts, one per row.
    references: for each row, a list of one right text or more.
"""


class _TextMetric(InMemoryMetric):
    reference_urls: tuple[str, ...] = ()
    may_be_empty = False  # whether a row may have no right text

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
            reference_urls=list(self.reference_urls),
        )

    def check(self, predictions: Any, references: Any) -> None:
        """Raise InputError unless each row has a text and a list of texts."""
        of_texts = all(isinstance(text, str) for text in predictions)
        of_lists = all(
            isinstance(row, list | tuple) and (len(row) or self.may_be_empty) for row in references
        )
        if not len(predictions) or not of_texts or not of_lists:
            raise InputError(
                "predictions and references: allowed are texts, at least one, and for each a list of one "
                'text or more: predictions=["a"], references=[["a", "b"]]'
            )


class Squad(_TextMetric):
    """`exact_match`, and `f1` of the words that two answers share, 0 to 1, as SQuAD 1.1 defines them.

    Case, punctuation, articles and white space are ignored (Rajpurkar et al. 2016, section 6.1). Two answers
    without a word have an `f1` of 1, as in SQuAD 2.0. In SQuAD 1.1's script it is 0.
    """

    reference_urls = ("https://rajpurkar.github.io/SQuAD-explorer/",)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        exact, f1 = answer_scores(predictions, references)
        return {"exact_match": float(exact.mean()), "f1": float(f1.mean())}


class SquadV2(_TextMetric):
    """`exact_match` and `f1`, 0 to 1, as SQuAD 2.0 defines them, also of each kind of question.

    A question without an answer has no right text; the right prediction is "" (Rajpurkar et al. 2018).
    `no_answer_f1` is the share of these questions that get "". It equals the accuracy on them.
    `has_answer_exact_match` and `has_answer_f1` are of the other questions. A kind that is absent has no
    figure.
    """

    reference_urls = ("https://rajpurkar.github.io/SQuAD-explorer/",)
    may_be_empty = True

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        exact, f1 = answer_scores(predictions, references)
        scores = {"exact_match": exact, "f1": f1}
        empty = np.array([not any(map(_words, texts)) for texts in references])
        if empty.any():
            scores["no_answer_f1"] = f1[empty]
        if not empty.all():
            scores["has_answer_exact_match"], scores["has_answer_f1"] = exact[~empty], f1[~empty]
        return {name: float(of_rows.mean()) for name, of_rows in scores.items()}


def answer_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Any:
    """Return the exact match and the F1 of each row as two arrays. The best right text of a row counts.

    A row without right texts has no answer, and the right prediction is "".
    """
    pairs = zip(predictions, references, strict=True)
    exact, f1 = zip(*(_answer_scores_of_row(text, tuple(texts)) for text, texts in pairs), strict=True)
    return np.array(exact, float), np.array(f1, float)


@lru_cache(ROWS_KEPT)
def _answer_scores_of_row(prediction: str, texts: tuple[str, ...]) -> tuple[bool, float]:
    words, rights = _words(prediction), [_words(text) for text in texts] or [[]]
    rights = [right for right in rights if right] or rights[:1]
    return max(words == right for right in rights), max(_overlap(words, right) for right in rights)


def _words(answer: str) -> list[str]:
    plain = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _overlap(predicted: list[str], right: list[str]) -> float:
    """Return the harmonic mean of precision and recall of words; 1 for two answers without words."""
    if not predicted or not right:
        return float(predicted == right)
    return 2 * (Counter(predicted) & Counter(right)).total() / (len(predicted) + len(right))


class Rouge(_TextMetric):
    """`rouge1`, `rouge2` and `rougeL`, 0 to 1: F of shared words, pairs of words, longest common subsequence.

    They are means over rows, with Porter stemming (Lin 2004).
    """

    reference_urls = ("https://aclanthology.org/W04-1013/",)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        means = np.mean([_rouge_of_row(text, tuple(texts)) for text, texts in pairs], axis=0)
        return dict(zip(ROUGE, means.tolist(), strict=True))


@lru_cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # loads nltk

    return RougeScorer([*ROUGE], use_stemmer=True)


@lru_cache(ROWS_KEPT)
def _rouge_of_row(text: str, right: tuple[str, ...]) -> tuple[float, ...]:
    """Return the F of each kind in `ROUGE`."""
    scores = _rouge_scorer().score_multi(right, text)
    return tuple(scores[kind].fmeasure for kind in ROUGE)


class SacreBleu(_TextMetric):
    """`bleu` of all rows together, 0 to 100, with sacrebleu's own tokenisation (Post 2018)."""

    reference_urls = ("https://aclanthology.org/W18-6319/",)

    def _compute(self, predictions: Any, references: Any, tokenize: Any = None) -> dict[str, float]:
        from sacrebleu.metrics.bleu import BLEU

        pairs = zip(predictions, references, strict=True)
        rows = [_bleu_counts_of_row(text, tuple(texts), tokenize) for text, texts in pairs]
        counts, totals, *lengths = (np.sum(column, axis=0).tolist() for column in zip(*rows, strict=True))
        return {"bleu": float(BLEU.compute_bleu(counts, totals, *lengths, smooth_method="exp").score)}


@lru_cache(ROWS_KEPT)
def _bleu_counts_of_row(text: str, right: tuple[str, ...], tokenize: Any) -> tuple[Any, ...]:
    """Return the counts of n-grams that are right, of all n-grams, and both lengths."""
    from sacrebleu import corpus_bleu

    score = corpus_bleu([text], [[one] for one in right], tokenize=tokenize)
    return score.counts, score.totals, score.sys_len, score.ref_len
