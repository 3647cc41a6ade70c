"""Replay the random numbers of the first pass over a window, such as dropout, in every later pass."""

from typing import Any

import torch

from gradacc_hf.utils.rng import random_state, set_random_state


class RngReplay:
    """The states of torch's generators at the start of each micro-batch, in the first pass over a window.

    Args:
        device: Device whose generator is recorded beside the generator of the host.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._states: list[Any] = []

    def enter(self, position: int) -> None:
        """Record the state at the first run of a micro-batch, and restore it at later runs."""
        if position < len(self._states):
            set_random_state(self._states[position], self._device)
        else:
            self._states.append(random_state(self._device))

    def rewind(self, position: int = 0) -> None:
        """Restore the state before a micro-batch, if it has been recorded."""
        if self._states:
            set_random_state(self._states[position], self._device)
