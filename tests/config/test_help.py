"""`RECIPE --help` fits a terminal and names settings that exist; `--help all` names every setting."""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from recipe_runs import load_recipe

from gradacc_hf.config.help import COMMON, common_settings
from gradacc_hf.config.parser import read_command_line
from gradacc_hf.config.schema import Config, DataConfig
from gradacc_hf.recipe.base import Recipe

WITHOUT_SETTINGS = {"compare_trainer", "minimal"}
RECIPES = sorted({path.stem for path in (ROOT / "recipes").glob("*.py")} - WITHOUT_SETTINGS)
SETTING = re.compile(r"--[a-z][\w.]*")


def recipe_class(name: str) -> type[Recipe]:
    module = load_recipe(name)
    [found] = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Recipe) and value.__module__ == name
    ]
    return found


def flags_of(section: Any, prefix: str = "--") -> Iterator[str]:
    """Every flag of a config."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from flags_of(value, f"{prefix}{field.name}.")
        else:
            yield prefix + {"budget_file": "budget", "continues": "continue"}.get(field.name, field.name)


@pytest.fixture
def shown(monkeypatch, capsys):
    """The lines that the help of a recipe prints."""

    def run(name: str, *words: str) -> list[str]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [f"recipes/{name}.py"])
        monkeypatch.setenv("COLUMNS", "80")
        found = recipe_class(name)
        description = (found.__doc__ or "").partition("\n")[0]
        with pytest.raises(SystemExit) as end:
            read_command_line(words, data=found.Data, description=description)
        assert end.value.code == 0
        return capsys.readouterr().out.splitlines()

    return run


def settings_in(lines: list[str]) -> set[str]:
    """The flags that the lines of a help describe."""
    return {match[1] for line in lines if (match := re.match(r"[│ ]*(--[\w.]+)", line))}


@pytest.mark.parametrize("name", RECIPES)
def test_the_help_of_a_recipe_has_at_most_90_lines_of_80_columns(name, shown):
    lines = shown(name, "--help")
    assert len(lines) <= 90
    assert [line for line in lines if len(line) > 80] == []


@pytest.mark.parametrize("name", RECIPES)
def test_the_help_of_a_recipe_has_one_line_a_setting_with_its_value_and_a_text(name, shown):
    lines = shown(name, "--help")
    lines = lines[lines.index("Run:") :]
    for heading, settings in common_settings(recipe_class(name).Data).items():
        start = lines.index(f"{heading}:") + 1
        for line, setting in zip(lines[start:], settings, strict=False):
            assert re.fullmatch(rf"  --{re.escape(setting)} +\S.* \[[^\]]+\]]?", line), line
        assert lines[start + len(settings)] == ""


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_in_the_help_exists_and_help_all_has_the_rest(name, shown):
    found = recipe_class(name)
    every = set(flags_of(Config(data=found.Data())))
    short, complete = shown(name, "--help"), shown(name, "--help", "all")
    assert settings_in(complete) == every
    assert settings_in(short[short.index("Run:") :]) < every
    assert {flag for line in short for flag in SETTING.findall(line)} - every == {"--help"}
    own = set(flags_of(found.Data(), "--data.")) - set(flags_of(DataConfig(), "--data."))
    assert own <= settings_in(short)


@pytest.mark.parametrize("name", RECIPES)
def test_the_examples_in_the_help_are_command_lines_of_the_recipe(name, shown):
    text = "\n".join(shown(name, "--help")).replace("\\\n", " ")
    commands = re.findall(r"^  python (\S+) (.*)$", text, re.MULTILINE)
    assert len(commands) == 2
    for file, words in commands:
        assert (ROOT / file).is_file()
        config = read_command_line(words.split(), data=recipe_class(name).Data)
        assert Path(config.config).is_file()
        assert Path(config.recipe).samefile(ROOT / file)


@pytest.mark.parametrize("name", sorted(WITHOUT_SETTINGS))
def test_the_help_of_a_script_without_settings_fits_too(name):
    command = [sys.executable, str(ROOT / "recipes" / f"{name}.py"), "--help"]
    lines = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"COLUMNS": "80", "PYTHONPATH": str(ROOT)}
    ).stdout.splitlines()
    assert 0 < len(lines) <= 90
    assert [line for line in lines if len(line) > 80] == []


def test_a_common_setting_stands_under_one_heading():
    settings = [setting for names in COMMON.values() for setting in names]
    assert len(settings) == len(set(settings))


def test_a_long_value_continues_on_the_next_line(shown, tmp_path):
    path = "x" * 70 + ".csv"
    lines = shown("masked_lm", "--data.train", path, "--help")
    assert any(line.strip() == f"[{path}]" for line in lines)


def test_a_recipe_typed_into_a_notebook_has_its_settings_without_a_text(capsys):
    scope: dict[str, Any] = {"DataConfig": DataConfig, "dataclass": dataclass, "__name__": "typed"}
    exec("@dataclass\nclass Data(DataConfig):\n    column: str = 'text'\n", scope)
    with pytest.raises(SystemExit):
        read_command_line(["--help"], data=scope["Data"])
    assert re.search(r"^  --data.column +\[text\]$", capsys.readouterr().out, re.MULTILINE)


def test_a_word_that_is_no_kind_of_help_is_refused():
    with pytest.raises(ValueError, match="--help: found 'most', allowed is true or false or all"):
        read_command_line(["--help", "most"])
