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

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.data.columns import (
    class_names,
    drop_unknown,
    encode_labels,
    file_rows,
    in_file_order,
    is_list,
    labels_as_text,
    require_column,
    with_label,
)
from gradacc_hf.data.files import FAULT
from gradacc_hf.data.places import places
from gradacc_hf.errors import listed, refuse
from gradacc_hf.recipe.labels import SHOWN, Labels, match_labels
from gradacc_hf.tasks.details import (
    Table,
    Texts,
    class_mistakes,
    class_tables,
    label_mistakes,
    label_tables,
    largest_errors,
)

KEY = "data.label_column"


class Target(ABC):
    """The labels of a task. `encode` replaces the column by `label`, with numbers, and finds the names."""

    def __init__(self, train: Dataset, validation: Dataset, column: str, given: Sequence[str] = ()):
        """Raise InputError if a data set has no such column. The label names may be `given`, in order."""
        for split in (train, validation):
            require_column(split, column, KEY)
        self.column, self.feature, self.given = column, train.features[column], list(given)
        self.labels = Labels([], {})
        self.in_training: list[int] | None = None  # training rows of each label

    @property
    def names(self) -> list[str]:
        """The label names of the model, by id."""
        return self.labels.names

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """Return the problem of a row's label, or None, for `check_rows`."""
        label = row[self.column]
        if label is None or label != label:  # NaN
            return f"column {self.column!r} is empty"
        if isinstance(self.feature, ClassLabel) and label == -1:
            return f"column {self.column!r} is −1, a label that is withheld"
        return None

    @property
    def are_known(self) -> bool:
        """Whether the label names are known without reading all rows."""
        return bool(self.given)

    @abstractmethod
    def ids(self, labels: Sequence[Any]) -> list[Any]:
        """Return the targets of labels without a problem, as `encode` makes them. Call it after `encode`."""

    def _unknown(self, texts: Sequence[str]) -> str | None:
        """Return the problem of labels, if names are given and one label has another, or None."""
        odd = next((text for text in texts if self.given and text not in self.given), None)
        return None if odd is None else f"label {odd!r} is not in data.labels ({listed(self.given[:SHOWN])})"

    @abstractmethod
    def encode(
        self,
        train: Dataset,
        validation: Dataset,
        skipped: list[str] | None = None,
        own: Sequence[str] | None = None,
    ) -> tuple[Dataset, Dataset]:
        """Return both data sets with a column `label`, the targets of `loss`. Set `labels`.

        A validation row may have a label that is in no training row. With a list `skipped`, the row is left
        out and gets a line there; otherwise InputError is raised.

        Args:
            train: Training rows.
            validation: Validation rows.
            skipped: Receives a line about each row that is left out.
            own: The label names of the model, by id; None if it has none.
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

    def describe(
        self, logits: np.ndarray, labels: np.ndarray, texts: Texts, what: str = "text"
    ) -> list[Table]:
        """Return tables about predictions for the report. Shapes are as in `loss`.

        Args:
            logits, labels: predictions and targets.
            texts: numbers of rows → what the rows show.
            what: the name of what they show.
        """
        return []

    def baseline(self, train: Sequence[Any], validation: Sequence[Any]) -> dict[str, float]:
        """Return the metrics, on validation labels, of the best constant answer to the training labels."""
        answer = self.constant(np.asarray(train))
        return self.metrics(np.tile(answer, (len(validation), 1)), np.asarray(validation))


class SingleLabel(Target):
    """A class for each row. Labels are strings, integers, booleans or a ClassLabel."""

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """Return the problem of a row's label, or None. −100 marks a row without a label."""
        if str(row[self.column]) in (str(IGNORED), f"{IGNORED}.0"):
            return f"column {self.column!r} is −100, so it has no label"
        return super().problem(row) or self._unknown([self._text(row[self.column])])

    @property
    def are_known(self) -> bool:
        """Whether the names are given, or in the file as a ClassLabel."""
        return super().are_known or isinstance(self.feature, ClassLabel)

    def _text(self, label: Any) -> str:
        names = self.feature.names if isinstance(self.feature, ClassLabel) else ()
        if names and label in range(len(names)):  # labels of validation rows may be text
            return names[label]
        return f"{label:.0f}" if isinstance(label, float) and label.is_integer() else str(label)

    def ids(self, labels: Sequence[Any]) -> list[int]:
        """Return the class ids."""
        return [self.labels.ids[self._text(label)] for label in labels]

    def encode(
        self,
        train: Dataset,
        validation: Dataset,
        skipped: list[str] | None = None,
        own: Sequence[str] | None = None,
    ) -> tuple[Dataset, Dataset]:
        settings = {"skipped": skipped, "names": self.given}
        train, validation, found = encode_labels(train, validation, self.column, **settings)
        self.labels = match_labels(found, own, None if self.are_known else KEY)
        ids = np.array([self.labels.ids[name] for name in found])
        if (ids != np.arange(len(found))).any():
            train, validation = (
                with_label(dataset, "label", ids[np.asarray(dataset["label"])])
                for dataset in (train, validation)
            )
        self.in_training = np.bincount(train["label"], minlength=len(self.names)).tolist()
        return train, validation

    def model_overrides(self) -> dict[str, Any]:
        return {**self.labels.model_overrides(), "problem_type": "single_label_classification"}

    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the mean cross-entropy over rows; `weights` (classes,) weigh rows by class."""
        weights = None if weights is None else weights.to(logits)
        return torch.nn.functional.cross_entropy(logits, labels, weights)

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return _scores(("accuracy", "f1", "matthews_correlation"), logits.argmax(-1), labels)

    def describe(
        self, logits: np.ndarray, labels: np.ndarray, texts: Texts, what: str = "text"
    ) -> list[Table]:
        probabilities = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        tables = class_tables(self.names, logits.argmax(-1), labels, self.in_training)
        return tables + class_mistakes(self.names, probabilities, labels, texts, what)

    def constant(self, labels: np.ndarray) -> np.ndarray:
        majority = Counter(labels.tolist()).most_common(1)[0][0]
        return np.eye(len(self.names))[majority]


class MultiLabel(Target):
    """Any number of labels for each row: a list of strings, integers or class ids, which may be empty.

    Rows of equal length with only 0 and 1 (false and true) are one-hot: one number for each label.
    """

    def __init__(self, train: Dataset, validation: Dataset, column: str, given: Sequence[str] = ()):
        """Raise InputError if a data set has no such column of lists."""
        super().__init__(train, validation, column, given)
        for split in (train, validation):
            if not is_list(feature := split.features[column]):
                found = getattr(feature, "dtype", None) or type(feature).__name__
                cure = (
                    f'write lists (JSONL: {{"{column}": ["a", "b"]}}) or separate labels (a;b), or set '
                    "data.problem to single_label"
                )
                refuse(KEY, f"column {column!r} holds {found}, not lists of labels", cure)
        self.one_hot = _width_of_one_hot(train, column)

    def problem(self, row: Mapping[str, Any]) -> str | None:
        labels = row[self.column]
        if row.get(FAULT):
            return row[FAULT]
        if any(label is None or not str(label).strip() for label in labels or ()):
            return f"column {self.column!r} has an empty label among {len(labels)}"
        if labels is not None and isinstance(self.feature.feature, ClassLabel) and -1 in labels:
            return f"column {self.column!r} has −1, a label that is withheld, among {len(labels)}"
        if labels is not None and {*map(str, labels)} & {str(IGNORED), f"{IGNORED}.0"}:
            return f"column {self.column!r} has −100, the mark of a missing label, among {len(labels)}"
        if labels is not None and self.one_hot and (len(labels) != self.one_hot or {*labels} - {0, 1}):
            return (
                f"column {self.column!r} is {labels}: the training rows have {self.one_hot} numbers, 0 or 1"
            )
        names = getattr(self.feature.feature, "names", None)
        unknown = None if self.one_hot else self._unknown(labels_as_text(labels, names))
        return super().problem(row) or unknown

    @property
    def are_known(self) -> bool:
        """Whether the names are given, or in the file as class ids, or numbers of one-hot rows."""
        return super().are_known or bool(self.one_hot) or isinstance(self.feature.feature, ClassLabel)

    def ids(self, labels: Sequence[Any]) -> list[list[float]]:
        """Return 1 for each label of a row, and 0 for all others."""
        if self.one_hot:
            return self._placed(labels).tolist()
        names = getattr(self.feature.feature, "names", None)
        return self._targets([labels_as_text(of_row, names) for of_row in labels]).tolist()

    def encode(
        self,
        train: Dataset,
        validation: Dataset,
        skipped: list[str] | None = None,
        own: Sequence[str] | None = None,
    ) -> tuple[Dataset, Dataset]:
        if self.one_hot:
            return self._encode_one_hot(train, own), self._encode_one_hot(validation, own)
        known: Any = self.given or class_names(train, self.column)
        if known is None:
            known = sorted({label for labels in train[self.column] for label in labels})
        found = [str(label) for label in known]
        if not known:
            refuse(KEY, "no training row has a label", "at least one row must have one")
        if not all(isinstance(label, str | int) for label in known):
            refuse(KEY, f"a label is {known[0]!r}", "labels are all strings, or all integers")
        self.labels, unknown = match_labels(found, own), {}
        texts = self._texts(validation)
        for row in in_file_order(validation, range(len(texts))):
            if absent := sorted({*texts[row]} - {*found}):
                unknown[row] = absent[0]
        if unknown:
            where = places(validation, file_rows(validation)[[*unknown]], "validation")
            labels = [
                f"label {label!r} of {place}" for label, place in zip(unknown.values(), where, strict=True)
            ]
            validation = drop_unknown(validation, [*unknown], labels, KEY, skipped)
        return self._encode(train), self._encode(validation)

    def _texts(self, dataset: Dataset) -> list[list[str]]:
        """Return the labels of each row as text: class ids of both data sets may be in different orders."""
        names = class_names(dataset, self.column)
        return [labels_as_text(labels, names) for labels in dataset[self.column]]

    def _encode(self, dataset: Dataset) -> Dataset:
        return with_label(dataset, self.column, self._targets(self._texts(dataset)))

    def _targets(self, texts: Sequence[Sequence[str]]) -> np.ndarray:
        targets = np.zeros((len(texts), len(self.names)), np.float32)
        for row, labels in enumerate(texts):
            targets[row, [self.labels.ids[label] for label in labels]] = 1
        return targets

    def _encode_one_hot(self, dataset: Dataset, own: Sequence[str] | None) -> Dataset:
        note = f"rows of {self.one_hot} numbers, 0 or 1, are one-hot: one for each label"
        names = [str(number) for number in range(self.one_hot)]
        if self.given and len(self.given) != self.one_hot:
            refuse(
                "data.labels", f"{len(self.given)} names for rows of {self.one_hot} numbers", "one for each"
            )
        if own is not None and len(own) == self.one_hot:
            names, note = list(own), f"{note}, in the order of the model's own: {listed(own)}"
        elif own is not None:
            note += f"; the model has {len(own)} labels of its own ({listed(own[:SHOWN])})"
        self.labels = Labels(names, {name: number for number, name in enumerate(names)}, note)
        if self.given:
            self.labels = match_labels(self.given, own)
        return with_label(dataset, self.column, self._placed(dataset[self.column][:]))

    def _placed(self, rows: Sequence[Sequence[Any]]) -> np.ndarray:
        """Return one-hot rows in the order of the model's labels."""
        found = np.zeros((len(rows), len(self.names)), np.float32)
        found[:, [*self.labels.ids.values()]] = rows
        return found

    def model_overrides(self) -> dict[str, Any]:
        return {**self.labels.model_overrides(), "problem_type": "multi_label_classification"}

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean binary cross-entropy over rows and labels."""
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return _scores(("multi_label",), (logits > 0).astype(int), labels.astype(int))

    def describe(
        self, logits: np.ndarray, labels: np.ndarray, texts: Texts, what: str = "text"
    ) -> list[Table]:
        tables = label_tables(self.names, (logits > 0).astype(int), labels.astype(int), self.in_training)
        return tables + label_mistakes(self.names, logits, labels, texts)

    def constant(self, labels: np.ndarray) -> np.ndarray:
        """Return logits of the most frequent set of labels."""
        majority = Counter(map(tuple, labels.tolist())).most_common(1)[0][0]
        return np.asarray(majority) - 0.5


class Regression(Target):
    """A number for each row. Labels are numbers, or strings of numbers."""

    @property
    def are_known(self) -> bool:
        """Whether the names are known: always, as one number has no name."""
        return True

    def __init__(self, train: Dataset, validation: Dataset, column: str, given: Sequence[str] = ()):
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

    def ids(self, labels: Sequence[Any]) -> list[float]:
        """Return the numbers."""
        return np.array([*map(_number, labels)], np.float32).tolist()

    def encode(
        self,
        train: Dataset,
        validation: Dataset,
        skipped: list[str] | None = None,
        own: Sequence[str] | None = None,
    ) -> tuple[Dataset, Dataset]:
        def encode(dataset: Dataset) -> Dataset:
            numbers = [_number(label) for label in dataset[self.column]]
            return with_label(dataset, self.column, np.array(numbers, np.float32))

        self.labels = Labels([self.column], {})
        if own is not None:
            of_one = f"the model's own: {own[0]}"
            note = of_one if len(own) == 1 else f"one number; the model's own labels are {listed(own)}"
            self.labels = Labels([own[0] if len(own) == 1 else self.column], {}, note)
        return encode(train), encode(validation)

    def model_overrides(self) -> dict[str, Any]:
        return {**self.labels.model_overrides(), "problem_type": "regression"}

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error over rows."""
        return torch.nn.functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return _scores(("pearsonr", "spearmanr", "mse"), logits[:, 0], labels)

    def describe(
        self, logits: np.ndarray, labels: np.ndarray, texts: Texts, what: str = "text"
    ) -> list[Table]:
        return largest_errors(logits[:, 0], labels, texts)

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
        names: The names of the classes in the data, by id.
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
    missing = {names[number] for number in {*labels}} - {*weights}  # the model may have labels without rows
    if missing or {*weights} - {*names} or not all(weights.values()):
        refuse(
            "data.class_weights",
            f"found {setting!r}",
            f"allowed: none, balanced, or a number above 0 for each of {listed(names)}, "
            f"as in {names[0]}=2,{names[1]}=1",
        )
    return torch.tensor([weights.get(name, 1.0) for name in names])


def _width_of_one_hot(train: Dataset, column: str) -> int:
    """Return the length of one-hot rows; 0 if rows are sets of labels.

    Raise InputError for rows of numbers that can be neither.
    """
    element = train.features[column].feature
    if not isinstance(element, Value) or not any(kind in element.dtype for kind in ("int", "float", "bool")):
        return 0
    rows = [labels for labels in train[column] if labels and None not in labels]
    width = Counter(map(len, rows)).most_common(1)[0][0] if rows else 0
    numbers = [labels for labels in rows if len(labels) == width and {*labels} <= {0, 1}]
    repeats = next((labels for labels in rows if len({*labels}) < len(labels)), None)  # a set has no repeats
    is_set = "int" in element.dtype and repeats is None
    cure = "write the names of a row's labels, or one 0 or 1 for each label in every row"
    if len(numbers) == len(rows) > 0 and is_set and width == 1:
        found = f"every row of column {column!r} is [0] or [1], which is one label or two"
        refuse(KEY, found, f"{cure}; for one class a row: data.problem single_label")
    if len(numbers) == len(rows) or (len(numbers) > len(rows) / 2 and not is_set):
        return width  # rows of another form are bad rows
    if "int" not in element.dtype or (repeats is not None and len({*map(len, rows)}) == 1):
        odd = next((labels for labels in rows if {*labels} - {0, 1}), rows[0])
        repeats = repeats if "int" in element.dtype else None
        found = f"column {column!r} has rows such as {repeats or odd}, which are neither one-hot nor labels"
        refuse(KEY, found + ": a number is there twice" * bool(repeats), cure)
    return 0


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
