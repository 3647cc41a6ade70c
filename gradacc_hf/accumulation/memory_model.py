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
        layers: The part of `activations` that `remove_padding` computes without padding; None for no part.
        attention: The part of `activations` that it computes by groups of examples, padded to the longest of
            the group; None for no part.
        group_cost: Cost of a group in pairs of tokens (`padding_layout.py`).
        unsharded: The bytes among `parameters` that FSDP2 does not divide, of a teacher.
    """

    parameters: int
    gradients: int
    optimizer: int
    exponents: np.ndarray
    activations: np.ndarray
    loss: np.ndarray
    workspace: int = 0
    workspace_share: float = 0.0
    layers: np.ndarray | None = None
    attention: np.ndarray | None = None
    group_cost: float = 0.0
    unsharded: int = 0

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
        return self._parts(self._moments @ terms, self.loss @ terms)

    def _parts(self, held: np.ndarray, of_loss: np.ndarray) -> Parts:
        """Return the bytes at the moment that holds most, from the bytes of all moments (moments)."""
        most = int(held.argmax())
        together = float(held[most])
        loss = min(together, max(0.0, float(of_loss[most])))
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

    def parts_without_padding(self, tokens: np.ndarray) -> Parts:
        """Return the bytes at the peak of a step after `remove_padding`. Embeddings, head, loss stay padded.

        Args:
            tokens: Tokens of the examples, (examples, columns).
        """
        padded = self.terms(len(tokens), tokens.max(0))
        held = self._moments @ padded
        if self.layers is not None:
            held = held + self.layers @ (self._terms_of_examples(tokens, padded) - padded)
        if self.attention is not None:
            held = held + self.attention @ (self._terms_of_groups(tokens, padded) - padded)
        return self._parts(held, self.loss @ padded)

    def bytes_without_padding(self, tokens: np.ndarray) -> int:
        """Return the peak bytes of a step after `remove_padding`, as `parts_without_padding`."""
        return self.parts_without_padding(tokens).total

    def _terms_of_examples(self, tokens: np.ndarray, padded: np.ndarray) -> np.ndarray:
        """Return the value of each term (terms), summed over examples where the term has rows."""
        each = tokens.astype(np.float64)[:, None] ** self.exponents[:, 1:]
        return np.where(self.exponents[:, 0] == 0, padded, np.prod(each, axis=2).sum(0))

    def _terms_of_groups(self, tokens: np.ndarray, padded: np.ndarray) -> np.ndarray:
        """Return an upper limit of each term (terms), if each example is as long as the longest of its group.

        The layout has the groups of the least cost, Σ (length + length²) + `group_cost` per group. A few
        groups of equal numbers of examples therefore limit Σ length², which limits Σ length
        (Cauchy-Schwarz). With several columns, the limit is the padded batch.
        """
        if tokens.shape[1] > 1:
            return padded
        lengths = np.sort(tokens[:, 0]).astype(np.float64)
        rows, least, groups = len(lengths), np.inf, 1
        while groups <= rows and (groups - 1) * self.group_cost < least:
            ends = np.arange(groups + 1) * rows // groups
            longest = lengths[ends[1:] - 1]
            padded_cost = (ends[1:] - ends[:-1]) @ (longest * (1 + longest))
            least = min(least, (groups - 1) * self.group_cost + padded_cost)
            groups *= 2
        pairs = least - lengths.sum()
        sums = np.array([rows, min(np.sqrt(rows * pairs), rows * lengths[-1]), pairs])
        return np.where(self.exponents[:, 0] == 0, padded, sums[self.exponents[:, 1]])

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
            parameters=(self.parameters - self.unsharded) // processes + self.unsharded + 2 * largest_layer,
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
