"""Checksums of examples depend on the content alone."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from gradacc_hf import WindowLoader
from gradacc_hf.accumulation.collation import LocalWindows
from gradacc_hf.accumulation.same_data import checksum
from gradacc_hf.accumulation.splitting import Bound, usual_cost


@dataclasses.dataclass
class Example:
    tokens: list
    weight: float = 1.0


PICTURE = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
UNLIKE = [
    {"a": [[1], [2]]},
    {"a": [[1, 2]]},
    {"a": [1, 2]},
    {"a": [1.0, 2.0]},
    {"b": [1, 2]},
    {"a": [[1], [2, 3]]},
    {"a": "1"},
    {"a": None},
    {"a": True},
    {"a": b"1"},
    {"a": ["x", "yz"]},
    {"a": ["xy", "z"]},
    {"a": {"x", "y"}},
    {"a": torch.tensor([0.5, 2.0], dtype=torch.bfloat16)},
    {"a": torch.tensor([2.0, 0.5], dtype=torch.bfloat16)},
    {"a": Image.fromarray(PICTURE)},
    {"a": Image.fromarray(PICTURE[::-1].copy())},
    {"a": {"bytes": b"x", "path": "x.png"}},
    {"a": {"bytes": b"y", "path": "x.png"}},
    {"a": Example([1])},
    {"a": Example([2])},
    ([1, 2], 3),
    ([1], 2, 3),
]


def test_unlike_examples_have_unlike_checksums_that_float64_holds():
    found = [checksum(example) for example in UNLIKE]
    assert len(set(found)) == len(UNLIKE)
    assert [int(float(each)) for each in found] == found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a": [1, 2]}, {"a": (1, 2)}),
        ({"a": [0.5, 1.0]}, {"a": torch.tensor([0.5, 1.0], requires_grad=True)}),
        ({"bytes": b"x", "path": "/here/x.png"}, {"bytes": b"x", "path": "/there/x.png"}),
        ({"a": Path("/here/x.png")}, {"a": Path("/there/x.png")}),
        ({"a": {"x", "y", "z"}}, {"a": {"z", "y", "x"}}),
        ({"a": object()}, {"a": object()}),
        ({"a": Example([1])}, {"a": Example([1])}),
    ],
)
def test_equal_content_has_one_checksum_whatever_holds_it(one, other):
    assert checksum(one) == checksum(other)


class Stream(torch.utils.data.IterableDataset):
    """Examples whose content counts how often it is read."""

    read = 0

    def __iter__(self):
        for number in range(40):
            yield {"number": number, "content": Content(self, number)}


@dataclasses.dataclass
class Content:
    stream: Stream
    number: int

    def __array__(self, dtype=None, copy=None):
        self.stream.read += 1
        return np.array([self.number])


def test_later_windows_of_a_stream_compare_one_example():
    stream = Stream()
    plan = WindowLoader(stream, 8, micro_batch_size=8, accelerator=Accelerator(cpu=True), shuffle=False).plan
    windows = LocalWindows(
        dataset=plan,
        collate_fn=lambda rows: {"labels": torch.zeros(len(rows))},
        count_items=lambda batch: len(batch["labels"]),
        tokens=plan.tokens,
        pad_to="micro_batch",
        bound=Bound(micro_batch_size=8),
        cost=usual_cost("cpu"),
        plan=plan,
        num_processes=2,
        process=0,
    )
    windows.compare_at = (0, 0)
    read = []
    for number in range(3):
        before = stream.read
        assert windows[0, number][0].rows
        read.append(stream.read - before)
    assert read == [8, 1, 1]
