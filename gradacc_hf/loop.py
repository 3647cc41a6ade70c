"""THE loop: windows in, a fine-tuned model out.

`train` is the loop of the README with a record of each window; `evaluate` runs a model over data through the
same split; `fine_tune` is both with what a real run needs around them: DDP set up for the model at hand,
evaluation, early stopping, the best and the last model saved. Which examples and micro-batches: `windows.py`.
Files and progress: `runlog.py`.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch.distributed.tensor import DTensor

from gradacc_hf.bf16_weights import accumulate_in_float32
from gradacc_hf.checkpoint import WriteModel, save_model, write_pretrained
from gradacc_hf.items import ComputeLoss, model_loss
from gradacc_hf.out_of_memory import replayed
from gradacc_hf.runlog import RunLog, WindowRecord
from gradacc_hf.tryout import try_out
from gradacc_hf.tune import Tuning
from gradacc_hf.window import Window
from gradacc_hf.windows import WindowLoader

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
) -> Iterator[WindowRecord]:
    """Train a prepared model, one window per step of this iterator; stop iterating to stop training.

    `scheduler` is not prepared and is stepped once a window. `max_grad_norm` 0 does not clip.
    """
    numbers, look_ahead = count(1), getattr(compute_loss, "look_ahead", _nothing)
    largest = max_grad_norm or math.inf
    for _ in range(windows.state_dict()["epoch"], epochs):
        started = time.perf_counter()
        for window in windows:  # one window is one optimizer step
            model.train()
            while not window.done:
                with replayed(window, model, optimizer):  # cut finer, where memory runs out
                    look_ahead(model, window)  # nothing, but for a loss of all its examples together
                    for batch in window:  # this process's micro-batches
                        with accelerator.accumulate(model):
                            loss = compute_loss(model(**batch), batch)  # a mean over the micro-batch's items
                            accelerator.backward(window.weigh(loss))
                            if accelerator.sync_gradients:
                                grad_norm = accelerator.clip_grad_norm_(model.parameters(), largest)
                            optimizer.step()
                            optimizer.zero_grad()
            lr = optimizer.param_groups[0]["lr"]
            if scheduler is not None and not accelerator.optimizer_step_was_skipped:  # fp16 overflow
                scheduler.step()
            yield WindowRecord(
                window=(number := next(numbers)),
                epoch=window.epoch,
                loss=window.loss,
                grad_norm=_number(grad_norm),
                lr=lr,
                examples=len(window.indices),
                items=window.num_items,
                tokens=window.tokens,
                padded_tokens=window.padded_tokens,
                accumulation_steps=window.accumulation_steps,
                seconds=time.perf_counter() - started,
                skipped=accelerator.optimizer_step_was_skipped,
            )
            if number == max_windows:
                return
            started = time.perf_counter()


def _nothing(model: torch.nn.Module, window: Window) -> None:
    """Most losses are means over examples that know nothing of each other."""


def _number(norm: Any) -> float:
    """A norm as a number; that of sharded gradients is itself sharded."""
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


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
    tune: bool = False,
    output_dir: Path | str | None = None,
    save_with: Sequence[Any] = (),
    write_model: WriteModel = write_pretrained,
    **more_summary: Any,
) -> dict[str, Any]:
    """Fine-tune a model and give the run in figures (`summary.json`); the model is trained in place.

    `model` and `optimizer` come unprepared. `validate` gives metrics of the prepared model, after every
    `eval_every` windows (0: only at the end), at the end, and with `eval_on_start` before the first. `tune`:
    find the fastest size of micro-batches on the first windows (`tune.py`). Under
    `output_dir`: history.jsonl, summary.json, best/ and last/ with the model, which `write_model` writes, and
    `save_with` (a tokenizer). Further keyword arguments go into the summary as they are.
    """
    try_out(model, windows, compute_loss)
    accumulate_in_float32(model, optimizer)  # where weights are in bf16
    model, optimizer = accelerator.prepare(model, optimizer)
    folder = Path(output_dir) if output_dir is not None else None
    evaluations: list[dict[str, float]] = []  # each with the window that it came after
    best_evaluation: dict[str, float] = {}

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

    state = windows.state_dict()
    to_run = windows.plan.count_windows(range(state["epoch"], epochs))  # None: a stream's are not known
    total = min(max_windows or math.inf, math.inf if to_run is None else to_run - state["window"])
    num_windows = int(total) if total < math.inf else None
    tuning = Tuning.of(windows, num_windows) if tune else None
    first_window = windows.tokens[windows.plan.indices(state["epoch"], state["window"])]
    with RunLog(accelerator, num_windows, folder) as log:
        if validate and eval_on_start:
            evaluate_now(0)
        for record in train(
            model,
            optimizer,
            windows,
            accelerator=accelerator,
            scheduler=scheduler,
            epochs=epochs,
            max_windows=max_windows,
            max_grad_norm=max_grad_norm,
            compute_loss=compute_loss,
        ):
            log.window(record)
            if tuning is not None and tuning.said is None:
                tuning.saw(record.seconds - windows.seconds_to_collate)
                if tuning.said is not None:
                    log.console.print(tuning.said, soft_wrap=True)
            if validate and eval_every and record.window % eval_every == 0:
                evaluate_now(record.window)
                if (
                    best.patience
                    and record.window < total
                    and len(evaluations) - evaluations.index(best_evaluation) > best.patience
                ):
                    log.console.print(
                        f"stopped early: {best.metric} has not improved in {best.patience} evaluations"
                    )
                    break
        if folder is not None:
            save_model(model, folder / "last", accelerator, *save_with, write=write_model)
        last = log.records[-1].window if log.records else 0
        if validate and last and last not in [evaluation["window"] for evaluation in evaluations]:
            evaluate_now(last)
    return log.summary(
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
