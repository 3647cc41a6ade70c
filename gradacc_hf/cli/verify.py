"""`gradacc verify`: whether accumulation is exact for the model, data and budget of a recipe."""

import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import Progress

from gradacc_hf.config.budget import export_cpu_offload
from gradacc_hf.errors import InputError, listed
from gradacc_hf.hub.model_card import refresh_cards
from gradacc_hf.recipe.loading import load_recipe, on_this_machine, open_run
from gradacc_hf.run.folder import refuse_links
from gradacc_hf.run.padding import choose_padding
from gradacc_hf.run.setup import check_vocabulary, load_data, make_model, make_windows
from gradacc_hf.training.run_log import finite
from gradacc_hf.utils.commands import Parser
from gradacc_hf.utils.files import write_whole
from gradacc_hf.utils.verbosity import silence_libraries
from gradacc_hf.verification import all_heads as conformance
from gradacc_hf.verification.exactness import verify
from gradacc_hf.verification.table import print_verification


def main(argv: Sequence[str]) -> None:
    """Run the command. The exit code is 0 if the loop is exact, and 1 if it is not."""
    parser = Parser(
        prog="gradacc verify",
        description="Compare accumulated gradients with the gradients of whole windows, on a recipe's data. "
        "The exit code is 0 if the loop is exact, and 1 if it is not.",
        epilog="Settings of the recipe may follow, such as --batch.effective 32.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="the recipe's config file")
    what.add_argument(
        "--run",
        type=Path,
        help="the folder of a run: verify its recipe, and write the result to verify.json, cards and report",
    )
    what.add_argument(
        "--all-heads",
        action="store_true",
        help="verify a tiny model of every head of the installed transformers (half an hour)",
    )
    parser.add_argument("--budget", help="a budget's name or file (default: auto, or the budget of --run)")
    parser.add_argument(
        "--windows",
        type=int,
        help="number of windows to compare, chosen among the next 8 (default: one, and up to two more with "
        "other labels)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments, settings = parser.parse_known_args(argv)
    silence_libraries()
    if arguments.all_heads:
        if settings:
            parser.error(f"unrecognized arguments: {' '.join(settings)}")
        _all_heads(arguments.json)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("gradacc verify runs in one process; start it without a launcher")
    if arguments.run is None:
        flags = ["--config", arguments.config, "--budget", arguments.budget or "auto", *settings]
        recipe = load_recipe(flags)
    elif settings or arguments.budget:
        given = settings[0] if settings else "--budget"
        raise InputError(f"{given}: --run uses the settings of the run; give other settings with --config")
    else:
        refuse_links(arguments.run.resolve(), "--run")
        recipe = open_run(arguments.run)
        if not (arguments.run / "summary.json").is_file():
            raise InputError(f"{arguments.run}: found no summary.json, so this run has not ended")
    if recipe.config.model.load_in_4bit:
        raise InputError(
            "model.load_in_4bit: found true; allowed: false, because gradients are compared in float32"
        )
    recipe = on_this_machine(recipe)
    export_cpu_offload(recipe.config.budget)
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.accelerator.is_available())
    recipe, training, validation = load_data(recipe)
    check_vocabulary(recipe, recipe.empty_model(), (training, validation))
    windows, _ = make_windows(recipe, training, validation, accelerator)
    if arguments.windows is not None and not 1 <= arguments.windows <= len(windows):
        raise InputError(
            f"--windows: found {arguments.windows}; allowed: 1 to {len(windows)}, the windows of an epoch"
        )
    model = make_model(recipe)
    choose_padding(recipe, model, windows)
    recipe.before_training(model, [training], accelerator)
    result = verify(model, windows, recipe.compute_loss, num_windows=arguments.windows)
    as_json = finite({**asdict(result), "exact": result.exact, "verdict": result.verdict})
    as_json = json.dumps(as_json, indent=2)
    written = _write(arguments.run, as_json) if arguments.run is not None else []
    if arguments.json:
        print(as_json)
    else:
        print_verification(result, Console(highlight=False))
    if written:
        print(f"wrote {listed(map(str, written))}", file=sys.stderr if arguments.json else sys.stdout)
    sys.exit(0 if result.exact else 1)


def _write(run: Path, as_json: str) -> list[Path]:
    """Write verify.json of a run, and the model cards and the report with the verdict. Return the files."""
    write_whole(run / "verify.json", as_json + "\n")
    written = [run / "verify.json", *refresh_cards(run)]
    if (run / "report.html").is_file():
        from gradacc_hf.report import write_report  # late: it loads matplotlib

        write_report([run])
        written.append(run / "report.html")
    return written


def _all_heads(as_json: bool) -> NoReturn:
    """Print the conformance table. The exit code is 1 if a head is not exact for an unknown reason."""
    warnings.filterwarnings("ignore")  # warnings of hundreds of models do not concern the user
    with Progress(console=Console(stderr=True), transient=True) as progress:
        verdicts = conformance.conformance(
            conformance.heads(every=True), lambda which: progress.track(which, description="heads")
        )
    if as_json:
        print(json.dumps([asdict(verdict) for verdict in verdicts], indent=2))
    else:
        conformance.print_conformance(verdicts, Console(highlight=False))
    sys.exit(1 if any(verdict.unexplained for verdict in verdicts) else 0)
