"""The memory of a recipe's micro-batches, from the model's config, the data and the settings.

`memory/estimator.py` estimates it by tracing a step. Estimates are cached in $XDG_CACHE_HOME/gradacc_hf or
~/.cache/gradacc_hf. The cache key contains everything that an estimate depends on.
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

from gradacc_hf.accumulation.splitting import Bound, padded_alone
from gradacc_hf.config.schema import BudgetConfig, detect_budget, parse_bytes, tokens_per_micro_batch
from gradacc_hf.errors import NotTraceableError
from gradacc_hf.memory.estimator import ROWS_MULTIPLE, Point, StepEstimate, StepSettings, estimate, terms_of
from gradacc_hf.padding.logits import TOKENS_PER_CHUNK
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.training.run_log import versions
from gradacc_hf.utils.files import write_whole
from gradacc_hf.utils.rng import preserve_rng_state

CACHE_FORMAT = 2  # raise it when the estimate of an unchanged step changes
CANDIDATE_EXAMPLES = 500  # examples of different lengths, from which the traced ones are chosen
STEP_INDEPENDENT_KEYS = (
    "memory",
    "max_tokens",
    "micro_batch_size",
    "num_workers",
    "padding_free",
)  # of a budget


def recipe_memory(
    recipe: Recipe,
    dataset: Any,
    lengths: np.ndarray,
    make_model: Callable[[Recipe], Any],
    on_gpu: bool,
    only_longest: bool = False,
) -> StepEstimate:
    """Return the memory of a micro-batch of a recipe, without loading weights.

    Args:
        recipe: the recipe.
        dataset: the training examples.
        lengths: tokens of the examples, (examples, columns).
        make_model: recipe → the model that is trained.
        on_gpu: whether the run will be on a GPU.
        only_longest: whether to estimate the longest example alone, which is quicker.

    Raises:
        NotTraceableError: if no step of the model can be traced.
    """
    weightless = recipe.weightless()
    try:
        with preserve_rng_state():
            choose = _longest if only_longest else _points
            multiple = recipe.config.budget.pad_to_multiple_of or 1
            padded = padded_alone(lengths, multiple, recipe.columns_padded_together)
            points, exponents = choose(weightless, dataset, padded)
    except (ValueError, KeyError, TypeError) as error:
        raise NotTraceableError(f"the examples cannot be collated: {error}") from error
    config = recipe.config
    settings = StepSettings(config.optim, config.budget.precision, on_gpu, config.model.load_in_4bit)
    file = _cache() / f"memory-{_key(weightless, points, settings)}.json"
    can_be_kept = not config.model.trust_remote_code  # the cache key does not contain that code
    with suppress(OSError, ValueError, KeyError, TypeError):  # no cached estimate, or a damaged one
        if can_be_kept:
            return StepEstimate.from_json(json.loads(file.read_text(encoding="utf-8")))
    if not only_longest:
        print(
            f"estimating the memory of a step of {config.model.name} (once; cached in {file.parent})",
            file=stderr,
        )
    with preserve_rng_state():
        found = estimate(lambda: make_model(weightless), points, exponents, weightless.compute_loss, settings)
    if not can_be_kept:
        return found
    with suppress(OSError):  # the cache is optional
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
    """Return the bound of a recipe's micro-batches: the setting of the budget; for `auto`, available bytes.

    `auto` is a number of tokens (`tokens_per_micro_batch`) on a CPU without `budget.memory`, and for a model
    that cannot be traced.

    Args:
        recipe, dataset, lengths, make_model: as for `recipe_memory`.
        accelerator: the Accelerator of the run.
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
            print(f"{thumb}, because no step could be traced: {error}", file=stderr)
    return broadcast_object_list([bound])[0]  # all processes must split windows under the same bound


def usable_memory(budget: BudgetConfig, on_gpu: bool) -> int | None:
    """Return the bytes of a budget, at most the smallest GPU's memory; None if neither is known."""
    granted = parse_bytes(budget.memory) if budget.memory is not None else None
    found = detect_budget().memory if on_gpu else None
    return min(filter(None, (granted, parse_bytes(found) if found else None)), default=None)


def _points(recipe: Recipe, dataset: Any, lengths: np.ndarray) -> tuple[list[Point], np.ndarray]:
    """Return the points to trace, with exponents. Each batch repeats one example; lengths are far apart."""
    if isinstance(recipe.pad_to, int):
        lengths = np.full_like(lengths, recipe.pad_to)
    different, first = np.unique(lengths, axis=0, return_index=True)
    some = np.unique(np.linspace(0, len(different) - 1, CANDIDATE_EXAMPLES).astype(int))
    exponents = terms_of(different[some])
    of_lengths = exponents[: len(exponents) // 2, 1:]
    chosen = some[_far_apart(different[some], of_lengths)]
    packed = recipe.pad_to == "nothing"
    # The lean loss needs at least two chunks of tokens.
    chunked_rows = 2 * TOKENS_PER_CHUNK // max(1, int(different[chosen].min()) - 1) + 1
    rows = ROWS_MULTIPLE * math.ceil(chunked_rows / ROWS_MULTIPLE) if recipe.lean_loss else ROWS_MULTIPLE
    if packed:  # one row holds several examples; the row's length is the sum of the examples' lengths
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
    """Return the index of the example with most tokens."""
    return int(lengths.reshape(len(lengths), -1).sum(axis=1).argmax())


def _longest(recipe: Recipe, dataset: Any, lengths: np.ndarray) -> tuple[list[Point], np.ndarray]:
    """Return the longest example as the only point to trace, with its exponents."""
    index = longest_example(lengths)
    batch = _collate(recipe, dataset, index, 1, recipe.pad_to if isinstance(recipe.pad_to, int) else None)
    return [Point(1, tuple(map(int, lengths[index])), batch)], np.zeros((1, 1 + lengths.shape[1]), dtype=int)


def _far_apart(lengths: np.ndarray, powers: np.ndarray) -> np.ndarray:
    """Return the indices of as many lengths as there are powers, which determine the powers well.

    Each chosen length has the largest component orthogonal to the earlier ones: Gram-Schmidt with pivoting.
    """
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
    """Return a checksum of everything that an estimate depends on: model, settings, batches, versions."""
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
        "teacher": recipe.config.model.teacher and recipe.teacher.config.to_dict(),
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
