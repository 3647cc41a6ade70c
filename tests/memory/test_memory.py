"""The predicted memory of a step equals a trace of the whole model at that size, and torch's own counts."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from recipe_runs import load_recipe, make_recipe, write_rows
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from gradacc_hf.accumulation.loss_items import IGNORED, model_loss
from gradacc_hf.accumulation.splitting import Bound
from gradacc_hf.errors import InputError, NotTraceableError
from gradacc_hf.memory import estimator as estimating
from gradacc_hf.memory.estimator import Point, StepSettings, estimate, terms_of
from gradacc_hf.padding.removal import remove_padding
from gradacc_hf.run import memory_bound as recipes
from gradacc_hf.run.setup import make_model
from gradacc_hf.tasks.lean_loss import make_lean
from gradacc_hf.training.lora import add_lora
from gradacc_hf.training.optimizer import make_optimizer
from gradacc_hf.training.settings import LoraConfig, OptimConfig
from gradacc_hf.utils.modeling import checkpoint_activations

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
LENGTHS = ((8,), (16,), (40,))


def llama(attention="sdpa", checkpointing=False, lora=0, lean=False, dtype=torch.float32, layers=4):
    config = transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": layers}, vocab_size=300)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    if lean:
        make_lean(model, True)
    if lora:
        add_lora(model, LoraConfig(rank=lora), [])
    if checkpointing:
        checkpoint_activations(model)
    return model


def t5(attention="eager", lean=False):
    sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "vocab_size": 300}
    config = transformers.T5Config(**sizes, num_layers=4, num_decoder_layers=1, decoder_start_token_id=0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation=attention)
    if lean:
        make_lean(model, True)
    return model


def tokens(rows, lengths):
    ids = torch.ones(rows, lengths[0], dtype=torch.long)
    labels = torch.ones(rows, lengths[-1], dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def predict(build, settings=StepSettings(), lengths=LENGTHS, rows=(2, 3)):
    points = [Point(r, one, tokens(r, one)) for r in rows for one in lengths]
    return estimate(build, points, terms_of(np.array(lengths)), model_loss, settings)


def predict_at(build, rows, lengths, settings=StepSettings()):
    """Of this size alone, every layer traced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimating, "equal_layers", lambda model: {})
        point = Point(rows, lengths, tokens(rows, lengths))
        return estimate(build, [point], np.zeros((1, 1 + len(lengths)), int), model_loss, settings)


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({"attention": "eager"}, "fp32"),
        ({"checkpointing": True, "lora": 4, "dtype": torch.bfloat16}, "bf16"),
    ],
)
def test_a_size_and_layers_that_were_not_traced_are_predicted_to_the_byte(options, precision):
    def build():
        return llama(**options)

    settings = StepSettings(precision=precision)
    found = predict(build, settings)
    whole = predict_at(build, 50, (100,), settings)
    predicted, traced = found.memory.parts(50, 100), whole.memory.parts(50, 100)
    assert predicted.total == pytest.approx(traced.total, rel=1e-4, abs=4096)
    assert predicted.parameters == traced.parameters
    assert found.flops_of(50, 100) == pytest.approx(whole.flops_of(50, 100), rel=1e-6)


def test_the_two_lengths_of_an_encoder_decoder_are_told_apart():
    lengths = ((8, 8), (16, 24), (40, 8), (8, 40), (24, 40), (40, 16))
    found = predict(t5, lengths=lengths)
    whole = predict_at(t5, 20, (50, 90))
    assert found.memory.bytes(20, (50, 90)) == pytest.approx(whole.memory.bytes(20, (50, 90)), rel=1e-3)


def test_the_peak_is_that_of_torch_s_own_tracker():
    """Trace the first step of a model without gradients, as MemTracker does."""
    batch = tokens(4, (32,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = llama(layers=2)
        given = {name: torch.zeros_like(value) for name, value in batch.items()}
        torchs = MemTracker()
        torchs.track_external(model, *given.values())
        with torchs:
            model(**given).loss.backward()
        peak = next(iter(torchs.get_tracker_snapshot("peak").values()))["Total"]
        model.zero_grad()
        ours = estimating.trace(model, given, model_loss)
        parameters = sum(p.numel() * p.itemsize for p in model.parameters())
    most = max(phase.held.sum(axis=1).max() for phase in ours.phases)
    assert most + parameters == pytest.approx(peak, rel=0.01)


def test_parts_are_what_they_are():
    found = predict_at(lambda: llama(layers=2), 8, (64,))
    model = llama(layers=2)
    number = sum(p.numel() for p in model.parameters())
    assert (found.total_parameters, found.trained_parameters) == (number, number)
    buffers = sum(b.numel() * b.itemsize for b in model.buffers())
    assert found.memory.parameters == 4 * number + buffers
    assert found.memory.gradients == 4 * number
    steps = 4 * len(list(model.parameters()))  # AdamW counts them for each weight
    assert found.memory.optimizer == 8 * number + steps
    assert found.memory.parts(8, 64).loss >= 2 * 4 * 8 * 64 * 300  # logits, and their gradient


def test_states_in_8_bits_are_a_quarter_but_of_embeddings():
    model = llama(layers=2)
    embeddings = model.get_input_embeddings().weight.numel()
    small = sum(p.numel() for p in model.parameters() if p.numel() < 4096)
    others = sum(p.numel() for p in model.parameters()) - embeddings - small
    found = predict_at(lambda: llama(layers=2), 2, (8,), StepSettings(OptimConfig(name="adamw_8bit")))
    assert found.memory.optimizer == pytest.approx(8 * (embeddings + small) + 2 * others, rel=0.02)


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "muon", "schedule_free_adamw"])
def test_the_states_of_an_optimizer_are_those_that_it_makes(name):
    if name == "schedule_free_adamw":
        pytest.importorskip("schedulefree", reason="needs the extra schedulefree")
    model = llama(layers=2)
    settings = StepSettings(OptimConfig(name=name))
    optimizer = make_optimizer(model, settings.optim)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    made = sum(estimating.tensor_bytes(state.values()) for state in optimizer.state.values())
    assert predict_at(lambda: llama(layers=2), 2, (8,), settings).memory.optimizer == made


def test_offloaded_inputs_of_layers_take_no_memory_of_a_gpu():
    def build(offload):
        model = llama(layers=8)
        checkpoint_activations(model, offload)
        return model

    if not hasattr(transformers.PreTrainedModel, "activation_checkpointing_enable"):
        with pytest.raises(InputError, match=r"offload_activations: found true with transformers 5\..*5\.23"):
            build(True)
        return
    kept, offloaded = (
        predict_at(partial(build, offload), 4, (512,), StepSettings(on_gpu=True)).memory.parts(4, 512)
        for offload in (False, True)
    )
    of_one_layer = 4 * 512 * SIZES["hidden_size"] * 4
    assert kept.activations - offloaded.activations == 7 * of_one_layer  # one is needed at the peak
    assert (kept.loss, kept.parameters) == (offloaded.loss, offloaded.parameters)


def test_matrices_of_pissa_are_counted_twice_and_lengths_of_dora_once():
    def build(**settings):
        config = transformers.LlamaConfig(**SIZES, vocab_size=300)
        model = transformers.AutoModelForCausalLM.from_config(config)
        add_lora(model, LoraConfig(rank=4, **settings), [])
        return model

    plain, pissa, dora = (
        predict_at(partial(build, **more), 1, (8,)) for more in ({}, {"init": "pissa"}, {"dora": True})
    )
    assert pissa.memory.parameters - plain.memory.parameters == 4 * plain.trained_parameters
    assert pissa.memory.optimizer == plain.memory.optimizer
    rows = sum(m.out_features for name, m in build().named_modules() if name.endswith("base_layer"))
    assert dora.trained_parameters - plain.trained_parameters == rows


def test_gradients_of_bf16_weights_are_float32_and_frozen_ones_have_none():
    found = predict_at(lambda: llama(lora=4, dtype=torch.bfloat16), 2, (8,), StepSettings(precision="bf16"))
    assert found.memory.gradients == 4 * found.trained_parameters
    assert found.trained_parameters < found.total_parameters / 10


def test_of_weights_in_4_bits_no_copy_is_held_for_the_backward_pass():
    whole, quantized = (
        predict_at(lambda: llama(lora=4), 1, (8,), StepSettings(precision="bf16", four_bit=four_bit)).memory
        for four_bit in (False, True)
    )
    inside = llama(lora=4).model.layers.named_parameters()
    copies = 2 * sum(p.numel() for name, p in inside if p.ndim == 2 and "lora" not in name)
    spared = whole.parts(1, 8).activations - quantized.parts(1, 8).activations
    assert spared == pytest.approx(copies, rel=0.1)
    assert whole.parameters - quantized.parameters > 0.85 * 2 * copies


@pytest.mark.parametrize(("build", "lengths"), [(partial(llama, layers=2), (256,)), (t5, (8, 256))])
def test_a_lean_loss_holds_a_few_hundred_tokens_logits_at_most(build, lengths):
    lean = predict_at(partial(build, lean=True), 64, lengths).memory.parts(64, lengths)
    usual = predict_at(build, 64, lengths).memory.parts(64, lengths)
    assert lean.loss < usual.loss / 3


def test_dropout_makes_attention_quadratic_on_a_cpu_and_not_on_a_gpu():
    def build():
        config = transformers.BertConfig(**SIZES, vocab_size=300, max_position_embeddings=4096)
        return transformers.AutoModelForTokenClassification.from_config(config)

    cpu, gpu = (
        predict_at(build, 1, (4000,), StepSettings(on_gpu=on_gpu)).memory.parts(1, 4000)
        for on_gpu in (False, True)
    )
    assert cpu.activations > 3 * gpu.activations


def test_experts_are_traced_in_float32_and_take_memory_for_the_tokens_of_each_choice():
    def build(chosen):
        sizes = SIZES | {"intermediate_size": 512, "num_key_value_heads": 4}
        more = {"num_local_experts": 4, "num_experts_per_tok": chosen, "vocab_size": 300}
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **more))

    one, four = (
        predict_at(partial(build, chosen), 8, (128,)).memory.parts(8, 128).activations for chosen in (1, 4)
    )
    assert four > 2 * one


def test_a_model_that_cannot_be_traced_says_so_in_a_line():
    class Asks(torch.nn.Linear):
        def forward(self, input_ids, **_):
            raise RuntimeError("line one\nline two" if input_ids.shape else "")

    with pytest.raises(NotTraceableError, match="RuntimeError: line one line two"):
        predict(lambda: Asks(2, 2))


# Of recipes


@pytest.fixture
def rows_of(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = "the quick brown fox jumps over the lazy dog and then some more of them " * 3
    texts = [words[: 20 + 9 * i] for i in range(20)]
    return lambda **columns: write_rows(
        tmp_path / "rows.jsonl", [{n: c(t, i) for n, c in columns.items()} for i, t in enumerate(texts)]
    )


def of_recipe(recipe):
    training, _ = recipe.datasets()
    lengths = memory_lengths(recipe, training)
    return recipes.recipe_memory(recipe, training, lengths, make_model, on_gpu=False), lengths


def memory_lengths(recipe, training):
    from gradacc_hf.accumulation.lengths import measure_lengths

    return measure_lengths(training, recipe.lengths(training))


def test_an_estimate_needs_no_weights_and_is_kept_in_the_cache(tiny_bert, rows_of, tmp_path, monkeypatch):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_bert.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    data = rows_of(text=lambda t, i: t, label=lambda t, i: "ab"[i % 2])
    settings = ["--model.name", bare, "--data.train", data, "--batch.effective", 8, "--data.max_length", 32]
    recipe_class = load_recipe("text_classification").TextClassification
    recipe = make_recipe(recipe_class, *settings).weightless()
    found, _ = of_recipe(recipe)
    assert found.memory.bytes(64, 32) > found.memory.bytes(2, 32)

    monkeypatch.setattr(recipes, "estimate", lambda *_: pytest.fail("traced again"))
    recipe = make_recipe(recipe_class, *settings).weightless()
    again, _ = of_recipe(recipe)
    assert json.dumps(again.to_json()) == json.dumps(found.to_json())
    assert not list((tmp_path / "cache" / "gradacc_hf").glob(".*"))


def test_masked_positions_are_counted_as_often_as_they_are_masked(tiny_bert, rows_of):
    data = rows_of(text=lambda t, i: t)
    recipe = make_recipe(
        load_recipe("masked_lm").MaskedLM, "--model.name", tiny_bert, "--data.train", data,
        "--data.max_length", 32, "--batch.effective", 8,
    )  # fmt: skip
    found, _ = of_recipe(recipe)
    loss = found.memory.parts(64, 32).loss
    vocabulary = len(recipe.tokenizer)
    of_all = 64 * 32 * vocabulary * 4
    assert 0.15 * of_all < loss < 1.2 * of_all


def test_the_loader_says_which_example_does_not_fit_with_its_bytes(tiny_bert, rows_of, caplog):
    from accelerate import Accelerator

    from gradacc_hf.run.setup import make_windows

    data = rows_of(text=lambda t, i: t, label=lambda t, i: "ab"[i % 2])
    recipe = make_recipe(
        load_recipe("text_classification").TextClassification, "--model.name", tiny_bert, "--data.train",
        data, "--batch.effective", 8, "--data.max_length", 32, "--budget.memory", "1GiB",
    )  # fmt: skip
    training, validation = recipe.datasets()
    windows, _ = make_windows(recipe, training, validation, Accelerator(cpu=True))
    assert windows.bound.max_bytes == 2**30
    most = windows.bound.memory.bytes(1, 20)
    make_windows(
        recipe, training, validation, Accelerator(cpu=True), Bound(None, None, most, windows.bound.memory)
    )
    assert "padded tokens, predicted to take" in caplog.text
    assert "each runs alone" in caplog.text


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["sequence_classification", "causal_lm"])
def test_a_step_without_padding_holds_at_most_what_is_predicted(kind, attention):
    """Of lengths that were not traced, against the tensors of a real step after `remove_padding`."""

    def build():
        sizes = {**SIZES, "vocab_size": 300}
        if kind == "causal_lm":
            config = transformers.LlamaConfig(**sizes)
            return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        config = transformers.BertConfig(**sizes, num_labels=3)
        build_one = transformers.AutoModelForSequenceClassification.from_config
        return build_one(config, attn_implementation=attention)

    def batch(lengths):
        ids = torch.ones(len(lengths), max(lengths), dtype=torch.long)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        labels = torch.zeros(len(lengths), dtype=torch.long)
        labels = torch.where(mask == 1, ids, IGNORED) if kind == "causal_lm" else labels
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    points = [Point(r, one, batch(one * r)) for r in (2, 3) for one in LENGTHS]
    memory = replace(
        estimate(build, points, terms_of(np.array(LENGTHS)), model_loss, StepSettings()).memory,
        workspace_share=0.0,
    )
    lengths = np.minimum(90, 4 + np.random.default_rng(0).exponential(25, 24)).astype(int).tolist()
    model, mixed = build().train(), batch(lengths)
    model_loss(model(**mixed), mixed).backward()  # gradients exist in the middle of a window
    remove_padding(model, mixed)
    most = max(phase.held.sum(axis=1).max() for phase in estimating.trace(model, mixed, model_loss).phases)
    predicted = memory.bytes_without_padding(np.array(lengths)[:, None]) - memory.resident
    assert most <= predicted < (1.5 if attention == "eager" else 1.4) * most
    assert predicted < memory.bytes(len(lengths), max(lengths)) - memory.resident
