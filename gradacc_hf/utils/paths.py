"""Location of the recipes and configs."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


BUNDLE_ROOTS = (PACKAGE.parent, PACKAGE / "_kit")
"""Folders that may hold recipes/ and configs/: beside the package in a checkout, inside it if installed."""


def bundle_root() -> Path:
    """Return the folder that holds recipes/ and configs/."""
    return next(root for root in BUNDLE_ROOTS if (root / "recipes").is_dir())
