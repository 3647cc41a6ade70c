"""Weighing by items, in a plain loop, on tiny heads of every kind: a window of 16 against 5 + 5 + 5 + 1."""

from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch

from gradacc_hf.accumulation.loss_items import resolve
from gradacc_hf.errors import HeadUnavailableError
from gradacc_hf.verification.tiny_models import KINDS, build_head, model_types

HEADS = {
    "sequence_classification": ("bert", "distilbert", "deberta-v2", "llama", "bart"),
    "token_classification": ("roberta", "modernbert", "electra", "big_bird"),
    "masked_lm": ("bert", "mpnet", "albert", "longformer"),
    "causal_lm": ("gpt2", "llama", "qwen3", "gemma2", "bloom", "bart"),
    "seq2seq_lm": ("t5", "bart", "marian"),
    "question_answering": ("bert", "camembert", "electra"),
    "multiple_choice": ("bert", "xlm-roberta", "distilbert"),
    "image_classification": ("vit", "swin", "convnext"),
    "audio_classification": ("wav2vec2", "wav2vec2-bert", "hubert"),
    "ctc": ("wav2vec2", "wav2vec2-bert", "wavlm"),
}
EVERY_HEAD = [(kind, model_type) for kind in KINDS for model_type in HEADS[kind]]
PADDING_INVARIANT = [
    (kind, model_type)
    for kind, model_type in EVERY_HEAD
    if kind not in ("question_answering", "image_classification", "audio_classification", "ctc")
]
SPLIT = (5, 5, 5, 1)
UNEQUAL = (3, 20, 7, 12, 5, 9, 17, 4, 11, 6, 14, 8, 19, 3, 10, 13)


def window_gradient(head, examples, split, pad_to=None):
    """Loss and gradient of the window: each micro-batch's mean loss × its items / the window's items."""
    cuts = pairwise(accumulate(split, initial=0))
    batches = [head.collate(examples[start:stop], pad_to) for start, stop in cuts]
    items = [resolve(head.num_items)(batch) for batch in batches]
    head.model.zero_grad()
    total = 0.0
    for batch, count in zip(batches, items, strict=True):
        loss = head.model(**batch).loss * (count / sum(items))
        loss.backward()
        total += loss.item()
    gradients = [p.grad.flatten().double() for p in head.model.parameters() if p.grad is not None]
    return total, torch.cat(gradients)


def assert_exact(head, examples, pad_to=None):
    whole_loss, whole = window_gradient(head, examples, (len(examples),), pad_to)
    split_loss, split = window_gradient(head, examples, SPLIT, pad_to)
    assert np.isfinite(whole_loss)
    assert whole.norm() > 1e-2
    assert split_loss == pytest.approx(whole_loss, rel=1e-5)
    assert (split - whole).norm() / whole.norm() < 1e-5


def test_every_kind_has_at_least_three_heads_here():
    assert all(len(set(HEADS[kind]) & set(model_types(kind))) >= 3 for kind in KINDS)


@pytest.mark.parametrize(("kind", "model_type"), EVERY_HEAD)
def test_a_window_of_equal_lengths_is_exact_under_any_split(kind, model_type):
    head = build_head(kind, model_type)
    assert head.model.training
    assert all(p.dtype == torch.float32 for p in head.model.parameters())
    assert_exact(head, head.examples([12] * 16, seed=1))


@pytest.mark.parametrize(("kind", "model_type"), PADDING_INVARIANT)
def test_a_window_of_unequal_lengths_is_exact_under_any_split(kind, model_type):
    head = build_head(kind, model_type)
    assert_exact(head, head.examples(UNEQUAL, seed=2))


@pytest.mark.parametrize("model_type", HEADS["question_answering"])
def test_question_answering_is_exact_when_every_micro_batch_is_padded_alike(model_type):
    head = build_head("question_answering", model_type)
    assert_exact(head, head.examples(UNEQUAL, seed=3), pad_to=max(UNEQUAL))


@pytest.mark.parametrize("problem", ["multi_label", "regression"])
@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_multi_label_and_regression_are_means_over_rows(model_type, problem):
    head = build_head("sequence_classification", model_type, problem=problem)
    examples = head.examples(UNEQUAL, seed=4)
    assert head.collate(examples)["labels"].is_floating_point()
    assert_exact(head, examples)


@pytest.mark.parametrize(
    ("model_type", "num_items"), [("gpt2", "next_token"), ("llama", "next_token"), ("bart", "labels")]
)
def test_whether_a_causal_head_shifts_its_labels_is_found_by_asking_its_loss(model_type, num_items):
    assert build_head("causal_lm", model_type).num_items == num_items


def test_the_wrong_count_of_items_is_seen_as_inexact():
    head = build_head("causal_lm", "gpt2")
    examples = head.examples(UNEQUAL, seed=2)
    for example in examples[::3]:
        example["labels"] = example[
            "input_ids"
        ]  # no prompt: the first token counts as a label, but is no item
    _, whole = window_gradient(head, examples, (16,))
    object.__setattr__(head, "num_items", "labels")
    _, split = window_gradient(head, examples, SPLIT)
    assert (split - whole).norm() / whole.norm() > 1e-3


def test_the_same_seed_gives_the_same_head_and_examples_and_leaves_the_callers_draws_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, again = build_head("masked_lm", "bert", seed=1), build_head("masked_lm", "bert", seed=1)
    assert torch.equal(torch.rand(3), expected)
    other = build_head("masked_lm", "bert", seed=2)
    weights = [torch.cat([p.flatten() for p in head.model.parameters()]) for head in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.examples([5, 9], seed=3) == again.examples([5, 9], seed=3) != first.examples([5, 9], seed=4)


def test_a_head_draws_no_random_numbers_in_train_mode():
    for kind, model_type in [
        ("seq2seq_lm", "t5"),
        ("audio_classification", "wav2vec2"),
        ("causal_lm", "gpt2"),
    ]:
        head = build_head(kind, model_type)
        batch = head.collate(head.examples([9] * 4))
        assert head.model(**batch).loss.item() == head.model(**batch).loss.item()


def test_collation_pads_on_the_right_and_labels_with_the_ignored_value():
    head = build_head("token_classification", "bert")
    batch = head.collate(head.examples([3, 6]), pad_to=8)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 8)
    assert batch["attention_mask"].tolist() == [[1] * 3 + [0] * 5, [1] * 6 + [0] * 2]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == head.model.config.pad_token_id).all()


@pytest.mark.parametrize(
    ("kind", "model_type", "reason"),
    [("causal_lm", "esm", "no such head"), ("token_classification", "bros", "have to specify bbox")],
)
def test_a_head_that_cannot_be_built_says_why_in_one_line(kind, model_type, reason):
    with pytest.raises(HeadUnavailableError, match=f"^{kind} of {model_type}: .*{reason}") as caught:
        build_head(kind, model_type)
    assert "\n" not in str(caught.value)


def test_padding_to_less_than_the_longest_example_is_refused():
    head = build_head("masked_lm", "bert")
    with pytest.raises(ValueError, match="pad_to=5 is shorter than the longest input_ids of 9"):
        head.collate(head.examples([4, 9]), pad_to=5)


def test_wrong_names_are_answered_with_the_allowed_ones():
    with pytest.raises(ValueError, match="allowed: sequence_classification"):
        build_head("text_classification", "bert")
    with pytest.raises(ValueError, match="allowed: single_label, multi_label, regression"):
        build_head("sequence_classification", "bert", problem="ranking")
    with pytest.raises(ValueError, match="only 'single_label'"):
        build_head("masked_lm", "bert", problem="regression")
    with pytest.raises(ValueError, match="lengths: found 2; allowed: 3 or more"):
        build_head("masked_lm", "bert").examples([4, 2])
