"""Relates the losses of a window's micro-batches to the loss of the whole window.

`which_items` finds the item count over which the loss is a mean. `why_coupled` finds the reason if no item
count explains the loss of the window.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from gradacc_hf.accumulation.loss_items import COUNTS, IGNORED
from gradacc_hf.doctor.record import LOSS_RTOL_FP32, Inputs, ObservedMicroBatch
from gradacc_hf.utils.modeling import BATCH_NORMS

ROUNDING_RTOL = 1e-5  # relative rounding error of a loss in float32, with a margin


def tensors_in(inputs: Inputs) -> list[torch.Tensor]:
    """All tensors among the inputs of a forward."""
    return [value for value in (*inputs[0], *inputs[1].values()) if isinstance(value, torch.Tensor)]


def named(model: torch.nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The inputs of a forward by name."""
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, inputs[0], strict=False)), **inputs[1]}


def which_items(
    model: torch.nn.Module,
    micro_batches: Sequence[ObservedMicroBatch],
    losses: Sequence[float],
    whole: float,
    tolerance: float,
) -> tuple[str, tuple[float, ...], bool]:
    """Find the item count with which the weighed losses give the loss of the whole window.

    Return the name of the count ("" if there is none), the items of each micro-batch, and whether the count
    is certain. It is uncertain if a count with other weights explains the loss too, as with equal losses.
    """
    known = []
    for name, items in counts(model, micro_batches):
        mean = sum(n * loss for n, loss in zip(items, losses, strict=True) if n) / sum(items)
        off = abs(mean - whole) / max(abs(whole), 1e-12)
        if off < tolerance:
            known.append((off, name, items))
    if not known:
        return "", (), False
    _, name, best = min(known)
    shares = [[n / sum(items) for n in items] for off, _, items in known if off < ROUNDING_RTOL]
    mine = [n / sum(best) for n in best]
    alike = all(abs(a - b) <= LOSS_RTOL_FP32 for other in shares for a, b in zip(mine, other, strict=True))
    return name, best, alike


def counts(
    model: torch.nn.Module, micro_batches: Sequence[ObservedMicroBatch]
) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Yield each count that applies to these inputs: name, and items of each micro-batch."""
    for name, count in COUNT_BY.items():
        try:
            items = tuple(float(count(model, micro_batch)) for micro_batch in micro_batches)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError, RuntimeError):
            continue
        if sum(items):
            yield name, items


def _rows(model: torch.nn.Module, micro_batch: ObservedMicroBatch) -> int:
    assert micro_batch.forward is not None
    return next(len(value) for value in tensors_in(micro_batch.forward.inputs) if value.ndim)


def _targets(model: torch.nn.Module, micro_batch: ObservedMicroBatch) -> int:
    if micro_batch.torch_loss is None:
        raise KeyError("the loss is the model's own")
    target = micro_batch.torch_loss.others[0]
    ignored = micro_batch.torch_loss.named.get("ignore_index", IGNORED)
    return target.numel() if target.is_floating_point() else int((target != ignored).sum())


def _class_weights(model: torch.nn.Module, micro_batch: ObservedMicroBatch) -> float:
    if micro_batch.torch_loss is None:
        raise KeyError("the loss is the model's own")
    target, options = micro_batch.torch_loss.others[0], micro_batch.torch_loss.named
    ignored = options.get("ignore_index", IGNORED)
    return float(options["weight"][target[target != ignored]].sum())


def _by_name(name: str) -> Callable[[torch.nn.Module, ObservedMicroBatch], float]:
    def count(model: torch.nn.Module, micro_batch: ObservedMicroBatch) -> float:
        assert micro_batch.forward is not None
        return COUNTS[name](named(model, micro_batch.forward.inputs))

    return count


COUNT_BY: dict[str, Callable[[torch.nn.Module, ObservedMicroBatch], float]] = {
    "examples": _rows,
    "labels that are not −100": _by_name("labels"),
    "labels that are not −100, without the first of each row": _by_name("next_token"),
    "targets": _targets,
    "weights of the targets' classes": _class_weights,
}


def why_coupled(
    model: torch.nn.Module,
    micro_batches: Sequence[ObservedMicroBatch],
    loss_of: Callable[..., torch.Tensor],
    tolerance: float,
) -> str:
    """Return the reason why the micro-batches' losses do not give the loss of the window.

    It is "batch_norm", "padding", "in_batch" or "unknown".
    """
    if any(isinstance(module, BATCH_NORMS) and module.training for module in model.modules()):
        return "batch_norm"
    first = next(micro_batch for micro_batch in micro_batches if micro_batch.forward)
    assert first.forward is not None

    def rows_of(value: Any, rows: list[int]) -> Any:
        return value[rows] if isinstance(value, torch.Tensor) and value.ndim else value

    def loss(rows: list[int]) -> float:
        positional, by_name = first.forward.inputs  # type: ignore[union-attr]
        inputs = (
            tuple(rows_of(v, rows) for v in positional),
            {k: rows_of(v, rows) for k, v in by_name.items()},
        )
        others = first.torch_loss.others if first.torch_loss else ()
        with torch.no_grad():
            return float(loss_of(inputs, tuple(rows_of(v, rows) for v in others), model))

    try:
        alone, again, twice = loss([0]), loss([0]), loss([0, 0])
    except (RuntimeError, IndexError, ValueError, TypeError):
        return "unknown"
    if abs(alone - again) > tolerance * max(abs(alone), abs(again)):
        return "unknown"  # the model is random
    if abs(alone - twice) <= tolerance * max(abs(alone), abs(twice)):
        return "padding" if _padded(micro_batches) else "unknown"
    # A loss that the loop computes may have other dimensions before the examples, such as time.
    return "unknown" if first.torch_loss is not None else "in_batch"


def _padded(micro_batches: Sequence[ObservedMicroBatch]) -> bool:
    """Whether micro-batches differ in their length."""
    lengths = set()
    for micro_batch in micro_batches:
        assert micro_batch.forward is not None
        wide = (value.shape[1] for value in tensors_in(micro_batch.forward.inputs) if value.ndim > 1)
        lengths.add(next(wide, 0))
    return len(lengths) > 1
