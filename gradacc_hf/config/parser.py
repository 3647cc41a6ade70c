"""Read a command line, a config file and a budget file into a `Config`, or raise an error of one line.

Precedence, from low to high: dataclass, the recipe's defaults, `--config`, `--budget`, the other flags.

A number in a file stays text until the type of its field is known. So `0123` in a text field is a name.
`${...}` is plain text: nothing is read from the environment.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import os
import re
import reprlib
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from gradacc_hf.config.earlier_run import EarlierRun
from gradacc_hf.config.help import print_all_settings, print_help
from gradacc_hf.config.schema import (
    FLAGS_ONLY,
    Config,
    DataConfig,
    OutputConfig,
    detect_budget,
    with_settings,
)
from gradacc_hf.errors import InputError
from gradacc_hf.training.settings import ModelConfig
from gradacc_hf.utils.paths import BUNDLE_ROOTS


def read_command_line(
    argv: Sequence[str],
    *,
    data: type = DataConfig,
    model: type = ModelConfig,
    defaults: Mapping[str, Any] | None = None,
    description: str = "",
) -> Config:
    """Return the `Config` of a command line.

    `--help` prints the common settings with their values, `--help all` every setting; both exit with code 0.

    Args:
        argv: The words after the program's name.
        data: The recipe's subclass of `DataConfig`.
        model: The recipe's subclass of `ModelConfig`.
        defaults: The recipe's own defaults, as nested mappings.
        description: One line about the recipe, for `--help`.

    Raises:
        InputError: For an unknown key, an impossible value, or a file that cannot be read.
    """
    flags = _read_flags(argv)
    settings = _Settings(Config(model=model(), data=data()))
    if "continue" in flags:
        if "resume" in flags:
            raise InputError("--continue and --resume exclude each other: give one of the two")
        settings.values["continues"] = flags["resume"] = _typed(flags.pop("continue"), str, "--continue")
        if flags["resume"] == "auto":
            raise InputError("--continue: found auto, allowed is the folder of a run")
    if "resume" in flags:
        resume = settings.values["resume"] = _typed(flags.pop("resume"), str, "--resume")
        if resume != "auto":  # a run has its settings in its folder
            flags.setdefault("config", str(Path(resume) / "config.yaml"))
    settings.update(defaults or {}, _Source(suffix=" in the recipe's defaults"))
    if "config" in flags:
        file = settings.values["config"] = _typed(flags.pop("config"), str, "--config")
        settings.update(_read_file(file, "--config"), _Source(suffix=f" in {file}"))
        if settings["resume"] not in (None, "auto"):  # the run may come from someone else
            settings.values["model.trust_remote_code"] = False
            _send_nowhere(settings, file, flags)
    if "budget" in flags:
        budget = settings.values["budget_file"] = _typed(flags.pop("budget"), str, "--budget")
        values, origin = _read_budget(budget)
        settings.update(values, _Source(suffix=f" in {origin}", section="budget."))
    settings.values["check"] = _typed(flags.pop("check", False), bool, "--check")
    help_wanted = _typed(flags.pop("help", False), bool | Literal["all"], "--help")
    settings.update(flags, _Source(prefix="--"))
    _adopt_adapters(settings)

    config = settings.config()
    if help_wanted:
        (print_all_settings if help_wanted == "all" else print_help)(config, description)
        sys.exit(0)
    settings.check_rules(config)
    if config.recipe is None:
        return config
    found = _find_recipe(config.recipe, config.config, settings.names["recipe"])
    return dataclasses.replace(config, recipe=found)


def _send_nowhere(settings: "_Settings", file: str, flags: Mapping[str, Any]) -> None:
    """Reset the settings of a resumed run that send files elsewhere; a flag can set them again."""
    for name, local_values in (("push_to_hub", (None,)), ("tracker", ("none", "tensorboard"))):
        if settings[f"output.{name}"] not in local_values:
            settings.values[f"output.{name}"] = getattr(OutputConfig(), name)
            if f"output.{name}" not in flags and int(os.environ.get("RANK", 0)) == 0:
                print(
                    f"output.{name}: the value in {file} is ignored on resume: give the flag again",
                    file=sys.stderr,
                )


def _adopt_adapters(settings: "_Settings") -> None:
    """Take the settings of the adapters that a run starts from. Raise `InputError` for others."""
    run = EarlierRun.of(settings["model.name"])
    if run is None or not run.has_adapters:
        return
    for name, value in run.adapter_settings.items():
        key = f"model.lora.{name}"
        if settings[key] not in (value, attrgetter(key)(settings.defaults)):
            found = f"found {_shown(settings[key])}, and the adapters of {run.folder} have {_shown(value)}"
            name, text = settings.names[key], json.dumps(value) if isinstance(value, list) else str(value)
            same = "leave it out" if name.startswith("--") else f"give --{key} {shlex.quote(text)}"
            cure = f"{same}, or merge them (gradacc merge {run.folder}) and name {run.folder}/merged"
            raise InputError(f"{name}: {found}; {cure}")
        settings.values[key] = value


def recipe_file(argv: Sequence[str]) -> str:
    """Return the path of the recipe in the config of a command line. Raise `InputError` if it has none."""
    config = _typed(_read_flags(argv).get("config", True), str, "--config")
    recipe = _read_file(config, "--config").get("recipe")
    if not isinstance(recipe, str):
        raise InputError(f"recipe in {config}: found {_shown(recipe)}, allowed is the path of a recipe file")
    return _find_recipe(recipe, config, f"recipe in {config}")


def check_recipe_of(config: Path) -> None:
    """Raise `InputError` if the recipe that a run's config.yaml names may have come with the run.

    gradacc writes the absolute path of the recipe into a run, and no recipe file. A relative path is allowed
    for recipes of gradacc only, and a path inside the folder of the run for none.
    """
    recipe = Path(recipe_file(["--config", str(config)]))
    given = _read_file(str(config), "--config")["recipe"]
    is_bundled = any(recipe.parent == (root / "recipes").resolve() for root in BUNDLE_ROOTS)
    if recipe.is_relative_to(config.parent.resolve()) or not (is_bundled or Path(given).is_absolute()):
        raise InputError(
            f"recipe in {config}: found {_shown(given)}, not executed, as it may have come with the run; "
            "allowed: a recipe of gradacc, or an absolute path elsewhere"
        )


@dataclass(frozen=True)
class _Source:
    """The place where keys were written. Messages name a key as the user wrote it."""

    prefix: str = ""
    suffix: str = ""
    section: str = ""  # "budget." for a budget file, whose keys have no section

    def key(self, key: str) -> str:
        return self.prefix + key.removeprefix(self.section)


class _Settings:
    """The settings read so far, source by source.

    values: set values by key ("optim.lr").
    names: keys as messages name them ("optim.lr in configs/a.yaml").
    """

    def __init__(self, defaults: Config):
        self.defaults = defaults
        self.hints: dict[str, Any] = {}  # the type of each field: {"optim.lr": float}
        self.values: dict[str, Any] = {}
        self.names: dict[str, str] = {}
        self._collect(defaults, "")

    def _collect(self, section: Any, prefix: str) -> None:
        hints = get_type_hints(type(section))
        for name in (item.name for item in dataclasses.fields(section)):
            value = getattr(section, name)
            if dataclasses.is_dataclass(value):
                self._collect(value, f"{prefix}{name}.")
            elif prefix or name not in FLAGS_ONLY:
                self.hints[prefix + name] = hints[name]

    def __getitem__(self, key: str) -> Any:
        return self.values[key] if key in self.values else attrgetter(key)(self.defaults)

    def config(self) -> Config:
        """Return the config with these settings."""
        return with_settings(self.defaults, self.values)

    def inside(self, prefix: str) -> list[str]:
        """Return the names inside a section such as "optim."; the names of the sections for ""."""
        keys = [key.removeprefix(prefix) for key in self.hints if key.startswith(prefix)]
        return sorted({key.split(".")[0] for key in keys})

    def update(self, values: Mapping[Any, Any], source: _Source) -> None:
        """Set values: {"optim": {"lr": 1}} or {"optim.lr": 1}."""
        seen = set()
        for key, value in self._flatten(values, source.section):
            name = source.key(key) + source.suffix
            if names := self.inside(f"{key}."):
                raise InputError(f"{name} is a section: set its keys, such as {source.key(key)}.{names[0]}")
            if key not in self.hints:
                raise InputError(f"unknown key {name}: {self._closest(key, source)}")
            if key in seen:
                raise InputError(f"{name} is given twice: keep one of the two")
            self.values[key] = _typed(value, self.hints[key], name)
            self.names[key] = name
            seen.add(key)

    def _flatten(self, values: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            key = prefix + (name if isinstance(name, str) and name.isprintable() else _shown(name))
            if isinstance(value, Mapping) and self.inside(f"{key}."):
                yield from self._flatten(value, f"{key}.")
            else:
                yield key, value

    def _closest(self, key: str, source: _Source) -> str:
        """Return the end of the message about an unknown key: the closest key, and all allowed ones."""
        section, dot, name = key.rpartition(".")
        if names := self.inside(section + dot):  # a typing mistake in a known section
            close = [section + dot + match for match in difflib.get_close_matches(name, names, 1)]
        else:
            section, names, close = "", self.inside(""), []
        if not section and source.prefix:
            names += ["check", "config", "continue", "help", "resume"]
            close = close or difflib.get_close_matches(key, names, 1)
        if not source.section:  # the right name in the wrong section, or in none
            namesakes = [other for other in self.hints if other.endswith(f".{name}")]
            close += difflib.get_close_matches(key, namesakes, 1, cutoff=0)
        question = f"did you mean {source.key(close[0])}? " if close else ""
        return f"{question}({section or 'a run'} has: {', '.join(names)})"

    def check_rules(self, config: Config) -> None:
        """Raise `InputError` for the first value that the `rules` of a section do not allow."""
        for path in dict.fromkeys(key.rpartition(".")[0] for key in self.hints):
            section = attrgetter(path)(config) if path else config
            for name, possible, allowed in getattr(section, "rules", tuple)():
                if not possible:
                    key = self.names.get(f"{path}.{name}", f"--{path}.{name} (not set)")
                    raise InputError(f"{key}: found {_shown(getattr(section, name))}, allowed is {allowed}")


def _read_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Return ["--a.b", "1", "--c=2", "--d"] as {"a.b": "1", "c": "2", "d": True}: True without a value."""
    flags: dict[str, Any] = {}
    words = ["--help" if word == "-h" else word for word in argv]
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise InputError(f"found {_shown(word)} on the command line, allowed are flags: --optim.lr 1e-5")
        key, equals, value = word[2:].partition("=")
        if key in flags:
            raise InputError(f"--{key} is given twice: keep one of the two")
        if not equals and words and not words[0].startswith("--"):
            equals, value = "=", words.pop(0)
        flags[key] = (None if value in ("null", "~") else value) if equals else True
    return flags


class _Loader(yaml.SafeLoader):
    """YAML whose only typed scalars are null and true/false. All else is text, and a key may occur once."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":bool", ":null"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = []
        for key, _ in node.value:
            if key.value in seen:
                problem = f"{key.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


def _parse(text: str) -> Any:
    """Return the content of YAML text. Raise ValueError with one line."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: plain data, no objects
    except Exception as error:  # errors of PyYAML; odd tags and deep nesting raise others
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        raise ValueError(f"line {mark.line + 1}: {problem}" if mark else "it cannot be read") from error


def _read_file(file: str, flag: str) -> Mapping[Any, Any]:
    content, problem, question = None, "is empty", ""
    try:
        content = _parse(Path(file).read_bytes().decode("utf-8-sig"))
    except OSError as error:
        problem, question = f"cannot be read ({error.strerror})", _closest_file(Path(file))
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte {error.start + 1})"
    except ValueError as error:
        problem = f"is not YAML ({error})"
    if isinstance(content, Mapping):
        return content
    problem = problem if content is None else f"holds {_shown(content)}"
    raise InputError(
        f"{flag}: found {_shown(file)}, which {problem}; {question}allowed is a YAML file with keys"
    )


def _closest_file(absent: Path) -> str:
    """Return a question with the YAML file of the closest name, in the same folder or configs/; or ""."""
    folders = (absent.parent, *(root / "configs" for root in (Path(), *BUNDLE_ROOTS)))
    files = {file.name: file for folder in reversed(folders) for file in sorted(folder.glob("*.y*ml"))}
    close = difflib.get_close_matches(absent.name, files, 1)
    return f"did you mean {files[close[0]]}? " if close else ""


def _read_budget(budget: str) -> tuple[Mapping[Any, Any], str]:
    """Return the keys of a budget (auto, a file, or a name in configs/budgets), and their source."""
    if budget == "auto":
        detected = detect_budget()
        return {"memory": detected.memory, "precision": detected.precision}, "--budget auto"
    folders = [root / "configs" / "budgets" for root in (Path(), *BUNDLE_ROOTS)]
    files = [Path(budget), *(folder / f"{budget}.yaml" for folder in folders)]
    is_name = re.fullmatch(r"[\w-]+", budget)
    file = next((str(file) for file in files if file.is_file()), None if is_name else budget)
    if file is not None:
        return _read_file(file, "--budget"), file
    names = sorted({"auto", *(path.stem for folder in folders for path in folder.glob("*.yaml"))})
    question = "".join(f"did you mean {match}? " for match in difflib.get_close_matches(budget, names, 1))
    allowed = f"a file or a name: {question}({', '.join(names)})"
    raise InputError(f"--budget: found {_shown(budget)}, allowed is {allowed}")


def _find_recipe(recipe: str, config_file: str | None, name: str) -> str:
    """Return the path of a recipe, relative to the folder of the config file, or else to gradacc's folders.

    A recipe that is given as a flag is relative to the current folder.
    """
    here = Path() if config_file is None or name.startswith("--") else Path(config_file).parent
    for folder in (here, *BUNDLE_ROOTS, *(root / "configs" for root in BUNDLE_ROOTS)):
        if (folder / recipe).is_file():
            return str((folder / recipe).resolve())
    raise InputError(
        f"{name}: found {_shown(recipe)}, allowed is a recipe file, relative to {here} or of gradacc"
    )


def _typed(value: Any, hint: Any, name: str) -> Any:
    """Return `value` as the type `hint`. Raise an `InputError` that names `name`."""
    try:
        return _convert(value, hint)
    except ValueError:
        found = _shown(value)
        if isinstance(value, bool):  # for a flag: no value was given
            unquoted = " (YAML reads yes, no, on and off as true or false, unless quoted)"
            found = "no value" if name.startswith("--") else found + unquoted
        raise InputError(f"{name}: found {found}, allowed is {_allowed(hint)}") from None


def _convert(value: Any, hint: Any) -> Any:
    """Return `value`, or the value that its text stands for, as the type `hint`. Raise ValueError.

    A field may be a bool, int, float, str, Literal of names, list or dict of these, or a union (| None).
    """
    kind, choices = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        for choice in choices:
            with contextlib.suppress(ValueError):
                return _convert(value, choice)
    elif kind is list:
        items = _parse(value) if isinstance(value, str) and value.startswith("[") else value
        if isinstance(items, (list, tuple)):
            return [_convert(item, choices[0]) for item in items]
    elif kind is dict:
        items = _parse(value) if isinstance(value, str) and value.startswith("{") else value
        if isinstance(items, Mapping):
            of, to = choices
            return {_convert(key, of): _convert(item, to) for key, item in items.items()}
    elif kind is Literal:
        if isinstance(value, str) and value in choices:
            return value
    elif hint in (int, float) and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        number = hint(str(value))
        if hint is int or math.isfinite(number):
            return number
    elif hint is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    elif hint in (bool, str, NoneType) and isinstance(value, hint) and value != "":
        return value
    raise ValueError


def _allowed(hint: Any) -> str:
    kind, choices = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(_allowed(choice) for choice in choices)
    if kind is Literal:
        return " or ".join(", ".join(map(str, choices)).rsplit(", ", 1))
    if kind is dict:
        return "numbers by number: {0: 32, 500: 64}"
    if kind is list and get_origin(choices[0]) is dict:
        return "a list of sources: [{source: a.jsonl, weight: 3}]"
    if kind is list:
        shown = {int: "a list of numbers: [17, 3]", float: "a list of numbers: [0.9, 0.95]"}
        return shown.get(choices[0], 'a list: ["a", "b"]')
    return {int: "an integer", float: "a number", bool: "true or false", str: "text", NoneType: "null"}[hint]


def _shown(value: Any) -> str:
    """Return a value on one line, shortened, as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    short = reprlib.Repr()
    short.maxstring = 80
    return short.repr(value)
