"""The base class of recipe files, and loading the recipe that a config or a run names."""

from gradacc_hf.utils.extras import require

require(__name__, "recipes")

from gradacc_hf.recipe.base import Recipe

__all__ = ["Recipe"]
