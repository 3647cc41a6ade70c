"""Bad rows, which a task cannot use: raise an error for the first, or skip and count them.

Rows are counted from 1 as in the user's file, also after a shuffle. The recipe finds the problem of a row;
`columns.py` checks columns of texts and of class labels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from gradacc_hf.data.columns import file_rows, select_rows
from gradacc_hf.data.looks_like import looks_like
from gradacc_hf.data.places import places
from gradacc_hf.errors import refuse

Problem = Callable[[Mapping[str, Any]], str | None]
"""Row → problem of the row, such as "3 tags for 4 tokens", or None."""


def check_rows(
    dataset: Dataset,
    problem: Problem,
    *,
    key: str,
    on_bad_row: Literal["error", "skip"] = "error",
    split: str = "training",
    numbers: Sequence[int] | np.ndarray | None = None,
    others: tuple[Dataset, Sequence[int] | np.ndarray | None] | None = None,
) -> tuple[Dataset, list[str]]:
    """Return the rows without a problem, and a line about each bad row, in the order of the file.

    Args:
        dataset: The rows.
        problem: Returns the problem of a row, or None.
        key: The setting that messages name.
        on_bad_row: "error" raises InputError for the first bad row of the file; "skip" leaves bad rows out.
        split: The name of the rows in messages.
        numbers: The number of each row in the file, from 0, if `dataset` has lost it.
        others: Further rows of the same file with their numbers. An error counts and names them, too.

    Raises:
        InputError: If no row is left, and for a bad row with `on_bad_row` "error".
    """
    bad = _bad_rows(dataset, problem, numbers)
    if bad and on_bad_row == "error":
        found = [*bad.values(), *(_bad_rows(others[0], problem, others[1]).values() if others else ())]
        number, first = min(found)
        more = f" (the first of {len(found):,} bad rows)" if len(found) > 1 else ""
        if len(found) == len(dataset) + (len(others[0]) if others else 0) > 1:
            more = f" (all {len(found):,} rows are bad{_format(dataset)})"
        cure = "correct it, or leave such rows out: --data.on_bad_row skip"
        refuse(key, f"{places(dataset, [number], split)[0]}: {first}{more}", cure)
    in_order = sorted(bad.values())
    where = places(dataset, [number for number, _ in in_order], split)
    lines = [f"{place}: {found}" for place, (_, found) in zip(where, in_order, strict=True)]
    if len(bad) == len(dataset):
        found = f"none of the {len(dataset):,} {split} rows can be used{_format(dataset)} ({lines[0]}, …)"
        refuse(key, found, "give others")
    kept = [index for index in range(len(dataset)) if index not in bad]
    return select_rows(dataset, kept) if bad else dataset, lines


def _format(rows: Dataset) -> str:
    first: Any = rows.with_format("arrow")[:3]  # images are not decoded
    name = looks_like(rows.column_names, first.to_pylist())
    return f"; they look like {name}" if name else ""


def _bad_rows(
    dataset: Dataset, problem: Problem, numbers: Sequence[int] | np.ndarray | None
) -> dict[int, tuple[int, str]]:
    """Return the number in the file, from 0, and the problem of each bad row, by index."""
    numbers = file_rows(dataset) if numbers is None else numbers
    bad = {}
    for start in range(0, len(dataset), 1000):
        columns = dataset[start : start + 1000]
        for index, values in enumerate(zip(*columns.values(), strict=True), start=start):
            if (found := problem(dict(zip(columns, values, strict=True)))) is not None:
                bad[index] = int(numbers[index]), found
    return bad
