"""`model.router_loss`: the router loss of a mixture of experts in the recipes."""

from typing import Any, Literal

import torch

from gradacc_hf.accumulation.router_loss import router_functions, router_loss_over_window
from gradacc_hf.errors import InputError

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "router_z_loss_coef")  # attributes of heads


def set_router_loss(model: torch.nn.Module, setting: Literal["window", "micro_batch", "none"]) -> str | None:
    """Apply `model.router_loss` to a model.

    Args:
        model: A model of transformers, also without weights.
        setting: "window": over the whole window. "micro_batch": transformers' own. "none": left out.

    Returns:
        A note for the plan. None for a model without a router loss.
    """
    heads: list[Any] = [module for module in model.modules() if router_functions(module)]
    factors = {name: getattr(head, name) for head in heads for name in COEFFICIENTS if hasattr(head, name)}
    if not any(factors.values()):
        return None
    for head in heads:
        head.config.output_router_logits = setting == "micro_batch"
    if setting == "none":
        return "none"
    times = ", ".join(f"{name} {factor:g}" for name, factor in factors.items())
    if setting == "micro_batch":
        for head in heads:
            head.register_forward_pre_hook(_only_in_training, with_kwargs=True)
        return f"over each micro-batch, not exact; {times}"
    try:
        router_loss_over_window(model)
    except InputError as error:
        return f"none: {error}"
    return f"over the window, by one more forward pass; {times}"


def router_loss_factor(head: torch.nn.Module) -> float:
    """Return the factor of `aux_loss` in the loss of a head; 0 for a head without a router loss."""
    if not router_functions(head):
        return 0.0
    return next((float(getattr(head, name)) for name in COEFFICIENTS if hasattr(head, name)), 0.0)


def _only_in_training(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """Leave the router loss out of evaluations, and of `generate`, where transformers fails with a cache."""
    return args, kwargs if module.training else kwargs | {"output_router_logits": False}


def counts_padding(config: Any) -> bool:
    """Whether the router loss of a model reads padding, so that it depends on the padded length."""
    return getattr(config, "model_type", None) == "switch_transformers"
