"""How close does our loop come to what cannot be beaten?

Two limits, timed beside it: the same micro-batches without a loop around them, and micro-batches without any
padding or cutting. How fast other ways are is `compare.py`'s.
"""

import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.errors import InputError
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.run.setup import load_data, make_model, make_windows, total_windows
from gradacc_hf.training.optimizer import make_optimizer, make_scheduler
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.verification.baselines import run_windows


@dataclass(frozen=True)
class Speed:
    """Of our loop, how close it comes to what cannot be beaten; one figure a repeat, and their medians.

    `of_dense_limit`: the seconds of the dense limit / ours. The limit has every example's tokens at the speed
    of a dense micro-batch of its own length, plus the optimizer. `overhead`: our seconds / those of the same
    micro-batches, collated before, through forward, backward, clipping and optimizer alone, minus 1.
    """

    windows: int
    examples: int
    micro_batches: int
    padding: float
    seconds: list[float]
    of_dense_limit: list[float]
    median_of_dense_limit: float
    overhead: list[float]
    median_overhead: float
    dense_tokens_per_second: dict[int, float]  # by length, median
    measured_with: dict[str, str]


def speed(
    recipe: Recipe,
    num_windows: int = 4,
    repeats: int = 5,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Speed:
    """Time the first windows of a recipe's run by our loop, bare, and dense, in turns; a first turn warms up.

    `progress` wraps the turns. Raises InputError if windows are too few.
    """
    config, accelerator = recipe.config, Accelerator()
    recipe, training, validation = load_data(recipe)
    windows, _ = make_windows(recipe, training, validation, accelerator)
    if num_windows > len(windows):
        raise InputError(
            f"--windows: found {num_windows}; allowed: 1 to {len(windows)}, the windows of an epoch"
        )
    splits = [windows.split(0, t) for t in range(num_windows)]
    cut = [split.processes[0] for split in splits]
    collated = [[windows.collated(piece, split.pad_to) for piece in split.processes[0]] for split in splits]
    lengths = windows.lengths[np.concatenate([split.indices for split in splits])]
    rungs = sorted({min(int(lengths.max()), 2**power) for power in range(3, 16)})
    longest = training[int(windows.lengths.argmax())]
    dense = {length: windows.bound.max_rows(length) * [_cut_to(longest, length)] for length in rungs}

    def clock() -> float:
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def loop() -> float:
        model, optimizer, scheduler = _fresh(recipe, windows)
        again, _ = make_windows(recipe, training, validation, accelerator)
        shared: dict[str, Any] = {"scheduler": scheduler, "compute_loss": recipe.loss}
        shared |= {"max_windows": num_windows, "max_grad_norm": config.optim.max_grad_norm}
        return run_windows(model, optimizer, again, **shared).seconds

    def bare() -> tuple[float, float]:
        """Seconds of all, and of the optimizer with clipping among them."""
        model, optimizer, _ = _fresh(recipe, windows)
        model.to(accelerator.device).train()
        started, stepping = clock(), 0.0
        for window in collated:
            items = sum(micro_batch.num_items for micro_batch in window)
            for micro_batch in window:
                batch = micro_batch.batch
                (recipe.loss(model(**batch), batch) * (micro_batch.num_items / items)).backward()
            before = clock()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            stepping += clock() - before
        return clock() - started, stepping

    def per_token() -> dict[int, float]:
        """Seconds a token, by length, of a forward and backward that adds to gradients that are there."""
        model, _, _ = _fresh(recipe, windows)
        model.to(accelerator.device).train()
        found = {}
        for length, examples in dense.items():
            batch = {key: value.to(accelerator.device) for key, value in recipe.collate(examples).items()}
            for _ in range(2):  # the first finds the allocator's blocks, and no gradients
                started = clock()
                recipe.loss(model(**batch), batch).backward()
                found[length] = (clock() - started) / (len(examples) * length)
        return found

    seconds, overhead, shares, speeds = [], [], [], []
    for repeat in progress(range(repeats + 1)):
        ours, (alone, stepping), costs = loop(), bare(), per_token()
        limit = stepping + sum(lengths * np.interp(np.log2(lengths), np.log2(rungs), list(costs.values())))
        if repeat:
            seconds.append(ours)
            overhead.append(ours / alone - 1)
            shares.append(float(limit) / ours)
            speeds.append(costs)
    return Speed(
        windows=num_windows,
        examples=len(lengths),
        micro_batches=sum(map(len, cut)),
        padding=1 - sum(split.tokens for split in splits) / sum(split.padded_tokens for split in splits),
        seconds=seconds,
        of_dense_limit=shares,
        median_of_dense_limit=median(shares),
        overhead=overhead,
        median_overhead=median(overhead),
        dense_tokens_per_second={length: 1 / median(costs[length] for costs in speeds) for length in rungs},
        measured_with=measured_with(accelerator.device.type),
    )


def _fresh(recipe: Recipe, windows: WindowLoader) -> tuple[Any, Any, Any]:
    gc.collect()
    model = make_model(recipe)
    optimizer = make_optimizer(model, recipe.config.optim)
    return (
        model,
        optimizer,
        make_scheduler(optimizer, recipe.config.optim, windows, total_windows(recipe.config, windows)),
    )


def _cut_to(example: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Its first `length` tokens."""
    return {key: value[:length] if isinstance(value, list) else value for key, value in example.items()}
