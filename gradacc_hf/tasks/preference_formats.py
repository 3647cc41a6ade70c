"""Formats of preferences: pairs of answers, and answers with a label; read a row as chats or texts.

| columns | an example |
|---|---|
| `prompt`, `chosen`, `rejected` | a pair: texts, or messages |
| `chosen`, `rejected` | a pair whose answers begin with the same messages or the same text: the prompt |
| `prompt`, `completion`, `label` | an answer, and whether it is desirable |

A chat is {messages, tools, learned_from}, a text {prompt, completion}, as in `chat_formats.py`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Value

from gradacc_hf.data.sources import SOURCE
from gradacc_hf.errors import InputError, listed, refuse
from gradacc_hf.tasks.chat import chat_problem
from gradacc_hf.tasks.chat_formats import Format

Row = Mapping[str, Any]
PAIR = ("chosen", "rejected")
ANSWERS_OF: dict[bool, tuple[str, ...]] = {False: PAIR, True: ("completion",)}
"""Whether an example is one answer with a label → the columns of its answers."""


@dataclass(frozen=True)
class PreferenceFormat:
    """A format of rows.

    Attributes:
        has_prompt: Whether the prompt is in a column `prompt`. Otherwise, answers begin with it.
        is_single: Whether a row is one answer with a label.
        is_chat: Whether its rows are chats, which a chat template writes.
        unpairs: Whether each row becomes two examples, of one answer each.
    """

    has_prompt: bool
    is_single: bool
    is_chat: bool
    unpairs: bool = False

    def __str__(self) -> str:
        answers = ANSWERS_OF[self.is_single]
        names = listed(["prompt", *answers] if self.has_prompt else answers)
        how = "chats" if self.is_chat else "plain text"
        prompt = "" if self.has_prompt else ", the prompt is what both begin with"
        return f"{names}{' with label' * self.is_single}, {how}{prompt}{', unpaired' * self.unpairs}"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the format reads."""
        label = ("label",) if self.is_single else ()
        return (*(("prompt",) if self.has_prompt else ()), *ANSWERS_OF[self.is_single], *label)

    def read(self, row: Row) -> list[dict[str, Any]]:
        """Return each answer of a row with its prompt, as a chat or as a text.

        Raises:
            ValueError: With the problem of the row.
        """
        columns = ANSWERS_OF[self.is_single]
        for name in columns:
            if isinstance(row[name], str) and not row[name].strip():
                raise ValueError(f"column {name!r} is empty")
        if self.has_prompt:
            forms = (Format("prompt", ("prompt", name), self.is_chat) for name in columns)
            return [form.read(row) for form in forms]
        answers = [row[name] for name in columns]
        for name, answer in zip(columns, answers, strict=True):
            if not isinstance(answer, list if self.is_chat else str):
                what = "a list of messages" if self.is_chat else "text"
                raise ValueError(f"column {name!r}: {row[name]!r:.40} is not {what}")
        shared = _shared(*answers)
        if shared == 0:
            raise ValueError(
                "its chosen and its rejected answer share no prompt, and it has no column 'prompt'"
            )
        if self.is_chat:
            common = {"tools": row.get("tools"), "learned_from": shared}
            return [{"messages": answer, **common} for answer in answers]
        return [{"prompt": answer[:shared], "completion": answer[shared:]} for answer in answers]

    def problem(self, row: Row) -> str | None:
        """Return the problem of a row, or None."""
        if self.is_single and not isinstance(row["label"], bool):
            return f"its label is {row['label']!r:.40}; allowed: true or false"
        try:
            answers = self.read(row)
        except ValueError as error:
            return str(error)
        if not self.is_single and answers[0] == answers[1]:
            return "its chosen and its rejected answer are equal"
        for name, answer in zip(ANSWERS_OF[self.is_single], answers, strict=True):
            problem = chat_problem(**answer) if self.is_chat else None
            if not self.is_chat and not answer["completion"].strip():
                problem = "it has no text after the prompt"
            if problem:
                return problem if self.is_single else f"{name}: {problem}"
        return None


@dataclass(frozen=True)
class MixedPreferences:
    """The format of each source of a mixture."""

    forms: tuple[PreferenceFormat, ...]

    @property
    def are_single(self) -> bool:
        """Whether every row is one answer with a label."""
        return all(form.is_single for form in self.forms)

    def of(self, row: Row) -> PreferenceFormat:
        """Return the format of a row."""
        return self.forms[row[SOURCE] if len(self.forms) > 1 else 0]


def answers_to_score(given: Any, name: str) -> dict[str, dict[str, Any]]:
    """Return the chats or texts of an input of a reward model, by the name of the score.

    Args:
        given: A text, a list of messages, or a row: `messages`; or `completion`, or `chosen` and `rejected`,
            with `prompt` or without it.
        name: The name of the input, for an error.

    Raises:
        InputError: With the problem of the input.
    """
    if isinstance(given, str):
        return {"score": {"prompt": "", "completion": given}}
    given = {"messages": given} if isinstance(given, list) else given
    cure = 'give a text, or a row with "messages", "completion", or "chosen" and "rejected"'
    if "messages" in given:
        if problem := chat_problem(given["messages"], given.get("tools")):
            refuse(name, problem, cure)
        return {"score": {"messages": given["messages"], "tools": given.get("tools")}}
    answers = [column for column in ("completion", *PAIR) if column in given]
    found = {}
    for column in answers:
        row = {"prompt": given.get("prompt", ""), "answer": given[column]}
        is_chat = any(isinstance(part, list) for part in row.values())
        row["prompt"] = row["prompt"] or ([] if is_chat else "")
        try:
            answer = Format("prompt", ("prompt", "answer"), is_chat).read(row)
        except ValueError as error:
            refuse(name, str(error), cure)
        if is_chat and (problem := chat_problem(**answer)):
            refuse(name, problem, cure)
        found["score" if column == "completion" else f"{column}_score"] = answer
    return found or refuse(name, f"found {given!r:.80}", cure)


def find_format(splits: Sequence[Dataset], wants_single: bool) -> PreferenceFormat:
    """Return the format of training and validation rows.

    Args:
        splits: The rows.
        wants_single: Whether an example is one answer (KTO), and not a pair.

    Raises:
        InputError: The columns are of no such format.
    """
    columns = set.intersection(*({*split.column_names} for split in splits))
    found = " and ".join(dict.fromkeys(listed(split.column_names) for split in splits))
    is_single = wants_single and {"completion", "label"} <= columns
    if not is_single and not {*PAIR} <= columns:
        if {"completion", "label"} <= columns:
            raise InputError(
                f"data.train: found the columns {found}, answers without pairs; allowed: --data.loss kto, or "
                "the columns chosen and rejected"
            )
        single = ", or prompt, completion and label" if wants_single else ""
        raise InputError(
            f"data.train: found the columns {found}; allowed: chosen and rejected, with or without prompt"
            f"{single}; rename yours"
        )
    if is_single and "prompt" not in columns:
        raise InputError(
            f"data.train: found the columns {found}; allowed: prompt, completion and label; rename yours"
        )
    answers = ANSWERS_OF[is_single]
    columns = ("prompt", *answers) if "prompt" in columns else answers
    is_chat = any(isinstance(row[name], list) for row in _some(splits[0]) for name in columns)
    return PreferenceFormat(len(columns) > len(answers), is_single, is_chat, wants_single and not is_single)


def _some(rows: Dataset) -> list[Row]:
    return [rows[place] for place in range(0, len(rows), max(1, len(rows) // 20))]


def labels_as_bools(rows: Dataset) -> Dataset:
    """Return rows whose labels 0 and 1 are false and true."""
    kind = rows.features.get("label")
    is_number = isinstance(kind, Value) and kind.dtype.startswith(("int", "uint"))
    if is_number and {*rows["label"]} <= {0, 1, None}:  # None: a pair in a mixture
        return rows.cast_column("label", Value("bool"))
    return rows


def _shared(one: Any, other: Any) -> int:
    """Return the number of messages, or of characters, with which two answers begin alike.

    The prompt of texts ends before the space of the first word that differs. As in TRL, that space is in the
    answers.
    """
    if isinstance(one, str):
        found = re.search(r"\s*\S*$", one[: _equal(one, other)])
        return found.start() if found else 0
    return _equal([*map(_said, one)], [*map(_said, other)])


def _equal(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the number of elements with which two sequences begin alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _said(message: Any) -> Any:
    return {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else message
