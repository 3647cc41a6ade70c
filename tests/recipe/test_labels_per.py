"""Several integer labels per text are never taken for one label per token."""

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from recipe_runs import load_recipe, make_recipe, summary, write_rows
from transformers import AutoModelForSequenceClassification

from gradacc_hf import WindowLoader, verify
from gradacc_hf.errors import InputError
from gradacc_hf.recipe import Recipe
from gradacc_hf.recipe.labels_per import find_labels_per

TextClassification = load_recipe("text_classification").TextClassification


def without_labels(model, args, inputs):
    """Leave the loss to the recipe, as CONTRIBUTING.md shows."""
    return args, {name: value for name, value in inputs.items() if name != "labels"}


class TwoQuestions(Recipe):
    """Answer two questions about a text, each with one of two classes."""

    model_class = AutoModelForSequenceClassification

    def datasets(self):
        def features(row):
            tokens = self.tokenizer(row["text"], truncation=True, max_length=self.data.max_length)
            return {"input_ids": tokens["input_ids"], "labels": [row["first"], row["second"]]}

        train, validation = self.rows()
        return tuple(split.map(features, remove_columns=split.column_names) for split in (train, validation))

    def model_overrides(self):
        return {"id2label": dict(enumerate("abcd")), "label2id": dict(zip("abcd", range(4), strict=True))}

    def model(self):
        model = super().model()
        model.register_forward_pre_hook(without_labels, with_kwargs=True)
        return model

    def loss(self, outputs, batch):
        return torch.nn.functional.cross_entropy(outputs.logits.view(-1, 2), batch["labels"].view(-1))

    def metrics(self, predictions, references):
        right = [
            (p.reshape(2, 2).argmax(1) == r).mean() for p, r in zip(predictions, references, strict=True)
        ]
        return {"accuracy": sum(right) / len(right)}


def rows():
    """Return texts; some have as many tokens as labels."""
    return [{"text": "tea " * (i % 5), "first": i % 2, "second": i // 2 % 2} for i in range(60)]


def test_two_labels_per_text_work_and_are_exact(start, tiny_bert):
    data = write_rows("rows.jsonl", rows())
    outcome = start(
        TwoQuestions, "--data.train", data, "--train.best_metric", "accuracy", "--output.dir", "run"
    )
    assert outcome.code == 0, outcome.err
    assert 0 <= summary("run")["eval"]["accuracy"] <= 1
    recipe = make_recipe(TwoQuestions, "--data.train", data, "--model.name", tiny_bert, "--model.dropout", 0)
    training, _ = recipe.read_examples()
    assert recipe.labels_per == "example"
    windows = WindowLoader(
        training, 16, micro_batch_size=3, collate_fn=recipe.collate, accelerator=Accelerator(cpu=True)
    )
    assert verify(recipe.model(), windows, recipe.loss).exact


@pytest.mark.parametrize(
    ("labels", "tokens", "wanted"),
    [
        ([[0, 1], [1, 1]], [[5, 6, 7], [5, 6]], "example"),
        ([[0, 1, 1], [1, 1]], [[5, 6, 7], [5, 6]], "token"),
        ([[0.0, 1.0], [1.0, 1.0]], [[5, 6], [5, 6]], None),
        ([0, 1], [[5, 6], [5, 6]], None),
    ],
)
def test_the_lengths_decide_what_labels_are_for(labels, tokens, wanted):
    assert find_labels_per(Dataset.from_dict({"labels": labels, "input_ids": tokens})) == wanted


def test_two_labels_for_two_tokens_in_every_text_are_stated_in_the_plan(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [{"text": "", "first": i % 2, "second": 0} for i in range(60)]  # [CLS] [SEP]
    words = ["--data.train", write_rows("rows.jsonl", texts), "--model.name", tiny_bert]
    recipe = make_recipe(TwoQuestions, *words)
    recipe.read_examples()
    assert recipe.labels_per == "token"
    note = recipe.model_notes["labels per token"]
    assert note.startswith("treated as labels of 2 tokens, as every example has this many")
    recipe = make_recipe(TwoQuestions, "--data.train", write_rows("rows.jsonl", rows()), *words[2:])
    recipe.read_examples()
    assert recipe.model_notes == {}


def test_an_example_without_labels_is_one_line():
    examples = Dataset.from_dict({"labels": [[0, 1], None], "input_ids": [[5, 6], [5, 6, 7]]})
    with pytest.raises(InputError, match=r"^labels: example 1 has none; give it labels, or leave it out$"):
        find_labels_per(examples)


def test_a_micro_batch_alone_does_not_decide(tiny_bert):
    """Texts of three tokens with three labels each, in a data set with other texts."""
    recipe = make_recipe(TextClassification, "--data.train", "x.csv", "--model.name", tiny_bert)
    recipe.labels_per = "example"
    examples = [{"input_ids": [101, 5, 102], "labels": [0, 1, 1]}]
    assert recipe.collate(examples, pad_to=6)["labels"].tolist() == [[0, 1, 1]]
    recipe.labels_per = "token"
    assert recipe.collate(examples, pad_to=6)["labels"].tolist() == [[0, 1, 1, -100, -100, -100]]


def test_lists_that_fit_neither_are_one_line(tiny_bert):
    recipe = make_recipe(TextClassification, "--data.train", "x.csv", "--model.name", tiny_bert)
    examples = [{"input_ids": [1, 2, 3], "labels": [0]}, {"input_ids": [1, 2, 3], "labels": [0, 1]}]
    with pytest.raises(
        InputError, match=r"labels: found lists of 1 to 2 integers for 3 to 3 tokens; allowed: one"
    ):
        recipe.collate(examples)
