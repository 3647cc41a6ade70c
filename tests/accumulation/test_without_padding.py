"""Windows that are split for a model without padding: by real tokens, in the order of the window."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import BertConfig, BertForSequenceClassification

from gradacc_hf import WindowLoader, remove_padding
from gradacc_hf.accumulation.memory_model import MicroBatchMemory
from gradacc_hf.accumulation.padding_layout import padding_layout
from gradacc_hf.accumulation.reference import EXACT, read_gradient, relative_error, whole_window_gradient
from gradacc_hf.accumulation.splitting import Bound, Cost, split_without_padding
from gradacc_hf.verification.tiny_models import build_head

MEMORY = MicroBatchMemory(
    parameters=100,
    gradients=100,
    optimizer=200,
    exponents=np.array([[1, 1], [1, 2]]),
    activations=np.array([[3.0, 0.1], [1.0, 0.2]]),
    loss=np.array([[0.0, 0.0], [0.5, 0.0]]),
    layers=np.array([[2.0, 0.0], [0.5, 0.1]]),
    attention=np.array([[0.5, 0.1], [0.0, 0.1]]),
    group_cost=2000.0,
)
BOUNDS = {
    "tokens": Bound(max_tokens=256),
    "examples": Bound(micro_batch_size=7),
    "bytes": Bound(max_bytes=3_000, memory=MEMORY),
}


@pytest.mark.parametrize("num_processes", [1, 3])
@pytest.mark.parametrize("bound", BOUNDS)
def test_few_micro_batches_of_about_equal_size_keep_the_bound(bound, num_processes):
    tokens = np.random.default_rng(0).integers(1, 90, (96, 1))
    processes = split_without_padding(tokens, BOUNDS[bound], num_processes)
    split = [positions for process in processes for positions in process]
    assert sorted(np.concatenate(split)) == list(range(96))
    assert all((np.diff(positions) > 0).all() for positions in split), "in the order of the window"
    shares = BOUNDS[bound].shares(tokens)
    sums = [shares[positions].sum() for positions in split]
    assert max(sums) <= 1 + 1e-9
    assert len(split) <= np.ceil(shares.sum()) + 2 * num_processes
    totals = [sum(int(tokens[positions].sum()) for positions in process) for process in processes]
    assert max(totals) <= 1.1 * sum(totals) / num_processes


def test_an_example_beyond_the_bound_is_alone():
    split = split_without_padding(np.array([[10], [500], [10]]), Bound(max_tokens=100))
    assert [positions.tolist() for positions in split[0]] == [[1], [0, 2]]
    assert split_without_padding(np.zeros((0, 1), int), Bound(max_tokens=100), 2) == [[], []]


def test_bytes_of_a_micro_batch_are_at_most_the_bytes_of_the_bound():
    tokens = np.random.default_rng(1).integers(1, 60, (64, 1))
    for positions in split_without_padding(tokens, BOUNDS["bytes"])[0]:
        assert MEMORY.bytes_without_padding(tokens[positions]) <= 3_000
    alone = tokens[:1]
    assert MEMORY.bytes_without_padding(alone) == MEMORY.bytes(1, alone[0])
    assert MEMORY.bytes_without_padding(np.repeat(alone, 9, axis=0)) == MEMORY.bytes(9, alone[0])


@pytest.mark.parametrize("group_cost", [0.0, 2_000.0, 500_000.0])
def test_bytes_without_padding_are_those_of_examples_groups_and_the_padded_rest(group_cost):
    """Attention is at most the sum over the groups of a layout, and at least the sum over examples."""
    lengths = np.random.default_rng(2).integers(1, 200, 40)
    memory = replace(MEMORY, group_cost=group_cost)
    mask = torch.arange(lengths.max()) < torch.from_numpy(lengths)[:, None]
    layout = padding_layout(mask, Cost(fixed=max(group_cost, 1e-9), quadratic=1.0))

    def by(rows):
        examples = [(1, length) for length in lengths]
        real, grouped = (sum(memory.terms(*row) for row in found) for found in (examples, rows))
        padded, rest = memory.terms(40, lengths.max()), memory.activations - memory.layers - memory.attention
        held = (rest + memory.loss) @ padded + memory.layers @ real + memory.attention @ grouped
        return memory.resident + held.max()

    predicted = memory.bytes_without_padding(lengths[:, None])
    assert by(layout.groups) <= predicted + 1 <= memory.bytes(40, lengths.max()) + 1
    assert predicted <= (1.1 if group_cost < 1e5 else 1.4) * by(layout.groups)


@pytest.mark.parametrize("bound", ["tokens", "bytes"])
def test_what_stays_padded_keeps_twice_the_bound_beside_a_long_example(bound):
    bound = {"tokens": Bound(max_tokens=4096), "bytes": Bound(max_bytes=1_000_000, memory=MEMORY)}[bound]
    tokens = np.array([100] * 63 + [2000])[:, None]
    split = split_without_padding(tokens, bound)[0]
    assert max(len(rows) / bound.max_rows(tokens[rows].max()) for rows in split) <= 2
    assert len(split) <= np.ceil(bound.shares(tokens).sum()) + 1


def test_the_predicted_cost_is_the_sum_over_examples():
    examples = [{"input_ids": torch.ones(n, dtype=torch.long), "labels": torch.tensor(0)} for n in (2, 200)]
    settings = {"accelerator": Accelerator(cpu=True), "collate_fn": collate, "max_tokens": 1000}
    windows = WindowLoader(examples, 2, padding_free=True, **settings)
    expected = windows.cost(1, 2) + windows.cost(1, 200) - windows.cost.fixed
    assert windows.predicted_cost(windows.split(0, 0)) == pytest.approx(expected)


def collate(examples):
    ids = torch.nn.utils.rnn.pad_sequence([example["input_ids"] for example in examples], True)
    labels = torch.stack([example["labels"] for example in examples])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


@pytest.mark.parametrize("pad_to", ["nothing", "window", 300])
def test_another_padding_than_that_of_micro_batches_is_refused(pad_to):
    examples = [{"input_ids": torch.ones(n, dtype=torch.long), "labels": torch.tensor(0)} for n in (2, 200)]
    settings = {"collate_fn": lambda examples, pad_to=None: collate(examples), "max_tokens": 1000}
    settings |= {"accelerator": Accelerator(cpu=True), "pad_to": pad_to}
    with pytest.raises(ValueError, match=f"pad_to is {pad_to!r}; allowed with padding_free=True: 'micro_"):
        WindowLoader(examples, 2, padding_free=True, **settings)
    with pytest.raises(ValueError, match="allowed with padding_free=True"):
        WindowLoader(examples, 2, **settings).without_padding()


@pytest.mark.parametrize("noise_every", [0, 1])
def test_a_window_without_padding_has_the_gradient_of_the_padded_window(noise_every):
    torch.manual_seed(0)
    small = {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**small, intermediate_size=16, num_labels=3)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = BertForSequenceClassification(config)
    padded = BertForSequenceClassification(config)
    padded.load_state_dict(model.state_dict())
    lengths = torch.randint(3, 60, (64,)).tolist()
    examples = [
        {"input_ids": torch.randint(1, 100, (n,)), "labels": torch.tensor(i % 3)}
        for i, n in enumerate(lengths)
    ]
    remove_padding(model, collate(examples[:8]))
    accelerator = Accelerator(cpu=True)
    settings = {"accelerator": accelerator, "collate_fn": collate, "max_tokens": 256}
    windows = WindowLoader(examples, 32, padding_free=True, noise_every=noise_every, **settings)
    for window in windows:
        sizes = [int(each.batch["attention_mask"].sum()) for each in window.micro_batches]
        assert max(sizes) <= 256
        assert window.padded_tokens == window.tokens == sum(sizes)
        model.zero_grad()
        for batch in window:
            with accelerator.accumulate(model):
                accelerator.backward(window.weigh(model(**batch).loss))
        whole = whole_window_gradient(padded, collate([examples[i] for i in window.indices]))
        assert relative_error(read_gradient(model), whole) <= EXACT
        assert window.measures_noise == bool(noise_every)


def test_the_loader_hands_over_the_layouts_of_inputs_and_targets(monkeypatch):
    head = build_head("seq2seq_lm", "bart")
    padded = copy.deepcopy(head.model)
    examples = head.examples([17, 9, 30, 12])
    remove_padding(head.model, head.collate(examples))
    settings = {"accelerator": Accelerator(cpu=True), "collate_fn": head.collate, "max_tokens": 1000}
    [window] = WindowLoader(examples, 4, padding_free=True, **settings)
    assert window.micro_batches[0].layouts.keys() == {"attention_mask", "labels"}
    monkeypatch.setattr("gradacc_hf.padding.hooks.padding_layout", None)  # a call would fail
    for batch in window:
        assert batch["labels"].shape != batch["input_ids"].shape
        with settings["accelerator"].accumulate(head.model):
            settings["accelerator"].backward(window.weigh(head.model(**batch).loss))
    whole = whole_window_gradient(padded, head.collate(examples))
    assert relative_error(read_gradient(head.model), whole) <= EXACT
