"""The command line of `gradacc compare`: exactness, speed, memory and quality of several ways to accumulate.

gradacc compare --config configs/text_classification_offline.yaml
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from accelerate import Accelerator
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gradacc_hf.accumulation.loss_items import as_window_loss
from gradacc_hf.accumulation.reference import EXACT
from gradacc_hf.comparison.compare import ComparedRuns, compare, ratios
from gradacc_hf.comparison.worker import CONTENDERS, micro_batch_size, window_size
from gradacc_hf.errors import InputError, listed
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.run.folder import next_folder
from gradacc_hf.run.setup import load_data, make_windows
from gradacc_hf.utils.commands import Parser
from gradacc_hf.utils.redaction import redact
from gradacc_hf.utils.verbosity import silence_libraries


def main(argv: Sequence[str]) -> None:
    """Compare, and exit with 1 if a contender failed."""
    given, more_settings = _parser().parse_known_args(argv)
    silence_libraries()
    contenders = _chosen(given.contenders)
    if given.repeats < 1:
        raise InputError(f"--repeats: found {given.repeats}; allowed: 1 or more")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("gradacc compare runs on one process: start it without a launcher")
    settings = ["--config", given.config, "--budget", given.budget, *more_settings]
    recipe = load_recipe(settings)
    size, rows = _checked_sizes(recipe, given.windows)
    folder = given.output or next_folder("compare")
    if given.output and folder.exists():
        raise InputError(f"--output: {folder} is there already; give a new folder")
    console = Console(highlight=False, stderr=given.json)
    console.print(
        f"{given.windows} windows of {size} examples, {given.repeats} "
        f"times; in micro-batches of {rows} examples, gradacc's of as many tokens as these padded; "
        f"runs in {folder}"
    )
    command = redact(f"gradacc compare {shlex.join(argv)}")
    with _progress(given.repeats * len(contenders)) as on_run:
        found = compare(settings, folder, contenders, given.windows, given.repeats, on_run, command)
    if given.json:
        print(json.dumps({k: v if isinstance(v, str) else asdict(v) for k, v in found.items()}, indent=2))
    else:
        print_comparison(found, console)
    if any(isinstance(runs, ComparedRuns) for runs in found.values()):
        from gradacc_hf.report import write_report  # late: it loads matplotlib

        console.print(f"report: {write_report([folder])}")
    sys.exit(1 if any(isinstance(runs, str) for runs in found.values()) else 0)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gradacc compare",
        description="Train the same windows in several ways, and compare exactness and speed.",
        epilog="Any setting of the recipe can follow, as on its own command line: --batch.effective 32. "
        f"Contenders: {', '.join(f'{key} ({name})' for key, name in CONTENDERS.items())}.",
    )
    parser.add_argument("--config", required=True, help="the recipe's config file")
    parser.add_argument("--budget", default="auto", help="a budget's name or file (%(default)s)")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="which, by commas (%(default)s)")
    parser.add_argument("--windows", type=int, default=8, help="windows in a run (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, with other seeds (%(default)s)")
    parser.add_argument("--output", type=Path, help="a new folder for the runs and the report")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _chosen(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown or len(set(names)) < len(names):
        raise InputError(f"--contenders: found {text!r}; allowed: some of {listed(CONTENDERS)}, each once")
    return names


def _checked_sizes(recipe: Recipe, num_windows: int) -> tuple[int, int]:
    """Return the examples of a window, and of a micro-batch of the contenders that split by count.

    Raises:
        InputError: the recipe's loss is of a whole window, or an epoch has fewer full windows.
    """
    if as_window_loss(recipe.loss) is not None:
        raise InputError(
            f"recipe: the loss of {type(recipe).__name__} is of all examples of a window together, which no "
            "other way of accumulating has; see gradacc bench contrastive"
        )
    recipe, training, validation = load_data(recipe)
    windows, _ = make_windows(recipe, training, validation, Accelerator())
    size = window_size(recipe)
    full = len(training) // size
    if not 1 <= num_windows <= full:
        raise InputError(f"--windows: found {num_windows}; allowed: 1 to {full}, the full ones of an epoch")
    return size, micro_batch_size(recipe, windows)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """Show a bar on stderr, or lines if stderr is no terminal. Yield the function that names the next run."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total, completed=-1)

        def on_run(name: str) -> None:
            progress.update(task, advance=1, description=name)
            if not progress.console.is_terminal:
                print(f"running {name}", file=sys.stderr)

        yield on_run


def print_comparison(found: dict[str, ComparedRuns | str], console: Console) -> None:
    """Print a row for each contender, with medians and ranges, and the ratios of speed."""
    narrow: Any = {"box": SIMPLE, "padding": (0, 2, 0, 0), "pad_edge": False}
    table = Table("", **narrow)
    for header in ("gradient\noff by", "examples\na second", "tokens\na second", "padding", "MiB", "seconds"):
        table.add_column(header, justify="right")
    ran = {name: contender for name, contender in found.items() if isinstance(contender, ComparedRuns)}
    for contender in ran.values():
        table.add_row(
            contender.name,
            _error(contender),
            _spread(contender.examples_per_second, "{:.1f}"),
            _spread(contender.tokens_per_second, "{:,.0f}"),
            f"{contender.padding:.0%}",
            _spread([size / 2**20 for size in contender.training_memory_bytes], "{:,.0f}"),
            _spread(contender.seconds, "{:.1f}"),
        )
    console.print(table)
    metrics = list(next(iter(ran.values())).metrics)
    after = Table("after\ntraining", "logged\nloss", **narrow)
    for name in metrics:
        after.add_column("validation\n" + name.replace("_", "\n"), justify="right")
    for contender in ran.values():
        cells = [_spread(contender.metrics[name], "{:.3f}") for name in metrics]
        after.add_row(contender.name, _spread(contender.losses, "{:.2f}"), *cells)
    console.print(after)
    for name, reason in found.items():
        if isinstance(reason, str):
            console.print(f"{CONTENDERS[name]}: not compared: {reason}")
    for name, other in ran.items():
        if name != "ours" and "ours" in ran:
            times = ratios(ran["ours"], other)
            console.print(
                f"{ran['ours'].name}: {median(times):.1f} × the examples per second of {other.name} "
                f"(median of {len(times)} pairs of runs: {min(times):.1f}–{max(times):.1f})"
            )


def _error(contender: ComparedRuns) -> str:
    if not contender.gradient_errors:
        return "not measured"
    worst = max(contender.gradient_errors)
    return f"{worst:.0e} {'exact' if worst <= EXACT else '     '}"


def _spread(values: Sequence[float], form: str) -> str:
    middle = form.format(median(values))
    return middle if len(values) == 1 else f"{middle}\n{form.format(min(values))}–{form.format(max(values))}"
