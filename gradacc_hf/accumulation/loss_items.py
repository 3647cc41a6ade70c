"""Losses, and the counts of the items that a loss is a mean over.

An item is one term of the mean: a predicted token, a labelled token, an example. A `CountItems` function
returns the number of items of a collated batch on the host. `window.py` weighs losses by this number, which
makes accumulation exact.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

if TYPE_CHECKING:
    from gradacc_hf.accumulation.window import Window

IGNORED = -100  # label of torch and transformers for a position without an item

SEVERAL_LOSSES = (
    "If it is a sum of several losses, give the items of each: num_items={'mlm': …, 'nsp': …}, and "
    "weigh({'mlm': …, 'nsp': …}), or a compute_loss that returns such a mapping"
)

CountItems = Callable[[Mapping[str, Any]], float]
Loss = torch.Tensor | Mapping[str, torch.Tensor]
"""A mean over items, or several means over items of their own, by name."""
ComputeLoss = Callable[[Any, Mapping[str, Any]], Loss]
"""(model outputs, batch) → the mean loss over the items of the batch; or a `WindowLoss`."""


@dataclass(frozen=True)
class CountSeveral:
    """Count the items of several losses, such as masked tokens and sentence pairs.

    Attributes:
        counts: The item count of each loss by name.
    """

    counts: Mapping[str, CountItems]

    def each(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Return the number of items of each loss."""
        return {name: float(count(batch)) for name, count in self.counts.items()}

    def __call__(self, batch: Mapping[str, Any]) -> float:
        return sum(self.each(batch).values())


def losses_by_name(loss: Loss, names: Collection[str], where: str) -> dict[str, torch.Tensor]:
    """Return several losses by name, or a single loss by the name "".

    Raises:
        ValueError: The names are not the names of `num_items`.
    """
    given = sorted(loss) if isinstance(loss, Mapping) else []
    if given != sorted(names):
        found = f"losses {given}" if given else "one loss"
        wanted = f"a mapping with the losses {sorted(names)}" if names else "one loss"
        raise ValueError(f"{where} got {found}; with num_items= of this loader, it takes {wanted}")
    return dict(loss) if isinstance(loss, Mapping) else {"": loss}


def total_loss(loss: Loss) -> torch.Tensor:
    """Return the sum of several losses; a single loss as it is."""
    if not isinstance(loss, Mapping):
        return loss
    first, *others = loss.values()
    return sum(others, first)


@runtime_checkable
class WindowLoss(Protocol):
    """A loss over all examples of a window together (`gradient_cache.py`).

    It is not a mean over micro-batches, and an example has no gradient of its own.
    """

    def look_ahead(self, model: torch.nn.Module, window: "Window") -> None:
        """Run the micro-batches of a window before the loop trains on them, with `window.forward_pass()`.

        A pass of `for batch in window` under `torch.no_grad` has the same effect.
        """
        ...

    def __call__(self, outputs: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the loss of the window. Its gradient is the part that flows through this micro-batch."""
        ...


def as_window_loss(compute_loss: ComputeLoss) -> WindowLoss | None:
    """Return a loss over a whole window as it is, and None for a mean over items."""
    return compute_loss if isinstance(compute_loss, WindowLoss) else None


def model_loss(outputs: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the loss that the model computed from the labels in the batch.

    Args:
        outputs: An object or a mapping with `loss`, a tuple with the loss, or the loss alone. In a tuple the
            loss is the first element, or else the only scalar.
        batch: The micro-batch.

    Raises:
        ValueError: The outputs hold no loss, or a loss for each item.
    """
    loss = _loss_of(outputs)
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return loss
    given = f"for a batch with {sorted(batch)}"
    if isinstance(loss, torch.Tensor) and loss.ndim == 1:
        raise ValueError(
            f"the model returned a loss for each of {len(loss)} items {given}: return the mean, or pass "
            "compute_loss= with the mean"
        )
    found = "" if loss is None else f" but a {_described(loss)}"
    raise ValueError(f"the model returned no loss{found} {given}: add labels, or pass compute_loss=")


def output_named(outputs: Any, name: str, position: int) -> Any:
    """Return one output of a model by its name, or by its position in a tuple; None if it is missing."""
    if isinstance(outputs, Mapping):
        return outputs.get(name)
    if isinstance(outputs, tuple | list) and not hasattr(outputs, name):
        return outputs[position] if len(outputs) > position else None
    return getattr(outputs, name, None)


def logits_of(outputs: Any) -> torch.Tensor | None:
    """Return the logits: the output of this name, the first of a tuple after the loss, or a tensor alone."""
    if isinstance(outputs, tuple | list) and not hasattr(outputs, "logits"):
        loss = _loss_of(outputs)
        return next((one for one in outputs if isinstance(one, torch.Tensor) and one is not loss), None)
    logits = outputs if isinstance(outputs, torch.Tensor) else output_named(outputs, "logits", position=1)
    return logits if isinstance(logits, torch.Tensor) and logits.ndim else None


def _loss_of(outputs: Any) -> Any:
    if isinstance(outputs, torch.Tensor):
        return outputs
    loss = output_named(outputs, "loss", position=0)
    if not isinstance(outputs, tuple | list) or (isinstance(loss, torch.Tensor) and loss.ndim == 0):
        return loss
    scalars = [one for one in outputs if isinstance(one, torch.Tensor) and one.ndim == 0]
    if scalars and isinstance(loss, torch.Tensor) and loss.shape == (1,):
        raise ValueError(
            "the model returned a tuple with several single numbers, and any may be the loss: return a "
            "mapping with 'loss', or pass compute_loss="
        )
    return scalars[0] if len(scalars) == 1 else loss  # (logits, loss)


def _described(value: Any) -> str:
    return (
        f"tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
    )


def count_labels(batch: Mapping[str, Any]) -> int:
    """Count the labels that are not −100, or the rows if labels are floats or booleans.

    Regression and multi-label classification have float or boolean labels. A batch of question answering has
    `start_positions` instead of labels. Its items are the examples whose answer lies inside the padded
    length, as the head ignores later positions.
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
                "an answer has only one end inside the padded text, so starts and ends have unequal items: "
                "move both ends outside, or remove the example"
            )
        return int(starts.sum())
    raise ValueError(
        f"the batch has {sorted(batch)} and no 'labels' to count: set num_items= to a function that counts "
        "the terms of the mean loss"
    )


def count_next_token(batch: Mapping[str, Any]) -> int:
    """Count the labels from position 1 on. A causal head predicts each token from the tokens before."""
    if "labels" not in batch:
        raise ValueError(f"num_items='next_token' counts batch['labels']; the batch has {sorted(batch)}")
    return int((batch["labels"][..., 1:] != IGNORED).sum())


COUNTS: dict[str, CountItems] = {"labels": count_labels, "next_token": count_next_token}


NumItems = str | CountItems | Mapping[str, str | CountItems]
"""A name in `COUNTS`, a function that counts the items of a batch, or one of these for each loss by name."""


def resolve(num_items: NumItems) -> CountItems:
    """Return the count function: one of `COUNTS` by name, the function itself, or `CountSeveral`."""
    if isinstance(num_items, Mapping):
        return CountSeveral({name: resolve(count) for name, count in num_items.items()})
    if callable(num_items):
        return num_items
    if num_items not in COUNTS:
        raise ValueError(
            f"num_items is {num_items!r}; allowed: {', '.join(map(repr, COUNTS))}, or a function of the batch"
        )
    return COUNTS[num_items]
