"""Label a text: which of a few classes does it belong to?

    ./launch.sh recipes/text_classification.py --config configs/text_classification_offline.yaml --budget auto

Your own texts: `--data.train my.csv --data.text_column text --data.label_column label`.
"""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from gradacc_hf.config import DataConfig
from gradacc_hf.errors import BadInput
from gradacc_hf.labels import check_texts, encode_labels
from gradacc_hf.recipe import Recipe
from gradacc_hf.run import run


def features(rows, tokenizer, text_column, max_length):
    """Rows → what the model reads."""
    tokens = tokenizer(rows[text_column], truncation=True, max_length=max_length, return_token_type_ids=False)
    return {**tokens, "labels": rows["label"]}


class TextClassification(Recipe):
    """Label a text."""

    model_class = AutoModelForSequenceClassification

    @dataclass
    class Data(DataConfig):
        text_column: str = "text"
        """Column that holds the text."""
        label_column: str = "label"
        """Column that holds the label: strings or integers."""
        class_weights: str = "none"
        """Weight of each class in the loss: none, balanced (1 / its frequency), or spam=5,ham=1."""

    def datasets(self):
        data = self.data
        train, validation = self.rows(data.label_column)
        for dataset in (train, validation):
            check_texts(dataset, data.text_column)
        train, validation, self.labels = encode_labels(train, validation, data.label_column)
        self.class_weights = self.weigh_classes(Counter(train["label"]))
        return self.tokenize(train), self.tokenize(validation)

    def tokenize(self, dataset):
        data = self.data
        settings = {"text_column": data.text_column, "max_length": data.max_length}
        settings["tokenizer"] = self.tokenizer
        return dataset.map(features, batched=True, fn_kwargs=settings, remove_columns=dataset.column_names)

    def weigh_classes(self, counts):
        """One weight a class, in the order of the labels; None where all weigh 1."""
        setting = self.data.class_weights
        if setting == "none":
            return None
        if setting == "balanced":
            mean = counts.total() / len(counts)
            return torch.tensor([mean / max(1, counts[c]) for c in range(len(self.labels))])
        pairs = [pair.strip().rpartition("=") for pair in setting.split(",")]
        weights = {key: float(n) if re.fullmatch(r"\d*\.?\d+", n) else 0.0 for key, _, n in pairs}
        if sorted(weights) != sorted(self.labels) or not all(weights.values()):
            raise BadInput(
                f"data.class_weights: found {setting!r}; allowed: none, balanced, or a number above 0 for "
                f"each of {', '.join(self.labels)}, as in {self.labels[0]}=2,{self.labels[1]}=1"
            )
        return torch.tensor([weights[label] for label in self.labels])

    def model_overrides(self):
        ids = {label: i for i, label in enumerate(self.labels)}
        return {"id2label": dict(enumerate(self.labels)), "label2id": ids}

    def num_items(self, batch):
        """A weighted mean divides by the weights of its examples, so these are its items."""
        if self.class_weights is None:
            return len(batch["labels"])
        return float(self.class_weights[batch["labels"]].sum())

    def loss(self, outputs, batch):
        weights = None if self.class_weights is None else self.class_weights.to(outputs.logits)
        return torch.nn.functional.cross_entropy(outputs.logits, batch["labels"], weights)

    def metrics(self, predictions, references):
        from gradacc_hf.metrics import load  # slow to import, so not before it is needed

        predicted, scores = np.stack(predictions).argmax(-1), {}
        for name in ("accuracy", "f1", "matthews_correlation"):
            scores |= load(name).compute(predictions=predicted, references=references) or {}
        return scores

    def baseline(self, train, validation):
        """Always the label that is the most frequent in training."""
        majority = Counter(train["labels"]).most_common(1)[0][0]
        return self.metrics([np.eye(len(self.labels))[majority]] * len(validation), validation["labels"])


if __name__ == "__main__":
    run(TextClassification)
