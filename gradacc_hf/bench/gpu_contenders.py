"""The models and contenders of `gradacc bench gpu`.

All contenders of a model train the same examples in windows of the same size, with the same settings. A
micro-batch holds as many examples as fit `max_tokens`. Trainer's micro-batches have a fixed number of
examples, so that they fit when padded to the longest.

The dense limit is the loop on examples of one length: as many examples and real tokens, and no padding.
Examples are as long as the docstrings of Python's standard library, in words and signs. Tokens and weights
are random.
"""

import copy
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn.utils.rnn import pad_sequence

from gradacc_hf.accumulation.accelerate_state import reset_settings
from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.loss_items import IGNORED, model_loss
from gradacc_hf.bench.predicted_memory import MemoryCase, build, is_classifier, step_estimate
from gradacc_hf.comparison.worker import peak_memory, reset_peak_memory
from gradacc_hf.embedded import docstrings
from gradacc_hf.errors import NotTraceableError, one_line
from gradacc_hf.padding.removal import remove_padding
from gradacc_hf.training.optimizer import make_optimizer
from gradacc_hf.training.settings import OptimConfig
from gradacc_hf.utils.memory import release_memory
from gradacc_hf.verification.baselines import EpochResult, run_trainer, run_windows

CONTENDERS = {
    "ours": "gradacc",
    "ours_padded": "gradacc, padded",
    "trainer": "Trainer",
    "trainer_by_length": "Trainer, by length",
    "trainer_batch_rebalance": "Trainer, batch_rebalance",
    "dense": "dense limit",
}
"""Contender → name in tables."""
STRATEGIES = {
    "trainer": "random",
    "trainer_by_length": "group_by_length",
    "trainer_batch_rebalance": "batch_rebalance",
}
"""`train_sampling_strategy` of Trainer."""
OPTIMIZER = OptimConfig(lr=1e-5)


@dataclass(frozen=True)
class GpuModel:
    """A model, and the sizes of windows and micro-batches."""

    name: str
    model: str  # a key of SIZES in predicted_memory.py
    effective: int  # examples of a window
    max_tokens: int  # of a micro-batch
    lora: int = 0
    lean: bool = False


@dataclass(frozen=True)
class Turn:
    """One run of a contender, or the reason why it failed. Turn 0 warms up."""

    model: str
    precision: str
    contender: str
    turn: int
    windows: int
    tokens: int = 0  # without padding
    seconds: float = 0.0
    flops: float | None = None  # of forward and backward on real tokens; None: unknown
    peak_bytes: int = 0  # above the memory before the model
    predicted_bytes: int | None = None  # None: no prediction for this contender
    failed: str | None = None


class GpuWorkload:
    """A model and its examples, with the estimate of a step.

    Attributes:
        problem: why the step could not be estimated, or None.
    """

    def __init__(self, model: GpuModel, precision: str, longest: int, num_windows: int, device: torch.device):
        self.model, self.precision, self.device = model, precision, device
        self.case = MemoryCase(
            model.model, 2, (longest,), precision=precision, lora=model.lora, lean=model.lean
        )
        lengths = docstring_lengths(longest)[: model.effective * num_windows]
        mean = round(sum(lengths) / len(lengths))
        draw = torch.Generator().manual_seed(0)
        self.examples = [self._example(length, draw) for length in lengths]
        self.dense = [self._example(mean, draw) for _ in lengths]
        most = model.max_tokens // longest
        self.size = max(n for n in range(1, most + 1) if model.effective % n == 0)
        torch.manual_seed(0)
        self.built = build(self.case).to(device)  # each run trains a copy
        self.memory, self.flops, self.problem = None, None, None
        try:
            self.memory = _estimate(self.case).memory
            # The lean loss is traced for a few tokens only, and computes logits twice.
            self.flops = _estimate(replace(self.case, precision="fp32", lean=False)).flops_of
        except NotTraceableError as error:
            self.problem = one_line(error)

    def _example(self, length: int, draw: torch.Generator) -> dict[str, Any]:
        ids = torch.randint(5, 8000, (length,), generator=draw)
        return {"input_ids": ids, "labels": 0 if is_classifier(self.model.model) else ids}

    def run(self, contender: str, turn: int, num_windows: int) -> Turn:
        """Train `num_windows` windows with a contender. An error of any kind is the reason in `failed`."""
        names = (self.model.name, self.precision, contender, turn, num_windows)
        try:
            return self._run(contender, num_windows, names)
        except Exception as error:  # out of memory, or anything that a library raises
            return Turn(*names, failed=f"{type(error).__name__}: {one_line(error)[:300]}")

    def _run(self, contender: str, num_windows: int, names: Any) -> Turn:
        examples = self.dense if contender == "dense" else self.examples
        examples = examples[: self.model.effective * num_windows]
        lengths = [len(example["input_ids"]) for example in examples]
        reset_settings()
        release_memory()
        before = reset_peak_memory(self.device)
        torch.manual_seed(0)
        model = copy.deepcopy(self.built)
        if contender in STRATEGIES:
            reset_peak_memory(self.device)
            ran, predicted = self._with_trainer(model, examples, STRATEGIES[contender]), None
        else:
            windows = self._windows(model, examples, padding_free=contender == "ours")
            predicted = self._predicted(windows)
            reset_peak_memory(self.device)  # removing padding runs the model
            optimizer = make_optimizer(model, OPTIMIZER)
            ran = run_windows(model, optimizer, windows, max_windows=num_windows, max_grad_norm=1.0)
        return Turn(
            *names,
            tokens=sum(lengths),
            seconds=ran.seconds,
            flops=sum(self.flops(1, n) for n in lengths) if self.flops else None,
            peak_bytes=peak_memory(self.device) - before,
            predicted_bytes=predicted,
        )

    def _with_trainer(self, model: Any, examples: list[Any], strategy: str) -> EpochResult:
        return run_trainer(
            model,
            make_optimizer(model, OPTIMIZER),
            examples,
            collate,
            self.size,
            gradient_accumulation_steps=self.model.effective // self.size,
            train_sampling_strategy=strategy,
            max_grad_norm=1.0,
            bf16=self.precision == "bf16",
            use_cpu=self.device.type == "cpu",
        )

    def _windows(self, model: Any, examples: list[Any], padding_free: bool) -> WindowLoader:
        """Return the windows for the loop. Remove padding from the model if it is to be."""
        precision = {"fp32": "no"}.get(self.precision, self.precision)
        windows = WindowLoader(
            examples,
            self.model.effective,
            accelerator=Accelerator(cpu=self.device.type == "cpu", mixed_precision=precision),
            collate_fn=collate,
            max_tokens=self.model.max_tokens,
            num_items="labels" if is_classifier(self.model.model) else "next_token",
            shuffle=False,
            padding_free=padding_free,
        )
        if padding_free:
            remove_padding(model, windows.sample()[1].batch, compute_loss=model_loss)
        return windows

    def _predicted(self, windows: WindowLoader) -> int | None:
        """Return the predicted bytes of the largest micro-batch, without CUDA's context."""
        memory = self.memory
        if memory is None:
            return None
        splits = [windows.split(0, window) for window in range(len(windows))]
        micro_batches = [windows.tokens[indices] for split in splits for indices in split.processes[0]]
        if windows.padding_free:
            most = max(map(memory.bytes_without_padding, micro_batches))
        else:
            most = max(memory.bytes(len(tokens), tokens.max(0)) for tokens in micro_batches)
        return most - memory.workspace


_estimate = cache(step_estimate)


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad examples on the right to the longest."""
    ids = [example["input_ids"] for example in examples]
    labels = [example["labels"] for example in examples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": torch.tensor(labels)
        if isinstance(labels[0], int)
        else pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def docstring_lengths(longest: int) -> list[int]:
    """Return the words and signs of each docstring, with two special tokens, in a fixed random order."""
    lengths = np.minimum(_words_and_signs(), longest)
    return np.random.default_rng(0).permutation(lengths).tolist()


@cache
def _words_and_signs() -> list[int]:
    return [len(re.findall(r"\w+|[^\w\s]", text)) + 2 for text in docstrings()["text"]]
