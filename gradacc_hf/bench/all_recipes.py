"""`gradacc bench recipes`: the table of the recipes in README.md, measured.

Run each offline config in a separate process, one after another. Read the figures from the run's files, and
predict the recipe's example with the saved model.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from gradacc_hf.bench.offline import check_names, offline_configs
from gradacc_hf.bench.progress import Progress
from gradacc_hf.errors import InputError, one_line
from gradacc_hf.recipe.loading import open_run
from gradacc_hf.run.predict import Input, load_model, predict
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.utils.paths import bundle_root


@dataclass(frozen=True)
class OfflineRun:
    """One offline run. The metric comes from the best evaluation of the run."""

    recipe: str
    data: str
    training_examples: int
    model: str
    metric: str  # selects the best evaluation
    value: float
    baseline: float | None
    windows: int
    seconds: float  # loading, training, evaluation and report
    example: Any
    answer: dict[str, Any] | None  # None if the recipe has no example


@dataclass(frozen=True)
class RecipesResult:
    """All offline runs."""

    results: tuple[OfflineRun, ...]
    measured_with: dict[str, str]


def measure_recipes(
    names: Sequence[str] = (), windows: int | None = None, progress: Progress = iter
) -> RecipesResult:
    """Run the recipes of these names, or all, for at most `windows` windows each. Raises InputError."""
    known = offline_configs()
    check_names(names, known)
    runs = tuple(_run(name, known[name], windows) for name in progress(list(names or known)))
    return RecipesResult(runs, measured_with())


def _run(name: str, config: Path, windows: int | None) -> OfflineRun:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, str(bundle_root() / "recipes" / f"{name}.py"), "--config", str(config)]
        command += ["--output.dir", str(run), "--output.tracker", "none"]
        command += ["--train.max_windows", str(windows)] if windows else []
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - started
        if done.returncode:
            raise InputError(f"{name}: {one_line(ValueError(done.stderr))[-300:]}")
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        recipe = open_run(run)
        metric = recipe.config.train.best_metric
        takes_text = recipe.pipeline_tag != "image-classification"
        inputs = [Input("the recipe's example", recipe.example)] if takes_text else []
        answer = next(predict(recipe, load_model(recipe, run), inputs), None)
        return OfflineRun(
            recipe=name,
            data=str(recipe.config.data.train),
            training_examples=summary["card"]["training_examples"],
            model=recipe.config.model.name,
            metric=metric,
            value=summary["best"][metric],
            baseline=(summary["baseline"] or {}).get(metric),
            windows=summary["windows"],
            seconds=seconds,
            example=recipe.example,
            answer=answer,
        )


def print_recipes(result: RecipesResult, console: Console) -> None:
    """Print the table in Markdown, then each recipe's example with the saved model's prediction."""
    lines = ["| recipe | data | model | offline result | baseline | time |", "|---|---|---|---|---|---|"]
    for one in result.results:
        baseline, value = "–" if one.baseline is None else f"{one.baseline:.3f}", one.value or math.nan
        lines.append(
            f"| `{one.recipe}` | `{one.data}`, {one.training_examples:,} examples "
            f"| `{one.model}` | {one.metric} {value:.3f} after {one.windows:,} windows | {baseline} "
            f"| {one.seconds:.0f} s |"
        )
    for one in (row for row in result.results if row.answer is not None):
        asked = one.example if isinstance(one.example, str) else json.dumps(one.example, ensure_ascii=False)
        lines += ["", f"{one.recipe}: {asked}", json.dumps(one.answer, ensure_ascii=False)]
    console.print("\n".join(lines), soft_wrap=True, markup=False)
