"""The teacher of a run: what the summary records of it, and the line at the end of the run."""

import math
from collections.abc import Mapping
from typing import Any

from accelerate.utils import DistributedType

from gradacc_hf.accumulation.accelerate_state import forget_model
from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.config.schema import with_settings
from gradacc_hf.recipe.base import Recipe


def teacher_facts(recipe: Recipe, windows: WindowLoader) -> dict[str, Any] | None:
    """Return the name and the settings of a teacher, with its validation metrics; None without a teacher.

    With FSDP, the metrics are unknown.

    Args:
        recipe: The recipe, whose evaluation stays as it is.
        windows: The loader of the validation examples.
    """
    settings = recipe.config.model
    if settings.teacher is None:
        return None
    teacher, accelerator = recipe.distillation.teacher, windows.accelerator
    metrics = {}
    if accelerator.distributed_type != DistributedType.FSDP:
        changes = {"data.samples": 0} if hasattr(recipe.data, "samples") else {}
        evaluated = recipe.with_config(with_settings(recipe.config, changes))
        evaluated.samples, evaluated.details = [], []
        prepared = accelerator.prepare_model(teacher, evaluation_mode=True)
        try:
            metrics = evaluated.validate(prepared, windows, accelerator)
        finally:
            forget_model(accelerator, prepared)
            accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    return {
        "name": settings.teacher,
        "temperature": settings.teacher_temperature,
        "weight": settings.teacher_weight,
        "parameters": sum(parameter.numel() for parameter in teacher.parameters()),
        "metrics": metrics,
    }


def share_kept(metric: str, direction: str, student: Mapping[str, Any], teacher: Mapping[str, Any]) -> float:
    """Return the student's share of the teacher's metric; NaN if it is unknown, or lower is better."""
    own, of_teacher = (math.nan if (score := of.get(metric)) is None else score for of in (student, teacher))
    return own / of_teacher if direction == "max" and of_teacher > 0 else math.nan


def teacher_line(summary: Mapping[str, Any], metric: str, direction: str) -> str | None:
    """Return the metric of the teacher, and the share that the best model keeps; None without a teacher."""
    teacher, best = summary.get("teacher"), summary.get("best")
    if not teacher or not best or (value := teacher["metrics"].get(metric)) is None:
        return None
    name = "validation loss" if metric == "loss" else metric.replace("_", " ")
    kept = share_kept(metric, direction, best, teacher["metrics"])
    share = "" if math.isnan(kept) else f"; this model keeps {kept:.1%} of it"
    return f"{name} {value:,.4f} of {teacher['name']}{share}"
