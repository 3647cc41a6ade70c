"""tasks/label_lists.py: separated text, one column for each label, and lists as text → lists of labels."""

import pytest
from datasets import Dataset

from gradacc_hf.errors import InputError
from gradacc_hf.tasks.label_lists import LabelLists


def rows(**columns):
    return Dataset.from_dict({"text": ["t"] * len(next(iter(columns.values()))), **columns})


@pytest.mark.parametrize(
    ("labels", "separator"),
    [
        (["news; sport", "food", None], ";"),
        (["news|sport", "food|food", None], "|"),
        (["news,sport", "food", None], ","),
    ],
)
def test_the_separator_is_found_in_the_training_rows_and_stated(labels, separator):
    convert = LabelLists("label")
    train, form = convert(rows(label=labels))
    assert form == f"labels in 'label' separated by {separator!r} (data.label_separator)"
    assert train["label"][:] == [["news", "sport"], ["food"], None]
    validation, _ = convert(rows(label=["news", "a;b,c"]))  # by the same separator
    assert validation["label"][0] == ["news"]
    assert len(validation["label"][1]) == {";": 2, "|": 1, ",": 2}[separator]


def test_a_separator_of_the_user_counts_and_texts_without_any_stay():
    assert LabelLists("label", separator="/")(rows(label=["a;b/c"]))[0]["label"][0] == ["a;b", "c"]
    texts = rows(label=["news", "food"])
    assert LabelLists("label")(texts) == (texts, None)
    lists = rows(label=[["news"], []])
    assert LabelLists("label")(lists) == (lists, None)


def test_lists_as_text_are_read_and_numbers_stay_numbers():
    found, form = LabelLists("label")(rows(label=['["a", "b"]', "['c']", "[]", "[a"]))
    assert form == "lists written as text in 'label'"
    assert found["label"][:] == [["a", "b"], ["c"], [], None]
    assert found["__fault"][:] == [None, None, None, "column 'label' is '[a', not a list"]
    assert LabelLists("label")(rows(label=["[0, 1]", "[1, 1]"]))[0]["label"][:] == [[0, 1], [1, 1]]


def test_a_column_for_each_label_keeps_all_labels_in_the_given_order():
    of = {"b": ["1", "0", "2"], "a": [True, False, False], "never": [0.0, 0.0, 0.0]}
    found, form = LabelLists("label", ["b", "a", "never"])(rows(**of))
    assert form == "one column for each label: b, a, never"
    assert found.features["label"].feature.names == ["b", "a", "never"]
    assert found["label"][:] == [[0, 1], [], []]
    assert found["__fault"][:] == [None, None, "column 'b' is '2', not 0 or 1"]
    with pytest.raises(InputError, match=r"data.label_columns: no column 'c'"):
        LabelLists("label", ["a", "c"])(rows(**of))


def test_without_a_column_of_labels_the_columns_of_0_and_1_are_named():
    with pytest.raises(InputError, match=r"no column 'label'; found .*: --data.label_columns toxic,rude$"):
        LabelLists("label")(rows(toxic=["0", "1"], rude=[1, 0], stars=[5, 3]))
