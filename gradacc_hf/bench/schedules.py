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
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console

from gradacc_hf.bench.every_recipe import offline_configs
from gradacc_hf.embedded.smollm2 import write_tiny_llama
from gradacc_hf.errors import BadInput, listed, one_line
from gradacc_hf.open_recipe import load_recipe
from gradacc_hf.report import plots
from gradacc_hf.runlog import measured_with, read_history
from gradacc_hf.saving import write_whole

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
    """Run these configs, or all that have examples here, with each schedule; raises BadInput."""
    for name in names:
        if name not in TASKS:
            raise BadInput(f"--only: found {name!r}; allowed: {listed(TASKS)}")
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
        found = {s: [_read(_folder(folder, name, s, seed)) for seed in range(seeds)] for s in ways[name]}
        target = max(min(loss for _, loss in run["curve"]) for runs in found.values() for run in runs)
        for schedule, runs in found.items():
            results.append(
                OfSchedule(
                    recipe=name,
                    schedule=schedule,
                    target=target,
                    examples=tuple(_needed(run["curve"], target) for run in runs),
                    final_losses=tuple(run["curve"][-1][1] for run in runs),
                    windows=tuple(run["windows"] for run in runs),
                    last_size=tuple(run["size"] for run in runs),
                    noise_scale=tuple(run["noise"] for run in runs),
                    curves=tuple(tuple(run["curve"]) for run in runs),
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
        raise BadInput(f"{run}: {one_line(ValueError(done.stderr))[-300:]}")
    for saved in ("best", "last"):
        shutil.rmtree(run / saved, ignore_errors=True)


def _read(run: Path) -> dict[str, Any]:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    rows = read_history(run / "history.jsonl", sys.maxsize)
    done = np.cumsum([0, *(row.examples for row in rows)])
    return {
        "curve": [(float(done[int(e["window"])]), float(e["loss"])) for e in summary["evaluations"]],
        "windows": len(rows),
        "size": max(row.examples for row in rows[-2:]),
        "noise": rows[-1].noise_scale if math.isfinite(rows[-1].noise_scale) else None,
    }


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
            known = [scale for scale in one.noise_scale if scale is not None]
            cells = (
                one.schedule,
                _spread(one.examples, ",.0f"),
                _spread(one.final_losses, ".2f"),
                _spread(one.windows, ",.0f"),
                _spread(one.last_size, ",.0f"),
                _spread(known, ",.0f") if known else "beyond measure",
            )
            lines.append(f"| {' | '.join(cells)} |")
        console.print("\n".join([*lines, ""]), soft_wrap=True, markup=False)
    console.print("\n".join(result.pictures))


def _spread(values: Sequence[float], form: str) -> str:
    least, most = format(min(values), form), format(max(values), form)
    middle = format(median(values), form)
    return middle if least == most else f"{middle} ({least}–{most})"
