"""`data.streaming`: the examples, windows and weights of data read whole, also after a stop."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from chat_templates import byte_tokenizer
from conftest import ROOT
from datasets import ClassLabel, Dataset, Features, Value
from recipe_runs import load_recipe, make_recipe, run_recipe, summary, tiny_bert, with_defaults, write_rows
from safetensors.torch import load_file

from gradacc_hf.cli.plan import main as plan
from gradacc_hf.data import streams
from gradacc_hf.errors import InputError
from gradacc_hf.recipe import streaming
from gradacc_hf.run.runner import load_task

TextClassification = load_recipe("text_classification").TextClassification
__all__ = ["tiny_bert"]

WORDS = [f"word {number} " * (number % 23 + 1) for number in range(60)]
TEXTS = [{"text": text} for text in WORDS]
LABELLED = [{"text": text, "label": "ab"[number % 2]} for number, text in enumerate(WORDS)]
BAD = [{"text": "  ", "label": "a"}, {"text": None, "label": "b"}, {"text": "word", "label": "c"}]
LISTS = [{"text": text, "label": ["a", "b"][: number % 3]} for number, text in enumerate(WORDS)]
SEPARATED = [{**row, "label": ";".join(row["label"]) or "b"} for row in LISTS]
NUMBERS = [{"text": text, "label": number / 7} for number, text in enumerate(WORDS)]
PAIRS = [{"anchor": text, "positive": f"to {text}"} for text in WORDS]
NESTED = [{"pair": {"de": text, "en": f"to {text}"}} for text in WORDS]
TAGGED = [{"tokens": (words := text.split()), "tags": ["B-X", "O"] * (len(words) // 2)} for text in WORDS]
CHATS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"yes {text}"}]}
    for text in WORDS
]
SQUAD = [
    {
        "question": f"which {number}?",
        "context": f"{text}is the answer {number} here",
        "answers": {"text": [f"answer {number}"], "answer_start": [len(text) + 7]},
    }
    for number, text in enumerate(WORDS)
]
NONE = {"text": [], "answer_start": []}
UNANSWERED = [{**row, "answers": NONE} if number % 3 == 0 else row for number, row in enumerate(SQUAD)]
STREAMED = ["--data.streaming", "true", "--train.max_windows", "6"]
MULTI = ["--data.problem", "multi_label", "--data.labels", "a,b"]
CASES = {
    "labels": ("text_classification", "TextClassification", LABELLED, ["--data.labels", "b,a"]),
    "lists": ("text_classification", "TextClassification", LISTS, MULTI),
    "separated": ("text_classification", "TextClassification", SEPARATED, MULTI),
    "numbers": ("text_classification", "TextClassification", NUMBERS, ["--data.problem", "regression"]),
    "masked": ("masked_lm", "MaskedLM", TEXTS, []),
    "tags": ("token_classification", "TokenClassification", TAGGED, ["--data.labels", "O,B-X"]),
    "squad": ("question_answering", "QuestionAnswering", SQUAD, ["--data.doc_stride", "8"]),
    "no answers": ("question_answering", "QuestionAnswering", UNANSWERED, ["--data.doc_stride", "8"]),
    "pairs": ("contrastive", "Contrastive", PAIRS, []),
    "texts": ("causal_lm", "CausalLM", TEXTS, []),
    "chats": ("causal_lm", "CausalLM", CHATS, []),
    "inner columns": (
        *("seq2seq", "Seq2Seq", NESTED),
        ["--data.source_column", "pair.de", "--data.target_column", "pair.en"],
    ),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(streams, "ROWS", 7)


@pytest.fixture
def chat_model(tiny_bert, tmp_path):
    """A model's config with a tokenizer that has a chat template, as a folder."""
    shutil.copytree(tiny_bert, tmp_path / "chat")
    byte_tokenizer().save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


@pytest.mark.parametrize("case", CASES)
def test_a_stream_gives_the_examples_of_the_file(tiny_bert, chat_model, case):
    name, class_name, rows, settings = CASES[case]
    recipe_class = getattr(load_recipe(name), class_name)
    path, other = write_rows("rows.jsonl", rows), write_rows("other.jsonl", rows[:10])
    words = [
        "--model.name",
        chat_model if case == "chats" else tiny_bert,
        "--data.max_length",
        300 if case == "chats" else 24,
    ]
    words += ["--data.train", path, "--data.validation", other, *settings]
    whole, validation = make_recipe(recipe_class, *words).datasets()
    recipe = make_recipe(recipe_class, *words, *STREAMED)
    sample, of_stream = recipe.datasets()
    assert [*recipe.stream(sample)] == [*whole]
    assert [*of_stream] == [*validation]
    assert len(whole) >= len(rows)


def test_class_names_of_a_parquet_file_are_the_labels(tiny_bert):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["b", "a", "c"])})
    Dataset.from_list(LABELLED, features).to_parquet("rows.parquet")
    words = ["--model.name", tiny_bert, "--data.train", "rows.parquet", "--data.validation_rows", "10"]
    recipe = make_recipe(TextClassification, *words, *STREAMED)
    sample, validation = recipe.datasets()
    assert recipe.target.names == ["b", "a", "c"]
    assert [row["labels"] for row in validation] == [1, 0] * 5
    assert [row["labels"] for row in recipe.stream(sample)] == [1, 0] * 25


def bad_rows_recipe(tiny_bert, *settings):
    path = write_rows("rows.jsonl", [*LABELLED[:40], *BAD, *LABELLED[40:]])
    path.write_text(path.read_text() + "no JSON\n")
    words = [
        "--model.name",
        tiny_bert,
        "--data.train",
        path,
        "--data.validation_rows",
        2,
        "--batch.effective",
        4,
    ]
    return make_recipe(TextClassification, *words, "--data.labels", "a,b", *STREAMED, *settings)


def test_bad_rows_are_skipped_and_counted(tiny_bert, monkeypatch, caplog):
    Accelerator(cpu=True)  # its process logs
    monkeypatch.setattr(streaming, "SAMPLE", 8)
    recipe = bad_rows_recipe(tiny_bert, "--data.on_bad_row", "skip", "--data.max_length", 32)
    stream = recipe.stream(recipe.datasets()[0])
    examples = [*stream]
    assert len(examples) == 58
    assert stream.read["rows"] == 62
    assert stream.read["count"] == 4
    assert [line.partition(": ")[0][-7:] for line in stream.read["first"]] == [
        *("line 41", "line 42", "line 43", "line 64")
    ]
    assert stream.read["truncated"] == sum(len(text.split()) > 30 for text in WORDS[2:])
    assert len(caplog.messages) == 1
    assert "rows.jsonl line 41: column 'text' is empty: the row is skipped" in caplog.text
    list(stream.apart())
    assert stream.read["rows"] == 62


def test_the_first_bad_row_ends_the_stream_with_its_line(tiny_bert, monkeypatch):
    monkeypatch.setattr(streaming, "SAMPLE", 8)
    recipe = bad_rows_recipe(tiny_bert)
    stream = recipe.stream(recipe.datasets()[0])
    with pytest.raises(InputError) as raised:
        list(stream)
    assert str(raised.value) == (
        "data.train: rows.jsonl line 41: column 'text' is empty; correct it, or leave such rows out: "
        "--data.on_bad_row skip"
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_examples_go_on_at_every_position(tiny_bert, workers):
    write_rows("rows.jsonl", TEXTS)
    recipe_class = load_recipe("masked_lm").MaskedLM  # a row has several examples
    words = ["--model.name", tiny_bert, "--data.train", "rows.jsonl", "--data.max_length", 8, *STREAMED]
    words += ["--data.validation_rows", 20]
    recipe = make_recipe(recipe_class, *words)
    stream = recipe.stream(recipe.datasets()[0])
    examples, states = [], []
    for example in stream:
        examples.append(example)
        states.append(json.loads(json.dumps(stream.state_dict())))
    assert len(examples) > 100
    recipe = make_recipe(recipe_class, *words, "--budget.num_workers", workers)
    stream = recipe.stream(recipe.datasets()[0])
    for done in range(1, len(states), 1 if workers == 0 else 41):
        resumed = stream.apart()
        resumed.load_state_dict(states[done - 1])
        assert [*resumed] == examples[done:]


def test_the_plan_states_the_size_and_no_column_that_was_converted(tiny_bert):
    spans = [{"text": "Ada sang", "entities": [[0, 3, "X"]]}] * 30
    recipe_class = load_recipe("token_classification").TokenClassification
    words = ["--model.name", tiny_bert, "--data.train", write_rows("rows.jsonl", spans), *STREAMED]
    words += ["--data.max_length", 16, "--data.labels", "O,B-X,I-X", "--data.validation_rows"]
    recipe = make_recipe(recipe_class, *words, 5)
    recipe.datasets()
    assert "rows.jsonl (1.41 KiB)" in recipe.reading.notes["stream"][0]
    assert "ignored" not in recipe.reading.notes
    with pytest.raises(
        InputError, match=r"no rows after the first 30, the validation rows; set data.validation"
    ):
        make_recipe(recipe_class, *words, 30).datasets()


def test_a_process_ends_while_its_workers_still_read(tiny_bert):
    write_rows("rows.jsonl", LABELLED)
    words = ["--model.name", tiny_bert, "--data.train", "rows.jsonl", "--data.max_length", 32, *STREAMED]
    words += ["--data.validation_rows", 5, "--data.labels", "a,b", "--budget.num_workers", 1]
    program = f"""
from recipe_runs import load_recipe, make_recipe
recipe = make_recipe(load_recipe("text_classification").TextClassification, *{[*map(str, words)]})
held = iter(recipe.stream(recipe.datasets()[0]))
print(len(next(held)))
"""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/helpers")))
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, timeout=100)
    assert (ended.returncode, ended.stdout) == (0, b"3\n"), ended.stderr


class ToldToStop(TextClassification):
    """Label a text, until a signal stops it at the first evaluation."""

    def validate(self, model, windows, accelerator):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().validate(model, windows, accelerator)


@pytest.fixture
def start(tiny_bert, capfd):
    def start(recipe_class, *arguments):
        small = {"--model.name": tiny_bert, "--data.max_length": 32, "--batch.effective": 8}
        small |= {"--data.train": "rows.jsonl", "--data.validation": "v.jsonl", "--optim.lr": 1e-3}
        small |= {
            "--output.tracker": "none",
            "--data.labels": "a,b",
            "--budget.micro_batch_size": 8,
            "--train.eval_every": 4,
        }
        return run_recipe(recipe_class, with_defaults(arguments, small), capfd)

    return start


def weights(folder):
    return load_file(f"{folder}/last/model.safetensors")


def same(one, other):
    return all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


@pytest.mark.slow
def test_a_run_on_a_stream_is_the_run_on_the_file_also_after_a_stop(start):
    """Bit for bit, with dropout: a buffer of the whole stream, a smaller one, and a worker after the stop."""
    write_rows("rows.jsonl", LABELLED)
    write_rows("v.jsonl", LABELLED[:10])
    length = ["--train.epochs", 2, "--train.max_windows", 14]
    streamed = ["--data.streaming", "true", *length]
    assert start(TextClassification, *length, "--output.dir", "whole").code == 0
    outcome = start(TextClassification, *streamed, "--output.dir", "buffered")
    assert outcome.code == 0, outcome.err
    assert "60 rows read in an epoch, 0 of them skipped and " in outcome.out
    assert "the rows of a stream and 10 validation examples" in Path("buffered/last/README.md").read_text()
    assert same("whole", "buffered")

    streamed += ["--data.buffer_size", 9]
    assert start(TextClassification, *streamed, "--output.dir", "undisturbed").code == 0
    assert not same("whole", "undisturbed")
    streamed += ["--output.dir", "stopped"]
    outcome = start(ToldToStop, *streamed)
    assert "stopped after window 5 of 14" in outcome.out, outcome.err
    streamed += ["--resume", "auto", "--budget.num_workers", 1]
    write_rows("rows.jsonl", [*LABELLED, LABELLED[0]])
    outcome = start(TextClassification, *streamed)
    assert outcome.code == 2
    write_rows("rows.jsonl", LABELLED)
    outcome = start(TextClassification, *streamed)
    assert outcome.code == 0, outcome.err
    assert summary("stopped")["windows"] == 14
    assert same("undisturbed", "stopped")
    assert summary("stopped")["skipped_rows"]["rows"] == 60


def test_another_file_is_refused_by_the_bytes_of_its_end(tiny_bert, monkeypatch):
    """Its first rows, which are compared, too, are the same."""
    monkeypatch.setattr(streaming, "SAMPLE", 8)
    words = ["--model.name", tiny_bert, "--data.train", "rows.jsonl", "--data.validation_rows", 5, *STREAMED]
    words += ["--data.labels", "a,b", "--batch.effective", 4, "--output.dir", "run"]
    same = []
    for rows in (LABELLED, [*LABELLED, LABELLED[0]]):
        write_rows("rows.jsonl", rows)
        config = make_recipe(TextClassification, *words).config
        same.append(load_task(TextClassification, config, Accelerator(cpu=True)).same)
    assert {key for key in same[0] if same[0][key] != same[1][key]} == {"data.train (bytes of the files)"}


def test_without_a_number_of_windows_the_plan_of_a_run_says_that_it_is_unknown(start):
    write_rows("rows.jsonl", LABELLED)
    write_rows("v.jsonl", LABELLED[:10])
    outcome = start(
        TextClassification, "--data.streaming", "true", "--optim.scheduler", "constant", "--check"
    )
    assert outcome.code == 0, outcome.err
    assert "as many as the stream has to train on, 10 to validate" in outcome.out
    assert "the plan is of the first 60 training rows" in outcome.out
    assert "windows               as many as the stream has, over 1 epoch" in outcome.out


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            ["--train.max_windows", "null"],
            "train.max_windows: found null, and the number of windows of a stream",
        ),
        (["--data.labels", "null"], "data.labels: found null, and a stream shows no label before its row"),
        (["--data.labels", "null"], "list all labels, such as --data.labels a,b"),
        (
            ["--data.streaming", "false", "--data.validation_rows", "9"],
            "data.validation_fraction is the share",
        ),
        (["--data.class_weights", "balanced"], "none or a=5,b=1 with data.streaming"),
        (["--batch.effective", "{0: 4, 2: 8}"], "batch.effective: found {0: 4, 2: 8}, and the learning rate"),
        (
            ["--data.streaming", "false", "--data.buffer_size", "9"],
            "1000, its default, without data.streaming",
        ),
    ],
)
def test_settings_that_need_all_rows_are_refused_in_one_line(start, changes, line):
    write_rows("rows.jsonl", LABELLED)
    write_rows("v.jsonl", LABELLED[:10])
    outcome = start(
        TextClassification, *with_defaults(changes, {"--data.streaming": "true", "--train.max_windows": 6})
    )
    assert outcome.code == 2, outcome.out
    assert outcome.err.count("\n") == 1
    assert line in outcome.err


def test_a_recipe_that_needs_all_rows_refuses_a_stream(tiny_bert):
    write_rows("rows.jsonl", LABELLED)
    recipe_class = load_recipe("image_classification").ImageClassification
    recipe = make_recipe(recipe_class, "--model.name", tiny_bert, "--data.train", "rows.jsonl", *STREAMED)
    with pytest.raises(InputError, match=r"data\.streaming: ImageClassification needs all rows at once"):
        recipe.datasets()


@pytest.mark.slow
def test_gradacc_plan_is_of_the_first_rows(tiny_bert, capsys):
    write_rows("rows.jsonl", LABELLED)
    Path("c.yaml").write_text(f"recipe: {ROOT / 'recipes/text_classification.py'}\n")
    words = ["--config", "c.yaml", "--budget", "cpu", "--model.name", tiny_bert, "--data.max_length", 32]
    words += ["--data.train", "rows.jsonl", "--data.validation_rows", 10, "--data.labels", "a,b"]
    words += ["--batch.effective", 8, "--data.streaming", "true", "--optim.scheduler", "constant"]
    plan([*map(str, words)])
    found = capsys.readouterr().out
    assert "the plan is of the first 50 training rows" in found
    assert "windows               an unknown number in 1 epoch" in found
    assert "the number of windows is unknown (set train.max_windows)" in found
