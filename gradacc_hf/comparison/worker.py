"""Run one contender of a comparison, in a separate process, so that the memory can be measured.

    python -m gradacc_hf.comparison.worker NAME FOLDER WINDOWS errors|no_errors --config FILE [settings]

Train the first windows of a recipe's run with a function of `verification/baselines.py`, timed, and evaluate.
With `errors`, train again without dropout, and compare each gradient with the gradient of the window in one
batch. Write config.yaml, history.jsonl and summary.json to the folder. `comparison/compare.py` starts workers
and reads the folders.
"""

import gc
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

from gradacc_hf.accumulation.accelerate_state import reset_settings
from gradacc_hf.accumulation.lengths import measure_lengths
from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.oom import out_of_memory
from gradacc_hf.accumulation.reference import (
    full_float32,
    read_gradient,
    relative_error,
    whole_window_gradient,
)
from gradacc_hf.accumulation.splitting import padded_alone, padded_size
from gradacc_hf.config.schema import with_settings
from gradacc_hf.errors import GradaccError, InputError, OutOfMemoryError, one_line
from gradacc_hf.padding.attention import with_padding
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.recipe.loading import load_recipe_to_run
from gradacc_hf.run.folder import settings
from gradacc_hf.run.padding import choose_padding
from gradacc_hf.run.setup import load_data, make_accelerator, make_model, make_windows, total_windows
from gradacc_hf.training.optimizer import make_optimizer, make_scheduler
from gradacc_hf.training.run_log import finite, peak_memory_bytes, versions
from gradacc_hf.training.schedule_free import keep_averaged_weights
from gradacc_hf.utils.files import write_whole
from gradacc_hf.utils.memory import release_memory
from gradacc_hf.utils.modeling import disable_dropout, uncompiled
from gradacc_hf.utils.verbosity import silence_libraries
from gradacc_hf.verification.baselines import (
    custom_loss,
    run_accelerate,
    run_at_once,
    run_trainer,
    run_windows,
)

CONTENDERS = {
    "at_once": "at once",
    "trainer": "Trainer",
    "trainer_by_length": "Trainer, by length",
    "trainer_batch_rebalance": "Trainer, batch_rebalance",
    "exact_trainer": "ExactTrainer",
    "exact_trainer_batch_rebalance": "ExactTrainer, batch_rebalance",
    "accelerate": "accumulate()",
    "ours": "gradacc",
    "ours_padded": "gradacc, padded",
}
"""Contender → name in tables and reports."""
SPLIT_BY_LENGTH = ("ours", "ours_padded")
"""Contenders that split windows by length."""
LOOPS = (*SPLIT_BY_LENGTH, "at_once")
"""Contenders that train windows."""
USUAL = tuple(name for name in CONTENDERS if name != "ours_padded")
STRATEGIES = {
    "trainer_by_length": "group_by_length",
    "trainer_batch_rebalance": "batch_rebalance",
    "exact_trainer_batch_rebalance": "batch_rebalance",
}
"""`train_sampling_strategy` of Trainer; otherwise the order of the windows."""
DOES_NOT_FIT = 3  # exit code of a contender that ran out of memory


class WorkerRun:
    """The first windows of a recipe's run, on the same examples for each contender.

    Attributes:
        examples: the examples of all windows, in order.
        size: examples of a micro-batch, for contenders that split by count.
        steps: micro-batches of a window, for these contenders.
        pad_to: the length to which these contenders pad; None for the longest of a micro-batch.
        collated_examples: the examples of each micro-batch of the last training, in order.
        padding_free: whether the last training computed no padding.
    """

    def __init__(self, recipe: Recipe, num_windows: int):
        changes = {"train.noise_every": 0}  # measuring the noise scale would slow one of few windows
        recipe = recipe.with_config(with_settings(recipe.config, changes))
        self.accelerator = make_accelerator(recipe.config)
        recipe, self.training, self.validation = load_data(recipe)
        self.recipe, self.num_windows = recipe, num_windows
        self.windows, _ = self.loaders()
        order = np.concatenate([self.windows.plan.indices(0, t) for t in range(num_windows)])
        self.examples: Any = self.training.select(order)
        if recipe.transform is not None:  # so that all contenders get the same masks
            self.examples = self.windows.examples(order)
        self.size = micro_batch_size(recipe, self.windows)
        self.steps = window_size(recipe) // self.size
        self.pad_to = self.windows.pad_to if isinstance(self.windows.pad_to, int) else None
        if self.windows.pad_to == "window":  # the other contenders have no lengths of a whole window
            self.pad_to = int(self.windows.tokens.max())
        self.collated_examples: list[list[Any]] = []
        self.padding_free = False

    def loaders(self) -> tuple[WindowLoader, WindowLoader]:
        """Return new loaders of the training and the validation data."""
        return make_windows(self.recipe, self.training, self.validation, self.accelerator)

    def set_up(self) -> tuple[Any, Any, Any]:
        """Return a new model on the device, the optimizer and the scheduler."""
        config, recipe = self.recipe.config, self.recipe
        model = make_model(recipe).to(self.accelerator.device)
        recipe.before_training(model, (self.training, self.validation), self.accelerator)
        optimizer = make_optimizer(
            model, config.optim, self.accelerator.mixed_precision, config.model.lora.plus_lr_ratio
        )
        return (
            model,
            optimizer,
            make_scheduler(optimizer, config.optim, self.windows, total_windows(config, self.windows)),
        )

    def train(self, name: str, model: Any, optimizer: Any, scheduler: Any, max_grad_norm: float) -> Any:
        """Train one epoch of the windows with a contender."""
        recipe, self.collated_examples = self.recipe, []
        shared: dict[str, Any] = {"scheduler": scheduler, "max_grad_norm": max_grad_norm}
        if name in LOOPS:
            windows, _ = self.loaders()
            shared["compute_loss"] = recipe.compute_loss
            if name == "ours":
                choose_padding(recipe, model, windows)
            self.padding_free = windows.padding_free
            if name != "at_once":
                splits = [windows.split(0, t) for t in range(self.num_windows)]
                self.collated_examples = [
                    windows.examples(indices) for split in splits for indices in split.processes[0]
                ]
                return run_windows(model, optimizer, windows, max_windows=self.num_windows, **shared)
            batches = (self._whole(windows, t) for t in range(self.num_windows))
            return run_at_once(model, optimizer, batches, accelerator=self.accelerator, **shared)
        loss = custom_loss(model, self.collated([self.examples[0]], model.device), recipe.compute_loss)
        precision, on_cpu = self.accelerator.mixed_precision, self.accelerator.device.type == "cpu"
        if name == "accelerate":
            loader: Any = DataLoader(self.examples, self.size, collate_fn=self._collate)  # type: ignore[arg-type]
            shared |= {} if loss is None else {"compute_loss": loss}
            shared |= {"mixed_precision": precision, "cpu": on_cpu}
            return run_accelerate(model, optimizer, loader, self.steps, **shared)
        return run_trainer(
            model,
            optimizer,
            self.examples,
            self._collate,
            self.size,
            compute_loss=loss,
            exact=name.startswith("exact_trainer"),
            num_items=recipe.num_items,
            gradient_accumulation_steps=self.steps,
            train_sampling_strategy=STRATEGIES.get(name, "sequential"),
            seed=recipe.config.train.seed,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            use_cpu=on_cpu,
            **shared,
        )

    def _collate(self, examples: Sequence[Any]) -> Any:
        self.collated_examples.append(list(examples))
        return self.recipe.collate(examples, **self._padding)

    @property
    def _padding(self) -> dict[str, int]:
        return {} if self.pad_to is None else {"pad_to": self.pad_to}

    def collated(self, examples: Sequence[Any], device: Any) -> Any:
        """Collate examples as one batch on the device, padded as for contenders that split by count."""
        return send_to_device(dict(self.recipe.collate(examples, **self._padding)), device)

    def _whole(self, windows: WindowLoader, number: int) -> Any:
        indices = windows.plan.indices(0, number)
        self.collated_examples.append(windows.examples(indices))
        return windows.collated(indices, self.pad_to).batch

    def padded_size(self, name: str, window: list[np.ndarray]) -> int:
        """Return the padded tokens of a window, from tokens of shape (examples, columns) by micro-batch."""
        if self.windows.pad_to == "nothing" or self.padding_free:
            return int(sum(map(np.sum, window)))
        pad_to = self.pad_to
        if name in SPLIT_BY_LENGTH and self.windows.pad_to == "window":
            pad_to = int(max(map(np.max, window)))
        multiple = self.recipe.config.budget.pad_to_multiple_of or 1
        padded = (
            padded_alone(tokens, multiple, self.recipe.columns_padded_together)
            if pad_to is None
            else np.full_like(tokens, pad_to)
            for tokens in window
        )
        return sum(map(padded_size, padded))

    def tokens(self, examples: Sequence[Any]) -> np.ndarray:
        """Return the tokens of each example as the recipe counts them, of shape (examples, columns)."""
        return measure_lengths(examples, self.recipe.lengths(examples))

    def by_window(self) -> list[list[list[Any]]]:
        """Return the examples of each micro-batch, by window."""
        windows, size = [], window_size(self.recipe)
        for micro_batch in self.collated_examples:
            if not windows or sum(map(len, windows[-1])) >= size:
                windows.append([])
            windows[-1].append(micro_batch)
        return windows


def window_size(recipe: Recipe) -> int:
    """Return the examples of a window. Raises InputError if the number changes during the run."""
    size = recipe.config.batch.effective
    if not isinstance(size, int):
        raise InputError(
            f"batch.effective: found {size}; allowed here: a number, because Trainer has a fixed batch size"
        )
    return size


def micro_batch_size(recipe: Recipe, windows: WindowLoader) -> int:
    """Return the largest divisor of the window size that fits the budget, padded to the longest."""
    bound, effective = windows.bound, window_size(recipe)
    most = bound.max_rows(windows.tokens.max(0))
    return max(size for size in range(1, min(most, effective) + 1) if effective % size == 0)


def train_timed(run: WorkerRun, name: str, folder: Path) -> None:
    """Train with a clock, evaluate, and write the run's folder."""
    recipe, config, device = run.recipe, run.recipe.config, run.accelerator.device
    if device.type == "cuda":  # warm up: loading kernels takes time and memory
        model, optimizer, scheduler = run.set_up()
        run.train(name, model, optimizer, scheduler, config.optim.max_grad_norm)
        del model, optimizer, scheduler
        run.accelerator.free_memory()
        release_memory()
    model, optimizer, scheduler = run.set_up()
    ends: list[float] = []
    rates: list[float] = []

    def note(*_: Any) -> None:
        ends.append(time.perf_counter())
        rates.append(optimizer.param_groups[0]["lr"])

    optimizer.register_step_post_hook(note)
    gc.collect()
    before = reset_peak_memory(device)
    ran = run.train(name, model, optimizer, scheduler, config.optim.max_grad_norm)
    peak = peak_memory(device)
    keep_averaged_weights(optimizer)
    _, validation = run.loaders()
    prepared = run.accelerator.prepare(model) if name not in LOOPS else model
    with uncompiled(prepared):
        metrics = recipe.validate(prepared, validation, run.accelerator)
    tokens_of = [[run.tokens(micro_batch) for micro_batch in window] for window in run.by_window()]
    if len(ends) == len(tokens_of):
        seconds = [ran.seconds - (ends[-1] - ends[0]), *np.diff(ends).tolist()]
    else:  # the fp16 scaler has skipped an unknown subset of the steps
        seconds, rates = [ran.seconds / len(tokens_of)] * len(tokens_of), [math.nan] * len(tokens_of)

    rows = [
        {
            "window": number + 1,
            "epoch": 0,
            "loss": ran.losses[number],
            "lr": rates[number],
            "examples": sum(map(len, window)),
            "tokens": int(sum(map(np.sum, window))),
            "padded_tokens": run.padded_size(name, window),
            "accumulation_steps": len(window),
            "seconds": seconds[number],
        }
        for number, window in enumerate(tokens_of)
    ]
    tokens, padded = (sum(row[key] for row in rows) for key in ("tokens", "padded_tokens"))
    steps = [row["accumulation_steps"] for row in rows]
    summary = {
        "contender": CONTENDERS[name],
        "seed": config.train.seed,
        "windows": len(rows),
        "examples": sum(row["examples"] for row in rows),
        "tokens": tokens,
        "padded_tokens": padded,
        "padding": 1 - tokens / padded,
        "seconds": ran.seconds,
        "cpu_seconds": ran.cpu_seconds if device.type == "cpu" else None,
        "tokens_per_second": tokens / ran.seconds,
        "peak_memory_bytes": peak_memory_bytes(device),
        "training_memory_bytes": max(0, peak - before),
        "effective_batch_size": config.batch.effective,
        "accumulation_steps": {"min": min(steps), "mean": sum(steps) / len(steps), "max": max(steps)},
        "processes": 1,
        "precision": {"no": "fp32"}.get(run.accelerator.mixed_precision, run.accelerator.mixed_precision),
        "eval": {"window": len(rows), **metrics},
        "baseline": recipe.baseline(run.training, run.validation),
        "first_window": [tokens.sum(1).tolist() for tokens in tokens_of[0]],
        "versions": versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.yaml", settings(config))
    _write_history(folder, rows)
    write_whole(folder / "summary.json", json.dumps(finite(summary), indent=2) + "\n")


def measure_errors(run: WorkerRun, name: str, folder: Path) -> None:
    """Add the relative error of the gradient to each window's row, in float32 without dropout and clipping.

    The reference is the gradient of the window in one batch, at the contender's weights before the step.
    """
    recipe = run.recipe
    on_cpu = run.accelerator.device.type == "cpu"
    reset_settings()  # the state keeps the budget's precision
    run.accelerator = Accelerator(cpu=on_cpu, mixed_precision="no")
    model, optimizer, scheduler = run.set_up()
    disable_dropout(model)
    found: list[float] = []

    def compare(*_: Any) -> None:
        gradient = read_gradient(model)
        [window] = run.by_window()[len(found) : len(found) + 1]
        examples = [example for micro_batch in window for example in micro_batch]
        batch = run.collated(examples, model.device)
        with exit_if_out_of_memory(0), with_padding():  # if the window does not fit, no error is measured
            whole = whole_window_gradient(model, batch, recipe.compute_loss)
        found.append(relative_error(gradient, whole))
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = gradient[parameter_name]

    optimizer.register_step_pre_hook(compare)
    with full_float32():
        run.train(name, model, optimizer, scheduler, max_grad_norm=0.0)
    lines = (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) | {"gradient_error": error} for line, error in zip(lines, found, strict=True)]
    _write_history(folder, rows)


def _write_history(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_whole(folder / "history.jsonl", "".join(json.dumps(finite(row)) + "\n" for row in rows))


def reset_peak_memory(device: torch.device) -> int:
    """Start the measurement of `peak_memory`. Return the bytes that the process holds now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux: only the peak of the whole process is known
        return peak_memory_bytes(device)
    return _status("VmRSS")


def peak_memory(device: torch.device) -> int:
    """Return the largest number of bytes held since `reset_peak_memory`."""
    if device.type == "cuda" or not Path("/proc/self/status").exists():
        return peak_memory_bytes(device)
    return _status("VmHWM")


def _status(key: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) * 1024


def main(argv: Sequence[str]) -> None:
    """Run a contender. A GradaccError ends it with one line and an exit code, lack of memory with 3."""
    name, folder, num_windows, with_errors, *settings = argv
    silence_libraries()
    try:
        run = WorkerRun(load_recipe_to_run(settings), int(num_windows))
        with exit_if_out_of_memory(DOES_NOT_FIT):
            train_timed(run, name, Path(folder))
        if with_errors == "errors":
            measure_errors(run, name, Path(folder))
    except GradaccError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(error.exit_code)


@contextmanager
def exit_if_out_of_memory(exit_code: int) -> Iterator[None]:
    """Exit with this code and one line on stderr when memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, OutOfMemoryError) or out_of_memory(error)):
            raise
        print(one_line(error)[:300], file=sys.stderr)
        sys.exit(exit_code)


if __name__ == "__main__":
    main(sys.argv[1:])
