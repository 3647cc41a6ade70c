"""`gradacc bench recipes`: the table in recipes/README.md, measured.

Runs every offline config as its user does, in a process of its own, one after another; reads what the run
says of itself and asks the saved model the recipe's example.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from gradacc_hf.errors import InputError, listed, one_line
from gradacc_hf.recipe.loading import open_run
from gradacc_hf.run.predict import load_model, predict
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.utils.paths import bundle_root

SUFFIX = "_offline"


@dataclass(frozen=True)
class RecipeResult:
    """One offline run. Metrics are of its best evaluation."""

    recipe: str
    data: str
    training_examples: int
    model: str
    metric: str  # the one that says which evaluation is the best
    value: float
    baseline: float | None
    windows: int
    seconds: float  # of the whole process: loading, training, evaluation, report
    example: Any
    answer: dict[str, Any] | None  # None where the recipe has no example


@dataclass(frozen=True)
class Recipes:
    """All of them."""

    results: tuple[RecipeResult, ...]
    measured_with: dict[str, str]


def offline_configs() -> dict[str, Path]:
    """Recipe → its offline config."""
    files = sorted((bundle_root() / "configs").glob(f"*{SUFFIX}.yaml"))
    return {file.stem.removesuffix(SUFFIX): file for file in files}


def recipes(names: Sequence[str] = (), windows: int | None = None, progress: Any = iter) -> Recipes:
    """Run the recipes of these names, or all; at most `windows` windows each. Raises InputError."""
    known = offline_configs()
    for name in names:
        if name not in known:
            raise InputError(f"--only: found {name!r}; allowed: {listed(known)}")
    chosen: Iterable[str] = progress(list(names or known))
    results = tuple(_run(name, known[name], windows) for name in chosen)
    return Recipes(results, measured_with())


def _run(name: str, config: Path, windows: int | None) -> RecipeResult:
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
        no_file = recipe.pipeline_tag != "image-classification"
        asked = [("the recipe's example", recipe.example)] if no_file else []
        answer = next(predict(recipe, load_model(recipe, run), asked), None)
        return RecipeResult(
            recipe=name,
            data=recipe.config.data.train,
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


def print_recipes(result: Recipes, console: Console) -> None:
    """The table, in Markdown; then what each saved model says to its recipe's example."""
    lines = ["| recipe | data | model | offline result | baseline | time |", "|---|---|---|---|---|---|"]
    for one in result.results:
        baseline, value = "–" if one.baseline is None else f"{one.baseline:.3f}", one.value or math.nan
        lines.append(
            f"| [`{one.recipe}`]({one.recipe}.py) | `{one.data}`, {one.training_examples:,} examples "
            f"| `{one.model}` | {one.metric} {value:.3f} after {one.windows:,} windows | {baseline} "
            f"| {one.seconds:.0f} s |"
        )
    for one in (row for row in result.results if row.answer is not None):
        asked = one.example if isinstance(one.example, str) else json.dumps(one.example, ensure_ascii=False)
        lines += ["", f"{one.recipe}: {asked}", json.dumps(one.answer, ensure_ascii=False)]
    console.print("\n".join(lines), soft_wrap=True, markup=False)
