"""Write a text for a text: a summary, a translation, what a function does.

    ./launch.sh recipes/seq2seq.py --config configs/seq2seq_offline.yaml --budget auto

Your own: `--data.train my.csv --data.source_column article --data.target_column summary`. `model.name` is an
encoder-decoder (T5, BART, Marian, …), or else an encoder such as BERT, of which two are then joined.
"""

import math
import re
import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSeq2SeqLM

from gradacc_hf.config import DataConfig
from gradacc_hf.errors import BadInput
from gradacc_hf.items import IGNORED
from gradacc_hf.labels import file_rows, list_lengths, require_column, texts_of
from gradacc_hf.loop import evaluate
from gradacc_hf.recipe import Recipe
from gradacc_hf.run import run
from gradacc_hf.tasks.generate import generate
from gradacc_hf.tasks.joined import join, joined_config, new_parameters


def features(rows, tokenizer, source, target, prefix, max_length, max_target_length, start):
    """Rows → what the model reads, and as `labels` what it is to write after its start token."""
    sources = [prefix + (text if isinstance(text, str) else "") for text in rows[source]]
    targets = [text if isinstance(text, str) else "" for text in rows[target]]
    tokens = tokenizer(sources, truncation=True, max_length=max_length, return_token_type_ids=False)
    written = tokenizer(text_target=targets, truncation=True, max_length=max_target_length)["input_ids"]
    return {**tokens, "labels": [ids[1:] if ids[:1] == [start] else ids for ids in written]}


class Seq2Seq(Recipe):
    """Write a text for a text."""

    model_class = AutoModelForSeq2SeqLM
    pipeline_tag = "summarization"
    example = "def add(a, b):\n    return a + b"

    @dataclass
    class Data(DataConfig):
        source_column: str = "source"
        """Column that holds the text to read; translation.de is the column de inside translation."""
        target_column: str = "target"
        """Column that holds the text to write."""
        prefix: str | None = None
        """What every source begins with: T5 knows "summarize: "."""
        max_target_length: int = 64
        """Where a target is cut off, and the most that is written (tokens)."""
        generate_rows: int | None = 200
        """The first so many validation rows have a text written for them (null: all); the loss is of all."""
        num_beams: int = 1
        """Beams of the search for what to write (1: greedy)."""

        def rules(self):
            yield from super().rules()
            rows = self.generate_rows
            yield "max_target_length", self.max_target_length >= 1, "1 token or more"
            yield "generate_rows", rows is None or rows >= 1, "1 row or more, or null"
            yield "num_beams", self.num_beams >= 1, "1 or more"

    @property
    def columns(self):
        return {"source": self.data.source_column, "target": self.data.target_column}

    def datasets(self):
        rows = self.rows()
        if not set(self.columns.values()) <= set(
            rows[0].column_names
        ):  # translation.de is inside translation
            rows = [dataset.flatten() for dataset in rows]
        for name, column in self.columns.items():
            for dataset in rows:
                require_column(dataset, column, f"data.{name}_column")
        tokenized, numbers = map(self.tokenize, rows), list(map(file_rows, rows))
        train, validation = self.check_rows(*tokenized, self.problem, "data.train", numbers)
        columns = list(self.columns.values())
        self.validation_rows = validation.select_columns(columns)
        return train.remove_columns(columns), validation.remove_columns(columns)

    def tokenize(self, dataset):
        columns = list(self.columns.values())
        return dataset.select_columns(columns).map(features, batched=True, fn_kwargs=self.settings)

    @cached_property
    def settings(self):
        """What `features` is told."""
        config, data = self.model_config(), self.data
        positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf
        if data.max_target_length > positions:
            raise BadInput(
                f"data.max_target_length: found {data.max_target_length}; allowed: 1 to {positions}, the "
                f"positions of the decoder of {self.config.model.name}"
            )
        lengths = {"max_length": data.max_length, "max_target_length": data.max_target_length}
        texts = {"tokenizer": self.tokenizer, "prefix": data.prefix or "", **self.columns}
        return {**texts, **lengths, "start": config.decoder_start_token_id}

    @cached_property
    def of_nothing(self):
        """What becomes of no text at all: the prefix and special tokens."""
        return features({column: [""] for column in self.columns.values()}, **self.settings)

    def problem(self, row):
        """Which text of a row is not there, or has no token left; or None."""
        limits = {"source": ("input_ids", "max_length"), "target": ("labels", "max_target_length")}
        for name, (tokens, limit) in limits.items():
            text = row[self.columns[name]]
            if not isinstance(text, str) or not text.strip():
                return f"its {name} is {'empty' if text is None or isinstance(text, str) else 'no text'}"
            if len(row[tokens]) <= len(self.of_nothing[tokens][0]):
                return f"no token of its {name} is left; data.{limit} is {getattr(self.data, limit)}"
        return None

    @cached_property
    def joined(self):
        """Is the model two encoders, joined here?"""
        return not self.base_config().is_encoder_decoder

    def model_config(self):
        config = super().model_config()
        if config.is_encoder_decoder:
            return config
        return joined_config(config, self.tokenizer, self.config.model.name)

    def _load_model(self, **options):
        warnings.filterwarnings("ignore", "Version v4.12.0")  # two joined were once trained otherwise
        if not self.joined:
            return super()._load_model(**options)
        with self._loading("weights"):
            model = join(self.model_path, self.model_config(), dtype=self.dtype, **options, **self._source())
        self.new_parameters = new_parameters(model)
        return model

    def lengths(self, dataset):
        """Tokens to read and to write, which are padded on their own."""
        tokens = [list_lengths(dataset, column) for column in ("input_ids", "labels")]
        return np.stack(tokens, axis=1)

    def collate(self, examples, pad_to=None):
        """What the decoder reads, the model makes of `labels`: its start token, and the labels before."""
        batch = super().collate([{k: v for k, v in e.items() if k != "labels"} for e in examples], pad_to)
        labels = [torch.tensor(example["labels"]) for example in examples]
        return {**batch, "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED)}

    def predict(self, outputs, batch):
        """Nothing: what the decoder says after the right words is not what it would write."""
        return [None] * len(batch["labels"]), [None] * len(batch["labels"])

    def validate(self, model, windows, accelerator):
        found = evaluate(
            model, windows, accelerator=accelerator, compute_loss=self.loss, predict=self.predict
        )
        source, target = self.shown.column_names
        written = generate(model, windows, accelerator, len(self.shown), **self.search)
        written = [text.strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]
        first = zip(self.shown[source][:5], written, self.shown[target][:5], strict=False)
        self.samples[:] = [dict(zip(("input", "output", "reference"), texts, strict=True)) for texts in first]
        return {"loss": found.loss, **self.metrics(written, self.shown[target])}

    @property
    def shown(self):
        """The validation rows that texts are written for."""
        number = min(self.data.generate_rows or len(self.validation_rows), len(self.validation_rows))
        return self.validation_rows.select(range(number)).select_columns(list(self.columns.values()))

    @property
    def search(self):
        """How a text is found: what `generate` is told."""
        length = self.data.max_target_length
        return {"max_new_tokens": length, "num_beams": self.data.num_beams, "do_sample": False}

    def metrics(self, predictions, references):
        from gradacc_hf.metrics import load  # slow to import, so not before it is needed

        pairs = {"predictions": list(predictions), "references": [[text] for text in references]}
        return load("rouge").compute(**pairs) | load("sacrebleu").compute(**pairs)

    def baseline(self, train, validation):
        """Always the first line or sentence of the source: of a function, its name and parameters."""
        source, target = self.shown.column_names
        end = re.compile(r"\n|(?<=[.!?])\s")
        first = [end.split(text.strip(), maxsplit=1)[0] for text in self.shown[source]]
        return self.metrics(first, self.shown[target])

    def answer(self, model, inputs):
        """Texts, or rows with a source → the text written for each."""
        [texts] = texts_of(inputs, [self.columns["source"]])
        tokens = self.tokenizer(
            [(self.data.prefix or "") + text for text in texts],
            truncation=True,
            max_length=self.data.max_length,
            padding=True,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        written = model.generate(**tokens.to(model.device), **self.search)
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [{"output": text.strip()} for text in texts]


if __name__ == "__main__":
    run(Seq2Seq)
