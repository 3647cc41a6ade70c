"""The part of a budget that this machine can provide.

`find_device` describes the machine; `adapt_budget` compares. A key that only makes a run faster is left out
if the machine cannot provide it, with one line that names the key. A key without which the run might not fit
is an error. `recipe/budget.py` does the same for the model, `training/optimizer.py` for the optimizer.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from gradacc_hf.config.schema import BudgetConfig, Config
from gradacc_hf.errors import InputError
from gradacc_hf.utils.hardware import Device, find_device, refuse_place


def fit_to_machine(config: Config) -> tuple[Config, list[str]]:
    """Return the config with a budget that this machine can provide, and a line about each changed key.

    Raises:
        InputError: On a machine where no run is exact, and as `adapt_budget` does.
    """
    device = find_device()
    refuse_place(device.kind, device.engine)
    budget, lines = adapt_budget(config.budget, device)
    return replace(config, budget=budget), lines


def export_cpu_offload(budget: BudgetConfig) -> None:
    """Export `budget.cpu_offload` to the environment, for Accelerate; call it before `Accelerator()`.

    Two parts of Accelerate read it from there: the FSDP plugin, and the choice of a communication backend,
    which must support tensors on CPUs.
    """
    if budget.cpu_offload:
        os.environ["FSDP_OFFLOAD_PARAMS"] = "true"


def adapt_budget(budget: BudgetConfig, device: Device) -> tuple[BudgetConfig, list[str]]:
    """Return the budget that the device can provide, and a line about each changed key.

    Raises:
        InputError: For `cpu_offload` without FSDP2 and `offload_activations` without a GPU, as the run might
            not fit without it.
    """
    if budget.cpu_offload and not device.fsdp2:
        raise InputError(
            "budget.cpu_offload: found true without FSDP2; allowed is false, or true on GPUs with "
            "accelerate launch --use_fsdp --fsdp_version 2"
        )
    if budget.offload_activations and device.kind != "cuda":
        raise InputError(
            "budget.offload_activations: found true without a CUDA GPU, where activations are in main memory "
            "anyway; allowed is false"
        )
    lines = []
    for key, value, why in _beyond(budget, device):
        lines.append(f"budget.{key}: {why}")
        budget = replace(budget, **{key: value})
    if budget.attention == "flash_attention_2" and (why := _no_flash_attention(budget, device)):
        lines.append(f"budget.attention: flash_attention_2 {why}: using the model's own choice")
        budget = replace(budget, attention=None)
    return budget, lines


def _beyond(budget: BudgetConfig, device: Device) -> Iterator[tuple[str, Any, str]]:
    """Yield (key, replacement of its value, reason) for each key that the device cannot provide."""
    if budget.precision == "fp16" and device.kind != "cuda":
        yield "precision", "fp32", "fp16 needs a GPU, and this machine has none: training in fp32"
    if budget.precision == "bf16" and not device.bf16:
        yield "precision", "fp16", "bf16 needs a GPU from Ampere on (RTX 30, A100): training in fp16"
    if budget.whole_gradients and not device.fsdp2:
        yield "whole_gradients", False, "needs FSDP2, which this run does not use: ignored"
    if budget.compile and not device.compiler:
        needs = "a C++ compiler and Python's headers" + (" and Triton" if device.kind == "cuda" else "")
        yield "compile", False, f"needs {needs}, which were not found: training uncompiled"


def _no_flash_attention(budget: BudgetConfig, device: Device) -> str:
    """Return why flash attention cannot be used; "" if it can."""
    if device.kind != "cuda":
        return "needs a CUDA GPU, and this machine has none"
    if not device.flash_attention:
        return "is not installed (pip install flash-attn)"
    return "" if budget.precision != "fp32" else "computes in bf16 or fp16, and budget.precision is fp32"
