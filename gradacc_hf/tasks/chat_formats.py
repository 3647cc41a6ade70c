"""Formats of rows for language models: find the format of the data, and read a row as a chat or as a text.

A chat is {messages, tools, learned_from}: its assistant's turns from message `learned_from` on are learned.
A text is {prompt, completion}. `chat.py` tokenises both.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import product
from typing import Any

from datasets import Dataset

from gradacc_hf.data.columns import require_texts
from gradacc_hf.data.reading import Reading
from gradacc_hf.data.sources import SOURCE
from gradacc_hf.errors import InputError, listed, refuse
from gradacc_hf.tasks.chat import OTHER_NAMES, as_tools, chat_problem

Row = Mapping[str, Any]
CHATS = ("messages", "conversations", "conversation")  # columns with a list of messages
ROLES = {**OTHER_NAMES, "tool": "tool", "observation": "tool", "function_call": "assistant"}
"""`from` in a message of ShareGPT, and the role in a chat."""
ALPACA = ("instruction", "input", "output", "system", "history")
SAMPLED = 20  # rows that are read to find the format
ALLOWED = (
    "allowed: messages; or conversations; or prompt and completion; or instruction and output; or prompt and "
    "chosen; or text; rename yours"
)


@dataclass(frozen=True)
class Format:
    """A format of rows.

    name: the value of `data.format`.
    columns: the columns that it reads.
    is_chat: whether its rows are chats, which a chat template writes.
    learn: the value of `data.learn`.
    """

    name: str
    columns: tuple[str, ...]
    is_chat: bool = True
    learn: str = "all"

    def __str__(self) -> str:
        if self.name in ("messages", "sharegpt"):
            of_messages, of_sharegpt = ("OpenAI messages", "role, content"), ("ShareGPT", "from, value")
            title, keys = of_messages if self.name == "messages" else of_sharegpt
            return f"{title} ({'; '.join([f'{self.columns[0]}: {keys}', *self.columns[1:]])})"
        if self.name == "prompt":
            return f"{self.columns[0]} and {self.columns[1]}, {'chats' if self.is_chat else 'plain text'}"
        return f"{'Alpaca' if self.is_chat else 'plain text'} ({listed(self.columns)})"

    @property
    def learned(self) -> str:
        """The learned part of a row, for the plan."""
        if self.name == "prompt":
            turns = "the last assistant turn of " if self.learn == "last" else "the assistant turns of "
            rejected = "; rejected is not used" if self.columns[1] == "chosen" else ""
            return f"{turns if self.is_chat else ''}{self.columns[1]}{rejected}"
        if not self.is_chat:
            return "all of the text"
        if self.learn == "last":
            return "the last assistant turn"
        return "every assistant turn; --data.learn last learns the last one only"

    @property
    def texts(self) -> Sequence[str]:
        """The columns that hold texts only."""
        chats = self.name in ("messages", "sharegpt") or (self.is_chat and self.name == "prompt")
        return () if chats else [name for name in self.columns if name != "history"]

    def of(self, row: Row) -> "Format":
        """Return the format of a row."""
        return self

    def read(self, row: Row) -> dict[str, Any]:
        """Return a row as a chat or as a text.

        Raises:
            ValueError: With the problem of the row.
        """
        found = READERS[self.name](row, self)
        if self.is_chat and self.learn == "last" and isinstance(messages := found["messages"], list):
            own = [
                turn
                for turn, m in enumerate(messages)
                if isinstance(m, dict) and m.get("role") == "assistant"
            ]
            found["learned_from"] = max([found["learned_from"], *own[-1:]])
        return found

    def problem(self, row: Row) -> str | None:
        """Return the problem of a row, or None."""
        try:
            found = self.read(row)
        except ValueError as error:
            return str(error)
        return chat_problem(**found) if self.is_chat else None


@dataclass(frozen=True)
class MixedFormat:
    """The format of each source of a mixture."""

    forms: tuple[Format, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the formats read."""
        return tuple(dict.fromkeys(name for form in self.forms for name in form.columns))

    @property
    def is_chat(self) -> bool:
        """Whether a source has chats."""
        return any(form.is_chat for form in self.forms)

    def of(self, row: Row) -> Format:
        """Return the format of a row."""
        return self.forms[row[SOURCE]]

    def read(self, row: Row) -> dict[str, Any]:
        """Return a row as a chat or as a text, like `Format.read`."""
        return self.of(row).read(row)

    def problem(self, row: Row) -> str | None:
        """Return the problem of a row, or None."""
        return self.of(row).problem(row)


def find_format(splits: Sequence[Dataset], name: str, learn: str, has_template: bool) -> Format:
    """Return the format of training and validation rows.

    Args:
        splits: Training and validation rows.
        name: The value of `data.format`; "auto" takes the first format that the columns allow.
        learn: The value of `data.learn`.
        has_template: Whether the model has a chat template. Without one, plain text is before Alpaca.

    Raises:
        InputError: If the columns or the rows are of no such format. It names the format that they look like.
    """
    first, found = _sample(splits[0]), _formats(splits, learn, has_template)
    possible = [form for form in found if name in ("auto", form.name)]
    if not possible and found:
        refuse(
            "data.format",
            f"found {name}, and the rows are {found[0]}",
            f"set it to auto or {found[0].name}",
        )
    if not possible:
        alike = next(filter(None, (_looks_like(column, first) for column in splits[0].column_names)), ALLOWED)
        columns = " and ".join(dict.fromkeys(listed(split.column_names) for split in splits))
        raise InputError(f"data.train: found the columns {columns}; {alike}")
    form = possible[0]
    if learn == "last" and not form.is_chat:
        refuse("data.learn", f"found last, and the rows are {form}, without turns", "set it to all")
    for split, column in product(splits, form.texts):
        if column in split.column_names:
            require_texts(split, column, "data.train")
    if all(map(form.problem, first)):
        for other in (other for other in found if other != form and not all(map(other.problem, first))):
            what = f"its rows cannot be read as {form}: {form.problem(first[0])}. They look like {other}"
            refuse("data.train", what, f"set data.format to {other.name}")
    return form


def note_format(reading: Reading, form: Format, splits: Sequence[Dataset], has_template: bool) -> None:
    """Note the format with the other formats that the columns allow, and what is learned."""
    others = [one for one in _formats(splits, form.learn, has_template) if one.name != form.name]
    reads = [f"--data.format {one.name} reads {one} instead" for one in others]
    reading.note("format", "; ".join([str(form), *(reads or ["data.format overrules it"])]))
    reading.note("learned", form.learned)


def as_input(given: Any) -> Any:
    """Return a row of ShareGPT or Alpaca as a chat to answer; anything else as it is.

    Raises:
        ValueError: With the problem of the row.
    """
    if not isinstance(given, Mapping) or {"messages", "prompt"} & {*given}:
        return given
    for form in (
        form for form in _formats_of({*given, "output"}, {*given}, [given], "all", True) if form.is_chat
    ):
        found = form.read({**given, "output": given.get("output") or "?"})
        return {"messages": found["messages"], "tools": found["tools"]}
    return given


def _formats(splits: Sequence[Dataset], learn: str, has_template: bool) -> list[Format]:
    """Return the formats that the columns of all splits allow, the preferred one first."""
    columns = set.intersection(*({*split.column_names} for split in splits))
    optional = {name for split in splits for name in split.column_names}
    return list(_formats_of(columns, optional, _sample(splits[0]), learn, has_template))


def _formats_of(
    columns: Set[str], optional: Set[str], first: Sequence[Row], learn: str, has_template: bool
) -> Iterator[Format]:
    """Yield the formats that these columns allow. A format also reads optional columns."""
    for name in (name for name in CHATS if name in columns):
        keys, more = _keys(name, first), [other for other in ("system", "tools") if other in optional]
        if "from" in keys or (name != "messages" and "role" not in keys):
            yield Format("sharegpt", (name, *more), learn=learn)
        else:
            yield Format("messages", (name, *(other for other in more if other == "tools")), learn=learn)
    pairs = [pair for pair in (("prompt", "completion"), ("prompt", "chosen")) if {*pair} <= columns]
    for pair in pairs[:1]:
        is_chat = any(isinstance(row[name], list) for row, name in product(first, pair))
        yield Format("prompt", pair, is_chat, learn)
    alpaca = [Format("alpaca", tuple(name for name in ALPACA if name in columns | optional), learn=learn)]
    alpaca *= {"instruction", "output"} <= columns
    text = [Format("text", ("text",), is_chat=False, learn=learn)] * ("text" in columns)
    yield from alpaca + text if has_template else text + alpaca


def _sample(rows: Dataset) -> list[Row]:
    """Return rows from all parts of a data set."""
    return [rows[row] for row in range(0, len(rows), max(1, len(rows) // SAMPLED))]


def _keys(column: str, rows: Iterable[Row]) -> set[str]:
    """Return the keys of the messages in a column."""
    found = (item for row in rows for item in _as_list(row.get(column)) or () if isinstance(item, dict))
    return {key for item in found for key, value in item.items() if value is not None}


def _looks_like(column: str, rows: Sequence[Row]) -> str | None:
    """Return a line about a column of messages under another name, or None."""
    for keys, title, name in (
        ({"role", "content"}, "OpenAI messages", "messages"),
        ({"from", "value"}, "ShareGPT", "conversations"),
    ):
        if keys <= _keys(column, rows):
            return f"{column} looks like {title}: rename it to {name}"
    return None


def _as_list(value: Any) -> list[Any] | None:
    """Return a list, which may be written as JSON (in a CSV file); None for other values."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, list) else None


def _chat(messages: Any, tools: Any = None, learned_from: int = 0) -> dict[str, Any]:
    return {"messages": messages, "tools": tools, "learned_from": learned_from}


def _said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _text(row: Row, column: str) -> str:
    """Return the text in a column that may be absent or empty."""
    text = row.get(column)
    if text is not None and not isinstance(text, str):
        raise ValueError(f"column {column!r}: {text!r:.40} is not text")
    return text or ""


def _read_messages(row: Row, form: Format) -> dict[str, Any]:
    column = form.columns[0]
    if (messages := _as_list(row[column])) is None and row[column] is not None:
        raise ValueError(f"column {column!r}: {row[column]!r:.40} is not a list of {{role, content}}")
    return _chat(messages, row.get("tools"))


def _read_sharegpt(row: Row, form: Format) -> dict[str, Any]:
    column = form.columns[0]
    if (items := _as_list(row[column])) is None:
        raise ValueError(f"column {column!r}: {row[column]!r:.40} is not a list of {{from, value}}")
    messages = [_of_sharegpt(item, f"{column}[{place}]") for place, item in enumerate(items)]
    if (system := _text(row, "system")) and messages[:1] != [_said("system", system)]:
        if messages and messages[0]["role"] == "system":
            raise ValueError(f"column 'system' and {column}[0] are two system messages; leave one out")
        messages.insert(0, _said("system", system))
    return _chat(messages, _wrapped(row.get("tools")))


def _of_sharegpt(item: Any, place: str) -> dict[str, Any]:
    """Return a message {from, value} as {role, content}, with its other keys."""
    if not isinstance(item, dict):
        raise ValueError(f"{place}: {item!r:.40} is not {{from, value}}")
    name, value = item.get("from"), item.get("value")
    if (role := ROLES.get(str(name).lower())) is None:
        raise ValueError(f"{place}: 'from' is {name!r:.40}; allowed: {listed(ROLES)}")
    if not isinstance(value, str):
        raise ValueError(f"{place}: 'value' is {value!r:.40}, not text")
    rest = {key: one for key, one in item.items() if key not in ("from", "value") and one is not None}
    if str(name).lower() == "function_call":
        return {**rest, **_said(role, ""), "tool_calls": _calls(value, place)}
    return {**rest, **_said(role, value)}


def _calls(value: str, place: str) -> list[dict[str, Any]]:
    """Return the calls that a message of ShareGPT has as JSON: {name, arguments}, or a list of them."""
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise ValueError(f"{place}: a function_call is JSON, {{name, arguments}}; found {value!r:.40}")
    return [{"type": "function", "function": call} for call in calls]


def _wrapped(tools: Any) -> Any:
    """Return tools of ShareGPT, {name, parameters}, as templates expect them: {type, function}."""
    try:
        found = as_tools(tools)
    except ValueError:  # `chat_problem` names it
        return tools
    return found and [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in found
    ]


def _read_alpaca(row: Row, form: Format) -> dict[str, Any]:
    asked = "\n".join(text for name in ALPACA[:2] if (text := _text(row, name)).strip())
    for name, text in (("instruction", asked), ("output", _text(row, "output"))):
        if not text.strip():
            raise ValueError(f"column {name!r} is empty")
    messages = [_said("system", system)] if (system := _text(row, "system")).strip() else []
    if (history := _as_list(row.get("history") or [])) is None:
        raise ValueError(f"column 'history': {row['history']!r:.40} is not a list of [instruction, output]")
    for place, turns in enumerate(history):
        if not (isinstance(turns, list) and [*map(type, turns)] == [str, str]):
            raise ValueError(f"history[{place}]: {turns!r:.40} is not [instruction, output]")
        messages += [_said("user", turns[0]), _said("assistant", turns[1])]
    return _chat([*messages, _said("user", asked), _said("assistant", row["output"])])


def _read_prompt(row: Row, form: Format) -> dict[str, Any]:
    """Return a prompt with its completion or chosen answer. In a chat, the prompt is not learned."""
    parts = []
    for name, role in zip(form.columns, ("user", "assistant"), strict=True):
        part = row[name]
        if not isinstance(part, str if not form.is_chat else str | list):
            raise ValueError(f"column {name!r}: {part!r:.40} is not text{' or messages' * form.is_chat}")
        parts.append([_said(role, part)] if isinstance(part, str) else part)
    prompt, answer = parts
    if not form.is_chat:
        return dict(zip(("prompt", "completion"), (row[name] for name in form.columns), strict=True))
    said = [[(m.get("role"), m.get("content")) for m in part if isinstance(m, dict)] for part in parts]
    begins = int(said[1][:1] != said[0][:1] and bool(said[1]) and said[1][0][0] == "system")
    if prompt and said[1][begins : begins + len(prompt)] == said[0]:  # the answer repeats the prompt
        return _chat(answer, row.get("tools"), begins + len(prompt))
    return _chat([*prompt, *answer], row.get("tools"), len(prompt))


def _read_text(row: Row, form: Format) -> dict[str, Any]:
    if not isinstance(row["text"], str):
        raise ValueError(f"column 'text': {row['text']!r:.40} is not text")
    return {"prompt": "", "completion": row["text"]}


READERS: dict[str, Callable[[Row, Format], dict[str, Any]]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt": _read_prompt,
    "text": _read_text,
}
