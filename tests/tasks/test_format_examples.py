"""The examples of chats in recipes/README.md: the files are read, and the learned text is the stated one."""

import re

import datasets.config
import pytest
from conftest import ROOT
from data_command import byte_model, for_both, inspected

GUIDE = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
CHATS = GUIDE.partition("\n### Chats\n")[2].partition("\n## ")[0].partition("\n### ")[0]
EXAMPLES = re.findall(r"^`(\w+)`, learned ([^\n]+)\n\n```jsonl\n(.*?)```", CHATS, re.MULTILINE | re.DOTALL)
TITLES = {
    "messages": "OpenAI messages",
    "sharegpt": "ShareGPT",
    "alpaca": "Alpaca",
    "prompt": "prompt and c",
    "text": "plain text",
}
"""`data.format` → the format as the plan states it."""


def test_every_block_of_the_guide_is_an_example():
    assert len(EXAMPLES) == CHATS.count("```jsonl") > 0
    assert {name for name, _, _ in EXAMPLES} == {*re.findall(r"^\| `(\w+)` \|", CHATS, re.MULTILINE)}


@pytest.mark.parametrize(("name", "learned", "rows"), EXAMPLES, ids=[name for name, _, _ in EXAMPLES])
def test_an_example_is_read_as_stated(name, learned, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "train.jsonl"
    file.write_text(rows, encoding="utf-8")
    model = ("--model.name", byte_model(tmp_path / "model"), "--model.lora.rank", 0, "--data.max_length", 512)
    found = inspected(capsys, "causal_lm", *for_both(file, *model))
    number = len(rows.splitlines())
    assert found["rows"] == {"training": number, "validation": number}
    assert found["format"][0].startswith(TITLES[name])
    end = "</s>" if "plain text" in found["format"][0].partition(";")[0] else "<|im_end|>"
    texts = [text for example in found["examples"] for text in example["learned"]]
    assert texts == [f"{text}{end}" for text in re.findall("`(.+?)`", learned)]
