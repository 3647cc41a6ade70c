"""Muon with AdamW: which weights each part trains, as one optimizer with the same numbers as two."""

import copy

import pytest
import torch
from accelerate import Accelerator

from gradacc_hf.errors import InputError
from gradacc_hf.training.muon import hidden_matrices
from gradacc_hf.training.optimizer import Schedule, choose_trained, learning_rate, make_optimizer
from gradacc_hf.training.settings import LoraConfig, ModelConfig, OptimConfig
from gradacc_hf.verification.tiny_models import build_head

MUON = OptimConfig("muon", 1e-2, weight_decay=0.1)


@pytest.mark.parametrize(
    ("kind", "model_type", "others"),
    [
        (
            "sequence_classification",
            "bert",
            {"word_embeddings", "position_embeddings", "token_type_embeddings"},
        ),
        ("causal_lm", "gpt2", {"wte", "wpe"}),  # Conv1D instead of Linear, and a head with the embeddings
        ("causal_lm", "llama", {"embed_tokens", "lm_head"}),
        ("seq2seq_lm", "t5", {"shared", "relative_attention_bias"}),
    ],
)
def test_muon_trains_the_matrices_of_hidden_layers(kind, model_type, others):
    model = build_head(kind, model_type).model
    hidden = {id(weight) for weight in hidden_matrices(model)}
    found = {
        name.split(".")[-2] for name, p in model.named_parameters() if p.ndim == 2 and id(p) not in hidden
    }
    assert found == others | ({"classifier"} if kind == "sequence_classification" else set())
    first, *more = make_optimizer(model, MUON).param_groups
    assert {id(weight) for weight in first["params"]} == hidden
    assert sum(len(group["params"]) for group in (first, *more)) == len(list(model.parameters()))


def steps(model, optimizers, factors, load_after=None):
    """Step with the same gradients, and load the optimizer's state into itself once."""
    schedules = [Schedule(optimizer, factors.__getitem__, by_examples=False) for optimizer in optimizers]
    torch.manual_seed(1)
    for step in range(len(factors) - 1):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            if step == load_after:
                optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
            schedule.step()


def test_a_copy_of_muon_with_adamw_steps_by_itself():
    model = build_head("causal_lm", "llama").model
    optimizer = make_optimizer(model, MUON)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    copied_model, copied = copy.deepcopy((model, optimizer))
    for each in (optimizer, copied):
        for group in each.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
    copied.step()
    assert not torch.equal(copied_model.lm_head.weight, model.lm_head.weight)
    optimizer.step()
    for parameter, other in zip(model.parameters(), copied_model.parameters(), strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize("load_after", [None, 2])
def test_one_optimizer_of_two_parts_steps_as_two_optimizers(load_after):
    one, two = (build_head("causal_lm", "llama").model for _ in range(2))
    hidden = {id(weight) for weight in hidden_matrices(two)}
    matrices, wide, narrow = (
        [p for p in two.parameters() if (id(p) in hidden, p.ndim >= 2) == kind]
        for kind in ((True, True), (False, True), (False, False))
    )
    prepared = Accelerator(cpu=True).prepare(make_optimizer(one, MUON)).optimizer
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": wide, "weight_decay": 0.1}, {"params": narrow, "weight_decay": 0.0}]
    factors = [0.5, 1.0, 0.7, 0.3, 0.0]
    steps(one, [prepared], factors, load_after)
    steps(two, [muon, torch.optim.AdamW(groups, lr=1e-2, fused=True)], factors)
    for (name, found), expected in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert {group["lr"] for group in prepared.param_groups} == {0.0}


def test_muon_without_a_matrix_to_train_is_refused():
    model = build_head("sequence_classification", "bert").model
    choose_trained(model, ModelConfig(freeze=["bert.*"], lora=LoraConfig()), None)
    with pytest.raises(
        InputError, match=r"^optim\.name: found muon, and no matrix .* is trained; use adamw$"
    ):
        make_optimizer(model, MUON)


@pytest.mark.parametrize("total", [3, 5, 9])
def test_warmup_and_decay_of_all_windows_reach_the_full_rate(total):
    wsd = OptimConfig(lr=1.0, scheduler="wsd", warmup_ratio=0.5, decay_ratio=0.5)
    rates = [learning_rate(wsd, window, total) for window in range(1, total + 2)]
    assert max(rates) == rates[-(-total // 2)] == 1  # both parts are rounded up to whole windows
    assert rates[-1] == 0


def test_a_floor_is_where_cosine_ends_and_the_long_name_of_constant_is_the_same():
    cosine = OptimConfig(lr=1.0, scheduler="cosine", min_lr_ratio=0.1, warmup_ratio=0.5)
    rates = [learning_rate(cosine, window, 8) for window in (1, 3, 5, 7, 9)]
    assert rates == pytest.approx([0, 0.5, 1, 0.55, 0.1])
    constant, alias = (
        OptimConfig(scheduler=s, warmup_ratio=0.5) for s in ("constant", "constant_with_warmup")
    )
    assert [learning_rate(constant, w, 8) for w in range(1, 9)] == [
        learning_rate(alias, w, 8) for w in range(1, 9)
    ]
