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

    Raises InputError for lists of labels that fit neither, and for an example without labels.
    """
    if not isinstance(dataset, Dataset) or not {"labels", "input_ids"} <= {*dataset.column_names}:
        return None
    kind = dataset.features["labels"]
    if not is_list(kind) or not getattr(kind.feature, "dtype", "").startswith("int"):
        return None
    labels, tokens = (_sizes(dataset, name) for name in ("labels", "input_ids"))
    if None in labels:
        refuse("labels", f"example {labels.index(None)} has none", "give it labels, or leave it out")
    return _decide(labels, tokens) if labels else None


def note_on_tokens(dataset: Dataset) -> str | None:
    """Return a line for the plan if labels of tokens could also be several labels per example."""
    sizes = {*_sizes(dataset, "labels")}
    if len(sizes) != 1:
        return None
    found = f"treated as labels of {min(sizes)} tokens, as every example has this many"
    return f"{found}; labels_per in the recipe overrules it"


def _sizes(dataset: Dataset, name: str) -> list[Any]:
    """Return the length of the list in each row of a column; None for a row without one."""
    tables: Any = dataset.select_columns([name]).with_format("arrow").iter(batch_size=10_000)
    return [size for table in tables for size in pc.list_value_length(table[name]).to_pylist()]


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
