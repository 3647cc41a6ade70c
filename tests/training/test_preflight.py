"""The preflight check warns of causes of inexact accumulation before a run starts."""

import pytest
import torch
from accelerate import Accelerator

from gradacc_hf import WindowLoader
from gradacc_hf.accumulation.loss_items import model_loss
from gradacc_hf.training.preflight import preflight_check
from gradacc_hf.verification.tiny_models import build_head


def said(caplog, kind, model_type, **arguments):
    head = build_head(kind, model_type)
    examples = head.examples([5, 9, 30, 12])
    if kind == "causal_lm":
        examples = [{**example, "labels": example["input_ids"]} for example in examples]
    accelerator = Accelerator(cpu=True)
    windows = WindowLoader(
        examples,
        4,
        accelerator=accelerator,
        collate_fn=head.collate,
        max_tokens=64,
        **arguments,
    )
    before = {name: tensor.clone() for name, tensor in head.model.state_dict().items()}
    drawn = torch.random.get_rng_state()
    preflight_check(head.model, windows, model_loss)
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.model.state_dict().items())
    assert all(parameter.grad is None for parameter in head.model.parameters())
    return caplog.text


def test_a_loss_that_padding_reaches_is_named_with_the_cure(caplog):
    assert "no split is exact. If padding changes the loss" in said(caplog, "question_answering", "bert")


def test_items_that_are_not_those_of_the_loss_are_noticed(caplog):
    assert "no split is exact" in said(caplog, "causal_lm", "gpt2", num_items="labels")


def test_nothing_is_said_of_a_causal_model_with_its_own_items(caplog):
    assert said(caplog, "causal_lm", "gpt2", num_items="next_token") == ""


@pytest.mark.parametrize("pad_to", ["window", 40])
def test_nothing_is_said_when_a_window_is_padded_alike(caplog, pad_to):
    assert said(caplog, "question_answering", "bert", pad_to=pad_to) == ""


@pytest.mark.parametrize("model_type", ["bert", "roberta", "deberta-v2", "gpt2"])
def test_nothing_is_said_of_a_padding_invariant_model(caplog, model_type):
    assert said(caplog, "token_classification", model_type) == ""


def test_batch_norm_is_named(caplog):
    assert "16 modules normalise over the micro-batch (BatchNorm: resnet.embedder" in said(
        caplog, "image_classification", "resnet"
    )
