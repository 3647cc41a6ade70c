"""The lessons of recipes/lessons/: list them in order, run one, and draw the result.

A lesson is a file whose docstring begins with a question. `main()` prints and returns figures, and
`draw(axes, figures)` draws them. recipes/lessons/README.md holds the order and the answers.
"""

import ast
import importlib.util
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from gradacc_hf.errors import listed, refuse
from gradacc_hf.utils.paths import bundle_root

# Colours of Okabe and Ito, distinct for colour-blind readers. Dashes keep a line visible under another line.
# The background is white, also on dark pages.
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": "cycler('color', ['0072b2', 'd55e00', '009e73', 'cc79a7', 'e69f00', '56b4e9'])"
    " + cycler('linestyle', ['-', '--', '-.', ':', '-', '--'])",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 11,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "the same file for the same figures",
}


def names() -> list[str]:
    """Return the names of the lessons, in the order of their README."""
    readme = (bundle_root() / "recipes/lessons/README.md").read_text(encoding="utf-8")
    return re.findall(r"\]\((\w+)\.py\)", readme)


def question(name: str) -> str:
    """Return the question of a lesson: the docstring up to the first question mark."""
    docstring = ast.get_docstring(ast.parse(_path(name).read_text(encoding="utf-8"))) or ""
    return "".join(docstring.partition("?")[:2])


def run(name: str, plot: Path | None = None) -> Any:
    """Run a lesson, which prints its results.

    Args:
        name: the lesson.
        plot: an SVG file that does not exist; the lesson is drawn into it.

    Returns:
        The lesson's figures.

    Raises:
        InputError: the lesson is unknown, or the plot cannot be written. Then the lesson has not run.
    """

    if name not in names():
        refuse("lesson", f"found {name!r}", f"there are: {listed(names())}")
    if "RANK" in os.environ:
        refuse("lessons", "found a launcher's RANK in the environment", "run `gradacc lessons` without one")
    if plot is not None:
        _check_plot(plot)
    lesson = load(name)
    with fresh_accelerate():
        figures = lesson.main()
    if plot is not None:
        _write_plot(lesson, figures, plot)
        print(plot)
    return figures


@contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Hide Accelerate's settings and state, so that an Accelerator has the settings of the lesson alone.

    The environment is restored at the end, and Accelerate's state is reset again.
    """
    from gradacc_hf.accumulation.accelerate_state import (
        reset_accelerate,  # late: listing lessons starts without torch
    )

    before = dict(os.environ)
    for setting in [key for key in os.environ if key.startswith("ACCELERATE_")]:
        del os.environ[setting]
    reset_accelerate()
    try:
        yield
    finally:
        reset_accelerate()
        os.environ.clear()
        os.environ.update(before)


def load(name: str) -> ModuleType:
    """Import a lesson under a name that shadows no module: one lesson is called time."""
    spec = importlib.util.spec_from_file_location(f"lesson_{name}", _path(name))
    assert spec is not None
    assert spec.loader is not None
    lesson = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lesson)
    return lesson


def _path(name: str) -> Path:
    return bundle_root() / "recipes/lessons" / f"{name}.py"


def _check_plot(plot: Path) -> None:
    from gradacc_hf.utils.extras import require  # late: a list of lessons does not need it
    from gradacc_hf.utils.files import write_whole  # late: it loads torch

    require("--plot", "report", "matplotlib")
    if plot.suffix != ".svg":
        refuse("--plot", f"found {plot}", "allowed: a file that ends in .svg")
    try:
        if plot.exists():
            refuse("--plot", f"{plot} exists already", "give another name, or move it")
        write_whole(plot, "")  # fails before the lesson runs
        plot.unlink()
    except OSError as error:
        refuse(
            "--plot",
            f"{plot} cannot be written ({error.strerror})",
            "give a file in a folder that you can write",
        )


def _write_plot(lesson: ModuleType, figures: Any, plot: Path) -> None:
    import matplotlib  # late: only plots need it
    from matplotlib.figure import Figure

    from gradacc_hf.utils.files import write_whole

    drawn = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        lesson.draw(axes, figures)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            figure.legend(loc="outside right upper")
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    write_whole(plot, drawn.getvalue())
