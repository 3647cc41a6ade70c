"""Every example of `recipes/README.md`, section "Formats", is read, and what is learned is what it states."""

import json
import re

import pytest
from conftest import ROOT
from recipe_runs import load_recipe, make_recipe, write_rows

README = (ROOT / "recipes/README.md").read_text()


def table(title):
    """The examples of a table: (the format, the example, what is learned)."""
    section = README.partition(f"\n### {title}\n")[2].partition("\n#")[0]
    rows = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in section.splitlines() if line[:2] == "| "]
    assert len(rows) > 3
    return [pytest.param(*(cell.strip("`") for cell in cells[1:]), id=cells[0]) for cells in rows[1:]]


def read(recipe, path, tiny_bert, *flags):
    """The recipe, which read the file for both splits, and its training rows."""
    settings = ["--data.train", path, "--data.validation", path, "--model.name", tiny_bert]
    recipe = make_recipe(recipe, *settings, *flags)
    return recipe, recipe.datasets()[0]


@pytest.mark.parametrize(("row", "learned"), table("Question answering"))
def test_questions(row, learned, tiny_bert, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [json.loads(row)] * 3)
    recipe = load_recipe("question_answering").QuestionAnswering
    recipe, train = read(recipe, path, tiny_bert, "--data.max_length", 48, "--data.doc_stride", 8)
    assert len(train) == 3
    span = train[0]["input_ids"][train[0]["start_positions"] : train[0]["end_positions"] + 1]
    assert recipe.tokenizer.decode(span) == ("[CLS]" if learned == "no answer" else learned.lower())
