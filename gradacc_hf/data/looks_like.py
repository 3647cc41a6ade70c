"""Name the well-known format that rows look like, for messages about rows that a task cannot use."""

from collections.abc import Mapping, Sequence
from typing import Any

FORMATS = (
    ("SQuAD as published", ({"paragraphs"},)),
    ("SQuAD", ({"question", "context", "answers"},)),
    ("ShareGPT", ({"conversations"},)),
    ("OpenAI messages", ({"messages"},)),
    ("Alpaca", ({"instruction", "output"},)),
    ("preference pairs", ({"chosen", "rejected"},)),
    ("prompts with completions", ({"prompt", "completion"},)),
    ("words with tags", ({"tokens", "ner_tags"}, {"tokens", "tags"}, {"words", "labels"})),
)
"""Name of a format, and sets of columns. A file has all columns of one set. The first that fits counts."""
_TURNS = ({"from", "value"}, {"role", "content"})


def looks_like(columns: Sequence[str], rows: Sequence[Mapping[str, Any]] = ()) -> str | None:
    """Return the name of the format that columns and first rows look like; None if there is none."""
    for name, of_format in FORMATS:
        if any(needed <= {*columns} for needed in of_format):
            return name
    for row in rows:
        for column, value in row.items():
            turns = value if isinstance(value, list) and value else [None]
            if all(isinstance(turn, dict) and any(keys <= {*turn} for keys in _TURNS) for turn in turns):
                return f"chats in column {column!r}"
    return None
