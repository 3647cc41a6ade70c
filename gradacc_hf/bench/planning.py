"""`gradacc bench planning`: the time and memory of planning windows.

Planning a window is choosing the examples and splitting them into micro-batches, from lengths alone.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from accelerate import Accelerator
from rich.console import Console

from gradacc_hf.accumulation.sampler import WindowPlan
from gradacc_hf.accumulation.splitting import Bound, split_window
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.run.setup import load_data, make_windows
from gradacc_hf.training.loop import train
from gradacc_hf.training.optimizer import make_optimizer
from gradacc_hf.training.run_log import measured_with

LARGE_WINDOWS = 200  # windows that are planned for the large data set
WINDOW_SIZE = 64  # examples


@dataclass(frozen=True)
class PlanningResult:
    """The cost of planning: for the offline config, and for `examples` random lengths."""

    window_ms: float  # median over an epoch of the offline config
    share_of_step: float  # planning time / training time of the offline config's second window
    examples: int
    permutation_seconds: float  # once per epoch
    large_window_ms: float  # median
    permutation_bytes: int
    lengths_bytes: int
    measured_with: dict[str, str]


def measure_planning(recipe: Recipe, examples: int = 10_000_000) -> PlanningResult:
    """Time the planning of a recipe's windows, and of windows of a data set with `examples` examples."""
    recipe, training, validation = load_data(recipe)
    windows, _ = make_windows(recipe, training, validation, Accelerator())
    model = recipe.model()
    model, optimizer = windows.accelerator.prepare(model, make_optimizer(model, recipe.config.optim))
    records = train(model, optimizer, windows, accelerator=windows.accelerator, max_windows=2)
    step_seconds = [record.seconds for record in records][-1]
    window_ms = median(_milliseconds(partial(windows.split, 0, t)) for t in range(len(windows)))

    lengths = np.random.default_rng(0).integers(1, 512, size=examples, dtype=np.int32)
    plan = WindowPlan(examples, WINDOW_SIZE, seed=0, shuffle=True, drop_last=False)
    permutation_seconds = _milliseconds(lambda: plan.indices(0, 0)) / 1000
    bound = Bound(max_tokens=4096)
    large_ms = [
        _milliseconds(lambda t=t: split_window(lengths[plan.indices(0, t)], bound))
        for t in range(LARGE_WINDOWS)
    ]
    return PlanningResult(
        window_ms=window_ms,
        share_of_step=window_ms / 1000 / step_seconds,
        examples=examples,
        permutation_seconds=permutation_seconds,
        large_window_ms=median(large_ms),
        permutation_bytes=plan.memory_bytes(),
        lengths_bytes=lengths.nbytes,
        measured_with=measured_with(windows.accelerator.device.type),
    )


def _milliseconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - started)


def print_planning(result: PlanningResult, console: Console) -> None:
    """Print a line for the offline config and a line for the large data set."""
    console.print(
        f"Offline config: {result.window_ms:.2f} ms per window, {result.share_of_step:.3%} of a step.\n"
        f"{result.examples:,} examples: {result.large_window_ms:.2f} ms per window of {WINDOW_SIZE}, and "
        f"{result.permutation_seconds:.1f} s per epoch for the permutation.\n"
        f"Memory: {result.permutation_bytes / 1e6:.0f} MB for the permutation, "
        f"{result.lengths_bytes / 1e6:.0f} MB for the lengths."
    )
