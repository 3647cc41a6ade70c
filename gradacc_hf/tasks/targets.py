"""What a model is taught to say of an input: one of some classes, any number of labels, or a number.

A `Target` knows its column of labels: what is wrong with a row's label, what the model's config and loss are,
how good predictions are, and which answer is the best that looks at no input. Shared by the recipes that
label texts and images.
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
    """The labels of a task. `encode` replaces their column by `label`, as numbers, and finds their names."""

    def __init__(self, train: Dataset, validation: Dataset, column: str):
        """Raises InputError where a data set has no such column."""
        for split in (train, validation):
            require_column(split, column, KEY)
        self.column, self.feature = column, train.features[column]
        self.names: list[str] = []

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """For `check_rows`: what is wrong with a row's label."""
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
        """Both with a column `label` of what `loss` compares with, a row each.

        Raises InputError, also for a validation row with a label that no training row has; with a list
        `skipped`, such a row is left out, and said there.
        """

    @abstractmethod
    def model_overrides(self) -> dict[str, Any]:
        """What the model's config says of its outputs."""

    @abstractmethod
    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean over rows. logits: (rows, outputs); labels: as `encode` made them."""

    @abstractmethod
    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """How good these predictions are. Shapes as in `loss`."""

    @abstractmethod
    def constant(self, labels: np.ndarray) -> np.ndarray:
        """The logits, (outputs,), of the best answer to these labels that looks at no input."""

    def baseline(self, train: Sequence[Any], validation: Sequence[Any]) -> dict[str, float]:
        """The metrics on validation labels of the answer that is the best to the training labels."""
        answer = self.constant(np.asarray(train))
        return self.metrics(np.tile(answer, (len(validation), 1)), np.asarray(validation))


class SingleLabel(Target):
    """One of some classes. Labels are strings, integers, booleans or a ClassLabel."""

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
        """The mean over rows of the cross-entropy; `weights`, (classes,), weigh rows by their class."""
        weights = None if weights is None else weights.to(logits)
        return torch.nn.functional.cross_entropy(logits, labels, weights)

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return _scores(("accuracy", "f1", "matthews_correlation"), logits.argmax(-1), labels)

    def constant(self, labels: np.ndarray) -> np.ndarray:
        majority = Counter(labels.tolist()).most_common(1)[0][0]
        return np.eye(len(self.names))[majority]


class MultiLabel(Target):
    """Any number of labels. A row has a list of strings, of integers or of a ClassLabel; it may be empty."""

    def __init__(self, train: Dataset, validation: Dataset, column: str):
        """Raises InputError where a data set has no such column of lists."""
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
        """The labels of each row; validation's ids may be in another order than training's."""
        names = class_names(dataset, self.column)
        return [labels_as_text(labels, names) for labels in dataset[self.column]]

    def _encode(self, dataset: Dataset) -> Dataset:
        rows = [[float(name in labels) for name in self.names] for labels in self._texts(dataset)]
        return with_label(dataset, self.column, np.array(rows, np.float32))

    def model_overrides(self) -> dict[str, Any]:
        return {**_names(self.names), "problem_type": "multi_label_classification"}

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean over rows of the binary cross-entropy, which is itself a mean over labels."""
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return _scores(("multi_label",), (logits > 0).astype(int), labels.astype(int))

    def constant(self, labels: np.ndarray) -> np.ndarray:
        """The set of labels that is the most frequent."""
        majority = Counter(map(tuple, labels.tolist())).most_common(1)[0][0]
        return np.asarray(majority) - 0.5


class Regression(Target):
    """A number. Labels are numbers, or strings of them."""

    def __init__(self, train: Dataset, validation: Dataset, column: str):
        """Raises InputError where a data set has no such column of numbers."""
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
        """The mean over rows of the squared error."""
        return torch.nn.functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return _scores(("pearsonr", "spearmanr", "mse"), logits[:, 0], labels)

    def constant(self, labels: np.ndarray) -> np.ndarray:
        return labels.mean(keepdims=True)


TARGETS = {"single_label": SingleLabel, "multi_label": MultiLabel, "regression": Regression}
"""`data.problem` → what it makes of the labels."""


def answers(logits: torch.Tensor, config: Any) -> list[dict[str, Any]]:
    """What a saved model says, a dict a row, by the problem in its config. logits: (rows, outputs).

    One class: label, score (its probability) and scores of all; several: labels (those above 0.5) and scores;
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
    """One weight a class, in the order of `names`; None where all weigh 1.

    setting: none, balanced (1 / its frequency among `labels`, which are class ids), or "spam=5,ham=1".
    Raises InputError.
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
    """A label as a number; NaN where it is none."""
    try:
        return float(label)
    except (TypeError, ValueError):
        return math.nan
