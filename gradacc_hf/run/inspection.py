"""The data that a run of a recipe uses, for `gradacc data`: counts, lengths, labels, duplicates and examples.

The data are read and checked by the functions of a run, so that both refuse the same data with the same line.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow.compute
import torch
from accelerate import Accelerator
from datasets import Dataset

from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.accumulation.splitting import Bound
from gradacc_hf.config.batch_size import effective_batch_size
from gradacc_hf.config.schema import with_settings
from gradacc_hf.data.columns import as_list, is_list
from gradacc_hf.data.files import FAULT
from gradacc_hf.data.reading import SPLITS, FileRows, Truncation
from gradacc_hf.errors import InputError
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.run.decoded import (
    NO_ANSWER,
    TOKENS,
    DecodedExample,
    answer_tokens,
    decode_example,
    is_encoder_decoder,
    kind_of_labels,
    label_names,
)
from gradacc_hf.run.fingerprint import repeated_examples, shared_examples
from gradacc_hf.run.overview import data_lines
from gradacc_hf.run.resolve import check_settings
from gradacc_hf.run.setup import check_best_metric, check_inputs, load_data, make_windows

pc: Any = pyarrow.compute  # the functions are made at import, so type checkers do not know them
BINS = 10  # of a histogram
LEARNED, NOT_LEARNED = "learned tokens", "other tokens"


@dataclass(frozen=True)
class LengthSummary:
    """Lengths of one input, in tokens, over the examples of a split.

    histogram: (shortest, longest, number of examples) of each bin.
    """

    min: int
    median: float
    p95: float
    max: int
    histogram: list[tuple[int, int, int]]


@dataclass(frozen=True)
class EqualExamples:
    """Examples with the same inputs as another: repeated in a split, or shared by both splits.

    number: these examples.
    first: the first of them; None if there is none.
    other: the example with the same inputs: an earlier one, or the training example.
    text: the text of both.
    """

    number: int
    first: int | None = None
    other: int | None = None
    text: str | None = None


@dataclass(frozen=True)
class Inspection:
    """The data of a run.

    lines: name and text of each line of the plan about the data.
    format: the formats that were found.
    files: the files with their rows.
    rows: examples by split.
    columns: column → the setting that names it; "" if no setting does, None if nothing uses the column.
    columns_of_sources: the same for each source of a mixture, with the columns as the source names them.
    kind_of_labels: as `kind_of_labels` returns it.
    labels: by split, as `count_labels` returns them.
    lengths: by split and input.
    truncated: the truncated rows.
    duplicates: by "training", "validation" and "both".
    split: the split of the examples that are shown.
    examples: examples as the model receives them.
    refused: the line with which a run refuses these data; None if it does not.
    """

    lines: list[tuple[str, str]]
    format: list[str]
    files: list[FileRows]
    rows: dict[str, int]
    columns: dict[str, str | None]
    columns_of_sources: dict[str, dict[str, str | None]]
    kind_of_labels: str
    labels: dict[str, dict[str, float]]
    lengths: dict[str, dict[str, LengthSummary]]
    truncated: list[Truncation]
    duplicates: dict[str, EqualExamples]
    split: str
    examples: list[DecodedExample]
    refused: str | None

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        of_examples = [{"split": self.split, **example.as_json()} for example in self.examples]
        return {**asdict(self), "examples": of_examples}


def inspect_data(recipe: Recipe, number: int = 3, split: str = "training") -> Inspection:
    """Return the data that a run of this recipe uses. No weights are loaded.

    Args:
        recipe: the recipe, which is not changed.
        number: examples to show: of each class and source, as far as the number goes, else evenly spaced.
        split: the split of these examples.

    Raises:
        InputError: as a run does, for data or settings that it refuses. For windows that need more examples
            than there are, the line is `refused` of the inspection.
    """
    recipe = recipe.weightless()
    check_settings(type(recipe), recipe.config)
    recipe, training, validation = load_data(recipe)
    check_best_metric(recipe.config, recipe.baseline(training, validation))
    refused, one_each = None, Bound(micro_batch_size=1)
    try:
        effective_batch_size(recipe.config.batch, len(training))
    except InputError as error:  # the examples are shown in one window
        refused = str(error)
        recipe = recipe.with_config(with_settings(recipe.config, {"batch.effective": len(training)}))
    windows = make_windows(recipe, training, validation, Accelerator(cpu=True), one_each)
    with torch.device("meta"):
        empty = recipe.empty_model()
    check_inputs(recipe, empty, training, validation)
    splits, shown = (training, validation), SPLITS.index(split)
    sources = (recipe.sources, recipe.validation_sources)[shown]
    numbers = choose_examples(_kinds(recipe, splits[shown], sources), number)
    reading = recipe.reading
    return Inspection(
        lines=data_lines(recipe, len(training), len(validation))
        + ([("tokens", recipe.tokens_are)] if recipe.tokens_are else []),
        format=reading.notes.get("format", []),
        files=reading.files,
        rows=dict(zip(SPLITS, map(len, splits), strict=True)),
        columns=_columns(recipe, reading.columns),
        columns_of_sources={
            source: _columns(recipe, names, given)
            for (source, names), given in zip(reading.of_sources.items(), recipe.data.mixture, strict=False)
        },
        kind_of_labels=kind_of_labels(recipe, training[0]),
        labels={name: count_labels(recipe, rows) for name, rows in zip(SPLITS, splits, strict=True)},
        lengths={
            name: _lengths(recipe, rows, loader)
            for name, rows, loader in zip(SPLITS, splits, windows, strict=True)
        },
        truncated=reading.truncated,
        duplicates=_duplicates(recipe, splits, windows),
        split=split,
        examples=list(_decoded(recipe, splits[shown], windows[shown], numbers, sources, split)),
        refused=refused,
    )


def _kinds(recipe: Recipe, dataset: Dataset, sources: Sequence[str] | None) -> list[tuple[Any, ...]]:
    """Return the source and the classes of each example. Only these decide which examples are shown."""
    kind = kind_of_labels(recipe, dataset[0])
    classes: Any = [()] * len(dataset)
    if kind == "answers":
        classes = [(answer,) for answer in _have_answers(recipe, dataset)]
    elif kind == "classes":
        classes = [(label,) for label in dataset["labels"][:]]
    elif kind == "sets":
        classes = [np.flatnonzero(np.asarray(labels) > 0) for labels in dataset["labels"][:]]
    names = [("source", source) for source in sources] if sources else [None] * len(dataset)
    return [(name, *of_example) for name, of_example in zip(names, classes, strict=True)]


def choose_examples(kinds: Sequence[tuple[Any, ...]], number: int) -> list[int]:
    """Return the numbers of examples that are evenly spaced, or of kinds that the others do not have.

    Args:
        kinds: What each example shows, such as its source and its class.
        number: The number of examples to choose.
    """
    if number >= len(kinds):
        return [*range(len(kinds))]
    groups = {kind: place for place, kind in enumerate(dict.fromkeys(kinds))}
    of_examples = np.array([groups[kind] for kind in kinds])
    is_free, seen, chosen = np.ones(len(kinds), bool), set(), []
    for place in range(number):
        new = np.array([len({*kind} - seen) for kind in groups])[of_examples]
        best = np.flatnonzero(is_free & (new == new[is_free].max()))
        after = np.searchsorted(best, len(kinds) * place // number)
        example = int(best[after % len(best)])
        chosen.append(example)
        is_free[example] = False
        seen |= {*kinds[example]}
    return sorted(chosen)


def _columns(
    recipe: Recipe, columns: Sequence[str], source: Mapping[str, Any] | None = None
) -> dict[str, str | None]:
    """Return each column with its setting. A source of a mixture may name columns of its own."""
    settings, own = {}, {}
    for key in (field.name for field in fields(recipe.data)):
        value = getattr(recipe.data, key)
        if key.endswith("_columns") and isinstance(value, str | list):
            settings |= dict.fromkeys(as_list(value), f"data.{key}")
        elif key.endswith("_column") and isinstance(value, str):
            settings |= dict.fromkeys((value.partition(".")[0], value), f"data.{key}")
            if source and key in source:
                settings[value], own[value] = key, source[key]
    used = recipe.reading.used
    return {
        own.get(name, name): settings.get(name, "") if used is None or name in used else None
        for name in columns
        if name != FAULT
    }


def _lengths(recipe: Recipe, dataset: Dataset, windows: WindowLoader) -> dict[str, LengthSummary]:
    """Return the lengths of each input."""
    columns = windows.tokens.T
    names = [name.removesuffix(f"_{TOKENS}") for name in dataset.column_names if name.endswith(f"_{TOKENS}")]
    if len(names) != len(columns):
        names = [f"input {number}" for number in range(1, len(columns) + 1)]
    if len(columns) == 1:
        names = ["tokens"]
    elif len(columns) == 2 and is_encoder_decoder(recipe):
        names = ["source", "target"]
    return dict(zip(names, map(summarise, columns), strict=True))


def summarise(lengths: np.ndarray) -> LengthSummary:
    """Return the summary of lengths, with bins of equal width."""
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // BINS))
    counts = np.bincount((lengths - low) // width)
    bins = [(low + width * i, min(high, low + width * (i + 1) - 1), int(n)) for i, n in enumerate(counts)]
    return LengthSummary(
        low, float(np.median(lengths)), float(np.percentile(lengths, 95)), high, histogram=bins
    )


def count_labels(recipe: Recipe, dataset: Dataset) -> dict[str, float]:
    """Return the number of examples, or of tokens, with each label; of numbers, their range."""
    kind, names = kind_of_labels(recipe, dataset[0]), label_names(recipe) or []
    if kind == "answers":
        return _count_answers(recipe, dataset)
    if kind in ("", "targets"):
        return {}
    columns = list(_label_columns(dataset))
    if kind == "numbers":
        values = np.concatenate(columns)
        ranges = {"min": values.min(), "median": np.median(values), "max": values.max()}
        return {name: float(value) for name, value in ranges.items()}
    if kind == "sets":
        counts = sum((column.reshape(-1, len(names)) > 0).sum(0) for column in columns)
    else:
        learned = [column[column != IGNORED] for column in columns]
        if kind == "tokens":
            number = sum(map(len, learned))
            return {LEARNED: number, NOT_LEARNED: sum(map(len, columns)) - number}
        counts = sum(np.bincount(column, minlength=len(names)) for column in learned)
    return dict(zip(names, np.asarray(counts).tolist(), strict=True))


def _label_columns(dataset: Dataset) -> Iterator[np.ndarray]:
    """Yield the labels of some thousand examples each, without the borders of lists."""
    tables: Any = dataset.select_columns("labels").with_format("arrow").iter(batch_size=10_000)
    for table in tables:
        values = table["labels"].combine_chunks()
        yield np.asarray(pc.list_flatten(values) if is_list(dataset.features["labels"]) else values)


def _count_answers(recipe: Recipe, dataset: Dataset) -> dict[str, float]:
    """Return the number of examples with and without an answer."""
    number = sum(_have_answers(recipe, dataset))
    without = len(dataset) - number
    return {"answer": number, **({NO_ANSWER: without} if without else {})}


def _have_answers(recipe: Recipe, dataset: Dataset) -> list[bool]:
    examples: Any = dataset.select_columns([TOKENS, "start_positions", "end_positions"])
    return [bool(answer_tokens(recipe, example)) for example in examples]


def _duplicates(
    recipe: Recipe, splits: Sequence[Dataset], windows: Sequence[WindowLoader]
) -> dict[str, EqualExamples]:
    """Return the repeated examples of each split, and the validation examples that are in both."""
    found = {}
    for name, pairs, split in (
        ("training", repeated_examples(splits[0]), 0),
        ("validation", repeated_examples(splits[1]), 1),
        ("both", shared_examples(splits[0], splits[1]), 1),
    ):
        found[name] = EqualExamples(len(pairs))
        if pairs:
            first, dataset = pairs[0][0], splits[split]
            row = dataset[first]  # without masks, which differ
            example = decode_example(recipe, first, row, row, windows[split].tokens[first])
            text = " | ".join(part.text for part in example.texts)
            found[name] = EqualExamples(len(pairs), *pairs[0], text)
    return found


def _decoded(
    recipe: Recipe,
    dataset: Dataset,
    windows: WindowLoader,
    numbers: Sequence[int],
    sources: Sequence[str] | None,
    split: str,
) -> Iterator[DecodedExample]:
    weights = recipe.example_weights if split == "training" else None
    examples: list[Mapping[str, Any]] = windows.examples(numbers)
    for number, example in zip(numbers, examples, strict=True):
        found = decode_example(recipe, number, example, dataset[number], windows.tokens[number])
        weight = None if weights is None else float(weights[number])
        yield replace(found, weight=weight, source=sources[number] if sources else None)
