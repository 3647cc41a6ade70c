"""recipes/text_classification.py with pairs of texts, several labels and numbers; rows that it leaves out."""

import json
import runpy
from pathlib import Path

import datasets
import numpy as np
import pytest
import transformers
from accelerate import Accelerator
from recipe_runs import run_recipe

from gradacc_hf import verify
from gradacc_hf.errors import InputError
from gradacc_hf.recipe.labels import given_labels
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.run.setup import make_model, make_windows
from gradacc_hf.tasks.targets import TARGETS
from gradacc_hf.utils.paths import bundle_root

RECIPE = bundle_root() / "recipes/text_classification.py"
TextClassification = runpy.run_path(str(RECIPE))["TextClassification"]
WORDS = {"sport": ["goal", "match"], "music": ["song", "guitar"], "food": ["bread", "soup"]}
MULTI = {"data.problem": "multi_label", "data.label_column": "topics"}
NUMBER = {"data.problem": "regression", "data.label_column": "score", "data.text_pair_column": "other"}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")


def make_rows(number=120):
    """Texts of 1 to 40 words on 0 to 3 topics, another text, and the share of words that the two share."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(number):
        topics = [topic for topic in WORDS if rng.random() < 0.4]
        known = [word for topic in topics for word in WORDS[topic]] or ["tea"]
        words = rng.choice(known, int(np.clip(np.exp(rng.normal(2, 1)), 1, 40)))
        shared = rng.random() < 0.5
        other = " ".join(words) if shared else "rain and wind"
        rows.append(
            {"text": " ".join(words), "other": other, "topics": topics, "score": 4.5 if shared else 1.0}
        )
    return rows


def write(rows, path="a.jsonl"):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(tiny_bert, settings):
    shared = {"model.name": tiny_bert, "model.dropout": 0, "data.max_length": 48, "batch.effective": 16}
    settings = {**shared, "output.tracker": "none", "data.train": "a.jsonl", **settings}
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


@pytest.fixture
def start(tiny_bert, capfd):
    def start(settings):
        ended = run_recipe(TextClassification, words(tiny_bert, settings), capfd)
        return ended.code, ended.out, ended.err

    return start


@pytest.fixture
def refused(start):
    def refused(settings):
        code, _, err = start({**settings, "check": "true"})
        assert code == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return refused


def summary():
    return json.loads(Path("out/summary.json").read_text())


def recipe_of(tiny_bert, settings):
    Path("a.yaml").write_text(f"recipe: {RECIPE}\n")
    return load_recipe(["--config", "a.yaml", *words(tiny_bert, settings)])


# Runs


def test_a_decoder_without_padding_token_is_exact_and_saved(start, tiny_bert):
    """As GPT-2 and most Llamas are: padded with the end of a text, and read at the last token before it."""
    write([{**row, "label": str(len(row["topics"]) > 1)} for row in make_rows(60)])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert, eos_token="[SEP]")
    tokenizer.pad_token = None
    ids = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
    config = transformers.GPT2Config(vocab_size=len(tokenizer), **sizes, **ids)
    transformers.GPT2LMHeadModel(config).save_pretrained("gpt2")
    tokenizer.save_pretrained("gpt2")
    settings = {"model.name": "gpt2", "budget.max_tokens": 100}
    recipe = recipe_of(tiny_bert, settings)
    windows, _ = make_windows(recipe, *recipe.datasets(), Accelerator(cpu=True))
    assert verify(make_model(recipe), windows, recipe.loss, num_windows=1, trainer=False).loop.error <= 1e-5
    code, _, err = start({**settings, "train.max_windows": 1, "output.dir": "out"})
    assert code == 0, err
    assert transformers.AutoConfig.from_pretrained("out/best").pad_token_id == ids["eos_token_id"]


def test_a_class_255_beside_0_and_1_is_refused(refused):
    write([{**row, "label": [0, 1, 255][i % 3]} for i, row in enumerate(make_rows(30))])
    assert "data.label_column: the labels are 0 to 1 and 255" in refused({})


def test_several_labels_are_learned_and_said(start, tiny_bert):
    write(make_rows())
    code, _, err = start({**MULTI, "train.epochs": 8, "optim.lr": 3e-3, "output.dir": "out"})
    assert code == 0, err
    found = summary()
    assert found["baseline"].keys() == {"exact_match", "f1_micro", "f1_macro"}
    assert found["eval"]["f1_macro"] > found["baseline"]["f1_macro"] + 0.3
    assert found["items"] == found["examples"]
    config = transformers.AutoConfig.from_pretrained("out/best")
    assert config.problem_type == "multi_label_classification"
    assert config.id2label == {0: "food", 1: "music", 2: "sport"}
    texts = ["goal match goal", "song soup guitar bread", "tea"]
    recipe = recipe_of(tiny_bert, {**MULTI, "model.name": "out/best"})
    answers = recipe.answer(recipe.model_class.from_pretrained("out/best").eval(), texts)
    pipeline = transformers.pipeline("text-classification", "out/best", device="cpu", top_k=None)
    for answer, expected in zip(answers, pipeline(texts), strict=True):
        assert answer["scores"] == pytest.approx({e["label"]: e["score"] for e in expected}, rel=1e-4)
        assert answer["labels"] == [name for name, score in answer["scores"].items() if score > 0.5]
    assert "sport" in answers[0]["labels"]


def test_a_number_is_learned_from_a_pair_of_texts(start, tiny_bert):
    write(make_rows())
    code, _, err = start({**NUMBER, "train.epochs": 8, "optim.lr": 3e-3, "output.dir": "out"})
    assert code == 0, err
    found = summary()
    assert found["baseline"].keys() == {"pearsonr", "spearmanr", "mse"}
    assert found["baseline"]["pearsonr"] == found["baseline"]["spearmanr"] == 0
    assert found["eval"]["mse"] == pytest.approx(found["eval"]["loss"], rel=1e-4)
    assert found["eval"]["mse"] < found["baseline"]["mse"]
    assert found["eval"]["pearsonr"] > 0.5
    recipe = recipe_of(tiny_bert, {**NUMBER, "model.name": "out/best"})
    pair = {"text": "goal match", "other": "goal match"}
    model = recipe.model_class.from_pretrained("out/best").eval()
    pipeline = transformers.pipeline("text-classification", "out/best", device="cpu")
    expected = pipeline({"text": pair["text"], "text_pair": pair["other"]})
    [answer] = recipe.answer(model, [pair])
    assert answer == {"score": pytest.approx(expected["score"], rel=1e-4)}
    with pytest.raises(InputError, match="input 1: no 'other' among text; give texts as text, other"):
        recipe.answer(model, [{"text": "goal"}])


@pytest.mark.parametrize("settings", [MULTI, NUMBER], ids=["multi_label", "regression"])
def test_the_gradient_of_a_window_is_exact_in_unequal_micro_batches(tiny_bert, settings):
    write(make_rows())
    recipe = recipe_of(tiny_bert, {**settings, "budget.max_tokens": 100})
    windows, _ = make_windows(recipe, *recipe.datasets(), Accelerator(cpu=True))
    sizes = [len(piece) for piece in windows.split(0, 0).processes[0]]
    assert len(set(sizes)) > 1
    found = verify(make_model(recipe), windows, recipe.loss, num_windows=2, trainer=False)
    assert found.loop.error <= 1e-5
    assert found.exact


def test_a_class_label_s_names_and_order_are_kept(tiny_bert):
    names = ["sport", "food", "music"]
    features = datasets.Features(
        {"text": datasets.Value("string"), "topics": datasets.List(datasets.ClassLabel(names=names))}
    )
    rows = {"text": ["goal", "soup", "tea", "goal"], "topics": [[0], [1, 2], [], [0]]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet("a.parquet")
    recipe = recipe_of(tiny_bert, {**MULTI, "data.train": "a.parquet", "data.validation": "a.parquet"})
    train, _ = recipe.datasets()
    assert recipe.target.names == names
    assert train["labels"][:] == [[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 0, 0]]


def write_class_ids(path, names, topics, kind=datasets.List):
    features = datasets.Features(
        {"text": datasets.Value("string"), "topics": kind(datasets.ClassLabel(names=names))}
    )
    rows = {"text": ["goal"] * len(topics), "topics": topics}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


def test_class_ids_of_validation_are_read_by_their_own_names(tiny_bert):
    train = write_class_ids("a.parquet", ["sport", "food", "music"], [[0], [1, 2]])
    validation = write_class_ids("b.parquet", ["music", "sport"], [[0], [0, 1]], datasets.LargeList)
    recipe = recipe_of(tiny_bert, {**MULTI, "data.train": train, "data.validation": validation})
    assert recipe.datasets()[1]["labels"][:] == [[0, 0, 1], [1, 0, 1]]


# Bad input


def test_a_withheld_label_among_several_is_refused_or_left_out(start, refused):
    train = write_class_ids("a.parquet", ["sport", "food"], [[0], [1], [1, -1]])
    settings = {**MULTI, "data.train": train, "data.validation": train, "batch.effective": 1}
    assert "a.parquet row 3: column 'topics' has −1, a label that is withheld, among 2" in refused(settings)
    code, out, err = start({**settings, "data.on_bad_row": "skip", "check": "true"})
    assert code == 0, err
    assert "2 to train on, 2 to validate" in out


@pytest.mark.parametrize("settings", [MULTI, NUMBER], ids=["multi_label", "regression"])
def test_class_weights_are_for_classes(refused, settings):
    write(make_rows(20))
    line = refused({**settings, "data.class_weights": "balanced"})
    assert "data.class_weights: found 'balanced', allowed is none" in line


@pytest.mark.parametrize(
    ("settings", "change", "found"),
    [
        ({}, {"text": None}, "data.text_column: a.jsonl line 7: column 'text' is empty"),
        ({}, {"text": " \n"}, "data.text_column: a.jsonl line 7: column 'text' is empty"),
        ({}, {"text": "\u200b"}, "line 7: no token of its text is left, truncated to data.max_length 48"),
        ({}, {"label": None}, "data.label_column: a.jsonl line 7: column 'label' is empty"),
        (NUMBER, {"other": ""}, "data.text_column: a.jsonl line 7: column 'other' is empty"),
        (NUMBER, {"score": None}, "data.label_column: a.jsonl line 7: column 'score' is empty"),
        (NUMBER, {"score": "much"}, "a.jsonl line 7: column 'score': 'much' is not a number"),
        (NUMBER, {"score": "nan"}, "a.jsonl line 7: column 'score': 'nan' is not a number"),
        (MULTI, {"topics": None}, "data.label_column: a.jsonl line 7: column 'topics' is empty"),
        (MULTI, {"topics": ["food", None]}, "line 7: column 'topics' has an empty label among 2"),
        (MULTI, {"topics": ["food", " "]}, "line 7: column 'topics' has an empty label among 2"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_or_left_out(start, refused, settings, change, found):
    rows = [{**row, "label": "long" if len(row["text"]) > 30 else "short"} for row in make_rows(40)]
    if isinstance(change.get("score"), str):  # as a CSV file is read whose column is not all numbers
        rows = [{**row, "score": str(row["score"])} for row in rows]
    others = write(rows, "b.jsonl")
    rows[6] = {**rows[6], **change}
    write(rows)
    settings = {**settings, "data.validation": others}
    line = refused(settings)
    assert found in line
    assert "--data.on_bad_row skip" in line
    code, out, err = start(
        {**settings, "data.on_bad_row": "skip", "train.max_windows": 1, "output.dir": "out"}
    )
    assert code == 0, err
    assert "39 to train on, 40 to validate" in out
    assert "left out              1 row that cannot be used, the first: a.jsonl line 7: " in out
    assert summary()["skipped_rows"]["count"] == 1


def test_rows_of_a_held_out_set_keep_the_numbers_of_the_file(start, tiny_bert):
    rows = [{**row, "label": "long" if len(row["text"]) > 30 else "short"} for row in make_rows(40)]
    for row in (0, 1, 38):
        rows[row]["text"] = ["", "\u200b", None][min(row, 2)]
    write(rows)
    _, out, _ = start({"data.on_bad_row": "skip", "check": "true"})
    assert "left out              3 rows" in out
    recipe = recipe_of(tiny_bert, {"data.on_bad_row": "skip"})
    recipe.datasets()
    assert sorted(line.split()[2] for line in recipe.skipped_rows) == ["1:", "2:", "39:"]


def test_truncation_that_empties_every_text_is_refused(refused):
    write([{**row, "label": str(i % 2)} for i, row in enumerate(make_rows(20))])
    line = refused({"data.max_length": 2, "data.on_bad_row": "skip"})
    assert "none of the 18 training rows can be used" in line
    assert "truncated to data.max_length 2" in line


def test_no_room_beside_the_special_tokens_is_refused(refused):
    write([{**row, "label": str(i % 2)} for i, row in enumerate(make_rows(20))])
    line = refused({"data.max_length": 1})
    assert "data.max_length: found 1, and a text has 2 special tokens; allowed: 3 or more" in line


def test_a_pair_of_which_one_text_is_left_is_named(refused):
    rows = [{**row, "other": "\u200b" if i == 2 else row["other"]} for i, row in enumerate(make_rows(20))]
    write(rows)
    line = refused({**NUMBER, "data.validation": "a.jsonl"})
    assert "a.jsonl line 3: no token of one of its texts is left, truncated to data.max_length 48" in line


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (
            {"data.label_column": "score"},
            "to predict numbers: recipes/text_classification.py with",
        ),
        (
            {"data.label_column": "topics"},
            "for several labels a row: recipes/text_classification.py with",
        ),
        ({**MULTI, "data.label_column": "score"}, "column 'score' holds float64, not lists of labels; write"),
        (
            {**NUMBER, "data.label_column": "topics"},
            "column 'topics' holds List; data.problem",
        ),
        ({**NUMBER, "data.text_pair_column": "pair"}, "data.text_pair_column: no column 'pair'; found text"),
        ({"data.problem": "multi"}, "single_label, multi_label or regression"),
    ],
)
def test_a_problem_that_its_labels_are_not_of_is_refused(refused, settings, found):
    write(make_rows(20))
    assert found in refused(settings)


@pytest.mark.parametrize("several", [True, False])
def test_a_label_that_only_validation_has_is_left_out_where_that_is_allowed(several):
    rows = [["sport"], ["food"], ["sport"], ["music"], ["food"]]
    column = rows if several else [labels[0] for labels in rows]
    train = datasets.Dataset.from_dict({"text": ["a"] * 3, "topics": column[:3]})
    validation = datasets.Dataset.from_dict({"text": ["b", "c"], "topics": column[3:]})
    target, skipped = TARGETS["multi_label" if several else "single_label"](train, validation, "topics"), []
    found, kept = target.encode(train, validation, skipped)
    assert skipped == ["label 'music' of validation row 1 is in no training row"]
    assert (len(found), kept["text"][:]) == (3, ["c"])
    assert kept["label"][:] == ([[1.0, 0.0]] if several else [0])
    with pytest.raises(InputError, match="none of the 1 validation rows can be used"):
        target.encode(train, validation.select([0]), skipped)


def test_a_label_that_only_validation_has_is_refused(refused):
    write([{"text": "goal", "topics": ["sport"]}, {"text": "soup", "topics": ["food"]}])
    write([{"text": "goal", "topics": ["sport"]}, {"text": "song", "topics": ["music"]}], "b.jsonl")
    line = refused({**MULTI, "data.validation": "b.jsonl", "batch.effective": 1})
    assert "label 'music' of b.jsonl line 2 is in no training row" in line
    assert "--data.on_bad_row skip" in line


def test_class_ids_in_training_and_text_in_validation_are_compared_by_name():
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    train = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features)
    other = datasets.Dataset.from_dict({"text": ["c", "d"], "label": ["no", "1"]})
    target = TARGETS["single_label"](train, other, "label")
    assert [target.problem(row) for row in (*train, *other, {"label": float("nan")})] == [
        *[None] * 4,
        "column 'label' is empty",
    ]
    with pytest.raises(InputError, match="label '1' of validation row 2 is in no training row"):
        target.encode(train, other)


def test_given_names_are_those_of_one_hot_rows_in_their_order():
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "topics": [[1, 0, 0], [0, 1, 1]]})

    def encoded(names, own=None):
        target = TARGETS["multi_label"](rows, rows, "topics", names)
        found = target.encode(rows, rows, own=own)[0]["label"][:]
        assert target.ids(rows["topics"][:]) == found
        return target.names, found

    assert encoded(["c", "b", "a"]) == (["c", "b", "a"], [[1, 0, 0], [0, 1, 1]])
    assert encoded(["c", "b", "a"], ["a", "b", "c"]) == (["a", "b", "c"], [[0, 0, 1], [1, 1, 0]])
    with pytest.raises(InputError, match="2 names for rows of 3 numbers"):
        encoded(["a", "b"])
    with pytest.raises(InputError, match=r"data\.labels: found a, b, a; name each label once"):
        given_labels("a,b,a")
