"""`gradacc bench profile`: where the time of a window goes, with padding and without.

One process trains the same window of offline text classification with each model, in turns, on one thread:

| model | micro-batches |
|---|---|
| padded, by count | as Trainer splits the window |
| padded, by length | as the loop splits the window without `remove_padding` |
| without padding | as the loop splits the window |

torch's profiler gives the time of each operator without the operators that it calls. The operators are summed
up by kind.
"""

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from gradacc_hf.bench.offline import offline_recipe
from gradacc_hf.bench.progress import Progress
from gradacc_hf.comparison.worker import micro_batch_size
from gradacc_hf.run.padding import choose_padding
from gradacc_hf.run.setup import load_data, make_accelerator, make_model, make_windows
from gradacc_hf.training.run_log import measured_with

KINDS = {
    "matrix products": ("mm", "addmm", "linear", "matmul"),
    "attention": ("bmm", "baddbmm", "softmax", "_softmax", "_softmax_backward_data", "all", "where"),
    "dropout masks": ("bernoulli_", "native_dropout"),
    "indices and copies": ("index_select", "index_copy_", "copy_", "cat", "fill_", "zero_", "clone"),
}
"""Kind → operators of ATen. The rest, such as GELU and LayerNorm, is "other"."""
WINDOW = 0


@dataclass(frozen=True)
class ProfileResult:
    """Milliseconds of one window on one thread, medians over turns.

    Attributes:
        tokens: Computed tokens in the layers, by model.
        micro_batches: Micro-batches of the window, by model.
        milliseconds: Kind of operators → milliseconds, by model.
        measured_with: Versions.
    """

    tokens: dict[str, int]
    micro_batches: dict[str, int]
    milliseconds: dict[str, dict[str, float]]
    measured_with: dict[str, str]


def measure_profile(repeats: int, progress: Progress = iter) -> ProfileResult:
    """Profile the window with each model, in turns, after one turn to warm up."""
    recipe = offline_recipe()
    accelerator = make_accelerator(recipe.config)
    recipe, training, validation = load_data(recipe)
    windows, _ = make_windows(recipe, training, validation, accelerator)
    padded, removed = (make_model(recipe).train() for _ in range(2))
    indices = windows.plan.indices(0, WINDOW)
    by_count = np.split(indices, len(indices) // micro_batch_size(recipe, windows))
    by_length = windows.split(0, WINDOW).processes[0]
    choose_padding(recipe, removed, windows)
    without = windows.split(0, WINDOW).processes[0]
    splits = {"padded, by count": by_count, "padded, by length": by_length, "without padding": without}
    batches = {
        name: [recipe.collate(windows.examples(part)) for part in split] for name, split in splits.items()
    }
    models = {name: removed if name == "without padding" else padded for name in splits}

    def compute(name: str) -> None:
        for batch in batches[name]:
            models[name](**batch).loss.backward()
        models[name].zero_grad()

    found: dict[str, list[dict[str, float]]] = {name: [] for name in splits}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for turn in progress(range(repeats + 1)):
            for name in splits:
                times = _profiled(lambda name=name: compute(name))
                if turn:
                    found[name].append(times)
    finally:
        torch.set_num_threads(threads)
    real = int(windows.tokens[indices].sum())
    return ProfileResult(
        tokens={
            name: real if models[name] is removed else sum(b["input_ids"].numel() for b in batches[name])
            for name in splits
        },
        micro_batches={name: len(split) for name, split in splits.items()},
        milliseconds={
            name: {kind: median(times[kind] for times in turns) for kind in (*KINDS, "other")}
            for name, turns in found.items()
        },
        measured_with=measured_with("cpu"),
    )


def _profiled(compute: Callable[[], Any]) -> dict[str, float]:
    """Return the milliseconds of a function by kind of operators."""
    kinds = {f"aten::{operator}": kind for kind, operators in KINDS.items() for operator in operators}
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its start and end otherwise
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        compute()
    times: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        times[kinds.get(event.key, "other")] += event.self_cpu_time_total / 1e3
    return times


def print_profile(result: ProfileResult, console: Console) -> None:
    """Print a table: kinds of operators by model, in milliseconds."""
    names = list(result.milliseconds)
    table = Table("milliseconds of one window, one thread", *names, box=SIMPLE)
    for kind in (*KINDS, "other"):
        table.add_row(kind, *(f"{result.milliseconds[name][kind]:,.0f}" for name in names))
    table.add_row("sum", *(f"{sum(result.milliseconds[name].values()):,.0f}" for name in names))
    table.add_row("tokens in the layers", *(f"{result.tokens[name]:,}" for name in names))
    table.add_row("micro-batches", *(str(result.micro_batches[name]) for name in names))
    console.print(table)
