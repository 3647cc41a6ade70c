"""`gradacc bench sizes`: is the size of micro-batches that a run finds as fast as the best fixed one?

For each config, in a process of its own: the run's first windows find a size (`tune.py`); then each of the
next windows is trained with every size, in turns, and as found. What counts is the ratio window by window.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from datasets import disable_progress_bars
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from scipy.stats import binom
from transformers.utils import logging

from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.splitting import Bound, Cost
from gradacc_hf.bench.all_recipes import offline_configs
from gradacc_hf.errors import InputError, listed
from gradacc_hf.recipe.loading import load_recipe_to_run
from gradacc_hf.run.setup import load_data, make_accelerator, make_model, make_windows, total_windows
from gradacc_hf.training.autotune import Tuning, sizes_to_try
from gradacc_hf.training.loop import train
from gradacc_hf.training.optimizer import make_optimizer
from gradacc_hf.training.run_log import WindowRecord, measured_with

RECIPES = ("text_classification", "question_answering", "image_classification")
FOUND = "found"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Size:
    """A fixed size, over all windows: its seconds / those of the size that was found, as median and interval.

    Above 1, the found one was faster.
    """

    max_tokens: int
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Sweep:
    """One config. `sizes`: those that the run chose from, and two above, the largest first."""

    recipe: str
    found: int
    cost: dict[str, float]
    windows_to_find: int
    sizes: tuple[Size, ...]

    @property
    def best(self) -> Size:
        """The fastest fixed size."""
        return min(self.sizes, key=lambda size: size.ratio)


@dataclass(frozen=True)
class Sweeps:
    """All configs; intervals hold the median with a probability of at least 95 %."""

    sweeps: tuple[Sweep, ...]
    windows: int
    measured_with: dict[str, str]


def sweeps(
    only: Sequence[str] = (), windows: int = 16, progress: Callable[[Sequence[str]], Iterable[str]] = iter
) -> Sweeps:
    """Sweep the offline configs of these recipes. Raises InputError."""
    known = offline_configs()
    if unknown := sorted(set(only) - set(known)):
        raise InputError(f"--only: found {unknown[0]!r}; allowed: {listed(known)}")
    found = []
    for name in progress(list(only or RECIPES)):
        command = [sys.executable, "-m", __name__, str(windows), "--config", str(known[name])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"{name}: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
        found.append(_sweep(name, json.loads(done.stdout.splitlines()[-1])))
    return Sweeps(tuple(found), windows, measured_with())


def interval(ratios: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """One that holds the median with at least this probability, or all ratios: between two order statistics.

    Of n draws, k or fewer are below the median with the probability of k or fewer heads in n throws.
    """
    ordered = sorted(ratios)
    left_out = max(0, int(binom.ppf((1 - confidence) / 2, len(ordered), 0.5)) - 1)
    return ordered[left_out], ordered[-1 - left_out]


def _sweep(name: str, said: dict[str, Any]) -> Sweep:
    sizes = []
    for size, seconds in said["seconds"].items():
        if size != FOUND:
            ratios = [a / b for a, b in zip(seconds, said["seconds"][FOUND], strict=True)]
            sizes.append(Size(int(size), median(ratios), *interval(ratios)))
    return Sweep(name, said["found"], said["cost"], said["windows_to_find"], tuple(sizes))


def _measure(num_windows: int, settings: Sequence[str]) -> dict[str, Any]:
    """In a process of its own: find a size, then time the next windows with each, in turns."""
    recipe = load_recipe_to_run([*settings, "--output.tracker", "none"])
    accelerator = make_accelerator(recipe.config)
    recipe, training, validation = load_data(recipe)
    windows, _ = make_windows(recipe, training, validation, accelerator)
    model = make_model(recipe)
    optimizer = make_optimizer(model, recipe.config.optim, accelerator.mixed_precision)
    model, optimizer = accelerator.prepare(model, optimizer)

    def trained(loader: WindowLoader, epochs: int) -> Iterator[WindowRecord]:
        settings: Any = {"accelerator": accelerator, "compute_loss": recipe.loss, "epochs": epochs}
        return train(model, optimizer, loader, **settings)

    bound, cost, sizes = windows.bound, windows.cost, sizes_to_try(windows)
    beyond = [4 * sizes[0], 2 * sizes[0]] if bound.max_bytes is None else []  # which the run may not take
    epochs, in_all = recipe.config.train.epochs, total_windows(recipe.config, windows)
    tuning = Tuning.of(windows, in_all)
    if tuning is None:
        raise InputError("nothing to try: too few windows, or all sizes cut them alike")
    taken = 0
    for record in trained(windows, epochs):
        tuning.record(record.seconds - windows.seconds_to_collate)
        taken += 1
        if tuning.said is not None:
            break
    if num_windows > in_all - taken:
        raise InputError(f"--windows: found {num_windows}; allowed: {in_all - taken} at most")
    ways: dict[str, tuple[Bound, Cost]] = {
        str(size): (replace(bound, max_tokens=size), cost) for size in (*beyond, *sizes)
    }
    ways[FOUND] = windows.bound, windows.cost
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(num_windows):
        windows.load_state_dict(windows.state_dict())  # at an epoch's end, to the next one
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


def print_sweeps(result: Sweeps, console: Console) -> None:
    """A table a config, the largest size first; then how the found size compares with the best fixed one."""
    for sweep in result.sweeps:
        table = Table("max_tokens", box=SIMPLE)
        for header in ("time, found = 1", f"{CONFIDENCE:.0%} interval", ""):
            table.add_column(header, justify="right")
        for size in sweep.sizes:
            marks = ["found"] * (size.max_tokens == sweep.found) + ["fastest fixed"] * (size is sweep.best)
            figures = f"{size.ratio:.2f}", f"{size.low:.2f}–{size.high:.2f}"
            table.add_row(f"{size.max_tokens:,}", *figures, ", ".join(marks))
        console.print(f"{sweep.recipe}: {sweep.found:,} was found in {sweep.windows_to_find} windows")
        console.print(table)
        best = sweep.best
        console.print(
            f"as found, {best.ratio:.2f} × the speed of the best fixed size, {best.max_tokens:,} "
            f"({best.low:.2f}–{best.high:.2f}, {result.windows} windows)\n"
        )


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        print(json.dumps(_measure(int(sys.argv[1]), sys.argv[2:])))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
