"""Answers as spans of a text: characters to tokens and back, for texts longer than a model reads.

A context that does not fit is cut into parts that overlap, each with the whole question before it. What is
learned from a part, and which span is the best, is `recipes/question_answering.py`'s.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gradacc_hf.items import IGNORED


def in_parts(
    questions: Sequence[str],
    contexts: Sequence[str],
    tokenizer: Any,
    max_length: int,
    doc_stride: int,
    token_types: bool = True,
) -> Any:
    """Questions and contexts → one example or more each: a BatchEncoding.

    Beside what the model reads: `row`, of which question it is, and `offsets`, where each token is in its own
    text, in characters. max_length: tokens of an example; doc_stride: of them, what two parts share.
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
        split_special_tokens=True,  # a "[SEP]" that somebody wrote separates nothing
    )
    parts["row"], parts["offsets"] = parts.pop("overflow_to_sample_mapping"), parts.pop("offset_mapping")
    return parts


def add_positions(parts: Any, answers: Sequence[Mapping[str, Any]]) -> None:
    """Add `start_positions` and `end_positions`: the tokens of each row's first answer.

    Both are IGNORED in a part that does not have all of it.
    """
    positions = []
    for part, (row, offsets) in enumerate(zip(parts["row"], parts["offsets"], strict=True)):
        text, start = answers[row]["text"][0], answers[row]["answer_start"][0]
        first, last = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
        begins, ends = np.array(offsets).T
        of_context = np.array([sequence == 1 for sequence in parts.sequence_ids(part)])
        tokens = np.flatnonzero(of_context & (begins < last) & (ends > first)).tolist()
        whole = tokens and begins[of_context][0] <= first and last <= ends[of_context][-1]
        positions.append((tokens[0], tokens[-1]) if whole else (IGNORED, IGNORED))
    parts["start_positions"], parts["end_positions"] = map(list, zip(*positions, strict=True))


def best_spans(
    starts: torch.Tensor, ends: torch.Tensor, max_answer_length: int
) -> list[tuple[float, int, int]]:
    """Start and end logits, (batch, length) each → the span with the largest sum: (sum, first, last token).

    It ends where it starts or later, and has at most `max_answer_length` tokens.
    """
    length = starts.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool, device=starts.device)
    sums = (starts[:, :, None] + ends[:, None, :]).masked_fill(
        ~allowed.triu().tril(max_answer_length - 1), -torch.inf
    )
    best, at = sums.flatten(1).max(1)
    return list(zip(best.tolist(), (at // length).tolist(), (at % length).tolist(), strict=True))


def problem_of_texts(question: Any, context: Any) -> str | None:
    """What is wrong with a question or its context, or None."""
    for name, text in (("question", question), ("context", context)):
        if not isinstance(text, str) or not text.strip():
            return f"its {name} is {'empty' if text is None or isinstance(text, str) else 'no text'}"
    return None


def problem_of_answers(context: str, answers: Any) -> str | None:
    """What is wrong with the answers of a row, which must be where they are said to be, or None."""
    if not isinstance(answers, Mapping) or not {"text", "answer_start"} <= answers.keys():
        return 'its answers are not {"text": […], "answer_start": […]}'
    texts, starts = answers["text"] or [], answers["answer_start"] or []
    if not texts:
        return "it has no answer"
    if len(texts) != len(starts):
        return f"it has {len(texts)} answers and {len(starts)} places where they start"
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip():
            return "an answer of it is empty"
        if start is None or not 0 <= start <= len(context) - len(text):
            return f"its answer {text!r} at {start} is outside its context of {len(context):,} characters"
        if (found := context[start : start + len(text)]) != text:
            return f"its context has {found!r} at {start}, and not the answer {text!r}"
    return None


def problem_of_length(
    question: str,
    context: str,
    answer: str,
    tokenizer: Any,
    max_length: int,
    doc_stride: int,
    token_types: bool = True,
) -> str | None:
    """A question that leaves no room for its context, or an answer that may be whole in no part of it.

    The settings are those of `in_parts`.
    """

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    limits = f"data.max_length is {max_length}, data.doc_stride {doc_stride}"
    most = max_length - tokenizer.num_special_tokens_to_add(pair=True) - doc_stride
    if len(question.encode()) >= most and (found := tokens(question)) >= most:  # no more tokens than bytes
        return f"its question of {found} tokens leaves no room for its context: {limits}"
    long = len(answer.encode()) > doc_stride and (found := tokens(answer)) > doc_stride
    if long and tokens(question) + tokens(context) > most + doc_stride:
        return f"its answer of {found} tokens may be whole in no part of its context: {limits}"
    return None
