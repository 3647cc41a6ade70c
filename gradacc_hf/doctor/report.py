"""The report of a diagnosis as text: the observed windows, the findings, and the checks that passed."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from gradacc_hf.doctor.judgement import Judgement, judgements
from gradacc_hf.doctor.record import LoopRecord
from gradacc_hf.doctor.rules import COUPLED, Finding

NOTHING_OBSERVED = "gradacc doctor: found no step of this optimizer after a backward of this model"
NOT_OBSERVED = (
    "gradacc doctor: {} was not judged: no step followed a backward that the doctor observed; it observes "
    "Tensor.backward() and torch.autograd.backward() of a model that holds the parameters"
)
NOTHING_JUDGED = (
    "gradacc doctor: nothing was judged, so the loop may be right or wrong; the lines above name the reasons "
    "(exit code 0, because no fault was found)"
)


def report(record: LoopRecord, found: Sequence[Finding]) -> str:
    """Return the text of the report."""
    if not record.windows:
        return NOTHING_OBSERVED
    lines = [_heading(record)]
    for finding in found:
        lines += _lines_of(finding)
    lines += [f"✓ {line}" for line in _right(record, {finding.name for finding in found})]
    lines += [f"? {line}" for line in _not_judged(record, {finding.name for finding in found})]
    return "\n".join(lines)


def _heading(record: LoopRecord) -> str:
    """Return the first line: the place of the loop, the windows observed, and their micro-batches."""
    windows = record.windows
    counts = sorted(Counter(map(len, windows)).items(), reverse=True)
    sizes = [(many, f"with {size} micro-batch{'es' * (size > 1)}") for size, many in counts]
    if len(sizes) == 1:
        split = "each " * (len(windows) > 1) + sizes[0][1]
    else:
        split = ", ".join(f"{many} {size}" for many, size in sizes)
    begins = windows[0].micro_batches[0].place
    where = f", loop at {begins}" if begins is not None else ""
    many = f"{len(windows)} window{'s' * (len(windows) > 1)}"
    return f"gradacc doctor{where}, {record.optimizer}: observed {many}, {split}"


def _lines_of(finding: Finding) -> list[str]:
    sign = "✗" if finding.kind == "error" else "·"
    lines = [f"{sign} {finding.name}: {finding.what}{' (advice)' * (finding.kind == 'advice')}"]
    if finding.place is not None:
        lines.append(f"    at      {finding.place}: {finding.place.code}")
    lines += [f"    seen    {finding.evidence}", f"    so      {finding.effect}"]
    first, *more = finding.fix.splitlines()
    return [*lines, f"    instead {first}", *(f"            {line}" for line in more)]


def _right(record: LoopRecord, wrong: set[str]) -> Iterator[str]:
    """Yield the checks that passed."""
    judged = judgements(record)
    all_windows = len(judged)
    equal = [each for each in judged if each.compared == "right"]
    if equal:
        found = [each.window.comparison for each in equal if each.window.comparison is not None]
        items = next((f", items: {each.counted}" for each in found if each.counted), "")
        error = max(each.error for each in found)
        to = f"to {error:.0e}" if error else "to the last bit"
        which = "each gradient" if len(equal) == all_windows else f"in {_of(equal, judged)}, the gradient"
        yield f"{which} equals the gradient of the window in one batch, {to}{items}"
    weighed = [each for each in judged if each.compared != "right" and each.weighed == "right"]
    if weighed and record.steps > 1:
        items = next((f", {w.weighing.counted}" for w in weighed if w.weighing.counted), "")
        which = "each window" if len(weighed) == all_windows else _of(weighed, judged)
        yield (
            f"in {which}, the gradient is the sum of the micro-batches' gradients, and their weights are the "
            f"shares of the items{items}"
            if items
            else f"in {which}, the gradient is the sum of the micro-batches' gradients, with equal weights"
        )
    if record.steps > 1 and not wrong & {"zeroed_inside_the_window", "never_zeroed"}:
        yield "gradients are zeroed once per window"
    if record.steps > 1 and not any("clipped" in name or "unscaled" in name for name in wrong):
        yield "no gradient is changed before the window is complete"
    rates = {m.lr for w in record.windows for m in w.micro_batches}
    if len(rates) > 1 and "scheduler_per_micro_batch" not in wrong:
        yield "the learning rate changes only with the steps"
    if record.steps == 1 and not wrong and not record.sets_gradients:
        yield "nothing is accumulated: each step has one micro-batch"
    if not math.isfinite(sum(w.norm_at_step for w in record.windows)):
        yield "some gradients are not finite; this alone does not make the loop wrong"


def _of(some: Sequence[Judgement], judged: Sequence[Judgement]) -> str:
    return f"{len(some)} of {len(judged)} windows"


def _not_judged(record: LoopRecord, wrong: set[str]) -> Iterator[str]:
    """Yield what was not compared or not judged, with the reason."""
    judged, many = judgements(record), len(record.windows)
    reasons: dict[tuple[str, bool], int] = {}
    for each in judged:
        if each.compared == "no":
            key = each.why_not_compared, each.weighed != "no"
            reasons[key] = reasons.get(key, 0) + 1
    for (why, is_weighed), number in reasons.items():
        which = "" if number == many else f" in {number} of {many} windows"
        but = "; the weights of the losses were judged" if is_weighed and record.steps > 1 else ""
        yield f"the gradient was not compared with the window in one batch{which}: {why}{but}"
    unknown = Counter(
        each.weighing.why_not for each in judged if each.compared == "no" and each.weighed == "no"
    )
    for why, number in unknown.items():
        if record.steps > 1 or record.sets_gradients:
            which = "" if number == many else f" in {number} of {many} windows"
            yield f"the scale of the loss was not judged{which}: {why}"
    odd = [each for each in judged if each.compared == "wrong" and not each.weighing.faults]
    if odd and not wrong & {*COUPLED.values(), *BY_GRADIENT}:
        error = max(each.window.comparison.error for each in odd if each.window.comparison is not None)
        yield (
            f"in {_of(odd, judged)}, the gradient is {error:.2g} off from the gradient of the window in one "
            "batch, for a reason that was not found"
        )
    if math.isnan(record.mixed_rows[0]):
        yield "whether the examples of a packed row attend to each other was not judged: no outputs by token"
    changes = [w for w in record.windows if w.change.place and w.change.hand != 1.0]
    if changes and "divided_twice" not in wrong:
        where = f"{changes[0].change.place}: {changes[0].change.place.code}"  # type: ignore[union-attr]
        done = "scales" if changes[0].change.hand is not None else "changes"
        yield f"the loop {done} the gradient before the step, which is not judged itself ({where})"
    set_aside = Counter(d.why for w in record.windows for d in w.discarded if d.why in DISCARDED)
    for why, number in set_aside.items():
        yield f"{DISCARDED[why]}: not judged ({number} of them)"
    reads = [read for window in record.windows for read in window.reads]
    if record.steps > 1 and reads and sum(len(w) == record.steps for w, _ in record.compared) < 2:
        yield "the losses that the loop reads were not compared with the loss of the window"
    if record.steps > 1 and "partial_window_leaked" not in wrong:
        yield from _end_not_judged(record, wrong)


BY_GRADIENT = {  # findings that explain another gradient
    *("not_divided", "divided_twice", "mis_scaled", "mean_of_means", "another_gradient"),
    *("partial_window_mis_scaled", "partial_window_leaked", "swamped_in_16_bits", "clipped_too_early"),
}
DISCARDED = {
    "other_loss": "backwards of another loss, zeroed before a window",
    "other_weights": "backwards at other weights, zeroed before a window (two passes, as in SAM)",
    "not_finite": "windows with a gradient that is not finite, zeroed without a step",
    "skipped": "whole windows, or windows of another optimizer, zeroed without a step",
}


def _end_not_judged(record: LoopRecord, wrong: set[str]) -> Iterator[str]:
    """Yield why the end of a pass over the data was not judged."""
    if record.has_several_loaders:
        yield "the end of a pass over the data was not judged: several loaders give batches"
    elif record.is_stream:
        yield "whether a window may continue in the next pass was not judged: the loop reads a stream"
    elif record.stopped_early:
        yield "the end of a pass over the data was not observed, because of --stop"
    elif not record.pass_length and "partial_window_dropped" not in wrong:
        yield "the end of a pass over the data was not judged: the loop has no DataLoader with a length"
