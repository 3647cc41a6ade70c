"""The end of the last layer runs at tokens that the loss reads, with the gradient of the padded model."""

import copy

import pytest
import torch

import gradacc_hf
from gradacc_hf import PaddingNotRemovableError
from gradacc_hf.accumulation.reference import EXACT, compare, read_gradient, whole_window_gradient
from gradacc_hf.padding.removal import is_removed, skips_unread
from gradacc_hf.verification.tiny_models import build_head

LENGTHS = [17, 9, 30, 9, 12, 3, 21]
OTHERS = [11, 4, 4, 26, 7]


def model_loss(outputs, batch):
    return outputs.loss


def make(kind, model_type, compute_loss=model_loss):
    """Return a padded model, a copy that skips unread tokens, and a function that makes batches."""
    head = build_head(kind, model_type)

    def batch_of(lengths):
        batch = head.collate(head.examples(lengths))
        if batch["labels"].ndim == 2:
            batch["labels"][:, 1::3] = -100
        return batch

    padded = copy.deepcopy(head.model)
    gradacc_hf.remove_padding(head.model, batch_of(LENGTHS), compute_loss)
    return padded, head.model, batch_of


def error(padded, model, batch):
    reference = whole_window_gradient(padded, batch)
    return compare("skipped", whole_window_gradient(model, batch), reference).error


def rows_of(module, model, batch):
    """Return the tokens of the input of a module in a forward."""
    seen = []
    handle = module.register_forward_hook(
        lambda module, args, output: seen.append(args[0].shape[:-1].numel())
    )
    model(**batch)
    handle.remove()
    return seen[-1]


@pytest.mark.parametrize(
    ("kind", "model_type", "part", "read"),
    [
        ("sequence_classification", "bert", "bert.encoder.layer.1.intermediate", "rows"),
        ("sequence_classification", "distilbert", "distilbert.transformer.layer.1.ffn", "rows"),
        ("sequence_classification", "bert", "bert.encoder.layer.1.attention.self.query", "rows"),
        (
            "sequence_classification",
            "albert",
            "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn",
            "rows",
        ),
        ("sequence_classification", "deberta-v2", "deberta.encoder.layer.1.intermediate", "rows"),
        ("sequence_classification", "modernbert", "model.layers.1.mlp.Wi", "rows"),
        ("sequence_classification", "modernbert", "model.layers.1.attn.Wo", "rows"),
        ("sequence_classification", "llama", "model.layers.1.mlp.up_proj", "rows"),
        ("sequence_classification", "mistral", "model.layers.1.self_attn.q_proj", "rows"),
        ("multiple_choice", "roberta", "roberta.encoder.layer.1.intermediate", "rows"),
        ("token_classification", "electra", "electra.encoder.layer.1.intermediate", "labels"),
        ("masked_lm", "bert", "bert.encoder.layer.1.intermediate", "labels"),
        ("masked_lm", "bert", "bert.encoder.layer.1.attention.self.query", "labels"),
        ("causal_lm", "llama", "model.layers.1.mlp.up_proj", "next labels"),
        ("causal_lm", "phimoe", "model.layers.1.self_attn.o_proj", "next labels"),
    ],
)
def test_the_feed_forward_part_runs_at_read_tokens_with_the_same_gradient(kind, model_type, part, read):
    padded, model, batch_of = make(kind, model_type)
    batch = batch_of(OTHERS)
    labels = batch["labels"]
    expected = {
        "rows": batch["input_ids"].shape[:-1].numel(),
        "labels": int((labels != -100).sum()) if labels.ndim == 2 else 0,
        "next labels": int((labels[:, 1:] != -100).sum()) if labels.ndim == 2 else 0,
    }
    assert error(padded, model, batch) < EXACT
    assert rows_of(model.get_submodule(part), model.train(), batch) == expected[read]
    real = int((batch["attention_mask"] != 0).sum())
    assert rows_of(model.get_submodule(part), model.eval(), batch) == real > expected[read]


def test_other_outputs_are_those_of_the_padded_model_in_evaluation_and_without_labels():
    padded, model, batch_of = make("token_classification", "bert")
    batch = batch_of(OTHERS)
    real = batch["attention_mask"] != 0
    with torch.no_grad():
        for training, given in ((False, batch), (True, {k: v for k, v in batch.items() if k != "labels"})):
            outputs = [each.train(training)(**given).logits[real] for each in (model, padded)]
            torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        model.train()(**batch)  # the layers of a direct call get no labels of an earlier call
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        states = [each.train().bert(**inputs).last_hidden_state[real] for each in (model, padded)]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


def test_a_loss_that_reads_all_tokens_skips_none():
    def with_penalty(outputs, batch):
        return outputs.loss + (outputs.logits * batch["attention_mask"][..., None]).square().mean()

    padded, model, batch_of = make("token_classification", "bert", with_penalty)
    assert is_removed(model)
    assert not skips_unread(model)
    assert error(padded, model, batch_of(OTHERS)) < EXACT


def test_a_loss_that_fails_on_the_sample_is_refused():
    with pytest.raises(PaddingNotRemovableError, match="fails on a sample \\(AttributeError"):
        make("sequence_classification", "bert", lambda outputs, batch: outputs.missing)


def test_the_loss_of_the_loop_may_read_real_tokens_where_the_models_loss_reads_padding():
    def loss_of_real_tokens(outputs, batch):
        starts = outputs.start_logits.masked_fill(batch["attention_mask"] == 0, -torch.inf)
        return torch.nn.functional.cross_entropy(starts, batch["start_positions"])

    head = build_head("question_answering", "bert")
    batch = head.collate(head.examples(LENGTHS))
    with pytest.raises(PaddingNotRemovableError, match="reads hidden states of padding"):
        gradacc_hf.remove_padding(head.model, batch)
    padded = copy.deepcopy(head.model)
    gradacc_hf.remove_padding(head.model, batch, loss_of_real_tokens)
    gradients = []
    for model in (head.model, padded):
        other = head.collate(head.examples(OTHERS))
        loss_of_real_tokens(model.train()(**other), other).backward()
        gradients.append(read_gradient(model))
    assert compare("real tokens", *gradients).error < EXACT


def test_frozen_layers_skip_none():
    head = build_head("sequence_classification", "bert")
    head.model.bert.requires_grad_(False)
    gradacc_hf.remove_padding(head.model, head.collate(head.examples(LENGTHS)), model_loss)
    assert is_removed(head.model)
    assert not skips_unread(head.model)


def test_layers_that_are_computed_again_skip_none_and_stay_exact():
    padded, model, batch_of = make("sequence_classification", "bert")
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    assert skips_unread(model)
    batch = batch_of(OTHERS)
    assert error(padded, model, batch) < EXACT


def test_a_batch_without_labelled_tokens_is_computed_whole():
    padded, model, batch_of = make("masked_lm", "bert")
    batch = batch_of(OTHERS)
    batch["labels"][:] = -100
    gradients = []
    for each in (model, padded):
        (each.train()(**batch).logits * (batch["attention_mask"] != 0)[..., None]).sum().backward()
        gradients.append(read_gradient(each))
    assert compare("skipped", *gradients).error < EXACT


def test_a_copy_skips_too_and_the_restored_model_does_not():
    padded, model, batch_of = make("sequence_classification", "bert")
    batch = batch_of(OTHERS)
    twin = copy.deepcopy(model)
    assert error(padded, twin, batch) < EXACT
    feed_forward = twin.bert.encoder.layer[1].intermediate
    assert rows_of(feed_forward, twin.train(), batch) == len(OTHERS)
    gradacc_hf.restore_padding(model)
    assert not skips_unread(model)
    assert not is_removed(model)
