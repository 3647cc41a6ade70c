"""`RECIPE --help`: the common settings, in one line each. `RECIPE --help all`: every setting, by tyro.

`COMMON` lists the settings of the short help. It also has every field that a recipe adds to `DataConfig`.
The text of a setting is the first line of the docstring under the field.
"""

import ast
import dataclasses
import inspect
import os
import sys
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, get_type_hints

import tyro

from gradacc_hf.config.schema import FLAGS_ONLY, Config, DataConfig

COLUMNS = 80

COMMON = {
    "Run": ("config", "budget", "check", "resume"),
    "Data": (
        "data.train",
        "data.validation",
        "data.validation_fraction",
        "data.config_name",
        "data.separator",
        "data.encoding",
        "data.max_length",
        "data.on_bad_row",
    ),
    "Model": ("model.name", "model.dropout", "model.lora.rank", "model.load_in_4bit"),
    "Budget": (
        "budget.memory",
        "budget.precision",
        "budget.max_tokens",
        "budget.micro_batch_size",
        "budget.gradient_checkpointing",
        "budget.compile",
    ),
    "Training": (
        "batch.effective",
        "train.epochs",
        "train.max_windows",
        "train.seed",
        "optim.name",
        "optim.lr",
        "optim.scheduler",
        "optim.warmup_ratio",
        "optim.weight_decay",
        "optim.max_grad_norm",
    ),
    "Evaluation": (
        "train.eval_every",
        "train.eval_on_start",
        "train.early_stopping",
        "train.best_metric",
        "train.best_direction",
    ),
    "Output": (
        "output.dir",
        "output.overwrite",
        "output.tracker",
        "output.push_to_hub",
        "checkpoint.every",
    ),
}
"""Heading in the short help → the settings below it, by their flag without `--`."""


def common_settings(data: type[DataConfig]) -> dict[str, tuple[str, ...]]:
    """Return `COMMON` with the fields that a recipe adds to `DataConfig`, under the heading "Data"."""
    shared = {field.name for field in dataclasses.fields(DataConfig)}
    own = tuple(f"data.{field.name}" for field in dataclasses.fields(data) if field.name not in shared)
    return {**COMMON, "Data": COMMON["Data"] + own}


def every_setting(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (flag without `--`, type, first line of the help) of each setting of a config."""
    hints, lines = get_type_hints(type(section)), first_lines(type(section))
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from every_setting(value, f"{prefix}{field.name}.")
        elif prefix or field.name not in FLAGS_ONLY:
            yield prefix + field.name, hints[field.name], lines.get(field.name, "")


def print_help(config: Config, description: str = "") -> None:
    """Print the short help: usage, examples, and the common settings with their values in `config`."""
    print("\n".join(_short_help(config, description)))


def print_all_settings(config: Config, description: str = "") -> None:
    """Print every setting, with its value in `config` as the default."""
    markers = (tyro.conf.FlagConversionOff, tyro.conf.UsePythonSyntaxForLiteralCollections)
    shown = {"default": config, "description": description, "use_underscores": True, "config": markers}
    try:
        tyro.cli(Config, args=["--help"], **shown)
    except SystemExit:  # tyro's help ends the program
        return


def _short_help(config: Config, description: str) -> Iterator[str]:
    program = _from_here(Path(sys.argv[0]))
    example = _example_config(Path(sys.argv[0]))
    yield f"usage: {program} [--SETTING VALUE ...]"
    yield from ["", description] if description else []
    yield from ["", "Examples:", "  # Train with a config on this machine"]
    yield from [f"  python {program} \\", f"      --config {example} --budget auto"]
    yield "  # Change a setting, and print the plan without training"
    yield from [f"  python {program} --check \\", f"      --config {example} --train.epochs 2"]
    yield from ["", "A value in brackets holds unless the flag is given."]
    for heading, names in common_settings(type(config.data)).items():
        yield from ["", f"{heading}:"]
        indent = 4 + max(len(f"--{name}") for name in names)
        for name in names:
            yield _line(name, config, indent)
    yield from ["", "The other settings: --help all. A config file has the same keys as the flags."]
    yield "Guides: recipes/README.md (data formats), configs/README.md (budgets)."


def _line(name: str, config: Config, indent: int) -> str:
    """Return the line of a setting; text that the line cannot hold continues on further lines."""
    section_name, _, field = name.rpartition(".")
    field = "budget_file" if name == "budget" else field
    section = attrgetter(section_name)(config) if section_name else config
    text = first_lines(type(section)).get(field, "")
    text = f"{text} [{_value(getattr(section, field))}]".lstrip()
    first = f"  --{name}".ljust(indent)
    wrap = {"width": COLUMNS, "break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(text, initial_indent=first, subsequent_indent=" " * indent, **wrap)


def first_lines(section: type) -> dict[str, str]:
    """Return the first line of the docstring under each field of a dataclass and of its bases.

    It is empty for a class without a source file, such as one that was typed into a notebook.
    """
    lines: dict[str, str] = {}
    for base in reversed(section.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # no source file
            continue
        for field, text in pairwise(getattr(tree.body[0], "body", [])):
            match field, text:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(docstring))),
                ):
                    lines[name] = docstring.strip().partition("\n")[0].removesuffix(".")
    return lines


def _value(value: Any) -> str:
    """Return a value as a flag takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "required" if value == "" else str(value)


def _from_here(path: Path) -> str:
    """Return a path relative to the current folder where it is inside."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(path)


def _example_config(recipe: Path) -> str:
    """Return a config of a recipe file, preferably the offline config."""
    for name in (f"{recipe.stem}_offline.yaml", f"{recipe.stem}.yaml"):
        config = recipe.parent.parent / "configs" / name
        if config.is_file():
            return _from_here(config)
    return "FILE"
