"""The loop in the open, without a Recipe: MiniLM learns to predict the module of a docstring.

    ./launch.sh recipes/minimal.py --processes 2

Copy it into your project and replace the data, the model and the collate function. From `for window` to the
scheduler's step it is Accelerate's own loop, with two additions: the loop over windows, and `window.weigh`.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_scheduler

from gradacc_hf import WindowLoader, evaluate
from gradacc_hf.embedded import docstring_modules, minilm_path


def main(epochs: int, max_windows: int | None) -> None:
    set_seed(0)
    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(minilm_path())
    train, validation = docstring_modules()
    modules = sorted(set(train["label"]))

    def tokenize(row):
        tokens = tokenizer(row["text"], truncation=True, max_length=256, return_token_type_ids=False)
        return {**tokens, "labels": modules.index(row["label"])}

    def collate(examples):
        return tokenizer.pad(examples, return_tensors="pt")

    train, validation = ([tokenize(row) for row in rows] for rows in (train, validation))
    model = AutoModelForSequenceClassification.from_pretrained(minilm_path(), num_labels=len(modules))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    model, optimizer = accelerator.prepare(model, optimizer)

    shared = {"max_tokens": 2048, "collate_fn": collate, "accelerator": accelerator}
    windows = WindowLoader(train, 64, seed=0, **shared)
    # Do not prepare the scheduler: it takes one step per window.
    scheduler = get_scheduler("linear", optimizer, 4, epochs * len(windows))

    for epoch in range(epochs):
        model.train()
        for window in windows:  # one window is one optimizer step
            for batch in window:  # this process's micro-batches
                with accelerator.accumulate(model):
                    loss = model(**batch).loss  # a mean over the micro-batch's items
                    accelerator.backward(window.weigh(loss))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
            if not accelerator.optimizer_step_was_skipped:  # fp16 overflow
                scheduler.step()
            accelerator.print(
                f"epoch {epoch} window {window.number} of {len(windows)}: loss {window.loss:.4f}"
            )
            if window.number + 1 == max_windows:
                break

    found = evaluate(model, WindowLoader(validation, 256, shuffle=False, **shared), accelerator=accelerator)
    right = sum(
        logits.argmax() == label for logits, label in zip(found.predictions, found.references, strict=True)
    )
    accelerator.print(f"accuracy {right / len(validation):.3f} on {len(validation)} held-out docstrings")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fine-tune MiniLM on docstrings, with the loop in the open.")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training examples (1)")
    parser.add_argument("--check", action="store_true", help="check whether this would run, and stop")
    parser.add_argument("--max_windows", type=int, help="optimizer steps after which an epoch ends (all)")
    arguments = parser.parse_args()
    print("check: this would run") if arguments.check else main(arguments.epochs, arguments.max_windows)
