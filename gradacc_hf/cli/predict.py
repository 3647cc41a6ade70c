"""`gradacc predict`: predictions of a saved run on new input."""

import json
import math
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import track

from gradacc_hf.data.reading import counted as number_of
from gradacc_hf.errors import InputError, refuse
from gradacc_hf.recipe.base import Generation, Recipe
from gradacc_hf.recipe.loading import open_run
from gradacc_hf.run.predict import load_model, number_texts, predict, read_inputs
from gradacc_hf.utils.commands import Parser
from gradacc_hf.utils.files import flush
from gradacc_hf.utils.verbosity import silence_libraries


def main(argv: Sequence[str]) -> None:
    """Run the command. Raises InputError."""
    arguments = _make_parser().parse_args(argv)
    if bool(arguments.texts) == bool(arguments.input):
        raise InputError("predict: give texts, or --input FILE (- for standard input), but not both")
    if arguments.output is not None and arguments.output.exists():
        raise InputError(f"--output: {arguments.output} exists; give another name, or move the file")
    if arguments.output is not None and (left := _unfinished(arguments.output)).exists():
        raise InputError(f"--output: {left} exists, of a prediction that was stopped; move or remove it")
    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise InputError(f"--output: no folder {arguments.output.parent}; create it, or give another")
    silence_libraries()
    inputs = number_texts(arguments.texts) if arguments.texts else read_inputs(arguments.input)
    recipe = open_run(arguments.run, arguments.trust_remote_code)
    for flag in ("max_new_tokens", "temperature"):
        if getattr(arguments, flag) is not None and not recipe.writes_texts:
            raise InputError(f"--{flag}: {_name(recipe)} writes no text; leave it out")
    recipe.generation = Generation(arguments.max_new_tokens, arguments.temperature or 0.0)
    set_seed(recipe.config.train.seed)  # of samples
    model = load_model(recipe, arguments.run, arguments.model)
    # A bar would mix with predictions on the terminal, so it is shown only if they go elsewhere.
    quiet = not sys.stderr.isatty() or (arguments.output is None and sys.stdout.isatty())
    bar = {"total": len(arguments.texts) or None, "console": Console(stderr=True), "transient": True}
    answers = predict(recipe, model, inputs, arguments.batch_size)
    counts = [0, 0]  # truncated answers, all answers
    counted = _count_truncated(track(answers, "predict", disable=quiet, **bar), counts)
    if arguments.output is not None:
        _write(arguments.output, counted)
        print(f"wrote {number_of(counts[1], 'answer')} to {arguments.output}")
    else:
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]  # JSON is UTF-8 in any locale
        for answer in counted:
            print(json.dumps(answer, ensure_ascii=False), flush=True)
    if counts[0]:
        said = f"{counts[0]:,} of {counts[1]:,} answers were truncated; for longer ones: --max_new_tokens N"
        print(said, file=sys.stderr)


def _name(recipe: Recipe) -> str:
    """Return the name of a recipe's file, such as text_classification."""
    return Path(recipe.config.recipe or type(recipe).__name__).stem


def _make_parser() -> Parser:
    parser = Parser(
        prog="gradacc predict",
        description="Predict on new input with the model of a saved run. Prints one JSON object per line, in "
        "the order of the input. An answer to a row of a file has the row's line, and its id.",
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
        "--output",
        type=Path,
        metavar="FILE",
        help="write the predictions to this file. While it is incomplete, its name is FILE.unfinished, and "
        "each line in it is whole",
    )
    parser.add_argument(
        "--batch_size",
        type=_at_least_one,
        metavar="N",
        help="inputs that are answered at once (default: 32, or 8 where the model writes texts)",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=_at_least_one,
        metavar="N",
        help="longest answer, in tokens; a longer one is truncated, and has truncated: true (default: the "
        "setting of the run)",
    )
    parser.add_argument(
        "--temperature",
        type=_temperature,
        metavar="T",
        help="sample answers from the probabilities of the logits / T, with train.seed of the run: the same "
        "command repeats them (default: 0, the likeliest token)",
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code from the model's repository"
    )
    parser.add_argument(
        "--model", choices=("best", "last"), default="best", help="the saved model (default: %(default)s)"
    )
    return parser


def _count_truncated(answers: Iterable[dict[str, Any]], counts: list[int]) -> Iterator[dict[str, Any]]:
    """Yield the answers. Count the truncated answers, and all answers."""
    for answer in answers:
        counts[0] += bool(answer.get("truncated"))
        counts[1] += 1
        yield answer


def _write(output: Path, answers: Iterable[dict[str, Any]]) -> None:
    """Write the answers line by line. The file has its name once it is complete."""
    unfinished, written = _unfinished(output), 0
    try:
        with unfinished.open("x", encoding="utf-8") as file:
            for answer in answers:
                file.write(json.dumps(answer, ensure_ascii=False) + "\n")
                file.flush()
                written += 1
        flush(unfinished)
        unfinished.rename(output)
    except OSError as error:
        refuse("--output", f"{output} cannot be written ({error.strerror})", "give another")
    except (KeyboardInterrupt, InputError) as error:
        if not written:
            unfinished.unlink()
            raise
        kept = f"the first {written:,} answers are in {unfinished}"
        if isinstance(error, InputError):
            raise InputError(f"{error}; {kept}") from None
        print(f"stopped: {kept}", file=sys.stderr)
        sys.exit(130)


def _unfinished(output: Path) -> Path:
    return output.with_name(f"{output.name}.unfinished")


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"found {text!r}; allowed: 1 or more")
    return int(text)


def _temperature(text: str) -> float:
    try:
        if 0 <= (value := float(text)) < math.inf:
            return value
    except ValueError:
        pass
    raise ArgumentTypeError(f"found {text!r}; allowed: 0 (the likeliest token) or more")
