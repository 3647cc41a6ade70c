"""Load the recipe that a command line's `--config` or the folder of a run names.

A command line is the user's own. The folder of a run may come from someone else: no code in it is executed.
"""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from gradacc_hf.config.budget import fit_to_machine
from gradacc_hf.config.parser import check_recipe_of, read_command_line, recipe_file
from gradacc_hf.config.schema import Config, with_settings
from gradacc_hf.errors import InputError, listed, refuse
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.utils.hardware import say

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


def load_recipe(argv: Sequence[str]) -> Recipe:
    """Return the recipe that a command line's `--config` names, with its settings. Raise InputError."""
    found = recipe_class_of(argv)
    config = read_command_line(argv, data=found.Data)
    check_lean_loss(found, config)
    return found(config)


def load_recipe_to_run(argv: Sequence[str]) -> Recipe:
    """Return the recipe that `--config` names, with a budget that this machine can provide."""
    return on_this_machine(load_recipe(argv))


def on_this_machine(recipe: Recipe) -> Recipe:
    """Return the recipe with a budget that this machine can provide; print a line about each changed key."""
    config, lines = fit_to_machine(recipe.config)
    for line in lines:
        say(line)
    return recipe.with_config(config)


def recipe_class_of(argv: Sequence[str]) -> type[Recipe]:
    """Return the class of the recipe that a command line's `--config` names. Raise InputError."""
    file = recipe_file(argv)
    sys.path.insert(0, str(Path(file).parent))  # as `python FILE` does, for modules beside the recipe
    defined = {
        value
        for value in runpy.run_path(file).values()
        if isinstance(value, type) and issubclass(value, Recipe) and value.__module__ == "<run_path>"
    }
    found = [recipe for recipe in defined if not any(recipe in other.__mro__[1:] for other in defined)]
    if len(found) != 1:
        raise InputError(
            f"recipe: {file} must define one Recipe; found {listed(c.__name__ for c in found) or 'none'}"
        )
    return found[0]


def open_run(run: Path, trust_remote_code: bool = False) -> Recipe:
    """Return the recipe of a run, with the run's settings. Raise InputError if the folder holds no run.

    A run may come from someone else. No code in its folder is executed, for any config.yaml, except the
    code of its model with `trust_remote_code`. The recipe is one of gradacc or outside of the folder.
    """
    if not run.is_dir():
        refuse(str(run), "found no such folder", "give the folder of a run, such as runs/NAME-1")
    if not (run / "config.yaml").is_file():
        above = run.resolve().parent
        hint = f"its run is {above}" if (above / "config.yaml").is_file() else "give the folder of a run"
        refuse(str(run), "found no config.yaml in it, so it is not the folder of a run", hint)
    _refuse_pickles(run)
    check_recipe_of(run / "config.yaml")
    recipe = load_recipe(["--config", str(run / "config.yaml")])
    trusted = recipe.config.model.trust_remote_code and trust_remote_code
    return recipe.with_config(with_settings(recipe.config, {"model.trust_remote_code": trusted}))


def _refuse_pickles(run: Path) -> None:
    for path in (path for which in ("best", "last") for path in sorted((run / which).glob("*"))):
        if path.suffix in PICKLES:
            found = f"found {path.name}, a pickle, which can execute code and which gradacc never writes"
            refuse(str(path.parent), found, "remove it: weights are in *.safetensors")


def check_lean_loss(recipe_class: type[Recipe], config: Config) -> None:
    """Raise InputError if `budget.lean_loss` is true for a recipe without a lean loss."""
    if config.budget.lean_loss is True and not recipe_class.lean_loss:
        raise InputError(
            f"budget.lean_loss: found true, but {recipe_class.__name__} always computes all its logits; "
            "allowed here: auto or false"
        )
