"""The base class of the metrics: an `evaluate.Metric` that writes no files.

Predictions are kept in memory, so any number of processes can compute at once.
"""

import os
from typing import Any

import evaluate


class InMemoryMetric(evaluate.Metric):
    """An `evaluate.Metric` (compute, add, add_batch, combine) that keeps its predictions in memory."""

    def __init__(self, config_name: str | None = None, keep_in_memory: bool = True, **settings: Any):
        super().__init__(config_name, keep_in_memory=keep_in_memory, **settings)

    def compute(self, *, predictions: Any = None, references: Any = None, **settings: Any) -> Any:
        """Return the metric of all rows. Rows that are given here, and not by `add_batch`, are not copied."""
        if (
            predictions is None
            or references is None
            or self.writer is not None  # some rows were added before
            or not self.keep_in_memory
            or len(predictions) != len(references)
        ):
            return super().compute(predictions=predictions, references=references, **settings)
        self.check(predictions, references)
        return self._compute(predictions=predictions, references=references, **settings)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **more: Any) -> None:
        """Keep a batch until `compute`. Raise InputError as `check` does."""
        self.check(predictions, references)
        super().add_batch(predictions=predictions, references=references, **more)

    def check(self, predictions: Any, references: Any) -> None:
        """Raise InputError for rows that this metric cannot score."""

    def _build_data_dir(self) -> str:
        if self.keep_in_memory:  # evaluate would create this folder without using it
            return os.path.join(self._data_dir_root, self.name, self.config_name)
        return super()._build_data_dir()
