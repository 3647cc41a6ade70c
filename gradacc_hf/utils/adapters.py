"""Files of adapters that peft and transformers load with the base model as it is.

**PiSSA.** peft splits each adapted weight W into adapters B₀A₀ and a frozen rest, W − B₀A₀. The trained
adapters BA are for that rest. They are saved as plain adapters for W itself, BA − B₀A₀ = [B, B₀] [A; −A₀], of
twice the rank. No program needs another decomposition to load them. Source: Meng et al. 2024,
https://arxiv.org/abs/2404.02948, section 3; peft has the same conversion for its own models.

**DoRA.** peft names the trained lengths `…lora_magnitude_vector`. transformers 5.23 leaves these out with a
warning when it loads adapters, and peft also loads `…lora_magnitude_vector.weight`.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ADAPTER = "default"  # peft's name for a single adapter
ADAPTER_CONFIG = "adapter_config.json"
LENGTHS = "lora_magnitude_vector"
PARTS = ("lora_A", "lora_B")


def has_adapters(model: torch.nn.Module) -> bool:
    """Whether a model has adapters of peft."""
    return any(hasattr(module, PARTS[0]) for module in model.modules())


@contextmanager
def without_adapters(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield a model whose adapters, and the modules trained with them, have no effect in the block.

    The same parameters are trained after it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # late: slow to import
    from peft.utils import ModulesToSaveWrapper

    kinds = BaseTunerLayer, ModulesToSaveWrapper
    layers: list[Any] = [module for module in model.modules() if isinstance(module, kinds)]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield model
    finally:
        for layer, was_disabled in zip(layers, before, strict=True):
            layer.enable_adapters(not was_disabled)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


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


def complete_adapters(folder: Path, are_plain: bool) -> None:
    """Change written adapters so that every program loads all of them.

    Args:
        folder: the folder with the config and the weights of the adapters.
        are_plain: whether `plain_adapters` made the weights.
    """
    config, file = folder / ADAPTER_CONFIG, folder / "adapter_model.safetensors"
    values: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    if are_plain:  # the scale, alpha / rank, stays
        values |= {"r": 2 * values["r"], "lora_alpha": 2 * values["lora_alpha"], "init_lora_weights": True}
        config.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
    if values.get("use_dora"):
        saved = load_file(file)
        named = {f"{name}.weight" if name.endswith(LENGTHS) else name: t for name, t in saved.items()}
        save_file(named, file, {"format": "pt"})
