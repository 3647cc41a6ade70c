"""Losses, and the items that their means are over.

An item is one term of the mean: a predicted token, a labelled token, an example. `CountItems` takes a
collated batch on the host and returns a number. Weighing by it makes accumulation exact (`window.py`).
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

if TYPE_CHECKING:
    from gradacc_hf.accumulation.window import Window

IGNORED = -100  # torch's and transformers' label for "no item here"

CountItems = Callable[[Mapping[str, Any]], float]
ComputeLoss = Callable[[Any, Mapping[str, Any]], torch.Tensor]
"""(the model's outputs, the batch) → the mean loss over the batch's items; or a `WindowLoss`."""


@runtime_checkable
class WindowLoss(Protocol):
    """A loss of all examples of a window together (`gradient_cache.py`).

    It has no mean over micro-batches, and no example has a gradient of its own.
    """

    def look_ahead(self, model: torch.nn.Module, window: "Window") -> None:
        """Run the window's micro-batches (`window.forward_pass()`) before the loop trains on them.

        A pass of `for batch in window` under `torch.no_grad` does the same.
        """
        ...

    def __call__(self, outputs: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the window's loss, with the gradient that goes through this micro-batch."""
        ...


def as_window_loss(compute_loss: ComputeLoss) -> WindowLoss | None:
    """Return a loss of all examples of a window together; None for one that is a mean over items."""
    return compute_loss if isinstance(compute_loss, WindowLoss) else None


def look_ahead(compute_loss: ComputeLoss, model: torch.nn.Module, window: "Window") -> None:
    """Let a `WindowLoss` run the window's micro-batches; any other loss needs nothing."""
    if (window_loss := as_window_loss(compute_loss)) is not None:
        window_loss.look_ahead(model, window)


def model_loss(outputs: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the loss that the model computed itself, from the labels in its batch."""
    if getattr(outputs, "loss", None) is None:
        raise ValueError(
            f"the model gave no loss for a batch with {sorted(batch)}: add labels, or pass compute_loss="
        )
    return outputs.loss


def count_labels(batch: Mapping[str, Any]) -> int:
    """Count labels that are not −100; rows where labels are real or truth values (regression, multi-label).

    Question answering has `start_positions` instead. Its items are the examples whose answer lies inside the
    padded length, as the head ignores positions beyond it.
    """
    if "labels" in batch:
        labels = torch.as_tensor(batch["labels"])
        if labels.is_floating_point() or labels.dtype == torch.bool:
            return labels.shape[0]
        return int((labels != IGNORED).sum())
    if "start_positions" in batch:
        length = batch["input_ids"].shape[1]
        starts, ends = batch["start_positions"] < length, batch["end_positions"] < length
        if (starts != ends).any():
            raise ValueError(
                "an answer starts inside its padded text and ends outside, or the other way round: the means "
                "over starts and over ends have unequal items: put both outside, or leave the example out"
            )
        return int(starts.sum())
    raise ValueError(
        f"the batch has {sorted(batch)} and no 'labels' to count: pass num_items= a function of the "
        "batch that says how many terms its mean loss has"
    )


def count_next_token(batch: Mapping[str, Any]) -> int:
    """Count labels from position 1 on: a causal head predicts each token from those before it."""
    if "labels" not in batch:
        raise ValueError(f"num_items='next_token' counts batch['labels']; the batch has {sorted(batch)}")
    return int((batch["labels"][..., 1:] != IGNORED).sum())


COUNTS: dict[str, CountItems] = {"labels": count_labels, "next_token": count_next_token}


def resolve(num_items: str | CountItems) -> CountItems:
    """Return the function that counts: one of `COUNTS` by name, or the caller's own `batch -> number`."""
    if callable(num_items):
        return num_items
    if num_items not in COUNTS:
        raise ValueError(
            f"num_items is {num_items!r}; allowed: {', '.join(map(repr, COUNTS))}, or a function of the batch"
        )
    return COUNTS[num_items]
