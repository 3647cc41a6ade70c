"""Every example of `recipes/README.md`, section "Formats", is read as it states, with what is learned."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import transformers
from conftest import ROOT
from data_command import for_both, inspected
from PIL import Image
from recipe_runs import load_recipe, make_recipe, write_rows

from gradacc_hf.errors import InputError

README = (ROOT / "recipes/README.md").read_text()
SHORT = ["--data.max_length", 64]  # the positions of the tiny model


def table(title):
    """The examples of a table: (the format, the example, what is learned)."""
    section = README.partition(f"\n### {title}\n")[2].partition("\n#")[0]
    rows = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in section.splitlines() if line[:2] == "| "]
    assert len(rows) > 3
    return [
        pytest.param(cells[0], *(cell.strip("`") for cell in cells[1:]), id=cells[0]) for cells in rows[1:]
    ]


def read(recipe, path, tiny_bert, *flags):
    """The recipe, which read the file for both splits, and its training rows."""
    settings = ["--data.train", path, "--data.validation", path, "--model.name", tiny_bert]
    recipe = make_recipe(recipe, *settings, *flags)
    return recipe, recipe.datasets()[0]


def flags_in(form):
    """The flags that a line of the page gives."""
    return [word for flag in re.findall(r"`(--[^`]+)`", form) for word in flag.split()]


def first_part(tokenizer, token):
    """The part of a token that has the label: its first word piece, and the next ones without a space."""
    return tokenizer.decode(tokenizer(token, add_special_tokens=False)["input_ids"]).split()[0]


@pytest.mark.parametrize(("form", "example", "learned"), table("Token classification"))
def test_tags(form, example, learned, tiny_bert, tmp_path, capsys):
    suffixes = re.findall(r"`(\.\w+)`", form) or [".jsonl"]
    is_text = suffixes != [".jsonl"]
    content = example.replace("\\n", "\n").replace("\\t", "\t")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    pairs = [pair.rpartition("/") for pair in learned.split()]
    flags = ["--model.name", tiny_bert, *SHORT, *flags_in(form)]
    for suffix in suffixes:
        path = tmp_path / f"a{suffix}"
        path.write_text(content if is_text else f"{content}\n" * 2)
        found = inspected(capsys, "token_classification", *for_both(path, *flags))
        number = 1 if is_text else 2
        assert found["rows"] == {"training": number, "validation": number}
        expected = [f"{first_part(tokenizer, token)}/{tag}" for token, _, tag in pairs]
        assert [example["learned"] for example in found["examples"]] == [expected] * number
        counts = Counter(tag for *_, tag in pairs)
        assert {tag: n / number for tag, n in found["labels"]["training"].items() if n} == counts
        assert found["format"] or is_text or form == "tokens and tags"


@pytest.mark.parametrize(("form", "example", "learned"), table("Multi-label"))
def test_several_labels(form, example, learned, tiny_bert, tmp_path, capsys):
    path = tmp_path / ("a.csv" if ".csv" in form else "a.jsonl")
    path.write_text(example.replace("\\n", "\n"))
    flags = [*flags_in(form), "--model.name", tiny_bert, *SHORT, "--data.problem", "multi_label"]
    flags += ["--train.best_metric", "f1_micro"]
    found = inspected(capsys, "text_classification", *for_both(path, *flags))
    assert found["examples"][0]["learned"] == learned.split()
    assert {*learned.split()} <= {name for name, number in found["labels"]["training"].items() if number}
    assert bool(found["format"]) == (".csv" in form)


@pytest.mark.parametrize(("form", "row", "learned"), table("Question answering"))
def test_questions(form, row, learned, tiny_bert, tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", [json.loads(row)] * 3)
    flags = ["--model.name", tiny_bert, "--data.max_length", 48, "--data.doc_stride", 8]
    found = inspected(capsys, "question_answering", *for_both(path, *flags))
    assert found["rows"] == {"training": 3, "validation": 3}
    assert [example["learned"] for example in found["examples"]] == [[learned.lower()]] * 3
    assert found["labels"]["training"]["no answer" if learned == "no answer" else "answer"] == 3
    assert bool(found["format"]) == (form not in ("as above", "no answer"))


@pytest.mark.parametrize(("form", "files", "learned"), table("Images"))
def test_images(form, files, learned, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for file in files.split(" "):
        name, _, content = file.partition(":")
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if content:
            Path(name).write_text(content.replace("\\n", "\n"))
        else:
            Image.new("RGB", (8, 8)).save(name)
    if learned.count("/") == 1:  # a second class, which a model needs
        Image.new("RGB", (8, 8)).save("pets/0.png")
        table = next(path for path in Path().rglob("*.*") if path.suffix in (".csv", ".jsonl"))
        lines = table.read_text().splitlines()
        table.write_text("\n".join([*lines, lines[-1].replace("1.png", "0.png").replace("cat", "none")]))
    given = next((name for name in ("pets.csv",) if Path(name).exists()), "pets")
    found = inspected(capsys, "image_classification", *for_both(given))
    assert {example["texts"]["text"].partition(", ")[2] for example in found["examples"]} == {"8 × 8 pixels"}
    named = [
        f"{Path(example['texts']['text'].partition(',')[0]).name}/{'/'.join(example['learned'])}"
        for example in found["examples"]
    ]
    is_of_folders = not any(name.endswith((".csv", ".jsonl")) for name in map(str, Path().rglob("*.*")))
    assert (found["format"] == ["images in a folder for each class"]) == is_of_folders
    assert any("cat/1.png," in example["texts"]["text"] for example in found["examples"]) == is_of_folders
    assert sorted(one for one in named if "none" not in one) == learned.split()
    assert found["rows"]["training"] == len(named) == 2


def test_a_broken_label_is_one_line_with_the_line_of_the_file(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("text,a,b\n" + "t,1,0\n" * 12 + "t,1,maybe\n" + "t,0,1\n" * 12)
    recipe = load_recipe("text_classification").TextClassification
    flags = ["--data.problem", "multi_label", "--data.label_columns", "a, b"]
    with pytest.raises(InputError) as caught:
        read(recipe, "a.csv", tiny_bert, *flags)
    assert str(caught.value) == (
        "data.label_column: a.csv line 14: column 'b' is 'maybe', not 0 or 1; "
        "correct it, or leave such rows out: --data.on_bad_row skip"
    )
    _, train = read(recipe, "a.csv", tiny_bert, *flags, "--data.on_bad_row", "skip")
    assert len(train) == 24
    with pytest.raises(
        InputError, match=r"data.label_columns: .* null, except with data.problem multi_label"
    ):
        read(recipe, "a.csv", tiny_bert, *flags[2:])
