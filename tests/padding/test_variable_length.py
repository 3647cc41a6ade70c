"""The kernel for variable lengths is used only where it is as precise as attention by example.

Torch has this kernel for CUDA alone. Here, attention by example stands in for it, right and wrong.
`tests/test_cuda.py` runs the kernel.
"""

import itertools

import pytest
import torch

from gradacc_hf.padding import variable_length

HEADS = [(4, 4), (4, 2)]


def by_example(query, key, value, offsets, longest, is_causal, scale):
    ends = offsets.tolist()
    outputs = []
    for start, end in itertools.pairwise(ends):
        parts = (states[start:end].transpose(0, 1)[None] for states in (query, key, value))
        options = {"is_causal": is_causal, "scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
        output = torch.nn.functional.scaled_dot_product_attention(*parts, **options)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def check(monkeypatch, kernel, heads, is_causal):
    monkeypatch.setattr(variable_length, "_kernel", kernel)
    variable_length.is_precise.cache_clear()
    return variable_length.is_precise(torch.device("cpu"), torch.bfloat16, heads, 32, is_causal)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_check_accepts_the_right_attention_and_draws_no_random_number(monkeypatch, heads, is_causal):
    state = torch.get_rng_state()
    assert check(monkeypatch, by_example, heads, is_causal)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_check_rejects_a_lost_mask_mixed_examples_and_a_wrong_gradient(monkeypatch):
    def without_mask(query, key, value, offsets, longest, is_causal, scale):
        return by_example(query, key, value, offsets, longest, False, scale)

    def mixed(query, key, value, offsets, longest, is_causal, scale):
        return by_example(query, key, value, offsets[[0, -1]], longest, is_causal, scale)

    def without_gradient_of_keys(query, key, value, *more):
        return by_example(query, key.detach() + 0 * key, value, *more)

    assert not check(monkeypatch, without_mask, (4, 4), True)
    assert not check(monkeypatch, mixed, (4, 4), False)
    assert not check(monkeypatch, without_gradient_of_keys, (4, 4), False)


def test_a_kernel_that_fails_is_not_used():
    variable_length.is_precise.cache_clear()
    assert not variable_length.is_precise(torch.device("cpu"), torch.bfloat16, (4, 4), 32, False)
    states = torch.zeros(1, 4, 9, 32, dtype=torch.bfloat16)
    assert not variable_length.takes(states, states, "full", 0.0)
