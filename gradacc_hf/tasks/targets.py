"""Targets of a model: a class, any number of labels, or a number.

A `Target` checks and encodes the column of labels. It has the model's config, the loss, the metrics and the
baseline for them. The recipes that label texts and images share it.
"""

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Value

from gradacc_hf.data.columns import (
    class_names,
    drop_unknown,
    encode_labels,
    file_rows,
    is_list,
    labels_as_text,
    require_column,
    with_label,
)
from gradacc_hf.errors import listed, refuse

KEY = "data.label_column"


class Target(ABC):
    """The labels of a task. `encode` replaces the column by `label`, with numbers, and finds the names."""

    def __init__(self, train: Dataset, validation: Dataset, column: str):
        """Raise InputError if a data set has no such column."""
        for split in (train, validation):
            require_column(split, column, KEY)
        self.column, self.feature = column, train.features[column]
        self.names: list[str] = []

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """Return the problem of a row's label, or None, for `check_rows`."""
        label = row[self.column]
        if label is None:
            return f"column {self.column!r} is empty"
        if isinstance(self.feature, ClassLabel) and label == -1:
            return f"column {self.column!r} is −1, a label that is withheld"
        return None

    @abstractmethod
    def encode(
        self, train: Dataset, validation: Dataset, skipped: list[str] | None = None
    ) -> tuple[Dataset, Dataset]:
        """Return both data sets with a column `label`, the targets of `loss`.

        A validation row may have a label that is in no training row. With a list `skipped`, the row is left
        out and gets a line there; otherwise InputError is raised.
        """

    @abstractmethod
    def model_overrides(self) -> dict[str, Any]:
        """Return the settings of the model's config for its outputs."""

    @abstractmethod
    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean loss over rows, from logits (rows, outputs) and labels as `encode` makes them."""

    @abstractmethod
    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return the metrics of predictions. Shapes are as in `loss`."""

    @abstractmethod
    def constant(self, labels: np.ndarray) -> np.ndarray:
        """Return the logits (outputs,) of the best constant answer to these labels."""

    def baseline(self, train: Sequence[Any], validation: Sequence[Any]) -> dict[str, float]:
        """Return the metrics, on validation labels, of the best constant answer to the training labels."""
        answer = self.constant(np.asarray(train))
        return self.metrics(np.tile(answer, (len(validation), 1)), np.asarray(validation))


class SingleLabel(Target):
    """A class for each row. Labels are strings, integers, booleans or a ClassLabel."""

    def encode(
        self, train: Dataset, validation: Dataset, skipped: list[str] | None = None
    ) -> tuple[Dataset, Dataset]:
        train, validation, self.names = encode_labels(train, validation, self.column, skipped=skipped)
        return train, validation

    def model_overrides(self) -> dict[str, Any]:
        return {**_names(self.names), "problem_type": "single_label_classification"}

    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the mean cross-entropy over rows; `weights` (classes,) weigh rows by class."""
        weights = None if weights is None else weights.to(logits)
        return torch.nn.functional.cross_entropy(logits, labels, weights)

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return _scores(("accuracy", "f1", "matthews_correlation"), logits.argmax(-1), labels)

    def constant(self, labels: np.ndarray) -> np.ndarray:
        majority = Counter(labels.tolist()).most_common(1)[0][0]
        return np.eye(len(self.names))[majority]


class MultiLabel(Target):
    """Any number of labels for each row: a list of strings, integers or class ids, which may be empty."""

    def __init__(self, train: Dataset, validation: Dataset, column: str):
        """Raise InputError if a data set has no such column of lists."""
        super().__init__(train, validation, column)
        for split in (train, validation):
            if not is_list(feature := split.features[column]):
                found = getattr(feature, "dtype", None) or type(feature).__name__
                cure = f'write lists (JSONL: {{"{column}": ["a", "b"]}}), or set data.problem to single_label'
                refuse(KEY, f"column {column!r} holds {found}, not lists of labels", cure)

    def problem(self, row: Mapping[str, Any]) -> str | None:
        labels = row[self.column]
        if labels is not None and None in labels:
            return f"column {self.column!r} has an empty label among {len(labels)}"
        if labels is not None and isinstance(self.feature.feature, ClassLabel) and -1 in labels:
            return f"column {self.column!r} has −1, a label that is withheld, among {len(labels)}"
        return super().problem(row)

    def encode(
        self, train: Dataset, validation: Dataset, skipped: list[str] | None = None
    ) -> tuple[Dataset, Dataset]:
        known = class_names(train, self.column)
        if known is None:
            known = sorted({label for labels in train[self.column] for label in labels})
        self.names = [str(label) for label in known]
        if not known:
            refuse(KEY, "no training row has a label", "at least one row must have one")
        if not all(isinstance(label, str | int) for label in known):
            refuse(KEY, f"a label is {known[0]!r}", "labels are all strings, or all integers")
        unknown = {}
        for row, labels in enumerate(self._texts(validation)):
            if absent := sorted({*labels} - {*self.names}):
                unknown[row] = f"label {absent[0]!r} of validation row {file_rows(validation)[row] + 1:,}"
        if unknown:
            validation = drop_unknown(validation, [*unknown], [*unknown.values()], KEY, skipped)
        return self._encode(train), self._encode(validation)

    def _texts(self, dataset: Dataset) -> list[list[str]]:
        """Return the labels of each row as text: class ids of both data sets may be in different orders."""
        names = class_names(dataset, self.column)
        return [labels_as_text(labels, names) for labels in dataset[self.column]]

    def _encode(self, dataset: Dataset) -> Dataset:
        rows = [[float(name in labels) for name in self.names] for labels in self._texts(dataset)]
        return with_label(dataset, self.column, np.array(rows, np.float32))

    def model_overrides(self) -> dict[str, Any]:
        return {**_names(self.names), "problem_type": "multi_label_classification"}

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean binary cross-entropy over rows and labels."""
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return _scores(("multi_label",), (logits > 0).astype(int), labels.astype(int))

    def constant(self, labels: np.ndarray) -> np.ndarray:
        """Return logits of the most frequent set of labels."""
        majority = Counter(map(tuple, labels.tolist())).most_common(1)[0][0]
        return np.asarray(majority) - 0.5


class Regression(Target):
    """A number for each row. Labels are numbers, or strings of numbers."""

    def __init__(self, train: Dataset, validation: Dataset, column: str):
        """Raise InputError if a data set has no such column of numbers."""
        super().__init__(train, validation, column)
        for split in (train, validation):
            feature = split.features[column]
            if not isinstance(feature, Value) or feature.dtype == "bool":
                found = getattr(feature, "dtype", None) or type(feature).__name__
                refuse(
                    KEY,
                    f"column {column!r} holds {'classes' if isinstance(feature, ClassLabel) else found}",
                    "data.problem regression is for numbers; set it to single_label or multi_label",
                )

    def problem(self, row: Mapping[str, Any]) -> str | None:
        found = super().problem(row)
        if found is None and not math.isfinite(_number(row[self.column])):
            found = f"column {self.column!r}: {row[self.column]!r} is not a number"
        return found

    def encode(
        self, train: Dataset, validation: Dataset, skipped: list[str] | None = None
    ) -> tuple[Dataset, Dataset]:
        def encode(dataset: Dataset) -> Dataset:
            numbers = [_number(label) for label in dataset[self.column]]
            return with_label(dataset, self.column, np.array(numbers, np.float32))

        return encode(train), encode(validation)

    def model_overrides(self) -> dict[str, Any]:
        return {**_names([self.column]), "problem_type": "regression"}

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error over rows."""
        return torch.nn.functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return _scores(("pearsonr", "spearmanr", "mse"), logits[:, 0], labels)

    def constant(self, labels: np.ndarray) -> np.ndarray:
        return labels.mean(keepdims=True)


TARGETS = {"single_label": SingleLabel, "multi_label": MultiLabel, "regression": Regression}
"""`data.problem` → the class of its target."""


def answers(logits: torch.Tensor, config: Any) -> list[dict[str, Any]]:
    """Return the answer of a saved model for each row, from its logits (rows, outputs).

    The problem in the model's config determines the keys:

    a class: label, score (the probability of the label), scores (of all labels).
    several labels: labels (with a probability above 0.5), scores.
    a number: score.
    """
    logits = logits.float().cpu()
    if config.problem_type == "regression":
        return [{"score": number} for number in logits[:, 0].tolist()]
    names = [config.id2label[i] for i in range(logits.shape[1])]
    several = config.problem_type == "multi_label_classification"
    found = []
    for row in (logits.sigmoid() if several else logits.softmax(-1)).tolist():
        scores = dict(zip(names, row, strict=True))
        if several:
            found.append({"labels": [name for name in names if scores[name] > 0.5], "scores": scores})
        else:
            best = max(names, key=scores.__getitem__)
            found.append({"label": best, "score": scores[best], "scores": scores})
    return found


def class_weights(setting: str, names: Sequence[str], labels: Sequence[int]) -> torch.Tensor | None:
    """Return one weight for each class, in the order of `names`; None if all weights are 1.

    Args:
        setting: none, balanced (1 / the frequency of the class), or "spam=5,ham=1".
        names: The names of the classes.
        labels: The class ids of the training rows.

    Raises:
        InputError: For any other setting, or if a class has no weight.
    """
    if setting == "none":
        return None
    if setting == "balanced":
        counts = Counter(labels)
        mean = counts.total() / len(counts)
        return torch.tensor([mean / max(1, counts[c]) for c in range(len(names))])
    pairs = [pair.strip().rpartition("=") for pair in setting.split(",")]
    weights = {key: float(n) if re.fullmatch(r"\d*\.?\d+", n) else 0.0 for key, _, n in pairs}
    if sorted(weights) != sorted(names) or not all(weights.values()):
        refuse(
            "data.class_weights",
            f"found {setting!r}",
            f"allowed: none, balanced, or a number above 0 for each of {listed(names)}, "
            f"as in {names[0]}=2,{names[1]}=1",
        )
    return torch.tensor([weights[name] for name in names])


def _names(names: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def _scores(names: Sequence[str], predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    from gradacc_hf.metrics import load  # slow to import, so not before it is needed

    scores: dict[str, float] = {}
    for name in names:
        scores |= load(name).compute(predictions=predictions, references=references) or {}
    return scores


def _number(label: Any) -> float:
    """Return a label as a number; NaN if it is not one."""
    try:
        return float(label)
    except (TypeError, ValueError):
        return math.nan
