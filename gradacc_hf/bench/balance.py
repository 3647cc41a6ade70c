"""`gradacc bench balance`: balance over simulated processes, and how the cost of planning grows.

The first table splits windows of the offline data's real lengths with `split_window` and with a strided
assignment. The second table holds the loader's memory and time by number of examples and processes, and the
collectives of a window. `python -m gradacc_hf.bench.balance` counts the collectives on real processes.
"""

import json
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean, median
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from gradacc_hf.accumulation.balancing import BALANCED
from gradacc_hf.accumulation.lengths import measure_lengths
from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.sampler import WindowPlan
from gradacc_hf.accumulation.splitting import Bound, Cost, split_window
from gradacc_hf.bench.launch import launch
from gradacc_hf.bench.progress import Progress
from gradacc_hf.embedded import documented_functions, minilm_path
from gradacc_hf.recipe.loading import load_recipe, load_recipe_to_run
from gradacc_hf.run.setup import load_data, make_accelerator, make_model, make_windows
from gradacc_hf.training.loop import iter_windows
from gradacc_hf.training.optimizer import make_optimizer
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.utils.paths import bundle_root

WINDOWS = {8: 50, 64: 20, 1024: 3}  # simulated windows, by number of processes
EXAMPLES_PER_PROCESS = 16, 64  # in a window
MODEL_MAX_TOKENS = 512  # of MiniLM
DATASET_EXAMPLES = 10**5, 10**7, 10**8, 10**9
PROCESS_COUNTS = 1, 8, 64, 1000
MAX_MEASURED_EXAMPLES = 10**8  # larger data sets are computed from these
PEAK_BYTES_PER_EXAMPLE = 16  # of a loader, to check the available memory
CONFIG = "configs/text_classification_offline.yaml"

Split = list[list[np.ndarray]]


@dataclass(frozen=True)
class Lengths:
    """The lengths of a data set's examples, and the bound of the micro-batches."""

    name: str
    tokens: np.ndarray
    max_tokens: int

    def window(self, size: int, draw: np.random.Generator) -> np.ndarray:
        """Return `size` random lengths, drawn with replacement if the data set has fewer."""
        return draw.choice(self.tokens, size, replace=size > len(self.tokens))


@dataclass(frozen=True)
class Balance:
    """Windows of one size.

    `worst` and `median` are ratios: predicted cost of the slowest process / reference cost. The reference
    cost is the mean over processes, or the cost of the costliest example if larger.
    """

    lengths: str
    processes: int
    examples_each: int
    windows: int
    worst: float  # over the windows
    median: float
    strided_worst: float
    strided_median: float
    strided_by_ours: float  # ratio of the costs of the slowest process, median
    accumulation_steps: float  # largest number of a process, mean over windows
    strided_accumulation_steps: float
    plan_ms: float  # median


@dataclass(frozen=True)
class DataGrowth:
    """Memory and time of one process, by the number of examples with one column of lengths."""

    examples: int
    permutation_bytes: int
    lengths_bytes: int
    most_bytes: int  # peak of the set-up
    permutation_seconds: float  # once per epoch
    plan_ms: float  # for a window of 64, median
    how: str  # "measured" or "computed"


@dataclass(frozen=True)
class ProcessGrowth:
    """Planning time and collectives of a window with 64 examples for each process."""

    processes: int
    examples: int
    plan_ms: float  # median
    collectives: dict[str, int]
    how: str


@dataclass(frozen=True)
class BalanceResult:
    """Both tables.

    `sizes`: for each data set, the number of examples, mean length, 95th percentile, longest, and the limit
    of padded tokens.
    """

    sizes: dict[str, tuple[int, float, float, int, int]]
    balances: tuple[Balance, ...]
    by_data: tuple[DataGrowth, ...]
    by_processes: tuple[ProcessGrowth, ...]
    measured_with: dict[str, str]


def measure_balance(progress: Progress = iter) -> BalanceResult:
    """Simulate and measure both tables."""
    all_lengths = offline_lengths()
    jobs: list[Callable[[], Any]] = [
        partial(simulate, lengths, processes, each, windows)
        for lengths in all_lengths
        for processes, windows in WINDOWS.items()
        for each in EXAMPLES_PER_PROCESS
    ]
    fit = [
        n
        for n in DATASET_EXAMPLES
        if n <= min(MAX_MEASURED_EXAMPLES, psutil.virtual_memory().available // (2 * PEAK_BYTES_PER_EXAMPLE))
    ]
    jobs += [partial(grow_by_data, examples) for examples in fit]
    jobs += [partial(grow_by_processes, all_lengths[0], processes) for processes in PROCESS_COUNTS]
    jobs.append(count_collectives)
    *found, collectives = [job() for job in progress(jobs)]
    by_data = [row for row in found if isinstance(row, DataGrowth)]
    return BalanceResult(
        sizes={lengths.name: _sizes(lengths) for lengths in all_lengths},
        balances=tuple(row for row in found if isinstance(row, Balance)),
        by_data=(
            *by_data,
            *(_computed(by_data[-1], examples) for examples in DATASET_EXAMPLES if examples not in fit),
        ),
        by_processes=tuple(
            replace(row, collectives=collectives, how=f"{row.how}; collectives as on 2")
            if row.processes > 1
            else row
            for row in found
            if isinstance(row, ProcessGrowth)
        ),
        measured_with=measured_with("cpu"),
    )


def offline_lengths() -> list[Lengths]:
    """Return lengths of docstrings, truncated for the model and by the config, and of source texts."""
    found = []
    for name, settings in (
        (f"docstrings of up to {MODEL_MAX_TOKENS} tokens", ["--data.max_length", str(MODEL_MAX_TOKENS)]),
        ("docstrings as configured", []),
    ):
        recipe = load_recipe(["--config", str(bundle_root() / CONFIG), *settings])
        training, _ = recipe.datasets()
        found.append(Lengths(name, measure_lengths(training, recipe.lengths(training))[:, 0], 2048))
    tokenizer = AutoTokenizer.from_pretrained(minilm_path(), model_max_length=sys.maxsize)
    sources = tokenizer(documented_functions()[0]["source"][:])["input_ids"]
    found.append(Lengths("functions' source", np.array([len(ids) for ids in sources]), 8192))
    return found


def simulate(lengths: Lengths, processes: int, examples_each: int, windows: int, seed: int = 0) -> Balance:
    """Split windows for simulated processes, with `split_window` and strided."""
    draw, bound = np.random.default_rng([seed, processes, examples_each]), Bound(lengths.max_tokens)
    ratios: dict[str, list[float]] = {"balanced": [], "strided": []}
    steps: dict[str, list[int]] = {"balanced": [], "strided": []}
    slower, milliseconds = [], []
    for _ in range(windows):
        window = lengths.window(processes * examples_each, draw)
        started = time.process_time()
        balanced = split_window(window, bound, processes)
        milliseconds.append(1000 * (time.process_time() - started))
        slowest = {}
        for way, split in (("balanced", balanced), ("strided", strided(window, bound, processes))):
            costs = process_costs(split, window)
            slowest[way] = max(costs)
            ratios[way].append(unevenness(costs, window))
            steps[way].append(max(map(len, split)))
        slower.append(slowest["strided"] / slowest["balanced"])
    return Balance(
        lengths=lengths.name,
        processes=processes,
        examples_each=examples_each,
        windows=windows,
        worst=max(ratios["balanced"]),
        median=median(ratios["balanced"]),
        strided_worst=max(ratios["strided"]),
        strided_median=median(ratios["strided"]),
        strided_by_ours=median(slower),
        accumulation_steps=mean(steps["balanced"]),
        strided_accumulation_steps=mean(steps["strided"]),
        plan_ms=median(milliseconds),
    )


def strided(window: np.ndarray, bound: Bound, processes: int) -> Split:
    """Give process i the examples i, i + processes, …, and split each share at the least cost."""
    shares = [np.arange(process, len(window), processes) for process in range(processes)]
    return [[share[indices] for indices in split_window(window[share], bound)[0]] for share in shares]


def process_costs(split: Split, window: np.ndarray, cost: Cost = Cost()) -> list[float]:
    """Return the predicted cost of all micro-batches, for each process."""
    return [
        sum(cost(len(indices), int(window[indices].max())) for indices in micro_batches)
        for micro_batches in split
    ]


def unevenness(costs: Sequence[float], window: np.ndarray, cost: Cost = Cost()) -> float:
    """Return the slowest process's cost / the larger of the mean and the costliest example's."""
    return max(costs) / max(mean(costs), cost(1, int(window.max())))


def grow_by_data(examples: int) -> DataGrowth:
    """Measure the memory and time to make a loader and to plan windows of two epochs."""
    lengths = np.random.default_rng(0).integers(1, 512, size=examples, dtype=np.int32)
    accelerator = Accelerator(cpu=True)

    def loader(examples: int) -> WindowLoader:
        tokens = lengths[:examples]
        return WindowLoader(range(examples), 64, accelerator=accelerator, max_tokens=4096, lengths=tokens)

    loader(64)  # the first call fills Python's cache of sequence types, whose size depends on the imports
    tracemalloc.start()
    windows = loader(examples)
    held, _ = tracemalloc.get_traced_memory()
    started = time.process_time()
    windows.split(0, 0)
    seconds = time.process_time() - started
    windows.split(1, 0)  # the next permutation replaces the first
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    plan = windows.plan
    assert isinstance(plan, WindowPlan)
    return DataGrowth(
        examples=examples,
        permutation_bytes=plan.memory_bytes(),
        lengths_bytes=held,
        most_bytes=most,
        permutation_seconds=seconds,
        plan_ms=_median_ms(
            lambda number: windows.split(1, number), range(0, len(windows), len(windows) // 50)
        ),
        how="measured",
    )


def _computed(largest: DataGrowth, examples: int) -> DataGrowth:
    """Scale the figures of the largest measured data set; a window takes the same time."""
    times = examples / largest.examples
    return DataGrowth(
        examples=examples,
        permutation_bytes=round(largest.permutation_bytes * times),
        lengths_bytes=round(largest.lengths_bytes * times),
        most_bytes=round(largest.most_bytes * times),
        permutation_seconds=largest.permutation_seconds * times,
        plan_ms=largest.plan_ms,
        how="computed",
    )


def grow_by_processes(lengths: Lengths, processes: int) -> ProcessGrowth:
    """Time the planning of windows. Each process plans the whole window."""
    size, draw, bound = 64 * processes, np.random.default_rng(0), Bound(lengths.max_tokens)
    drawn = [lengths.window(size, draw) for _ in range(5)]
    plan_ms = _median_ms(lambda number: split_window(drawn[number], bound, processes), range(5))
    return ProcessGrowth(processes, size, plan_ms, {}, "measured")


def _median_ms(function: Callable[[int], Any], numbers: Iterable[int]) -> float:
    times = []
    for number in numbers:
        started = time.process_time()
        function(number)
        times.append(1000 * (time.process_time() - started))
    return median(times)


def _sizes(lengths: Lengths) -> tuple[int, float, float, int, int]:
    tokens = lengths.tokens
    return (
        len(tokens),
        float(tokens.mean()),
        float(np.percentile(tokens, 95)),
        int(tokens.max()),
        lengths.max_tokens,
    )


def print_balance(result: BalanceResult, console: Console) -> None:
    """Print a table for each data set, then memory and time by examples and by processes."""
    for name, (examples, average, most_are, longest, max_tokens) in result.sizes.items():
        console.print(
            f"{name}: {examples:,} examples of {average:.0f} tokens on average (95 %: up to {most_are:.0f}, "
            f"longest: {longest:,}); micro-batches of at most {max_tokens:,} padded tokens"
        )
        headers = "processes", "examples\neach", "slowest¹\nworst", "\nmedian", "strided\nworst", "\nmedian"
        table = _table(*headers, "strided\n/ split²", "steps³\nsplit", "\nstrided", "planning,\nms")
        for row in (row for row in result.balances if row.lengths == name):
            table.add_row(
                f"{row.processes:,}",
                str(row.examples_each),
                *(f"{ratio:.3f}" for ratio in (row.worst, row.median, row.strided_worst, row.strided_median)),
                f"{row.strided_by_ours:.2f}",
                f"{row.accumulation_steps:.1f}",
                f"{row.strided_accumulation_steps:.1f}",
                f"{row.plan_ms:,.1f}",
            )
        console.print(table)
    worst = max(row.worst for row in result.balances)
    verdict = "within" if worst <= BALANCED else "MORE THAN"
    windows = ", ".join(f"{count} windows with {processes:,}" for processes, count in WINDOWS.items())
    console.print(
        "¹ Predicted cost of the slowest process, relative to the mean over processes. If the costliest "
        f"example costs more than the mean, it is the reference. {windows} processes. Worst ratio with "
        f"split_window: {worst:.3f}, {verdict} {BALANCED}.\n"
        "² Cost of the slowest process, strided / split_window, median.\n"
        "³ Largest number of accumulation steps of a process, mean over windows.\n"
    )
    console.print("Memory and time of one process, by number of examples (one column of lengths)")
    headers = "examples", "permutation", "lengths", "set-up,\npeak", "permutation,\ns per epoch"
    table = _table(*headers, "planning a window\nof 64, ms")
    for row in result.by_data:
        table.add_row(
            f"{row.examples:,}",
            *map(_megabytes, (row.permutation_bytes, row.lengths_bytes, row.most_bytes)),
            f"{row.permutation_seconds:,.2f}",
            f"{row.plan_ms:.2f}",
            row.how,
        )
    console.print(table)
    console.print("A window with 64 docstrings per process; every process plans the whole window")
    table = _table("processes", "examples", "planning, ms", "collectives")
    for row in result.by_processes:
        numbers = f"{row.processes:,}", f"{row.examples:,}", f"{row.plan_ms:,.1f}"
        table.add_row(*numbers, str(sum(row.collectives.values())), row.how)
    console.print(table)
    kinds = Counter(result.by_processes[-1].collectives)
    console.print(
        "Collectives of a window, counted on 2 processes (DDP over gloo, MiniLM).\n"
        f"  all_gather: {kinds['all_gather']}, for the numbers of items.\n"
        f"  all_reduce: {kinds['all_reduce']}, for {kinds['all_reduce'] - 1} buckets of gradients and the "
        "loss.\n"
        f"  broadcast: {kinds['broadcast']}, for the model's buffers.\n"
        "Each window needs one more all_gather until every process has run its costliest micro-batch. The "
        "numbers do not depend on the number of processes.\n"
        "FSDP2 (computed): 1 all_gather and 2 all_reduce per window, including the gradient's norm. Each "
        "layer has 1 reduce_scatter, and up to 2 all_gather per micro-batch."
    )


def _table(*headers: str) -> Table:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    return table


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"


def count_collectives() -> dict[str, int]:
    """Count the collectives of a window on two processes (DDP, gloo), by kind."""
    return json.loads(
        launch(
            "bench balance",
            2,
            "gradacc_hf.bench.balance",
            environment={"ACCELERATE_USE_CPU": "true"},  # gloo names the collectives in profiles
        )
    )


def _count(windows_before: int = 5) -> None:
    """Profile one window in each process, after the first windows, which have an extra collective."""
    settings = ["--batch.effective", "16", "--budget.max_tokens", "512", "--output.tracker", "none"]
    recipe = load_recipe_to_run(["--config", str(bundle_root() / CONFIG), *settings])
    accelerator = make_accelerator(recipe.config)
    recipe, training, validation = load_data(recipe)
    loader, _ = make_windows(recipe, training, validation, accelerator)
    model = make_model(recipe)
    model, optimizer = accelerator.prepare(model, make_optimizer(model, recipe.config.optim))
    records = iter_windows(model, optimizer, loader, accelerator=accelerator)
    for _ in range(windows_before):
        next(records)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        next(records)
    names = [event.name for event in profile.events() or () if event.name.startswith("gloo:")]
    if accelerator.is_main_process:
        print(json.dumps(Counter(name.removeprefix("gloo:") for name in names)), flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    _count()
