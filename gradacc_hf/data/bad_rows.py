"""Bad rows, which a task cannot use: raise an error for the first, or skip and count them.

Rows are counted from 1 as in the user's file, also after a shuffle. The recipe finds the problem of a row;
`columns.py` checks columns of texts and of class labels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from gradacc_hf.data.columns import file_rows, select_rows
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
) -> tuple[Dataset, list[str]]:
    """Return the rows without a problem, and a line about each bad row.

    Args:
        dataset: The rows.
        problem: Returns the problem of a row, or None.
        key: The setting that messages name.
        on_bad_row: "error" raises InputError at the first bad row; "skip" leaves bad rows out.
        split: The name of the rows in messages.
        numbers: The number of each row in the file, from 0, if `dataset` has lost it.

    Raises:
        InputError: If no row is left, and for a bad row with `on_bad_row` "error".
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
