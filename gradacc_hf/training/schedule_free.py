"""Optimizers without a schedule, which average the weights (the library schedulefree).

During training the model has weights at which gradients are computed. The result of the training is their
average, which `optimizer.eval()` puts into the model. Other optimizers have one set of weights, and these
functions do nothing.

Source: Defazio et al. 2024, "The Road Less Scheduled", https://arxiv.org/abs/2405.15682.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

AVERAGES = (
    "train_mode"  # schedulefree's key in each group of parameters: whether the weights are for training
)


@contextmanager
def averaged_weights(optimizer: Any) -> Iterator[None]:
    """Put the averaged weights into the model for the block, to evaluate or save it.

    The weights for training return with the same bits. They are copied, as schedulefree computes them from
    the average up to rounding. Memory: one copy of the trained weights.

    Args:
        optimizer: any optimizer.
    """
    if not optimizer.param_groups[0].get(AVERAGES):  # another optimizer, or already averaged
        yield
        return
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for_training = [weight.detach().clone() for weight in weights]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for weight, value in zip(weights, for_training, strict=True):
                weight.copy_(value)


def keep_averaged_weights(optimizer: Any) -> None:
    """Put the averaged weights into the model at the end of training."""
    if optimizer.param_groups[0].get(AVERAGES):
        optimizer.eval()
