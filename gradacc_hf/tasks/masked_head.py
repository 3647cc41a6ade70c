"""The head of a masked language model, computed at the masked positions only.

The vocabulary is large (30,522 tokens in BERT). The logits of all positions take most of the memory and half
of the time of a small model. The loss needs only the masked 15 % of the positions.
"""

from typing import Any

import torch

from gradacc_hf.accumulation.loss_items import IGNORED


def head_at_labels(model: Any) -> Any:
    """Make the model compute logits only where `labels` are not −100: (items, vocabulary). Return the model.

    With labels, it returns no loss. Without labels, it returns the logits of all positions (batch, length,
    vocabulary). A model whose head does not call its output embeddings returns all logits in both cases:
    `at_labels` takes both shapes.
    """
    chosen: list[torch.Tensor] = []

    def look(module: Any, args: Any, kwargs: Any) -> Any:
        labels = kwargs.pop("labels", None)
        chosen[:] = [] if labels is None else [labels != IGNORED]
        return args, kwargs

    def select(module: Any, args: Any) -> Any:
        if chosen and args[0].shape[:2] == chosen[0].shape:
            return args[0][chosen[0]], *args[1:]

    model.register_forward_pre_hook(look, with_kwargs=True)
    if (embeddings := model.get_output_embeddings()) is not None:
        embeddings.register_forward_pre_hook(select)
    return model


def at_labels(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the logits (items, vocabulary) of the labelled positions, from all logits or from these."""
    return logits if logits.ndim == 2 else logits[labels != IGNORED]
