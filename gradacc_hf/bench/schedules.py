"""`gradacc bench schedules`: what sizes of windows, fixed or changing, do to the examples that a run needs.

Runs offline configs as their user does, each with a quarter of its window's size, with its size, with one
that grows by a schedule, and with one that follows the noise scale; all of them over the same examples, with
a learning rate by the square root of the size. The causal language model is a tiny Llama from scratch, which
is quick. A run that is there already is not run again.
"""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from gradacc_hf.bench.all_recipes import offline_configs
from gradacc_hf.embedded.smollm2 import write_tiny_llama
from gradacc_hf.errors import InputError, listed, one_line
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.report import narrative as words
from gradacc_hf.report import plots
from gradacc_hf.report.runs import RecordedRun, read_runs
from gradacc_hf.training.run_log import finite, measured_with
from gradacc_hf.utils.files import write_whole

TINY = "tiny_llama"
NOISE = "by the noise scale"
TASKS: dict[str, tuple[int, list[str]]] = {  # the size of windows, and what is not as the offline config says
    "text_classification": (64, []),
    "causal_lm": (32, ["--model.name", TINY, "--model.lora.rank", "0", "--data.max_length", "96"]),
}
EVALUATIONS = 8  # of a run, about
POINTS = 40  # of a drawn line


@dataclass(frozen=True)
class OfSchedule:
    """The runs of one config with one schedule, by seed: `examples` until the validation loss is `target`."""

    recipe: str
    schedule: str
    target: float
    examples: tuple[float, ...]
    final_losses: tuple[float, ...]
    windows: tuple[int, ...]
    last_size: tuple[int, ...]
    noise_scale: tuple[float | None, ...]  # at the end; None beyond measure
    curves: tuple[tuple[tuple[float, float], ...], ...]  # (examples, validation loss) of each evaluation


@dataclass(frozen=True)
class Schedules:
    """All of them."""

    results: tuple[OfSchedule, ...]
    pictures: tuple[str, ...]
    measured_with: dict[str, str]


def schedules(names: Sequence[str], seeds: int, folder: Path, progress: Any = iter) -> Schedules:
    """Run these configs, or all that have examples here, with each schedule; raises InputError."""
    for name in names:
        if name not in TASKS:
            raise InputError(f"--only: found {name!r}; allowed: {listed(TASKS)}")
    chosen = list(names or TASKS)
    tiny = folder / TINY
    if not tiny.exists():
        tiny.mkdir(parents=True)
        write_tiny_llama(tiny)
    flags = {name: [str(tiny) if word == TINY else word for word in TASKS[name][1]] for name in chosen}
    ways = {name: _schedules(TASKS[name][0], _examples(name, flags[name])) for name in chosen}
    todo = [(name, way, seed) for seed in range(seeds) for name in chosen for way in ways[name]]
    for task, way, seed in progress(todo):
        _run(task, [*flags[task], *ways[task][way]], _folder(folder, task, way, seed), seed)
    results, pictures = [], []
    for name in chosen:
        folders = {way: [_folder(folder, name, way, seed) for seed in range(seeds)] for way in ways[name]}
        found = {way: read_runs(of_way) for way, of_way in folders.items()}
        target = max(min(loss for _, loss in _curve(run)) for runs in found.values() for run in runs)
        for schedule, runs in found.items():
            curves = tuple(tuple(_curve(run)) for run in runs)
            results.append(
                OfSchedule(
                    recipe=name,
                    schedule=schedule,
                    target=target,
                    examples=tuple(_needed(curve, target) for curve in curves),
                    final_losses=tuple(curve[-1][1] for curve in curves),
                    windows=tuple(run.windows for run in runs),
                    last_size=tuple(int(run.window_size) for run in runs),
                    noise_scale=tuple(finite([run.noise_scale for run in runs])),
                    curves=curves,
                )
            )
        picture = folder / f"{name}.svg"
        write_whole(picture, _picture(name, [result for result in results if result.recipe == name]))
        pictures.append(str(picture))
    return Schedules(tuple(results), tuple(pictures), measured_with())


def _examples(name: str, flags: Sequence[str]) -> int:
    """That there are to train on."""
    recipe = load_recipe(["--config", str(offline_configs()[name]), *flags])
    return len(recipe.datasets()[0])


def _schedules(size: int, examples: int) -> dict[str, list[str]]:
    """Name → the flags of it. Sizes are a quarter of `size`, a half, and all of it."""
    small, half = size // 4, size // 2
    first = math.ceil(examples / 3 / small)
    steps = {0: small, first: half, first + math.ceil(examples / 3 / half): size}
    grows = ["noise_scale", "--batch.smallest", str(small), "--batch.largest", str(4 * size)]
    sizes = {
        str(small): ([str(small)], small),
        str(size): ([str(size)], size),
        f"{small}, {half}, {size}": ([json.dumps(steps).replace('"', "")], half),
        NOISE: ([*grows, "--train.noise_every", "4"], half),
    }
    scaled = ["--optim.lr_scaling", "sqrt", "--optim.lr_reference_batch", str(size)]
    every = {label: max(1, examples // EVALUATIONS // usual) for label, (_, usual) in sizes.items()}
    return {
        label: ["--batch.effective", *flags, *scaled, "--train.eval_every", str(every[label])]
        for label, (flags, _) in sizes.items()
    }


def _folder(folder: Path, name: str, schedule: str, seed: int) -> Path:
    return folder / name / schedule.replace(", ", "-").replace(" ", "_") / f"seed_{seed}"


def _run(name: str, settings: Sequence[str], run: Path, seed: int) -> None:
    if (run / "summary.json").exists():
        return
    shutil.rmtree(run, ignore_errors=True)
    config = offline_configs()[name]
    command = [sys.executable, str(config.parent.parent / "recipes" / f"{name}.py"), "--config", str(config)]
    command += ["--output.dir", str(run), "--output.tracker", "none", "--checkpoint.every", "0"]
    command += ["--train.seed", str(seed), "--train.eval_on_start", "true", "--train.max_windows", "null"]
    command += ["--train.best_metric", "loss", "--train.best_direction", "min"]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{run}: {one_line(ValueError(done.stderr))[-300:]}")
    for saved in ("best", "last"):
        shutil.rmtree(run / saved, ignore_errors=True)


def _curve(run: RecordedRun) -> list[tuple[float, float]]:
    """(examples, validation loss) of each evaluation."""
    done = [0, *accumulate(row.examples for row in run.rows)]
    return [(float(done[int(each["window"])]), each["loss"]) for each in run.evaluations]


def _needed(curve: Sequence[tuple[float, float]], target: float) -> float:
    """The examples at which the loss first is the target, on a line between evaluations."""
    for (before, high), (after, low) in pairwise(curve):
        if low <= target:
            return before + (after - before) * (max(high, target) - target) / max(high - low, 1e-12)
    return curve[0][0] if curve[0][1] <= target else math.nan


def _picture(name: str, results: Sequence[OfSchedule]) -> str:
    """Validation loss by examples: the median of the seeds, from the least to the most."""
    lines = []
    for look, result in enumerate(results):
        last = min(curve[-1][0] for curve in result.curves)
        grid = np.linspace(0, last, POINTS)
        known = (list(zip(*curve, strict=True)) for curve in result.curves)
        repeats = [np.interp(grid, examples, losses) for examples, losses in known]
        lines.append(plots.curve(look, [list(zip(grid.tolist(), repeat, strict=True)) for repeat in repeats]))
    labels = [
        result.schedule if result.schedule == NOISE else f"windows of {result.schedule}" for result in results
    ]
    return plots.alone(
        plots.curves(name, "validation loss", lines, log=True, xlabel="examples", labels=labels)
    )


def print_schedules(result: Schedules, console: Console) -> None:
    """A table a config, in Markdown: medians over the seeds, with least and most."""
    for name in dict.fromkeys(one.recipe for one in result.results):
        rows = [one for one in result.results if one.recipe == name]
        until = f"examples until validation loss {rows[0].target:.2f}"
        lines = [f"{name}, {len(rows[0].examples)} seeds", ""]
        lines += [f"| windows of | {until} | final loss | windows | last size | noise scale at the end |"]
        lines += ["|---|---|---|---|---|---|"]
        for one in rows:
            known = words.finite(one.noise_scale)
            cells = (
                one.schedule,
                words.spread(one.examples, words.count),
                words.spread(one.final_losses, "{:.2f}".format),
                words.spread(one.windows, words.count),
                words.spread(one.last_size, words.count),
                words.spread(known, words.count) if known else "beyond measure",
            )
            lines.append(f"| {' | '.join(cells)} |")
        console.print("\n".join([*lines, ""]), soft_wrap=True, markup=False)
    console.print("\n".join(result.pictures))
