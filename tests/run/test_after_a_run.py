"""What follows a run: a new run from its model, `gradacc merge` and `gradacc export`."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from recipe_runs import load_recipe, run_recipe, summary, write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from gradacc_hf.accumulation.accelerate_state import reset_accelerate
from gradacc_hf.bench.offline import offline_recipe
from gradacc_hf.run.outputs import batch_of_rows
from gradacc_hf.run.runner import run

TextClassification = load_recipe("text_classification").TextClassification
Contrastive = load_recipe("contrastive").Contrastive


@pytest.fixture(scope="module")
def flags(tiny_bert, tmp_path_factory):
    """The settings of a small run."""
    texts = (f"some {number} words" for number in range(80))
    rows = [{"text": text, "label": "even" if i % 2 else "odd"} for i, text in enumerate(texts)]
    data = write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)
    words = ["--data.train", data, "--data.max_length", 32, "--batch.effective", 16, "--optim.lr", 1e-2]
    return [*map(str, words), "--budget.max_tokens", "200", "--output.tracker", "none"]


@pytest.fixture(scope="module")
def runs(flags, tiny_bert, tmp_path_factory):
    """A folder with a run of adapters, "lora", and a run of a whole model, "whole"."""
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (("lora", ["--model.lora.rank", "4", "--model.lora.alpha", "6"]), ("whole", [])):
        words = ["--model.name", str(tiny_bert), "--output.dir", str(folder / name)]
        run(TextClassification, [*flags, *words, *more])
        reset_accelerate()
    pairs = [{"anchor": f"number {i}", "positive": f"after number {i - 1}"} for i in range(40)]
    words = ["--data.train", write_rows(folder / "pairs.jsonl", pairs), "--output.dir", folder / "search"]
    run(Contrastive, [*flags[2:], "--model.name", str(tiny_bert), *map(str, words)])
    reset_accelerate()
    return folder


@pytest.fixture
def here(runs, tmp_path, monkeypatch):
    """The current folder, with copies of the runs."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(runs, tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize("name", ["whole", "lora"])
def test_a_new_run_starts_from_the_best_model_of_a_run(name, here, flags, tiny_bert, gradacc, capfd):
    new = ["--model.name", name, "--output.dir", "new", "--train.eval_on_start", "true"]
    outcome = run_recipe(TextClassification, [*flags, *new], capfd)
    assert outcome.code == 0, outcome.err
    first, best = summary("new")["evaluations"][0], summary(name)["best"]
    assert first["loss"] == pytest.approx(best["loss"], abs=1e-6)
    assert summary("new")["eval"]["loss"] != pytest.approx(best["loss"], abs=1e-4)
    if name == "whole":
        assert "start                 best model of whole\n" in outcome.out
        plan = run_recipe(TextClassification, [*flags, "--model.name", "whole/last", "--check"], capfd)
        assert "start                 last model of whole\n" in plan.out
        return
    assert f"start                 adapters of lora on {tiny_bert}, trained further\n" in outcome.out
    assert "head                  kept: saved with the adapters of lora\n" in outcome.out
    saved = json.loads(Path("new/best/adapter_config.json").read_text())
    assert [saved["base_model_name_or_path"], saved["r"], saved["lora_alpha"]] == [str(tiny_bert), 4, 6]
    plan = run_recipe(TextClassification, [*flags, "--model.name", "new", "--check"], capfd)
    assert f"adapters of new on {tiny_bert}" in plan.out
    code, out, _ = gradacc("predict", "new", "some 2 words")
    assert (code, json.loads(out)["label"] in ("even", "odd")) == (0, True)


def test_adapters_are_evaluated_with_the_labels_of_their_model(here, gradacc):
    file = Path("lora/best/model_config.json")
    labels = {"id2label": {"0": "odd", "1": "even"}, "label2id": {"odd": 0, "even": 1}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **labels}))
    code, out, _ = gradacc("evaluate", "lora", "--json")
    recorded = summary("lora")["best"]["accuracy"]  # the data alone have the order even, odd
    assert (code, json.loads(out)["metrics"]["accuracy"]["value"]) == (0, pytest.approx(1 - recorded))


def test_other_adapters_or_labels_than_the_run_has_are_refused(here, flags, capfd):
    lora = ["--model.name", "lora"]
    outcome = run_recipe(TextClassification, [*flags, *lora, "--model.lora.rank", 8], capfd)
    assert (
        "--model.lora.rank: found 8, and the adapters of lora have 4; leave it out, or merge" in outcome.err
    )
    other = write_rows("other.jsonl", [{"text": f"{i} words", "label": "abc"[i % 3]} for i in range(60)])
    outcome = run_recipe(TextClassification, [*flags, *lora, f"--data.train={other}"][2:], capfd)
    assert "the data have other labels than lora, whose head is saved with its adapters" in outcome.err


def test_merged_weights_answer_as_the_adapters_and_need_no_peft(here, gradacc):
    code, out, err = gradacc("merge", "lora")
    assert (code, err) == (0, "")
    assert out.startswith("lora/merged: largest difference ")
    assert " on 8 rows of the data, " in out
    tokenizer = AutoTokenizer.from_pretrained("lora/merged")
    batch = tokenizer(["some 1 words", "some 22 words"], return_tensors="pt", padding=True)
    whole = AutoModelForSequenceClassification.from_pretrained("lora/merged").eval()
    adapters = AutoPeftModelForSequenceClassification.from_pretrained("lora/best", num_labels=2).eval()
    with torch.no_grad():
        assert torch.allclose(whole(**batch).logits, adapters(**batch).logits, atol=1e-5)
    assert whole.config.id2label == {0: "even", 1: "odd"}
    card = Path("lora/merged/README.md").read_text()
    assert 'pipeline("text-classification", model=".")' in card
    Path("link").symlink_to("lora")
    code, _, err = gradacc("merge", "link")
    assert (code, err) == (2, "error: link/merged: it exists; move it, or use it\n")


def test_a_merge_that_would_answer_otherwise_writes_nothing(here, gradacc, monkeypatch):
    assert "it holds a whole model; there is nothing to merge" in gradacc("merge", "whole")[2]
    from gradacc_hf.run import merging

    def damaged(model, folder, state):
        write(model, folder, state)
        tensors = load_file(folder / "model.safetensors")
        save_file({k: v * 1.01 for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})

    write = merging.write_merged
    monkeypatch.setattr(merging, "write_merged", damaged)
    code, _, err = gradacc("merge", "lora")
    assert (code, err.count("\n")) == (2, 1)
    assert "lora/merged was not written, as its outputs are not the outputs of lora/best: largest" in err
    assert "allowed with model.dtype float32 is 0.0001" in err
    assert not [path for path in Path("lora").iterdir() if "merged" in path.name]


def test_a_card_of_a_search_model_or_of_adapters_runs_as_it_stands(here, monkeypatch, capfd):
    pytest.importorskip("sentence_transformers", reason="needs the extra export")
    for name, said in (
        ("search", r"tensor\(\[\[-?0\.\d+"),
        ("lora", r"'label': '(even|odd)', 'score': 0\.\d+"),
    ):
        monkeypatch.chdir(here / name / "best")
        snippet = re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)[1]
        exec(snippet, {})
        assert re.search(said, capfd.readouterr().out)


def test_all_files_of_a_run_have_one_mode(here):
    for name in ("lora", "whole", "search"):
        modes = {path.stat().st_mode for path in Path(name).rglob("*") if path.is_file()}
        assert len(modes) == 1


def test_a_search_model_is_exported_as_a_sentence_transformer(here, gradacc):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs the extra export")
    code, out, err = gradacc("export", "search", "--to", "sentence-transformers")
    assert (code, err) == (0, "")
    assert out.startswith("search/sentence-transformers: largest difference ")
    model = sentence_transformers.SentenceTransformer("search/sentence-transformers", device="cpu")
    assert (model.max_seq_length, type(model[2]).__name__) == (32, "Normalize")
    assert model.encode(["number 3", "a"]).shape == (2, 32)
    assert "it exists; move it, or use it" in gradacc("export", "search", "--to", "sentence-transformers")[2]


@pytest.mark.parametrize("name", ["lora", "search"])
def test_onnx_answers_any_number_of_rows_and_tokens_as_the_run(name, here, gradacc):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="needs the extra export")
    import onnxruntime

    if name == "lora":
        assert (
            "it has adapters, which are not merged; gradacc merge lora"
            in gradacc("export", name, "--to=onnx")[2]
        )
        assert gradacc("merge", name)[0] == 0
        adapters = Path("lora/last/adapter_model.safetensors")
        save_file({k: v * 2 for k, v in load_file(adapters).items()}, adapters, {"format": "pt"})
        code, _, err = gradacc("export", name, "--to", "onnx", "--model", "last")
        assert (code, err.count("\n")) == (2, 1)
        assert "lora/merged: its outputs are not the outputs of lora/last (largest difference" in err
    code, out, err = gradacc("export", name, "--to", "onnx")
    assert (code, err) == (0, "")
    assert f"{name}/onnx: largest difference " in out
    session = onnxruntime.InferenceSession(f"{name}/onnx/model.onnx", providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(f"{name}/onnx")
    inputs = [value.name for value in session.get_inputs()]
    for texts in (["some 3 words"], ["some 4 words", "a", "b and c"]):
        batch = tokenizer(texts, padding=True, return_tensors="np")
        [found] = session.run(None, {key: batch[key] for key in inputs})
        assert found.shape == (len(texts), 2 if name == "lora" else 32)


def test_other_exports_are_refused_in_one_line(here, gradacc):
    for words, said in (
        (
            ["whole", "--to", "gguf"],
            "--to: no library on PyPI writes gguf from a transformers model; convert_hf",
        ),
        (["whole", "--to", "sentence-transformers"], "found sentence-transformers for a run of TextClassif"),
        (["whole", "--to", "pdf"], "invalid choice: 'pdf'"),
        (["gone", "--to", "onnx"], "gone: found no such folder"),
    ):
        code, _, err = gradacc("export", *words)
        assert (code, err.count("\n")) == (2, 1)
        assert said in err


def test_rows_of_very_different_lengths_are_compared_in_one_batch():
    batch = batch_of_rows(offline_recipe(), 10)
    mask = batch["attention_mask"].sum(1)
    assert len(mask) == len(batch["labels"]) == 10
    assert mask.max() > 5 * mask.min()
