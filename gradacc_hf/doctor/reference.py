"""One window as a whole, beside the gradient that its loop has made of it.

Run before the optimizer's step, at the weights of the window, without dropout. The loss of the window at
once, which keeps no activations, says which items the micro-batches are to be weighed by; their gradients,
weighed so, are that of the window. Where no count of items explains that loss or several do, as in 16 bits,
which have not the digits to tell them apart, the gradient is taken of the window at once, too. That of the
loop is set aside meanwhile and put back; beside it there is one more at a time (for weights in 16 bits, whose
sum in float32 is looked at: that sum, and one more).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.accumulation.oom import out_of_memory, release_memory, trim_memory
from gradacc_hf.doctor.item_counts import SAME, counts, named, tensors_in, which_items, why_coupled
from gradacc_hf.doctor.observer import Inputs, MicroBatch, OwnLoss, Watch, Window, logits_in, loss_in
from gradacc_hf.errors import GradaccError, one_line
from gradacc_hf.utils.rng import preserve_rng_state

GradientNow = Sequence[torch.Tensor | None]  # of each parameter that the optimizer steps
LossOf = Callable[[Any, Mapping[str, Any]], torch.Tensor]
PADDED_WITH = {"labels": IGNORED, "attention_mask": 0, "token_type_ids": 0}
HALVES = {torch.bfloat16, torch.float16}
GIVE_LOSS_FN = "put `with gradacc_hf.diagnose(model, optimizer, loss_fn=…):` around the loop"
CHUNK = 2**16  # elements that are compared in float64 at a time
SAME_IN_HALF = 2e-2  # `SAME`, under autocast, or with weights in 16 bits


@dataclass(frozen=True)
class Alike:
    """How the loop's gradient g compares with another r: ‖g‖ / ‖r‖, and the cosine of their angle."""

    ratio: float
    cosine: float

    def error(self) -> float:
        """‖g − r‖ / ‖r‖."""
        return max(0.0, self.ratio**2 - 2 * self.ratio * self.cosine + 1) ** 0.5


@dataclass(frozen=True)
class Replay:
    """A window's gradient beside that of the window at once (`whole`), and what else is known of it.

    `items`: of each micro-batch, where some count makes the pieces' losses the whole's; `means`: beside the
    plain mean of the micro-batches' gradients, where that is another. `coupled`: why pieces and whole differ
    whatever is counted. `swamped`: the error that adding up in 16 bits has made.
    """

    why_not: str = ""  # it was not made
    whole: Alike | None = None
    means: Alike | None = None
    losses: tuple[float, ...] = ()
    whole_loss: float = 0.0
    items: tuple[float, ...] = ()
    counted: str = ""
    coupled: str = ""
    swamped: float | None = None
    half: bool = False  # in 16 bits, in which one looks less closely

    @property
    def tolerance(self) -> float:
        """Relative: below it a difference is rounding."""
        return SAME_IN_HALF if self.half else SAME


class ReplayError(GradaccError):
    """Why not, in a few words."""


def replay(watch: Watch, window: Window, loss_fn: LossOf | None) -> Replay:
    """Compute the window again; weights, gradients, buffers and random numbers are left as they were."""
    pieces = window.micro_batches
    try:
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ReplayError("there are several processes: try it on one")
        losses_of, known = _how(pieces, loss_fn)
        if loss_fn is None:
            _check_goes_backward(watch, pieces)
        whole = _joined(pieces)
        half, kind = watch.autocast, watch.parameters()[0].device.type
        with _as_it_was(watch) as loops_gradient, torch.autocast(kind, half, enabled=half is not None):
            return _compare(watch, window, whole, losses_of, known, loops_gradient)
    except ReplayError as error:
        return Replay(why_not=str(error))
    except Exception as error:  # whatever a model raises that is run in another way: its loop goes on
        if not out_of_memory(error):
            return Replay(why_not=f"it failed: {one_line(error)[:120]}")
        release_memory()
        return Replay(why_not="the window does not fit into memory at once: take a smaller one to diagnose")


Loss = Callable[[Inputs, tuple[Any, ...], torch.nn.Module], torch.Tensor]


def _how(pieces: Sequence[MicroBatch], loss_fn: LossOf | None) -> tuple[Loss, tuple[float, ...]]:
    """(inputs, the other arguments of the loss, model) → the loss, as the loop computed it; and what that was
    for each micro-batch, where it was seen.
    """
    for piece in pieces:
        if piece.forward is None:
            raise ReplayError(f"{len(piece.forwards)} forwards lead to one backward")
    if loss_fn is not None:

        def given(inputs: Any, others: tuple[Any, ...], model: Any) -> torch.Tensor:
            return loss_fn(model(*inputs[0], **inputs[1]), named(model, inputs))

        return given, ()
    if all(piece.own_loss is not None and piece.own_loss.shape is not None for piece in pieces):
        function, arguments = pieces[0].own_loss.function, pieces[0].own_loss.named  # type: ignore[union-attr]
        shape = pieces[0].own_loss.shape or ()  # type: ignore[union-attr]
        of_each = [piece.own_loss.named for piece in pieces if piece.own_loss]
        for key, value in arguments.items():
            if isinstance(value, torch.Tensor) and not all(each.get(key) is value for each in of_each):
                raise ReplayError(f"the loss is given another {key}= with each micro-batch")
        alone = _is_one_example(pieces[0])
        is_flat = not alone and pieces[0].own_loss.others[0].ndim == 1  # type: ignore[union-attr]

        def computed(inputs: Any, others: tuple[Any, ...], model: Any) -> torch.Tensor:
            outputs: Any = model(*inputs[0], **inputs[1])
            outputs = outputs if isinstance(outputs, torch.Tensor) else logits_in(outputs)
            rows = shape[0 if alone else 1 :]
            outputs = outputs.float().reshape(shape if outputs.numel() == math.prod(shape) else (-1, *rows))
            if is_flat:
                others = (others[0].flatten(), *others[1:])
            return function(outputs, *others, **arguments)

        return computed, tuple(piece.own_loss.value for piece in pieces if piece.own_loss)
    losses = tuple(piece.forward.loss for piece in pieces if piece.forward)
    if None not in losses:
        return lambda inputs, others, model: loss_in(model(*inputs[0], **inputs[1])), losses  # type: ignore[return-value]
    raise ReplayError(
        f"the loss is neither the model's own nor one function of torch on its output: {GIVE_LOSS_FN}"
    )


def _check_goes_backward(watch: Watch, pieces: Sequence[MicroBatch]) -> None:
    """Is what went backward the loss that was seen, divided alike or by items, and nothing beside it?"""
    by = [piece.divided_by for piece in pieces]
    known = [divided for divided in by if divided is not None and math.isfinite(divided)]
    if len(known) < len(by) or not all(known):
        return
    allowed = Replay(half=_in_half(watch)).tolerance
    shares = [[1.0] * len(by), *(items for _, items in counts(watch.model, pieces))]
    for items in shares:
        weights = [divided * n for divided, n in zip(known, items, strict=True) if n]
        if weights and max(weights) - min(weights) <= allowed * abs(max(weights)):
            return
    raise ReplayError(f"what goes backward is not the loss alone that was seen: {GIVE_LOSS_FN}")


def _in_half(watch: Watch) -> bool:
    return watch.autocast is not None or _has_half_weights(watch)


def _has_half_weights(watch: Watch) -> bool:
    return any(p.dtype in HALVES for p in watch.parameters())


def work(window: Window) -> tuple[float, float]:
    """What a window takes, by the elements of its inputs: micro-batch by micro-batch, and padded at once."""
    inputs = [tensors_in(piece.forward.inputs) for piece in window.micro_batches if piece.forward]
    largest = [max(tensors, key=torch.Tensor.numel) for tensors in inputs if tensors]
    rows = [max(1, len(tensor)) if tensor.ndim else 1 for tensor in largest]
    of_a_row = [tensor.numel() / n for tensor, n in zip(largest, rows, strict=True)]
    return sum(tensor.numel() for tensor in largest), sum(rows) * max(of_a_row, default=0.0)


def _is_one_example(piece: MicroBatch) -> bool:
    """Has a micro-batch no dimension for more than one?"""
    values = tensors_in(piece.forward.inputs) if piece.forward else []
    return bool(values) and all(value.ndim < 2 and value.is_floating_point() for value in values)


def _joined(pieces: Sequence[MicroBatch]) -> tuple[Any, tuple[Any, ...]]:
    """The inputs of all micro-batches as those of one, and the other arguments of the loss."""
    inputs = [piece.forward.inputs for piece in pieces if piece.forward]
    alone = _is_one_example(pieces[0])

    def together(name: str, found: list[Any]) -> Any:
        return _together(name, [v[None] if alone and isinstance(v, torch.Tensor) else v for v in found])

    positional = tuple(together(str(i), [one[0][i] for one in inputs]) for i in range(len(inputs[0][0])))
    by_name = {key: together(key, [one[1].get(key) for one in inputs]) for key in inputs[0][1]}
    others: tuple[Any, ...] = ()
    if all(piece.own_loss for piece in pieces):
        owned = [_by_rows(piece.own_loss) for piece in pieces if piece.own_loss]
        others = tuple(together("labels", [one[i] for one in owned]) for i in range(len(owned[0])))
    return (positional, by_name), others


def _by_rows(loss: OwnLoss) -> tuple[Any, ...]:
    """The other arguments of a loss, its targets as they were before they were laid end to end."""
    target, *more = loss.others
    if target.ndim == 1 and len(loss.rows) > 1 and target.numel() == math.prod(loss.rows):
        target = target.reshape(loss.rows)
    return target, *more


def _together(name: str, values: list[Any]) -> Any:
    """Tensors below each other, padded on the right to the longest; anything else must be the same in all."""
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.ndim]
    if not tensors:
        return values[0]
    if len(tensors) != len(values) or len({tensor.ndim for tensor in tensors}) > 1:
        raise ReplayError(f"the micro-batches' {name} cannot be put together")
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        wide = tensor.new_full((len(tensor), *shape), PADDED_WITH.get(name, 0))
        wide[(slice(None), *map(slice, tensor.shape[1:]))] = tensor
        padded.append(wide)
    return torch.cat(padded)


@contextmanager
def _as_it_was(watch: Watch) -> Iterator[list[torch.Tensor | None]]:
    """Gives the loop's gradient, which is put back in the end, as are buffers and random numbers."""
    parameters, gradients = watch.parameters(), [p.grad for p in watch.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in watch.model.buffers()]
    for p in parameters:
        p.grad = None
    try:
        with preserve_rng_state(), torch.enable_grad():
            yield gradients
    finally:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _compare(
    watch: Watch,
    window: Window,
    whole: Any,
    loss_of: Loss,
    losses: tuple[float, ...],
    gradient: list[torch.Tensor | None],
) -> Replay:
    model, parameters, pieces = watch.model, watch.parameters(), window.micro_batches

    def one(piece: MicroBatch) -> torch.Tensor:
        assert piece.forward is not None
        return loss_of(piece.forward.inputs, piece.own_loss.others if piece.own_loss else (), model)

    inputs, others = whole
    found = Replay(half=_in_half(watch))
    tolerance = found.tolerance
    trim_memory()  # of what the loop has let go
    with torch.no_grad():
        whole_loss = float(loss_of(inputs, others, model))
        trim_memory()
        losses = losses or tuple(float(one(piece)) for piece in pieces)
    if not all(map(math.isfinite, (whole_loss, *losses))):
        raise ReplayError("a loss is not finite")
    counted, items, is_sure = which_items(watch.model, pieces, losses, whole_loss, tolerance)
    adds_up = not counted and abs(sum(losses) - whole_loss) <= tolerance * abs(whole_loss)
    coupled = "" if counted or adds_up else why_coupled(model, pieces, loss_of, tolerance)
    if adds_up or (is_sure and not found.half):
        weights = [1.0] * len(pieces) if adds_up else [n / sum(items) for n in items]
        for piece, weight in zip(pieces, weights, strict=True):
            if weight:
                (one(piece) * weight).backward()
    else:  # what the pieces' losses have to do with the window's is not known, or not to enough digits
        loss_of(inputs, others, model).backward()
    # Clipping has changed the length by then; the direction it has not.
    clipped = window.norm_at_step / pieces[-1].norm_after if pieces[-1].norm_after else 1.0
    beside_whole = _alike(gradient, _taken(parameters), clipped)
    found = replace(found, whole=beside_whole, losses=losses, whole_loss=whole_loss)
    if adds_up:
        return _as_means(found, beside_whole, watch, pieces)
    means = swamped = None
    if beside_whole.error() > tolerance and len(pieces) > 1:
        for piece in pieces:
            (one(piece) / len(pieces)).backward()
        means = _alike(gradient, _taken(parameters), clipped)
    if counted and _has_half_weights(watch):
        swamped = _swamped(gradient, parameters, pieces, items, one)
    return replace(found, means=means, items=items, counted=counted, coupled=coupled, swamped=swamped)


def _as_means(found: Replay, whole: Alike, watch: Watch, pieces: Sequence[MicroBatch]) -> Replay:
    """Of losses that add up to the window's: shares of its mean, or sums that the loop divides by its items.

    Trainer hands a model the number of items in its window; a loop divides its sums. Else they are sums only.
    """
    given = [value for piece in pieces if piece.forward for value in piece.forward.inputs[1].values()]
    numbers = [float(v) for v in given if isinstance(v, int | float | torch.Tensor) and _is_number(v)]
    for counted, items in counts(watch.model, pieces):
        total = sum(items)
        is_share = any(math.isclose(total, number, rel_tol=SAME) for number in numbers)
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


def _is_number(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or (value.numel() == 1 and not value.ndim)


@torch.no_grad()
def _alike(gradient: GradientNow, other: GradientNow, clipped: float = 1.0) -> Alike:
    """The loop's gradient, as it was before it was `clipped` to so much, beside another one, in float64."""
    inner = mine = theirs = 0.0
    for g, o in zip(gradient, other, strict=True):
        some = g if g is not None else o
        for i in range(0, 0 if some is None else some.numel(), CHUNK):
            a = None if g is None else g.flatten()[i : i + CHUNK].double() / clipped
            b = None if o is None else o.flatten()[i : i + CHUNK].double()
            mine += float(a.square().sum()) if a is not None else 0.0
            theirs += float(b.square().sum()) if b is not None else 0.0
            inner += float(a @ b) if a is not None and b is not None else 0.0
    if not theirs or not mine:
        return Alike((mine**0.5) / (theirs**0.5) if theirs else float("inf"), 1.0 if mine == theirs else 0.0)
    return Alike((mine / theirs) ** 0.5, inner / (mine * theirs) ** 0.5)


def _taken(parameters: Sequence[torch.nn.Parameter]) -> GradientNow:
    """What is in `.grad`, which has nothing then."""
    gradient = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return gradient


def _swamped(
    gradient: GradientNow,
    parameters: Sequence[torch.nn.Parameter],
    pieces: Sequence[MicroBatch],
    items: Sequence[float],
    one: Callable[[MicroBatch], torch.Tensor],
) -> float:
    """How far the loop's gradient is from that added up in float32: the sine of the angle between them."""
    totals = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    for piece, n in zip(pieces, items, strict=True):
        (one(piece) * (n / sum(items))).backward()
        for total, g in zip(totals, _taken(parameters), strict=True):
            if g is not None:
                total += g.float()
    return max(0.0, 1 - _alike(gradient, totals).cosine ** 2) ** 0.5
