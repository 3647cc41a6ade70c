"""What a mean loss is a mean over: counting items, per kind of head.

An item is one term of the mean: a predicted token, a labelled token, an example. Takes a collated batch on
the host, gives a number. Weighing by it is what makes accumulation exact (`windows.py`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

IGNORED = -100  # torch's and transformers' label for "no item here"

CountItems = Callable[[Mapping[str, Any]], float]
ComputeLoss = Callable[[Any, Mapping[str, Any]], torch.Tensor]
"""(the model's outputs, the batch) → the mean loss over the batch's items.

One with a method `look_ahead(model, window)` is a loss of all examples of a window together: that is called
before each window's micro-batches (`contrastive.py`).
"""


def model_loss(outputs: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """The loss that the model computed itself, from the labels in its batch."""
    if getattr(outputs, "loss", None) is None:
        raise ValueError(
            f"the model gave no loss for a batch with {sorted(batch)}: add labels, or pass compute_loss="
        )
    return outputs.loss


def count_labels(batch: Mapping[str, Any]) -> int:
    """Labels that are not −100; rows where labels are real or truth values (regression, multi-label).

    Question answering has `start_positions` instead: its items are the examples whose answer lies inside the
    padded length, as positions beyond it are ignored by the head.
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
    """Labels from position 1 on: a causal head predicts each token from those before it."""
    if "labels" not in batch:
        raise ValueError(f"num_items='next_token' counts batch['labels']; the batch has {sorted(batch)}")
    return int((batch["labels"][..., 1:] != IGNORED).sum())


COUNTS: dict[str, CountItems] = {"labels": count_labels, "next_token": count_next_token}


def resolve(num_items: str | CountItems) -> CountItems:
    """The function that counts: one of `COUNTS` by name, or the caller's own `batch -> number`."""
    if callable(num_items):
        return num_items
    if num_items not in COUNTS:
        raise ValueError(
            f"num_items is {num_items!r}; allowed: {', '.join(map(repr, COUNTS))}, or a function of the batch"
        )
    return COUNTS[num_items]
