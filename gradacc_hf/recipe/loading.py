"""A recipe from where it is named: by a command line's `--config`, or by the folder of a run.

A command line is the user's own. The folder of a run may have come from others: nothing in it is run.
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
    """Return the recipe that a command line's `--config` names, with its settings. Raises InputError."""
    found = recipe_class_of(argv)
    config = read_command_line(argv, data=found.Data)
    check_lean_loss(found, config)
    return found(config)


def load_recipe_to_run(argv: Sequence[str]) -> Recipe:
    """Return the recipe that `--config` names, with a budget that this machine can provide."""
    return on_this_machine(load_recipe(argv))


def on_this_machine(recipe: Recipe) -> Recipe:
    """Return the recipe with a budget that this machine can provide; print a line about each other key."""
    config, lines = fit_to_machine(recipe.config)
    for line in lines:
        say(line)
    return recipe.with_config(config)


def recipe_class_of(argv: Sequence[str]) -> type[Recipe]:
    """Return the class of the recipe that a command line's `--config` names. Raises InputError."""
    file = recipe_file(argv)
    sys.path.insert(0, str(Path(file).parent))  # as `python FILE` has it, for what lies beside it
    defined = {
        value
        for value in runpy.run_path(file).values()
        if isinstance(value, type) and issubclass(value, Recipe) and value.__module__ == "<run_path>"
    }
    found = [recipe for recipe in defined if not any(recipe in other.__mro__[1:] for other in defined)]
    if len(found) != 1:
        raise InputError(
            f"recipe: {file} defines {listed(c.__name__ for c in found) or 'no'} Recipe; it must be one"
        )
    return found[0]


def open_run(run: Path, trust_remote_code: bool = False) -> Recipe:
    """The recipe of a run, with the run's settings. Raises InputError where the folder is no run's.

    A run may have come from others: no code in its folder is run, whatever its config.yaml says, but with
    `trust_remote_code` that of its model. The recipe that it names is the kit's or one outside of the folder.
    """
    if not run.is_dir():
        refuse(str(run), "found no such folder", "give the folder of a run, such as runs/NAME-1")
    if not (run / "config.yaml").is_file():
        above = run.resolve().parent
        hint = f"its run is {above}" if (above / "config.yaml").is_file() else "give the folder of a run"
        refuse(str(run), "found no config.yaml in it, so this is no run's folder", hint)
    _refuse_pickles(run)
    check_recipe_of(run / "config.yaml")
    recipe = load_recipe(["--config", str(run / "config.yaml")])
    trusted = recipe.config.model.trust_remote_code and trust_remote_code
    return recipe.with_config(with_settings(recipe.config, {"model.trust_remote_code": trusted}))


def _refuse_pickles(run: Path) -> None:
    for path in (path for which in ("best", "last") for path in sorted((run / which).glob("*"))):
        if path.suffix in PICKLES:
            found = f"found {path.name}, a pickle, which may run code and which no run writes"
            refuse(str(path.parent), found, "remove it: weights are in *.safetensors")


def check_lean_loss(recipe_class: type[Recipe], config: Config) -> None:
    """Raise InputError where a lean loss is asked for from a recipe that has none."""
    if config.budget.lean_loss is True and not recipe_class.lean_loss:
        raise InputError(
            f"budget.lean_loss: found true, but {recipe_class.__name__} always computes all its logits; "
            "allowed here: auto or false"
        )
