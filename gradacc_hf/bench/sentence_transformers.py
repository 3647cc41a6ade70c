"""`gradacc bench contrastive`: ContrastiveLoss, compared with the losses of sentence-transformers.

`measure_contrastive` starts each contender in a separate process, in turns, with the same pairs, weights and
windows.

| contender | batch |
|---|---|
| `MultipleNegativesRankingLoss` | the whole window |
| `CachedMultipleNegativesRankingLoss` | mini-batches of `max_tokens` tokens |
| `ContrastiveLoss` | micro-batches of `max_tokens` tokens, without padding in the layers |
| `ContrastiveLoss`, at once | the whole window, without padding in the layers: one pass |

The losses of sentence-transformers run in a plain PyTorch loop. Without dropout, all should reach the same
model.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gradacc_hf.accumulation.gradient_cache import COLUMNS, Embedder
from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.reference import EXACT, read_gradient, relative_error, whole_window_gradient
from gradacc_hf.bench.progress import Progress
from gradacc_hf.comparison.worker import peak_memory, reset_peak_memory
from gradacc_hf.errors import InputError, one_line
from gradacc_hf.padding.attention import with_padding
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.run.padding import choose_padding
from gradacc_hf.run.setup import load_data, make_model, make_windows, total_windows
from gradacc_hf.training.loop import iter_windows
from gradacc_hf.training.optimizer import make_optimizer, make_scheduler
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.utils.paths import bundle_root
from gradacc_hf.utils.verbosity import silence_libraries

CONTENDERS = {
    "at_once": "MultipleNegativesRankingLoss",
    "cached": "CachedMultipleNegativesRankingLoss",
    "ours": "ContrastiveLoss",
    "ours_at_once": "ContrastiveLoss, at once",
}
COMPARED = {"at_once": "ours_at_once", "cached": "ours"}
"""Loss of sentence-transformers → contender with as much memory or less."""
WHOLE_WINDOW = 1_000_000_000
"""Tokens of a micro-batch that holds any window."""


@dataclass(frozen=True)
class ContrastiveRuns:
    """The runs of one contender. Tuples have one element per repeat, unless a comment states otherwise."""

    name: str
    gradient_error: float  # relative to plain PyTorch on the whole first window
    examples_per_second: tuple[float, ...]
    training_memory_bytes: tuple[int, ...]  # peak of training, above the memory before
    losses: tuple[float, ...]  # of each window of the first repeat
    metrics: dict[str, float]  # of the evaluation after the first repeat


@dataclass(frozen=True)
class ContrastiveResult:
    """The contenders by key. `times`: pairs per second, gradacc / the loss in `COMPARED`, per repeat."""

    contenders: dict[str, ContrastiveRuns]
    times: dict[str, tuple[float, ...]]
    windows: int
    pairs: int  # in a window
    max_tokens: int
    measured_with: dict[str, str]


def measure_contrastive(
    settings: Sequence[str] = (),
    num_windows: int = 4,
    repeats: int = 3,
    max_tokens: int = 2048,
    progress: Progress = iter,
) -> ContrastiveResult:
    """Train the first windows of the offline config with each contender, in turns.

    Args:
        settings: command-line settings added to the offline config.
        num_windows: the number of windows in a run.
        repeats: the number of runs of each contender.
        max_tokens: the tokens of a micro-batch.
        progress: wraps the runs.

    Raises:
        InputError: sentence-transformers is not installed, or an epoch has fewer windows.
    """
    if find_spec("sentence_transformers") is None:
        raise InputError(
            "bench contrastive: sentence-transformers is not installed: pip install sentence-transformers"
        )
    names = list(CONTENDERS)
    turns = [name for repeat in range(repeats) for name in names[repeat % 4 :] + names[: repeat % 4]]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for name in progress(turns):
        found[name].append(_run_in_process(name, num_windows, max_tokens, settings))
    contenders = {
        name: ContrastiveRuns(
            name=CONTENDERS[name],
            gradient_error=runs[0]["gradient_error"],
            examples_per_second=tuple(run["examples_per_second"] for run in runs),
            training_memory_bytes=tuple(run["training_memory_bytes"] for run in runs),
            losses=tuple(runs[0]["losses"]),
            metrics=runs[0]["metrics"],
        )
        for name, runs in found.items()
    }
    speeds = {name: runs.examples_per_second for name, runs in contenders.items()}
    times = {
        other: tuple(a / b for a, b in zip(speeds[ours], speeds[other], strict=True))
        for other, ours in COMPARED.items()
    }
    pairs, device = _recipe(max_tokens, settings).config.batch.least, found["ours"][0]["device"]
    return ContrastiveResult(contenders, times, num_windows, pairs, max_tokens, measured_with(device))


def _run_in_process(name: str, num_windows: int, max_tokens: int, settings: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, name, str(num_windows), str(max_tokens), *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 2:
        raise InputError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"{CONTENDERS[name]} failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _recipe(max_tokens: int, settings: Sequence[str]) -> Recipe:
    config = str(bundle_root() / "configs/contrastive_offline.yaml")
    shared = [f"--budget.max_tokens={max_tokens}", "--model.dropout=0", "--batch.drop_last=true"]
    return load_recipe(["--config", config, *shared, *settings])


def run_contender(name: str, num_windows: int, max_tokens: int, settings: Sequence[str]) -> dict[str, Any]:
    """Train and evaluate one contender, then measure the error of the first window's gradient."""
    recipe = _recipe(WHOLE_WINDOW if name == "ours_at_once" else max_tokens, settings)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    recipe, training, validation_data = load_data(recipe)
    windows, validation = make_windows(recipe, training, validation_data, accelerator)
    if num_windows > len(windows):
        raise InputError(
            f"--windows: found {num_windows}; allowed: 1 to {len(windows)}, the windows of an epoch"
        )
    contender = ContrastiveTraining(name, recipe, windows, max_tokens)
    before = reset_peak_memory(accelerator.device)
    started = time.perf_counter()
    losses = list(contender.train(num_windows))
    seconds = time.perf_counter() - started
    peak = peak_memory(accelerator.device)
    metrics = recipe.validate(contender.model, validation, accelerator)

    contender = ContrastiveTraining(
        name, recipe, make_windows(recipe, training, validation_data, accelerator)[0], max_tokens
    )
    batch = windows.collated(windows.plan.indices(0, 0)).batch
    with with_padding():
        truth = whole_window_gradient(contender.model, batch, recipe.loss)
    gradients: list[Any] = []
    contender.optimizer.register_step_pre_hook(lambda *_: gradients.append(read_gradient(contender.model)))
    list(contender.train(1))
    return {
        "gradient_error": relative_error(gradients[0], truth),
        "examples_per_second": num_windows * recipe.config.batch.least / seconds,
        "training_memory_bytes": max(0, peak - before),
        "losses": losses,
        "metrics": metrics,
        "device": accelerator.device.type,
    }


class ContrastiveTraining:
    """The training of one contender on a recipe's windows, from the same initial weights."""

    def __init__(self, name: str, recipe: Recipe, windows: WindowLoader, max_tokens: int):
        self.recipe, self.windows, self.accelerator = recipe, windows, windows.accelerator
        self.model, self.reference_loss = make_model(recipe).to(self.accelerator.device), None
        if name in COMPARED.values():
            choose_padding(recipe, self.model, windows)
        else:
            self.model, self.reference_loss = _reference(name, self.model, recipe, max_tokens)
        self.optimizer = make_optimizer(self.model, recipe.config.optim)
        total = total_windows(recipe.config, windows)
        self.scheduler = make_scheduler(self.optimizer, recipe.config.optim, windows, total)

    def train(self, num_windows: int) -> Iterator[float]:
        """Train, and yield the loss of each window after the step. Gradients are not clipped."""
        if self.reference_loss is None:
            model, optimizer = self.accelerator.prepare(self.model, self.optimizer)
            shared = {"scheduler": self.scheduler, "compute_loss": self.recipe.loss}
            records = iter_windows(model, optimizer, self.windows, accelerator=self.accelerator, **shared)
            yield from (record.loss for _, record in zip(range(num_windows), records, strict=False))
            return
        self.model.train()
        for number in range(num_windows):
            batch = self.windows.collated(self.windows.plan.indices(0, number)).batch
            loss = self.reference_loss(_features(batch), None)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), math.inf)  # `train` computes the norm too
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            yield loss.item()


def _reference(name: str, embedder: Any, recipe: Recipe, max_tokens: int) -> tuple[Embedder, Any]:
    """Return the model of sentence-transformers with these weights, as an `Embedder`, and the loss."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    with tempfile.TemporaryDirectory() as folder:
        embedder.save_pretrained(folder)
        recipe.tokenizer.save_pretrained(folder)
        model = SentenceTransformer(folder, device=str(embedder.device))
    data: Any = recipe.data
    settings: dict[str, Any] = {"scale": 1 / data.temperature}
    if data.symmetric:
        settings |= {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    if name == "cached":
        loss: Any = losses.CachedMultipleNegativesRankingLoss(
            model, mini_batch_size=1024, mini_batch_num_tokens=max_tokens, **settings
        )
    else:
        loss = losses.MultipleNegativesRankingLoss(model, **settings)
    [encoder] = [m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)]
    return Embedder(encoder), loss


def _features(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    keys = ("input_ids", "attention_mask")
    return [{k: batch[f"{c}_{k}"] for k in keys} for c in COLUMNS if f"{c}_input_ids" in batch]


def print_contrastive(result: ContrastiveResult, console: Console) -> None:
    """Print a row for each contender, with medians, and the ratios of the speeds."""
    console.print(
        f"{result.windows} windows of {result.pairs} pairs; micro-batches of {result.max_tokens:,} tokens"
    )
    table = Table("", box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    metrics = [name for name in result.contenders["ours"].metrics if name != "loss"]
    for header in ("gradient\nerror", "pairs\nper s", "MiB", "last\nloss", *metrics):
        table.add_column(header.replace("_", "\n", 1), justify="right")
    for contender in result.contenders.values():
        table.add_row(
            contender.name.replace("MultipleNegatives", "\nMultipleNegatives\n").strip(),
            f"{contender.gradient_error:.0e}{'' if contender.gradient_error <= EXACT else ' !'}",
            f"{median(contender.examples_per_second):.1f}",
            f"{median(contender.training_memory_bytes) / 2**20:,.0f}",
            f"{contender.losses[-1]:.4f}",
            *(f"{contender.metrics[name]:.3f}" for name in metrics),
        )
    console.print(table)
    for name, times in result.times.items():
        console.print(
            f"{CONTENDERS[COMPARED[name]]}: {median(times):.2f} × the pairs per second of {CONTENDERS[name]} "
            f"(median of {len(times)} pairs of runs, {min(times):.2f}–{max(times):.2f})"
        )


def main(argv: Sequence[str]) -> None:
    """Run one contender, as `measure_contrastive` starts it, and print the figures as a line of JSON."""
    name, num_windows, max_tokens, *settings = argv
    silence_libraries()
    try:
        print(json.dumps(run_contender(name, int(num_windows), int(max_tokens), settings)))
    except InputError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
