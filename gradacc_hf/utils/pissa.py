"""Adapters that start at the largest singular values of the weights (PiSSA), and how they are saved.

peft splits each adapted weight W into adapters B₀A₀ and a frozen rest, W − B₀A₀. The trained adapters BA are
for that rest. They are saved as plain adapters for W itself, BA − B₀A₀ = [B, B₀] [A; −A₀], of twice the rank.
Any program loads these with the base model as it is, without another decomposition.

Source: Meng et al. 2024, https://arxiv.org/abs/2404.02948, section 3; peft saves them the same way.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ADAPTER = "default"  # peft's name for a single adapter
PARTS = ("lora_A", "lora_B")


def keep_initial_adapters(model: torch.nn.Module) -> None:
    """Keep a copy of each adapter's first matrices in buffers, for saving. No state dict has them."""
    from peft.tuners.lora import LoraLayer  # late: slow to import

    for module in model.modules():
        if isinstance(module, LoraLayer):
            for part in PARTS:
                first = getattr(module, part)[ADAPTER].weight.detach().clone()
                module.register_buffer(f"initial_{part}", first, persistent=False)  # type: ignore[attr-defined]


def has_initial_adapters(model: torch.nn.Module) -> bool:
    """Whether adapters of a model started at the largest singular values."""
    return any(hasattr(module, f"initial_{PARTS[0]}") for module in model.modules())


def plain_adapters(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict with plain adapters for the weights of the base model.

    Args:
        model: the model with adapters.
        state: its state dict, gathered if the model is sharded.
    """
    found = dict(state)
    for prefix, module in model.named_modules():
        if hasattr(module, f"initial_{PARTS[0]}"):
            first = {part: getattr(module, f"initial_{part}").cpu() for part in PARTS}
            name_a, name_b = (f"{prefix}.{part}.{ADAPTER}.weight" for part in PARTS)
            found[name_a] = torch.cat([state[name_a].cpu(), -first["lora_A"]], dim=0)
            found[name_b] = torch.cat([state[name_b].cpu(), first["lora_B"]], dim=1)
    return found


def describe_plain_adapters(config: Path) -> None:
    """Change a written adapter_config.json to plain adapters of twice the rank with the same scale."""
    values: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    values |= {"r": 2 * values["r"], "lora_alpha": 2 * values["lora_alpha"], "init_lora_weights": True}
    config.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
