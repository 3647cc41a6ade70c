"""data/loading.py: a file, a folder or a Hub name → train and validation."""

import json
import shutil
import time
from pathlib import Path

import datasets
import datasets.config
import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from gradacc_hf import embedded
from gradacc_hf.data import loading, readers
from gradacc_hf.data import loading as data
from gradacc_hf.data.columns import encode_labels, require_column, require_texts
from gradacc_hf.data.files import encoding_fault
from gradacc_hf.data.loading import load_data
from gradacc_hf.errors import InputError

KINDS = [".csv", ".json", ".jsonl", ".parquet"]  # test_formats.py has the others
ROWS = [{"text": f"text {i}", "label": "odd" if i % 2 else "even"} for i in range(20)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(embedded, "hub_has", lambda name, repo_type: None)


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def load(train, validation=None, *, validation_fraction=0.2, seed=0, **more) -> data.Splits:
    given = None if validation is None else str(validation)
    return load_data(str(train), given, validation_fraction=validation_fraction, seed=seed, **more)


def write(path: Path, content: list[dict] | str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        frame = pd.DataFrame(content)
        if path.suffix.lower() == ".csv":
            frame.to_csv(path, index=False)
        elif path.suffix == ".parquet":
            frame.to_parquet(path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(content))
        else:
            path.write_text("\n".join(map(json.dumps, content)))
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("suffix", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    train = write(tmp_path / f"train{suffix}", ROWS)
    splits = load(train, write(tmp_path / f"other{suffix}", ROWS[:3]))
    assert list(splits.train) == ROWS
    assert list(splits.validation) == ROWS[:3]
    assert not splits.held_out
    assert "other" in splits.source


def test_a_file_may_have_any_name(tmp_path):
    for name in ("a [1] #2*.csv", "è {x}?.jsonl", "data.v1.CSV"):
        assert len(load(write(tmp_path / "my data [x]" / name, ROWS)).train) == 16, name


def test_a_file_that_cannot_be_opened_is_refused(tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "a.csv")

    path = write(tmp_path / "a.csv", ROWS)
    monkeypatch.setattr(readers, "find_encoding", denied)
    assert f"cannot read {path}: Permission denied" in refusal(load, path)


def test_a_file_that_changed_is_read_again(tmp_path):
    path = write(tmp_path / "a.csv", ROWS)
    assert len(load(path).train) == 16
    write(path, ROWS[:10])
    assert len(load(path).train) == 8


def test_rows_are_held_out_by_the_seed_alone_and_none_is_lost(tmp_path):
    path = write(tmp_path / "a.csv", ROWS)
    first, again, other = load(path), load(path), load(path, seed=1)
    assert first.held_out
    assert first.source == "validation: 4 of 20 training rows, held out by seed 0"
    assert first.validation["text"][:] == again.validation["text"][:] != other.validation["text"][:]
    assert sorted([*first.train["text"], *first.validation["text"]]) == sorted(row["text"] for row in ROWS)
    assert len(load(path, validation_fraction=0.001).validation) == 1


def test_rows_of_an_article_or_of_a_context_are_held_out_together(tmp_path):
    def held_by(articles):
        rows = [{"title": row // 3 % articles, "context": f"c{row // 3}", "text": row} for row in range(60)]
        path = write(tmp_path / "a.json", rows)
        splits = load(path, together=("title", "context"))
        column = splits.source.partition(", all rows of a ")[2].removesuffix(" together")
        assert not {*splits.train[column]} & {*splits.validation[column]}
        assert len(splits.train) + len(splits.validation) == 60
        assert 12 <= len(splits.validation) <= 14
        return column, splits.reading.kept_together

    assert held_by(articles=20) == ("title", "title")
    assert held_by(articles=3) == ("context", "context")
    path = write(tmp_path / "b.json", [{"context": "one", "text": row} for row in range(20)])
    assert load(path, together=("context",)).source.endswith("held out by seed 0")


def test_a_file_with_the_words_of_two_splits_is_in_neither(tmp_path):
    write(tmp_path / "set" / "train_test.csv", ROWS)
    splits = load(tmp_path / "set")
    assert (len(splits.train), len(splits.validation), splits.held_out) == (16, 4, True)
    write(tmp_path / "test set" / "train" / "a.csv", ROWS)
    write(tmp_path / "test set" / "old test" / "a.csv", ROWS[:3])
    splits = load(tmp_path / "test set")
    assert (len(splits.train), len(splits.validation)) == (20, 3)


@pytest.mark.parametrize(("fraction", "rows"), [(0, 20), (1, 20), (-0.1, 20), (0.99, 20), (0.5, 1)])
def test_a_share_that_leaves_nothing_is_refused(tmp_path, fraction, rows):
    path = write(tmp_path / "a.csv", ROWS[:rows])
    message = refusal(load, path, validation_fraction=fraction)
    assert message.startswith("data.validation_fraction: ")
    assert "data.validation" in message.split(";")[1]


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "test"])
def test_a_folders_own_splits_are_found(tmp_path, name):
    write(tmp_path / "set" / "train.csv", ROWS)
    write(tmp_path / "set" / f"{name}.csv", [{"text": "None", "label": "even"}])
    splits = load(tmp_path / "set")
    assert len(splits.train) == 20
    assert not splits.held_out
    assert splits.validation["text"][:] == ["None"], "the word None is a text"


def test_validation_may_name_a_split_of_train(tmp_path):
    for name, rows in (("train", ROWS), ("validation", ROWS[:2]), ("test", ROWS[:5])):
        write(tmp_path / "set" / f"{name}.jsonl", rows)
    assert len(load(tmp_path / "set").validation) == 2
    assert len(load(tmp_path / "set", "test").validation) == 5


def test_a_folder_of_plain_files_is_one_set(tmp_path):
    write(tmp_path / "set" / "a.jsonl", ROWS[:10])
    write(tmp_path / "set" / "b.jsonl", ROWS[10:])
    splits = load(tmp_path / "set")
    assert (len(splits.train), len(splits.validation), splits.held_out) == (16, 4, True)
    assert len(load(tmp_path / "set", tmp_path / "set").validation) == 20


def test_the_embedded_docstrings_bring_their_own_validation(monkeypatch, tmp_path):
    parts = Dataset.from_list(ROWS[:4]), Dataset.from_list(ROWS[4:6])
    monkeypatch.setattr(embedded.stdlib, "docstring_modules", lambda: parts)
    splits = load("embedded:docstrings")
    assert [[*rows] for rows in (splits.train, splits.validation)] == [[*rows] for rows in parts]
    assert not splits.held_out
    assert "embedded:docstrings" in refusal(load, "embedded:other")


def test_a_data_set_cached_from_the_hub_loads_without_the_hub(tmp_path):
    write(tmp_path / "name" / "train.csv", ROWS)
    datasets.load_dataset(str(tmp_path / "name"))
    (folder,) = (path.parent for path in (tmp_path / "cache").glob("name/*/0.0.0/*/dataset_info.json"))
    shutil.copytree(folder, tmp_path / "cache" / "org___name" / "default" / "0.0.0" / folder.name)
    assert len(load("org/name").train) == 16


def test_a_name_that_is_nowhere_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "the Hub does not answer" in refusal(load, "org/none")
    monkeypatch.setattr(embedded, "hub_has", lambda name, repo_type: False)
    assert "is not on the Hub" in refusal(load, "reviews")
    write(tmp_path / "review" / "train.csv", ROWS)
    assert "did you mean 'review'?" in refusal(load, "reviews")


def test_a_missing_file_names_the_closest_one(tmp_path):
    write(tmp_path / "train.csv", ROWS)
    message = refusal(load, tmp_path / "tra1n.csv")
    assert message.startswith("data.train: no file or folder")
    assert f"did you mean '{tmp_path / 'train.csv'}'?" in message
    message = refusal(load, tmp_path / "train.csv", tmp_path / "nowhere" / "x.csv")
    assert message.startswith("data.validation: no file or folder")
    assert "no file or folder ''" in refusal(load, "")


def test_an_extension_that_is_not_read_names_those_that_are(tmp_path):
    kinds = ".csv, .tsv, .json, .jsonl, .parquet, .arrow, .xlsx (text also in .gz, .bz2, .xz, .zst)"
    assert f"is a .docx; allowed: {kinds}" in refusal(load, write(tmp_path / "a.docx", "x"))
    assert "file without extension" in refusal(load, write(tmp_path / "a", "x"))
    (tmp_path / "set").mkdir()
    assert "no data file in" in refusal(load, tmp_path / "set")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text,label\n"),
        ("a.csv", "\n\n"),
        ("a.jsonl", "\n\n"),
        ("a.json", "[]"),
        ("a.parquet", [{"text": "", "label": ""}]),
    ],
)
def test_a_file_without_rows_is_refused(tmp_path, name, content):
    path = write(tmp_path / name, content)
    if name == "a.parquet":
        pd.DataFrame({"text": []}).to_parquet(path)
    assert "no rows" in refusal(load, path)


@pytest.mark.parametrize("suffix", KINDS)
def test_an_empty_file_is_refused(tmp_path, suffix):
    write(tmp_path / "set" / f"train{suffix}", ROWS)
    empty = write(tmp_path / "set" / f"validation{suffix}", "")
    assert f"{empty} is empty" in refusal(load, empty)
    assert f"{empty} is empty" in refusal(load, tmp_path / "set")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_bytes_that_are_not_utf8_are_named_by_line_and_byte(tmp_path, name):
    row = b'{"text": "x", "label": "a"}\n' if name == "a.jsonl" else b"x,a\n"
    before = b"text,label\n" + row * 300_000  # more than one block
    path = write(tmp_path / name, before + "é".encode() + b"\n" + b"x\xe9" + b"\n" + row)
    message = refusal(load, path)
    assert f"is not UTF-8: line 300,003, byte {len(before) + 4:,}; save it as UTF-8" in message


def test_utf8_across_the_end_of_a_block_is_accepted(tmp_path):
    path = write(tmp_path / "a.csv", b"x" * ((1 << 20) - 1) + "é".encode())
    assert encoding_fault(path, "utf-8") is None
    path = write(tmp_path / "b.csv", b"x" * ((1 << 20) - 1) + b"\xc3")
    assert encoding_fault(path, "utf-8") == "line 1, byte 1,048,575"
    path = write(tmp_path / "c.csv", b"\n" * ((1 << 20) - 1) + b"\xc3\n\n")
    assert encoding_fault(path, "utf-8") == "line 1,048,576, byte 1,048,575"


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.csv", "text,label\na,1\nb,2,3\n", "a.csv line 3: 3 values for 2 columns; correct it"),
        ("a.csv", 'text,label\na,1\n"b,2\n', "a.csv line 3: a quote opens and does not close"),
        ("a.csv", "text,label\na,1,x\nb,2,y\n", "a.csv line 2: 3 values for 2 columns; correct it, or"),
        ("a.jsonl", '{"text": "a"}\n{"text": }\n', "a.jsonl line 2, column 10: Expecting value"),
        ("a.jsonl", '"a"\n"b"\n', "a.jsonl line 1: not an object"),
        ("a.json", '[{"text": "a"},\n{"text": "b"', "a.json line 2: Expecting"),
        ("a.parquet", "PAR1 not at all", "Parquet magic bytes not found"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path, name, content, found, capfd):
    bad = write(tmp_path / "set" / name, content)
    message = refusal(load, bad)
    assert found in message
    assert str(bad) in message
    bad = bad.rename(bad.with_name(f"validation{bad.suffix}"))
    write(tmp_path / "set" / f"train{bad.suffix}", ROWS)
    message = refusal(load, tmp_path / "set")
    assert str(bad) in message, "also in a folder"
    assert "ailed to" not in capfd.readouterr().err


def test_splits_with_different_columns_keep_their_own(tmp_path):
    write(tmp_path / "set" / "train.csv", ROWS)
    write(tmp_path / "set" / "test.csv", "txt,label\na,b\n")
    validation = load(tmp_path / "set").validation
    message = refusal(require_column, validation, "text", "data.text_column")
    assert "no column 'text'; found txt, label; did you mean 'txt'?" in message


def test_a_folder_without_train_names_what_it_has(tmp_path):
    write(tmp_path / "set" / "test.csv", ROWS)
    assert "has no train split; found test" in refusal(load, tmp_path / "set")


def test_a_missing_column_names_the_closest():
    rows = Dataset.from_list(ROWS)
    require_column(rows, "text", "data.text_column")
    message = refusal(require_column, rows, "txt", "data.text_column")
    assert message == "data.text_column: no column 'txt'; found text, label; did you mean 'text'?"


def test_what_is_not_text_is_refused_with_what_to_do():
    message = refusal(require_texts, Dataset.from_list([{"text": 1}]), "text")
    assert "holds int64, not text" in message
    assert 'write its numbers as strings (JSONL: {"text": "12"})' in message


@pytest.mark.parametrize(
    ("labels", "ids", "names"),
    [
        (["b", "a", "b"], [1, 0, 1], ["a", "b"]),
        ([10, 9, -1], [2, 1, 0], ["-1", "9", "10"]),
        ([2.0, 1.0, 2.0], [1, 0, 1], ["1", "2"]),
        ([True, False, True], [1, 0, 1], ["False", "True"]),
    ],
)
def test_labels_become_class_ids_in_sorted_order(labels, ids, names):
    rows = Dataset.from_dict({"text": ["x"] * 3, "kind": labels, "label": [7, 7, 7]})
    train, validation, found = encode_labels(rows, rows.select([1]), "kind")
    assert (train["label"][:], found) == (ids, names)
    assert validation["label"][:] == [ids[1]]
    assert train.column_names == ["text", "label"]
    assert train.features["label"].dtype == "int64"


def test_a_class_label_keeps_its_own_names_and_order():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["z", "y", "x"])})
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 2, 1]}, features=features)
    train, validation, names = encode_labels(rows.select([0, 1]), rows, "label")
    assert names == ["z", "y", "x"]
    assert (train["label"][:], validation["label"][:]) == ([0, 2], [0, 2, 1])
    withheld = Dataset.from_dict({"text": ["a", "b"], "label": [0, -1]}, features=features)
    assert "row 2 is empty" in refusal(encode_labels, rows, withheld, "label")


def test_labels_of_a_held_out_set_stay_with_their_rows(tmp_path):
    rows = [{"text": f"{i}", "label": i % 3} for i in range(50)]
    splits = load(
        write(tmp_path / "a.csv", [{"text": f"t{row['text']}", "label": row["label"]} for row in rows])
    )
    train, validation, names = encode_labels(splits.train, splits.validation, "label")
    assert names == ["0", "1", "2"]
    for part in (train, validation, train.shuffle(seed=1), train.map(lambda row: row)):
        assert all(row["label"] == int(row["text"][1:]) % 3 for row in part)
    again = encode_labels(splits.train, splits.validation, "label")[0]
    assert again._fingerprint == train._fingerprint


def test_the_same_class_may_be_written_as_number_or_string():
    numbers, words = Dataset.from_dict({"label": [1, 2]}), Dataset.from_dict({"label": ["2", "1"]})
    text = ["a", "b"]
    _, validation, names = encode_labels(
        numbers.add_column("text", text), words.add_column("text", text), "label"
    )
    assert (validation["label"][:], names) == ([1, 0], ["1", "2"])


@pytest.mark.parametrize(
    ("train", "validation", "found"),
    [
        (["a", "b"], ["a", "c"], "label 'c' of validation row 2 is in no training row"),
        (["a", None, None], ["a"], "row 2 is empty, the first of 2"),
        (["a", "b"], [None, "a"], "row 1 is empty"),
        (["a", "a"], ["a"], "one class only, 'a'"),
        ([1.0, 2.5], [1.0], "row 2: 2.5; labels are classes, as strings or integers; to predict numbers: "),
        ([1.0, float("inf")], [1.0], "row 2: inf"),
        ([["a"], ["b"]], [["a"]], "for several labels a row: recipes/text_classification.py with data"),
    ],
)
def test_labels_that_cannot_be_classes_are_refused(train, validation, found):
    first = Dataset.from_dict({"text": ["x"] * len(train), "label": train})
    second = Dataset.from_dict({"text": ["x"] * len(validation), "label": validation})
    message = refusal(encode_labels, first, second, "label")
    assert message.startswith("data.label_column: ")
    assert found in message


def test_a_million_rows_are_checked_in_seconds():
    number = 1_000_000
    rows = Dataset.from_dict({"text": ["x"] * number, "label": np.arange(number) % 5})
    shuffled = rows.shuffle(seed=0, keep_in_memory=True)
    start = time.perf_counter()
    train, _, names = encode_labels(shuffled, shuffled.select(range(9)), "label")
    assert time.perf_counter() - start < 5
    assert len(names) == 5
    assert train[-1]["label"] == shuffled[-1]["label"]


def test_the_offline_switch_is_put_back():
    before = datasets.config.HF_HUB_OFFLINE
    refusal(load, "org/none")
    assert before == datasets.config.HF_HUB_OFFLINE


def test_rows_that_another_version_prepared_are_prepared_again(tmp_path, monkeypatch):
    """`datasets` hashes an imported function by its name, so that its cache knows no change of the code."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def prepared():
        return load_data(str(file), validation_fraction=0.1, seed=0).train.map(dict)

    first = prepared()._fingerprint
    assert prepared()._fingerprint == first  # from the cache
    monkeypatch.setattr(loading, "_code_of_package", lambda: b"another version")
    assert prepared()._fingerprint != first
