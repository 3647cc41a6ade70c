"""`gradacc bench speed`: the time of the loop, compared with two lower limits.

The first limit is the time of the same micro-batches without the loop. The second limit is the time of dense
micro-batches, without padding or splitting. The loop runs as in a recipe, without padding where the model
allows it, and once more with padding. `gradacc compare` times other ways to train.
"""

import copy
import gc
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gradacc_hf.accumulation.collation import MicroBatch, Split
from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.bench.progress import Progress
from gradacc_hf.errors import InputError
from gradacc_hf.padding import restore_padding
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.run.padding import choose_padding
from gradacc_hf.run.setup import load_data, make_model, make_windows, total_windows
from gradacc_hf.training.optimizer import make_optimizer, make_scheduler
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.verification.baselines import run_windows

DENSE_POWERS = range(3, 16)  # dense micro-batches have 2^3 … 2^15 tokens per example


@dataclass(frozen=True)
class SpeedResult:
    """The time of the loop: one figure per repeat, and medians.

    `of_dense_limit`: seconds of the dense limit / seconds of the loop. The dense limit is the time of each
    example at the speed of a dense micro-batch of the example's length, plus the optimizer's time.
    `of_dense_limit_padded`: the same for the loop with padding.
    `overhead`: seconds of the loop / seconds of the bare micro-batches, minus 1. Bare micro-batches are
    collated beforehand and take the time of forward, backward, clipping and the optimizer.
    """

    windows: int
    examples: int
    micro_batches: int
    padding: float
    seconds: list[float]
    of_dense_limit: list[float]
    median_of_dense_limit: float
    of_dense_limit_padded: list[float]
    median_of_dense_limit_padded: float
    overhead: list[float]
    median_overhead: float
    dense_tokens_per_second: dict[int, float]  # by length, median
    measured_with: dict[str, str]


def measure_speed(
    recipe: Recipe, num_windows: int = 4, repeats: int = 5, progress: Progress = iter
) -> SpeedResult:
    """Time the first windows of a recipe's run in three ways, in turns. The first turn warms up.

    Args:
        recipe: the recipe whose windows are timed.
        num_windows: the number of windows in a run.
        repeats: the number of turns after the first.
        progress: wraps the turns.

    Raises:
        InputError: an epoch has fewer windows.
    """
    workload = Workload(recipe, num_windows)
    lengths, dense_lengths = workload.lengths, list(workload.dense)
    seconds, overhead, of_dense_limit, padded, token_seconds = [], [], [], [], []
    for turn in progress(range(repeats + 1)):
        loop_seconds, padded_seconds = workload.time_loop(), workload.time_loop(padded=True)
        bare_seconds, optimizer_seconds = workload.time_bare_micro_batches()
        costs = workload.time_dense_tokens()
        if turn == 0:
            continue
        by_example = np.interp(np.log2(lengths), np.log2(dense_lengths), list(costs.values()))
        seconds.append(loop_seconds)
        overhead.append(loop_seconds / bare_seconds - 1)
        limit = float(optimizer_seconds + sum(lengths * by_example))
        of_dense_limit.append(limit / loop_seconds)
        padded.append(limit / padded_seconds)
        token_seconds.append(costs)
    return SpeedResult(
        windows=num_windows,
        examples=len(lengths),
        micro_batches=sum(map(len, workload.micro_batches)),
        padding=workload.padding,
        seconds=seconds,
        of_dense_limit=of_dense_limit,
        median_of_dense_limit=median(of_dense_limit),
        of_dense_limit_padded=padded,
        median_of_dense_limit_padded=median(padded),
        overhead=overhead,
        median_overhead=median(overhead),
        dense_tokens_per_second={
            length: 1 / median(costs[length] for costs in token_seconds) for length in dense_lengths
        },
        measured_with=measured_with(workload.accelerator.device.type),
    )


class Workload:
    """The first windows of a recipe's run: planned, collated, and timed in three ways.

    Attributes:
        model: the model of a run, without padding where it allows that. A timing trains a copy.
        splits: the split of each window.
        micro_batches: the collated micro-batches of each window.
        lengths: tokens of each example.
        dense: examples of one length that fill a micro-batch without padding, by length.
    """

    def __init__(self, recipe: Recipe, num_windows: int):
        self.num_windows, self.accelerator = num_windows, Accelerator()
        self.recipe, self.training, self.validation = load_data(recipe)
        self.model, self.windows = make_model(self.recipe), self._loader()
        choose_padding(self.recipe, self.model, self.windows)
        if num_windows > len(self.windows):
            raise InputError(
                f"--windows: found {num_windows}; allowed: 1 to {len(self.windows)}, the windows of an epoch"
            )
        self.splits: list[Split] = [self.windows.split(0, t) for t in range(num_windows)]
        self.micro_batches: list[list[MicroBatch]] = [
            [self.windows.collated(indices, split.pad_to) for indices in split.processes[0]]
            for split in self.splits
        ]
        self.lengths = self.windows.lengths[np.concatenate([split.indices for split in self.splits])]
        self.dense = self._dense_micro_batches()

    @property
    def padding(self) -> float:
        """Share of padding among the tokens that the layers of the loop compute."""
        if self.windows.padding_free:
            return 0.0
        padded = sum(split.padded_tokens for split in self.splits)
        return 1 - sum(split.tokens for split in self.splits) / padded

    def _loader(self) -> WindowLoader:
        windows, _ = make_windows(self.recipe, self.training, self.validation, self.accelerator)
        return windows

    def _dense_micro_batches(self) -> dict[int, list[dict[str, Any]]]:
        longest = self.training[int(self.windows.lengths.argmax())]
        lengths = sorted({min(int(self.lengths.max()), 2**power) for power in DENSE_POWERS})
        return {
            length: self.windows.bound.max_rows(length) * [_first_tokens(longest, length)]
            for length in lengths
        }

    def time_loop(self, padded: bool = False) -> float:
        """Return the seconds of the loop."""
        model, optimizer = self._model_and_optimizer(padded)
        loader = self._loader()
        if self.windows.padding_free and not padded:
            loader.without_padding()
        config = self.recipe.config
        scheduler = make_scheduler(optimizer, config.optim, self.windows, total_windows(config, self.windows))
        ran = run_windows(
            model,
            optimizer,
            loader,
            scheduler=scheduler,
            compute_loss=self.recipe.loss,
            max_windows=self.num_windows,
            max_grad_norm=config.optim.max_grad_norm,
        )
        return ran.seconds

    def time_bare_micro_batches(self) -> tuple[float, float]:
        """Return the seconds of the micro-batches without the loop, and of clipping and the optimizer."""
        recipe = self.recipe
        model, optimizer = self._model_and_optimizer()
        model.to(self.accelerator.device).train()
        started, optimizer_seconds = self._clock(), 0.0
        for window in self.micro_batches:
            items = sum(micro_batch.num_items for micro_batch in window)
            for micro_batch in window:
                batch = micro_batch.batch_on_device(self.accelerator)
                (recipe.loss(model(**batch), batch) * (micro_batch.num_items / items)).backward()
            before = self._clock()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.config.optim.max_grad_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            optimizer_seconds += self._clock() - before
        return self._clock() - started, optimizer_seconds

    def time_dense_tokens(self) -> dict[int, float]:
        """Return the seconds per token, by length, of a forward and backward that add to gradients."""
        recipe, device = self.recipe, self.accelerator.device
        model, _ = self._model_and_optimizer(padded=True)
        model.to(device).train()
        found = {}
        for length, examples in self.dense.items():
            batch = {key: value.to(device) for key, value in recipe.collate(examples).items()}
            for _ in range(2):  # the first pass fills the allocator and creates the gradients
                started = self._clock()
                recipe.loss(model(**batch), batch).backward()
                found[length] = (self._clock() - started) / (len(examples) * length)
        return found

    def _model_and_optimizer(self, padded: bool = False) -> tuple[Any, Any]:
        gc.collect()
        model = copy.deepcopy(self.model)
        if padded:
            restore_padding(model)
        return model, make_optimizer(model, self.recipe.config.optim)

    def _clock(self) -> float:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _first_tokens(example: Mapping[str, Any], length: int) -> dict[str, Any]:
    return {key: value[:length] if isinstance(value, list) else value for key, value in example.items()}


def print_speed(result: SpeedResult, console: Console) -> None:
    """Print both figures, and the speed of dense micro-batches by length."""
    low, high = min(result.of_dense_limit), max(result.of_dense_limit)
    console.print(
        f"{result.windows} windows, {result.examples} examples in {result.micro_batches} micro-batches, "
        f"{result.padding:.1%} padding, {len(result.seconds)} repeats.\n"
        f"Speed relative to dense micro-batches: {result.median_of_dense_limit:.2f} ({low:.2f}–{high:.2f}); "
        f"of the loop with padding: {result.median_of_dense_limit_padded:.2f} "
        f"({min(result.of_dense_limit_padded):.2f}–{max(result.of_dense_limit_padded):.2f}).\n"
        f"Overhead of the loop over forward, backward and optimizer: {result.median_overhead:.1%} "
        f"({min(result.overhead):.1%} to {max(result.overhead):.1%}).\n"
        "Speed of dense micro-batches:"
    )
    table = Table("tokens per example", "tokens per s", box=SIMPLE)
    for length, tokens in result.dense_tokens_per_second.items():
        table.add_row(str(length), f"{tokens:,.0f}")
    console.print(table)
