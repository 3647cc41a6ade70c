"""Predict the bytes of a training step from a micro-batch's rows and length: numbers only, no torch.

At every moment of a step, live memory is a polynomial in the rows and the length (or lengths, where columns
are padded on their own). The peak is the largest of them. `memory/estimator.py` finds the polynomials;
`splitting.Bound` bounds a split by them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

Lengths = int | Sequence[int] | np.ndarray
LONGEST = 2**40  # tokens that one row may have: more than any memory holds


@dataclass(frozen=True)
class Parts:
    """Bytes at the moment of a step when most are held."""

    parameters: int
    gradients: int
    optimizer: int  # its states
    activations: int  # and what comes and goes beside them in the backward pass
    loss: int  # logits, and what the loss makes of them
    workspace: int  # what libraries hold beside the tensors, and memory lost between blocks

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True, eq=False)
class MicroBatchMemory:
    """bytes(rows, length) of one process: what is always there, and the moments of a step.

    `exponents` (terms, 1 + columns): the powers of rows and of each length that a term is the product of.
    `activations`, `loss` (moments, terms): its factors. `workspace` is in bytes, `workspace_share` a share of
    activations and loss. All lengths are in tokens, as `WindowLoader` counts them.
    """

    parameters: int
    gradients: int
    optimizer: int
    exponents: np.ndarray
    activations: np.ndarray
    loss: np.ndarray
    workspace: int = 0
    workspace_share: float = 0.0

    @property
    def resident(self) -> int:
        """Bytes that are there between micro-batches."""
        return self.parameters + self.gradients + self.optimizer + self.workspace

    @cached_property
    def _moments(self) -> np.ndarray:
        return self.activations + self.loss

    def terms(self, rows: float, lengths: Lengths) -> np.ndarray:
        """The products that the factors belong to (terms)."""
        values = np.array([rows, *np.atleast_1d(lengths)], dtype=np.float64)
        return np.prod(values**self.exponents, axis=1)

    def parts(self, rows: int, lengths: Lengths) -> Parts:
        """Bytes of `rows` examples padded to `lengths`, by part, when most are held."""
        terms = self.terms(rows, lengths)
        most = int((self._moments @ terms).argmax())
        together = float(self._moments[most] @ terms)
        loss = min(together, max(0.0, float(self.loss[most] @ terms)))
        return Parts(
            parameters=self.parameters,
            gradients=self.gradients,
            optimizer=self.optimizer,
            activations=round(together - loss),
            loss=round(loss),
            workspace=self.workspace + round(self.workspace_share * together),
        )

    def bytes(self, rows: int, lengths: Lengths) -> int:
        """The most that a step with `rows` examples padded to `lengths` holds."""
        return self.parts(rows, lengths).total

    def max_rows(self, lengths: Lengths, max_bytes: int) -> int:
        """How many examples padded to `lengths` fit into `max_bytes`; 0 where not even one does."""
        available = (max_bytes - self.resident) / (1 + self.workspace_share)
        nothing, one = (self._moments @ self.terms(rows, lengths) for rows in (0, 1))
        a_row = one - nothing  # every term has rows to the power of 0 or 1
        if available < 0 or (one > available).any():
            return 0
        growing = a_row > 0
        if not growing.any():
            return LONGEST
        return int(((available - nothing[growing]) / a_row[growing]).min())

    def max_length(self, max_bytes: int) -> int:
        """How many tokens one row may have (packing); 0 where not even one fits."""
        low, high = 0, LONGEST
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.max_rows(middle, max_bytes) else (low, middle - 1)
        return low

    def over_processes(
        self, processes: int, sharded: bool, largest_layer: int = 0, whole_gradients: bool = False
    ) -> "MicroBatchMemory":
        """Of each of several processes: DDP, or with `sharded` FSDP2.

        DDP reduces gradients in buckets, a second copy. FSDP2 divides parameters, gradients and optimizer
        states, and gathers a layer of `largest_layer` bytes while the next one comes, its gradients too; with
        `whole_gradients` it holds all of these.
        """
        if processes == 1:
            return self
        if not sharded:
            return replace(self, gradients=2 * self.gradients)
        return replace(
            self,
            parameters=self.parameters // processes + 2 * largest_layer,
            gradients=self.gradients if whole_gradients else self.gradients // processes + largest_layer,
            optimizer=self.optimizer // processes,
        )

    def to_json(self) -> dict[str, Any]:
        """As plain numbers and lists."""
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "MicroBatchMemory":
        """What `to_json` gave."""
        made: dict[str, Any] = {n: np.array(v) if isinstance(v, list) else v for n, v in values.items()}
        return cls(**made)
