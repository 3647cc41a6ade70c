"""Muon for the matrices of hidden layers, AdamW for all other weights, as one optimizer.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. The learning rate follows Liu et al.
2025, https://arxiv.org/abs/2502.16982: updates have the size of AdamW's, so that AdamW's rates can be used.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

LINEAR = (torch.nn.Linear, Conv1D)


def hidden_matrices(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the trained weights of the linear layers in the body of a model.

    Embeddings and the head are not among them. Without a transformers model inside, the body is all of the
    model.
    """
    inner: Any = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    body = model if inner is None else inner.base_model
    outputs = None if inner is None else inner.get_output_embeddings()
    of_words = {outputs, *(m for m in model.modules() if isinstance(m, torch.nn.Embedding))} - {None}
    excluded = {id(module.weight) for module in of_words}
    found: dict[int, Any] = {id(m.weight): m.weight for m in body.modules() if isinstance(m, LINEAR)}
    return [weight for key, weight in found.items() if key not in excluded and weight.requires_grad]


class MuonWithAdamW(Optimizer):
    """One optimizer with the groups and states of both, for schedules, checkpoints and Accelerate.

    Args:
        muon: groups for `torch.optim.Muon`, of matrices only.
        adamw: groups for AdamW; there may be none.
        lr: the learning rate of both.
        of_adamw: further settings of AdamW.
    """

    def __init__(
        self, muon: list[dict[str, Any]], adamw: list[dict[str, Any]], lr: float, **of_adamw: Any
    ) -> None:
        parts: list[Optimizer] = [torch.optim.Muon(muon, lr=lr, adjust_lr_fn="match_rms_adamw")]
        if adamw:
            parts.append(AdamW(adamw, lr=lr, **of_adamw))
        self._parts = [(part, len(part.param_groups)) for part in parts]
        super().__init__([group for part in parts for group in part.param_groups], {"lr": lr})

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs. An optimizer of torch copies only groups and states."""
        return {**super().__getstate__(), "_parts": self._parts}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step both parts. They get the present groups and states, which loading replaces."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = 0
        for part, number in self._parts:
            part.param_groups, part.state = self.param_groups[first : first + number], self.state
            part.step()
            first += number
        return loss
