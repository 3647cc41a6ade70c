"""Rules that turn the record of a loop into findings with evidence.

A rule reads the whole record and yields findings. `messages.py` holds the texts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from statistics import median
from typing import Any, Literal

from gradacc_hf.doctor.listener import UNSCALE
from gradacc_hf.doctor.messages import CONSEQUENCES, FIXES, MESSAGES
from gradacc_hf.doctor.record import (
    SAME_NORM_RTOL,
    GradientComparison,
    LoopRecord,
    LossRead,
    ObservedMicroBatch,
    ObservedWindow,
    Place,
    Weighing,
    WindowComparison,
)
from gradacc_hf.doctor.weighing import weigh, weighings
from gradacc_hf.doctor.windows import ZERO_NORM_RTOL, has_leaked, is_zeroed_between

MAX_STEPS = 1024  # a larger divisor of the loss is a weight, not accumulation steps
MIN_SUM_RTOL_16_BIT = 2**-9  # relative error of a gradient summed in 16 bits, from which it is reported
DEFAULT_LEARNING_RATES = {5e-5: "Trainer's default, for 8 examples", 1e-3: "torch's default"}
MIN_LARGE_WINDOW_EXAMPLES = 64  # examples of a window from which a default learning rate is reported


@dataclass(frozen=True)
class Finding:
    """A fault of the loop, or advice.

    name: identifier, a key of MESSAGES.
    what: the finding in a sentence.
    evidence: the numbers of this run that show it.
    effect: the consequence for training.
    fix: the lines to change, with "-" and "+" in front.
    place: the line in the user's code.
    kind: "error" or "advice".
    """

    name: str
    what: str
    evidence: str
    effect: str
    fix: str
    place: Place | None
    kind: Literal["error", "advice"] = "error"


def findings(record: LoopRecord) -> list[Finding]:
    """All findings, errors first, without the consequences of other findings."""
    first: dict[str, Finding] = {}
    for rule in RULES:
        for finding in rule(record):
            first.setdefault(finding.name, finding)
    found = list(first.values())
    names = {finding.name for finding in found}
    explained = {effect for name in names for effect in CONSEQUENCES.get(name, ())}
    fixes = FIXES.get(record.driver, {})
    found = [
        replace(finding, fix=fixes.get(finding.name, finding.fix).strip("\n"))
        for finding in found
        if finding.name not in explained
    ]
    return sorted(found, key=lambda finding: finding.kind != "error")


def _found(
    name: str, evidence: str, place: Place | None, kind: Literal["error", "advice"] = "error", **values: Any
) -> Finding:
    what, effect, fix = (text.format(**values) for text in MESSAGES[name])
    return Finding(name, what, evidence, effect, fix.strip("\n"), place, kind)


def _stepped_every(record: LoopRecord) -> Iterator[Finding]:
    if {len(window.micro_batches) for window in record.windows} != {1}:
        return
    steps, place = len(record.windows), record.windows[0].place
    n = record.intended or min(window.requested_steps or 1 for window in record.windows)
    if n > 1:
        evidence = f"{steps} steps followed {steps} backwards; the accumulation steps are set to {n}"
        yield _found("stepped_on_every_micro_batch", evidence, place, n=n)
        return
    divisors = [m.divided_by for window in record.windows for m in window.micro_batches]
    n = round(divisors[0] or 0) if divisors[0] is None or math.isfinite(divisors[0]) else 0
    same = all(by is not None and abs(by - n) <= 1e-3 * n for by in divisors)
    if same and 1 < n <= MAX_STEPS:  # only advice: the divisor may be the weight of a loss
        evidence = f"{steps} steps followed {steps} backwards, each of a loss divided by {n}"
        yield _found("stepped_on_every_micro_batch", evidence, place, "advice", n=n)


def times(number: int) -> str:
    """A number of times in words."""
    return "once" if number == 1 else f"{number} times"


def _zeroed_inside(record: LoopRecord) -> Iterator[Finding]:
    between = [pair for window in record.windows for pair in pairwise(window.micro_batches)]
    lost = [pair for pair in between if _is_zeroed(*pair)]
    if lost:
        before, _ = lost[0]
        evidence = (
            f"the gradient was zeroed between two backwards of a window ({times(len(lost))}, first from norm "
            f"{before.norm_after:.3g})"
        )
        place = _line_of(before.touched, before.place, "zero")
        yield _found("zeroed_inside_the_window", evidence, place, n=record.steps)
    empty = [w for w in record.windows if w.norm_at_step == 0 < w.micro_batches[-1].norm_after]
    if empty:
        last = empty[0].micro_batches[-1]
        evidence = f"the gradient was zeroed between the last backward and the step ({times(len(empty))})"
        place = _line_of(last.touched, last.place, "zero")
        yield _found("zeroed_inside_the_window", evidence, place, n=record.steps)


def _is_zeroed(before: ObservedMicroBatch, after: ObservedMicroBatch) -> bool:
    """Whether gradients were zeroed between two backwards: all, or some by a function that zeroes."""
    some = any("zero" in how for how, _ in before.touched) and _changed(before.norm_after, after.norm_before)
    return before.data_pass == after.data_pass and (is_zeroed_between(before, after) or some)


def _never_zeroed(record: LoopRecord) -> Iterator[Finding]:
    nexts = dict(pairwise(map(id, record.windows)))
    zeroed = {id(w) for w in record.windows if any(_is_zeroed(*pair) for pair in pairwise(w.micro_batches))}
    known = [
        w
        for w in record.windows
        if w.norm_after_step is not None and w.norm_at_step > 0 and nexts.get(id(w)) not in zeroed
    ]
    kept = [w for w in known if not _changed(w.norm_at_step, w.norm_after_step) and w.norm_after_step]
    if len(kept) >= 2:
        first, last = record.windows[0], record.windows[-1]
        evidence = (
            f"after {len(kept)} of {len(record.windows)} steps, the gradient's norm was the same as before; "
            f"it was {first.norm_at_step:.3g} at the first step and {last.norm_at_step:.3g} at the last"
        )
        yield _found("never_zeroed", evidence, last.place)


def _changed(before: float, after: float | None) -> bool:
    """Whether a norm has changed, but not to zero."""
    return bool(after) and after > ZERO_NORM_RTOL * before and abs(after / before - 1) > SAME_NORM_RTOL  # type: ignore[operator]


def _clipped_early(record: LoopRecord) -> Iterator[Finding]:
    changed = [
        (before, after)
        for before, after in record.between
        if before.norm_after > 0 and _changed(before.norm_after, after.norm_before)
        if not any("zero" in how for how, _ in before.touched)
    ]
    if changed:
        before, after = changed[0]
        evidence = (
            f"the gradient changed between two backwards of a window ({times(len(changed))}, first from norm "
            f"{before.norm_after:.3g} to {after.norm_before:.3g})"
        )
        unscaled = any("unscale" in how for how, _ in before.touched)
        name = "unscaled_too_early" if unscaled else "clipped_too_early"
        yield _found(name, evidence, _line_of(before.touched, before.place), n=record.steps)


def _clipped_in_a_hook(record: LoopRecord) -> Iterator[Finding]:
    for window, found in record.compared:
        is_of_hooks = found.hook is not None and _error(found.means) <= found.tolerance < found.error
        if is_of_hooks and weigh(window, record.steps).verdict == "exact":
            evidence = (
                f"a hook changes the gradient of each backward; the gradient is {found.error:.2g} off from "
                "the gradient of the window in one batch"
            )
            yield _found("clipped_too_early", evidence, found.hook, n=record.steps)
            return


def _clipped_scaled(record: LoopRecord) -> Iterator[Finding]:
    for window in record.windows:
        changes = [how for how, _ in window.micro_batches[-1].touched]
        before = changes[: changes.index(UNSCALE)] if UNSCALE in changes else []
        if any("clip" in how for how in before) and window.unscaled != 1:
            evidence = (
                f"between the clipping and the step, the gradient scaler divided the gradient by its scale "
                f"(norm {window.norm_at_step:.3g} at the step)"
            )
            yield _found(
                "clipped_while_scaled", evidence, _line_of(window.micro_batches[-1].touched, None, "clip")
            )
            return


def _clipped_late(record: LoopRecord) -> Iterator[Finding]:
    late = [by for window in record.windows if (by := _late(window.touched_after))]
    if late:
        evidence = (
            f"after {len(late)} of {len(record.windows)} steps, the gradient was changed ({late[0][0][0]})"
        )
        yield _found("clipped_too_late", evidence, _line_of(late[0], record.windows[0].place))


def _late(touched: Sequence[tuple[str, Place | None]]) -> list[tuple[str, Place | None]]:
    """The changes after a step that have no effect: clipping, and any change before zeroing."""
    zeroed = [index for index, (how, _) in enumerate(touched) if "zero" in how]
    until = zeroed[-1] if zeroed else 0
    return [each for i, each in enumerate(touched) if "clip" in each[0] or (i < until and i not in zeroed)]


def _scheduled(record: LoopRecord) -> Iterator[Finding]:
    n = record.steps
    moved = [(b, a) for b, a in record.between if b.lr != a.lr and b.data_pass == a.data_pass]
    if moved:
        before, after = moved[0]
        first, second = next((x, y) for x, y in zip(before.lr, after.lr, strict=True) if x != y)
        evidence = (
            f"the learning rate changed between two backwards of a window ({times(len(moved))}, first from "
            f"{first:.4g} to {second:.4g})"
        )
        yield _found("scheduler_per_micro_batch", evidence, record.schedule.stepped or after.place, n=n)
        return
    moves_with_windows = all(before.lr != after.lr for before, after in pairwise(record.windows))
    if not (moves_with_windows and n > 1 and record.schedule_length and record.pass_length):
        return  # the scheduler steps once per pass or never, or the length is unknown
    length, of_pass = record.schedule_length, record.pass_length
    if not length % of_pass:
        passes = length // of_pass
        evidence = (
            f"the schedule has {length} steps, {passes} × the {of_pass} micro-batches of a pass; a pass has "
            f"{math.ceil(of_pass / n)} windows"
        )
        values = {"n": n, "schedule_length": length, "passes": passes}
        place = record.schedule.made or record.windows[0].place
        yield _found("schedule_sized_in_micro_batches", evidence, place, "error", **values)


def _synchronised_every(record: LoopRecord) -> Iterator[Finding]:
    early = [m for w in record.full for m in w.micro_batches[:-1] if m.synchronised]
    if early:
        many = len(early) + len(record.full)
        evidence = f"DDP reduced the gradients in {many} backwards of {len(record.full)} windows"
        yield _found("synchronised_every_micro_batch", evidence, early[0].place, n=record.steps)


def _weights(record: LoopRecord) -> Iterator[Finding]:
    """Findings from the weights of the losses. They need no comparison of gradients."""
    n = record.steps
    found: dict[str, tuple[ObservedWindow, Weighing]] = {}
    for window, weighing in weighings(record):
        if not _is_leak(window, record):
            for name in weighing.faults:
                found.setdefault(name, (window, weighing))
    for name in sorted(found, key=lambda name: (name == "mean_of_means", name)):  # the scale first
        window, weighing = found[name]
        steps, place = len(window), weighing.place
        evidence = f"over {steps} micro-batches, the weights of the loss sum up to {weighing.sum:.4g}"
        compared = window.comparison
        if compared is not None and compared.whole is not None:
            evidence += (
                f"; the gradient at the step is {compared.whole.ratio:.4g} × as long as the gradient of the "
                "window in one batch"
            )
        if name == "mean_of_means":
            items = ", ".join(f"{count:g}" for count in weighing.items)
            evidence = f"items of the micro-batches ({weighing.counted}): {items}; all have the same weight"
            if record.sampling == "batch_rebalance":
                evidence += '; train_sampling_strategy="batch_rebalance" makes micro-batches of unequal size'
        elif name == "another_gradient":
            totals = ", ".join(f"{total:.3g}" for total in weighing.items)
            evidence = (
                f"each backward of a window repeats the losses before; their weights add up to {totals}"
            )
        elif name == "partial_window_mis_scaled":
            evidence = f"a window has {steps} of {n} micro-batches, and {evidence}"
        elif name == "in_batch_negatives_cut":
            evidence = f"the classes of the loss are the examples of a micro-batch; a window has {steps}"
        elif name == "loss_is_a_sum":
            items = ", ".join(f"{count:g}" for count in weighing.items)
            evidence = (
                f"the loss is a sum over {weighing.counted} ({items}), which the loop does not divide by"
            )
        elif name == "divided_twice" and window.change.hand and window.change.hand != 1:
            evidence += f", and the gradient is multiplied by {window.change.hand:.4g} as well"
        if name != "partial_window_leaked":
            yield _found(name, evidence, place, n=n)


def _packed_rows(record: LoopRecord) -> Iterator[Finding]:
    change, place = record.mixed_rows
    if change > 0:
        evidence = f"other tokens in the first example of a row change outputs of later ones by {change:.2g}"
        yield _found("packed_examples_mixed", evidence, place)


def _batch_norm(record: LoopRecord) -> Iterator[Finding]:
    if record.has_batch_norm and record.steps > 1:
        place = record.windows[0].micro_batches[0].place
        evidence = "a BatchNorm of the model is in training mode"
        found = next((r for _, r in record.compared if r.coupled == "batch_norm"), None)
        yield _found("examples_coupled", _losses_of(found) if found else evidence, place)


def _losses_of(found: WindowComparison) -> str:
    losses = ", ".join(f"{loss:.5g}" for loss in found.losses[:4]) + " …" * (len(found.losses) > 4)
    return f"the loss of the window in one batch is {found.whole_loss:.5g}, of the micro-batches {losses}"


def _gradient(record: LoopRecord) -> Iterator[Finding]:
    """Findings from the comparisons of full windows, where the weights of the losses do not tell."""
    full = [(w, r) for w, r in record.compared if len(w) == record.steps and not _is_leak(w, record)]
    if record.steps < 2 or not full:
        return
    coupled = next((pair for pair in full if pair[1].coupled in COUPLED), None)
    if coupled is not None and coupled[1].coupled == "sum" and weigh(coupled[0], record.steps).verdict:
        return  # the loop divides the sum
    if coupled is not None and (coupled[1].coupled == "sum" or coupled[1].error > coupled[1].tolerance):
        window, found = coupled
        evidence = _losses_of(found)
        if found.coupled == "in_batch":
            evidence += "; the loss of an example changes in a batch that holds it twice"
        yield _found(COUPLED[found.coupled], evidence, window.micro_batches[0].place)
        return
    full = [(w, r) for w, r in full if w.is_intact and w.change.scaled is not None]
    if not full:
        return
    window, worst = max(full, key=lambda pair: pair[1].error)
    weighing, n, whole = weigh(window, record.steps), record.steps, worst.whole
    if worst.error <= worst.tolerance or (weighing.verdict == "exact" and weighing.items):
        return
    assert whole is not None
    place = window.micro_batches[0].place
    off = _error(GradientComparison(1.0, whole.cosine))  # error of the direction alone
    direction = f"the direction of the gradient is {off:.2g} off from the gradient of the window in one batch"
    is_means = (
        worst.means is not None
        and _error(GradientComparison(1.0, worst.means.cosine)) + worst.tolerance < off
    )
    beside = worst.means if is_means and worst.means is not None else whole
    length = (
        f"with {n} micro-batches, the gradient at the step is {whole.ratio:.4g} × as long as the gradient of "
        "the window in one batch"
    )
    allowed = 10 * worst.tolerance  # relative deviation of a ratio from the expected value
    if abs(beside.ratio / n - 1) <= allowed:
        yield _found("not_divided", length, place, n=n)
    elif abs(beside.ratio * n - 1) <= allowed:
        yield _found("divided_twice", length, place, n=n)
    elif abs(beside.ratio - 1) > allowed and not is_means and off <= worst.tolerance:
        yield _found("mis_scaled", length, place, "advice")
    if is_means:
        items = ", ".join(f"{count:g}" for count in worst.items)
        evidence = (f"items of the micro-batches ({worst.counted}): {items}; " if items else "") + direction
        yield _found("mean_of_means", evidence, place, n=n)
    elif off > worst.tolerance and not weighing.verdict:
        yield _found("another_gradient", direction, window.place)


COUPLED = {
    "batch_norm": "examples_coupled",
    "in_batch": "in_batch_negatives_cut",
    "sum": "loss_is_a_sum",
    "padding": "padding_reaches_the_loss",
}


def _is_leak(window: ObservedWindow, record: LoopRecord) -> bool:
    """Whether a window continues in the next pass over the data."""
    passes = [m.data_pass for m in window.micro_batches]
    if passes[0]:
        return passes[-1] > passes[0]
    return record.steps > 1 and has_leaked(window, record.full, record.steps)


def _partial(record: LoopRecord) -> Iterator[Finding]:
    """Findings about windows at the end of a pass over the data."""
    n = record.steps
    for window in (*record.windows, *record.later):
        dropped = [d.micro_batches for d in window.discarded if d.why == "dropped"]
        if dropped and len(dropped[-1]) < n:
            yield _dropped(len(dropped[-1]), n, dropped[-1][-1])
            return
        passes = [m.data_pass for m in window.micro_batches]
        if not record.is_stream and _is_leak(window, record):
            evidence = f"a window has {len(window)} micro-batches, some of them from the pass before"
            if passes[0]:
                old = passes.count(passes[0])
                evidence = f"{old} of the {len(passes)} backwards of a window were in the previous pass"
            yield _found("partial_window_leaked", evidence, window.place, n=n)
            return
    yield from _mis_scaled_partial(record)
    known = {
        m.losses for w in record.windows for m in w.micro_batches if m is w.micro_batches[-1] or w.is_intact
    }
    left = [each for each in record.unstepped if each.losses in known]
    if record.pass_length and 0 < len(left) < n:
        yield _dropped(len(left), n, left[-1])


def _mis_scaled_partial(record: LoopRecord) -> Iterator[Finding]:
    """A finding about the gradient of a partial window, where the weights of the losses do not tell."""
    n = record.steps
    errors = [(r.error, r.tolerance) for w, r in record.compared if len(w) == n and w.is_intact]
    full_are_right = bool(errors) and all(error <= tolerance for error, tolerance in errors)
    for window, comparison in record.compared:
        steps, whole = len(window), comparison.whole
        if steps >= n or whole is None or not window.is_intact or weigh(window, n).verdict:
            continue
        evidence = f"a window has {steps} of {n} micro-batches, and the gradient is "
        if abs(whole.ratio * n / steps - 1) <= 10 * comparison.tolerance:
            evidence += f"{whole.ratio:.3g} × as long as the gradient of the window in one batch"
        elif full_are_right and not comparison.coupled and comparison.error > comparison.tolerance:
            evidence += (
                f"{whole.error():.2g} off from the gradient of the window in one batch, unlike full windows"
            )
        else:
            continue
        yield _found("partial_window_mis_scaled", evidence, window.micro_batches[0].place, n=n)
        return


def _dropped(steps: int, n: int, where: ObservedMicroBatch) -> Finding:
    evidence = f"no step followed the last {steps} backwards of the data; a window has {n}"
    return _found("partial_window_dropped", evidence, where.place, n=n)


def _swamped(record: LoopRecord) -> Iterator[Finding]:
    of = [(r.swamped, w) for w, r in record.compared if r.swamped is not None and len(w.micro_batches) > 1]
    error, window = max(of, key=lambda pair: pair[0], default=(0.0, None))
    if window is not None and error >= MIN_SUM_RTOL_16_BIT:
        steps = len(window.micro_batches)
        evidence = f"after {steps} micro-batches, the gradient is {error:.2%} off from the sum in float32"
        yield _found("swamped_in_16_bits", evidence, window.place)


def _logged(record: LoopRecord) -> Iterator[Finding]:
    """Findings about losses that one line reads once per window, or that Trainer logs."""
    full = [(w, r) for w, r in record.compared if len(w.micro_batches) == record.steps and r.losses]
    if record.steps < 2 or len(full) < 2:
        return
    series = []
    for place in {read.place for w, _ in full for read in w.reads}:
        by = [[read for read in w.reads if read.place == place] for w, _ in full]
        by = by if by[-1] else by[:-1]  # reads after the last observed step are not recorded
        if len(by) > 1 and all(len(reads) == 1 for reads in by):
            series.append([reads[0] for reads in by])
    logged, numbers = dict(record.logged), [record.windows.index(w) + 1 for w, _ in full]
    known = list(
        takewhile(lambda number: number in logged, numbers)
    )  # the report may come before the last log
    if len(known) > 1:
        series.append([LossRead(logged[number], full[0][0].place) for number in known])
    found: dict[str, Finding] = {}
    for reads in series:
        for finding in _loss_findings(reads, [r for _, r in full[: len(reads)]], record.steps):
            found.setdefault(finding.name, finding)
    yield from found.values()


def _loss_findings(
    reads: Sequence[LossRead], compared: Sequence[WindowComparison], n: int
) -> Iterator[Finding]:
    true = [_mean(comparison) for comparison in compared]

    def are(others: Sequence[float]) -> bool:
        pairs = zip((read.value for read in reads), others, strict=True)
        return all(abs(a - b) <= 10 * compared[0].tolerance * abs(b) for a, b in pairs)

    shown = f"the logged loss is {reads[0].value:.4g}, the loss of the window {true[0]:.4g}"
    last, place = [comparison.losses[-1] for comparison in compared], reads[0].place
    if are(true):
        return
    if are([n * loss for loss in true]):
        evidence = f"{shown}; their ratio is {n}, the accumulation steps"
        yield _found("logged_loss_inflated", evidence, place, n=n)
    elif are(last):
        evidence = f"{shown}, the loss of the last micro-batch {last[0]:.4g}"
        yield _found("logged_loss_of_the_last_micro_batch", evidence, place, n=n)
    elif are([loss / n for loss in last]):
        evidence = f"{shown}; it is the loss of the last micro-batch, {last[0]:.4g}, divided by {n}"
        yield _found("logged_loss_of_the_last_micro_batch", evidence, place, n=n)


def _rate(record: LoopRecord) -> Iterator[Finding]:
    windows = [sum(r.items) for _, r in record.compared if r.items and r.counted == "examples"]
    examples = median(windows) if windows else 0
    for rate, whose in DEFAULT_LEARNING_RATES.items():
        used = any(math.isclose(window.lr[0], rate, rel_tol=1e-6) for window in record.windows)
        if used and examples >= MIN_LARGE_WINDOW_EXAMPLES and record.steps > 1:
            evidence = f"the learning rate is {rate:g}, {whose}; a window has {examples:g} examples"
            values = {"twice": 2 * rate, "four_times": 4 * rate}
            yield _found("learning_rate_unchanged", evidence, record.windows[0].place, "advice", **values)


def _mean(comparison: WindowComparison) -> float:
    """The loss of a window, computed from the losses of the micro-batches."""
    if not comparison.items:
        return comparison.whole_loss
    pairs = zip(comparison.items, comparison.losses, strict=True)
    return sum(n * loss for n, loss in pairs if n) / sum(comparison.items)


def _error(alike: GradientComparison | None) -> float:
    return math.inf if alike is None else alike.error()


def _line_of(
    touched: Sequence[tuple[str, Place | None]], otherwise: Place | None, like: str = ""
) -> Place | None:
    """The last line that changed gradients with a function of this name; `otherwise` if there is none."""
    places = [place for how, place in touched if place is not None and like in how]
    return places[-1] if places else otherwise


RULES: tuple[Callable[[LoopRecord], Iterator[Finding]], ...] = (
    _stepped_every,
    _zeroed_inside,
    _never_zeroed,
    _clipped_early,
    _clipped_in_a_hook,
    _clipped_scaled,
    _clipped_late,
    _weights,
    _packed_rows,
    _batch_norm,
    _gradient,
    _partial,
    _scheduled,
    _synchronised_every,
    _swamped,
    _logged,
    _rate,
)
