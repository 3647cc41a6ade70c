"""Rows that a task cannot learn from: one line that names the first, or all left out, counted and said.

Rows are counted from 1 as in the user's file, also after a shuffle. What is wrong with a row is for the
recipe to say; columns of texts and of class labels are `columns.py`'s.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from gradacc_hf.data.columns import file_rows, select_rows
from gradacc_hf.errors import refuse

Problem = Callable[[Mapping[str, Any]], str | None]
"""A row → what is wrong with it, or None: "3 tags for 4 tokens"."""


def check_rows(
    dataset: Dataset,
    problem: Problem,
    *,
    key: str,
    on_bad_row: Literal["error", "skip"] = "error",
    split: str = "training",
    numbers: Sequence[int] | np.ndarray | None = None,
) -> tuple[Dataset, list[str]]:
    """Return the rows without a problem, and a line about each bad row.

    key: the setting that a message names.
    on_bad_row: "error" raises InputError at the first bad row; "skip" leaves it out.
    split: what the rows are called.
    numbers: the number of each row in its file, from 0, where `dataset` is no longer the file itself.
    Raises InputError where no row is left.
    """
    numbers = file_rows(dataset) if numbers is None else numbers
    kept, bad = [], []
    for start in range(0, len(dataset), 1000):
        columns = dataset[start : start + 1000]
        for index, values in enumerate(zip(*columns.values(), strict=True), start=start):
            found = problem(dict(zip(columns, values, strict=True)))
            if found is None:
                kept.append(index)
                continue
            bad.append(f"{split} row {numbers[index] + 1:,}: {found}")
            if on_bad_row == "error":
                refuse(key, bad[0], "correct it, or leave such rows out: --data.on_bad_row skip")
    if not kept:
        refuse(key, f"none of the {len(dataset):,} {split} rows can be used ({bad[0]}, …)", "give others")
    return select_rows(dataset, kept) if bad else dataset, bad
