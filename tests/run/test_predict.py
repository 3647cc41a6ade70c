"""`gradacc predict`: a saved run on texts, files and standard input; and what it refuses."""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import ROOT
from recipe_runs import run_file

from gradacc_hf.cli import main as cli
from gradacc_hf.embedded import minilm_path

TEXTS = ["prize winner click cash", "tea in the garden", "of the letter, " * 100]


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of a copy of the recipe, as `python recipes/X.py` starts it, without a config file."""
    folder = tmp_path_factory.mktemp("predict")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=32, **sizes)
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    rng = np.random.default_rng(0)
    words = {"ham": ["tea", "garden", "letter"], "spam": ["prize", "cash", "winner", "click"]}
    rows = [{"body": " ".join(rng.choice(words[label], 5)), "label": label} for label in words] * 40
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(ROOT / "recipes/text_classification.py", folder / "mine.py")
    flags = {"model.name": "bert", "data.train": "mine.jsonl", "data.text_column": "body"}
    flags |= {
        "data.max_length": 16,
        "optim.lr": 1e-2,
        "train.epochs": 3,
        "batch.effective": 16,
        "output.dir": "run",
    }
    with contextlib.chdir(folder):
        run_file("mine.py", *(f"--{key}={value}" for key, value in flags.items()))
    shutil.rmtree(folder / "bert")  # a saved run stands on its own
    return folder / "run"


@pytest.fixture
def gradacc(capsys, monkeypatch, tmp_path):
    """The command line in this process, in an empty folder: its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def gradacc(*words, stdin=""):
        monkeypatch.setattr(sys, "argv", ["gradacc", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return gradacc


@pytest.fixture
def predict(gradacc, run):
    """The answers, as they are printed."""

    def predict(*words, stdin=""):
        code, out, err = gradacc("predict", run, *words, stdin=stdin)
        assert (code, err) == (0, "")
        return [json.loads(line) for line in out.splitlines()]

    return predict


def test_answers_are_those_of_the_saved_model(predict, run):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run / "best").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "best")
    for text, answer in zip(TEXTS, predict(*TEXTS), strict=True):
        batch = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            [probabilities] = model(**batch).logits.softmax(-1).tolist()
        best = int(np.argmax(probabilities))
        assert answer["label"] == ["ham", "spam"][best]
        assert answer["score"] == pytest.approx(probabilities[best], abs=1e-5)
    assert [answer["label"] for answer in predict(*TEXTS[:2])] == ["spam", "ham"]


def test_every_kind_of_input_gives_the_same_answers_in_its_order(predict):
    texts = [*TEXTS, 'é, "ü"\tß', "tea\u2028garden"] * 10  # more than are answered at once
    expected = predict(*texts)
    Path("a.jsonl").write_text("\n\n".join(json.dumps({"id": 1, "body": text}) for text in texts))
    Path("b.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    Path("c.txt").write_text("".join(text + "\n" for text in texts), encoding="utf-8-sig")
    quoted = ('1,"' + text.replace('"', '""') + '"\n' for text in texts)
    Path("d.csv").write_text("id,body\n" + "".join(quoted))
    for file in ("a.jsonl", "b.jsonl", "c.txt", "d.csv"):
        answers = predict("--input", file)
        assert [answer["label"] for answer in answers] == [answer["label"] for answer in expected], file
        assert [a["score"] for a in answers] == pytest.approx([a["score"] for a in expected], abs=1e-5)
    for file in ("a.jsonl", "c.txt"):
        assert predict("--input", "-", stdin=Path(file).read_text(encoding="utf-8-sig")) == predict(
            "--input", file
        )


def test_answers_have_the_line_and_the_id_of_their_row(predict):
    Path("a.jsonl").write_text('{"body": "tea tea tea", "id": "x7"}\n\n{"body": "cash", "id": 3}\n')
    answers = predict("--input", "a.jsonl", "--batch_size", "1")
    assert [(answer["line"], answer["id"]) for answer in answers] == [(1, "x7"), (3, 3)]
    Path("b.csv").write_text('guid,body\n1,"two\nlines"\n2,tea\n')
    assert [(answer["line"], answer["guid"]) for answer in predict("--input", "b.csv")] == [
        (2, "1"),  # the line on which the row begins
        (4, "2"),
    ]
    assert "line" not in predict("tea")[0]


def test_answers_go_to_a_file_that_has_its_name_once_it_is_complete(gradacc, predict, run):
    expected = predict(*TEXTS)
    assert gradacc("predict", run, *TEXTS, "--output", "a.jsonl") == (
        0,
        f"wrote {len(TEXTS)} answers to a.jsonl\n",
        "",
    )
    assert [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()] == expected
    assert gradacc("predict", run, "tea", "--output", "a.jsonl")[0] == 2
    Path("b.jsonl").write_text('{"body": "tea"}\n' * 40 + '{"text": "tea"}\n')
    words = ["predict", run, "--input", "b.jsonl", "--output", "c.jsonl", "--batch_size", 4]
    code, _, err = gradacc(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert "b.jsonl, line 41: no 'body' among text; " in err
    assert err.endswith("; the first 32 answers are in c.jsonl.unfinished\n")
    assert sorted(path.name for path in Path().iterdir()) == ["a.jsonl", "b.jsonl", "c.jsonl.unfinished"]
    lines = Path("c.jsonl.unfinished").read_text().splitlines()
    assert [json.loads(line)["line"] for line in lines] == [*range(1, 33)]
    assert "c.jsonl.unfinished exists, of a prediction that was stopped" in gradacc(*words)[2]
    _, _, err = gradacc("predict", run, "tea", "--temperature", "1")
    assert err == "error: --temperature: mine writes no text; leave it out\n"
    assert (
        "--batch_size: found '0'; allowed: 1 or more" in gradacc("predict", run, "tea", "--batch_size", 0)[2]
    )


def test_the_last_model_answers_when_it_is_asked(gradacc, run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    shutil.rmtree(other / "best")
    code, _, err = gradacc("predict", other, "tea")
    assert code == 2
    assert "found no best/ in it; choose --model last" in err
    assert gradacc("predict", other, "tea", "--model", "last")[0] == 0
    shutil.rmtree(other / "last")
    assert "this run saved no model" in gradacc("predict", other, "tea")[2]


def test_the_config_of_a_run_runs_it_again(run, tmp_path, monkeypatch, capfd):
    """With the recipe file that really ran, though no config named it."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["recipe"] == str(run.parent / "mine.py")
    monkeypatch.chdir(run.parent)
    again = ["--config", run / "config.yaml", "--output.dir", tmp_path / "b", "--model.name", run / "last"]
    run_file(config["recipe"], *again, "--check")
    assert "check: this would run" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"body": "x"}\n\n{"body": "x"\n', "a.jsonl, line 3: column 13: Expecting ',' delimiter"),
        ("a.jsonl", '{"body": "x"}\n12\n', "a.jsonl, line 2: found 12; one JSON object, or string, a line"),
        (
            "a.jsonl",
            '{"body": "x"}\n{"text": "x"}\n',
            "a.jsonl, line 2: no ",
        ),
        ("a.jsonl", '{"body": "x"}\n{"body": 3}\n', "a.jsonl, line 2: column 'body'"),
        ("a.jsonl", "\n", "a.jsonl: found no input"),
        ("a.csv", "body,id\nx,1\nx\n", "a.csv, line 3: found fewer fields than the header has; quote fields"),
        ("a.csv", "body\nx,1\n", "a.csv, line 2: found more fields than the header has"),
        ("a.csv", 'body\n"x\n', "a.csv, line 2: unexpected end of data"),
        ("a.csv", "text\nx\n", "a.csv, line 2: no "),
        ("a.txt", "", "a.txt: found no input; give at least one"),
        ("a.txt", b"x\n\xff\n", "found bytes that are not UTF-8; save it as UTF-8"),
        (
            "a.xlsx",
            "",
            "--input: found 'a.xlsx'; allowed: a .jsonl, .csv, .txt file, or - for standard input",
        ),
    ],
)
def test_a_broken_file_is_refused_in_one_line_that_names_its_line(gradacc, run, name, content, said):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, err = gradacc("predict", run, "--input", name)
    assert (code, err.count("\n"), err[:7]) == (2, 1, "error: ")
    assert said in err


def test_what_is_no_run_is_refused_in_one_line(gradacc, run, tmp_path):
    Path("empty").mkdir()
    moved = shutil.copytree(run, tmp_path / "moved")
    config = (run / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace("mine.py", "gone.py"))
    for words, said in (
        (["gone", "tea"], "gone: found no such folder"),
        (["empty", "tea"], "empty: found no config.yaml in it"),
        ([run / "best", "tea"], f"its run is {run}"),
        ([moved, "tea"], "gone.py', allowed is a recipe file"),
        ([run], "predict: give texts, or --input FILE"),
        ([run, "tea", "--input", "-"], "not both"),
        ([run, "--input", "gone.txt"], "--input: no file 'gone.txt'"),
        ([run, "tea", "--output", "gone/a.jsonl"], "--output: no folder gone"),
    ):
        code, out, err = gradacc("predict", *words)
        assert (code, out, err.count("\n"), err[:7]) == (2, "", 1, "error: ")
        assert said in err


def test_a_recipe_that_does_not_answer_says_so(gradacc, run, tmp_path):
    (tmp_path / "mute.py").write_text(
        "from gradacc_hf.recipe.base import Recipe\n"
        "from transformers import AutoModelForSequenceClassification\n"
        "class Mute(Recipe):\n    model_class = AutoModelForSequenceClassification\n"
    )
    other = shutil.copytree(run, tmp_path / "other")
    (other / "config.yaml").write_text(f"recipe: {tmp_path / 'mute.py'}\ndata:\n  train: mine.jsonl\n")
    code, _, err = gradacc("predict", other, "tea")
    assert code == 2
    assert err == "error: text 1: Mute has no answers to inputs: define answer() in the recipe\n"
