"""Print a verification: the ways to accumulate in a table, the reasons for errors, and the verdict."""

import io

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gradacc_hf.errors import listed
from gradacc_hf.verification.exactness import Verification

WIDTH_COLUMNS = 100
"""Width of the text of `print(verify(...))`, in characters."""


def print_verification(result: Verification, console: Console) -> None:
    """Print the comparisons, the parameters with the largest errors, the reasons, and the verdict."""
    compared = f"{result.windows} window{'s' * (result.windows > 1)}"
    if result.windows < result.windows_read:
        next_windows = f"{result.windows} of the next {result.windows_read} windows"
        compared = f"{next_windows}, chosen for different labels and unequal micro-batches"
    console.print(
        f"{compared}\n{result.examples} examples, split into {listed(result.accumulation_steps)} "
        f"micro-batches\nreference gradient: {result.reference}"
    )
    table = Table("gradient of", box=SIMPLE)
    for header in ("relative error", "norm ÷ reference", "cosine", ""):
        table.add_column(header, justify="right")
    ways = [way for way in (result.loop, result.exact_trainer, result.trainer) if way is not None]
    for way in ways:
        row = (f"{way.error:.1e}", f"{way.norm_ratio:.4f}", f"{way.cosine:.6f}")
        table.add_row(way.way, *row, "exact" if way.exact else "not exact")
    console.print(table)
    for way in ways:
        if not way.exact:
            worst = listed(f"{name} {error:.1e}" for name, error in way.worst)
            console.print(f"largest relative errors of {way.way}, by parameter: {worst}")
    if result.trainer_failed:
        console.print(f"Trainer could not be compared: {result.trainer_failed}", markup=False)
    for reason in result.reasons:
        console.print(f"why: {reason.what}\nwhat to do: {reason.cure}", style="bold", markup=False)
    console.print(result.verdict, style="green" if result.exact else "red", markup=False)
    console.print("measured with " + listed(f"{k} {v}" for k, v in result.measured_with.items()))


def as_text(result: Verification) -> str:
    """Return what `print_verification` prints, without colours."""
    text = io.StringIO()
    console = Console(file=text, width=WIDTH_COLUMNS, highlight=False, color_system=None)
    print_verification(result, console)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
