"""The losses in a backward, and the weight of each.

A hook on each loss receives the derivative of the tensor that goes backward: the weight of this loss. Weights
need neither the model nor the data again, so they are known for any loop. `weighing.py` judges them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.doctor.frames import user_line
from gradacc_hf.doctor.listener import LOSSES
from gradacc_hf.doctor.record import MODEL, MODEL_WITH_NUMBER, LossTerm, TorchLoss


@dataclass(frozen=True)
class _Seen:
    """A loss before its backward: the term without a weight, and its number in the order of computing."""

    term: LossTerm
    number: int
    recomputed: TorchLoss | None
    holds: range = range(0)  # numbers of the losses that the model computed on the way to this one


class TermWatch:
    """Collects the losses that enter a backward."""

    def __init__(self):
        self._num_seen = 0
        self._fired: list[tuple[_Seen, torch.Tensor]] = []
        self._is_backward = False

    @property
    def num_seen(self) -> int:
        """The number of losses computed so far."""
        return self._num_seen

    def loss_computed(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        named: Mapping[str, Any],
        loss: torch.Tensor,
        recomputed: TorchLoss | None = None,
    ) -> None:
        """Watch a loss that a torch function computed. `recomputed`: how to compute it again."""
        name = getattr(function, "__name__", "")
        args = tuple(args) or tuple(value for value in named.values() if isinstance(value, torch.Tensor))
        if not args or not isinstance(args[0], torch.Tensor) or not args[0].ndim:
            return
        is_sum = name == "sum" or named.get("reduction") == "sum"
        items = tuple(_items(name, args, named, is_sum))
        is_square = name == "cross_entropy" and _is_in_batch(args)
        value = float(loss.detach())
        self._watch(loss, LossTerm(name, user_line(), value, 0.0, items, is_sum, is_square), recomputed)

    def output_loss(self, loss: torch.Tensor, since: int, has_number: bool) -> None:
        """Watch a loss that the model returns.

        since: `num_seen` at the start of the forward.
        has_number: whether a number is among the inputs, by which the model may divide the loss.
        """
        if loss.requires_grad:
            term = LossTerm(
                MODEL_WITH_NUMBER if has_number else MODEL,
                user_line(),
                float(loss.detach()),
                0.0,
                (),
                False,
                False,
            )
            self._watch(loss, term, None, range(since, self._num_seen))

    def _watch(
        self, loss: torch.Tensor, term: LossTerm, recomputed: TorchLoss | None, holds: range = range(0)
    ) -> None:
        seen = _Seen(term, self._num_seen, recomputed, holds)
        self._num_seen += 1

        def fired(weight: torch.Tensor) -> None:
            if self._is_backward:
                self._fired.append((seen, weight.detach()))

        loss.register_hook(fired)

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """Collect the losses that enter the backward in the `with` block."""
        self._fired, self._is_backward = [], True
        try:
            yield
        finally:
            self._is_backward = False

    def take(self, root: float | None, tolerance: float) -> "BackwardLosses":
        """Return the losses in the latest backward. `root`: the loss that went backward; None if unknown."""
        held = {number for seen, _ in self._fired for number in seen.holds}
        fired = [(seen, float(weight)) for seen, weight in self._fired if weight]
        known = [(_with_items(seen, w, fired), w) for seen, w in fired if seen.number not in held]
        self._fired = []
        terms = tuple(replace(seen.term, weight=weight, number=seen.number) for seen, weight in known)
        torch_losses = tuple(seen.recomputed for seen, _ in known)
        if root is None:
            return BackwardLosses(terms, torch_losses, False)
        shares = [term.weight * term.value for term in terms]
        for number in range(len(terms), 0, -1):  # losses inside of others come last
            size = max(abs(root), sum(map(abs, shares[:number])))
            if abs(sum(shares[:number]) - root) <= tolerance * size:
                return BackwardLosses(terms[:number], torch_losses[:number], True)
        return BackwardLosses(terms, torch_losses, False)


@dataclass(frozen=True)
class BackwardLosses:
    """The losses in a backward.

    torch_losses: how to compute each again; None if unknown.
    is_complete: whether the terms make up all of the loss.
    """

    terms: tuple[LossTerm, ...]
    torch_losses: tuple[TorchLoss | None, ...]
    is_complete: bool


def _with_items(seen: _Seen, weight: float, fired: Sequence[tuple[_Seen, float]]) -> _Seen:
    """The loss of a model, with the items of the mean that it is; any other loss as it is."""
    inner = [(each.term, w) for each, w in fired if each.number in seen.holds]
    if len(inner) != 1 or inner[0][0].is_sum:
        return seen
    term, of_term = inner[0]
    is_same = math.isclose(term.value * of_term, seen.term.value * weight, rel_tol=1e-3)
    return replace(seen, term=replace(seen.term, items=term.items)) if is_same else seen


def _items(
    name: str, args: Sequence[Any], named: Mapping[str, Any], is_sum: bool
) -> Iterator[tuple[str, float]]:
    """Yield the counts of items over which a loss may be a mean: of a mean one, of a sum all."""
    first = args[0]
    rows, elements = float(len(first)), float(first.numel())
    target = args[1] if len(args) > 1 else named.get("target")
    if name in ("cross_entropy", "nll_loss") and isinstance(target, torch.Tensor):
        if target.is_floating_point():
            counted = first.numel() / first.shape[min(1, first.ndim - 1)]
        else:
            ignored = named.get("ignore_index", IGNORED)
            kept = target[target != ignored]
            weight = args[2] if len(args) > 2 else named.get("weight")
            counted = float(kept.numel() if weight is None else weight.detach()[kept].sum())
        yield "targets", float(counted)
    elif name in LOSSES and isinstance(target, torch.Tensor) and named.get("reduction") == "batchmean":
        yield "examples", rows
    elif name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss") and isinstance(target, torch.Tensor):
        yield "elements", float(max(elements, target.numel()))
    elif not is_sum:
        per_row = name.startswith(("triplet", "cosine_embedding", "multi"))
        yield ("examples", rows) if per_row else ("elements", elements)
    if is_sum:
        yield "examples", rows
        yield "elements", elements


def _is_in_batch(args: Sequence[Any]) -> bool:
    """Whether the classes are the examples of the batch, as in a contrastive loss."""
    scores, target = args[0], args[1] if len(args) > 1 else None
    if not isinstance(target, torch.Tensor) or target.is_floating_point() or target.ndim != 1:
        return False
    is_square = scores.ndim == 2 and scores.shape[0] == scores.shape[1] == len(target) > 1
    return is_square and torch.equal(target, torch.arange(len(target), device=target.device))
