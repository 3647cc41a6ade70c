"""Apply a saved model to new inputs, and read the inputs, for `gradacc predict`.

The config.yaml of a run names the recipe file and holds the settings. The recipe loads the saved model and
computes the answers.
"""

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gradacc_hf.errors import InputError, listed, one_line, refuse
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.training.bad_index import name_bad_index
from gradacc_hf.training.run_log import finite
from gradacc_hf.utils.hardware import find_device, refuse_place

INPUTS_PER_BATCH = 32
PROMPTS_PER_BATCH = 8  # for recipes that write texts
SORTED_BATCHES = 8  # micro-batches whose inputs are sorted by length together
IDS = ("id", "_id", "idx", "guid", "qid", "uid")
"""Columns of an input row that an answer keeps: the first of them that the row has."""
INPUT_SUFFIXES = (".jsonl", ".csv", ".txt")


class Input(NamedTuple):
    """An input of a prediction.

    where: the source, for messages ("a.csv, line 2").
    given: a text, or a row as a mapping.
    line: the line of a file, from 1; None for a text of the command line.
    """

    where: str
    given: Any
    line: int | None = None

    @property
    def names(self) -> dict[str, Any]:
        """The line and the id of the input, which the answer keeps."""
        found = {} if self.line is None else {"line": self.line}
        row = self.given if isinstance(self.given, Mapping) else {}
        return found | next(({name: row[name]} for name in IDS if name in row), {})


def folder_of(run: Path, which: str) -> Path:
    """Return the folder of the "best" or the "last" model of a run. Raises InputError if there is none."""
    folder = run / which
    if not folder.is_dir():
        there = listed(f"--model {name}" for name in ("best", "last") if (run / name).is_dir())
        cure = f"choose {there}" if there else "this run saved no model; continue it with --resume"
        refuse(str(run), f"found no {which}/ in it", cure)
    return folder


def load_model(recipe: Recipe, run: Path, which: str = "best") -> Any:
    """Return the "best" or the "last" model of a run in evaluation mode, on the GPU if there is one."""
    folder = folder_of(run, which)
    device = find_device().kind
    refuse_place(device)
    model = recipe.load(folder)
    recipe.model_path = recipe.processor_path = str(
        folder
    )  # the tokenizer or processor was saved beside the model
    recipe.of_chats = _of_chats(run)
    return model.to(device).eval()


def _of_chats(run: Path) -> bool | None:
    """Return whether a run was trained on chats; None if it has not ended, or does not state it."""
    try:
        return json.loads((run / "summary.json").read_text(encoding="utf-8")).get("of_chats")
    except (OSError, ValueError, AttributeError):
        return None


def predict(
    recipe: Recipe, model: Any, inputs: Iterable[Input], batch_size: int | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the answers to the inputs, in order, as soon as they are known.

    Inputs of similar length are answered together. Raises InputError that names the invalid input.

    Args:
        recipe: the recipe of the run.
        model: the saved model.
        inputs: the inputs; plain tuples of a source and an input, too.
        batch_size: inputs that are answered at once; by default 32, and 8 where the model writes texts.
    """
    size = batch_size or (PROMPTS_PER_BATCH if recipe.writes_texts else INPUTS_PER_BATCH)
    rest = iter(inputs)
    while together := [Input(*one) for one in islice(rest, size * SORTED_BATCHES)]:
        order = sorted(range(len(together)), key=lambda place: len(str(together[place].given)))
        answers = dict[int, dict[str, Any]]()
        for start in range(0, len(order), size):
            places = order[start : start + size]
            found = _answer_all(recipe, model, [together[place] for place in places])
            answers |= zip(places, found, strict=True)
        for place, one in enumerate(together):
            yield finite({**one.names, **answers[place]})


def _answer_all(recipe: Recipe, model: Any, inputs: Sequence[Input]) -> list[dict[str, Any]]:
    try:
        return _answer(recipe, model, [one.given for one in inputs])
    except InputError:
        for one in sorted(inputs, key=lambda one: one.line or 0):  # find the first invalid input
            try:
                _answer(recipe, model, [one.given])
            except InputError as error:
                problem = re.sub(r"^input(?: 1)?: ", "", one_line(error))  # the number within the batch
                raise InputError(f"{one.where}: {problem}") from None
        raise


@torch.inference_mode()
def _answer(recipe: Recipe, model: Any, inputs: Sequence[Any]) -> list[dict[str, Any]]:
    with name_bad_index(model):
        return recipe.answer(model, inputs)


def number_texts(texts: Sequence[str]) -> Iterator[Input]:
    """Yield the texts of a command line as inputs, with the sources "text 1", "text 2"."""
    for number, text in enumerate(texts, start=1):
        yield Input(f"text {number:,}", text)


def read_inputs(source: str) -> Iterator[Input]:
    """Yield the inputs in a .jsonl, .csv or .txt file, or on standard input ("-"). Raises InputError.

    Each line of a .txt file is an input, even an empty one. Blank lines of JSONL are skipped.
    """
    path = Path(source)
    if source == "-":
        sys.stdin.reconfigure(encoding="utf-8-sig")  # type: ignore[union-attr]
        return _checked(_either(sys.stdin), "standard input")
    if path.suffix.lower() not in INPUT_SUFFIXES:
        refuse(
            "--input",
            f"found {source!r}",
            f"allowed: a {listed(INPUT_SUFFIXES)} file, or - for standard input",
        )
    if not path.is_file():
        refuse(
            "--input", f"no file {source!r}", f"give a {listed(INPUT_SUFFIXES)} file, or - for standard input"
        )
    read = {".jsonl": _objects, ".csv": _rows, ".txt": _texts}[path.suffix.lower()]
    return _checked(_opened(path, read), source)


def _opened(path: Path, read: Any) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="" if read is _rows else None) as lines:
        yield from read(lines)


def _checked(numbered: Iterator[tuple[int, Any]], source: str) -> Iterator[Input]:
    """Yield inputs with the name of their source. Raises InputError with the line that cannot be read."""
    line, count = 0, 0
    try:
        for line, one in numbered:
            count += 1
            yield Input(f"{source}, line {line:,}", one, line)
    except UnicodeDecodeError:
        refuse(f"{source}, after line {line:,}", "found bytes that are not UTF-8", "save it as UTF-8")
    except OSError as error:
        refuse(source, f"cannot be read ({error.strerror})", "give a readable file")
    except _BrokenLineError as error:
        refuse(f"{source}, line {error.line:,}", str(error), error.cure)
    if not count:
        refuse(source, "found no input", "give at least one")


class _BrokenLineError(Exception):
    def __init__(self, line: int, found: str, cure: str):
        super().__init__(found)
        self.line, self.cure = line, cure


def _texts(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, start=1):
        yield number, line.removesuffix("\n")


def _objects(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    cure = "one JSON object, or string, a line"
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            raise _BrokenLineError(number, f"column {error.colno}: {error.msg}", cure) from None
        if not isinstance(found, Mapping | str):
            raise _BrokenLineError(number, f"found {line.strip()[:40]}", cure)
        yield number, found


def _rows(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """Yield rows with the line on which each begins, as the messages about data name it."""
    reader = csv.reader(lines, strict=True)
    header, line = None, 1
    try:
        for values in reader:
            if values and header is None:
                header = values
            elif values and header is not None:
                if len(values) != len(header):
                    found = f"found {'more' if len(values) > len(header) else 'fewer'} fields"
                    cure = "quote fields that hold a comma or a line break"
                    raise _BrokenLineError(line, f"{found} than the header has", cure)
                yield line, dict(zip(header, values, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise _BrokenLineError(line, str(error), "correct it, or leave it out") from None


def _either(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """Yield JSON objects if the first line is one, else texts."""
    rest = iter(lines)
    first = list(islice(rest, 1))
    try:
        read = _objects if isinstance(json.loads("".join(first)), Mapping) else _texts
    except ValueError:
        read = _texts
    return read(line for some in (first, rest) for line in some)
