"""Search: embed texts so that the text that belongs to a query is the nearest.

    ./launch.sh recipes/contrastive.py --config configs/contrastive_offline.yaml --budget auto

Your own pairs: `--data.train my.csv --data.anchor_column question --data.positive_column answer`, and
`--data.negative_column wrong_answer` if each pair has a hard negative. All other pairs of a window are
negatives too, however the window is split (by the gradient cache). A larger `batch.effective` has more. Equal
texts are not negatives of each other: all positives of an anchor are right, in the loss and in the metric.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModel

from gradacc_hf.accumulation.gradient_cache import (
    COLUMNS,
    ContrastiveLoss,
    Embedder,
    search_positives,
    text_numbers,
)
from gradacc_hf.config import DataConfig
from gradacc_hf.data.columns import file_rows, list_lengths, require_column, texts_of
from gradacc_hf.data.sources import CARRIED
from gradacc_hf.errors import InputError
from gradacc_hf.recipe import Recipe, ScoredRows
from gradacc_hf.run import run
from gradacc_hf.tasks.search import chance, features, nearest, note_equal_texts, sample
from gradacc_hf.training.loop import evaluate

HITS = 10  # candidates per query in an evaluation


class Contrastive(Recipe):
    """Find the text that belongs to a text."""

    model_class = AutoModel
    padding_side = "right"
    pipeline_tag = "sentence-similarity"
    baseline_is = "a random order"
    example = "Return the number of items in the list."

    @dataclass
    class Data(DataConfig):
        anchor_column: str = "anchor"
        """Column of the search text.
        For example a question or a description."""
        positive_column: str = "positive"
        """Column of the text to find."""
        negative_column: str | None = None
        """Column of a hard negative.
        A text that looks like the right one, and is wrong. null: there is none."""
        temperature: float = 0.05
        """Divisor of the cosines in the loss.
        The lower it is, the more the nearest negatives count."""
        symmetric: bool = True
        """Also search anchors from positives.
        The loss is then the mean of both directions."""

        def rules(self):
            yield from super().rules()
            yield "temperature", self.temperature > 0, "a number above 0, such as 0.05"

    def __init__(self, config):
        super().__init__(config)
        data = self.data
        names = (data.anchor_column, data.positive_column, data.negative_column)
        self.columns = {column: name for column, name in zip(COLUMNS, names, strict=True) if name}
        self.loss = ContrastiveLoss(data.temperature, data.symmetric)
        self.searched = None  # `answer` keeps the validation texts and their embeddings here

    def datasets(self):
        if self.config.batch.least < 2:
            raise InputError("batch.effective: found 1; allowed: 2 or more, as other pairs are the negatives")
        rows = self.rows()
        self.reading.use(self.columns.values())
        for dataset in rows:
            for column, name in self.columns.items():
                require_column(dataset, name, f"data.{column}_column")
        numbers, tokenised = [file_rows(dataset) for dataset in rows], map(self.tokenize, rows)
        splits = self.check_rows(*tokenised, self.problem, "data.train", numbers)
        for column, name in self.columns.items():
            splits = self.note_truncated(splits, {f"{column}_lost": f"tokens of {name}"})
        note_equal_texts(splits, self.reading)
        return splits

    def tokenize(self, dataset):
        removed = [name for name in dataset.column_names if name not in CARRIED]
        return dataset.map(features, batched=True, fn_kwargs=self.settings, remove_columns=removed)

    @property
    def settings(self):
        """The arguments of `features`."""
        return {"columns": self.columns, "max_length": self.data.max_length, "tokenizer": self.tokenizer}

    def examples_of(self, rows):
        found = features(rows, **self.settings)
        examples = (dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True))
        return {**found, "problem": [self.problem(example) or "" for example in examples]}

    def problem(self, row):
        for column, name in self.columns.items():
            if not row[f"{column}_text"].strip():
                return f"unpaired: its {name} is empty or not text"
            if len(row[f"{column}_input_ids"]) <= self.tokenizer.num_special_tokens_to_add():
                return f"no token of its {name} is left at data.max_length {self.data.max_length}"
        return None

    def model(self):
        return Embedder(super().model())

    def empty_model(self):
        return Embedder(super().empty_model())

    def load(self, folder):
        model = super().load(folder)
        return model if isinstance(model, Embedder) else Embedder(model)  # with adapters it is one already

    def lengths(self, dataset):
        tokens = [list_lengths(dataset, f"{column}_input_ids") for column in self.columns]
        return np.stack(tokens, axis=1)

    def collate(self, examples, pad_to=None):
        batch = {}
        for column in self.columns:
            tokens = [{"input_ids": example[f"{column}_input_ids"]} for example in examples]
            batch |= {f"{column}_{key}": value for key, value in super().collate(tokens, pad_to).items()}
        return batch

    def num_items(self, batch):
        """Return the number of pairs."""
        return len(batch["anchor_input_ids"])

    def padded_part(self, model, batch):
        inputs = {name: batch[f"anchor_{name}"] for name in ("input_ids", "attention_mask")}
        return model.encoder, inputs

    def predict(self, outputs, batch):
        return outputs.float().cpu().numpy(), text_numbers(batch).tolist()

    def validate(self, model, windows, accelerator):
        """Search each anchor's positives among all of the validation set, also for the loss."""
        found = evaluate(
            model, windows, accelerator=accelerator, compute_loss=self.loss, predict=self.predict
        )
        embeddings, texts = torch.from_numpy(np.stack(found.predictions)), torch.tensor(found.references)
        ids, right = search_positives(embeddings, texts, HITS)
        self.scored = ScoredRows(ids, right, self.metrics)
        rows = range(min(8, len(ids)))
        shown = [(windows.examples([i, *ids[i][:3]]), ids[i], right[i]) for i in rows]
        self.samples[:] = [sample(pair, found, *hits) for (pair, *found), *hits in shown]
        scores = {"loss": self.loss.value(embeddings, texts), **self.metrics(ids, right)}
        return scores | self.scored.by_source(self.validation_sources or ())

    def metrics(self, predictions, references):
        from gradacc_hf.metrics import load  # slow to import, so not before it is needed

        return load("retrieval").compute(predictions=predictions, references=references) or {}

    def baseline(self, train, validation):
        """Return the expected scores of a random order of all different positives of the validation rows."""
        return chance(validation)

    def example_of(self, row):
        return row[self.data.anchor_column]

    def answer(self, model, inputs):
        """Return the five validation texts nearest to each text, or to each row's anchor."""
        settings = self.tokenizer, self.data.max_length
        [texts] = texts_of(inputs, [self.data.anchor_column])
        if self.searched is None:  # once for all inputs
            candidates = [*dict.fromkeys(self.datasets()[1]["positive_text"])]
            self.searched = candidates, model.embed(candidates, *settings)
        candidates, embedded = self.searched
        return nearest(texts, model.embed(texts, *settings), candidates, embedded)


if __name__ == "__main__":
    run(Contrastive)
