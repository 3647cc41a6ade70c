"""Weights in bfloat16 whose gradients accumulate in float32.

bf16 has 8 significant bits: what is added to a sum some 256 times as large is rounded away, so a gradient
that accumulates in bf16 gets worse with every micro-batch. `accumulate_in_float32` lets `.grad` be float32
over bf16 weights; the optimizer gets it rounded once, at the step, after clipping.

The step itself still rounds: an update below about 1/256 of a weight is lost, as neither float32 copies of
the weights nor stochastic rounding are provided. Float32 weights under bf16 precision lose neither.
"""

from typing import Any

import torch
from torch.optim import Optimizer

from gradacc_hf.errors import InputError


def accumulate_in_float32(model: torch.nn.Module, optimizer: Optimizer) -> None:
    """Let the trained bf16 (or fp16) weights of a model accumulate gradients in float32.

    Other weights stay as they are. Call it once, before `accelerator.prepare`. After `optimizer.step()`,
    `.grad` is None. Memory: 4 bytes per weight for its gradient instead of 2.

    Args:
        model: The unprepared model.
        optimizer: The unprepared optimizer; each step gets the gradients rounded to the weights' dtype.

    Raises:
        InputError: On several processes, as DDP reduces gradients in the weights' dtype; or with torch
            before 2.10, which has no float32 gradients of bf16 weights.
    """
    half = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if not half:
        return
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise InputError(
            "model.dtype: found trained bfloat16 weights on several processes, where DDP reduces gradients "
            "in bfloat16; allowed there is float32, which computes in bf16 with budget.precision bf16"
        )
    if not hasattr(half[0], "grad_dtype"):
        raise InputError(
            f"model.dtype: found bfloat16 with torch {torch.__version__}, where gradients have the weights' "
            "format; allowed is float32, or torch from 2.10"
        )

    def round_gradients(*_: Any) -> None:
        for parameter in half:
            if parameter.grad is not None:
                parameter.grad_dtype = None  # any
                parameter.grad = parameter.grad.to(parameter.dtype)  # one by one, so that one is there twice

    def in_float32_again(*_: Any) -> None:
        for parameter in half:
            parameter.grad, parameter.grad_dtype = None, torch.float32

    in_float32_again()
    optimizer.register_step_pre_hook(round_gradients)
    optimizer.register_step_post_hook(in_float32_again)
