"""`gradacc bench watching`: the cost of measuring the noise scale, and of the doctor.

The data is offline text classification. Each window is trained with and without measuring, in turns. The
doctor observes the loop of gradacc and a plain loop that splits by count. The result is the ratio of the
times in the same turn.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from accelerate.utils import send_to_device
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.noise_scale import NOISE_EVERY
from gradacc_hf.bench.micro_batch_size import interval
from gradacc_hf.bench.progress import Progress
from gradacc_hf.comparison.worker import peak_memory, reset_peak_memory
from gradacc_hf.config.schema import with_settings
from gradacc_hf.doctor import Diagnosis, diagnose
from gradacc_hf.recipe.loading import load_recipe_to_run
from gradacc_hf.run.setup import load_data, make_accelerator, make_model, make_windows
from gradacc_hf.training.loop import iter_windows
from gradacc_hf.training.optimizer import make_optimizer
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.utils.paths import bundle_root

WATCHED_WINDOWS = 3  # the doctor's default
MICRO_BATCH_EXAMPLES = 8  # in the plain loop
MAX_TOKENS = 1024


@dataclass(frozen=True)
class MonitoringResult:
    """Times relative to the same windows without monitoring, and peak memory. Dicts are by loop."""

    noise: tuple[float, ...]  # time of a window that measures the noise scale
    noise_every: int  # windows; the default of a run
    watched: dict[str, tuple[float, ...]]  # time of the windows that the doctor observes
    afterwards: dict[str, tuple[float, ...]]  # time of as many windows after the doctor has finished
    gradients_more: dict[str, tuple[float, ...]]  # extra peak memory, in multiples of the gradient's size
    measured_with: dict[str, str]


class MonitoredLoops:
    """One model, and two loops over the next windows of the data."""

    def __init__(self):
        config = str(bundle_root() / "configs/text_classification_offline.yaml")
        settings = [
            "--budget.max_tokens",
            str(MAX_TOKENS),
            "--model.dropout",
            "0",
            "--output.tracker",
            "none",
        ]
        recipe = load_recipe_to_run(["--config", config, *settings])
        self.accelerator = make_accelerator(recipe.config)
        self.recipe, self.training, self.validation = load_data(recipe)
        self.windows = self.make_loader(noise_every=0)
        self.measuring_windows = self.make_loader(noise_every=1)
        model = make_model(self.recipe)
        optimizer = make_optimizer(model, self.recipe.config.optim, self.accelerator.mixed_precision)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.loops: dict[str, Callable[[int], None]] = {"ours": self.ours, "by count": self.by_count}

    def make_loader(self, noise_every: int) -> WindowLoader:
        """Return a loader that measures the noise scale every `noise_every` windows; 0 disables it."""
        config = with_settings(self.recipe.config, {"train.noise_every": noise_every})
        loader, _ = make_windows(
            self.recipe.with_config(config), self.training, self.validation, self.accelerator
        )
        return loader

    def go_to(self, window: int) -> None:
        """Continue with this window of the epoch."""
        for loader in (self.windows, self.measuring_windows):
            loader.load_state_dict({**self.windows.state_dict(), "window": window})

    def seconds(self, measures_noise: bool) -> float:
        """Return the seconds of the next window, with or without measuring the noise scale."""
        loader = self.measuring_windows if measures_noise else self.windows
        return next(self._trained(loader.with_bound(loader.bound))).seconds

    def _trained(self, loader: WindowLoader) -> Iterator[Any]:
        return iter_windows(
            self.model, self.optimizer, loader, accelerator=self.accelerator, epochs=loader.epoch + 1
        )

    def ours(self, windows: int) -> None:
        """Train the next windows with the loop of gradacc."""
        records = self._trained(self.windows.with_bound(self.windows.bound))
        for _ in range(windows):
            next(records)

    def by_count(self, windows: int) -> None:
        """Train the same windows with a plain loop that splits by count."""
        loader, model = self.windows, self.model.train()
        for window in range(loader.window, loader.window + windows):
            micro_batches = loader.plan.indices(loader.epoch, window).reshape(-1, MICRO_BATCH_EXAMPLES)
            for indices in micro_batches:
                batch = self.recipe.collate(loader.examples(indices))
                loss = model(**send_to_device(batch, self.accelerator.device)).loss
                (loss / len(micro_batches)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def watch(self, loop: str) -> tuple[float, float, float]:
        """Return the relative times of observed and of later windows, and the extra peak memory."""
        run, device = self.loops[loop], self.accelerator.device
        before = reset_peak_memory(device)
        plain = _seconds(run, WATCHED_WINDOWS)
        peak = peak_memory(device) - before
        diagnosis: Diagnosis
        with diagnose(
            self.model, self.optimizer, windows=WATCHED_WINDOWS, say=lambda text: None
        ) as diagnosis:
            before = reset_peak_memory(device)
            watched = _seconds(run, WATCHED_WINDOWS)
            more = peak_memory(device) - before - peak
            assert diagnosis.is_over, "the doctor observes too many windows"
            afterwards = _seconds(run, WATCHED_WINDOWS)
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return watched / plain, afterwards / plain, more / size


def _seconds(run: Callable[[int], None], windows: int) -> float:
    started = time.perf_counter()
    run(windows)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure_monitoring(turns: int, progress: Progress = iter) -> MonitoringResult:
    """Time one window for the noise scale, and `WATCHED_WINDOWS` of each loop, in each turn."""
    loops = MonitoredLoops()
    for loop in loops.loops.values():
        loop(1)  # warms up
    noise: list[float] = []
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in loops.loops}
    for turn in progress(range(turns)):
        loops.go_to(turn % 20)
        pair = {
            measures: loops.seconds(measures) for measures in ((True, False) if turn % 2 else (False, True))
        }
        noise.append(pair[True] / pair[False])
        for name in found:
            found[name].append(loops.watch(name))
    columns = {name: list(zip(*rows, strict=True)) for name, rows in found.items()}
    return MonitoringResult(
        noise=tuple(noise),
        noise_every=NOISE_EVERY,
        watched={name: found[0] for name, found in columns.items()},
        afterwards={name: found[1] for name, found in columns.items()},
        gradients_more={name: found[2] for name, found in columns.items()},
        measured_with=measured_with(loops.accelerator.device.type),
    )


def print_monitoring(result: MonitoringResult, console: Console) -> None:
    """Print a sentence and a table: medians with intervals of 95 %."""
    more = median(result.noise) - 1
    low, high = interval(result.noise)
    console.print(
        f"A window that measures the noise scale takes {1 + more:.2f} × as long "
        f"({low:.2f}–{high:.2f}, {len(result.noise)} pairs).\n"
        f"Measured every {result.noise_every} windows, it adds {more / result.noise_every:.2%} to a run "
        f"({(low - 1) / result.noise_every:.2%} to {(high - 1) / result.noise_every:.2%}).\n"
        "The doctor, relative to the same windows without it:"
    )
    table = Table("loop", "time, observed", "time, afterwards", "extra peak memory, in gradients", box=SIMPLE)
    for name in result.watched:
        columns = (result.watched[name], result.afterwards[name], result.gradients_more[name])
        cells = [(median(values), *interval(values)) for values in columns]
        table.add_row(name, *(f"{middle:.2f} ({low:.2f}–{high:.2f})" for middle, low, high in cells))
    console.print(table)
