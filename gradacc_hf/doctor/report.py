"""The report of a diagnosis as text: what was observed, the findings, and what is right."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from gradacc_hf.doctor.record import LoopRecord, WindowComparison
from gradacc_hf.doctor.rules import COUPLED, Finding

NOTHING_OBSERVED = "gradacc doctor: no step of this optimizer was seen after a backward of this model"


def report(record: LoopRecord, found: Sequence[Finding]) -> str:
    """What was observed, each finding with its evidence, and what is right."""
    if not record.windows:
        return NOTHING_OBSERVED
    lines = [_heading(record)]
    for finding in found:
        lines += _lines_of(finding)
    lines += [f"✓ {line}" for line in _right(record, {finding.name for finding in found})]
    reasons = {w.comparison.why_not for w in record.windows if w.comparison and w.comparison.why_not}
    lines += [f"? the gradient was not compared with that of the window at once: {why}" for why in reasons]
    return "\n".join(lines)


def _heading(record: LoopRecord) -> str:
    """How many windows were observed, of how many micro-batches, and where the loop is."""
    windows = record.windows
    counts = sorted(Counter(map(len, windows)).items(), reverse=True)
    sizes = [(many, f"with {size} micro-batch{'es' * (size > 1)}") for size, many in counts]
    if len(sizes) == 1:
        split = "each " * (len(windows) > 1) + sizes[0][1]
    else:
        split = ", ".join(f"{many} {size}" for many, size in sizes)
    begins = windows[0].micro_batches[0].place
    where = f", the loop at {begins}" if begins is not None else ""
    return f"gradacc doctor{where}: {len(windows)} window{'s' * (len(windows) > 1)} watched, {split}"


def _lines_of(finding: Finding) -> list[str]:
    sign = "✗" if finding.kind == "error" else "·"
    lines = [f"{sign} {finding.name}: {finding.what}{' (advice)' * (finding.kind == 'advice')}"]
    if finding.place is not None:
        lines.append(f"    at      {finding.place}: {finding.place.code}")
    lines += [f"    seen    {finding.evidence}", f"    so      {finding.effect}"]
    first, *more = finding.fix.splitlines()
    return [*lines, f"    instead {first}", *(f"            {line}" for line in more)]


def _right(record: LoopRecord, wrong: set[str]) -> Iterator[str]:
    """What was checked and is right."""
    comparisons: list[WindowComparison] = [found for _, found in record.compared]
    errors = [found.whole.error() for found in comparisons if found.whole is not None]
    is_coupled = bool(wrong & set(COUPLED.values()))
    if errors and max(errors) <= max(found.tolerance for found in comparisons) and not is_coupled:
        items = next((f", items: {found.counted}" for found in comparisons if found.counted), "")
        to = f"to {max(errors):.0e}" if max(errors) else "to the last bit"
        yield f"each gradient is that of its window at once, {to}{items}"
    if record.steps > 1 and not wrong & {"zeroed_inside_the_window", "never_zeroed"}:
        yield "gradients are zeroed once a window"
    if record.steps > 1 and not any("clipped" in name or "unscaled" in name for name in wrong):
        yield "no gradient is changed before its window is complete"
    rates = {m.lr for w in record.windows for m in w.micro_batches}
    if len(rates) > 1 and "scheduler_per_micro_batch" not in wrong:
        yield "the learning rate moves with the steps"
    if record.steps == 1 and not wrong:
        yield "nothing is accumulated: each step has one micro-batch"
    if not math.isfinite(sum(w.norm_at_step for w in record.windows)):
        yield "some gradients are not finite, which says nothing of the loop"
