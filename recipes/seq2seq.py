"""Write a text for a text: a summary, a translation, the description of a function.

    ./launch.sh recipes/seq2seq.py --config configs/seq2seq_offline.yaml --budget auto

Your own: `--data.train my.csv --data.source_column article --data.target_column summary`. `model.name` is an
encoder-decoder (T5, BART, Marian, …), or an encoder such as BERT: two copies are then joined.
"""

import re
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from transformers import AutoModelForSeq2SeqLM

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.config import DataConfig
from gradacc_hf.data.columns import list_lengths, require_texts, text_problem, texts_of
from gradacc_hf.data.reading import tokens_lost
from gradacc_hf.data.sources import first_of_each
from gradacc_hf.recipe import ScoredRows
from gradacc_hf.run import run
from gradacc_hf.tasks.encoder_decoder import EncoderDecoder
from gradacc_hf.tasks.generate import as_answer, check_target_length, generate, truncated
from gradacc_hf.tasks.lean_loss import make_lean
from gradacc_hf.tasks.unigram import perplexity, unigram_loss, with_perplexity
from gradacc_hf.training.experts import counts_padding
from gradacc_hf.training.loop import evaluate
from gradacc_hf.training.run_log import by_source


def features(rows, tokenizer, columns, prefix, max_length, max_target_length, start):
    """Return the inputs of the model, and as `labels` the tokens to write after the start token."""
    source, target = columns
    sources = [prefix + text for text in rows[source]]
    read = tokenizer(sources, truncation=True, max_length=max_length)
    written = tokenizer(text_target=rows[target], truncation=True, max_length=max_target_length)
    bare, bare_target = tokenizer(prefix)["input_ids"], tokenizer(text_target="")["input_ids"]
    nothing_read = f"no token of the source is left; data.max_length is {max_length}"
    nothing_written = f"no token of the target is left; data.max_target_length is {max_target_length}"
    problems = [
        nothing_read * (len(ids) <= len(bare)) or nothing_written * (len(labels) <= len(bare_target))
        for ids, labels in zip(read["input_ids"], written["input_ids"], strict=True)
    ]
    lost = {"lost_source": tokens_lost(tokenizer, [sources], read, max_length)}
    in_target = {"text_target": rows[target]}
    lost["lost_target"] = tokens_lost(tokenizer, in_target, written, max_target_length)
    labels = [ids[1:] if ids[:1] == [start] else ids for ids in written["input_ids"]]
    return {"input_ids": read["input_ids"], "labels": labels, "problem": problems, **lost}


def inner(row, name):
    """Return the value of a column, or of a column inside another, such as translation.de."""
    for part in [name] if name in row else name.split("."):
        row = (row or {}).get(part)
    return row


class Seq2Seq(EncoderDecoder):
    """Write a text for a text."""

    model_class = AutoModelForSeq2SeqLM
    padding_side = "right"
    example = "def add(a, b):\n    return a + b"
    baseline_is = "the frequencies of tokens, and the first sentence of each source"
    lean_loss = True
    writes_texts = True

    @dataclass
    class Data(DataConfig):
        source_column: str = "source"
        """Column of the text to read.
        translation.de: the column de inside the column translation."""
        target_column: str = "target"
        """Column of the text to write."""
        prefix: str | None = None
        """Text put before every source.
        For T5 for example "summarize: "."""
        max_target_length: int = 64
        """Tokens after which a target is truncated.
        Also the most tokens that the model writes."""
        generate_rows: int | None = 200
        """Validation rows to write texts for.
        The first ones, as many of each source; null: all. The loss is computed on all rows."""
        num_beams: int = 1
        """Beams of the search (1: greedy)."""

        def rules(self):
            yield from super().rules()
            rows = self.generate_rows
            yield "max_target_length", self.max_target_length >= 1, "1 token or more"
            yield "generate_rows", rows is None or rows >= 1, "1 row or more, or null"
            yield "num_beams", self.num_beams >= 1, "1 or more"

    @property
    def pipeline_tag(self):
        return "translation" if self.data.source_column.startswith("translation.") else "summarization"

    @property
    def columns(self):
        return [self.data.source_column, self.data.target_column]

    def datasets(self):
        data, rows, start = self.data, self.rows(), self.model_config().decoder_start_token_id
        check_target_length(self.model_config(), data.max_target_length, self.config.model.name)
        self.reading.use(self.columns)
        if not set(self.columns) <= set(rows[0].column_names):  # translation.de is inside translation
            rows = [dataset.flatten() for dataset in rows]
        for dataset in rows:
            require_texts(dataset, data.source_column, "data.source_column")
            require_texts(dataset, data.target_column, "data.target_column")
        rows = self.check_rows(*rows, text_problem(self.columns), "data.train")
        settings = {"max_length": data.max_length, "max_target_length": data.max_target_length}
        settings |= {"columns": self.columns, "prefix": data.prefix or "", "start": start}
        self.settings = {**settings, "tokenizer": self.tokenizer}
        splits = self.map_rows(rows, features, "data.train", keep=self.columns, **settings)
        splits = self.note_truncated(splits, {"lost_source": "source tokens"})
        limit = "data.max_target_length"
        train, validation = self.note_truncated(splits, {"lost_target": "labelled tokens"}, limit)
        self.shown_rows = first_of_each(validation, data.generate_rows)
        self.shown = validation.select(self.shown_rows)
        return train.remove_columns(self.columns), validation.remove_columns(self.columns)

    def row_problem(self, row):
        row.update({name: inner(row, name) for name in self.columns})
        return text_problem(self.columns)(row)

    def examples_of(self, rows):
        return features(rows, **self.settings)

    @property
    def pad_to(self):
        over_window = self.config.model.router_loss == "window"
        return "window" if over_window and counts_padding(self.own_config) else "micro_batch"

    def model(self):
        model = super().model()
        make_lean(model, self.config.budget.lean_loss)
        return model

    def check_model(self):
        """Check the weights, and, by loading them, whether the model allows the lean loss."""
        super().check_model()
        if self.config.budget.lean_loss is True:
            self.model()

    def lengths(self, dataset):
        """Return the tokens to read and to write of each example, which are padded separately."""
        tokens = [list_lengths(dataset, column) for column in ("input_ids", "labels")]
        return np.stack(tokens, axis=1)

    def collate(self, examples, pad_to=None):
        """Return the batch. It has no decoder inputs: the model shifts `labels` to the right."""
        batch = super().collate([{k: v for k, v in e.items() if k != "labels"} for e in examples], pad_to)
        labels, multiple = [example["labels"] for example in examples], self.config.budget.pad_to_multiple_of
        length = -(-max(map(len, labels)) // (multiple or 1)) * (multiple or 1)
        padded = [ids + [IGNORED] * (length - len(ids)) for ids in labels]
        return {**batch, "labels": torch.tensor(padded)}

    def validate(self, model, windows, accelerator):
        """Return the loss of all rows, and the scores of the texts that are written for the first rows."""
        settings = {"accelerator": accelerator, "compute_loss": self.loss, "predict": None}
        found = evaluate(model, windows, sources=self.validation_sources, **settings)
        written = generate(model, windows, accelerator, self.shown_rows, self.tokenizer, **self.search)
        source, target = (self.shown[column] for column in self.columns)
        self.scored = ScoredRows(written, target, self.metrics)
        rows = islice(zip(source, written, target, strict=True), 5)
        self.samples[:] = [dict(zip(("input", "output", "reference"), row, strict=True)) for row in rows]
        scores = with_perplexity({"loss": found.loss} | by_source("loss", found.source_losses))
        sources = [self.validation_sources[row] for row in self.shown_rows if self.validation_sources]
        return scores | self.metrics(written, target) | self.scored.by_source(sources)

    @property
    def search(self):
        """The options of `generate`."""
        length = self.data.max_target_length
        return {"max_new_tokens": length, "num_beams": self.data.num_beams, "do_sample": False}

    def metrics(self, predictions, references):
        from gradacc_hf.metrics import load  # slow to import, so not before it is needed

        pairs = {"predictions": list(predictions), "references": [[text] for text in references]}
        return load("rouge").compute(**pairs) | load("sacrebleu").compute(**pairs)

    def baseline(self, train, validation):
        """Return the perplexity of token frequencies, and the scores of the first sentence of a source."""
        tokens = ((token for row in rows["labels"] for token in row) for rows in (train, validation))
        of_tokens = perplexity(unigram_loss(*tokens, len(self.tokenizer)))
        source, target = self.columns
        end = re.compile(r"\n|(?<=[.!?])\s")
        first = [end.split(text.strip(), maxsplit=1)[0] for text in self.shown[source]]
        return {"perplexity": of_tokens, **self.metrics(first, self.shown[target])}

    def example_of(self, row):
        return inner(row, self.data.source_column)

    def answer(self, model, inputs):
        """Return the text written for each input: a text, or a row with a source."""
        [texts] = texts_of(inputs, [self.data.source_column])
        texts = [(self.data.prefix or "") + text for text in texts]
        settings = {"truncation": True, "max_length": self.data.max_length, "padding": True}
        tokens = self.tokenizer(texts, **settings, return_token_type_ids=False, return_tensors="pt")
        longest = self.generation.max_new_tokens or self.data.max_target_length
        options = {**self.search, **self.generation.options, "max_new_tokens": longest}
        written = model.generate(**tokens.to(model.device), **options)
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        cut = truncated(model, written, longest)
        return [as_answer("output", text, is_cut) for text, is_cut in zip(texts, cut, strict=True)]


if __name__ == "__main__":
    run(Seq2Seq)
