"""The settings that a sweep varies, read from its command line.

`--optim.lr 1e-5,3e-5` lists values. `--optim.lr 1e-6..1e-4` is a range, from which `search.py` chooses.
Commas inside brackets separate nothing. A text of the data, such as `data.labels a,b`, has commas of its own,
and one value.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Union, get_args, get_origin

from gradacc_hf.errors import InputError, refuse

Point = Mapping[str, str]  # setting → value, as on a command line
SEED = "train.seed"
OF_THE_RANKING = ("train.best_metric", "train.best_direction")
OF_THE_SWEEP = ("check", "continue", "help", "output.dir", "output.overwrite", "output.push_to_hub", "resume")
LOG_FROM_RATIO = 10  # a range with a larger ratio of its ends is searched by the logarithm
NUMBER = r"[+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?"
NAME_LENGTH = 100  # characters of a folder


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`."""

    low: float
    high: float
    is_integer: bool

    @property
    def is_log(self) -> bool:
        """Whether the logarithm is searched evenly."""
        return self.low > 0 and self.high / self.low >= LOG_FROM_RATIO

    def text(self, value: float) -> str:
        """Return a number of this range as a value of a command line."""
        return (
            str(round(value))
            if self.is_integer
            else f"{min(max(float(f'{value:.3g}'), self.low), self.high):g}"
        )


@dataclass(frozen=True)
class Space:
    """The settings that vary: `choices` are lists of values, `ranges` are numbers between two ends."""

    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The settings that vary."""
        return [*self.choices, *self.ranges]

    def grid(self) -> list[Point]:
        """Return all combinations of the choices."""
        return [
            dict(zip(self.choices, values, strict=True))
            for values in itertools.product(*self.choices.values())
        ]

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield (setting, text) for the plan of a sweep."""
        for name, values in self.choices.items():
            yield name, ", ".join(values)
        for name, ends in self.ranges.items():
            scale = "logarithmic" if ends.is_log else "linear"
            yield name, f"{ends.low:g} to {ends.high:g}, {scale}"


def split_settings(words: Sequence[str], types: Mapping[str, Any]) -> tuple[list[str], Space]:
    """Return the flags that all runs share, and the settings that vary.

    Args:
        words: flags of a recipe.
        types: type of each setting of the recipe.

    Raises:
        InputError: for flags that belong to the sweep, and for values that are given twice.
    """
    shared: list[str] = []
    choices: dict[str, Sequence[str]] = {}
    ranges: dict[str, Range] = {}
    for key, value in _flags(words):
        if key in OF_THE_SWEEP or key.partition(".")[0] in OF_THE_SWEEP:
            refuse(
                f"--{key}",
                "found a setting of a single run",
                "remove it; --output names the folder of the sweep",
            )
        kind = types.get(key)
        values = split(value or "")
        if value is None:
            shared.append(f"--{key}")
        elif ends := _range(key, value, kind):
            ranges[key] = ends
        elif len(values) > 1 and not _has_commas(key, kind):
            if len({one if number(one) is None else number(one) for one in values}) < len(values):
                refuse(f"--{key}", f"found {value}", "give each value once")
            choices[key] = values
        else:
            shared += [f"--{key}", value]
    if SEED in choices or SEED in ranges:
        raise InputError(
            f"--{SEED}: found several values; give --seeds, the number of seeds, and one first seed"
        )
    for name in OF_THE_RANKING:
        if name in choices:
            refuse(f"--{name}", "found several values", "give one: all runs are ranked by it")
    return shared, Space(choices, ranges)


def split(value: str) -> list[str]:
    """Return the parts between the commas of a value, without commas inside brackets."""
    parts, depth = [""], 0
    for letter in value:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def number(text: str) -> float | None:
    """Return the number that a value is; None for any other value."""
    return float(text) if re.fullmatch(NUMBER, text) else None


def folder_name(point: Point) -> str:
    """Return the name of the folder of a point: "lr-1e-05_effective-16"."""
    last = [name.rpartition(".")[2] for name in point]
    names = last if len({*last}) == len(last) else [*point]
    whole = "_".join(f"{name}-{value}" for name, value in zip(names, point.values(), strict=True)) or "run"
    name = re.sub(r"[^\w.+-]+", "-", whole)[:NAME_LENGTH]
    return name if name == whole else f"{name}-{hashlib.sha256(whole.encode()).hexdigest()[:6]}"


def _flags(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield the flags of a command line, each with its value; None without a value."""
    rest = [*words]
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise InputError(f"found {word!r} on the command line; allowed are flags: --optim.lr 1e-5,3e-5")
        key, equals, value = word[2:].partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            equals, value = "=", rest.pop(0)
        yield key, value if equals else None


def _parts(kind: Any) -> list[Any]:
    return [*get_args(kind)] if get_origin(kind) in (Union, UnionType) else [kind]


def _has_commas(key: str, kind: Any) -> bool:
    """Whether commas are a part of the setting's value, as in lists of labels and of files."""
    return key.startswith("data.") and str in _parts(kind)


def _range(key: str, value: str, kind: Any) -> Range | None:
    """Return the range that a value is; None for any other value."""
    if not (found := re.fullmatch(rf"({NUMBER})\.\.({NUMBER})", value)):
        return None
    low, high = float(found[1]), float(found[2])
    if not {int, float} & {*_parts(kind)}:
        refuse(f"--{key}", f"found the range {value}", "a range is for numbers; list the values, with commas")
    is_integer = float not in _parts(kind)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        refuse(f"--{key}", f"found the range {value}", "give the smaller end first, such as 1e-6..1e-4")
    if is_integer and not (low.is_integer() and high.is_integer()):
        refuse(f"--{key}", f"found the range {value}", "give integers, such as 16..128")
    return Range(low, high, is_integer)
