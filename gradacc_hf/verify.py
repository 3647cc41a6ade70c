"""Is accumulation exact? The one place with the whole-window reference gradient.

`verify` compares, on the user's own model and data, the gradient that the loop accumulates with that of the
window at once, and says why where they differ (`diagnose.py`). `whole_window_gradient` runs a window with no
accumulation, no weighing and no Accelerate: what every split must give. `relative_error` is the measure:
‖g − reference‖ / ‖reference‖ over all parameters together, ≤ 1e-5 in float32.
"""

import copy
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.tensor import DTensor

from gradacc_hf.diagnose import Reason, diagnose
from gradacc_hf.errors import one_line
from gradacc_hf.items import ComputeLoss, model_loss
from gradacc_hf.window import Window
from gradacc_hf.windows import WindowLoader

Gradient = dict[str, torch.Tensor]

EXACT = 1e-5
ROUNDING = 1e-3  # up to here an error may be float32's rounding, where gradients cancel
WORST = 5  # parameters that a comparison names
NOT_FINITE = Reason(
    "the gradient of the window at once is not finite", "mend the loss, the weights or the data first"
)
TINY = 1e-300  # instead of 0, to divide by
RANDOM = r"drop|jitter|mask_(time|feature)_prob"  # fields of modules and configs that hold a probability


@dataclass(frozen=True)
class Comparison:
    """What one way accumulates against the reference, in the window where it is furthest off.

    `error` and `norm_ratio`: ‖g − r‖ / ‖r‖ and ‖g‖ / ‖r‖; `cosine` of the angle between them. `worst`:
    parameters by ‖g_p − r_p‖ / max(‖r_p‖, 1e-4 ‖r‖), as some (a key's bias) have no gradient but rounding.
    """

    way: str
    error: float
    norm_ratio: float
    cosine: float
    worst: tuple[tuple[str, float], ...]

    @property
    def exact(self) -> bool:
        """Is the error at most `EXACT`? NaN is not."""
        return self.error <= EXACT

    @property
    def badness(self) -> float:
        """The error, to be sorted by: NaN is worst."""
        return math.inf if math.isnan(self.error) else self.error


@dataclass(frozen=True)
class Verification:
    """The verdict on a model, its data and their split; `loop` is ours."""

    loop: Comparison
    trainer: Comparison | None  # transformers' Trainer with the same micro-batches
    trainer_failed: str  # what it raised, where it did
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
    fit at once is taken one example at a time, in float64. `trainer`: also run `transformers.Trainer` on the
    same micro-batches. Raises ValueError for several processes or mixed precision, whose rounding would hide
    what is asked, for windows that are not there, and for data without items.
    """
    accelerator = windows.accelerator
    if accelerator.num_processes > 1 or accelerator.mixed_precision != "no":
        raise ValueError(
            "verify() compares in float32 on one process; found "
            f"{accelerator.num_processes} processes, mixed precision {accelerator.mixed_precision!r}"
        )
    if not 1 <= num_windows <= len(windows):
        raise ValueError(f"num_windows: found {num_windows}; allowed: 1 to {len(windows)}, those of an epoch")
    model = copy.deepcopy(model).float().to(accelerator.device).train()
    remove_dropout(model)
    windows = windows.copy(num_windows)
    ours, theirs, failed = [], [], ""
    steps, examples, reference = [], 0, "the window at once, in float32"
    with _random_numbers_as_they_were():
        for window in windows:
            truth = _whole(model, windows, window, compute_loss)
            if truth is None:
                reference = "one example at a time, in float64: a window does not fit at once"
                truth = _one_by_one(model, windows, window, compute_loss)
            gradient = _accumulated(model, window, accelerator, compute_loss)
            ours.append((compare("the loop", gradient, truth), window, math.isfinite(_norm(truth))))
            if trainer and not failed:
                try:
                    found = _trainer_gradient(model, list(window), compute_loss)
                    theirs.append(compare("Trainer", found, truth))
                except Exception as error:  # whatever Trainer or its callbacks raise is not our verdict
                    failed = f"{type(error).__name__}: {one_line(error)[:200]}"
            steps.append(len(window))
            examples += len(window.indices)
            if len(steps) == num_windows:
                break
        if not ours:
            raise ValueError("no example of the data set has an item: every label is ignored")
        loop, worst, finite = max(ours, key=lambda found: found[0].badness)
        if EXACT < loop.error < ROUNDING and "float32" in reference:
            loop = _in_float64(model, windows, worst, compute_loss) or loop
        needs_reason = not loop.exact or "float64:" in reference  # that reference trusts the count of items
        reasons: tuple[Reason, ...] = (NOT_FINITE,)
        if finite:
            window = worst.indices, worst.pad_to
            reasons = diagnose(model, windows, compute_loss, *window) if needs_reason else ()
    return Verification(
        loop=loop,
        trainer=max(theirs, key=lambda comparison: comparison.badness) if theirs else None,
        trainer_failed=failed,
        reference=reference,
        windows=len(steps),
        examples=examples,
        accumulation_steps=tuple(steps),
        reasons=reasons,
        measured_with={name: version(name) for name in ("gradacc-hf", "transformers", "accelerate", "torch")},
    )


def _accumulated(
    model: torch.nn.Module, window: Window, accelerator: Any, compute_loss: ComputeLoss
) -> Gradient:
    """What our loop accumulates over a window; `.grad` is left empty."""
    model.zero_grad()
    for batch in window:
        batch = _in_dtype_of(model, batch)
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


def _in_dtype_of(model: torch.nn.Module, batch: Any) -> Any:
    """Real inputs as the model's weights are: float64 where those are; else as they come."""
    if next(model.parameters()).dtype != torch.float64:
        return batch
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }


def compare(way: str, gradient: Gradient, reference: Gradient) -> Comparison:
    """All measures of how far a gradient is from the reference, in float64."""
    size, norm = _norm(reference) or TINY, _norm(gradient)
    inner = sum(float((gradient[n].double() * r.double()).sum()) for n, r in reference.items())
    by_parameter = {
        name: _norm({name: gradient[name].double() - r.double()}) / max(_norm({name: r}), 1e-4 * size, TINY)
        for name, r in reference.items()
    }
    worst = sorted(by_parameter.items(), key=lambda pair: -pair[1])[:WORST]
    return Comparison(
        way, relative_error(gradient, reference), norm / size, inner / (norm * size or 1), tuple(worst)
    )


def _whole(
    model: torch.nn.Module, windows: WindowLoader, window: Window, compute_loss: ComputeLoss
) -> Gradient | None:
    """The reference, or None where the window does not fit; what it had taken by then is free again."""
    try:
        batch = _in_dtype_of(model, windows.collated(window.indices, window.pad_to).batch)
        return whole_window_gradient(model, batch, compute_loss)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
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
            batch = _in_dtype_of(model, example.batch)
            (compute_loss(model(**batch), batch) * (example.num_items / window.num_items)).backward()
    gradient = read_gradient(model)
    model.zero_grad()
    model.float()
    return gradient


def _trainer_gradient(
    model: torch.nn.Module, micro_batches: list[Any], compute_loss: ComputeLoss
) -> Gradient:
    """What reaches the optimizer of a Trainer that is given these micro-batches as one step."""
    from gradacc_hf.contenders import run_trainer  # late: it loads transformers.Trainer

    recorder = RecordGradients(model)
    with torch.no_grad():
        outputs = model(**micro_batches[0])
        own_loss = getattr(outputs, "loss", None)
    is_own = own_loss is not None and torch.equal(own_loss, compute_loss(outputs, micro_batches[0]))
    with _accelerate_as_it_was():
        run_trainer(
            model,
            recorder,
            micro_batches,
            lambda batches: dict(batches[0]),
            1,
            compute_loss=None if is_own else compute_loss,
            gradient_accumulation_steps=len(micro_batches),
            max_grad_norm=0,
            use_cpu=next(model.parameters()).device.type == "cpu",
        )
    model.train()
    model.zero_grad()
    return recorder.gradients[0]


def remove_dropout(model: torch.nn.Module) -> None:
    """Set every probability to drop, mask or jitter to 0, in the modules and in their configs."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    for holder in (*model.modules(), *configs):
        for name, value in list(vars(holder).items()):
            of_dropout = name == "p" and isinstance(holder, torch.nn.modules.dropout._DropoutNd)
            if isinstance(value, float) and (of_dropout or re.search(RANDOM, name)):
                setattr(holder, name, 0.0)


@contextmanager
def _random_numbers_as_they_were() -> Iterator[None]:
    """TrainingArguments' seed is set for all of these."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _accelerate_as_it_was() -> Iterator[None]:
    """TrainingArguments clears Accelerate's state, which the caller's Accelerator lives on."""
    states = (AcceleratorState, PartialState, GradientState)
    before = [dict(state._shared_state) for state in states]
    try:
        yield
    finally:
        for state, values in zip(states, before, strict=True):
            state._shared_state.clear()
            state._shared_state.update(values)


def whole_window_gradient(
    model: torch.nn.Module, batch: Mapping[str, Any], compute_loss: ComputeLoss = model_loss
) -> Gradient:
    """The gradient of the mean loss of one batch that holds the whole window; `.grad` is left empty."""
    model.zero_grad()
    compute_loss(model(**batch), batch).backward()
    gradient = read_gradient(model)
    model.zero_grad()
    return gradient


def read_gradient(model: torch.nn.Module) -> Gradient:
    """A copy of every parameter's `.grad`, whole where it is sharded; zeros where there is none."""
    gradient = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
            gradient[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    return gradient


def relative_error(gradient: Gradient, reference: Gradient) -> float:
    """‖gradient − reference‖ / ‖reference‖, over all parameters, in float64; two zeros are the same."""
    difference = _norm({name: gradient[name].double() - reference[name].double() for name in reference})
    size = _norm(reference)
    return difference / size if size else math.inf if difference else 0.0


def _norm(gradient: Gradient) -> float:
    return sum(float(g.double().square().sum()) for g in gradient.values()) ** 0.5


class RecordGradients(torch.optim.SGD):
    """An optimizer that changes nothing and keeps, for each step, the gradient that reached it."""

    def __init__(self, model: torch.nn.Module):
        super().__init__(model.parameters(), lr=0.0)
        self.model, self.gradients = model, []

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.gradients.append(read_gradient(self.model))
