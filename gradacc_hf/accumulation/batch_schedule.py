"""Effective batch sizes that change during a run, and learning rates that follow them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

LrScaling = Literal["none", "linear", "sqrt"]


@runtime_checkable
class ExampleScheduler(Protocol):
    """A learning rate scheduler that counts examples, also in windows without an optimizer step."""

    by_examples: bool


def counts_examples(scheduler: Any) -> bool:
    """Whether a scheduler counts examples, and is therefore stepped after every window."""
    return isinstance(scheduler, ExampleScheduler) and scheduler.by_examples


@dataclass(frozen=True)
class ScheduledBatch:
    """Effective batch sizes that change at given windows.

    Args:
        sizes: Examples per window, by the number of earlier windows: {0: 32, 500: 64}.
    """

    sizes: Mapping[int, int]

    def __call__(self, number: int) -> int:
        return self.sizes[max(first for first in self.sizes if first <= number)]

    def __str__(self) -> str:
        (_, first), *later = sorted(self.sizes.items())
        return ", ".join([f"{first} examples a window", *(f"after {n} windows {size}" for n, size in later)])


@dataclass
class GrowingBatch:
    """An effective batch size that doubles once the gradient noise scale is at least the doubled size.

    Args:
        smallest: Examples of the first window.
        largest: Maximum examples per window.
        patience: Measurements in a row that must reach the doubled size, as a single one is noisy.
        sizes: Examples per window, by the number in the run of the first window of this size.
        in_a_row: Latest measurements in a row that reached the doubled size.
    """

    smallest: int
    largest: int
    patience: int = 4
    sizes: dict[int, int] = field(default_factory=dict)
    in_a_row: int = 0

    def __post_init__(self):
        if not 1 <= self.smallest <= self.largest:
            raise ValueError(
                f"GrowingBatch has smallest {self.smallest} and largest {self.largest}; "
                "allowed: 1 <= smallest <= largest"
            )
        self.sizes = self.sizes or {0: self.smallest}

    def __call__(self, number: int) -> int:
        return ScheduledBatch(self.sizes)(number)

    def __str__(self) -> str:
        return f"{self.smallest} to {self.largest} examples a window, by the noise scale"

    def grow(self, number: int, noise_scale: float) -> bool:
        """Record a measurement before the window of this number. Return whether this window is larger."""
        size = self(number)
        larger = min(2 * size, self.largest)
        self.in_a_row = self.in_a_row + 1 if noise_scale >= larger > size else 0
        if self.in_a_row < self.patience:
            return False
        self.sizes[number], self.in_a_row = larger, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the state that changes during a run, as numbers."""
        return {"sizes": dict(self.sizes), "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.sizes = {int(number): size for number, size in state["sizes"].items()}
        self.in_a_row = state["in_a_row"]


def lr_factor(rule: LrScaling, size: int, reference: int | None) -> float:
    """Return the factor that scales the learning rate of `reference` examples per window to `size` examples.

    Sources: Goyal et al. 2017 for "linear" (SGD); Krizhevsky 2014, and Malladi et al. 2022 for "sqrt" (Adam).
    """
    if rule == "none" or reference is None:
        return 1.0
    return size / reference if rule == "linear" else math.sqrt(size / reference)
