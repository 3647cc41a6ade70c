"""THE loop: windows in, a fine-tuned model out.

`train` is the loop of the README with a record of each window; `evaluate` runs a model over data through the
same split; `fine_tune` is both with what a real run needs around them: DDP set up for the model at hand,
evaluation, early stopping, checkpoints, the best and the last model saved. Which examples and micro-batches:
`windows.py`. Files and progress: `runlog.py`.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, broadcast_object_list, gather_object

from gradacc_hf.bf16_weights import accumulate_in_float32
from gradacc_hf.checkpoint import Checkpointer, Checkpoints
from gradacc_hf.dynamics import Movement
from gradacc_hf.gradients import as_number
from gradacc_hf.items import ComputeLoss, model_loss
from gradacc_hf.nonfinite import NonFinite, drop_non_finite, find_non_finite
from gradacc_hf.out_of_memory import replayed
from gradacc_hf.runlog import RunLog, WindowRecord
from gradacc_hf.saving import WriteModel, save_model, write_pretrained
from gradacc_hf.stopping import StopSignals
from gradacc_hf.tryout import try_out
from gradacc_hf.tune import Tuning
from gradacc_hf.window import Window
from gradacc_hf.windows import WindowLoader

logger = get_logger(__name__)

Predict = Callable[[Any, Mapping[str, Any]], tuple[Sequence[Any], Sequence[Any]]]


def logits_and_labels(outputs: Any, batch: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Predictions and references of a micro-batch, row by row, as numpy arrays: float32 logits, labels."""
    if getattr(outputs, "logits", None) is None or "labels" not in batch:
        raise ValueError("the model gives no logits, or the batch has no labels: pass predict= for this head")
    return outputs.logits.float().cpu().numpy(), batch["labels"].cpu().numpy()


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    windows: WindowLoader,
    *,
    accelerator: Accelerator,
    scheduler: Any = None,
    epochs: int = 1,
    max_windows: int | None = None,
    max_grad_norm: float = 0.0,
    compute_loss: ComputeLoss = model_loss,
    on_nonfinite: Literal["stop", "skip"] = "stop",
    windows_done: int = 0,
) -> Iterator[WindowRecord]:
    """Train a prepared model, one window per step of this iterator; stop iterating to stop training.

    `scheduler` is not prepared and is stepped once a window. `max_grad_norm` 0 does not clip. `windows_done`:
    by the run that goes on; `max_windows` counts them too. A window whose loss or gradient is not finite
    takes no step; `on_nonfinite` "stop" then raises NonFinite, with the loader where it was before.
    """
    if max_windows is not None and windows_done >= max_windows:
        return
    numbers, look_ahead = count(windows_done + 1), getattr(compute_loss, "look_ahead", _nothing)
    largest = max_grad_norm or math.inf
    for _ in range(windows.state_dict()["epoch"], epochs):
        started = time.perf_counter()
        for window in windows:  # one window is one optimizer step
            number = next(numbers)
            model.train()
            while not window.done:
                with replayed(window, model, optimizer):  # cut finer, where memory runs out
                    look_ahead(model, window)  # nothing, but for a loss of all its examples together
                    for batch in window:  # this process's micro-batches
                        with accelerator.accumulate(model):
                            loss = compute_loss(model(**batch), batch)  # a mean over the micro-batch's items
                            accelerator.backward(window.weigh(loss))
                            if accelerator.sync_gradients:
                                norm = as_number(accelerator.clip_grad_norm_(model.parameters(), largest))
                                drop_non_finite(optimizer, norm, accelerator)  # the step is none, then
                            optimizer.step()
                            optimizer.zero_grad()
            lr = optimizer.param_groups[0]["lr"]
            mean = window.loss
            # Under fp16, a gradient beyond what it can hold is the scaler's to judge.
            finite = math.isfinite(norm if accelerator.scaler is None else mean)
            if not finite:
                where = find_non_finite(model, window, compute_loss)
                window.put_buffers_back()
                _stop_or_skip(number, window, windows, where, on_nonfinite)
            windows.saw(window, norm)
            skipped = accelerator.optimizer_step_was_skipped or not finite
            if scheduler is not None and (not skipped or getattr(scheduler, "by_examples", False)):
                scheduler.step()
            yield WindowRecord(
                window=number,
                epoch=window.epoch,
                loss=mean,
                grad_norm=norm,
                lr=lr,
                examples=len(window.indices),
                items=window.num_items,
                tokens=window.tokens,
                padded_tokens=window.padded_tokens,
                accumulation_steps=window.accumulation_steps,
                seconds=time.perf_counter() - started,
                skipped=skipped,
                noise_scale=windows.noise.scale,
                noise_measured=windows.noise.measured,
            )
            if number == max_windows:
                return
            started = time.perf_counter()


def _stop_or_skip(number: int, window: Window, windows: WindowLoader, where: str, on_nonfinite: str) -> None:
    what = f"window {number}: its loss or gradient is not finite: {where}"
    if on_nonfinite == "stop":
        windows.put_back(window)
        raise NonFinite(
            f"{what}; no step was taken: look at these examples and go on without them (--data.leave_out), "
            "or without such windows (--train.on_nonfinite skip), or begin anew with a lower --optim.lr"
        )
    logger.warning(f"{what}; no step was taken, and the run goes on")


def _nothing(model: torch.nn.Module, window: Window) -> None:
    """Most losses are means over examples that know nothing of each other."""


@dataclass(frozen=True)
class Evaluation:
    """`loss` is the mean over all items; the lists are by example, in the data set's order, each once."""

    loss: float
    predictions: list[Any]
    references: list[Any]


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    windows: WindowLoader,
    *,
    accelerator: Accelerator,
    compute_loss: ComputeLoss = model_loss,
    predict: Predict | None = logits_and_labels,
) -> Evaluation:
    """Run a prepared model over all data of `windows`, dropout off; no accumulation state is touched.

    `predict` None: for the loss alone, without predictions and references. A loss of all examples of a window
    together (`look_ahead`) is not one of micro-batches: it is NaN here.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        model = accelerator.unwrap_model(
            model
        )  # DDP's forward is collective, and processes have unequal counts
    training = model.training
    model.eval()
    rows: list[tuple[int, Any, Any]] = []
    loss_here, items_here = 0.0, 0.0
    for micro_batch, batch in windows.micro_batches():
        outputs = model(**batch)
        if micro_batch.num_items and not hasattr(compute_loss, "look_ahead"):
            loss_here += float(compute_loss(outputs, batch)) * micro_batch.num_items
            items_here += micro_batch.num_items
        if predict and len(micro_batch.indices):  # else it is run again only because the others wait
            rows += zip(micro_batch.indices.tolist(), *predict(outputs, batch), strict=True)
    model.train(training)
    sums = gather_object([(loss_here, items_here)])
    everything = {index: (prediction, reference) for index, prediction, reference in gather_object(rows)}
    items = sum(items for _, items in sums)
    return Evaluation(
        loss=sum(loss for loss, _ in sums) / items if items else math.nan,
        predictions=[everything[index][0] for index in sorted(everything)],
        references=[everything[index][1] for index in sorted(everything)],
    )


@dataclass(frozen=True)
class Best:
    """Which metric of an evaluation says that a model is the best so far, and when to give up.

    `patience`: evaluations in a row without improvement after which the run stops; 0 never stops.
    """

    metric: str = "loss"
    direction: Literal["min", "max"] = "min"
    patience: int = 0

    def improves(self, history: Sequence[Mapping[str, float]]) -> bool:
        """Is the latest evaluation better than all before it? Any number is better than NaN."""
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
    validate: Callable[[torch.nn.Module], Mapping[str, float]] | None = None,
    eval_every: int = 0,
    eval_on_start: bool = False,
    best: Best = Best(),
    on_nonfinite: Literal["stop", "skip"] = "stop",
    tune: bool = False,
    output_dir: Path | str | None = None,
    checkpoints: Checkpoints | None = None,
    save_with: Sequence[Any] = (),
    write_model: WriteModel = write_pretrained,
    **more_summary: Any,
) -> dict[str, Any]:
    """Fine-tune a model and give the run in figures (`summary.json`); the model is trained in place.

    `model` and `optimizer` come unprepared. `validate` gives metrics of the prepared model, after every
    `eval_every` windows (0: only at the end), at the end, and with `eval_on_start` before the first. `tune`:
    find the fastest size of micro-batches on the first windows (`tune.py`). `on_nonfinite`: as for `train`.
    Under `output_dir`: history.jsonl, summary.json, best/ and last/ with the model, which `write_model`
    writes, and `save_with` (a tokenizer). Further keyword arguments go into the summary as they are.

    With `checkpoints`, the run saves some there, goes on from one, and stops between windows on SIGTERM or
    SIGINT: what it gives then is no summary that is written, and its `stopped_after` is the window.
    """
    try_out(model, windows, compute_loss)
    accumulate_in_float32(model, optimizer)  # where weights are in bf16
    model, optimizer = accelerator.prepare(model, optimizer)
    folder = Path(output_dir) if output_dir is not None else None
    evaluations: list[dict[str, float]] = []  # each with the window that it came after
    best_evaluation: dict[str, float] = {}
    start, done = windows.state_dict(), 0
    first_window = windows.tokens[windows.plan.indices(start["epoch"], start["window"])]
    checkpointer = None
    if checkpoints is not None:
        if folder is None:
            raise ValueError("checkpoints need a folder: give output_dir=")
        checkpointer = Checkpointer(folder, checkpoints, accelerator, model, optimizer, scheduler, windows)
        if checkpoints.resume_from is not None:
            done, progress = checkpoints.resume_from.window, checkpointer.load(checkpoints.resume_from)
            evaluations, best_evaluation = progress["evaluations"], progress["best"]

    def evaluate_now(window: int) -> None:
        nonlocal best_evaluation
        assert validate is not None
        metrics = broadcast_object_list([validate(model)])[0]  # all processes decide alike
        if best.metric not in metrics:
            raise ValueError(f"best: no metric {best.metric!r}; validate gave {', '.join(metrics)}")
        log.evaluation(metrics)
        evaluations.append({"window": window, **metrics})
        if best.improves(evaluations):
            best_evaluation = evaluations[-1]
            if folder is not None:
                save_model(model, folder / "best", accelerator, *save_with, write=write_model)

    def gives_up_after(window: int) -> bool:
        """Evaluate, where it is time to; is it time to stop, too?"""
        if not (validate and eval_every and window % eval_every == 0):
            return False
        if window not in [evaluation["window"] for evaluation in evaluations]:
            evaluate_now(window)
        if not best.patience or window == total:
            return False
        return len(evaluations) - evaluations.index(best_evaluation) > best.patience

    def save_checkpoint() -> None:
        assert checkpointer is not None
        log.keep()
        window, progress = log.records[-1].window, {"evaluations": evaluations, "best": best_evaluation}
        if problem := checkpointer.save(window, best_evaluation.get("window"), progress):
            log.say(f"no checkpoint after window {window}: {problem}")

    def total_windows(done: int) -> float:
        epoch, window = windows.coming
        to_run = windows.plan.count_windows(range(epoch, epochs))  # None: a stream's are not known
        return min(max_windows or math.inf, math.inf if to_run is None else done + to_run - window)

    total, grown = total_windows(done), windows.grown
    num_windows = int(total) if total < math.inf else None
    tuning = Tuning.of(windows, num_windows and num_windows - done) if tune else None
    movement, stopped_after = Movement(model), None
    signals = StopSignals(accelerator)
    with RunLog(accelerator, num_windows, folder, done) as log, signals if checkpointer else nullcontext():
        if validate and eval_on_start and not done:
            evaluate_now(0)
        records = train(
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
        gave_up = done > 0 and gives_up_after(done)  # a checkpoint is saved before the evaluation
        try:
            for record in () if gave_up else records:
                log.window(replace(record, update_ratio=movement.since_last()))
                if windows.grown != grown:
                    total, grown = total_windows(record.window), windows.grown
                    log.expect(int(total) if total < math.inf else None)
                    size = windows.plan.size_asked(*windows.coming)
                    log.say(
                        f"windows of {size:,} examples from window {record.window + 1} on, by the noise scale"
                    )
                if tuning is not None and tuning.said is None:
                    tuning.saw(record.seconds - windows.seconds_to_collate)
                    if tuning.said is not None:
                        log.say(tuning.said)
                if checkpointer is not None:
                    stop, every = signals.asked(), checkpointer.settings.every
                    if stop or (every and record.window % every == 0):
                        save_checkpoint()
                    if stop and record.window < total:
                        stopped_after = record.window
                        break
                gave_up = gives_up_after(record.window)
                if gave_up:
                    break
        except NonFinite:
            if checkpointer is not None and log.records:
                save_checkpoint()  # after the window before it
            raise
        if gave_up:
            log.say(f"stopped early: {best.metric} has not improved in {best.patience} evaluations")
        last = log.records[-1].window if log.records else 0
        if stopped_after is None:
            if folder is not None:
                save_model(model, folder / "last", accelerator, *save_with, write=write_model)
            if validate and last and last not in [evaluation["window"] for evaluation in evaluations]:
                evaluate_now(last)
    return log.summary(
        write=stopped_after is None,
        stopped_after=stopped_after,
        eval=evaluations[-1] if evaluations else None,
        best=best_evaluation or None,
        evaluations=evaluations,
        first_window=[tokens.sum(1).tolist() for tokens in windows.cut(first_window)],
        micro_batches=str(windows.bound),
        replays=windows.replays,
        tuning=tuning.to_json() if tuning is not None else None,
        empty_windows=windows.empty_windows,
        empty_micro_batches=windows.empty_micro_batches,
        effective_batch_size=None if callable(size := windows.plan.effective_batch_size) else size,
        **{"baseline": None, **more_summary},
    )
