"""Whether integer labels in lists are one label per token, or several labels per example."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow.compute
from datasets import Dataset

from gradacc_hf.data.columns import is_list
from gradacc_hf.errors import refuse

pc: Any = pyarrow.compute  # the functions are made at import, so type checkers do not know them


def labels_per(examples: Sequence[Mapping[str, Any]]) -> Literal["token", "example"] | None:
    """Return what the integer labels of these examples are for; None for labels of any other kind.

    Raises InputError for lists of labels that fit neither.
    """
    labels = [np.asarray(example.get("labels", 0)) for example in examples]
    if labels[0].ndim != 1 or labels[0].dtype.kind != "i" or "input_ids" not in examples[0]:
        return None
    return _decide([len(one) for one in labels], [len(example["input_ids"]) for example in examples])


def find_labels_per(dataset: Dataset) -> Literal["token", "example"] | None:
    """Return what the integer labels of a data set are for; None for labels of any other kind.

    Raises InputError for lists of labels that fit neither.
    """
    if not isinstance(dataset, Dataset) or not {"labels", "input_ids"} <= {*dataset.column_names}:
        return None
    kind = dataset.features["labels"]
    if not is_list(kind) or not getattr(kind.feature, "dtype", "").startswith("int"):
        return None
    sizes: dict[str, list[int]] = {"labels": [], "input_ids": []}
    tables: Any = dataset.select_columns([*sizes]).with_format("arrow").iter(batch_size=10_000)
    for table in tables:
        for name, found in sizes.items():
            found += pc.list_value_length(table[name]).to_pylist()
    return _decide(sizes["labels"], sizes["input_ids"]) if sizes["labels"] else None


def _decide(labels: Sequence[int], tokens: Sequence[int]) -> Literal["token", "example"]:
    if [*labels] == [*tokens]:
        return "token"
    if len({*labels}) == 1:
        return "example"
    found = (
        f"found lists of {min(labels)} to {max(labels)} integers for {min(tokens)} to {max(tokens)} tokens"
    )
    allowed = "one label per token, or the same number of labels for all examples; or define collate()"
    refuse("labels", found, f"allowed: {allowed}")
