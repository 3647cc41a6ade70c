"""Is accumulation exact for this model, data and split?

`verify` compares the gradient that our loop accumulates on the user's own model and data, and Trainer's, with
that of the window at once (`gradients.py`), and says why they differ (`reasons.py`).
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch

from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.loss_items import (
    COUNTS,
    ComputeLoss,
    CountItems,
    as_window_loss,
    look_ahead,
    model_loss,
)
from gradacc_hf.accumulation.oom import out_of_memory
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
from gradacc_hf.accumulation.window import Window
from gradacc_hf.errors import InputError, one_line
from gradacc_hf.training.compile import compile_layers, is_compiled, uncompiled
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.utils.modeling import disable_dropout
from gradacc_hf.utils.rng import preserve_rng_state
from gradacc_hf.verification.causes import Reason, why_not_exact

AT_ONCE = "the window at once, in float32"
ONE_BY_ONE = "one example at a time, in float64: a window does not fit at once"
ROUNDING = 1e-3  # up to here an error may be float32's rounding, where gradients cancel
NOT_FINITE = Reason(
    "the gradient of the window at once is not finite", "mend the loss, the weights or the data first"
)


@dataclass(frozen=True)
class Verification:
    """The verdict on a model, its data and their split; `loop` is ours."""

    loop: Comparison
    exact_trainer: Comparison | None  # our ExactTrainer with the same micro-batches
    trainer: Comparison | None  # transformers' Trainer with them
    trainer_failed: str  # what one of the two raised, where it did
    reference: str
    windows: int
    examples: int
    accumulation_steps: tuple[int, ...]  # of each window
    reasons: tuple[Reason, ...]  # why the loop is not exact
    measured_with: dict[str, str]

    @property
    def exact(self) -> bool:
        """Is the gradient of the loop that of each window at once?"""
        return self.loop.exact and not self.reasons

    @property
    def verdict(self) -> str:
        """One sentence."""
        steps = sorted(set(self.accumulation_steps))
        cut = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
        if self.exact:
            return f"Exact: {cut} micro-batches give the gradient of the window, to {self.loop.error:.0e}."
        why = "; ".join(reason.what for reason in self.reasons) or "for no reason that is known here"
        return f"Not exact: {cut} micro-batches are off by {self.loop.error:.1e}: {why}."


def verify(
    model: torch.nn.Module,
    windows: WindowLoader,
    compute_loss: ComputeLoss = model_loss,
    *,
    num_windows: int = 1,
    trainer: bool = True,
) -> Verification:
    """Compare accumulated gradients with those of whole windows, in float32 and without dropout.

    `model` comes unprepared; a copy of it is tried, so that it, the loader and what is drawn at random stay
    as they are. Windows of one micro-batch are cut finer, as else nothing is accumulated. One that does not
    fit at once is taken one example at a time, in float64. `trainer`: also run `transformers.Trainer` and our
    `ExactTrainer` on the same micro-batches. Raises ValueError for several processes or mixed precision,
    whose rounding would hide what is asked, for windows that are not there, and for data without items.
    """
    accelerator = windows.accelerator
    if accelerator.num_processes > 1 or accelerator.mixed_precision != "no":
        raise ValueError(
            "verify() compares in float32 on one process; found "
            f"{accelerator.num_processes} processes, mixed precision {accelerator.mixed_precision!r}"
        )
    most = windows.plan.count_windows([windows.epoch])  # None: a stream's are not known
    if num_windows < 1 or (most is not None and num_windows > most):
        raise ValueError(f"num_windows: found {num_windows}; allowed: 1 to {most}, those of an epoch")
    compiled, model = is_compiled(model), copy.deepcopy(model).float().to(accelerator.device).train()
    if compiled:
        compile_layers(model)
    disable_dropout(model)
    windows = windows.copy(num_windows)
    ours, failed = [], ""
    theirs: dict[str, list[Comparison]] = {"ExactTrainer": [], "Trainer": []}
    steps, examples, fits = [], 0, True
    with preserve_rng_state(), full_float32():
        for window in windows:
            truth = _whole(model, windows, window, compute_loss)
            if truth is None and as_window_loss(compute_loss) is not None:
                raise InputError(
                    f"batch.effective: a window of {len(window.indices)} does not fit at once, and its loss "
                    "is of all examples together: verify with a smaller one"
                )
            if truth is None:
                fits = False
                truth = _one_by_one(model, windows, window, compute_loss)
            gradient = _accumulated(model, window, accelerator, compute_loss)
            ours.append((compare("the loop", gradient, truth), window, math.isfinite(norm(truth))))
            if trainer and not failed:
                micro_batches = list(window.batches())
                try:
                    for way, found in theirs.items():
                        exact = way == "ExactTrainer"
                        gradient = _trainer_gradient(
                            model, micro_batches, compute_loss, windows.count_items, exact
                        )
                        found.append(compare(way, gradient, truth))
                except Exception as error:  # whatever Trainer or its callbacks raise is not our verdict
                    failed = f"{type(error).__name__}: {one_line(error)[:200]}"
            steps.append(len(window))
            examples += len(window.indices)
            if len(steps) == num_windows:
                break
        if not ours:
            raise ValueError("no example of the data set has an item: every label is ignored")
        loop, worst, finite = max(ours, key=lambda found: found[0].badness)
        if EXACT < loop.error < ROUNDING and fits:
            loop = _in_float64(model, windows, worst, compute_loss) or loop
        reasons: tuple[Reason, ...] = ()
        if not finite:
            reasons = (NOT_FINITE,)
        elif not (loop.exact and fits):  # a reference of single examples trusts the count of items
            reasons = why_not_exact(model, windows, compute_loss, worst.indices, worst.pad_to)
    return Verification(
        loop=loop,
        exact_trainer=max(theirs["ExactTrainer"], key=_badness, default=None),
        trainer=max(theirs["Trainer"], key=_badness, default=None),
        trainer_failed=failed,
        reference=AT_ONCE if fits else ONE_BY_ONE,
        windows=len(steps),
        examples=examples,
        accumulation_steps=tuple(steps),
        reasons=reasons,
        measured_with=measured_with(accelerator.device.type),
    )


def _badness(comparison: Comparison) -> float:
    return comparison.badness


def _accumulated(
    model: torch.nn.Module, window: Window, accelerator: Any, compute_loss: ComputeLoss
) -> Gradient:
    """What our loop accumulates over a window; `.grad` is left empty."""
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
    """The comparison again, where float32's own rounding may be what is seen: near a minimum, say."""
    model.double()
    try:
        truth = _whole(model, windows, window, compute_loss)
        gradient = _accumulated(model, window, windows.accelerator, compute_loss)
        return None if truth is None else compare("the loop, in float64", gradient, truth)
    except RuntimeError:  # a loss with float32 in it
        return None
    finally:
        model.float()


def _whole(
    model: torch.nn.Module, windows: WindowLoader, window: Window, compute_loss: ComputeLoss
) -> Gradient | None:
    """The reference, or None where the window does not fit; what it had taken by then is free again."""
    try:
        batch = in_dtype_of(model, windows.collated(window.indices, window.pad_to).batch)
        with uncompiled(model):
            return whole_window_gradient(model, batch, compute_loss)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    model.zero_grad()
    return None


def _one_by_one(
    model: torch.nn.Module, windows: WindowLoader, window: Window, compute_loss: ComputeLoss
) -> Gradient:
    """The gradient of a window from its examples alone, in float64: the finest split."""
    model.double()
    for index in window.indices:
        example = windows.collated([index], window.pad_to)
        if example.num_items:
            batch = in_dtype_of(model, example.batch)
            (compute_loss(model(**batch), batch) * (example.num_items / window.num_items)).backward()
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
    """What reaches the optimizer of Trainer, or ExactTrainer, given these micro-batches as one step.

    `ExactTrainer` is told what the items are only where a function counts them, as its user would have to.
    """
    from gradacc_hf.verification.baselines import (  # late: they load transformers.Trainer
        own_loss,
        run_trainer,
    )

    recorder = RecordGradients(model)
    run_trainer(
        model,
        recorder,
        micro_batches,
        lambda batches: dict(batches[0]),
        1,
        compute_loss=own_loss(model, micro_batches[0], compute_loss),
        exact=exact,
        num_items=None if count_items in COUNTS.values() else count_items,
        gradient_accumulation_steps=len(micro_batches),
        max_grad_norm=0,
        logging_strategy="no",
        use_cpu=next(model.parameters()).device.type == "cpu",
        dataloader_pin_memory=False,  # they are on the device already
    )
    model.train()
    model.zero_grad()
    return recorder.gradients[0]
