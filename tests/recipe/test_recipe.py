"""A recipe through its command line: what a run does, on any hardware, and what is refused."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import text_classification_runs
import torch
import transformers
from accelerate import Accelerator
from conftest import ROOT
from recipe_runs import summary, write_rows
from safetensors.torch import load_file
from text_classification_runs import arguments, history, make_rows, write

from gradacc_hf.accumulation.accelerate_state import forget_prepared_optimizers
from gradacc_hf.training.optimizer import make_optimizer
from gradacc_hf.training.settings import OptimConfig
from gradacc_hf.utils.modeling import set_dropout

RECIPE = ROOT / "recipes" / "text_classification.py"
ENVIRONMENT = dict(os.environ)  # before any Accelerator in this process has added to it
METRICS = {"loss", "accuracy", "f1", "matthews_correlation"}

# Fixtures.
start = text_classification_runs.start
datasets_cache = text_classification_runs.datasets_cache
empty_folder = text_classification_runs.empty_folder


def snapshot(folder="."):
    """Every file and folder below, with its content."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in sorted(Path(folder).rglob("*"))
    }


# A run


@pytest.mark.parametrize("labels", [("ham", "spam"), (0, 1)], ids=["strings", "integers"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "folder"])
def test_each_format_trains_and_evaluates(start, kind, labels):
    rows, others = make_rows(labels=labels), make_rows(30, labels, seed=1)
    if kind == "folder":
        write("data/train.csv", rows)
        write("data/validation.csv", others)
        data = {"data__train": "data"}
    else:
        data = {
            "data__train": write(f"mine.{kind}", rows),
            "data__validation": write(f"other.{kind}", others),
        }
    outcome = start(**data, output__dir="out", train__epochs=2)
    assert outcome.code == 0, outcome.err
    found = summary("out")
    assert found["windows"] == len(history("out")) == 20
    assert sum(map(len, found["first_window"])) == history("out")[0]["examples"] == 16
    assert found["command"].startswith("python ")
    assert found["command"].endswith("--train.epochs 2")
    assert f"accuracy {found['eval']['accuracy']:.4f}" in Path("out/report.html").read_text()
    assert found["examples"] == found["items"] == 300
    assert found["eval"].keys() == {"window", *METRICS}
    assert found["baseline"].keys() == METRICS - {"loss"}
    assert found["baseline"]["accuracy"] == pytest.approx(20 / 30)
    assert (
        found["eval"]["accuracy"] > found["baseline"]["accuracy"]
    )  # it has learned which words give a label away
    for model in ("best", "last"):
        names = transformers.AutoConfig.from_pretrained(f"out/{model}").id2label
        assert names == {0: str(labels[0]), 1: str(labels[1])}


@pytest.mark.parametrize(
    ("setting", "weights"), [("none", [1, 1]), ("balanced", [0.75, 1.5]), ("spam=5,ham=1", [1, 5])]
)
def test_class_weights_weigh_the_loss_and_are_its_items(start, tiny_bert, setting, weights):
    """One window over all rows and a tiny step: its loss is that of the saved model on all rows."""
    rows = make_rows()
    data = {"data__train": write("a.csv", rows), "data__validation": "a.csv", "data__class_weights": setting}
    start(**data, batch__effective=150, optim__lr=1e-12, output__dir="out")
    weights = torch.tensor(weights, dtype=torch.float32)
    labels = torch.tensor([["ham", "spam"].index(row["label"]) for row in rows])
    model = transformers.AutoModelForSequenceClassification.from_pretrained("out/last")
    tokenizer = transformers.AutoTokenizer.from_pretrained("out/last")
    batch = tokenizer(
        [row["text"] for row in rows], truncation=True, max_length=32, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(**batch).logits, labels, weights)
    (window,) = history("out")
    assert window["items"] == pytest.approx(float(weights[labels].sum()))
    assert window["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert summary("out")["eval"]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_frozen_parameters_stay_and_the_others_move(start, tiny_bert):
    outcome = start(
        data__train=write("a.csv", make_rows(40)),
        model__freeze='["bert.embeddings.*", "*.layer.0.*"]',
        output__dir="out",
    )
    before, after = load_file(tiny_bert / "model.safetensors"), load_file("out/last/model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[f"bert.{name}"])}
    still = {name for name in before if name.startswith("embeddings.") or ".layer.0." in name}
    assert still
    assert moved == before.keys() - still
    assert "of them frozen" in outcome.out


def test_dropout_is_overridden_everywhere(start):
    losses = {}
    for dropout in (None, 0, 0.5):
        data = {"data__train": write("a.csv", make_rows(40)), "model__dropout": dropout}
        start(**data, output__dir=f"out-{dropout}", train__max_windows=1)
        config = transformers.AutoConfig.from_pretrained(f"out-{dropout}/last")
        expected = 0.1 if dropout is None else dropout
        assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == expected
        losses[dropout] = history(f"out-{dropout}")[0]["loss"]
    assert len(set(losses.values())) == 3


def test_dropout_of_whole_layers_is_only_ever_switched_off():
    config = transformers.BartConfig(encoder_layerdrop=0.2, dropout=0.1, num_labels=3)
    set_dropout(config, 0.4)
    assert (config.dropout, config.attention_dropout, config.encoder_layerdrop) == (0.4, 0.4, 0.2)
    set_dropout(config, 0.0)
    assert (config.dropout, config.encoder_layerdrop) == (0, 0)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor", "muon", "schedule_free_adamw"])
def test_every_optimizer_lowers_the_loss(start, name):
    lr = {"sgd": 0.1}.get(name, 3e-3)
    more = {}
    if name == "schedule_free_adamw":
        pytest.importorskip("schedulefree", reason="needs the extra schedulefree")
        outcome = start(data__train=write("a.csv", make_rows(66)), optim__name=name)
        assert outcome.err.startswith("error: --optim.scheduler (not set): found 'linear', ")
        more = {"optim__scheduler": "constant"}
    start(
        data__train=write("a.csv", make_rows(66)),
        optim__name=name,
        optim__lr=lr,
        train__epochs=4,
        output__dir="out",
        **more,
    )
    losses = [row["loss"] for row in history("out")]
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])


@pytest.mark.parametrize(
    ("scheduler", "after_warmup"),
    [
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
        ("constant", [1, 1, 1, 1]),
        ("wsd", [1, 1, 1, 1 - 0.9 * 0.5**0.5]),
    ],
)
def test_the_learning_rate_follows_its_schedule_by_window(start, scheduler, after_warmup):
    wsd = {"optim__decay_ratio": 0.25, "optim__min_lr_ratio": 0.1} if scheduler == "wsd" else {}
    flags = {
        **wsd,
        "optim__scheduler": scheduler,
        "optim__warmup_ratio": 0.5,
        "train__max_windows": 8,
        "train__epochs": 3,
    }
    start(data__train=write("a.csv", make_rows(66)), **flags, output__dir="out")
    warmup = (0.1, 0.325, 0.55, 0.775) if wsd else (0, 0.25, 0.5, 0.75)
    expected = [1e-3 * share for share in (*warmup, *after_warmup)]
    assert [row["lr"] for row in history("out")] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_optimizers_are_fused_but_for_fp16_whose_overflows_would_go_unseen(tiny_bert, optimizer):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu"), True  # fp16 as on a GPU
    accelerator.state._mixed_precision = "fp16"
    skipped = {}
    for precision in ("no", "fp16"):
        made = make_optimizer(model, OptimConfig(name=optimizer), precision)
        prepared = accelerator.prepare_optimizer(made)
        loss = sum(p.sum() for p in model.parameters()) * math.inf
        accelerator.backward(loss)
        prepared.step()
        prepared.zero_grad()
        skipped[precision] = accelerator.optimizer_step_was_skipped
        forget_prepared_optimizers(accelerator)
    assert skipped == {"no": False, "fp16": True}


def test_biases_and_norms_do_not_decay(tiny_bert):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in ("adamw", "adam", "sgd", "adafactor"):
        groups = make_optimizer(model, OptimConfig(name=optimizer, weight_decay=0.1)).param_groups
        decay = {names[p]: group["weight_decay"] for group in groups for p in group["params"]}
        assert decay.keys() == set(names.values())
        for name, value in decay.items():
            assert value == (0 if name.endswith("bias") or "LayerNorm" in name else 0.1), name


def test_a_run_gets_the_next_free_numbered_folder(start):
    write("a.csv", make_rows(40))
    Path("mine.yaml").write_text("data:\n  train: a.csv\n")
    for flags in ({"data__train": "a.csv"}, {"data__train": "a.csv"}, {"config": "mine.yaml"}):
        assert start(**flags, train__max_windows=1).code == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["mine-1", "run-1", "run-2"]


def test_the_saved_model_predicts_in_a_pipeline(start):
    rows = make_rows()
    start(data__train=write("a.csv", rows), train__epochs=3, optim__lr=3e-3, output__dir="out")
    pipeline = transformers.pipeline("text-classification", "out/best", device="cpu")
    found = pipeline([row["text"] for row in rows], truncation=True, max_length=32)
    assert {answer["label"] for answer in found} == {"ham", "spam"}
    right = [answer["label"] == row["label"] for answer, row in zip(found, rows, strict=True)]
    assert np.mean(right) > 0.8
    assert pipeline(["winner prize click cash"])[0]["label"] == "spam"


def test_without_validation_a_stated_share_is_held_out(start):
    outcome = start(data__train=write("a.csv", make_rows()), data__validation_fraction=0.2, output__dir="out")
    assert "120 to train on, 30 to validate" in outcome.out
    assert "30 of 150 training rows, held out by seed 0" in outcome.out
    assert summary("out")["examples"] == 120


def test_a_class_of_one_row_stays_in_training_whatever_the_seed(start):
    write("a.csv", [*make_rows(40), {"text": "once", "label": "rare"}])
    for seed in range(4):
        outcome = start(data__train="a.csv", data__validation_fraction=0.5, train__seed=seed, check=True)
        assert outcome.code == 0, outcome.err


def test_check_says_that_it_would_run_and_writes_nothing(start):
    write("a.csv", make_rows(40))
    before = snapshot()
    outcome = start(data__train="a.csv", output__tracker=None, check=True)
    assert (outcome.code, outcome.err) == (0, "")
    assert "this would run" in outcome.out
    assert snapshot() == before


def test_the_plan_says_what_is_about_to_happen(start):
    outcome = start(
        data__train=write("a.csv", make_rows()),
        data__validation=write("b.csv", make_rows(30)),
        train__epochs=2,
        budget__micro_batch_size=4,
        check=True,
    )
    plan = {line.split("  ")[0]: line for line in outcome.out.splitlines()}
    expected = {
        "recipe": "Label a text.",
        "model": "parameters",
        "examples": "150 to train on, 30 to validate",
        "effective batch size": "16 examples",
        "windows": "20, over 2 epochs",
        "micro-batches": "at most 4 examples",
        "accumulation steps": "(min / mean / max)",
        "padding": "% of the tokens",
        "precision": "fp32",
        "processes": "1 on cpu",
    }
    for row, content in expected.items():
        assert content in plan[row]


def test_the_plan_tells_the_accumulation_steps_and_the_padding_of_the_run(start):
    budget = {"budget__max_tokens": 128, "budget__padding_free": "off"}
    outcome = start(data__train=write("a.csv", make_rows()), output__dir="out", **budget)
    found = summary("out")
    steps = found["accumulation_steps"]
    assert f"{steps['min']} / {steps['mean']:.1f} / {steps['max']} (min / mean / max)" in outcome.out
    assert f"{found['padding']:.1%} of the tokens" in outcome.out


def test_curves_go_to_tensorboard_unless_told_otherwise(start):
    write("a.csv", make_rows(40))
    start(data__train="a.csv", output__tracker=None, output__dir="with")
    start(data__train="a.csv", output__tracker="none", output__dir="without")
    (events,) = Path("with/logs").rglob("events.out.tfevents.*")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator(str(events.parent))
    curves.Reload()
    losses = [point.value for point in curves.Scalars("train/loss")]
    assert losses == pytest.approx([row["loss"] for row in history("with")], rel=1e-6)
    assert "eval/accuracy" in curves.Tags()["scalars"]
    assert not Path("without/logs").exists()


def test_overwriting_replaces_the_run_and_leaves_other_files(start):
    write("a.csv", make_rows(40))
    start(data__train="a.csv", output__dir="out")
    Path("out/notes.txt").write_text("mine")
    assert (
        start(data__train="a.csv", output__dir="out", output__overwrite="true", train__max_windows=1).code
        == 0
    )
    assert len(history("out")) == summary("out")["windows"] == 1
    assert Path("out/notes.txt").read_text() == "mine"


def test_a_model_with_other_labels_gets_a_new_classifier(start):
    start(data__train=write("a.csv", make_rows(40)), output__dir="out")
    rows = [{**row, "label": f"{row['label']}{i % 2}"} for i, row in enumerate(make_rows(40))]
    outcome = start(model__name="out/best", data__train=write("b.csv", rows), output__dir="out2")
    assert outcome.code == 0, outcome.err
    assert transformers.AutoConfig.from_pretrained("out2/last").num_labels == 4


# The run does not depend on the hardware


def launched(tiny_bert, processes, runs):
    """Runs of the recipe's file, one after the other, in processes that are started as launch.sh does."""
    Path("several.py").write_text(
        "import json, runpy, sys, torch\n"
        "end = torch.distributed.destroy_process_group\n"
        "torch.distributed.destroy_process_group = lambda *_: None  # until the last run has ended\n"
        "for words in json.load(open('runs.json')):\n"
        f"    sys.argv = [{str(RECIPE)!r}, *words]\n"
        f"    runpy.run_path({str(RECIPE)!r}, run_name='__main__')\n"
        "end()\n"
    )
    Path("runs.json").write_text(json.dumps([arguments(tiny_bert, flags) for flags in runs]))
    command = [Path(sys.executable).with_name("accelerate"), "launch", "--num_processes", str(processes)]
    command += ["--config_file", ROOT / "configs" / "accelerate" / "cpu_2.yaml", "several.py"]
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1", "GRADACC_PROCESSES": str(processes)}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


def test_the_run_is_the_same_on_any_micro_batch_size_and_number_of_processes(start, tiny_bert):
    flags = {
        "data__train": write("a.csv", make_rows(400)),
        "batch__effective": 64,
        "optim__weight_decay": 0.1,
    }
    sizes = (1, 7, 64)
    for size in sizes:
        assert start(**flags, budget__micro_batch_size=size, output__dir=f"one-{size}").code == 0
    runs = [{**flags, "budget__micro_batch_size": size, "output__dir": f"two-{size}"} for size in sizes]
    streamed = {**flags, "data__train": write_rows("a.jsonl", make_rows(400)), "data__streaming": "true"}
    streamed |= {"data__labels": "ham,spam", "data__validation_rows": 40, "data__buffer_size": 100}
    streamed |= {"train__max_windows": 6, "budget__micro_batch_size": 7, "output__dir": "one-stream"}
    assert start(**streamed).code == 0
    runs.append({**streamed, "budget__num_workers": 1, "output__dir": "two-stream"})
    two = launched(tiny_bert, 2, runs)
    assert two.returncode == 0, two.stderr
    for name in ("one-7", "one-64", "two-1", "two-7", "two-64", "two-stream"):
        same_as = "one-stream" if name == "two-stream" else "one-1"
        first, other = history(same_as), history(name)
        assert len(first) == 6
        assert summary(name)["processes"] == (2 if name.startswith("two") else 1)
        for key in ("window", "epoch", "examples", "items", "tokens", "lr"):
            assert [row[key] for row in other] == [row[key] for row in first]
        for key in ("loss", "grad_norm"):
            assert [row[key] for row in other] == pytest.approx([row[key] for row in first], rel=1e-5)
        assert summary(name)["eval"]["loss"] == pytest.approx(summary(same_as)["eval"]["loss"], rel=1e-5)
    steps = {name: history(name)[0]["accumulation_steps"] for name in ("one-1", "one-7", "one-64", "two-1")}
    assert steps["one-1"] == 64 > steps["one-7"] >= 10 > steps["one-64"]
    assert 32 <= steps["two-1"] <= 1.05 * 32  # equal costs, not equal counts


# Bad input: exit code 2, one line, nothing touched


@pytest.fixture
def refused(start):
    """Run it, see that it is refused the way every bad input is, and give the line."""

    def refused(**flags):
        before = snapshot()
        outcome = start(**flags)
        assert outcome.code == 2, outcome.out
        assert outcome.err.startswith("error: ")
        assert outcome.err.count("\n") == 1
        assert outcome.err.endswith("\n")
        assert "Traceback" not in outcome.err + outcome.out
        assert snapshot() == before
        return outcome.err

    return refused


@pytest.fixture
def mine():
    return write("mine.csv", make_rows(40))


def test_a_mistyped_key_is_refused_with_the_one_that_was_meant(refused, mine):
    line = refused(data__train=mine, optim__lrr=1)
    assert "--optim.lrr" in line
    assert "did you mean --optim.lr?" in line


def test_a_missing_file_is_refused_with_the_closest(refused, mine):
    line = refused(data__train="mine.csw")
    assert "data.train" in line
    assert "'mine.csw'" in line
    assert "did you mean 'mine.csv'?" in line
    assert "data.validation" in refused(data__train=mine, data__validation="gone/a.csv")


@pytest.mark.parametrize("column", ["text_column", "label_column"])
def test_a_missing_column_is_refused_with_those_that_there_are(refused, mine, column):
    line = refused(data__train=mine, **{f"data__{column}": "body"})
    assert f"data.{column}" in line
    assert "'body'" in line
    assert "text, label" in line


def test_an_empty_data_set_is_refused(refused):
    for name, content in (("a.csv", ""), ("b.csv", "text,label\n"), ("c.jsonl", "\n")):
        Path(name).write_text(content)
        line = refused(data__train=name)
        assert "data.train" in line
        assert name in line
        assert "at least one" in line


def test_a_label_seen_only_in_validation_is_refused(refused, mine):
    line = refused(data__train=mine, data__validation=write("b.csv", [{"text": "x", "label": "eggs"}]))
    assert "data.label_column" in line
    assert "'eggs' of b.csv line 2 is in no training row" in line
    assert "data.train" in line


def test_an_effective_batch_size_of_0_is_refused(refused, mine):
    line = refused(data__train=mine, batch__effective=0)
    assert "--batch.effective" in line
    assert "found '0'" in line or "found 0" in line
    assert "1 example or more" in line


def test_an_effective_batch_size_above_the_data_set_is_refused(refused, mine):
    line = refused(data__train=mine, batch__effective=37)
    assert "batch.effective: found 37; allowed: 1 to 36" in line


def test_a_budget_below_one_token_is_refused(refused, mine):
    line = refused(data__train=mine, budget__max_tokens=0)
    assert "--budget.max_tokens: found 0" in line
    assert "smaller than one token" in line


def test_a_folder_that_holds_a_run_is_refused(start, refused, mine):
    start(data__train=mine, output__dir="out", train__max_windows=1)
    line = refused(data__train=mine, output__dir="out")
    assert "output.dir: out already holds a run" in line
    assert "--output.overwrite true" in line


@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_a_folder_that_holds_other_files_is_refused(refused, mine, overwrite):
    write("out/thesis.csv", make_rows(3))
    line = refused(data__train=mine, output__dir="out", output__overwrite=overwrite)
    assert "output.dir: out holds files that do not belong to a run" in line
    assert "new or empty folder" in line


@pytest.mark.parametrize("given", ["out", None])
def test_an_output_folder_that_is_a_file_is_refused(refused, mine, given):
    Path(given or "runs").write_text("mine")
    assert f"output.dir: {given or 'runs'} is a file" in refused(data__train=mine, output__dir=given)


def test_a_model_that_cannot_be_found_offline_is_refused_with_what_can(refused, mine):
    line = refused(data__train=mine, model__name="nobody/nothing")
    assert "model.name: 'nobody/nothing'" in line
    assert "embedded:minilm" in line


@pytest.fixture
def damaged(tiny_bert):
    """A copy of the model in the folder `damaged`; a function of its bytes changes one of its files."""

    def damaged(file, change):
        shutil.copytree(tiny_bert, "damaged", dirs_exist_ok=True)
        path = Path("damaged", file)
        path.write_bytes(change(path.read_bytes()))
        return "damaged"

    return damaged


def test_a_truncated_model_file_is_refused(refused, mine, damaged):
    line = refused(
        data__train=mine,
        model__name=damaged("model.safetensors", lambda content: content[: len(content) // 2]),
    )
    assert "model.name" in line
    assert "damaged/model.safetensors is not a complete safetensors file" in line
    assert "copy" in line


@pytest.mark.parametrize("check", [True, None])
def test_a_flipped_bit_in_a_model_file_s_header_is_refused(refused, mine, damaged, check):
    """In its length, its JSON, or the name of a tensor, which then would start at random."""

    def flipped(position, bit=0):
        return lambda content: (
            content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]
        )

    content = Path(damaged("config.json", lambda content: content), "model.safetensors").read_bytes()
    name = content.index(b"layer.1.output.dense.weight")
    for change in (flipped(0), flipped(8), flipped(name + 8), flipped(content.index(b'"F32"') + 1)):
        shutil.rmtree("damaged")
        line = refused(data__train=mine, model__name=damaged("model.safetensors", change), check=check)
        assert "model.name" in line
        assert "damaged" in line
        assert "again" in line


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_model_folder_whose_json_is_none_is_refused(refused, mine, damaged, file):
    line = refused(data__train=mine, model__name=damaged(file, lambda content: content[:100]))
    assert "model.name" in line
    assert "damaged" in line


def test_a_model_whose_config_is_of_another_size_is_refused(refused, mine, damaged):
    changed = damaged(
        "config.json", lambda content: content.replace(b'"intermediate_size": 64', b'"intermediate_size": 96')
    )
    line = refused(data__train=mine, model__name=changed, check=True)
    assert "[64, 32]" in line or "[32, 64]" in line or "[64]" in line
    assert "config.json" in line


@pytest.mark.parametrize("change", [{"model_type": "nonsense"}, {"hidden_size": "many"}, {"hidden_size": 33}])
def test_a_config_that_is_no_model_s_is_refused(refused, mine, damaged, change):
    model = damaged("config.json", lambda content: json.dumps({**json.loads(content), **change}).encode())
    assert "of damaged cannot be loaded" in refused(data__train=mine, model__name=model)


def test_a_model_without_tokenizer_is_refused(refused, mine, damaged):
    model = damaged("config.json", lambda content: content)
    for path in Path(model).glob("tokenizer*"):
        path.unlink()
    assert "model.name: damaged has no tokenizer" in refused(data__train=mine, model__name=model)


def test_a_data_file_whose_encoding_is_not_found_is_refused(refused):
    Path("japanese.csv").write_bytes("text,label\nお茶,a\ntea,b\n".encode("shift_jis"))
    line = refused(data__train="japanese.csv")
    assert "japanese.csv is not UTF-8: line 2" in line
    assert "set data.encoding to its encoding, such as cp1252 or shift_jis" in line


def test_the_plan_states_the_separator_and_the_encoding_of_a_file(start, mine):
    rows = Path(mine).read_text().replace(",", ";") + "café;spam\n"
    Path("latin.csv").write_bytes(rows.encode("latin-1"))
    outcome = start(data__train="latin.csv", check=True)
    assert outcome.code == 0, outcome.err
    assert (
        "read                  latin.csv: 41 rows, training (separator ;, encoding cp1252)\n" in outcome.out
    )
    outcome = start(data__train="latin.csv", data__encoding="iso8859-15", data__separator=";", check=True)
    assert (
        "read                  latin.csv: 41 rows, training (separator ;, encoding iso8859-15)" in outcome.out
    )


def test_an_unknown_tracker_is_refused_with_those_that_are_known(refused, mine):
    line = refused(data__train=mine, output__tracker="tensorbord")
    assert "output.tracker: found 'tensorbord'" in line
    assert "tensorboard" in line


def test_a_freeze_pattern_that_matches_nothing_is_refused(refused, mine):
    line = refused(data__train=mine, model__freeze='["encoder.*"]')
    assert "model.freeze: 'encoder.*' matches no parameter" in line
    assert "bert.embeddings.word_embeddings.weight" in line
    assert "leave no parameter" in refused(data__train=mine, model__freeze='["*"]')


@pytest.mark.parametrize(
    "setting", ["spam=5,ham=1,eggs=2", "spam=5", "spam=5,ham=x", "spam=-5,ham=1", "spam=0,ham=1", "balance"]
)
def test_class_weights_that_do_not_fit_the_labels_are_refused(refused, mine, setting):
    line = refused(data__train=mine, data__class_weights=setting)
    assert f"data.class_weights: found '{setting}'" in line
    assert "ham=2,spam=1" in line


def test_an_unknown_best_metric_is_refused_with_those_that_there_are(refused, mine):
    line = refused(data__train=mine, train__best_metric="acuracy")
    assert "train.best_metric: found 'acuracy'; allowed: loss, accuracy, f1, matthews_correlation" in line


def test_early_stopping_that_can_never_act_is_refused(refused, mine):
    line = refused(data__train=mine, train__early_stopping=2)
    assert "train.early_stopping: found 2" in line
    assert "train.eval_every" in line


def test_more_tokens_than_the_model_has_positions_are_refused(refused, mine):
    line = refused(data__train=mine, data__max_length=65)
    assert "data.max_length: found 65; allowed: 1 to 64" in line


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"optim__lrr": 1}, "did you mean --optim.lr?"),
        ({"data__train": "japanese.csv"}, "japanese.csv is not UTF-8"),
        ({"model__name": "damaged"}, "damaged/model.safetensors is not a complete safetensors file"),
    ],
)
def test_a_process_of_its_own_ends_with_2_and_one_line(tiny_bert, mine, damaged, flags, named):
    Path("japanese.csv").write_bytes("text,label\nお茶,a\ntea,b\n".encode("shift_jis"))
    damaged("model.safetensors", lambda content: content[:-1])
    before = snapshot()
    words = arguments(tiny_bert, {"data__train": mine, **flags})
    found = subprocess.run([sys.executable, RECIPE, *words], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1
    assert named in found.stderr
    assert snapshot() == before


def test_a_tokenizer_that_cannot_pad_is_refused(refused, mine, tiny_bert):
    shutil.copytree(tiny_bert, "unpadded")
    settings = Path("unpadded/tokenizer_config.json")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"pad_token": None}))
    config = Path("unpadded/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": None}))
    found = "model.name: the tokenizer of unpadded has neither a padding nor an end-of-text token; set its"
    assert found in refused(data__train=mine, model__name="unpadded")
