"""`gradacc verify`: is accumulation exact for a recipe's model, data and budget?"""

import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import torch
import transformers
from accelerate import Accelerator
from datasets import disable_progress_bars
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gradacc_hf.config.budget import export_cpu_offload
from gradacc_hf.errors import InputError, listed
from gradacc_hf.hub.model_card import refresh_cards
from gradacc_hf.recipe.loading import load_recipe, on_this_machine, open_run
from gradacc_hf.run.folder import refuse_links
from gradacc_hf.run.setup import load_data, make_model, make_windows
from gradacc_hf.training.run_log import finite
from gradacc_hf.utils.commands import Parser
from gradacc_hf.utils.files import write_whole
from gradacc_hf.verification import all_heads as conformance
from gradacc_hf.verification.exactness import Verification, verify


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
        "--run",
        type=Path,
        help="a run's folder: verify what it trained; its verify.json, cards and report say what came of it",
    )
    what.add_argument(
        "--all-heads",
        action="store_true",
        help="every head of the installed transformers, tiny (half an hour)",
    )
    parser.add_argument("--budget", help="a budget's name or file (auto or, with --run, that of the run)")
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
        raise InputError("gradacc verify runs on one process: start it without a launcher")
    if arguments.run is None:
        flags = ["--config", arguments.config, "--budget", arguments.budget or "auto", *settings]
        recipe = load_recipe(flags)
    elif settings or arguments.budget:
        given = settings[0] if settings else "--budget"
        raise InputError(f"{given}: a run is verified with its own settings; others go with --config FILE")
    else:
        refuse_links(arguments.run.resolve(), "--run")
        recipe = open_run(arguments.run)
        if not (arguments.run / "summary.json").is_file():
            raise InputError(f"{arguments.run}: found no summary.json; this run has not ended")
    if recipe.config.model.load_in_4bit:
        raise InputError(
            "model.load_in_4bit: found true; allowed is false, as gradients are compared in float32"
        )
    recipe = on_this_machine(recipe)
    export_cpu_offload(recipe.config.budget)
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.accelerator.is_available())
    recipe, training, validation = load_data(recipe)
    windows, _ = make_windows(recipe, training, validation, accelerator)
    if not 1 <= arguments.windows <= len(windows):
        raise InputError(
            f"--windows: found {arguments.windows}; allowed: 1 to {len(windows)}, the windows of an epoch"
        )
    result = verify(make_model(recipe), windows, recipe.loss, num_windows=arguments.windows)
    as_json = finite({**asdict(result), "exact": result.exact, "verdict": result.verdict})
    as_json = json.dumps(as_json, indent=2)
    if arguments.run is not None:
        write_whole(arguments.run / "verify.json", as_json + "\n")
        refresh_cards(arguments.run)
        if (arguments.run / "report.html").is_file():
            from gradacc_hf.report import write_report  # late: it loads matplotlib

            write_report([arguments.run])
    if arguments.json:
        print(as_json)
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
