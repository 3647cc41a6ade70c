"""The pictures of a report: their data, titles and notes.

Functions take contenders and return pictures. `plots.py` draws them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from gradacc_hf.accumulation.noise_scale import CONFIDENCE, MEASUREMENTS_NEEDED
from gradacc_hf.accumulation.reference import EXACT
from gradacc_hf.errors import listed
from gradacc_hf.report import narrative as words
from gradacc_hf.report import plots
from gradacc_hf.report.runs import HistoryRow, RunGroup
from gradacc_hf.report.tables import first_baseline, memory_figure, metric_names, source_metrics

BEYOND = 10.0  # times the largest noise scale, or as much below the smallest: the end of the picture
UNBOUNDED = 1e99  # examples; the upper bound of an interval without one
LOG_AXIS_RATIO = 3.0  # between the medians of contenders; above it an axis is logarithmic


@dataclass(frozen=True)
class Figure:
    """A picture with its title and the note under it."""

    title: str
    svg: Markup
    note: str = ""


def curves_of(found: Sequence[RunGroup]) -> list[Figure]:
    """Return loss, gradient error and evaluations by window."""
    figures = []
    if losses := _by_window(found, "loss"):
        log = _far_apart(losses)
        notes = ["Each contender logs its own loss, which is not always the mean over the window."] * (
            len(found) > 1
        )
        notes += ["The axis is logarithmic."] * log
        figures.append(Figure("Loss", plots.curves("loss", "loss", losses, log=log), " ".join(notes)))
    figures += _source_losses_of(found)
    if errors := _by_window(found, "gradient_error"):
        has_zero = any(bool(np.any(line.least <= 0)) for line in errors)
        note = f"An error of 0 is drawn at {words.error(plots.FLOOR)}." if has_zero else ""
        drawn = plots.curves("error", "relative error", errors, log=True, bound=EXACT)
        figures.append(Figure("Gradient error", drawn, note))
    return figures + _evaluations_of(found)


def _source_losses_of(found: Sequence[RunGroup]) -> list[Figure]:
    """Return the training loss of each source by window, for one contender that is trained on a mixture."""
    runs = found[0].runs if len(found) == 1 else ()
    names = [*dict.fromkeys(name for run in runs for row in run.rows for name in row.source_losses)]
    if not names:
        return []
    lines = [
        plots.curve(
            look,
            [[(row.window, row.source_losses.get(name, math.nan)) for row in run.rows] for run in runs],
            _windows_a_point(found),
        )
        for look, name in enumerate(names)
    ]
    drawn = plots.curves("sources", "loss", lines, labels=names)
    return [Figure("Loss by source", drawn, "The mean over the items of each source in a window.")]


def _evaluations_of(found: Sequence[RunGroup]) -> list[Figure]:
    """Return every metric by window, if a run was evaluated more than once."""
    if all(len(run.evaluations) < 2 for contender in found for run in contender.runs):
        return []
    figures = []
    of_sources = source_metrics(found) if len(found) == 1 else {}
    for i, name in enumerate([*metric_names(found), "loss"]):
        parts = [name, *(part for part, (metric, _) in of_sources.items() if metric == name)]
        drawn_of = [(contender, part) for contender in found for part in parts]
        lines = [
            plots.curve(look, [[(e["window"], e.get(part, math.nan)) for e in r.evaluations] for r in c.runs])
            for look, (c, part) in enumerate(drawn_of)
        ]
        labels = ["all", *(of_sources[part][1] for part in parts[1:])] if len(parts) > 1 else ()
        shown = lines if labels else [line for line in lines if line.known]
        drawn = plots.curves(f"evaluation{i}", name, shown, labels=labels)
        figures.append(Figure(words.metric_title(name), drawn, "On the validation examples."))
    return figures


def small_curves_of(found: Sequence[RunGroup]) -> list[Figure]:
    """Return learning rate and gradient norm by window."""
    figures = []
    if rates := _by_window(found, "lr"):
        runs = [run for contender in found for run in contender.runs]
        ends = sorted({window for run in runs for window in run.summary.get("continued_after", ())})
        shown = listed(f"{window:,}" for window in ends)
        note = f"Continued after window{'s' * (len(ends) > 1)} {shown}." if ends else ""
        figures.append(Figure("Learning rate", plots.curves("lr", "learning rate", rates, small=True), note))
    if norms := _by_window(found, "grad_norm"):
        drawn = plots.curves("norm", "gradient norm", norms, small=True, log=_far_apart(norms))
        figures.append(Figure("Gradient norm", drawn, "Before clipping."))
    return figures


def dynamics_of(found: Sequence[RunGroup]) -> list[Figure]:
    """Return the noise scale, the effective batch size if it changes, and the weight change per step."""
    figures = _noise_of(found)
    sizes = _by_window(found, "examples")
    if any(_changes(line.middle) for line in sizes if len(line.middle) > 2):
        drawn = plots.curves("size", "examples", sizes, small=True)
        figures.append(Figure("Effective batch size", drawn, "Examples of each window."))
    if ratios := _by_window(found, "update_ratio"):
        drawn = plots.curves("update", "relative change", ratios, small=True)
        note = "Norm of the weight change divided by the norm of the weights, on a sample of the weights."
        figures.append(Figure("Weight change per step", drawn, note))
    return figures


def _changes(sizes: np.ndarray) -> bool:
    """Whether the sizes of windows change. The short last window of an epoch does not count."""
    before, inner, after = sizes[:-2], sizes[1:-1], sizes[2:]
    is_short = (inner < before) & (inner < after)
    return bool(np.ptp([sizes[0], *inner[~is_short]]) > 0)


def _noise_of(found: Sequence[RunGroup]) -> list[Figure]:
    """Return the noise scale by window, on a logarithmic axis, from the first interval on.

    A single run has its interval as a band, which ends at the edge of the picture.
    """
    lines = [noise_curve(look, contender) for look, contender in enumerate(found)]
    lines = [line for line in lines if line.known]
    if not lines:
        return []
    middles = np.concatenate([line.middle[np.isfinite(line.middle)] for line in lines])
    edges = float(middles.min()) / BEYOND, float(middles.max()) * BEYOND
    clipped = [
        plots.Curve(
            line.look, line.windows, line.middle, np.clip(line.least, *edges), np.clip(line.most, *edges)
        )
        for line in lines
    ]
    note = "Average over recent windows."
    if all(len(contender.runs) == 1 for contender in found):
        note += f" Band: the {CONFIDENCE:.0%} interval, up to the edge of the picture."
    sizes = {run.window_size for contender in found for run in contender.runs}
    size = sizes.pop() if len(sizes) == 1 else None
    says = "" if size is None else f"effective batch size {size:g}"
    drawn = plots.curves("noise", "examples", clipped, small=True, log=True, bound=size, bound_text=says)
    return [Figure("Gradient noise scale", drawn, note)]


def noise_curve(look: int, contender: RunGroup) -> plots.Curve:
    """Return the known, positive noise scales of a contender, with the interval of a single run."""

    def known(row: HistoryRow, value: float) -> float:
        is_known = row.noise_measured >= MEASUREMENTS_NEEDED and 0 < row.noise_scale < math.inf
        return value if is_known else math.nan

    together = _windows_a_point([contender])
    middle, low, high = (
        plots.curve(
            look,
            [[(row.window, known(row, value(row))) for row in run.rows] for run in contender.runs],
            together,
        )
        for value in (
            lambda row: row.noise_scale,
            lambda row: row.noise_low,
            lambda row: row.noise_high if math.isfinite(row.noise_high) else UNBOUNDED,
        )
    )
    if len(contender.runs) > 1 or not low.known:
        return middle
    return plots.Curve(look, middle.windows, middle.middle, low.middle, high.middle)


def curves_note(found: Sequence[RunGroup]) -> str:
    """Return the meaning of a point of a curve, if it is more than one window of one run."""
    windows, repeats = _windows_a_point(found), max(len(contender.runs) for contender in found)
    of = [f"{windows} windows"] * (windows > 1) + [f"{repeats} repeats"] * (repeats > 1)
    return f"A point is a median of {' of '.join(of)}; bands reach from minimum to maximum." * bool(of)


def _by_window(found: Sequence[RunGroup], name: str) -> list[plots.Curve]:
    """Return a column of the histories: one curve for each contender that has it."""
    together = _windows_a_point(found)
    lines = []
    for look, contender in enumerate(found):
        repeats = [
            [(row.window, value) for row in run.rows if (value := getattr(row, name)) is not None]
            for run in contender.runs
        ]
        lines.append(plots.curve(look, repeats, together))
    return [line for line in lines if line.known]


def _windows_a_point(found: Sequence[RunGroup]) -> int:
    return plots.windows_a_point(max(len(run.rows) for contender in found for run in contender.runs))


def _far_apart(lines: Sequence[plots.Curve]) -> bool:
    """Whether contenders differ so much that the lower curves would be flat lines."""
    middles = [float(np.nanmedian(line.middle)) for line in lines]
    positive = all(np.nanmin(line.least) > 0 for line in lines)
    return positive and max(middles) > LOG_AXIS_RATIO * min(middles)


def metrics_of(found: Sequence[RunGroup]) -> list[Figure]:
    """Return the final metrics, if there are contenders to compare."""
    if len(found) < 2:
        return []
    baseline = first_baseline(found)
    figures = []
    for i, name in enumerate([*metric_names(found), "loss"]):
        values = [words.finite([run.metrics("eval").get(name) for run in c.runs]) for c in found]
        if any(values):
            labels = [contender.label for contender in found]
            drawn = plots.dots(f"metric{i}", words.metric_name(name), labels, values, baseline.get(name))
            figures.append(Figure(words.metric_title(name), drawn))
    return figures


def bars_of(found: Sequence[RunGroup]) -> list[Figure]:
    """Return speed and memory, if there are contenders to compare."""
    if len(found) < 2:
        return []
    memory_title, memory = memory_figure(found)
    labels = [contender.label for contender in found]
    wanted = (
        ("speed", "Speed", "examples per second", lambda run: run.examples_per_second),
        ("memory", memory_title.capitalize(), "MiB", lambda run: (memory(run) or math.nan) / 2**20),
    )
    figures = []
    for name, title, unit, figure in wanted:
        values = [words.finite([figure(run) for run in contender.runs]) for contender in found]
        if any(values):
            figures.append(Figure(title, plots.bars(name, unit, labels, values)))
    return figures


def sizes_of(found: Sequence[RunGroup]) -> list[Figure]:
    """Return the time of each micro-batch size that a run tried on its first windows, without warm-up."""
    figures = []
    for look, contender in enumerate(found):
        run = next((run for run in contender.runs if run.summary.get("tuning")), None)
        if run is None:
            continue
        tuning, trials = run.summary["tuning"], run.summary["tuning"]["trials"]
        trials = [trial for trial in trials if trial.get("counts", True)]
        sizes = sorted({trial["max_tokens"] for trial in trials})
        values = [[1e6 * t["seconds_per_token"] for t in trials if t["max_tokens"] == s] for s in sizes]
        labels = [f"{size:,}" + " (kept)" * (size == tuning["max_tokens"]) for size in sizes]
        if trials:
            drawn = plots.dots(f"sizes{look}", "µs per token, without padding", labels, values, None)
            note = "Rows: most tokens of a micro-batch. A mark is one of the first windows of the run."
            title = contender.label if len(found) > 1 else "Time by micro-batch size"
            figures.append(Figure(title, drawn, note))
    return figures


def windows_of(found: Sequence[RunGroup]) -> list[Figure]:
    """Return the first window of each contender that records it, all at one scale."""
    windows = {
        look: window
        for look, contender in enumerate(found)
        if (window := contender.first_window()) is not None
    }
    longest = max((max(map(max, window)) for window in windows.values()), default=0)
    rows = max((plots.picture_rows(window) for window in windows.values()), default=0)
    figures = []
    for look, window in windows.items():
        padded = sum(len(lengths) * max(lengths) for lengths in window)
        padding = 1 - sum(map(sum, window)) / padded if padded else 0.0
        count, is_padded = f"{len(window)} micro-batch{'es' * (len(window) != 1)}", found[look].is_padded
        drawn = plots.window_picture(f"window{look}", look, window, longest or 1, rows, is_padded)
        note = f"{words.percent(padding)} padding" if is_padded else "no padding computed"
        figures.append(Figure(found[look].label, drawn, f"{count}, {note}"))
    return figures
