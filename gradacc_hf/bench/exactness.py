"""`gradacc bench exactness`: relative errors of accumulated gradients, by contender and by head.

A head is a model class such as `BertForSequenceClassification`. The reference is the gradient of the whole
window in one batch. The models are tiny, with random weights, on the CPU, in float32, without dropout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader

from gradacc_hf.accumulation.reference import EXACT, RecordGradients, relative_error, whole_window_gradient
from gradacc_hf.bench.progress import Progress
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.verification.all_heads import LENGTHS, SPLITS, split_by_count
from gradacc_hf.verification.baselines import run_accelerate, run_trainer, run_windows
from gradacc_hf.verification.tiny_models import Head, build_head

HEADS = {
    "sequence_classification": ("bert", "roberta", "llama"),
    "token_classification": ("bert", "roberta", "deberta-v2"),
    "masked_lm": ("bert", "roberta", "modernbert"),
    "causal_lm": ("gpt2", "llama", "qwen3"),
    "seq2seq_lm": ("t5", "bart", "marian"),
    "question_answering": ("bert", "roberta", "distilbert"),
    "multiple_choice": ("bert", "roberta", "deberta-v2"),
    "image_classification": ("vit", "swin", "dinov2"),
}
CONTENDERS = {
    "ours": "Window-\nLoader",
    "exact_trainer": "Exact-\nTrainer",
    "accelerate": "accu-\nmulate()",
    "trainer": "Trainer",
}


@dataclass(frozen=True)
class GradientDeviation:
    """The gradient for one head, split and contender, compared with the gradient of the whole window."""

    kind: str
    model_type: str
    split: str
    contender: str
    error: float  # relative
    norm_ratio: float  # norm of the gradient / norm of the whole window's gradient


@dataclass(frozen=True)
class ExactnessResult:
    """Every head, split and contender. A gradient is exact if the error is at most `EXACT`."""

    errors: tuple[GradientDeviation, ...]
    measured_with: dict[str, str]


def measure_exactness(
    heads: Mapping[str, Sequence[str]] = HEADS, progress: Progress = iter
) -> ExactnessResult:
    """Compare the gradients that reach the optimizer.

    Args:
        heads: model types, by kind of head. Examples of question answering are all padded to one length,
            because padding changes the loss.
        progress: wraps the list of heads.
    """
    deviations: list[GradientDeviation] = []
    named = [(kind, model_type) for kind, model_types in heads.items() for model_type in model_types]
    for kind, model_type in progress(named):
        head = build_head(kind, model_type)
        pad_to = max(LENGTHS) if kind == "question_answering" else None
        whole = whole_window_gradient(head.model, head.collate(head.examples(LENGTHS), pad_to=pad_to))
        for size, split in SPLITS.items():
            for contender in CONTENDERS:
                gradient = accumulated_gradient(head, contender, size, pad_to)
                error = relative_error(gradient, whole)
                ratio = float(get_total_norm(gradient.values()) / get_total_norm(whole.values()))
                deviations.append(GradientDeviation(kind, model_type, split, contender, error, ratio))
    return ExactnessResult(tuple(deviations), measured_with("cpu"))


def accumulated_gradient(
    head: Head, contender: str, micro_batch_size: int, pad_to: int | None
) -> dict[str, torch.Tensor]:
    """Return the gradient of one window, by parameter, as one contender accumulates it."""
    examples = head.examples(LENGTHS)
    collate = partial(head.collate, pad_to=pad_to)
    windows = split_by_count(head, examples, micro_batch_size, pad_to)
    micro_batches = windows.split(0, 0).processes[0]
    assert " + ".join(str(len(indices)) for indices in micro_batches) == SPLITS[micro_batch_size]
    in_order = [examples[i] for i in np.concatenate(micro_batches)]
    recorder = RecordGradients(head.model)
    if contender == "ours":
        run_windows(head.model, recorder, windows)
    elif contender == "accelerate":
        loader: Any = DataLoader(in_order, micro_batch_size, collate_fn=collate)  # type: ignore[arg-type]
        run_accelerate(head.model, recorder, loader, len(loader), cpu=True)
    else:
        run_trainer(
            head.model,
            recorder,
            in_order,
            collate,
            micro_batch_size,
            exact=contender == "exact_trainer",
            gradient_accumulation_steps=len(micro_batches),
            max_grad_norm=0,
            use_cpu=True,
        )
    [gradient] = recorder.gradients  # one window, one optimizer step
    return gradient


def print_exactness(result: ExactnessResult, console: Console) -> None:
    """Print a table for each split: exact heads and worst error by kind, and Trainer's median norm ratio."""
    for split in SPLITS.values():
        table = Table(
            title=f"Exact heads and worst relative error, with micro-batches of {split} examples",
            box=SIMPLE,
            padding=(0, 1, 0, 0),
        )
        for header in ("kind of head", *CONTENDERS.values(), "‖g‖¹"):
            table.add_column(header, justify="left" if header == "kind of head" else "right", no_wrap=True)
        rows = [row for row in result.errors if row.split == split]
        for kind in [*dict.fromkeys(row.kind for row in rows), "all"]:
            chosen = [row for row in rows if kind in (row.kind, "all")]
            by = {name: [row for row in chosen if row.contender == name] for name in CONTENDERS}
            exact = {name: sum(row.error <= EXACT for row in by[name]) for name in by}
            cells = [f"{exact[n]}/{len(by[n])} {max(row.error for row in by[n]):.0e}" for n in by]
            norm_ratio = median(row.norm_ratio for row in by["trainer"])
            table.add_row(kind.replace("_", " "), *cells, f"{norm_ratio:.3f}")
        console.print(table)
    console.print(f"exact: relative error at most {EXACT:.0e}")
    console.print("¹ norm of Trainer's gradient, divided by the norm of the whole window's gradient; median")
