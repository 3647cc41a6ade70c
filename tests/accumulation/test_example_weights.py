"""Weights of examples in the loss: a weighted mean over the items of the window, for every split."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from gradacc_hf import InputError, WindowLoader, remove_padding, train
from gradacc_hf.accumulation.example_losses import ExampleItems, ExampleLosses
from gradacc_hf.accumulation.loss_items import IGNORED, model_loss
from gradacc_hf.accumulation.reference import EXACT, RecordGradients, read_gradient, relative_error
from gradacc_hf.padding.logits import DeferredLogits
from gradacc_hf.tasks.lean_loss import make_lean
from gradacc_hf.tasks.packing import pack
from gradacc_hf.training.preflight import preflight_check
from gradacc_hf.verification.tiny_models import build_head

LENGTHS = np.random.default_rng(3).integers(3, 40, size=17).tolist()
WEIGHTS = np.random.default_rng(4).choice([0.0, 0.25, 1.0, 3.7], size=17)


def weighted_gradient(head, examples, indices, count_items):
    """Return the gradient and the loss of a window by their definition, one example at a time."""
    head.model.zero_grad()
    weights = WEIGHTS[indices]
    items = [count_items(head.collate([examples[i]])) for i in indices]
    losses = [head.model(**head.collate([examples[i]])).loss * n for i, n in zip(indices, items, strict=True)]
    loss = sum(w * each for w, each in zip(weights, losses, strict=True)) / (weights @ np.array(items))
    loss.backward()
    return read_gradient(head.model), float(loss.detach())


def check_windows(head, untouched, split, sources=None, collate=None, compute_loss=model_loss):
    accelerator, examples = Accelerator(cpu=True), untouched.examples(LENGTHS)
    windows = WindowLoader(
        examples,
        7,
        accelerator=accelerator,
        collate_fn=collate or head.collate,
        num_items=head.num_items,
        weights=WEIGHTS,
        **split,
        **(sources or {}),
    )
    preflight_check(head.model, windows, compute_loss)
    recorder = RecordGradients(head.model)
    model, optimizer = accelerator.prepare(head.model, recorder)
    records = train(model, optimizer, windows, accelerator=accelerator, compute_loss=compute_loss)
    assert len(records) == 3
    for record, gradient in zip(records, recorder.gradients, strict=True):
        indices = windows.plan.indices(0, record.window - 1)
        expected, loss = weighted_gradient(untouched, examples, indices, windows.count_items)
        assert relative_error(gradient, expected) < EXACT
        assert record.loss == pytest.approx(loss, rel=1e-5)
        assert record.examples == len(indices)


@pytest.mark.parametrize(
    ("kind", "model_type", "problem"),
    [
        ("sequence_classification", "bert", "single_label"),
        ("sequence_classification", "bert", "multi_label"),
        ("sequence_classification", "bert", "regression"),
        ("token_classification", "bert", "single_label"),
        ("causal_lm", "llama", "single_label"),
        ("masked_lm", "bert", "single_label"),
        ("seq2seq_lm", "t5", "single_label"),
    ],
)
def test_the_gradient_is_that_of_the_weighted_mean(kind, model_type, problem):
    for split in ({"micro_batch_size": 1}, {"max_tokens": 64}, {"max_tokens": 10_000}):
        heads = [build_head(kind, model_type, problem=problem) for _ in range(2)]
        check_windows(*heads, split)


@pytest.mark.parametrize(
    ("kind", "is_lean"),
    [
        ("sequence_classification", False),
        ("token_classification", False),
        ("causal_lm", False),
        ("causal_lm", True),
    ],
)
def test_without_padding_and_with_few_logits(kind, is_lean, monkeypatch):
    head, untouched = (build_head(kind, "llama") for _ in range(2))
    if is_lean:
        assert make_lean(head.model, True)
        monkeypatch.setattr(DeferredLogits, "_computed", None)  # which computes all logits
    remove_padding(head.model, head.collate(head.examples(LENGTHS[:4])))
    check_windows(head, untouched, {"max_tokens": 90, "padding_free": True})


def test_packed_with_few_logits():
    head, untouched = (build_head("causal_lm", "llama") for _ in range(2))
    make_lean(head.model, True)
    check_windows(head, untouched, {"max_tokens": 90, "pad_to": "nothing"}, collate=pack)


@pytest.mark.parametrize("size", [2, 3])
def test_a_loss_of_the_labelled_tokens_after_the_first(size):
    """Their number may be a multiple of the examples."""

    def loss_of_labelled(outputs, batch):
        labels = batch["labels"][:, 1:]
        chosen = labels != IGNORED
        return torch.nn.functional.cross_entropy(outputs.logits[:, :-1][chosen], labels[chosen])

    heads = [build_head("causal_lm", "llama") for _ in range(2)]
    check_windows(*heads, {"micro_batch_size": size}, compute_loss=loss_of_labelled)


def test_with_sources():
    heads = [build_head("causal_lm", "llama") for _ in range(2)]
    sources = {"sources": ["a"] * 10 + ["b"] * 7, "shares": {"a": 2, "b": 1.5}}
    check_windows(*heads, {"max_tokens": 64}, sources)


def windows_of(head, examples, weights, size=2):
    return WindowLoader(
        examples,
        size,
        accelerator=Accelerator(cpu=True),
        collate_fn=head.collate,
        micro_batch_size=1,
        weights=weights,
        shuffle=False,
    )


def test_a_window_without_weight_is_skipped_and_counted():
    head = build_head("sequence_classification", "bert")
    windows = windows_of(head, head.examples([5] * 4), [0, 0, 0, 2])
    model, optimizer = windows.accelerator.prepare(head.model, RecordGradients(head.model))
    [record] = train(model, optimizer, windows, accelerator=windows.accelerator)
    assert windows.empty_windows == 1
    assert (record.examples, record.items) == (2, 2)


def test_the_loss_of_the_recipe_counts_beside_the_loss_of_the_model():
    """As in question answering, where the model and the recipe compute a loss for starts and for ends."""
    head, weights = build_head("sequence_classification", "bert"), [1, 3]
    examples = head.examples([5, 7])

    def losses(outputs, batch, **options):
        calls = (
            torch.nn.functional.cross_entropy(outputs.logits * n, batch["labels"], **options) for n in (3, 8)
        )
        return sum(calls) / 2

    batch = head.collate(examples)
    found = losses(head.model(**batch), batch, reduction="none").tolist()
    windows = windows_of(head, examples, weights)
    model, optimizer = windows.accelerator.prepare(head.model, RecordGradients(head.model))
    [record] = train(model, optimizer, windows, accelerator=windows.accelerator, compute_loss=losses)
    assert record.loss == pytest.approx(np.average(found, weights=weights), rel=1e-5)


def test_sums_of_losses_of_16_bits_are_in_32_bits():
    """The sum of these losses, 30 each, is above the largest number of float16."""
    logits = torch.tensor([30.0, 0.0], dtype=torch.float16).repeat(2, 4_000, 1).requires_grad_()
    batch = {"labels": torch.ones(2, 4_000, dtype=torch.int64)}
    items = ExampleItems.of(batch, lambda own: own["labels"].numel(), np.array([1, 3]), np.zeros(2), None)
    losses = ExampleLosses(items, batch, num_sources=1, weighs=True)
    with losses.active():
        loss = torch.nn.functional.cross_entropy(logits.view(-1, 2), batch["labels"].view(-1))
    losses.record(loss, checks=True)
    assert (float(loss), float(losses.parts)) == (30, 30)
    loss.backward()
    assert torch.isfinite(logits.grad).all()


def negative_log_likelihood(outputs, batch):
    return -outputs.logits.log_softmax(-1).gather(1, batch["labels"][:, None]).mean()


@pytest.mark.parametrize(
    ("loss", "without", "message"),
    [
        (lambda outputs, batch: outputs.loss + 1, [], "so that the weights do not reach it"),
        (negative_log_likelihood, ["labels"], "computed without cross_entropy"),
    ],
)
def test_a_loss_that_the_weights_do_not_reach_is_refused(loss, without, message):
    head = build_head("sequence_classification", "bert")
    own, before = head.model.forward, torch.nn.functional.cross_entropy
    head.model.forward = lambda **batch: own(**{k: v for k, v in batch.items() if k not in without})
    windows = windows_of(head, head.examples([5, 7]), [1, 3])
    model, optimizer = windows.accelerator.prepare(head.model, RecordGradients(head.model))
    with pytest.raises(InputError, match=message):
        train(model, optimizer, windows, accelerator=windows.accelerator, compute_loss=loss)
    assert torch.nn.functional.cross_entropy is before
