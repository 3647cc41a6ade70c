"""The memory of a recipe's micro-batches: from the model's config, the data and the settings.

`memory/estimator.py` estimates it by tracing a step. Estimates are cached in $XDG_CACHE_HOME/gradacc_hf or
~/.cache/gradacc_hf, by everything that they depend on.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from sys import stderr
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list

from gradacc_hf.accumulation.splitting import Bound, rounded_up
from gradacc_hf.config.schema import BudgetConfig, detect_budget, parse_bytes, tokens_per_micro_batch
from gradacc_hf.errors import NotTraceableError
from gradacc_hf.memory.estimator import ROWS_MULTIPLE, Point, StepEstimate, StepSettings, estimate, terms_of
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.tasks.lean_loss import TOKENS_PER_CHUNK
from gradacc_hf.training.run_log import versions
from gradacc_hf.utils.files import write_whole
from gradacc_hf.utils.rng import preserve_rng_state

CACHE_FORMAT = 1  # raise it when an estimate of the same step changes
CANDIDATE_EXAMPLES = 500  # examples, of different lengths, that the ones to trace are chosen from
STEP_INDEPENDENT_KEYS = ("memory", "max_tokens", "micro_batch_size", "num_workers")  # keys of a budget


def recipe_memory(
    recipe: Recipe,
    dataset: Any,
    lengths: np.ndarray,
    make_model: Callable[[Recipe], Any],
    on_gpu: bool,
    only_longest: bool = False,
) -> StepEstimate:
    """Return the memory that a micro-batch of a recipe takes; no weights are loaded.

    Args:
        dataset: the training examples.
        lengths: their tokens, (examples, columns).
        make_model: recipe → the model that is trained.
        on_gpu: whether the run will be on a GPU.
        only_longest: whether to estimate the longest example alone, which is quicker.

    Raises:
        NotTraceableError: where no step of the model can be traced.
    """
    weightless = recipe.weightless()
    try:
        with preserve_rng_state():
            choose = _longest if only_longest else _points
            padded = rounded_up(lengths, recipe.config.budget.pad_to_multiple_of or 1)
            points, exponents = choose(weightless, dataset, padded)
    except (ValueError, KeyError, TypeError) as error:
        raise NotTraceableError(f"its examples cannot be collated: {error}") from error
    config = recipe.config
    settings = StepSettings(config.optim, config.budget.precision, on_gpu, config.model.load_in_4bit)
    file = _cache() / f"memory-{_key(weightless, points, settings)}.json"
    can_be_kept = not config.model.trust_remote_code  # that code may change unnoticed
    with suppress(OSError, ValueError, KeyError, TypeError):  # none there, or none that can be read
        if can_be_kept:
            return StepEstimate.from_json(json.loads(file.read_text(encoding="utf-8")))
    if not only_longest:
        print(f"tracing a step of {config.model.name} for its memory (once: {file.parent})", file=stderr)
    with preserve_rng_state():
        found = estimate(lambda: make_model(weightless), points, exponents, weightless.loss, settings)
    if not can_be_kept:
        return found
    with suppress(OSError):  # a cache that cannot be written is done without
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(found.to_json()))
    return found


def choose_bound(
    recipe: Recipe,
    dataset: Any,
    lengths: np.ndarray,
    make_model: Callable[[Recipe], Any],
    accelerator: Accelerator,
) -> Bound:
    """Return the limit of a recipe's micro-batches: what its budget says; for `auto`, the available bytes.

    On a CPU without `budget.memory`, and for a model that cannot be traced, `auto` is a number of tokens
    (`tokens_per_micro_batch`). Arguments: as for `recipe_memory`.
    """
    budget, on_gpu = recipe.config.budget, accelerator.device.type == "cuda"
    tokens = tokens_per_micro_batch(budget, accelerator.device.type)
    memory = usable_memory(budget, on_gpu)
    if budget.micro_batch_size is not None or budget.max_tokens != "auto" or memory is None:
        return Bound(max_tokens=tokens, micro_batch_size=budget.micro_batch_size)
    bound = Bound(max_tokens=tokens)
    if accelerator.is_main_process:
        try:
            found = recipe_memory(recipe, dataset, lengths, make_model, on_gpu)
            sharded = accelerator.distributed_type == DistributedType.FSDP
            of_one = found.memory.over_processes(
                accelerator.num_processes, sharded, found.largest_layer, budget.whole_gradients
            )
            bound = Bound(max_bytes=memory, memory=of_one)
        except NotTraceableError as error:
            thumb = f"budget.max_tokens: {tokens:,}, a rule of thumb"
            print(f"{thumb}: no step could be traced: {error}", file=stderr)
    return broadcast_object_list([bound])[0]  # else processes might split a window differently


def usable_memory(budget: BudgetConfig, on_gpu: bool) -> int | None:
    """Return the bytes of a budget, at most the smallest GPU's memory; None where neither is known."""
    granted = parse_bytes(budget.memory) if budget.memory is not None else None
    found = detect_budget().memory if on_gpu else None
    return min(filter(None, (granted, parse_bytes(found) if found else None)), default=None)


def _points(recipe: Recipe, dataset: Any, lengths: np.ndarray) -> tuple[list[Point], np.ndarray]:
    """Batches of one example each, several times over, in lengths as far apart as there are."""
    if isinstance(recipe.pad_to, int):
        lengths = np.full_like(lengths, recipe.pad_to)
    different, first = np.unique(lengths, axis=0, return_index=True)
    some = np.unique(np.linspace(0, len(different) - 1, CANDIDATE_EXAMPLES).astype(int))
    exponents = terms_of(different[some])
    of_lengths = exponents[: len(exponents) // 2, 1:]
    chosen = some[_far_apart(different[some], of_lengths)]
    packed = recipe.pad_to == "nothing"
    chunked_rows = (
        2 * TOKENS_PER_CHUNK // max(1, int(different[chosen].min()) - 1) + 1
    )  # a lean loss takes two and more
    rows = ROWS_MULTIPLE * math.ceil(chunked_rows / ROWS_MULTIPLE) if recipe.lean_loss else ROWS_MULTIPLE
    if packed:  # one row of several examples: its length is theirs together
        lengths_of = [int(rows * k * different[chosen[-1], 0]) for k in (1, 2, 3)]
        batches = [_collate(recipe, dataset, int(first[chosen[-1]]), rows * k, None) for k in (1, 2, 3)]
        exponents = np.array([(0, 0), (0, 1), (0, 2)])
        return [
            Point(1, (length,), batch) for length, batch in zip(lengths_of, batches, strict=True)
        ], exponents
    points = []
    for number in (rows, 2 * rows):
        for place in chosen:
            padded = tuple(int(length) for length in different[place])
            pad_to = None if recipe.pad_to == "micro_batch" else padded[0]
            batch = _collate(recipe, dataset, int(first[place]), number, pad_to)
            points.append(Point(number, padded, batch))
    return points, exponents


def longest_example(lengths: np.ndarray) -> int:
    """The index of the example with most tokens."""
    return int(lengths.reshape(len(lengths), -1).sum(axis=1).argmax())


def _longest(recipe: Recipe, dataset: Any, lengths: np.ndarray) -> tuple[list[Point], np.ndarray]:
    """The longest example alone."""
    index = longest_example(lengths)
    batch = _collate(recipe, dataset, index, 1, recipe.pad_to if isinstance(recipe.pad_to, int) else None)
    return [Point(1, tuple(map(int, lengths[index])), batch)], np.zeros((1, 1 + lengths.shape[1]), dtype=int)


def _far_apart(lengths: np.ndarray, powers: np.ndarray) -> np.ndarray:
    """As many of the lengths as there are powers, which tell these well apart: each the farthest from what
    those before it say (Gram-Schmidt with pivoting)."""
    values = np.prod((lengths / lengths.max(axis=0))[:, None, :] ** powers[None], axis=2)
    chosen: list[int] = []
    for _ in powers:
        chosen.append(int((values**2).sum(axis=1).argmax()))
        direction = values[chosen[-1]] / np.linalg.norm(values[chosen[-1]])
        values = values - np.outer(values @ direction, direction)
    return np.array(sorted(chosen))


def _collate(recipe: Recipe, dataset: Any, index: int, rows: int, pad_to: int | None) -> Mapping[str, Any]:
    example = dataset[index]
    if recipe.transform is not None:
        example = recipe.transform(example, np.random.default_rng(0))
    examples = [dict(example) if isinstance(example, Mapping) else example for _ in range(rows)]
    return recipe.collate(examples, *(() if pad_to is None else (pad_to,)))


def _key(recipe: Recipe, points: list[Point], settings: StepSettings) -> str:
    """Return a checksum of what an estimate depends on: model, settings, batches, code, versions."""
    config = recipe.config
    beside = sorted(Path(config.recipe).parent.glob("*.py")) if config.recipe else []
    shapes = [
        {
            name: (tuple(v.shape), str(v.dtype)) if isinstance(v, torch.Tensor) else str(v)
            for name, v in b.items()
        }
        for b in (point.batch for point in points)
    ]
    decides = {
        "format": CACHE_FORMAT,
        "model": recipe.model_config().to_dict(),
        "settings": {**asdict(config.model), **asdict(config.data)},
        "optimizer": asdict(settings.optim),
        "budget": {k: v for k, v in asdict(config.budget).items() if k not in STEP_INDEPENDENT_KEYS},
        "on_gpu": settings.on_gpu,
        "recipe": [hashlib.sha256(file.read_bytes()).hexdigest() for file in beside],
        "class": f"{type(recipe).__module__}.{type(recipe).__qualname__}",
        "points": [(point.rows, point.lengths) for point in points],
        "batches": shapes,
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "gradacc_hf"
