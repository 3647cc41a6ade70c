"""The rows of an evaluation, so that a bootstrap can score any of them again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradacc_hf.training.run_log import by_source


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

    def by_source(self, sources: Sequence[str]) -> dict[str, float]:
        """Return the metrics of the rows of each source, by metric and source: "accuracy/chats".

        Args:
            sources: The source of each row; empty without a mixture.
        """
        rows_of: dict[str, list[int]] = {}
        for row, source in enumerate(sources):
            rows_of.setdefault(source, []).append(row)
        scores: dict[str, float] = {}
        for source, rows in rows_of.items():
            for metric, value in self.score(np.array(rows)).items():
                scores |= by_source(metric, {source: value})
        return scores
