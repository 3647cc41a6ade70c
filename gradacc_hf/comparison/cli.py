"""The command line of `gradacc compare`: exactness, speed, memory and quality of several ways to train.

gradacc compare --config configs/text_classification_offline.yaml
"""

import argparse
import json
import os
import shlex
import shutil
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
from gradacc_hf.comparison.compare import ComparedRuns, compare, cpu_ratios, ratios
from gradacc_hf.comparison.worker import CONTENDERS, USUAL, micro_batch_size, window_size
from gradacc_hf.errors import InputError, listed, refuse
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.run.folder import new_folder
from gradacc_hf.run.setup import load_data, make_windows
from gradacc_hf.utils.commands import Parser
from gradacc_hf.utils.redaction import redact
from gradacc_hf.utils.verbosity import silence_libraries

IGNORED_SECTIONS = ("checkpoint", "output")
IGNORED = (
    "check",
    "continue",
    "resume",
    "train.best_direction",
    "train.best_metric",
    "train.early_stopping",
    "train.eval_every",
    "train.eval_on_start",
    "train.noise_every",
    "train.on_nonfinite",
)
"""Settings of a run that no contender reads."""


def main(argv: Sequence[str]) -> None:
    """Run the command. The exit code is 1 if a contender failed."""
    given, more_settings = _parser().parse_known_args(argv)
    _refuse_ignored(more_settings)
    silence_libraries()
    contenders = _chosen(given.contenders)
    if given.repeats < 1:
        raise InputError(f"--repeats: found {given.repeats}; allowed: 1 or more")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("gradacc compare runs in one process; start it without a launcher")
    settings = ["--config", given.config, "--budget", given.budget, *more_settings]
    recipe = load_recipe(settings)
    size, rows = _checked_sizes(recipe, given.windows)
    folder = new_folder("compare", given.output)
    console = Console(highlight=False, stderr=given.json)
    console.print(
        f"{given.windows} window{'s' * (given.windows > 1)} of {size} examples, {given.repeats} "
        f"run{'s' * (given.repeats > 1)} of each contender.\n"
        f"Micro-batches have {rows} examples. With gradacc, the budget bounds them instead.\n"
        f"Folder of the runs: {folder}",
        soft_wrap=True,
    )
    command = redact(f"gradacc compare {shlex.join(argv)}")
    try:
        with _progress(given.repeats * len(contenders)) as on_run:
            found = compare(settings, folder, contenders, given.windows, given.repeats, on_run, command)
    except BaseException:
        if not any(folder.rglob("summary.json")):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if given.json:
        print(json.dumps({k: v if isinstance(v, str) else asdict(v) for k, v in found.items()}, indent=2))
    else:
        print_comparison(found, console)
    if any(isinstance(runs, ComparedRuns) for runs in found.values()):
        from gradacc_hf.report import verdict_of, write_report  # late: it loads matplotlib

        verdict = verdict_of([folder])
        console.print(f"{verdict.sentences[0].striptags()} {verdict.measure}", markup=False)
        console.print(f"report: {write_report([folder])}")
    sys.exit(1 if any(isinstance(runs, str) for runs in found.values()) else 0)


def _refuse_ignored(settings: Sequence[str]) -> None:
    """Raise InputError for the first flag that has no effect on a comparison."""
    for word in settings:
        key = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and (key in IGNORED or key.partition(".")[0] in IGNORED_SECTIONS):
            cure = "name the folder with --output" if key == "output.dir" else "remove it"
            refuse(f"--{key}", "found a setting that gradacc compare ignores", cure)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gradacc compare",
        description="Train the same windows in several ways, and compare exactness, speed and memory.",
        epilog="Settings of the recipe may follow, such as --batch.effective 32. The contender at_once "
        "trains each window as one large batch. trainer is transformers.Trainer, and trainer_by_length "
        "groups examples by length. trainer_batch_rebalance groups them by predicted cost. exact_trainer and "
        "exact_trainer_batch_rebalance are gradacc_hf.ExactTrainer. accelerate is the loop of Accelerate's "
        "guide, with accelerator.accumulate. `ours` is the loop of gradacc, and ours_padded is the same "
        "loop with padding.",
    )
    parser.add_argument("--config", required=True, help="the recipe's config file")
    parser.add_argument("--budget", default="auto", help="a budget's name or file (default: %(default)s)")
    parser.add_argument(
        "--contenders",
        default=",".join(USUAL),
        help="the contenders, separated by commas (default: %(default)s)",
    )
    parser.add_argument(
        "--windows", type=int, default=8, help="number of windows in a run (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="number of runs of each contender, with different seeds (default: %(default)s)",
    )
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
    """Return the examples of a window, and of a micro-batch for the contenders that split by count.

    Raises:
        InputError: the recipe's loss is of a whole window, or an epoch has fewer full windows.
    """
    if as_window_loss(recipe.loss) is not None:
        raise InputError(
            f"recipe: the loss of {type(recipe).__name__} is of all examples of a window together, which the "
            "other contenders cannot accumulate. Use gradacc bench contrastive instead"
        )
    if recipe.config.data.weight_column is not None:
        found = "found weights of rows, which the other contenders do not have"
        refuse("data.weight_column", found, "set it to null")
    recipe, training, validation = load_data(recipe)
    windows, _ = make_windows(recipe, training, validation, Accelerator())
    size = window_size(recipe)
    full = len(training) // size
    if not 1 <= num_windows <= full:
        raise InputError(
            f"--windows: found {num_windows}; allowed: 1 to {full}, the full windows of an epoch"
        )
    return size, micro_batch_size(recipe, windows)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """Show a bar, or lines if stderr is not a terminal. Yield the function to call before each run."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total, completed=-1)

        def on_run(name: str) -> None:
            progress.update(task, advance=1, description=name)
            if not progress.console.is_terminal:
                print(f"running {name}", file=sys.stderr)

        yield on_run


def print_comparison(found: dict[str, ComparedRuns | str], console: Console) -> None:
    """Print a row for each contender, with medians and ranges, and the ratios of the speeds."""
    narrow: Any = {"box": SIMPLE, "padding": (0, 2, 0, 0), "pad_edge": False}
    table = Table("", **narrow)
    for header in ("gradient\nerror", "examples\nper s", "tokens\nper s", "padding", "MiB", "seconds"):
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
            console.print(f"{CONTENDERS[name]} was not compared: {reason}")
    for name, other in ran.items():
        if name != "ours" and "ours" in ran:
            times, cpu_times = ratios(ran["ours"], other), cpu_ratios(ran["ours"], other)
            pairs = f"median of {len(times)} pairs of runs, {min(times):.2f}–{max(times):.2f}"
            console.print(
                f"{ran['ours'].name} trains {median(times):.2f} × as many examples per second as "
                f"{other.name} ({pairs if len(times) > 1 else '1 pair of runs'})"
            )
            if cpu_times:
                spread = f" ({min(cpu_times):.2f}–{max(cpu_times):.2f})" * (len(cpu_times) > 1)
                console.print(f"  per second of CPU time: {median(cpu_times):.2f} ×{spread}")


def _error(contender: ComparedRuns) -> str:
    if not contender.gradient_errors:
        return "not measured"
    worst = max(contender.gradient_errors)
    return f"{worst:.0e} {'exact' if worst <= EXACT else '     '}"


def _spread(values: Sequence[float], form: str) -> str:
    middle = form.format(median(values))
    return middle if len(values) == 1 else f"{middle}\n{form.format(min(values))}–{form.format(max(values))}"
