"""`gradacc bench budgets`: the table of configs/README.md: what each recipe takes under each budget file.

Predicted by `gradacc plan`; on the CPU measured as well, in a process of its own for each recipe.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console

from gradacc_hf.bench.all_recipes import offline_configs
from gradacc_hf.bench.cpu_speed import Variant, VariantFailedError, run_windows
from gradacc_hf.errors import InputError, listed
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.run.plan import Plan, make_plan
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.utils.paths import bundle_root

GIB = 2**30
WINDOWS = 2  # measured, after one more
LARGE = ("--model.name", "embedded:decoder_1b", "--data.max_length", "1024")
LARGE_RUNS = {  # name: (config, settings); what a small card cannot hold
    "causal_lm, 1.2 B parameters": ("causal_lm", (*LARGE, "--model.lora.rank", "0")),
    "causal_lm, 1.2 B, LoRA 16": ("causal_lm", LARGE),
}


@dataclass(frozen=True)
class Cell:
    """A recipe under a budget; bytes of the largest micro-batch's step."""

    budget: str
    predicted: int
    available: int
    fits: bool
    accumulation_steps: float  # mean
    padding: float


@dataclass(frozen=True)
class Row:
    """A recipe under all budgets. `measured`: the peak of a process on the CPU; None where none was run."""

    name: str
    model: str
    cells: tuple[Cell, ...]
    measured: int | None


@dataclass(frozen=True)
class Budgets:
    """All recipes."""

    rows: tuple[Row, ...]
    measured_with: dict[str, str]


def budget_names() -> list[str]:
    """The budget files, the CPU's first, then by memory."""
    names = [file.stem for file in (bundle_root() / "configs/budgets").glob("*.yaml")]
    return sorted(names, key=lambda name: int("".join(filter(str.isdigit, name)) or 0))


def budgets(only: Sequence[str] = (), progress: Callable[[list[str]], Iterable[str]] = iter) -> Budgets:
    """Plan each offline config, and the large runs, under each budget. Raises InputError."""
    runs = {name: (str(file), ()) for name, file in offline_configs().items()}
    runs |= {name: (runs[config][0], settings) for name, (config, settings) in LARGE_RUNS.items()}
    if unknown := sorted(set(only) - set(runs)):
        raise InputError(f"--only: found {unknown[0]!r}; allowed: {listed(runs)}")
    rows = tuple(_row(name, *runs[name]) for name in progress([n for n in runs if n in only or not only]))
    return Budgets(rows, measured_with("cpu"))


def _row(name: str, config: str, settings: Sequence[str]) -> Row:
    cells = []
    recipe = load_recipe(["--config", config, *settings]).weightless()
    data, model = recipe.datasets(), recipe.config.model.name
    for budget in budget_names():
        under = load_recipe(["--config", config, "--budget", budget, *settings]).config
        cells.append(_cell(budget, make_plan(recipe.with_config(under), data=data, with_levers=False)))
    measured = None
    if not settings:
        try:
            measured = run_windows(config, WINDOWS, Variant())["peak_memory_bytes"]
        except VariantFailedError as error:
            raise InputError(f"{name}: {error}") from error
    return Row(name, model, tuple(cells), measured)


def _cell(budget: str, plan: Plan) -> Cell:
    steps = plan.steps
    return Cell(budget, plan.parts.total, plan.memory, plan.fits, steps.accumulation_steps[1], steps.padding)


def print_budgets(result: Budgets, console: Console) -> None:
    """A table in Markdown."""
    names = [cell.budget for cell in result.rows[0].cells]
    lines = ["| recipe, model | " + " | ".join(f"`{name}`" for name in names) + " | `cpu`, measured |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for row in result.rows:
        cells = [_words(cell) for cell in row.cells]
        measured = "–" if row.measured is None else f"{row.measured / GIB:.1f} GiB"
        lines.append(f"| {row.name}, `{row.model}` | " + " | ".join([*cells, measured]) + " |")
    console.print("\n".join(lines), soft_wrap=True, markup=False)


def _words(cell: Cell) -> str:
    if not cell.fits:
        return f"**out of memory**: {cell.predicted / GIB:.1f} GiB"
    return f"{cell.predicted / GIB:.1f} GiB · {cell.accumulation_steps:.1f} · {cell.padding:.0%}"
