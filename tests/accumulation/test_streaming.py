"""Streams: windows of examples that come one after the other, of a number that nobody knows."""

import functools
import json
import logging
import tempfile
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from gradacc_hf import WindowLoader, evaluate, fine_tune, retry_on_oom, verify
from gradacc_hf.accumulation.reference import EXACT, RecordGradients, relative_error, whole_window_gradient
from gradacc_hf.accumulation.streaming import Stream
from gradacc_hf.verification.tiny_models import build_head

RNG = np.random.default_rng(0)
DATA = [
    {"input_ids": RNG.integers(1, 99, n).tolist(), "labels": int(n) % 3} for n in RNG.integers(1, 60, size=53)
]
LENGTHS = np.random.default_rng(3).integers(3, 40, size=23).tolist()
SHARDS = [DATA[:20], DATA[20:21], DATA[21:]]


class Plain:
    """Iterable anew each epoch, without a length; counts what is taken from it."""

    def __init__(self, examples=DATA):
        self.examples, self.taken = examples, 0

    def __iter__(self):
        for example in self.examples:
            self.taken += 1
            yield example


def of_shards(shards):
    for shard in shards:
        yield from shard


def doubled(example):
    return {"input_ids": [2 * token for token in example["input_ids"]]}


def of_hugging_face(shards=SHARDS):
    return IterableDataset.from_generator(of_shards, gen_kwargs={"shards": shards}).map(doubled)


def filtered():
    return of_hugging_face().filter(lambda example: len(example["input_ids"]) % 5 > 0)


def batched():
    return of_hugging_face().map(lambda columns: columns, batched=True, batch_size=7).skip(3)


def with_a_buffer_of_its_own():
    return of_hugging_face().shuffle(seed=3, buffer_size=10)


def in_memory():
    return datasets.Dataset.from_list(DATA).to_iterable_dataset(num_shards=3).with_format("numpy")


@functools.cache
def files():
    folder = tempfile.TemporaryDirectory()
    for number, shard in enumerate(SHARDS):
        text = "".join(json.dumps(example) + "\n" for example in shard)
        Path(folder.name, f"{number}.jsonl").write_text(text)
    return folder


def from_files():
    return datasets.load_dataset("json", data_files=f"{files().name}/*.jsonl", split="train", streaming=True)


STREAMS = [Plain, of_hugging_face, filtered, batched, with_a_buffer_of_its_own, in_memory, from_files]


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def collate(examples, pad_to=None):
    longest = pad_to or max(len(example["input_ids"]) for example in examples)
    rows = [[*example["input_ids"]] + [0] * (longest - len(example["input_ids"])) for example in examples]
    return {
        "input_ids": torch.tensor(np.array(rows)),
        "labels": torch.tensor([int(e["labels"]) for e in examples]),
    }


def loader(accelerator, data, size=16, **arguments):
    arguments = {"max_tokens": 256, "collate_fn": collate, "buffer_size": 20, **arguments}
    if "micro_batch_size" in arguments:
        del arguments["max_tokens"]
    return WindowLoader(data, size, accelerator=accelerator, **arguments)


def seen(windows):
    """An epoch: each window's indices, and its batches as they came."""
    return [(w.indices.tolist(), [batch["input_ids"].tolist() for batch in w.batches()]) for w in windows]


def indices(windows):
    return [window.indices.tolist() for window in windows]


def stream_of(num_examples, size, buffer_size, shuffle=True, drop_last=False):
    data = Plain(list(range(num_examples)))
    return data, Stream(
        data, size, 1, shuffle, drop_last, buffer_size, lambda found: np.ones((len(found), 1))
    )


def blocks(windows):
    """Those that its stream holds."""
    assert isinstance(windows.plan, Stream)
    return list(windows.plan.held_examples)


sizes = {"num_examples": st.integers(1, 60), "size": st.integers(1, 60), "buffer_size": st.integers(1, 70)}


# Windows


@settings(deadline=None)
@given(**sizes, shuffle=st.booleans(), epoch=st.integers(0, 2))
def test_an_epoch_is_the_stream_block_by_block_cut_into_windows(
    num_examples, size, buffer_size, shuffle, epoch
):
    size = min(size, num_examples)
    _, stream = stream_of(num_examples, size, buffer_size, shuffle)
    windows = [stream.indices(*number).tolist() for number in stream.walk(epoch, 0)]
    assert [len(window) for window in windows[:-1]] == [size] * (len(windows) - 1)
    assert 1 <= len(windows[-1]) <= size
    order = [index for window in windows for index in window]
    expected = []
    for block, first in enumerate(range(0, num_examples, buffer_size)):
        there = np.arange(first, min(first + buffer_size, num_examples))
        if shuffle:
            np.random.default_rng([1, epoch, block]).shuffle(there)
        expected += there.tolist()
    assert order == expected


@settings(deadline=None)
@given(**sizes)
def test_what_is_read_ahead_is_at_most_a_buffer_and_what_is_held_two_and_the_window(
    num_examples, size, buffer_size
):
    size = min(size, num_examples)
    (data, stream), done = stream_of(num_examples, size, buffer_size), 0
    for number in chain(stream.walk(0, 0), stream.walk(1, 0)):
        window = stream.indices(*number)
        assert stream.__getitems__(window.tolist()) == window.tolist()
        done += len(window)
        assert data.taken - done <= buffer_size
        assert sum(stream.held_examples.values()) <= size + 2 * buffer_size


@settings(deadline=None)
@given(**sizes)
def test_drop_last_leaves_out_the_partial_window(num_examples, size, buffer_size):
    size = min(size, num_examples)
    _, stream = stream_of(num_examples, size, buffer_size, drop_last=True)
    for epoch in range(2):
        windows = [stream.indices(*number) for number in stream.walk(epoch, 0)]
        assert [len(window) for window in windows] == [size] * (num_examples // size)


@pytest.mark.parametrize("make", STREAMS)
def test_each_example_comes_once_an_epoch_in_another_order_each(accelerator, make):
    windows = loader(accelerator, make())
    epochs = [seen(windows) for _ in range(3)]
    everything = [sorted(index for window, _ in epoch for index in window) for epoch in epochs]
    assert everything[0] == everything[1] == everything[2] == list(range(len(list(make()))))
    rows = [
        sorted(
            tuple(token for token in row if token) for _, window in epoch for batch in window for row in batch
        )
        for epoch in epochs
    ]
    expected = sorted(tuple(np.asarray(example["input_ids"]).tolist()) for example in make())
    assert rows[0] == rows[1] == rows[2] == expected
    assert epochs[0] != epochs[1] != epochs[2]
    assert seen(loader(accelerator, make())) == epochs[0]
    assert seen(loader(accelerator, make(), seed=1)) != epochs[0]


def test_the_windows_do_not_depend_on_the_split(accelerator):
    ways = [{"micro_batch_size": 1}, {"max_tokens": 100}, {"max_tokens": 9999}]
    runs = [indices(loader(accelerator, Plain(), **way)) for way in ways]
    assert runs[0] == runs[1] == runs[2]
    assert [len(window) for window in runs[0]] == [16, 16, 16, 5]


def test_a_buffer_of_the_whole_stream_gives_the_windows_of_the_data_set(accelerator):
    whole = loader(accelerator, DATA, buffer_size=None)
    stream = loader(accelerator, Plain(), buffer_size=53)
    assert seen(whole) == seen(stream)


def test_without_shuffling_the_order_is_the_streams(accelerator):
    windows = loader(accelerator, Plain(), shuffle=False)
    for _ in range(2):
        assert list(chain(*indices(windows))) == list(range(53))


def test_the_effective_batch_size_may_follow_the_windows_number(accelerator):
    sizes = [8, 8, 16, 4, 8, 30]
    arguments = {"size": lambda number: sizes[min(number, 5)], "buffer_size": 10}
    windows = loader(accelerator, Plain(), **arguments)
    assert [len(window) for window in indices(windows)] == [8, 8, 16, 4, 8, 9]
    state = windows.state_dict()
    second = indices(windows)
    assert [len(window) for window in second] == [30, 23]
    windows.load_state_dict(state)
    assert indices(windows) == second
    next(iter(windows))
    with pytest.raises(ValueError, match="an earlier epoch is unfinished"):
        next(iter(windows))


def test_a_stream_with_set_epoch_is_told_the_epoch_and_others_are_not_changed(accelerator):
    class Told(Plain):
        def set_epoch(self, epoch):
            self.epochs = [*getattr(self, "epochs", []), epoch]

    told, dataset = Told(), of_hugging_face()
    windows = loader(accelerator, told)
    for _ in range(2):
        indices(windows)
    assert told.epochs == [0, 1]
    windows = loader(accelerator, dataset, shuffle=False, lengths=lambda example: 1)
    orders = [[tuple(e["input_ids"]) for w in windows for e in windows.examples(w.indices)] for _ in range(4)]
    assert len({tuple(order) for order in orders}) > 1  # it has shuffled its shards
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert dataset.epoch == 0


# Lengths


def test_lengths_come_from_a_column_a_function_or_the_input_ids(accelerator):
    data = [{**example, "n": len(example["input_ids"])} for example in DATA]
    ways = [None, "n", lambda example: len(example["input_ids"])]
    runs = [seen(loader(accelerator, Plain(data), lengths=way)) for way in ways]
    assert runs[0] == runs[1] == runs[2]
    [window, *_] = loader(accelerator, Plain(data))
    assert window.tokens == sum(data[i]["n"] for i in window.indices)
    equal = loader(accelerator, Plain([{"labels": 1}] * 20), collate_fn=torch.utils.data.default_collate)
    assert [window.tokens for window in equal] == [16, 4]


def test_examples_that_are_too_large_are_said_once_and_refused_where_padding_would_cut_them(
    accelerator, caplog
):
    list(loader(accelerator, Plain(), max_tokens=50))
    assert caplog.text.count("runs alone in a micro-batch that exceeds the bound") == 1
    longest = max(range(20), key=lambda i: len(DATA[i]["input_ids"]))
    assert f"example {longest}" in caplog.text
    with pytest.raises(ValueError, match=rf"example {longest} has \d+ tokens, more than pad_to=32"):
        next(iter(loader(accelerator, Plain(), pad_to=32)))


# Going on where a run was


def places(windows, epochs=2):
    """Each window of these epochs as `seen`, and the state of the run after it."""
    found, states = [], [windows.state_dict()]
    for _ in range(epochs):
        for window in windows:
            found.append(
                (window.indices.tolist(), [batch["input_ids"].tolist() for batch in window.batches()])
            )
            states.append(json.loads(json.dumps(windows.state_dict())))
    return found, states


def random_tokens(example, random):
    return {**example, "input_ids": random.integers(1, 99, len(example["input_ids"])).tolist()}


@pytest.mark.parametrize("buffer_size", [1, 7, 16, 100])
@pytest.mark.parametrize("make", STREAMS)
def test_a_run_stopped_at_any_window_goes_on_with_exactly_the_rest(accelerator, make, buffer_size):
    arguments = {"buffer_size": buffer_size, "transform": random_tokens}
    expected, states = places(loader(accelerator, make(), **arguments))
    per_epoch = len(expected) // 2
    stops = range(len(states)) if buffer_size == 7 else range(0, len(states), 3)
    for stop in stops:
        resumed = loader(accelerator, make(), seed=77, **arguments)
        resumed.load_state_dict(states[stop])
        assert states[stop]["epoch"] == stop // per_epoch
        assert resumed.state_dict() == states[stop]
        rest = [window for _ in range(2 - stop // per_epoch) for window in seen(resumed)]
        assert rest == expected[stop:]


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_run_of_no_shuffling_or_partial_windows_goes_on_too(accelerator, drop_last):
    arguments = {"shuffle": drop_last, "drop_last": drop_last}
    expected, states = places(loader(accelerator, of_hugging_face(), **arguments))
    for stop in range(0, len(states), 2):
        resumed = loader(accelerator, of_hugging_face(), **arguments)
        resumed.load_state_dict(states[stop])
        rest = []
        while resumed.state_dict()["epoch"] < 2:
            rest += seen(resumed)
        assert rest == expected[stop:]


def test_resuming_reads_on_from_the_shard_where_it_was_and_else_from_the_beginning(accelerator):
    pulled = []

    def generate(shards):
        for shard in shards:
            for example in shard:
                pulled.append(1)
                yield example

    def make():
        return IterableDataset.from_generator(generate, gen_kwargs={"shards": SHARDS})

    windows = loader(accelerator, make(), buffer_size=8)
    *_, state = [windows.state_dict() for _, _ in zip(range(3), windows, strict=False)]
    resumed = loader(accelerator, make(), buffer_size=8)
    resumed.load_state_dict(state)
    pulled.clear()
    assert len(indices(resumed)) == 1
    assert len(pulled) == len(SHARDS[2])
    plain = Plain()
    resumed = loader(accelerator, plain, buffer_size=8)
    resumed.load_state_dict({**state, "stream": {**state["stream"], "mark": None}})
    [last] = [(blocks(resumed), len(window.indices)) for window in resumed]
    assert last == ([6], 5)  # what is before it was thrown away
    assert plain.taken == 53


def test_another_data_set_of_the_same_source_changes_nothing(accelerator):
    """What `datasets` notes of where it is, it notes in the source that they share."""
    source = of_hugging_face()
    data, held_out = source.skip(5), source.take(5)
    expected, _ = places(loader(accelerator, source.skip(5), buffer_size=4))
    windows, found, states = loader(accelerator, data, buffer_size=4), [], []
    for window in windows:
        found.append((window.indices.tolist(), [batch["input_ids"].tolist() for batch in window.batches()]))
        assert len(list(held_out)) == 5
        source.map(doubled)
        states.append(json.loads(json.dumps(windows.state_dict())))
    assert found == expected[:3]
    for stop, state in enumerate(states[:-1], start=1):
        resumed = loader(accelerator, source.skip(5), buffer_size=4)
        resumed.load_state_dict(state)
        assert seen(resumed) == expected[stop:3]


def test_going_through_the_stream_in_the_middle_of_an_epoch_changes_nothing(accelerator):
    windows, undisturbed = loader(accelerator, of_hugging_face()), loader(accelerator, of_hugging_face())
    for window, expected in zip(windows, undisturbed, strict=True):
        batches = [batch["input_ids"].tolist() for batch in window.batches()]
        assert batches == [batch["input_ids"].tolist() for batch in expected.batches()]
        passed = [index for micro_batch, _ in windows.micro_batches() for index in micro_batch.indices]
        assert sorted(passed) == list(range(53))
        tokens = [DATA[i]["input_ids"] for i in window.indices]
        assert [example["input_ids"] for example in windows.examples(window.indices)] == [
            [2 * token for token in row] for row in tokens
        ]
        assert windows.state_dict() == undisturbed.state_dict()


def sampled(windows):
    """Return the indices of the sample: each example alone, and all together."""
    alone, together, _ = windows.sample()
    return [micro_batch.indices.tolist() for micro_batch in (*alone, together)]


def test_a_model_is_tried_on_the_first_examples_with_items_apart_from_the_run(accelerator):
    data = [{**example, "labels": -100 if i < 30 else 1} for i, example in enumerate(DATA)]
    windows, undisturbed = (loader(accelerator, Plain(data), size=4, buffer_size=5) for _ in range(2))
    assert all(min(indices) >= 30 for indices in sampled(windows))
    assert blocks(windows) == [0]
    assert seen(windows) == seen(undisturbed)
    state = windows.state_dict()
    assert sampled(windows) == sampled(undisturbed)
    assert windows.state_dict() == state
    assert seen(windows) == seen(undisturbed)


def test_what_a_collate_function_does_to_an_example_is_not_there_the_next_time(accelerator):
    def popping(examples):
        return collate([{"input_ids": e.pop("input_ids"), "labels": e.pop("labels")} for e in examples])

    windows = loader(accelerator, Plain(), collate_fn=popping)
    windows.sample()
    [window, *_] = windows
    assert len(windows.examples(window.indices[:0])) == 0
    assert len(list(window.batches())) == len(window)


# What cannot be


def test_a_stream_has_no_number_of_windows(accelerator):
    windows = loader(accelerator, Plain())
    for _ in range(2):
        for _ in windows:
            with pytest.raises(
                TypeError, match=r"the length of a stream is unknown until it has been read to its end"
            ):
                len(windows)
            break
    assert len(list(windows)) == len(windows) == 4


def generator():
    yield from DATA


@pytest.mark.parametrize(
    ("data", "arguments", "said"),
    [
        (generator(), {}, "a generator can be read only once.*IterableDataset.from_generator"),
        (iter(DATA), {}, "a list_iterator can be read only once"),
        (Plain(), {"buffer_size": 0}, "buffer_size is 0; it must be an integer of at least 1"),
        (Plain(), {"buffer_size": 2.5}, "buffer_size is 2.5"),
        (DATA, {"buffer_size": 100}, "buffer_size=100 is for streams: a list has a length"),
        (
            Plain(),
            {"lengths": [1] * 53},
            "lengths is a list; for a stream it must be a column name or a function",
        ),
        (Plain(), {"num_workers": 2}, "num_workers is 2; the process itself reads a stream"),
        (Plain(), {"size": 0}, "the effective batch size is 0; it must be an integer of at least 1"),
        (Plain(), {"seed": -1}, "the seed is -1"),
        (17, {"buffer_size": None}, "or a stream of examples to iterate over; found int"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(accelerator, data, arguments, said):
    with pytest.raises(ValueError, match=said) as refused:
        loader(accelerator, data, **arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (Plain([]), "the stream gave no examples in epoch 0"),
        (Plain(DATA[:10]), "the effective batch size is 16, but the stream has 10 examples"),
    ],
)
def test_what_is_found_out_by_reading_is_said_then_in_one_line(accelerator, data, said):
    with pytest.raises(ValueError, match=said):
        list(loader(accelerator, data))


def test_a_stream_that_gives_nothing_the_second_time_is_refused(accelerator):
    class Once:
        left = iter(DATA)

        def __iter__(self):
            return self.left

    windows = loader(accelerator, Once())
    assert len(indices(windows)) == 4
    with pytest.raises(ValueError, match="no examples in epoch 1: every iteration must give the same"):
        list(windows)


def test_a_stream_that_is_split_by_process_is_refused(accelerator):
    from datasets.distributed import split_dataset_by_node

    with pytest.raises(ValueError, match=r"split by process .* give the whole stream"):
        loader(accelerator, split_dataset_by_node(of_hugging_face(), rank=0, world_size=2))


def test_a_state_of_other_data_or_another_buffer_is_refused(accelerator):
    windows = loader(accelerator, Plain())
    assert len(indices(windows)) == 4
    state = {**windows.state_dict(), "epoch": 0, "window": 3}
    state["stream"] = {**state["stream"], "examples": 48}
    with pytest.raises(ValueError, match="buffer_size is 7, but the state was saved with 20"):
        loader(accelerator, Plain(), buffer_size=7).load_state_dict(state)
    with pytest.raises(ValueError, match="the state is from a stream"):
        loader(accelerator, DATA, buffer_size=None).load_state_dict(state)
    with pytest.raises(ValueError, match="the state is from a data set with a length"):
        windows.load_state_dict({"seed": 0, "epoch": 0, "window": 1})
    for shorter in (45, 35, 17):  # in the same block, and in earlier ones
        other = loader(accelerator, Plain(DATA[:shorter]))
        other.load_state_dict(state)
        with pytest.raises(ValueError, match=f"ended after {shorter} examples, before window 3 of epoch 0"):
            list(other)


def test_what_has_gone_by_cannot_be_looked_up(accelerator):
    windows = loader(accelerator, Plain())
    first, *_ = windows
    with pytest.raises(ValueError, match=r"example \d+ is not in memory: a stream is read forward only"):
        windows.examples(first.indices)
    with pytest.raises(ValueError, match="window 0 of epoch 0 is no longer in memory"):
        windows.split(0, 0)


# Training


def head_and_stream(kind="token_classification", num=23, **arguments):
    head, accelerator = build_head(kind, "bert"), Accelerator(cpu=True)
    examples = head.examples((LENGTHS * 10)[:num])
    data = datasets.Dataset.from_list(examples).to_iterable_dataset(num_shards=2)
    arguments = {"max_tokens": 64, "collate_fn": head.collate, "buffer_size": 8, **arguments}
    return head, examples, WindowLoader(data, 10, accelerator=accelerator, **arguments)


def test_the_gradient_is_that_of_the_whole_window_also_of_the_partial_one():
    head, examples, windows = head_and_stream()
    model, optimizer = windows.accelerator.prepare(head.model, RecordGradients(head.model))
    handed_out = []
    for window in windows:
        for batch in window:
            with windows.accelerator.accumulate(model):
                windows.accelerator.backward(window.weigh(model(**batch).loss))
                optimizer.step()
                optimizer.zero_grad()
        handed_out.append(window)
    assert [len(window.indices) for window in handed_out] == [10, 10, 3]
    assert max(len(window) for window in handed_out) > 1
    for window, gradient in zip(handed_out, optimizer.optimizer.gradients, strict=True):
        batch = head.collate([examples[i] for i in window.indices])
        assert relative_error(gradient, whole_window_gradient(head.model, batch)) < EXACT
        with torch.no_grad():
            assert window.loss == pytest.approx(float(head.model(**batch).loss), rel=1e-5)


def test_a_window_that_does_not_fit_the_memory_is_run_again_where_its_stream_has_read_on():
    head, examples, windows = head_and_stream(max_tokens=200)

    def check(module, inputs, named):
        if named["input_ids"].numel() > 60:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    head.model.register_forward_pre_hook(check, with_kwargs=True)
    model, optimizer = windows.accelerator.prepare(head.model, RecordGradients(head.model))
    seen = []
    for window in windows:
        while not window.done:
            with retry_on_oom(window, model, optimizer):
                for batch in window:
                    with windows.accelerator.accumulate(model):
                        windows.accelerator.backward(window.weigh(model(**batch).loss))
                        optimizer.step()
                        optimizer.zero_grad()
        seen.append(window.indices.tolist())
    assert windows.replays > 0
    assert sorted(chain(*seen)) == list(range(23))
    untouched = build_head("token_classification", "bert")
    for window, gradient in zip(seen, optimizer.optimizer.gradients, strict=True):
        batch = untouched.collate([examples[i] for i in window])
        assert relative_error(gradient, whole_window_gradient(untouched.model, batch)) < EXACT


@pytest.mark.parametrize("tune", [False, True])
def test_a_stream_is_fine_tuned_for_two_epochs_evaluated_and_saved(tmp_path, capsys, tune):
    head, examples, windows = head_and_stream("sequence_classification", num=125, max_tokens=400)
    *_, validation = head_and_stream("sequence_classification", shuffle=False)
    labels = []

    def validate(model):
        found = evaluate(model, validation, accelerator=windows.accelerator)
        labels.append([int(label) for label in found.references])
        return {"loss": found.loss}

    summary = fine_tune(
        head.model,
        torch.optim.AdamW(head.model.parameters(), lr=1e-3),
        windows,
        accelerator=windows.accelerator,
        epochs=2,
        validate=validate,
        eval_every=10,
        tune=tune,
        output_dir=tmp_path,
    )
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["examples"] for row in rows] == 2 * [*12 * [10], 5]
    assert summary["examples"] == 250
    assert sum(map(len, summary["first_window"])) == 10
    assert (summary["tuning"] is not None) == tune
    assert not tune or summary["tuning"]["trials"]
    assert labels == 3 * [[example["labels"] for example in examples[:23]]]
    assert (tmp_path / "last/model.safetensors").exists()
    said = [
        line.split(" · ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("window")
    ]
    assert said == [f"window {window}" for window in (*range(1, 11), 20)]
    assert windows.state_dict()["epoch"] == 2


def test_max_windows_ends_a_run_on_a_stream_without_an_end():
    head, examples, windows = head_and_stream("sequence_classification")

    class Endless:
        def __iter__(self):
            while True:
                yield from examples

    windows = WindowLoader(
        Endless(), 10, accelerator=windows.accelerator, collate_fn=head.collate, max_tokens=64
    )
    optimizer = torch.optim.AdamW(head.model.parameters(), lr=1e-3)
    summary = fine_tune(head.model, optimizer, windows, accelerator=windows.accelerator, max_windows=4)
    assert summary["windows"] == 4
    assert windows.state_dict()["window"] == 4


def test_a_model_is_verified_and_diagnosed_on_a_stream():
    head, _, windows = head_and_stream("sequence_classification", micro_batch_size=3, max_tokens=None)
    assert verify(head.model, windows, num_windows=3, trainer=False).exact
    assert blocks(windows) == [0, 1]  # what the next window needs
    assert indices(windows) == indices(head_and_stream("sequence_classification")[2])
    head, _, windows = head_and_stream(
        "question_answering", micro_batch_size=3, max_tokens=None, num_items="labels"
    )
    found = verify(head.model, windows, num_windows=3, trainer=False)
    assert not found.exact
    assert "padding" in found.verdict


def test_drop_last_says_how_many_examples_it_drops(accelerator, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(indices(loader(accelerator, Plain(), drop_last=True))) == 3
    assert "drop_last: 5 of 53 examples are left out of each epoch" in caplog.text
