"""`gradacc bench budgets`: the memory of each recipe under each budget file, a table of README.md.

`gradacc plan` predicts the memory. On the CPU, each recipe is also measured, in a separate process.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from gradacc_hf.bench.cpu_speed import Variant, VariantFailedError, time_windows
from gradacc_hf.bench.offline import check_names, offline_configs
from gradacc_hf.bench.progress import Progress
from gradacc_hf.errors import InputError
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.run.plan import Plan, make_plan
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.utils.paths import bundle_root

GIB = 2**30
MEASURED_WINDOWS = 2  # after one window to warm up
LARGE = ("--model.name", "embedded:decoder_1b", "--data.max_length", "1024")
LARGE_RUNS = {  # name: (config, settings); too large for a small GPU
    "causal_lm, 1.2 B parameters": ("causal_lm", (*LARGE, "--model.lora.rank", "0")),
    "causal_lm, 1.2 B, LoRA 16": ("causal_lm", LARGE),
}


@dataclass(frozen=True)
class BudgetedRun:
    """A recipe under a budget: bytes of the step with the largest micro-batch."""

    budget: str
    predicted: int
    available: int
    fits: bool
    accumulation_steps: float  # mean
    padding: float


@dataclass(frozen=True)
class BudgetedRecipe:
    """A recipe under all budgets. `measured` is the peak of a process on the CPU, or None if not measured."""

    name: str
    model: str
    cells: tuple[BudgetedRun, ...]
    measured: int | None


@dataclass(frozen=True)
class BudgetsResult:
    """All recipes under all budgets."""

    rows: tuple[BudgetedRecipe, ...]
    measured_with: dict[str, str]


def budget_names() -> list[str]:
    """Return the names of the budget files: the CPU's first, then by memory."""
    names = [file.stem for file in (bundle_root() / "configs/budgets").glob("*.yaml")]
    return sorted(names, key=lambda name: int("".join(filter(str.isdigit, name)) or 0))


def measure_budgets(only: Sequence[str] = (), progress: Progress = iter) -> BudgetsResult:
    """Plan each offline config, and the large runs, under each budget. Raises InputError."""
    runs = {name: (str(file), ()) for name, file in offline_configs().items()}
    runs |= {name: (runs[config][0], settings) for name, (config, settings) in LARGE_RUNS.items()}
    check_names(sorted(only), runs)
    rows = tuple(_row(name, *runs[name]) for name in progress([n for n in runs if n in only or not only]))
    return BudgetsResult(rows, measured_with("cpu"))


def _row(name: str, config: str, settings: Sequence[str]) -> BudgetedRecipe:
    cells = []
    recipe = load_recipe(["--config", config, *settings]).weightless()
    data, model = recipe.datasets(), recipe.config.model.name
    for budget in budget_names():
        under = load_recipe(["--config", config, "--budget", budget, *settings]).config
        cells.append(_cell(budget, make_plan(recipe.with_config(under), data=data, with_levers=False)))
    measured = None
    if not settings:
        try:
            measured = time_windows(config, MEASURED_WINDOWS, Variant())["peak_memory_bytes"]
        except VariantFailedError as error:
            raise InputError(f"{name}: {error}") from error
    return BudgetedRecipe(name, model, tuple(cells), measured)


def _cell(budget: str, plan: Plan) -> BudgetedRun:
    steps = plan.steps
    return BudgetedRun(
        budget, plan.parts.total, plan.memory, plan.fits, steps.accumulation_steps[1], steps.padding
    )


def print_budgets(result: BudgetsResult, console: Console) -> None:
    """Print a table in Markdown."""
    names = [cell.budget for cell in result.rows[0].cells]
    lines = ["| recipe, model | " + " | ".join(f"`{name}`" for name in names) + " | `cpu`, measured |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for row in result.rows:
        cells = [_cell_text(cell) for cell in row.cells]
        measured = "–" if row.measured is None else f"{row.measured / GIB:.1f} GiB"
        lines.append(f"| {row.name}, `{row.model}` | " + " | ".join([*cells, measured]) + " |")
    console.print("\n".join(lines), soft_wrap=True, markup=False)


def _cell_text(cell: BudgetedRun) -> str:
    if not cell.fits:
        return f"**out of memory**: {cell.predicted / GIB:.1f} GiB"
    return f"{cell.predicted / GIB:.1f} GiB · {cell.accumulation_steps:.1f} · {cell.padding:.0%}"
