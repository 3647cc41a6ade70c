"""`gradacc plan`: memory, steps and cost of a run, without a GPU."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from rich.bar import Bar
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gradacc_hf.errors import InputError, refuse
from gradacc_hf.memory.estimator import FRAGMENTED_SHARE, WORKSPACE_BYTES
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.run.plan import GIB, Plan, make_plan, rate_of
from gradacc_hf.utils.commands import Parser
from gradacc_hf.utils.verbosity import silence_libraries

NAMES = {"optimizer": "optimizer states", "activations": "activations or step", "loss": "logits and loss"}
"""Part of the memory → its name in the table, if they differ."""
PREDICTION_ERROR = (
    "38 of 39 measured steps were within 10 % or 64 MiB of the prediction (gradacc bench memory)"
)
"""From gradacc_hf/bench/README.md: 17 + 5 steps on a CPU, 17 on an H100."""


def main(argv: Sequence[str]) -> None:
    """Run the command. The exit code is 1 if the run does not fit."""
    parser = Parser(
        prog="gradacc plan",
        description="Predict memory, accumulation steps, operations and cost of a run, without a GPU and "
        "without weights. The exit code is 0 if the run fits, and 1 if it does not.",
        epilog="Settings of the recipe may follow, such as --data.max_length 512.",
    )
    parser.add_argument("--config", required=True, help="the recipe's config file")
    parser.add_argument("--budget", default="auto", help="a budget's name or file (default: %(default)s)")
    parser.add_argument(
        "--processes", type=int, default=1, help="number of processes, one per device (default: %(default)s)"
    )
    parser.add_argument(
        "--tflops", type=float, help="TFLOP per second that a device reaches, to estimate the run time"
    )
    parser.add_argument(
        "--rate-of", metavar="RUN", type=Path, help="take the rate from this finished run instead of --tflops"
    )
    parser.add_argument("--price", type=float, help="price of one device per hour, to estimate the cost")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    arguments, settings = parser.parse_known_args(argv)
    for name in ("processes", "tflops", "price"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            refuse(f"--{name}", f"found {value:g}", "allowed: a number above 0")
    if arguments.tflops is not None and arguments.rate_of is not None:
        raise InputError("--tflops and --rate-of both give the rate; give only one of them")
    if arguments.price is not None and arguments.tflops is None and arguments.rate_of is None:
        raise InputError("--price needs --tflops or --rate-of, to estimate the run time")
    silence_libraries()
    recipe = load_recipe(["--config", arguments.config, "--budget", arguments.budget, *settings])
    tflops = rate_of(arguments.rate_of) if arguments.rate_of is not None else arguments.tflops
    found = make_plan(recipe, arguments.processes, tflops, arguments.price)
    if arguments.json:
        print(json.dumps(asdict(found), indent=2))
    else:
        show(found, Console(highlight=False))
    if not found.fits:
        sys.exit(1)


def show(plan: Plan, console: Console) -> None:
    """Print the memory as bars, the split and the cost, and settings that need less memory."""
    rows, lengths = plan.steps.largest
    console.print(
        f"{plan.model}: {plan.parameters:,} parameters, {plan.trained:,} trained, {plan.precision}, on "
        f"{plan.processes} × {plan.device} with {plan.memory / GIB:.1f} GiB",
        soft_wrap=True,
    )
    table = Table("memory per process", box=SIMPLE, title_justify="left")
    table.add_column("GiB", justify="right")
    table.add_column(f"of {plan.memory / GIB:.1f} GiB", width=40)
    scale, begin = max(plan.memory, plan.parts.total), 0
    for name, size in asdict(plan.parts).items():
        bar = Bar(scale, begin, begin + size, width=40)
        table.add_row(NAMES.get(name, name), f"{size / GIB:.2f}", bar)
        begin += size
    style = "green" if plan.fits else "red"
    table.add_row("total", f"{begin / GIB:.2f}", Bar(scale, 0, begin, width=40, color=style), style=style)
    console.print(table)
    for name, text in _explanations(plan):
        console.print(f"{name:<22}{text}", soft_wrap=True)
    least, mean, most = plan.steps.accumulation_steps
    windows, total = "an unknown number", "unknown"
    if plan.steps.windows is not None:
        windows = f"{plan.steps.windows:,}"
        if (of_epochs := plan.steps.windows_of_epochs) and of_epochs > plan.steps.windows:
            windows += f" of {of_epochs:,}"  # train.max_windows
        total = f"{plan.steps.flops_per_window * plan.steps.windows / 1e15:,.2f} PFLOP"
    lines = {
        **plan.model_notes,
        "largest micro-batch": f"{rows} × {'at most ' * plan.padding_free}{_listed(lengths)} tokens",
        "micro-batch limit": f"{plan.bound} ({plan.why})",
        "accumulation steps": f"{least} / {mean:.1f} / {most} (min / mean / max)",
        "padding": f"{plan.steps.padding:.1%} of the tokens",
        "windows": f"{windows} in {plan.steps.epochs} epoch{'s' * (plan.steps.epochs > 1)}",
        "operations": f"{plan.steps.flops_per_window / 1e12:,.2f} TFLOP per window, {total} in total",
    }
    if plan.seconds is not None:
        lines["time"] = f"{timedelta(seconds=round(plan.seconds))}" + (
            f", cost {plan.price:,.2f}" if plan.price is not None else ""
        )
    elif plan.steps.windows is None:
        lines["time"] = "not estimated: the number of windows is unknown (set train.max_windows)"
    else:
        lines["time"] = "not estimated: give --tflops or --rate-of (and --price for the cost)"
    lines[f"on {max(2, plan.processes)} processes"] = ", ".join(
        f"{size / GIB:.2f} GiB each with {name}" for name, size in plan.processes_change.items()
    )
    for name, value in (*plan.data_lines, *lines.items()):  # names of files may look like markup
        console.print(f"{name:<22}{value}", soft_wrap=True, markup=False, emoji=False)
    if plan.fits:
        console.print("It fits.", style="green")
        return
    available = f"{plan.memory / GIB:.2f} GiB are available"
    why = f"the longest example, {_listed(plan.longest)} tokens, needs {plan.longest_bytes / GIB:.2f} GiB"
    remedy = "Settings that need less memory:" if plan.levers else ""
    if plan.longest_bytes <= plan.memory:
        why = f"the largest micro-batch needs {plan.parts.total / GIB:.2f} GiB"
        remedy = "--budget.max_tokens auto splits finer."
    console.print(f"It does not fit: {why}, and {available}. {remedy}", style="red", soft_wrap=True)
    for lever in plan.levers:
        verdict = "fits" if lever.fits else "does not fit yet"
        console.print(
            f"  {lever.flags:<64} {lever.bytes / GIB:6.2f} GiB ({lever.saved / GIB:.2f} less): {verdict}",
            soft_wrap=True,
        )


def _explanations(plan: Plan) -> list[tuple[str, str]]:
    """Return (name, text) of lines about the parts whose names do not explain them, and about the margin."""
    left = plan.memory - plan.parts.total
    margin = f"{left / GIB:.2f} GiB ({left / plan.memory:.0%}) left" if left >= 0 else "none"
    libraries = "CUDA's context and libraries" if plan.device == "cuda" else "Python and libraries"
    return [
        (
            NAMES["activations"],
            "what layers keep for the backward pass, or temporary tensors of the optimizer's step if larger",
        ),
        (
            "workspace",
            f"{WORKSPACE_BYTES / 2**20:.0f} MiB for {libraries}, and {FRAGMENTED_SHARE:.0%} of activations "
            "and loss for gaps between blocks of memory",
        ),
        ("margin", f"{margin}; {PREDICTION_ERROR}"),
    ]


def _listed(lengths: Sequence[int]) -> str:
    return " + ".join(map(str, lengths))
