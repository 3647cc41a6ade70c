"""Embeddings without padding have the gradient of the padded model, whatever makes their positions."""

import copy

import peft
import pytest
import torch

import gradacc_hf
from gradacc_hf.accumulation.reference import EXACT, compare, whole_window_gradient
from gradacc_hf.padding.removal import is_removed
from gradacc_hf.verification.tiny_models import build_head

LENGTHS = [17, 9, 30, 9, 12, 3, 21]
OTHERS = [11, 4, 4, 26, 7]
REAL = sum(OTHERS)
PADDED = len(OTHERS) * max(OTHERS)


def make(kind, model_type, lengths=OTHERS):
    """Return a padded model, a copy without padding, and a batch."""
    head = build_head(kind, model_type)
    padded = copy.deepcopy(head.model)
    gradacc_hf.remove_padding(head.model, head.collate(head.examples(LENGTHS)))
    return padded, head.model, head.collate(head.examples(lengths))


def tokens_of(model, batch, part):
    """Return the tokens that a part of the model gets in a forward."""
    seen = []
    handle = model.get_submodule(part).register_forward_hook(
        lambda module, args, output: seen.append(args[0].shape[:2].numel())
    )
    model.train()(**batch)
    handle.remove()
    return seen[0]


def error(padded, model, batch):
    reference = whole_window_gradient(padded, batch)
    return compare("without padding", whole_window_gradient(model, batch), reference).error


@pytest.mark.parametrize(
    ("kind", "model_type", "part"),
    [
        ("sequence_classification", "bert", "bert.embeddings.word_embeddings"),
        ("sequence_classification", "bert", "bert.embeddings.dropout"),
        ("masked_lm", "roberta", "roberta.embeddings.position_embeddings"),
        ("token_classification", "distilbert", "distilbert.embeddings.dropout"),
        ("masked_lm", "modernbert", "model.embeddings.norm"),
        ("causal_lm", "llama", "model.embed_tokens"),
    ],
)
def test_embeddings_are_computed_at_real_tokens(kind, model_type, part):
    padded, model, batch = make(kind, model_type)
    assert tokens_of(padded, batch, part) == PADDED
    assert tokens_of(model, batch, part) == REAL
    assert error(padded, model, batch) < EXACT
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).loss, padded.eval()(**batch).loss)


@pytest.mark.parametrize(
    ("kind", "model_type", "part"),
    [("causal_lm", "gpt2", "transformer.wte"), ("seq2seq_lm", "t5", "encoder.embed_tokens")],
)
def test_embeddings_that_the_model_changes_stay_padded(kind, model_type, part):
    padded, model, batch = make(kind, model_type)
    assert is_removed(model)
    assert tokens_of(model, batch, part) == PADDED
    assert error(padded, model, batch) < EXACT


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_token_types_positions_and_padding_on_the_left(model_type):
    head = build_head("masked_lm", model_type)
    wide, other = (head.collate(head.examples(lengths)) for lengths in (LENGTHS, OTHERS))
    for batch in (wide, other):
        mask = batch["attention_mask"] = batch["attention_mask"].flip(1)
        batch |= {name: batch[name].flip(1) for name in ("input_ids", "labels")}
        batch["token_type_ids"] = torch.arange(mask.shape[1]).expand_as(mask) % 2
        batch["token_type_ids"] %= head.model.config.type_vocab_size
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0) + 2
    padded = copy.deepcopy(head.model)
    gradacc_hf.remove_padding(head.model, wide)
    assert tokens_of(head.model, other, f"{model_type}.embeddings.word_embeddings") == REAL
    assert error(padded, head.model, other) < EXACT
    del other["position_ids"]
    assert error(padded, head.model, other) < EXACT


def test_given_embeddings_stay_padded():
    padded, model, batch = make("sequence_classification", "bert")
    batch["inputs_embeds"] = padded.get_input_embeddings()(batch.pop("input_ids")).detach()
    assert tokens_of(model, batch, "bert.embeddings.LayerNorm") == PADDED
    assert error(padded, model, batch) < EXACT


@pytest.mark.parametrize("reentrant", [False, True])
def test_frozen_embeddings_before_layers_that_are_computed_again(reentrant):
    padded, model, batch = make("causal_lm", "llama")
    options = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], lora_dropout=0.0)
    models = []
    for each in (padded, model):
        torch.manual_seed(0)
        enable = getattr(each, "activation_checkpointing_enable", None) or each.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        each.enable_input_require_grads()
        models.append(peft.get_peft_model(each, options))
    for each in models:
        for name, parameter in each.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape)
    assert error(*models, batch) < EXACT
