"""`gradacc bench schedules`: the examples that a run needs, with fixed and changing sizes of windows.

Each offline config runs with four sizes of windows:

- a quarter of the config's size
- the config's size
- a size that grows by a schedule
- a size that follows the noise scale

All runs train on the same examples, with a learning rate proportional to the square root of the size. The
causal language model is a tiny Llama trained from scratch, which is fast. An existing run is not repeated.
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

import numpy as np
from rich.console import Console

from gradacc_hf.bench.offline import check_names, offline_configs
from gradacc_hf.bench.progress import Progress
from gradacc_hf.embedded.smollm2 import write_tiny_llama
from gradacc_hf.errors import InputError, one_line
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.report import narrative, plots
from gradacc_hf.report.runs import RecordedRun, read_runs
from gradacc_hf.training.run_log import finite, measured_with
from gradacc_hf.utils.files import write_whole

TINY = "tiny_llama"
NOISE = "by the noise scale"
TASKS: dict[str, tuple[int, list[str]]] = {  # recipe: (size of windows, settings added to the offline config)
    "text_classification": (64, []),
    "causal_lm": (32, ["--model.name", TINY, "--model.lora.rank", "0", "--data.max_length", "96"]),
}
EVALUATIONS_PER_RUN = 8  # approximately
POINTS_PER_LINE = 40


@dataclass(frozen=True)
class ScheduleRuns:
    """The runs of one config with one schedule. Tuples have one element per seed.

    `examples`: number of examples until the validation loss reaches `target`.
    """

    recipe: str
    schedule: str
    target: float
    examples: tuple[float, ...]
    final_losses: tuple[float, ...]
    windows: tuple[int, ...]
    last_size: tuple[int, ...]
    noise_scale: tuple[float | None, ...]  # at the end; None if too large to measure
    curves: tuple[tuple[tuple[float, float], ...], ...]  # (examples, validation loss) of each evaluation


@dataclass(frozen=True)
class SchedulesResult:
    """All configs with all schedules. `pictures` are files."""

    results: tuple[ScheduleRuns, ...]
    pictures: tuple[str, ...]
    measured_with: dict[str, str]


def measure_schedules(
    names: Sequence[str], seeds: int, folder: Path, progress: Progress = iter
) -> SchedulesResult:
    """Run these configs of `TASKS`, or all, with each schedule. Raises InputError."""
    check_names(names, TASKS)
    chosen = list(names or TASKS)
    tiny = folder / TINY
    if not tiny.exists():
        tiny.mkdir(parents=True)
        write_tiny_llama(tiny)
    flags = {name: [str(tiny) if word == TINY else word for word in TASKS[name][1]] for name in chosen}
    by_config = {
        name: schedule_flags(TASKS[name][0], _training_examples(name, flags[name])) for name in chosen
    }
    todo = [(name, label, seed) for seed in range(seeds) for name in chosen for label in by_config[name]]
    for name, label, seed in progress(todo):
        _run(name, [*flags[name], *by_config[name][label]], _folder(folder, name, label, seed), seed)
    results, pictures = [], []
    for name in chosen:
        runs = {
            label: read_runs([_folder(folder, name, label, seed) for seed in range(seeds)])
            for label in by_config[name]
        }
        of_config = _summaries(name, runs)
        picture = folder / f"{name}.svg"
        write_whole(picture, _picture(name, of_config))
        results += of_config
        pictures.append(str(picture))
    return SchedulesResult(tuple(results), tuple(pictures), measured_with())


def _summaries(name: str, by_schedule: dict[str, list[RecordedRun]]) -> list[ScheduleRuns]:
    """Summarise the runs of a config. The target is the lowest loss that all runs reach."""
    all_runs = [run for runs in by_schedule.values() for run in runs]
    target = max(min(loss for _, loss in _curve(run)) for run in all_runs)
    found = []
    for schedule, runs in by_schedule.items():
        curves = tuple(tuple(_curve(run)) for run in runs)
        found.append(
            ScheduleRuns(
                recipe=name,
                schedule=schedule,
                target=target,
                examples=tuple(examples_until(target, curve) for curve in curves),
                final_losses=tuple(curve[-1][1] for curve in curves),
                windows=tuple(run.windows for run in runs),
                last_size=tuple(int(run.window_size) for run in runs),
                noise_scale=tuple(finite([run.noise_scale for run in runs])),
                curves=curves,
            )
        )
    return found


def _training_examples(name: str, flags: Sequence[str]) -> int:
    recipe = load_recipe(["--config", str(offline_configs()[name]), *flags])
    return len(recipe.datasets()[0])


def schedule_flags(size: int, examples: int) -> dict[str, list[str]]:
    """Return the flags of each schedule, by label. Sizes are `size`, a half and a quarter of `size`."""
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
    every = {label: max(1, examples // EVALUATIONS_PER_RUN // usual) for label, (_, usual) in sizes.items()}
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
    """Return (examples, validation loss) of each evaluation."""
    done = [0, *accumulate(row.examples for row in run.rows)]
    return [(float(done[int(each["window"])]), each["loss"]) for each in run.evaluations]


def examples_until(target: float, curve: Sequence[tuple[float, float]]) -> float:
    """Return the examples at which the loss first reaches the target, interpolated linearly, or NaN."""
    for (before, high), (after, low) in pairwise(curve):
        if low <= target:
            return before + (after - before) * (max(high, target) - target) / max(high - low, 1e-12)
    return curve[0][0] if curve[0][1] <= target else math.nan


def _picture(name: str, results: Sequence[ScheduleRuns]) -> str:
    """Draw the validation loss by examples: the median of the seeds, with the range."""
    lines = []
    for look, result in enumerate(results):
        last = min(curve[-1][0] for curve in result.curves)
        grid = np.linspace(0, last, POINTS_PER_LINE)
        known = (list(zip(*curve, strict=True)) for curve in result.curves)
        repeats = [np.interp(grid, examples, losses) for examples, losses in known]
        lines.append(plots.curve(look, [list(zip(grid.tolist(), repeat, strict=True)) for repeat in repeats]))
    labels = [
        result.schedule if result.schedule == NOISE else f"windows of {result.schedule}" for result in results
    ]
    return plots.alone(
        plots.curves(name, "validation loss", lines, log=True, xlabel="examples", labels=labels)
    )


def print_schedules(result: SchedulesResult, console: Console) -> None:
    """Print a table in Markdown for each config: medians over the seeds, with the range."""
    for name in dict.fromkeys(one.recipe for one in result.results):
        rows = [one for one in result.results if one.recipe == name]
        until = f"examples until the validation loss is {rows[0].target:.2f}"
        lines = [f"{name}, {len(rows[0].examples)} seeds", ""]
        lines += [f"| window size | {until} | final loss | windows | last size | noise scale at the end |"]
        lines += ["|---|---|---|---|---|---|"]
        for one in rows:
            known = narrative.finite(one.noise_scale)
            cells = (
                one.schedule,
                narrative.spread(one.examples, narrative.count),
                narrative.spread(one.final_losses, "{:.2f}".format),
                narrative.spread(one.windows, narrative.count),
                narrative.spread(one.last_size, narrative.count),
                narrative.spread(known, narrative.count) if known else "too large to measure",
            )
            lines.append(f"| {' | '.join(cells)} |")
        console.print("\n".join([*lines, ""]), soft_wrap=True, markup=False)
    console.print("\n".join(result.pictures))
