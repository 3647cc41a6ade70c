"""Exact, fast, budget-aware gradient accumulation for Hugging Face fine-tuning.

`import gradacc_hf` loads neither torch nor accelerate: an export loads its module at its first use.
gradacc_hf/README.md is the map of the package.
"""

from typing import TYPE_CHECKING

from gradacc_hf.utils import moved_modules
from gradacc_hf.utils.lazy import lazy_exports

__version__ = "0.2.0"

__all__ = [
    "Best",
    "Bound",
    "Checkpoints",
    "ContrastiveLoss",
    "Diagnosis",
    "DoctorCallback",
    "Evaluation",
    "ExactTrainer",
    "ExactTrainerMixin",
    "GradaccError",
    "GrowingBatch",
    "InputError",
    "LogitsNeededError",
    "LoopError",
    "MissingExtraError",
    "NonFiniteError",
    "OutOfMemoryError",
    "PaddingNotRemovableError",
    "ScheduledBatch",
    "Verification",
    "Window",
    "WindowLoader",
    "WindowRecord",
    "__version__",
    "accumulate_in_float32",
    "diagnose",
    "evaluate",
    "fine_tune",
    "iter_windows",
    "newest_checkpoint",
    "preflight_check",
    "remove_padding",
    "restore_logits",
    "restore_padding",
    "retry_on_oom",
    "router_loss_over_window",
    "skip_unlabelled_logits",
    "train",
    "verify",
]

_LAZY = {
    "Best": "training.finetune",
    "Bound": "accumulation.splitting",
    "Checkpoints": "training.checkpoint",
    "ContrastiveLoss": "accumulation.gradient_cache",
    "Diagnosis": "doctor",
    "DoctorCallback": "doctor.callback",
    "Evaluation": "training.loop",
    "ExactTrainer": "hf_trainer.trainer",
    "ExactTrainerMixin": "hf_trainer.trainer",
    "GradaccError": "errors",
    "GrowingBatch": "accumulation.batch_schedule",
    "InputError": "errors",
    "LogitsNeededError": "errors",
    "LoopError": "errors",
    "MissingExtraError": "errors",
    "NonFiniteError": "errors",
    "OutOfMemoryError": "errors",
    "PaddingNotRemovableError": "errors",
    "ScheduledBatch": "accumulation.batch_schedule",
    "Verification": "verification.exactness",
    "Window": "accumulation.window",
    "WindowLoader": "accumulation.loader",
    "WindowRecord": "training.run_log",
    "accumulate_in_float32": "accumulation.fp32_accumulation",
    "diagnose": "doctor",
    "evaluate": "training.loop",
    "fine_tune": "training.finetune",
    "iter_windows": "training.loop",
    "newest_checkpoint": "training.checkpoint",
    "preflight_check": "training.preflight",
    "remove_padding": "padding.removal",
    "restore_logits": "padding.logits",
    "restore_padding": "padding.removal",
    "retry_on_oom": "accumulation.oom",
    "router_loss_over_window": "accumulation.router_loss",
    "skip_unlabelled_logits": "padding.logits",
    "train": "training.loop",
    "verify": "verification.exactness",
}
"""Export → the module that defines it. The imports below are the same list for editors and type checkers."""

if TYPE_CHECKING:
    from gradacc_hf.accumulation.batch_schedule import GrowingBatch, ScheduledBatch
    from gradacc_hf.accumulation.fp32_accumulation import accumulate_in_float32
    from gradacc_hf.accumulation.gradient_cache import ContrastiveLoss
    from gradacc_hf.accumulation.loader import WindowLoader
    from gradacc_hf.accumulation.oom import retry_on_oom
    from gradacc_hf.accumulation.router_loss import router_loss_over_window
    from gradacc_hf.accumulation.splitting import Bound
    from gradacc_hf.accumulation.window import Window
    from gradacc_hf.doctor import Diagnosis, diagnose
    from gradacc_hf.doctor.callback import DoctorCallback
    from gradacc_hf.errors import (
        GradaccError,
        InputError,
        LogitsNeededError,
        LoopError,
        MissingExtraError,
        NonFiniteError,
        OutOfMemoryError,
        PaddingNotRemovableError,
    )
    from gradacc_hf.hf_trainer.trainer import ExactTrainer, ExactTrainerMixin
    from gradacc_hf.padding.logits import restore_logits, skip_unlabelled_logits
    from gradacc_hf.padding.removal import remove_padding, restore_padding
    from gradacc_hf.training.checkpoint import Checkpoints, newest_checkpoint
    from gradacc_hf.training.finetune import Best, fine_tune
    from gradacc_hf.training.loop import Evaluation, evaluate, iter_windows, train
    from gradacc_hf.training.preflight import preflight_check
    from gradacc_hf.training.run_log import WindowRecord
    from gradacc_hf.verification.exactness import Verification, verify
else:
    # Exports of version 0.1.0 and what replaces them. They stay until version 1.0.
    _RENAMED = {"BadInput": "InputError", "replayed": "retry_on_oom", "try_out": "preflight_check"}
    __getattr__, __dir__ = lazy_exports(__name__, _LAZY, _RENAMED)


moved_modules.install()
