"""`gradacc bench watching`: what it costs to measure the noise scale, and to have the doctor watch.

Text classification offline; each window is trained with and without, in turns, by our loop and, for the
doctor, by one that cuts by count, as most are written. What counts is the ratio in the same turn.
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
from gradacc_hf.bench.micro_batch_size import interval
from gradacc_hf.comparison.worker import peak_memory, reset_peak_memory
from gradacc_hf.config.schema import TrainConfig
from gradacc_hf.doctor import Diagnosis, diagnose
from gradacc_hf.recipe.loading import load_recipe_to_run
from gradacc_hf.run.setup import load_data, make_accelerator, make_model, make_windows
from gradacc_hf.training.loop import train
from gradacc_hf.training.optimizer import make_optimizer
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.utils.paths import bundle_root

WATCHED = 3  # windows that the doctor watches, by default
BY_COUNT = 8  # examples of a micro-batch in the usual loop
MAX_TOKENS = 1024


@dataclass(frozen=True)
class Watching:
    """`noise`: time of a window that measures, by that of the same window without. The doctor's, by loop:
    time of the windows that it watches, of as many when it is done, and the most memory beyond that of the
    loop, in sizes of the gradient.
    """

    noise: tuple[float, ...]
    noise_every: int
    watched: dict[str, tuple[float, ...]]
    afterwards: dict[str, tuple[float, ...]]
    gradients_more: dict[str, tuple[float, ...]]
    measured_with: dict[str, str]


class Loops:
    """One model, and two loops over the next windows of its data."""

    def __init__(self):
        config = str(bundle_root() / "configs/text_classification_offline.yaml")
        ours = ["--budget.max_tokens", str(MAX_TOKENS), "--model.dropout", "0", "--output.tracker", "none"]
        recipe = load_recipe_to_run(["--config", config, *ours])
        self.accelerator = make_accelerator(recipe.config)
        self.recipe, training, validation = load_data(recipe)
        self.windows, _ = make_windows(self.recipe, training, validation, self.accelerator)
        model = make_model(self.recipe)
        optimizer = make_optimizer(model, self.recipe.config.optim, self.accelerator.mixed_precision)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.loops: dict[str, Callable[[int], None]] = {"ours": self.ours, "by count": self.by_count}

    def loader(self, noise_every: int) -> WindowLoader:
        """At the next window."""
        loader = self.windows.with_bound(self.windows.bound)
        loader._windows.noise_every = noise_every
        return loader

    def seconds(self, noise_every: int) -> float:
        """Of the next window."""
        records = self._trained(self.loader(noise_every))
        return next(records).seconds

    def _trained(self, loader: WindowLoader) -> Iterator[Any]:
        return train(
            self.model, self.optimizer, loader, accelerator=self.accelerator, epochs=loader.epoch + 1
        )

    def ours(self, windows: int) -> None:
        """The next windows by our loop."""
        records = self._trained(self.loader(0))
        for _ in range(windows):
            next(records)

    def by_count(self, windows: int) -> None:
        """The same windows, cut by count."""
        loader, model = self.windows, self.model.train()
        for window in range(loader.window, loader.window + windows):
            pieces = loader.plan.indices(loader.epoch, window).reshape(-1, BY_COUNT)
            for piece in pieces:
                batch = self.recipe.collate(loader.examples(piece))
                loss = model(**send_to_device(batch, self.accelerator.device)).loss
                (loss / len(pieces)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def watch(self, loop: str) -> tuple[float, float, float]:
        """Watched, and when the doctor is done: times by those without; and gradients more."""
        run, device = self.loops[loop], self.accelerator.device
        before = reset_peak_memory(device)
        plain = _seconds(run, WATCHED)
        peak = peak_memory(device) - before
        diagnosis: Diagnosis
        with diagnose(self.model, self.optimizer, windows=WATCHED, say=lambda said: None) as diagnosis:
            before = reset_peak_memory(device)
            watched = _seconds(run, WATCHED)
            more = peak_memory(device) - before - peak
            assert diagnosis.is_over, "it watches more than it is to"
            afterwards = _seconds(run, WATCHED)
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return watched / plain, afterwards / plain, more / size


def _seconds(run: Callable[[int], None], windows: int) -> float:
    started = time.perf_counter()
    run(windows)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def watching(turns: int, progress: Any = iter) -> Watching:
    """Each turn one window for the noise scale, and `WATCHED` by each loop for the doctor."""
    loops = Loops()
    for loop in loops.loops.values():
        loop(1)  # what is set up once
    noise: list[float] = []
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in loops.loops}
    for turn in progress(range(turns)):
        loops.windows.load_state_dict({**loops.windows.state_dict(), "window": turn % 20})
        pair = {every: loops.seconds(every) for every in ((1, 0) if turn % 2 else (0, 1))}
        noise.append(pair[1] / pair[0])
        for name in found:
            found[name].append(loops.watch(name))
    columns = {name: list(zip(*rows, strict=True)) for name, rows in found.items()}
    return Watching(
        noise=tuple(noise),
        noise_every=TrainConfig().noise_every,
        watched={name: found[0] for name, found in columns.items()},
        afterwards={name: found[1] for name, found in columns.items()},
        gradients_more={name: found[2] for name, found in columns.items()},
        measured_with=measured_with(loops.accelerator.device.type),
    )


def print_watching(result: Watching, console: Console) -> None:
    """A sentence and a table: medians, with intervals that hold them with 95 %."""
    more = median(result.noise) - 1
    low, high = interval(result.noise)
    console.print(
        f"a window that measures the noise scale takes {1 + more:.2f} × its time ({low:.2f}–{high:.2f}, "
        f"{len(result.noise)} pairs): one in {result.noise_every}, that is {more / result.noise_every:.2%} "
        f"({(low - 1) / result.noise_every:.2%} to {(high - 1) / result.noise_every:.2%})"
    )
    table = Table("loop", "watched, time ×", "afterwards, time ×", "gradients more, at the peak", box=SIMPLE)
    for name in result.watched:
        columns = (result.watched[name], result.afterwards[name], result.gradients_more[name])
        cells = [(median(values), *interval(values)) for values in columns]
        table.add_row(name, *(f"{middle:.2f} ({low:.2f}–{high:.2f})" for middle, low, high in cells))
    console.print(table)
