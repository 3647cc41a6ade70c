"""Separate the backwards of a window from backwards whose gradient was zeroed before it."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from gradacc_hf.doctor.record import Discarded, ObservedMicroBatch, ObservedWindow

EQUAL_RTOL = 1e-3  # relative difference up to which weights of losses are equal
ZERO_NORM_RTOL = 1e-12  # a norm that is smaller, relative to an earlier one, counts as zero


def is_zeroed_between(before: ObservedMicroBatch, after: ObservedMicroBatch) -> bool:
    """Whether the gradient was zeroed between two backwards."""
    if not math.isfinite(before.norm_after):
        return after.norm_before == 0
    return before.norm_after > 0 and after.norm_before <= ZERO_NORM_RTOL * before.norm_after


def own_backwards(
    pending: Sequence[ObservedMicroBatch], earlier: Sequence[ObservedWindow], is_set: bool = False
) -> tuple[list[ObservedMicroBatch], list[Discarded]]:
    """Return the backwards of a window, and those discarded before it.

    Backwards that were zeroed by a fault of the loop stay in the window.

    pending: the backwards since the latest step.
    earlier: the windows before.
    is_set: whether the loop set the gradient at the step, perhaps from copies of zeroed gradients.
    """
    parts = [[pending[0]]]
    for before, after in pairwise(pending):
        if is_zeroed_between(before, after):
            parts.append([])
        parts[-1].append(after)
    own, discarded = parts.pop(), []
    while parts:
        why = "copied" if is_set else _why_discarded(parts[-1], own, earlier)
        if why:
            discarded.insert(0, Discarded(why, tuple(parts.pop())))
            continue
        own = parts.pop() + own
    return own, discarded


def _why_discarded(
    part: list[ObservedMicroBatch], own: list[ObservedMicroBatch], earlier: Sequence[ObservedWindow]
) -> str:
    """The reason, or "" if zeroing this part of the window is a fault."""
    if not all(math.isfinite(each.norm_after) for each in part):
        return "not_finite"
    if part[-1].weights_version != own[0].weights_version:
        return "other_weights"
    if own[-1].losses not in {each.losses for each in part}:
        return "other_loss"
    if part[-1].data_pass < own[0].data_pass:
        return "dropped"
    if part[-1].model_version != own[0].model_version:  # another optimizer made a step
        return "skipped"
    usual = Counter(len(w.micro_batches) for w in earlier if not w.discarded).most_common(1)
    if usual and usual[0][0] == len(own) > 1:
        return "dropped" if len(part) < len(own) else "skipped"
    return ""


def has_leaked(window: ObservedWindow, full: Sequence[ObservedWindow], steps: int) -> bool:
    """Whether a window continues in the next pass over the data, by the number and sizes of micro-batches.

    full: windows of `steps` micro-batches, with equal weights.
    """
    usual = [m.terms[0] for w in full if w is not window for m in w.micro_batches if m.terms]
    terms = [m.terms[0] for m in window.micro_batches if m.terms]
    weights = [term.weight for term in (*usual, *terms)]
    if not usual or len(terms) < steps or max(weights) - min(weights) > EQUAL_RTOL * max(map(abs, weights)):
        return False
    if len(window) > steps:
        return True
    sizes, size = [dict(term.items) for term in terms], dict(usual[0].items)
    if any(dict(term.items) != size for term in usual):
        return False
    short = [index for index, each in enumerate(sizes) if each != size]
    return bool(short) and short[-1] < len(sizes) - 1 and all(_is_less(sizes[i], size) for i in short)


def _is_less(items: dict[str, float], usual: dict[str, float]) -> bool:
    return items.keys() == usual.keys() and all(items[name] < usual[name] for name in usual)
