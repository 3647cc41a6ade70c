"""LoRA: the trained parameters, exact accumulation, and models that load as they were saved."""

import json
import re
from pathlib import Path

import pytest
import text_classification_runs
import torch
import transformers
from accelerate import Accelerator
from conftest import ROOT
from peft import AutoPeftModel, PeftModel
from recipe_runs import summary
from safetensors.torch import load_file
from text_classification_runs import TextClassification, arguments, make_rows, write
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from gradacc_hf import WindowLoader, verify
from gradacc_hf.accumulation.reference import EXACT, relative_error, whole_window_gradient
from gradacc_hf.cli import verify as verify_command
from gradacc_hf.config.parser import read_command_line
from gradacc_hf.errors import InputError
from gradacc_hf.training.lora import (
    TESTED_PAIR,
    add_lora,
    check_peft,
    four_bit,
    installed_mismatch,
    peft_mismatch,
    write_merged,
)
from gradacc_hf.training.optimizer import choose_trained, make_optimizer
from gradacc_hf.training.settings import LoraConfig, OptimConfig
from gradacc_hf.utils.adapters import without_adapters
from gradacc_hf.utils.files import save_model
from gradacc_hf.utils.modeling import checkpoint_activations, disable_dropout
from gradacc_hf.verification.tiny_models import build_head

# Fixtures.
start = text_classification_runs.start
datasets_cache = text_classification_runs.datasets_cache
empty_folder = text_classification_runs.empty_folder

TEXTS = ["tea in the garden", "prize winner click"]


def adapted(kind="sequence_classification", model_type="bert", **settings):
    """Return a tiny head with adapters that are not zero, and the names of the new parameters."""
    head = build_head(kind, model_type)
    body = f"{head.model.base_model_prefix}."
    tied = head.model.get_output_embeddings() is not None
    new = set() if tied else {n for n, _ in head.model.named_parameters() if not n.startswith(body)}
    add_lora(head.model, LoraConfig(rank=4, **settings), new)
    torch.manual_seed(0)
    for name, parameter in head.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return head, new


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


HEADS = [
    ("sequence_classification", "bert"),
    ("sequence_classification", "distilbert"),  # peft has no default layers for it
    ("sequence_classification", "roberta"),  # a head of two layers
    ("token_classification", "bert"),
    ("question_answering", "distilbert"),
    ("causal_lm", "gpt2"),  # Conv1D instead of Linear, tied embeddings
    ("causal_lm", "llama"),
    ("masked_lm", "distilbert"),
    ("seq2seq_lm", "t5"),
    ("image_classification", "vit"),
]


@pytest.mark.parametrize(("kind", "model_type"), HEADS)
def test_adapters_and_what_is_new_are_trained_exactly_and_nothing_else(kind, model_type):
    head, new = adapted(kind, model_type)
    wrapped = {
        name.replace("modules_to_save.default.", "") for name in trained(head.model) if "lora_" not in name
    }
    assert wrapped == new
    assert any("lora_A" in name for name in trained(head.model))
    pad_to = "window" if kind == "question_answering" else "micro_batch"  # padding changes the loss there
    settings = {"collate_fn": head.collate, "num_items": head.num_items, "accelerator": Accelerator(cpu=True)}
    examples = head.examples([5, 9, 12, 30, 7, 3])
    windows = WindowLoader(examples, 6, micro_batch_size=2, pad_to=pad_to, **settings)
    assert verify(head.model, windows, trainer=False).loop.error < EXACT


@pytest.mark.parametrize(("kind", "model_type"), HEADS)
def test_gradient_checkpointing_changes_no_gradient(kind, model_type):
    head, _ = adapted(kind, model_type)
    disable_dropout(head.model.train())
    batch = head.collate(head.examples([9, 12, 9]))
    plain = whole_window_gradient(head.model, batch)
    assert plain.keys() == trained(head.model)
    assert all(plain[name].norm() > 0 for name in plain if "lora_" in name)
    checkpoint_activations(head.model)
    assert relative_error(whole_window_gradient(head.model, batch), plain) < EXACT


@pytest.mark.parametrize(("kind", "model_type"), HEADS)
def test_adapters_come_back_on_their_base_or_merged_without_peft(kind, model_type, tmp_path):
    head, new = adapted(kind, model_type)
    model, accelerator = head.model.eval(), Accelerator(cpu=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = head.collate(head.examples([9, 12, 9]))
    save_model(model, tmp_path / "merged", accelerator, write=write_merged)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    merged, info = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not any("lora" in name or "modules_to_save" in name for name in merged.state_dict())
    same(merged(**batch), model(**batch))

    save_model(model, tmp_path / "adapter", accelerator)
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.") for name in saved if "lora_" not in name} == new
    base = build_head(kind, model_type).model  # with the same random weights
    same(PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(**batch), model(**batch))


@pytest.mark.parametrize(("kind", "model_type"), [("sequence_classification", "bert"), ("causal_lm", "gpt2")])
@pytest.mark.parametrize(
    "settings",
    [
        {"dora": True},
        {"rslora": True, "dora": True},
        {"init": "pissa"},
        {"init": "pissa", "dora": True, "alpha": 3},
    ],
    ids=["dora", "rslora", "pissa", "pissa and dora"],
)
def test_adapters_of_every_kind_come_back_too(kind, model_type, settings, tmp_path):
    """GPT-2 has transposed weights. All adapted outputs differ from the outputs of the base model."""
    plain = build_head(kind, model_type).model.eval()
    batch = build_head(kind, model_type).collate(build_head(kind, model_type).examples([9, 12, 9]))
    head, _ = adapted(kind, model_type, **settings)
    model = head.model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name or "lora_A" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    assert (model(**batch).logits - plain(**batch).logits).abs().max() > 0.01
    accelerator = Accelerator(cpu=True)
    save_model(model, tmp_path / "merged", accelerator, write=write_merged)
    same(type(model).from_pretrained(tmp_path / "merged")(**batch), model(**batch))
    save_model(model, tmp_path / "adapter", accelerator)
    by_transformers = build_head(kind, model_type).model
    by_transformers.load_adapter(str(tmp_path / "adapter"))
    for loaded in (PeftModel.from_pretrained(plain, tmp_path / "adapter"), by_transformers):
        same(loaded.eval()(**batch), model(**batch))
    saved = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True
    assert saved["r"] == (8 if "init" in settings else 4)


def test_adapters_are_named_by_their_kind():
    assert str(LoraConfig(rank=8)) == "LoRA rank 8"
    every = LoraConfig(rank=8, dora=True, rslora=True, plus_lr_ratio=4, init="pissa")
    assert str(every) == "DoRA rank 8, rsLoRA, LoRA+, PiSSA"


def test_pissa_and_dora_start_at_the_outputs_of_the_base_model():
    head = build_head("causal_lm", "gpt2")
    batch = head.collate(head.examples([9, 12]))
    expected = head.model.eval()(**batch)
    add_lora(head.model, LoraConfig(rank=4, init="pissa", dora=True), set())
    same(head.model.eval()(**batch), expected)
    assert all(p.abs().sum() > 0 for name, p in head.model.named_parameters() if "lora_" in name)


def same(outputs, expected):
    for name in ("logits", "start_logits", "end_logits"):
        if name in expected:
            torch.testing.assert_close(outputs[name], expected[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.loss, expected.loss)


def test_without_its_adapters_a_model_is_the_base_model_and_then_as_before():
    head, _ = adapted(dora=True)
    batch, base = head.collate(head.examples([5, 9])), build_head("sequence_classification", "bert").model
    disable_dropout(head.model), disable_dropout(base)
    trained = [name for name, parameter in head.model.named_parameters() if parameter.requires_grad]
    with torch.no_grad():
        head.model.classifier.modules_to_save["default"].weight.mul_(2)
        before = head.model(**batch).logits
        with without_adapters(head.model) as inner:
            assert torch.equal(inner(**batch).logits, base(**batch).logits)
        assert torch.equal(head.model(**batch).logits, before)
    assert not torch.equal(before, base(**batch).logits)
    assert trained == [name for name, p in head.model.named_parameters() if p.requires_grad]


def test_a_mixtral_gets_the_adapters_that_peft_chooses():
    head, _ = adapted("causal_lm", "mixtral")
    layers = {name.split(".lora_")[0] for name, p in head.model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "adafactor"])
def test_an_optimizer_gets_the_trained_parameters_and_decays_the_adapters(optimizer):
    model = adapted()[0].model
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = make_optimizer(model, OptimConfig(name=optimizer, weight_decay=0.1)).param_groups
    decay = {names[p]: group["weight_decay"] for group in groups for p in group["params"]}
    assert decay.keys() == trained(model)
    assert all(value == (0 if name.endswith("bias") else 0.1) for name, value in decay.items())


def test_matrices_b_learn_faster_by_the_ratio_and_nothing_else_does():
    model = adapted()[0].model
    groups = make_optimizer(model, OptimConfig(lr=1e-4), plus_lr_ratio=16.0).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[p]: group["lr"] for group in groups for p in group["params"]}
    assert rates.keys() == trained(model)
    assert groups[0]["lr"] == 1e-4  # which histories show
    assert all(rate == (16e-4 if ".lora_B." in name else 1e-4) for name, rate in rates.items())


def test_adapters_of_bf16_weights_are_float32():
    head = build_head("causal_lm", "llama")
    add_lora(head.model.bfloat16(), LoraConfig(rank=4), set())
    kinds = {name: p.dtype for name, p in head.model.named_parameters()}
    assert {kinds[name] for name in trained(head.model)} == {torch.float32}
    assert kinds["model.embed_tokens.weight"] == torch.bfloat16
    whole_window_gradient(head.model, head.collate(head.examples([9])))


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (["query"], ["0.attention.self.query", "1.attention.self.query"]),
        (["*.layer.1.*self*"], [f"1.attention.self.{name}" for name in ("key", "query", "value")]),
        (["*.0.output.dense", "pooler.dense"], ["0.output.dense", "bert.pooler.dense"]),
    ],
)
def test_targets_are_names_or_patterns_of_linear_layers(targets, layers):
    head, _ = adapted(targets=targets)
    found = {name.split(".lora_")[0] for name in trained(head.model) if ".lora_" in name}
    assert {name.removeprefix("bert.encoder.layer.") for name in found} == set(layers)


def test_what_cannot_be_adapted_is_refused_in_one_line():
    with pytest.raises(
        InputError, match=r"model.lora.targets: 'quary' matches no linear layer; the model has bert"
    ):
        adapted(targets=["quary"])
    for new in (None, {name for name, _ in build_head("causal_lm", "gpt2").model.named_parameters()}):
        with pytest.raises(InputError, match=r"rank: found 4, but this model has no pretrained weights"):
            add_lora(build_head("causal_lm", "gpt2").model, LoraConfig(rank=4), new)


RANK = {"model__lora__rank": 8}
PISSA = {**RANK, "model__lora__init": "pissa"}
FOUR_BIT = {**RANK, "model__load_in_4bit": True}


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"model__lora__rank": -1}, r"--model.lora.rank: found -1, allowed is 0 \(off\) or more.*"),
        ({"model__lora__alpha": 0}, r"--model.lora.alpha: found 0, allowed is 1 or more, or null"),
        ({"model__lora__dropout": 1}, r"--model.lora.dropout: found 1.0, allowed is a probability .*"),
        ({"model__lora__merge": True}, r"--model.lora.merge: found true, .*: set model.lora.rank"),
        ({"model__lora__dora": True}, r"--model.lora.dora: found true, .*: set model.lora.rank"),
        ({"model__lora__init": "pissa"}, r"--model.lora.init: .* default without adapters: .*rank"),
        ({**RANK, "model__lora__plus_lr_ratio": 0.5}, r"--model.lora.plus_lr_ratio: .* 1 \(off\) or more"),
        (
            {**PISSA, "model__lora__rslora": True},
            r"--model.lora.rslora: .* false with model.lora.init pissa.*",
        ),
        ({**PISSA, "model__lora__dropout": 0.1}, r"--model.lora.dropout: .* 0 with model.lora.init pissa.*"),
        ({**PISSA, "model__load_in_4bit": True}, r"--model.load_in_4bit: .* false with model.lora.init.*"),
        ({**PISSA, "model__dtype": "bfloat16"}, r"--model.dtype: .* float32 with model.lora.init pissa.*"),
        ({**RANK, "optim__name": "muon"}, r"optim.name: found muon with adapters, .* model.lora.rank 0"),
        ({"model__lora__targets": "[query]"}, r"--model.lora.targets: .*: set model.lora.rank"),
        ({"model__load_in_4bit": True}, r"--model.load_in_4bit: found true, .*: set model.lora.rank"),
        ({**FOUR_BIT, "model__lora__merge": True}, r"--model.load_in_4bit: .* false with model.lora.merge.*"),
        (FOUR_BIT, r"model.load_in_4bit: found true without a CUDA GPU; allowed is false here"),
        ({**RANK, "model__freeze": "[bert.*]"}, r"--model.freeze: .*, allowed is \[\] with model.lora.*"),
        ({"model__lora": 8}, r"--model.lora is a section: set its keys, such as --model.lora.alpha"),
        ({"model__lora__rnk": 8}, r"unknown key --model.lora.rnk: did you mean --model.lora.rank\? .*"),
    ],
)
def test_bad_settings_are_refused_in_one_line(start, flags, line):
    outcome = start(data__train=write("a.csv", make_rows(40)), **flags)
    assert outcome.code == 2
    assert re.fullmatch(f"error: {line}\n", outcome.err)
    assert not Path("runs").exists()


def test_a_peft_that_transformers_refuses_is_named_with_a_pair_that_works():
    assert peft_mismatch("5.24.0", "0.21.2", "0.22.0") == (
        "transformers 5.24.0 needs peft 0.22.0 or newer, found peft 0.21.2; install that peft, or the tested "
        'pair: pip install "transformers==5.23.0" "peft==0.21.2"'
    )
    assert peft_mismatch("5.24.0", "0.22.0", "0.22.0") is None
    assert peft_mismatch("5.23.0", "0.21.2", "0.20.0") is None
    assert peft_mismatch("5.23.0", "0.9.0", "0.20.0") is not None


def test_the_tested_pair_is_that_of_the_constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert {f"transformers=={TESTED_PAIR[0]}", f"peft=={TESTED_PAIR[1]}"} <= set(lines)


def test_a_run_with_the_installed_pair_is_refused_in_one_line_or_runs(start):
    outcome = start(data__train=write("a.csv", make_rows(40)), model__lora__rank=4, train__max_windows=1)
    if (mismatch := installed_mismatch()) is None:
        check_peft()
        assert outcome.code == 0, outcome.err
        return
    assert (outcome.code, outcome.err) == (2, f"error: model.lora: {mismatch}\n")
    assert not Path("runs").exists()


def test_lora_is_a_section_of_a_config_file_too():
    Path("a.yaml").write_text("model:\n  lora:\n    rank: 8\n    targets: [query]\ndata: {train: a.csv}\n")
    config = read_command_line(["--config", "a.yaml", "--model.lora.alpha", "4"])
    assert config.model.lora == LoraConfig(rank=8, alpha=4, targets=["query"])


@pytest.fixture
def recipe(tiny_bert):
    """Return a recipe with the settings of these tests."""

    def recipe(**flags):
        flags = {"data__train": write("a.csv", make_rows(40)), "model__lora__rank": 4, **flags}
        return TextClassification(
            read_command_line(arguments(tiny_bert, flags), data=TextClassification.Data)
        )

    return recipe


def test_a_run_saves_adapters_that_predict_as_the_merged_model_does(start, recipe, tiny_bert):
    data = {"data__train": write("a.csv", make_rows(40)), "model__lora__rank": 4, "optim__lr": 0.03}
    outcome = start(**data, output__dir="out")
    assert outcome.code == 0, outcome.err
    model = recipe().load("out/last")
    parameters = [
        p for name, p in model.named_parameters() if "lora_" not in name and "modules_to_save" not in name
    ]
    total = sum(p.numel() for p in parameters)
    shapes = {name: t.shape for name, t in load_file("out/last/adapter_model.safetensors").items()}
    adapters = sum(shape.numel() for shape in shapes.values())
    assert f"{total:,} parameters, {adapters:,} trained (LoRA rank 4)" in outcome.out
    for folder in ("best", "last"):
        names = {path.name for path in Path("out", folder).iterdir()}
        assert names == {"adapter_config.json", "adapter_model.safetensors", "model_config.json"} | {
            *("README.md", "tokenizer.json", "tokenizer_config.json"),
        }
        assert Path("out", folder, "adapter_model.safetensors").stat().st_size < 40_000
    found = json.loads(Path("out/last/adapter_config.json").read_text())
    assert found["base_model_name_or_path"] == str(tiny_bert)
    assert (found["r"], found["lora_alpha"]) == (4, 8)

    assert start(**data, output__dir="merged", model__lora__merge="true").code == 0
    assert summary("merged")["eval"] == summary("out")["eval"]
    plain = AutoModelForSequenceClassification.from_pretrained("merged/last").eval()
    config = AutoConfig.from_pretrained("out/last/model_config.json")
    batch = AutoTokenizer.from_pretrained("out/last")(TEXTS, padding=True, return_tensors="pt")
    expected = plain(**batch).logits
    ways = {
        "Recipe.load": model,
        "transformers": AutoModelForSequenceClassification.from_pretrained("out/last", config=config),
        "peft": AutoPeftModel.from_pretrained("out/last", config=None, num_labels=2),
    }
    for name, way in ways.items():
        torch.testing.assert_close(way.eval()(**batch).logits, expected, msg=name)
    start_again = AutoModelForSequenceClassification.from_pretrained(tiny_bert, config=config)
    assert not torch.allclose(start_again.eval()(**batch).logits, expected, atol=0.1)
    for way in (plain, ways["Recipe.load"], ways["transformers"]):
        assert way.config.id2label == {0: "ham", 1: "spam"}
        pipeline = transformers.pipeline("text-classification", model=way, tokenizer="out/last")
        assert [answer["label"] for answer in pipeline(TEXTS)] == [
            way.config.id2label[int(i)] for i in expected.argmax(-1)
        ]
    assert recipe().load("merged/last").config.id2label == {0: "ham", 1: "spam"}


def test_an_adapter_of_a_language_model_loads_as_any_model_does(tmp_path):
    head = build_head("causal_lm", "llama")
    head.model.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    add_lora(model, LoraConfig(rank=4, targets=["o_proj", "mlp.*"]), set())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_model(model, tmp_path / "adapter", Accelerator(cpu=True))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    batch = head.collate(head.examples([9, 12]))
    same(loaded(**batch), model.eval()(**batch))
    tokens = torch.tensor([[5, 6, 7]])
    assert torch.equal(
        loaded.generate(tokens, max_new_tokens=8, do_sample=False),
        model.generate(tokens, max_new_tokens=8, do_sample=False),
    )


def test_the_empty_model_has_the_trained_parameters_of_the_real_one(recipe):
    counts = []
    for device in ("meta", "cpu"):
        one = recipe()
        one.datasets()
        model = one.empty_model() if device == "meta" else one.model()
        choose_trained(model, one.config.model, one.new_parameters)
        assert {parameter.device.type for parameter in model.parameters()} == {device}
        counts.append({n: p.shape for n, p in model.named_parameters() if p.requires_grad})
    assert counts[0] == counts[1]
    assert any("lora_A" in name for name in counts[0])
    assert any("classifier" in name for name in counts[0])


def test_verify_says_that_lora_is_exact(tiny_bert, monkeypatch, capsys):
    write("a.csv", make_rows(60))
    Path("a.yaml").write_text(f"recipe: {ROOT}/recipes/text_classification.py\ndata: {{train: a.csv}}\n")
    flags = arguments(tiny_bert, {"model__lora__rank": 8, "budget__gradient_checkpointing": "true"})
    with pytest.raises(SystemExit) as end:
        verify_command.main(["--config", "a.yaml", "--budget", "auto", *flags, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert end.value.code == 0
    assert found["exact"]
    assert found["exact_trainer"]["error"] < EXACT
    assert all("lora_" in name or "modules_to_save" in name for name, _ in found["loop"]["worst"])


def test_four_bits_leave_what_is_new_whole():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: 0)  # the settings only: the rest needs a GPU
        settings = four_bit("bf16", {"classifier.weight", "classifier.bias"})
    quantization = settings["quantization_config"]
    assert quantization.bnb_4bit_compute_dtype == torch.bfloat16
    assert quantization.llm_int8_skip_modules == ["classifier"]
