"""The base class of recipes, and loading the recipe of a config or of a run."""

from gradacc_hf.utils.extras import require

require(__name__, "recipes")

from gradacc_hf.recipe.base import Recipe
from gradacc_hf.recipe.scoring import ScoredRows

__all__ = ["Recipe", "ScoredRows"]
