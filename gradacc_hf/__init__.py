"""Exact, fast, budget-aware gradient accumulation for Hugging Face fine-tuning."""

from typing import TYPE_CHECKING, Any

from gradacc_hf.bf16_weights import accumulate_in_float32
from gradacc_hf.checkpoint import Checkpoints, newest_checkpoint
from gradacc_hf.doctor import Diagnosis, diagnose
from gradacc_hf.errors import BadInput
from gradacc_hf.loop import Best, Evaluation, evaluate, fine_tune, train
from gradacc_hf.out_of_memory import replayed
from gradacc_hf.tryout import try_out
from gradacc_hf.verify import verify
from gradacc_hf.window import Window
from gradacc_hf.windows import WindowLoader

if TYPE_CHECKING:
    from gradacc_hf.doctor.trainer import DoctorCallback
    from gradacc_hf.trainer import ExactTrainer, ExactTrainerMixin

__all__ = [
    "BadInput",
    "Best",
    "Checkpoints",
    "Diagnosis",
    "DoctorCallback",
    "Evaluation",
    "ExactTrainer",
    "ExactTrainerMixin",
    "Window",
    "WindowLoader",
    "accumulate_in_float32",
    "diagnose",
    "evaluate",
    "fine_tune",
    "newest_checkpoint",
    "replayed",
    "train",
    "try_out",
    "verify",
]


def __getattr__(name: str) -> Any:
    """What stands on transformers.Trainer, which is slow to import, when it is asked for."""
    if name == "DoctorCallback":
        from gradacc_hf.doctor.trainer import DoctorCallback

        return DoctorCallback
    if name not in ("ExactTrainer", "ExactTrainerMixin"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gradacc_hf import trainer

    return getattr(trainer, name)
