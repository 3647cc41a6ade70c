"""Read data files and Hub data sets, and check their rows and columns."""

from gradacc_hf.utils.extras import require

require(__name__, "recipes")
