"""The head of a masked language model, at the masked positions only.

A vocabulary is wide (BERT's: 30,522): the logits of all positions take most of the memory and half of the
time of a small model, and the loss is a mean over the masked 15 % of them.
"""

from typing import Any

import torch

from gradacc_hf.accumulation.loss_items import IGNORED


def head_at_labels(model: Any) -> Any:
    """The same model; given `labels`, it computes logits (items, vocabulary), where they are not −100.

    It then gives no loss. Without labels it gives the logits of all positions, (batch, length, vocabulary),
    as ever. So does, with them, a model whose head does not call its output embeddings: `at_labels` takes
    both.
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
    """Logits (items, vocabulary) of the labelled positions, row by row, of what the model gave."""
    return logits if logits.ndim == 2 else logits[labels != IGNORED]
