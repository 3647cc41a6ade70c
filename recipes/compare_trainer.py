"""The same fine-tuning four ways, as their users write them: Trainer, ExactTrainer, accumulate() and windows.

    ./launch.sh recipes/compare_trainer.py --windows 3

All train MiniLM on the same docstrings in the same windows of 32, the last one partial, with SGD and without
dropout. The changes of the weights are compared with training on each window at once. Copy the way that you
have and the way that you want. For your own config, with repeats, memory and a report:
`gradacc compare --config FILE`.
"""

import argparse
import tempfile
import time

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    logging,
)

from gradacc_hf import ExactTrainer, WindowLoader
from gradacc_hf.embedded import docstring_modules, minilm_path

WINDOW, MICRO_BATCH, LR = 32, 4, 0.05
tokenizer = AutoTokenizer.from_pretrained(minilm_path())


def collate(examples):
    return tokenizer.pad(examples, return_tensors="pt")


def with_trainer(model, examples, trainer_class=Trainer):
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=WINDOW // MICRO_BATCH,
        num_train_epochs=1,
        optim="sgd",
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        train_sampling_strategy="sequential",  # the same windows as the other ways
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = trainer_class(model, arguments, collate, train_dataset=examples)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def with_exact_trainer(model, examples):
    with_trainer(model, examples, ExactTrainer)


def with_accumulate(model, examples):
    accelerator = Accelerator(gradient_accumulation_steps=WINDOW // MICRO_BATCH)
    loader = torch.utils.data.DataLoader(examples, MICRO_BATCH, collate_fn=collate)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()


def with_windows(model, examples, max_tokens=MICRO_BATCH * 128):
    accelerator = Accelerator()
    windows = WindowLoader(
        examples, WINDOW, max_tokens=max_tokens, collate_fn=collate, accelerator=accelerator, shuffle=False
    )
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=LR))
    model.train()
    for window in windows:
        for batch in window:
            with accelerator.accumulate(model):
                accelerator.backward(window.weigh(model(**batch).loss))
                optimizer.step()
                optimizer.zero_grad()


def at_once(model, examples):
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    model.train()
    for start in range(0, len(examples), WINDOW):
        batch = collate(examples[start : start + WINDOW]).to(model.device)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main(num_windows):
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = docstring_modules()[0].shuffle(seed=0).select(range(num_windows * WINDOW - 12))
    classes = sorted(set(rows["label"]))
    examples = []
    for row in rows:
        tokens = tokenizer(row["text"], truncation=True, max_length=128, return_token_type_ids=False)
        examples.append({**tokens, "labels": classes.index(row["label"])})

    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    expected = None
    ways = {"at once": at_once, "Trainer": with_trainer, "ExactTrainer": with_exact_trainer}
    ways |= {"accumulate()": with_accumulate, "windows": with_windows}
    for name, way in ways.items():
        set_seed(0)  # the same initial weights of the classifier
        model = AutoModelForSequenceClassification.from_pretrained(
            minilm_path(), num_labels=len(classes), **no_dropout
        )
        before = torch.cat([parameter.detach().flatten().cpu() for parameter in model.parameters()])
        started = time.perf_counter()
        way(model.to(Accelerator().device), examples)
        seconds = time.perf_counter() - started
        change = torch.cat([parameter.detach().flatten().cpu() for parameter in model.parameters()]) - before
        expected = change if expected is None else expected
        off = float((change - expected).norm() / expected.norm())
        speed = len(examples) / seconds
        print(f"{name:<14}error of the weight change {off:.0e}   {speed:.0f} examples/s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fine-tune MiniLM four ways and compare the weights.")
    parser.add_argument("--windows", type=int, default=3, help="optimizer steps of each way (%(default)s)")
    parser.add_argument("--check", action="store_true", help="check whether this would run, and stop")
    arguments = parser.parse_args()
    if arguments.windows < 1:
        parser.error(f"--windows: found {arguments.windows}; allowed: 1 or more")
    print("check: this would run") if arguments.check else main(arguments.windows)
