"""Accumulate the gradients of bfloat16 weights in float32.

bf16 has 8 significant bits. A term 256 times smaller than a sum is rounded away, so a gradient that
accumulates in bf16 gets worse with every micro-batch. `accumulate_in_float32` makes `.grad` float32 for bf16
weights. The gradient is rounded once, at the optimizer step, after clipping.

The step itself still rounds: an update below about 1/256 of a weight is lost. gradacc provides neither
float32 copies of the weights nor stochastic rounding. Float32 weights with bf16 precision lose neither
gradients nor updates.
"""

from typing import Any

import torch
from torch.optim import Optimizer

from gradacc_hf.errors import InputError


def accumulate_in_float32(model: torch.nn.Module, optimizer: Optimizer) -> None:
    """Accumulate the gradients of trained bf16 and fp16 weights in float32.

    Other weights are unchanged. Call it once, before `accelerator.prepare`. After `optimizer.step()`, `.grad`
    is None. Memory: 4 bytes per gradient element instead of 2.

    Args:
        model: The unprepared model.
        optimizer: The unprepared optimizer. Each step gets the gradients rounded to the dtype of the weights.

    Raises:
        InputError: With several processes, as DDP reduces gradients in the dtype of the weights. Also with
            torch before 2.10, which has no float32 gradients for bf16 weights.
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
            f"model.dtype: found bfloat16 with torch {torch.__version__}, where gradients have the format of "
            "the weights; allowed is float32, or torch 2.10 and later"
        )

    def round_gradients(*_: Any) -> None:
        for parameter in half:
            if parameter.grad is not None:
                parameter.grad_dtype = None  # allows any dtype
                parameter.grad = parameter.grad.to(parameter.dtype)  # in turn: one extra copy at a time

    def in_float32_again(*_: Any) -> None:
        for parameter in half:
            parameter.grad, parameter.grad_dtype = None, torch.float32

    in_float32_again()
    optimizer.register_step_pre_hook(round_gradients)
    optimizer.register_step_post_hook(in_float32_again)
