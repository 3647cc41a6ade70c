"""The record of a training loop: the observed windows and micro-batches.

`observer.py` fills the record. `reference.py` adds the comparison of each window's gradient. `rules.py` reads
the record.
"""

import linecache
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a forward: positional, by name
LOSS_RTOL_FP32 = 1e-4  # relative difference of two losses or gradients up to which rounding explains it
LOSS_RTOL_16_BIT = 2e-2  # the same, under autocast or with weights in 16 bits


@dataclass(frozen=True)
class Place:
    """A line of the user's code."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{os.path.relpath(self.file)}:{self.line}"

    @property
    def code(self) -> str:
        """The text of the line; "" if the file cannot be read."""
        return linecache.getline(self.file, self.line).strip()


@dataclass(frozen=True)
class Forward:
    """A forward of the model. The outputs are not stored, because they keep the activations alive."""

    inputs: Inputs
    loss: float | None  # computed by the model itself
    place: Place | None


@dataclass(frozen=True)
class TorchLoss:
    """A torch function that computed a loss from the model's output: `function(output, *others, **named)`."""

    function: Callable[..., torch.Tensor]
    others: tuple[Any, ...]
    named: dict[str, Any]
    shape: tuple[int, ...] | None  # of the first argument; None if it is not the model's output
    rows: tuple[int, ...]  # shape of the model's output, without the last dimension
    value: float


@dataclass(frozen=True)
class LossRead:
    """A tensor that the loop read as a number."""

    value: float
    place: Place | None


@dataclass
class ObservedMicroBatch:
    """A backward, with the forwards before it. Norms are of all gradients of the optimizer together."""

    forwards: list[Forward]
    torch_loss: TorchLoss | None
    divided_by: float | None  # observed loss ÷ the loss that went backward; None if no loss was observed
    place: Place | None
    norm_before: float
    norm_after: float
    lr: float
    synchronised: bool | None  # whether DDP synchronised the processes; None without DDP
    data_pass: int  # passes over the training data begun so far
    touched: list[tuple[str, Place | None]] = field(default_factory=list)  # later changes of gradients

    @property
    def forward(self) -> Forward | None:
        """The only forward of this backward; None if there were several."""
        return self.forwards[0] if len(self.forwards) == 1 else None


@dataclass(frozen=True)
class GradientComparison:
    """The loop's gradient g compared with a reference r: ‖g‖ / ‖r‖, and the cosine of the angle."""

    ratio: float
    cosine: float

    def error(self) -> float:
        """‖g − r‖ / ‖r‖."""
        return max(0.0, self.ratio**2 - 2 * self.ratio * self.cosine + 1) ** 0.5


@dataclass(frozen=True)
class WindowComparison:
    """The gradient of a window, compared with the gradient of the same examples in one batch.

    why_not: reason why the window was not recomputed; "" if it was.
    whole: the loop's gradient, compared with the gradient of the whole window.
    means: the loop's gradient, compared with the mean of the micro-batches' gradients; None if not computed.
    losses: recomputed losses of the micro-batches.
    whole_loss: recomputed loss of the whole window.
    items: items of each micro-batch, if weighing by these items gives the loss of the whole window.
    counted: name of the item count.
    coupled: reason why no item count gives the loss of the whole window.
    swamped: relative error of the sum in 16 bits.
    half: whether the loop computes in 16 bits, which needs a larger tolerance.
    """

    why_not: str = ""
    whole: GradientComparison | None = None
    means: GradientComparison | None = None
    losses: tuple[float, ...] = ()
    whole_loss: float = 0.0
    items: tuple[float, ...] = ()
    counted: str = ""
    coupled: str = ""
    swamped: float | None = None
    half: bool = False

    @property
    def tolerance(self) -> float:
        """Relative difference up to which rounding explains it."""
        return LOSS_RTOL_16_BIT if self.half else LOSS_RTOL_FP32


@dataclass
class ObservedWindow:
    """All backwards between two steps of the optimizer."""

    micro_batches: list[ObservedMicroBatch]
    norm_at_step: float
    lr: float
    place: Place | None  # of the step
    reads: list[LossRead]
    requested_steps: int | None  # accumulation steps set in Accelerate at that time
    comparison: WindowComparison | None = None
    norm_after_step: float | None = None  # at the start of the next backward
    touched_after: list[tuple[str, Place | None]] = field(default_factory=list)  # after the step

    def __len__(self) -> int:
        return len(self.micro_batches)


@dataclass
class LoopRecord:
    """All observations of a loop; the findings are derived from it.

    intended: accumulation steps stated by the user; None if not stated.
    windows: the completed windows that were observed.
    unstepped: backwards at the end of the loop that no step followed.
    pass_lengths: micro-batches of each pass over the training data; None for a stream.
    schedule_length: steps in the schedule of the learning rate; None if unknown.
    driver: the library that calls backward, "trainer" or "accelerate"; "" if the loop calls it.
    autocast: the type of autocast; None without autocast.
    logged: pairs of step number and loss that Trainer logged.
    """

    intended: int | None = None
    windows: list[ObservedWindow] = field(default_factory=list)
    unstepped: Sequence[ObservedMicroBatch] = ()
    pass_lengths: list[int | None] = field(default_factory=list)
    schedule_length: int | None = None
    driver: str = ""
    autocast: torch.dtype | None = None
    logged: list[tuple[int, float]] = field(default_factory=list)

    @property
    def pass_length(self) -> int | None:
        """Micro-batches of the first pass with a known length; None if no length is known."""
        return next((length for length in self.pass_lengths if length), None)

    @property
    def steps(self) -> int:
        """The most frequent number of micro-batches above 1 in a window; 1 if no window accumulates."""
        counts = Counter(map(len, self.windows))
        return max(counts, key=lambda steps: (steps > 1, counts[steps], steps), default=0)

    @property
    def full(self) -> list[ObservedWindow]:
        """The windows with `steps` micro-batches."""
        return [window for window in self.windows if len(window) == self.steps]

    @property
    def compared(self) -> list[tuple[ObservedWindow, WindowComparison]]:
        """The windows that were recomputed."""
        pairs = ((window, window.comparison) for window in self.windows)
        return [(window, found) for window, found in pairs if found is not None and found.whole is not None]

    @property
    def between(self) -> list[tuple[ObservedMicroBatch, ObservedMicroBatch]]:
        """Pairs of backwards that follow each other in a full window."""
        return [pair for window in self.full for pair in pairwise(window.micro_batches)]
