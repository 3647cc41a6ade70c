"""What the metrics share: predictions are kept in memory and nothing is written.

So any number of processes may compute at once.
"""

import os
from typing import Any

import evaluate


class InMemoryMetric(evaluate.Metric):
    """An `evaluate.Metric` that keeps what it is given in memory, unless told otherwise."""

    def __init__(self, config_name: str | None = None, keep_in_memory: bool = True, **settings: Any):
        super().__init__(config_name, keep_in_memory=keep_in_memory, **settings)

    def _build_data_dir(self) -> str:
        if self.keep_in_memory:  # evaluate would make this folder, and then not use it
            return os.path.join(self._data_dir_root, self.name, self.config_name)
        return super()._build_data_dir()
