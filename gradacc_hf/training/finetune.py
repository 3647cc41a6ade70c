"""Fine-tune a model: the loop with evaluation, early stopping, checkpoints and saving.

`fine_tune` runs the phases one after the other. The objects of a run:

- `EvaluationLog` stores the evaluations and finds the best.
- `Evaluator` evaluates when it is due.
- `ModelSaver` writes best/ and last/.
- `RunLength` counts the windows of the run.
- `CheckpointSaving` saves checkpoints when they are due.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from gradacc_hf.accumulation.accelerate_state import check_unprepared
from gradacc_hf.accumulation.fp32_accumulation import accumulate_in_float32
from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.loss_items import ComputeLoss, model_loss
from gradacc_hf.accumulation.streaming import Stream
from gradacc_hf.accumulation.validation import check_windows
from gradacc_hf.errors import InputError, NonFiniteError
from gradacc_hf.training.autotune import Tuning
from gradacc_hf.training.bad_index import name_bad_index
from gradacc_hf.training.checkpoint import Checkpointer, Checkpoints
from gradacc_hf.training.loop import iter_windows
from gradacc_hf.training.preflight import (
    check_token_ids,
    check_trainable,
    preflight_check,
    warn_of_untrained,
)
from gradacc_hf.training.run_log import FIGURES, RunLog, WindowRecord
from gradacc_hf.training.schedule_free import averaged_weights, keep_averaged_weights
from gradacc_hf.training.update_ratio import UpdateRatio
from gradacc_hf.utils.files import WriteModel, save_model, write_pretrained
from gradacc_hf.utils.rng import rng_states, set_rng_states
from gradacc_hf.utils.signals import StopSignals

Validate = Callable[[torch.nn.Module], Mapping[str, float]]
"""Prepared model → metrics."""

ROUNDING = 1e-6
"""Windows by which a share of an epoch may be off, as a product of floating-point numbers."""

SUMMARY_KEYS = (
    "stopped_after",
    "eval",
    "best",
    "evaluations",
    "first_window",
    "micro_batches",
    "replays",
    "tuning",
    "empty_windows",
    "empty_micro_batches",
    "effective_batch_size",
)
"""Keys of a summary that `write_summary` sets."""

EvalEvery = int | float | Literal["epoch"]
"""Windows between evaluations; a share of an epoch, as a float; or every epoch."""

End = Literal["trained", "stopped by a signal", "out of patience"]
"""The reason why training ended."""


@dataclass(frozen=True)
class Best:
    """The criterion for the best evaluation of a run and for early stopping.

    Args:
        metric: the metric to compare.
        direction: "min" if the lowest value is the best, "max" if the highest is.
        patience: the run stops after this many evaluations in a row without improvement; 0 is off.
        patient_after: evaluations after this window count towards `patience`, for a run that continues.
    """

    metric: str = "loss"
    direction: Literal["min", "max"] = "min"
    patience: int = 0
    patient_after: int = 0

    def improves(self, history: Sequence[Mapping[str, float]]) -> bool:
        """Whether the latest evaluation is better than all earlier ones. Any number is better than NaN."""
        sign = -1 if self.direction == "max" else 1
        *earlier, latest = [
            math.inf if math.isnan(m[self.metric]) else sign * m[self.metric] for m in history
        ]
        return all(latest < value for value in earlier)


def fine_tune(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    windows: WindowLoader,
    *,
    accelerator: Accelerator,
    scheduler: Any = None,
    epochs: int = 1,
    max_windows: int | None = None,
    max_grad_norm: float = 1.0,
    compute_loss: ComputeLoss = model_loss,
    validate: Validate | None = None,
    eval_every: EvalEvery = 0,
    eval_on_start: bool = False,
    best: Best = Best(),
    on_nonfinite: Literal["stop", "skip"] = "stop",
    tune: bool = False,
    output_dir: Path | str | None = None,
    checkpoints: Checkpoints | None = None,
    save_with: Sequence[Any] = (),
    write_model: WriteModel = write_pretrained,
    summary: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fine-tune a model in place, and return the figures of the run.

    Args:
        model, optimizer: the model and the optimizer, not prepared.
        windows, accelerator: the training windows, and the Accelerator that `windows` was made with.
        scheduler: a learning rate scheduler, not prepared. It is stepped once per window.
        epochs, max_windows: passes over the data, and the maximum number of windows (None: no maximum).
        max_grad_norm: norm at which the gradient of a window is clipped; 0 does not clip.
        compute_loss: (outputs, batch) → the mean loss over the items of a micro-batch.
        validate: prepared model → metrics. It is also called after the last window.
        eval_every: windows between evaluations, "epoch", or a share of an epoch; 0: only at the end.
        eval_on_start: whether to evaluate before the first window, too.
        best: the criterion for the best evaluation and for early stopping.
        on_nonfinite: action for a loss or gradient that is not finite, as for `train`.
        tune: whether to find the fastest micro-batch size on the first windows (`autotune.py`).
        output_dir: folder for history.jsonl, summary.json, and the models in best/ and last/.
        checkpoints: settings of the checkpoints in `output_dir`. SIGTERM and SIGINT save one, too.
        save_with, write_model: objects to save beside a model, such as a tokenizer; the function that writes.
        summary: further entries of the summary.

    Returns:
        The summary, as in summary.json. `stopped_after` is the window after which a signal stopped the run.

    Raises:
        InputError: model, optimizer or windows cannot be trained, or `summary` has a reserved key.
        NonFiniteError: as for `train`. A checkpoint after the previous window is saved first.
    """
    more, first_window = check_summary(summary or {}), split_of_next_window(windows)
    model, optimizer = prepare(model, optimizer, scheduler, windows, compute_loss)
    saver = ModelSaver(accelerator, output_dir, save_with, write_model)
    checkpointer = open_checkpoints(checkpoints, saver, model, optimizer, scheduler, windows)
    done, evaluations = resume(checkpointer, best)
    length, ratio = RunLength(windows, epochs, max_windows, done), UpdateRatio(model)
    tuning = Tuning.of(windows, length.known and length.known - done) if tune else None
    signals = StopSignals(accelerator) if checkpointer is not None else nullcontext()
    with RunLog(accelerator, length.known, saver.folder, done) as log, signals as stop:
        times = EvaluationTimes(eval_every, windows)
        evaluator = Evaluator(model, optimizer, validate, times, evaluations, log, saver)
        if eval_on_start and not done:
            evaluator.evaluate(0)
        records = iter_windows(
            model,
            optimizer,
            windows,
            accelerator=accelerator,
            scheduler=scheduler,
            epochs=epochs,
            max_windows=max_windows,
            max_grad_norm=max_grad_norm,
            compute_loss=compute_loss,
            on_nonfinite=on_nonfinite,
            windows_done=done,
        )
        saving = CheckpointSaving(checkpointer, stop, log, evaluations) if checkpointer and stop else None
        end = train_windows(records, done, log, length, evaluator, ratio, tuning, saving)
        finish(end, evaluator, saving)
    return write_summary(log, windows, evaluations, tuning, first_window, end, more)


def prepare(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    windows: WindowLoader,
    compute_loss: ComputeLoss,
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Check model, optimizer and scheduler, and return the prepared model and optimizer.

    Gradients of bf16 weights accumulate in float32.
    """
    accelerator = windows.accelerator
    check_unprepared(accelerator, model, optimizer)
    check_trainable(model, optimizer, scheduler)
    warn_of_untrained(model, optimizer)
    check_token_ids(model, windows)
    with name_bad_index(model):
        preflight_check(model, windows, compute_loss)
    accumulate_in_float32(model, optimizer)
    return accelerator.prepare(model, optimizer)


def check_summary(more: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return further entries of a summary. Raise InputError for a key that the run writes itself."""
    if taken := sorted({*SUMMARY_KEYS, *FIGURES} & more.keys()):
        raise InputError(f"summary: found the key {taken[0]!r}, which the run writes itself: choose another")
    return more


def split_of_next_window(windows: WindowLoader) -> list[list[int]]:
    """Return the tokens of each example of the next window, by micro-batch. Refuse a DataLoader."""
    check_windows(windows)
    place = windows.state_dict()
    split = windows.split(place["epoch"], place["window"])
    return [windows.tokens[indices].sum(1).tolist() for process in split.processes for indices in process]


def open_checkpoints(
    settings: Checkpoints | None,
    saver: "ModelSaver",
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    windows: WindowLoader,
) -> Checkpointer | None:
    """Return the `Checkpointer` of this run, or None without `settings`.

    Raise ValueError for checkpoints without a folder.
    """
    if settings is None:
        return None
    if saver.folder is None:
        raise ValueError("checkpoints need a folder: set output_dir=")
    return Checkpointer(saver.folder, settings, saver.accelerator, model, optimizer, scheduler, windows)


def resume(checkpointer: Checkpointer | None, best: Best) -> tuple[int, "EvaluationLog"]:
    """Load the checkpoint to resume from, if there is one.

    Returns:
        The number of windows done, and the evaluations so far.
    """
    if checkpointer is None or checkpointer.settings.resume_from is None:
        return 0, EvaluationLog(best)
    checkpoint = checkpointer.settings.resume_from
    return checkpoint.window, EvaluationLog.from_progress(best, checkpointer.load(checkpoint))


def train_windows(
    records: Iterable[WindowRecord],
    done: int,
    log: RunLog,
    length: "RunLength",
    evaluator: "Evaluator",
    ratio: UpdateRatio,
    tuning: Tuning | None,
    saving: "CheckpointSaving | None",
) -> End:
    """Train window by window, with logging, tuning, checkpoints and evaluations after each.

    Args:
        records: an iterator that trains one window per record.
        done: windows done before the run was resumed.

    Returns:
        The reason why training ended.
    """
    if done and evaluator.gives_up_after(done, length.total):  # the checkpoint was saved before evaluating
        return "out of patience"
    try:
        for record in records:
            log.window(replace(record, update_ratio=ratio.since_last()))
            if line := length.count_again(record.window):
                log.expect(length.known)
                log.say(line)
            if tuning is not None and tuning.said is None:
                tuning.record(record.seconds - tuning.windows.seconds_to_collate)
                if tuning.said is not None:
                    log.say(tuning.said)
            if saving is not None and saving.stops_after(record.window, length.total):
                return "stopped by a signal"
            if evaluator.gives_up_after(record.window, length.total):
                return "out of patience"
    except NonFiniteError:
        if saving is not None and log.records:
            saving.save()  # the state after the previous window
        raise
    return "trained"


def finish(end: End, evaluator: "Evaluator", saving: "CheckpointSaving | None") -> None:
    """Save the last model and evaluate it, and save the last state, unless a signal stopped the run."""
    random = rng_states(evaluator.saver.accelerator.device)
    log, best = evaluator.log, evaluator.evaluations.criterion
    if end == "out of patience":
        log.say(f"stopped early: {best.metric} has not improved in {best.patience} evaluations")
    if end != "stopped by a signal":
        with averaged_weights(evaluator.optimizer):
            evaluator.saver.save(evaluator.model, "last")
            config = evaluator.model_config()
            evaluator.evaluate_at_end(log.last_window)
            if evaluator.model_config() != config:  # such as the threshold of an answer
                evaluator.saver.save(evaluator.model, "last")
        if saving is not None:
            saving.save_at_end(random)
    keep_averaged_weights(evaluator.optimizer)


def write_summary(
    log: RunLog,
    windows: WindowLoader,
    evaluations: "EvaluationLog",
    tuning: Tuning | None,
    first_window: list[list[int]],
    end: End,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the summary of a run. Write it unless a signal stopped the run.

    Args:
        first_window: the tokens of the examples of the first window, by micro-batch.
        more: further entries.
    """
    stopped = end == "stopped by a signal"
    size = windows.plan.effective_batch_size
    own = {
        "stopped_after": log.last_window if stopped else None,
        "eval": evaluations.latest,
        "best": evaluations.best,
        "evaluations": evaluations.rows,
        "first_window": first_window,
        "micro_batches": windows.limit,
        "replays": windows.replays,
        "tuning": tuning.to_json() if tuning is not None else None,
        "empty_windows": windows.empty_windows,
        "empty_micro_batches": windows.empty_micro_batches,
        "effective_batch_size": None if callable(size) else size,
    }
    return log.summary({"baseline": None, **more, **own}, write=not stopped)


class RunLength:
    """The number of windows of a run. It changes when windows grow with the noise scale.

    Attributes:
        total: windows of the whole run; infinite for a stream, whose length is unknown.
    """

    def __init__(self, windows: WindowLoader, epochs: int, max_windows: int | None, done: int):
        self.windows, self.epochs, self.max_windows = windows, epochs, max_windows
        self.total = self._count(done)
        self._growths = windows.num_growths

    @property
    def known(self) -> int | None:
        """Windows of the whole run; None for a stream."""
        return int(self.total) if self.total < math.inf else None

    def count_again(self, window: int) -> str | None:
        """Update `total` after this window. Return a line for the user if windows have grown, else None."""
        if self.windows.num_growths == self._growths:
            return None
        self.total, self._growths = self._count(window), self.windows.num_growths
        size = self.windows.plan.size_asked(*self.windows.next_position)
        return (
            f"effective batch size: {size:,} examples from window {window + 1:,} on, as the gradient noise "
            "scale is at least as large"
        )

    def _count(self, done: int) -> float:
        epoch, window = self.windows.next_position
        to_run = self.windows.plan.count_windows(range(epoch, self.epochs))  # None for a stream
        return min(self.max_windows or math.inf, math.inf if to_run is None else done + to_run - window)


class EvaluationLog:
    """The evaluations of a run, with the best.

    Attributes:
        rows: the metrics of each evaluation, and the `window` after which it ran.
    """

    def __init__(self, criterion: Best):
        self.criterion = criterion
        self.rows: list[dict[str, float]] = []
        self._best: int | None = None  # index of a row

    @classmethod
    def from_progress(cls, criterion: Best, progress: Mapping[str, Any]) -> "EvaluationLog":
        """Return the evaluations in the `progress` of a checkpoint."""
        log = cls(criterion)
        log.rows = list(progress["evaluations"])
        if progress["best"]:
            log._best = log.windows.index(progress["best"]["window"])
        return log

    def progress(self) -> dict[str, Any]:
        """Return the evaluations as plain numbers, for a checkpoint."""
        return {"evaluations": self.rows, "best": self.best or {}}

    @property
    def windows(self) -> list[float]:
        """The windows after which evaluations ran, each once."""
        return [row["window"] for row in self.rows]

    @property
    def best(self) -> dict[str, float] | None:
        """The best evaluation so far; None before the first."""
        return None if self._best is None else self.rows[self._best]

    @property
    def latest(self) -> dict[str, float] | None:
        """The latest evaluation; None before the first."""
        return self.rows[-1] if self.rows else None

    def add(self, window: int, metrics: Mapping[str, float]) -> bool:
        """Add an evaluation after this window. Return whether it is the best so far."""
        self.rows.append({"window": window, **metrics})
        improves = self.criterion.improves(self.rows)
        if improves:
            self._best = len(self.rows) - 1
        return improves

    @property
    def is_out_of_patience(self) -> bool:
        """Whether `patience` evaluations in a row brought no improvement."""
        patience, best = self.criterion.patience, self.best
        if not patience or best is None:
            return False
        since = max(best["window"], self.criterion.patient_after)
        return sum(window > since for window in self.windows) >= patience


@dataclass(frozen=True)
class ModelSaver:
    """Save the models of a run, or nothing without a folder. Call it on every process."""

    accelerator: Accelerator
    output_dir: Path | str | None
    companions: Sequence[Any]
    write: WriteModel

    @property
    def folder(self) -> Path | None:
        """The folder of the run."""
        return Path(self.output_dir) if self.output_dir is not None else None

    def save(self, model: torch.nn.Module, name: str) -> None:
        """Save the prepared model in the folder `name` of the run."""
        if self.folder is not None:
            save_model(model, self.folder / name, self.accelerator, *self.companions, write=self.write)


@dataclass(frozen=True)
class EvaluationTimes:
    """The windows after which the model is evaluated.

    every: windows between evaluations (0: never); "epoch": after each epoch; or a share of an epoch, as a
        float: after each such part, and after each epoch.
    windows: the training windows.
    """

    every: EvalEvery
    windows: WindowLoader

    def __post_init__(self) -> None:
        if isinstance(self.every, float) and not 0 < self.every < 1:
            raise InputError(f"eval_every: found {self.every}; allowed: windows, 'epoch', or a share below 1")
        if isinstance(self.every, float) and isinstance(self.windows.plan, Stream):
            raise InputError(
                f"eval_every: found {self.every}; allowed for a stream, whose epochs have no known length: "
                "windows, or 'epoch'"
            )

    def is_due(self, window: int) -> bool:
        """Whether an evaluation is due after this window of the run, which is the latest of `windows`."""
        if isinstance(self.every, int):
            return self.every > 0 and window % self.every == 0
        epoch, done = self.windows.next_position
        if not done or self.every == "epoch":
            return not done
        part = float(self.every) * self.windows.plan.num_windows(epoch)
        before, now = ((count + ROUNDING) // part for count in (done - 1, done))
        return now > before


@dataclass(frozen=True)
class Evaluator:
    """Evaluate the model when it is due, and save the best model."""

    model: torch.nn.Module  # prepared
    optimizer: torch.optim.Optimizer  # prepared
    validate: Validate | None
    times: EvaluationTimes
    evaluations: EvaluationLog
    log: RunLog
    saver: ModelSaver

    def evaluate(self, window: int) -> None:
        """Evaluate the model after this window. Do nothing without `validate`."""
        if self.validate is None:
            return
        with averaged_weights(self.optimizer):
            found = self.validate(self.model)
            metrics = broadcast_object_list([found])[0]  # the same decisions in all processes
            metric = self.evaluations.criterion.metric
            if metric not in metrics:
                raise ValueError(f"best: no metric {metric!r}; validate returned {', '.join(metrics)}")
            self.log.evaluation(metrics)
            if self.evaluations.add(window, metrics):
                self.saver.save(self.model, "best")

    def gives_up_after(self, window: int, total: float) -> bool:
        """Evaluate after this window, if it is due. Return whether the run stops early."""
        if self.validate is None or not self.times.is_due(window):
            return False
        if window not in self.evaluations.windows:
            self.evaluate(window)
        return window != total and self.evaluations.is_out_of_patience

    def model_config(self) -> str:
        """Return the model's config as text. An evaluation may change it."""
        return repr(getattr(self.saver.accelerator.unwrap_model(self.model), "config", None))

    def evaluate_at_end(self, window: int) -> None:
        """Evaluate after the last window, unless it has been evaluated."""
        if window and window not in self.evaluations.windows:
            self.evaluate(window)


@dataclass(frozen=True)
class CheckpointSaving:
    """Save checkpoints of a run when they are due, and when a signal stops the run."""

    checkpointer: Checkpointer
    signals: StopSignals
    log: RunLog
    evaluations: EvaluationLog

    def stops_after(self, window: int, total: float) -> bool:
        """Save a checkpoint after this window, if it is due. Return whether a signal stops the run."""
        is_asked, every = self.signals.asked(), self.checkpointer.settings.every
        if is_asked or (every and window % every == 0):
            self.save()
        return is_asked and window < total

    def save_at_end(self, random: Mapping[str, Any]) -> None:
        """Save the last state of the run, if the settings ask for it.

        Args:
            random: the random number generators after the last window. The last evaluation may have used
                them, which a longer run would not do here.
        """
        if self.checkpointer.settings.at_end and self.log.records:
            set_rng_states(random, self.checkpointer.accelerator.device)
            self.save(at_end=True)

    def save(self, at_end: bool = False) -> None:
        """Save a checkpoint after the latest window. Print a line if that fails."""
        self.log.keep()
        best, window = self.evaluations.best, self.log.last_window
        best_window = None if best is None else best["window"]
        if problem := self.checkpointer.save(window, best_window, self.evaluations.progress(), at_end):
            self.log.say(f"no checkpoint after window {window}: {problem}")
