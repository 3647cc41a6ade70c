"""One run of a recipe: from its command line to a folder with a trained model."""

from gradacc_hf.utils.extras import require

require(__name__, "recipes")

from gradacc_hf.run.runner import run

__all__ = ["run"]
