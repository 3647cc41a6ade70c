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

    def _build_data_dir(self) -> str:
        if self.keep_in_memory:  # evaluate would create this folder without using it
            return os.path.join(self._data_dir_root, self.name, self.config_name)
        return super()._build_data_dir()
