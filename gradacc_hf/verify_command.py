"""`gradacc verify`: is accumulation exact for a recipe's model, data and budget?"""

import json
import os
import runpy
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import disable_progress_bars
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gradacc_hf import conformance
from gradacc_hf.command_line import read_command_line, recipe_file
from gradacc_hf.errors import BadInput, Parser, listed
from gradacc_hf.optim import frozen_parameters
from gradacc_hf.recipe import Recipe
from gradacc_hf.run import make_windows
from gradacc_hf.verify import Verification, verify


def main(argv: Sequence[str]) -> None:
    """The command line: exits with 0 where the loop is exact, with 1 where it is not."""
    parser = Parser(
        prog="gradacc verify",
        description="Compare accumulated gradients with those of whole windows, on a recipe's data. "
        "Exits with 0 where the loop is exact, with 1 where it is not.",
        epilog="Any setting of the recipe can follow, as on its own command line: --batch.effective 32",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="the recipe's config file")
    what.add_argument(
        "--all-heads",
        action="store_true",
        help="every head of the installed transformers, tiny (a quarter of an hour)",
    )
    parser.add_argument("--budget", default="auto", help="a budget's name or file (%(default)s)")
    parser.add_argument("--windows", type=int, default=1, help="windows to compare (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments, settings = parser.parse_known_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    if arguments.all_heads:
        if settings:
            parser.error(f"unrecognized arguments: {' '.join(settings)}")
        _all_heads(arguments.json)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BadInput("gradacc verify runs on one process: start it without a launcher")
    recipe = load_recipe(["--config", arguments.config, "--budget", arguments.budget, *settings])
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.accelerator.is_available())
    windows, _ = make_windows(recipe, *recipe.datasets(), accelerator)
    if not 1 <= arguments.windows <= len(windows):
        raise BadInput(
            f"--windows: found {arguments.windows}; allowed: 1 to {len(windows)}, the windows of an epoch"
        )
    set_seed(recipe.config.train.seed)
    model = recipe.model()
    for name in frozen_parameters([name for name, _ in model.named_parameters()], recipe.config.model.freeze):
        model.get_parameter(name).requires_grad_(False)
    result = verify(model, windows, recipe.loss, num_windows=arguments.windows)
    if arguments.json:
        print(json.dumps({**asdict(result), "exact": result.exact, "verdict": result.verdict}, indent=2))
    else:
        show(result, Console(highlight=False))
    sys.exit(0 if result.exact else 1)


def _all_heads(as_json: bool) -> NoReturn:
    """The conformance table; exits with 1 where a head is not exact for no reason that is known."""
    warnings.filterwarnings("ignore")  # of hundreds of models, none of which is the user's
    with Progress(console=Console(stderr=True), transient=True) as progress:
        verdicts = conformance.conformance(
            conformance.heads(every=True), lambda which: progress.track(which, description="heads")
        )
    if as_json:
        print(json.dumps([asdict(verdict) for verdict in verdicts], indent=2))
    else:
        conformance.show(verdicts, Console(highlight=False))
    sys.exit(1 if any(verdict.unexplained for verdict in verdicts) else 0)


def load_recipe(argv: Sequence[str]) -> Recipe:
    """The recipe that a command line's `--config` names, with its settings. Raises BadInput."""
    file = recipe_file(argv)
    sys.path.insert(0, str(Path(file).parent))  # as `python FILE` has it, for what lies beside it
    defined = {
        value
        for value in runpy.run_path(file).values()
        if isinstance(value, type) and issubclass(value, Recipe) and value.__module__ == "<run_path>"
    }
    found = [recipe for recipe in defined if not any(recipe in other.__mro__[1:] for other in defined)]
    if len(found) != 1:
        raise BadInput(
            f"recipe: {file} defines {listed(c.__name__ for c in found) or 'no'} Recipe; it must be one"
        )
    return found[0](read_command_line(argv, data=found[0].Data))


def show(result: Verification, console: Console) -> None:
    """A table of the ways, the parameters that are furthest off, the reasons, and the verdict."""
    console.print(
        f"{result.windows} window{'s' * (result.windows > 1)}, {result.examples} examples, in "
        f"{listed(result.accumulation_steps)} micro-batches; against {result.reference}"
    )
    table = Table("", box=SIMPLE)
    for header in ("relative error", "‖g‖ ratio", "cosine", ""):
        table.add_column(header, justify="right")
    ways = [way for way in (result.loop, result.exact_trainer, result.trainer) if way is not None]
    for way in ways:
        row = (f"{way.error:.1e}", f"{way.norm_ratio:.4f}", f"{way.cosine:.6f}")
        table.add_row(way.way, *row, "exact" if way.exact else "not exact")
    console.print(table)
    for way in ways:
        if not way.exact:
            worst = listed(f"{name} {error:.1e}" for name, error in way.worst)
            console.print(f"{way.way} is furthest off in {worst}")
    if result.trainer_failed:
        console.print(f"Trainer could not be compared: {result.trainer_failed}")
    for reason in result.reasons:
        console.print(f"why: {reason.what}\nwhat to do: {reason.cure}", style="bold")
    console.print(result.verdict, style="green" if result.exact else "red")
    console.print("measured with " + listed(f"{k} {v}" for k, v in result.measured_with.items()))
