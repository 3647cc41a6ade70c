"""The extras of this package: their requirements, and the error for a missing one.

`pip install gradacc-hf` installs what the loop and `ExactTrainer` need. A package that needs more calls
`require` at the top. The extras and their requirements are read from the metadata of the installed package.
"""

import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata

from gradacc_hf.errors import MissingExtraError, one_line

DISTRIBUTION = "gradacc-hf"
NAMES_SHOWN = 3  # packages; the message stays one line


def require(user: str, extra: str, *packages: str) -> None:
    """Raise MissingExtraError unless the packages of an extra are installed.

    Args:
        user: the module or command that needs the packages, as the message should name it.
        extra: the extra in pyproject.toml that installs them.
        packages: the distributions that are needed; by default all of the extra.
    """
    missing = [name for name in packages or packages_of(extra) if not is_installed(name)]
    if missing:
        raise MissingExtraError(
            f"{user} needs {_listed(missing)}, not installed here: pip install '{DISTRIBUTION}[{extra}]'"
        )


@cache
def packages_of(*extras: str) -> tuple[str, ...]:
    """Return the distributions that these extras install, without gradacc-hf and the base requirements.

    The result is empty where gradacc runs from a folder without being installed, as in a Space.
    """
    return tuple(name for name, _ in _requirements(extras) if name != DISTRIBUTION)


def pinned(*extras: str) -> list[str]:
    """Return the requirements of the base and of these extras, pinned to the installed versions."""
    names = sorted({name for name, _ in _requirements(("", *extras)) if name != DISTRIBUTION})
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in names]


def is_installed(distribution: str) -> bool:
    """Whether a distribution is installed, in any version."""
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _requirements(extras: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield (distribution, extra) for each requirement of these extras. The base has the extra ""."""
    from packaging.requirements import Requirement  # late: commands that need no extra start without it

    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return
    for line in lines:
        of_extra = re.search(r"""extra == ['"]([^'"]+)""", line)
        extra = of_extra[1] if of_extra else ""
        if extra not in extras:
            continue
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        yield requirement.name, extra
        if requirement.name == DISTRIBUTION:  # an extra that consists of other extras
            yield from _requirements(tuple(requirement.extras))


def _listed(names: list[str]) -> str:
    shown, more = names[:NAMES_SHOWN], len(names) - NAMES_SHOWN
    if more > 0:
        return f"{', '.join(shown)} and {more} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]


# python -m gradacc_hf.utils.extras EXTRA …: exit code 2 and one line if a package of an extra is missing
if __name__ == "__main__":
    try:
        for name in sys.argv[1:]:
            require("this", name)
    except MissingExtraError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
