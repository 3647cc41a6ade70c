"""Noise scales are those of problems solved in closed form; sizes that change leave nothing inexact."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from checkpointed_runs import cut_back, history_without_seconds, same_weights
from datasets import Dataset
from recipe_runs import load_recipe, write_rows
from training_runs import history

from gradacc_hf import WindowLoader, evaluate, fine_tune, train
from gradacc_hf.accumulation.accelerate_state import reset_accelerate
from gradacc_hf.accumulation.batch_schedule import GrowingBatch, ScheduledBatch, lr_factor
from gradacc_hf.accumulation.gradient_cache import ContrastiveLoss
from gradacc_hf.accumulation.noise_scale import CONFIDENCE, NoiseScale, SmallBatch, in_words
from gradacc_hf.accumulation.reference import EXACT, RecordGradients, relative_error, whole_window_gradient
from gradacc_hf.accumulation.sampler import WindowPlan
from gradacc_hf.config.batch_size import check_can_measure, check_sizes, effective_batch_size
from gradacc_hf.config.parser import read_command_line
from gradacc_hf.errors import InputError
from gradacc_hf.padding.removal import remove_padding
from gradacc_hf.report import write_report
from gradacc_hf.run.setup import noise_every
from gradacc_hf.tasks.packing import pack
from gradacc_hf.training.checkpoint import Checkpoints, newest_checkpoint
from gradacc_hf.training.optimizer import make_scheduler
from gradacc_hf.training.settings import OptimConfig
from gradacc_hf.training.update_ratio import UpdateRatio
from gradacc_hf.verification.tiny_models import build_head

LENGTHS = np.random.default_rng(5).integers(3, 40, size=61).tolist()


class Mean(torch.nn.Module):
    """½‖w − x‖² for each example, which has one item or several: the gradient is w − x."""

    def __init__(self, w):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(w, dtype=torch.float32))

    def forward(self, x, labels):
        items = (labels != -100).sum(1)
        losses = 0.5 * (self.w - x).square().sum(1)
        return SimpleNamespace(loss=(losses * items).sum() / items.sum())


def closed_form(unequal_items):
    """Examples whose gradient goes with their length, weights that are not learned, and tr(Σ) / |G|²."""
    random = np.random.default_rng(0)
    lengths = random.integers(5, 60, size=4096)
    x = random.normal(size=(len(lengths), 16)).astype(np.float32)
    x[:, 0] += (lengths - 30) / 10
    items = random.integers(1, 6, size=len(x)) if unequal_items else np.ones(len(x), int)
    w = x.mean(0) + 0.4
    per_example = (w - x) * items[:, None] / items.mean()
    gradient = per_example.mean(0)
    noise = per_example - gradient * (items / items.mean())[:, None]  # of a mean over items
    labels = [[1] * n + [-100] * (5 - n) for n in items]
    data = [
        {"x": row, "labels": torch.tensor(label)} for row, label in zip(torch.tensor(x), labels, strict=True)
    ]
    return data, lengths, w, float(noise.var(0).sum() / np.square(gradient).sum())


@pytest.mark.parametrize("unequal_items", [False, True])
def test_the_noise_scale_is_that_of_the_closed_form_within_10_percent_though_the_split_is_by_length(
    unequal_items,
):
    data, lengths, w, truth = closed_form(unequal_items)
    accelerator = Accelerator(cpu=True)
    model = Mean(w)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    windows = WindowLoader(
        data, 64, accelerator=accelerator, lengths=lengths, max_tokens=600, noise_every=2,
        num_items="labels" if unequal_items else lambda batch: len(batch["x"]),
    )  # fmt: skip
    windows.noise = NoiseScale(horizon=math.inf)
    records = train(model, optimizer, windows, accelerator=accelerator, epochs=99, max_windows=500)
    assert windows.noise.measured == 250
    assert abs(windows.noise.scale / truth - 1) < 0.1
    assert records[-1].noise_scale == windows.noise.scale


def test_the_first_micro_batch_of_a_split_by_length_would_not_do():
    data, lengths, w, truth = closed_form(unequal_items=False)
    windows = WindowLoader(data, 64, accelerator=Accelerator(cpu=True), lengths=lengths, max_tokens=600)
    x, noise = torch.stack([example["x"] for example in data]).numpy(), NoiseScale(horizon=math.inf)
    for t in range(len(windows)):
        split = windows.split(0, t)
        first, whole = (
            np.linalg.norm((w - x[part]).mean(0)) for part in (split.processes[0][0], split.indices)
        )
        noise.record(64, whole, SmallBatch(len(split.processes[0][0]), first))
    assert abs(noise.scale / truth - 1) > 0.3


@pytest.fixture(scope="module")
def classifier():
    """A classifier in float64 without padding, examples with labels by length, and their gradients."""
    head = build_head("sequence_classification", "bert")
    examples = head.examples(LENGTHS * 2)
    for example in examples:
        example["labels"] = torch.tensor(min(len(example["input_ids"]) // 13, 2))
    model = head.model.double()
    gradients = [read_gradient_of(model, head.collate([example])) for example in examples]
    remove_padding(model, head.collate(examples[:8]))
    return head, model, examples, torch.stack(gradients).numpy()


def read_gradient_of(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def windows_of(classifier, **settings):
    head, _, examples, _ = classifier
    shared = {"accelerator": Accelerator(cpu=True), "collate_fn": head.collate, "num_items": head.num_items}
    return WindowLoader(examples, 32, **shared, **settings)


@pytest.mark.parametrize("max_tokens", [400, 150])
def test_windows_without_padding_give_the_exact_noise_of_the_gradients_of_examples(classifier, max_tokens):
    """The mean of tr(Σ) over many splits. By length, or up to a number of tokens, it is biased."""
    gradients = classifier[-1]
    truth, products = float(gradients.var(0, ddof=1).sum()), gradients @ gradients.T

    def noise(part, whole):
        squares = [products[np.ix_(some, some)].mean() for some in (part, whole)]
        return (squares[0] - squares[1]) / (1 / len(part) - 1 / len(whole))

    def difference(windows, first):
        """Return the mean difference from the truth, in standard errors."""
        splits = [windows.split(epoch, window) for epoch in range(300) for window in range(3)]
        found = [noise(np.concatenate(split.processes[0][: first(split)]), split.indices) for split in splits]
        return (np.mean(found) - truth) / (np.std(found) / math.sqrt(len(found)))

    windows = windows_of(classifier, max_tokens=max_tokens, padding_free=True, noise_every=1)
    assert abs(difference(windows, lambda split: split.noise_micro_batches)) < 3
    by_length = windows_of(classifier, max_tokens=max_tokens)
    assert abs(difference(by_length, lambda split: 1)) > 10
    if max_tokens == 150:
        by_tokens = windows_of(classifier, max_tokens=max_tokens, padding_free=True)
        assert abs(difference(by_tokens, lambda split: 1)) > 10


def test_windows_without_padding_measure_the_gradient_of_their_random_part(classifier):
    _, model, _, gradients = classifier
    windows = windows_of(classifier, max_tokens=150, padding_free=True, noise_every=1)
    model, _ = windows.accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    for window in windows:
        model.zero_grad()
        for batch in window:
            with windows.accelerator.accumulate(model):
                windows.accelerator.backward(window.weigh(model(**batch).loss))
        part = np.concatenate(window.split.plan.processes[0][: window.split.plan.noise_micro_batches])
        assert window.small.examples == len(part)
        assert window.small.grad_norm == pytest.approx(np.linalg.norm(gradients[part].mean(0)), rel=1e-6)
    single = windows_of(classifier, max_tokens=4000, padding_free=True, noise_every=2)
    assert [single.split(0, window).measures_noise for window in range(4)] == [True, False, True, False]


def test_a_noise_scale_follows_what_changes_and_forgets_what_was():
    noise, again = NoiseScale(horizon=8), NoiseScale()
    for number in range(400):
        signal = 1.0 if number < 200 else 0.01  # |G|²; tr(Σ) is 10
        small = SmallBatch(4, math.sqrt(signal + 10 / 4)) if number % 4 == 0 else None
        noise.record(32, math.sqrt(signal + 10 / 32), small)
        if number == 199:
            assert abs(noise.scale - 10) < 1e-3
    assert abs(noise.scale / 1000 - 1) < 0.05
    assert NoiseScale.of(json.loads(json.dumps(noise.state_dict()))) == noise
    assert math.isnan(again.scale)
    again.record(32, math.nan, SmallBatch(4, 1.0))  # a window that took no step says nothing
    assert math.isnan(again.scale)
    again.record(32, 1.0, SmallBatch(4, 3.0))
    assert again.scale == math.inf  # all of the gradient may be noise


@pytest.mark.parametrize(
    ("kind", "model_type", "settings"),
    [
        ("token_classification", "bert", {"max_tokens": 96}),
        ("token_classification", "bert", {"micro_batch_size": 2}),
        ("token_classification", "bert", {"max_tokens": 96, "num_workers": 1}),
        ("token_classification", "bert", {"max_tokens": 96, "leave_out": [3, 17, 30]}),
        ("question_answering", "bert", {"max_tokens": 200, "pad_to": "window"}),
        ("causal_lm", "llama", {"max_tokens": 96, "pad_to": "nothing", "collate_fn": pack}),
    ],
)
def test_a_window_that_measures_is_exact_and_keeps_its_bound(kind, model_type, settings):
    head, untouched = build_head(kind, model_type), build_head(kind, model_type)
    examples, accelerator = head.examples(LENGTHS), Accelerator(cpu=True)
    settings = {"collate_fn": head.collate, "num_items": head.num_items, **settings}
    windows = WindowLoader(examples, 20, accelerator=accelerator, noise_every=2, **settings)
    model, optimizer = accelerator.prepare(head.model, RecordGradients(head.model))
    train(model, optimizer, windows, accelerator=accelerator)
    for t, gradient in enumerate(optimizer.optimizer.gradients):
        split = windows.split(0, t)
        batch = untouched.collate([examples[i] for i in split.indices])
        assert relative_error(gradient, whole_window_gradient(untouched.model, batch)) < EXACT
        assert split.measures_noise == (t in (0, 2))
        pieces = split.processes[0]
        assert sorted(np.concatenate(pieces)) == sorted(split.indices)
        for piece in pieces:
            rows, [tokens] = windows.shape(piece, split.pad_to)
            most = settings.get("micro_batch_size")
            assert len(piece) <= most if most else rows * tokens <= settings["max_tokens"] or len(piece) == 1
    assert windows.noise.measured == 2


def test_a_loop_of_one_s_own_tells_the_loader_of_its_gradients():
    """As the README says: with what `clip_grad_norm_` gave, in the window's body."""
    head, accelerator = build_head("sequence_classification", "bert"), Accelerator(cpu=True)
    windows = WindowLoader(
        head.examples(LENGTHS), 16, accelerator=accelerator, collate_fn=head.collate, max_tokens=96,
        noise_every=1,
    )  # fmt: skip
    model, optimizer = accelerator.prepare(head.model, torch.optim.SGD(head.model.parameters(), lr=0.1))
    for window in windows:
        for batch in window:
            with accelerator.accumulate(model):
                accelerator.backward(window.weigh(model(**batch).loss))
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        windows.record_gradient_norm(window, norm)
    assert windows.noise.measured == 4
    assert type(windows.noise.scale) is float
    assert json.loads(json.dumps(windows.state_dict())) == windows.state_dict()


def test_the_random_part_is_as_large_whatever_is_drawn():
    lengths = [2] * 200 + [90] * 20
    windows = WindowLoader(
        [{"x": 0}] * 220, 110, accelerator=Accelerator(cpu=True), lengths=lengths, max_tokens=400,
        noise_every=1,
    )  # fmt: skip
    sizes = {len(windows.split(epoch, t).processes[0][0]) for epoch in range(20) for t in range(2)}
    assert sizes == {4}  # of 90 tokens each, where 13 would be an eighth
    tiny = WindowLoader(
        [{"x": 0}] * 9, 4, accelerator=Accelerator(cpu=True), micro_batch_size=4, noise_every=1
    )
    assert [len(tiny.split(0, t).processes[0][0]) for t in range(3)] == [2, 2, 1]
    assert [tiny.split(0, t).measures_noise for t in range(3)] == [True, True, False]


# Sizes that change


def test_sizes_by_window_are_those_asked_for_and_say_so():
    sizes = ScheduledBatch({0: 4, 3: 8, 5: 16})
    data = [{"x": i, "labels": 0} for i in range(40)]
    windows = WindowLoader(data, sizes, accelerator=Accelerator(cpu=True), max_tokens=8)
    assert [len(w.indices) for w in windows] == [4, 4, 4, 8, 8, 12]
    assert [len(w.indices) for w in windows] == [16, 16, 8]
    assert str(sizes) == "4 examples a window, after 3 windows 8, after 5 windows 16"
    assert windows.plan.examples_before(1, 2) == 72
    assert windows.plan.examples_of(8) == 72


def test_a_growing_batch_doubles_when_the_noise_is_as_large_and_stops_at_the_largest():
    sizes, noise = GrowingBatch(4, 14, patience=2), NoiseScale()
    noise.record(4, 1.0, SmallBatch(1, 3.0))  # beyond measure
    grew = [sizes.grow(number, noise.scale) for number in range(1, 8)]
    assert grew == [False, True] * 2 + [False] * 3
    assert [sizes(n) for n in range(6)] == [4, 4, 8, 8, 14, 14]
    calm = NoiseScale()
    calm.record(4, 1.0, SmallBatch(1, 1.01))
    assert not GrowingBatch(4, 14, patience=1).grow(1, calm.scale)
    twice, seen = GrowingBatch(4, 14, patience=2), [noise, calm, noise, noise]  # in a row
    assert [twice.grow(n, each.scale) for n, each in enumerate(seen)] == [False] * 3 + [True]
    with pytest.raises(ValueError, match="smallest 8 and largest 4"):
        GrowingBatch(8, 4)


def grown(folder, resume=None, num_workers=0, streamed=False, lengths=LENGTHS):
    """A tiny BERT with dropout whose windows grow from 4 to 16 examples over two epochs."""
    reset_accelerate()
    accelerator, head = Accelerator(cpu=True), build_head("sequence_classification", "bert")
    for module in head.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    data = head.examples(lengths)
    data = Dataset.from_list(data).to_iterable_dataset() if streamed else data
    windows = WindowLoader(
        data, GrowingBatch(4, 16), accelerator=accelerator, collate_fn=head.collate, max_tokens=96,
        noise_every=1, num_workers=num_workers,
    )  # fmt: skip
    optimizer, scheduler = torch.optim.AdamW(head.model.parameters(), lr=1e-3), None

    def validate(model):
        return {"loss": 0.0 if streamed else evaluate(model, windows, accelerator=accelerator).loss}

    if not streamed:
        scaling = OptimConfig(lr_scaling="linear", lr_reference_batch=4, warmup_ratio=0.25)
        scheduler = make_scheduler(optimizer, scaling, windows, len(windows))
    if resume is not None:
        resume = newest_checkpoint(resume, accelerator)
    torch.manual_seed(3)
    summary = fine_tune(
        head.model, optimizer, windows, accelerator=accelerator, scheduler=scheduler, epochs=2,
        validate=validate, output_dir=folder, checkpoints=Checkpoints(every=1, keep=99, resume_from=resume),
    )  # fmt: skip
    return head.model, summary, windows


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grown") / "whole"
    return *grown(folder), folder


def test_windows_grow_with_the_noise_and_each_example_comes_once_an_epoch(whole):
    _, summary, windows, folder = whole
    sizes = [row["examples"] for row in history(folder)]
    assert sizes[:4] == [4, 4, 4, 4]
    assert {8, 16} < set(sizes)
    assert summary["examples"] == sum(sizes) == 2 * len(LENGTHS)
    indices = [windows.plan.indices(0, t) for t in range(windows.plan.num_windows(0))]
    assert sorted(np.concatenate(indices)) == list(range(len(LENGTHS)))
    assert [len(window) for window in indices] == sizes[: len(indices)]


def test_the_rate_warms_up_and_decays_by_examples_and_follows_the_size(whole):
    _, _, windows, folder = whole
    rows = history(folder)
    before = [0, *itertools.accumulate(row["examples"] for row in rows)]
    total = WindowLoader(
        [{}] * len(LENGTHS), GrowingBatch(4, 16), accelerator=Accelerator(cpu=True), max_tokens=1
    ).plan.examples_of(16)
    asked = GrowingBatch(4, 16, sizes=windows.plan.effective_batch_size.sizes)
    warmup = math.ceil(0.25 * total)
    for t, row in enumerate(rows):
        done = before[t]
        shape = done / warmup if done < warmup else (total - done) / (total - warmup)
        assert row["lr"] == pytest.approx(1e-3 * max(0, shape) * asked(t) / 4), t


@pytest.mark.parametrize("window", [2, 5, 8])
def test_a_run_that_grows_goes_on_as_if_it_had_not_been_stopped(whole, tmp_path, window):
    model, _, _, folder = whole
    again, _, _ = grown(killed := cut_back(folder, tmp_path / "run", window), resume=killed)
    assert same_weights(model, again)
    assert history_without_seconds(killed) == history_without_seconds(folder)


def test_workers_that_have_windows_ready_grow_too(whole, tmp_path):
    model, _, _ = grown(tmp_path / "workers", num_workers=2)
    assert same_weights(model, whole[0])


def test_windows_of_a_stream_grow_too(tmp_path):
    _, summary, _ = grown(tmp_path / "streamed", streamed=True)
    sizes = [row["examples"] for row in history(tmp_path / "streamed")]
    assert sum(sizes) == summary["examples"] == 2 * len(LENGTHS)
    assert sizes.count(16) > 1


def test_a_rate_for_another_size_follows_by_rule():
    assert lr_factor("none", 64, 16) == 1
    assert lr_factor("linear", 64, 16) == 4
    assert lr_factor("sqrt", 64, 16) == 2
    model = torch.nn.Linear(1, 1)
    windows = WindowLoader([{}] * 32, 8, accelerator=Accelerator(cpu=True), max_tokens=8)
    optim = OptimConfig(lr=1e-3, lr_scaling="sqrt", lr_reference_batch=2, scheduler="constant")
    optimizer = torch.optim.SGD(model.parameters(), lr=optim.lr)
    make_scheduler(optimizer, optim, windows, 4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-3)


@pytest.mark.parametrize("drop_last", [False, True])
def test_sizes_beyond_the_data_are_all_of_it(drop_last):
    windows = WindowLoader(
        [{"labels": 0}] * 40, ScheduledBatch({0: 8, 3: 4096}), accelerator=Accelerator(cpu=True),
        max_tokens=99, drop_last=drop_last,
    )  # fmt: skip
    assert [
        windows.plan.size(epoch, t) for epoch in range(3) for t in range(windows.plan.num_windows(epoch))
    ] == ([8, 8, 8, 40, 40] if drop_last else [8, 8, 8, 16, 40, 40])
    assert windows.plan.size_asked(0, 3) == 40
    assert windows.plan.examples_of(5) == (104 if drop_last else 80)


def test_the_rate_follows_the_size_after_a_window_that_took_no_step():
    """The first window of 8 is not to be trained with the rate of windows of 2."""
    torch.manual_seed(0)
    x = torch.randn(24, 3)
    x[2] = math.nan  # in the second window of 2
    data = [{"x": row, "labels": torch.tensor([1])} for row in x]
    accelerator = Accelerator(cpu=True)
    windows = WindowLoader(
        data, ScheduledBatch({0: 2, 2: 8}), accelerator=accelerator, max_tokens=99, shuffle=False
    )
    model = Mean(np.zeros(3))
    optim = OptimConfig(lr=1e-3, scheduler="constant", lr_scaling="linear", lr_reference_batch=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=optim.lr)
    scheduler = make_scheduler(optimizer, optim, windows, len(windows))
    model, optimizer = accelerator.prepare(model, optimizer)
    records = list(
        train(model, optimizer, windows, accelerator=accelerator, scheduler=scheduler, on_nonfinite="skip")
    )
    assert [record.skipped for record in records][:3] == [False, True, False]
    assert [record.lr for record in records][:3] == pytest.approx([1e-3, 1e-3, 4e-3])


def test_trying_a_model_out_cuts_windows_even_where_the_first_measures_noise():
    windows = WindowLoader(
        [{"labels": 0}] * 40, 12, accelerator=Accelerator(cpu=True), max_tokens=99, noise_every=1
    )
    assert [len(window) for window in windows.copy(2)][:2] == [3, 3]


# What a person asks for, and is told


def test_sizes_come_from_a_file_or_a_flag(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("batch:\n  effective: {0: 32, 500: 64}\n")
    told = read_command_line(["--config", str(config), "--data.train", "x.csv"])
    assert told.batch.effective == {0: 32, 500: 64}
    assert effective_batch_size(told.batch, 64)(500) == 64
    with pytest.raises(
        InputError, match=r"batch\.effective: found 64; allowed: 1 to 63, the number of training examples"
    ):
        effective_batch_size(told.batch, 63)
    told = read_command_line(["--batch.effective", "{0: 8, 9: 16}", "--data.train", "x.csv"])
    assert told.batch.effective == {0: 8, 9: 16}
    grows = ["--batch.effective", "noise_scale", "--batch.smallest", "8", "--batch.largest", "32"]
    told = read_command_line([*grows, "--data.train", "x.csv"])
    assert effective_batch_size(told.batch, 99) == GrowingBatch(8, 32)
    assert effective_batch_size(told.batch, 20) == GrowingBatch(8, 20)
    with pytest.raises(
        InputError, match=r"batch\.smallest: found 8; allowed: 1 to 7, the number of training examples"
    ):
        effective_batch_size(told.batch, 7)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--batch.effective", "{5: 32}"], "--batch.effective: found {5: 32}, allowed is sizes of 1 or more"),
        (["--batch.effective", "{0: 0}"], "--batch.effective: found {0: 0}, allowed is sizes of 1 or more"),
        (["--batch.effective", "{0: many}"], "--batch.effective: found '{0: many}', allowed"),
        (["--batch.effective", "noise"], "or noise_scale"),
        (["--batch.largest", "8"], "--batch.largest: found 8, allowed is batch.smallest (16) or more"),
        (["--batch.smallest", "8"], "allowed is 16, its default, unless batch.effective is noise_scale"),
        (["--optim.lr_scaling", "sqrt"], "--optim.lr_reference_batch (not set): found null"),
        (["--optim.lr_reference_batch", "8"], "found 8, allowed is null without lr_scaling"),
        (["--train.noise_every", "-1"], "found -1, allowed is null, 0 windows (off) or more"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_are_refused_in_a_line(flags, says):
    with pytest.raises(InputError) as error:
        read_command_line([*flags, "--data.train", "x.csv"])
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_growing_windows_need_a_part_of_each_process_to_measure_by():
    check_can_measure(GrowingBatch(16, 32), True, 8)
    with pytest.raises(InputError, match=r"batch\.smallest: found 15; allowed: 16 or more on 8 processes"):
        check_can_measure(GrowingBatch(15, 32), True, 8)
    with pytest.raises(InputError, match=r"budget\.whole_gradients, nor with a loss over a whole window"):
        check_can_measure(GrowingBatch(16, 32), False, 8)


def test_growing_windows_need_measurements_and_an_end():
    grows = ["--data.train", "x.csv", "--batch.effective", "noise_scale"]
    with pytest.raises(InputError, match=r"train\.noise_every: found 0 with batch\.effective noise_scale"):
        check_sizes(read_command_line([*grows, "--train.noise_every", "0"]))
    with pytest.raises(InputError, match=r"train\.max_windows: found 9 with batch\.effective noise_scale"):
        check_sizes(read_command_line([*grows, "--train.max_windows", "9"]))
    check_sizes(read_command_line([*grows, "--train.max_windows", "9", "--optim.scheduler", "constant"]))


def test_a_loss_of_the_whole_window_has_no_noise_scale():
    class Encoder(torch.nn.Linear):
        def forward(self, x):
            return torch.nn.functional.normalize(super().forward(x), dim=-1)

    torch.manual_seed(0)
    data, model = [{"x": torch.randn(2, 3)} for _ in range(8)], Encoder(3, 3)
    accelerator = Accelerator(cpu=True)
    windows = WindowLoader(
        data, 8, accelerator=accelerator, micro_batch_size=4, num_items=lambda batch: len(batch["x"]),
        noise_every=1,
    )  # fmt: skip
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="noise_every"):
        train(model, optimizer, windows, accelerator=accelerator, compute_loss=ContrastiveLoss())


@pytest.mark.parametrize(
    ("interval", "known", "says"),
    [
        ((200, 900), "200 to 900", "are much smaller. Larger windows would need fewer steps"),
        ((200, math.inf), "at least 200", "are much smaller. Larger windows would need fewer steps"),
        ((4, 16), "4 to 16", "are much larger. Smaller windows would need fewer examples"),
        ((0, 0.02), "at most 0.02", "are much larger. Smaller windows would need fewer examples"),
        ((40, 110), "40 to 110", "are about as large, which balances steps and examples"),
        ((40, 1234), "40 to 1,200", "are not too large. Whether larger windows would help cannot be decided"),
        ((4, 110), "4 to 110", "are not too small. Whether smaller windows would do cannot be decided"),
        (
            (0.5, 400),
            "0.5 to 400",
            "no advice on windows of 64, as smaller and larger ones may be better",
        ),
    ],
)
def test_the_noise_scale_is_put_into_words(interval, known, says):
    line, windows = in_words(*interval, 64, 5), "" if says.startswith("no") else "windows of 64 "
    basis = f"the gradient noise scale is {known} examples (90% interval from 5 measurements)"
    assert line == f"{basis}: {windows}{says}"


def test_a_noise_scale_that_cannot_be_determined_gives_no_advice():
    assert "cannot be determined from 5 measurements: no advice on windows of 64." in in_words(
        0, math.inf, 64, 5
    )
    assert in_words(math.nan, math.nan, 64, 0) == ""


def sampled(random, truth, dimensions, num_windows, every, drift=1.0):
    """The noise scale of sampled windows of 64 examples, measured by 8; heavy-tailed gradients of examples.

    `drift`: |G|² at the end over that at the start. `truth`: tr(Σ) / |G|² of every window.
    """
    noise = NoiseScale()
    for t in range(num_windows):
        square = drift ** (t / (num_windows - 1))
        mean = random.normal(size=dimensions)
        mean *= math.sqrt(square) / np.linalg.norm(mean)
        spread = random.normal(size=(64, dimensions)) * np.sqrt(random.exponential(size=(64, 1)))
        gradients = mean + math.sqrt(truth * square / dimensions) * spread
        small = SmallBatch(8, float(np.linalg.norm(gradients[:8].mean(0))))
        noise.record(64, float(np.linalg.norm(gradients.mean(0))), small if t % every == 0 else None)
    return noise


@pytest.mark.parametrize("drift", [1.0, 0.1])
def test_the_interval_has_the_true_noise_scale_about_as_often_as_it_says(drift):
    random, shares = np.random.default_rng(0), {}
    cases = itertools.product((6.0, 60.0, 600.0), (4, 32), ((30, 2), (64, 8)))
    for truth, dimensions, (num_windows, every) in cases:
        found = [sampled(random, truth, dimensions, num_windows, every, drift).interval for _ in range(150)]
        shares[truth, dimensions, every] = np.mean([low <= truth <= high for low, high in found])
    assert min(shares.values()) > CONFIDENCE - 0.1, shares
    assert np.mean([*shares.values()]) > CONFIDENCE - 0.03, shares


def test_the_interval_narrows_with_more_measurements():
    random = np.random.default_rng(1)
    widths = []
    for every in (16, 4, 1):
        found = [sampled(random, 20.0, 50, 64, every).interval for _ in range(40)]
        widths.append(np.median([high - low for low, high in found]))
    assert widths[0] > 2 * widths[1] > 2 * widths[2]


def test_few_measurements_exclude_nothing():
    noise = NoiseScale()
    assert all(map(math.isnan, noise.interval))
    for norm in (3.0, 2.0):
        noise.record(64, 1.0, SmallBatch(8, norm))
        assert noise.interval == (0, math.inf)
    noise.record(64, 1.0, SmallBatch(8, 1.01))
    assert in_words(*noise.interval, 64, noise.measured).startswith("the gradient noise scale cannot be")


def test_sums_of_version_0_1_have_a_noise_scale_and_no_interval():
    noise = sampled(np.random.default_rng(2), 20.0, 50, 40, 2)
    state = noise.state_dict()
    before = {
        key: state[key]
        for key in ("horizon", "measured", "_noise", "_noise_weight", "_square", "_inverse", "_weight")
    }
    old = NoiseScale.of(before)
    assert old.scale == noise.scale
    assert old.interval == (0, math.inf)
    old.record(64, 1.0, SmallBatch(8, 1.2))
    assert old.interval == NoiseScale.of(json.loads(json.dumps(old.state_dict()))).interval == (0, math.inf)


@pytest.mark.parametrize("unequal_items", [False, True])
def test_runs_of_other_seeds_do_not_contradict_each_other(unequal_items):
    """Real gradients and splits: the intervals of short runs have the closed form, or they say nothing."""
    data, lengths, w, truth = closed_form(unequal_items)
    found = []
    for seed in range(16):
        accelerator = Accelerator(cpu=True)
        model = Mean(w)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
        windows = WindowLoader(
            data, 64, accelerator=accelerator, lengths=lengths, max_tokens=600, noise_every=2, seed=seed,
            num_items="labels" if unequal_items else lambda batch: len(batch["x"]),
        )  # fmt: skip
        train(model, optimizer, windows, accelerator=accelerator, max_windows=30)
        found.append(windows.noise.interval)
    overlap = [max(a[0], b[0]) <= min(a[1], b[1]) for a, b in itertools.combinations(found, 2)]
    assert np.mean(overlap) > 0.85  # 97 % of the pairs of 60 seeds
    for size in (2**power for power in range(12)):
        lines = [in_words(*interval, size, 15) for interval in found]
        advice = {word for line in lines for word in ("much smaller", "much larger") if word in line}
        assert len(advice) < 2, lines
    assert sum(low <= truth <= high for low, high in found) >= 13  # 93 % of 60 seeds
    assert all(high < math.inf for _, high in found), "15 measurements suffice here"


@pytest.mark.parametrize(
    ("windows", "setting", "every"),
    [(30, None, 2), (37, None, 3), (256, None, 16), (9999, None, 16), (30, 16, 16), (30, 1, 1), (30, 0, 0)],
)
def test_short_runs_measure_more_often_unless_a_number_is_set(windows, setting, every):
    flags = ["--data.train", "x.csv", "--batch.effective", "8"]
    flags[2:2] = [] if setting is None else ["--train.noise_every", str(setting)]
    config = read_command_line(flags)
    assert noise_every(config, WindowPlan(8 * windows, 8, 0, shuffle=True, drop_last=False)) == every
    if setting != 0:
        grows = read_command_line([*flags[:-1], "noise_scale"])
        plan = WindowPlan(8 * windows, 8, 0, shuffle=True, drop_last=False)
        assert noise_every(grows, plan) == (setting or 16)


def test_a_scale_beyond_measure_is_not_a_number_of_examples():
    line = in_words(math.inf, math.inf, 64, 15)
    assert line == (
        "the gradient noise scale is too large to measure (90% interval from 15 measurements): windows of 64 "
        "are much smaller. Larger windows would need fewer steps"
    )


def test_a_step_is_measured_by_the_weights_that_it_moves():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Linear(40, 2))
    model[1].bias.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = torch.cat([p.detach().flatten() for p in trained])
    movement = UpdateRatio(model)
    with torch.no_grad():
        for p in trained:
            p += 0.1 * torch.randn_like(p)
    after = torch.cat([p.detach().flatten() for p in trained])
    assert movement.since_last() == pytest.approx(float((after - before).norm() / before.norm()))
    assert movement.since_last() == 0
    large = torch.nn.Linear(1000, 1000, bias=False)
    movement = UpdateRatio(large)
    before = large.weight.detach().clone()
    with torch.no_grad():
        large.weight[:, ::7] *= 1.5
    expected = float((large.weight.detach() - before).norm() / before.norm())
    assert movement.since_last() == pytest.approx(expected, rel=0.02)


def test_a_step_is_measured_fairly_beside_many_small_weights(monkeypatch):
    """LayerNorms are ones, a thousandth of all weights: none may count for more."""
    monkeypatch.setattr("gradacc_hf.training.update_ratio.SAMPLE", 4096)
    torch.manual_seed(0)
    layers = [(torch.nn.Linear(256, 256), torch.nn.LayerNorm(256)) for _ in range(20)]
    model = torch.nn.Sequential(*itertools.chain.from_iterable(layers))
    movement, before = UpdateRatio(model), [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p += 1e-3 * torch.randn_like(p)
    moved = sum(
        float((p.detach() - b).square().sum()) for p, b in zip(model.parameters(), before, strict=True)
    )
    expected = math.sqrt(moved / sum(float(b.square().sum()) for b in before))
    assert movement.since_last() == pytest.approx(expected, rel=0.1)


def test_the_report_shows_what_the_size_of_windows_did(whole, tmp_path):
    folder = whole[-1]
    (folder / "config.yaml").write_text("optim:\n  max_grad_norm: 0.5\n")
    page = write_report([folder], tmp_path / "report.html").read_text(encoding="utf-8")
    rows = history(folder)
    clipped = sum(row["grad_norm"] > 0.5 for row in rows) / len(rows)
    assert 0 < clipped < 1 or clipped == 1
    for text in (
        "<h2>Batch size</h2>",
        "gradient noise scale at the end (examples)",
        f"{100 * clipped:.1f}\N{NO-BREAK SPACE}%",
        "windows that took no step",
        "weight change per step, relative (median)",
        "Effective batch size",
    ):
        assert text in page, text


def test_a_recipe_has_windows_of_the_sizes_asked_for_and_keeps_to_them(start, tmp_path):
    recipe = load_recipe("text_classification").TextClassification
    rows = [{"text": "word " * (1 + i % 9), "label": i % 2} for i in range(70)]
    flags = ["--data.train", write_rows(tmp_path / "rows.jsonl", rows), "--budget.max_tokens", 40]
    flags += ["--train.noise_every", 1, "--optim.lr_scaling", "linear", "--optim.lr_reference_batch", 4]
    flags += ["--optim.scheduler", "constant", "--output.dir", tmp_path / "run", "--optim.lr", 1e-4]
    ran = start(recipe, *flags, "--batch.effective", "{0: 4, 3: 8}")
    assert ran.code == 0, ran.err
    assert "4 examples a window, after 3 windows 8" in ran.out
    assert "windows of 8" in ran.out.partition("noise scale")[2]
    rows = history(tmp_path / "run")
    assert [row["examples"] for row in rows] == [4, 4, 4, 8, 8, 8, 8, 8, 8, 3]
    assert [row["lr"] for row in rows] == pytest.approx([1e-4] * 3 + [2e-4] * 7)
    again = start(recipe, *flags, "--batch.effective", "{0: 4, 3: 16}", "--resume", "auto")
    assert again.code == 2
    assert "batch.effective: found {'0': 4, '3': 16}" in again.err
    same = start(recipe, *flags, "--batch.effective", "{0: 4, 3: 8}", "--resume", "auto")
    assert "run has ended: there is nothing to resume" in same.out
