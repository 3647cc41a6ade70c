"""`ExactTrainer`: the Trainer of transformers with exact gradient accumulation."""

from typing import TYPE_CHECKING

from gradacc_hf.utils.lazy import lazy_exports

__all__ = ["ExactTrainer", "ExactTrainerMixin"]

if TYPE_CHECKING:
    from gradacc_hf.hf_trainer.trainer import ExactTrainer, ExactTrainerMixin
else:
    __getattr__, __dir__ = lazy_exports(__name__, {"ExactTrainer": "trainer", "ExactTrainerMixin": "trainer"})
