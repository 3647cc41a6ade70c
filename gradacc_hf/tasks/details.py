"""Tables about an evaluation, for the report: classes, confusions, entities, and the worst mistakes.

Functions take predictions and references, and return tables as plain values, for summary.json.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

MOST_CLASSES = 20
"""Classes up to which all confusions are in one matrix."""
MOST_ROWS = 200
"""Rows of a table. The rarest classes beyond are left out, with a note."""
CONFUSIONS = 20
"""Pairs of classes in the table that replaces a matrix."""
MISTAKES = 8
SIGNS_SHOWN = 300
"""Characters of a text in a table."""

Table = dict[str, Any]
"""title; kind: table, matrix or texts; columns; rows, the first cell of each is the name of the row; note."""
Texts = Callable[[Sequence[int]], Sequence[str]]
"""Numbers of examples → what the examples show."""


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "table", note: str = ""
) -> Table:
    """Return a table with numbers of Python."""
    plain = [[cell.item() if hasattr(cell, "item") else cell for cell in row] for row in rows]
    return {"title": title, "kind": kind, "columns": [*columns], "rows": plain, "note": note}


def class_tables(
    names: Sequence[str],
    predicted: np.ndarray,
    true: np.ndarray,
    in_training: Sequence[int] | None = None,
    of_tokens: bool = False,
) -> list[Table]:
    """Return a table of the classes, and their confusions.

    Args:
        names: names of the classes, by id.
        predicted, true: class ids, (rows,).
        in_training: training rows of each class, if they are known.
        of_tokens: whether the classes are tags of tokens.
    """
    title, support = ("Tags", "tokens") if of_tokens else ("Classes", "rows")
    size = len(names)
    matrix = np.bincount(true * size + predicted, minlength=size * size).reshape(size, size)
    right, found, there = matrix.diagonal(), matrix.sum(0), matrix.sum(1)
    tables = [_scores_table(title, names, right, found, there, support, in_training)]
    if size <= MOST_CLASSES:
        note = "Rows: true. Columns: predicted. The shade is the share of the row."
        rows = [[name, *counts] for name, counts in zip(names, matrix.tolist(), strict=True)]
        return [*tables, table("Confusion matrix", ["true", *names], rows, "matrix", note)]
    wrong = matrix - np.diag(right)
    order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS]
    pairs = [divmod(int(place), size) for place in order]
    rows = [[names[a], names[b], wrong[a, b], there[a]] for a, b in pairs if wrong[a, b]]
    if rows:
        columns = ["true class", "predicted as", "rows", "of"]
        tables.append(table("Most frequent confusions", columns, rows))
    return tables


def _scores_table(
    title: str,
    names: Sequence[str],
    right: Sequence[int] | np.ndarray,
    found: Sequence[int] | np.ndarray,
    true: Sequence[int] | np.ndarray,
    support: str,
    in_training: Sequence[int] | None = None,
) -> Table:
    """Return precision, recall and F1 of each name, the most frequent ones first."""
    columns = ["", "precision", "recall", "F1", support, "predicted"]
    rows = []
    for number, name in enumerate(names):
        hits, predicted, there = (int(counts[number]) for counts in (right, found, true))
        scores = [_ratio(hits, predicted), _ratio(hits, there), _ratio(2 * hits, predicted + there)]
        rows.append([name, *scores, there, predicted])
        if in_training is not None:
            rows[-1].append(int(in_training[number]))
    if in_training is not None:
        columns.append("training rows")
    rows = sorted(rows, key=lambda row: -row[4])
    note = f"The {len(rows) - MOST_ROWS:,} rarest are left out." if len(rows) > MOST_ROWS else ""
    return table(title, columns, rows[:MOST_ROWS], note=note)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def label_tables(
    names: Sequence[str], predicted: np.ndarray, true: np.ndarray, in_training: Sequence[int] | None = None
) -> list[Table]:
    """Return a table of the labels of rows with any number of labels: 0 or 1, (rows, labels)."""
    right = (predicted * true).sum(0)
    found, there = predicted.sum(0), true.sum(0)
    return [_scores_table("Labels", names, right, found, there, "rows", in_training)]


def entity_tables(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> list[Table]:
    """Return a table of the types of entities, from the tags of each sequence."""
    from gradacc_hf.metrics.sequence_labelling import entities_of  # slow to import

    right, found, true = Counter[str](), Counter[str](), Counter[str]()
    for predicted, reference in zip(predictions, references, strict=True):
        mine, theirs = {*entities_of(predicted)}, {*entities_of(reference)}
        for counts, entities in ((right, mine & theirs), (found, mine), (true, theirs)):
            counts.update(kind for kind, _, _ in entities)
    names = sorted({*found, *true})
    if not names:
        return []
    hits, predicted, there = ([counts[name] for name in names] for counts in (right, found, true))
    return [_scores_table("Entities", names, hits, predicted, there, "entities")]


def class_mistakes(
    names: Sequence[str], probabilities: np.ndarray, true: np.ndarray, texts: Texts, what: str = "text"
) -> list[Table]:
    """Return the wrong predictions with the highest probability.

    Args:
        names: names of the classes, by id.
        probabilities: of each class, (rows, classes).
        true: class ids, (rows,).
        texts: what the examples show.
        what: the name of what they show.
    """
    predicted = probabilities.argmax(-1)
    wrong = np.flatnonzero(predicted != true)
    worst = wrong[np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")[:MISTAKES]].tolist()
    rows = [
        [
            shortened(text),
            names[int(true[row])],
            names[int(predicted[row])],
            float(probabilities[row].max()),
        ]
        for row, text in zip(worst, texts(worst), strict=True)
    ]
    return _mistakes([what, "label", "predicted", "probability"], rows)


def label_mistakes(names: Sequence[str], logits: np.ndarray, true: np.ndarray, texts: Texts) -> list[Table]:
    """Return the rows with the label that is wrong with the highest probability."""
    surprise = np.where((logits > 0) != (true > 0), np.abs(logits), 0)
    worst = np.argsort(-surprise.max(1), kind="stable")[:MISTAKES]
    worst = [row for row in worst.tolist() if surprise[row].any()]

    def labels(of_row: np.ndarray) -> str:
        return ", ".join(names[number] for number in np.flatnonzero(of_row > 0).tolist()) or "none"

    shown = zip(worst, texts(worst), strict=True)
    rows = [[shortened(text), labels(true[row]), labels(logits[row])] for row, text in shown]
    return _mistakes(["text", "labels", "predicted"], rows)


def largest_errors(predicted: np.ndarray, true: np.ndarray, texts: Texts) -> list[Table]:
    """Return the rows whose predicted number is farthest from the true one."""
    worst = np.argsort(-np.abs(predicted - true), kind="stable")[:MISTAKES].tolist()
    shown = zip(worst, texts(worst), strict=True)
    rows = [[shortened(text), f"{true[row]:.4g}", f"{predicted[row]:.4g}"] for row, text in shown]
    return [table("Largest errors", ["text", "true", "predicted"], rows, "texts")]


def _mistakes(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[Table]:
    return [table("Most confident mistakes", columns, rows, "texts")] if rows else []


def shortened(text: str) -> str:
    """Return the beginning of a text."""
    return text if len(text) <= SIGNS_SHOWN else text[: SIGNS_SHOWN - 1].rstrip() + "…"
