"""Measure the free memory of the device, and return unused memory to the device or the system."""

import ctypes
import gc
import platform

import psutil
import torch

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def release_memory() -> None:
    """Return unused memory to the device or the system, now and whenever a tensor is freed later."""
    release_freed_memory_at_once()
    trim_memory()


def trim_memory() -> None:
    """Return unused memory from the caches of torch and glibc to the device or the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def release_freed_memory_at_once() -> None:
    """Let glibc return tensors above 1 MiB to the system as soon as they are freed.

    By default glibc keeps blocks of up to 32 MiB for later use. A step then holds 1.5 times as much memory.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def free_memory() -> int:
    """Return the free bytes of this process's device. On a CPU, the memory limit of the process applies."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    free = psutil.virtual_memory().available
    if hasattr(psutil, "RLIMIT_AS"):  # on Linux
        process = psutil.Process()
        limit, _ = process.rlimit(psutil.RLIMIT_AS)
        if limit != psutil.RLIM_INFINITY:
            free = min(free, max(0, limit - process.memory_info().vms))
    return free
