"""`gradacc compare`: the same training by several loops, side by side."""

from gradacc_hf.utils.extras import require

require(__name__, "recipes")
require(__name__, "report")
