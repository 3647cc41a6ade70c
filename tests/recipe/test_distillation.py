"""Distillation in recipes: exact for every split, and refused with a teacher that does not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from chat_templates import byte_tokenizer
from recipe_runs import load_recipe, make_recipe, run_recipe, summary, write_rows
from torch.nn import functional

from gradacc_hf.accumulation.accelerate_state import reset_accelerate
from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.accumulation.reference import EXACT, read_gradient, relative_error
from gradacc_hf.cli import main as cli
from gradacc_hf.config.schema import with_settings
from gradacc_hf.embedded import minilm_path
from gradacc_hf.errors import InputError
from gradacc_hf.padding.logits import DeferredLogits
from gradacc_hf.run.padding import choose_padding
from gradacc_hf.run.setup import load_data, make_model, make_windows
from gradacc_hf.training.distillation import Distillation
from gradacc_hf.training.loop import evaluate

CLASSES = {
    name: getattr(load_recipe(name), class_name)
    for name, class_name in {
        "text_classification": "TextClassification",
        "token_classification": "TokenClassification",
        "causal_lm": "CausalLM",
        "masked_lm": "MaskedLM",
    }.items()
}
TEMPERATURE, WEIGHT = 3.0, 0.7
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
TAGS, LABELS = ("O", "B-X", "I-X"), ("ham", "spam", "other")


def bert(folder, kind, labels=None, layers=2, seed=0):
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    names = {} if labels is None else {"id2label": dict(enumerate(labels))}
    names |= {"label2id": {label: i for i, label in enumerate(labels or ())}} if labels else {}
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), num_hidden_layers=layers, max_position_embeddings=64,
        initializer_range=0.2, hidden_dropout_prob=0, attention_probs_dropout_prob=0, **SIZES, **names,
    )  # fmt: skip
    torch.manual_seed(seed)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def llama(folder, layers, seed, vocabulary=259):
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, num_hidden_layers=layers, num_key_value_heads=2, initializer_range=0.2,
        bos_token_id=256, eos_token_id=257, pad_token_id=258, **SIZES,
    )  # fmt: skip
    torch.manual_seed(seed)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with students, teachers, and data of 24 rows of unequal length."""
    folder = tmp_path_factory.mktemp("distillation")
    draw = np.random.default_rng(0)
    words = ["tea", "garden", "prize", "cash", "of", "in"]
    bert(folder / "student", transformers.BertModel)
    bert(folder / "of_texts", transformers.BertForSequenceClassification, LABELS[::-1], layers=3, seed=1)
    bert(folder / "of_tags", transformers.BertForTokenClassification, TAGS[::-1], layers=3, seed=2)
    bert(folder / "of_others", transformers.BertForSequenceClassification, ("a", "b", "c"))
    llama(folder / "llama", 2, seed=3)
    llama(folder / "of_llama", 3, seed=4)
    llama(folder / "of_more", 1, seed=4, vocabulary=300)
    texts = [draw.choice(words, 1 + i % 12).tolist() for i in range(24)]
    labels = [{"text": " ".join(t), "label": LABELS[i % 3]} for i, t in enumerate(texts)]
    write_rows(folder / "texts.jsonl", labels)
    tags = [{"tokens": t, "tags": [TAGS[i % 3] for i, _ in enumerate(t)]} for t in texts]
    write_rows(folder / "tags.jsonl", tags)
    answers = [{"prompt": "say " + t[0], "completion": " " + " ".join(t)} for t in texts]
    write_rows(folder / "answers.jsonl", answers)
    for index, (name, rows) in enumerate((("several", [["ham"], ["ham", "other"], []]),)):
        several = [{"text": " ".join(t), "label": rows[i % 3]} for i, t in enumerate(texts)]
        write_rows(folder / f"{name}.jsonl", [{"text": "tea", "label": ["spam"]}, *several][index:])
    return folder


USES = {
    "text_classification": ("student", "of_texts", "texts.jsonl"),
    "token_classification": ("student", "of_tags", "tags.jsonl"),
    "causal_lm": ("llama", "of_llama", "answers.jsonl"),
}


def flags(models, kind, *more, **changes):
    student, teacher, data = USES[kind]
    settings = {
        "model.name": models / student,
        "model.teacher": models / teacher,
        "model.teacher_temperature": TEMPERATURE,
        "model.teacher_weight": WEIGHT,
        "data.train": models / data,
        "data.validation": models / data,
        "data.max_length": 48,
        "batch.effective": 12,
        "output.tracker": "none",
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return [*(str(word) for key, value in settings.items() for word in (f"--{key}", value)), *more]


def parts(models, kind, *more, **changes):
    """A recipe with its loader and its model."""
    reset_accelerate()
    recipe = make_recipe(CLASSES[kind], *flags(models, kind, *more, **changes))
    recipe, training, validation = load_data(recipe)
    windows, others = make_windows(recipe, training, validation, Accelerator(cpu=True))
    model = make_model(recipe)
    choose_padding(recipe, model, windows)
    return recipe, windows, others, model.train()


def of_formula(recipe, window, windows):
    """The gradient of the formula, from all logits of the whole window in one batch."""
    changes = {"model.teacher": None, "budget.lean_loss": False}
    student = make_model(recipe.with_config(with_settings(recipe.config, changes))).train()
    teacher = type(recipe).model_class.from_pretrained(recipe.config.model.teacher).eval()
    batch = windows.collated(window.indices, window.pad_to).batch
    logits = [
        model(**{k: v for k, v in batch.items() if k != "labels"}).logits for model in (student, teacher)
    ]
    if names := recipe.model_overrides().get("id2label"):
        order = [teacher.config.label2id[name] for name in names.values()]
        assert order != sorted(order)
        logits[1] = logits[1][..., order]
    labels = batch["labels"]
    if recipe.num_items == "next_token":
        logits, labels = [each[:, :-1] for each in logits], labels[:, 1:]
    if labels.is_floating_point():
        task = functional.binary_cross_entropy_with_logits(logits[0], labels)
        p, q = ((each.detach() if i else each) / TEMPERATURE for i, each in enumerate(logits))
        q, p = torch.sigmoid(p), torch.sigmoid(q)
        rows = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean(-1)
        weights = torch.ones(len(labels))
    else:
        chosen = labels != IGNORED
        (student_rows, teacher_rows), labels = (each[chosen] for each in logits), labels[chosen]
        weights = torch.ones(len(labels))
        if getattr(recipe, "class_weights", None) is not None:
            weights = recipe.class_weights[labels]
        task = functional.cross_entropy(student_rows, labels, reduction="none")
        task = (task * weights).sum() / weights.sum()
        p = (teacher_rows.detach() / TEMPERATURE).softmax(-1)
        q = (student_rows / TEMPERATURE).softmax(-1)
        rows = (p * (p.log() - q.log())).sum(-1)
    loss = (1 - WEIGHT) * task + WEIGHT * TEMPERATURE**2 * (rows * weights).sum() / weights.sum()
    loss.backward()
    return read_gradient(student), float(loss)


CASES = {
    "a text": ("text_classification", {"budget__max_tokens": 60}, True),
    "a text, padded, one by one": (
        "text_classification",
        {"budget__micro_batch_size": 1, "budget__padding_free": "off"},
        False,
    ),
    "class weights": (
        "text_classification",
        {"budget__micro_batch_size": 5, "data__class_weights": "ham=3,spam=1,other=2"},
        True,
    ),
    "several labels": (
        "text_classification",
        {"budget__micro_batch_size": 5, "data__problem": "multi_label", "data__labels": ",".join(LABELS)},
        True,
    ),
    "tags": ("token_classification", {"budget__max_tokens": 40}, True),
    "answers": ("causal_lm", {"budget__max_tokens": 200, "budget__lean_loss": "true"}, True),
    "answers, all logits": ("causal_lm", {"budget__max_tokens": 200, "budget__lean_loss": "false"}, True),
    "answers, packed": ("causal_lm", {"budget__max_tokens": 200, "data__packing": "true"}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_formula_over_the_whole_window(models, case, monkeypatch):
    kind, changes, removes = CASES[case]
    if case == "several labels":
        changes = changes | {
            "data__train": models / "several.jsonl",
            "data__validation": models / "several.jsonl",
        }
    monkeypatch.setattr("gradacc_hf.training.distillation.TOKENS_PER_CHUNK", 7)
    monkeypatch.setattr("gradacc_hf.padding.logits.TOKENS_PER_CHUNK", 7)  # several chunks, one computed again
    recipe, windows, _, model = parts(models, kind, **changes)
    assert ("none in the layers" in recipe.model_notes.get("padding in layers", "")) is removes
    assert "teacher's padding" not in recipe.model_notes
    window = next(iter(windows))
    assert len(window) >= 2
    computed = []
    if changes.get("budget__lean_loss") == "true":
        own = DeferredLogits._computed
        monkeypatch.setattr(DeferredLogits, "_computed", lambda *args: computed.append(1) or own(*args))
    for batch in window:
        with window.accelerator.accumulate(model):
            window.accelerator.backward(window.weigh(recipe.compute_loss(model(**batch), batch)))
    expected, loss = of_formula(recipe, window, windows)
    assert relative_error(read_gradient(model), expected) <= EXACT
    assert window.loss == pytest.approx(loss, rel=1e-5)
    assert not computed  # the lean loss never has the logits of all positions, of neither model
