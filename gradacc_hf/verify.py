"""Is accumulation exact? The one place with the whole-window reference gradient.

`verify` compares, on the user's own model and data, the gradient that the loop accumulates with that of the
window at once, and says why where they differ (`diagnose.py`). `whole_window_gradient` runs a window with no
accumulation, no weighing and no Accelerate: what every split must give. `relative_error` is the measure:
‖g − reference‖ / ‖reference‖ over all parameters together, ≤ 1e-5 in float32.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.tensor import DTensor

from gradacc_hf.diagnose import Reason, diagnose
from gradacc_hf.items import ComputeLoss, model_loss
from gradacc_hf.window import Window
from gradacc_hf.windows import WindowLoader

Gradient = dict[str, torch.Tensor]

EXACT = 1e-5
WORST = 5  # parameters that a comparison names


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


@dataclass(frozen=True)
class Verification:
    """The verdict on a model, its data and their split; `loop` is ours."""

    loop: Comparison
    trainer: Comparison | None  # transformers' Trainer with the same micro-batches; None where not compared
    reference: str
    windows: int
    examples: int
    accumulation_steps: tuple[int, ...]  # of each window
    reasons: tuple[Reason, ...]  # why the loop is not exact
    measured_with: dict[str, str]

    @property
    def exact(self) -> bool:
        """Is the gradient of the loop that of each window at once?"""
        return self.loop.exact

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

    `model` comes unprepared; it, the loader's place and Accelerate's state are left as they were, but that
    the model is on the device. `trainer`: also run `transformers.Trainer` on the same micro-batches. A window
    that does not fit at once is taken one example at a time, in float64. Raises ValueError where the loader's
    accelerator has several processes or mixed precision: its rounding would hide what is asked.
    """
    accelerator = windows.accelerator
    if accelerator.num_processes > 1 or accelerator.mixed_precision != "no":
        raise ValueError(
            "verify() compares in float32 on one process; found "
            f"{accelerator.num_processes} processes, mixed precision {accelerator.mixed_precision!r}"
        )
    training, place = model.training, windows.state_dict()
    model.to(accelerator.device).train()
    compared: dict[str, list[Comparison]] = {"the loop": [], "Trainer": []}
    steps, examples, reference = [], 0, "the window at once, in float32"
    with without_dropout(model), torch.random.fork_rng():
        for window in windows:
            truth = _whole(model, windows, window, compute_loss)
            if truth is None:
                reference = "one example at a time, in float64: a window does not fit at once"
                truth = _one_by_one(model, windows, window.indices, compute_loss)
            for batch in window:
                with accelerator.accumulate(model):
                    accelerator.backward(window.weigh(compute_loss(model(**batch), batch)))
            compared["the loop"].append(compare("the loop", read_gradient(model), truth))
            model.zero_grad()
            if trainer:
                found = _trainer_gradient(model, list(window), compute_loss)
                compared["Trainer"].append(compare("Trainer", found, truth))
            steps.append(len(window))
            examples += len(window.indices)
            if len(steps) == num_windows:
                break
        loop, *others = [max(found, key=_badness) for found in compared.values() if found]
        reasons = () if loop.exact else diagnose(model, windows, compute_loss)
    model.train(training)
    windows.load_state_dict(place)
    return Verification(
        loop=loop,
        trainer=others[0] if others else None,
        reference=reference,
        windows=len(steps),
        examples=examples,
        accumulation_steps=tuple(steps),
        reasons=reasons,
        measured_with={name: version(name) for name in ("gradacc-hf", "transformers", "accelerate", "torch")},
    )


def compare(way: str, gradient: Gradient, reference: Gradient) -> Comparison:
    """All measures of how far a gradient is from the reference, in float64."""
    size, norm = _norm(reference), _norm(gradient)
    inner = sum(float((gradient[n].double() * r.double()).sum()) for n, r in reference.items())
    by_parameter = {
        name: float((gradient[name].double() - r.double()).norm())
        / max(float(r.double().norm()), 1e-4 * size)
        for name, r in reference.items()
    }
    worst = sorted(by_parameter.items(), key=lambda pair: -pair[1])[:WORST]
    return Comparison(
        way, relative_error(gradient, reference), norm / size, inner / (norm * size or 1), tuple(worst)
    )


def _badness(comparison: Comparison) -> float:
    return comparison.error if comparison.error == comparison.error else float("inf")


def _whole(
    model: torch.nn.Module, windows: WindowLoader, window: Window, compute_loss: ComputeLoss
) -> Gradient | None:
    """The reference, or None where the window does not fit; what it had taken by then is free again."""
    try:
        pad_to = windows.split(window.epoch, window.number).pad_to
        return whole_window_gradient(model, windows.collated(window.indices, pad_to).batch, compute_loss)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
    model.zero_grad()
    return None


def _one_by_one(
    model: torch.nn.Module, windows: WindowLoader, indices: Any, compute_loss: ComputeLoss
) -> Gradient:
    """The gradient of a window from its examples alone, in float64: the finest split."""
    double = copy.deepcopy(model).double()
    double.zero_grad()
    examples = [windows.collated(indices[i : i + 1]) for i in range(len(indices))]
    num_items = sum(example.num_items for example in examples)
    for example in (example for example in examples if example.num_items):
        batch = {
            name: value.double() if getattr(value, "is_floating_point", bool)() else value
            for name, value in example.batch.items()
        }
        (compute_loss(double(**batch), batch) * (example.num_items / num_items)).backward()
    return read_gradient(double)


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


@contextmanager
def without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Every probability to drop, mask or jitter at 0, in the modules and in the model's config."""
    holders = [
        *model.modules(),
        *{id(c): c for m in model.modules() if (c := getattr(m, "config", None))}.values(),
    ]
    changed = []
    for holder in holders:
        for name, value in vars(holder).items():
            random = re.search(r"drop|jitter|mask_(time|feature)_prob", name) or (
                name == "p" and isinstance(holder, torch.nn.modules.dropout._DropoutNd)
            )
            if random and isinstance(value, float) and value:
                changed.append((holder, name, value))
                setattr(holder, name, 0.0)
    try:
        yield
    finally:
        for holder, name, value in changed:
            setattr(holder, name, value)


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
    """‖gradient − reference‖ / ‖reference‖, over all parameters, in float64."""
    return _norm({name: gradient[name].double() - reference[name].double() for name in reference}) / _norm(
        reference
    )


def _norm(gradient: Gradient) -> float:
    return sum(float(g.double().square().sum()) for g in gradient.values()) ** 0.5


class RecordGradients(torch.optim.SGD):
    """An optimizer that changes nothing and keeps, for each step, the gradient that reached it."""

    def __init__(self, model: torch.nn.Module):
        super().__init__(model.parameters(), lr=0.0)
        self.model, self.gradients = model, []

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.gradients.append(read_gradient(self.model))
