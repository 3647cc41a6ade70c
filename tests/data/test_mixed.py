"""data/mixed.py: values keep the types that they have in the files."""

import json
from pathlib import Path

import datasets.config
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Json, List, Value

from gradacc_hf.data.columns import encode_labels
from gradacc_hf.data.loading import load_data, read_file
from gradacc_hf.data.mixed import ROWS_AT_ONCE, as_column, dataset_of, read_mixed_json
from gradacc_hf.errors import InputError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def names_of(train, label="label"):
    """The names of the classes in a file or folder, and the lines about it."""
    splits = load_data(train, None, validation_fraction=0.1, seed=0, label_column=label)
    splits.reading.use(["text", label])
    return encode_labels(splits.train, splits.validation, label)[2], splits.reading.notes


def write_labels(path, labels, times=8):
    """A file with these labels: CSV as they are, JSON and Parquet with their types."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": f"t {i}", "label": label} for i, label in enumerate([*labels] * times)]
    if path.endswith(".csv"):
        Path(path).write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
    elif path.endswith(".jsonl"):
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pd.DataFrame(rows).to_parquet(path)
    return path


@pytest.mark.parametrize(
    "labels",
    [
        ["01234", "1234"],
        ["1", "1.0"],
        ["True", "true"],
        ["NA", "None", "nan", "null"],
        ["2", "9", "10"],
        ["1e3", "1000"],
        ["2020-01-01", "2020-01-02"],
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_labels_that_are_text_stay_text(labels, suffix):
    names, notes = names_of(write_labels(f"a{suffix}", labels))
    assert sorted(names) == sorted(labels)
    assert not notes


def test_integers_of_a_text_file_are_in_the_order_of_their_size():
    assert names_of(write_labels("a.csv", [10, 9, -1, 0]))[0] == ["-1", "0", "9", "10"]
    assert names_of(write_labels("b.csv", ["10", "9", "01"]))[0] == ["01", "10", "9"]


def test_labels_that_differ_in_white_space_only_are_refused():
    assert names_of(write_labels("a.csv", [" 0", " 1"]))[0] == [" 0", " 1"]
    with pytest.raises(InputError, match=r"labels '.?1' and '.?1' differ in white space only; write them"):
        names_of(write_labels("b.csv", [" 1", "0", "1"]))


@pytest.mark.parametrize("empty", ["", '""'])
def test_an_empty_label_of_a_text_file_is_no_label(empty):
    with pytest.raises(InputError, match=r"is empty, the first of 8"):
        names_of(write_labels("a.csv", ["a", "b", empty]))


def test_texts_of_a_text_file_may_be_numbers_dates_and_words_for_nothing():
    texts = ["012", "1.50", "nan", "None", "2020-01-01", "TRUE"]
    Path("a.csv").write_text("text\n" + "".join(f"{text}\n" for text in texts))
    splits = load_data("a.csv", "a.csv", validation_fraction=0.1, seed=0)
    assert splits.train["text"][:] == texts


def test_one_column_of_several_types_is_stated_and_nothing_is_changed():
    names, notes = names_of(write_labels("a.jsonl", [1, "1", "01", "x", True, 2.0]))
    assert sorted(names) == ["01", "1", "2", "True", "x"]
    assert notes["merged"] == [
        "column 'label' has 8 truth values, 24 texts, 16 numbers; 1 and \"1\" are one value"
    ]


def test_files_whose_labels_have_other_types_are_one_set():
    write_labels("set/a.jsonl", [0, 1])
    write_labels("set/b.csv", ["0", "1"])
    names, notes = names_of("set")
    assert names == ["0", "1"]
    assert "16 numbers" in notes["merged"][0]
    write_labels("floats/a.parquet", [0, 1])
    write_labels("floats/b.parquet", [0.0, 1.0])
    assert names_of("floats") == (["0", "1"], {})


def test_class_ids_beside_text_are_refused():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    Path("set").mkdir()
    Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features).to_parquet("set/a.parquet")
    write_labels("set/b.csv", ["no", "yes"])
    with pytest.raises(InputError, match=r"column 'label' has classes of different names: .*'no', 'yes'"):
        names_of("set")
    splits = load_data("set", validation_fraction=0.1, seed=0)
    splits.reading.use(["text"])
    assert splits.train.column_names == ["text"]


def test_rows_with_late_keys_and_late_types_are_read():
    rows = [{"text": "x" * 3000, "label": "ab"[i % 2], "n": i, "nothing": None} for i in range(4_000)]
    rows.append({"text": "end", "label": "a", "n": "many", "nothing": "something", "note": "late"})
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))  # more than one block
    splits = load_data("a.jsonl", None, validation_fraction=0.1, seed=0)
    assert len(splits.train) + len(splits.validation) == len(rows)
    assert splits.reading.columns == ["text", "label", "n", "nothing", "note"]


def test_beside_a_column_of_dates_the_rows_are_not_read_into_memory():
    rows = [{"text": f"t {i}", "day": f"2020-01-0{i % 9 + 1}", "n": i} for i in range(2_500)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, _ = read_file(Path("a.jsonl"), "data.train")
    assert found.to_list() == rows
    assert found.column_names == ["text", "day", "n"]
    assert found.cache_files  # the file of text and n, which are mapped into memory


@pytest.mark.parametrize(
    ("first", "later", "feature"),
    [
        (1, 1.5, Value("float64")),
        (None, "x", Value("string")),
        ([], ["x"], List(Value("string"))),
        (2**60 + 1, 0.5, Json()),  # the integer is no float64
        ({"a": 1}, {"b": 1}, Json()),
        (True, 1, Json()),
    ],
    ids=str,
)
def test_a_type_that_changes_after_many_rows_changes_no_value(first, later, feature):
    values = [first] * ROWS_AT_ONCE + [later]
    Path("a.jsonl").write_text("".join(json.dumps({"c": value}) + "\n" for value in values))
    found = read_mixed_json(Path("a.jsonl"))
    assert found["c"][:] == values
    assert found.features["c"] == feature


def test_integers_of_more_than_64_bits_are_read():
    rows = [{"text": f"t {i}", "id": 2**70 + i, "more": {"n": 2**64}} for i in range(3)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = load_data("a.jsonl", "a.jsonl", validation_fraction=0.1, seed=0)
    assert splits.train["id"][:] == [str(row["id"]) for row in rows]


def test_rows_that_look_like_the_log_of_an_agent_are_rows():
    rows = [{"id": "1", "type": "a", "version": 1, "cwd": "x", "text": f"t {i}"} for i in range(4)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = load_data("a.jsonl", "a.jsonl", validation_fraction=0.1, seed=0)
    assert splits.train.to_list() == rows


@pytest.mark.parametrize(
    "values",
    [
        [1, "1", None],
        [{"a": 1}, {"b": "x"}],
        [{"a": "1"}, {"a": 1}],
        [["a", 1], ["b"]],
        ["x", ["x"]],
        [1.5, None],
        [["a"], []],
        [None, None],
    ],
    ids=str,
)
def test_a_column_has_the_values_that_it_was_given(values):
    assert dataset_of({"c": as_column(values)})["c"][:] == values
