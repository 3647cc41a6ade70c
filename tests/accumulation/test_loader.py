"""Windows depend on data, seed and effective batch size alone, and every one is handed out whole."""

import gc
import logging
import re
import weakref

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.logging import MultiProcessAdapter
from hypothesis import given, settings
from hypothesis import strategies as st

from gradacc_hf import evaluate, fine_tune, train, verify
from gradacc_hf.accumulation.lengths import measure_lengths
from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.sampler import WindowPlan
from gradacc_hf.errors import InputError

RNG = np.random.default_rng(0)
DATA = [
    {"input_ids": RNG.integers(1, 99, n).tolist(), "labels": int(n) % 3} for n in RNG.integers(1, 60, size=53)
]


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def collate(examples, pad_to=None):
    longest = pad_to or max(len(example["input_ids"]) for example in examples)
    return {
        "input_ids": torch.tensor([e["input_ids"] + [0] * (longest - len(e["input_ids"])) for e in examples]),
        "labels": torch.tensor([e["labels"] for e in examples]),
    }


def loader(accelerator, data=DATA, size=16, **arguments):
    arguments.setdefault("collate_fn", collate)
    if "micro_batch_size" not in arguments:
        arguments.setdefault("max_tokens", 256)
    return WindowLoader(data, size, accelerator=accelerator, **arguments)


def seen(windows):
    return [window.indices.tolist() for window in windows]


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 300), st.booleans(), st.integers(0, 3))
def test_an_epoch_is_a_permutation_cut_into_windows(num_examples, size, shuffle, epoch):
    plan = WindowPlan(num_examples, size, seed=1, shuffle=shuffle, drop_last=False)
    windows = [plan.indices(epoch, t).tolist() for t in range(plan.num_windows(epoch))]
    assert [len(w) for w in windows[:-1]] == [size] * (len(windows) - 1)
    order = [index for window in windows for index in window]
    assert sorted(order) == list(range(num_examples))
    if not shuffle:
        assert order == list(range(num_examples))


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 300), st.integers(0, 3))
def test_drop_last_drops_the_partial_window_and_counts_its_examples(num_examples, size, epoch):
    plan = WindowPlan(num_examples, size, seed=1, shuffle=True, drop_last=True)
    sizes = [plan.size(epoch, t) for t in range(plan.num_windows(epoch))]
    assert sizes == [size] * (num_examples // size)
    assert plan.dropped(epoch) == num_examples % size


def test_the_windows_do_not_depend_on_the_split(accelerator):
    ways = [
        {"micro_batch_size": 1},
        {"micro_batch_size": 7},
        {"max_tokens": 100},
        {"max_tokens": 9999, "num_workers": 2},
    ]
    runs = [seen(loader(accelerator, **way)) for way in ways]
    assert all(run == runs[0] for run in runs)
    assert [len(window) for window in runs[0]] == [16, 16, 16, 5]


def test_epochs_differ_and_the_seed_decides(accelerator):
    windows = loader(accelerator)
    first, second = seen(windows), seen(windows)
    assert first != second
    assert seen(loader(accelerator)) == first
    assert seen(loader(accelerator, seed=1)) != first


def test_without_shuffling_the_order_is_the_data_sets(accelerator):
    windows = loader(accelerator, shuffle=False)
    assert [i for window in seen(windows) for i in window] == list(range(53))
    assert [i for window in seen(windows) for i in window] == list(range(53))


def test_a_micro_batch_holds_the_examples_of_its_window(accelerator):
    for window in loader(accelerator):
        expected = sorted(tuple(DATA[i]["input_ids"]) for i in window.indices)
        rows = [tuple(row[row > 0].tolist()) for batch in window.batches() for row in batch["input_ids"]]
        assert sorted(rows) == expected
        assert window.tokens == sum(map(len, expected))


@pytest.mark.parametrize("workers", [0, 2])
def test_planned_tokens_are_those_that_are_run(accelerator, workers):
    for window in loader(accelerator, num_workers=workers):
        shapes = [batch["input_ids"].shape for batch in window.batches()]
        assert window.padded_tokens == sum(rows * length for rows, length in shapes)
        assert window.accumulation_steps == len(shapes) == len(window)


def test_the_effective_batch_size_may_follow_the_windows_number(accelerator):
    sizes = [8, 8, 16, 4, 8, 30]
    windows = loader(accelerator, size=lambda number: sizes[min(number, 5)])
    assert len(windows) == 6
    assert [len(w) for w in seen(windows)] == [8, 8, 16, 4, 8, 9]
    assert [len(w) for w in seen(windows)] == [30, 23]  # numbered over the whole run, not anew each epoch


def test_a_run_stopped_anywhere_goes_on_with_the_windows_that_it_would_have_had(accelerator):
    whole = loader(accelerator)
    expected = seen(whole) + seen(whole)
    for stop in range(1, 8):
        first, windows_seen = loader(accelerator), []
        state = None
        while state is None:
            for window in first:
                windows_seen.append(window.indices.tolist())
                if len(windows_seen) == stop:
                    state = first.state_dict()
                    break
        resumed = loader(accelerator, seed=77)
        resumed.load_state_dict(state)
        assert state["epoch"] == stop // 4
        while len(windows_seen) < 8:
            windows_seen += seen(resumed)
        assert windows_seen == expected


def test_iterating_a_window_again_gives_the_same_micro_batches(accelerator):
    window = next(iter(loader(accelerator)))
    first, again = list(window.batches()), list(window.batches())
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))


def test_the_loader_holds_no_micro_batch_that_it_has_put_on_the_device(accelerator, monkeypatch):
    alive: list[weakref.ref] = []

    def copy(batch, device, non_blocking):  # on a GPU this copies; here it must, to be seen
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]
        copied = {key: value.clone() for key, value in batch.items()}
        alive.extend(map(weakref.ref, copied.values()))
        return copied

    monkeypatch.setattr("gradacc_hf.accumulation.collation.send_to_device", copy)
    for window in loader(accelerator):
        for batch in window.batches():
            del batch
    assert len(alive) > 8


def test_every_example_padded_alike_where_the_window_decides(accelerator):
    for window in loader(accelerator, pad_to="window"):
        longest = max(len(DATA[i]["input_ids"]) for i in window.indices)
        assert {batch["input_ids"].shape[1] for batch in window.batches()} == {longest}
    for window in loader(accelerator, pad_to=64):
        assert {batch["input_ids"].shape[1] for batch in window.batches()} == {64}


@pytest.mark.parametrize("pad_to", ["window", 64])
def test_pad_to_is_refused_where_the_collate_function_does_not_take_it(accelerator, pad_to):
    with pytest.raises(ValueError, match="needs a collate function that takes pad_to"):
        loader(accelerator, pad_to=pad_to, collate_fn=lambda examples: collate(examples))


def test_an_example_longer_than_pad_to_is_named(accelerator):
    with pytest.raises(ValueError, match=r"example \d+ has 58 tokens, more than pad_to=32"):
        loader(accelerator, pad_to=32)


def test_micro_batches_and_windows_without_items_are_skipped_counted_and_said(accelerator, caplog):
    data = [{**example, "labels": -100 if i < 20 else 1} for i, example in enumerate(DATA)]
    windows = loader(accelerator, data, 8, micro_batch_size=2, shuffle=False)
    with caplog.at_level(logging.WARNING):
        handed_out = list(windows)
    assert [window.number for window in handed_out] == [2, 3, 4, 5, 6]  # 0 and 1 are empty, 2 in half
    assert handed_out[0].num_items == 4
    assert windows.empty_windows == 2
    assert windows.empty_micro_batches >= 9
    assert "window 0 of epoch 0 has no item" in caplog.text


def test_drop_last_says_how_many_examples_it_drops(accelerator, caplog):
    assert len(loader(accelerator, drop_last=True)) == 3
    assert "5 of 53 examples are left out" in caplog.text


def test_an_example_larger_than_the_bound_is_said_once(accelerator, caplog):
    windows = loader(accelerator, max_tokens=50)
    list(windows)
    assert caplog.text.count("runs alone in a micro-batch that exceeds the bound") == 1
    assert re.search(r"the longest, example \d+, has 58 padded tokens", caplog.text)


def test_prepare_leaves_the_loader_as_it_is(accelerator):
    windows = loader(accelerator)
    assert accelerator.prepare(windows) is windows


def test_a_prepared_scheduler_is_noticed_and_named(caplog):
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    accelerator.prepare(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0))
    next(iter(loader(accelerator)))
    assert "LambdaLR was prepared by Accelerate" in caplog.text


def test_deepspeed_is_refused_with_a_sentence(accelerator, monkeypatch):
    from accelerate.utils import DistributedType

    monkeypatch.setattr(accelerator.state, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="DEEPSPEED accumulates and scales gradients by itself"):
        loader(accelerator)


@pytest.mark.parametrize("size", [0, -1, 54, 2.5, True, "16"])
def test_an_effective_batch_size_that_cannot_be_is_refused(accelerator, size):
    with pytest.raises(ValueError, match="from 1 to the 53 examples"):
        loader(accelerator, size=size)


def test_an_empty_data_set_is_refused(accelerator):
    with pytest.raises(ValueError, match="no examples"):
        loader(accelerator, data=[])


@pytest.mark.parametrize("count", [lambda batch: -1, lambda batch: float("nan")])
def test_a_count_that_cannot_be_is_named_with_its_examples(accelerator, count):
    with pytest.raises(ValueError, match=r"num_items returned .* for examples"):
        next(iter(loader(accelerator, num_items=count)))


def test_weigh_says_what_it_was_given(accelerator):
    window = next(iter(loader(accelerator)))
    with pytest.raises(RuntimeError, match="inside `for batch in window`"):
        window.weigh(torch.tensor(1.0))
    for _ in window.batches():
        with pytest.raises(ValueError, match="found NoneType"):
            window.weigh(None)
        with pytest.raises(ValueError, match=r"found a tensor of shape \(3,\)"):
            window.weigh(torch.ones(3))
    with pytest.raises(RuntimeError, match="after the last micro-batch"):
        _ = window.loss


def test_lengths_come_from_a_column_a_sequence_a_function_or_the_input_ids():
    expected = [len(example["input_ids"]) for example in DATA]
    dataset = datasets.Dataset.from_list([{**example, "n": len(example["input_ids"])} for example in DATA])
    assert measure_lengths(dataset, None).ravel().tolist() == expected
    assert measure_lengths(dataset.select(range(50, 0, -1)), None).ravel().tolist() == expected[50:0:-1]
    assert measure_lengths(dataset, "n").ravel().tolist() == expected
    assert measure_lengths(DATA, None).ravel().tolist() == expected
    assert measure_lengths(DATA[:2], [[3, 1], [2, 5]]).tolist() == [[3, 1], [2, 5]]
    assert measure_lengths(DATA, expected).ravel().tolist() == expected
    assert measure_lengths(DATA, lambda example: len(example["input_ids"])).ravel().tolist() == expected
    assert measure_lengths([{"pixel_values": 0}] * 3, None).ravel().tolist() == [1, 1, 1]
    choices = [{"input_ids": [[1, 2, 3], [1]]}, {"input_ids": [[1], [2]]}]
    assert measure_lengths(choices, None).ravel().tolist() == [6, 2]
    assert measure_lengths(datasets.Dataset.from_list(choices), None).ravel().tolist() == [6, 2]


SIZES = [9, 400, 31]
MEASURED = {
    "audio": [{"input_values": [0.5] * n, "labels": [1] * 500} for n in SIZES],
    "audio of numpy": [
        {"input_values": np.zeros(n, np.float32), "attention_mask": np.ones(900)} for n in SIZES
    ],
    "frames": [{"input_features": torch.zeros(n, 80)} for n in SIZES],
    "frames, mels first": [{"input_features": np.zeros((80, n)).tolist()} for n in SIZES],
    "embeddings": [{"inputs_embeds": torch.zeros(n, 16), "position_ids": torch.arange(n)} for n in SIZES],
    "another name": [{"id": 7, "name": "x", "signal": [0.5] * n, "label": 1} for n in SIZES],
    "nested": [{"audio": {"array": np.zeros(n), "sampling_rate": 16_000}, "text": "x"} for n in SIZES],
    "nested input_ids": [{"x": {"input_ids": [1] * n, "noise": [0] * 999}} for n in SIZES],
    "x and y": [(torch.zeros(n), torch.zeros(999)) for n in SIZES],
    "arrays": [np.zeros(n) for n in SIZES],
}
UNMEASURED = {
    "texts": [{"text": "a b c", "label": 1}] * 3,
    "images": [{"pixel_values": torch.zeros(3, 8, 8), "labels": torch.zeros(5)}] * 3,
    "numbers": [{"x": 0.5, "y": 1.0}] * 3,
    "texts alone": ["a b c"] * 3,
}


@pytest.mark.parametrize("kind", MEASURED)
def test_inputs_without_input_ids_are_measured_where_lengths_bound_a_micro_batch(kind, accelerator, caplog):
    examples = MEASURED[kind]
    assert measure_lengths(examples, None, bounds=True).ravel().tolist() == SIZES
    assert measure_lengths(examples, None).ravel().tolist() == [1, 1, 1]
    windows = loader(accelerator, examples, 3, max_tokens=400)
    assert sorted(len(indices) for [*process] in windows.split(0, 0).processes for indices in process) == [
        1,
        2,
    ]
    assert "bounds a micro-batch" not in caplog.text
    if isinstance(examples[0], dict):
        dataset = datasets.Dataset.from_list(examples)
        for form in (None, "numpy", "torch"):
            formatted = dataset.with_format(form)
            assert measure_lengths(formatted, None, bounds=True).ravel().tolist() == SIZES
        stream = loader(accelerator, dataset.to_iterable_dataset(), 3, max_tokens=400)
        stream.plan.ahead(0, 0, 1)
        assert stream.tokens[np.arange(3)].ravel().tolist() == SIZES


@pytest.mark.parametrize("kind", UNMEASURED)
def test_inputs_without_a_length_are_a_warning_where_only_lengths_bound_a_micro_batch(
    kind, accelerator, caplog
):
    loader(accelerator, UNMEASURED[kind], 3, micro_batch_size=2)
    loader(accelerator, UNMEASURED[kind], 3, lengths=[1, 2, 3])
    assert "count as 1 token" not in caplog.text
    MultiProcessAdapter.warning_once.cache_clear()
    assert loader(accelerator, UNMEASURED[kind], 3, max_tokens=400).tokens.ravel().tolist() == [1, 1, 1]
    assert caplog.text.count("3 of 3 examples have no input_ids and no other sequence") == 1
    assert "Give lengths=, or micro_batch_size= instead of max_tokens=" in caplog.text


def test_a_torch_data_set_that_knows_no_end_but_its_length_is_fine(accelerator):
    class Endless(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            return DATA[index % len(DATA)]

    assert measure_lengths(Endless(), None).tolist() == [[len(example["input_ids"])] for example in DATA[:20]]
    assert sorted(i for window in loader(accelerator, Endless()) for i in window.indices) == list(range(20))


def test_a_collate_function_that_gives_no_mapping_is_named(accelerator):
    with pytest.raises(ValueError, match="collate_fn returned a tuple; it must return a mapping"):
        next(iter(loader(accelerator, collate_fn=lambda examples: (1, 2))))


def test_a_forgotten_collate_function_is_named(accelerator):
    with pytest.raises(ValueError, match="pass a collate_fn= that pads"):
        next(iter(WindowLoader(DATA, 16, accelerator=accelerator, max_tokens=256)))


@pytest.mark.parametrize("lengths", [[1, 2], [-1] * 53, ["a"] * 53, [float("nan")] * 53])
def test_lengths_that_do_not_fit_the_data_are_refused(lengths):
    with pytest.raises(ValueError, match="lengths"):
        measure_lengths(DATA, lengths)


def test_a_data_set_of_hugging_face_and_a_list_give_the_same_windows(accelerator):
    dataset = datasets.Dataset.from_list(DATA)
    for a, b in zip(loader(accelerator), loader(accelerator, dataset), strict=True):
        for x, y in zip(a.batches(), b.batches(), strict=True):
            assert torch.equal(x["input_ids"], y["input_ids"])


def test_planning_ten_million_examples_needs_their_lengths_and_one_permutation_only():
    plan = WindowPlan(10_000_000, 64, seed=0, shuffle=True, drop_last=False)
    plan.indices(0, 0)
    plan.indices(1, 12345)
    assert plan.memory_bytes() == 40_000_000
    assert isinstance(plan.starts(0), range)


def noisy(example, random):
    """Every token another, drawn anew."""
    return {**example, "input_ids": random.integers(1, 99, len(example["input_ids"])).tolist()}


def drawn(windows):
    """Example → its tokens, as they came in one epoch's micro-batches."""
    found = {}
    for window in windows:
        for batch in window.batches():
            rows = window.micro_batch.indices
            for index, tokens in zip(rows.tolist(), batch["input_ids"].tolist(), strict=True):
                found[index] = tokens[: len(DATA[index]["input_ids"])]
    return found


@pytest.mark.parametrize(
    "way", [{"micro_batch_size": 1}, {"max_tokens": 9999, "num_workers": 2}, {"pad_to": "window"}]
)
def test_what_is_random_about_an_example_is_drawn_from_seed_epoch_and_index_alone(accelerator, way):
    expected = drawn(loader(accelerator, transform=noisy, micro_batch_size=7))
    assert len(expected) == len(DATA)
    windows = loader(accelerator, transform=noisy, **way)
    assert drawn(windows) == expected
    next_epoch = drawn(windows)
    assert all(next_epoch[index] != expected[index] for index in expected if len(expected[index]) > 4)
    other_seed = drawn(loader(accelerator, transform=noisy, seed=1, **way))
    assert sum(other_seed[index] == expected[index] for index in expected) < 5

    resumed = loader(accelerator, transform=noisy, **way)
    resumed.load_state_dict({"seed": 0, "epoch": 1, "window": 2})
    rest = drawn(resumed)
    assert rest == {index: next_epoch[index] for index in rest}


def test_examples_and_batches_asked_for_are_those_of_the_epoch_at_hand(accelerator):
    windows = loader(accelerator, transform=noisy)
    for _ in range(2):
        for window in windows:
            tokens = [example["input_ids"] for example in windows.examples(window.indices)]
            collated = windows.collated(window.indices).batch["input_ids"].tolist()
            assert [row[: len(t)] for row, t in zip(collated, tokens, strict=True)] == tokens
        assert drawn([window]) == dict(zip(window.indices.tolist(), tokens, strict=True))


def test_a_micro_batch_that_comes_again_meets_the_same_dropout(accelerator):
    dropout = torch.nn.Dropout(0.5)
    [window, *_] = loader(accelerator)
    first = [dropout(batch["input_ids"].float()) for batch in window.forward_pass()]
    torch.rand(3)
    again = [dropout(batch["input_ids"].float()) for batch in window.forward_pass()]
    assert len(first) > 1
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(dropout(torch.ones(99)), dropout(torch.ones(99)))


class OneBad(torch.utils.data.Dataset):
    """Raises for one index, as a broken file does."""

    def __init__(self, error, at_once=False):
        self.error = error
        if at_once:
            self.__getitems__ = lambda indices: [self[index] for index in indices]

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5:
            raise self.error
        return {"x": torch.ones(3), "labels": torch.tensor(0)}


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("error", [KeyError("text"), OSError("broken data stream"), IndexError("9")])
def test_an_example_that_cannot_be_read_is_named(at_once, error):
    dataset, sizes = OneBad(error, at_once), {"accelerator": Accelerator(cpu=True), "shuffle": False}
    line = (
        f"example 5 of the data set cannot be read \\({type(error).__name__}: .*\\): correct it, or remove it"
    )
    with pytest.raises(InputError, match=line) as caught:
        WindowLoader(dataset, 4, max_tokens=8, **sizes)  # measures lengths
    assert caught.value.__cause__ is error
    windows = iter(WindowLoader(dataset, 4, micro_batch_size=2, lengths=[3] * 8, **sizes))
    next(windows)
    with pytest.raises(InputError, match=line) as caught:
        next(windows)
    assert caught.value.__cause__ is error

    def transform(example, random):
        raise error

    loader = WindowLoader(dataset, 4, micro_batch_size=2, lengths=[3] * 8, transform=transform, **sizes)
    with pytest.raises(InputError, match=r"example [0-3] of the data set cannot be read"):
        next(iter(loader))


def test_a_data_loader_is_refused_as_data_and_as_windows():
    loader, accelerator = torch.utils.data.DataLoader([{"x": 1}] * 4), Accelerator(cpu=True)
    cure = r"its data set \(loader.dataset\) with collate_fn=loader.collate_fn"
    with pytest.raises(ValueError, match=f"a DataLoader, whose items are batches: give {cure}"):
        WindowLoader(loader, 4, accelerator=accelerator, micro_batch_size=2)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for call in (
        lambda: fine_tune(model, optimizer, loader, accelerator=accelerator),
        lambda: train(model, optimizer, loader, accelerator=accelerator),
        lambda: evaluate(model, loader, accelerator=accelerator),
        lambda: verify(model, loader),
    ):
        with pytest.raises(InputError, match=f"windows is a DataLoader, .* make a WindowLoader of {cure}"):
            call()
