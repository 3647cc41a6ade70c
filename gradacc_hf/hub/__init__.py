"""Model cards and the Hugging Face Hub."""

from gradacc_hf.utils.extras import require

require(__name__, "recipes")
