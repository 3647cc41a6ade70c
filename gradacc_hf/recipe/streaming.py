"""The examples of a recipe with `data.streaming`, made from rows while they are read.

The recipe prepares a sample, the first rows, as it prepares any file. `open_rows` returns the sample; an
`ExampleStream` makes the examples of all rows with the recipe's `examples_of`, in `budget.num_workers`
processes.
"""

import atexit
import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from datasets.utils.py_utils import size_str
from torch.utils.data import DataLoader

from gradacc_hf.config.schema import Config
from gradacc_hf.data.files import FAULT
from gradacc_hf.data.loading import VALIDATION_SPLITS, Convert, choose_split
from gradacc_hf.data.mixed import rows_as_dataset
from gradacc_hf.data.readers import quiet
from gradacc_hf.data.reading import counted
from gradacc_hf.data.streams import ROWS, Chunk, Position, RowStream, open_streams
from gradacc_hf.errors import InputError, listed, refuse
from gradacc_hf.utils.logs import get_logger
from gradacc_hf.utils.signals import ignore_signals

if TYPE_CHECKING:
    from gradacc_hf.recipe.base import Recipe

logger = get_logger(__name__)

SAMPLE = 1000  # rows for the plan, and at least two windows
SHOWN = 10  # skipped rows in summary.json
NOTHING_READ = {"rows": 0, "truncated": 0, "count": 0, "first": []}
CURE = "correct it, or leave such rows out: --data.on_bad_row skip"


@dataclass(frozen=True)
class OpenRows:
    """The training rows of a recipe with `data.streaming`.

    Attributes:
        rows: The stream.
        start: Position of the first training row. The rows before are validation rows.
        convert: Converts rows from the format of a file, or None.
        columns: Columns of the sample, before it is converted.
    """

    rows: RowStream
    start: Position
    convert: Convert | None
    columns: list[str]


def open_rows(recipe: "Recipe", convert: Convert | None) -> tuple[OpenRows, Dataset, Dataset]:
    """Open the training rows, and return them with the sample and the validation rows.

    Validation rows are the first `data.validation_rows` of `data.validation`, or else of the validation split
    of `data.train`. Without either, they are the first training rows, and training starts after them.

    Raises:
        InputError: For settings that need all rows, and for rows that cannot be read.
    """
    check_settings(recipe)
    data, number = recipe.data, recipe.data.validation_rows
    shared = {"reading": recipe.reading, "config_name": data.config_name, "encoding": data.encoding}
    splits = open_streams(data.train, "data.train", **shared)
    if "train" not in splits:
        refuse("data.train", f"{data.train!r} has no train split; found {listed(splits)}", "name the files")
    rows, start = splits["train"], {}
    name = next((split for split in VALIDATION_SPLITS if split in splits), None)
    of_train = data.validation is None and name is None
    if of_train:
        others, source = rows, f"of the training rows, which start with row {number + 1:,}"
    elif data.validation is None or data.validation in splits:
        name = str(data.validation or name)
        others, source = splits[name], f"of the {name} split of {data.train}"
    else:
        found = open_streams(data.validation, "data.validation", **shared)
        name = choose_split(found, data.validation, data.validation_split)
        others, source = found[name], f"of {data.validation}"
    validation, after = _head(recipe, others, number, {}, "data.train" if of_train else "data.validation")
    start = after if of_train else start
    sample, _ = _head(recipe, rows, sample_size(recipe.config), start, "data.train")
    recipe.validation_source = f"validation: the first {len(validation):,} {source}"
    _note(recipe, rows, len(sample))
    opened = OpenRows(rows, start, convert, sample.column_names)
    sample, validation = (_converted(recipe, part, convert) for part in (sample, validation))
    recipe.reading.columns = [*dict.fromkeys((*sample.column_names, *validation.column_names))]
    return opened, sample, validation


def check_settings(recipe: "Recipe") -> None:
    """Raise InputError for settings that need all rows, or the number of rows."""
    config = recipe.config
    if recipe.data.mixture:
        refuse("data.train", "found a mixture with data.streaming", "set data.streaming to false")
    if recipe.data.weight_column is not None:
        cure = "set one of the two to null or false"
        refuse("data.weight_column", "found with data.streaming", cure)
    decays = not config.optim.is_constant
    cure = "or set optim.scheduler constant and optim.warmup_ratio 0"
    if decays and config.train.max_windows is None:
        found = f"found null, and the number of windows of a stream, which {config.optim.scheduler} needs, "
        refuse("train.max_windows", f"{found}is unknown", f"set it to the windows of the run, {cure}")
    if decays and not isinstance(config.batch.effective, int):
        found = f"found {config.batch.effective}, and the learning rate then follows the number of examples"
        refuse("batch.effective", f"{found}, which a stream does not have", f"set it to a number, {cure}")


def sample_size(config: Config) -> int:
    """Return the number of rows that are read before training."""
    sizes = config.batch.effective
    largest = max(sizes.values()) if isinstance(sizes, dict) else config.batch.least
    return max(SAMPLE, 2 * largest)


def _head(
    recipe: "Recipe", rows: RowStream, number: int, start: Position, key: str
) -> tuple[Dataset, Position]:
    """Return the next rows that can be read, and the position after them."""
    chunks, stop = rows.take(number, start)
    places, found = [], []
    for place, row, problem in (one for chunk in chunks for one in chunk.rows()):
        if problem is None:
            places.append(place)
            found.append(row)
        elif recipe.data.on_bad_row == "error":
            refuse(key, f"{place}: {problem}", CURE)
        else:
            recipe.skipped_rows.append(f"{place}: {problem}")
    if not found:
        names = listed(one.name for one in rows.sources[:3])
        if start:
            found = f"{names}: no rows after the first {recipe.data.validation_rows:,}, the validation rows"
            refuse(key, found, "set data.validation, or data.validation_rows to fewer")
        refuse(key, f"{names}: no rows", "give at least two")
    return rows.as_dataset(found, places), stop


def _converted(recipe: "Recipe", rows: Dataset, convert: Convert | None) -> Dataset:
    rows, found = convert(rows) if convert else (rows, None)
    if found:
        recipe.reading.note("format", found)
    return rows


def _note(recipe: "Recipe", rows: RowStream, sampled: int) -> None:
    sizes = rows.sizes()
    names = listed(source.name for source in rows.sources[:3]) + ", …" * (len(rows.sources) > 3)
    size = f", {size_str(sum(sizes.values()))}" if sizes else ""
    of = f" ({len(rows.sources):,} files{size})" if len(rows.sources) > 1 else f" ({size.removeprefix(', ')})"
    note, buffer = recipe.reading.note, recipe.data.buffer_size
    note("stream", f"{names}{of if sizes else ''}; rows unknown, shuffled in blocks of {buffer:,} examples")
    note(
        "stream",
        f"the plan is of the first {counted(sampled, 'training row')}; later ones are checked while read",
    )


@dataclass(frozen=True)
class Made:
    """The examples of a chunk, the lines about its bad rows, and the numbers of rows read and truncated."""

    start: Position
    examples: list[dict[str, Any]]
    bad: list[str]
    rows: int
    truncated: int


@dataclass(frozen=True)
class MakeExamples(torch.utils.data.Dataset):
    """Chunk of rows → examples. Runs in worker processes, if there are any."""

    recipe: "Recipe"
    opened: OpenRows
    keep: Sequence[str]

    def __getitem__(self, chunk: Chunk) -> Made:
        read = [*chunk.rows()]
        found = [(place, row) for place, row, problem in read if problem is None]
        bad = {place: problem for place, _, problem in read if problem is not None}
        if self.opened.convert and found:
            found = self._converted(found, self.opened.convert)
        for place, row in found:
            row.update({name: None for name in self.opened.columns if name not in row})
            if problem := row.get(FAULT) or self.recipe.row_problem(row):
                bad[place] = problem
        found = [(place, row) for place, row in found if place not in bad]
        examples, truncated = self._examples(found, bad) if found else ([], 0)
        lines = [f"{place}: {bad[place]}" for place, _, _ in read if place in bad]
        return Made(chunk.start, examples, lines, len(read), truncated)

    def _converted(self, found: Sequence[tuple[str, Any]], convert: Convert) -> list[tuple[str, Any]]:
        with quiet():
            converted, _ = convert(rows_as_dataset([row for _, row in found]))
        places = [place for place, _ in found]
        if len(converted) != len(places):  # rows with several examples
            places = [f"{places[0]} to {places[-1]}, example {at + 1}" for at in range(len(converted))]
        return [*zip(places, map(dict, converted), strict=True)]

    def _examples(
        self, found: Sequence[tuple[str, Mapping[str, Any]]], bad: dict[str, str]
    ) -> tuple[list[dict[str, Any]], int]:
        """Return the examples of rows, and the number of truncated rows. Add bad rows to `bad`."""
        names = dict.fromkeys(name for _, row in found for name in row)
        made = dict(self.recipe.examples_of({name: [row.get(name) for _, row in found] for name in names}))
        problems = made.pop("problem", [""] * len(found))
        bad.update({place: p for (place, _), p in zip(found, problems, strict=True) if p})
        columns = zip(*(made[name] for name in self.keep), strict=True)
        examples = [dict(zip(self.keep, values, strict=True)) for values in columns]
        if any(problems):
            rows = made.get("row", range(len(found)))
            examples = [example for row, example in zip(rows, examples, strict=True) if not problems[row]]
        lost = [made[name] for name in made if "lost" in name]
        rows_lost = zip(problems, *lost, strict=True) if lost else ()
        return examples, sum(not problem and any(of_row) for problem, *of_row in rows_lost)


class ExampleStream:
    """The examples of all training rows, in order. Iterable again and again, without a length.

    Args:
        recipe: The recipe, after a call of `datasets()`.
        keep: Columns of an example.

    Attributes:
        read: The number of rows read in an epoch, of truncated ones, and the count of skipped ones with
            lines about the first. Of several readings, the furthest.
    """

    def __init__(self, recipe: "Recipe", keep: Sequence[str]):
        assert recipe.opened is not None
        self.opened, self.workers = recipe.opened, recipe.config.budget.num_workers
        self.ahead, self.stops = recipe.data.buffer_size, recipe.data.on_bad_row == "error"
        self.read: dict[str, Any] = {**NOTHING_READ}
        self._make = MakeExamples(recipe, self.opened, tuple(keep))
        self._place: dict[str, Any] = {}
        self.load_state_dict({"rows": self.opened.start, "examples": 0, "counts": NOTHING_READ})

    def apart(self) -> "ExampleStream":
        """Return a copy with a separate position, the beginning. Both share `read`."""
        other = copy.copy(self)
        other.load_state_dict({"rows": self.opened.start, "examples": 0, "counts": NOTHING_READ})
        return other

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the latest example, as plain data."""
        return self._place

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a position in the next iteration."""
        self._place = dict(state)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        skip, counts = self._place["examples"], self._place["counts"]
        for made in self._chunks(self._place["rows"]):
            before = counts
            counts = self._count(made, counts)
            for number, example in enumerate(made.examples[skip:], start=skip + 1):
                self._place = {"rows": made.start, "examples": number, "counts": before}
                yield example
            skip = max(0, skip - len(made.examples))

    def _chunks(self, start: Position) -> Iterator[Made]:
        """Yield the examples of chunks. Workers prepare as many as a block of the shuffle has."""
        options: dict[str, Any] = {}
        if self.workers:
            options["prefetch_factor"] = 2 + self.ahead // (ROWS * self.workers)
        loader = DataLoader(
            self._make,
            sampler=self.opened.rows.chunks(start),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=_begin_worker,
            collate_fn=_identity,
            generator=torch.Generator(),  # without it, a seed would be drawn from the generator of dropout
            **options,
        )
        examples: Any = iter(loader)
        if not self.workers:
            yield from examples
            return
        # Workers ignore the signal with which Python ends them at its exit, and Python would wait for them.
        atexit.register(examples._shutdown_workers)
        try:
            yield from examples
        finally:
            atexit.unregister(examples._shutdown_workers)
            examples._shutdown_workers()

    def _count(self, made: Made, counts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the counts after a chunk. Raise InputError for the first bad row unless it is skipped."""
        if made.bad and self.stops:
            raise InputError(f"data.train: {made.bad[0]}; {CURE}")
        counts = {
            "rows": counts["rows"] + made.rows,
            "truncated": counts["truncated"] + made.truncated,
            "count": counts["count"] + len(made.bad),
            "first": [*counts["first"], *made.bad][:SHOWN],
        }
        if counts["rows"] > self.read["rows"]:
            if made.bad and not self.read["count"]:
                logger.warning(f"{made.bad[0]}: the row is skipped, and later bad rows are counted")
            self.read.update(counts)
        return counts


def _begin_worker(worker: int) -> None:
    ignore_signals(worker)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker is one process of several
    torch.set_num_threads(1)


def _identity(made: Any) -> Any:
    return made
