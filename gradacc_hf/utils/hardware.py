"""Detection of the device and its features."""

import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate.utils import is_torch_xla_available, parse_flag_from_env
from torch.utils._triton import has_triton

from gradacc_hf.errors import InputError

ENGINES = ("DEEPSPEED", "MEGATRON_LM")  # as accelerate.utils.DistributedType names them
DEVICES = ("cpu", "cuda")  # as torch names them: AMD's (ROCm) is "cuda", too
_NAMES = {"mps": "mps, an Apple GPU", "xla": "xla, a TPU or another torch_xla device"}
_ON_THE_CPU = {"xla": "USE_TORCH_XLA=false"}
ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
AMPERE = 8  # the first compute capability with bf16


def refuse_place(device: str, engine: str = "", system: str = sys.platform) -> None:
    """Raise InputError for a device, engine or system on which windows are not exact or were never run.

    Args:
        device: a device type of torch.
        engine: a name of `accelerate.utils.DistributedType`.
        system: a value of `sys.platform`.
    """
    if system in ("win32", "cygwin"):
        raise InputError("system: found Windows; use WSL 2 (wsl --install), which is Linux")
    if engine in ENGINES:
        raise InputError(
            f"{engine} accumulates and scales gradients by itself, so windows cannot be exact with it: "
            "launch with DDP or FSDP (--multi_gpu or --use_fsdp) instead"
        )
    if device not in DEVICES:
        on_the_cpu = _ON_THE_CPU.get(device, "ACCELERATE_USE_CPU=true")
        raise InputError(
            f"device: found {_NAMES.get(device, device)}, which gradacc was never tested on; use a CUDA GPU, "
            f"or the CPU ({on_the_cpu} in the environment)"
        )


@dataclass(frozen=True)
class Device:
    """The features of a machine that budgets depend on. Several GPUs have a feature if each GPU has it."""

    kind: str  # "cpu", "cuda", "mps" or "xla", as torch names it
    bf16: bool = True
    compiler: bool = True  # one that torch.compile can use
    flash_attention: bool = False
    fsdp2: bool = False  # whether this process was launched for FSDP2
    engine: str = ""  # the engine of ENGINES that this process was launched for, or ""


def find_device() -> Device:
    """Return the device that Accelerate will choose for this process, as it was launched."""
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
    if is_torch_xla_available():  # Accelerate uses torch_xla wherever it is installed
        return "xla"
    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available():
        return "cpu"
    found = torch.accelerator.current_accelerator()
    return "cpu" if found is None else found.type


def _has_compiler(kind: str) -> bool:
    """Whether torch.compile finds a C++ compiler and the headers of Python; on a GPU, Triton too."""
    if kind == "cuda" and not has_triton():
        return False
    compilers = (os.environ.get("CXX"), "g++", "clang++", "c++")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return header.is_file() and any(map(shutil.which, filter(None, compilers)))


def describe_device() -> str:
    """Return a short description of the devices that `--budget auto` found."""
    if not torch.cuda.is_available():
        return f"no GPU: the CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = " and ".join(sorted({device.name for device in found}))
    memory = min(device.total_memory for device in found) / 2**30
    bf16 = "bf16" if all(device.major >= AMPERE for device in found) else "no bf16"
    return f"{len(found)} × {names}, {memory:.1f} GiB each, {bf16}"


def say(line: str) -> None:
    """Print a line on stderr, on the main process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(line, file=sys.stderr)


def set_up_allocator() -> None:
    """Let CUDA allocate memory in segments that can grow.

    Micro-batches of many shapes fragment segments of fixed size. Call this before CUDA starts. It changes
    nothing where the user has configured the allocator.
    """
    if not any(name in os.environ for name in ALLOCATOR_NAMES):
        renamed = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
        os.environ[ALLOCATOR_NAMES[0 if renamed else 1]] = "expandable_segments:True"


def launched_for_several() -> bool:
    """Whether `accelerate launch` was called for several processes but started only this one.

    The environment then has the address of the main process, but not the number of processes.
    """
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    sizes = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    return by_accelerate and "MASTER_ADDR" in os.environ and not any(name in os.environ for name in sizes)
