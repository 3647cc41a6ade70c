"""Compare the gradient of a window with the gradient of the same examples in one batch.

The window is recomputed before the optimizer's step: at the weights of the window, without dropout.

1. A forward of the whole window, without activations, gives its loss.
2. If exactly one count of items explains that loss, the reference is the sum of the micro-batches' gradients,
   weighed by these items.
3. Otherwise (always in 16 bits, which are too coarse) the reference is a backward of the whole window.

The loop's gradient is set aside and restored. At most one extra gradient is held. For weights in 16 bits, two
are held, because the sum in float32 is computed as well.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.accumulation.oom import out_of_memory
from gradacc_hf.doctor.gradients import GradientNow, Subject, compare_gradients
from gradacc_hf.doctor.item_counts import counts, named, tensors_in, which_items, why_coupled
from gradacc_hf.doctor.observer import is_number, logits_in, loss_in
from gradacc_hf.doctor.record import (
    LOSS_RTOL_FP32,
    GradientChange,
    GradientComparison,
    Inputs,
    ObservedMicroBatch,
    ObservedWindow,
    Place,
    TorchLoss,
    WindowComparison,
)
from gradacc_hf.errors import GradaccError, one_line
from gradacc_hf.utils.memory import release_memory, trim_memory
from gradacc_hf.utils.rng import preserve_rng_state

LossOf = Callable[[Any, Mapping[str, Any]], torch.Tensor]
CHANGED_INSIDE = "the gradient was changed inside the window, or carried over from the window before"
PADDED_WITH = {"labels": IGNORED, "attention_mask": 0, "token_type_ids": 0}
TYPES_OF_16_BITS = {torch.bfloat16, torch.float16}
HOW_TO_GIVE_THE_LOSS = "put `with gradacc_hf.diagnose(model, optimizer, loss_fn=…):` around the loop"


class ReplayError(GradaccError):
    """A window cannot be recomputed. The message is the reason, in a few words."""


def compare_window(
    subject: Subject, window: ObservedWindow, loss_fn: LossOf | None, autocast: torch.dtype | None
) -> WindowComparison:
    """Recompute the window, and compare gradients. Weights, gradients, buffers and RNG state are restored.

    loss_fn: computes the loss from (outputs, inputs by name); None to use the observed loss.
    autocast: the type of autocast; None without autocast.
    """
    half = autocast is not None or _has_half_weights(subject)
    micro_batches = window.micro_batches
    try:
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ReplayError("there are several processes: diagnose the loop on one")
        _check_weights(subject, window)
        loss_of, known = _loss_of_loop(micro_batches, loss_fn)
        if loss_fn is None:
            _check_goes_backward(subject, micro_batches, WindowComparison(half=half).tolerance)
        whole = _joined_inputs(micro_batches)
        kind = subject.parameters()[0].device.type
        with (
            _weights_of(window),
            state_kept(subject) as gradient,
            torch.autocast(kind, autocast, enabled=autocast is not None),
        ):
            return _compare(subject, window, whole, loss_of, known, gradient, half)
    except ReplayError as error:
        return WindowComparison(why_not=str(error))
    except Exception as error:  # recomputing may fail in any way; the user's loop must continue
        if not out_of_memory(error):
            return WindowComparison(why_not=f"it failed: {one_line(error)[:120]}")
        release_memory()
        return WindowComparison(
            why_not="the window does not fit into memory as one batch: diagnose with a smaller window"
        )


def _check_weights(subject: Subject, window: ObservedWindow) -> None:
    """Raise ReplayError if the model alone, with the weights of now, does not give the gradient."""
    if window.weights_changed and not window.other_weights:
        raise ReplayError("weights of the model change before the step, as in SAM or by another optimizer")
    inside = {id(p) for p in subject.model.parameters()}
    if any(p.grad is not None and id(p) not in inside for p in subject.parameters()):
        raise ReplayError("the optimizer also steps parameters of another module")


@contextmanager
def _weights_of(window: ObservedWindow) -> Iterator[None]:
    """Give the model the weights of the window in the block, where another optimizer has stepped since."""
    now = [p.data for p, _ in window.other_weights]
    try:
        for p, before in window.other_weights:
            p.data = before.to(p.device)
        yield
    finally:
        for (p, _), value in zip(window.other_weights, now, strict=True):
            p.data = value


LossOfInputs = Callable[[Inputs, tuple[Any, ...], torch.nn.Module], torch.Tensor]


def _loss_of_loop(
    micro_batches: Sequence[ObservedMicroBatch], loss_fn: LossOf | None
) -> tuple[LossOfInputs, tuple[float, ...]]:
    """Return the loss function of the loop, and the loss of each micro-batch; () if these were not observed.

    The function takes (inputs, the other arguments of the loss, model).
    """
    for micro_batch in micro_batches:
        if micro_batch.forward is None:
            raise ReplayError(f"{len(micro_batch.forwards)} forwards belong to one backward; allowed: 1")
    if loss_fn is None and any(len(each.terms) > 1 for each in micro_batches):
        raise ReplayError(f"the backward starts from more than one loss: {HOW_TO_GIVE_THE_LOSS}")
    if loss_fn is None and any(each.terms and not each.is_complete for each in micro_batches):
        raise ReplayError(f"the backward starts from more than the observed loss: {HOW_TO_GIVE_THE_LOSS}")
    if loss_fn is None and len({tuple(name for name, _ in each.losses) for each in micro_batches}) > 1:
        raise ReplayError(f"the micro-batches have different losses: {HOW_TO_GIVE_THE_LOSS}")
    if loss_fn is not None:

        def given(inputs: Any, others: tuple[Any, ...], model: Any) -> torch.Tensor:
            return loss_fn(model(*inputs[0], **inputs[1]), named(model, inputs))

        return given, ()
    torch_losses = [m.torch_loss for m in micro_batches if m.torch_loss is not None]
    if len(torch_losses) == len(micro_batches) and all(loss.shape is not None for loss in torch_losses):
        return _torch_loss_of_loop(micro_batches, torch_losses), tuple(loss.value for loss in torch_losses)
    losses = tuple(micro_batch.forward.loss for micro_batch in micro_batches if micro_batch.forward)
    if None not in losses:
        return lambda inputs, others, model: loss_in(model(*inputs[0], **inputs[1])), losses  # type: ignore[return-value]
    raise ReplayError(
        "the loss is computed neither by the model nor by one torch function of the model's output: "
        f"{HOW_TO_GIVE_THE_LOSS}"
    )


def _torch_loss_of_loop(
    micro_batches: Sequence[ObservedMicroBatch], torch_losses: Sequence[TorchLoss]
) -> LossOfInputs:
    """Return the loss that the loop computes with one torch function of the model's output."""
    first = torch_losses[0]
    function, arguments, shape = first.function, first.named, first.shape or ()
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor) and not all(each.named.get(key) is value for each in torch_losses):
            raise ReplayError(f"the argument {key}= of the loss differs between micro-batches")
    alone = _is_one_example(micro_batches[0])
    is_flat = not alone and first.others[0].ndim == 1

    def computed(inputs: Any, others: tuple[Any, ...], model: Any) -> torch.Tensor:
        outputs: Any = model(*inputs[0], **inputs[1])
        outputs = outputs if isinstance(outputs, torch.Tensor) else logits_in(outputs)
        rows = shape[0 if alone else 1 :]
        outputs = outputs.float().reshape(shape if outputs.numel() == math.prod(shape) else (-1, *rows))
        if is_flat:
            others = (others[0].flatten(), *others[1:])
        return function(outputs, *others, **arguments)

    return computed


def _check_goes_backward(
    subject: Subject, micro_batches: Sequence[ObservedMicroBatch], tolerance: float
) -> None:
    """Raise ReplayError unless only the observed loss went backward, divided by a constant or by items."""
    by = [micro_batch.divided_by for micro_batch in micro_batches]
    known = [divided for divided in by if divided is not None and math.isfinite(divided)]
    if len(known) < len(by) or not all(known):
        return
    shares = [[1.0] * len(by), *(items for _, items in counts(subject.model, micro_batches))]
    for items in shares:
        weights = [divided * n for divided, n in zip(known, items, strict=True) if n]
        if weights and max(weights) - min(weights) <= tolerance * abs(max(weights)):
            return
    raise ReplayError("the weights of the losses are neither equal nor in proportion to a count of items")


def _has_half_weights(subject: Subject) -> bool:
    return any(p.dtype in TYPES_OF_16_BITS for p in subject.parameters())


def _hooks(subject: Subject) -> list[Any]:
    """Hooks of the loop that may change the gradient of each backward, for example clamp it."""
    owners = (*subject.parameters(), *subject.model.modules())
    kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return [hook for each in owners for kind in kinds for hook in (getattr(each, kind, None) or {}).values()]


def work(window: ObservedWindow) -> tuple[float, float]:
    """Return the input elements of a window: summed over the micro-batches, and as one padded batch."""
    inputs = [
        tensors_in(micro_batch.forward.inputs) for micro_batch in window.micro_batches if micro_batch.forward
    ]
    largest = [max(tensors, key=torch.Tensor.numel) for tensors in inputs if tensors]
    rows = [max(1, len(tensor)) if tensor.ndim else 1 for tensor in largest]
    of_a_row = [tensor.numel() / n for tensor, n in zip(largest, rows, strict=True)]
    return sum(tensor.numel() for tensor in largest), sum(rows) * max(of_a_row, default=0.0)


def _is_one_example(micro_batch: ObservedMicroBatch) -> bool:
    """Whether a micro-batch is one example, without a batch dimension."""
    values = tensors_in(micro_batch.forward.inputs) if micro_batch.forward else []
    return bool(values) and all(value.ndim < 2 and value.is_floating_point() for value in values)


def _joined_inputs(micro_batches: Sequence[ObservedMicroBatch]) -> tuple[Any, tuple[Any, ...]]:
    """Return the inputs of all micro-batches as one batch, and the other arguments of the loss."""
    inputs = [micro_batch.forward.inputs for micro_batch in micro_batches if micro_batch.forward]
    alone = _is_one_example(micro_batches[0])

    def together(name: str, found: list[Any]) -> Any:
        return _together(name, [v[None] if alone and isinstance(v, torch.Tensor) else v for v in found])

    positional = tuple(together(str(i), [one[0][i] for one in inputs]) for i in range(len(inputs[0][0])))
    by_name = {key: together(key, [one[1].get(key) for one in inputs]) for key in inputs[0][1]}
    others: tuple[Any, ...] = ()
    if all(micro_batch.torch_loss for micro_batch in micro_batches):
        owned = [_by_rows(micro_batch.torch_loss) for micro_batch in micro_batches if micro_batch.torch_loss]
        others = tuple(together("labels", [one[i] for one in owned]) for i in range(len(owned[0])))
    return (positional, by_name), others


def _by_rows(loss: TorchLoss) -> tuple[Any, ...]:
    """Return the other arguments of a loss, with flattened targets reshaped like the model's output."""
    target, *more = loss.others
    if target.ndim == 1 and len(loss.rows) > 1 and target.numel() == math.prod(loss.rows):
        target = target.reshape(loss.rows)
    return target, *more


def _together(name: str, values: list[Any]) -> Any:
    """Join tensors in the first dimension, padded on the right to the longest; else return a single value."""
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.ndim]
    if not tensors:
        return values[0]
    if len(tensors) != len(values) or len({tensor.ndim for tensor in tensors}) > 1:
        raise ReplayError(f"the micro-batches' {name} cannot be joined into one batch")
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        wide = tensor.new_full((len(tensor), *shape), PADDED_WITH.get(name, 0))
        wide[(slice(None), *map(slice, tensor.shape[1:]))] = tensor
        padded.append(wide)
    return torch.cat(padded)


@contextmanager
def state_kept(subject: Subject) -> Iterator[list[torch.Tensor | None]]:
    """Yield the loop's gradient. At the end, restore the gradient, the buffers and the RNG state."""
    mine = subject.parameters()
    known = {id(p) for p in mine}
    parameters = [*mine, *(p for p in subject.model.parameters() if id(p) not in known)]
    gradients = [p.grad for p in parameters]
    buffers = [(buffer, buffer.clone()) for buffer in subject.model.buffers()]
    for p in parameters:
        p.grad = None
    try:
        with preserve_rng_state(), torch.enable_grad():
            yield gradients[: len(mine)]
    finally:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _compare(
    subject: Subject,
    window: ObservedWindow,
    whole: Any,
    loss_of: LossOfInputs,
    losses: tuple[float, ...],
    gradient: list[torch.Tensor | None],
    half: bool,
) -> WindowComparison:
    model, parameters, micro_batches = subject.model, subject.parameters(), window.micro_batches

    def one(micro_batch: ObservedMicroBatch) -> torch.Tensor:
        assert micro_batch.forward is not None
        return loss_of(
            micro_batch.forward.inputs, micro_batch.torch_loss.others if micro_batch.torch_loss else (), model
        )

    inputs, others = whole
    found = WindowComparison(half=half)
    tolerance = found.tolerance
    trim_memory()  # return what the loop has freed
    with torch.no_grad():
        whole_loss = float(loss_of(inputs, others, model))
        trim_memory()
        losses = losses or tuple(float(one(micro_batch)) for micro_batch in micro_batches)
    if not all(map(math.isfinite, (whole_loss, *losses))):
        raise ReplayError("a loss is not finite")
    counted, items, is_sure = which_items(subject.model, micro_batches, losses, whole_loss, tolerance)
    adds_up = not counted and abs(sum(losses) - whole_loss) <= tolerance * abs(whole_loss)
    coupled = "" if counted or adds_up else why_coupled(model, micro_batches, loss_of, tolerance)
    if not window.is_intact:
        if adds_up:
            coupled = "sum"
        kept = replace(found, losses=losses, whole_loss=whole_loss, coupled=coupled)
        return replace(kept, items=items, counted=counted, why_not=CHANGED_INSIDE)
    if coupled == "unknown":
        raise ReplayError("no count of items explains the loss of the window in one batch")
    hooks = _hooks(subject)
    if (adds_up or (is_sure and not found.half)) and not hooks:
        weights = [1.0] * len(micro_batches) if adds_up else [n / sum(items) for n in items]
        for micro_batch, weight, before in zip(micro_batches, weights, losses, strict=True):
            if weight:
                loss = one(micro_batch)
                _check_repeats(float(loss.detach()), before, tolerance)
                (loss * weight).backward()
    else:  # the items are unknown or uncertain, the losses are in 16 bits, or hooks change gradients
        loss = loss_of(inputs, others, model)
        _check_repeats(float(loss.detach()), whole_loss, tolerance)
        loss.backward()
    change, last = window.change, micro_batches[-1].norm_after
    clipped = window.norm_at_step / last if last else 1.0
    if change.hand is None and window.before_change is not None:  # compare before that change
        gradient, clipped = list(window.before_change), 1.0
    beside_whole = compare_gradients(gradient, _take_gradients(parameters), clipped)
    found = replace(found, losses=losses, whole_loss=whole_loss, adds_up=adds_up)
    if adds_up:
        return _as_means(replace(found, whole=beside_whole), subject, micro_batches, change)
    found = replace(found, whole=_with_division(beside_whole, change, len(micro_batches)))
    means = swamped = None
    if found.error > tolerance and len(micro_batches) > 1:
        for micro_batch in micro_batches:
            (one(micro_batch) / len(micro_batches)).backward()
        means = compare_gradients(gradient, _take_gradients(parameters), clipped)
        means = _with_division(means, change, len(micro_batches))
    if counted and _has_half_weights(subject):
        swamped = _swamped(gradient, parameters, micro_batches, items, one)
    found = replace(found, means=means, items=items, counted=counted, coupled=coupled, swamped=swamped)
    return replace(found, hook=_line_of_code(hooks[0])) if hooks and is_sure else found


def _line_of_code(function: Any) -> Place | None:
    """The first line of a function; None if it is not written in Python."""
    code = getattr(function, "__code__", None)
    return None if code is None else Place(code.co_filename, code.co_firstlineno)


def _check_repeats(now: float, before: float, tolerance: float) -> None:
    """Raise ReplayError if a loss differs from the same loss before."""
    if abs(now - before) > tolerance * max(abs(now), abs(before)):
        raise ReplayError("the same examples give another loss each time")


def _with_division(
    found: GradientComparison, change: GradientChange, steps: int, total: float = 1.0
) -> GradientComparison:
    """Return the comparison with the loop's own scaling of the gradient, unless it is a kind of clipping.

    total: expected ratio of the gradients.
    """
    hand = change.hand
    if hand is None or hand <= 0 or found.ratio <= 0 or not math.isfinite(found.ratio):
        return found
    scaled = replace(found, ratio=found.ratio * hand)
    is_division = steps > 1 and abs(hand * steps - 1) <= LOSS_RTOL_FP32
    is_nearer = abs(math.log(scaled.ratio * total)) < abs(math.log(found.ratio * total))
    return scaled if is_division or is_nearer else found


def _as_means(
    found: WindowComparison,
    subject: Subject,
    micro_batches: Sequence[ObservedMicroBatch],
    change: GradientChange,
) -> WindowComparison:
    """Return the comparison with losses turned into means, for losses that add up to the window's loss.

    The losses are shares of the window's mean if the window's number of items is among the model's inputs, as
    in Trainer. They are shares as well if the loop divides by that number. Otherwise they are plain sums.
    """
    given = [
        value
        for micro_batch in micro_batches
        if micro_batch.forward
        for value in micro_batch.forward.inputs[1].values()
    ]
    numbers = [float(v) for v in given if is_number(v)]
    for counted, items in counts(subject.model, micro_batches):
        total = sum(items)
        assert found.whole is not None
        whole = _with_division(found.whole, change, len(micro_batches), total)
        is_share = any(math.isclose(total, number, rel_tol=LOSS_RTOL_FP32) for number in numbers)
        if is_share or math.isclose(whole.ratio * total, 1, rel_tol=10 * found.tolerance):
            by = 1.0 if is_share else total
            return replace(
                found,
                whole=replace(whole, ratio=whole.ratio * by),
                losses=tuple(
                    loss / by * total / n if n else 0.0 for loss, n in zip(found.losses, items, strict=True)
                ),
                whole_loss=found.whole_loss / by,
                items=items,
                counted=counted,
            )
    return replace(found, coupled="sum")


def _take_gradients(parameters: Sequence[torch.nn.Parameter]) -> GradientNow:
    """Return the gradients of the parameters, and set them to None."""
    gradient = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return gradient


def _swamped(
    gradient: GradientNow,
    parameters: Sequence[torch.nn.Parameter],
    micro_batches: Sequence[ObservedMicroBatch],
    items: Sequence[float],
    one: Callable[[ObservedMicroBatch], torch.Tensor],
) -> float:
    """The sine of the angle between the loop's gradient and the sum in float32."""
    totals = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    for micro_batch, n in zip(micro_batches, items, strict=True):
        (one(micro_batch) * (n / sum(items))).backward()
        for total, g in zip(totals, _take_gradients(parameters), strict=True):
            if g is not None:
                total += g.float()
    return max(0.0, 1 - compare_gradients(gradient, totals).cosine ** 2) ** 0.5
