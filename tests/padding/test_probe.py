"""The check before padding is removed finds what mixes examples, drops masks or reads padding."""

import copy

import pytest
import torch
from transformers import BertModel

import gradacc_hf
from gradacc_hf import InputError, PaddingNotRemovableError
from gradacc_hf.padding import attention, probe
from gradacc_hf.padding.removal import is_grouped, is_removed
from gradacc_hf.padding.sample import make_sample
from gradacc_hf.verification.tiny_models import build_head

LENGTHS = [17, 9, 30, 9, 12, 3, 21]


def head_and_batch(kind="masked_lm", model_type="bert", lengths=LENGTHS):
    head = build_head(kind, model_type)
    return head.model, head.collate(head.examples(lengths))


def refusal(model, batch):
    with pytest.raises(PaddingNotRemovableError) as caught:
        gradacc_hf.remove_padding(model, batch)
    assert not is_removed(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "model_type", "reason"),
    [
        ("question_answering", "bert", "the loss reads hidden states of padding"),
        ("causal_lm", "lfm2_moe", "examples mix, or a mask is lost"),
        ("token_classification", "yoso", "examples mix, or a mask is lost"),
        ("masked_lm", "convbert", "the layers need the padded shape"),
        ("masked_lm", "squeezebert", "calls no repeated layers"),
        ("token_classification", "xlnet", "no layer gets states (batch, length, size)"),
    ],
)
def test_the_reason_of_a_refusal(kind, model_type, reason):
    assert reason in refusal(*head_and_batch(kind, model_type))


def test_a_head_at_zero_decides_as_well():
    model, batch = head_and_batch("sequence_classification", "bert")
    torch.nn.init.zeros_(model.classifier.weight)
    gradacc_hf.remove_padding(model, batch)
    assert is_grouped(model)
    assert not model.classifier.weight.any()
    mixing, batch = head_and_batch("sequence_classification", "yoso")
    torch.nn.init.zeros_(mixing.classifier.out_proj.weight)
    assert "examples mix" in refusal(mixing, batch)


@pytest.mark.parametrize("lengths", [LENGTHS, [8, 8, 8]])
@pytest.mark.parametrize("fault", ["mixes", "drops masks"])
def test_faulty_attention_is_found(monkeypatch, fault, lengths):
    model, batch = head_and_batch("masked_lm", "bert", lengths)
    groups = attention.PackedMask.group_masks

    def no_masks(self, explicit):
        return [None for _ in groups(self, explicit)]

    def one_example(states, blocks, sizes, groups):
        return [states for _ in groups[:1]]

    if fault == "drops masks":
        monkeypatch.setattr(attention.PackedMask, "group_masks", no_masks)
    else:
        monkeypatch.setattr(attention, "_blocks", one_example)
    try:
        gradacc_hf.remove_padding(model, batch)
    except PaddingNotRemovableError:
        return
    assert not is_grouped(model)  # padded attention modules are not concerned


def test_a_layer_that_is_skipped_at_random_is_named():
    model, batch = head_and_batch("seq2seq_lm", "bart")
    model.config.encoder_layerdrop = model.model.encoder.layerdrop = 0.1
    assert "layerdrop skips layers at random; set it to 0" in refusal(model, batch)


def test_a_module_of_another_library_is_named():
    model, batch = head_and_batch()
    assert "removed from Sequential: it has no config of transformers" in refusal(
        torch.nn.Sequential(model), batch
    )


def test_what_forwards_change_in_modules_is_restored():
    model, batch = head_and_batch()
    layer = model.base_model.encoder.layer[0]
    layer.calls, seen = 0, torch.zeros(())
    layer.register_buffer("seen", seen)

    def change(module, args):
        module.calls += 1
        module.seen += 1
        module.seen = module.seen.clone()

    layer.register_forward_pre_hook(change)
    gradacc_hf.remove_padding(model, batch)
    assert is_grouped(model)
    assert (layer.calls, layer.seen is seen, seen.item()) == (0, True, 0)


def test_labels_that_decide_nothing_are_named():
    model, batch = head_and_batch()
    batch["labels"][:] = -100
    assert "of the sample decide nothing" in refusal(model, batch)


def test_a_model_without_a_loss_is_checked_on_its_outputs():
    head, batch = head_and_batch()
    model = BertModel(head.config).train()
    padded = copy.deepcopy(model)
    batch.pop("labels")
    gradacc_hf.remove_padding(model, batch)
    real = batch["attention_mask"] != 0
    hidden, expected = (one(**batch).last_hidden_state[real] for one in (model, padded))
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch.pop("attention_mask"), "no attention_mask of shape (batch, length)"),
        (lambda batch: batch["attention_mask"][:, 3:].zero_(), "the longest example has 3 tokens"),
    ],
)
def test_a_batch_that_cannot_be_used_is_named(change, message):
    model, batch = head_and_batch()
    change(batch)
    with pytest.raises(InputError) as caught:
        gradacc_hf.remove_padding(model, batch)
    assert message in str(caught.value)


def test_the_check_compares_few_gradients_of_a_large_model(monkeypatch):
    model, batch = head_and_batch()
    monkeypatch.setattr(probe, "MOST_COMPARED", 2_000)
    seen, compare = [], probe.compare

    def record(way, gradient, reference):
        seen.append(gradient)
        return compare(way, gradient, reference)

    monkeypatch.setattr(probe, "compare", record)
    for _ in range(2):  # the first time leaves no hook of parameters, which would be refused
        gradacc_hf.remove_padding(model, batch)
        assert is_grouped(model)
        gradacc_hf.restore_padding(model)
    for gradient in seen:
        assert sum(one.numel() for one in gradient.values()) <= 2_000
        assert not any("word_embeddings" in name for name in gradient)
        assert all(f"bert.encoder.layer.{layer}.output.LayerNorm.bias" in gradient for layer in (0, 1))


def test_an_optimizer_in_the_backward_pass_is_refused():
    model, batch = head_and_batch()
    weight = next(model.parameters())
    handle = weight.register_post_accumulate_grad_hook(lambda parameter: parameter.data.add_(1))
    before = weight.detach().clone()
    assert "hooks after the backward pass" in refusal(model, batch)
    assert torch.equal(weight, before)
    handle.remove()
    gradacc_hf.remove_padding(model, batch)


@pytest.mark.parametrize("lengths", [[8, 8, 8, 8, 8], [9], [5, 6], [4, 8, 16, 32, 64], [9, 9, 4]])
def test_a_sample_has_two_lengths_and_two_of_one(lengths):
    _, batch = head_and_batch(lengths=lengths)
    sample = make_sample(batch, pad_token_id=0)
    found = sample["attention_mask"].sum(1).tolist()
    assert len(set(found)) > 1
    assert len(found) <= 4
    assert len(found) < 3 or len(set(found)) < len(found)
    padding = sample["attention_mask"] == 0
    assert (sample["labels"][padding] == -100).all()
    assert (sample["input_ids"][padding] == 0).all()
    ends = sample["attention_mask"].sum(1) - 1
    assert (sample["input_ids"][range(len(ends)), ends] == 2).all()  # the separator stays
