"""Answers as spans of a text: map characters to tokens and back, for texts longer than a model's input.

A context that does not fit is split into overlapping parts, each after the whole question.
`recipes/question_answering.py` trains on the parts and chooses the best span.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.data.columns import require_fast, with_column
from gradacc_hf.data.reading import counted
from gradacc_hf.errors import refuse


def in_parts(
    questions: Sequence[str],
    contexts: Sequence[str],
    tokenizer: Any,
    max_length: int,
    doc_stride: int,
    token_types: bool = True,
) -> Any:
    """Tokenise questions and contexts into examples, one or more for each pair.

    Args:
        questions: One question for each row.
        contexts: One context for each row.
        tokenizer: A fast tokenizer.
        max_length: Tokens of an example, at most.
        doc_stride: Tokens that two parts of a context share.
        token_types: Whether to return token types.

    Returns:
        A BatchEncoding of the model's inputs, with two more keys. `row` is the number of the question.
        `offsets` is the position of each token in its text, in characters.
    """
    parts = tokenizer(
        questions,
        contexts,
        truncation="only_second",
        max_length=max_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=token_types,
        split_special_tokens=True,  # a "[SEP]" in a text separates nothing
    )
    parts["row"], parts["offsets"] = parts.pop("overflow_to_sample_mapping"), parts.pop("offset_mapping")
    return parts


def add_positions(parts: Any, answers: Sequence[Mapping[str, Any]]) -> None:
    """Add `start_positions` and `end_positions`: the first and last token of each row's first answer.

    Both are IGNORED in a part that does not hold the whole answer.
    """
    held, reach = [], {}  # the answer's tokens in each part; their range in the text, over all parts
    for part, (row, offsets) in enumerate(zip(parts["row"], parts["offsets"], strict=True)):
        text, start = answers[row]["text"][0], answers[row]["answer_start"][0]
        first, last = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
        begins, ends = np.array(offsets).T
        of_context = np.array([sequence == 1 for sequence in parts.sequence_ids(part)])
        tokens = np.flatnonzero(of_context & (begins < last) & (ends > first)).tolist()
        held.append(tokens)
        if tokens:
            begin, end = reach.get(row, offsets[tokens[0]])
            reach[row] = min(begin, offsets[tokens[0]][0]), max(end, offsets[tokens[-1]][1])
    positions = []
    for row, offsets, tokens in zip(parts["row"], parts["offsets"], held, strict=True):
        whole = tokens and (offsets[tokens[0]][0], offsets[tokens[-1]][1]) == reach[row]
        positions.append((tokens[0], tokens[-1]) if whole else (IGNORED, IGNORED))
    parts["start_positions"], parts["end_positions"] = map(list, zip(*positions, strict=True))


def unused(answers: Iterable[Mapping[str, Any]], without: int) -> list[str]:
    """Return lines about the answers and the parts that training does not use.

    Args:
        answers: The answers of each training row.
        without: The number of training parts that hold no answer.
    """
    lines = [f"{counted(without, 'training part')} without an answer"] if without else []
    if several := sum(len(of_row["text"]) > 1 for of_row in answers):
        lines.append(f"all answers but the first of {counted(several, 'training row')}")
    return lines


def with_held(rows: Dataset, parts: Dataset) -> Dataset:
    """Add `is_held` to the rows: whether a part of the row's context holds its whole answer."""
    row, start = (parts.with_format("numpy")[name][:] for name in ("row", "start_positions"))
    return with_column(rows, "is_held", np.isin(np.arange(len(rows)), row[start != IGNORED]))


def context_logits(
    outputs: Any, input_ids: torch.Tensor, tokenizer: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return start and end logits (batch, length), −∞ outside the context, so that softmaxes skip padding."""
    no_words = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}  # padding, separators
    outside = torch.isin(input_ids, torch.tensor(sorted(no_words), device=input_ids.device))
    outside |= (input_ids == tokenizer.sep_token_id).cumsum(1) == 0  # the question
    starts, ends = (
        logits.masked_fill(outside, -torch.inf) for logits in (outputs.start_logits, outputs.end_logits)
    )
    return starts, ends


def best_spans(
    starts: torch.Tensor, ends: torch.Tensor, max_answer_length: int
) -> list[tuple[float, int, int]]:
    """Return for each row the span with the largest sum of logits: (sum, first token, last token).

    A span has 1 to `max_answer_length` tokens. `starts` and `ends` are logits (batch, length).
    """
    length = starts.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool, device=starts.device)
    sums = (starts[:, :, None] + ends[:, None, :]).masked_fill(
        ~allowed.triu().tril(max_answer_length - 1), -torch.inf
    )
    best, at = sums.flatten(1).max(1)
    return list(zip(best.tolist(), (at // length).tolist(), (at % length).tolist(), strict=True))


def best_of_rows(
    spans: Sequence[tuple[float, int, int]],
    rows: Sequence[int],
    offsets: Sequence[Sequence[tuple[int, int]]],
) -> dict[int, tuple[float, int, int]]:
    """Return the best span of each row, (sum, start, end in characters), from the best spans of the parts.

    Args:
        spans: The best span of each part: (sum, first token, last token).
        rows: The row of each part.
        offsets: The position of each token of each part, in characters.
    """
    best: dict[int, tuple[float, int, int]] = {}
    for (total, first, last), row, places in zip(spans, rows, offsets, strict=True):
        best[row] = max(best.get(row, (-math.inf, 0, 0)), (total, places[first][0], places[last][1]))
    return best


@torch.no_grad()
def find_answer(
    model: Any, question: str, context: str, max_answer_length: int, tokenizer: Any, **settings: Any
) -> dict[str, Any]:
    """Return the answer to one question, its start in the context, and its probability.

    `settings` go to `in_parts`.
    """
    parts = in_parts([question], [context], tokenizer, **settings)
    offsets, rows = parts.pop("offsets"), parts.pop("row")
    batch = tokenizer.pad(parts, return_tensors="pt").to(model.device)
    starts, ends = context_logits(model(**batch), batch["input_ids"], tokenizer)
    [(total, begin, end)] = best_of_rows(best_spans(starts, ends, max_answer_length), rows, offsets).values()
    score = math.exp(total - starts.logsumexp((0, 1)) - ends.logsumexp((0, 1)))
    return {"answer": context[begin:end], "answer_start": begin, "score": score}


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Raise InputError unless the tokenizer of the model `name` separates texts and returns positions."""
    require_fast(tokenizer, name)
    if tokenizer.sep_token_id is None:
        found = f"the tokenizer of {name} does not separate question and context"
        refuse("model.name", found, "use an encoder such as BERT")


def row_problem(question: Any, context: Any, answers: Any = None, **settings: Any) -> str | None:
    """Return the problem of a row, or None. `answers` are checked if they are given.

    `settings` are arguments of `in_parts`.
    """
    if problem := problem_of_texts(question, context):
        return problem
    if problem := None if answers is None else problem_of_answers(context, answers):
        return problem
    return problem_of_length(question, **settings)


def problem_of_texts(question: Any, context: Any) -> str | None:
    """Return the problem of a question or its context, or None."""
    for name, text in (("question", question), ("context", context)):
        if not isinstance(text, str) or not text.strip():
            return f"its {name} is {'empty' if text is None or isinstance(text, str) else 'not text'}"
    return None


def problem_of_answers(context: str, answers: Any) -> str | None:
    """Return the problem of the answers of a row, or None. An answer must start at `answer_start`."""
    found = answers if isinstance(answers, Mapping) else {}
    texts, starts = found.get("text"), found.get("answer_start")
    if not isinstance(texts, list) or not isinstance(starts, list):
        return 'its answers are not {"text": […], "answer_start": […]}'
    if not texts:
        return "it has no answer"
    if len(texts) != len(starts):
        return f"it has {len(texts)} answers and {len(starts)} places where they start"
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip():
            return "one of its answers is empty"
        if type(start) is not int:
            return f"its answer {text!r} starts at {start!r}, not at a whole number of characters"
        if not 0 <= start <= len(context) - len(text):
            return f"its answer {text!r} at {start} is outside its context of {len(context):,} characters"
        if (there := context[start : start + len(text)]) != text:
            return f"its context has {there!r} at {start}, not the answer {text!r}"
    return None


def problem_of_length(
    question: str, tokenizer: Any, max_length: int, doc_stride: int, token_types: bool = True
) -> str | None:
    """Return the problem of a question that leaves no room for its context, or None.

    The arguments are the same as for `in_parts`.
    """
    most = max_length - tokenizer.num_special_tokens_to_add(pair=True) - doc_stride
    if len(question.encode()) < most:  # no more tokens than bytes
        return None
    tokens = tokenizer(question, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if len(tokens) < most:
        return None
    return (
        f"its question of {len(tokens)} tokens leaves no room for its context: "
        f"data.max_length is {max_length}, data.doc_stride {doc_stride}"
    )
