"""A mixture of sources: `data.train` as a list of mappings, each with a source, a weight, and settings.

Each source is read as if it were alone. The rows of all sources become one data set, with the number of the
source in column `SOURCE`. A recipe keeps the columns of `CARRIED`, so that examples have them, too.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from gradacc_hf.data.bad_rows import check_rows
from gradacc_hf.data.columns import file_rows, require_column, select_rows, with_column
from gradacc_hf.data.loading import Convert, Splits
from gradacc_hf.data.mixed import joined
from gradacc_hf.data.places import join_files
from gradacc_hf.data.reading import Reading, counted
from gradacc_hf.errors import listed, refuse

SOURCE, WEIGHT = "_source", "_weight"
CARRIED = (SOURCE, WEIGHT)
"""Columns of rows that a recipe keeps: the number of the source, and the weight in the loss."""
OF_READERS = ("config_name", "separator", "encoding", "rows_key", "sheet")
"""Settings of `data` that a source may have for itself, beside `validation`, `format` and columns."""


def renamed(renames: Mapping[str, str], keys: Mapping[str, str], convert: Convert | None) -> Convert:
    """Return a conversion that gives columns of a source the names of the recipe's settings first.

    Args:
        renames: The column of the recipe by column of the source.
        keys: The setting of each column of the source, which messages name.
        convert: The conversion of the recipe.
    """

    def convert_renamed(rows: Dataset) -> tuple[Dataset, str | None]:
        for own in renames:
            require_column(rows, own, keys[own])
        replaced = {*renames.values()} - {*renames}
        rows = rows.remove_columns([name for name in rows.column_names if name in replaced])
        rows = rows.rename_columns(dict(renames))
        return convert(rows) if convert else (rows, None)

    return convert_renamed


def join_sources(names: Sequence[str], found: Sequence[Splits]) -> tuple[Splits, list[list[str]], bool]:
    """Return the rows of all sources as one data set, source after source.

    Args:
        names: The name of each source.
        found: The rows of each source.

    Returns:
        The rows, the columns of each source, and whether the sources have validation rows of their own. If
        all name the same validation file, they have not, and these rows are there once.
    """
    reading = Reading()
    for splits in found:
        reading.files += [file for file in splits.reading.files if file not in reading.files]
        for name, text in ((name, text) for name, texts in splits.reading.notes.items() for text in texts):
            reading.note(name, text)
        for name, lines in splits.reading.merged.items():
            reading.merged.setdefault(name, []).extend(lines)
        reading.refused |= splits.reading.refused
        reading.kept_together = splits.reading.kept_together or reading.kept_together
    shared = len({splits.source for splits in found}) == 1 and not any(splits.held_out for splits in found)
    if shared:  # in the format of the first source
        validation = with_column(found[0].validation, SOURCE, np.zeros(len(found[0].validation), np.int64))
    else:
        validation = _joined(names, [splits.validation for splits in found], reading)
    texts = [splits.source.removeprefix("validation: ") for splits in found]
    text = "; ".join(f"{name}: {text}" for name, text in zip(names, texts, strict=True))
    train = _joined(names, [splits.train for splits in found], reading)
    every = dict.fromkeys((*train.column_names, *validation.column_names))
    reading.columns = [name for name in every if name != SOURCE]
    reading.of_sources = {name: [*splits.reading.columns] for name, splits in zip(names, found, strict=True)}
    source = found[0].source if shared else f"validation: {text}"
    columns = [splits.train.column_names for splits in found]
    return Splits(train, validation, False, source, reading), columns, not shared


def _joined(names: Sequence[str], parts: Sequence[Dataset], reading: Reading) -> Dataset:
    """Return the rows of all sources, with the number of the source. Messages can name the line of a row."""
    tables = [Dataset(part.data, info=part.info.copy()) for part in parts]
    rows, lines, classes = joined([(Path(name), table) for name, table in zip(names, tables, strict=True)])
    for column, line in lines.items():
        reading.merged.setdefault(column, []).append(line)
    for column, line in classes.items():
        reading.refused[column] = ("data.train", line, "write labels as text")
    join_files(rows, list(zip(names, tables, strict=True)))
    sizes = [len(table) for table in tables]
    starts = np.cumsum([0, *sizes[:-1]])
    rows = with_column(rows, SOURCE, np.repeat(np.arange(len(parts)), sizes))
    kept = [file_rows(part) + start for part, start in zip(parts, starts, strict=True)]
    return select_rows(rows, np.concatenate(kept).tolist())


def first_of_each(rows: Dataset, number: int | None) -> list[int]:
    """Return the numbers of the first rows, `number` in all (None: every row), as many of each source."""
    sources = rows[SOURCE] if SOURCE in rows.column_names else [0] * len(rows)
    seen = Counter[int]()
    turns = []
    for row, source in enumerate(sources):
        turns.append((seen[source], row))
        seen[source] += 1
    return sorted(row for _, row in sorted(turns)[:number])


def weighed(rows: Dataset, column: str, on_bad_row: Any) -> tuple[Dataset, list[str]]:
    """Return rows with the number in a column as `WEIGHT`, and a line about each row that was left out.

    Raise InputError for a row whose weight is not a number of 0 or more.
    """
    require_column(rows, column, "data.weight_column")

    def problem(row: Mapping[str, Any]) -> str | None:
        value = "empty" if row[column] in (None, "") else repr(row[column])
        found = f"column {column!r} is {value}: allowed are 0 or more"
        return None if _number(row[column]) >= 0 else found

    weights = rows.select_columns(column)
    kept, lines = check_rows(weights, problem, key="data.weight_column", on_bad_row=on_bad_row)
    left = np.flatnonzero(np.isin(file_rows(rows), file_rows(kept)))
    rows = select_rows(rows, left.tolist()) if len(left) < len(rows) else rows
    numbers = np.array([_number(value) for value in rows[column]], np.float64)
    if not numbers.any():
        found = f"all {counted(len(rows), 'row')} have the weight 0"
        refuse("data.weight_column", found, "one must be above 0")
    return with_column(rows, WEIGHT, numbers), lines


def weights_note(column: str, weights: np.ndarray) -> str:
    """Return a line about the weights of examples: their number, range and mean, and the weights of 0."""
    low, mean, high = weights.min(), weights.mean(), weights.max()
    none = f", {int((weights == 0).sum()):,} of weight 0" if low == 0 else ""
    return f"{column}: {counted(len(weights), 'example')}, {low:g} to {high:g}, mean {mean:.3g}{none}"


def _number(value: Any) -> float:
    """Return a number, or the number that a text stands for; −1 for any other value."""
    try:
        found = float(value) if not isinstance(value, bool) else -1.0
    except (TypeError, ValueError):
        return -1.0
    return found if np.isfinite(found) else -1.0


def carried(dataset: Dataset) -> list[str]:
    """Return the columns of a data set that a recipe keeps."""
    return [name for name in CARRIED if name in dataset.column_names]


def mixture_note(names: Sequence[str], counts: Sequence[int], shares: Mapping[str, str]) -> list[str]:
    """Return a line about each source: its examples, its share, and how often they come in an epoch."""
    total, whole = sum(counts), sum(map(float, shares.values()))
    lines = []
    for name, count in zip(names, counts, strict=True):
        share = float(shares[name]) / whole
        often = f"each {share * total / count:.2f} times an epoch"
        lines.append(f"{name}: {counted(count, 'example')}, {share:.1%} of every window, {often}")
    return lines


def no_examples(names: Sequence[str], counts: Sequence[int]) -> None:
    """Raise InputError for a source without examples."""
    if empty := [name for name, count in zip(names, counts, strict=True) if not count]:
        refuse("data.train", f"{listed(empty)} has no example that can be used", "give others, or remove it")
