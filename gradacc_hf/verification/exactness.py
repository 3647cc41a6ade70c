"""Verify that accumulation is exact for a model, its data and a split.

`verify` compares the gradients that the loop, ExactTrainer and Trainer accumulate with the gradient of the
window in one batch (`accumulation/reference.py`). `causes.py` finds the reason for a difference, and
`table.py` prints the result.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.look_ahead import look_ahead
from gradacc_hf.accumulation.loss_items import (
    COUNTS,
    ComputeLoss,
    CountItems,
    as_window_loss,
    model_loss,
)
from gradacc_hf.accumulation.oom import out_of_memory
from gradacc_hf.accumulation.probe_rows import labels_of_window, marks_of
from gradacc_hf.accumulation.reference import (
    EXACT,
    Comparison,
    Gradient,
    RecordGradients,
    compare,
    full_float32,
    in_dtype_of,
    norm,
    read_gradient,
    whole_window_gradient,
)
from gradacc_hf.accumulation.sample_examples import count_labels
from gradacc_hf.accumulation.validation import check_windows
from gradacc_hf.accumulation.window import Window
from gradacc_hf.errors import InputError, one_line
from gradacc_hf.padding.attention import with_padding
from gradacc_hf.training.compile import compile_layers
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.utils.modeling import disable_dropout, is_compiled, uncompiled
from gradacc_hf.utils.rng import preserve_rng_state
from gradacc_hf.verification.causes import Reason, why_not_exact

REFERENCE_AT_ONCE = "the whole window in one batch, in float32"
REFERENCE_ONE_BY_ONE = "one example at a time, in float64, because a window does not fit in one batch"
LOOK_AHEAD, MOST_WINDOWS = 8, 3
"""Windows among which the compared ones are chosen, and the most that are chosen without a number."""
ROUNDING_RTOL_FP32 = 1e-3
"""Relative error up to which float32 rounding may be the cause, if gradients cancel."""
NOT_FINITE = Reason(
    "the gradient of the whole window is not finite", "correct the loss, the weights or the data first"
)


@dataclass(frozen=True)
class Verification:
    """The result of `verify` for a model, its data and a split. `print` shows a table.

    Attributes:
        loop: the loop's gradient compared with the reference, in the window with the largest error.
        exact_trainer: the same for `ExactTrainer` with the same micro-batches; None if it did not run.
        trainer: the same for `transformers.Trainer`; None if it did not run.
        trainer_failed: the exception of Trainer or ExactTrainer, or "".
        reference: the way in which the reference gradient was computed.
        windows: the number of compared windows.
        windows_read: the number of windows from which they were chosen.
        examples: the number of examples in these windows.
        accumulation_steps: the number of micro-batches of each window.
        reasons: the reasons why the loop is not exact, with cures.
        undecided: what the compared windows cannot show.
        measured_with: versions and device.
    """

    loop: Comparison
    exact_trainer: Comparison | None
    trainer: Comparison | None
    trainer_failed: str
    reference: str
    windows: int
    windows_read: int
    examples: int
    accumulation_steps: tuple[int, ...]
    reasons: tuple[Reason, ...]
    undecided: tuple[str, ...]
    measured_with: dict[str, str]

    @property
    def exact(self) -> bool:
        """Whether the loop accumulates the gradient of each whole window, to a relative error of 1e-5.

        False also if every compared gradient is 0, which shows nothing.
        """
        return self.loop.exact and not self.reasons and not self.shows_nothing

    @property
    def shows_nothing(self) -> bool:
        """Whether the gradients of all compared windows are 0."""
        return self.loop.norm_ratio == 0 and self.loop.error == 0

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        steps = sorted(set(self.accumulation_steps))
        number = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
        if self.shows_nothing:
            return "Cannot tell: " + "; ".join(self.undecided) + "."
        if self.exact:
            but = "".join(f" Cannot tell: {line}." for line in self.undecided)
            return (
                f"Exact: {number} micro-batches give the gradient of the whole window, with a relative error "
                f"of {self.loop.error:.0e}.{but}"
            )
        why = "; ".join(reason.what for reason in self.reasons) or "the reason is unknown"
        return (
            f"Not exact: {number} micro-batches give a gradient with a relative error of "
            f"{self.loop.error:.1e}: {why}."
        )

    def __str__(self) -> str:
        from gradacc_hf.verification.table import as_text

        return as_text(self)


def verify(
    model: torch.nn.Module,
    windows: WindowLoader,
    compute_loss: ComputeLoss = model_loss,
    *,
    num_windows: int | None = None,
    trainer: bool = True,
) -> Verification:
    """Compare accumulated gradients with gradients of whole windows, in float32 and without dropout.

    The model is copied; the model, the loader and the random number generators do not change. A window with a
    single micro-batch is split finer, because otherwise nothing is accumulated. If a window does not fit in
    memory as one batch, the reference is computed one example at a time, in float64.

    Args:
        model: the model, before `accelerator.prepare`.
        windows: the loader of the windows, on one process and without mixed precision.
        compute_loss: computes the mean loss of a micro-batch, a scalar, from (outputs, batch).
        num_windows: number of windows to compare. They are chosen among the next 8, or the next `num_windows`
            if these are more: windows with the most different labels, and with unequal micro-batches. By
            default one window, and up to two more if they have other labels.
        trainer: whether to run `transformers.Trainer` and `ExactTrainer` on the same micro-batches.

    Returns:
        For each way, the comparison in the window with the largest error, and the reasons for an error.
        `print` shows a table; `exact` is the verdict.

    Raises:
        ValueError: there are several processes or mixed precision, more windows than an epoch has, or no
            items in the data.
        InputError: a window does not fit in memory, and its loss is of all examples together.
    """
    _check_arguments(windows, num_windows)
    accelerator = windows.accelerator
    try:
        compiled, model = is_compiled(model), copy.deepcopy(model)
    except RuntimeError as error:  # a weight that a hook computes, as of weight_norm
        raise InputError(f"model: {type(model).__name__} cannot be copied: {one_line(error)}") from error
    model = model.float().to(accelerator.device).train()
    if compiled:
        compile_layers(model)
    disable_dropout(model)
    look_ahead = max(LOOK_AHEAD, num_windows or 0)
    most = windows.plan.count_windows([windows.epoch])
    ahead = look_ahead if most is None else min(look_ahead, most - windows.window % most)
    with preserve_rng_state(), full_float32():
        read = [_facts_of(window) for window in islice(windows.copy(ahead), look_ahead)]
        if not read:
            raise ValueError("no example of the data set has an item: every label is ignored")
        chosen, windows = deciding_windows(read, num_windows), windows.copy(ahead)
        comparisons = _compare_windows(model, windows, chosen, compute_loss, trainer)
        worst, window = next(comparisons)
        compared = [worst]
        for each, its_window in comparisons:
            compared.append(each)
            if each.loop.badness > worst.loop.badness:
                worst, window = each, its_window
        fits = all(each.fits for each in compared)
        loop = worst.loop
        if EXACT < loop.error < ROUNDING_RTOL_FP32 and fits:
            loop = _in_float64(model, windows, window, compute_loss) or loop
        reasons: tuple[Reason, ...] = ()
        if not worst.finite:
            reasons = (NOT_FINITE,)
        elif not (loop.exact and fits):  # a reference from single examples relies on the item count
            reasons = why_not_exact(model, windows, compute_loss, window.indices.tolist(), window.pad_to)
    return Verification(
        loop=loop,
        exact_trainer=_worst(compared, EXACT_TRAINER),
        trainer=_worst(compared, TRAINER),
        trainer_failed=compared[-1].trainer_failed,
        reference=REFERENCE_AT_ONCE if fits else REFERENCE_ONE_BY_ONE,
        windows=len(compared),
        windows_read=len(read),
        examples=sum(each.examples for each in compared),
        accumulation_steps=tuple(each.steps for each in compared),
        reasons=reasons,
        undecided=tuple(_undecided(compared, read)),
        measured_with=measured_with(accelerator.device.type),
    )


def _check_arguments(windows: WindowLoader, num_windows: int | None) -> None:
    check_windows(windows)
    accelerator = windows.accelerator
    if accelerator.num_processes > 1 or accelerator.mixed_precision != "no":
        raise ValueError(
            "verify() compares in float32 on one process; found "
            f"{accelerator.num_processes} processes, mixed precision {accelerator.mixed_precision!r}"
        )
    most = windows.plan.count_windows([windows.epoch])  # None: the length of a stream is unknown
    if num_windows is not None and (num_windows < 1 or (most is not None and num_windows > most)):
        raise ValueError(
            f"num_windows: found {num_windows}; allowed: 1 to {most}, the number of windows in an epoch"
        )


@dataclass(frozen=True)
class WindowFacts:
    """The facts by which windows are chosen, without the data of the window."""

    several: bool
    """Whether the window has several micro-batches."""
    unequal: bool
    """Whether the micro-batches have different numbers of items."""
    labels: set[int]
    kinds: set[Any]
    """Labels and other entries of the batches, which may weigh examples."""


def _facts_of(window: Window) -> WindowFacts:
    batches = [micro_batch.batch for micro_batch in window.micro_batches]
    labels = labels_of_window(batches) or set()
    unequal = len({micro_batch.num_items for micro_batch in window.micro_batches}) > 1
    kinds = set[Any](labels).union(*map(marks_of, batches))
    if labels:  # by token, rows may differ in how often a label occurs
        kinds |= {pair for counted in count_labels(window.micro_batches) for pair in counted.items()}
    return WindowFacts(len(window) > 1, unequal, labels, kinds)


def deciding_windows(windows: Sequence[WindowFacts], number: int | None) -> list[int]:
    """Choose the windows that show most: different labels, several micro-batches, unequal items.

    Args:
        windows: The facts of the windows to choose from, in order.
        number: The number to choose; None for one window, and up to two more with other labels.

    Returns:
        The places of the chosen windows, in order.
    """
    left, chosen, known = list(range(len(windows))), list[int](), set[Any]()

    def value(place: int) -> tuple[bool, int, bool]:
        window = windows[place]
        return window.several, len(window.kinds - known), window.unequal

    while left and len(chosen) < (number or MOST_WINDOWS):
        best = max(left, key=value)
        if chosen and number is None and not windows[best].kinds - known:
            break
        left.remove(best)
        chosen.append(best)
        known |= windows[best].kinds
    return sorted(chosen)


def _undecided(compared: Sequence["_ComparedWindow"], read: Sequence[WindowFacts]) -> Iterator[str]:
    """Yield what the compared windows cannot show."""
    if all(each.loop.error == 0 == each.loop.norm_ratio for each in compared):
        yield "the gradient of each compared window is 0"
    labels = set().union(*(window.labels for window in read))
    if len(labels) == 1:
        yield (
            f"all labels of the first {len(read)} windows are {labels.pop()}, so a loss that weighs labels "
            "would not show"
        )


EXACT_TRAINER, TRAINER = "ExactTrainer", "Trainer"


@dataclass(frozen=True)
class _ComparedWindow:
    """One window: the gradients of all ways compared with the reference."""

    examples: int
    steps: int
    """Micro-batches of the window."""
    loop: Comparison
    finite: bool
    """Whether the reference gradient is finite."""
    fits: bool
    """Whether the window fits in memory as one batch."""
    trainers: dict[str, Comparison] = field(default_factory=dict)
    """Trainers by name, without a Trainer that failed in this window or did not run."""
    trainer_failed: str = ""
    """The exception of a Trainer, in this window or an earlier one."""


def _compare_windows(
    model: torch.nn.Module,
    windows: WindowLoader,
    chosen: Sequence[int],
    compute_loss: ComputeLoss,
    trainer: bool,
) -> Iterator[tuple[_ComparedWindow, Window]]:
    """Yield the comparison of one chosen window after another, with the window.

    After a failure of a Trainer, only the loop is compared.
    """
    failed = ""
    for place, window in enumerate(islice(windows, chosen[-1] + 1)):
        if place not in chosen:
            continue
        truth = _whole(model, windows, window, compute_loss)
        fits = truth is not None
        if truth is None and as_window_loss(compute_loss) is not None:
            raise InputError(
                f"batch.effective: a window of {len(window.indices)} examples does not fit in memory, and "
                "the loss is of all examples together; verify with a smaller window"
            )
        if truth is None:
            truth = _one_by_one(model, windows, window, compute_loss)
        gradient = _accumulated(model, window, windows.accelerator, compute_loss)
        loop, trainers = compare("the loop", gradient, truth), {}
        if trainer and not failed:
            trainers, failed = _compare_trainers(model, windows, window, compute_loss, truth)
        finite = math.isfinite(norm(truth))
        yield _ComparedWindow(len(window.indices), len(window), loop, finite, fits, trainers, failed), window


def _compare_trainers(
    model: torch.nn.Module, windows: WindowLoader, window: Window, compute_loss: ComputeLoss, truth: Gradient
) -> tuple[dict[str, Comparison], str]:
    """Return the comparison of each Trainer by name, and the exception of a Trainer, or ""."""
    micro_batches, found = list(window.batches()), {}
    try:
        for name in (EXACT_TRAINER, TRAINER):
            exact = name == EXACT_TRAINER
            gradient = _trainer_gradient(model, micro_batches, compute_loss, windows.count_items, exact)
            found[name] = compare(name, gradient, truth)
    except Exception as error:  # whatever Trainer or a callback raises, the loop still gets a verdict
        return found, f"{type(error).__name__}: {one_line(error)[:200]}"
    return found, ""


def _worst(compared: list[_ComparedWindow], trainer: str) -> Comparison | None:
    found = [each.trainers[trainer] for each in compared if trainer in each.trainers]
    return max(found, key=lambda comparison: comparison.badness, default=None)


def _accumulated(
    model: torch.nn.Module, window: Window, accelerator: Any, compute_loss: ComputeLoss
) -> Gradient:
    """Return the gradient that the loop accumulates over a window; every `.grad` is None afterwards."""
    model.zero_grad()
    look_ahead(compute_loss, model, window)
    for batch in window:
        batch = in_dtype_of(model, batch)
        with accelerator.accumulate(model):
            accelerator.backward(window.weigh(compute_loss(model(**batch), batch)))
    gradient = read_gradient(model)
    model.zero_grad()
    return gradient


def _in_float64(
    model: torch.nn.Module, windows: WindowLoader, window: Window, compute_loss: ComputeLoss
) -> Comparison | None:
    """Compare in float64, because float32 rounding may be the whole error, as near a minimum.

    Return None for a loss that does not work in float64.
    """
    model.double()
    try:
        truth = _whole(model, windows, window, compute_loss)
        gradient = _accumulated(model, window, windows.accelerator, compute_loss)
        return None if truth is None else compare("the loop, in float64", gradient, truth)
    except RuntimeError:  # the loss works only in float32
        return None
    finally:
        model.float()


def _whole(
    model: torch.nn.Module, windows: WindowLoader, window: Window, compute_loss: ComputeLoss
) -> Gradient | None:
    """Return the reference gradient, or None if the window does not fit in memory."""
    try:
        batch = in_dtype_of(model, windows.collated(window.indices, window.pad_to).batch)
        with uncompiled(model), with_padding():
            return whole_window_gradient(model, batch, compute_loss)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    model.zero_grad()
    return None


def _one_by_one(
    model: torch.nn.Module, windows: WindowLoader, window: Window, compute_loss: ComputeLoss
) -> Gradient:
    """Return the gradient of a window, summed over single examples in float64: the finest split."""
    model.double()
    for index in window.indices:
        example = windows.collated([index], window.pad_to)
        if example.num_items:
            batch = in_dtype_of(model, example.batch)
            loss = compute_loss(model(**batch), batch)
            if isinstance(loss, Mapping):
                parts = [
                    loss[name] * (n / window.split.items[name]) for name, n in example.items.items() if n
                ]
            else:
                parts = [loss * (example.num_items / window.num_items)]
            sum(parts[1:], parts[0]).backward()
    gradient = read_gradient(model)
    model.zero_grad()
    model.float()
    return gradient


def _trainer_gradient(
    model: torch.nn.Module,
    micro_batches: list[Any],
    compute_loss: ComputeLoss,
    count_items: CountItems,
    exact: bool,
) -> Gradient:
    """Return the gradient that Trainer or ExactTrainer accumulates over these micro-batches.

    `ExactTrainer` gets `num_items` only if a user would have to pass it: when a function counts the items.
    """
    from gradacc_hf.verification.baselines import custom_loss, run_trainer  # late: it loads Trainer

    recorder = RecordGradients(model)
    run_trainer(
        model,
        recorder,
        micro_batches,
        lambda batches: dict(batches[0]),
        1,
        compute_loss=custom_loss(model, micro_batches[0], compute_loss),
        exact=exact,
        num_items=None if count_items in COUNTS.values() else count_items,
        gradient_accumulation_steps=len(micro_batches),
        max_grad_norm=0,
        logging_strategy="no",
        use_cpu=next(model.parameters()).device.type == "cpu",
        dataloader_pin_memory=False,  # the micro-batches are already on the device
    )
    model.train()
    model.zero_grad()
    return recorder.gradients[0]
