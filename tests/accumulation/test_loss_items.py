"""Items are counted as the heads' own mean losses count them."""

import pytest
import torch

from gradacc_hf.accumulation.loss_items import count_labels, count_next_token, resolve


def test_labels_count_where_they_are_not_ignored():
    assert count_labels({"labels": torch.tensor([[1, -100, 0], [-100, -100, 5]])}) == 3


def test_real_labels_count_by_rows():
    assert count_labels({"labels": torch.zeros(4, 7)}) == 4
    assert count_labels({"labels": torch.zeros(4)}) == 4


def test_next_tokens_count_from_position_one_on():
    assert count_next_token({"labels": torch.tensor([[1, 2, 3], [4, -100, 5]])}) == 3


def test_answers_count_where_they_lie_inside_the_padded_length():
    batch = {
        "input_ids": torch.zeros(3, 8),
        "start_positions": torch.tensor([0, 7, 8]),
        "end_positions": torch.tensor([1, 7, 9]),
    }
    assert count_labels(batch) == 2


@pytest.mark.parametrize("count", [count_labels, count_next_token])
def test_a_batch_without_labels_is_named(count):
    with pytest.raises(ValueError, match="input_ids"):
        count({"input_ids": torch.zeros(2, 3)})


def test_an_unknown_count_is_named_with_those_allowed():
    with pytest.raises(ValueError, match="'tokens'; allowed: 'labels', 'next_token'"):
        resolve("tokens")
