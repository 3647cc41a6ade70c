"""`gradacc completion SHELL`: a script with which bash, zsh or fish completes commands, flags and settings.

shtab writes the script from the parsers of all commands. So completion itself starts no Python.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from gradacc_hf.cli.main import COMMANDS, configs, make_parser, recipes
from gradacc_hf.config.help import every_setting
from gradacc_hf.config.schema import Config
from gradacc_hf.recipe.loading import recipe_class_of
from gradacc_hf.utils.commands import Parser, parser_of
from gradacc_hf.utils.extras import require

SHELLS = ("bash", "zsh", "fish")
BASH_FILE = "~/.local/share/bash-completion/completions/gradacc"
"""A file that bash finds by itself."""
SHTAB_FILE = "~/.local/share/bash_completion/gradacc"
"""The file that shtab names in its script for bash."""
FILES = ("config", "input")  # arguments that are files
NAMES_OF_RECIPES = ("recipe", "like")


def main(argv: Sequence[str]) -> None:
    """Print the script of a shell."""
    parser = Parser(
        prog="gradacc completion",
        description="Print a script that completes commands, flags and settings of gradacc.",
        epilog=f"Write it where the shell finds it. bash: {BASH_FILE}; "
        "zsh: _gradacc in a folder of $fpath; fish: ~/.config/fish/completions/gradacc.fish.",
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    given = parser.parse_args(argv)
    require("gradacc completion", "completion", "shtab")
    print(script_of(whole_parser(), given.shell))


def script_of(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script of a shell for a parser."""
    import shtab  # of an extra

    return shtab.complete(parser, shell).replace(SHTAB_FILE, BASH_FILE)


def whole_parser() -> argparse.ArgumentParser:
    """Return the parser of `gradacc` with the parsers of all commands, and settings where they may follow."""
    import shtab  # of an extra

    settings = settings_of_recipes()
    parsers = {name: parser_of(import_module(module).main) for name, (module, _) in COMMANDS.items()}
    for parser in parsers.values():
        if "Settings of the recipe may follow" in (parser.epilog or ""):
            _add_settings(parser, settings)
    whole = make_parser(parsers)
    for action in actions(whole):
        if action.type is Path or action.dest in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest in NAMES_OF_RECIPES:
            action.choices = recipes()
    return whole


def settings_of_recipes() -> dict[str, tuple[Any, str]]:
    """Return the settings of all recipes: (type, one line of help) by flag without `--`."""
    found: dict[str, tuple[Any, str]] = {}
    for config in (files[0] for name in recipes() if (files := configs(name))):
        data = recipe_class_of(["--config", str(config)]).Data
        found |= {name: (kind, text) for name, kind, text in every_setting(Config(data=data()))}
    return found


def _add_settings(parser: argparse.ArgumentParser, settings: Mapping[str, tuple[Any, str]]) -> None:
    for name, (kind, text) in settings.items():
        if name != "recipe":
            parser.add_argument(f"--{name}", choices=allowed(kind), help=text.replace("%", "%%"))


def allowed(kind: Any) -> list[str] | None:
    """Return all texts that a setting of this type may have; None if there are too many to list."""
    if kind is bool:
        return ["true", "false"]
    if kind is NoneType:
        return ["null"]
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    if get_origin(kind) not in (Union, UnionType):
        return None
    parts = [allowed(part) for part in get_args(kind)]
    return None if None in parts else [text for part in parts for text in part or ()]


def actions(parser: argparse.ArgumentParser) -> Iterable[argparse.Action]:
    """Yield the arguments of a parser and of its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from actions(sub)
