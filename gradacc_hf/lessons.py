"""The lessons of recipes/lessons/: which there are, in order, and running one, with a plot.

A lesson is a file whose docstring begins with its question. Its `main()` prints what it shows and gives the
figures; `draw(axes, figures)` draws them. The order, and the answers: recipes/lessons/README.md.
"""

import ast
import importlib.util
import io
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from accelerate.state import AcceleratorState, GradientState

from gradacc_hf.errors import listed, refuse
from gradacc_hf.utils.extras import require
from gradacc_hf.utils.files import write_whole
from gradacc_hf.utils.paths import bundle_root

# The colours of Okabe and Ito, which the colour-blind tell apart; dashes, so that a line shows under another.
# On white, also where the page is dark.
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
    """The lessons, in the order in which their README leads through them."""
    readme = (bundle_root() / "recipes/lessons/README.md").read_text(encoding="utf-8")
    return re.findall(r"\]\((\w+)\.py\)", readme)


def question(name: str) -> str:
    """What a lesson answers: its docstring up to the first question mark."""
    docstring = ast.get_docstring(ast.parse(_path(name).read_text(encoding="utf-8"))) or ""
    return "".join(docstring.partition("?")[:2])


def run(name: str, plot: Path | None = None) -> Any:
    """Run a lesson, which prints what it shows; draw it into `plot`, an SVG file; give its figures.

    Raises InputError for an unknown lesson, or a plot that cannot be written: then nothing has been run.
    """
    if name not in names():
        refuse("lesson", f"found {name!r}", f"there are: {listed(names())}")
    if "RANK" in os.environ:
        refuse("lessons", "found a launcher's RANK in the environment", "run `gradacc lessons` without one")
    if plot is not None:
        _check_plot(plot)
    for setting in [key for key in os.environ if key.startswith("ACCELERATE_")]:
        del os.environ[setting]  # a lesson's Accelerator is as its file says
    AcceleratorState._reset_state(reset_partial_state=True)  # and its own
    GradientState._reset_state()
    lesson = load(name)
    figures = lesson.main()
    if plot is not None:
        _write_plot(lesson, figures, plot)
        print(plot)
    return figures


def load(name: str) -> ModuleType:
    """A lesson as a module, under a name that shadows none: one lesson is called time."""
    spec = importlib.util.spec_from_file_location(f"lesson_{name}", _path(name))
    assert spec is not None
    assert spec.loader is not None
    lesson = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lesson)
    return lesson


def _path(name: str) -> Path:
    return bundle_root() / "recipes/lessons" / f"{name}.py"


def _check_plot(plot: Path) -> None:
    require("--plot", "report", "matplotlib")
    if plot.suffix != ".svg":
        refuse("--plot", f"found {plot}", "allowed: a file that ends in .svg")
    try:
        if plot.exists():
            refuse("--plot", f"{plot} exists already", "give another name, or move it")
        write_whole(plot, "")  # so that a lesson is not run in vain
        plot.unlink()
    except OSError as error:
        refuse("--plot", f"{plot} cannot be written ({error.strerror})", "give a file in a folder of yours")


def _write_plot(lesson: ModuleType, figures: Any, plot: Path) -> None:
    import matplotlib  # late: only plots need it
    from matplotlib.figure import Figure

    drawn = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        lesson.draw(axes, figures)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            figure.legend(loc="outside right upper")
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    write_whole(plot, drawn.getvalue())
