"""The loss of each example of a micro-batch: to weigh examples, and to add up the loss of each source.

Models and recipes return a mean over items. The losses of the items exist only inside torch's loss
functions. While a `with` block of `ExampleLosses` runs, these functions compute the loss of each item and
return the weighted mean.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from gradacc_hf.accumulation.loss_items import IGNORED, CountItems
from gradacc_hf.errors import InputError

TOLERANCE = 2e-2  # between the loss of a micro-batch and the weighted mean: 16 bits, auxiliary losses
FUNCTIONS = ("cross_entropy", "binary_cross_entropy_with_logits", "mse_loss")


@dataclass(frozen=True)
class ExampleItems:
    """The items of the examples in a micro-batch.

    Attributes:
        weights: Weight of each example in the loss (examples,).
        items: Weighted items of each example (examples,).
        sources: Number of the source of each example (examples,).
        lengths: Tokens of each example (examples,), if they share one row; None for a row each.
    """

    weights: np.ndarray
    items: np.ndarray
    sources: np.ndarray
    lengths: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        batch: Mapping[str, Any],
        count_items: CountItems,
        weights: np.ndarray,
        sources: np.ndarray,
        lengths: np.ndarray | None,
    ) -> "ExampleItems":
        """Count the items of each example of a batch. Raise ValueError if it has no row for each example."""
        number = len(weights)
        sizes = np.ones(number, np.int64) if lengths is None else lengths
        along, total = (0, number) if lengths is None else (1, int(sizes.sum()))
        split = {
            name: value
            for name, value in batch.items()
            if isinstance(value, torch.Tensor) and value.ndim > along and value.shape[along] == total
        }
        if not split:
            raise ValueError(
                f"the batch of {number} examples has no tensor with a row for each: weights need one"
            )
        items = np.empty(number)
        for example, end in enumerate(np.cumsum(sizes)):
            start = int(end - sizes[example])
            own = {name: value.narrow(along, start, int(sizes[example])) for name, value in split.items()}
            items[example] = count_items({**batch, **own})
        return cls(weights, items * weights, sources, lengths)


class ExampleLosses:
    """Weigh the examples of a micro-batch in its loss, and add up the losses by source.

    Args:
        found: The items of the examples.
        batch: The micro-batch on the device.
        num_sources: The number of sources.
        weighs: Whether a loss that cannot be weighed is an error. Otherwise it only has no parts by source.

    Attributes:
        items: The weighted items of each example (examples,).
        parts: The part of each source in the mean loss, which is their sum (sources,). NaN if not known.
    """

    def __init__(self, found: ExampleItems, batch: Mapping[str, Any], num_sources: int, weighs: bool):
        self.batch, self.lengths, self.num_sources = batch, found.lengths, num_sources
        self.weighs, self.items = weighs, found.items
        tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
        device = tensors[0].device
        self.weights = torch.from_numpy(found.weights.astype(np.float32)).to(device)
        self.sources = torch.from_numpy(found.sources.astype(np.int64)).to(device)
        self.number_of_examples = len(found.weights)
        self.parts = torch.full((num_sources,), math.nan, device=device)
        self._means: list[torch.Tensor] = []  # of each call of a loss function: the parts of the sources

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replace torch's loss functions in a `with` block."""
        found = {name: getattr(functional, name) for name in FUNCTIONS}
        # A loop that was left may end its block after the next one has begun.
        before = {name: getattr(function, "replaces", function) for name, function in found.items()}
        for name, own in before.items():
            setattr(functional, name, self._replacement(name, own))
        try:
            yield
        finally:
            for name, own in before.items():
                setattr(functional, name, own)

    @property
    def calls(self) -> int:
        """The number of calls of loss functions so far."""
        return len(self._means)

    def forget_first(self, calls: int) -> None:
        """Forget the first calls if there were more: a model computes a loss that a recipe does not use."""
        if self.calls > calls:
            del self._means[:calls]

    def record(self, loss: torch.Tensor, checks: bool) -> None:
        """Record the mean loss of the micro-batch, and find the part of each source in it.

        Args:
            loss: The loss.
            checks: Whether to compare numbers, for which a GPU has to finish.

        Raises:
            InputError: With weights, the loss is not the weighted mean of the items.
        """
        if not self._means:
            if self.weighs:
                raise InputError(
                    "example weights: the loss was computed without cross_entropy, mse_loss and "
                    "binary_cross_entropy_with_logits of torch. Use one of these, or remove the weights"
                )
            return
        found = loss.detach().reshape(()).float()
        parts = self._parts_of(found)
        mean = parts.sum()
        is_mean = (found - mean).abs() <= TOLERANCE * mean.abs()
        if self.weighs and checks and bool(mean.isfinite() & found.isfinite() & ~is_mean):
            raise InputError(
                f"example weights: the loss is {float(found):.6g}, but the weighted mean over items is "
                f"{float(mean):.6g}, so that the weights do not reach it. Return the mean of one of torch's "
                "loss functions, or remove the weights"
            )
        self.parts = torch.where(is_mean, parts, math.nan)

    def _parts_of(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the parts of the sources in the mean of the last calls.

        The number of calls is the one whose mean is closest to the loss. Many models compute a loss, too,
        before a recipe computes the loss from the outputs.
        """
        latest = torch.stack(self._means[::-1]).cumsum(0)
        latest = latest / torch.arange(1, len(latest) + 1, device=latest.device)[:, None]
        return latest[(latest.sum(1) - loss).abs().nan_to_num(math.inf).argmin()]

    def _replacement(self, name: str, own: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def loss(
            input: Any,
            target: torch.Tensor,
            weight: torch.Tensor | None = None,
            size_average: bool | None = None,
            ignore_index: int = IGNORED,
            reduce: bool | None = None,
            reduction: str = "mean",
            **options: Any,
        ) -> torch.Tensor:
            if reduction == "none" or size_average is not None or reduce is not None:
                options |= {"size_average": size_average, "reduce": reduce, "reduction": reduction}
                options |= {"ignore_index": ignore_index} if name == "cross_entropy" else {}
                return own(input, target, weight=weight, **options)
            options |= {"weight": weight}
            if name == "cross_entropy":
                options |= {"ignore_index": ignore_index}
            losses = own(input, target, reduction="none", **options)
            terms = target if target.shape == losses.shape else losses
            examples = self._examples_of(terms.reshape(-1))
            if examples is None:
                self._means.append(torch.full_like(self.parts, math.nan))
                return own(input, target, reduction=reduction, **options)
            items = torch.ones_like(losses, dtype=torch.float32)
            if name == "cross_entropy" and not target.is_floating_point():
                is_item = target != ignore_index
                items = is_item.float()
                if weight is not None:
                    items = items * weight[torch.where(is_item, target, 0)]
            return self._reduced(losses, items, examples, reduction)

        vars(loss)["replaces"] = own
        return loss

    def _reduced(
        self, losses: torch.Tensor, items: torch.Tensor, examples: torch.Tensor, reduction: str
    ) -> torch.Tensor:
        """Return the weighted mean or sum of losses, and record the part of each source in the mean.

        Sums are in float32 at least: 16 bits cannot count the items of a micro-batch.
        """
        weights = self.weights[examples].view_as(losses)
        weighed = torch.where(weights > 0, losses * weights, 0)
        num_items = (weights * items).sum()
        by_source = losses.new_zeros(self.num_sources, dtype=torch.float32)
        by_source.index_add_(0, self.sources[examples], weighed.detach().reshape(-1).float())
        self._means.append(by_source / num_items)
        total = weighed.sum()
        return (total / num_items if reduction == "mean" else total).to(losses.dtype)

    def _examples_of(self, target: torch.Tensor) -> torch.Tensor | None:
        """Return the example of each element of a flattened target (elements,); None if it is not known."""
        number, elements = self.number_of_examples, len(target)
        numbers = torch.arange(number, device=target.device)
        if self.lengths is not None:
            if elements == int(self.lengths.sum()):
                return numbers.repeat_interleave(torch.from_numpy(self.lengths).to(target.device))
        else:
            labels: Any = self.batch.get("labels")
            of_tokens = isinstance(labels, torch.Tensor) and labels.ndim == 2
            of_tokens = of_tokens and len(labels) == number  # not of pairs, which have two rows each
            either: Sequence[torch.Tensor] = (labels, labels[:, 1:]) if of_tokens else ()
            for own in either:  # causal models shift labels
                if elements == own.numel():
                    return numbers.repeat_interleave(elements // number)
                chosen = own != IGNORED  # a loss of the labelled tokens only
                if elements == int(chosen.sum()) and torch.equal(target, own[chosen]):
                    return chosen.nonzero()[:, 0]
            if not of_tokens and elements % number == 0:
                return numbers.repeat_interleave(elements // number)
        if self.weighs:
            raise InputError(
                f"example weights: the loss has {elements} terms, which cannot be assigned to {number} "
                "examples: remove the weights"
            )
        return None
