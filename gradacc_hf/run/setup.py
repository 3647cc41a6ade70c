"""Make the parts of a run from its settings: the Accelerator, the data, the windows and the model."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow.compute
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, LoggerType, set_seed
from datasets import Dataset

from gradacc_hf.accumulation.batch_schedule import GrowingBatch, ScheduledBatch
from gradacc_hf.accumulation.lengths import measure_lengths
from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.loss_items import as_window_loss
from gradacc_hf.accumulation.noise_scale import MEASUREMENTS_WANTED, NOISE_EVERY
from gradacc_hf.accumulation.sampler import EffectiveBatchSize, WindowPlan
from gradacc_hf.accumulation.splitting import Bound
from gradacc_hf.accumulation.streaming import Stream
from gradacc_hf.config.batch_size import check_can_measure, effective_batch_size
from gradacc_hf.config.budget import export_cpu_offload
from gradacc_hf.config.schema import BudgetConfig, Config, tokens_per_micro_batch
from gradacc_hf.data.columns import is_list
from gradacc_hf.errors import InputError, refuse
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.recipe.budget import fit_to_model
from gradacc_hf.run.memory_bound import choose_bound
from gradacc_hf.training.autotune import WINDOWS_NEEDED
from gradacc_hf.training.bad_index import num_embeddings, num_outputs
from gradacc_hf.training.compile import compile_layers
from gradacc_hf.training.optimizer import choose_trained
from gradacc_hf.utils.hardware import launched_for_several
from gradacc_hf.utils.modeling import checkpoint_activations, num_positions

pc: Any = pyarrow.compute  # the functions are made at import, so type checkers do not know them


def make_accelerator(config: Config) -> Accelerator:
    """Return an Accelerator for the precision of the budget and the tracker of the run.

    Args:
        config: a config that this machine can run (`config.budget.fit_to_machine`).

    Raises:
        InputError: for an unknown tracker, or a launcher that started another number of processes.
    """
    tracker, known = config.output.tracker, sorted(map(str, LoggerType.list()))
    if tracker != "none" and tracker not in known:
        raise InputError(
            f"output.tracker: found {tracker!r}; allowed: none, {', '.join(n for n in known if n != 'all')}"
        )
    if tracker not in ("none", *map(str, get_available_trackers())):
        raise InputError(
            f"output.tracker: {tracker} is not installed: pip install {tracker}, or choose another tracker"
        )
    export_cpu_offload(config.budget)
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(config.budget.precision, config.budget.precision),
        cpu=not torch.accelerator.is_available(),  # else several processes would not form a group
        log_with=None if tracker == "none" or config.check else tracker,
        project_dir="runs",  # until the folder of the run is made
        step_scheduler_with_optimizer=False,
    )
    expected = int(os.environ.get("GRADACC_PROCESSES") or accelerator.num_processes)
    if accelerator.num_processes != expected:
        raise InputError(
            f"found {accelerator.num_processes} running processes; allowed: {expected}, as given to the "
            "launcher. On CPUs use the topology configs/accelerate/cpu_2.yaml, as ./launch.sh does"
        )
    if accelerator.num_processes == 1 and launched_for_several():
        raise InputError(
            "accelerate launch started one process instead of several, because MULTI_CPU needs mpirun: pass "
            "--config_file configs/accelerate/cpu_2.yaml --num_processes N, or use ./launch.sh"
        )
    return accelerator


def load_data(recipe: Recipe) -> tuple[Recipe, Dataset, Dataset]:
    """Read the data sets of a recipe.

    Returns:
        The recipe, with a budget that its model and inputs can use.
        The training examples.
        The validation examples.
    """
    training, validation = recipe.read_examples()
    return fit_to_model(recipe), training, validation


def make_windows(
    recipe: Recipe,
    training: Dataset,
    validation: Dataset,
    accelerator: Accelerator,
    bound: Bound | None = None,
) -> tuple[WindowLoader, WindowLoader]:
    """Return the loaders of a run: training in windows, validation in the data set's order.

    Args:
        recipe, training, validation: as `load_data` returns them.
        bound: the limit of a micro-batch; by default the limit of the budget, or of the available memory.

    Raises:
        InputError: for sizes of windows that the examples cannot fill, or that rule out measuring noise.
    """
    config = recipe.config
    sizes = effective_batch_size(config.batch, len(training))
    measures = as_window_loss(recipe.loss) is None  # a loss of the whole window has no parts to measure
    if accelerator.distributed_type == DistributedType.FSDP and config.budget.whole_gradients:
        measures = False  # the gradient of a single micro-batch is never available
    if isinstance(sizes, GrowingBatch):
        check_can_measure(sizes, measures, accelerator.num_processes)
    wrong = [index for index in config.data.leave_out if not 0 <= index < len(training)]
    if wrong and recipe.opened is None:
        raise InputError(
            f"data.leave_out: found {wrong[0]}; allowed: 0 to {len(training) - 1}, training examples"
        )
    by_length = config.budget.micro_batch_size is None
    lengths = measure_lengths(training, recipe.lengths(training), bounds=by_length)
    shared = _settings(recipe, accelerator)
    shared["bound"] = bound or choose_bound(recipe, training, lengths, make_model, accelerator)
    shared["num_workers"] = config.budget.num_workers
    plan = WindowPlan(len(training), sizes, config.train.seed, shuffle=True, drop_last=config.batch.drop_last)
    if recipe.example_weights is not None and as_window_loss(recipe.loss) is not None:
        found = f"the loss of {type(recipe).__name__} is over all rows of a window together"
        refuse("data.weight_column", found, "set it to null")
    windows = WindowLoader(
        training,
        sizes,
        sources=recipe.sources,
        shares=recipe.shares,
        weights=recipe.example_weights,
        noise_every=noise_every(config, plan) if measures else 0,
        lengths=lengths,
        **_training_settings(config),
        **shared,
    )
    bound = windows.bound
    if bound.max_bytes is not None:  # a prediction for training, which excludes generation
        most = tokens_per_micro_batch(config.budget, accelerator.device.type)
        bound = replace(bound, max_tokens=most)
    return windows, make_validation_windows(recipe, validation, accelerator, bound)


def make_validation_windows(
    recipe: Recipe, validation: Dataset, accelerator: Accelerator, bound: Bound | None = None
) -> WindowLoader:
    """Return the loader of the validation examples, in the data set's order.

    Args:
        recipe, validation: as `load_data` returns them.
        accelerator: the Accelerator.
        bound: the limit of a micro-batch; by default the limit of the budget, without a prediction.
    """
    budget, sources = recipe.config.budget, recipe.validation_sources
    if bound is None:
        bound = Bound(tokens_per_micro_batch(budget, accelerator.device.type), budget.micro_batch_size)
    size: EffectiveBatchSize = min(512, len(validation))
    return WindowLoader(
        validation,
        size if sources is None else sizes_of_one_source(sources, size),
        lengths=recipe.lengths(validation),
        shuffle=False,
        bound=bound,
        num_workers=budget.num_workers,
        **_settings(recipe, accelerator),
    )


def sizes_of_one_source(sources: Sequence[str], most: int) -> ScheduledBatch:
    """Return sizes of windows, each of at most `most` examples of one source. Examples are in their order."""
    of_sources = [len([*rows]) for _, rows in groupby(sources)]
    found = [min(most, rows - start) for rows in of_sources for start in range(0, rows, most)]
    return ScheduledBatch(dict(enumerate(found)))


def _settings(recipe: Recipe, accelerator: Accelerator) -> dict[str, Any]:
    """Return the arguments that all loaders of a run share."""
    return {
        "accelerator": accelerator,
        "collate_fn": recipe.collate,
        "num_items": recipe.num_items,
        "pad_to": recipe.pad_to,
        "pad_to_multiple_of": recipe.config.budget.pad_to_multiple_of,
        "columns_padded_together": recipe.columns_padded_together,
        "transform": recipe.transform,
        "seed": recipe.config.train.seed,
    }


def _training_settings(config: Config) -> dict[str, Any]:
    """Return the arguments of a loader of training windows only."""
    return {
        "drop_last": config.batch.drop_last,
        "leave_out": config.data.leave_out,
        "whole_gradients": config.budget.whole_gradients,
    }


def stream_windows(recipe: Recipe, training: Dataset, planned: WindowLoader) -> WindowLoader:
    """Return the loader of all examples of a stream.

    Args:
        recipe: as `load_data` returns it.
        training: the sample of the training examples.
        planned: the windows of the sample, whose micro-batches have the same limit.
    """
    config = recipe.config

    def lengths(example: Any) -> Any:
        found: Any = recipe.lengths([example])
        return found[0]

    return WindowLoader(
        recipe.stream(training),
        effective_batch_size(config.batch, len(training)),
        lengths=None if recipe.lengths([training[0]]) is None else lengths,
        buffer_size=config.data.buffer_size,
        bound=planned.bound,
        cost=planned.cost,
        noise_every=planned.noise_every,
        padding_free=planned.padding_free,
        **_training_settings(config),
        **_settings(recipe, planned.accelerator),
    )


def noise_every(config: Config, plan: WindowPlan) -> int:
    """Return the windows between measurements of the gradient noise scale; 0 for none.

    By default, short runs measure more often, so that `MEASUREMENTS_WANTED` measurements are made. Windows
    that grow by the noise scale are measured as often as in long runs.
    """
    if config.train.noise_every is not None:
        return config.train.noise_every
    if config.batch.effective == "noise_scale":
        return NOISE_EVERY
    total = _total(config, plan)
    return min(NOISE_EVERY, max(1, math.ceil(total / MEASUREMENTS_WANTED))) if total else NOISE_EVERY


def total_windows(config: Config, windows: WindowLoader) -> int | None:
    """Return the number of windows of the whole run. For a stream: the most windows, or None if unknown."""
    return _total(config, windows.plan)


def _total(config: Config, plan: WindowPlan | Stream) -> int | None:
    if config.data.streaming:
        return config.train.max_windows
    total = sum(plan.num_windows(epoch) for epoch in range(config.train.epochs))
    return min(total, config.train.max_windows or total)


def tries_sizes(budget: BudgetConfig, num_windows: int | None) -> bool:
    """Whether a run of so many windows (None: unknown) tries several micro-batch sizes.

    A run of a compiled model does not, because the first windows are slow at any size.
    """
    is_free = budget.max_tokens == "auto" and budget.micro_batch_size is None and not budget.compile
    return is_free and (num_windows is None or num_windows >= WINDOWS_NEEDED)


def make_model(recipe: Recipe) -> Any:
    """Return the model that is trained. New weights, as of a classifier, are equal in all processes.

    Args:
        recipe: as `load_data` returns it.
    """
    config = recipe.config
    set_seed(config.train.seed)
    model = recipe.model()
    choose_trained(model, recipe.config.model, recipe.new_parameters)
    recipe.load_earlier_adapters(model)
    if config.budget.gradient_checkpointing:
        checkpoint_activations(model, config.budget.offload_activations)
    if config.budget.compile:
        compile_layers(model)
    if config.model.teacher is not None:
        recipe.distillation.attach(model)
    return model


def check_inputs(recipe: Recipe, model: Any, training: Dataset, validation: Dataset) -> None:
    """Raise InputError for tokens, or a data.max_length, that the model cannot take."""
    check_max_length(recipe, model, training)
    check_vocabulary(recipe, model, (training, validation))


def check_max_length(recipe: Recipe, model: Any, training: Dataset) -> None:
    """Raise InputError if data.max_length exceeds the positions of the model, or leaves no room for text."""
    if not any(name.endswith("input_ids") for name in training.column_names):
        return
    special, given = recipe.tokenizer.num_special_tokens_to_add(), recipe.config.data.max_length
    if given <= special:
        found = f"found {given}, and a text has {special} special tokens"
        refuse("data.max_length", found, f"allowed: {special + 1} or more")
    allowed = min(recipe.tokenizer.model_max_length, num_positions(model) or math.inf)
    multiple = recipe.config.budget.pad_to_multiple_of or 1
    if given <= allowed < (padded := -(-given // multiple) * multiple):
        found = f"found {multiple}, which pads data.max_length {given} to {padded} tokens"
        refuse("budget.pad_to_multiple_of", found, f"the model has {allowed} positions: lower either")
    if given > allowed:
        found, name = f"found {given}", recipe.config.model.name
        refuse("data.max_length", found, f"allowed: 1 to {allowed}, the positions of {name}")


def check_vocabulary(recipe: Recipe, model: Any, datasets: Sequence[Dataset]) -> None:
    """Raise InputError if the data have a token id beyond the embeddings or the outputs of the model.

    Training examples of `data.leave_out` may have one. Note it for the plan if the tokenizer has further
    tokens, and none is in the data.
    """
    inner = next((module for module in model.modules() if hasattr(module, "get_input_embeddings")), None)
    columns = [column for column in datasets[0].column_names if column.endswith("input_ids")]
    if (rows := num_embeddings(inner)) is None or not columns:
        return
    tokenizer, outputs = recipe.tokenizer, num_outputs(inner) or rows
    training, *others = datasets
    if left_out := recipe.config.data.leave_out:
        datasets = [training.select(np.setdiff1d(np.arange(len(training)), left_out)), *others]
    largest = {column: max(_largest(dataset, column) for dataset in datasets) for column in columns}
    largest |= {"the batches": max(tokenizer.convert_tokens_to_ids(recipe.tokens_of_batches()))}
    limits = dict.fromkeys(largest, rows)
    if is_list(datasets[0].features.get("labels")):
        largest["labels"] = max(_largest(dataset, "labels") for dataset in datasets)
    limits["labels"] = outputs
    for column, number in largest.items():
        if number >= limits[column]:
            token, name = tokenizer.convert_ids_to_tokens(number), recipe.config.model.name
            refuse(
                "model.name",
                f"{column} have the token {token!r}, id {number}, and {name} has the ids 0 to "
                f"{limits[column] - 1}",
                f"call resize_token_embeddings({len(tokenizer)}) on the model and save both, or remove the "
                "token from the tokenizer",
            )
    if len(tokenizer) > rows:
        note = f"{len(tokenizer) - rows} of {len(tokenizer)} tokens have no embedding; the data have none"
        recipe.model_notes["tokenizer"] = f"{note} of them"


def _largest(dataset: Dataset, column: str) -> int:
    """Return the largest number in a column of lists, of the rows that are selected."""
    tables: Any = dataset.select_columns(column).with_format("arrow").iter(batch_size=10_000)
    return max((pc.max(pc.list_flatten(table[column])).as_py() or 0 for table in tables), default=0)


def check_best_metric(config: Config, baseline: Mapping[str, float] | None) -> None:
    """Raise InputError for a `train.best_metric` that the evaluations of this recipe do not compute."""
    known = ["loss", *(baseline or {})]
    if baseline is not None and config.train.best_metric not in known:
        raise InputError(
            f"train.best_metric: found {config.train.best_metric!r}; allowed: {', '.join(known)}"
        )
