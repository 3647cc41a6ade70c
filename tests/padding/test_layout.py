"""The layout of a batch without padding: an exact inverse, groups of least cost, and gradients by copying."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradacc_hf.accumulation.padding_layout import (
    attach_layout,
    attached_layout,
    pack,
    padding_layout,
    target_mask,
    unpack,
)
from gradacc_hf.accumulation.splitting import Cost

ONE_GROUP, GROUP_PER_LENGTH = Cost(fixed=1e15, quadratic=1.0), Cost(fixed=0.0, quadratic=1.0)


def right_padded(lengths, width=None):
    return (torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]).long()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=6), st.data())
def test_packing_keeps_real_tokens_by_example_and_order(rows, data):
    mask = torch.tensor(rows).long()
    layout = padding_layout(mask, data.draw(st.sampled_from([ONE_GROUP, GROUP_PER_LENGTH, None])))
    if mask.all() or not mask.any(1).all():
        assert layout is None
        return
    numbers = torch.arange(mask.numel())
    packed = pack(numbers, layout.tokens).tolist()
    by_example = torch.split(torch.tensor(packed), list(layout.lengths))
    for row, tokens in zip(layout.rows.tolist(), by_example, strict=True):
        assert tokens.tolist() == [row * 6 + column for column in range(6) if rows[row][column]]
    assert sum(rows for rows, _ in layout.groups) == len(mask)
    padded = unpack(torch.tensor(packed), layout.tokens, *mask.shape)
    assert torch.equal(padded, numbers.view(mask.shape) * mask)


@pytest.mark.parametrize(
    ("cost", "groups", "has_padding"),
    [(ONE_GROUP, ((4, 9),), True), (GROUP_PER_LENGTH, ((2, 9), (1, 4), (1, 2)), False)],
)
def test_groups_follow_the_cost(cost, groups, has_padding):
    layout = padding_layout(right_padded([9, 2, 9, 4]), cost)
    assert sorted(layout.groups) == sorted(groups)
    assert (layout.blocks is not None) == has_padding
    assert layout.num_tokens == 24


def test_the_default_groups_join_lengths_that_are_close():
    layout = padding_layout(right_padded([40, 41, 42, 300, 301]))
    assert sorted(layout.groups) == [(2, 301), (3, 42)]


@pytest.mark.parametrize(
    ("mask", "side"),
    [
        (right_padded([3, 5]), "right"),
        (right_padded([3, 5]).flip(1), "left"),
        (torch.tensor([[1, 0, 1], [1, 1, 1]]), "mixed"),
    ],
)
def test_the_side_of_padding(mask, side):
    assert padding_layout(mask).side == side


def test_gradients_flow_back_twice_by_copies():
    torch.manual_seed(0)
    tokens = torch.tensor([4, 1, 3])
    wide, narrow = (torch.randn(n, 2, dtype=torch.float64, requires_grad=True) for n in (6, 3))
    functions = ((lambda x: pack(x, tokens), wide), (lambda x: unpack(x, tokens, 2, 3), narrow))
    for function, values in functions:
        assert torch.autograd.gradcheck(function, values)
        assert torch.autograd.gradgradcheck(function, values)


def test_an_attached_layout_is_void_after_a_change_and_for_other_tensors():
    mask = right_padded([3, 5])
    layout = padding_layout(mask)
    assert attached_layout(mask) is None
    attach_layout(mask, layout)
    assert attached_layout(mask).tokens is layout.tokens
    assert attached_layout(mask.clone()) is None
    mask[0, 0] = 0
    assert attached_layout(mask) is None


def test_targets_end_at_their_last_label():
    labels = torch.tensor([[5, -100, 6, -100], [7, -100, -100, -100], [-100, -100, -100, 8]])
    assert target_mask(labels).tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
