"""`gradacc evaluate`: the metrics of a saved run, with intervals, on its own data and on others."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from chat_templates import CHATML, byte_tokenizer
from recipe_runs import load_recipe, run_recipe, summary, write_rows

from gradacc_hf.hub.model_card import refresh_cards
from gradacc_hf.report.runs import read_runs
from gradacc_hf.run.evaluate import name_of

FLAGS = {"--model.dropout": 0, "--data.max_length": 32, "--batch.effective": 16, "--optim.lr": 3e-3}
FLAGS |= {"--output.tracker": "none", "--train.noise_every": 0, "--budget.padding_free": "off"}
WORDS = {"ham": ["tea", "garden", "letter"], "spam": ["prize", "cash", "winner", "click"]}


def labelled(number, seed):
    rng = np.random.default_rng(seed)
    return [
        {"text": " ".join(rng.choice([*WORDS[label], "the", "of"], 5)), "label": label}
        for label in rng.choice([*WORDS], number).tolist()
    ]


def tagged(number, seed):
    rows = labelled(number, seed)
    tags = {word: f"B-{label}" for label, words in WORDS.items() for word in words}
    return [
        {"tokens": row["text"].split(), "tags": [tags.get(w, "O") for w in row["text"].split()]}
        for row in rows
    ]


def answered(number, seed):
    rows = []
    for row in labelled(number, seed):
        word = row["text"].split()[-1]
        answer = {"text": [word], "answer_start": [row["text"].rindex(word)]}
        rows.append({"question": "Which is the last?", "context": row["text"], "answers": answer})
    return rows


def written(number, seed):
    return [{"source": row["text"], "target": row["text"][::-1]} for row in labelled(number, seed)]


def chats(number, seed):
    def messages(row):
        turns = (("system", "Be brief."), ("user", row["text"]), ("assistant", row["label"]))
        return [{"role": role, "content": content} for role, content in turns]

    return [{"messages": messages(row)} for row in labelled(number, seed)]


def pairs(number, seed):
    return [
        {"anchor": row["text"], "positive": f"{row['text']} {row['label']}"} for row in labelled(number, seed)
    ]


TASKS = {
    "text_classification": ("TextClassification", labelled, {}),
    "token_classification": ("TokenClassification", tagged, {}),
    "question_answering": ("QuestionAnswering", answered, {"--data.doc_stride": 4}),
    "seq2seq": ("Seq2Seq", written, {"--data.max_target_length": 12, "--data.generate_rows": 20}),
    "causal_lm": (
        "CausalLM",
        chats,
        {"--data.max_length": 96, "--data.sample_tokens": 4, "--data.samples": 2},
    ),
    "masked_lm": ("MaskedLM", labelled, {}),
    "contrastive": ("Contrastive", pairs, {}),
}


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=259, max_position_embeddings=128, eos_token_id=257, **sizes)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def train(tiny_bert, tiny_llama, capfd, tmp_path, monkeypatch):
    """A run of a recipe on 96 rows, 24 of them for validation, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def train(task, *flags):
        recipe, rows, own = TASKS[task]
        write_rows("train.jsonl", rows(96, seed=0))
        write_rows("valid.jsonl", rows(24, seed=1))
        model = tiny_llama if task == "causal_lm" else tiny_bert
        settings = {**FLAGS, "--model.name": model, "--data.train": "train.jsonl", **own}
        settings |= {"--data.validation": "valid.jsonl", "--output.dir": "run"}
        words = [str(word) for flag in settings.items() for word in flag]
        outcome = run_recipe(getattr(load_recipe(task), recipe), [*words, *flags], capfd)
        assert outcome.code == 0, outcome.err
        return Path("run")

    return train


@pytest.fixture
def evaluate(gradacc):
    """`gradacc evaluate` in this process: its exit code, output and errors."""
    return partial(gradacc, "evaluate")


@pytest.mark.parametrize("task", TASKS)
def test_the_metrics_are_those_that_the_run_recorded_on_the_same_rows(task, train, evaluate):
    run = train(task)
    code, out, err = evaluate(run, "--json")
    assert code == 0, err
    found = json.loads(out)
    recorded = {name: value for name, value in summary(run)["best"].items() if name != "window"}
    assert {name: metric["value"] for name, metric in found["metrics"].items()} == pytest.approx(
        recorded, rel=1e-5
    )
    baseline = summary(run)["baseline"] or {}
    for name, metric in found["metrics"].items():
        assert metric["baseline"] == pytest.approx(baseline.get(name))
        if task != "contrastive" or name != "loss":  # that loss is of all rows together
            assert metric["low"] is not None, (name, found["notes"])
            assert metric["low"] <= metric["value"] <= metric["high"], name
    titles = [table["title"] for table in found["details"]]
    assert ("Entities" in titles) == (task == "token_classification")
    assert ("Confusion matrix" in titles) == task.endswith("_classification")
    if task == "causal_lm":
        assert {sample["system"] for sample in found["samples"]} == {"Be brief."}
    assert json.loads(Path(run, "evaluations", "validation-1.json").read_text()) == found


def test_other_data_are_read_by_the_recipe_and_nothing_is_overwritten(train, evaluate):
    run = train("text_classification")
    rows = labelled(130, seed=2)
    Path("test.csv").write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    for number in (1, 2):
        code, out, err = evaluate(run, "--data", "test.csv")
        assert (code, err) == (0, "")
        assert "test.csv: 130 examples" in out
        assert "\nbaseline column: a baseline that ignores the input\n" in out
        assert f"evaluations/test-{number}.json" in out
    card = (run / "best" / "README.md").read_text()
    assert "local files, 130 examples" in card  # a card has no names of local files
    assert "test.csv" not in card
    assert "test.csv" in (run / "report.html").read_text()
    assert card.count("by `gradacc evaluate`") == 1  # of two alike, the newer
    assert [one.name for one in read_runs([run])[0].scored] == ["test-2"]
    file = run / "evaluations/test-1.json"
    found = json.loads(file.read_text())
    assert found["window"] == summary(run)["best"]["window"]
    for data, window, shown in (("other", found["window"], 2), ("other", 1, 1)):  # 1: as before continuing
        file.write_text(json.dumps({**found, "data": data, "window": window}))
        refresh_cards(run)
        assert (run / "best" / "README.md").read_text().count("by `gradacc evaluate`") == shown
    # the labels of the run, not of the file, which has one of the two only
    spam = [row for row in rows if row["label"] == "spam"]
    write_rows("spam.jsonl", spam)
    found = json.loads(evaluate(run, "--data", "spam.jsonl", "--json", "--model", "last")[1])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run / "last").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "last")
    batch = tokenizer([row["text"] for row in spam], padding=True, return_tensors="pt")
    with torch.no_grad():
        predicted = model(**batch).logits.argmax(-1).tolist()
    right = np.mean([model.config.id2label[label] == "spam" for label in predicted])
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(right)
    # what cannot be evaluated is refused in one line, and leaves no file
    write_rows("odd.jsonl", [*spam, {"text": "tea", "label": "eggs"}])
    write_rows("two.jsonl", [{"text": "tea", "label": "eggs"}, spam[0]])
    out = " ".join(evaluate(run, "--data", "two.jsonl", "--data.on_bad_row", "skip")[1].split())
    assert "two.jsonl: 1 example " in out
    assert "note: 1 row of data.train and the data left out, the first: label 'eggs' of two.jsonl" in out
    assert "no interval of loss, accuracy, f1, matthews_correlation: one example has none" in out
    before = sorted(run.rglob("*"))
    for words, said in (
        (["--data", "odd.jsonl"], "'eggs'"),
        (["--data", "no.jsonl"], "no file"),
        (["--data", "spam.jsonl", "--split", "test"], "no split 'test'"),
    ):
        code, out, err = evaluate(run, *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert said in err
    write_rows("train.jsonl", [{**row, "label": f"no {row['label']}"} for row in labelled(96, seed=0)])
    write_rows("test.jsonl", [{"text": "tea", "label": "no ham"}])
    code, _, err = evaluate(run, "--data", "test.jsonl")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: data.train: found the labels no ham, no spam, and the model has ham, spam;")
    assert sorted(run.rglob("*")) == before
    shutil.rmtree(run / "best")
    assert evaluate(run)[0] == 2


def test_a_file_is_named_after_its_data():
    assert name_of(None, None) == "validation"
    assert name_of(None, "test") == "test"
    assert name_of("a/b.c.jsonl", None) == "b"
    assert name_of("user/data set", "test") == "data_set-test"
