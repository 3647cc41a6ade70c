"""Weights in bf16: their gradients accumulate in float32, whatever stands between them and the step."""

import re

import pytest
import text_classification_runs
import torch
from accelerate import Accelerator
from recipe_runs import summary
from safetensors.torch import load_file
from text_classification_runs import make_rows, write

from gradacc_hf import WindowLoader, accumulate_in_float32, train
from gradacc_hf.accumulation.reference import RecordGradients, relative_error, whole_window_gradient
from gradacc_hf.training.lora import add_lora
from gradacc_hf.training.optimizer import make_optimizer
from gradacc_hf.training.settings import LoraConfig, OptimConfig
from gradacc_hf.utils.modeling import checkpoint_activations, disable_dropout
from gradacc_hf.verification.tiny_models import build_head

# Fixtures.
start = text_classification_runs.start
datasets_cache = text_classification_runs.datasets_cache
empty_folder = text_classification_runs.empty_folder

STEPS = (1, 4, 16, 64, 256)
ROUNDING = 2**-8  # of bf16


def error(steps, in_float32, checkpointing=False, lora=False, precision="no"):
    """How far what reaches the optimizer is from the window at once, over the same weights in float32."""
    head = build_head("causal_lm", "llama")
    model, examples = head.model, head.examples([12] * 256)
    disable_dropout(model.train())
    if lora:
        torch.manual_seed(0)
        add_lora(model, LoraConfig(rank=4), {"lm_head.weight"})
    truth = whole_window_gradient(model.bfloat16().float(), head.collate(examples))
    model.bfloat16()
    if checkpointing:
        checkpoint_activations(model)
    recorder = RecordGradients(model)
    if in_float32:
        accumulate_in_float32(model, recorder)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    settings = {"collate_fn": head.collate, "num_items": head.num_items, "accelerator": accelerator}
    windows = WindowLoader(examples, 256, micro_batch_size=256 // steps, **settings)
    prepared, optimizer = accelerator.prepare(model, recorder)
    [_] = train(prepared, optimizer, windows, accelerator=accelerator, max_grad_norm=1e9)
    assert {tensor.dtype for tensor in recorder.gradients[0].values()} == {torch.bfloat16}
    return relative_error(recorder.gradients[0], truth)


@pytest.mark.slow
def test_the_error_stays_flat_in_float32_and_grows_in_bf16():
    flat = [error(steps, in_float32=True) for steps in STEPS]
    growing = [error(steps, in_float32=False) for steps in STEPS]
    assert flat[0] == growing[0] < 8 * ROUNDING, "what the forward and backward in bf16 round"
    assert max(flat) == flat[0]
    assert growing == sorted(growing)
    assert growing[-1] > 1.3 * growing[0]


LORA, CHECKPOINTING = {"lora": True}, {"checkpointing": True}


@pytest.mark.parametrize("settings", [CHECKPOINTING, LORA, {**LORA, **CHECKPOINTING}, {"precision": "bf16"}])
def test_so_it_does_with_gradient_checkpointing_adapters_and_autocast(settings):
    once, flat, growing = (error(n, f, **settings) for n, f in ((1, True), (64, True), (64, False)))
    assert flat < 1.05 * once
    assert growing > 1.08 * once


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor"])
@pytest.mark.parametrize("precision", ["no", "fp16"], ids=["fused", "foreach"])  # as make_optimizer has it
def test_every_optimizer_steps_as_on_gradients_that_were_rounded_once(name, precision):
    torch.manual_seed(0)
    x, weights = torch.randn(64, 16).bfloat16(), []
    for in_float32 in (True, False):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.LayerNorm(8)).bfloat16()
        optimizer = make_optimizer(model, OptimConfig(name=name, lr=0.1), precision)
        parameters = list(model.parameters())
        if in_float32:
            accumulate_in_float32(model, optimizer)
        sums = [0.0 for _ in parameters]
        for _ in range(2):
            for piece in x.split(1):
                (model(piece).float() ** 3).mean().backward()
                if not in_float32:
                    sums = [total + p.grad.float() for total, p in zip(sums, parameters, strict=True)]
                    model.zero_grad()
            if not in_float32:
                for parameter, total in zip(parameters, sums, strict=True):
                    parameter.grad = total.bfloat16()
                sums = [0.0 for _ in parameters]
            else:
                assert {p.grad.dtype for p in parameters} == {torch.float32}
            optimizer.step()
            assert in_float32 == all(p.grad is None for p in parameters)
            optimizer.zero_grad()
        weights.append(torch.cat([p.detach().flatten() for p in parameters]))
    assert weights[0].dtype == torch.bfloat16
    assert torch.equal(*weights)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_clipped_zeroed_and_accumulated_in_float32(set_to_none):
    model = torch.nn.Linear(4, 1).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    accumulate_in_float32(model, optimizer)
    for _ in range(2):
        model(torch.ones(1, 4).bfloat16()).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert norm == pytest.approx(5**0.5)
        assert model.weight.grad.dtype == torch.float32
        assert float(model.weight.grad[0, 0]) == pytest.approx(0.1 / 5**0.5, rel=1e-4), "not a bf16 number"
        optimizer.zero_grad(set_to_none=set_to_none)


def test_float32_weights_are_left_alone():
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    accumulate_in_float32(model, optimizer)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert model.weight.grad is not None


def test_small_updates_are_lost_as_the_documentation_says():
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    torch.nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1 / 1024)
    accumulate_in_float32(model, optimizer)
    for _ in range(100):
        model(torch.ones(1, 1).bfloat16()).sum().backward()
        optimizer.step()
    assert model.weight.item() == 1


def test_a_run_in_bf16_learns_and_saves_bf16(start):
    outcome = start(
        data__train=write("a.csv", make_rows()),
        model__dtype="bfloat16",
        budget__precision="bf16",
        train__epochs=3,
        optim__lr=3e-3,
        output__dir="out",
    )
    assert outcome.code == 0, outcome.err
    assert "warning" not in outcome.err.lower()
    assert summary("out")["eval"]["accuracy"] > 0.9
    saved = load_file("out/last/model.safetensors").values()
    assert {tensor.dtype for tensor in saved} == {torch.bfloat16}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_bf16_weights_want_bf16_precision(start, precision):
    outcome = start(data__train="a.csv", model__dtype="bfloat16", budget__precision=precision)
    assert outcome.code == 2
    assert re.fullmatch(
        rf"error: model.dtype: found bfloat16 with budget.precision {precision}; allowed: float32, .*\n",
        outcome.err,
    )
