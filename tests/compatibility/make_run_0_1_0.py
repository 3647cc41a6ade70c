"""Make the folder run_0_1_0 beside this file, with version 0.1.0 of the package; README.md says how.

The folder gets a tiny model, data, a run that was stopped by SIGTERM after window 8 of 18, the same run left
to finish, and the answers of the finished run. `PLACE` stands for the folder that the runs were started in.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

import gradacc_hf

HERE = Path(__file__).resolve().parent
RECIPE = HERE / "recipes_0_1_0" / "text_classification.py"
STOP_AFTER_WINDOW = 8
WORDS = {
    "tea": ["tea", "garden", "letter", "morning", "window", "river"],
    "code": ["return", "value", "list", "class", "file", "error"],
    "any": ["the", "a", "of", "in", "and", "is", "it", "to", "one", "some"],
}
SETTINGS = {
    "model.name": "model",
    "model.dropout": 0,
    "data.train": "train.jsonl",
    "data.validation": "validation.jsonl",
    "data.max_length": 24,
    "data.class_weights": "balanced",
    "batch.effective": 8,
    "optim.lr": 1e-2,
    "optim.warmup_ratio": 0.2,
    "train.epochs": 3,
    "train.eval_every": 3,
    "train.noise_every": 2,
    "checkpoint.every": 4,
    "checkpoint.keep": 1,
    "budget.max_tokens": 48,
    "output.tracker": "none",
}
QUESTIONS = [
    "some tea in the garden",
    "return the value of a list",
    "one letter is to the river and it is a file",
]


def make_model(folder: Path) -> None:
    """Write a BERT of 1 layer with a tokenizer of letters and a few words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:()_="
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{letter}" for letter in letters[:36]),
    ]
    tokens += [word for words in WORDS.values() for word in words if len(word) > 1]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, **special
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
    )
    transformers.BertModel(config).save_pretrained(folder)


def make_rows(file: Path, number: int, seed: int) -> None:
    """Write texts of 2 to 20 words, a third of which are labelled `code`."""
    draw, rows = random.Random(seed), []
    for row in range(number):
        label = "tea" if row % 3 else "code"
        rows.append(
            {
                "text": " ".join(draw.choices(WORDS[label] + WORDS["any"], k=draw.randint(2, 20))),
                "label": label,
            }
        )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_and_stop() -> None:
    """Run the recipe; send this process SIGTERM after a window, with random states that no seed gives."""
    import runpy

    from gradacc_hf.runlog import RunLog, WindowRecord

    write = RunLog.window

    def write_and_stop(self: RunLog, record: WindowRecord) -> None:
        write(self, record)
        if record.window == STOP_AFTER_WINDOW:
            _ = torch.rand(3), np.random.rand(3), random.random()
            os.kill(os.getpid(), signal.SIGTERM)

    RunLog.window = write_and_stop
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    if not (Path(gradacc_hf.__file__).parent / "windows.py").is_file():
        sys.exit("gradacc_hf is not version 0.1.0 here: set PYTHONPATH to a checkout of it (README.md)")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name).resolve()
        make_model(place / "model")
        make_rows(place / "train.jsonl", 48, seed=0)
        make_rows(place / "validation.jsonl", 12, seed=1)
        shutil.copy(RECIPE, place)
        flags = [word for key, value in SETTINGS.items() for word in (f"--{key}", str(value))]
        started = {"cwd": place, "check": True}
        subprocess.run([sys.executable, RECIPE.name, *flags, "--output.dir", "finished"], **started)
        subprocess.run([sys.executable, __file__, RECIPE.name, *flags, "--output.dir", "stopped"], **started)
        (place / "questions.txt").write_text("".join(text + "\n" for text in QUESTIONS))
        predict = [sys.executable, "-m", "gradacc_hf", "predict", "finished", "--input", "questions.txt"]
        subprocess.run([*predict, "--output", "answers.jsonl"], **started)
        for left in (".lock", "report.html", "checkpoints"):
            path = place / "finished" / left
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (place / "stopped" / ".lock").unlink()
        (place / RECIPE.name).unlink()
        for name in ("finished/config.yaml", "stopped/config.yaml", "stopped/TO_BE_RESUMED"):
            text = (place / name).read_text()
            (place / name).write_text(text.replace(str(place), "PLACE"))
        for path in place.rglob("*"):
            assert path.is_dir() or str(place).encode() not in path.read_bytes(), path
            path.chmod(0o755 if path.is_dir() else 0o644)
        shutil.rmtree(HERE / "run_0_1_0", ignore_errors=True)
        shutil.copytree(place, HERE / "run_0_1_0")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        del sys.argv[0]
        train_and_stop()
    else:
        main()
