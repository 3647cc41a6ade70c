"""Out of memory: split the current window into smaller micro-batches and run it again.

Every split of a window has the same gradient, so nothing else changes. A loop puts `retry_on_oom` around its
micro-batches.
"""

import ctypes
import gc
import platform
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from accelerate.logging import get_logger
from torch.nn.parallel import DistributedDataParallel

from gradacc_hf.accumulation.window import PeerOutOfMemoryError, Window
from gradacc_hf.errors import OutOfMemoryError, one_line

logger = get_logger(__name__)

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
# torch's allocator on a CPU; C++'s; oneDNN, which has none of its own words for it.
SAID = ("can't allocate memory", "bad_alloc", "could not create a", "std::length_error")


def out_of_memory(error: BaseException) -> bool:
    """Is this what is raised on a GPU, or on a CPU, where memory does not suffice?"""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAID)


def release_memory() -> None:
    """What nothing holds any more goes back to the device, or the system, now and from here on."""
    release_freed_memory_at_once()
    trim_memory()


def trim_memory() -> None:
    """What nothing holds any more goes back to the device, or the system, rather than into a cache."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def release_freed_memory_at_once() -> None:
    """Tensors above 1 MiB go back to the system as soon as nothing holds them, on a CPU: glibc keeps up to
    32 MiB of each for what comes next, of another size, so that a step holds half as much again and more."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def free_memory() -> int:
    """Bytes that are left on this process's device; on a CPU no more than it is allowed to take."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    free = psutil.virtual_memory().available
    if hasattr(psutil, "RLIMIT_AS"):  # on Linux
        process = psutil.Process()
        limit, _ = process.rlimit(psutil.RLIMIT_AS)
        if limit != psutil.RLIM_INFINITY:
            free = min(free, max(0, limit - process.memory_info().vms))
    return free


@contextmanager
def retry_on_oom(window: Window, model: torch.nn.Module, optimizer: Any) -> Iterator[None]:
    """Run a window's micro-batches in this; where memory ran out, it is not `done`, and is to be run again.

        while not window.done:
            with retry_on_oom(window, model, optimizer):
                for batch in window:
                    ...

    The gradients are dropped, and this window and all later ones are split into smaller micro-batches. Raises
    OutOfMemoryError if one example alone does not fit, if the states of the optimizer do not fit, or if other
    processes already wait for the gradients of this process.
    """
    steps: list[int] = []
    hook = getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(lambda *_: steps.append(1))
    window.prepare_for_oom()
    window.snapshot_buffers(model)
    shortage = said = None
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, PeerOutOfMemoryError):
            shortage = error.shortage
        elif out_of_memory(error):
            said = one_line(error)[:200]
        else:
            raise
        traceback.clear_frames(error.__traceback__)  # they hold activations
    finally:
        hook.remove()
    if shortage is None and said is None:
        return
    optimizer.zero_grad()
    window.restore_buffers()
    window.release_graph()
    if isinstance(model, DistributedDataParallel):
        # Else only a process whose forward broke off would wait for buffers from the first one.
        model.require_forward_param_sync = False
    release_memory()
    if steps:
        raise OutOfMemoryError(
            f"out of memory in the optimizer's step ({said}): its states do not fit, whatever the split; "
            "take a leaner one (--optim.name adafactor), --model.lora.rank 8, or more memory"
        )
    shortage = shortage or window.share_oom(said or "")
    if shortage.alone is not None:
        raise OutOfMemoryError(
            f"out of memory on example {shortage.alone} alone, of {shortage.needs}, with "
            f"{free_memory() / 2**20:,.0f} MiB free ({shortage.said or 'in another process'}): shorten it "
            "(--data.max_length), or set --budget.gradient_checkpointing true or --budget.precision bf16"
        )
    bound = window.split_finer(shortage)
    logger.warning(
        f"window {window.number} of epoch {window.epoch}: out of memory in a micro-batch of "
        f"{shortage.examples} examples, {shortage.needs}; from here on at most {bound}, and this window is "
        "run again"
    )
