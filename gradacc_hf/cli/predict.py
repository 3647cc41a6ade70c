"""`gradacc predict`: predictions of a saved run on new input."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import transformers
from datasets import disable_progress_bars
from rich.console import Console
from rich.progress import track

from gradacc_hf.errors import InputError, refuse
from gradacc_hf.recipe.loading import open_run
from gradacc_hf.run.predict import load_model, number_texts, predict, read_inputs
from gradacc_hf.utils.commands import Parser
from gradacc_hf.utils.files import write_whole


def main(argv: Sequence[str]) -> None:
    """Run the command. Raises InputError."""
    parser = Parser(
        prog="gradacc predict",
        description="Predict on new input with the model of a saved run. Prints one JSON object per line, in "
        "the order of the input.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, such as runs/NAME-1")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="inputs")
    parser.add_argument(
        "--input",
        metavar="FILE",
        help="read inputs from a file: .jsonl or .csv with the columns of the training data, or .txt with "
        "one input per line. - reads standard input: lines of text, or of JSON objects if the first is one",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the predictions to this file, all or none"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code from the model's repository"
    )
    parser.add_argument(
        "--model", choices=("best", "last"), default="best", help="the saved model (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    if bool(arguments.texts) == bool(arguments.input):
        raise InputError("predict: give texts, or --input FILE (- for standard input), but not both")
    if arguments.output is not None and arguments.output.exists():
        raise InputError(f"--output: {arguments.output} exists; give another name, or move the file")
    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise InputError(f"--output: no folder {arguments.output.parent}; create it, or give another")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    inputs = number_texts(arguments.texts) if arguments.texts else read_inputs(arguments.input)
    recipe = open_run(arguments.run, arguments.trust_remote_code)
    model = load_model(recipe, arguments.run, arguments.model)
    # A bar would mix with predictions on the terminal, so it is shown only if they go elsewhere.
    quiet = not sys.stderr.isatty() or (arguments.output is None and sys.stdout.isatty())
    bar = {"total": len(arguments.texts) or None, "console": Console(stderr=True), "transient": True}
    lines = (
        json.dumps(answer, ensure_ascii=False)
        for answer in track(predict(recipe, model, inputs), "predict", disable=quiet, **bar)
    )
    if arguments.output is not None:
        try:
            write_whole(arguments.output, "".join(line + "\n" for line in lines))
        except OSError as error:
            refuse("--output", f"{arguments.output} cannot be written ({error.strerror})", "give another")
        return
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]  # JSON is UTF-8 in any locale
    for line in lines:
        print(line, flush=True)
