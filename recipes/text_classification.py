"""Label a text, or a pair of texts, with a class, any number of labels, or a number.

    ./launch.sh recipes/text_classification.py --config configs/text_classification_offline.yaml --budget auto

Your own texts: `--data.train my.csv --data.text_column text --data.label_column label`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from gradacc_hf.config import DataConfig
from gradacc_hf.data.columns import as_list, problems_of_tokens, require_texts, text_problem, texts_of
from gradacc_hf.data.files import FAULT
from gradacc_hf.data.reading import tokens_lost
from gradacc_hf.errors import refuse
from gradacc_hf.recipe import Recipe
from gradacc_hf.recipe.labels import given_labels
from gradacc_hf.run import run
from gradacc_hf.tasks.label_lists import LabelLists
from gradacc_hf.tasks.targets import TARGETS, answers, class_weights
from gradacc_hf.utils.modeling import is_decoder


def features(rows, tokenizer, columns, max_length):
    """Return the inputs of the model for a batch of rows."""
    texts = [rows[column] for column in columns]
    which = None if len(texts) > 1 else False  # the tokens of one text have one type
    tokens = tokenizer(*texts, truncation=True, max_length=max_length, return_token_type_ids=which)
    special = tokenizer.num_special_tokens_to_add(which is None)
    problems = problems_of_tokens(tokens, len(texts), special, max_length)
    lost = tokens_lost(tokenizer, texts, tokens, max_length)
    return {**tokens, "labels": rows["label"], "problem": problems, "lost_tokens": lost}


class TextClassification(Recipe):
    """Label a text."""

    model_class = AutoModelForSequenceClassification
    pipeline_tag = "text-classification"
    takes_teacher = True

    @dataclass
    class Data(DataConfig):
        text_column: str = "text"
        """Column of the text."""
        text_pair_column: str | None = None
        """Column of the second text, for pairs."""
        label_column: str = "label"
        """Column of the label.
        A string or an integer; a list of them for multi_label; a number for regression."""
        problem: Literal["single_label", "multi_label", "regression"] = "single_label"
        """A class, several labels or a number."""
        label_columns: str | list[str] | None = None
        """Columns of one label each, such as a,b,c.
        For multi_label. A row has 0 or 1 in each, or false or true."""
        label_separator: str | None = None
        """Separator of labels in a text, such as ;.
        For multi_label. null: found in the training rows, and stated in the plan."""
        labels: str | list[str] | None = None
        """All label names in their order, such as a,b.
        null: found in the training rows. data.streaming needs them, unless the file has class names."""
        class_weights: str = "none"
        """Class weights: none, balanced or a=5,b=1.
        They weigh examples in the loss. balanced: 1 / the frequency of a class. a, b: names of classes."""

        def rules(self):
            yield from super().rules()
            has_classes = self.problem == "single_label"
            yield (
                "class_weights",
                has_classes or self.class_weights == "none",
                "none, except for single_label",
            )
            not_balanced = not (self.streaming and self.class_weights == "balanced")
            yield "class_weights", not_balanced, "none or a=5,b=1 with data.streaming, which counts no rows"
            for name in ("label_columns", "label_separator"):
                is_possible = self.problem == "multi_label" or getattr(self, name) is None
                yield name, is_possible, "null, except with data.problem multi_label"

    def datasets(self):
        data, columns = self.data, self.text_columns()
        convert = LabelLists(data.label_column, as_list(data.label_columns), data.label_separator)
        label_column = None if data.problem == "regression" else data.label_column
        train, validation = self.rows(label_column, convert if data.problem == "multi_label" else None)
        label_columns = as_list(data.label_columns) or [data.label_column]
        self.reading.make_column(data.label_column, label_columns)
        self.reading.use([*columns, *label_columns, FAULT])
        for split in (train, validation):
            for column, key in columns.items():
                require_texts(split, column, key)
        self.target = TARGETS[data.problem](train, validation, data.label_column, given_labels(data.labels))
        if data.streaming and not self.target.are_known:
            found = "found null, and a stream shows no label before its row"
            refuse("data.labels", found, "list all labels, such as --data.labels a,b")
        train, validation = self.check_rows(train, validation, text_problem(columns), "data.text_column")
        train, validation = self.check_rows(train, validation, self.target.problem, "data.label_column")
        train, validation = self.target.encode(train, validation, self.may_skip, self.own_labels)
        self.note_labels(self.target.labels)
        self.class_weights = class_weights(data.class_weights, self.target.labels.in_data, train["label"])
        self.notes_pad_id()
        settings = {"columns": list(columns), "max_length": data.max_length}
        return self.map_rows((train, validation), features, "data.text_column", **settings)

    def row_problem(self, row):
        return text_problem(self.text_columns())(row) or self.target.problem(row)

    def examples_of(self, rows):
        rows = {**rows, "label": self.target.ids(rows[self.data.label_column])}
        return features(rows, self.tokenizer, list(self.text_columns()), self.data.max_length)

    @property
    def example(self):
        text = "Wait until all pending tasks of the event loop are done."
        return text if self.data.text_pair_column is None else {"text": text, "text_pair": text}

    def example_of(self, row):
        texts = [row[column] for column in self.text_columns()]
        return texts[0] if len(texts) == 1 else dict(zip(("text", "text_pair"), texts, strict=True))

    def text_columns(self):
        """Return the column of the text, or both of a pair, each with the name of its setting."""
        columns = {self.data.text_column: "data.text_column"}
        if self.data.text_pair_column is not None:
            columns[self.data.text_pair_column] = "data.text_pair_column"
        return columns

    def model_overrides(self):
        return self.target.model_overrides()

    @property
    def padding_side(self):
        """The side of the padding: XLNet reads the last position, a text of any other model starts at 0."""
        return None if self.own_config.model_type == "xlnet" else "right"

    def model(self):
        """Return the model, with the padding token by which a decoder finds the last token of a text."""
        model = super().model()
        if self.notes_pad_id():
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def notes_pad_id(self):
        """Whether the config gets the padding token of the tokenizer, which a decoder searches for."""
        own = getattr(self.own_config, "pad_token_id", None)
        if own is not None and not (is_decoder(self.own_config) and own != self.tokenizer.pad_token_id):
            return False
        note = f"{self.tokenizer.pad_token_id}, as in the tokenizer; the model's config has {own}"
        self.model_notes["pad_token_id"] = note
        return True

    def num_items(self, batch):
        """Return the divisor of the loss: the weights of the examples, or else the number of examples."""
        if self.class_weights is None:
            return len(batch["labels"])
        return float(self.class_weights[batch["labels"]].sum())

    def loss(self, outputs, batch):
        weights = () if self.class_weights is None else (self.class_weights,)
        return self.target.loss(outputs.logits, batch["labels"], *weights)

    @property
    def labels_are_several(self):
        """Whether a text has any number of labels."""
        return self.data.problem == "multi_label"

    def item_logits(self, logits, batch):
        """Return the logits of the examples, and their weights in the loss."""
        weights = self.class_weights
        return logits, None if weights is None else weights.to(logits.device)[batch["labels"]]

    def metrics(self, predictions, references):
        return self.target.metrics(np.stack(predictions), np.stack(references))

    def describe(self, predictions, references, windows):
        return self.target.describe(np.stack(predictions), np.stack(references), self.texts(windows))

    def baseline(self, train, validation):
        """Return the scores of a constant answer: the most frequent label or set of labels, or the mean."""
        return self.target.baseline(train["labels"], validation["labels"])

    def answer(self, model, inputs):
        texts = texts_of(inputs, list(self.text_columns()))
        settings = {"truncation": True, "max_length": self.data.max_length, "padding": True}
        tokens = self.tokenizer(*texts, **settings, return_tensors="pt")
        with torch.no_grad():
            return answers(model(**tokens.to(model.device)).logits, model.config)


if __name__ == "__main__":
    run(TextClassification)
