"""Teach a language model to answer: chats, prompts with completions, or plain text.

    ./launch.sh recipes/causal_lm.py --config configs/causal_lm_offline.yaml --budget auto

Your own: a JSONL file with `messages` (a list of {role, content}), or with `prompt` and `completion`, or with
`text`. ShareGPT, Alpaca, and `prompt` with `chosen` are read, too: recipes/README.md, "Chats". The loss
covers the assistant's turns of a chat, completions, and all of a plain text. A chat may have `tools`; turns
with `weight` 0 or `train` false are not learned.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal

from transformers import AutoModelForCausalLM

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.config import DataConfig
from gradacc_hf.data.columns import file_rows
from gradacc_hf.data.sources import carried
from gradacc_hf.recipe import Recipe
from gradacc_hf.run import run
from gradacc_hf.tasks import chat
from gradacc_hf.tasks.chat_formats import MixedFormat, find_format, note_format
from gradacc_hf.tasks.generate import as_answer
from gradacc_hf.tasks.lean_loss import make_lean
from gradacc_hf.tasks.packing import check_packing, pack
from gradacc_hf.tasks.prompts import answer_samples, write_answers
from gradacc_hf.tasks.unigram import perplexity, unigram_loss, with_perplexity
from gradacc_hf.training.loop import evaluate
from gradacc_hf.training.run_log import by_source


def features(row, tokenizer, form, max_length):
    """Return the tokens of a row, and as `labels` the tokens that the loss covers."""
    tokenize = chat.tokenize_chat if form.of(row).is_chat else chat.tokenize_completion
    row = form.read(row)
    return tokenize(tokenizer, **row, max_length=max_length)


class CausalLM(Recipe):
    """Teach a language model to answer."""

    model_class = AutoModelForCausalLM
    padding_side = "right"
    saves_padding_side = False  # a text is continued after padding on the left
    pipeline_tag = "text-generation"
    baseline_is = "the frequencies of tokens"
    example = "Write a Python function that adds two numbers."
    num_items = "next_token"
    lean_loss = True
    takes_teacher = True
    writes_texts = True

    @dataclass
    class Data(DataConfig):
        chat_template: str | None = None
        """File with a chat template (Jinja).
        Used instead of the model's own."""
        packing: bool = False
        """Pack examples instead of padding them.
        The examples of a micro-batch form one row. None attends to another."""
        format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt", "text"] = "auto"
        """Format of the rows; auto finds it.
        The plan names the format, and others that the columns allow. prompt: with completion or chosen."""
        learn: Literal["all", "last"] = "all"
        """Assistant turns to learn: all, or the last.
        Turns with weight 0 or train false are not learned in any case."""
        samples: int = 4
        """Validation prompts to answer for the report.
        They are answered after each evaluation. 0: none."""
        sample_tokens: int = 64
        """Tokens after which an answer ends."""

        def rules(self):
            yield from super().rules()
            yield "samples", self.samples >= 0, "0 prompts or more"
            yield "sample_tokens", self.sample_tokens >= 1, "1 token or more"

    def datasets(self):
        rows = self.rows()
        has_template = bool(self.tokenizer.chat_template)
        self.form = self.find_forms(rows, has_template)
        self.of_chats = self.form.is_chat
        if self.of_chats:
            chat.check_chat_template(self.tokenizer, self.config.model.name)
        self.reading.use([*self.form.columns, "tools"] if self.of_chats else self.form.columns)
        rows = self.check_rows(*rows, self.form.problem, "data.train")
        tokens = [dataset.map(features, fn_kwargs=self.settings) for dataset in rows]
        numbers = [file_rows(dataset) for dataset in rows]
        tokens = self.check_rows(*tokens, chat.tokens_problem, "data.train", numbers)
        train, validation = self.note_truncated(tokens)
        self.validation = validation
        if self.of_chats:
            names = [n for n in train.column_names if n not in ("input_ids", "labels")]
            rows = chain(*(dataset.select_columns(names) for dataset in (train, validation)))
            found = (self.form.read(row) for row in rows if self.form.of(row).is_chat)
            chat.note_chats(self.reading, self.tokenizer, found)
        return tuple(
            dataset.select_columns(["input_ids", "labels", *carried(dataset)])
            for dataset in (train, validation)
        )

    def find_forms(self, rows, has_template):
        """Return the format of the rows, or the formats of the sources of a mixture."""
        forms = []
        for number, of_source in enumerate(self.rows_of_sources(rows)):
            name = self.setting_of_source(number, "format")
            forms.append(find_format(of_source, name, self.data.learn, has_template))
            note_format(self.reading, forms[-1], of_source, has_template)
        return MixedFormat(tuple(forms)) if len(forms) > 1 else forms[0]

    def row_problem(self, row):
        return self.form.problem(row)

    def examples_of(self, rows):
        rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        found = [features(row, **self.settings) for row in rows]
        columns = {name: [row[name] for row in found] for name in found[0]}
        return {**columns, "problem": [chat.tokens_problem(row) or "" for row in found]}

    @cached_property
    def tokenizer(self):
        tokenizer = super().tokenizer
        chat.use_template(tokenizer, self.data.chat_template)
        return tokenizer

    @property
    def settings(self):
        """The arguments of `features`."""
        return {"tokenizer": self.tokenizer, "form": self.form, "max_length": self.data.max_length}

    def model(self):
        model = super().model()
        if self.data.packing:
            check_packing(model, self.config.model.name, self.data.max_length)
        make_lean(model, self.config.budget.lean_loss)
        return model

    def check_model(self):
        """Check the weights, and, by loading them, whether the model allows packing and the lean loss."""
        super().check_model()
        if self.data.packing or self.config.budget.lean_loss is True:
            self.model()

    def collate(self, examples, pad_to=None):
        return pack(examples) if self.data.packing else super().collate(examples, pad_to)

    @property
    def pad_to(self):
        """The padding of a batch; packed examples have none."""
        return "nothing" if self.data.packing else "micro_batch"

    def validate(self, model, windows, accelerator):
        options = {"accelerator": accelerator, "compute_loss": self.loss, "predict": None}
        found = evaluate(model, windows, sources=self.validation_sources, **options)
        rows, settings = map(self.form.read, self.validation), (self.data.samples, self.data.sample_tokens)
        self.samples[:] = answer_samples(accelerator.unwrap_model(model), self.tokenizer, rows, *settings)
        return with_perplexity({"loss": found.loss} | by_source("loss", found.source_losses))

    def example_of(self, row):
        """Return the first message of the user, the prompt, or the first words of a text."""
        row = self.form.read(row)
        asked = [turn["content"] for turn in row.get("messages") or () if turn["role"] == "user"]
        if asked:
            return asked[0]
        return row.get("prompt") or " ".join(row.get("completion", "").split()[:8])

    def answer(self, model, inputs):
        """Return the answers to chats, prompts or texts."""
        longest = self.generation.max_new_tokens or self.data.sample_tokens
        options = {"batch_size": len(inputs), "of_chats": self.of_chats, **self.generation.options}
        answers = write_answers(model, self.tokenizer, inputs, longest, **options)
        return [as_answer("answer", text, is_truncated) for text, is_truncated in answers]

    def baseline(self, train, validation):
        """Return the perplexity of the frequencies that tokens have in the training labels."""
        learned = (
            (token for row in rows["labels"] for token in row[1:] if token != IGNORED)
            for rows in (train, validation)
        )
        return {"perplexity": perplexity(unigram_loss(*learned, len(self.tokenizer)))}


if __name__ == "__main__":
    run(CausalLM)
