"""Training runs with checkpoints, and the folder that a killed run leaves."""

import shutil

import torch
from accelerate import Accelerator
from training_runs import LENGTHS, history

from gradacc_hf import WindowLoader, evaluate, fine_tune
from gradacc_hf.accumulation.accelerate_state import reset_accelerate
from gradacc_hf.training.checkpoint import Checkpoints, newest_checkpoint
from gradacc_hf.training.optimizer import make_optimizer, make_scheduler
from gradacc_hf.training.settings import OptimConfig
from gradacc_hf.verification.tiny_models import build_head

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
}


def run(
    folder,
    resume=None,
    optimizer="adamw",
    make=None,
    accelerator=None,
    every=1,
    keep=99,
    epochs=2,
    plus_lr_ratio=1.0,
    **more,
):
    """Train a tiny BERT with dropout for two epochs of 5 windows, with an evaluation every 3 windows.

    `optimizer` is a name in OPTIMIZERS, or an OptimConfig with its schedule.
    """
    reset_accelerate()
    accelerator = accelerator() if accelerator else Accelerator(cpu=True)
    torch.manual_seed(7)
    head = build_head("sequence_classification", "bert")
    for module in head.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    model = make(head.model) if make else head.model
    windows = WindowLoader(
        head.examples(LENGTHS), 10, accelerator=accelerator, collate_fn=head.collate, max_tokens=64
    )
    if isinstance(optimizer, OptimConfig):
        chosen = make_optimizer(model, optimizer, plus_lr_ratio=plus_lr_ratio)
        scheduler = make_scheduler(chosen, optimizer, windows, 5 * epochs)
    else:
        chosen = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
        scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: 1 / (1 + step))
    if resume is not None:
        resume = newest_checkpoint(resume, accelerator)
    settings = {
        "validate": lambda model: {"loss": evaluate(model, windows, accelerator=accelerator).loss},
        **more,
    }
    summary = fine_tune(
        model,
        chosen,
        windows,
        accelerator=accelerator,
        scheduler=scheduler,
        epochs=epochs,
        eval_every=3,
        output_dir=folder,
        checkpoints=Checkpoints(every=every, keep=keep, resume_from=resume),
        **settings,
    )
    return model, summary


def history_without_seconds(folder):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history(folder)]


def same_weights(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def cut_back(run, folder, window):
    """Copy the folder of a run, as a kill in the window after this checkpoint would leave the folder."""
    shutil.copytree(run, folder)
    for path in sorted((folder / "checkpoints").iterdir())[window:]:
        shutil.rmtree(path)
    shutil.rmtree(folder / "last", ignore_errors=True)
    (folder / "summary.json").unlink()
    lines = (folder / "history.jsonl").read_text().splitlines(keepends=True)
    (folder / "history.jsonl").write_text("".join(lines[: window + 1]) + '{"window": 99, "epo')
    return folder
