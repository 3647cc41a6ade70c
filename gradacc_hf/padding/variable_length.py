"""Attention over packed examples in one call of torch's kernel for variable lengths, on CUDA.

The kernel (`torch.nn.attention.varlen`, FlashAttention) needs no groups of similar length. It has 16-bit
inputs and no dropout. Each kind of call is first compared with attention by example, forward and backward.
Where the kernel is missing, fails or is less precise, attention runs by groups.
"""

from functools import cache
from typing import Any

import torch

from gradacc_hf.accumulation.padding_layout import PaddingLayout

SAMPLE_LENGTHS = (37, 5, 64, 1)
MOST_RELATIVE_ERROR = 2.0
"""Allowed error, relative to the error of attention by example in the same 16 bits. Both against float32."""


def takes(query: torch.Tensor, key: torch.Tensor, kind: str, dropout: float) -> bool:
    """Whether the kernel computes this attention, as precisely as attention by example.

    Args:
        query: (1, heads, tokens, size).
        key: (1, heads of keys, tokens, size).
        kind: Kind of the mask (`PackedMask`).
        dropout: Probability of dropout in the attention.
    """
    if not query.is_cuda or dropout or kind == "other" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if torch.are_deterministic_algorithms_enabled():
        return False
    heads = query.shape[1], key.shape[1]
    return is_precise(query.device, query.dtype, heads, query.shape[-1], kind == "causal")


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PaddingLayout,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Attend within each example.

    Args:
        query: (1, heads, tokens, size), as `key` and `value` with their own number of heads.
        key: Keys.
        value: Values.
        layout: Layout of the tokens, on their device.
        is_causal: Whether a token attends to no later token.
        scale: Factor of the scores. None for 1 / √size.

    Returns:
        (1, tokens, heads, size).
    """
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    return _kernel(query, key, value, layout.offsets, max(layout.lengths), is_causal, scale)[None]


def _kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    longest: int,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # since torch 2.10

    # The window of a causal attention ends at the token itself.
    options: dict[str, Any] = {"window_size": (-1, 0)} if is_causal else {}
    options |= {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    output = varlen_attn(query, key, value, offsets, offsets, longest, longest, scale=scale, **options)
    assert isinstance(output, torch.Tensor)
    return output


@cache
def is_precise(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int], size: int, is_causal: bool
) -> bool:
    """Whether the kernel's output and gradients are as near to float32 as SDPA's by example."""
    generator = torch.Generator(device).manual_seed(0)
    total = sum(SAMPLE_LENGTHS)
    shapes = [(total, number, size) for number in (heads[0], heads[1], heads[1], heads[0])]
    *states, direction = (
        torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes
    )
    ends = torch.tensor([0, *SAMPLE_LENGTHS], device=device).cumsum(0).int()

    def by_example(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        parts = zip(*(part.split(SAMPLE_LENGTHS) for part in (query, key, value)), strict=True)
        outputs = [
            torch.nn.functional.scaled_dot_product_attention(
                *(part.transpose(0, 1)[None] for part in parts_of_one),
                is_causal=is_causal,
                enable_gqa=heads[0] != heads[1],
            )
            for parts_of_one in parts
        ]
        return torch.cat([output[0].transpose(0, 1) for output in outputs])

    def by_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return _kernel(query, key, value, ends, max(SAMPLE_LENGTHS), is_causal, None)

    def results(attend: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [part.detach().to(dtype).requires_grad_() for part in states]
        output = attend(*inputs)
        return [output.detach(), *torch.autograd.grad(output, inputs, direction.to(dtype))]

    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        try:
            found = results(by_kernel, dtype)
        except (ImportError, RuntimeError, ValueError):  # an old torch, GPU, or an unusual head size
            return False
        exact, usual = results(by_example, torch.float32), results(by_example, dtype)
    return all(
        bool((mine - true).norm() <= MOST_RELATIVE_ERROR * (theirs - true).norm())
        for mine, theirs, true in zip(found, usual, exact, strict=True)
    )
