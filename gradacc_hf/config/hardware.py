"""What this machine can honour of a budget, and what becomes of the rest.

`find_device` looks; `adapt_budget` compares. A key that only makes a run faster is left off where it cannot
be had, with one line on stderr that names it; one that the run would not fit without is refused (InputError).
Machines that this is not for are refused as a whole (`arguments.refuse_place`). What the optimizer needs is
`optim.py`'s, what a model can be compiled to `compiled.py`'s.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from gradacc_hf.config.schema import BudgetConfig, Config
from gradacc_hf.errors import InputError
from gradacc_hf.utils.hardware import Device, find_device, refuse_place, say


def apply_budget(config: Config) -> None:
    """Set the budget of `config` to what this machine can honour of it; call it before `Accelerator()`.

    Raises InputError as `adapt_budget` does, and on a machine that this is not for.
    """
    device = find_device()
    refuse_place(device.kind, device.engine)
    config.budget, lines = adapt_budget(config.budget, device)
    for line in lines:
        say(line)
    if config.budget.cpu_offload:  # Accelerate reads it twice: for its plugin, and for how processes talk
        os.environ["FSDP_OFFLOAD_PARAMS"] = "true"


def adapt_attention(recipe: Any) -> None:
    """Leave a model its own choice where its class cannot compute attention as the budget says."""
    budget = recipe.config.budget
    if budget.attention is None:
        return
    try:
        recipe.empty_model()
    except InputError:
        recipe.config.budget = replace(budget, attention=None)
        own = type(recipe.empty_model()).__name__  # whatever else is wrong is raised here
        say(f"budget.attention: {own} has no {budget.attention}: the model's own choice instead")


def adapt_padding(recipe: Any) -> None:
    """Pad as little as can be where padding to a multiple is not for this task."""
    budget = recipe.config.budget
    if budget.pad_to_multiple_of is None:
        return
    why = ""
    if recipe.pad_to != "micro_batch":
        pads = {"window": "windows are padded alike", "nothing": "nothing is padded"}
        why = pads.get(recipe.pad_to, f"all is padded to {recipe.pad_to} tokens")
    elif recipe.tokens_are is not None:
        why = f"its tokens are {recipe.tokens_are}"
    if why:
        recipe.config.budget = replace(budget, pad_to_multiple_of=None)
        say(f"budget.pad_to_multiple_of: of no use for {type(recipe).__name__}, where {why}")


def adapt_budget(budget: BudgetConfig, device: Device) -> tuple[BudgetConfig, list[str]]:
    """The budget as far as the device can honour it, and a line about each key that it cannot.

    Raises InputError where a run of less than was asked for would not be the user's: without `cpu_offload` it
    would not fit.
    """
    if budget.cpu_offload and not device.fsdp2:
        raise InputError(
            "budget.cpu_offload: found true without FSDP2; allowed is false, or true on GPUs launched by "
            "accelerate launch --use_fsdp --fsdp_version 2"
        )
    lines = []
    for key, value, why in _beyond(budget, device):
        lines.append(f"budget.{key}: {why}")
        budget = replace(budget, **{key: value})
    if budget.attention == "flash_attention_2" and (why := _no_flash_attention(budget, device)):
        lines.append(f"budget.attention: flash_attention_2 {why}: the model's own choice instead")
        budget = replace(budget, attention=None)
    return budget, lines


def _beyond(budget: BudgetConfig, device: Device) -> Iterator[tuple[str, Any, str]]:
    """(key, what takes the place of its value, why), for each that the device cannot honour."""
    if budget.precision == "fp16" and device.kind != "cuda":
        yield "precision", "fp32", "fp16 needs a GPU, and none is here: training in fp32"
    if budget.precision == "bf16" and not device.bf16:
        yield "precision", "fp16", "bf16 needs a GPU from Ampere on (RTX 30, A100): training in fp16"
    if budget.whole_gradients and not device.fsdp2:
        yield "whole_gradients", False, "needs FSDP2, and processes were not launched for it: of no use"
    if budget.compile and not device.compiler:
        needs = "a C++ compiler and Python's headers" + (" and Triton" if device.kind == "cuda" else "")
        yield "compile", False, f"needs {needs}, and they are not here: training uncompiled"


def _no_flash_attention(budget: BudgetConfig, device: Device) -> str:
    """Why there is none; "" where there is."""
    if device.kind != "cuda":
        return "needs a CUDA GPU, and none is here"
    if not device.flash_attention:
        return "is not installed (pip install flash-attn)"
    return "" if budget.precision != "fp32" else "computes in bf16 or fp16, and budget.precision is fp32"
