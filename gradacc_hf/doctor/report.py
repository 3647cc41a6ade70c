"""The report of a diagnosis as text: the observed windows, the findings, and the checks that passed."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from gradacc_hf.doctor.record import LoopRecord, WindowComparison
from gradacc_hf.doctor.rules import COUPLED, Finding

NOTHING_OBSERVED = "gradacc doctor: found no step of this optimizer after a backward of this model"


def report(record: LoopRecord, found: Sequence[Finding]) -> str:
    """Return the text of the report."""
    if not record.windows:
        return NOTHING_OBSERVED
    lines = [_heading(record)]
    for finding in found:
        lines += _lines_of(finding)
    lines += [f"✓ {line}" for line in _right(record, {finding.name for finding in found})]
    reasons = {w.comparison.why_not for w in record.windows if w.comparison and w.comparison.why_not}
    lines += [f"? the gradient was not compared with the window in one batch: {why}" for why in reasons]
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
    return f"gradacc doctor{where}: observed {len(windows)} window{'s' * (len(windows) > 1)}, {split}"


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
    comparisons: list[WindowComparison] = [found for _, found in record.compared]
    errors = [found.whole.error() for found in comparisons if found.whole is not None]
    is_coupled = bool(wrong & set(COUPLED.values()))
    if errors and max(errors) <= max(found.tolerance for found in comparisons) and not is_coupled:
        items = next((f", items: {found.counted}" for found in comparisons if found.counted), "")
        to = f"to {max(errors):.0e}" if max(errors) else "to the last bit"
        yield f"each gradient equals the gradient of the window in one batch, {to}{items}"
    if record.steps > 1 and not wrong & {"zeroed_inside_the_window", "never_zeroed"}:
        yield "gradients are zeroed once per window"
    if record.steps > 1 and not any("clipped" in name or "unscaled" in name for name in wrong):
        yield "no gradient is changed before the window is complete"
    rates = {m.lr for w in record.windows for m in w.micro_batches}
    if len(rates) > 1 and "scheduler_per_micro_batch" not in wrong:
        yield "the learning rate changes only with the steps"
    if record.steps == 1 and not wrong:
        yield "nothing is accumulated: each step has one micro-batch"
    if not math.isfinite(sum(w.norm_at_step for w in record.windows)):
        yield "some gradients are not finite; this alone does not make the loop wrong"
