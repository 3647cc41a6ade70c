"""Distillation in recipes: exact for every split, and refused with a teacher that does not fit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from chat_templates import byte_tokenizer
from checkpointed_runs import cut_back
from recipe_runs import load_recipe, make_recipe, run_recipe, summary, write_rows
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from gradacc_hf.accumulation.accelerate_state import reset_accelerate
from gradacc_hf.accumulation.look_ahead import look_ahead
from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.accumulation.reference import EXACT, read_gradient, relative_error
from gradacc_hf.config.schema import with_settings
from gradacc_hf.embedded import minilm_path
from gradacc_hf.run.padding import choose_padding
from gradacc_hf.run.plan import make_plan
from gradacc_hf.run.runner import run
from gradacc_hf.run.setup import load_data, make_model, make_windows
from gradacc_hf.run.teacher import share_kept, teacher_facts

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


def bert(folder, kind, labels=None, layers=2, seed=0, positions=64, **more):
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    names = {} if labels is None else {"id2label": dict(enumerate(labels))}
    names |= {"label2id": {label: i for i, label in enumerate(labels or ())}} if labels else {}
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), num_hidden_layers=layers, max_position_embeddings=positions,
        initializer_range=0.2, hidden_dropout_prob=0, attention_probs_dropout_prob=0, **SIZES, **names,
        **more,
    )  # fmt: skip
    torch.manual_seed(seed)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def llama(folder, layers, seed, vocabulary=259):
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, num_hidden_layers=layers, num_key_value_heads=2, initializer_range=0.2,
        bos_token_id=256, eos_token_id=257, pad_token_id=258 if vocabulary > 258 else None, **SIZES,
    )  # fmt: skip
    torch.manual_seed(seed)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def mixtral(folder, layers, seed):
    config = transformers.MixtralConfig(
        vocab_size=259, num_hidden_layers=layers, num_key_value_heads=2, initializer_range=0.2,
        num_local_experts=4, router_aux_loss_coef=0.5,
        bos_token_id=256, eos_token_id=257, pad_token_id=258, **SIZES,
    )  # fmt: skip
    torch.manual_seed(seed)
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
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
    kind = transformers.BertForSequenceClassification
    bert(folder / "of_few_positions", kind, LABELS, layers=1, positions=32)
    bert(folder / "of_several", kind, LABELS, layers=1, problem_type="multi_label_classification")
    llama(folder / "llama", 2, seed=3)
    llama(folder / "of_llama", 3, seed=4)
    llama(folder / "of_more", 1, seed=4, vocabulary=300)
    llama(folder / "of_fewer", 1, seed=4, vocabulary=200)
    texts = [draw.choice(words, 1 + i % 12).tolist() for i in range(24)]
    labels = [{"text": " ".join(t), "label": LABELS[i % 3], "n": i} for i, t in enumerate(texts)]
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
    "masked_lm": ("student", "of_texts", "texts.jsonl"),
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
    changes = {"model.teacher": None, "budget.lean_loss": False, "model.router_loss": "none"}
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
        shared = min(each.shape[-1] for each in logits)  # vocabularies may be padded
        p = (teacher_rows[:, :shared].detach() / TEMPERATURE).softmax(-1)
        q = (student_rows[:, :shared] / TEMPERATURE).softmax(-1)
        rows = (p * (p.log() - q.log())).sum(-1)
    loss = (1 - WEIGHT) * task + WEIGHT * TEMPERATURE**2 * (rows * weights).sum() / weights.sum()
    loss.backward()
    return read_gradient(student), float(loss)


def accumulate(recipe, window, model):
    """Add up the gradient of a window, micro-batch by micro-batch."""
    for batch in window:
        with window.accelerator.accumulate(model):
            window.accelerator.backward(window.weigh(recipe.compute_loss(model(**batch), batch)))


class Largest(TorchDispatchMode):
    """The most rows of logits that a product with the weights of a vocabulary gives."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and result.shape[-1] == self.vocabulary:
            self.rows = max(self.rows, len(result))
        return result


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
    "answers, a padded vocabulary": (
        "causal_lm",
        {"model__teacher": "of_more", "budget__max_tokens": 200, "budget__lean_loss": "true"},
        True,
    ),
    "answers, packed": ("causal_lm", {"budget__max_tokens": 200, "data__packing": "true"}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_formula_over_the_whole_window(models, case, monkeypatch):
    kind, changes, removes = CASES[case]
    if "model__teacher" in changes:
        changes = changes | {"model__teacher": models / changes["model__teacher"]}
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
    with Largest(recipe.own_config.vocab_size) as largest:
        accumulate(recipe, window, model)
    expected, loss = of_formula(recipe, window, windows)
    assert relative_error(read_gradient(model), expected) <= EXACT
    assert window.loss == pytest.approx(loss, rel=1e-5)
    if changes.get("budget__lean_loss") == "true":
        assert largest.rows == 7  # the logits of one chunk, of either model


@pytest.mark.parametrize("lean", ["true", "false"])
def test_the_router_loss_is_of_the_student_alone_with_the_factor_of_the_model(models, lean, tmp_path):
    mixtral(tmp_path / "student", 2, seed=5)
    mixtral(tmp_path / "teacher", 3, seed=6)
    names = {"model__name": tmp_path / "student", "model__teacher": tmp_path / "teacher"}
    budget = {"budget__micro_batch_size": 5, "budget__lean_loss": lean, "budget__padding_free": "off"}
    recipe, windows, _, model = parts(models, "causal_lm", **names, **budget)
    window = next(iter(windows))
    look_ahead(recipe.compute_loss, model, window)
    accumulate(recipe, window, model)
    of_routers = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "student")
    batch = windows.collated(window.indices, window.pad_to).batch
    router_loss = 0.5 * of_routers(**batch, output_router_logits=True).aux_loss
    router_loss.backward()
    expected, loss = of_formula(recipe, window, windows)
    for name, parameter in of_routers.named_parameters():
        expected[name] = expected[name] + (0.0 if parameter.grad is None else parameter.grad)
    assert relative_error(read_gradient(model), expected) <= EXACT
    assert window.loss == pytest.approx(loss + float(router_loss), rel=1e-5)


def test_a_teacher_teaches_a_mixture_with_few_logits_at_a_time(models):
    reset_accelerate()
    budget = {"budget__micro_batch_size": 5, "budget__lean_loss": "true", "budget__padding_free": "off"}
    recipe = make_recipe(CLASSES["causal_lm"], *flags(models, "causal_lm", **budget))
    recipe, training, validation = load_data(recipe)
    recipe.sources, recipe.shares = ["a", "b"] * 12, {"a": "1", "b": "1"}
    windows, _ = make_windows(recipe, training, validation, Accelerator(cpu=True))
    model, window = make_model(recipe).train(), next(iter(windows))
    accumulate(recipe, window, model)
    expected, loss = of_formula(recipe, window, windows)
    assert relative_error(read_gradient(model), expected) <= EXACT
    assert window.loss == pytest.approx(loss, rel=1e-5)
    least, most = sorted(window.source_losses.values())
    assert least < loss < most


def test_a_teacher_in_bf16_teaches_a_student_in_float32_with_few_logits_at_a_time(models):
    losses = []
    for lean in ("true", "false"):
        recipe, windows, _, model = parts(models, "causal_lm", budget__lean_loss=lean)
        recipe.distillation.teacher.bfloat16()
        batch = windows.collated(range(3), None).batch
        losses.append(float(recipe.compute_loss(model(**batch), batch)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_student_with_a_metric_of_0_keeps_nothing_of_the_teacher():
    scores = {"accuracy": 0.0}, {"accuracy": 0.5}
    assert share_kept("accuracy", "max", *scores) == 0
    assert np.isnan(share_kept("accuracy", "max", *scores[::-1]))
    assert np.isnan(share_kept("f1", "max", *scores))


REFUSED = {
    "no labels": ("text_classification", {"model__teacher": "student"}, "has no labels of its own"),
    "other labels": (
        "text_classification",
        {"model__teacher": "of_others"},
        "has the labels a, b, c, and",
    ),
    "no folder": ("text_classification", {"model__teacher": "nowhere"}, "is no folder here"),
    "other tokens": ("text_classification", {"model__teacher": "of_llama"}, "the tokenizer of"),
    "other vocabulary": ("causal_lm", {"model__teacher": "of_fewer"}, "of_fewer has 200 outputs, and "),
    "other recipe": ("masked_lm", {"model__name": "student"}, "MaskedLM learns from no teacher"),
    "no classes": (
        "text_classification",
        {"data__problem": "regression", "data__label_column": "n"},
        "no classes",
    ),
    "weight": ("text_classification", {"model__teacher_weight": "0"}, "model.teacher_weight"),
    "positions": (
        "text_classification",
        {"model__teacher": "of_few_positions"},
        "has 32 positions, and data.max_length is 48",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_teacher_that_does_not_fit_is_refused_in_one_line(models, case, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind, changes, said = REFUSED[case]
    names = ("model__teacher", "model__name")
    changes = {key: models / value if key in names else value for key, value in changes.items()}
    outcome = run_recipe(CLASSES[kind], [*flags(models, kind, **changes), "--check"], capfd)
    assert outcome.code == 2, outcome.out
    assert said in outcome.err
    assert outcome.err.startswith(("error: model.teacher", "error: --model.teacher", "error: data.problem"))
    assert outcome.err.count("\n") == 1


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory):
    """The folder of a run of two windows with a teacher."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        reset_accelerate()
        words = flags(models, "text_classification", output__dir="out")
        run(CLASSES["text_classification"], [*words, "--checkpoint.every", "1", "--optim.lr", "1e-3"])
    return folder / "out"


def test_a_run_states_the_teacher_and_saves_the_student_alone(trained, models):
    found = summary(trained)["teacher"]
    assert found["name"] == str(models / "of_texts")
    assert (found["temperature"], found["weight"]) == (TEMPERATURE, WEIGHT)
    rows = [json.loads(line) for line in (models / "texts.jsonl").read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "of_texts")
    teacher = transformers.AutoModelForSequenceClassification.from_pretrained(models / "of_texts")
    tokens = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        answers = teacher(**tokens).logits.argmax(-1).tolist()
    right = [teacher.config.id2label[a] == row["label"] for a, row in zip(answers, rows, strict=True)]
    assert found["metrics"]["accuracy"] == pytest.approx(np.mean(right))
    page = (trained / "report.html").read_text()
    assert ">teacher<" in page
    assert f"{found['metrics']['accuracy']:.4f}" in page
    card = (trained / "best" / "README.md").read_text()
    assert f"a local model, {found['parameters']:,} parameters; temperature 3.0, 0.7 of the loss" in card
    assert str(models) not in card
    for saved in (trained / "best", trained / "last"):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(saved)
        assert model.config.num_hidden_layers == 2
    [state] = (trained / "checkpoints").glob("window-*2")
    weights = sum(path.stat().st_size for path in state.glob("*.safetensors"))
    one = (trained / "last" / "model.safetensors").stat().st_size
    assert weights == pytest.approx(3 * one, rel=0.01)  # weights and two states of AdamW, of the student


def test_a_teacher_of_several_labels_is_measured_on_the_problem_of_the_student(models):
    recipe, _, others, _ = parts(models, "text_classification", model__teacher=models / "of_several")
    assert 0 <= teacher_facts(recipe, others)["metrics"]["accuracy"] <= 1


def losses(folder):
    return [json.loads(line)["loss"] for line in Path(folder, "history.jsonl").read_text().splitlines()]


def test_a_run_is_not_resumed_with_another_teacher(trained, models, tmp_path, monkeypatch, capfd):
    """Neither with another name, nor with other weights in the same folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models, tmp_path / "models")
    begun = cut_back(trained, tmp_path / "out", 1)
    lines = (begun / "history.jsonl").read_text()

    def resume(**changes):
        words = flags(models, "text_classification", output__dir="out", **changes)
        more = ["--checkpoint.every", "1", "--optim.lr", "1e-3", "--resume", "out"]
        return run_recipe(CLASSES["text_classification"], [*words, *more], capfd)

    refused = resume(model__teacher=models / "of_others")
    assert refused.code == 2
    assert refused.err.startswith("error: model.teacher: ")
    teacher = models / "of_texts"
    before = (teacher / "model.safetensors").read_bytes()
    bert(teacher, transformers.BertForSequenceClassification, LABELS[::-1], layers=3, seed=9)
    try:
        changed = resume()
    finally:
        (teacher / "model.safetensors").write_bytes(before)
    assert changed.code == 2
    assert "model.teacher (weights): the content has changed" in changed.err
    assert (begun / "history.jsonl").read_text() == lines
    done = resume()
    assert done.code == 0, done.err
    assert "exact" not in done.err  # no warning before the run
    assert losses(begun) == losses(trained)
    assert summary(begun)["eval"] == summary(trained)["eval"]


def test_the_commands_after_a_run_need_the_teacher_only_to_train(trained, models, gradacc, tmp_path):
    copied = shutil.copytree(trained, tmp_path / "out")
    (copied / "report.html").unlink()  # not written again
    code, out, err = gradacc("verify", "--run", copied, "--json", "--windows", "1")
    assert code == 0, err
    assert json.loads(out)["exact"]
    gone = shutil.move(models / "of_texts", models / "elsewhere")
    try:
        assert gradacc("predict", copied, "tea garden")[0] == 0
        code, out, err = gradacc("evaluate", copied, "--json")
        assert code == 0, err
        found = json.loads(out)["metrics"]["accuracy"]["value"]
        assert found == pytest.approx(summary(copied)["best"]["accuracy"])
        assert gradacc("continue", copied, "--train.epochs", "+1")[0] == 2
    finally:
        shutil.move(gone, models / "of_texts")


def test_the_plan_counts_the_teacher(models):
    reset_accelerate()
    recipe = make_recipe(CLASSES["text_classification"], *flags(models, "text_classification"))
    without = recipe.with_config(with_settings(recipe.config, {"model.teacher": None}))
    plans = [make_plan(each, with_levers=False) for each in (recipe, without)]
    teacher = transformers.AutoModelForSequenceClassification.from_pretrained(models / "of_texts")
    teacher = sum(parameter.numel() for parameter in teacher.parameters())
    assert plans[0].parts.parameters - plans[1].parts.parameters == 4 * teacher
    assert plans[0].trained == plans[1].trained
    assert plans[0].steps.flops_per_window > plans[1].steps.flops_per_window * 1.2
    assert "model.teacher" not in plans[0].model_notes.get("teacher", "")
    assert "at temperature 3" in plans[0].model_notes["teacher"]
