"""Agree among processes whether memory sufficed for their micro-batches of a window."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from gradacc_hf.accumulation.splitting import Bound
from gradacc_hf.errors import OutOfMemoryError


@dataclass(frozen=True)
class Shortage:
    """The smallest micro-batch, over all processes, that memory did not suffice for.

    `lengths`: padded tokens of each column. `alone`: index of the example that was all of the micro-batch.
    `needs`: the size for messages, in tokens, and in bytes where these are predicted. `message`: the error of
    this process; empty where another process ran out of memory.
    """

    examples: int
    rows: int
    lengths: list[int]
    alone: int | None
    needs: str
    message: str = ""


class PeerOutOfMemoryError(OutOfMemoryError):
    """Raised in a process that had enough memory, when another process had not."""

    def __init__(self, shortage: Shortage):
        super().__init__("another process is out of memory")
        self.shortage = shortage


@dataclass(frozen=True)
class OomExchange:
    """The exchange that every process takes part in, with a failed micro-batch or without one.

    `shape`: example indices → rows and padded tokens of each column of their micro-batch. `bound`: what the
    window was split under.
    """

    accelerator: Accelerator
    shape: Callable[[np.ndarray], tuple[int, list[int]]]
    bound: Bound

    def report_success(self, indices: np.ndarray) -> None:
        """Say that memory sufficed here. Raises PeerOutOfMemoryError where it did not elsewhere.

        `indices`: any examples of the window, so that all processes exchange equally many numbers.
        """
        if shortage := self._exchange(indices[:1], examples=0):
            raise PeerOutOfMemoryError(shortage)

    def report_failure(self, indices: np.ndarray) -> Shortage:
        """Say that memory ran out on these examples; return the smallest failure of all processes."""
        shortage = self._exchange(indices, examples=max(1, len(indices)))
        assert shortage is not None
        return shortage

    def _exchange(self, indices: np.ndarray, examples: int) -> Shortage | None:
        rows, lengths = self.shape(indices)
        alone = int(indices[0]) if len(indices) == 1 else -1
        here = [examples, rows * sum(lengths), alone, rows, *lengths]
        everywhere: Any = torch.tensor([here], device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            everywhere = self.accelerator.gather(everywhere)
        failures = [row for row in everywhere.tolist() if row[0]]
        if not failures:
            return None
        examples, _, alone, rows, *lengths = min(failures)
        needs = self.bound.needs(rows, lengths)
        return Shortage(examples, rows, lengths, alone if alone >= 0 else None, needs)
