"""The offline configs that the benchmarks run: embedded data and models, no download."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from gradacc_hf.errors import InputError, listed
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.utils.paths import bundle_root

SUFFIX = "_offline"
MAX_TOKENS = 1024


def offline_configs() -> dict[str, Path]:
    """Return the offline config of each recipe, by the recipe's name."""
    files = sorted((bundle_root() / "configs").glob(f"*{SUFFIX}.yaml"))
    return {file.stem.removesuffix(SUFFIX): file for file in files}


def check_names(names: Sequence[str], known: Iterable[str]) -> None:
    """Raise InputError for the first name of `--only` that is unknown."""
    known = list(known)
    for name in names:
        if name not in known:
            raise InputError(f"--only: found {name!r}; allowed: {listed(known)}")


def offline_recipe() -> Recipe:
    """Return the recipe of configs/text_classification_offline.yaml: MiniLM on docstrings."""
    config = str(bundle_root() / "configs/text_classification_offline.yaml")
    return load_recipe(["--config", config, f"--budget.max_tokens={MAX_TOKENS}", "--train.noise_every=0"])
