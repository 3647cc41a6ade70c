"""What is wrong with a training loop: from what was watched to findings, each with its evidence.

A rule looks at all windows and gives findings; their words are `words.py`'s.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from statistics import median
from typing import Any, Literal

from gradacc_hf.doctor.messages import EXPLAINS, FIXES, WORDS
from gradacc_hf.doctor.observer import MicroBatch, Place, Read, Window
from gradacc_hf.doctor.reference import Alike, Replay

UNTOUCHED = 1e-3  # relative change of a norm that is none
GONE = 1e-12  # of a norm, relative: less is nothing
MOST_STEPS = 1024  # by which a loss is divided to accumulate
SWAMPED = 2**-9  # relative error of a gradient that was added up in 16 bits
USUAL_RATES = {5e-5: "Trainer's default, for 8 examples", 1e-3: "torch's default"}
LARGE = 64  # examples, in a window whose learning rate is a default


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or, as "advice", worth a thought.

    `evidence`: numbers of this run. `place`: the line of the user's. `effect`: what it does to training.
    `fix`: the lines to change, "-" and "+" before them where they are known.
    """

    name: str
    what: str
    evidence: str
    effect: str
    fix: str
    place: Place | None
    kind: Literal["error", "advice"] = "error"


@dataclass(frozen=True)
class Seen:
    """All that findings are made from.

    `intended`: the accumulation steps that are meant, where that was said. `horizon`: the steps that the
    scheduler was made for. `pass_length`: micro-batches in a pass over the data. `left`: backwards after the
    last step. `logged`: losses that a Trainer has logged, by the number of its step. `driver`: whose backward
    it is, "trainer" or "accelerate"; "" for the loop's own.
    """

    windows: Sequence[Window]
    left: Sequence[MicroBatch]
    intended: int | None
    horizon: int | None
    pass_length: int | None
    logged: Sequence[tuple[int, float]] = ()
    driver: str = ""

    @property
    def steps(self) -> int:
        """Micro-batches of most windows that accumulate; 1 where none does."""
        counts = Counter(len(w.micro_batches) for w in self.windows)
        return max(counts, key=lambda steps: (steps > 1, counts[steps], steps), default=0)

    @property
    def full(self) -> list[Window]:
        """The windows with so many."""
        return [w for w in self.windows if len(w.micro_batches) == self.steps]

    @property
    def replays(self) -> list[tuple[Window, Replay]]:
        """Windows that were replayed."""
        return [(w, w.replay) for w in self.windows if w.replay is not None and w.replay.whole is not None]

    @property
    def between(self) -> list[tuple[MicroBatch, MicroBatch]]:
        """Backwards that follow each other in a full window."""
        return [pair for window in self.full for pair in pairwise(window.micro_batches)]


def findings(seen: Seen) -> list[Finding]:
    """All findings, errors first; what follows from another one is not said."""
    found = [finding for rule in RULES for finding in rule(seen)]
    names = {finding.name for finding in found}
    explained = {effect for name in names for effect in EXPLAINS.get(name, ())}
    fixes = FIXES.get(seen.driver, {})
    found = [
        replace(finding, fix=fixes.get(finding.name, finding.fix).strip("\n"))
        for finding in found
        if finding.name not in explained
    ]
    return sorted(found, key=lambda finding: finding.kind != "error")


def _found(
    name: str, evidence: str, place: Place | None, kind: Literal["error", "advice"] = "error", **values: Any
) -> Finding:
    what, effect, fix = (text.format(**values) for text in WORDS[name])
    return Finding(name, what, evidence, effect, fix.strip("\n"), place, kind)


def _stepped_every(seen: Seen) -> Iterator[Finding]:
    if {len(window.micro_batches) for window in seen.windows} != {1}:
        return
    steps, place = len(seen.windows), seen.windows[0].place
    n = seen.intended or min(window.asked or 1 for window in seen.windows)
    if n > 1:
        evidence = f"{steps} steps followed {steps} backwards; {n} micro-batches a step were asked for"
        yield _found("stepped_on_every_micro_batch", evidence, place, n=n)
        return
    divisors = [m.divided_by for window in seen.windows for m in window.micro_batches]
    n = round(divisors[0] or 0) if divisors[0] is None or math.isfinite(divisors[0]) else 0
    same = all(by is not None and abs(by - n) <= 1e-3 * n for by in divisors)
    if same and 1 < n <= MOST_STEPS:  # or it is the weight of a loss
        evidence = f"{steps} steps followed {steps} backwards, each of a loss divided by {n}"
        yield _found("stepped_on_every_micro_batch", evidence, place, "advice", n=n)


def _zeroed_inside(seen: Seen) -> Iterator[Finding]:
    lost = [
        (before, after)
        for before, after in seen.between
        if before.norm_after > 0 and after.norm_before <= GONE * before.norm_after
        if before.data_pass == after.data_pass
    ]
    if lost:
        before, _ = lost[0]
        evidence = (
            f"{len(lost)} times a gradient, the first of norm {before.norm_after:.3g}, was gone when the "
            "next backward of its window began"
        )
        yield _found(
            "zeroed_inside_the_window", evidence, _line_of(before.touched, before.place, "zero"), n=seen.steps
        )


def _never_zeroed(seen: Seen) -> Iterator[Finding]:
    known = [w for w in seen.windows if w.norm_after_step is not None and w.norm_at_step > 0]
    kept = [w for w in known if not _changed(w.norm_at_step, w.norm_after_step) and w.norm_after_step]
    if len(kept) >= 2:
        first, last = seen.windows[0], seen.windows[-1]
        evidence = (
            f"after {len(kept)} of {len(seen.windows)} steps the gradient was as long as before; its norm "
            f"was {first.norm_at_step:.3g} at the first step and {last.norm_at_step:.3g} at the last"
        )
        yield _found("never_zeroed", evidence, last.place)


def _changed(before: float, after: float | None) -> bool:
    """Has a gradient's norm been scaled, but not to nothing?"""
    return bool(after) and after > GONE * before and abs(after / before - 1) > UNTOUCHED  # type: ignore[operator]


def _clipped_early(seen: Seen) -> Iterator[Finding]:
    changed = [
        (before, after)
        for before, after in seen.between
        if before.norm_after > 0 and _changed(before.norm_after, after.norm_before)
    ]
    if changed:
        before, after = changed[0]
        evidence = (
            f"{len(changed)} times a gradient was changed between two backwards of a window, first from norm "
            f"{before.norm_after:.3g} to {after.norm_before:.3g}"
        )
        unscaled = any("unscale" in how for how, _ in before.touched)
        name = "unscaled_too_early" if unscaled else "clipped_too_early"
        yield _found(name, evidence, _line_of(before.touched, before.place), n=seen.steps)


def _clipped_late(seen: Seen) -> Iterator[Finding]:
    touched = [[(how, at) for how, at in w.touched_after if "zero" not in how] for w in seen.windows]
    if late := [by for by in touched if by]:
        evidence = (
            f"after {len(late)} of {len(seen.windows)} steps the gradient was changed ({late[0][0][0]})"
        )
        yield _found("clipped_too_late", evidence, _line_of(late[0], seen.windows[0].place))


def _scheduled(seen: Seen) -> Iterator[Finding]:
    n = seen.steps
    moved = [(before, after) for before, after in seen.between if before.lr != after.lr]
    if moved:
        before, after = moved[0]
        evidence = (
            f"the learning rate changed {len(moved)} times between two backwards of a window, first from "
            f"{before.lr:.4g} to {after.lr:.4g}"
        )
        yield _found("scheduler_per_micro_batch", evidence, after.place, n=n)
        return
    moves_with_windows = all(before.lr != after.lr for before, after in pairwise(seen.windows))
    if not (moves_with_windows and n > 1 and seen.horizon and seen.pass_length):
        return  # it steps once a pass, or never, or nobody knows how long it is
    if not seen.horizon % seen.pass_length:
        passes = seen.horizon // seen.pass_length
        evidence = (
            f"it was made for {seen.horizon} steps: {passes} × {seen.pass_length}, the micro-batches of a "
            f"pass; there are {math.ceil(seen.pass_length / n)} windows in one"
        )
        values = {"n": n, "horizon": seen.horizon, "passes": passes}
        yield _found("schedule_sized_in_micro_batches", evidence, seen.windows[0].place, "error", **values)


def _synchronised_every(seen: Seen) -> Iterator[Finding]:
    early = [m for w in seen.full for m in w.micro_batches[:-1] if m.synchronised]
    if early:
        times = len(early) + len(seen.full)
        evidence = f"DDP reduced them in {times} backwards of {len(seen.full)} windows"
        yield _found("synchronised_every_micro_batch", evidence, early[0].place, n=seen.steps)


def _gradient(seen: Seen) -> Iterator[Finding]:
    """What the replays of whole windows say."""
    full = [(w, r) for w, r in seen.replays if len(w.micro_batches) == seen.steps]
    if seen.steps < 2 or not full:
        return
    window, worst = max(full, key=lambda pair: _error(pair[1].whole))
    place, n, whole = window.micro_batches[0].place, seen.steps, worst.whole
    assert whole is not None
    is_right = _error(whole) <= worst.tolerance
    if worst.coupled in COUPLED and (worst.coupled == "sum" or not is_right):
        losses = ", ".join(f"{loss:.5g}" for loss in worst.losses[:4]) + " …" * (len(worst.losses) > 4)
        evidence = f"the window at once has the loss {worst.whole_loss:.5g}; its micro-batches {losses}"
        evidence += "; an example beside itself has another loss than alone" * (worst.coupled == "in_batch")
        yield _found(COUPLED[worst.coupled], evidence, place)
        return
    if is_right:
        return
    off = _error(Alike(1.0, whole.cosine))  # of its direction
    is_means = worst.means is not None and _error(Alike(1.0, worst.means.cosine)) + worst.tolerance < off
    beside = worst.means if is_means and worst.means is not None else whole
    length = (
        f"the gradient that reached the optimizer is {whole.ratio:.4g} × as long as that of the window at "
        f"once, in {n} micro-batches"
    )
    allowed = 10 * worst.tolerance  # by how much a ratio may be off and be called n
    if abs(beside.ratio / n - 1) <= allowed:
        yield _found("not_divided", length, place, n=n)
    elif abs(beside.ratio * n - 1) <= allowed:
        yield _found("divided_twice", length, place, n=n)
    elif abs(beside.ratio - 1) > allowed and not is_means and off <= worst.tolerance:
        yield _found("mis_scaled", length, place, "advice")
    if is_means:
        items = ", ".join(f"{count:g}" for count in worst.items) or "not known"
        evidence = (
            f"items of the micro-batches ({worst.counted}): {items}; the gradient is {off:.2g} off that of "
            "the window at once"
        )
        yield _found("mean_of_means", evidence, place, n=n)
    elif off > worst.tolerance:
        evidence = f"its direction is {off:.2g} off that of the window at once"
        yield _found("another_gradient", evidence, window.place)


COUPLED = {
    "batch_norm": "examples_coupled",
    "in_batch": "in_batch_negatives_cut",
    "sum": "loss_is_a_sum",
    "padding": "padding_reaches_the_loss",
}


def _partial(seen: Seen) -> Iterator[Finding]:
    """Windows that end with the data, or go on beyond."""
    n = seen.steps
    for window in seen.windows:
        passes = [m.data_pass for m in window.micro_batches]
        if passes[0] and passes[-1] > passes[0]:
            old = passes.count(passes[0])
            last_of_old, first_of_new = window.micro_batches[old - 1], window.micro_batches[old]
            if first_of_new.norm_before <= GONE * last_of_old.norm_after:
                yield _dropped(old, n, last_of_old)
            else:
                evidence = f"{old} of its {len(passes)} backwards were of the pass before"
                yield _found("partial_window_leaked", evidence, window.place, n=n)
            return
    errors = [(_error(r.whole), r.tolerance) for w, r in seen.replays if len(w.micro_batches) == n]
    full_are_right = bool(errors) and all(error <= tolerance for error, tolerance in errors)
    for window, replay in seen.replays:
        steps, whole = len(window.micro_batches), replay.whole
        if steps >= n or whole is None:
            continue
        evidence = f"in {steps} of {n} micro-batches its gradient is "
        if abs(whole.ratio * n / steps - 1) <= 10 * replay.tolerance:
            evidence += f"{whole.ratio:.3g} × as long as that of the window at once"
        elif full_are_right and not replay.coupled and whole.error() > replay.tolerance:
            evidence += (
                f"{whole.error():.2g} off that of the window at once, and those of full windows are not"
            )
        else:
            continue
        yield _found("partial_window_mis_scaled", evidence, window.micro_batches[0].place, n=n)
        return
    if seen.pass_length and 0 < len(seen.left) < n:
        yield _dropped(len(seen.left), n, seen.left[-1])


def _dropped(steps: int, n: int, where: MicroBatch) -> Finding:
    evidence = f"{steps} backwards at the end of the data came to no step ({n} make a window)"
    return _found("partial_window_dropped", evidence, where.place, n=n)


def _swamped(seen: Seen) -> Iterator[Finding]:
    of = [(r.swamped, w) for w, r in seen.replays if r.swamped is not None and len(w.micro_batches) > 1]
    error, window = max(of, key=lambda pair: pair[0], default=(0.0, None))
    if window is not None and error >= SWAMPED:
        steps = len(window.micro_batches)
        evidence = f"after {steps} micro-batches the gradient is {error:.2%} off its sum in float32"
        yield _found("swamped_in_16_bits", evidence, window.place)


def _logged(seen: Seen) -> Iterator[Finding]:
    """Losses that were read as numbers once a window at one place, or that Trainer has logged."""
    full = [(w, r) for w, r in seen.replays if len(w.micro_batches) == seen.steps and r.losses]
    if seen.steps < 2 or len(full) < 2:
        return
    series = []
    for place in {read.place for w, _ in full for read in w.reads}:
        by = [[read for read in w.reads if read.place == place] for w, _ in full]
        by = by if by[-1] else by[:-1]  # of the last window, what is read after its step is not heard
        if len(by) > 1 and all(len(reads) == 1 for reads in by):
            series.append([reads[0] for reads in by])
    logged, numbers = dict(seen.logged), [seen.windows.index(w) + 1 for w, _ in full]
    known = list(takewhile(lambda number: number in logged, numbers))  # a report may come before the last log
    if len(known) > 1:
        series.append([Read(logged[number], full[0][0].place) for number in known])
    found: dict[str, Finding] = {}
    for reads in series:
        for finding in _judged(reads, [r for _, r in full[: len(reads)]], seen.steps):
            found.setdefault(finding.name, finding)
    yield from found.values()


def _judged(reads: Sequence[Read], replays: Sequence[Replay], n: int) -> Iterator[Finding]:
    true = [_mean(replay) for replay in replays]

    def are(others: Sequence[float]) -> bool:
        pairs = zip((read.value for read in reads), others, strict=True)
        return all(abs(a - b) <= 10 * replays[0].tolerance * abs(b) for a, b in pairs)

    shown = f"{reads[0].value:.4g} was read where the window's loss is {true[0]:.4g}"
    last, place = [replay.losses[-1] for replay in replays], reads[0].place
    if are(true):
        return
    if are([n * loss for loss in true]):
        yield _found("logged_loss_inflated", f"{shown}: × {n}, the accumulation steps", place, n=n)
    elif are(last):
        evidence = f"{shown}, and the last micro-batch's {last[0]:.4g}"
        yield _found("logged_loss_of_the_last_micro_batch", evidence, place, n=n)
    elif are([loss / n for loss in last]):
        evidence = f"{shown}: the last micro-batch's, {last[0]:.4g}, divided by {n}"
        yield _found("logged_loss_of_the_last_micro_batch", evidence, place, n=n)


def _rate(seen: Seen) -> Iterator[Finding]:
    windows = [sum(r.items) for _, r in seen.replays if r.items and r.counted == "examples"]
    examples = median(windows) if windows else 0
    for rate, whose in USUAL_RATES.items():
        used = any(math.isclose(window.lr, rate, rel_tol=1e-6) for window in seen.windows)
        if used and examples >= LARGE and seen.steps > 1:
            evidence = f"{rate:g} is {whose}; a window has {examples:g} examples"
            values = {"twice": 2 * rate, "four_times": 4 * rate}
            yield _found("learning_rate_unchanged", evidence, seen.windows[0].place, "advice", **values)


def _mean(replay: Replay) -> float:
    """The loss of a window, from those of its micro-batches."""
    if not replay.items:
        return replay.whole_loss
    pairs = zip(replay.items, replay.losses, strict=True)
    return sum(n * loss for n, loss in pairs if n) / sum(replay.items)


def _error(alike: Alike | None) -> float:
    return math.inf if alike is None else alike.error()


def _line_of(
    touched: Sequence[tuple[str, Place | None]], otherwise: Place | None, like: str = ""
) -> Place | None:
    """The line that has changed gradients; the last that is known."""
    places = [place for how, place in touched if place is not None and like in how]
    return places[-1] if places else otherwise


RULES: tuple[Callable[[Seen], Iterator[Finding]], ...] = (
    _stepped_every,
    _zeroed_inside,
    _never_zeroed,
    _clipped_early,
    _clipped_late,
    _gradient,
    _partial,
    _scheduled,
    _synchronised_every,
    _swamped,
    _logged,
    _rate,
)
