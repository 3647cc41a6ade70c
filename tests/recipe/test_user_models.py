"""A model of the user's own stays as it is in every recipe, and the plan names each change."""

import contextlib
import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from checkpointed_runs import cut_back
from PIL import Image
from recipe_runs import load_recipe, make_recipe, run_recipe, write_rows
from tokenizers import Tokenizer, models, pre_tokenizers

from gradacc_hf import verify
from gradacc_hf.embedded.smollm2 import smollm2_path
from gradacc_hf.errors import InputError
from gradacc_hf.run.plan import make_plan
from gradacc_hf.run.predict import predict
from gradacc_hf.run.setup import check_max_length, check_vocabulary, make_model, make_windows
from gradacc_hf.utils.modeling import num_positions

WORDS = [f"w{number}" for number in range(40)]
TEXTS = [
    " ".join(np.random.default_rng(seed).choice(WORDS, size=1 + seed % 7).tolist()) for seed in range(60)
]
CLASSES = {
    name: getattr(load_recipe(name), class_name)
    for name, class_name in {
        "text_classification": "TextClassification",
        "token_classification": "TokenClassification",
        "image_classification": "ImageClassification",
        "causal_lm": "CausalLM",
        "masked_lm": "MaskedLM",
    }.items()
}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def names(*labels):
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def make_tokenizer(pad="<pad>", side="right", added=(), special=()):
    words = {word: i for i, word in enumerate(["<unk>", "<eos>", "<pad>", "<mask>", *WORDS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": pad, "mask_token": "<mask>"}
    marks |= {"cls_token": "<eos>", "sep_token": "<eos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, padding_side=side, **marks)
    tokenizer.add_tokens(list(added))
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def save(kind, *, tokenizer=None, folder="model", task="ForSequenceClassification", **settings):
    """Save a tiny model whose answers differ by input; return the model and the tokenizer."""
    tokenizer = tokenizer or make_tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"vocab_size": 4 + len(WORDS), "max_position_embeddings": 34, "initializer_range": 0.6}
    marks = {"pad_token_id": 2, "eos_token_id": 1, "bos_token_id": 1}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **marks, **settings})
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}{task}")(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@torch.no_grad()
def logits_of(model, tokenizer, **options):
    """The model's own logits of each text alone."""
    return [model(**tokenizer(text, return_tensors="pt", **options)).logits[0] for text in TEXTS]


def recipe_for(name, rows, *settings, model="model"):
    given = {"--data.train": write_rows("rows.jsonl", rows), "--model.name": model, "--data.max_length": 32}
    given |= {"--batch.effective": 16, "--budget.max_tokens": 64, "--model.dropout": 0}
    given |= dict(zip(settings[::2], settings[1::2], strict=True))
    return make_recipe(CLASSES[name], *(word for pair in given.items() for word in pair))


def first_evaluation(recipe):
    """The metrics of the model before the first window."""
    _, validation = make_windows(recipe, *recipe.datasets(), accelerator := Accelerator(cpu=True))
    model = make_model(recipe)
    return recipe.validate(accelerator.prepare(model), validation, accelerator), model


# Labels


ORDERS = {
    "names": ("negative", "positive"),
    "case": ("NEGATIVE", "Positive"),
    "a third label": ("negative", "positive", "mixed"),
    "ids": (0, 1),
    "booleans": (False, True),
}


@pytest.mark.parametrize("labels", ORDERS)
def test_a_classifier_answers_as_before_the_first_window(labels):
    own = ("positive", "negative") if labels != "booleans" else ("True", "False")
    own = own if labels != "a third label" else ("mixed", *own)
    model, tokenizer = save("Bert", **names(*own))
    answers = [int(logits.argmax()) for logits in logits_of(model, tokenizer)]
    assert len({*answers}) == len(own)
    written = {str(label).casefold(): label for label in ORDERS[labels]}
    label_of = [i if labels == "ids" else written[name.casefold()] for i, name in enumerate(own)]
    rows = [{"text": text, "label": label_of[i]} for text, i in zip(TEXTS, answers, strict=True)]
    recipe = recipe_for("text_classification", rows)
    found, loaded = first_evaluation(recipe)
    assert found["accuracy"] == 1
    assert loaded.config.id2label == dict(enumerate(own))
    assert recipe.model_notes["labels"].startswith("the model's own, in the model's order: ")
    assert recipe.model_notes["head"] == "kept: all weights are the saved ones"
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)


def test_a_subset_of_the_labels_keeps_the_whole_head():
    model, tokenizer = save("Bert", **names("mixed", "positive", "negative"))
    answers = [model.config.id2label[int(logits.argmax())] for logits in logits_of(model, tokenizer)]
    pairs = [pair for pair in zip(TEXTS, answers, strict=True) if pair[1] != "mixed"]
    recipe = recipe_for("text_classification", [{"text": text, "label": name} for text, name in pairs])
    found, loaded = first_evaluation(recipe)
    assert found["accuracy"] == 1
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize("labels", ["sets", "one-hot", "booleans", "floats"])
def test_a_model_of_several_labels_answers_as_before(labels):
    own = ("sport", "food", "money")
    model, tokenizer = save("Bert", **names(*own), problem_type="multi_label_classification")
    answers = [(logits > 0).tolist() for logits in logits_of(model, tokenizer)]
    kind = {"one-hot": int, "booleans": bool, "floats": float}.get(labels)
    rows = [
        {"text": text, "label": [*map(kind, row)] if kind else [own[i] for i in range(3) if row[i]]}
        for text, row in zip(TEXTS, answers, strict=True)
    ]
    recipe = recipe_for("text_classification", rows, "--data.problem", "multi_label")
    found, loaded = first_evaluation(recipe)
    assert found["exact_match"] == 1
    assert loaded.config.id2label == dict(enumerate(own))
    assert ("one-hot" in recipe.model_notes["labels"]) == (labels != "sets")


@pytest.mark.parametrize("labels", ["names", "ids"])
def test_a_tagger_answers_as_before_and_minus_100_is_no_tag(labels):
    own = ("O", "B-PER", "B-LOC")
    model, tokenizer = save("Bert", task="ForTokenClassification", **names(*own))
    tags = [logits.argmax(-1).tolist() for logits in logits_of(model, tokenizer, add_special_tokens=False)]
    rows = [
        {"tokens": text.split(), "tags": [own[i] if labels == "names" else i for i in row]}
        for text, row in zip(TEXTS, tags, strict=True)
    ]
    for row in rows[::2]:
        row["tags"][-1] = "-100" if labels == "names" else -100
    rows = [row for row in rows if {*map(str, row["tags"])} != {"-100"}]
    recipe = recipe_for("token_classification", rows)
    found, loaded = first_evaluation(recipe)
    assert found["accuracy"] == found["f1"] == 1
    assert loaded.config.id2label == dict(enumerate(own))
    train, validation = recipe.datasets()
    labelled = sum(label != -100 for rows in (train, validation) for row in rows["labels"] for label in row)
    assert labelled == sum(str(tag) != "-100" for row in rows for tag in row["tags"])
    [answer] = predict_with(recipe, loaded, [{"tokens": ["w1", "w2"]}])
    assert {*answer["tags"]} <= {*own}


def predict_with(recipe, model, inputs):
    return [*predict(recipe, model, [(f"input {i}", given) for i, given in enumerate(inputs)])]


def test_a_row_of_ignored_tags_alone_is_a_bad_row():
    save("Bert", task="ForTokenClassification", **names("O", "B-PER"))
    rows = [{"tokens": ["w1", "w2"], "tags": [0, 1]}] * 20 + [{"tokens": ["w1"], "tags": [-100]}]
    with pytest.raises(InputError, match="line 21: all of its 1 tags are −100, so it has no label"):
        recipe_for("token_classification", rows).datasets()


def test_an_image_classifier_answers_as_before():
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16,
        patch_size=8, initializer_range=0.6, **names("zebra", "cat"),
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    model.save_pretrained("model")
    processor.save_pretrained("model")
    rows = []
    for number in range(24):
        image = Image.fromarray(np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8))
        image.save(f"{number}.png")
        with torch.no_grad():
            answer = int(model(**processor(image, return_tensors="pt")).logits.argmax())
        rows.append({"image": f"{number}.png", "label": config.id2label[answer]})
    found, loaded = first_evaluation(recipe_for("image_classification", rows))
    assert len({row["label"] for row in rows}) == 2
    assert found["accuracy"] == 1
    assert loaded.config.id2label == {0: "zebra", 1: "cat"}


NEW_HEADS = {  # labels of the data, config of the model → labels, head
    "other names": (("good", "bad"), names("negative", "positive"), "instead of the model's own", "new"),
    "one other name": (
        ("Positive", "neutral"),
        names("positive", "negative"),
        "Positive, neutral, instead of the",
        "new",
    ),
    "the same names": (
        ("Positive", "negative"),
        names("negative", "positive"),
        "Positive = positive",
        "kept",
    ),
    "more labels": (("negative", "positive", "mixed"), names("negative", "positive"), "instead", "new"),
    "a regression": (("a", "b"), {"num_labels": 1, "problem_type": "regression"}, "own: LABEL_0", "new"),
}


@pytest.mark.parametrize("case", NEW_HEADS)
def test_the_plan_says_whether_the_head_is_new(case, capfd):
    labels, settings, line, head = NEW_HEADS[case]
    save("Bert", **settings)
    rows = [{"text": text, "label": labels[i % len(labels)]} for i, text in enumerate(TEXTS)]
    arguments = ["--data.train", write_rows("rows.jsonl", rows), "--model.name", "model", "--check"]
    arguments += ["--data.max_length", 32, "--batch.effective", 16, "--output.tracker", "none"]
    outcome = run_recipe(CLASSES["text_classification"], arguments, capfd)
    assert outcome.code == 0, outcome.err
    [labels] = [row for row in outcome.out.splitlines() if row.startswith("labels  ")]
    [found] = [row.split()[1].strip(":") for row in outcome.out.splitlines() if row.startswith("head  ")]
    assert line in labels
    assert found == head
    assert ("problem  " in outcome.out) == (case == "a regression")


def test_a_head_for_other_labels_gets_new_values_and_the_body_stays():
    """The head has the size of the saved one, whose second row is for "negative"."""
    for name, task in (
        ("text_classification", "ForSequenceClassification"),
        ("token_classification", "ForTokenClassification"),
    ):
        saved, _ = save("Bert", task=task, **names("positive", "negative"))
        labels = ["positive", "neutral"]
        rows = [
            {"text": text, "tokens": text.split()[:1], "label": labels[i % 2], "tags": [labels[i % 2]]}
            for i, text in enumerate(TEXTS)
        ]
        recipe = recipe_for(name, rows, "--model.lora.rank", 2)
        recipe.datasets()
        model = recipe.model()
        assert (
            recipe.model_notes["labels"] == f"neutral, positive, instead of the model's own: {listed(saved)}"
        )
        assert recipe.model_notes["head"].startswith(
            "new: classifier.bias, classifier.weight; the saved ones"
        )
        assert recipe.new_parameters == {"classifier.weight", "classifier.bias"}
        assert not torch.isclose(model.classifier.weight, saved.classifier.weight).any()
        assert model.classifier.weight.std() > 0
        assert torch.equal(
            model.bert.embeddings.word_embeddings.weight, saved.bert.embeddings.word_embeddings.weight
        )


def listed(model):
    return ", ".join(model.config.id2label.values())


NOT_ONE_HOT = {
    "a short row": (
        [[0, 1, 1], [1, 0, 0]] * 15 + [[0, 1]],
        r"line 31: column 'label' is \[0, 1\]: .*3 numbers",
    ),
    "soft labels": ([[0.5, 1.0], [0.5, 1.0]] * 15, r"rows such as \[0.5, 1.0\], which are neither one-hot"),
    "ratings": ([[2, 3, 1], [1, 3, 3]] * 15, r"rows such as \[1, 3, 3\], .*: a number is there twice"),
    "one column": ([[0], [1]] * 15, r"every row of column 'label' is \[0\] or \[1\]"),
    "-100": ([["a", "b"], ["-100", "a"]] * 15, "has −100, the mark of a missing label"),
}


@pytest.mark.parametrize("case", NOT_ONE_HOT)
def test_rows_of_numbers_that_are_no_labels_are_refused(case):
    save("Bert")
    labels, found = NOT_ONE_HOT[case]
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=False)]
    with pytest.raises(InputError, match=found):
        recipe_for("text_classification", rows, "--data.problem", "multi_label").datasets()


@pytest.mark.parametrize("label", [-100, "-100"])
def test_minus_100_is_no_class(label):
    save("Bert")
    kind = type(label)
    rows = [{"text": text, "label": kind(i % 2)} for i, text in enumerate(TEXTS)]
    rows += [{"text": "w1", "label": label}]
    with pytest.raises(InputError, match="line 61: column 'label' is −100, so it has no label"):
        recipe_for("text_classification", rows).datasets()


# Tokenizers and positions


DECODERS = {
    "left": (make_tokenizer(side="left"), {}, {"padding side"}),
    "none": (make_tokenizer(pad=None), {"pad_token_id": None}, {"padding token", "pad_token_id"}),
    "in the config": (make_tokenizer(pad=None, special=["<pad>"]), {}, {"padding token"}),
    "a word in the config": (
        make_tokenizer(pad=None),
        {"pad_token_id": 9},
        {"padding token", "pad_token_id"},
    ),
    "another in the config": (make_tokenizer(), {"pad_token_id": 1}, {"pad_token_id"}),
    "the end of a text": (make_tokenizer(pad="<eos>"), {"pad_token_id": 1}, set()),
}


@pytest.mark.parametrize("case", DECODERS)
def test_padding_does_not_change_the_answers_of_a_decoder(case):
    tokenizer, settings, changes = DECODERS[case]
    own = ("positive", "negative")
    model, tokenizer = save(
        "GPT2", task="ForSequenceClassification", tokenizer=tokenizer, **names(*own), **settings
    )
    answers = [own[int(logits.argmax())] for logits in logits_of(model, tokenizer)]
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, answers, strict=True)]
    recipe = recipe_for("text_classification", rows)
    found, loaded = first_evaluation(recipe)
    assert found["accuracy"] == 1
    assert changes == {*recipe.model_notes} - {"labels", "head", "dropout"}
    assert loaded.config.pad_token_id == recipe.tokenizer.pad_token_id
    windows, _ = make_windows(recipe, *recipe.datasets(), Accelerator(cpu=True))
    assert verify(make_model(recipe), windows, recipe.loss, trainer=False).exact


def test_a_language_model_keeps_the_padding_side_and_the_rest_of_its_tokenizer():
    save("Llama", task="ForCausalLM", tokenizer=make_tokenizer(side="left"))
    recipe = recipe_for("causal_lm", [{"text": text} for text in TEXTS])
    recipe.datasets()
    assert recipe.collate(recipe.datasets()[0].select(range(9)).to_list())["attention_mask"][:, 0].all()
    assert recipe.model_notes["padding side"].startswith("right, ")
    assert recipe.model_notes["padding side"].endswith("saved with left")
    [saved] = recipe.processors()
    saved.save_pretrained("saved")
    before, after = (json.loads(Path(folder, "tokenizer.json").read_text()) for folder in ("model", "saved"))
    assert before == after  # also without the truncation of this task
    assert transformers.AutoTokenizer.from_pretrained("saved").padding_side == "left"


def test_each_change_of_the_saved_tokenizer_has_a_line():
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(smollm2_path(), padding_side="left")
    tokenizer.pad_token = None
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": None}
    save("GPT2", task="ForTokenClassification", tokenizer=tokenizer, **names("O", "B-PER"), **sizes)
    rows = [{"tokens": ["Ada", "sang"], "tags": ["B-PER", "O"]}] * 20
    recipe = recipe_for("token_classification", rows)
    recipe.datasets()
    [saved] = recipe.processors()
    saved.save_pretrained("saved")
    before, after = (json.loads(Path(f, "tokenizer_config.json").read_text()) for f in ("model", "saved"))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed == {"add_prefix_space", "pad_token", "padding_side"}
    assert recipe.model_notes["add_prefix_space"] == "True; False in the saved tokenizer"
    assert recipe.model_notes["padding side"].endswith(
        "; the tokenizer's is left, and it is saved with right"
    )
    assert recipe.model_notes["padding token"].endswith("had none, and it is saved with this one")


@pytest.mark.parametrize("is_part", [False, True])
def test_a_tokenizer_setting_of_a_task_is_in_the_plan_or_not_saved(is_part):
    tokenizer = make_tokenizer()
    if is_part:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    save("Bert", task="ForTokenClassification", tokenizer=tokenizer, **names("a", "b"))
    rows = [
        {"tokens": text.split(), "tags": ["ab"[len(word) % 2] for word in text.split()]} for text in TEXTS
    ]
    recipe = recipe_for("token_classification", rows)
    recipe.tokenizer  # noqa: B018
    recipe.processors()[0].save_pretrained("saved")
    saved = json.loads(Path("saved/tokenizer_config.json").read_text())
    assert saved.get("add_prefix_space", False) == is_part
    assert recipe.model_notes.get("add_prefix_space") == (
        "True; no value in the saved tokenizer" if is_part else None
    )


def test_tokens_without_an_embedding_are_refused_by_the_check(capfd):
    added = make_tokenizer(added=["new"])
    for name, task, row in (
        ("causal_lm", "ForCausalLM", {"text": "w1 new"}),
        ("masked_lm", "ForMaskedLM", {"text": "w1 new"}),
        ("text_classification", "ForSequenceClassification", {"text": "w1 new", "label": "b"}),
    ):
        kind = "Bert" if name == "masked_lm" else "Llama"
        save(kind, task=task, tokenizer=added)
        rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(TEXTS)]
        arguments = ["--model.name", "model", "--data.max_length", 32, "--batch.effective", 16, "--check"]
        arguments += ["--output.tracker", "none", "--data.train"]
        outcome = run_recipe(CLASSES[name], [*arguments, write_rows("rows.jsonl", rows)], capfd)
        assert outcome.code == 0, outcome.err
        assert "tokenizer             1 of 45 tokens have no embedding; the data have none" in outcome.out
        outcome = run_recipe(CLASSES[name], [*arguments, write_rows("more.jsonl", [*rows, row])], capfd)
        assert outcome.code == 2
        assert "have the token 'new', id 44, and model has the ids 0 to 43; call resize" in outcome.err


def test_only_rows_that_are_used_may_have_no_token_without_an_embedding():
    save("Llama", task="ForCausalLM", tokenizer=make_tokenizer(added=["new"]))
    rows = [{"text": text} for text in [*TEXTS, "w1 new"]]
    for flags, refused in (((), True), (("--data.leave_out", f"[{len(TEXTS)}]"), False)):
        recipe = recipe_for("causal_lm", rows, "--data.validation", write_rows("v.jsonl", rows[:2]), *flags)
        training, validation = recipe.datasets()
        with pytest.raises(InputError, match="id 44") if refused else contextlib.nullcontext():
            check_vocabulary(recipe, recipe.empty_model(), (training, validation))
        check_vocabulary(recipe, recipe.empty_model(), (training.select(range(8)), validation))


def test_a_new_padding_token_without_an_embedding_is_refused():
    tokenizer = make_tokenizer(pad=None)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    save("Llama", task="ForCausalLM", tokenizer=tokenizer)
    recipe = recipe_for("causal_lm", [{"text": text} for text in TEXTS])
    with pytest.raises(InputError, match="the batches have the token '<new>', id 44"):
        check_vocabulary(recipe, recipe.empty_model(), recipe.datasets())


def test_an_input_with_an_unknown_token_id_is_named_by_predict():
    save(
        "Llama", task="ForSequenceClassification", tokenizer=make_tokenizer(added=["new"]), **names("a", "b")
    )
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(TEXTS)]
    recipe = recipe_for("text_classification", rows)
    recipe.datasets()
    with pytest.raises(InputError, match=r"input 1: model: model.embed_tokens has the rows 0 to 43.* has 44"):
        predict_with(recipe, make_model(recipe), ["w1", "w1 new"])


@pytest.mark.parametrize(("kind", "most"), [("Roberta", 31), ("Bert", 34), ("Llama", 34)])
def test_a_text_has_at_most_the_positions_of_the_model(kind, most):
    """RoBERTa's first positions belong to padding: 34 − 2 − 1."""
    save(kind, **names("a", "b"))
    rows = [{"text": "w1 " * 50, "label": "ab"[i % 2]} for i in range(20)]
    for length in (most, most + 1):
        recipe = recipe_for("text_classification", rows, "--data.max_length", length)
        train, _ = recipe.datasets()
        if length > most:
            with pytest.raises(InputError, match=f"allowed: 1 to {most}, the positions of model"):
                check_max_length(recipe, recipe.empty_model(), train)
            continue
        check_max_length(recipe, recipe.empty_model(), train)
        batch = recipe.collate(train.select(range(2)).to_list())
        assert batch["input_ids"].shape[1] == most
        assert make_model(recipe)(**batch).loss.isfinite()


def test_gradacc_plan_has_the_same_lines_and_refuses_the_same_tokens():
    tokenizer = make_tokenizer(side="left", added=["new"])
    save("GPT2", task="ForSequenceClassification", tokenizer=tokenizer, **names("b", "a"))
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(TEXTS)]
    recipe = recipe_for("text_classification", rows)
    found = make_plan(recipe, data=recipe.datasets()).model_notes
    assert {*found} - {"dropout"} == {"labels", "padding in layers", "padding side", "tokenizer"}
    recipe = recipe_for("text_classification", [*rows, {"text": "new", "label": "a"}])
    with pytest.raises(InputError, match="the token 'new', id 44"):
        make_plan(recipe)


def test_joined_encoders_have_the_positions_of_one():
    config = transformers.BertConfig(vocab_size=9, hidden_size=2, num_hidden_layers=1, num_attention_heads=1,
                                     intermediate_size=2, max_position_embeddings=34)  # fmt: skip
    joined = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(config, copy.deepcopy(config))
    assert num_positions(transformers.EncoderDecoderModel(joined)) == 34


# What a run saves


def saved_configs(folder):
    return [json.loads(Path(name, "config.json").read_text()) for name in ("model", folder)]


def test_a_run_saves_the_config_that_it_was_given(capfd):
    settings = {
        "hidden_dropout_prob": 0.07,
        "classifier_dropout": 0.2,
        "vocab_size": 60,
    }  # 16 more than tokens
    save("Bert", **names("b", "a"), **settings, problem_type="single_label_classification")
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(TEXTS)]
    arguments = [
        "--data.train",
        write_rows("rows.jsonl", rows),
        "--model.name",
        "model",
        "--output.dir",
        "out",
    ]
    arguments += ["--data.max_length", 32, "--batch.effective", 16, "--train.max_windows", 1]
    arguments += ["--output.tracker", "none"]
    assert run_recipe(CLASSES["text_classification"], arguments, capfd).code == 0
    before, after = saved_configs("out/best")
    assert before == after


def test_dropout_and_the_number_format_change_only_by_their_settings():
    save("Bert", hidden_dropout_prob=0.07, **names("b", "a"))
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(TEXTS)]
    for dropout in (None, 0.3):
        settings = ["--model.dropout", "null" if dropout is None else dropout, "--model.dtype", "bfloat16"]
        recipe = recipe_for("text_classification", rows, *settings)
        recipe.datasets()
        probabilities = {m.p for m in make_model(recipe).modules() if isinstance(m, torch.nn.Dropout)}
        assert probabilities == ({0.07, 0.1} if dropout is None else {dropout})
        assert ("dropout" in recipe.model_notes) == (dropout is not None)
        assert (
            recipe.model_notes["number format"]
            == "bfloat16, as model.dtype sets; float32 in the model's config"
        )
    assert "hidden_dropout_prob was 0.07" in recipe.model_notes["dropout"]


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied_in_what_is_saved_and_resumed(tied, capfd):
    save("Llama", task="ForCausalLM", tie_word_embeddings=tied)
    rows = [{"text": text} for text in TEXTS]
    arguments = ["--data.train", write_rows("rows.jsonl", rows), "--model.name", "model", "--data.samples", 0]
    arguments += ["--data.max_length", 32, "--batch.effective", 16, "--train.epochs", 1, "--optim.lr", 0.01]
    arguments += ["--output.tracker", "none", "--checkpoint.every", 1, "--checkpoint.keep", 9]
    assert run_recipe(CLASSES["causal_lm"], [*arguments, "--output.dir", "whole"], capfd).code == 0
    cut_back(Path("whole"), Path("resumed"), 2)
    assert run_recipe(CLASSES["causal_lm"], ["--resume", "resumed"], capfd).code == 0
    states = []
    for folder in ("model", "whole/last", "resumed/last"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        states.append(model.state_dict())
    first, whole, resumed = states
    assert not torch.equal(first["lm_head.weight"], whole["lm_head.weight"])
    assert torch.equal(whole["lm_head.weight"], whole["model.embed_tokens.weight"]) == tied
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
