"""Outputs of a model in a form that transformers' Trainer reads: a mapping with the loss."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from gradacc_hf.accumulation.loss_items import logits_of, model_loss


@contextmanager
def for_trainer(model: torch.nn.Module) -> Iterator[None]:
    """Change the outputs of the model to a form that Trainer reads, inside the `with` block."""
    hook = model.register_forward_hook(lambda module, inputs, outputs: as_trainer_reads(outputs))
    try:
        yield
    finally:
        hook.remove()


def as_trainer_reads(outputs: Any) -> Any:
    """Return outputs as a mapping with a scalar loss. Outputs without a loss stay as they are."""
    try:
        loss = model_loss(outputs, {})
    except ValueError:  # no loss: Trainer has an error of its own, or a loss from the labels
        return outputs
    if isinstance(outputs, Mapping):
        return outputs if loss.ndim == 0 else {**outputs, "loss": loss.reshape(())}
    if isinstance(outputs, tuple | list) and outputs[0] is loss and loss.ndim == 0:
        return outputs
    logits = None if isinstance(outputs, torch.Tensor) else logits_of(outputs)
    return {"loss": loss.reshape(())} | ({} if logits is None else {"logits": logits})
