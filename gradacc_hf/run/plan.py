"""The memory, steps, operations, time and cost of a run of a recipe, for `gradacc plan`.

A plan needs the config and the tokenizer of the model, and the data. It needs no weights and no GPU.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from accelerate import Accelerator
from datasets import Dataset

from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.memory_model import MicroBatchMemory, Parts
from gradacc_hf.accumulation.splitting import Bound, usual_cost
from gradacc_hf.config.schema import Config, tokens_per_micro_batch, with_settings
from gradacc_hf.errors import InputError, NotTraceableError, refuse
from gradacc_hf.memory.estimator import StepEstimate
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.recipe.budget import fit_to_model
from gradacc_hf.recipe.loading import open_run
from gradacc_hf.run.memory_advice import Lever, levers
from gradacc_hf.run.memory_bound import longest_example, recipe_memory, usable_memory
from gradacc_hf.run.overview import data_lines
from gradacc_hf.run.padding import plan_padding
from gradacc_hf.run.setup import check_vocabulary, make_model, make_windows, total_windows
from gradacc_hf.training.optimizer import check_optimizer_of_adapters

GIB = 2**30
Shape = tuple[tuple[int, ...], ...]  # (rows, columns): tokens of each row of a micro-batch
SAMPLED_WINDOWS = 200  # windows of the first epoch that are split, evenly spaced


@dataclass(frozen=True)
class Steps:
    """The split of the windows, from a sample of the first epoch."""

    windows: int | None  # None: unknown, of a stream
    windows_of_epochs: int | None  # without train.max_windows; None: unknown
    epochs: int
    accumulation_steps: tuple[int, float, int]  # min, mean, max over windows, of the process with most
    padding: float  # share of the tokens
    largest: tuple[int, list[int]]  # rows, and longest of each column, of the micro-batch with most memory
    flops_per_window: float  # floating-point operations


@dataclass(frozen=True)
class Plan:
    """The plan of a run. Bytes are for one process."""

    model: str
    parameters: int
    trained: int
    device: str
    processes: int
    precision: str
    memory: int  # available bytes
    parts: Parts  # at the largest micro-batch
    fits: bool
    longest: list[int]  # tokens of the longest example
    longest_bytes: int  # memory of that example alone
    bound: str
    why: str
    steps: Steps
    processes_change: dict[str, int]  # bytes of the same micro-batch under DDP and FSDP2
    seconds: float | None
    price: float | None
    levers: list[Lever]
    model_notes: dict[str, str]  # what the recipe changes of the model, and where the labels come from
    padding_free: bool  # whether micro-batches are planned without padding
    data_lines: list[tuple[str, str]]  # name and text of each line about the data


def rate_of(run: Path) -> float:
    """Return the speed of each device in a finished run, in 10¹² operations per second.

    The plan of the run gives the operations, the summary of the run the seconds.
    """
    recipe = open_run(run)
    file = run / "summary.json"
    if not file.is_file():
        refuse(str(run), "found no summary.json in it, so the run has not ended", "give a run that has")
    summary = json.loads(file.read_text(encoding="utf-8"))
    tuned: dict[str, Any] = summary.get("tuning") or {"max_tokens": None}
    if tuned["max_tokens"] is not None:  # most windows were split with this size
        changes = {"budget.max_tokens": tuned["max_tokens"]}
        recipe = recipe.with_config(with_settings(recipe.config, changes))
    planned = make_plan(recipe, summary["processes"], with_levers=False).steps.flops_per_window
    return planned * summary["windows"] / summary["seconds"] / summary["processes"] / 1e12


def make_plan(
    recipe: Recipe,
    processes: int = 1,
    tflops: float | None = None,
    price: float | None = None,
    with_levers: bool = True,
    data: tuple[Dataset, Dataset] | None = None,
) -> Plan:
    """Return the plan of a recipe's run.

    The plan is for GPUs. It is for a CPU with the budget `cpu`, or if the memory of a GPU is not known.

    Args:
        recipe: the recipe, which is not changed.
        processes: processes of the run.
        tflops: speed of one device, in 10¹² floating-point operations per second.
        price: price of one device per hour.
        with_levers: whether to search for settings that save memory, if the run does not fit.
        data: the result of an earlier `recipe.read_examples()`; by default the data are read.

    Raises:
        InputError: if no step of the model can be traced.
    """
    check_optimizer_of_adapters(recipe.config.optim, recipe.config.model.lora.rank)
    recipe = recipe.weightless()
    training, validation = data or recipe.read_examples()
    recipe = fit_to_model(recipe)
    empty = recipe.empty_model()
    check_vocabulary(recipe, empty, (training, validation))
    config, is_cpu = recipe.config, Path(recipe.config.budget_file or "").stem == "cpu"
    given = usable_memory(config.budget, on_gpu=not is_cpu)
    device = "cpu" if is_cpu or given is None else "cuda"
    if device == "cpu" and config.budget.offload_activations:
        refuse("budget.offload_activations", "found true, and the plan is for a CPU", "set it to false")
    memory = given or psutil.virtual_memory().total
    windows, _ = make_windows(recipe, training, validation, Accelerator(cpu=True), Bound(micro_batch_size=1))
    try:
        found = recipe_memory(recipe, training, windows.tokens, make_model, device == "cuda")
    except NotTraceableError as error:
        raise InputError(
            f"model.name: no step of {config.model.name} could be traced ({error}). Run the recipe with "
            "--check and a number for budget.max_tokens instead"
        ) from error
    per_process = found.memory.over_processes(processes, sharded=False)
    bound, why = _bound(recipe, per_process, memory, bool(given), device)
    windows = windows.with_bound(bound, processes, usual_cost(device))
    plan_padding(recipe, empty, windows)
    steps, largest = _steps(recipe, windows, found)
    parts = _parts(per_process, windows, largest)
    longest = windows.tokens[longest_example(windows.tokens)].tolist()
    alone = per_process.bytes(1, longest)
    room = {"found": found, "available": memory, "processes": processes}
    seconds = None
    if tflops and steps.windows is not None:
        seconds = steps.flops_per_window * steps.windows / (tflops * 1e12 * processes)
    return Plan(
        model=config.model.name,
        parameters=found.total_parameters,
        trained=found.trained_parameters,
        device=device,
        processes=processes,
        precision=config.budget.precision,
        memory=memory,
        parts=parts,
        fits=parts.total <= memory,
        longest=longest,
        longest_bytes=alone,
        bound=windows.limit,
        why=why,
        steps=steps,
        processes_change=_on_processes(max(2, processes), found, config, windows, largest),
        seconds=seconds,
        price=seconds * processes * price / 3600 if seconds is not None and price else None,
        levers=levers(recipe, training, windows.tokens, make_model, device == "cuda", **room)
        if with_levers and alone > memory
        else [],
        model_notes={name: note for name, note in recipe.model_notes.items() if name != "head"},
        padding_free=windows.padding_free,
        data_lines=data_lines(recipe, len(training), len(validation)),
    )


def _bound(
    recipe: Recipe, memory: MicroBatchMemory, there_are: int, is_given: bool, device: str
) -> tuple[Bound, str]:
    """Return the limit of a micro-batch, and the reason."""
    budget = recipe.config.budget
    if budget.micro_batch_size is not None:
        return Bound(micro_batch_size=budget.micro_batch_size), "set by budget.micro_batch_size"
    if budget.max_tokens != "auto":
        return Bound(max_tokens=budget.max_tokens), "set by budget.max_tokens"
    if is_given:
        return Bound(max_bytes=there_are, memory=memory), "the predicted bytes fit budget.memory"
    tokens = tokens_per_micro_batch(budget, device)
    return Bound(max_tokens=tokens), "more is not faster on a CPU; set budget.memory for a bound in bytes"


def _parts(memory: MicroBatchMemory, windows: WindowLoader, shape: Shape) -> Parts:
    """Return the bytes of a micro-batch with examples of these tokens."""
    tokens = np.array(shape)
    if windows.padding_free:
        return memory.parts_without_padding(tokens)
    return memory.parts(len(tokens), tokens.max(0))


def _on_processes(
    number: int, found: StepEstimate, config: Config, windows: WindowLoader, shape: Shape
) -> dict[str, int]:
    """Return the bytes of a micro-batch in each of several processes, under DDP and FSDP2."""
    whole, layer = config.budget.whole_gradients, found.largest_layer
    memories = {
        name: found.memory.over_processes(number, sharded, layer, whole)
        for name, sharded in (("DDP", False), ("FSDP2", True))
    }
    return {name: _parts(memory, windows, shape).total for name, memory in memories.items()}


def _steps(recipe: Recipe, windows: WindowLoader, found: StepEstimate) -> tuple[Steps, Shape]:
    """Return the split, and the micro-batch with most memory."""
    splits = windows.spread_splits(SAMPLED_WINDOWS)
    shapes = [
        _shape(windows, micro_batch, split.pad_to)
        for split in splits
        for process in split.processes
        for micro_batch in process
    ]
    different = sorted(set(shapes))
    steps = [max(map(len, split.processes)) for split in splits]
    tokens, padded = (sum(getattr(split, name) for split in splits) for name in ("tokens", "padded_tokens"))
    flops = {shape: _flops(found, windows, shape) for shape in different}
    largest = max(
        different, key=lambda shape: (_parts(found.memory, windows, shape).total, sum(map(sum, shape)))
    )
    planned = Steps(
        windows=total_windows(recipe.config, windows),
        windows_of_epochs=windows.plan.count_windows(range(recipe.config.train.epochs)),
        epochs=recipe.config.train.epochs,
        accumulation_steps=(min(steps), sum(steps) / len(steps), max(steps)),
        padding=1 - tokens / padded,
        largest=(len(largest), np.array(largest).max(0).tolist()),
        flops_per_window=sum(flops[shape] for shape in shapes) / len(splits),
    )
    return planned, largest


def _shape(windows: WindowLoader, micro_batch: np.ndarray, pad_to: int | None) -> Shape:
    """Return the computed tokens of each row of a micro-batch, in ascending order."""
    if windows.padding_free:
        return tuple(sorted(map(tuple, windows.tokens[micro_batch].tolist())))
    rows, lengths = windows.shape(micro_batch, pad_to)
    return (tuple(lengths),) * rows


def _flops(found: StepEstimate, windows: WindowLoader, shape: Shape) -> float:
    """Return the operations of a micro-batch. Without padding, they are the sum over examples."""
    if windows.padding_free:
        return sum(found.flops_of(1, tokens) for tokens in shape)
    return found.flops_of(len(shape), shape[0])
