"""The tables of predictions in a report: against scikit-learn and seqeval, and the order of mistakes."""

import numpy as np
import pytest
from seqeval.metrics import classification_report
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from gradacc_hf.run.samples import keep_before, with_before
from gradacc_hf.tasks.details import class_mistakes, class_tables, entity_tables, label_mistakes, label_tables

RNG = np.random.default_rng(0)


def column(table, name):
    """A column of a table, by the name of the row."""
    place = table["columns"].index(name)
    return {row[0]: row[place] for row in table["rows"]}


def test_scores_of_classes_are_those_of_scikit_learn():
    names, true, predicted = ["a", "b", "c"], RNG.integers(0, 3, 90), RNG.integers(0, 3, 90)
    classes, matrix = class_tables(names, predicted, true, in_training=[5, 6, 7])
    expected = precision_recall_fscore_support(true, predicted)
    for name, values in zip(("precision", "recall", "F1", "rows"), expected, strict=True):
        assert column(classes, name) == pytest.approx(dict(zip(names, values.tolist(), strict=True)))
    assert column(classes, "training rows") == {"a": 5, "b": 6, "c": 7}
    assert [row[1:] for row in matrix["rows"]] == confusion_matrix(true, predicted).tolist()


def test_many_classes_have_a_table_of_confusions_instead_of_a_matrix():
    names, true = [f"c{number}" for number in range(30)], np.arange(30).repeat(4)
    predicted = np.where(true == 7, 9, true)
    tables = class_tables(names, predicted, true)
    assert tables[1]["rows"] == [["c7", "c9", 4, 4]]
    assert column(tables[0], "precision")["c7"] is None  # it is never predicted


def test_scores_of_entities_are_those_of_seqeval():
    rows = [[RNG.choice(["O", "B-A", "I-A", "B-B"], 12).tolist() for _ in range(20)] for _ in "pr"]
    [table] = entity_tables(*rows)
    expected = classification_report(rows[1], rows[0], output_dict=True, zero_division=0)
    for kind in ("A", "B"):
        assert column(table, "F1")[kind] == pytest.approx(expected[kind]["f1-score"])
        assert column(table, "entities")[kind] == expected[kind]["support"]


def test_the_most_confident_mistakes_come_first():
    probabilities = np.array([[0.6, 0.4], [0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    shown = class_mistakes(
        ["ham", "spam"], probabilities, np.array([1, 1, 1, 0]), lambda rows: map(str, rows)
    )
    assert shown[0]["rows"] == [
        ["2", "spam", "ham", 0.8],
        ["3", "ham", "spam", 0.7],
        ["0", "spam", "ham", 0.6],
    ]
    assert class_mistakes(["ham", "spam"], probabilities[:1], np.array([0]), lambda rows: []) == []
    logits, true = np.array([[3.0, -1.0], [0.5, -4.0], [2.0, 2.0]]), np.array([[1, 0], [0, 1], [1, 1]])
    [labels] = label_tables(["x", "y"], (logits > 0).astype(int), true)
    assert column(labels, "precision") == {"x": pytest.approx(2 / 3), "y": 1.0}
    [mistakes] = label_mistakes(["x", "y"], logits, true, lambda rows: map(str, rows))
    assert mistakes["rows"] == [["1", "y", "x"]]


def test_answers_before_training_stand_beside_the_answers_to_the_same_prompts(tmp_path):
    before = [{"prompt": "tea?", "answer": "no", "reference": "yes"}]
    after = [{**before[0], "answer": "yes"}]
    assert with_before(tmp_path, after) == after
    keep_before(tmp_path, before)
    joined = {"prompt": "tea?", "before training": "no", "answer": "yes", "reference": "yes"}
    assert with_before(tmp_path, after) == [joined]
    assert with_before(tmp_path, [joined]) == [joined]
    other = [{**after[0], "prompt": "milk?"}]
    assert with_before(tmp_path, other) == other
