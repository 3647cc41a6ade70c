"""Diagnose the accumulation of any training loop: `diagnose` observes a few windows and reports.

    with gradacc_hf.diagnose(model, optimizer):
        train(...)                                   # hand-written, Accelerate's, Fabric's

For transformers' Trainer: `trainer.add_callback(gradacc_hf.DoctorCallback())`.

Data flows one way:

    listener.py, frames.py → terms.py, gradients.py, passes.py → observer.py → record.py
    examination.py, reference.py, item_counts.py → record.py
    record.py → weighing.py, judgement.py → rules.py, messages.py → report.py → Diagnosis
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from gradacc_hf.doctor.examination import Examination
from gradacc_hf.doctor.frames import StartedLoader, length_of
from gradacc_hf.doctor.gradients import Subject
from gradacc_hf.doctor.observer import Observer
from gradacc_hf.doctor.record import LoopRecord
from gradacc_hf.doctor.reference import LossOf
from gradacc_hf.doctor.report import report
from gradacc_hf.doctor.rules import Finding, findings

__all__ = ["Diagnosis", "Finding", "diagnose"]


class Diagnosis:
    """The result of observing a loop. `str(diagnosis)` is the report.

    Attributes:
        record: the observations.
        is_over: whether observing has ended and the report was passed to `say`.
        is_waiting: returns whether observed backwards wait for a step.
        findings: the faults of the loop, errors first; empty for a healthy loop.
        healthy: whether windows were observed and no finding is an error.
    """

    def __init__(self, record: LoopRecord, say: Callable[[str], Any]):
        self.record = record
        self.is_over = False
        self.is_waiting: Callable[[], bool] = lambda: False
        self._say = say

    @property
    def findings(self) -> list[Finding]:
        """The faults of the loop, errors first."""
        return findings(self.record)

    @property
    def healthy(self) -> bool:
        """Whether windows were observed and no finding is an error."""
        return bool(self.record.windows) and not any(f.kind == "error" for f in self.findings)

    def __str__(self) -> str:
        return report(self.record, self.findings)

    def finish(self) -> None:
        """Pass the report to `say`, once the record is complete."""
        self.is_over = True
        self._say(str(self))


@contextmanager
def diagnose(
    model: torch.nn.Module,
    optimizer: Any,
    *,
    loss_fn: LossOf | None = None,
    accumulation_steps: int | None = None,
    windows: int = 3,
    scheduler: Any = None,
    say: Callable[[str], Any] = print,
    to_end: bool = True,
    started_loaders: Sequence[StartedLoader] = (),
) -> Iterator[Diagnosis]:
    """Observe the training loop in the `with` block, and report the faults of its accumulation.

    The gradient of each of the first windows is compared with the gradient of the same examples in one batch.
    A partial window at the end of the data is compared as well. Dropout is off while the loop is observed.

    Args:
        model: the model, as the loop uses it.
        optimizer: a torch optimizer, or the optimizer that `accelerator.prepare` returned.
        loss_fn: computes the loss from (outputs, inputs by name). Needed if the loss is computed neither by
            the model nor by one torch function of the model's output.
        accumulation_steps: the intended number of micro-batches per window. Needed if neither Accelerate nor
            the divided loss shows the number.
        windows: number of windows to compare.
        scheduler: the learning rate scheduler; by default, the variables of the loop are searched for one.
        say: called with the report as soon as it is complete, and again if a later window leaks.
        to_end: whether to observe the end of a pass over the data too, if its last window is partial.
        started_loaders: loaders over which the loop already iterates.

    Yields:
        The `Diagnosis`.

    Raises:
        ValueError: an argument is not allowed.
    """
    for name, number in (("windows", windows), ("accumulation_steps", accumulation_steps)):
        if number is not None and number < 1:
            raise ValueError(f"{name}: found {number}; allowed: 1 or more")
    stepped = getattr(optimizer, "optimizer", optimizer)  # Accelerate's optimizer wraps torch's
    if not isinstance(model, torch.nn.Module) or not isinstance(stepped, torch.optim.Optimizer):
        raise ValueError(
            f"diagnose(model, optimizer): found {type(model).__name__} and {type(optimizer).__name__}; "
            "allowed: a torch.nn.Module, and a torch optimizer or Accelerate's wrapper of it"
        )
    subject = Subject.of(model, optimizer)
    record = LoopRecord(intended=accumulation_steps, schedule_length=length_of(scheduler))
    diagnosis = Diagnosis(record, say)
    examination = Examination(subject, record, windows, loss_fn, to_end)
    found_later = diagnosis.finish if to_end else None
    observer = Observer(subject, record, examination.examine, diagnosis.finish, found_later, started_loaders)
    diagnosis.is_waiting = lambda: observer.is_waiting
    try:
        with observer.attached():
            yield diagnosis
    except BaseException:
        observer.stop()  # the current window was interrupted, not dropped
        raise
    observer.stop(keep_unstepped=True)
