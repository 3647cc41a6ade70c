"""Measure the gradient of the first micro-batches of a window, for the gradient noise scale.

`collation.py` draws their examples at random. `noise_scale.py` computes the noise scale from the norm.
"""

import math
from collections.abc import Sequence

from accelerate import Accelerator

from gradacc_hf.accumulation.accelerate_state import forwards_are_collective, prepared_parameters
from gradacc_hf.accumulation.noise_scale import SmallBatch
from gradacc_hf.accumulation.reference import grad_norm


class NoiseProbe:
    """One measurement, in one pass over a window.

    Attributes:
        sums: Squared norm, measurements (1 or 0), and share of the window's items in the micro-batches. Add
            them up over processes before `result`.

    Args:
        accelerator: The Accelerator of the run.
        num_examples: Examples of the first micro-batches of each process; 0 measures nothing.
        share: Items of this process's first micro-batches / items of the window.
    """

    def __init__(self, accelerator: Accelerator, num_examples: int, share: float):
        self._accelerator, self._num_examples, self._share = accelerator, num_examples, share
        self.sums = (0.0, 0.0, 0.0)

    def measure(self) -> None:
        """Measure the gradient after the first micro-batches, as the mean over their items."""
        accelerator = self._accelerator
        parameters = prepared_parameters(accelerator)
        if not self._num_examples or all(p.grad is None for p in parameters):  # an unprepared optimizer
            return
        norm = grad_norm(parameters)
        if not forwards_are_collective(accelerator):
            norm /= self._share * accelerator.num_processes  # DDP divides by the number of processes later
        if accelerator.scaler is not None:
            norm /= accelerator.scaler.get_scale()
        if math.isfinite(norm):
            self.sums = (norm**2, 1.0, self._share)

    def result(self, sums: Sequence[float]) -> SmallBatch | None:
        """Return the measurement from the sums over processes; None if no process measured."""
        square, known, share = map(float, sums)
        if not known:
            return None
        if forwards_are_collective(self._accelerator):  # the gradient covers the examples of all processes
            norm = math.sqrt(square / known) / share
            return SmallBatch(self._num_examples * self._accelerator.num_processes, norm)
        return SmallBatch(self._num_examples, math.sqrt(square / known))
