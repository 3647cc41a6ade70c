"""Exact, fast, budget-aware gradient accumulation for Hugging Face fine-tuning."""

from gradacc_hf.errors import BadInput
from gradacc_hf.loop import Best, Evaluation, evaluate, fine_tune, train
from gradacc_hf.tryout import try_out
from gradacc_hf.verify import verify
from gradacc_hf.window import Window
from gradacc_hf.windows import WindowLoader

__all__ = [
    "BadInput",
    "Best",
    "Evaluation",
    "Window",
    "WindowLoader",
    "evaluate",
    "fine_tune",
    "train",
    "try_out",
    "verify",
]
