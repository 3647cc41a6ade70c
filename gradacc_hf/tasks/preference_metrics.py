"""Metrics of preferences, from the scores of the validation answers.

| metric | value |
|---|---|
| `accuracy` | share of pairs whose chosen answer has the higher reward; equal rewards count half |
| `margin` | mean reward of chosen answers minus mean reward of rejected answers |
| `chosen_logprob`, `rejected_logprob` | mean log-probability of an answer |
| `chosen_score`, `rejected_score` | mean score of a reward model |
| `reference_point` | z of KTO: mean log π − log π_ref of answers to other prompts, at least 0 |

`kl` is in `kl.py`.

With KTO, a pair is any desirable answer with any undesirable one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from gradacc_hf.tasks.preference_losses import KtoLoss, PairLoss

ROUNDING = 1e-6
"""Relative difference of a score and a reference that is rounding: before training, all rewards are 0."""


def pair_metrics(loss: PairLoss, rows: Sequence[Any]) -> dict[str, float]:
    """Return the loss and the metrics of pairs.

    Args:
        loss: The loss of the run.
        rows: Score, reference and number of tokens of the chosen and the rejected answer (pairs, 2, 3).
    """
    scores, reference, tokens = _columns(rows)
    reward = loss.reward(scores, reference, tokens)
    margin = reward[:, 0] - reward[:, 1]
    found = {
        "loss": float(loss.mean(scores, reference, tokens)),
        "accuracy": float((margin.sign().mean() + 1) / 2),
        "margin": float(margin.mean()),
    }
    what = "score" if loss.name == "reward" else "logprob"
    for name, value in zip(("chosen", "rejected"), scores.mean(0).tolist(), strict=True):
        found[f"{name}_{what}"] = value
    return found


def answer_metrics(loss: KtoLoss, rows: Sequence[Any], desirable: Sequence[Any]) -> dict[str, float]:
    """Return the loss and the metrics of desirable and undesirable answers.

    Args:
        loss: The loss of the run.
        rows: Score, reference and number of tokens of an answer, and of an answer to another prompt
            (answers, 2, 3).
        desirable: 1 or 0 for each answer.
    """
    scores, reference, _ = _columns(rows)
    good = torch.tensor(np.asarray(desirable, dtype=np.float64))
    point = loss.reference_point(scores[:, 1], reference[:, 1])
    ratios = scores[:, 0] - reference[:, 0]
    found = {"loss": float(loss.mean(ratios, good, point)), "reference_point": float(point)}
    if not 0 < good.sum() < len(good):  # answers of one kind have no pairs
        return found | dict.fromkeys(("accuracy", "margin"), float("nan"))
    chosen, rejected = good == 1, good == 0
    reward = loss.beta * ratios
    found["accuracy"] = ranked_above(reward[chosen].numpy(), reward[rejected].numpy())
    found["margin"] = float(reward[chosen].mean() - reward[rejected].mean())
    found["chosen_logprob"] = float(scores[chosen, 0].mean())
    return found | {"rejected_logprob": float(scores[rejected, 0].mean())}


def _columns(rows: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return scores, references and numbers of tokens. A reference that differs by rounding is the score."""
    scores, reference, tokens = torch.from_numpy(np.stack(rows).astype(np.float64)).unbind(2)
    is_equal = (scores - reference).abs() <= ROUNDING * scores.abs()
    return scores, torch.where(is_equal, scores, reference), tokens


def ranked_above(values: np.ndarray, others: np.ndarray) -> float:
    """Return the share of pairs in which the value exceeds the other; equal ones count half."""
    ranks = rankdata(np.concatenate([values, others]))[: len(values)]
    above = ranks.sum() - len(values) * (len(values) + 1) / 2
    return float(above / (len(values) * len(others)))


def accuracy_of_length(train: Mapping[str, np.ndarray], validation: Mapping[str, np.ndarray]) -> float:
    """Return the accuracy of a choice by length, at least 0.5, the accuracy of chance.

    The training answers decide whether the shorter or the longer answer is chosen.

    Args:
        train, validation: The lengths of `chosen` and `rejected` answers. Arrays of equal length with
            `paired` are pairs, else any chosen answer is compared with any rejected one.
    """

    def longer(rows: Mapping[str, np.ndarray]) -> float:
        chosen, rejected = rows["chosen"], rows["rejected"]
        if not len(chosen) or not len(rejected):
            return 0.5
        if "paired" in rows:
            return float((chosen > rejected).mean() + (chosen == rejected).mean() / 2)
        return ranked_above(chosen, rejected)

    found = longer(validation)
    return max(0.5, found if longer(train) >= 0.5 else 1 - found)
