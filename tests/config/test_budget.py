"""What a budget asks of the hardware and the model: honoured, or one line that says which key is not."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from conftest import ROOT
from recipe_runs import load_recipe, make_recipe
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from gradacc_hf.accumulation.reference import EXACT, read_gradient, relative_error
from gradacc_hf.bench import cpu_speed
from gradacc_hf.config.budget import adapt_budget, export_cpu_offload, fit_to_machine
from gradacc_hf.config.parser import read_command_line
from gradacc_hf.config.schema import BudgetConfig, Config
from gradacc_hf.errors import InputError, MissingExtraError
from gradacc_hf.recipe.budget import fit_to_model
from gradacc_hf.recipe.loading import open_run
from gradacc_hf.run.setup import load_data, make_model, make_windows
from gradacc_hf.training.compile import compile_layers
from gradacc_hf.training.optimizer import check_optimizer
from gradacc_hf.training.settings import OptimConfig
from gradacc_hf.utils import extras
from gradacc_hf.utils.hardware import ALLOCATOR_NAMES, Device, find_device, set_up_allocator
from gradacc_hf.utils.modeling import checkpoint_activations, is_compiled
from gradacc_hf.verification.exactness import verify

TextClassification = load_recipe("text_classification").TextClassification
CausalLM = load_recipe("causal_lm").CausalLM
BUDGETS = ROOT / "configs" / "budgets"
FLASH = BudgetConfig(attention="flash_attention_2", precision="bf16")


@pytest.fixture
def rows(tmp_path):
    """Texts of 1 to 30 words, of two classes."""
    random, path = np.random.default_rng(0), tmp_path / "rows.csv"
    texts = [" ".join(random.choice(["tea", "cash", "garden"], n)) for n in random.integers(1, 30, 60)]
    pd.DataFrame({"text": texts, "label": ["ham", "spam"] * 30}).to_csv(path, index=False)
    return path


def small_recipe(tiny_bert, rows, *arguments, recipe=TextClassification):
    shared = ["--model.name", tiny_bert, "--model.dropout", 0, "--data.train", rows, "--batch.effective", 16]
    return make_recipe(recipe, *shared, "--data.max_length", 32, *arguments)


# What the hardware cannot honour


@pytest.mark.parametrize(
    ("asked", "device", "honoured", "line"),
    [
        ({"precision": "fp16"}, Device("cpu"), {"precision": "fp32"}, "precision: fp16 needs a GPU"),
        ({"precision": "bf16"}, Device("cuda", bf16=False), {"precision": "fp16"}, "precision: bf16 needs"),
        (
            {"compile": True},
            Device("cpu", compiler=False),
            {"compile": False},
            "compile: needs a C++ compiler",
        ),
        (
            {"attention": "flash_attention_2"},
            Device("cpu"),
            {"attention": None},
            "attention: flash_attention_2",
        ),
    ],
)
def test_what_only_makes_a_run_faster_is_left_off_with_a_line(asked, device, honoured, line):
    budget, lines = adapt_budget(BudgetConfig(**asked), device)
    assert budget == BudgetConfig(**honoured)
    assert len(lines) == 1
    assert lines[0].startswith(f"budget.{line}")


def test_flash_attention_needs_its_package_and_a_half_precision():
    gpu = Device("cuda", flash_attention=True)
    assert adapt_budget(FLASH, gpu) == (FLASH, [])
    assert "is not installed" in adapt_budget(FLASH, replace(gpu, flash_attention=False))[1][0]
    budget, [line] = adapt_budget(replace(FLASH, precision="fp32"), gpu)
    assert budget.attention is None
    assert "budget.precision is fp32" in line


def test_what_a_device_can_do_is_left_as_it_is():
    budget = BudgetConfig(precision="bf16", compile=True, attention="eager", pad_to_multiple_of=8)
    assert adapt_budget(budget, Device("cuda")) == (budget, [])
    assert adapt_budget(replace(budget, precision="fp32"), Device("cpu"))[1] == []


def test_offload_is_refused_without_fsdp2_as_a_run_would_not_fit(monkeypatch):
    with pytest.raises(InputError, match=r"budget\.cpu_offload: found true without FSDP2; allowed is false"):
        adapt_budget(BudgetConfig(cpu_offload=True), Device("cuda"))
    for name, value in {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_OFFLOAD_PARAMS": "",
    }.items():
        monkeypatch.setenv(name, value)
    assert find_device().fsdp2
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "false")
    config, lines = fit_to_machine(Config(budget=BudgetConfig(cpu_offload=True)))
    assert (config.budget.cpu_offload, lines) == (True, [])
    export_cpu_offload(config.budget)
    assert type(FullyShardedDataParallelPlugin().cpu_offload).__name__ == "CPUOffloadPolicy"


def test_activations_are_offloaded_from_a_gpu_only_and_with_checkpointing():
    budget = BudgetConfig(gradient_checkpointing=True, offload_activations=True)
    assert adapt_budget(budget, Device("cuda")) == (budget, [])
    with pytest.raises(InputError, match=r"^budget\.offload_activations: found true without a CUDA GPU"):
        adapt_budget(budget, Device("cpu"))
    flags = ["--data.train", "a.csv", "--budget.offload_activations", "true"]
    with pytest.raises(InputError, match=r"offload_activations: .* false without budget.gradient_checkpoint"):
        read_command_line(flags)


def test_an_optimizer_that_is_not_here_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")  # as in an old torch
    with pytest.raises(InputError, match=r"^optim\.name: torch .* has no Muon; install torch 2\.9 or newer$"):
        check_optimizer(OptimConfig(name="muon"))
    monkeypatch.setattr(extras, "is_installed", lambda distribution: False)
    with pytest.raises(
        MissingExtraError, match=r"schedulefree, not installed here: .*gradacc-hf\[schedulefree\]"
    ):
        check_optimizer(OptimConfig(name="schedule_free_adamw", scheduler="constant"))


def test_an_8_bit_optimizer_is_refused_without_a_gpu_as_another_would_be_another_run():
    check_optimizer(OptimConfig(name="adafactor"))
    with pytest.raises(
        InputError, match=r"^optim\.name: found adamw_8bit without a CUDA GPU; allowed here: "
    ):
        check_optimizer(OptimConfig(name="adamw_8bit"))


def test_the_allocator_is_set_up_unless_the_user_has(monkeypatch):
    for name in ALLOCATOR_NAMES:
        monkeypatch.delenv(name, raising=False)
    set_up_allocator()
    set_by = [name for name in ALLOCATOR_NAMES if name in os.environ]
    assert len(set_by) == 1
    monkeypatch.delenv(set_by[0])
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    set_up_allocator()
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_all_budget_files_say_the_same_keys_in_the_same_order():
    orders = [list(yaml.safe_load(path.read_text())) for path in sorted(BUDGETS.glob("gpu_*.yaml"))]
    assert len(orders) == 6
    assert all(order == orders[0] for order in orders)
    assert ["memory", *yaml.safe_load((BUDGETS / "cpu.yaml").read_text())] == orders[0]


def test_an_automatic_budget_says_what_it_has_found_and_a_run_what_is_not_honoured(start, rows):
    asked = ["--budget.precision", "fp16", "--budget.attention", "flash_attention_2", "--check"]
    outcome = start(TextClassification, "--data.train", rows, "--budget", "auto", *asked)
    assert outcome.code == 0
    assert "auto: no GPU: the CPU, 1 thread\n" in outcome.out
    assert "fp32" in outcome.out
    assert [line.partition(" ")[0] for line in outcome.err.splitlines()] == [
        "budget.precision:",
        "budget.attention:",
    ]


# Attention


def test_attention_reaches_the_model(tiny_bert, rows):
    for attention, used in (("eager", "eager"), ("sdpa", "sdpa"), (None, "sdpa")):
        recipe = small_recipe(tiny_bert, rows, "--budget.attention", attention or "null")
        recipe.datasets()
        assert make_model(recipe).config._attn_implementation == used


def test_a_model_without_that_attention_has_its_own_choice(tmp_path, tiny_bert, rows, capsys):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.DebertaV2Config(vocab_size=len(tokenizer), **sizes)
    transformers.DebertaV2Model(config).save_pretrained(tmp_path / "deberta")
    tokenizer.save_pretrained(tmp_path / "deberta")
    recipe = small_recipe(tmp_path / "deberta", rows, "--budget.attention", "sdpa")
    fitted, _, _ = load_data(recipe)
    assert recipe.config.budget.attention == "sdpa"
    assert fitted.config.budget.attention is None
    assert make_model(fitted).config._attn_implementation == "eager"
    [line] = capsys.readouterr().err.splitlines()
    assert line == (
        "budget.attention: DebertaV2ForSequenceClassification has no sdpa: using the model's own choice"
    )


# Padding to a multiple


def test_micro_batches_are_padded_to_a_multiple_as_planned_and_stay_exact(tiny_bert, rows):
    recipe = small_recipe(tiny_bert, rows, "--budget.pad_to_multiple_of", 8, "--budget.max_tokens", 96)
    windows, _ = make_windows(recipe, *recipe.datasets(), Accelerator(cpu=True))
    widths = set()
    for number, window in enumerate(windows):
        shapes = [batch["input_ids"].shape for batch in window.batches()]
        widths |= {width for _, width in shapes}
        assert sum(shape.numel() for shape in shapes) == window.padded_tokens
        assert window.tokens == windows.tokens[window.indices].sum()
        assert all(shape.numel() <= 96 for shape in shapes)
        assert len(shapes) == len(windows.split(0, number).processes[0])
    assert widths == {16, 24, 32}
    windows, _ = make_windows(recipe, *recipe.datasets(), Accelerator(cpu=True))
    assert verify(make_model(recipe), windows, recipe.loss, num_windows=2, trainer=False).exact


@pytest.mark.parametrize(
    ("recipe", "arguments", "why"),
    [
        (CausalLM, ["--data.packing", "true"], "where nothing is padded"),
        (
            type("Windows", (TextClassification,), {"pad_to": "window"}),
            [],
            "where all examples of a window have one length",
        ),
    ],
)
def test_padding_to_a_multiple_is_left_off_where_it_is_of_no_use(
    tiny_bert, rows, capsys, recipe, arguments, why
):
    made = small_recipe(tiny_bert, rows, "--budget.pad_to_multiple_of", 8, *arguments, recipe=recipe)
    dataset = TextClassification.datasets(small_recipe(tiny_bert, rows))
    fitted = fit_to_model(made)
    windows, _ = make_windows(fitted, *dataset, Accelerator(cpu=True))
    assert windows.pad_to_multiple_of == 1
    assert made.config.budget.pad_to_multiple_of == 8
    assert fitted.config.budget.pad_to_multiple_of is None
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("budget.pad_to_multiple_of: no effect for")
    assert line.endswith(why)


def test_padding_beyond_the_positions_is_refused(start, rows):
    outcome = start(
        TextClassification, "--data.train", rows, "--data.max_length", 60, "--budget.pad_to_multiple_of", 50
    )
    assert outcome.code == 2
    assert outcome.err == (
        "error: budget.pad_to_multiple_of: found 50, which pads data.max_length 60 to 100 tokens; "
        "the model has 64 positions: lower either\n"
    )


# Compiling


@pytest.fixture
def traced_only(monkeypatch):
    """What is traced, and how often, without the minute that a C++ compiler takes."""
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **k: original(self, backend="eager", **k))
    torch._dynamo.reset()
    counters.clear()


def history(folder):
    return [json.loads(line) for line in Path(folder, "history.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run_saved_as_a_plain_model(traced_only, start, rows, tiny_bert):
    shared = ["--data.train", rows, "--budget.micro_batch_size", 5, "--train.max_windows", 3]
    shared += ["--budget.padding_free", "off"]
    assert start(TextClassification, *shared, "--output.dir", "plain").code == 0
    ran = start(TextClassification, *shared, "--output.dir", "compiled", "--budget.compile", "true")
    assert (ran.code, ran.err) == (0, "")
    graphs = counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 2, "one for many examples, one for one; none for evaluation"
    assert not counters["graph_break"]
    for one, other in zip(history("plain"), history("compiled"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    plain, compiled = (load_file(f"{folder}/last/model.safetensors") for folder in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    assert max(float((plain[name] - compiled[name]).abs().max()) for name in plain) < 1e-4
    open_run(Path("compiled")).load(Path("compiled/best"))

    recipe = small_recipe(tiny_bert, rows, "--budget.micro_batch_size", 5, "--budget.compile", "true")
    windows, _ = make_windows(recipe, *recipe.datasets(), Accelerator(cpu=True))
    assert is_compiled(make_model(recipe))
    torch._dynamo.reset()
    counters.clear()
    assert verify(make_model(recipe), windows, recipe.loss, trainer=False).exact
    assert counters["stats"]["unique_graphs"], "what is verified is compiled"


class Layer(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x).sin()


class Layers(torch.nn.Module):
    """Two layers that are alike."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([Layer(8, 8), Layer(8, 8)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


@pytest.mark.skipif(not find_device().compiler, reason="no C++ compiler")
@pytest.mark.slow
def test_what_a_compiler_makes_of_the_layers_gives_the_same_gradient():
    torch._dynamo.reset()
    counters.clear()
    plain, model = Layers(), Layers()
    compile_layers(model)
    for rows in (4, 7):
        for each in (plain, model):
            each.zero_grad()
            each(torch.arange(rows * 8.0).reshape(rows, 8).cos().requires_grad_()).backward()
        assert relative_error(read_gradient(model), read_gradient(plain)) <= EXACT
    assert counters["stats"]["unique_graphs"] == 1


class Decoder:
    """A small Llama of many layers: what its layers keep by their number must not compile each anew."""

    def __new__(cls, layers=10):
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 50}
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**sizes, num_hidden_layers=layers, num_key_value_heads=1)
        return transformers.LlamaForCausalLM(config)


def gradient_of(model, rows, length):
    model.zero_grad()
    ids = torch.arange(rows * length).reshape(rows, length) % 50
    model(input_ids=ids, labels=ids).loss.backward()
    return read_gradient(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_of_a_decoder_share_their_code_over_all_shapes(traced_only, checkpointing):
    plain, model = Decoder(), Decoder()
    for each in (plain, model):
        each.train()
        if checkpointing:
            checkpoint_activations(each)
    compile_layers(model)
    for rows, length in [(3, 7), (2, 9), (5, 6), (1, 11), (4, 12), (1, 5), (7, 3), (6, 21)]:
        error = relative_error(gradient_of(model, rows, length), gradient_of(plain, rows, length))
        assert error <= EXACT
    assert counters["stats"]["unique_graphs"] <= 3
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model.config.use_cache, "what is saved stays as it was"


def test_what_cannot_be_compiled_runs_as_it_is_with_one_line(monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no such\ninstruction")

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **k: original(self, backend=broken, **k))
    plain, model = Decoder(3).train(), Decoder(3).train()
    compile_layers(model)
    assert relative_error(gradient_of(model, 3, 7), gradient_of(plain, 3, 7)) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("budget.compile: LlamaDecoderLayer cannot be compiled and runs uncompiled (")
    assert not is_compiled(model)


# gradacc bench cpu


def test_the_cpu_benchmark_measures_a_recipe(tiny_bert, rows, tmp_path, capsys):
    settings = {"--data.train": rows, "--model.name": tiny_bert, "--batch.effective": 16}
    recipe = ROOT / "recipes" / "text_classification.py"
    (tmp_path / "a.yaml").write_text(f"recipe: {recipe}\n")
    words = [str(word) for pair in settings.items() for word in pair]
    cpu_speed.time_windows_here(1, ["--config", str(tmp_path / "a.yaml"), *words, "--data.max_length", "32"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["seconds"] > 0
    assert found["first"] > 0
    assert found["threads"] == 1


def test_ratios_to_the_default_are_taken_turn_by_turn():
    runs = [{"seconds": seconds, "first": 1.0} for seconds in (2.0, 30.0, 1.0)]
    ratio = cpu_speed.ratio_to_default("bf16", runs, [4.0, 40.0, 2.0])
    assert (ratio.median, ratio.low, ratio.high, ratio.clear) == (0.5, 0.5, 0.75, True)


def test_an_unknown_variant_is_refused():
    with pytest.raises(InputError, match="--only: found 'turbo'; allowed: default, threads_1"):
        cpu_speed.measure_cpu_settings("a.yaml", ["turbo"])
