"""The accumulated gradient is that of the whole window at once, for every head, split and window."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from gradacc_hf import WindowLoader
from gradacc_hf.accumulation.reference import (
    EXACT,
    RecordGradients,
    read_gradient,
    relative_error,
    whole_window_gradient,
)
from gradacc_hf.verification.tiny_models import build_head

HEADS = {
    "sequence_classification": ["bert", "roberta", "distilbert", "deberta-v2", "gpt2", "llama"],
    "token_classification": ["bert", "roberta", "distilbert", "electra"],
    "masked_lm": ["bert", "roberta", "distilbert", "modernbert"],
    "causal_lm": ["gpt2", "llama", "qwen2", "gpt_neox"],
    "seq2seq_lm": ["t5", "bart", "marian"],
    "question_answering": ["bert", "roberta", "distilbert"],
    "multiple_choice": ["bert", "roberta", "distilbert"],
    "image_classification": ["vit", "deit", "dinov2"],
}
LENGTHS = np.random.default_rng(3).integers(3, 40, size=23).tolist()
SPLITS = [{"micro_batch_size": 1}, {"micro_batch_size": 4}, {"max_tokens": 64}, {"max_tokens": 10_000}]


def run_epoch(
    model, windows, accelerator, *, max_grad_norm=None, weigh=lambda window, loss: window.weigh(loss)
):
    """The loop that users copy, on an optimizer that keeps the gradients that reached it."""
    model, optimizer = accelerator.prepare(model, RecordGradients(model))
    handed_out = []
    for window in windows:
        for batch in window:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(weigh(window, loss))
                if accelerator.sync_gradients and max_grad_norm is not None:
                    accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        handed_out.append(window)
    assert len(optimizer.optimizer.gradients) == len(handed_out)
    return handed_out, optimizer.optimizer.gradients


def reference(head, examples, window, **collate):
    return whole_window_gradient(head.model, head.collate([examples[i] for i in window.indices], **collate))


def heads():
    for kind, model_types in HEADS.items():
        for model_type in model_types:
            yield pytest.param(kind, model_type, "single_label", id=f"{kind}-{model_type}")
    for model_type in HEADS["sequence_classification"][:3]:
        for problem in ("multi_label", "regression"):
            yield pytest.param("sequence_classification", model_type, problem, id=f"{problem}-{model_type}")


@pytest.mark.parametrize(("kind", "model_type", "problem"), list(heads()))
def test_the_gradient_is_that_of_the_whole_window(kind, model_type, problem):
    head = build_head(kind, model_type, problem=problem)
    examples = head.examples(LENGTHS)
    padding = {"pad_to": "window"} if kind == "question_answering" else {}
    accelerator = Accelerator(cpu=True)
    for split in SPLITS:
        windows = WindowLoader(  # 10 + 10 + a partial window of 3
            examples,
            10,
            accelerator=accelerator,
            collate_fn=head.collate,
            num_items=head.num_items,
            **split,
            **padding,
        )
        handed_out, gradients = run_epoch(head.model, windows, accelerator)
        assert [len(window.indices) for window in handed_out] == [10, 10, 3]
        for window, gradient in zip(handed_out, gradients, strict=True):
            assert relative_error(gradient, reference(head, examples, window)) < EXACT
            with torch.no_grad():
                whole = head.model(**head.collate([examples[i] for i in window.indices])).loss
            assert window.loss == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.parametrize("size", [1, 16])
def test_windows_of_one_example_and_micro_batches_of_5_5_5_and_1_are_exact(size):
    head = build_head("token_classification", "bert")
    examples = head.examples([12] * 16)
    accelerator = Accelerator(cpu=True)
    windows = WindowLoader(
        examples, size, accelerator=accelerator, collate_fn=head.collate, micro_batch_size=5
    )
    handed_out, gradients = run_epoch(head.model, windows, accelerator)
    if size == 16:
        assert [len(batch["labels"]) for batch in handed_out[0].batches()] == [5, 5, 5, 1]
    for window, gradient in zip(handed_out, gradients, strict=True):
        assert relative_error(gradient, reference(head, examples, window)) < EXACT


def test_a_mean_of_means_is_not_exact_on_the_same_micro_batches():
    """What the tests above would say of Accelerate's plain loop: they can fail."""
    head = build_head("token_classification", "bert")
    examples = head.examples(LENGTHS)
    accelerator = Accelerator(cpu=True)
    windows = WindowLoader(examples, 10, accelerator=accelerator, collate_fn=head.collate, micro_batch_size=4)
    handed_out, gradients = run_epoch(
        head.model, windows, accelerator, weigh=lambda window, loss: (window.weigh(loss), loss)[1]
    )
    errors = [
        relative_error(g, reference(head, examples, w)) for w, g in zip(handed_out, gradients, strict=True)
    ]
    assert max(errors) > 0.01


def test_a_model_that_padding_reaches_is_exact_only_when_a_window_is_padded_alike():
    head = build_head("question_answering", "bert")
    examples = head.examples(LENGTHS)
    accelerator = Accelerator(cpu=True)
    errors = {}
    for pad_to in ("micro_batch", "window", 48):
        windows = WindowLoader(
            examples, 10, accelerator=accelerator, collate_fn=head.collate, micro_batch_size=3, pad_to=pad_to
        )  # fmt: skip
        handed_out, gradients = run_epoch(head.model, windows, accelerator)
        alike = {"pad_to": 48} if pad_to == 48 else {}
        errors[pad_to] = max(
            relative_error(g, reference(head, examples, w, **alike))
            for w, g in zip(handed_out, gradients, strict=True)
        )
    assert errors["window"] < EXACT
    assert errors[48] < EXACT
    assert errors["micro_batch"] > 1e-3


def test_micro_batches_and_windows_without_items_leave_the_gradient_exact_and_never_nan():
    head = build_head("token_classification", "bert")
    examples = head.examples(LENGTHS)
    for i in (*range(10), 12, 15, 21):
        examples[i]["labels"] = [-100] * len(examples[i]["labels"])
    accelerator = Accelerator(cpu=True)
    windows = WindowLoader(
        examples, 5, accelerator=accelerator, collate_fn=head.collate, micro_batch_size=1, shuffle=False
    )  # fmt: skip
    handed_out, gradients = run_epoch(head.model, windows, accelerator)
    assert [window.number for window in handed_out] == [2, 3, 4]
    assert windows.empty_windows == 2
    for window, gradient in zip(handed_out, gradients, strict=True):
        assert relative_error(gradient, reference(head, examples, window)) < EXACT
        assert np.isfinite(window.loss)


def test_a_class_weighted_mean_is_exact_with_its_weights_as_items():
    weights = torch.tensor([0.3, 5.0, 1.7])

    class Weighted(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, labels, **batch):
            outputs = self.inner(**batch)
            outputs.loss = torch.nn.functional.cross_entropy(outputs.logits, labels, weights)
            return outputs

    head = build_head("sequence_classification", "bert")
    model, examples = Weighted(head.model), head.examples(LENGTHS)
    accelerator = Accelerator(cpu=True)
    windows = WindowLoader(
        examples,
        10,
        accelerator=accelerator,
        collate_fn=head.collate,
        max_tokens=64,
        num_items=lambda batch: float(weights[batch["labels"]].sum()),
    )
    handed_out, gradients = run_epoch(model, windows, accelerator)
    for window, gradient in zip(handed_out, gradients, strict=True):
        whole = whole_window_gradient(model, head.collate([examples[i] for i in window.indices]))
        assert relative_error(gradient, whole) < EXACT


def test_clipping_at_a_threshold_that_bites_clips_the_gradient_of_the_whole_window():
    head = build_head("token_classification", "bert")
    examples = head.examples(LENGTHS)
    accelerator = Accelerator(cpu=True)
    windows = WindowLoader(examples, 10, accelerator=accelerator, collate_fn=head.collate, max_tokens=64)
    handed_out, gradients = run_epoch(head.model, windows, accelerator, max_grad_norm=0.01)
    for window, gradient in zip(handed_out, gradients, strict=True):
        whole = reference(head, examples, window)
        norm = torch.stack([g.norm() for g in whole.values()]).norm()
        assert norm > 0.1
        clipped = {name: g * (0.01 / (norm + 1e-6)) for name, g in whole.items()}
        assert relative_error(gradient, clipped) < EXACT


def test_under_bf16_the_gradient_is_that_of_the_same_split_in_bf16_and_near_that_of_float32():
    head = build_head("sequence_classification", "bert")
    examples = head.examples(LENGTHS)
    plain = Accelerator(cpu=True)
    windows = WindowLoader(examples, 10, accelerator=plain, collate_fn=head.collate, max_tokens=64)
    window = next(iter(windows))
    whole = reference(head, examples, window)

    by_hand = []  # the same micro-batches in bf16, weighed by hand
    for batch in window.batches():
        with torch.autocast("cpu", torch.bfloat16):
            loss = head.model(**batch).loss.float()
        (loss * (len(batch["labels"]) / 10)).backward()
    by_hand = read_gradient(head.model)
    head.model.zero_grad()

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    windows = WindowLoader(examples, 10, accelerator=accelerator, collate_fn=head.collate, max_tokens=64)
    _, gradients = run_epoch(head.model, windows, accelerator)
    assert relative_error(gradients[0], by_hand) < EXACT
    assert 1e-5 < relative_error(gradients[0], whole) < 2**-5


def test_leaving_another_loader_in_its_last_batch_does_not_synchronise_every_micro_batch():
    """Accelerate's own trap: a broken-out-of evaluation loader leaves its end set."""
    head = build_head("sequence_classification", "bert")
    examples = head.examples(LENGTHS)
    accelerator = Accelerator(cpu=True)
    other = accelerator.prepare(torch.utils.data.DataLoader([torch.zeros(1)] * 2))
    windows = WindowLoader(examples, 10, accelerator=accelerator, collate_fn=head.collate, micro_batch_size=2)
    for i, _ in enumerate(other):
        if i == 1:
            break
    handed_out, gradients = run_epoch(head.model, windows, accelerator)
    for window, gradient in zip(handed_out, gradients, strict=True):
        assert relative_error(gradient, reference(head, examples, window)) < EXACT


def accumulate(model, window, batches, accelerator, optimizer):
    """The loop over some of a window's micro-batches, up to where it is left."""
    for number, batch in enumerate(window):
        if number == batches:
            break
        with accelerator.accumulate(model):
            accelerator.backward(window.weigh(model(**batch).loss))
            optimizer.step()
            optimizer.zero_grad()


def test_a_window_left_half_way_leaks_nothing_into_the_next_or_into_its_own_replay():
    head = build_head("sequence_classification", "bert")
    examples = head.examples(LENGTHS)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(head.model, RecordGradients(head.model))
    windows = WindowLoader(examples, 10, accelerator=accelerator, collate_fn=head.collate, micro_batch_size=2)
    first, second, _ = windows
    accumulate(model, first, 2, accelerator, optimizer)
    accumulate(model, first, None, accelerator, optimizer)
    accumulate(model, first, 3, accelerator, optimizer)
    accumulate(model, second, None, accelerator, optimizer)
    for window, gradient in zip((first, second), optimizer.optimizer.gradients, strict=True):
        assert relative_error(gradient, reference(head, examples, window)) < EXACT


def test_the_accelerator_is_left_as_it_was_for_other_loops():
    head = build_head("sequence_classification", "bert")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=7)
    windows = WindowLoader(
        head.examples(LENGTHS), 10, accelerator=accelerator, collate_fn=head.collate, micro_batch_size=2
    )
    run_epoch(head.model, windows, accelerator)
    assert accelerator.gradient_accumulation_steps == 7
    assert accelerator.gradient_state.sync_with_dataloader


def test_skipping_the_step_of_the_last_micro_batch_is_an_error():
    head = build_head("sequence_classification", "bert")
    accelerator = Accelerator(cpu=True)
    windows = WindowLoader(
        head.examples(LENGTHS), 10, accelerator=accelerator, collate_fn=head.collate, micro_batch_size=2
    )
    model, optimizer = accelerator.prepare(head.model, RecordGradients(head.model))
    window = next(iter(windows))

    def skip_the_last():
        for number, batch in enumerate(window):
            if number == len(window) - 1:
                continue
            with accelerator.accumulate(model):
                accelerator.backward(window.weigh(model(**batch).loss))
                optimizer.step()
                optimizer.zero_grad()

    with pytest.raises(RuntimeError, match=r"did not go through accelerator\.accumulate"):
        skip_the_last()
