"""Mixtures and weights of rows from a config, as a user of a recipe meets them."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from chat_templates import byte_tokenizer
from datasets import Dataset
from guides import blocks
from recipe_runs import load_recipe, make_recipe, summary

from gradacc_hf.data.sources import renamed
from gradacc_hf.errors import InputError
from gradacc_hf.run.ending import example_input
from gradacc_hf.run.setup import make_model, make_windows
from gradacc_hf.verification.tiny_models import build_head

TextClassification = load_recipe("text_classification").TextClassification
CausalLM = load_recipe("causal_lm").CausalLM


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Two sources of texts: 60 reviews, and 25 tweets with other columns and weights."""
    monkeypatch.chdir(tmp_path)
    reviews = [
        {
            "text": f"review {i} is {['bad', 'good'][i % 2]}",
            "label": ["no", "yes"][i % 2],
            "w": 1 + i % 3,
        }
        for i in range(60)
    ]
    tweets = [{"body": f"tweet {i}", "topic": ["no", "yes"][i % 2], "w": i % 2} for i in range(25)]
    first, second = write(tmp_path / "reviews.jsonl", reviews), write(tmp_path / "tweets.jsonl", tweets)
    columns = {"text_column": "body", "label_column": "topic"}
    sources = [{"source": first, "weight": 3}, {"source": second, "name": "short", **columns}]
    return write_config(tmp_path, {"data": {"train": sources}})


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A Llama of bytes with a chat template, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    build_head("causal_lm", "llama").model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return {"model": {"name": str(folder)}}


def write_config(folder, settings):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def rows_of(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_a_mixture_trains_and_resumes_bit_for_bit_with_losses_by_source(start, config, tmp_path):
    flags = ["--config", config, "--batch.effective", 8, "--train.epochs", 2, "--train.eval_every", 5]
    flags += ["--checkpoint.every", 7, "--checkpoint.keep", 9, "--budget.max_tokens", 60]
    outcome = start(TextClassification, *flags, "--output.dir", "run")
    assert outcome.code == 0, outcome.err
    plan = outcome.out.partition("windows  ")[0]
    assert (
        "mixture               reviews: 54 examples, 75.0% of every window, each 1.07 times an epoch" in plan
    )
    assert "mixture               short: 23 examples, 25.0% of every window, each 0.84 times an epoch" in plan
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 20
    for row in rows:
        assert row["source_losses"].keys() == {"reviews", "short"}
        found = row["source_losses"]
        assert (6 * found["reviews"] + 2 * found["short"]) / 8 == pytest.approx(row["loss"], rel=1e-5)
    assert "(reviews " in outcome.out
    assert "\n  reviews: loss " in outcome.out
    assert len(summary(tmp_path / "run")["first_window"]) == rows[0]["accumulation_steps"] > 1
    end = summary(tmp_path / "run")["eval"]
    assert {"loss/reviews", "loss/short", "accuracy/reviews", "accuracy/short"} <= end.keys()
    assert (6 * end["loss/reviews"] + 2 * end["loss/short"]) / 8 == pytest.approx(end["loss"], rel=1e-5)
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "Loss by source" in page
    assert '<th scope="row">short</th>' in page
    assert "accuracy/short" not in page

    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for folder in (tmp_path / "again/checkpoints").iterdir():
        if not folder.name.endswith("7"):
            shutil.rmtree(folder)
    (tmp_path / "again/summary.json").unlink()
    outcome = start(TextClassification, *flags, "--output.dir", "again", "--resume", "auto")
    assert outcome.code == 0, outcome.err
    without = {"seconds", "update_ratio"}
    for one, other in zip(rows, rows_of(tmp_path / "again"), strict=True):
        assert {k: v for k, v in one.items() if k not in without} == {
            k: v for k, v in other.items() if k not in without
        }

    sources = yaml.safe_load(config.read_text())["data"]["train"]
    sources[0]["weight"] = 2
    write_config(tmp_path, {"data": {"train": sources}})
    shutil.rmtree(tmp_path / "run/last")
    (tmp_path / "run/summary.json").unlink()
    outcome = start(TextClassification, *flags, "--output.dir", "run", "--resume", "auto")
    assert outcome.code == 2
    assert "data.mixture" in outcome.err


def test_rows_have_weights_and_a_bad_weight_is_named_by_its_line(start, config, tmp_path):
    flags = ["--config", config, "--batch.effective", 8, "--data.weight_column", "w"]
    outcome = start(TextClassification, *flags, "--output.dir", "run")
    assert outcome.code == 0, outcome.err
    for row in rows_of(tmp_path / "run"):
        assert row["examples"] == 8
        assert row["items"] != 8
    assert "weights               w: 77 examples, 0 to 3, mean 1." in outcome.out
    assert "ignored" not in outcome.out
    rows = [json.loads(line) for line in (tmp_path / "tweets.jsonl").read_text().splitlines()]
    for wrong in (-1, "NaN", None, "much", True):
        rows[2]["w"] = wrong
        write(tmp_path / "tweets.jsonl", rows)
        outcome = start(TextClassification, *flags, "--output.dir", "other")
        assert outcome.code == 2
        assert "data.weight_column" in outcome.err
        assert "tweets.jsonl line 3" in outcome.err or "held out" in outcome.err
        assert f"column 'w' is {'empty' if wrong is None else repr(wrong)}: allowed are" in outcome.err


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{"weight": 3}], "mappings with source"),
        ([{"source": "a.jsonl", "shares": 3}], "mappings with source, and any of weight, name"),
        ([{"source": "a.jsonl", "weight": 0}], "a weight above 0 for each source"),
        ([{"source": "a.jsonl", "weight": "much"}], "a weight above 0 for each source"),
        ([{"source": "a.jsonl"}, {"source": "b/a.csv"}], "a different name for each source"),
        ([], "a CSV, JSONL or Parquet file"),
        ([{"source": "absent.jsonl"}], "no file or folder 'absent.jsonl'"),
    ],
)
def test_sources_that_cannot_be_read_are_refused(start, config, tmp_path, sources, message):
    write_config(tmp_path, {"data": {"train": sources}})
    outcome = start(TextClassification, "--config", config)
    assert outcome.code == 2
    assert message in outcome.err


def test_columns_of_a_source_may_change_places_and_a_missing_one_is_named():
    rows = Dataset.from_dict({"text": ["no"], "label": ["good"], "body": ["x"]})
    convert = renamed({"text": "label", "label": "text"}, {"text": "", "label": ""}, None)
    assert [*convert(rows)[0]] == [{"label": "no", "text": "good", "body": "x"}]
    convert = renamed({"body": "text"}, {"body": ""}, None)
    assert [*convert(rows)[0]] == [{"label": "good", "text": "x"}]
    with pytest.raises(InputError, match=r"text_column of a.csv: no column 'bodi'.* did you mean 'body'"):
        renamed({"bodi": "text"}, {"bodi": "text_column of a.csv"}, None)(rows)


def test_the_example_of_the_guide_is_read(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [example] = blocks("yaml")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    write(tmp_path / "chats.jsonl", [{"messages": turns}] * 20)
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": "Say", "output": "B"}] * 10))
    config = write_config(tmp_path, yaml.safe_load(example.text) | tiny_llama)
    recipe = make_recipe(CausalLM, "--config", config)
    recipe.read_examples()
    assert recipe.sources == ["chats"] * 18 + ["alpaca"] * 9
    assert recipe.shares == {"chats": "3", "alpaca": "1"}


def test_each_source_of_chats_has_a_format_of_its_own(tiny_llama, tmp_path):
    chats = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"A{i}"}]}
        for i in range(20)
    ]
    texts = [{"text": f"one {i}", "instruction": "Say", "output": f"B{i}"} for i in range(20)]
    sources = [
        {"source": write(tmp_path / "chats.jsonl", chats)},
        {"source": write(tmp_path / "alpaca.jsonl", texts), "format": "alpaca"},
        {"source": write(tmp_path / "plain.jsonl", texts), "format": "text"},
    ]
    recipe = make_recipe(
        CausalLM, "--config", write_config(tmp_path, {"data": {"train": sources}} | tiny_llama)
    )
    train, validation = recipe.read_examples()
    assert (len(train), len(validation)) == (54, 6)
    assert train.column_names == ["input_ids", "labels"]
    assert recipe.sources == ["chats"] * 18 + ["alpaca"] * 18 + ["plain"] * 18
    assert example_input(recipe).startswith("one ")
    assert recipe.validation_sources == ["chats"] * 2 + ["alpaca"] * 2 + ["plain"] * 2
    learned = [
        recipe.tokenizer.decode([token for token in row if token != -100]).strip() for row in train["labels"]
    ]
    assert all(
        ("AB"[i // 18] in text) if i < 36 else text.startswith("one") for i, text in enumerate(learned)
    )


RECIPES = {
    "token_classification": lambda i: {"tokens": ["Ada", f"sang{i}"], "tags": ["B-PER", "O"]},
    "masked_lm": lambda i: {"text": f"a text {i} of several words " * (1 + i % 9)},
    "seq2seq": lambda i: {"source": f"in {i}" if i % 2 else f"in {i},\n of two lines", "target": f"out {i}"},
    "question_answering": lambda i: {
        "question": "Who?",
        "context": f"It was Ada {i}. " + "Nothing else. " * (i % 9),
        "answers": {"text": ["Ada"], "answer_start": [7]},
    },
}


EXAMPLES = {
    "token_classification": "Ada sang10",
    "masked_lm": "a text 10 of several words [MASK] text 10 of several words",
    "seq2seq": "in 11",
    "question_answering": {"question": "Who?", "context": "It was Ada 3. " + "Nothing else. " * 3},
}


def recipe_class(name):
    """Return the class of a recipe, by the name of its file."""
    module = load_recipe(name)
    return next(
        value
        for value in vars(module).values()
        if getattr(value, "__module__", "") == name and hasattr(value, "Data")
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_keeps_the_sources_and_weights_of_rows(name, tiny_bert, tmp_path):
    rows = [{**RECIPES[name](i), "w": i} for i in range(12)]
    files = [write(tmp_path / f"{part}.jsonl", rows) for part in "ab"]
    sources = [{"source": file, "validation": file} for file in files]
    settings = {"data": {"train": sources, "weight_column": "w", "max_length": 24}}
    settings["model"] = {"name": str(tiny_bert)}
    settings["data"] |= {"doc_stride": 4} if name == "question_answering" else {}
    recipe = make_recipe(recipe_class(name), "--config", write_config(tmp_path, settings))
    train, validation = recipe.read_examples()
    assert recipe.sources == sorted(recipe.sources)
    assert {*recipe.sources} == {*recipe.validation_sources} == {"a", "b"}
    assert len(recipe.sources) == len(train) == len(recipe.example_weights)
    assert len(validation) == len(recipe.validation_sources)
    assert {*recipe.example_weights.tolist()} == {*map(float, range(12))}
    half = len(train) // 2
    assert np.array_equal(recipe.example_weights[:half], recipe.example_weights[half:])
    assert not {"_source", "_weight"} & {*train.column_names, *validation.column_names}
    assert example_input(recipe) == EXAMPLES[name]


@pytest.mark.parametrize("name", ["seq2seq", "question_answering", "contrastive"])
def test_metrics_of_a_source_equal_those_of_the_source_alone(name, tiny_bert, tmp_path):
    row_of = RECIPES.get(name, lambda i: {"anchor": f"call {i}", "positive": f"returns {i}"})
    sources = []
    for part, numbers in {"a": range(9), "b": range(9, 14)}.items():
        file = write(tmp_path / f"{part}.jsonl", map(row_of, numbers))
        sources.append({"source": file, "validation": file})
    data = {"max_length": 24} | ({"doc_stride": 4} if name == "question_answering" else {})

    def validate(train, **more):
        settings = {"data": {**data, **more, "train": train}, "batch": {"effective": 4}}
        settings["model"] = {"name": str(tiny_bert)}
        recipe = make_recipe(recipe_class(name), "--config", write_config(tmp_path, settings))
        accelerator = Accelerator(cpu=True)
        _, windows = make_windows(recipe, *recipe.read_examples(), accelerator)
        torch.manual_seed(0)
        return recipe.validate(accelerator.prepare(make_model(recipe)), windows, accelerator)

    each = {"generate_rows": 3, "max_target_length": 8} if name == "seq2seq" else {}
    found = validate(sources, **each | ({"generate_rows": 6} if each else {}))
    if name == "contrastive":  # the positives of all sources are searched
        of_sources = (9 * found["mrr_at_10/a"] + 5 * found["mrr_at_10/b"]) / 14
        assert found["mrr_at_10"] == pytest.approx(of_sources)
        return
    for part, source in zip("ab", sources, strict=True):
        alone = validate([source], **each)
        of_part = {key.removesuffix(f"/{part}"): value for key, value in found.items() if key.endswith(part)}
        assert len(of_part) > 1
        assert of_part == pytest.approx({key: value for key, value in alone.items() if "/" not in key})


def test_a_recipe_that_does_not_keep_them_is_refused(tiny_llama, tmp_path):
    class Forgetful(CausalLM):
        def datasets(self):
            return tuple(rows.select_columns(["input_ids", "labels"]) for rows in super().datasets())

    file = write(tmp_path / "a.jsonl", [{"text": f"some {i}", "w": 1} for i in range(9)])
    for data, key in (
        ({"train": [{"source": file}]}, "data.train"),
        ({"train": file, "weight_column": "w"}, "data.weight_column"),
    ):
        recipe = make_recipe(Forgetful, "--config", write_config(tmp_path, {"data": data} | tiny_llama))
        with pytest.raises(InputError, match=f"{key}: Forgetful does not keep the column"):
            recipe.read_examples()
