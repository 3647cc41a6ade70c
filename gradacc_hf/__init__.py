"""Exact, fast, budget-aware gradient accumulation for Hugging Face fine-tuning."""

from typing import TYPE_CHECKING, Any

from gradacc_hf.accumulation.fp32_accumulation import accumulate_in_float32
from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.oom import retry_on_oom
from gradacc_hf.accumulation.window import Window
from gradacc_hf.doctor import Diagnosis, diagnose
from gradacc_hf.errors import InputError
from gradacc_hf.training.checkpoint import Checkpoints, newest_checkpoint
from gradacc_hf.training.finetune import Best, fine_tune
from gradacc_hf.training.loop import Evaluation, evaluate, iter_windows, train
from gradacc_hf.training.preflight import preflight_check
from gradacc_hf.utils import moved_modules
from gradacc_hf.verification.exactness import verify

if TYPE_CHECKING:
    from gradacc_hf.doctor.callback import DoctorCallback
    from gradacc_hf.hf_trainer.trainer import ExactTrainer, ExactTrainerMixin

moved_modules.install()

__all__ = [
    "Best",
    "Checkpoints",
    "Diagnosis",
    "DoctorCallback",
    "Evaluation",
    "ExactTrainer",
    "ExactTrainerMixin",
    "InputError",
    "Window",
    "WindowLoader",
    "accumulate_in_float32",
    "diagnose",
    "evaluate",
    "fine_tune",
    "iter_windows",
    "newest_checkpoint",
    "preflight_check",
    "retry_on_oom",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    """What stands on transformers.Trainer, which is slow to import, when it is asked for."""
    if name == "DoctorCallback":
        from gradacc_hf.doctor.callback import DoctorCallback

        return DoctorCallback
    if name not in ("ExactTrainer", "ExactTrainerMixin"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gradacc_hf.hf_trainer import trainer

    return getattr(trainer, name)
