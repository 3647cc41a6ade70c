"""`gradacc evaluate`: the metrics of a saved run on labelled data, with intervals and the baseline."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gradacc_hf.config.schema import with_settings
from gradacc_hf.data.reading import counted
from gradacc_hf.errors import InputError, listed
from gradacc_hf.recipe.loading import open_run
from gradacc_hf.run.evaluate import RunEvaluation, evaluate_run, name_of, write_evaluation
from gradacc_hf.run.folder import refuse_links
from gradacc_hf.utils.commands import Parser
from gradacc_hf.utils.verbosity import silence_libraries


def main(argv: Sequence[str]) -> None:
    """Run the command. Raises InputError."""
    parser = Parser(
        prog="gradacc evaluate",
        description="Compute the metrics of a saved run on labelled data, with 95 % intervals by the "
        "bootstrap over rows, and the baseline. Write the result to RUN/evaluations, and into the report "
        "and the cards of the run.",
        epilog="Example: gradacc evaluate runs/NAME-1 --data test.jsonl",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, such as runs/NAME-1")
    parser.add_argument(
        "--data",
        metavar="FILE|HUB",
        help="rows with labels, in any format of data.train (default: the validation data of the run)",
    )
    parser.add_argument(
        "--split",
        metavar="NAME",
        help="the split of --data, such as test; without --data, of the run's training data",
    )
    parser.add_argument(
        "--model", choices=("best", "last"), default="best", help="the saved model (default: %(default)s)"
    )
    parser.add_argument(
        "--data.on_bad_row",
        dest="on_bad_row",
        choices=("error", "skip"),
        help="skip leaves out rows that the task cannot use (default: as in the run)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code from the model's repository"
    )
    arguments = parser.parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("gradacc evaluate runs in one process; start it without a launcher")
    silence_libraries()
    recipe = open_run(arguments.run, arguments.trust_remote_code)
    refuse_links(arguments.run.resolve(), "RUN")
    if arguments.on_bad_row is not None:
        changes = {"data.on_bad_row": arguments.on_bad_row}
        recipe = recipe.with_config(with_settings(recipe.config, changes))
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        bar = progress.add_task("evaluate", total=None)
        evaluation = evaluate_run(
            recipe,
            arguments.run,
            arguments.model,
            arguments.data,
            arguments.split,
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    written = write_evaluation(arguments.run, evaluation, name_of(arguments.data, arguments.split))
    if arguments.json:
        print(evaluation.as_json())
    else:
        print_evaluation(evaluation, Console(highlight=False))
    print(f"wrote {listed(written)}", file=sys.stderr if arguments.json else sys.stdout)


def print_evaluation(evaluation: RunEvaluation, console: Console) -> None:
    """Print the metrics as a table, with what was evaluated above and notes below."""
    console.print(
        f"{evaluation.model} model on {evaluation.data}: {counted(evaluation.examples, 'example')}",
        markup=False,
    )
    table = Table("metric", box=SIMPLE)
    for header in ("value", "95 % interval", "baseline"):
        table.add_column(header, justify="right")
    for name, metric in evaluation.metrics.items():
        interval = "–" if metric.low is None else f"{metric.low:.4f} to {metric.high:.4f}"
        baseline = "–" if metric.baseline is None else f"{metric.baseline:.4f}"
        table.add_row(name, f"{metric.value:.4f}", interval, baseline)
    console.print(table)
    if any(metric.baseline is not None for metric in evaluation.metrics.values()):
        console.print(f"baseline column: {evaluation.baseline_is}", markup=False)
    for note in evaluation.notes:
        console.print(f"note: {note}", markup=False)
