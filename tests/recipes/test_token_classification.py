"""recipes/token_classification.py, and the identifiers that it learns offline."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from accelerate import Accelerator
from conftest import ROOT
from datasets import ClassLabel, Dataset, Features, List, Value
from recipe_runs import load_recipe, make_recipe, summary, write_rows

from gradacc_hf import embedded
from gradacc_hf.accumulation.reference import EXACT
from gradacc_hf.embedded import identifiers
from gradacc_hf.errors import InputError
from gradacc_hf.run.setup import make_model, make_windows
from gradacc_hf.verification.exactness import verify

TokenClassification = load_recipe("token_classification").TokenClassification
OFFLINE = ROOT / "configs" / "token_classification_offline.yaml"
NAMES = ["O", "B-PER", "I-PER", "B-ORG"]


def make_rows(number=90, seed=0):
    """Sentences of 2 to 20 tokens: a person has two names, and a name after "at" is an organisation's."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(number):
        tokens, tags = [], []
        while len(tokens) < random.integers(2, 20):
            match random.integers(3):
                case 0:
                    tokens += [*random.choice(["walked", "the", "unbelievably", "of"], 2)]
                    tags += ["O", "O"]
                case 1:
                    tokens += [*random.choice(["Ada", "Bo", "Cleopatra"], 2)]
                    tags += ["B-PER", "I-PER"]
                case 2:
                    tokens += ["at", random.choice(["Ada", "Bo", "Cleopatra"])]
                    tags += ["O", "B-ORG"]
        rows.append({"tokens": list(map(str, tokens)), "tags": tags})
    return rows


def as_kind(kind, path, rows):
    """The rows as a file with tags of this kind: strings, or ids of a ClassLabel, or whole numbers."""
    if kind == "strings":
        return write_rows(f"{path}.jsonl", rows)
    ids = [{**row, "tags": [NAMES.index(tag) for tag in row["tags"]]} for row in rows]
    if kind == "numbers":
        return write_rows(f"{path}.jsonl", ids)
    features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=NAMES))})
    Dataset.from_list(ids, features=features).to_parquet(f"{path}.parquet")
    return Path(f"{path}.parquet")


@pytest.mark.parametrize("kind", ["strings", "ids", "numbers"])
def test_tags_of_every_kind_train_evaluate_and_are_saved_by_name(start, kind):
    train, validation = as_kind(kind, "train", make_rows()), as_kind(kind, "other", make_rows(30, seed=1))
    data = ["--data.train", train, "--data.validation", validation]
    outcome = start(
        TokenClassification, *data, "--train.epochs", 8, "--optim.lr", 3e-3, "--output.dir", "out"
    )
    assert outcome.code == 0, outcome.err
    found = summary("out")
    metrics = {"accuracy", "token_f1"} | (set() if kind == "numbers" else {"precision", "recall", "f1"})
    assert found["eval"].keys() == {"window", "loss"} | metrics
    assert found["baseline"].keys() == metrics
    assert found["items"] == 8 * sum(len(row["tokens"]) for row in make_rows())  # one a token, none cut off
    for metric in metrics:
        assert found["eval"][metric] > found["baseline"][metric] + 0.1
    labels = transformers.AutoConfig.from_pretrained("out/best").id2label
    expected = {"strings": sorted(NAMES), "ids": NAMES, "numbers": ["0", "1", "2", "3"]}[kind]
    assert labels == dict(enumerate(expected))
    if kind == "strings":
        check_the_saved_model()


def check_the_saved_model():
    """It answers, and a pipeline of transformers says the same of the first piece of each token."""
    recipe = make_recipe(TokenClassification, "--data.train", "train.jsonl", "--data.max_length", 16)
    model = transformers.AutoModelForTokenClassification.from_pretrained("out/best").eval()
    text = "the Cleopatra Bo walked at Ada"
    answer, *same = recipe.answer(model, [text, {"tokens": text.split()}, {"tokens": text}])  # as of a CSV
    assert same == [answer, answer]
    assert answer["tokens"] == text.split()
    assert answer["tags"][0] == answer["tags"][3] == answer["tags"][4] == "O"
    assert [name for entity in answer["entities"] for name in entity["tokens"]] == ["Cleopatra", "Bo", "Ada"]
    assert answer["entities"][0]["start"] == 1
    pipeline = transformers.pipeline("token-classification", "out/best", device="cpu")
    pieces = {piece["start"]: piece["entity"] for piece in pipeline(text, ignore_labels=[])}
    starts = [0, *(i + 1 for i, letter in enumerate(text) if letter == " ")]
    assert [pieces[start] for start in starts] == answer["tags"]
    long = "at Ada " * 40  # more than the 16 tokens that the model was told to take at once
    (answer,) = recipe.answer(model, [long])
    assert len(answer["tags"]) == 80
    assert set(answer["tags"][::2]) == {"O"}
    assert "O" not in answer["tags"][1::2]


def test_the_first_piece_of_each_token_has_its_tag_and_what_is_cut_off_has_none(tiny_bert, tmp_path):
    rows = [{"tokens": ["Cleopatra", "unbelievably", "of"], "tags": ["B-PER", "O", "O"]}] * 5
    file = write_rows(tmp_path / "a.jsonl", rows)
    for length in (32, 5):
        settings = ["--data.train", file, "--model.name", tiny_bert, "--data.max_length", length]
        recipe = make_recipe(TokenClassification, *settings)
        example = recipe.datasets()[0][0]
        pieces = recipe.tokenizer.convert_ids_to_tokens(example["input_ids"])
        tagged = [
            (p, recipe.labels.names[t]) for p, t in zip(pieces, example["labels"], strict=True) if t != -100
        ]
        expected = [("cleopatra", "B-PER"), ("unbelievable", "O"), ("of", "O")]
        first = [recipe.tokenizer.tokenize(token)[0] for token in rows[0]["tokens"]]
        assert (
            tagged == [(piece, tag) for piece, (_, tag) in zip(first, expected, strict=True)][: len(tagged)]
        )
        assert len(tagged) == (3 if length == 32 else 2)


def test_the_accumulated_gradient_is_that_of_the_window_at_once(tiny_bert, tmp_path):
    settings = ["--data.train", write_rows(tmp_path / "a.jsonl", make_rows()), "--model.name", tiny_bert]
    recipe = make_recipe(TokenClassification, *settings, "--budget.max_tokens", 96, "--batch.effective", 32)
    windows, _ = make_windows(recipe, *recipe.datasets(), Accelerator(cpu=True))
    found = verify(make_model(recipe), windows, recipe.loss, num_windows=2)
    assert min(found.accumulation_steps) > 2
    assert len({len(piece) for process in windows.split(0, 0).processes for piece in process}) > 1
    assert found.exact
    assert found.loop.error < EXACT < found.trainer.error


def test_the_hub_config_names_what_loads_without_code_of_its_own():
    recipe = make_recipe(TokenClassification, "--config", ROOT / "configs" / "token_classification.yaml")
    assert (recipe.data.train, recipe.data.tags_column) == ("lhoestq/conll2003", "ner_tags")
    assert not recipe.config.model.trust_remote_code


SPAN = {"text": "Ada's machine in London.", "label": [[0, 3, "PER"], [17, 23, "LOC"]]}


def test_character_spans_are_learned_and_answers_have_characters(tiny_bert, tmp_path, monkeypatch):
    file = write_rows(tmp_path / "a.jsonl", [SPAN, {"text": "Rome", "label": [[0, 4, "LOC"]]}] * 10)
    recipe = make_recipe(TokenClassification, "--data.train", file, "--model.name", tiny_bert)
    recipe.datasets()
    assert recipe.reading.notes["format"] == ["character spans in 'label' of 'text'"]
    assert recipe.labels.names == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    make_model(recipe).save_pretrained(tmp_path / "saved")
    model = recipe.load(tmp_path / "saved").eval()
    right = ["B-PER", "O", "O", "O", "O", "B-LOC", "O"]
    monkeypatch.setattr(TokenClassification, "tag", lambda self, model, tokens: right[: len(tokens)])
    (answer,) = recipe.answer(model, [{"text": SPAN["text"]}])
    assert answer["tokens"] == ["Ada", "'", "s", "machine", "in", "London", "."]
    assert [[*one["characters"], one["type"]] for one in answer["entities"]] == SPAN["label"]
    model.config.tokens_are_words = False
    assert recipe.answer(model, ["Ada's machine"])[0]["entities"] == [
        {"type": "PER", "tokens": ["Ada's"], "start": 0}
    ]


CONLL = "Ada B-PER\nsang O\n\n"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        (
            "a.txt",
            CONLL * 9 + "Bo\nsang O\n\n" + CONLL,
            "a.txt line 28: line 28 has 1 column, other lines have 2",
        ),
        (
            "a.jsonl",
            f"{json.dumps(SPAN)}\n" * 9 + json.dumps({"text": "Ada", "label": [[0, 2, "PER"]]}) + "\n",
            "a.jsonl line 10: entity 'Ad' at 0 begins or ends within a word",
        ),
    ],
)
def test_a_broken_line_of_a_format_is_one_line_and_may_be_skipped(
    name, content, line, tiny_bert, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content)
    settings = ["--data.train", name, "--model.name", tiny_bert]
    with pytest.raises(InputError) as caught:
        make_recipe(TokenClassification, *settings).datasets()
    assert str(caught.value) == (
        f"data.tags_column: {line}; correct it, or leave such rows out: --data.on_bad_row skip"
    )
    recipe = make_recipe(TokenClassification, *settings, "--data.on_bad_row", "skip")
    assert sum(map(len, recipe.datasets())) == 10 - (name == "a.jsonl")
    assert recipe.skipped_rows == [line]


def test_parts_of_speech_are_no_entities(tiny_bert, tmp_path):
    rows = [{"tokens": ["dogs", "bark"], "tags": ["NOUN", "VERB"]}] * 20
    file = write_rows(tmp_path / "a.jsonl", rows)
    recipe = make_recipe(TokenClassification, "--data.train", file, "--model.name", tiny_bert)
    found = recipe.baseline(*recipe.datasets())
    assert found == {"accuracy": 1.0, "token_f1": 1.0}


def test_the_baseline_is_the_most_frequent_tag_of_a_token(tiny_bert, tmp_path):
    a, b = {"tokens": ["at", "Cleopatra"], "tags": ["O", "B-PER"]}, {"tokens": ["Cleopatra"], "tags": ["O"]}
    train = write_rows(tmp_path / "a.jsonl", [a, a, b])
    new = {"tokens": ["Cleopatra", "new"], "tags": ["B-PER", "B-PER"]}
    validation = write_rows(tmp_path / "b.jsonl", [b, a, new])
    settings = ["--data.train", train, "--data.validation", validation, "--model.name", tiny_bert]
    found = (recipe := make_recipe(TokenClassification, *settings)).baseline(*recipe.datasets())
    assert found["accuracy"] == pytest.approx(3 / 5)  # wrong: O of b, and the new token, O as most are
    assert (found["precision"], found["recall"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_the_baseline_counts_unknown_tokens_too(tiny_bert, tmp_path):
    rows = [{"tokens": ["☃", "at"], "tags": ["B-PER", "O"]}] * 20
    file = write_rows(tmp_path / "a.jsonl", rows)
    recipe = make_recipe(TokenClassification, "--data.train", file, "--model.name", tiny_bert)
    train, validation = recipe.datasets()
    assert recipe.tokenizer.unk_token_id in train[0]["input_ids"]
    assert recipe.baseline(train, validation)["accuracy"] == 1
    assert [tag for _, tag in recipe.words(train[0])] == [
        recipe.labels.names.index(tag) for tag in ("B-PER", "O")
    ]


def test_a_rare_tag_is_not_held_out(tiny_bert, tmp_path):
    rows = [{"tokens": ["at"], "tags": [f"B-{i}"]} for i in range(20)] + [
        {"tokens": ["a"], "tags": ["O"]}
    ] * 5
    file = write_rows(tmp_path / "a.jsonl", rows)
    recipe = make_recipe(TokenClassification, "--data.train", file, "--model.name", tiny_bert)
    recipe.datasets()
    assert len(recipe.labels.names) == 21


# Bad rows


def test_a_tokenizer_that_does_not_say_where_its_tokens_are_is_refused(tiny_bert, tmp_path):
    folder = tmp_path / "slow"
    transformers.AutoModel.from_pretrained(tiny_bert).save_pretrained(folder)
    transformers.ByT5Tokenizer().save_pretrained(folder)
    file = write_rows(tmp_path / "a.jsonl", make_rows(20))
    recipe = make_recipe(TokenClassification, "--data.train", file, "--model.name", folder)
    with pytest.raises(InputError, match=r"does not return the positions of tokens in a text; name a model"):
        recipe.datasets()


def bad(row):
    rows = make_rows(40)
    rows[6] = row
    return rows


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "a.jsonl line 7: 1 tags for 2 tokens"),
        ({"tokens": [], "tags": []}, "a.jsonl line 7: no tokens"),
        ({"tokens": None, "tags": ["O"]}, "a.jsonl line 7: no tokens"),
        ({"tokens": ["a", None], "tags": ["O", "O"]}, "a.jsonl line 7: token 2 of 2 is null"),
        ({"tokens": ["a", "b"], "tags": None}, "a.jsonl line 7: 0 tags for 2 tokens"),
        ({"tokens": ["\u200b"], "tags": ["O"]}, "a.jsonl line 7: no token of its 1 is left"),
        (
            {"tokens": ["a"], "tags": ["X-a"]},
            "a.jsonl line 7: tag 'X-a' is not in the form of the others (B-ORG, B-PER, I-PER, O)",
        ),
        (
            {"tokens": ["a", "b"], "tags": ["O", None]},
            "a.jsonl line 7: tag 2 of 2 is null; −100 marks a token without a tag",
        ),
    ],
)
def test_a_bad_row_is_named_or_skipped(start, refused, row, line):
    train, validation = write_rows("a.jsonl", bad(row)), write_rows("b.jsonl", make_rows(20))
    data = ["--data.train", train, "--data.validation", validation]
    message = refused(TokenClassification, *data)
    assert line in message
    assert "--data.on_bad_row skip" in message
    outcome = start(TokenClassification, *data, "--data.on_bad_row", "skip", "--check")
    assert outcome.code == 0, outcome.err
    assert f"1 row that cannot be used, the first: {line}" in outcome.out
    assert "39 to train on" in outcome.out


def test_a_tag_of_validation_that_training_does_not_have_is_named(refused):
    train, validation = (
        write_rows("a.jsonl", make_rows()),
        write_rows("b.jsonl", bad({"tokens": ["a"], "tags": ["X"]})),
    )
    message = refused(TokenClassification, "--data.train", train, "--data.validation", validation)
    found = "b.jsonl line 7: tag 'X' is not one of the 4 tags of the training rows (B-ORG, B-PER, I-PER, O)"
    assert found in message


def test_an_id_that_has_no_name_is_named(refused):
    rows = [{"tokens": ["a"], "tags": [0]}] * 30 + [{"tokens": ["a"], "tags": [-1]}]
    features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=NAMES))})
    Dataset.from_list(rows, features=features).to_parquet("a.parquet")
    message = refused(TokenClassification, "--data.train", "a.parquet", "--data.validation", "a.parquet")
    assert "a.parquet row 31: tag '-1' is the id of none of the 4 classes (O, B-PER, I-PER, B-ORG)" in message


def test_the_first_row_of_the_file_is_named_where_all_are_bad(refused):
    train = write_rows("a.jsonl", [{"tokens": ["a", "b", "c"], "tags": ["O", None, "X"]}] * 20)
    message = refused(TokenClassification, "--data.train", train)
    assert "data.tags_column: a.jsonl line 1: tag 2 of 3 is null; " in message
    assert "(all 20 rows are bad)" in message


def test_ignored_tags_are_counted_and_255_is_no_class(start, refused):
    rows = [{"tokens": ["a", "b", "c", "d"], "tags": [0, 1, 2, tag]} for tag in [-100] * 9 + [0] * 11]
    train, validation = write_rows("a.jsonl", rows), write_rows("b.jsonl", rows[8:10])
    outcome = start(TokenClassification, "--data.train", train, "--data.validation", validation, "--check")
    assert outcome.code == 0, outcome.err
    counts = "9 of 80 training tokens and 1 of 8 validation tokens"
    assert f"ignored               {counts} have the tag −100, so no label" in outcome.out
    assert "labels                of the data: 0, 1, 2\n" in outcome.out
    rows = [{**row, "tags": [255 if tag < 0 else tag for tag in row["tags"]]} for row in rows]
    message = refused(TokenClassification, "--data.train", write_rows("a.jsonl", rows))
    assert (
        "data.tags_column: the labels are 0 to 2 and 255, the usual mark of a missing label; write" in message
    )


def test_a_row_whose_tags_are_no_list_is_named(refused):
    train = write_rows("a.jsonl", bad({"tokens": ["a"], "tags": "B-PER O"}))
    assert "a.jsonl line 7 has 'B-PER O' in column 'tags'" in refused(
        TokenClassification, "--data.train", train
    )


def test_columns_that_are_no_lists_are_refused(refused):
    train = write_rows("a.jsonl", [{"tokens": "a b", "tags": "O O", "scores": [0.5], "ids": [1]}] * 20)
    assert "data.tokens_column: column 'tokens' has string, not lists" in refused(
        TokenClassification, "--data.train", train
    )
    columns = ["--data.train", train, "--data.tokens_column", "ids"]
    assert "data.tokens_column: column 'ids' has lists of int64; of strings" in refused(
        TokenClassification, *columns
    )
    write_rows("b.jsonl", [{"tokens": ["a"], "tags": [0.5]}] * 20)
    assert "column 'tags' has lists of float64" in refused(TokenClassification, "--data.train", "b.jsonl")
    write_rows("c.jsonl", [{"tokens": ["a"], "tags": ["O"]}] * 20)
    assert "1 different tags" in refused(TokenClassification, "--data.train", "c.jsonl")
    assert "no column 'labels'; found tokens, tags" in refused(
        TokenClassification, "--data.train", "c.jsonl", "--data.tags_column", "labels"
    )


# embedded:identifiers

SOURCE = '''\
import os.path
import json as js
from collections.abc import Sized
LIMIT = 3
class Box(Sized):
    def fill(self, items, top=LIMIT):
        """Not a token."""
        global COUNT
        for item in items: self.items.append(js.dumps(item, indent=top))  # nor this
        COUNT = len(os.path.join(item, f"{item} is a long literal, and is not kept"))
        return helper(Box(), lambda key: key)
def helper(box, *rest):
    return [part for part in rest if box] or helper(None, *rest, *rest)
'''


def test_every_name_has_its_role():
    rows = list(identifiers.function_rows(SOURCE, ast.parse(SOURCE), ("box", "__init__")))[::-1]
    assert [row["module"] for row in rows] == ["box", "box"]
    for row in rows:
        assert len(row["tokens"]) == len(row["tags"])
        assert row["text"] == " ".join(row["tokens"])
    roles = set(zip(rows[0]["tokens"], rows[0]["tags"], strict=True))
    for role, names in {
        "B-function": ["fill", "helper"],
        "B-parameter": ["self", "top", "key"],
        "B-variable": ["item"],
        "B-method": ["append", "dumps", "join"],
        "B-builtin": ["len"],
        "B-class": ["Box"],
        "B-global": ["COUNT", "LIMIT"],
        "B-keyword": ["indent"],
        "O": ["def", "(", '"..."', "."],
    }.items():
        assert {(name, role) for name in names} <= roles, role
    assert {("items", "B-parameter"), ("items", "B-attribute")} <= roles  # by its place
    at = rows[0]["tokens"].index("os")
    assert rows[0]["tokens"][at : at + 5] == ["os", ".", "path", ".", "join"]
    assert rows[0]["tags"][at : at + 5] == ["B-import", "I-import", "I-import", "O", "B-method"]
    assert "Not a token." not in rows[0]["text"]
    assert "nor this" not in rows[0]["text"]
    assert ("part", "B-variable") in zip(rows[1]["tokens"], rows[1]["tags"], strict=True)


def test_the_embedded_rows_are_many_and_no_module_is_in_both_halves():
    train, validation = embedded.load("identifiers")
    assert len(train) > 5000
    assert 0.1 < len(validation) / (len(train) + len(validation)) < 0.3
    assert not set(train["module"]) & set(validation["module"])
    assert not set(train["text"]) & set(validation["text"])
    assert {tag for tags in validation["tags"] for tag in tags} == {
        tag for tags in train["tags"] for tag in tags
    }
    by_token = {}
    for row in train:
        for token, tag in zip(row["tokens"], row["tags"], strict=True):
            by_token.setdefault(token, set()).add(tag)
    assert np.mean([len(tags) > 1 for token, tags in by_token.items() if token.isidentifier()]) > 0.1
