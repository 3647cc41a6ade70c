"""Predict the bytes of a training step from the rows and length of a micro-batch: numbers only, no torch.

At every moment of a step, live memory is a polynomial in the rows and the length. With separately padded
columns, there are several lengths. The peak is the maximum over all moments. `memory/estimator.py` finds the
polynomials. `splitting.Bound` limits a split by the prediction.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

Lengths = int | Sequence[int] | np.ndarray
LONGEST = 2**40  # tokens of a row without limit: more than any memory holds


@dataclass(frozen=True)
class Parts:
    """Bytes at the peak of a training step, by kind."""

    parameters: int
    gradients: int
    optimizer: int  # states of the optimizer
    activations: int  # including temporary tensors of the backward pass
    loss: int  # logits, and the tensors that the loss computes from them
    workspace: int  # memory of libraries, and fragmentation

    @property
    def total(self) -> int:
        """The sum of all kinds."""
        return sum(asdict(self).values())


@dataclass(frozen=True, eq=False)
class MicroBatchMemory:
    """The memory of one process as a function of rows and lengths.

    All lengths are in tokens, as `WindowLoader` counts them.

    Attributes:
        parameters: Bytes of the parameters.
        gradients: Bytes of the gradients.
        optimizer: Bytes of the optimizer states.
        exponents: Powers of the rows and of each length in each term, (terms, 1 + columns).
        activations: Bytes of activations: factors of the terms at each moment, (moments, terms).
        loss: Bytes of the loss: factors of the terms at each moment, (moments, terms).
        workspace: Bytes that libraries hold.
        workspace_share: Further workspace, as a share of activations and loss.
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
        """Bytes in use between micro-batches."""
        return self.parameters + self.gradients + self.optimizer + self.workspace

    @cached_property
    def _moments(self) -> np.ndarray:
        return self.activations + self.loss

    def terms(self, rows: float, lengths: Lengths) -> np.ndarray:
        """Return the value of each term (terms)."""
        values = np.array([rows, *np.atleast_1d(lengths)], dtype=np.float64)
        return np.prod(values**self.exponents, axis=1)

    def parts(self, rows: int, lengths: Lengths) -> Parts:
        """Return the bytes at the peak of a step with `rows` examples padded to `lengths`, by kind."""
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
        """Return the peak bytes of a step with `rows` examples padded to `lengths`."""
        return self.parts(rows, lengths).total

    def bytes_without_padding(self, tokens: np.ndarray) -> int:
        """Return the peak bytes of a step whose layers compute no padding, and whose loss is padded.

        Args:
            tokens: Tokens of the examples, (examples, columns).
        """
        padded = self.terms(len(tokens), tokens.max(0))
        lengths, number = np.unique(tokens, axis=0, return_counts=True)
        each = np.prod(
            np.insert(lengths.astype(np.float64), 0, 1.0, axis=1)[:, None] ** self.exponents, axis=2
        )
        layers = np.where(self.exponents[:, 0] == 0, padded, number @ each)
        most = float((self.activations @ layers + self.loss @ padded).max())
        return self.resident + round((1 + self.workspace_share) * most)

    def max_rows(self, lengths: Lengths, max_bytes: int) -> int:
        """Return how many examples padded to `lengths` fit into `max_bytes`; 0 if not even one fits."""
        available = (max_bytes - self.resident) / (1 + self.workspace_share)
        nothing, one = (self._moments @ self.terms(rows, lengths) for rows in (0, 1))
        a_row = one - nothing  # linear, as every term has rows to the power of 0 or 1
        if available < 0 or (one > available).any():
            return 0
        growing = a_row > 0
        if not growing.any():
            return LONGEST
        return int(((available - nothing[growing]) / a_row[growing]).min())

    def max_length(self, max_bytes: int) -> int:
        """Return how many tokens of one packed row fit into `max_bytes`; 0 if not even one fits."""
        low, high = 0, LONGEST
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.max_rows(middle, max_bytes) else (low, middle - 1)
        return low

    def over_processes(
        self, processes: int, sharded: bool, largest_layer: int = 0, whole_gradients: bool = False
    ) -> "MicroBatchMemory":
        """Return the memory of each of several processes, for DDP or FSDP2.

        DDP holds a second copy of the gradients, in buckets. FSDP2 divides parameters, gradients and
        optimizer states. It also holds two gathered layers and the gradients of one.

        Args:
            processes: Number of processes.
            sharded: Whether FSDP2 is used.
            largest_layer: Bytes of the largest layer that FSDP2 gathers.
            whole_gradients: Whether FSDP2 holds unsharded gradients of all layers.
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
        """Return the fields as plain numbers and lists."""
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "MicroBatchMemory":
        """Return the model from the result of `to_json`."""
        made: dict[str, Any] = {n: np.array(v) if isinstance(v, list) else v for n, v in values.items()}
        return cls(**made)
