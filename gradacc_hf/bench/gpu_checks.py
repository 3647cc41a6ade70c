"""The checks of `gradacc bench gpu`: gradients of split windows, against the whole window at once.

A tiny model of each head runs windows in float32: split into padded micro-batches, and split without padding
in the layers. The reference is the gradient of each whole window at once, with padding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.loss_items import model_loss
from gradacc_hf.accumulation.reference import (
    EXACT,
    Gradient,
    RecordGradients,
    full_float32,
    relative_error,
    whole_window_gradient,
)
from gradacc_hf.errors import PaddingNotRemovableError, one_line
from gradacc_hf.padding.removal import remove_padding
from gradacc_hf.padding.variable_length import is_precise
from gradacc_hf.training.loop import train
from gradacc_hf.verification.tiny_models import Head, build_head

HEADS = (
    ("sequence_classification", "bert"),
    ("sequence_classification", "llama"),
    ("token_classification", "roberta"),
    ("masked_lm", "distilbert"),
    ("causal_lm", "gpt2"),
    ("causal_lm", "qwen2"),
    ("seq2seq_lm", "bart"),
    ("seq2seq_lm", "t5"),
    ("question_answering", "bert"),
)
LENGTHS = (31, 5, 12, 3, 24, 9, 17, 38, 6, 21, 14, 4)
WINDOW, MICRO_BATCH = 6, 4


@dataclass(frozen=True)
class Check:
    """The largest relative errors of a head, over the windows."""

    head: str
    split: float | None = None  # padded micro-batches
    without_padding: float | None = None  # None: refused or failed
    refused: str | None = None  # why padding cannot be removed
    failed: str | None = None

    @property
    def exact(self) -> bool:
        """Whether all that was measured is exact. NaN is not."""
        measured = [error for error in (self.split, self.without_padding) if error is not None]
        return self.failed is None and all(error <= EXACT for error in measured)


def check_head(kind: str, model_type: str, accelerator: Accelerator) -> Check:
    """Check a head. An error of any kind is the reason in `Check.failed`."""
    name = f"{kind}, {model_type}"
    try:
        with full_float32():
            return _check(name, build_head(kind, model_type), accelerator)
    except Exception as error:  # one head must not end the others
        return Check(name, failed=f"{type(error).__name__}: {one_line(error)[:300]}")


def check_kernel(device: torch.device) -> Check:
    """Check whether attention runs in torch's kernel for variable lengths, in bf16 and without dropout."""
    used = all(is_precise(device, torch.bfloat16, (4, 2), 64, is_causal) for is_causal in (False, True))
    why = None if used else "missing, or less precise than attention by example: attention runs by groups"
    return Check("the kernel for variable lengths", refused=why)


def _check(name: str, head: Head, accelerator: Accelerator) -> Check:
    examples = head.examples(LENGTHS)
    if head.kind == "causal_lm":
        examples = [{**example, "labels": example["input_ids"]} for example in examples]
    pad_to = max(LENGTHS) if head.kind == "question_answering" else None  # its loss reads padding
    model = head.model.to(accelerator.device)
    parts = [examples[start : start + WINDOW] for start in range(0, len(examples), WINDOW)]
    batches = [send_to_device(head.collate(part, pad_to), accelerator.device) for part in parts]
    whole = [whole_window_gradient(model, batch) for batch in batches]

    def error(**more: Any) -> float:
        found = _accumulated(head, examples, accelerator, more)
        return max(map(relative_error, found, whole))

    split = error(pad_to=pad_to or "micro_batch")
    try:
        remove_padding(model, batches[0], compute_loss=model_loss)
    except PaddingNotRemovableError as reason:
        return Check(name, split, refused=one_line(reason))
    return Check(name, split, error(padding_free=True))


def _accumulated(head: Head, examples: list[Any], accelerator: Accelerator, more: Any) -> list[Gradient]:
    """Return the gradient of each window from the loop. No weight changes."""
    windows = WindowLoader(
        examples,
        WINDOW,
        accelerator=accelerator,
        collate_fn=head.collate,
        num_items=head.num_items,
        micro_batch_size=MICRO_BATCH,
        shuffle=False,
        **more,
    )
    recorder = RecordGradients(head.model)
    model, optimizer = accelerator.prepare(head.model, recorder)
    train(model, optimizer, windows, accelerator=accelerator)
    return recorder.gradients
