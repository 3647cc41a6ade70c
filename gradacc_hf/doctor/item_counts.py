"""What the losses of a window's micro-batches have to do with that of the window at once.

Which items a mean is over (`which_items`, of the `counts` that there are), or why there are none by which the
micro-batches could be weighed (`why_coupled`).
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from gradacc_hf.accumulation.loss_items import COUNTS, IGNORED
from gradacc_hf.doctor.observer import Inputs, MicroBatch
from gradacc_hf.utils.modeling import BATCH_NORMS

ROUNDING = 1e-5  # of a loss, relative, with room to spare
SAME = 1e-4  # relative difference of two numbers that is but rounding


def tensors_in(inputs: Inputs) -> list[torch.Tensor]:
    """All tensors that a forward was given."""
    return [value for value in (*inputs[0], *inputs[1].values()) if isinstance(value, torch.Tensor)]


def named(model: torch.nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The inputs of a forward by name."""
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, inputs[0], strict=False)), **inputs[1]}


def which_items(
    model: torch.nn.Module,
    pieces: Sequence[MicroBatch],
    losses: Sequence[float],
    whole: float,
    tolerance: float,
) -> tuple[str, tuple[float, ...], bool]:
    """By which count the pieces' losses, weighed, are the whole's: its name, the items of each, is it sure?

    It is not where another count, by which they would weigh otherwise, explains the loss as well: where all
    losses are about alike.
    """
    known = []
    for name, items in counts(model, pieces):
        mean = sum(n * loss for n, loss in zip(items, losses, strict=True) if n) / sum(items)
        off = abs(mean - whole) / max(abs(whole), 1e-12)
        if off < tolerance:
            known.append((off, name, items))
    if not known:
        return "", (), False
    _, name, best = min(known)
    shares = [[n / sum(items) for n in items] for off, _, items in known if off < ROUNDING]
    mine = [n / sum(best) for n in best]
    alike = all(abs(a - b) <= SAME for other in shares for a, b in zip(mine, other, strict=True))
    return name, best, alike


def counts(model: torch.nn.Module, pieces: Sequence[MicroBatch]) -> Iterator[tuple[str, tuple[float, ...]]]:
    """The items of each piece by every count that there is here, with its name."""
    for name, count in COUNT_BY.items():
        try:
            items = tuple(float(count(model, piece)) for piece in pieces)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError, RuntimeError):
            continue
        if sum(items):
            yield name, items


def _rows(model: torch.nn.Module, piece: MicroBatch) -> int:
    assert piece.forward is not None
    return next(len(value) for value in tensors_in(piece.forward.inputs) if value.ndim)


def _targets(model: torch.nn.Module, piece: MicroBatch) -> int:
    if piece.own_loss is None:
        raise KeyError("the loss is the model's own")
    target = piece.own_loss.others[0]
    ignored = piece.own_loss.named.get("ignore_index", IGNORED)
    return target.numel() if target.is_floating_point() else int((target != ignored).sum())


def _class_weights(model: torch.nn.Module, piece: MicroBatch) -> float:
    if piece.own_loss is None:
        raise KeyError("the loss is the model's own")
    target, ignored = piece.own_loss.others[0], piece.own_loss.named.get("ignore_index", IGNORED)
    return float(piece.own_loss.named["weight"][target[target != ignored]].sum())


def _by_name(name: str) -> Callable[[torch.nn.Module, MicroBatch], float]:
    def count(model: torch.nn.Module, piece: MicroBatch) -> float:
        assert piece.forward is not None
        return COUNTS[name](named(model, piece.forward.inputs))

    return count


COUNT_BY: dict[str, Callable[[torch.nn.Module, MicroBatch], float]] = {
    "examples": _rows,
    "labels that are not −100": _by_name("labels"),
    "labels that are not −100, but the first of each row": _by_name("next_token"),
    "targets": _targets,
    "weights of the targets' classes": _class_weights,
}


def why_coupled(
    model: torch.nn.Module,
    pieces: Sequence[MicroBatch],
    loss_of: Callable[..., torch.Tensor],
    tolerance: float,
) -> str:
    """Why a window's loss is not that of its pieces: "batch_norm", "padding", "in_batch" or "unknown"."""
    if any(isinstance(module, BATCH_NORMS) and module.training for module in model.modules()):
        return "batch_norm"
    first = next(piece for piece in pieces if piece.forward)
    assert first.forward is not None

    def cut(value: Any, rows: list[int]) -> Any:
        return value[rows] if isinstance(value, torch.Tensor) and value.ndim else value

    def loss(rows: list[int]) -> float:
        positional, by_name = first.forward.inputs  # type: ignore[union-attr]
        inputs = tuple(cut(v, rows) for v in positional), {k: cut(v, rows) for k, v in by_name.items()}
        others = first.own_loss.others if first.own_loss else ()
        with torch.no_grad():
            return float(loss_of(inputs, tuple(cut(v, rows) for v in others), model))

    try:
        alone, twice = loss([0]), loss([0, 0])
    except (RuntimeError, IndexError, ValueError, TypeError):
        return "unknown"
    if abs(alone - twice) <= tolerance * max(abs(alone), abs(twice)):
        return "padding" if _padded(pieces) else "unknown"
    return "in_batch"


def _padded(pieces: Sequence[MicroBatch]) -> bool:
    """Do micro-batches differ in their length?"""
    lengths = set()
    for piece in pieces:
        assert piece.forward is not None
        wide = (value.shape[1] for value in tensors_in(piece.forward.inputs) if value.ndim > 1)
        lengths.add(next(wide, 0))
    return len(lengths) > 1
