"""`gradacc bench sizes`: the micro-batch size that a run finds, compared with fixed sizes.

Each config runs in a separate process. The first windows find a size (`training/autotune.py`). Each of the
next windows is trained with the found size and with every fixed size, in turns. The result is the ratio of
the times, window by window.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from scipy.stats import binom

from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.splitting import Bound, Cost
from gradacc_hf.bench.offline import check_names, offline_configs
from gradacc_hf.bench.progress import Progress
from gradacc_hf.errors import InputError
from gradacc_hf.recipe.loading import load_recipe_to_run
from gradacc_hf.run.setup import load_data, make_accelerator, make_model, make_windows, total_windows
from gradacc_hf.training.autotune import Tuning, sizes_to_try
from gradacc_hf.training.loop import iter_windows
from gradacc_hf.training.optimizer import make_optimizer
from gradacc_hf.training.run_log import WindowRecord, measured_with
from gradacc_hf.utils.verbosity import silence_libraries

RECIPES = ("text_classification", "question_answering", "image_classification")
FOUND = "found"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class FixedSize:
    """Seconds with a fixed size / seconds with the found size, over all windows: median and interval.

    Above 1, the found size was faster.
    """

    max_tokens: int
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class SizeSweep:
    """One config. `sizes`: the sizes that the run could choose and two larger sizes, the largest first."""

    recipe: str
    found: int
    cost: dict[str, float]
    windows_to_find: int
    sizes: tuple[FixedSize, ...]

    @property
    def best(self) -> FixedSize:
        """Return the fastest fixed size."""
        return min(self.sizes, key=lambda size: size.ratio)


@dataclass(frozen=True)
class MicroBatchSizesResult:
    """All configs. Intervals contain the median with a probability of at least 95 %."""

    sweeps: tuple[SizeSweep, ...]
    windows: int
    measured_with: dict[str, str]


def measure_micro_batch_sizes(
    only: Sequence[str] = (), windows: int = 16, progress: Progress = iter
) -> MicroBatchSizesResult:
    """Time all micro-batch sizes with the offline configs of these recipes. Raises InputError."""
    known = offline_configs()
    check_names(only, known)
    found = []
    for name in progress(list(only or RECIPES)):
        command = [sys.executable, "-m", __name__, str(windows), "--config", str(known[name])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"{name}: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
        found.append(_sweep(name, json.loads(done.stdout.splitlines()[-1])))
    return MicroBatchSizesResult(tuple(found), windows, measured_with())


def interval(ratios: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return two order statistics between which the median lies, with at least this probability.

    With too few ratios for the probability, return the smallest and the largest. The number of n draws below
    the median is binomial, with probability 1/2.
    """
    ordered = sorted(ratios)
    left_out = max(0, int(binom.ppf((1 - confidence) / 2, len(ordered), 0.5)) - 1)
    return ordered[left_out], ordered[-1 - left_out]


def _sweep(name: str, measured: dict[str, Any]) -> SizeSweep:
    sizes = []
    for size, seconds in measured["seconds"].items():
        if size != FOUND:
            ratios = [a / b for a, b in zip(seconds, measured["seconds"][FOUND], strict=True)]
            sizes.append(FixedSize(int(size), median(ratios), *interval(ratios)))
    return SizeSweep(name, measured["found"], measured["cost"], measured["windows_to_find"], tuple(sizes))


def _measure(num_windows: int, settings: Sequence[str]) -> dict[str, Any]:
    """Find a size in this process, then time the next windows with each size, in turns."""
    recipe = load_recipe_to_run([*settings, "--output.tracker", "none"])
    accelerator = make_accelerator(recipe.config)
    recipe, training, validation = load_data(recipe)
    windows, _ = make_windows(recipe, training, validation, accelerator)
    model = make_model(recipe)
    optimizer = make_optimizer(model, recipe.config.optim, accelerator.mixed_precision)
    model, optimizer = accelerator.prepare(model, optimizer)

    def trained(loader: WindowLoader, epochs: int) -> Iterator[WindowRecord]:
        settings: Any = {"accelerator": accelerator, "compute_loss": recipe.loss, "epochs": epochs}
        return iter_windows(model, optimizer, loader, **settings)

    bound, cost, sizes = windows.bound, windows.cost, sizes_to_try(windows)
    beyond = [4 * sizes[0], 2 * sizes[0]] if bound.max_bytes is None else []  # larger than the run may choose
    epochs, in_all = recipe.config.train.epochs, total_windows(recipe.config, windows) or 0
    tuning = Tuning.of(windows, in_all)
    if tuning is None:
        raise InputError("no size to try: there are too few windows, or all sizes give the same split")
    taken = 0
    for record in trained(windows, epochs):
        tuning.record(record.seconds - windows.seconds_to_collate)
        taken += 1
        if tuning.said is not None:
            break
    if num_windows > in_all - taken:
        raise InputError(f"--windows: found {num_windows}; allowed: 1 to {in_all - taken}")
    ways: dict[str, tuple[Bound, Cost]] = {
        str(size): (replace(bound, max_tokens=size), cost) for size in (*beyond, *sizes)
    }
    ways[FOUND] = windows.bound, windows.cost
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(num_windows):
        windows.load_state_dict(windows.state_dict())  # starts the next epoch at the end of an epoch
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            loader = windows.with_bound(ways[name][0], cost=ways[name][1])
            seconds[name].append(next(trained(loader, loader.epoch + 1)).seconds)
        windows.window += 1
    found = tuning.to_json()
    return {
        "found": found["max_tokens"],
        "cost": found["cost"],
        "windows_to_find": len(tuning.trials),
        "seconds": seconds,
    }


def print_micro_batch_sizes(result: MicroBatchSizesResult, console: Console) -> None:
    """Print a table for each config, and compare the found size with the best fixed size."""
    for sweep in result.sweeps:
        table = Table("max_tokens", box=SIMPLE)
        for header in ("time ÷ time with the found size", f"{CONFIDENCE:.0%} interval", ""):
            table.add_column(header, justify="right")
        for size in sweep.sizes:
            marks = ["found"] * (size.max_tokens == sweep.found) + ["fastest fixed"] * (size is sweep.best)
            figures = f"{size.ratio:.2f}", f"{size.low:.2f}–{size.high:.2f}"
            table.add_row(f"{size.max_tokens:,}", *figures, ", ".join(marks))
        console.print(f"{sweep.recipe}: found {sweep.found:,} tokens, after {sweep.windows_to_find} windows")
        console.print(table)
        best = sweep.best
        console.print(
            f"The found size has {best.ratio:.2f} × the speed of the fastest fixed size, {best.max_tokens:,} "
            f"({CONFIDENCE:.0%} interval {best.low:.2f}–{best.high:.2f}, {result.windows} windows).\n"
        )


if __name__ == "__main__":
    silence_libraries()
    try:
        print(json.dumps(_measure(int(sys.argv[1]), sys.argv[2:])))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
