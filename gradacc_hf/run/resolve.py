"""Resolve the settings of a run: from a command line to the frozen `Config` that the run reads.

The config names the recipe file and the folder to resume. Its budget is one that this machine can provide.
All that a run prints, saves or fingerprints comes from this config. After the data are read,
`recipe/budget.py` reduces the budget to the part that the model can use.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml

from gradacc_hf.config.batch_size import check_sizes
from gradacc_hf.config.budget import fit_to_machine
from gradacc_hf.config.parser import read_command_line
from gradacc_hf.config.schema import Config, with_settings
from gradacc_hf.errors import InputError
from gradacc_hf.hub.push import check_push
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.recipe.loading import check_lean_loss
from gradacc_hf.run.folder import check_output, ended, folder_to_resume
from gradacc_hf.training.lora import check_four_bit, check_peft
from gradacc_hf.training.optimizer import check_optimizer

CHANGED_DEFAULTS = {"train.eval_every": 0}
"""Setting → the default that it had in earlier versions, if that changes what a run computes."""


@dataclass(frozen=True)
class ResumedRun:
    """An earlier run that `--resume` continues."""

    folder: Path
    has_ended: bool

    def __str__(self) -> str:
        return f"{self.folder}, which has ended" if self.has_ended else f"{self.folder}"


def resolve_config(recipe_class: type[Recipe], argv: Sequence[str]) -> tuple[Config, list[str]]:
    """Return the settings of a recipe's command line as this machine can run them.

    Args:
        recipe_class: the recipe; its file becomes `recipe`.
        argv: the words after the program's name.

    Returns:
        The config, and a line about each key of the budget that this machine cannot provide.

    Raises:
        InputError: as `read_command_line` and `fit_to_machine` do.
    """
    description = (recipe_class.__doc__ or "").partition("\n")[0]
    config = read_command_line(argv, data=recipe_class.Data, description=description)
    config = replace(config, recipe=_file_of(recipe_class) or config.recipe)
    _check_dtype(config)  # as the user set it; `check_settings` checks it as the machine provides it
    return fit_to_machine(config)


def check_settings(recipe_class: type[Recipe], config: Config) -> None:
    """Raise InputError for settings that exclude each other, or that this machine does not support."""
    _check_dtype(config)
    _check_early_stopping(config)
    _check_eval_every(config)
    check_sizes(config)
    check_lean_loss(recipe_class, config)
    if config.model.lora.rank:
        check_peft()
    check_four_bit(config.model)
    check_optimizer(config.optim, config.model.lora.rank)


def find_run_to_resume(config: Config) -> ResumedRun | None:
    """Return the run that `--resume` names. Raises InputError if the named folder holds no run."""
    folder = folder_to_resume(config)
    return None if folder is None else ResumedRun(folder, ended(folder))


def resolve_output(config: Config, resumed: ResumedRun | None) -> Config:
    """Return the config with the folder that is resumed, and the full name of the Hub repository.

    Raises:
        InputError: for a folder or a repository that this user cannot write.
    """
    changes: dict[str, Any] = {}
    if resumed is None:
        check_output(config)
    else:
        changes = {"output.dir": str(resumed.folder), **recorded_defaults(config, resumed.folder)}
    if config.output.push_to_hub is not None:
        changes["output.push_to_hub"] = check_push(config.output.push_to_hub)
    return with_settings(config, changes)


def _file_of(recipe_class: type[Recipe]) -> str | None:
    """Return the file that defines a recipe; None for a recipe without a file, as in a notebook."""
    try:
        return str(Path(inspect.getfile(recipe_class)).resolve())
    except (TypeError, OSError):
        return None


def _check_early_stopping(config: Config) -> None:
    if config.train.early_stopping and not config.train.eval_interval:
        raise InputError(
            f"train.early_stopping: found {config.train.early_stopping} with train.eval_every "
            f"{'null' if config.train.eval_every is None else 0}, which evaluates at the end only: set "
            "train.eval_every to epoch, or train.early_stopping to 0"
        )


def _check_eval_every(config: Config) -> None:
    if config.data.streaming and isinstance(config.train.eval_every, float):
        raise InputError(
            f"train.eval_every: found {config.train.eval_every}, and the length of an epoch of a stream is "
            "unknown; allowed with data.streaming: epoch, or a number of windows"
        )


def recorded_defaults(config: Config, run: Path) -> dict[str, Any]:
    """Return the recorded values of settings whose default has changed since the run began.

    A setting keeps its recorded value if that was the default, and the setting has the default of today.

    Args:
        config: the settings with which the run is resumed.
        run: the folder of the run.
    """
    recorded = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {}
    found = {}
    for key, before in CHANGED_DEFAULTS.items():
        section, _, name = key.partition(".")
        had = (recorded.get(section) or {}).get(name, before)
        if attrgetter(key)(config) == attrgetter(key)(Config()) and had == before:
            found[key] = before
    return found


def _check_dtype(config: Config) -> None:
    if config.model.dtype == "bfloat16" and config.budget.precision != "bf16":
        raise InputError(
            f"model.dtype: found bfloat16 with budget.precision {config.budget.precision}; allowed: float32, "
            "or bfloat16 with budget.precision bf16, which computes losses and norms in float32"
        )
