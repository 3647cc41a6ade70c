"""The settings of a run, and reading them from flags, config files and budget files."""

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
