"""Questions about functions of the standard library, each answered by a span of the function's docstring."""

import re
from typing import Any

from datasets import Dataset

from gradacc_hf.embedded.stdlib import docstrings, in_two

LONGEST_CONTEXT, LONGEST_ANSWER = 800, 150  # characters
_VAGUE = {"and", "but", "it", "that", "these", "they", "this", "which"}  # they need the sentence before
_END = r"(?=[.;!](?:\s|$)|:?\n\s*\n|:?\s*\Z)"  # the end of a sentence, also without a full stop
_TEMPLATES = [
    (rf"\bReturns?\s+(?P<answer>[^.]+?){_END}", "What does {name} return?"),
    (
        rf"\bReturns?\s+(?P<what>[\w.`'\"()-]+)\s+(?:if|when)\s+(?P<answer>[^.]+?){_END}",
        "When does {name} return {what}?",
    ),
    (
        rf"\b[Rr]aises?\s+(?:an?\s+)?`*(?P<what>\w+)`*\s+(?:if|when)\s+(?P<answer>[^.]+?){_END}",
        "When does {name} raise {what}?",
    ),
    (
        rf"\b(?P<what>[A-Z]\w+)\s+(?:is|will\s+be)\s+raised\s+(?:if|when)\s+(?P<answer>[^.]+?){_END}",
        "When does {name} raise {what}?",
    ),
    (
        rf"(?:^|[.;]\s+)(?:If|When)\s+(?P<what>\S+\s[^.,]+),\s+(?:then\s+)?(?P<answer>[^.]+?){_END}",
        "What happens if {what}?",
    ),
    (rf"\b(?P<what>\w+)[`'*]*\s+defaults\s+to\s+(?P<answer>[^.]+?){_END}", "What does {what} default to?"),
    (rf"\b(?P<what>\w+)[`'*]*\s+must\s+be\s+(?P<answer>[^.]+?){_END}", "What must {what} be?"),
    (rf"\A\s*(?!Return)(?P<answer>[A-Z][^.]+?){_END}", "What does {name} do?"),
]
"""(pattern of a sentence in a docstring, question that it answers), filled with the name and the matches."""


def docstring_questions() -> tuple[Dataset, Dataset]:
    """Return (train, validation) of `question`, `context` and `answers`, in SQuAD's form.

    The context is a docstring. `answers` is {"text": […], "answer_start": […]}, spans of the context in
    characters; a context may hold several answers. All questions about a docstring are in the same set.
    Validation has no pair of question and answer that is in training, as copied docstrings would give. Long
    docstrings are left out, and those with a single question, which a model could answer without reading it.
    """
    rows, source = [], docstrings()
    for name, text in zip(source["name"], source["text"], strict=True):
        about = _questions(name.rpartition(".")[2], text) if len(text) <= LONGEST_CONTEXT else {}
        if len(about) > 1:
            rows += [{"question": q, "text": text, "answers": a} for q, a in about.items()]
    train, validation = in_two(Dataset.from_list(rows))
    seen = {pair for row in train for pair in _pairs(row)}
    validation = validation.select([i for i, row in enumerate(validation) if seen.isdisjoint(_pairs(row))])
    return train.rename_column("text", "context"), validation.rename_column("text", "context")


def _pairs(row: Any) -> set[tuple[str, str]]:
    return {(row["question"], answer) for answer in row["answers"]["text"]}


def _questions(name: str, text: str) -> dict[str, dict[str, list]]:
    found: dict[str, dict[str, list]] = {}
    for pattern, template in _TEMPLATES:
        for match in re.finditer(pattern, text, re.MULTILINE):
            what = " ".join(match.groupdict().get("what", "").split())
            first, *_ = match["answer"].lower().split()
            if len(match["answer"]) > LONGEST_ANSWER or {what.lower(), first} & _VAGUE:
                continue
            answers = found.setdefault(
                template.format(name=name, what=what), {"text": [], "answer_start": []}
            )
            answers["text"].append(match["answer"])
            answers["answer_start"].append(match.start("answer"))
    return found
