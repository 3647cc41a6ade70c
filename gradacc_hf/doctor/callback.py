"""The doctor on transformers' Trainer: a callback."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback

from gradacc_hf.doctor import Diagnosis, diagnose


class DoctorCallback(TrainerCallback):
    """Watches a Trainer's loop: `trainer.add_callback(DoctorCallback())`; `diagnosis` is what came of it.

    `settings` go to `diagnose`.
    """

    def __init__(self, say: Callable[[str], Any] = print, **settings: Any):
        self._say, self._settings, self._open = say, settings, ExitStack()
        self.diagnosis: Diagnosis | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **what: Any) -> None:
        """Begin to watch the model and the optimizer."""
        settings = {
            "accumulation_steps": args.gradient_accumulation_steps,
            "say": self._say,
            **self._settings,
        }
        self.diagnosis = self._open.enter_context(diagnose(what["model"], what["optimizer"], **settings))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """What Trainer says that the loss is."""
        if self.diagnosis is not None and logs and "loss" in logs:
            self.diagnosis.logged.append((state.global_step, float(logs["loss"])))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say what was seen."""
        self._open.close()
