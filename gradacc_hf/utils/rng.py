"""Read, restore and preserve the state of the random number generators."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> list[torch.Tensor]:
    """Return the states of the generators that dropout uses: torch's on the host, and the device's."""
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


def set_random_state(state: list[torch.Tensor], device: torch.device) -> None:
    """Restore the generators to a `random_state`."""
    torch.set_rng_state(state[0])
    for on_device in state[1:]:
        torch.cuda.set_rng_state(on_device, device)


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the generators of torch, numpy and Python to their present state at the end of the block."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def seed_host_generators() -> Iterator[None]:
    """Seed the generators of the host alike in all processes, and restore them at the end of the block.

    No GPU is used, so that a worker process of a loader can call it.
    """
    python, numpy, host = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(host)


def rng_states(device: torch.device) -> dict[str, Any]:
    """Return the states of all random number generators of this process."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    numpy = (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss)
    return {"torch": random_state(device), "python": random.getstate(), "numpy": numpy}


def set_rng_states(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore all generators to `rng_states`."""
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
    set_random_state(state["torch"], device)
