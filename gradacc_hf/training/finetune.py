"""Fine-tune a model: the loop with evaluation, checkpoints and saving."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from gradacc_hf.accumulation.fp32_accumulation import accumulate_in_float32
from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.loss_items import ComputeLoss, model_loss
from gradacc_hf.errors import NonFiniteError
from gradacc_hf.training.autotune import Tuning
from gradacc_hf.training.checkpoint import Checkpointer, Checkpoints
from gradacc_hf.training.loop import iter_windows
from gradacc_hf.training.preflight import preflight_check
from gradacc_hf.training.run_log import RunLog
from gradacc_hf.training.update_ratio import UpdateRatio
from gradacc_hf.utils.files import WriteModel, save_model, write_pretrained
from gradacc_hf.utils.signals import StopSignals


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
    preflight_check(model, windows, compute_loss)
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
        epoch, window = windows.next_position
        to_run = windows.plan.count_windows(range(epoch, epochs))  # None: a stream's are not known
        return min(max_windows or math.inf, math.inf if to_run is None else done + to_run - window)

    total, grown = total_windows(done), windows.num_growths
    num_windows = int(total) if total < math.inf else None
    tuning = Tuning.of(windows, num_windows and num_windows - done) if tune else None
    movement, stopped_after = UpdateRatio(model), None
    signals = StopSignals(accelerator)
    with RunLog(accelerator, num_windows, folder, done) as log, signals if checkpointer else nullcontext():
        if validate and eval_on_start and not done:
            evaluate_now(0)
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
        gave_up = done > 0 and gives_up_after(done)  # a checkpoint is saved before the evaluation
        try:
            for record in () if gave_up else records:
                log.window(replace(record, update_ratio=movement.since_last()))
                if windows.num_growths != grown:
                    total, grown = total_windows(record.window), windows.num_growths
                    log.expect(int(total) if total < math.inf else None)
                    size = windows.plan.size_asked(*windows.next_position)
                    log.say(
                        f"windows of {size:,} examples from window {record.window + 1} on, by the noise scale"
                    )
                if tuning is not None and tuning.said is None:
                    tuning.record(record.seconds - windows.seconds_to_collate)
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
        except NonFiniteError:
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
        first_window=[tokens.sum(1).tolist() for tokens in windows.split_lengths(first_window)],
        micro_batches=str(windows.bound),
        replays=windows.replays,
        tuning=tuning.to_json() if tuning is not None else None,
        empty_windows=windows.empty_windows,
        empty_micro_batches=windows.empty_micro_batches,
        effective_batch_size=None if callable(size := windows.plan.effective_batch_size) else size,
        **{"baseline": None, **more_summary},
    )
