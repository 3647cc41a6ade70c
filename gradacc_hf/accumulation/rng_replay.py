"""Give every pass over a window the random numbers (dropout) that its first pass drew."""

from typing import Any

import torch

from gradacc_hf.utils.rng import random_state, set_random_state


class RngReplay:
    """The states of torch's generators as each micro-batch of a window met them first.

    Args:
        device: Device whose generator is recorded beside the host's.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._states: list[Any] = []

    def enter(self, position: int) -> None:
        """Record the state for a micro-batch that comes for the first time; else restore the recorded one."""
        if position < len(self._states):
            set_random_state(self._states[position], self._device)
        else:
            self._states.append(random_state(self._device))

    def rewind(self) -> None:
        """Restore the state that the first micro-batch met; nothing where none has come."""
        if self._states:
            set_random_state(self._states[0], self._device)
