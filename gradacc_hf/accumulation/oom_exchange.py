"""Exchange between processes whether their micro-batches of a window fitted in memory."""

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
    """The smallest micro-batch, over all processes, that did not fit in memory.

    Attributes:
        examples: Number of examples.
        rows: Number of rows.
        lengths: Padded tokens of each column.
        alone: Index of the example, if the micro-batch had only one.
        half_bytes: Predicted bytes of half of the micro-batch, if it has no padding and bytes are predicted.
        needs: Size for a message: tokens, and bytes if they are predicted.
        message: The error of this process; empty if another process ran out of memory.
    """

    examples: int
    rows: int
    lengths: list[int]
    alone: int | None
    half_bytes: int
    needs: str
    message: str = ""


class PeerOutOfMemoryError(OutOfMemoryError):
    """Another process ran out of memory, while this process had enough."""

    def __init__(self, shortage: Shortage):
        super().__init__("another process is out of memory")
        self.shortage = shortage


@dataclass(frozen=True)
class OomExchange:
    """The exchange in which every process reports a failed micro-batch or success.

    Attributes:
        accelerator: The Accelerator of the run.
        shape: Example indices → rows and padded tokens of each column of their micro-batch.
        half_bytes: Example indices → predicted bytes of half of their micro-batch, or 0.
        bound: The bound of the split.
    """

    accelerator: Accelerator
    shape: Callable[[np.ndarray], tuple[int, list[int]]]
    half_bytes: Callable[[np.ndarray], int]
    bound: Bound

    def report_success(self, indices: np.ndarray) -> None:
        """Report success. Raise PeerOutOfMemoryError if another process ran out of memory.

        Args:
            indices: Any examples of the window. All processes exchange the same number of values.
        """
        if shortage := self._exchange(indices[:1], examples=0):
            raise PeerOutOfMemoryError(shortage)

    def report_failure(self, indices: np.ndarray) -> Shortage:
        """Report that memory ran out on these examples. Return the smallest failure of all processes."""
        shortage = self._exchange(indices, examples=max(1, len(indices)))
        assert shortage is not None
        return shortage

    def _exchange(self, indices: np.ndarray, examples: int) -> Shortage | None:
        rows, lengths = self.shape(indices)
        alone = int(indices[0]) if len(indices) == 1 else -1
        here = [examples, rows * sum(lengths), alone, self.half_bytes(indices), rows, *lengths]
        everywhere: Any = torch.tensor([here], device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            everywhere = self.accelerator.gather(everywhere)
        failures = [row for row in everywhere.tolist() if row[0]]
        if not failures:
            return None
        examples, _, alone, half_bytes, rows, *lengths = min(failures)
        needs = self.bound.needs(rows, lengths)
        return Shortage(examples, rows, lengths, alone if alone >= 0 else None, half_bytes, needs)
