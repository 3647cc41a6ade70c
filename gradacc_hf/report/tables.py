"""The tables of a report: figures side by side, the plan in numbers, the settings and versions.

Functions take contenders and runs, and return text. The names of all columns are defined here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from gradacc_hf.accumulation.noise_scale import CONFIDENCE, MEASUREMENTS_NEEDED, noise_range
from gradacc_hf.accumulation.reference import EXACT
from gradacc_hf.report import narrative as words
from gradacc_hf.report.runs import RecordedRun, RunGroup, number

SHARES = ("accuracy", "f1", "precision", "recall", "token_f1")
"""Metrics from 0 to 1. A report states the share of the teacher's metric that a student keeps."""


@dataclass(frozen=True)
class TableCell:
    """A cell of a table.

    text: the median.
    range: minimum and maximum over repeats; "" if they are equal.
    mark: "exact" or "off" for gradients, else "".
    """

    text: str
    range: str = ""
    mark: str = ""


def figures_table(found: Sequence[RunGroup]) -> tuple[list[str], list[tuple[str, list[TableCell]]]]:
    """Return the titles of the columns, and the label and cells of each contender, without empty columns."""
    metrics = metric_names(found)
    columns: list[tuple[str, Callable[[RecordedRun], float | None], Callable[[float], str]]] = [
        *((name, lambda run, name=name: run.metrics("eval").get(name), words.metric) for name in metrics),
        ("validation loss", lambda run: run.metrics("eval").get("loss"), words.metric),
        ("loss, last window", lambda run: run.loss if run.rows else None, words.metric),
        ("gradient error, worst", lambda run: run.gradient_error, words.error),
        ("examples/s", lambda run: run.examples_per_second, words.speed),
        ("tokens/s", lambda run: run.tokens_per_second, words.speed),
        ("padding", lambda run: run.padding, words.percent),
        (memory_figure(found)[0], memory_figure(found)[1], words.memory),
        ("seconds", lambda run: run.total("seconds"), words.speed),
    ]
    titles, cells = [], []
    for title, figure, show in columns:
        column = [_cell(title, contender, figure, show) for contender in found]
        if any(cell.text != "–" for cell in column):
            titles.append(title)
            cells.append(column)
    if len(found) > 1 or len(found[0].runs) > 1:
        titles.append("repeats")
        cells.append([TableCell(str(len(contender.runs))) for contender in found])
    rows = [(contender.label, [column[i] for column in cells]) for i, contender in enumerate(found)]
    return titles, rows


def metric_names(found: Sequence[RunGroup]) -> list[str]:
    """Return the metrics of all evaluations, without the loss and the metrics of a source."""
    names = dict.fromkeys(name for c in found for run in c.runs for name in run.metrics("eval"))
    return [name for name in names if name != "loss" and name not in source_metrics(found)]


def source_metrics(found: Sequence[RunGroup]) -> dict[str, tuple[str, str]]:
    """Return the metrics of the sources of a mixture, each with metric and source: "accuracy/chats"."""
    names = dict.fromkeys(name for c in found for run in c.runs for name in run.metrics("eval"))
    parts = {name: name.partition("/") for name in names}
    return {
        name: (metric, source) for name, (metric, _, source) in parts.items() if source and metric in names
    }


def sources_table(found: Sequence[RunGroup]) -> tuple[list[str], list[tuple[str, list[TableCell]]]]:
    """Return the titles of the columns, and a row of final metrics for each source and contender."""
    pairs = source_metrics(found).values()
    metrics = [*dict.fromkeys(metric for metric, _ in pairs)]
    metrics.sort(key=lambda metric: metric == "loss")  # last
    rows = []
    for source in dict.fromkeys(source for _, source in pairs):
        for contender in found:
            label = source if len(found) == 1 else f"{source}, {contender.label}"
            figures = [
                lambda run, name=f"{metric}/{source}": run.metrics("eval").get(name) for metric in metrics
            ]
            rows.append((label, [_cell("", contender, figure, words.metric) for figure in figures]))
    return [words.metric_name(metric) for metric in metrics], rows


def _cell(
    title: str,
    contender: RunGroup,
    figure: Callable[[RecordedRun], float | None],
    show: Callable[[float], str],
) -> TableCell:
    if title.startswith("gradient error"):
        worst = words.worst_error(contender)
        if worst is None:
            return TableCell("–")
        return TableCell(
            show(worst) if math.isfinite(worst) else "not finite", mark="exact" if worst <= EXACT else "off"
        )
    values = [value for run in contender.runs if (value := figure(run)) is not None]
    known = words.finite(values)
    if not known:
        return TableCell("not finite" if values and show is words.metric else "–")
    cell = _spread(known, show)
    missing = f"{len(values) - len(known)} not finite" if len(known) < len(values) else ""
    return TableCell(cell.text, ", ".join(filter(None, [cell.range, missing])))


def _spread(values: Sequence[float], show: Callable[[float], str]) -> TableCell:
    text, _, around = words.spread(values, show).partition(" (")
    return TableCell(text, around.removesuffix(")"))


def memory_figure(found: Sequence[RunGroup]) -> tuple[str, Callable[[RecordedRun], float | None]]:
    """Return the memory while training, if all runs record it; else the peak of the process."""
    title, key = "memory to train", "training_memory_bytes"
    if not all(run.summary.get(key) for contender in found for run in contender.runs if run.summary):
        title, key = "peak memory", "peak_memory_bytes"
    return title, lambda run: run.summary.get(key)


@dataclass(frozen=True)
class DetailCell:
    """A cell of a table about an evaluation. `shade` is a percentage; None for a cell without a shade."""

    text: str
    shade: int | None = None


@dataclass(frozen=True)
class DetailTable:
    """A table about an evaluation: of classes, confusions, entities, or mistakes.

    kind: "table", "matrix" or "texts".
    """

    title: str
    kind: str
    columns: list[str]
    rows: list[list[DetailCell]]
    note: str


@dataclass(frozen=True)
class ScoredSection:
    """An evaluation by `gradacc evaluate`, for the page."""

    title: str
    rows: list[list[str]]
    notes: tuple[str, ...]
    details: list[DetailTable]
    samples: tuple[dict[str, str], ...]


def details_of(found: Sequence[Mapping[str, Any]]) -> list[DetailTable]:
    """Return tables about an evaluation with formatted cells."""
    return [
        DetailTable(
            one["title"],
            one["kind"],
            one["columns"],
            [_detail_row(row, one["kind"] == "matrix") for row in one["rows"]],
            one["note"],
        )
        for one in found
    ]


def _detail_row(row: Sequence[Any], is_matrix: bool) -> list[DetailCell]:
    name, *cells = row
    total = sum(cell for cell in cells if isinstance(cell, int)) if is_matrix else 0
    return [
        DetailCell(str(name)),
        *(
            DetailCell(_shown(cell), round(100 * cell / total) if total and isinstance(cell, int) else None)
            for cell in cells
        ),
    ]


def _shown(cell: Any) -> str:
    if cell is None:
        return "–"
    return f"{cell:.3f}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else cell


def scored_sections(runs: Sequence[RecordedRun]) -> list[ScoredSection]:
    """Return the evaluations by `gradacc evaluate`."""
    found = []
    for run, scored in ((owner, one) for owner in runs for one in owner.scored):
        after = "" if scored.window is None else f" after window {scored.window:,}"
        title = f"{scored.name}: {scored.model} model{after} on {scored.data}, {scored.examples:,} examples"
        rows = [
            [
                name,
                words.metric(metric["value"]),
                _between(metric["low"], metric["high"]),
                words.metric(metric["baseline"]) if math.isfinite(metric["baseline"]) else "–",
            ]
            for name, metric in scored.metrics.items()
        ]
        title = f"{run.name}, {title}" if len(runs) > 1 else title
        found.append(ScoredSection(title, rows, scored.notes, details_of(scored.details), scored.samples))
    return found


def _between(low: float, high: float) -> str:
    known = math.isfinite(low) and math.isfinite(high)
    return f"{words.metric(low)} to {words.metric(high)}" if known else "–"


def before_rows(found: Sequence[RunGroup], titles: Sequence[str]) -> list[tuple[str, list[TableCell]]]:
    """Return rows of the table: the metrics before training, once if all contenders began alike.

    Empty if no model was evaluated before training.
    """
    rows: dict[tuple[TableCell, ...], list[str]] = {}
    for contender in found:
        before = [
            {words.metric_name(name): value for name, value in run.before_training.items()}
            for run in contender.runs
        ]
        values = [words.finite([metrics.get(title) for metrics in before]) for title in titles]
        cells = tuple(_spread(known, words.metric) if known else TableCell("") for known in values)
        if any(values):
            rows.setdefault(cells, []).append(contender.label)
    of_all = any(len(labels) == len(found) for labels in rows.values())
    return [
        ("before training" if of_all else f"{', '.join(labels)} before training", [*cells])
        for cells, labels in rows.items()
    ]


def baseline_row(found: Sequence[RunGroup], titles: Sequence[str]) -> list[str]:
    """Return a row of the table: the metrics of a baseline that ignores the input. Empty without any."""
    baseline: Mapping[str, float] = first_baseline(found)
    cells = [words.metric(baseline[title]) if title in baseline else "" for title in titles]
    return cells if any(cells) else []


def teacher_rows(found: Sequence[RunGroup], titles: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return rows of the table: the metrics of the teacher, and the share of each that the model keeps.

    A metric that is better where it is lower has no share. Empty without a teacher.
    """
    runs = [run for contender in found for run in contender.runs if run.teacher]
    if not runs:
        return []
    of_teacher = {name: number(value) for name, value in (runs[0].teacher.get("metrics") or {}).items()}
    of_teacher["validation loss"] = of_teacher.get("loss", math.nan)
    student, shares = runs[0].metrics("eval"), {}
    for name in titles:
        teacher, own = of_teacher.get(name, math.nan), student.get(name, math.nan)
        if name in SHARES and teacher > 0 and math.isfinite(own):
            shares[name] = f"{own / teacher:.1%}"
    cells = [words.metric(of_teacher[name]) if name in of_teacher else "" for name in titles]
    return [("teacher", cells), ("share of the teacher's", [shares.get(name, "") for name in titles])]


def first_baseline(found: Sequence[RunGroup]) -> dict[str, float]:
    return next((b for contender in found for run in contender.runs if (b := run.metrics("baseline"))), {})


def plan_table(found: Sequence[RunGroup]) -> list[tuple[str, list[TableCell]]]:
    """Return what was run, in numbers: (name, a cell for each contender), without empty rows."""
    rows: list[tuple[str, Callable[[RunGroup], TableCell]]] = [
        ("windows", _of_runs(lambda run: run.windows)),
        ("examples", _of_runs(lambda run: run.total("examples"))),
        ("effective batch size", _of_runs(_effective_batch_size)),
        ("accumulation steps: min / mean / max", _accumulation_steps),
        ("accumulation steps as planned", _planned_steps),
        ("processes", _of_runs(lambda run: run.summary.get("processes"))),
        (
            "precision",
            _all(lambda run: run.summary.get("precision")),
        ),
        ("tokens are", _all(lambda run: run.summary.get("tokens_are"))),
        ("teacher", _all(lambda run: run.teacher.get("name"))),
        ("temperature and weight of the teacher", _all(_teaching)),
        ("tokens", _of_runs(lambda run: run.total("tokens"))),
        ("tokens with padding", _of_runs(lambda run: run.total("padded_tokens"))),
        ("padding", _of_runs(lambda run: run.padding, words.percent)),
        ("windows skipped (not finite)", _of_runs(_skipped)),
        ("seeds", _all(lambda run: run.seed)),
        ("best evaluation", _best),
    ]
    return _known(found, rows)


def dynamics_table(found: Sequence[RunGroup]) -> list[tuple[str, list[TableCell]]]:
    """Return how the size of windows affects training, as rows of `plan_table`.

    Empty if no step was measured.
    """
    if not any(math.isfinite(run.update_ratio) for contender in found for run in contender.runs):
        return []
    rows = [
        ("effective batch size at the end", _of_runs(lambda run: run.window_size)),
        ("gradient noise scale at the end (examples)", _noise_scale),
        ("windows whose gradient was clipped", _of_runs(lambda run: run.clipped, words.percent)),
        ("windows that took no step", _of_runs(lambda run: run.skipped, words.percent)),
        ("weight change per step, relative (median)", _of_runs(lambda run: run.update_ratio, words.error)),
    ]
    return _known(found, rows)


def _known(
    found: Sequence[RunGroup], rows: Sequence[tuple[str, Callable[[RunGroup], TableCell]]]
) -> list[tuple[str, list[TableCell]]]:
    table = [(name, [cell(contender) for contender in found]) for name, cell in rows]
    return [(name, cells) for name, cells in table if any(cell.text for cell in cells)]


def _of_runs(
    figure: Callable[[RecordedRun], float | None], show: Callable[[float], str] = words.count
) -> Callable[[RunGroup], TableCell]:
    def cell(contender: RunGroup) -> TableCell:
        known = words.finite([figure(run) for run in contender.runs])
        return _spread(known, show) if known else TableCell("")

    return cell


def _all(value: Callable[[RecordedRun], Any]) -> Callable[[RunGroup], TableCell]:
    """Return a function that lists the distinct values of the runs."""

    def cell(contender: RunGroup) -> TableCell:
        values = (str(v) for run in contender.runs if (v := value(run)) is not None)
        return TableCell(", ".join(dict.fromkeys(values)))

    return cell


def _skipped(run: RecordedRun) -> int | None:
    return sum(row.skipped == 1 for row in run.rows) or None


def _effective_batch_size(run: RecordedRun) -> float | None:
    size = run.summary.get("effective_batch_size") or run.setting("batch", "effective")
    return size if isinstance(size, int | float) else None


def _teaching(run: RecordedRun) -> str | None:
    return f"{run.teacher['temperature']}, {run.teacher['weight']}" if run.teacher else None


def _noise_scale(contender: RunGroup) -> TableCell:
    """The noise scale with its interval for a single run, the spread over repeats for several."""
    measured = [run for run in contender.runs if run.noise_measurements >= MEASUREMENTS_NEEDED]
    if len(contender.runs) > 1 or not measured:
        known = words.finite([run.noise_scale for run in measured])
        return _spread(known, words.figure) if known else TableCell("")
    [run] = measured
    low, high = run.noise_interval
    scale = words.figure(run.noise_scale) if math.isfinite(run.noise_scale) else "beyond measure"
    if math.isnan(low):
        return TableCell(scale)
    if low <= 0 and math.isinf(high):
        return TableCell("not known", f"{run.noise_measurements} measurements exclude no value")
    return TableCell(scale, f"{CONFIDENCE:.0%} interval: {noise_range(low, high)}")


def _planned_steps(contender: RunGroup) -> TableCell:
    """The planned accumulation steps of a single run, if the run made others, with the reason."""
    run, *repeats = contender.runs
    planned = run.summary.get("planned_accumulation_steps")
    if repeats or not planned:
        return TableCell("")
    text = _steps(*(number(planned.get(key)) for key in ("min", "mean", "max")))
    return TableCell("" if text == _accumulation_steps(contender).text else text, _why_other_steps(run))


def _why_other_steps(run: RecordedRun) -> str:
    if run.summary.get("replays"):
        return "memory ran out, and windows were split finer"
    trials = (run.summary.get("tuning") or {}).get("trials")
    if trials:
        kept = run.summary["tuning"].get("max_tokens")
        then = f", then kept {kept:,} tokens" if kept else ""
        return f"the first {len(trials)} windows tried micro-batch sizes{then}"
    if run.padding == 0:
        return "the plan is from a sample of windows with padding, and the run computes none"
    return "the plan is from a sample of windows"


def _steps(least: float, mean: float, most: float) -> str:
    return f"{least:g} / {mean:.1f} / {most:g}".replace(" ", words.SPACE)


def _accumulation_steps(contender: RunGroup) -> TableCell:
    steps = zip(*(run.accumulation_steps for run in contender.runs), strict=True)
    least, mean, most = (words.finite(numbers) for numbers in steps)
    if not (least and mean and most):
        return TableCell("")
    return TableCell(_steps(min(least), sum(mean) / len(mean), max(most)))


def _best(contender: RunGroup) -> TableCell:
    """Return the best evaluation of a single run, if it is not the final one.

    Empty for repeats, which differ in the best window.
    """
    run, *repeats = contender.runs
    best = run.summary.get("best")
    if repeats or not best or best == run.summary.get("eval"):
        return TableCell("")
    text = " · ".join(f"{name} {words.metric(value)}" for name, value in run.metrics("best").items())
    return TableCell(text, f"after window {best.get('window', '?')}")


def configurations(runs: Sequence[RecordedRun]) -> list[tuple[str, str]]:
    """Return (runs, text): the configuration of the first run as YAML, then how the others differ."""
    known = [run for run in runs if run.config]
    if not known:
        return []
    first, before = known[0], _flat(known[0].config)

    def differences(run: RecordedRun) -> str:
        after = _flat(run.config)
        names = [name for name in {**before, **after} if before.get(name, _flat) != after.get(name, _flat)]
        lines = [f"{name}: {after.get(name, '(not set)')}" for name in names]
        return "\n".join([f"same as {first.name}" + (", except" if lines else ""), *lines])

    yaml_of_first = yaml.safe_dump(first.config, sort_keys=False, allow_unicode=True)
    others = distinct(known[1:], differences, always_named=True)
    return [(first.name if others else "", yaml_of_first), *others]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings by dotted names."""
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def distinct(
    runs: Sequence[RecordedRun], value: Callable[[RecordedRun], str], always_named: bool = False
) -> list[tuple[str, str]]:
    """Return (names of runs, value), each value once; no names if all agree, unless `always_named`."""
    names_of: dict[str, list[str]] = {}
    for run in runs:
        if found := value(run):
            names_of.setdefault(found, []).append(run.name)
    if len(names_of) == 1 and not always_named:
        return [("", next(iter(names_of)))]
    return [(", ".join(names), found) for found, names in names_of.items()]
