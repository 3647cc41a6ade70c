"""Progress bars of the benchmarks, on stderr, because stdout is for the result."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import track

Progress = Callable[[Sequence[Any]], Iterable[Any]]
"""A function that yields the elements of a sequence, and may show the progress. `iter` shows nothing."""


def progress_bar(name: str) -> Progress:
    """Return a Progress that draws a bar with this name and removes the bar at the end."""

    def progress(steps: Sequence[Any]) -> Iterable[Any]:
        return track(steps, name, console=Console(stderr=True), transient=True)

    return progress
