"""What would make a recipe's run fit into memory, and by how much: as flags to paste, the best first."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradacc_hf.errors import BadInput
from gradacc_hf.memory import NotTraceable
from gradacc_hf.recipe import Recipe
from gradacc_hf.recipe_memory import recipe_memory

Settings = dict[str, Any]  # "optim.name": "adafactor"


@dataclass(frozen=True)
class Lever:
    """Settings that take less: bytes of the longest example alone, and how many fewer that is."""

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
    memory: int,
    processes: int,
) -> list[Lever]:
    """Each lever alone, then together until it fits into `memory` bytes of each process.

    The other arguments are those of `recipe_memory`.
    """

    def take(settings: Settings) -> int | None:
        other = copy.copy(recipe)
        other.config = _with(recipe.config, settings)
        shorter = np.minimum(lengths, other.config.data.max_length)
        cut = shorter.reshape(len(lengths), -1).sum(axis=1) < lengths.reshape(len(lengths), -1).sum(axis=1)
        kept = np.flatnonzero(~cut) if cut.any() and not cut.all() else np.arange(len(lengths))
        longest = int(kept[lengths[kept].reshape(len(kept), -1).sum(axis=1).argmax()])
        try:
            found = recipe_memory(
                other, [dataset[longest]], lengths[[longest]], make_model, on_gpu, only_longest=True
            )
        except (BadInput, NotTraceable):  # not with this model
            return None
        return found.memory.over_processes(processes, sharded=False).bytes(1, lengths[longest])

    before = take({})
    if before is None:
        return []
    alone = [(size, settings) for settings in _choices(recipe) if (size := take(settings)) is not None]
    useful = sorted(((s, settings) for s, settings in alone if s < before), key=lambda found: found[0])
    found = [Lever(_flags(settings), s, before - s, s <= memory) for s, settings in useful]
    together: Settings = dict(useful[0][1]) if useful else {}
    for _, settings in useful[1:]:
        if any(lever.fits for lever in found):
            break
        together |= settings
        if (size := take(together)) is not None:
            found.append(Lever(_flags(together), size, before - size, size <= memory))
    return found


def _choices(recipe: Recipe) -> Iterator[Settings]:
    """What is not on yet, and possible for this recipe."""
    config = recipe.config
    if not config.budget.gradient_checkpointing:
        yield {"budget.gradient_checkpointing": True}
    if config.budget.precision == "fp32":
        yield {"budget.precision": "bf16"}
    if config.optim.name in ("adam", "adamw"):
        yield {"optim.name": "adafactor"}
    if recipe.lean_loss and config.budget.lean_loss is False:
        yield {"budget.lean_loss": "auto"}
    if not config.model.lora.rank and not recipe.from_scratch and not config.model.freeze:
        yield {"model.lora.rank": 16}
        yield {"model.lora.rank": 16, "model.dtype": "bfloat16", "budget.precision": "bf16"}
    elif config.model.dtype == "float32":
        yield {"model.dtype": "bfloat16", "budget.precision": "bf16"}
    if config.data.max_length > 1:
        yield {"data.max_length": config.data.max_length // 2}


def _with(config: Any, settings: Settings) -> Any:
    """A config with these settings."""
    config = copy.deepcopy(config)
    for key, value in settings.items():
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = getattr(section, part)
        setattr(section, name, value)
    return config


def _flags(settings: Settings) -> str:
    """As a command line takes them."""
    return " ".join(f"--{key} {str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items())
