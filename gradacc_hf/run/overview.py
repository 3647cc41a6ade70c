"""The table that a run prints before it loads a model: data, windows, micro-batches and budget."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator

from gradacc_hf.accumulation.batch_schedule import GrowingBatch, ScheduledBatch
from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.sampler import EffectiveBatchSize
from gradacc_hf.config.schema import Config
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.run.padding import plan_padding
from gradacc_hf.training.optimizer import choose_trained, learning_rate
from gradacc_hf.training.settings import OptimConfig
from gradacc_hf.utils.hardware import describe_device

ASSUMED = ", if the check of the model passes"
LATER = ("head", "padding in layers")
"""Notes on the model that need its weights. `print_head` prints them."""


class PlannedSteps(NamedTuple):
    """Accumulation steps over the planned windows, of the process that has most."""

    min: int
    mean: float
    max: int

    def __str__(self) -> str:
        return f"{self.min} / {self.mean:.1f} / {self.max}"


def print_plan(
    recipe: Recipe,
    windows: WindowLoader,
    empty: torch.nn.Module,
    num_windows: int | None,
    num_validation: int,
    tries_sizes: bool,
) -> PlannedSteps:
    """Print the plan of a run, and return the planned accumulation steps.

    Args:
        recipe: the recipe, after a call of `datasets()`.
        windows: the loader of the training windows.
        empty: the model without weights.
        num_windows: windows of the whole run; None if unknown.
        num_validation: validation examples.
        tries_sizes: whether the first windows try several micro-batch sizes.
    """
    config, plan, accelerator = recipe.config, windows.plan, windows.accelerator
    planned = windows.with_bound(windows.bound)
    plan_padding(recipe, empty, planned)
    sample = planned.spread_splits(100, end=num_windows)
    counts = [max(map(len, split.processes)) for split in sample]
    steps = PlannedSteps(min(counts), sum(counts) / len(counts), max(counts))
    padding = 1 - sum(split.tokens for split in sample) / sum(split.padded_tokens for split in sample)
    rows = (
        ("recipe", (type(recipe).__doc__ or type(recipe).__name__).partition("\n")[0]),
        ("model", f"{config.model.name}, {_parameters(recipe, empty)}"),
        *((name, note) for name, note in recipe.model_notes.items() if name not in LATER),
        *([("tokens", recipe.tokens_are)] if recipe.tokens_are else []),
        *data_lines(recipe, plan.num_examples, num_validation),
        ("effective batch size", _size(plan.effective_batch_size, num_windows)),
        ("windows", _windows(config, windows, num_windows)),
        (
            "micro-batches",
            f"at most {planned.limit}" + "; the first windows try smaller sizes" * tries_sizes,
        ),
        (
            "accumulation steps",
            f"{steps} (min / mean / max){_noise(planned)}"
            + "; more with smaller micro-batches" * tries_sizes,
        ),
        ("padding", f"{padding:.1%} of the tokens" + ASSUMED * planned.padding_free),
        *([("budget", f"auto: {describe_device()}")] if config.budget_file == "auto" else []),
        ("precision", {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)),
        ("processes", f"{accelerator.num_processes} on {accelerator.device.type}"),
    )
    for name, value in rows:
        accelerator.print(f"{name:<22}{value}")
    return steps


def data_lines(recipe: Recipe, num_training: int, num_validation: int) -> list[tuple[str, str]]:
    """Return (name, text) of the lines of a plan about the data, after a call of `datasets()`."""
    examples = f"{num_training:,}" if recipe.opened is None else "as many as the stream has"
    return [
        ("examples", f"{examples} to train on, {num_validation:,} to validate"),
        *recipe.reading.lines(),
        ("validation", recipe.validation_source.removeprefix("validation: ")),
        *([("left out", _left_out(recipe.skipped_rows))] if recipe.skipped_rows else []),
    ]


def print_head(recipe: Recipe, accelerator: Accelerator, windows_done: int = 0) -> None:
    """Print whether the head is new or kept, and whether padding is removed, of a loaded model.

    The head of a run that continues after `windows_done` windows is in its checkpoint.
    """
    notes = dict(recipe.model_notes)
    if windows_done and "head" in notes:
        notes["head"] = f"kept: the head of this run after window {windows_done:,}"
    for name in LATER:
        if note := notes.get(name):
            accelerator.print(f"{name:<22}{note}")


def rate_note(optim: OptimConfig, num_windows: int | None, start: int = 0) -> str:
    """Return a line if the learning rate is 0 in all windows from `start` on, as in one window of warmup."""
    coming = range(start + 1, (num_windows or 0) + 1)
    if not coming or any(learning_rate(optim, window, num_windows, start) for window in coming):
        return ""
    found = f"0 in every window, as optim.warmup_ratio {optim.warmup_ratio:g} begins at 0: nothing is learned"
    return f"{found}; set --optim.warmup_ratio 0, or train more windows"


def _windows(config: Config, windows: WindowLoader, num_windows: int | None) -> str:
    """Return the number of windows of a run, as text."""
    epochs, plan = config.train.epochs, windows.plan
    over = f"over {epochs} epoch{'s' * (epochs > 1)}"
    if config.data.streaming:
        return f"{f'at most {num_windows:,}' if num_windows else 'as many as the stream has'}, {over}"
    of_all = sum(plan.num_windows(epoch) for epoch in range(epochs))
    some = f" of {of_all:,}" if of_all > (num_windows or 0) else ""  # train.max_windows
    at_most = "at most " * isinstance(plan.effective_batch_size, GrowingBatch)
    return f"{at_most}{num_windows:,}{some}, {over}"


def _noise(windows: WindowLoader) -> str:
    """Return which windows have two micro-batches or more to measure the gradient noise scale, as text."""
    every = windows.noise_every
    where = f"one of every {every} windows" if every > 1 else "every window"
    return f"; at least 2 in {where}, to measure the noise scale" if every else ""


def _size(effective: EffectiveBatchSize, num_windows: int | None) -> str:
    if not callable(effective):
        return f"{effective} examples a window"
    late = isinstance(effective, ScheduledBatch) and max(effective.sizes) >= (num_windows or math.inf)
    return f"{effective}{f' (the run ends after {num_windows})' * late}"


def _parameters(recipe: Recipe, model: torch.nn.Module) -> str:
    """Return the number of parameters and of trained ones, as text; choose the trained ones."""
    total = sum(parameter.numel() for parameter in model.parameters())
    choose_trained(model, recipe.config.model, recipe.new_parameters)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if recipe.config.model.lora.rank:
        return f"{total:,} parameters, {trained:,} trained ({recipe.config.model.lora})"
    frozen = f", {total - trained:,} of them frozen" if trained < total else ""
    return f"{total:,} parameters{frozen}" + (", from scratch" if recipe.from_scratch else "")


def _left_out(rows: Sequence[str]) -> str:
    return f"{len(rows):,} row{'s' * (len(rows) > 1)} that cannot be used, the first: {rows[0]}"
