"""Short training runs of a tiny BERT with `fine_tune`, and an accelerator with fp16 on the CPU."""

import json

import numpy as np
import torch
from accelerate import Accelerator

from gradacc_hf import WindowLoader, fine_tune
from gradacc_hf.verification.tiny_models import build_head

LENGTHS = np.random.default_rng(0).integers(3, 40, size=50).tolist()


def set_up(effective_batch_size=10, accelerator=None, **split):
    """Return a tiny BERT, an optimizer and the windows of 50 examples."""
    head = build_head("sequence_classification", "bert")
    accelerator = accelerator or Accelerator(cpu=True)
    windows = WindowLoader(
        head.examples(LENGTHS),
        effective_batch_size,
        accelerator=accelerator,
        collate_fn=head.collate,
        **(split or {"max_tokens": 64}),
    )
    return head.model, torch.optim.AdamW(head.model.parameters(), lr=1e-3), windows


def run(model, optimizer, windows, **more):
    return fine_tune(model, optimizer, windows, accelerator=windows.accelerator, **more)


def history(folder):
    return [
        json.loads(line, parse_constant=no_json)
        for line in (folder / "history.jsonl").read_text().splitlines()
    ]


def no_json(constant):
    raise AssertionError(f"{constant} is not JSON")


class CountingScaler(torch.amp.GradScaler):
    unscaled = 0

    def unscale_(self, optimizer):
        self.unscaled += 1
        super().unscale_(optimizer)


def fp16_accelerator(init_scale=1024.0):
    """Return an accelerator with fp16 on the CPU, which torch supports and Accelerate does not."""
    accelerator = Accelerator(cpu=True)
    # one backoff is enough after an overflow, so that later windows step
    scaler = CountingScaler("cpu", init_scale=init_scale, backoff_factor=2.0**-30)
    accelerator.scaler, accelerator.native_amp = scaler, True
    accelerator.state._mixed_precision = "fp16"
    return accelerator
