"""recipes/seq2seq.py: encoder-decoders by name, and two encoders joined; exact, written out and scored."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from conftest import ROOT
from recipe_runs import run_file

import gradacc_hf
from gradacc_hf import embedded
from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.accumulation.reference import EXACT
from gradacc_hf.config.schema import with_settings
from gradacc_hf.errors import InputError
from gradacc_hf.padding.logits import skips_logits
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.run.setup import make_model, make_windows
from gradacc_hf.tasks.generate import generate
from gradacc_hf.verification.exactness import verify

OFFLINE = ROOT / "configs/seq2seq_offline.yaml"
KINDS = ["bert", "t5", "bart"]
WORDS = ["tea", "garden", "letter", "morning", "prize", "cash", "winner", "click", "river", "stone"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models with MiniLM's tokenizer, as folders."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.minilm_path())
    ids = {"pad_token_id": 0, "eos_token_id": tokenizer.sep_token_id}
    starts = {"bos_token_id": tokenizer.cls_token_id, "decoder_start_token_id": tokenizer.cls_token_id}
    size = len(tokenizer)
    made = {
        "bert": transformers.BertModel(
            transformers.BertConfig(
                vocab_size=size, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                intermediate_size=64, max_position_embeddings=64, initializer_range=0.2,
            )
        ),
        "t5": transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=size, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
                **ids, decoder_start_token_id=0,
            )
        ),
        "bart": transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                vocab_size=size, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, init_std=0.2,
                max_position_embeddings=64, forced_eos_token_id=None, **ids, **starts,
            )
        ),
    }  # fmt: skip
    folders = {name: tmp_path_factory.mktemp("models") / name for name in made}
    for name, model in made.items():
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def make_rows(number=40):
    """Sources of 3 to 60 words, and as a target the first of them, up to 8."""
    draw = random.Random(0)
    rows = []
    for _ in range(number):
        words = draw.choices(WORDS, k=draw.choice([3, 6, 12, 60]))
        rows.append({"source": " ".join(words), "target": " ".join(words[: draw.randint(1, 8)])})
    return rows


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def make(models, tmp_path, monkeypatch):
    """A recipe on rows of a file, with its two data sets."""
    monkeypatch.chdir(tmp_path)

    def make(rows, model="bert", **flags):
        columns = {"source_column": "source", "target_column": "target"}
        settings = {**columns, "max_length": 32, "max_target_length": 10, **flags}
        recipe = load_recipe(
            ["--config", str(OFFLINE), "--model.name", str(models.get(model, model))]
            + ["--data.train", write("a.jsonl", rows), "--data.validation", "a.jsonl"]
            + ["--model.dropout", "0", "--batch.effective", "16", "--budget.micro_batch_size", "3"]
            + [word for name, value in settings.items() for word in (f"--data.{name}", str(value))]
        )
        return recipe, *recipe.datasets()

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_is_exact_and_items_are_target_tokens(make, kind):
    recipe, train, validation = make(make_rows(), kind)
    windows, _ = make_windows(recipe, train, validation, Accelerator(cpu=True))
    found = verify(make_model(recipe), windows, recipe.loss, num_windows=2, trainer=False)
    assert found.exact, found.verdict
    assert found.loop.error <= EXACT
    assert min(found.accumulation_steps) > 3
    window = next(iter(windows))
    assert window.num_items == sum(len(train[int(i)]["labels"]) for i in window.indices)
    counts = {len(train[int(i)]["labels"]) for i in window.indices}
    assert len(counts) > 3  # unequal
    sizes = np.array([[len(example["input_ids"]), len(example["labels"])] for example in train])
    pieces = [sizes[piece] for piece in windows.split(0, 0).processes[0]]
    assert window.padded_tokens == sum(len(piece) * piece.max(0).sum() for piece in pieces)
    assert window.tokens == sizes[window.indices].sum()


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_reads_its_start_token_and_the_labels_before(make, kind):
    recipe, train, _ = make(make_rows(), kind)
    model = make_model(recipe).eval()
    batch = recipe.collate(list(train.select(range(6))))
    labels, start, pad = batch["labels"], model.config.decoder_start_token_id, recipe.tokenizer.pad_token_id
    assert (labels == IGNORED).any()
    assert not (labels == start).any()  # else its prediction would be an item too many
    assert all(row[row != IGNORED][-1] == recipe.tokenizer.sep_token_id for row in labels)
    read = torch.cat(
        [torch.full_like(labels[:, :1], start), labels[:, :-1].where(labels[:, :-1] >= 0, pad)], 1
    )
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=read).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        torch.testing.assert_close(recipe.loss(model(**batch), batch), expected)
        assert model(**batch).logits is None  # `budget.lean_loss`
        gradacc_hf.restore_logits(model)
        labelled = labels != IGNORED
        torch.testing.assert_close(model(**batch).logits[labelled], logits[labelled])


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_of_a_plan_computes_logits_at_labels_as_the_run_does(make, kind):
    recipe, *_ = make(make_rows(), kind)
    for setting in (True, "auto", False):
        chosen = recipe.with_config(with_settings(recipe.config, {"budget.lean_loss": setting}))
        with torch.device("meta"):
            planned = make_model(chosen.weightless())
        assert skips_logits(planned) == skips_logits(make_model(chosen)) == bool(setting)


def test_two_encoders_are_joined_with_their_weights_and_a_saved_model_is_whole(make, models, tmp_path):
    recipe, *_ = make(make_rows())
    model = make_model(recipe)
    assert type(model) is transformers.EncoderDecoderModel
    encoder = transformers.AutoModel.from_pretrained(models["bert"]).state_dict()
    halves = {"encoder.": model.encoder.state_dict(), "decoder.bert.": model.decoder.bert.state_dict()}
    for half in halves.values():
        same = [name for name in encoder if name in half and torch.equal(encoder[name], half[name])]
        assert set(encoder) - set(same) <= {"pooler.dense.weight", "pooler.dense.bias"}
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for name, _ in recipe.empty_model().named_parameters()}
    recipe.check_model()
    model.save_pretrained(tmp_path / "saved")
    recipe.tokenizer.save_pretrained(tmp_path / "saved")
    again, *_ = make(make_rows(), tmp_path / "saved")
    loaded = make_model(again)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    word = loaded.decoder.bert.embeddings.word_embeddings.weight
    assert loaded.decoder.get_output_embeddings().weight is word
    assert again.answer(loaded.eval(), ["tea garden"]) == recipe.answer(model.eval(), ["tea garden"])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_the_same_for_any_split(make, kind):
    recipe, train, validation = make(make_rows(), kind, generate_rows=7)
    model = make_model(recipe).eval()
    accelerator = Accelerator(cpu=True)
    _, windows = make_windows(recipe, train, validation, accelerator)
    written = generate(model, windows, accelerator, 7, recipe.tokenizer, **recipe.search)
    alone = recipe.answer(model, [row["source"] for row in make_rows()[:7]])
    assert written == [answer["output"] for answer in alone]


def test_an_evaluation_has_the_loss_of_all_rows_and_scores_what_is_written(make):
    recipe, train, validation = make(make_rows(), generate_rows=7)
    model, accelerator = make_model(recipe).train(), Accelerator(cpu=True)
    _, windows = make_windows(recipe, train, validation, accelerator)
    found = recipe.validate(model, windows, accelerator)
    assert model.training
    whole = recipe.collate(list(validation))
    with torch.no_grad():
        assert found["loss"] == pytest.approx(float(model.eval()(**whole).loss), rel=1e-5)
    rows = make_rows()[:7]
    written = [answer["output"] for answer in recipe.answer(model, [row["source"] for row in rows])]
    assert found.pop("perplexity") == pytest.approx(np.exp(found["loss"]))
    assert found == {"loss": found["loss"], **recipe.metrics(written, [row["target"] for row in rows])}
    assert recipe.samples == [
        {"input": row["source"], "output": text, "reference": row["target"]}
        for row, text in zip(rows[:5], written, strict=False)
    ]
    perfect = recipe.metrics(*[[row["target"] for row in rows]] * 2)
    pairs = np.mean([" " in row["target"] for row in rows])  # one word alone makes no pair of words
    assert perfect == {"rouge1": 1, "rouge2": pytest.approx(pairs), "rougeL": 1, "bleu": pytest.approx(100)}
    baseline = recipe.baseline(train, validation)
    assert 10 < baseline.pop("perplexity") < len(recipe.tokenizer)
    assert baseline == recipe.metrics([row["source"] for row in rows], [row["target"] for row in rows])


def test_a_prefix_begins_every_source_and_columns_inside_a_column_are_found(make):
    rows = [{"translation": {"de": row["source"], "en": row["target"]}} for row in make_rows()]
    columns = {"source_column": "translation.de", "target_column": "translation.en"}
    recipe, train, _ = make(rows, "t5", prefix="in English: ", **columns)
    for row, example in zip(rows, train, strict=True):
        source = recipe.tokenizer.decode(example["input_ids"], skip_special_tokens=True)
        assert f"in english : {row['translation']['de']}".startswith(source)
        assert (
            recipe.tokenizer.decode(example["labels"], skip_special_tokens=True) == row["translation"]["en"]
        )
    with pytest.raises(
        InputError, match=r"data\.target_column: no column 'translation.fr'; found translation.de"
    ):
        make(rows, "t5", **columns | {"target_column": "translation.fr"})


BAD = {
    "column 'source' is empty": {"source": " "},
    "column 'target' is empty": {"target": None},
    "no token of the source is left; data.max_length is 32": {"source": "\u200b"},
    "no token of the target is left; data.max_target_length is 10": {"target": "\u200b"},
}


@pytest.mark.parametrize("found", BAD)
def test_a_bad_row_is_named_or_left_out(make, found):
    rows = make_rows(20)
    rows[18] |= BAD[found]
    with pytest.raises(InputError) as caught:
        make(rows)
    assert str(caught.value) == (
        f"data.train: a.jsonl line 19: {found}; correct it, or leave such rows out: --data.on_bad_row skip"
    )
    recipe, train, validation = make(rows, on_bad_row="skip", generate_rows=20)
    assert len(train) == len(validation) == len(recipe.shown) == 19
    assert recipe.shown["target"] == [row["target"] for i, row in enumerate(rows) if i != 18]
    assert [line.partition(": ")[0] for line in recipe.skipped_rows] == [
        "a.jsonl line 19",
        "a.jsonl line 19",
    ]


def test_a_limit_that_leaves_nothing_of_any_text_is_named(make):
    with pytest.raises(InputError, match=r"line 1: no token of the source is left; data\.max_length is 4"):
        make(make_rows(), prefix="summarize this text: ", max_length=4)
    with pytest.raises(
        InputError, match=r"data\.max_target_length: found 65; allowed: 1 to 64, the positions"
    ):
        make(make_rows(), max_target_length=65)


def test_a_model_that_cannot_write_is_refused(make, tmp_path):
    folder = tmp_path / "gpt"
    config = transformers.GPT2Config(vocab_size=100, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2Model(config).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.minilm_path())
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"sep_token": None, "cls_token": None}))
    with pytest.raises(
        InputError, match="is neither an encoder-decoder nor an encoder like BERT, whose tokenizer"
    ):
        make(make_rows(), folder)


def test_the_offline_config_trains_and_its_model_writes(models, tmp_path, monkeypatch):
    """Two windows through the command line; the saved model is loaded again, by hand and by the recipe."""
    settings = ["--config", str(OFFLINE), "--data.train", write(tmp_path / "a.jsonl", make_rows(60))]
    settings += ["--data.source_column", "source", "--data.target_column", "target"]
    monkeypatch.chdir(tmp_path)
    here = ["--output.dir", "out", "--train.max_windows", "2", "--output.tracker", "none"]
    run_file(ROOT / "recipes/seq2seq.py", *settings, "--model.name", models["bert"], *here)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    metrics = {"perplexity", "rouge1", "rouge2", "rougeL", "bleu"}
    assert summary["eval"].keys() == {"window", "loss", *metrics}
    assert summary["baseline"].keys() == metrics
    assert [sample.keys() for sample in summary["samples"]] == [{"input", "output", "reference"}] * 5
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out/best")
    recipe = load_recipe([*settings, "--model.name", str(tmp_path / "out/best")])
    texts = [sample["input"] for sample in summary["samples"]]
    inputs = [*texts[:3], *({"source": text} for text in texts[3:])]
    assert [found["output"] for found in recipe.answer(model, inputs)] == [
        sample["output"] for sample in summary["samples"]
    ]
    with pytest.raises(InputError, match="input 2: no 'source' among text; give texts as source"):
        recipe.answer(model, ["tea", {"text": "tea"}])


@pytest.mark.slow
def test_two_processes_share_out_the_rows_and_find_what_one_does(models, tmp_path):
    settings = ["--config", str(OFFLINE), "--data.train", write(tmp_path / "a.jsonl", make_rows())]
    settings += ["--data.validation", settings[-1], "--data.source_column", "source"]
    settings += ["--data.target_column", "target", "--data.generate_rows", "7", "--model.dropout", "0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += [ROOT / "recipes/seq2seq.py", *settings, "--model.name", models["bert"]]
    command += ["--train.max_windows", "1", "--output.dir", "out", "--output.tracker", "none"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    recipe = load_recipe([*settings, "--model.name", str(tmp_path / "out/best")])
    accelerator = Accelerator(cpu=True)
    _, windows = make_windows(recipe, *recipe.datasets(), accelerator)
    found = recipe.validate(make_model(recipe), windows, accelerator)
    assert summary["eval"] == pytest.approx({"window": 1, **found}, rel=1e-4)
    assert summary["samples"] == recipe.samples
