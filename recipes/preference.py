"""Teach a model which of two answers is better: DPO, IPO, ORPO, SimPO, KTO, and reward models.

    ./launch.sh recipes/preference.py --config configs/preference_offline.yaml --budget auto

Your own: a JSONL file with `prompt`, `chosen` and `rejected`, each a text or a list of messages. Without
`prompt`, both answers begin with the same messages. For KTO: `prompt`, `completion` and `label` (true or
false), or pairs, which become two examples each. `--data.loss` names the loss: recipes/README.md,
"Preferences". The loss covers the answers alone.

DPO and KTO compare the model with the model from which training starts. Its log-probabilities are computed
once, before the first window, and cached.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gradacc_hf.config import DataConfig
from gradacc_hf.config.schema import tokens_per_micro_batch, with_settings
from gradacc_hf.data.columns import file_rows
from gradacc_hf.recipe import Recipe
from gradacc_hf.run import run
from gradacc_hf.run.setup import make_model
from gradacc_hf.tasks import chat
from gradacc_hf.tasks.answer_scores import REFERENCE, TOKENS, check_scores, rows_of, score_rows, scores_of
from gradacc_hf.tasks.generate import as_answer
from gradacc_hf.tasks.kl import EXAMPLES, load_reference, mean_kl
from gradacc_hf.tasks.lean_loss import make_lean
from gradacc_hf.tasks.preference_examples import (
    answer_lengths,
    answers_in,
    collate,
    examples_of,
    features,
    lengths_of,
    padded_rows,
    tokens_to_score,
)
from gradacc_hf.tasks.preference_formats import PAIR, MixedPreferences, find_format
from gradacc_hf.tasks.preference_losses import KtoLoss, PairLoss
from gradacc_hf.tasks.preference_metrics import accuracy_of_length, answer_metrics, pair_metrics
from gradacc_hf.tasks.prompts import answer_samples, write_answers
from gradacc_hf.tasks.references import References, cache_folder
from gradacc_hf.training.settings import LoraConfig
from gradacc_hf.utils.adapters import has_adapters, without_adapters
from gradacc_hf.utils.rng import preserve_rng_state


class Preference(Recipe):
    """Teach a model which of two answers is better."""

    model_class = AutoModelForCausalLM
    padding_side = "right"
    saves_padding_side = False  # a text is continued after padding on the left
    pipeline_tag = "text-generation"
    baseline_is = "chance, or the choice by length that the training pairs favour"
    example = "Write a Python function that adds two numbers."
    lean_loss = True
    has_router_loss = False  # the scores of answers would include it
    writes_texts = True

    @dataclass
    class Data(DataConfig):
        loss: Literal["dpo", "orpo", "simpo", "kto", "reward"] = "dpo"
        """The loss.
        kto learns from single answers with a label. reward trains a classifier that scores texts."""
        variant: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
        """The variant of dpo."""
        beta: float | None = None
        """Factor of the rewards.
        Default: 2 with simpo, else 0.1. The larger it is, the less the model departs from the reference.
        orpo: weight of the odds ratio."""
        gamma: float = 1.0
        """Margin of simpo."""
        label_smoothing: float = 0.0
        """Share of pairs that may be reversed.
        For simpo, and for dpo with variant sigmoid."""
        desirable_weight: float = 1.0
        """Weight of desirable answers in kto."""
        undesirable_weight: float = 1.0
        """Weight of undesirable answers in kto."""
        chat_template: str | None = None
        """File with a chat template (Jinja).
        Used instead of the model's own."""
        samples: int = 4
        """Validation prompts to answer for the report.
        They are answered after each evaluation. 0: none."""
        sample_tokens: int = 64
        """Tokens after which an answer ends."""

        def rules(self):
            yield from super().rules()
            smooths = self.loss == "simpo" or (self.loss == "dpo" and self.variant == "sigmoid")
            is_possible = self.loss == "dpo" or self.variant == "sigmoid"
            yield "variant", is_possible, "sigmoid, except with data.loss dpo"
            yield "beta", self.beta is None or self.beta > 0, "a number above 0, such as 0.1"
            yield "label_smoothing", 0 <= self.label_smoothing < 0.5, "0 or more, and below 0.5"
            is_possible = smooths or not self.label_smoothing
            yield "label_smoothing", is_possible, "0, except with simpo and dpo sigmoid"
            for name in ("desirable_weight", "undesirable_weight"):
                yield name, getattr(self, name) > 0, "a number above 0"
            is_possible = self.beta is None or self.loss != "reward"
            yield "beta", is_possible, "null with data.loss reward, whose scores have no factor"
            of_kto = dict.fromkeys(("desirable_weight", "undesirable_weight"), "kto")
            for name, loss in {"gamma": "simpo", **of_kto}.items():
                default = getattr(type(self), name)
                is_possible = self.loss == loss or getattr(self, name) == default
                yield name, is_possible, f"{default:g}, except with data.loss {loss}"
            weighs = self.loss in ("simpo", "reward") or (self.loss == "dpo" and self.variant != "hinge")
            is_possible = weighs or self.weight_column is None
            yield "weight_column", is_possible, "null with data.loss kto and orpo, and dpo hinge"
            yield "samples", self.samples >= 0, "0 prompts or more"
            yield "sample_tokens", self.sample_tokens >= 1, "1 token or more"

    def __init__(self, config):
        super().__init__(config)
        data = self.data
        self.of_answers, self.of_rewards = data.loss == "kto", data.loss == "reward"
        beta = data.beta or (2.0 if data.loss == "simpo" else 0.1)
        self.loss = PairLoss(data.loss, data.variant, beta, data.gamma, data.label_smoothing)
        if self.of_answers:
            self.loss = KtoLoss(beta, data.desirable_weight, data.undesirable_weight)
        if self.of_rewards:
            self.model_class, self.pipeline_tag = AutoModelForSequenceClassification, "text-classification"
            self.writes_texts = False
        self.references = References()

    def datasets(self):
        rows = self.rows(together=("prompt",))
        forms = [find_format(of_source, self.of_answers) for of_source in self.rows_of_sources(rows)]
        self.forms = MixedPreferences(tuple(forms))
        self.of_chats = any(form.is_chat for form in forms)
        if self.of_chats:
            chat.check_chat_template(self.tokenizer, self.config.model.name)
        for form in forms:
            self.reading.note("format", str(form))
        self.reading.use([*dict.fromkeys(name for form in forms for name in form.columns), "tools"])
        rows = self.check_rows(*rows, lambda row: self.forms.of(row).problem(row), "data.train")
        tokens = [dataset.map(features, fn_kwargs=self.settings) for dataset in rows]
        numbers = [file_rows(dataset) for dataset in rows]
        tokens = self.check_rows(*tokens, chat.tokens_problem, "data.train", numbers)
        splits = self.note_truncated(tokens, {f"{name}_lost": f"tokens of {name}" for name in PAIR})
        self.validation = splits[1]
        self.note_settings(splits)
        return tuple(examples_of(split, self.of_answers, self.data.max_length) for split in splits)

    def note_settings(self, splits):
        """Note what chats leave out, and where the reference comes from."""
        if self.of_chats:
            rows = (row for split in splits for row in split if self.forms.of(row).is_chat)
            chats = (one for row in rows for one in self.forms.of(row).read(row))
            chat.note_chats(self.reading, self.tokenizer, chats)
        if self.needs_reference:
            where = "the model from which training starts, computed before the first window, cached in"
            self.model_notes["reference"] = f"{where} {cache_folder()}"

    @property
    def needs_reference(self):
        """Whether the loss compares the model with a reference."""
        return self.data.loss in ("dpo", "kto")

    @cached_property
    def tokenizer(self):
        tokenizer = super().tokenizer
        chat.use_template(tokenizer, self.data.chat_template)
        return tokenizer

    @property
    def settings(self):
        """The arguments of `features`."""
        return {"tokenizer": self.tokenizer, "forms": self.forms, "max_length": self.data.max_length}

    @property
    def columns_padded_together(self):
        """Whether the answers of a pair are rows of one batch, with one padded length."""
        return not self.of_answers

    def lengths(self, dataset):
        return lengths_of(dataset, self.of_answers)

    def collate(self, examples, pad_to=None):
        references = self.references if self.needs_reference else None
        multiple = self.config.budget.pad_to_multiple_of or 1
        return collate(examples, self.of_answers, references, self.tokenizer.pad_token_id, multiple)

    def num_items(self, batch):
        """Return the number of examples."""
        return len(batch[TOKENS])

    def model_overrides(self):
        if not self.of_rewards:
            return {}
        return {"num_labels": 1, "pad_token_id": self.tokenizer.pad_token_id}

    def model(self):
        return self.with_scores(super().model())

    def with_scores(self, model):
        """Return a model whose outputs have a score for each row."""
        if not self.of_rewards:
            make_lean(model, self.config.budget.lean_loss)
        score_rows(model, self.loss, with_labels=not self.of_rewards)
        if not self.of_rewards:
            check_scores(model, self.config.model.name)
        return model

    def load(self, folder):
        model = super().load(folder)
        has_adapters = (Path(folder) / "adapter_config.json").exists()
        return model if has_adapters else self.with_scores(model)  # with adapters, `model` did it

    def check_model(self):
        super().check_model()
        if not self.of_rewards:
            self.model()

    def padded_part(self, model, batch):
        return model, rows_of(batch)

    def before_training(self, model, datasets, accelerator):
        """Compute the reference log-probabilities of all answers."""
        if not self.needs_reference:
            return
        answers = (answer for dataset in datasets for answer in self.answers_of(dataset))
        tokens = tokens_per_micro_batch(self.config.budget, accelerator.device.type)
        tokens = tokens or self.config.budget.micro_batch_size * self.data.max_length
        self.references.compute(model, answers, accelerator, tokens, self.tokenizer.pad_token_id)

    def write_run_files(self, folder):
        self.references.write(folder)

    def read_run_files(self, folder):
        self.references.read(folder)

    def answers_of(self, dataset):
        """Yield the token ids and labels of all answers."""
        for example in dataset:
            yield from answers_in(example, self.of_answers)

    def know_references(self, windows, accelerator):
        """Compute the reference log-probabilities of other data, with the model that training began with."""
        if not self.needs_reference:
            return
        examples = windows.examples(np.arange(windows.plan.num_examples))
        if self.references.missing(self.answers_of(examples)):
            self.before_training(self.started_from(), [examples], accelerator)

    def started_from(self):
        """Return the model from which training starts. New adapters change nothing, and are left out."""
        config = self.config
        if not config.model.load_in_4bit and not (self.earlier and self.earlier.has_adapters):
            config = with_settings(config, {"model.lora": LoraConfig()})
        with preserve_rng_state():
            return make_model(type(self)(config))

    def kl(self, model, windows, accelerator):
        """Return `kl`, a mean over the answer tokens of some examples, if the reference is there."""
        chosen = np.unique(np.linspace(0, windows.plan.num_examples - 1, EXAMPLES).astype(int))
        pairs = [answers_in(example, self.of_answers) for example in windows.examples(chosen)]
        answers = [answer for pair in pairs for answer in pair[: 1 if self.of_answers else 2]]
        inner = accelerator.unwrap_model(model)
        from_new_adapters = not (self.earlier and self.earlier.has_adapters)
        from_new_adapters &= self.config.model.lora.init == "default"
        if has_adapters(inner) and from_new_adapters:
            return {"kl": mean_kl(inner, partial(without_adapters, inner), answers, accelerator)}
        if (reference := load_reference(self.started_from, accelerator)) is None:
            return {}
        return {"kl": mean_kl(inner, partial(nullcontext, reference), answers, accelerator)}

    def predict(self, outputs, batch):
        scores = scores_of(outputs)
        scores = scores.view(2, -1).T if self.of_answers else scores.view(-1, 2)
        values = [part.float().cpu().numpy() for part in (scores, batch[REFERENCE], batch[TOKENS])]
        return np.stack(values, axis=2), batch.get("desirable", batch[TOKENS][:, 0]).cpu().numpy()

    def metrics(self, predictions, references):
        if self.of_answers:
            return answer_metrics(self.loss, predictions, references)
        return pair_metrics(self.loss, predictions)

    def validate(self, model, windows, accelerator):
        self.know_references(windows, accelerator)
        scores = super().validate(model, windows, accelerator)
        if self.needs_reference:
            scores |= self.kl(model, windows, accelerator)
        if self.writes_texts:
            rows = (row for row in self.validation if row["desirable"])
            rows = (self.forms.of(row).read(row)[0] for row in rows)
            settings = self.data.samples, self.data.sample_tokens
            self.samples[:] = answer_samples(accelerator.unwrap_model(model), self.tokenizer, rows, *settings)
        return scores

    def baseline(self, train, validation):
        """Return the accuracy of chance, or of a choice by length, and no margin."""
        lengths = [answer_lengths(examples, self.of_answers) for examples in (train, validation)]
        return {"accuracy": accuracy_of_length(*lengths), "margin": 0.0}

    def example_of(self, row):
        """Return the first message of the user, or the prompt."""
        row = self.forms.of(row).read(row)[0]
        asked = [turn["content"] for turn in row.get("messages") or () if turn["role"] == "user"]
        return asked[0] if asked else row["prompt"] or " ".join(row["completion"].split()[:8])

    def answer(self, model, inputs):
        """Return the answers to chats, prompts or texts; of a reward model, the scores of texts."""
        if self.of_rewards:
            return self.scores(model, inputs)
        longest = self.generation.max_new_tokens or self.data.sample_tokens
        options = {"batch_size": len(inputs), **self.generation.options}
        answers = write_answers(model, self.tokenizer, inputs, longest, **options)
        return [as_answer("answer", text, is_truncated) for text, is_truncated in answers]

    def scores(self, model, inputs):
        """Return the scores of texts, chats, and rows with a prompt and answers."""
        found = tokens_to_score(inputs, self.tokenizer, self.data.max_length)
        answers = [answer for each in found for answer in each.values()]
        rows = padded_rows(answers, self.tokenizer.pad_token_id)
        rows = {name: part.to(model.device) for name, part in rows.items()}
        scores = iter(scores_of(model(**rows)).tolist())
        return [{name: next(scores) for name in each} for each in found]


if __name__ == "__main__":
    run(Preference)
