"""Teach a model which of two answers is better: DPO, IPO, ORPO, SimPO, KTO, and reward models.

    ./launch.sh recipes/preference.py --config configs/preference_offline.yaml --budget auto

Your own: a JSONL file with `prompt`, `chosen` and `rejected`, each a text or a list of messages. Without
`prompt`, both answers begin with the same messages. For KTO: `prompt`, `completion` and `label` (true or
false), or pairs, which become two examples each. `--data.loss` names the loss: recipes/README.md,
"Preferences". The loss covers the answers alone.

DPO and KTO compare the model with the model from which training starts. Its log-probabilities are computed
once, before the first window, and cached.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from datasets import concatenate_datasets
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.config import DataConfig
from gradacc_hf.config.schema import tokens_per_micro_batch
from gradacc_hf.data.columns import file_rows, list_lengths
from gradacc_hf.data.sources import carried
from gradacc_hf.errors import refuse
from gradacc_hf.recipe import Recipe
from gradacc_hf.run import run
from gradacc_hf.run.setup import make_model
from gradacc_hf.tasks import chat
from gradacc_hf.tasks.answer_scores import (
    KL_ROWS,
    REFERENCE,
    ROWS,
    TOKENS,
    check_scores,
    rows_of,
    score_rows,
    scores_of,
)
from gradacc_hf.tasks.generate import as_answer
from gradacc_hf.tasks.lean_loss import make_lean
from gradacc_hf.tasks.preference_formats import (
    MixedPreferences,
    answers_to_score,
    find_format,
    labels_as_bools,
)
from gradacc_hf.tasks.preference_losses import KtoLoss, PairLoss
from gradacc_hf.tasks.preference_metrics import accuracy_of_length, answer_metrics, pair_metrics
from gradacc_hf.tasks.prompts import answer_samples, write_answers
from gradacc_hf.tasks.references import References, cache_folder

PAIR = ("chosen", "rejected")


def features(row, tokenizer, forms, max_length):
    """Return the tokens of each answer of a row with its prompt, and as `labels` the tokens of the answer."""
    form = forms.of(row)
    tokenize = chat.tokenize_chat if form.is_chat else chat.tokenize_completion
    found, problem = {}, ""
    for name, answer in zip(PAIR, form.read(row), strict=False):
        tokens = tokenize(tokenizer, **answer, max_length=max_length)
        found |= {f"{name}_{key}": tokens[key] for key in ("input_ids", "labels")}
        found[f"{name}_lost"] = tokens["lost_tokens"]
        problem = problem or (f"{name}: {tokens['problem']}" if tokens["problem"] else "")
    if "rejected_labels" in found and not problem:
        same = all(found[f"chosen_{key}"] == found[f"rejected_{key}"] for key in ("input_ids", "labels"))
        problem = f"its answers are equal within data.max_length {max_length}" if same else ""
    return {**found, "problem": problem}


def single_answers(rows, max_length):
    """Return each answer of a batch of rows as an example, with the answer of the previous row for the KL."""
    names = [name for name in PAIR if f"{name}_labels" in rows]
    kept = [name for name in rows if not name.startswith(("chosen_", "rejected_", "previous_", "label"))]
    found = {name: [] for name in ("input_ids", "labels", "kl_input_ids", "kl_labels", "desirable", *kept)}
    for number in range(len(rows["chosen_labels"])):
        for name in names:
            row = {key: rows[f"{name}_{key}"][number] for key in ("input_ids", "labels")}
            other = {key: rows[f"previous_{name}_{key}"][number] for key in ("input_ids", "labels")}
            (start, _), (begins, ends) = map(answer_span, (row["labels"], other["labels"]))
            answer = other["input_ids"][begins:ends], other["labels"][begins:ends]
            found["kl_input_ids"].append([*row["input_ids"][:start], *answer[0]][:max_length])
            found["kl_labels"].append([*[IGNORED] * start, *answer[1]][:max_length])
            found["desirable"].append(rows["label"][number] if "label" in rows else name == "chosen")
            for key, value in [*row.items(), *((key, rows[key][number]) for key in kept)]:
                found[key].append(value)
    return found


def answer_span(labels):
    """Return the first token of an answer, and the last token + 1."""
    places = [place for place, label in enumerate(labels) if label != IGNORED]
    return places[0], places[-1] + 1


class Preference(Recipe):
    """Teach a model which of two answers is better."""

    model_class = AutoModelForCausalLM
    padding_side = "right"
    saves_padding_side = False  # a text is continued after padding on the left
    pipeline_tag = "text-generation"
    baseline_is = "chance, or the choice by length that the training pairs favour"
    example = "Write a Python function that adds two numbers."
    lean_loss = True
    writes_texts = True

    @dataclass
    class Data(DataConfig):
        loss: Literal["dpo", "orpo", "simpo", "kto", "reward"] = "dpo"
        """The loss.
        kto learns from single answers with a label. reward trains a classifier that scores texts."""
        variant: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
        """The variant of dpo."""
        beta: float = 0.1
        """Factor of the rewards.
        The larger it is, the less the model departs from the reference. orpo: weight of the odds ratio."""
        gamma: float = 0.5
        """Margin of simpo."""
        label_smoothing: float = 0.0
        """Share of pairs that may be the wrong way round.
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
            yield (
                "variant",
                self.loss == "dpo" or self.variant == "sigmoid",
                "sigmoid, except with data.loss dpo",
            )
            yield "beta", self.beta > 0, "a number above 0, such as 0.1"
            yield "label_smoothing", 0 <= self.label_smoothing < 0.5, "0 or more, and below 0.5"
            yield (
                "label_smoothing",
                smooths or not self.label_smoothing,
                "0, except with simpo and dpo sigmoid",
            )
            for name in ("desirable_weight", "undesirable_weight"):
                yield name, getattr(self, name) > 0, "a number above 0"
            yield "samples", self.samples >= 0, "0 prompts or more"
            yield "sample_tokens", self.sample_tokens >= 1, "1 token or more"

    def __init__(self, config):
        super().__init__(config)
        data = self.data
        self.of_answers, self.of_rewards = data.loss == "kto", data.loss == "reward"
        self.loss = PairLoss(data.loss, data.variant, data.beta, data.gamma, data.label_smoothing)
        if self.of_answers:
            self.loss = KtoLoss(data.beta, data.desirable_weight, data.undesirable_weight)
        if self.of_rewards:
            self.model_class, self.pipeline_tag = AutoModelForSequenceClassification, "text-classification"
            self.writes_texts = False
        self.references = References()

    def datasets(self):
        rows = [labels_as_bools(split) for split in self.rows()]
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
        names = ["answers"] if "rejected_lost" not in tokens[0].column_names else PAIR
        splits = self.note_truncated(
            tokens, {f"{c}_lost": f"tokens of {n}" for c, n in zip(PAIR, names, strict=False)}
        )
        self.validation = splits[1]
        self.note_settings(splits)
        return tuple(map(self.examples, splits))

    def note_settings(self, splits):
        """Note what chats leave out, and where the reference comes from."""
        if self.of_chats:
            rows = (row for split in splits for row in split if self.forms.of(row).is_chat)
            chat.note_chats(
                self.reading, self.tokenizer, (one for row in rows for one in self.forms.of(row).read(row))
            )
        if self.needs_reference:
            where = "the model from which training starts, computed before the first window, cached in"
            self.model_notes["reference"] = f"{where} {cache_folder()}"

    @property
    def needs_reference(self):
        """Whether the loss compares the model with a reference."""
        return self.data.loss in ("dpo", "kto")

    def examples(self, rows):
        """Return the examples of tokenised rows."""
        columns = [name for name in rows.column_names if name.endswith(("_input_ids", "_labels"))]
        if not self.of_answers:
            return rows.select_columns([*columns, *carried(rows)])
        previous = rows.select([len(rows) - 1, *range(len(rows) - 1)]).select_columns(columns)
        previous = previous.rename_columns({name: f"previous_{name}" for name in columns})
        label = ["label"] if "label" in rows.column_names else []
        both = concatenate_datasets(
            [rows.select_columns([*columns, *label, *carried(rows)]), previous], axis=1
        )
        options = {"batched": True, "fn_kwargs": {"max_length": self.data.max_length}}
        return both.map(single_answers, remove_columns=both.column_names, **options)

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
        """Return the tokens of each answer with its prompt; of a pair, the longer one is the second."""
        if self.of_answers:
            return list_lengths(dataset, "input_ids")
        return np.sort(
            np.stack([list_lengths(dataset, f"{name}_input_ids") for name in PAIR], axis=1), axis=1
        )

    def collate(self, examples, pad_to=None):
        """Return a batch: pairs, chosen before rejected; or answers, and answers to other prompts."""
        answers = [self.answers_in(example) for example in examples]
        if self.of_answers:
            batch = self.pad([pair[0] for pair in answers])
            batch |= zip(KL_ROWS, self.pad([pair[1] for pair in answers]).values(), strict=True)
            batch["desirable"] = torch.tensor([float(example["desirable"]) for example in examples])
        else:
            batch = self.pad([answer for pair in answers for answer in pair])
        reference = self.references if self.needs_reference else None
        values = [[reference[answer] if reference else 0.0 for answer in pair] for pair in answers]
        tokens = [[sum(i != IGNORED for i in labels[1:]) for _, labels in pair] for pair in answers]
        return batch | {REFERENCE: torch.tensor(values), TOKENS: torch.tensor(tokens)}

    def pad(self, answers):
        """Return answers as the rows of a batch."""
        ids, labels = ([torch.tensor(part) for part in parts] for parts in zip(*answers, strict=True))
        width = -max(map(len, ids)) % (self.config.budget.pad_to_multiple_of or 1)
        columns = ids, [torch.ones_like(row) for row in ids], labels
        fillers = self.tokenizer.pad_token_id, 0, IGNORED
        return {
            name: torch.nn.functional.pad(pad_sequence(rows, True, filler), (0, width), value=filler)
            for name, rows, filler in zip(ROWS, columns, fillers, strict=True)
        }

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
            yield from self.answers_in(example)

    def answers_in(self, example):
        """Return the token ids and labels of both answers of an example; for KTO, the second is of its KL."""
        prefixes = ("", "kl_") if self.of_answers else ("chosen_", "rejected_")
        return [(example[f"{prefix}input_ids"], example[f"{prefix}labels"]) for prefix in prefixes]

    def know_references(self, windows, accelerator):
        """Compute the reference log-probabilities of other data, with the model that training began with."""
        if not self.needs_reference:
            return
        examples = windows.examples(np.arange(windows.plan.num_examples))
        if self.references.missing(self.answers_of(examples)):
            started_from = type(self)(self.config)
            self.before_training(make_model(started_from), [examples], accelerator)

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
        if self.writes_texts:
            rows = (row for row in self.validation if row.get("label", True))
            rows = (self.forms.of(row).read(row)[0] for row in rows)
            settings = self.data.samples, self.data.sample_tokens
            self.samples[:] = answer_samples(accelerator.unwrap_model(model), self.tokenizer, rows, *settings)
        return scores

    def baseline(self, train, validation):
        """Return the accuracy of chance, or of a choice by length, and no margin."""
        return {"accuracy": accuracy_of_length(*map(self.answer_lengths, (train, validation))), "margin": 0.0}

    def answer_lengths(self, examples):
        """Return the tokens of the chosen and of the rejected answers of examples."""
        if not self.of_answers:
            lengths = {
                name: [sum(i != IGNORED for i in row) for row in examples[f"{name}_labels"]] for name in PAIR
            }
            return {**{name: np.array(found) for name, found in lengths.items()}, "paired": np.array(True)}
        lengths = np.array([sum(i != IGNORED for i in row) for row in examples["labels"]])
        good = np.array(examples["desirable"], dtype=bool)
        return {"chosen": lengths[good], "rejected": lengths[~good]}

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
        found = [answers_to_score(given, f"input {number:,}") for number, given in enumerate(inputs, start=1)]
        tokens = []
        for number, answer in (
            (n, answer) for n, answers in enumerate(found, 1) for answer in answers.values()
        ):
            tokenize = chat.tokenize_chat if "messages" in answer else chat.tokenize_completion
            one = tokenize(self.tokenizer, **answer, max_length=self.data.max_length)
            if one["problem"]:
                refuse(f"input {number:,}", one["problem"], "give another")
            tokens.append((one["input_ids"], one["labels"]))
        batch = {name: value.to(model.device) for name, value in self.pad(tokens).items()}
        scores = iter(scores_of(model(**batch)).tolist())
        return [{name: next(scores) for name in answers} for answers in found]


if __name__ == "__main__":
    run(Preference)
