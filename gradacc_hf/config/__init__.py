"""The settings of a run: what a config file and a budget file may hold, and how they are read."""

from gradacc_hf.utils.extras import require

require(__name__, "recipes")

from gradacc_hf.config.schema import (
    BatchConfig,
    BudgetConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    OutputConfig,
    TrainConfig,
)
from gradacc_hf.training.settings import LoraConfig, ModelConfig, OptimConfig

__all__ = [
    "BatchConfig",
    "BudgetConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "OutputConfig",
    "TrainConfig",
]
