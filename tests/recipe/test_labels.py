"""The labels of a data set get the ids and the names of the user's model, where both have the same labels."""

from types import SimpleNamespace

import pytest

from gradacc_hf.errors import InputError
from gradacc_hf.recipe.labels import labels_of_config, match_labels

SAME = [
    # found, own, ids
    (["negative", "positive"], ["positive", "negative"], [1, 0]),
    (["negative", "positive"], ["POSITIVE", "Negative"], [1, 0]),
    (["not_equal", "equal"], ["Equal", "Not equal"], [1, 0]),
    (["0", "1"], ["positive", "negative"], [0, 1]),
    (["0", "1", "10", "2", *"3456789"], [f"LABEL_{i}" for i in range(11)], [0, 1, 10, 2, *range(3, 10)]),
    (["0", "2"], ["a", "b", "c"], [0, 2]),
    (["1", "0"], ["1", "0"], [0, 1]),  # names come before ids
    (["B-LOC", "O"], ["O", "B-PER", "B-LOC"], [2, 0]),
    (["LABEL_1", "LABEL_0"], ["LABEL_0", "LABEL_1"], [1, 0]),
]
OTHER = [
    (["bad", "good"], ["negative", "positive"]),
    (["Positive", "neutral"], ["positive", "negative"]),  # "neutral" has no row of the head
    (["1", "2"], ["negative", "positive"]),
    (["0", "1"], ["a", "b", "c"]),  # ids of two of three labels, or two other labels
    (["a", "b", "c"], ["a", "b"]),
    (["us", "US"], ["Us", "uS"]),  # without case, both are one
    (["-1", "1"], ["1", "- 1"]),
    (["a"], ["a", "a"]),
]


@pytest.mark.parametrize(("found", "own", "ids"), SAME)
def test_the_order_and_the_names_of_the_model_stay(found, own, ids):
    labels = match_labels(found, own)
    assert labels.names == own
    assert not labels.are_new
    assert [labels.ids[name] for name in found] == ids
    assert [labels.in_data[number] for number in ids] == found
    assert labels.model_overrides()["label2id"] == {name: i for i, name in enumerate(own)}
    assert labels.note.startswith("the model's own, in the model's order: ")
    assert ("of these" in labels.note) == (len(found) < len(own))


@pytest.mark.parametrize(("found", "own"), OTHER)
def test_other_labels_replace_those_of_the_model_and_the_plan_has_a_line(found, own):
    labels = match_labels(found, own)
    assert labels.names == found
    assert labels.ids == {name: i for i, name in enumerate(found)}
    assert labels.are_new
    assert labels.note == f"{', '.join(found)}, instead of the model's own: {', '.join(own)}"


def test_a_model_without_labels_gets_those_of_the_data():
    assert match_labels(["b", "a"], None).names == ["b", "a"]
    assert match_labels(["b", "a"], None).note == "of the data: b, a"
    assert match_labels([*"abcdefgh"], None).note == "of the data: a, b, c, d, e, f, … (8)"


@pytest.mark.parametrize(
    ("names", "architecture", "own"),
    [
        ({0: "LABEL_0", 1: "LABEL_1"}, "BertModel", None),
        ({0: "LABEL_0", 1: "LABEL_1"}, "BertForSequenceClassification", ["LABEL_0", "LABEL_1"]),
        ({0: "LABEL_0", 1: "LABEL_1"}, "BertForTokenClassification", None),
        ({1: "b", 0: "a"}, "BertModel", ["a", "b"]),
        ({1: "b", 2: "a"}, "BertForSequenceClassification", None),
    ],
)
def test_default_names_without_a_head_are_no_labels(names, architecture, own):
    config = SimpleNamespace(id2label=names, architectures=[architecture])
    assert labels_of_config(config, "ForSequenceClassification") == own
    assert labels_of_config(SimpleNamespace(), "ForSequenceClassification") is None


def test_255_beside_labels_from_0_on_is_refused_and_another_number_is_noted():
    with pytest.raises(InputError, match=r"k: the labels are 0 to 1 and 255, .*; write -100 .* such as c255"):
        match_labels(["0", "1", "255"], None, "k")
    with pytest.raises(InputError):
        match_labels(["0", "1", "255"], ["negative", "positive"], "k")
    for number in ("-1", "9"):
        note = match_labels(["0", "1", number], None, "k").note
        assert note.endswith(f"; {number} is learned as a class (-100 would mark a missing label)")


@pytest.mark.parametrize(
    ("found", "own", "key"),
    [
        (["0", "1", "255"], None, None),  # names of classes
        (["0", "1", "255"], ["0", "1", "255"], "k"),  # the model's own
        (["0", "255"], None, "k"),  # two classes
        (["0", "1", "2"], None, "k"),
        (["0", "1", "a"], None, "k"),
        (["0", "2", "255"], None, "k"),
    ],
)
def test_other_labels_are_classes(found, own, key):
    assert "learned as a class" not in match_labels(found, own, key).note
