"""`gradacc data --json` in this process, and the folder of a model that reads a token a byte."""

import json

import transformers
from chat_templates import tokenizer_of
from conftest import ROOT

from gradacc_hf.cli import data


def inspected(capsys, name, *flags):
    """Return what `gradacc data` states about these settings of configs/NAME_offline.yaml."""
    config = ROOT / "configs" / f"{name}_offline.yaml"
    capsys.readouterr()
    data.main([str(word) for word in ("--config", config, "--budget", "cpu", "--json", *flags)])
    return json.loads(capsys.readouterr().out)


def for_both(path, *flags, window=1):
    """The flags that read a file as training and as validation data, with windows of few examples."""
    return ["--data.train", path, "--data.validation", path, "--batch.effective", window, *flags]


def byte_model(folder):
    """A folder with the config of a tiny Llama and a byte tokenizer with SmolLM2's chat template."""
    tokenizer = tokenizer_of("smollm2")
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes).save_pretrained(folder)
    return folder
