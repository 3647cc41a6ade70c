"""Modes in which the losses of a sample are computed: without dropout, and in float64 if possible."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from math import isclose, isnan

import torch

from gradacc_hf.accumulation.loss_samples import LOSS_RTOL_FP32, LOSS_RTOL_FP64, LOSS_RTOL_HALF
from gradacc_hf.utils.modeling import without_dropout
from gradacc_hf.utils.precision import in_float64


@dataclass(frozen=True)
class LossMode:
    """A mode of a model.

    Attributes:
        training: Whether the modules are in training mode, where losses may differ from evaluation mode.
        float64: Whether the model computes in float64.
    """

    training: bool
    float64: bool

    def rtol(self, is_half: bool) -> float:
        """Return the largest relative difference of losses that is rounding. `is_half`: bf16 or fp16."""
        return LOSS_RTOL_FP64 if self.float64 else LOSS_RTOL_HALF if is_half else LOSS_RTOL_FP32

    @contextmanager
    def of(self, model: torch.nn.Module) -> Iterator[bool]:
        """Set the mode of a model in the block, without dropout and with BatchNorm in evaluation mode.

        Yield whether the model has dropout.

        Raises:
            ValueError: the model cannot compute in float64.
        """
        precision = in_float64(model) if self.float64 else nullcontext()
        with without_dropout(model, self.training) as has_dropout, precision:
            yield has_dropout


MODES = tuple(LossMode(training, float64) for training in (True, False) for float64 in (True, False))


def find_mode(
    model: torch.nn.Module, loss: Callable[[int], float], is_half: bool, allows_float64: bool = True
) -> tuple[LossMode, bool]:
    """Return the first mode whose losses are repeatable, and whether they are not in training mode.

    Without such a mode, return the last one that has losses. Tensors that the first forward creates and keeps
    are not in float64.

    Args:
        model: The model.
        loss: Computes a loss after a seed of random numbers.
        is_half: Whether the model usually computes in bf16 or fp16.
        allows_float64: Whether to try float64.
    """
    possible, changes = MODES[-1], False
    with suppress(Exception), LossMode(training=True, float64=False).of(model):
        loss(0)
    for mode in MODES:
        if mode.float64 and not allows_float64:
            continue
        try:
            with mode.of(model):
                first, second = loss(0), loss(1)
        except Exception:  # a kernel without float64, or a loss only in training mode
            continue
        if isnan(first) or isclose(first, second, rel_tol=mode.rtol(is_half)):
            return mode, changes
        changes |= mode.training
        possible = mode
    return possible, changes
