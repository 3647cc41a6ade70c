"""Whether a run tries several micro-batch sizes."""

from gradacc_hf.config.schema import Config
from gradacc_hf.training.autotune import WINDOWS_NEEDED


def tunes(config: Config, num_windows: int) -> bool:
    """Does a run of so many windows try sizes? What compiles tells nothing by its first windows."""
    budget = config.budget
    is_free = budget.max_tokens == "auto" and budget.micro_batch_size is None and not budget.compile
    return is_free and num_windows >= WINDOWS_NEEDED
