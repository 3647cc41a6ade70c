"""The page of a sweep: the best settings, a table, and a plot with the spread over seeds."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from markupsafe import Markup

from gradacc_hf.report import page_template, plots
from gradacc_hf.report.narrative import metric as shown
from gradacc_hf.report.narrative import metric_name
from gradacc_hf.report.plots import Series
from gradacc_hf.sweep.runs import TrialResult
from gradacc_hf.sweep.space import number
from gradacc_hf.utils.files import write_whole
from gradacc_hf.utils.redaction import redact

PAGE = "sweep.html"


def write_page(folder: Path, results: Sequence[TrialResult], metric: str, best: str, command: str) -> Path:
    """Write sweep.html, and return the path.

    Args:
        folder: the folder of the sweep.
        results: the results, the best first.
        metric: the metric that ranks the results.
        best: the line about the best settings.
        command: the command line of the sweep.
    """
    names = [*results[0].point] if results else []
    has_seeds = any(len(result.values) > 1 for result in results)
    page = page_template(Path(__file__).parent).render(
        generator=f"gradacc-hf {version('gradacc-hf')}",
        title=redact(folder.name),
        best=redact(best),
        metric=metric_name(metric),
        names=[redact(name) for name in names],
        rows=[_row(result, folder) for result in results],
        caption="mean over seeds; bars from the lowest to the highest seed" if has_seeds else "one seed",
        plots=plots_of(results, metric),
        command=redact(command),
    )
    write_whole(folder / PAGE, page)
    return folder / PAGE


def _row(result: TrialResult, folder: Path) -> Mapping[str, Any]:
    return {
        "cells": [redact(value) for value in result.point.values()],
        "metric": figures(result),
        "seconds": f"{result.seconds:,.0f}",
        "runs": [(run.name, run.relative_to(folder) / "report.html") for run in result.folders],
        "problem": redact(result.problem),
    }


def figures(result: TrialResult) -> str:
    """Return the mean, and the range over seeds where they differ."""
    if not result.values:
        return "–"
    least, mean, most = min(result.values), sum(result.values) / len(result.values), max(result.values)
    return shown(mean) + (f" ({shown(least)} to {shown(most)})" if least < most else "")


def plots_of(results: Sequence[TrialResult], metric: str) -> list[Markup]:
    """Return a plot for one or two settings, and a plot for each setting of more."""
    known = [result for result in results if result.values]
    names = [*known[0].point] if known else []
    values = {name: list(dict.fromkeys(result.point[name] for result in known)) for name in names}
    names = sorted(
        (name for name in names if len(values[name]) > 1), key=lambda name: not _all_numbers(values[name])
    )
    is_grid = len(names) == 2 and len(known) == len(values[names[0]]) * len(values[names[1]])
    if len(names) == 1:
        return [_plot(names[0], metric, [_series("", known, names[0], values[names[0]])], values[names[0]])]
    if is_grid:
        x, by = sorted(names, key=lambda name: (not _all_numbers(values[name]), -len(values[name])))
        groups = {
            value: [result for result in known if result.point[by] == value]
            for value in _in_order(values[by])
        }
        series = [_series(f"{by} {value}", group, x, values[x]) for value, group in groups.items()]
        return [_plot(x, metric, series, values[x])]
    return [_plot(n, metric, [_series("", known, n, values[n], is_line=False)], values[n]) for n in names]


def _plot(name: str, metric: str, series: Sequence[Series], values: Sequence[str]) -> Markup:
    ordered = _in_order(values)
    numbers = [found for value in ordered if (found := number(value)) is not None]
    ticks = None if _all_numbers(values) else ordered
    is_log = ticks is None and numbers[0] > 0 and numbers[-1] / numbers[0] >= 8
    return plots.spread(f"sweep-{name.replace('.', '-')}", name, metric_name(metric), series, is_log, ticks)


def _series(
    label: str, results: Sequence[TrialResult], name: str, values: Sequence[str], is_line: bool = True
) -> Series:
    ordered = _in_order(values)
    x_of = {v: float(v) if _all_numbers(values) else ordered.index(v) for v in values}
    points = sorted((x_of[result.point[name]], result.values) for result in results)
    return Series(label, [x for x, _ in points], [found for _, found in points], is_line)


def _all_numbers(values: Sequence[str]) -> bool:
    return all(number(value) is not None for value in values)


def _in_order(values: Sequence[str]) -> list[str]:
    return sorted(values, key=float) if _all_numbers(values) else [*values]
