"""The router loss of a window is that of all its tokens together, however the window is cut."""

import copy

import pytest
import torch
from accelerate import Accelerator

from gradacc_hf import (
    InputError,
    LoopError,
    WindowLoader,
    evaluate,
    remove_padding,
    router_loss_over_window,
    train,
    verify,
)
from gradacc_hf.accumulation.reference import (
    EXACT,
    RecordGradients,
    read_gradient,
    relative_error,
    whole_window_gradient,
)
from gradacc_hf.utils.modeling import checkpoint_activations
from gradacc_hf.verification.all_heads import LENGTHS
from gradacc_hf.verification.tiny_models import build_head

HEADS = [
    ("causal_lm", "mixtral"),
    ("causal_lm", "jetmoe"),
    ("seq2seq_lm", "nllb-moe"),
    ("seq2seq_lm", "switch_transformers"),
]


def with_router_loss(kind="causal_lm", model_type="mixtral"):
    """Return a tiny head, whose router loss is not negligible beside the rest."""
    head = build_head(kind, model_type)
    for name in ("aux_loss_coef", "router_aux_loss_coef", "router_z_loss_coef"):
        if hasattr(head.model, name):
            setattr(head.model, name, 0.5)
    return head, router_loss_over_window(head.model)


def loader(head, size=len(LENGTHS), **split):
    return WindowLoader(
        head.examples(LENGTHS),
        size,
        accelerator=Accelerator(cpu=True),
        collate_fn=head.collate,
        num_items=head.num_items,
        **split,
    )


def whole(head, pad_to=None):
    """Return the gradient and the loss of all examples in one batch."""
    batch, model = head.collate(head.examples(LENGTHS), pad_to), copy.deepcopy(head.model)
    return whole_window_gradient(model, batch), float(model(**batch).loss)


@pytest.mark.parametrize(("kind", "model_type"), HEADS)
def test_the_gradient_and_the_loss_are_those_of_the_whole_window(kind, model_type):
    head, _ = with_router_loss(kind, model_type)
    split = {"max_tokens": 200 if kind == "seq2seq_lm" else 90}
    if model_type == "switch_transformers":  # its router loss counts padding
        split = {"micro_batch_size": 5, "pad_to": "window"}
    windows = loader(head, **split)
    gradient, loss = whole(head, next(iter(windows.copy(1))).pad_to)
    recorder = RecordGradients(head.model)
    model, optimizer = windows.accelerator.prepare(head.model, recorder)
    [record] = train(model, optimizer, windows, accelerator=windows.accelerator)
    assert record.accumulation_steps >= 3
    assert relative_error(recorder.gradients[0], gradient) < EXACT
    assert record.loss == pytest.approx(loss, rel=1e-6)


def test_verify_finds_it_exact_and_names_the_call_where_it_is_missing():
    head, _ = with_router_loss()
    found = verify(head.model, loader(head, micro_batch_size=5))
    assert found.exact
    assert found.exact_trainer.exact
    assert not found.trainer.exact
    plain = build_head("causal_lm", "mixtral")
    plain.model.config.output_router_logits, plain.model.router_aux_loss_coef = True, 0.5
    found = verify(plain.model, loader(plain, micro_batch_size=5), trainer=False)
    assert "router_loss_over_window(model)" in found.reasons[0].cure


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plain_loop_with_dropout_is_exact_with_and_without_checkpointing(checkpointing):
    head, router_loss = with_router_loss()
    for module in head.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    if checkpointing:
        checkpoint_activations(head.model)
    examples = head.examples(LENGTHS)
    batches = [head.collate([examples[i] for i in part]) for part in (range(9), range(9, 11), range(11, 16))]
    items = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    shares = [number / sum(items) for number in items]

    def accumulated(seed):
        torch.manual_seed(seed)
        router_loss.look_ahead(head.model, batches, shares)
        for batch, share in zip(batches, shares, strict=True):
            (head.model(**batch).loss * share).backward()
        gradient = read_gradient(head.model)
        head.model.zero_grad()
        return gradient

    assert relative_error(accumulated(1), accumulated(2)) > 0.01  # there is dropout
    for module in head.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    gradient, _ = whole(head)
    assert relative_error(accumulated(0), gradient) < EXACT


def test_reentrant_checkpointing_is_refused_as_it_would_give_routers_no_gradient():
    head, _ = with_router_loss()
    head.model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(InputError, match="'use_reentrant': False"):
        head.model(**head.collate(head.examples(LENGTHS[:2])))


def test_a_loop_that_leaves_out_or_confuses_the_first_pass_is_told_so():
    head, router_loss = with_router_loss()
    examples = head.examples(LENGTHS)
    batches = [head.collate(examples[:8]), head.collate(examples[8:])]
    router_loss.look_ahead(head.model, batches)
    with pytest.raises(LoopError, match="the micro-batches that the loop trains on, in the same order"):
        head.model(**batches[1])
    router_loss.look_ahead(head.model, batches)
    for batch in batches:
        head.model(**batch)
    with pytest.raises(LoopError, match="look_ahead read 2 micro-batches, and the loop trains on more"):
        head.model(**batches[0])
    router_loss.look_ahead(head.model.eval(), batches)
    with pytest.raises(LoopError, match=r"look_ahead ran in evaluation mode: call model\.train\(\)"):
        head.model.train()(**batches[0])


def test_it_is_exact_where_padding_is_removed():
    head, _ = with_router_loss()
    gradient, _ = whole(head)
    remove_padding(head.model, head.collate(head.examples(LENGTHS[:4], seed=1)))
    recorder = RecordGradients(head.model)
    windows = loader(head, max_tokens=90)
    model, optimizer = windows.accelerator.prepare(head.model, recorder)
    train(model, optimizer, windows, accelerator=windows.accelerator)
    assert relative_error(recorder.gradients[0], gradient) < EXACT


def test_an_evaluation_leaves_it_out_and_does_not_depend_on_its_split():
    head, _ = with_router_loss()
    model = Accelerator(cpu=True).prepare(head.model)
    losses = [
        evaluate(model, loader(head, micro_batch_size=size), accelerator=Accelerator(cpu=True)).loss
        for size in (3, 16)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    plain = build_head("causal_lm", "mixtral")
    assert losses[0] == pytest.approx(whole(plain)[1], rel=1e-6)


def test_models_without_a_known_router_loss_are_refused():
    with pytest.raises(InputError, match="LlamaForCausalLM adds no router loss to its loss"):
        router_loss_over_window(build_head("causal_lm", "llama").model)
    with pytest.raises(InputError, match="the formula of this router loss is unknown"):
        router_loss_over_window(build_head("causal_lm", "doge").model)
