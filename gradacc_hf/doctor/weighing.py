"""Judge the weights of the losses in a window.

The gradient of a window equals the gradient of its examples in one batch under two conditions. The weight of
each micro-batch's mean loss is the micro-batch's share of the window's items, and nothing else changes the
gradient. The weights then sum up to 1. Without division by the accumulation steps they sum up to the number
of micro-batches.

A weight that the loop chose, such as the weight of an auxiliary loss, looks like a fault of the scale. A loss
of several terms is therefore right if one term is, and wrong only if no choice explains the weights.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from gradacc_hf.doctor.record import (
    MODEL,
    MODEL_WITH_NUMBER,
    LoopRecord,
    LossTerm,
    ObservedMicroBatch,
    ObservedWindow,
    Weighing,
    WindowComparison,
    groups_of,
)

RTOL = 4e-3  # relative difference up to which weights are alike; a number in bf16 has half of it
UNKNOWN_LOSS = "the loss is computed by functions that the doctor does not follow"


@dataclass(frozen=True)
class _Series:
    """The weights of one loss in the micro-batches of a group, as weights of a mean over the items.

    items: items of each micro-batch; () if unknown.
    raw: the weights of the sum, if the loss is a sum over these items; () if it is a mean.
    """

    weights: tuple[float, ...]
    items: tuple[float, ...] = ()
    counted: str = ""
    raw: tuple[float, ...] = ()

    @property
    def sum(self) -> float:
        """The sum of the weights; the sign is a choice of the loop."""
        return abs(sum(self.weights))

    def is_near(self, value: float) -> bool:
        """Whether the weights sum up to this value."""
        return abs(self.sum - value) <= RTOL * value

    @property
    def is_by_items(self) -> bool:
        """Whether the weights are in proportion to the items, or equal if the items are unknown."""
        items = self.items or (1.0,) * len(self.weights)
        return all(items) and _alike([weight / n for weight, n in zip(self.weights, items, strict=True)])

    @property
    def is_unequal_mean(self) -> bool:
        """Whether micro-batches with unequal items have the same weight."""
        return _alike(self.weights) and not _alike(self.items or (1.0,))


def weighings(record: LoopRecord) -> list[tuple[ObservedWindow, Weighing]]:
    """The verdict about each observed window."""
    known = [found for _, found in record.compared if found.items]
    is_mean = bool(known) and not any(found.adds_up for found in known)
    found = []
    for window in record.windows:
        many = [_as_mean(each) if is_mean else each for each in window.micro_batches]
        found.append((window, weigh(replace(window, micro_batches=many), record.steps)))
    return found


def _as_mean(micro_batch: ObservedMicroBatch) -> ObservedMicroBatch:
    """The micro-batch, if other windows show that the model does not divide its loss by an input."""
    names = [MODEL if term.function == MODEL_WITH_NUMBER else term.function for term in micro_batch.terms]
    terms = [replace(term, function=name) for term, name in zip(micro_batch.terms, names, strict=True)]
    return replace(micro_batch, terms=tuple(terms))


def weigh(window: ObservedWindow, steps: int) -> Weighing:
    """Judge the weights of the losses in a window. `steps`: micro-batches of a full window."""
    if (growing := _growing_sum(window)) is not None:
        return growing
    if any(discarded.why == "copied" for discarded in window.discarded):
        return Weighing(why_not="the loop zeroes backwards, and sets the gradient itself")
    hand, many = window.change.hand, len(window)
    if hand is None and (hand := window.change.scaled) is None:
        return Weighing(why_not="the loop scales the gradient, and changes it otherwise in the same lines")
    if abs(hand - 1) <= RTOL:
        return _weigh(window, steps, 1.0)
    if abs(hand * many - 1) <= RTOL and many > 1:  # the loop divides the gradient by the steps
        once = [replace(each, root_factors=(*each.root_factors, hand)) for each in window.micro_batches]
        scaled = _weigh(replace(window, micro_batches=once), steps, hand)
        is_twice = _weigh(window, steps, 1.0).verdict == "exact"
        return replace(scaled, verdict="divided_twice", place=window.change.place) if is_twice else scaled
    scaled = _weigh(window, steps, hand)
    if scaled.verdict == "exact":
        return scaled
    found = _weigh(window, steps, 1.0)  # the loop clips the gradient by hand
    if found.verdict == "exact" or many == 1:
        return found
    lines = {at for each in window.micro_batches[:-1] for _, at in each.touched}
    if window.change.place in lines:  # the fault of clipping too early
        return found
    where = f" at {window.change.place}" if window.change.place else ""
    return Weighing(why_not=f"the gradient is multiplied by {hand:.4g} before the step{where}")


def _growing_sum(window: ObservedWindow) -> Weighing | None:
    """The verdict about a sum of losses that goes backward after each new loss; None for other windows."""
    numbers = [{term.number for term in micro_batch.terms} for micro_batch in window.micro_batches]
    if len(numbers) < 2 or not all(before and before < after for before, after in pairwise(numbers)):
        return None
    totals: Counter[int] = Counter()
    for micro_batch in window.micro_batches:
        totals.update({term.number: term.weight for term in micro_batch.terms})
    weights = tuple(totals[number] for number in sorted(totals))
    return Weighing("another_gradient", "", sum(weights), weights, place=window.micro_batches[-1].place)


def _weigh(window: ObservedWindow, steps: int, scaled: float) -> Weighing:
    factor = window.unscaled * scaled
    if not math.isfinite(factor):
        return Weighing(why_not="the scale of the gradient scaler is unknown")
    judged: list[Weighing] = []
    losses = _losses_of_model(window)
    for by_line in (True, False):  # the branches of a loop may compute the same loss in several lines
        groups = groups_of(window.micro_batches, by_line)
        is_full = all(len(group) >= len(window) for group in groups)
        if window.alternates:  # each group has its share of the window
            shares = [len(group) / len(window) for group in groups]
            now = [_judge(g, len(g), factor / share, losses) for g, share in zip(groups, shares, strict=True)]
        else:
            now = [_judge(group, steps, factor, losses) for group in groups]
        if exact := _all_exact(now, groups, steps):
            return exact
        judged = judged or (now if is_full or not by_line else [])
    if wrong := [each for each in judged if each.faults]:
        return replace(wrong[0], verdict="+".join(sorted(set().union(*(each.faults for each in wrong)))))
    return next(each for each in judged if not each.verdict)


def _all_exact(
    judged: Sequence[Weighing], groups: Iterable[Sequence[ObservedMicroBatch]], steps: int
) -> Weighing | None:
    """An exact verdict, if all groups are exact, or at least divided like an exact one; else None."""
    for verdict, group in zip(judged, groups, strict=True):
        if verdict.verdict != "exact" and (verdict.faults or not _is_divided(group, steps)):
            return None
    return next((each for each in judged if each.verdict == "exact"), None)


def _is_divided(group: Sequence[ObservedMicroBatch], steps: int) -> bool:
    """Whether the loop divides the whole loss of each micro-batch by the accumulation steps."""
    return all(any(abs(f * steps - 1) <= RTOL for f in each.root_factors) for each in group)


def _losses_of_model(window: ObservedWindow) -> WindowComparison | None:
    """The recomputed losses of a model that computes them itself; None if they were not recomputed."""
    found = window.comparison
    is_known = found is not None and len(found.items) == len(window.micro_batches)
    return found if is_known else None


def _judge(
    group: Sequence[ObservedMicroBatch], steps: int, factor: float, losses: WindowComparison | None
) -> Weighing:
    """Judge the weights of a group of micro-batches with the same losses. `losses`: of the model itself."""
    many, place = len(group), group[0].place
    keys = _by_key(group)
    if not keys:
        return Weighing(why_not=UNKNOWN_LOSS, place=place)
    if losses is None and any(terms[0].function == MODEL_WITH_NUMBER for terms in keys):
        return Weighing(why_not="the model may divide the loss by a number among the inputs", place=place)
    of_key = [_series(terms, factor, losses if len(keys) == 1 else None) for terms in keys]
    every = [series for some in of_key for series in some]
    if many > 1 and any(term.is_in_batch for terms in keys for term in terms):
        others = _verdicts(of_key, group, steps) - {"exact"}
        verdict = "+".join(sorted({"in_batch_negatives_cut", *others}))
        return Weighing(verdict, place=place, sum=every[0].sum)
    if steps == 1 and many == 1:
        return Weighing("exact", place=place, sum=every[0].sum)
    verdicts = _verdicts(of_key, group, steps)
    main = next((series for series in every if series.is_near(1)), every[0])
    reason = ""
    if not verdicts:
        sums = sorted({f"{series.sum:.3g}" for some in of_key for series in some[:1]})
        reason = f"the weights of its losses sum up to {', '.join(sums)} over the window"
        if len(of_key) == 1 and every[0].sum > 1:
            reason += ", and not to 1: the loop chose a weight for the loss, or does not divide it"
        if any(series.raw for series in every):
            reason = "the number of items in its sums is unknown"
        elif not all(micro_batch.is_complete for micro_batch in group):
            reason += ", and other losses are unknown"
    return Weighing("+".join(sorted(verdicts)), reason, main.sum, main.items, main.counted, place)


def _verdicts(of_key: list[list[_Series]], group: Sequence[ObservedMicroBatch], steps: int) -> set[str]:
    """The verdicts about a group: {"exact"}, names of findings, or nothing if the weights do not tell."""
    many, every = len(group), [series for some in of_key for series in some]
    totals, is_alone = _totals(of_key), len(of_key) == 1
    candidates = [*every, *totals]
    right = [series for series in candidates if series.is_near(1)]
    undivided = [series for series in candidates if series.is_near(many) and many > 1]
    is_divided = many > 1 and _is_divided(group, many)
    if any(series.is_by_items for series in right):
        is_doubtful = not is_alone and not is_divided and any(not series.raw for series in undivided)
        return set() if is_doubtful else {"exact"}
    if not all(micro_batch.is_complete for micro_batch in group):
        return set()
    if any(series.is_unequal_mean for series in right):
        return {"mean_of_means"}
    is_as_full = any(s.is_near(many / steps) for s in candidates) or _is_divided(group, steps)
    if steps > 1 and many != steps and is_as_full:
        return {"partial_window_mis_scaled" if many < steps else "partial_window_leaked"}
    raw = every[0].raw if is_alone and group[0].losses[0][0] != "sum" else ()
    if raw and (abs(sum(raw) - 1) <= RTOL or _alike((*raw, 1.0))):
        return {"loss_is_a_sum"}
    found = _wrong_scale(of_key, group, undivided, totals)
    is_means = not any(series.raw for series in every)
    if is_means and any(series.is_unequal_mean for series in every) and (found or is_divided):
        found.add("mean_of_means")
    is_regular = all(any(series.is_by_items for series in some) for some in of_key)
    return {"exact"} if not found and is_divided and is_regular else found


def _wrong_scale(
    of_key: list[list[_Series]],
    group: Sequence[ObservedMicroBatch],
    undivided: Sequence[_Series],
    totals: Sequence[_Series],
) -> set[str]:
    """The findings about the scale of a group."""
    many, is_alone = len(group), len(of_key) == 1
    every = [series for some in of_key for series in some]
    has_factor = all(any(abs(f * many - 1) <= RTOL for f in each.factors) for each in group)
    is_large = min(some[0].sum for some in of_key) > 1 + RTOL and not any(series.raw for series in every)
    if many == 1 or (has_factor and (not is_alone or _is_divided(group, many))):
        undivided, is_large = (), False
    if undivided or (is_large and not is_alone):
        return {"not_divided"}
    twice = [sum(abs(f * many - 1) <= RTOL for f in each.root_factors) > 1 for each in group]
    if many > 2 and all(twice):  # a factor of 1/2 is common besides the steps
        return {"divided_twice"}
    if many > 1 and any(series.is_near(1 / many) for series in (every if is_alone else totals)):
        return {"divided_twice"}
    return set()


def _by_key(group: Sequence[ObservedMicroBatch]) -> list[list[LossTerm]]:
    """The terms of each loss that all micro-batches of a group have, one per micro-batch."""
    found: dict[tuple, list[LossTerm]] = defaultdict(list)
    for micro_batch in group:
        seen: Counter[str] = Counter()
        for term in micro_batch.terms:
            found[term.function, seen[term.function]].append(term)
            seen[term.function] += 1
    return [terms for terms in found.values() if len(terms) == len(group)]


def _series(terms: Sequence[LossTerm], factor: float, losses: WindowComparison | None) -> list[_Series]:
    """The weights of a loss: of a mean for the items that it averages over, of a sum for each count."""
    weights = tuple(term.weight * factor for term in terms)
    if terms[0].function in (MODEL, MODEL_WITH_NUMBER) and losses is not None:
        if losses.adds_up:  # each is a share of the window's mean
            total = sum(losses.items)
            weights = tuple(weight * n / total for weight, n in zip(weights, losses.items, strict=True))
        return [_Series(weights, losses.items, losses.counted)]
    names = [name for name, _ in terms[0].items]
    if not all([name for name, _ in term.items] == names for term in terms) or not names:
        return [_Series(weights)]
    found = []
    for index, name in enumerate(names):
        items = tuple(term.items[index][1] for term in terms)
        if terms[0].is_sum:
            as_means = tuple(weight * n for weight, n in zip(weights, items, strict=True))
            found.append(_Series(as_means, items, name, weights))
        else:
            found.append(_Series(weights, items, name))
    return found


def _totals(of_key: list[list[_Series]]) -> list[_Series]:
    """The summed weights of several means, as of a mixture whose shares sum up to 1."""
    firsts = [some[0] for some in of_key if not some[0].raw]
    if len(firsts) < 2 or len(firsts) < len(of_key):
        return []
    weights = tuple(sum(map(abs, each)) for each in zip(*(series.weights for series in firsts), strict=True))
    return [_Series(weights, firsts[0].items, firsts[0].counted)]


def _alike(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= RTOL * max(map(abs, values))
