"""Rows of questions from the formats of SQuAD: articles as published, and answers in several forms."""

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, List, Value

from gradacc_hf.data.reading import SPLITS, counted
from gradacc_hf.errors import refuse

IMPOSSIBLE = "is_impossible"
TITLE = "title"
"""Column of the article that a row is from. Rows of an article are held out together."""
ANSWER_TEXTS = ("answer_text", "answer", "text")
"""Columns of the text of an answer in rows with a column `answer_start`."""


def as_questions(
    rows: Dataset, question: str = "question", context: str = "context", answers: str = "answers"
) -> tuple[Dataset, str | None]:
    """Return rows of a question, a context and answers, and the format that they were in.

    The format is None if the rows stay as they are. Answers become {"text": […], "answer_start": […]}, both
    empty for a question without an answer.

    Args:
        rows: The rows of a file.
        question: The name of the column of the questions.
        context: The name of the column of the contexts.
        answers: The name of the column of the answers.
    """
    if "paragraphs" in rows.column_names and question not in rows.column_names:
        found = list(_published(rows, question, context, answers))
        if not found:
            refuse("data.train", "articles without a question", "give at least one")
        of_answers = {"text": List(Value("string")), "answer_start": List(Value("int64"))}
        types = {
            "id": Value("string"),
            TITLE: Value("string"),
            question: Value("string"),
            context: Value("string"),
        }
        features = Features({**types, answers: of_answers})
        how = f"SQuAD as published: {counted(len(rows), 'article')}, {counted(len(found), 'question')}"
        return Dataset.from_list(found, features), how
    forms, remove = [], []
    if answers not in rows.column_names:
        text = next((name for name in ANSWER_TEXTS if name in rows.column_names), None)
        if text is None or "answer_start" not in rows.column_names:
            return rows, None
        forms, remove = [f"SQuAD rows with columns {text!r} and 'answer_start'"], [text, "answer_start"]
        rows = rows.map(lambda row: {answers: _as_columns([{name: row[name] for name in remove}], text)})
    elif (sample := next((one for one in rows[answers] if one), None)) is not None:
        if isinstance(sample, str):
            forms = [f"SQuAD rows with {answers!r} as text"]
        elif isinstance(sample, list):
            forms = [f"SQuAD rows with lists of answers in {answers!r}"]
        if forms:
            rows = rows.map(lambda row: {answers: _as_columns(_parsed(row[answers]))})
    if IMPOSSIBLE in rows.column_names:
        forms = [*(forms or ["SQuAD rows"]), f"column {IMPOSSIBLE!r}"]
        rows = rows.map(lambda row: {answers: NO_ANSWER if _is_true(row[IMPOSSIBLE]) else row[answers]})
        remove.append(IMPOSSIBLE)
    return rows.remove_columns(remove), ", ".join(forms) or None


NO_ANSWER: dict[str, list[Any]] = {"text": [], "answer_start": []}


def has_no_answer(answers: Any) -> bool:
    """Whether these are the answers of a question without an answer."""
    return isinstance(answers, Mapping) and answers.get("text") == []


def no_answer_note(splits: Sequence[Dataset], answers: str) -> str | None:
    """Return a line about the questions without an answer in training and validation rows, or None."""
    numbers = [sum(map(has_no_answer, split[answers])) for split in splits]
    parts = [
        f"{number:,} of {counted(len(split), f'{name} row')}"
        for number, split, name in zip(numbers, splits, SPLITS, strict=True)
    ]
    return f"{' and '.join(parts)}; validation rows give the threshold" if any(numbers) else None


def _published(rows: Dataset, question: str, context: str, answers: str) -> Iterator[dict[str, Any]]:
    for number, article in enumerate(rows, start=1):
        assert isinstance(article, dict)
        title = _text(article.get(TITLE)) or f"article {number}"
        for place, paragraph in enumerate(_objects(article["paragraphs"]), start=1):
            if not isinstance(paragraph.get("qas"), list):
                found = f"article {number:,}, paragraph {place:,} has no list 'qas'"
                refuse("data.train", found, "a paragraph has 'context' and 'qas', as SQuAD is published")
            for one in _objects(paragraph["qas"]):
                impossible = _is_true(one.get(IMPOSSIBLE))
                given = NO_ANSWER if impossible else _as_columns(one.get("answers"))
                texts = {question: _text(one.get("question")), context: _text(paragraph.get("context"))}
                yield {"id": str(one.get("id", "")), TITLE: title, **texts, answers: given}


def _objects(found: Any) -> list[dict[str, Any]]:
    return [one for one in found or () if isinstance(one, dict)]


def _text(found: Any) -> str | None:
    return found if isinstance(found, str) else None


def _is_true(found: Any) -> bool:
    return str(found).strip().lower() in ("true", "1", "1.0")


def _parsed(answers: Any) -> Any:
    """Return answers that were written as text in a CSV file."""
    if not isinstance(answers, str):
        return answers
    for read in (json.loads, ast.literal_eval):
        try:
            return read(answers)
        except (ValueError, SyntaxError):
            continue
    return None


def _as_columns(answers: Any, text: str = "text") -> dict[str, Any]:
    """Return a list of answers as lists of texts and starts, both None if the answers have another form."""
    unknown = {"text": None, "answer_start": None}
    if isinstance(answers, Mapping):
        found = {name: answers.get(name) for name in unknown}
        return found if all(isinstance(value, list) for value in found.values()) else unknown
    if not isinstance(answers, list) or not all(isinstance(one, Mapping) for one in answers):
        return unknown
    answers = [one for one in answers if one.get(text) or one.get("answer_start") not in (None, "")]
    try:
        starts = [float(str(one.get("answer_start"))) for one in answers]  # 7.0 in a column with empty cells
    except ValueError:
        return unknown
    texts = [one.get(text) for one in answers]
    is_valid = all(map(float.is_integer, starts)) and all(isinstance(one, str) for one in texts)
    return {"text": texts, "answer_start": [*map(int, starts)]} if is_valid else unknown
