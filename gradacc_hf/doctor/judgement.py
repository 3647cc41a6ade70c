"""The answers about each window: about its gradient, and about the weights of its losses."""

from dataclasses import dataclass
from typing import Literal

from gradacc_hf.doctor.record import GradientComparison, LoopRecord, ObservedWindow, Weighing
from gradacc_hf.doctor.weighing import weighings

Answer = Literal["right", "wrong", "no"]


@dataclass(frozen=True)
class Judgement:
    """The answers about a window; "no" if it was not judged.

    compared: the gradient, compared with the gradient of the window in one batch.
    why_not_compared: the reason for "no".
    weighed: the weights of the losses.
    """

    window: ObservedWindow
    compared: Answer
    why_not_compared: str
    weighed: Answer
    weighing: Weighing


def judgements(record: LoopRecord) -> list[Judgement]:
    """Judge each observed window."""
    return [_judgement(window, weighing, record) for window, weighing in weighings(record)]


def is_judged(record: LoopRecord) -> bool:
    """Whether the gradient or the weights of the losses were judged in a window, or nothing accumulates."""
    is_single = record.steps == 1 and not record.sets_gradients
    return is_single or any(each.compared != "no" or each.weighed != "no" for each in judgements(record))


def _judgement(window: ObservedWindow, weighing: Weighing, record: LoopRecord) -> Judgement:
    found, why = window.comparison, ""
    compared: Answer = "no"
    if found is None or found.whole is None:
        why = (found.why_not if found is not None else "") or "the loop ended"
    else:
        compared = "right" if found.error <= found.tolerance and not weighing.faults else "wrong"
        is_same = GradientComparison(1.0, found.whole.cosine).error() <= found.tolerance
        if compared == "wrong" and is_same and weighing.verdict == "exact":
            compared, why = "no", f"the loop multiplies the loss by {found.whole.ratio:.4g}"
    weighed: Answer = "wrong" if weighing.faults else "no"
    if weighing.verdict == "exact" and window.is_intact and not record.has_batch_norm:
        weighed = "right"
    elif weighing.verdict == "exact":
        weighed = "wrong"
    return Judgement(window, compared, why, weighed, weighing)
