"""Location of the recipes and configs."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


BUNDLE_ROOTS = (PACKAGE.parent, PACKAGE / "_kit")
"""Where recipes/ and configs/ are: beside the package in a checkout, inside it in an installed one."""


def bundle_root() -> Path:
    """The folder that holds recipes/ and configs/."""
    return next(root for root in BUNDLE_ROOTS if (root / "recipes").is_dir())
