"""tasks/search.py: equal texts, and what a search found."""

import torch
from datasets import Dataset

from gradacc_hf.data.reading import Reading
from gradacc_hf.tasks.search import chance, nearest, note_equal_texts, sample


def test_equal_texts_of_a_split_are_noted():
    pairs = Dataset.from_dict({"anchor_text": ["a", "b", "b"], "positive_text": ["x", "y", "z"]})
    reading = Reading()
    note_equal_texts((pairs, pairs.select([0, 1])), reading)
    found = "3 training pairs have 2 different anchors: equal texts are not negatives"
    assert reading.notes == {"equal texts": [found]}


def test_chance_counts_every_positive_of_equal_anchors_as_right():
    one, two = {"anchor_input_ids": [[1], [2]]}, {"anchor_input_ids": [[1], [1]]}
    positives = {"positive_input_ids": [[3], [4]]}
    found = [chance(Dataset.from_dict({**anchors, **positives})) for anchors in (one, two)]
    assert found[0].keys() == found[1].keys()
    assert all(found[0][name] <= found[1][name] == 1 for name in found[0])
    assert found[0] != found[1]


def test_the_nearest_candidates_come_first():
    [found] = nearest(
        ["q"], torch.tensor([[1.0, 0.0]]), ["far", "near"], torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    )
    assert [each["text"] for each in found["found"]] == ["near", "far"]


def test_a_sample_names_the_rank_of_the_first_right_pair():
    pair, first = {"anchor_text": "a"}, {"positive_text": "x"}
    assert sample(pair, [first], [4, 2, 7], [7, 2])["rank of the right one"] == "2"
    assert sample(pair, [first], [4, 2, 7], [1])["rank of the right one"] == "beyond 3"
