"""What this machine can honour of a budget, and what becomes of the rest.

`find_device` looks; `honour_budget` compares. A key that only makes a run faster is left off where it cannot
be had, with one line on stderr that names it; one that the run would not fit without is refused (BadInput).
Machines that this is not for are refused as a whole (`arguments.refuse_place`). What the optimizer needs is
`optim.py`'s, what a model can be compiled to `compiled.py`'s.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_torch_xla_available, parse_flag_from_env
from torch.utils._triton import has_triton

from gradacc_hf.arguments import ENGINES, refuse_place
from gradacc_hf.config import BudgetConfig, Config
from gradacc_hf.errors import BadInput

ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
AMPERE = 8  # the first compute capability with bf16


@dataclass(frozen=True)
class Device:
    """What budgets ask of a machine; of several GPUs, what all of them have."""

    kind: str  # "cpu", "cuda", "mps", "xla", as torch names it
    bf16: bool = True
    compiler: bool = True  # that torch.compile can use
    flash_attention: bool = False
    fsdp2: bool = False  # is this process launched for it?
    engine: str = ""  # or for one of ENGINES?


def find_device() -> Device:
    """This machine's, of the processes as they were launched: the one that Accelerate will choose."""
    kind = _find_kind()
    gpus = range(torch.cuda.device_count()) if kind == "cuda" else ()
    return Device(
        kind=kind,
        bf16=all(torch.cuda.get_device_capability(index)[0] >= AMPERE for index in gpus),
        compiler=_has_compiler(kind),
        flash_attention=find_spec("flash_attn") is not None,
        fsdp2=os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("FSDP_VERSION") == "2",
        engine=next((name for name in ENGINES if os.environ.get(f"ACCELERATE_USE_{name}") == "true"), ""),
    )


def _find_kind() -> str:
    if is_torch_xla_available():  # Accelerate takes it wherever it is installed
        return "xla"
    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available():
        return "cpu"
    found = torch.accelerator.current_accelerator()
    return "cpu" if found is None else found.type


def _has_compiler(kind: str) -> bool:
    """A C++ compiler, and the headers of Python that what it compiles includes; on a GPU, Triton too."""
    if kind == "cuda" and not has_triton():
        return False
    compilers = (os.environ.get("CXX"), "g++", "clang++", "c++")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return header.is_file() and any(map(shutil.which, filter(None, compilers)))


def describe_device() -> str:
    """What `--budget auto` has found, in a few words."""
    if not torch.cuda.is_available():
        return f"no GPU: the CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = " and ".join(sorted({device.name for device in found}))
    memory = min(device.total_memory for device in found) / 2**30
    bf16 = "bf16" if all(device.major >= AMPERE for device in found) else "no bf16"
    return f"{len(found)} × {names}, {memory:.1f} GiB each, {bf16}"


def honour(config: Config) -> None:
    """Set the budget of `config` to what this machine can honour of it; call it before `Accelerator()`.

    Raises BadInput as `honour_budget` does, and on a machine that this is not for.
    """
    device = find_device()
    refuse_place(device.kind, device.engine)
    config.budget, lines = honour_budget(config.budget, device)
    for line in lines:
        say(line)
    if config.budget.cpu_offload:  # Accelerate reads it twice: for its plugin, and for how processes talk
        os.environ["FSDP_OFFLOAD_PARAMS"] = "true"


def honour_attention(recipe: Any) -> None:
    """Leave a model its own choice where its class cannot compute attention as the budget says."""
    budget = recipe.config.budget
    if budget.attention is None:
        return
    try:
        recipe.empty_model()
    except BadInput:
        recipe.config.budget = replace(budget, attention=None)
        own = type(recipe.empty_model()).__name__  # whatever else is wrong is raised here
        say(f"budget.attention: {own} has no {budget.attention}: the model's own choice instead")


def honour_padding(recipe: Any) -> None:
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


def honour_budget(budget: BudgetConfig, device: Device) -> tuple[BudgetConfig, list[str]]:
    """The budget as far as the device can honour it, and a line about each key that it cannot.

    Raises BadInput where a run of less than was asked for would not be the user's: without `cpu_offload` it
    would not fit.
    """
    if budget.cpu_offload and not device.fsdp2:
        raise BadInput(
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


def say(line: str) -> None:
    """A line on stderr, of the main process alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(line, file=sys.stderr)


def set_up_allocator() -> None:
    """CUDA memory in segments that can grow, which micro-batches of many shapes do not fragment.

    To be called before CUDA starts. Nothing is set where the user has set up the allocator.
    """
    if not any(name in os.environ for name in ALLOCATOR_NAMES):
        renamed = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
        os.environ[ALLOCATOR_NAMES[0 if renamed else 1]] = "expandable_segments:True"


def launched_for_several() -> bool:
    """Has `accelerate launch` been asked for several processes, and started this one alone?

    It says where processes are to meet, then, but not how many they are.
    """
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    sizes = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    return by_accelerate and "MASTER_ADDR" in os.environ and not any(name in os.environ for name in sizes)


def checkpoint_activations(model: Any) -> None:
    """Compute a model's activations again in the backward pass (`budget.gradient_checkpointing`)."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5.23
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
