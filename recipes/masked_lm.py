"""Fill in masked tokens: continue the pretraining of a masked language model on your texts.

    ./launch.sh recipes/masked_lm.py --config configs/masked_lm_offline.yaml --budget auto

Your own texts: `--data.train my.csv --data.text_column text`. A long text is split into chunks.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow.compute as pc
import torch
from transformers import AutoModelForMaskedLM, pipeline

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.config import DataConfig
from gradacc_hf.data.columns import require_column, texts_of
from gradacc_hf.data.sources import CARRIED
from gradacc_hf.errors import refuse
from gradacc_hf.recipe import Recipe
from gradacc_hf.run import run
from gradacc_hf.tasks.masked_head import at_labels, head_at_labels
from gradacc_hf.tasks.unigram import with_perplexity


def chunks(rows, tokenizer, text_column, max_length):
    """Return the inputs of the model: each text split into chunks of at most max_length tokens."""
    settings = {"truncation": True, "max_length": max_length, "return_overflowing_tokens": True}
    tokens = tokenizer(rows[text_column], return_token_type_ids=False, **settings)
    of_chunks = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    texts = tokens["overflow_to_sample_mapping"]
    return of_chunks | {name: [rows[name][text] for text in texts] for name in CARRIED if name in rows}


class MaskedLM(Recipe):
    """Fill in masked tokens."""

    model_class = AutoModelForMaskedLM
    padding_side = "right"
    pipeline_tag = "fill-mask"
    baseline_is = "the frequencies of tokens"
    example = "Return the [MASK] of the list."

    @dataclass
    class Data(DataConfig):
        text_column: str = "text"
        """Column of the text."""
        masked: float = 0.15
        """Share of tokens to mask and predict."""

        def rules(self):
            yield from super().rules()
            yield "masked", 0 < self.masked < 1, "a share above 0 and below 1, such as 0.15"

    def datasets(self):
        data, special = self.data, self.tokenizer.num_special_tokens_to_add()
        if self.tokenizer.mask_token is None:
            refuse("model.name", f"{self.config.model.name} has no mask token", "use a masked language model")
        if data.max_length <= special:
            found = f"found {data.max_length}, and {special} special tokens frame every chunk"
            refuse("data.max_length", found, f"allowed: {special + 1} or more")
        if not self.tokenizer.is_fast:
            found = f"the tokenizer of {self.config.model.name} cannot split a text into chunks"
            refuse("model.name", found, "use a model with a tokenizer.json")
        train, validation = self.rows()
        for dataset in (train, validation):
            require_column(dataset, data.text_column, "data.text_column")
        self.reading.use([data.text_column])
        rows = self.check_rows(train, validation, self.problem, "data.text_column")
        splits = [self.tokenize(dataset) for dataset in rows]
        self.reading.note_parts(rows, splits, f"chunks, by data.max_length {data.max_length}")
        return tuple(splits)

    def row_problem(self, row):
        return self.problem(row)

    def examples_of(self, rows):
        return chunks(rows, **self.settings)

    def problem(self, row):
        text = row[self.data.text_column]
        if not isinstance(text, str | None):
            return f"found {text!r}, not a text"
        return None if text and text.strip() else "the text is empty"

    def tokenize(self, dataset):
        columns = dataset.column_names
        return dataset.map(chunks, batched=True, fn_kwargs=self.settings, remove_columns=columns)

    @property
    def settings(self):
        """The arguments of `chunks`."""
        data = self.data
        return {
            "tokenizer": self.tokenizer,
            "text_column": data.text_column,
            "max_length": data.max_length,
        }

    @cached_property
    def ordinary(self):
        """For each token id, whether it is an ordinary token. Special tokens are never masked."""
        ids = np.arange(len(self.tokenizer))
        known = ids < self.own_config.vocab_size  # a tokenizer may have tokens that the model lacks
        return known & ~np.isin(ids, self.tokenizer.all_special_ids)

    def tokens_of_batches(self):
        return [*super().tokens_of_batches(), self.tokenizer.mask_token]

    def transform(self, example, random):
        """Mask as BERT does: of the chosen tokens 80 % become [MASK], 10 % a random token, and 10 % stay.

        All tokens are equally likely to be chosen, so a short chunk may have no item. To choose at least one
        in every chunk would give tokens of short chunks more weight in the loss.
        """
        ids = np.array(example["input_ids"])
        chosen = self.ordinary[ids] & (random.random(len(ids)) < self.data.masked)
        labels, kind = np.where(chosen, ids, IGNORED), random.random(len(ids))
        ids[chosen & (kind < 0.8)] = self.tokenizer.mask_token_id
        replaced = chosen & (kind >= 0.9)
        ids[replaced] = random.choice(np.flatnonzero(self.ordinary), replaced.sum())
        return {**example, "input_ids": ids.tolist(), "labels": labels.tolist()}

    def model(self):
        return head_at_labels(super().model())

    def loss(self, outputs, batch):
        labels = batch["labels"]
        logits = at_labels(outputs.logits, labels)
        return torch.nn.functional.cross_entropy(logits, labels[labels != IGNORED])

    def predict(self, outputs, batch):
        """Return predicted and true ids of the masked tokens, row by row."""
        labels = batch["labels"]
        predicted = at_labels(outputs.logits, labels).argmax(-1)
        counts = (labels != IGNORED).sum(1).tolist()
        pairs = (predicted.split(counts), labels[labels != IGNORED].split(counts))
        return tuple([row.cpu().numpy() for row in rows] for rows in pairs)

    def validate(self, model, windows, accelerator):
        """Return the metrics and the perplexity. Every evaluation uses the masks of epoch 0."""
        return with_perplexity(super().validate(model, windows, accelerator))

    def metrics(self, predictions, references):
        from gradacc_hf.metrics import load  # slow to import, so not before it is needed

        ids = {"predictions": np.concatenate(predictions), "references": np.concatenate(references)}
        return load("accuracy").compute(**ids)

    def baseline(self, train, validation):
        """Return the perplexity of token frequencies (+ 1), and the accuracy of the most frequent token."""
        expected, found = self.count(train) + self.ordinary, self.count(validation)
        loss = -np.log(expected[self.ordinary] / expected.sum()) @ found[self.ordinary] / found.sum()
        return {"accuracy": float(found[expected.argmax()] / found.sum()), "perplexity": float(np.exp(loss))}

    def count(self, dataset):
        """Return the number of occurrences of each ordinary token."""
        tables = dataset.select_columns("input_ids").with_format("arrow").iter(10_000)
        ids = (pc.list_flatten(table["input_ids"]).to_numpy() for table in tables)
        return sum(np.bincount(some, minlength=len(self.tokenizer)) for some in ids) * self.ordinary

    def example_of(self, row):
        """Return the text of a row, with a mask in place of the word in the middle."""
        words = row[self.data.text_column].split()
        words[len(words) // 2 : len(words) // 2 + 1] = [self.tokenizer.mask_token]
        return " ".join(words)

    def answer(self, model, inputs):
        """Return the likeliest tokens for each mask in a text, with probabilities."""
        tokenizer, settings = self.tokenizer, {"truncation": True, "max_length": self.data.max_length}
        fill, answers = pipeline("fill-mask", model=model, tokenizer=tokenizer, tokenizer_kwargs=settings), []
        for text in texts_of(inputs, [self.data.text_column])[0]:
            text = text.replace("[MASK]", tokenizer.mask_token)
            if tokenizer.mask_token_id not in tokenizer(text, **settings).input_ids:
                found = (
                    f"found no {tokenizer.mask_token} in the first {self.data.max_length} tokens of {text!r}"
                )
                refuse("input", found, "write one where a token is to be filled in")
            found = fill(text)
            masks = found if isinstance(found[0], list) else [found]
            fillings = [[{"token": f["token_str"], "score": f["score"]} for f in mask] for mask in masks]
            answers.append({"text": text, "fillings": fillings})
        return answers


if __name__ == "__main__":
    run(MaskedLM)
