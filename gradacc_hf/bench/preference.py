"""`gradacc bench preference`: the losses of preferences, compared with the trainers of TRL.

For each loss, three contenders train on the same pairs, tokens, weights and windows:

| contender | batch |
|---|---|
| TRL, whole batch | the whole window, padded |
| TRL, accumulated | micro-batches of `micro_batch_size` examples, in the order of the window |
| gradacc | micro-batches of the config's budget, without padding in the layers |

Gradients are of the first window. The model has smaller weights than the reference, so that both differ, as
in the middle of a run. Speed and memory are of separate processes, in turns. The time includes the reference
log-probabilities, which TRL computes with a second model in every step.
"""

import copy
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch.utils.data import SequentialSampler

from gradacc_hf.accumulation.accelerate_state import reset_accelerate
from gradacc_hf.accumulation.reference import Gradient, read_gradient, relative_error
from gradacc_hf.bench.progress import Progress
from gradacc_hf.comparison.worker import peak_memory, reset_peak_memory
from gradacc_hf.errors import InputError, one_line
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.run.padding import choose_padding
from gradacc_hf.run.setup import load_data, make_model, make_windows
from gradacc_hf.tasks.preference_examples import answer_span
from gradacc_hf.tasks.preference_formats import PAIR
from gradacc_hf.training.loop import train
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.utils.paths import bundle_root
from gradacc_hf.utils.verbosity import silence_libraries

ROUNDING = 1e-4
"""Difference of gradients above which a row is marked. Both compute log-probabilities in float32. On SmolLM2,
each is about 1e-5 from float64."""
LOSSES = ("dpo", "kto", "reward")
CONTENDERS = {"whole": "TRL, whole batch", "accumulated": "TRL, accumulated", "ours": "gradacc"}
SHRUNK = 0.9
"""Factor of all matrices of the model after the reference is known, where gradients are compared."""


@dataclass(frozen=True)
class PreferenceRuns:
    """The figures of one contender with one loss. Tuples have one element per repeat."""

    gradient_error: float  # of the first window, relative to TRL's whole batch
    loss_error: float
    examples_per_second: tuple[float, ...]
    memory_bytes: tuple[int, ...]  # peak of reference and training, above the memory with the loaded model


@dataclass(frozen=True)
class PreferenceResult:
    """The contenders by loss. `times`: examples per second of gradacc / of a contender of TRL, per repeat."""

    contenders: dict[str, dict[str, PreferenceRuns]]
    times: dict[str, dict[str, tuple[float, ...]]]
    windows: int
    examples: dict[str, int]  # in a window
    micro_batch_size: int
    measured_with: dict[str, str]


def measure_preference(
    settings: Sequence[str] = (),
    losses: Sequence[str] = (),
    num_windows: int = 2,
    repeats: int = 3,
    micro_batch_size: int = 4,
    progress: Progress = iter,
) -> PreferenceResult:
    """Train the first windows of the offline config with each loss and contender, in turns.

    Args:
        settings: command-line settings added to the offline config.
        losses: the values of `data.loss`; all by default.
        num_windows: the number of windows in a run.
        repeats: the number of runs of each contender.
        micro_batch_size: the examples of an accumulated micro-batch of TRL.
        progress: wraps the runs.

    Raises:
        InputError: TRL is not installed, or a loss is unknown.
    """
    if find_spec("trl") is None:
        raise InputError("bench preference: TRL is not installed: pip install trl==1.16.0")
    if unknown := [loss for loss in losses if loss not in LOSSES]:
        raise InputError(f"--only: found {unknown[0]!r}; allowed: {', '.join(LOSSES)}")
    chosen, names = list(losses or LOSSES), list(CONTENDERS)
    turns = [(loss, "gradients") for loss in chosen]
    turns += [
        (loss, name)
        for repeat in range(repeats)
        for loss in chosen
        for name in names[repeat % 3 :] + names[: repeat % 3]
    ]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for loss, name in progress(turns):
        sizes = num_windows, micro_batch_size
        found.setdefault((loss, name), []).append(_run_in_process(loss, name, *sizes, settings))
    contenders = {
        loss: {
            name: PreferenceRuns(
                gradient_error=found[loss, "gradients"][0]["gradient_errors"][name],
                loss_error=found[loss, "gradients"][0]["loss_errors"][name],
                examples_per_second=tuple(run["examples_per_second"] for run in found[loss, name]),
                memory_bytes=tuple(run["memory_bytes"] for run in found[loss, name]),
            )
            for name in names
        }
        for loss in chosen
    }
    times = {
        loss: {
            other: tuple(
                a / b
                for a, b in zip(
                    runs["ours"].examples_per_second, runs[other].examples_per_second, strict=True
                )
            )
            for other in names[:2]
        }
        for loss, runs in contenders.items()
    }
    first = {loss: found[loss, "gradients"][0] for loss in chosen}
    return PreferenceResult(
        contenders=contenders,
        times=times,
        windows=num_windows,
        examples={loss: first[loss]["examples"] for loss in chosen},
        micro_batch_size=micro_batch_size,
        measured_with=measured_with(first[chosen[0]]["device"]) | {"trl": first[chosen[0]]["trl"]},
    )


def _run_in_process(
    loss: str, name: str, num_windows: int, micro_batch_size: int, settings: Sequence[str]
) -> dict[str, Any]:
    words = [loss, name, str(num_windows), str(micro_batch_size), *settings]
    with tempfile.TemporaryDirectory() as cache:  # references are computed, not read
        home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "gradacc_hf"
        (Path(cache) / "gradacc_hf").mkdir()
        for path in home.glob("*") if home.is_dir() else ():
            if not path.name.startswith("reference-"):
                (Path(cache) / "gradacc_hf" / path.name).symlink_to(path)
        environment = {**os.environ, "XDG_CACHE_HOME": cache, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-m", __name__, *words], capture_output=True, text=True, env=environment
        )
    if done.returncode == 2:
        raise InputError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"{loss}, {CONTENDERS.get(name, name)} failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


class PreferenceTask:
    """The examples of the first windows, and the weights, for all contenders with one loss."""

    def __init__(self, loss: str, num_windows: int, micro_batch_size: int, settings: Sequence[str]):
        config = str(bundle_root() / "configs/preference_offline.yaml")
        shared = [f"--data.loss={loss}", "--model.dropout=0", "--model.lora.rank=0", "--batch.drop_last=true"]
        recipe = load_recipe(["--config", config, *shared, *settings])
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self.recipe, training, self.validation = load_data(recipe)
        self.size, self.micro_batch_size = self.recipe.config.batch.least, micro_batch_size
        windows, _ = make_windows(self.recipe, training, self.validation, self.accelerator)
        if num_windows > len(windows):
            raise InputError(
                f"--windows: found {num_windows}; allowed: 1 to {len(windows)}, the windows of an epoch"
            )
        places = [place for number in range(num_windows) for place in windows.plan.indices(0, number)]
        self.training = training.select(places)

    def ours(self, changes: bool, num_windows: int) -> tuple[list[float], Gradient, float, int]:
        """Train with gradacc. Return losses, the first gradient, seconds, and the peak memory."""
        model = make_model(self.recipe)
        loaded = self.training.select(range(self.size * num_windows))
        windows, _ = make_windows(self.recipe, loaded, self.validation, self.accelerator)
        choose_padding(self.recipe, model, windows)
        before, started = reset_peak_memory(self.accelerator.device), time.perf_counter()
        self.recipe.before_training(model, [loaded], self.accelerator)
        gradients: list[Gradient] = []
        optimizer = self._optimizer(model, changes, gradients)
        model, optimizer = self.accelerator.prepare(model, optimizer)
        records = train(
            model, optimizer, windows, accelerator=self.accelerator, compute_loss=self.recipe.loss
        )
        seconds = time.perf_counter() - started
        memory = max(0, peak_memory(self.accelerator.device) - before)
        return [record.loss for record in records], gradients[0] if gradients else {}, seconds, memory

    def _optimizer(self, model: Any, changes: bool, gradients: list[Gradient]) -> torch.optim.Optimizer:
        """Return AdamW; with `changes`, an optimizer that stores gradients, and shrink the weights."""
        if not changes:
            return torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.mul_(SHRUNK)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.register_step_pre_hook(lambda *_: gradients.append(read_gradient(model)))
        return optimizer

    def of_trl(self, changes: bool, num_windows: int, size: int) -> tuple[list[float], Gradient, float, int]:
        """Train with TRL, in micro-batches of `size` examples. Return as `ours` does."""
        model = self.plain_model()
        reference = copy.deepcopy(model).eval() if self.recipe.data.loss != "reward" else None
        gradients: list[Gradient] = []
        optimizer = self._optimizer(model, changes, gradients)
        rows = self.training.select(range(self.size * num_windows))
        with tempfile.TemporaryDirectory() as folder:
            trainer = _trainer(
                self.recipe,
                model,
                reference,
                _for_trl(rows, self.recipe.data.loss),
                optimizer,
                folder,
                size,
                self.size,
            )
            before, started = reset_peak_memory(self.accelerator.device), time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - started
            memory = max(0, peak_memory(self.accelerator.device) - before)
        if reference is not None and not changes:  # the second model is loaded before the measurement
            memory += sum(parameter.nbytes for parameter in reference.parameters())
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return losses, gradients[0] if gradients else {}, seconds, memory

    def plain_model(self) -> Any:
        """Return the model with the weights of the recipe's, as a user of TRL loads it."""
        ours = make_model(self.recipe)
        model = type(ours)(ours.config)
        model.load_state_dict(ours.state_dict())
        model.config.pad_token_id = self.recipe.tokenizer.pad_token_id
        return model


def _for_trl(examples: Dataset, loss: str) -> Dataset:
    """Return examples of the recipe with the columns that TRL's collate functions read.

    TRL counts all tokens after the prompt, so tokens after the last label are left out.
    """

    def parts(row: Any, prefix: str) -> tuple[list[int], list[int]]:
        ids, (start, end) = row[f"{prefix}input_ids"], answer_span(row[f"{prefix}labels"])
        return ids[:start], ids[start:end]

    rows: list[dict[str, Any]] = []
    row: Any
    for row in examples:
        if loss == "reward":
            rows.append({f"{name}_ids": row[f"{name}_input_ids"] for name in PAIR})
        elif loss == "kto":
            (prompt, answer), (_, other) = parts(row, ""), parts(row, "kl_")
            label = bool(row["desirable"])
            rows.append(
                {"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": other, "label": label}
            )
        else:
            (prompt, chosen), (_, rejected) = parts(row, "chosen_"), parts(row, "rejected_")
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return Dataset.from_list(rows)


def _trainer(
    recipe: Recipe,
    model: Any,
    reference: Any,
    rows: Dataset,
    optimizer: torch.optim.Optimizer,
    folder: str,
    size: int,
    window: int,
) -> Any:
    """Return TRL's trainer for the loss of a recipe. The rows are tokens, in the order of the windows."""
    import trl  # type: ignore[import-not-found]

    name = {"dpo": "DPO", "kto": "KTO", "reward": "Reward"}[recipe.data.loss]
    trainer_class, config_class = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")

    class WithTokens(trainer_class):  # type: ignore[misc, valid-type]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    given = config_class(
        output_dir=folder,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=math.ceil(window / size),
        num_train_epochs=1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_length=None,
        **({} if name == "Reward" else {"beta": recipe.loss.beta}),
    )
    more = {} if reference is None else {"ref_model": reference}
    return WithTokens(
        model=model,
        args=given,
        train_dataset=rows,
        processing_class=copy.deepcopy(recipe.tokenizer),
        optimizers=(optimizer, None),
        **more,
    )


def run_contender(
    loss: str, name: str, num_windows: int, micro_batch_size: int, settings: Sequence[str]
) -> dict[str, Any]:
    """Measure one contender, or with the name "gradients" the first gradient of all."""
    task = PreferenceTask(loss, num_windows, micro_batch_size, settings)
    if name == "gradients":
        return _errors(task)
    if name == "ours":
        _, _, seconds, memory = task.ours(False, num_windows)
    else:
        size = task.size if name == "whole" else micro_batch_size
        _, _, seconds, memory = task.of_trl(False, num_windows, size)
    return {"examples_per_second": num_windows * task.size / seconds, "memory_bytes": memory}


def _errors(task: PreferenceTask) -> dict[str, Any]:
    """Return how far loss and gradient of the first window are from TRL's whole batch."""
    import trl  # type: ignore[import-not-found]

    found = {}
    for name, size in (("whole", task.size), ("accumulated", task.micro_batch_size)):
        found[name] = task.of_trl(True, 1, size)[:2]
        reset_accelerate()
    task.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    found["ours"] = task.ours(True, 1)[:2]
    losses, truth = found["whole"]
    return {
        "gradient_errors": {name: relative_error(gradient, truth) for name, (_, gradient) in found.items()},
        "loss_errors": {name: abs(of[0] / losses[0] - 1) for name, (of, _) in found.items()},
        "examples": task.size,
        "device": task.accelerator.device.type,
        "trl": trl.__version__,
    }


def print_preference(result: PreferenceResult, console: Console) -> None:
    """Print a row for each loss and contender, with medians, and the ratios of the speeds."""
    of = ", ".join(f"{number} ({loss})" for loss, number in result.examples.items())
    console.print(
        f"{result.windows} windows of {of} examples; accumulated micro-batches of {result.micro_batch_size}"
    )
    table = Table("", box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for header in ("gradient\noff by", "loss\noff by", "examples\nper s", "MiB"):
        table.add_column(header, justify="right")
    for loss, contenders in result.contenders.items():
        for key, runs in contenders.items():
            mark = "" if runs.gradient_error <= ROUNDING else " !"
            table.add_row(
                f"{loss}: {CONTENDERS[key]}",
                "" if key == "whole" else f"{runs.gradient_error:.0e}{mark}",
                "" if key == "whole" else f"{runs.loss_error:.0e}",
                f"{median(runs.examples_per_second):.2f}",
                f"{median(runs.memory_bytes) / 2**20:,.0f}",
            )
    console.print(table)
    for loss, others in result.times.items():
        for key, times in others.items():
            console.print(
                f"{loss}: gradacc, {median(times):.2f} × the examples per second of {CONTENDERS[key]} "
                f"(median of {len(times)} pairs of runs, {min(times):.2f}–{max(times):.2f})"
            )


def main(argv: Sequence[str]) -> None:
    """Run one contender, as `measure_preference` starts it, and print the figures as a line of JSON."""
    loss, name, num_windows, size, *settings = argv
    silence_libraries()
    try:
        print(json.dumps(run_contender(loss, name, int(num_windows), int(size), settings)))
    except InputError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
