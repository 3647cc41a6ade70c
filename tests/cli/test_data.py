"""`gradacc data` shows what a run uses: read as a run reads it, and refused where a run refuses it."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT
from data_command import byte_model, for_both, inspected
from recipe_runs import load_recipe, with_defaults, write_rows
from rich.console import Console

from gradacc_hf.cli import data
from gradacc_hf.errors import GradaccError, InputError
from gradacc_hf.recipe.loading import load_recipe as load_from_flags
from gradacc_hf.run.inspection import choose_examples, inspect_data

CONFIG = str(ROOT / "configs/text_classification_offline.yaml")
TEXTS = [{"text": f"row {i % 8} of eight", "label": "ab"[i % 2], "id": i} for i in range(10)]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def learned(found, number=0):
    return found["examples"][number]["learned"]


def test_a_file_of_each_kind_of_the_page_of_formats_is_read_as_it_states(capsys):
    section = (ROOT / "recipes/README.md").read_text().partition("\n## Formats\n")[2].partition("\n### ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `.")]
    examples = [(row[0].strip("`"), row[1].strip("`")) for row in rows if "good" in row[1]]
    model, forms = byte_model("model"), {}
    for number, (suffix, text) in enumerate(examples):
        file = Path(f"{number}{suffix}")
        file.write_text(text.replace("⏎", "\n").replace("→", "\t") + "\n")
        flags = for_both(file, "--model.name", model, "--model.lora.rank", 0)
        found = inspected(capsys, "causal_lm", *flags)
        assert found["rows"] == {"training": 1, "validation": 1}
        assert found["columns"] == {"text": "", "label": None}
        assert learned(found) == ["good; fine</s>"]
        forms[suffix, number] = found["files"][0]["form"]
    rows_under = ["rows under 'data'", "rows under 'train'"]
    assert [*forms.values()] == ["", "separator ;", "separator tab", "", "", *rows_under]


@pytest.mark.parametrize(
    ("recipe", "row", "flags", "texts", "right"),
    [
        (
            "text_classification",
            {"text": "ada sang", "label": 2.5},
            ["--data.problem", "regression", "--train.best_metric", "mse"],
            {"text": "[CLS] ada sang [SEP]"},
            ["2.5"],
        ),
        (
            "seq2seq",
            {"source": "a b", "target": "c"},
            [
                "--data.max_target_length",
                8,
                "--data.source_column",
                "source",
                "--data.target_column",
                "target",
            ],
            {"source": "[CLS] a b [SEP]", "target": "c [SEP]"},
            ["c [SEP]"],
        ),
        (
            "contrastive",
            {"anchor": "a", "positive": "b", "negative": "c"},
            [f"--data.{name}_column={name}" for name in ("anchor", "positive", "negative")],
            {"anchor": "[CLS] a [SEP]", "positive": "[CLS] b [SEP]", "negative": "[CLS] c [SEP]"},
            ["[CLS] b [SEP]"],
        ),
    ],
)
def test_an_example_is_shown_as_the_model_receives_it(recipe, row, flags, texts, right, tiny_bert, capsys):
    file = write_rows("a.jsonl", [row] * 2)
    own = ["--model.name", tiny_bert, "--data.max_length", 32, *flags]
    found = inspected(capsys, recipe, *for_both(file, *own, window=2), "--examples", 1)
    [example] = found["examples"]
    assert (example["texts"], example["learned"]) == (texts, right)
    assert example["tokens"] == sum(len(text.split()) for text in texts.values())
    assert sum(lengths["max"] for lengths in found["lengths"]["training"].values()) == example["tokens"]
    if recipe == "text_classification":
        assert found["labels"]["training"] == {"min": 2.5, "median": 2.5, "max": 2.5}


def test_masked_tokens_are_those_of_the_first_epoch(tiny_bert, capsys):
    file = write_rows("a.jsonl", [{"text": "ada sang in the hall of the town " * 3}] * 2)
    flags = for_both(file, "--model.name", tiny_bert, "--data.max_length", 32, "--data.text_column", "text")
    flags += ["--data.masked", 0.5]
    found = inspected(capsys, "masked_lm", *flags, "--examples", 1, "--split", "validation")
    assert "[MASK]" not in found["duplicates"]["both"]["text"]
    [example] = found["examples"]
    assert example["split"] == "validation"
    assert 5 < len(example["learned"]) < 25
    assert 3 < example["texts"]["text"].count("[MASK]") <= len(example["learned"])
    assert {*example["learned"]} <= {"ada", "sang", "in", "the", "hall", "of", "town"}
    recipe = load_from_flags(["--config", str(ROOT / "configs/masked_lm_offline.yaml"), *map(str, flags)])
    ids = recipe.transform(recipe.datasets()[1][0], np.random.default_rng([0, 0, 0, 1]))
    assert recipe.tokenizer.decode(ids["input_ids"]) == example["texts"]["text"]


def test_lengths_labels_columns_and_duplicates_are_counted(tiny_bert, capsys):
    train, other = write_rows("train.jsonl", TEXTS), write_rows("other.jsonl", [*TEXTS[2:4], *TEXTS[2:3]])
    long = {"text": "a b c d e f g h", "label": "b", "id": 0}
    write_rows("train.jsonl", [*TEXTS, long])
    flags = ["--data.train", train, "--data.validation", other, "--model.name", tiny_bert]
    found = inspected(capsys, "text_classification", *flags, "--data.max_length", 8, "--batch.effective", 4)
    assert found["rows"] == {"training": 11, "validation": 3}
    assert [(one["name"], one["rows"], one["use"]) for one in found["files"]] == [
        ("train.jsonl", 11, "training"),
        ("other.jsonl", 3, "validation"),
    ]
    assert found["columns"] == {"text": "data.text_column", "label": "data.label_column", "id": None}
    assert found["labels"] == {"training": {"a": 5, "b": 6}, "validation": {"a": 2, "b": 1}}
    assert found["lengths"]["training"]["tokens"] == {
        "min": 6,
        "median": 6,
        "p95": 7,
        "max": 8,
        "histogram": [[6, 6, 10], [7, 7, 0], [8, 8, 1]],
    }
    [truncated] = found["truncated"]
    assert truncated["rows"] == {"training": 1, "validation": 0}
    assert (truncated["setting"], truncated["lost"]) == ("data.max_length 8", {"tokens": 2})
    text = "[CLS] row 0 of eight [SEP]"
    assert found["duplicates"]["training"] == {"number": 2, "first": 8, "other": 0, "text": text}
    assert [found["duplicates"][name]["number"] for name in ("validation", "both")] == [1, 3]


def test_weights_of_rows_are_stated_and_shown_at_each_example(tiny_bert, capsys):
    file = write_rows("a.jsonl", [{**row, "w": i % 4 / 2} for i, row in enumerate(TEXTS)])
    own = ["--model.name", tiny_bert, "--data.max_length", 32, "--data.weight_column", "w"]
    flags = for_both(file, *own)
    found = inspected(capsys, "text_classification", *flags, "--examples", 10)
    assert ["weights", "w: 10 examples, 0 to 1.5, mean 0.65, 3 of weight 0"] in found["lines"]
    assert found["columns"]["w"] == "data.weight_column"
    assert [example["weight"] for example in found["examples"]] == [i % 4 / 2 for i in range(10)]
    found = inspected(capsys, "text_classification", *flags, "--split", "validation")
    assert found["examples"][1]["weight"] is None
    text = shown(flags)
    assert "tokens, weight 0, «learned»" in text
    assert "w (data.weight_column)" in text
    assert "ignored               1 column that nothing uses: id\n" in text


def test_columns_are_named_as_the_file_or_the_source_names_them(tiny_bert, capsys):
    own = ["--model.name", tiny_bert, "--data.max_length", 32]
    rows = [{"text": f"row {i}", "news": i % 2, "food": 1, "id": i} for i in range(10)]
    flags = [*for_both(write_rows("a.jsonl", rows), *own), "--data.problem", "multi_label"]
    flags += ["--data.label_columns", "news,food", "--train.best_metric", "f1_micro"]
    assert "columns               text (data.text_column), news, food (data.label_columns)\n" in shown(flags)

    body = [{"body": f"row {i}", "kind": "ab"[i % 2], "w": i} for i in range(10)]
    sources = [
        {"source": str(write_rows("texts.jsonl", TEXTS))},
        {"source": str(write_rows("chat.jsonl", body)), "text_column": "body", "label_column": "kind"},
    ]
    settings = {"recipe": str(ROOT / "recipes/text_classification.py"), "data": {"train": sources}}
    Path("mix.yaml").write_text(yaml.safe_dump(settings))
    flags = [*own, "--batch.effective", 4]
    text = shown(flags, "mix.yaml")
    assert "ignored               texts: 1 column that nothing uses: id\n" in text
    assert "ignored               chat: 1 column that nothing uses: w\n" in text
    assert "columns               texts: text (data.text_column), label (data.label_column)\n" in text
    assert "columns               chat: body (text_column), kind (label_column)\n" in text
    data.main(["--config", "mix.yaml", "--budget", "cpu", "--json", *map(str, flags)])
    found = json.loads(capsys.readouterr().out)["columns_of_sources"]
    assert found["chat"] == {"body": "text_column", "kind": "label_column", "w": None}
    assert {"source texts", "source chat"} <= {*re.findall("source \\w+", text)}
    assert {"a", "b"} <= {*re.findall("label: «(.)»", text)}


@pytest.mark.parametrize(
    ("kinds", "number", "chosen"),
    [
        ([("a",)] * 10, 3, [0, 3, 6]),
        ([("a",)] * 9 + [("b",)], 2, [0, 9]),
        ([("a", 0)] * 6 + [("a", 1)] * 2 + [("b", 0), ("b", 1)], 2, [0, 9]),
        ([("a", 0)] * 6 + [("a", 1)] * 2 + [("b", 0), ("b", 1)], 3, [0, 6, 9]),
        ([("a", 1, 2), ("a", 1), ("a",)], 9, [0, 1, 2]),
    ],
)
def test_examples_of_each_source_and_class_are_chosen_first(kinds, number, chosen):
    assert choose_examples(kinds, number) == chosen


def test_a_tag_ends_with_a_space_before_the_next_tag(tiny_bert):
    Path("a.conll").write_text("Ada B-PER\nsang O\n. O\n\n" * 2)
    settings = {"recipe": str(ROOT / "recipes/token_classification.py"), "model": {"name": str(tiny_bert)}}
    Path("tags.yaml").write_text(yaml.safe_dump(settings))
    text = shown(for_both("a.conll", "--data.max_length", 32), "tags.yaml")
    assert "[CLS] «ada/B-PER» «sang/O» «./O» [SEP]" in text


def shown(flags, config=CONFIG, **settings):
    """Return what a terminal shows."""
    recipe = load_from_flags(["--config", config, "--budget", "cpu", *map(str, flags)])
    file = io.StringIO()
    data.show(inspect_data(recipe), Console(file=file, highlight=False, width=100, **settings))
    return file.getvalue()


def test_learned_text_is_in_colour_on_a_terminal_and_in_marks_elsewhere(tiny_bert, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    rows = [{**row, "text": f"{row['text']} \x1b[31m [b]"} for row in TEXTS]
    flags = for_both(write_rows("a.jsonl", rows), "--model.name", tiny_bert, "--data.max_length", 32)
    plain = shown(flags)
    assert "label: «a»" in plain
    assert "\x1b" not in plain
    assert "[ b ]" in plain
    assert "columns               text (data.text_column), label (data.label_column)\n" in plain
    assert "more" not in plain
    assert "ignored               1 column that nothing uses: id" in plain
    assert re.search(r"validation lengths +median \d+, 95 % up to \d+, longest \d+ tokens", plain)
    assert re.search(r" a +5 +50.0% +5 +50.0%", plain)
    assert "10 of 10 validation examples have the inputs of a training example" in plain
    colour = shown(flags, force_terminal=True, color_system="standard")
    assert "«" not in colour
    assert re.search(r"label: \x1b\[0m\x1b\[[\d;]*102ma\x1b\[0m", colour)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "label: «a»" in re.sub(r"\x1b\[[\d;]*m", "", shown(flags, force_terminal=True))


@pytest.mark.parametrize(
    ("rows", "flags"),
    [
        (TEXTS, ["--data.text_column", "body"]),
        ([*TEXTS, {"text": None, "label": "a", "id": 0}], []),
        (TEXTS, ["--data.train", "absent.csv"]),
        (TEXTS, ["--data.max_length", "600"]),
        (TEXTS, ["--batch.effective", "600"]),
        (TEXTS, ["--optim.lrr", "1"]),
        (TEXTS, ["--data.problem", "multi_label"]),
    ],
    ids=["column", "row", "file", "positions", "windows", "setting", "metric"],
)
def test_it_refuses_with_the_line_of_a_run_and_exit_code_1(rows, flags, tiny_bert, start, capfd):
    small = {"--config": CONFIG, "--budget": "cpu", "--data.max_length": 32, "--batch.effective": 4}
    small |= {"--data.train": write_rows("a.jsonl", rows), "--model.name": tiny_bert}
    words = [str(word) for word in with_defaults(flags, small)]
    outcome = start(load_recipe("text_classification").TextClassification, *words, "--output.tracker", "none")
    with pytest.raises(GradaccError) as caught:
        data.main(words)
    assert (outcome.code, outcome.out, outcome.err) == (2, "", f"error: {caught.value}\n")
    assert caught.value.exit_code == 1
    assert "given twice" not in outcome.err
    assert ("of eight [SEP]" in capfd.readouterr().out) == ("--batch.effective" in flags)


def test_it_writes_nothing(tiny_bert, capsys):
    file = write_rows("a.jsonl", TEXTS)
    inspected(
        capsys, "text_classification", *for_both(file, "--model.name", tiny_bert, "--data.max_length", 32)
    )
    assert [path.name for path in Path().iterdir()] == ["a.jsonl"]


def test_a_wrong_number_of_examples_is_refused():
    with pytest.raises(InputError, match=r"--examples: found -1; allowed: 0 or more"):
        data.main(["--config", CONFIG, "--examples", "-1"])
