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

    Both are IGNORED in a part that does not hold the whole answer, and for a row without an answer.
    """
    held, reach = [], {}  # the answer's tokens in each part; their range in the text, over all parts
    for part, (row, offsets) in enumerate(zip(parts["row"], parts["offsets"], strict=True)):
        text, start = next(zip(answers[row]["text"], answers[row]["answer_start"], strict=False), ("", -1))
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


def no_answer_tokens(input_ids: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Return the position of the token of "no answer" in each row (batch, length): [CLS], or else 0."""
    mark = -1 if tokenizer.cls_token_id is None else tokenizer.cls_token_id
    return (input_ids == mark).int().argmax(1)


def point_at_no_answer(part: Mapping[str, Any], tokenizer: Any) -> dict[str, int]:
    """Return the positions of a part. Without the whole answer in it, both are the token of "no answer"."""
    names = ("start_positions", "end_positions")
    if part[names[0]] != IGNORED:
        return {name: part[name] for name in names}
    return dict.fromkeys(names, int(no_answer_tokens(torch.tensor([part["input_ids"]]), tokenizer)))


def context_logits(
    outputs: Any, input_ids: torch.Tensor, tokenizer: Any, no_answer: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return start and end logits (batch, length), −∞ outside the context, so that softmaxes skip padding.

    With `no_answer`, the token of "no answer" keeps its logits, too.
    """
    no_words = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}  # padding, separators
    outside = torch.isin(input_ids, torch.tensor(sorted(no_words), device=input_ids.device))
    outside |= (input_ids == tokenizer.sep_token_id).cumsum(1) == 0  # the question
    if no_answer:
        outside = outside.scatter(1, no_answer_tokens(input_ids, tokenizer)[:, None], False)
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


def above_no_answer(
    spans: Sequence[tuple[float, int, int]], outputs: Any, input_ids: torch.Tensor, tokenizer: Any
) -> list[tuple[float, int, int]]:
    """Return spans with the sum of logits less the sum of logits of "no answer" in the same part."""
    at = no_answer_tokens(input_ids, tokenizer)[:, None]
    sums = (outputs.start_logits + outputs.end_logits).gather(1, at)[:, 0].tolist()
    return [(total - none, first, last) for (total, first, last), none in zip(spans, sums, strict=True)]


def answers_or_none(
    margins: np.ndarray, found: Sequence[str], right: Sequence[Sequence[str]]
) -> tuple[list[str], float]:
    """Return the answers with "" where the margin is below a threshold, and the threshold with the best F1.

    Args:
        margins: For each row, the logits of the best span less the logits of "no answer".
        found: The text of the best span of each row.
        right: The right answers of each row; none for a question without an answer.
    """
    from gradacc_hf.metrics.texts import answer_scores  # slow to import, so not before it is needed

    f1 = [answer_scores(texts, right)[1] for texts in (found, [""] * len(found))]
    threshold = find_threshold(margins, *f1)
    return [
        text if margin >= threshold else "" for text, margin in zip(found, margins, strict=True)
    ], threshold


def find_threshold(margins: np.ndarray, with_span: np.ndarray, without: np.ndarray) -> float:
    """Return the threshold with the best mean F1. Rows with a margin at or above it are answered.

    Of equally good thresholds, the nearest to 0 is returned.

    Args:
        margins: For each row, the logits of the best span less the logits of "no answer".
        with_span: The F1 of the span as the answer of the row.
        without: The F1 of "no answer" as the answer of the row.
    """
    order = np.argsort(-margins, kind="stable")
    gains = np.concatenate([[0.0], np.cumsum((with_span - without)[order])])  # by the number of answered rows
    bounds = np.concatenate([[margins.max() + 1], margins[order], [margins.min() - 1]])
    cuts = np.flatnonzero(np.r_[True, bounds[1:-2] > bounds[2:-1], True])  # rows with equal margins are alike
    best = cuts[np.isclose(gains[cuts], gains[cuts].max())]
    thresholds = (bounds[best] + bounds[best + 1]) / 2
    return float(thresholds[np.abs(thresholds).argmin()])


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

    The answer is "" without a start where the model's config has a `no_answer_threshold` and no span reaches
    it. `settings` go to `in_parts`.
    """
    parts = in_parts([question], [context], tokenizer, **settings)
    offsets, _ = parts.pop("offsets"), parts.pop("row")
    batch = tokenizer.pad(parts, return_tensors="pt").to(model.device)
    outputs, ids = model(**batch), batch["input_ids"]
    threshold = getattr(model.config, "no_answer_threshold", None)
    spans = best_spans(*context_logits(outputs, ids, tokenizer), max_answer_length)
    starts, ends = context_logits(outputs, ids, tokenizer, threshold is not None)
    if threshold is None:
        total, part = max((total, part) for part, (total, _, _) in enumerate(spans))
        score = math.exp(total - starts.logsumexp((0, 1)) - ends.logsumexp((0, 1)))
    else:  # each part has its own probability of "no answer"
        spans = above_no_answer(spans, outputs, ids, tokenizer)
        margin, part = max((margin, part) for part, (margin, _, _) in enumerate(spans))
        at = no_answer_tokens(ids, tokenizer)[part]
        none = float(starts[part].log_softmax(0)[at] + ends[part].log_softmax(0)[at])
        if margin < threshold:
            return {"answer": "", "answer_start": None, "score": math.exp(none)}
        score = math.exp(none + margin)
    _, first, last = spans[part]
    begin, end = offsets[part][first][0], offsets[part][last][1]
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
