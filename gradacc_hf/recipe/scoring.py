"""The rows of an evaluation, so that a bootstrap can score any of them again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ScoredRows:
    """The predictions and references of an evaluation, and the function that computes metrics of them.

    predictions, references: one for each row.
    metrics: (predictions, references) → metrics.
    """

    predictions: Sequence[Any]
    references: Sequence[Any]
    metrics: Callable[[Sequence[Any], Sequence[Any]], Mapping[str, float]]

    def __len__(self) -> int:
        return len(self.predictions)

    def score(self, rows: np.ndarray) -> Mapping[str, float]:
        """Return the metrics of these rows, which may repeat."""
        chosen = rows.tolist()
        pairs = [[values[row] for row in chosen] for values in (self.predictions, self.references)]
        return self.metrics(*pairs)
