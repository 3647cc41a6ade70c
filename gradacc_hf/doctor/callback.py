"""The doctor as a callback of transformers' Trainer."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback

from gradacc_hf.doctor import Diagnosis, diagnose


class DoctorCallback(TrainerCallback):
    """Diagnose a Trainer's loop: `trainer.add_callback(DoctorCallback())`.

    Args:
        say: called with the report.
        settings: further arguments of `diagnose`.

    Attributes:
        diagnosis: the `Diagnosis` of the latest training; None before the first.
    """

    def __init__(self, say: Callable[[str], Any] = print, **settings: Any):
        self._say, self._settings, self._open = say, settings, ExitStack()
        self.diagnosis: Diagnosis | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **trained: Any) -> None:
        """Start observing the model and the optimizer."""
        settings = {
            "accumulation_steps": args.gradient_accumulation_steps,
            "scheduler": trained.get("lr_scheduler"),
            "say": self._say,
            **self._settings,
        }
        watched = diagnose(trained["model"], trained["optimizer"], **settings)
        self.diagnosis = self._open.enter_context(watched)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Record the loss that Trainer logs."""
        if self.diagnosis is not None and logs and "loss" in logs:
            self.diagnosis.record.logged.append((state.global_step, float(logs["loss"])))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop observing, and report."""
        self._open.close()
