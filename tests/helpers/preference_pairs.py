"""Pairs of answers and a tiny model, for the tests of preferences: the exactness of every loss."""

import json
from pathlib import Path

import torch
import transformers
from chat_templates import byte_tokenizer

from gradacc_hf.accumulation.reference import RecordGradients, relative_error, whole_window_gradient
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.run.padding import choose_padding
from gradacc_hf.run.setup import make_model, make_windows
from gradacc_hf.training.loop import train

ROOT = Path(__file__).parents[2]
LOSSES = {
    "dpo": ["--data.label_smoothing", "0.1"],
    "hinge": ["--data.loss", "dpo", "--data.variant", "hinge", "--data.beta", "0.3"],
    "ipo": ["--data.loss", "dpo", "--data.variant", "ipo"],
    "orpo": ["--data.loss", "orpo"],
    "simpo": ["--data.loss", "simpo", "--data.beta", "2"],
    "kto": ["--data.loss", "kto", "--data.undesirable_weight", "1.5"],
    "reward": ["--data.loss", "reward"],
}
"""Name → settings of the loss."""
WORDS = ["red", "green", "blue", "a", "of", "the", "sky", "sea", "grass", "one", "two", "three"]


def pairs(number=26):
    """Rows of a prompt and two answers, which are messages in every row, of unequal lengths."""

    def text(row, size):
        return " ".join(WORDS[(row * 7 + place * 5) % len(WORDS)] for place in range(size))

    return [
        {
            "prompt": [{"role": "user", "content": f"q{row} {text(row, 1 + row % 4)}"}],
            "chosen": [{"role": "assistant", "content": text(row + 1, 1 + row % 6)}],
            "rejected": [{"role": "assistant", "content": text(row + 3, 1 + row * 5 % 7) + "."}],
        }
        for row in range(number)
    ]


def write_pairs(folder):
    """Write the pairs and a tiny Llama with a token a byte into a folder, and return their settings."""
    folder = Path(folder)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs()))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    byte_tokenizer().save_pretrained(folder / "llama")
    return [
        *("--config", str(ROOT / "configs/preference_offline.yaml")),
        *("--model.name", str(folder / "llama"), "--model.lora.rank", "0"),
        *("--data.train", str(folder / "pairs.jsonl"), "--data.validation_fraction", "0.2"),
        *("--data.max_length", "128", "--batch.effective", "11"),
    ]


def exactness(settings, accelerator, **split):
    """The worst relative errors of gradient and loss of two windows, against each window at once.

    The split is the budget's. Training starts from the saved weights. The trained weights differ from them,
    so that rewards are not 0.
    """
    flags = [word for name, value in split.items() for word in (f"--budget.{name}", str(value))]
    recipe = load_recipe([*settings, *flags])
    training, validation = recipe.read_examples()
    windows, _ = make_windows(recipe, training, validation, accelerator)
    trained, untouched = make_model(recipe), make_model(recipe)
    choose_padding(recipe, trained, windows)
    recipe.before_training(trained, [training, validation], accelerator)
    for model in (trained, untouched):
        with torch.no_grad():
            (model.score if recipe.of_rewards else model.lm_head).weight.mul_(0.8)
    batches = [recipe.collate(windows.examples(windows.plan.indices(0, number))) for number in (0, 1)]
    truths = [whole_window_gradient(untouched, batch, recipe.loss) for batch in batches]
    losses = [float(recipe.loss(untouched(**batch), batch).detach()) for batch in batches]
    model, optimizer = accelerator.prepare(trained, RecordGradients(trained))
    recorder = optimizer.optimizer
    recorder.model = accelerator.unwrap_model(model)
    options = {"accelerator": accelerator, "compute_loss": recipe.loss, "max_windows": 2}
    records = train(model, optimizer, windows, **options)
    gradients = recorder.gradients
    found = {
        "error": max(map(relative_error, gradients, truths)),
        "loss_error": max(abs(r.loss / loss - 1) for r, loss in zip(records, losses, strict=True)),
        "steps": [record.accumulation_steps for record in records],
        "padding": recipe.model_notes.get("padding in layers", "kept"),
    }
    return found, recipe, (untouched, batches[0])
