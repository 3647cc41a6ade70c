"""The examples of chats in recipes/README.md: the files are read, and the learned text is the stated one."""

import re

import datasets.config
import pytest
from chat_templates import learned_of_row, tokenizer_of
from conftest import ROOT

from gradacc_hf.data.loading import load_data
from gradacc_hf.tasks.chat_formats import find_format

GUIDE = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
CHATS = GUIDE.partition("\n### Chats\n")[2].partition("\n## ")[0].partition("\n### ")[0]
EXAMPLES = re.findall(r"^`(\w+)`, learned ([^\n]+)\n\n```jsonl\n(.*?)```", CHATS, re.MULTILINE | re.DOTALL)


def test_every_block_of_the_guide_is_an_example():
    assert len(EXAMPLES) == CHATS.count("```jsonl") > 0
    assert {name for name, _, _ in EXAMPLES} == {*re.findall(r"^\| `(\w+)` \|", CHATS, re.MULTILINE)}


@pytest.mark.parametrize(("name", "learned", "rows"), EXAMPLES, ids=[name for name, _, _ in EXAMPLES])
def test_an_example_is_read_as_stated(name, learned, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "train.jsonl"
    file.write_text(rows, encoding="utf-8")
    found = load_data(str(file), str(file), validation_fraction=0.1, seed=0)
    form, tokenizer = (
        find_format((found.train, found.validation), "auto", "all", True),
        tokenizer_of("smollm2"),
    )
    assert form.name == name
    of_rows = [learned_of_row(tokenizer, form, row) for row in found.train]
    assert [problem for _, problem in of_rows] == [""] * len(found.train)
    end = "<|im_end|>" if form.is_chat else tokenizer.eos_token
    assert [text for texts, _ in of_rows for text in texts] == [
        f"{text}{end}" for text in re.findall("`(.+?)`", learned)
    ]
