"""Every example of `recipes/README.md`, section "Formats", is read, and what is learned is what it states."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image
from recipe_runs import load_recipe, make_recipe, write_rows

from gradacc_hf.errors import InputError

README = (ROOT / "recipes/README.md").read_text()


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


def decoded(recipe, example):
    """The labelled tokens of an example: its first word pieces, with the tags."""
    pieces = recipe.tokenizer.convert_ids_to_tokens(example["input_ids"])
    pairs = [pair for pair in zip(pieces, example["labels"], strict=True) if pair[1] != -100]
    return " ".join(f"{piece}/{recipe.labels.names[label]}" for piece, label in pairs)


@pytest.mark.parametrize(("form", "example", "learned"), table("Token classification"))
def test_tags(form, example, learned, tiny_bert, tmp_path):
    suffixes = re.findall(r"`(\.\w+)`", form) or [".jsonl"]
    is_text = suffixes != [".jsonl"]
    content = example.replace("\\n", "\n").replace("\\t", "\t")
    for suffix in suffixes:
        path = tmp_path / f"a{suffix}"
        path.write_text(content if is_text else f"{content}\n" * 2)
        recipe, train = read(load_recipe("token_classification").TokenClassification, path, tiny_bert)
        pairs = [pair.rpartition("/") for pair in learned.split()]
        pieces = [f"{recipe.tokenizer.tokenize(token)[0]}/{tag}" for token, _, tag in pairs]
        assert [decoded(recipe, example) for example in train] == [" ".join(pieces)] * (1 if is_text else 2)
        assert (recipe.reading.notes.get("format") or is_text) or form == "tokens and tags"


@pytest.mark.parametrize(("form", "example", "learned"), table("Multi-label"))
def test_several_labels(form, example, learned, tiny_bert, tmp_path):
    path = tmp_path / ("a.csv" if ".csv" in form else "a.jsonl")
    path.write_text(example.replace("\\n", "\n"))
    flags = [word for flag in re.findall(r"`(--[^`]+)`", form) for word in flag.split()]
    recipe = load_recipe("text_classification").TextClassification
    recipe, train = read(recipe, path, tiny_bert, "--data.problem", "multi_label", *flags)
    names = recipe.target.labels.names
    assert [name for name, is_on in zip(names, train[0]["labels"], strict=True) if is_on] == learned.split()
    assert bool(recipe.reading.notes.get("format")) == (".csv" in form)


@pytest.mark.parametrize(("form", "row", "learned"), table("Question answering"))
def test_questions(form, row, learned, tiny_bert, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [json.loads(row)] * 3)
    recipe = load_recipe("question_answering").QuestionAnswering
    recipe, train = read(recipe, path, tiny_bert, "--data.max_length", 48, "--data.doc_stride", 8)
    assert len(train) == 3
    span = train[0]["input_ids"][train[0]["start_positions"] : train[0]["end_positions"] + 1]
    assert recipe.tokenizer.decode(span) == ("[CLS]" if learned == "no answer" else learned.lower())


@pytest.mark.parametrize(("form", "files", "learned"), table("Images"))
def test_images(form, files, learned, tmp_path, monkeypatch):
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
    recipe = load_recipe("image_classification").ImageClassification
    given = next((name for name in ("pets.csv",) if Path(name).exists()), "pets")
    recipe, train = read(recipe, given, "embedded:tiny_vit")
    names = recipe.target.names
    found = sorted(f"{Path(row['image']['path']).name}/{names[row['labels']]}" for row in train)
    assert [one for one in found if "none" not in one] == learned.split()


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
