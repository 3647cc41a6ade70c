"""Settings that save memory in a run of a recipe: flags to paste, the largest saving first."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradacc_hf.config.schema import with_settings
from gradacc_hf.errors import InputError, NotTraceableError
from gradacc_hf.memory.estimator import LEAN_OPTIMIZERS, StepEstimate
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.run.memory_bound import longest_example, recipe_memory

Settings = dict[str, Any]  # "optim.name": "adafactor"
MIN_SAVED_SHARE = 0.01  # of the bytes; a flag that saves less is not listed


@dataclass(frozen=True)
class Lever:
    """Flags that save memory.

    flags: the flags of a command line.
    bytes: memory of the longest example with these flags.
    saved: bytes less than without them.
    fits: whether the longest example fits into the memory.
    """

    flags: str
    bytes: int
    saved: int
    fits: bool


def levers(
    recipe: Recipe,
    dataset: Any,
    lengths: np.ndarray,
    make_model: Callable[[Recipe], Any],
    on_gpu: bool,
    *,
    found: StepEstimate,
    available: int,
    processes: int = 1,
) -> list[Lever]:
    """Return each lever alone, the best first. Then return the best ones combined, until the run fits.

    Args:
        recipe, dataset, lengths, make_model, on_gpu: as for `recipe_memory`.
        found: the estimate of the recipe as it is.
        available: bytes of memory.
        processes: processes of the run.
    """
    longest = lengths[longest_example(lengths)]

    def needs(estimate: StepEstimate, tokens: np.ndarray) -> int:
        return estimate.memory.over_processes(processes, sharded=False).bytes(1, tokens)

    before = needs(found, longest)

    def take(settings: Settings) -> int | None:
        if shorter := settings.get("data.max_length"):
            return needs(found, np.minimum(longest, shorter))
        estimate, name = found, settings.get("optim.name")
        is_known = name in LEAN_OPTIMIZERS  # each estimate has their states
        traced = {key: value for key, value in settings.items() if key != "optim.name" or not is_known}
        try:
            if traced:
                other = recipe.with_config(with_settings(recipe.config, traced))
                estimate = recipe_memory(other, dataset, lengths, make_model, on_gpu, only_longest=True)
        except (InputError, NotTraceableError):  # this model does not support the setting
            return None
        if is_known:
            estimate = estimate.with_optimizer(name)
        return needs(estimate, longest)

    def lever(settings: Settings, size: int) -> Lever:
        return Lever(_flags(settings), size, before - size, size <= available)

    taken = [
        (size, settings) for settings in _choices(recipe, on_gpu) if (size := take(settings)) is not None
    ]
    useful = sorted((t for t in taken if t[0] < (1 - MIN_SAVED_SHARE) * before), key=lambda one: one[0])
    made = [lever(settings, size) for size, settings in useful]
    together: Settings = {}
    for _, settings in useful:
        if any(one.fits for one in made):
            break
        if "data.max_length" in settings:  # a model for shorter examples would have other estimates
            continue
        more = {**settings, **together}
        if len(together) and more != together and (size := take(more)) is not None:
            made.append(lever(more, size))
        together = more
    return made


def _choices(recipe: Recipe, on_gpu: bool) -> Iterator[Settings]:
    """Yield the settings that this recipe supports and that are not set yet."""
    config = recipe.config
    pissa = config.model.lora.init == "pissa"  # it needs full weights
    adapters = {"model.lora.rank": 16} | ({"optim.name": "adamw"} if config.optim.name == "muon" else {})
    half = {"model.dtype": "bfloat16", "budget.precision": "bf16"}
    if not config.budget.gradient_checkpointing:
        yield {"budget.gradient_checkpointing": True}
    if on_gpu and not config.budget.offload_activations:
        yield {"budget.gradient_checkpointing": True, "budget.offload_activations": True}
    if config.budget.precision == "fp32":
        yield {"budget.precision": "bf16"}
    if config.optim.name in ("adam", "adamw", "muon", "schedule_free_adamw"):
        yield {"optim.name": "adafactor"}
        if on_gpu:
            yield {"optim.name": "adamw_8bit"}
    if recipe.lean_loss and config.budget.lean_loss is False:
        yield {"budget.lean_loss": "auto"}
    if not config.model.lora.rank and not recipe.from_scratch and not config.model.freeze:
        yield adapters
        yield {**adapters, **half}
    elif config.model.lora.rank and config.model.dtype == "float32" and not pissa:
        yield half
    if on_gpu and not (recipe.from_scratch or config.model.load_in_4bit or config.model.freeze):
        if config.model.lora.rank and not (config.model.lora.merge or pissa):
            yield {"model.load_in_4bit": True}
        elif not config.model.lora.rank:
            yield {**adapters, "model.load_in_4bit": True}
    if config.data.max_length > 1:
        yield {"data.max_length": config.data.max_length // 2}


def _flags(settings: Settings) -> str:
    """Return settings as the flags of a command line."""
    shown = {key: str(value).lower() if isinstance(value, bool) else value for key, value in settings.items()}
    return " ".join(f"--{key} {value}" for key, value in shown.items())
