"""Draw the pictures of a report: functions take numbers and return SVG for an HTML page.

Text and axes use the colour of the page's text. Lines use the page's variables `--c0` … `--c6`. So both
follow the light or dark mode. The number of a contender sets colour, dashes and marker. Each identifies it.
"""

import io
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

# Okabe and Ito, distinct for the colour-blind. In the SVG each is replaced by the page's variable `--cN`.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (9, 2)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = "osD^vPX*"
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.alpha": 0.15,
    "grid.color": "#000000",
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "svg.hashsalt": "the same picture for the same figures",
    "text.parse_math": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}
WIDTH_INCHES = 4.8  # the largest size on the page; a phone shows two thirds of it
FLOOR = 1e-9  # an error of 0 is drawn here on a log axis
MAX_POINTS = 300  # of a curve


@dataclass(frozen=True)
class Curve:
    """Values of one contender by window: median, minimum and maximum over the repeats."""

    look: int
    windows: np.ndarray
    middle: np.ndarray
    least: np.ndarray
    most: np.ndarray

    @property
    def known(self) -> bool:
        """Whether there is a value to draw."""
        return bool(np.isfinite(self.middle).any())


def curve(look: int, repeats: Sequence[Sequence[tuple[float, float]]], windows_a_point: int = 1) -> Curve:
    """Return the curve of (window, value) pairs, one list for each repeat. Values not finite are gaps."""
    by_point: dict[int, list[float]] = {}
    for pairs in repeats:
        for window, value in pairs:
            point = by_point.setdefault(math.ceil(window / windows_a_point), [])
            if math.isfinite(value):
                point.append(value)
    points = sorted(by_point)
    measured = [by_point[point] or [math.nan] for point in points]
    return Curve(
        look,
        np.array(points) * windows_a_point,
        *(np.array([reduce(values) for values in measured]) for reduce in (np.median, np.min, np.max)),
    )


def windows_a_point(windows: int) -> int:
    """Return the number of windows of a run that share one point of a curve."""
    return math.ceil(windows / MAX_POINTS)


def curves(name: str, ylabel: str, lines: Sequence[Curve], *, log: bool = False, bound: float | None = None,
           bound_text: str = "", small: bool = False, xlabel: str = "window",
           labels: Sequence[str] = ()) -> Markup:  # fmt: skip
    """Draw values by window, one line for each contender.

    Args:
        name: prefix of the ids in the SVG.
        ylabel, xlabel: names of the axes.
        lines: the values.
        log: whether the axis of the values is logarithmic. Values of 0 and less are drawn at `FLOOR`.
        bound: a value that a dashed line marks.
        bound_text: the text on that line; by default the bound of exactness.
        small: whether the picture is low.
        labels: the legend.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 1.9 if small else 2.8), layout="constrained")
        axes = figure.subplots()
        for position, line in enumerate(lines):
            _draw_curve(axes, line, position, len(lines), log, labels[position] if labels else None)
        if labels:
            axes.legend()
        if bound is not None:
            axes.axhline(bound, color="#000000", linewidth=1, dashes=(2, 2))
            axes.annotate(
                bound_text or f"exact: at most {_short(bound)}", (1, bound), (0, 3),
                xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", fontsize=9,
            )  # fmt: skip
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        if log:
            _log_axis(axes)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        return _svg(name, figure, f"{ylabel} by {xlabel}")


def _draw_curve(axes: Axes, line: Curve, position: int, of: int, log: bool, label: str | None) -> None:
    look = _look(line.look)
    middle, least, most = (
        np.where(v <= 0, FLOOR, v) if log else v for v in (line.middle, line.least, line.most)
    )
    if np.any(most > least):
        axes.fill_between(line.windows, least, most, color=look["color"], alpha=0.18, linewidth=0)
    apart = max(1, math.ceil(len(middle) / 6))
    # Where lines overlap, the lower ones are thicker and the markers alternate.
    axes.plot(line.windows, middle, **look, linewidth=1.5 + 2.2 * (of - 1 - position) / max(4, of),
              markevery=(position * apart // of, apart), label=label)  # fmt: skip


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    steps = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def bars(name: str, xlabel: str, labels: Sequence[str], repeats: Sequence[Sequence[float]]) -> Markup:
    """Draw one bar for each contender, as long as the median of its repeats. Each repeat is a stroke."""
    return _rows(name, xlabel, labels, repeats, bar=True)


def dots(name: str, xlabel: str, labels: Sequence[str], repeats: Sequence[Sequence[float]],
         baseline: float | None) -> Markup:  # fmt: skip
    """Draw one row for each contender, one marker for each repeat, and a line at the baseline."""
    return _rows(name, xlabel, labels, repeats, bar=False, baseline=baseline)


def _rows(name: str, xlabel: str, labels: Sequence[str], repeats: Sequence[Sequence[float]], *, bar: bool,
          baseline: float | None = None) -> Markup:  # fmt: skip
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 0.75 + 0.3 * len(labels)), layout="constrained")
        axes = figure.subplots()
        axes.grid(axis="y", visible=False)
        for row, values in enumerate(repeats):
            look = {key: value for key, value in _look(row).items() if key != "linestyle"}
            known = [value for value in values if math.isfinite(value)]
            if bar and known:
                middle = float(np.median(known))
                axes.barh(row, middle, color=look["color"], height=0.66)
                axes.annotate(
                    f"{middle:,.1f}" if middle < 100 else f"{middle:,.0f}", (max(known), row), (6, 0),
                    textcoords="offset points", va="center",
                )  # fmt: skip
                look["color"], look["marker"] = "#000000", "|"
            if len(known) > 1 or not bar:
                axes.plot(known, [row] * len(known), **look, linestyle="none")
        if baseline is not None and math.isfinite(baseline):
            axes.axvline(baseline, color="#000000", linewidth=1, dashes=(2, 2))
            axes.annotate(
                "baseline", (baseline, 1), (3, 2), xycoords=("data", "axes fraction"),
                textcoords="offset points", fontsize=9,
            )  # fmt: skip
        axes.set_yticks(range(len(labels)), [_wrapped(label) for label in labels])
        axes.set(xlabel=xlabel, ylim=(len(labels) - 0.5, -0.5))
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.margins(x=0.14)
        if bar:
            axes.set_xlim(left=0)
        return _svg(name, figure, f"{xlabel}, by contender")


@dataclass(frozen=True)
class Series:
    """Values of several seeds at some places of an axis. They are joined by a line if `is_line`."""

    label: str
    places: Sequence[float]
    values: Sequence[Sequence[float]]
    is_line: bool = True


def spread(name: str, xlabel: str, ylabel: str, series: Sequence[Series], log: bool,
           ticks: Sequence[str] | None) -> Markup:  # fmt: skip
    """Draw the mean of the values at each place, a bar from their minimum to their maximum, and each value.

    Args:
        name: prefix of the ids in the SVG.
        xlabel, ylabel: names of the axes.
        series: the values; several series have a legend.
        log: whether the axis of the places is logarithmic.
        ticks: names of the places 0, 1, …; None for numbers.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 3.2), layout="constrained")
        axes = figure.subplots()
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(numticks=8))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
            axes.xaxis.set_minor_locator(NullLocator())
        for position, one in enumerate(series):
            look = _look(position)
            places = _side_by_side(one.places, position - (len(series) - 1) / 2, series, log)
            means = [float(np.mean(values)) for values in one.values]
            around = [[mean - min(v), max(v) - mean] for mean, v in zip(means, one.values, strict=True)]
            line = look["linestyle"] if one.is_line else "none"
            axes.errorbar(places, means, np.array(around).T, color=look["color"], marker=look["marker"],
                          linestyle=line, capsize=3, label=one.label)  # fmt: skip
            pairs = [(x, v) for x, values in zip(places, one.values, strict=True) for v in values]
            axes.plot(*zip(*pairs, strict=True), "_", color=look["color"], alpha=0.6)
        places = sorted({place for one in series for place in one.places})
        if ticks is not None:
            axes.set_xticks(range(len(ticks)), [_wrapped(tick) for tick in ticks])
        elif len(places) <= 8:
            axes.set_xticks(places, [_short(place, digits=3) for place in places])
            axes.xaxis.set_minor_locator(NullLocator())
        if len(series) > 1:
            figure.legend(loc="outside upper left", ncols=2)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.margins(x=0.08)
        return _svg(name, figure, f"{ylabel} by {xlabel}")


def _side_by_side(places: Sequence[float], offset: float, series: Sequence[Series], log: bool) -> list[float]:
    """Return the places, moved by a small share of the axis. The bars of several series then stand apart."""
    scale = np.log if log else np.asarray
    every = scale([place for one in series for place in one.places])
    moved = scale([*places]) + offset * 0.02 * (every.max() - every.min())
    return [*map(float, np.exp(moved) if log else moved)]


def window_picture(
    name: str,
    look: int,
    micro_batches: Sequence[Sequence[float]],
    longest: float,
    rows: float,
    is_padded: bool = True,
) -> Markup:
    """Draw one window: one bar for each example, as long as its tokens, in micro-batches.

    Padding is hatched if `is_padded`. `longest` (tokens) and `rows` (of `picture_rows`) are of the largest
    picture, so that all have one scale.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(1.75, 0.3 + min(3.6, 0.15 * rows)))
        axes = figure.add_axes((0.03, 0.01, 0.94, 0.99 - 0.3 / figure.get_figheight()))
        colour = COLOURS[look % len(COLOURS)]
        boxes, tokens = [], []
        top = 0.0
        for lengths in micro_batches:
            boxes.append(_box(0, top, max(lengths), len(lengths)))
            tokens += _bars_of(lengths, top, apart=rows < 100)
            top += len(lengths) + _gap(micro_batches)
        padding: Any = {"facecolor": "none", "edgecolor": colour, "linewidth": 0.6}
        padding["hatch"] = "/////" if is_padded else None
        axes.add_patch(PathPatch(Path.make_compound_path(*boxes), **padding))
        axes.add_patch(PathPatch(Path.make_compound_path(*tokens), facecolor=colour, linewidth=0))
        axes.set(xlim=(0, longest), ylim=(rows, 0), yticks=[], xticks=[0, longest])
        axes.set_xticklabels(["0", f"{longest:g} tokens"])
        axes.xaxis.tick_top()
        for tick, side in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
            tick.set_horizontalalignment(side)
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.spines["top"].set_visible(True)
        return _svg(name, figure, f"{len(micro_batches)} micro-batches of one window")


def picture_rows(micro_batches: Sequence[Sequence[float]]) -> float:
    """Return the height of the picture of this window, in examples."""
    return sum(map(len, micro_batches)) + _gap(micro_batches) * (len(micro_batches) - 1) + 0.2


def _gap(micro_batches: Sequence[Sequence[float]]) -> float:
    return max(1.0, 0.03 * sum(map(len, micro_batches)))


def _bars_of(lengths: Sequence[float], top: float, apart: bool) -> list[Path]:
    """Return one bar for each example; if bars are too thin to stand apart, one shape with their outline."""
    if apart:
        return [_box(0, top + row + 0.1, length, 0.8) for row, length in enumerate(lengths)]
    corners = [(length, top + row + side) for row, length in enumerate(lengths) for side in (0, 1)]
    return [Path([(0, top), *corners, (0, top + len(lengths)), (0, top)], closed=True)]


def _box(left: float, top: float, width: float, height: float) -> Path:
    return Path(
        [(left, top), (left + width, top), (left + width, top + height), (left, top + height), (left, top)],
        [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY],
    )


def alone(svg: Markup) -> str:
    """Return a picture as a separate file, which follows the light or dark mode of the viewer."""
    colours = "".join(f"--c{number}: {colour};" for number, colour in enumerate(COLOURS))
    style = (
        f"<style>svg {{ {colours} color: #1c1f23; background: #ffffff; font-family: sans-serif; }} "
        "text { fill: currentColor; } @media (prefers-color-scheme: dark) "
        "{ svg { color: #e6e6e6; background: #16181b; } }</style>"
    )
    head, rest = str(svg).split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{rest}\n'


def key(name: str, look: int) -> Markup:
    """Return the line and marker of a contender as a picture, for tables and legends."""
    with rc_context(STYLE):
        figure = Figure(figsize=(0.42, 0.14))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, 1), ylim=(-1, 1))
        axes.set_axis_off()
        axes.plot([0.02, 0.5, 0.98], [0, 0, 0], **_look(look), markevery=[1], linewidth=2)
        return _svg(name, figure, "")


def _look(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def _wrapped(label: str) -> str:
    """Return a label in at most two lines of 18 letters."""
    return "\n".join(textwrap.wrap(label, 18, max_lines=2, placeholder=" …") or [label])


def _short(value: float, digits: int = 1) -> str:
    """Return "0.5", "20" or "1e-5"; with 3 digits, "2.61e-4"."""
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _svg(name: str, figure: Figure, says: str) -> Markup:
    """Return the figure as an SVG element. Ids begin with `name`, because a page has many figures."""
    drawn = io.StringIO()
    figure.savefig(
        drawn, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| version="1.1"', "", svg)
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\1{name}-", svg).replace("xlink:href", "href")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for colour, number in [(colour, number) for number, colour in enumerate(COLOURS)]:
        svg = svg.replace(colour, f"var(--c{number})")
    svg = re.sub(r"#000000", "currentColor", svg)
    heading = f'<svg role="img" aria-label="{Markup.escape(says)}"' if says else '<svg aria-hidden="true"'
    return Markup(svg.replace("<svg", heading, 1))
