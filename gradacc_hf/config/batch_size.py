"""The effective batch size from a run's settings: a number, sizes by window, or sizes by the noise scale."""

from gradacc_hf.accumulation.batch_schedule import GrowingBatch, ScheduledBatch
from gradacc_hf.accumulation.sampler import EffectiveBatchSize
from gradacc_hf.config.schema import BatchConfig, Config
from gradacc_hf.errors import InputError


def effective_batch_size(batch: BatchConfig, num_examples: int) -> EffectiveBatchSize:
    """Return `batch.effective` as a loader takes it. Raise InputError if it exceeds the training examples."""
    grows = batch.effective == "noise_scale"
    sizes = batch.effective.values() if isinstance(batch.effective, dict) else [batch.least]
    if max(sizes) > num_examples:
        raise InputError(
            f"{'batch.smallest' if grows else 'batch.effective'}: found {max(sizes)}; allowed: 1 to "
            f"{num_examples}, the number of training examples"
        )
    if isinstance(batch.effective, dict):
        return ScheduledBatch(batch.effective)
    return GrowingBatch(batch.smallest, min(batch.largest, num_examples)) if grows else batch.least


def check_can_measure(sizes: GrowingBatch, measures: bool, num_processes: int) -> None:
    """Raise InputError if `batch.effective` is noise_scale and the noise scale cannot be measured."""
    if not measures:
        raise InputError(
            "batch.effective: found noise_scale, which cannot be measured with budget.whole_gradients, nor "
            "with a loss over a whole window; allowed: a number, or sizes by window"
        )
    if sizes.smallest < (least := 2 * num_processes):
        raise InputError(
            f"batch.smallest: found {sizes.smallest}; allowed: {least} or more on "
            f"{num_processes} processes, as the noise scale is measured on a part of each process's examples"
        )


def check_sizes(config: Config) -> None:
    """Raise InputError for settings that `batch.effective: noise_scale` excludes."""
    if config.batch.effective != "noise_scale":
        return
    if config.train.noise_every == 0:
        raise InputError("train.noise_every: found 0 with batch.effective noise_scale; allowed: 1 or more")
    if config.train.max_windows is not None and not config.optim.is_constant:
        raise InputError(
            "train.max_windows: found "
            f"{config.train.max_windows} with batch.effective noise_scale. The number of examples, on "
            "which the learning rate depends, is then unknown: set train.epochs instead, or set "
            "optim.scheduler constant and optim.warmup_ratio 0"
        )
