"""The record of a training loop: the observed windows and micro-batches.

`observer.py` fills the record. `reference.py` adds the comparison of each window's gradient. `rules.py` reads
the record.
"""

import linecache
import math
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
MODEL = "model"  # the function of a loss that the model returned
MODEL_WITH_NUMBER = "model, given a number"  # the same, if a number is among the inputs, as in Trainer


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
class ScheduleLines:
    """The lines that make a scheduler, and that step it or set the learning rate; None if not found."""

    made: Place | None = None
    stepped: Place | None = None


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
class LossTerm:
    """A loss in a backward.

    function: name of the torch function that computed it, MODEL or MODEL_WITH_NUMBER.
    weight: derivative of the tensor that went backward.
    items: counts of items, by name: of a mean, the count that it averages over; () if unknown.
    is_in_batch: whether the classes are the examples of the batch.
    number: identifies the loss, in all backwards that it enters.
    """

    function: str
    place: Place | None
    value: float
    weight: float
    items: tuple[tuple[str, float], ...]
    is_sum: bool
    is_in_batch: bool
    number: int = field(default=-1, compare=False)


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
    lr: tuple[float, ...]  # of each parameter group
    synchronised: bool | None  # whether DDP synchronised the processes; None without DDP
    data_pass: int  # passes over the training data begun so far
    terms: tuple[LossTerm, ...] = ()  # the losses in this backward
    is_complete: bool = False  # whether the terms make up all of the loss
    factors: tuple[float, ...] = ()  # numbers by which losses were multiplied before this backward
    root_factors: tuple[float, ...] = ()  # the last of them, by which the whole loss was multiplied
    weights_version: int = 0  # changes of the optimizer's weights so far
    model_version: int = 0  # changes with any weight of the model
    touched: list[tuple[str, Place | None]] = field(default_factory=list)  # later changes of gradients

    @property
    def losses(self) -> tuple[tuple[str, Place | None], ...]:
        """The losses in this backward, by function and line; the line of the backward if there are none."""
        return tuple((term.function, term.place) for term in self.terms) or (("", self.place),)

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
    adds_up: whether the losses of the micro-batches add up to the loss of the window.
    hook: the line of a hook that runs in each backward, and may change its gradient.
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
    adds_up: bool = False
    hook: Place | None = None

    @property
    def error(self) -> float:
        """The relative error of the loop's gradient; infinite if it was not compared."""
        return math.inf if self.whole is None else self.whole.error()

    @property
    def tolerance(self) -> float:
        """Relative difference up to which rounding explains it."""
        return LOSS_RTOL_16_BIT if self.half else LOSS_RTOL_FP32


@dataclass(frozen=True)
class GradientChange:
    """The changes of the gradient between the last backward of a window and the step.

    hand: factor by which the loop scaled it, without clipping to a norm; None if it changed otherwise.
    clip: factor of clipping to a norm.
    place: the first line that changed it by hand.
    scaled: factor by which the loop scaled it before it changed it otherwise; None if both were mixed.
    """

    hand: float | None = 1.0
    clip: float = 1.0
    place: Place | None = None
    how: str = ""
    scaled: float | None = 1.0

    @property
    def is_set(self) -> bool:
        """Whether the loop set another gradient, perhaps from the gradients of several backwards."""
        return self.hand is None and self.how in ("replaced", "copy_")


@dataclass(frozen=True)
class Discarded:
    """Backwards whose gradient was zeroed before the window.

    why: "other_loss", "other_weights", "not_finite", "dropped", "skipped" or "copied".
    """

    why: str
    micro_batches: tuple[ObservedMicroBatch, ...]


@dataclass(frozen=True)
class Weighing:
    """The verdict about the weights of the losses in a window.

    verdict: "exact", or the names of the findings, joined by "+"; "" if the weights do not tell.
    why_not: the reason, if they do not tell.
    sum: the sum of the weights of the main loss over the window.
    items: items of the micro-batches, in the main loss.
    counted: name of the item count.
    place: the line of the backward.
    """

    verdict: str = ""
    why_not: str = ""
    sum: float = 0.0
    items: tuple[float, ...] = ()
    counted: str = ""
    place: Place | None = None

    @property
    def faults(self) -> set[str]:
        """The names of the findings."""
        return set(self.verdict.split("+")) - {"exact", ""}


def groups_of(micro_batches: Sequence[ObservedMicroBatch], by_line: bool) -> list[list[ObservedMicroBatch]]:
    """Group micro-batches by their losses. A micro-batch with a part of the losses belongs to the same group.

    by_line: whether losses of the same function in two lines differ.
    """
    losses = [frozenset(m.losses if by_line else [name for name, _ in m.losses]) for m in micro_batches]
    heads: list[frozenset] = []
    for some in sorted(dict.fromkeys(losses), key=len, reverse=True):  # of equal length: in order
        if not any(some <= head for head in heads):
            heads.append(some)
    of = [next(i for i, head in enumerate(heads) if some <= head) for some in losses]
    groups = [[m for m, i in zip(micro_batches, of, strict=True) if i == n] for n in range(len(heads))]
    return [group for group in groups if group]


SAME_NORM_RTOL = 1e-3  # relative change of a norm up to which it counts as unchanged


def _is_kept(before: ObservedMicroBatch, after: ObservedMicroBatch) -> bool:
    return abs(after.norm_before - before.norm_after) <= SAME_NORM_RTOL * before.norm_after


@dataclass
class ObservedWindow:
    """All backwards between two steps of the optimizer that reach its parameters."""

    micro_batches: list[ObservedMicroBatch]
    norm_at_step: float
    lr: tuple[float, ...]
    place: Place | None  # of the step
    reads: list[LossRead]
    requested_steps: int | None  # accumulation steps set in Accelerate at that time
    change: GradientChange = GradientChange()
    before_change: Sequence[torch.Tensor | None] | None = None  # the gradient before that change by hand
    unscaled: float = 1.0  # factor by which a gradient scaler divided, between the last backward and the step
    weights_changed: bool = False  # any weight of the model, between the first backward and the step
    other_weights: Sequence[tuple[torch.nn.Parameter, torch.Tensor]] = ()  # another optimizer's, before
    discarded: list[Discarded] = field(default_factory=list)
    comparison: WindowComparison | None = None
    norm_after_step: float | None = None  # at the start of the next backward
    touched_after: list[tuple[str, Place | None]] = field(default_factory=list)  # after the step

    @property
    def is_intact(self) -> bool:
        """Whether the gradient at the last backward is the sum of all backwards of the window."""
        first, pairs = self.micro_batches[0], pairwise(self.micro_batches)
        return first.norm_before == 0 and all(_is_kept(before, after) for before, after in pairs)

    @property
    def alternates(self) -> bool:
        """Whether the micro-batches have different losses, each divided by the number of all of them."""
        many = len(self.micro_batches)
        is_divided = all(
            any(abs(f * many - 1) <= LOSS_RTOL_FP32 for f in m.root_factors) for m in self.micro_batches
        )
        return is_divided and len(groups_of(self.micro_batches, by_line=True)) > 1

    def __len__(self) -> int:
        """The number of micro-batches: of backwards of the same loss, or of all if losses alternate."""
        if self.alternates:
            return len(self.micro_batches)
        fine = [len(group) for group in groups_of(self.micro_batches, by_line=True)]
        is_even = len(set(fine)) == 1 and fine[0] > 1
        return max(fine if is_even else map(len, groups_of(self.micro_batches, by_line=False)))


@dataclass
class LoopRecord:
    """All observations of a loop; the findings are derived from it.

    intended: accumulation steps stated by the user; None if not stated.
    windows: the completed windows that were observed.
    unstepped: backwards at the end of the loop that no step followed.
    pass_lengths: micro-batches of each pass over the training data; None for a stream.
    schedule_length: steps in the schedule of the learning rate; None if unknown.
    driver: the library that calls backward, "trainer" or "accelerate"; "" if the loop calls it.
    sampling: `train_sampling_strategy` of Trainer, or "".
    autocast: the type of autocast; None without autocast.
    is_stream: whether the loop reads the data as a stream, so that a window may continue in the next pass.
    has_several_loaders: whether several loaders give batches at the same time.
    unseen_steps: steps after no backward that reached the optimizer.
    later: irregular windows after the observed ones; only the weights of their losses are known.
    schedule: the lines of the scheduler.
    optimizer: the class of the optimizer.
    has_batch_norm: whether a BatchNorm normalises with the statistics of the micro-batch.
    stopped_early: whether observing ended before the end of a pass over the data.
    logged: pairs of step number and loss that Trainer logged.
    mixed_rows: change of later examples of a packed row with the first one, and the line of the forward.
    """

    intended: int | None = None
    windows: list[ObservedWindow] = field(default_factory=list)
    unstepped: Sequence[ObservedMicroBatch] = ()
    pass_lengths: list[int | None] = field(default_factory=list)
    schedule_length: int | None = None
    driver: str = ""
    sampling: str = ""
    autocast: torch.dtype | None = None
    is_stream: bool = False
    has_several_loaders: bool = False
    unseen_steps: int = 0
    later: list[ObservedWindow] = field(default_factory=list)
    schedule: ScheduleLines = ScheduleLines()
    optimizer: str = ""
    has_batch_norm: bool = False
    stopped_early: bool = False
    logged: list[tuple[int, float]] = field(default_factory=list)
    mixed_rows: tuple[float, Place | None] = (0.0, None)

    @property
    def sets_gradients(self) -> bool:
        """Whether the loop zeroes backwards of a window, and sets the gradient of the step itself."""
        return any(discarded.why == "copied" for window in self.windows for discarded in window.discarded)

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
        """The windows whose losses were recomputed, and the gradient too if it was intact."""
        pairs = ((window, window.comparison) for window in self.windows)
        return [(window, found) for window, found in pairs if found is not None and found.losses]

    @property
    def between(self) -> list[tuple[ObservedMicroBatch, ObservedMicroBatch]]:
        """Pairs of backwards that follow each other in a full window."""
        return [pair for window in self.full for pair in pairwise(window.micro_batches)]
