"""Remove padding from the model of a run, if `budget.padding_free` and the model allow it."""

import math
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType, send_to_device

from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.loss_items import as_window_loss
from gradacc_hf.accumulation.oom import out_of_memory
from gradacc_hf.errors import InputError, PaddingNotRemovableError, one_line, refuse
from gradacc_hf.padding.removal import is_grouped, remove_padding_in_all, skips_unread
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.utils.memory import release_memory

LEAST_SAVING = 0.02
"""Share of the predicted cost below which padding is kept."""
MOST_NOISE_COST = 0.01
"""Share of the predicted cost that measuring the noise scale may add where padding is removed."""
SAMPLED_WINDOWS = 16
MOST_PARAMETERS = 1_000_000_000
"""Parameters of a model up to which `auto` checks it: the check holds 16-bit weights in float32."""


def choose_padding(recipe: Recipe, model: Any, windows: WindowLoader) -> None:
    """Remove padding from the model, and split the training windows by tokens without padding.

    Windows stay padded and sorted by length for models with padded attention modules. Validation windows stay
    so for all models, as decoders evaluate with padding. `recipe.model_notes["padding in layers"]` gets a
    line with the result.

    Args:
        recipe: The recipe.
        model: The model, before Accelerate wraps it.
        windows: The training windows.

    Raises:
        InputError: `budget.padding_free` is on, and padding cannot be removed.
    """
    setting = recipe.config.budget.padding_free
    if setting == "off":
        return
    why = _why_kept(recipe, model, windows, setting)
    if not why:
        why = _remove(recipe, model, windows)
    if why:
        if setting == "on":
            refuse("budget.padding_free", "found on", f"{why}; allowed: auto or off")
        recipe.model_notes["padding in layers"] = f"kept: {why}"
        return
    if recipe.pad_to == "nothing":
        recipe.model_notes["padding in layers"] = "none: packed examples, each with attention of its own"
        return
    _remove_from_teacher(recipe, windows)
    unread = "; the last layer ends with the tokens that the loss reads" * skips_unread(model)
    if not is_grouped(model):
        recipe.model_notes["padding in layers"] = f"none in the layers, except in attention{unread}"
        return
    before = _steps(windows)
    windows.without_padding()
    if recipe.config.train.noise_every is None and recipe.config.batch.effective != "noise_scale":
        _measure_noise_more_often(windows)
    now, before = f"{_steps(windows):.1f}", f"{before:.1f}"
    steps = f": {now} accumulation steps instead of {before}" * (now != before)
    recipe.model_notes["padding in layers"] = f"none in the layers{steps}{unread}"


def _measure_noise_more_often(windows: WindowLoader) -> None:
    """Measure the noise scale as often as costs at most `MOST_NOISE_COST`, if it is measured at all."""
    if windows.noise_every:
        never, always = (windows.with_bound(windows.bound, noise_every=every) for every in (0, 1))
        further = _cost(always) / _cost(never) - 1
        windows.measure_noise(min(windows.noise_every, max(1, math.ceil(further / MOST_NOISE_COST))))


def plan_padding(recipe: Recipe, model: Any, windows: WindowLoader) -> None:
    """Split windows as the run does if the check of its model passes, which a plan without weights cannot do.

    `recipe.model_notes["padding in layers"]` gets a line with this assumption, or why padding is planned.

    Args:
        recipe: The recipe.
        model: The model without weights.
        windows: The training windows of the plan.

    Raises:
        InputError: `budget.padding_free` is on, and padding is kept.
    """
    setting = recipe.config.budget.padding_free
    if setting == "off" or recipe.pad_to == "nothing":
        return
    why = _why_kept(recipe, model, windows, setting)
    if why and setting == "on":
        refuse("budget.padding_free", "found on", f"{why}; allowed: auto or off")
    if not why and not _runs_by_group(recipe, model, windows):
        why = "the attention of this model has no groups"
    if not why:
        windows.without_padding()
    note = f"kept: {why}" if why else "none in the layers, if the check of the model passes in the run"
    recipe.model_notes["padding in layers"] = note


def _runs_by_group(recipe: Recipe, model: Any, windows: WindowLoader) -> bool:
    """Whether transformers declares that a model class leaves attention to the attention interface."""
    part = recipe.padded_part(model, windows.sample(2)[1].batch)[0]
    return any(getattr(module, "_supports_attention_backend", False) for module in part.modules())


def _remove(recipe: Recipe, model: Any, windows: WindowLoader) -> str:
    """Remove padding, or return why it is kept."""
    part, batch = recipe.padded_part(model, windows.sample()[1].batch)
    compute_loss = None if as_window_loss(recipe.loss) is not None else recipe.compute_loss
    try:
        if windows.accelerator.distributed_type == DistributedType.FSDP:  # the whole model may not fit
            batch = send_to_device(batch, part.device)
        else:
            model.to(windows.accelerator.device)
        remove_padding_in_all(part, batch, windows.accelerator, compute_loss)
    except (PaddingNotRemovableError, InputError) as error:
        return one_line(error)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        release_memory()
        return "memory runs out in the check"
    return ""


def _remove_from_teacher(recipe: Recipe, windows: WindowLoader) -> None:
    """Remove padding from the teacher, if there is one and its model allows it."""
    if recipe.config.model.teacher is None or recipe.pad_to == "nothing":
        return
    teacher, accelerator = recipe.distillation.teacher, windows.accelerator
    parameters = [*teacher.parameters()]
    if sum(map(torch.numel, parameters)) > MOST_PARAMETERS:
        return
    teacher.to(accelerator.device).requires_grad_(True)  # the check compares gradients
    try:
        remove_padding_in_all(teacher, windows.sample()[1].batch, accelerator)
    except (PaddingNotRemovableError, InputError):
        recipe.model_notes["teacher's padding"] = "kept"
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        release_memory()
    finally:
        teacher.requires_grad_(False)


def _why_kept(recipe: Recipe, model: Any, windows: WindowLoader, setting: str) -> str:
    """Return why padding is kept without a check of the model, or ""."""
    packs = recipe.pad_to == "nothing"
    if not packs and recipe.pad_to != "micro_batch":
        return "padding changes the loss of this recipe"
    if not packs and "attention_mask" not in recipe.padded_part(model, windows.sample(2)[1].batch)[1]:
        return "the inputs have no attention mask"
    if any(hasattr(module, "hf_device_map") for module in model.modules()):
        return "the model is placed on devices already"
    if recipe.config.model.load_in_4bit or any(getattr(m, "is_quantized", False) for m in model.modules()):
        return "the weights are quantised"
    if setting == "auto" and recipe.config.budget.compile:
        return "the layers are compiled"
    number = sum(parameter.numel() for parameter in model.parameters())
    if setting == "auto" and number > MOST_PARAMETERS:
        return f"the check would copy {number:,} parameters, more than {MOST_PARAMETERS:,}"
    if windows.accelerator.distributed_type == DistributedType.FSDP:
        return "FSDP is used" if setting == "auto" else ""
    if packs:
        return ""
    other = windows.with_bound(windows.bound)
    other.without_padding()
    saving = 1 - _cost(other) / _cost(windows)
    if setting == "auto" and saving < LEAST_SAVING:
        return f"removing it would save {max(saving, 0):.0%} of the predicted cost"
    return ""


def _cost(windows: WindowLoader) -> float:
    return sum(map(windows.predicted_cost, windows.spread_splits(SAMPLED_WINDOWS)))


def _steps(windows: WindowLoader) -> float:
    splits = windows.spread_splits(SAMPLED_WINDOWS)
    return float(np.mean([max(map(len, split.processes)) for split in splits]))
