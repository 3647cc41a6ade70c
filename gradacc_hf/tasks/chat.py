"""Tokenise training texts, and mark the tokens that the loss covers: answers, never prompts.

A chat is a list of messages, {role, content}, as in transformers. The chat template renders it as one text.
The assistant's turns are found by the template's own marks ({% generation %}) or, without marks, by rendering
the chat up to each turn. The loss covers every assistant turn, with the token that ends it and with its tool
calls, except turns with `weight` 0 or `train` false. `chat_formats.py` makes chats of the rows of a file.
"""

import copy
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.data.columns import require_fast
from gradacc_hf.data.reading import Reading, counted
from gradacc_hf.errors import InputError, listed, one_line

Messages = Sequence[Mapping[str, Any]]
Tokens = dict[str, Any]
"""`input_ids`; `labels`, −100 for tokens that the loss does not cover; `problem`, "" if there is none.

`lost_tokens`, `lost_labels` and `lost_turns` are what truncation removed: tokens, tokens with a label, and
whole assistant turns.
"""
CALLS = ("tool_calls", "function_call")
LEARNED_BY = ("weight", "train")  # keys of a message that decide whether it is learned
OTHER_NAMES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant"}
OTHER_NAMES |= {"assistant": "assistant", "bing": "assistant", "bard": "assistant", "system": "system"}
"""Names of roles, in lower case, and the role in a chat."""
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys of a message with the assistant's reasoning
MARK = "\ue000"  # a character for private use: no text has it
TRIED = 20  # messages with a key for which the template is tried
NO_TOKENS = {"input_ids": [], "labels": [], "lost_tokens": 0, "lost_labels": 0, "lost_turns": 0}


def messages_problem(messages: Any) -> str | None:
    """Return the problem of a list of messages, or None."""
    if not isinstance(messages, list) or not messages:
        return "it has no messages"
    for turn, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"message {turn} is not {{role, content}}"
        if (role := OTHER_NAMES.get(message["role"].lower())) and message["role"] != role:
            return f"message {turn} has the role {message['role']!r}, which is {role!r} here"
        name, content = f"message {turn} ({message['role']})", message.get("content")
        if not isinstance(content, str | list | None):
            return f"{name} has no text as its content: {content!r:.40}"
        if content in (None, []) and not _calls(message):
            return f"{name} has no text as its content"
        for part in content if isinstance(content, list) else ():
            if problem := _part_problem(part):
                return f"{name} has {problem}"
    return None


def _part_problem(part: Any) -> str | None:
    """Return the problem of a part of a content, or None."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return None
    found = f"type {part['type']!r:.40}" if isinstance(part, dict) and "type" in part else f"{part!r:.40}"
    return f'a part of {found} in its content; allowed: text, {{"type": "text", "text": …}}'


def chat_problem(messages: Any, tools: Any = None, learned_from: int = 0) -> str | None:
    """Return the problem of a row's messages and tools, or None.

    The assistant's turns from message `learned_from` on are learned.
    """
    if problem := messages_problem(messages):
        return problem
    try:
        as_tools(tools)
    except ValueError:
        return f"its tools are not a list of functions: {tools!r:.60}"
    for turn, message in enumerate(messages, 1):
        weight, train = (message.get(key) for key in LEARNED_BY)
        if weight is not None and weight not in (0, 1):
            return f"message {turn} has weight {weight!r}; allowed: 0 (not learned) or 1"
        if not isinstance(train, bool | None):
            return f"message {turn} has train {train!r}; allowed: true or false"
        if weight is not None and train is not None and bool(weight) != train:
            return f"message {turn} has weight {weight!r} and train {train!r}; one of them is enough"
    if not any(message["role"] == "assistant" for message in messages):
        roles = listed(dict.fromkeys(message["role"] for message in messages))
        return f"it has no assistant turn, so nothing to learn; found the roles {roles}"
    own = [message for message in messages[learned_from:] if message["role"] == "assistant"]
    if not any(map(is_learned, own)):
        which = "all its assistant turns" if not learned_from else "all assistant turns that could be learned"
        found = (
            f"{which} have weight 0 or train false" if own else "it has no assistant turn after its prompt"
        )
        return f"{found}, so there is nothing to learn"
    for turn, message in enumerate(messages[learned_from:], learned_from + 1):
        if message["role"] == "assistant" and is_learned(message) and _is_empty(message):
            return f"message {turn} (assistant) is empty, and would be learned; weight 0 leaves it out"
    return None


def _is_empty(message: Mapping[str, Any]) -> bool:
    """Whether a message has no text, no reasoning and no call."""
    content = message.get("content")
    texts = [part["text"] for part in content] if isinstance(content, list) else [content]
    texts += [message.get(name) for name in REASONING]
    return not _calls(message) and not any(str(text or "").strip() for text in texts)


def is_learned(message: Mapping[str, Any]) -> bool:
    """Whether `weight` and `train` of a message allow to learn it."""
    return message.get("weight") != 0 and message.get("train") is not False


def as_tools(tools: Any) -> list[Any] | None:
    """Return the tools of a row as a list, or None if it has none. They may be one JSON text.

    Raises:
        ValueError: If they are not a list of objects.
    """
    found = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or None
    if found is not None and not (isinstance(found, list) and all(isinstance(one, dict) for one in found)):
        raise ValueError("not a list of functions")
    return without_nulls(found) or None


def for_template(messages: Messages, tokenizer: Any = None) -> list[dict[str, Any]]:
    """Return messages as templates expect them.

    Parquet fills absent keys with null, so keys with null are left out. Arguments of calls are objects. Parts
    of a content become one text. Reasoning has the key that the template of the tokenizer reads.
    """
    prepared = []
    reads = _reasoning_key(str(getattr(tokenizer, "chat_template", None)))
    for message in messages:
        kept = {k: without_nulls(v) for k, v in message.items() if v is not None and k not in LEARNED_BY}
        for call in (call for call in _calls(kept) if "arguments" in call):
            call["arguments"] = without_nulls(_as_object(call["arguments"]))
        if isinstance(content := kept.get("content", ""), list):
            content = "\n".join(part["text"] for part in content)
        if reads and reads not in kept and (name := next((name for name in REASONING if name in kept), None)):
            kept[reads] = kept.pop(name)
        prepared.append({**kept, "content": content})
    return prepared


@cache
def _reasoning_key(template: str) -> str | None:
    """Return the first key of REASONING that a template reads, as m.thinking or m['thinking']."""
    return next((name for name in REASONING if re.search(rf"[.'\"]{name}\b", template)), None)


def _calls(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the functions that a message calls: {name, arguments}."""
    calls = message.get("tool_calls")
    calls = [call.get("function") or call for call in calls or () if isinstance(call, dict)]
    return calls + [call for call in [message.get("function_call")] if isinstance(call, dict)]


def _as_object(arguments: Any) -> Any:
    """Return arguments that are written as JSON (by OpenAI) as an object, which templates expect."""
    if isinstance(arguments, str):
        try:
            found = json.loads(arguments)
        except ValueError:
            return arguments
        return found if isinstance(found, dict) else arguments
    return arguments


def without_nulls(value: Any) -> Any:
    """Return a copy of nested lists and objects without keys whose value is null."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def check_chat_template(tokenizer: Any, name: str) -> None:
    """Raise InputError unless the template determines exactly which tokens are the assistant's."""
    if not tokenizer.chat_template:
        raise InputError(
            f"model.name: {name} has no chat template; name an instruct model, or give data.chat_template a "
            "file with one"
        )
    require_fast(tokenizer, name)
    roles = ("user", "assistant", "user", "assistant")
    chat = [{"role": role, "content": f"xq{place}"} for place, role in enumerate(roles)]
    try:
        for turns_kept in (2, 4):
            if not any(assistant_tokens(tokenizer, chat[:turns_kept])[1]):
                raise ValueError("it marks none")
            text, spans = write_chat(tokenizer, chat[:turns_kept], None)
            marked = "".join(text[start:stop] for start, stop in spans)
            for message in chat[:turns_kept]:
                if (message["role"] == "assistant") != (message["content"] in marked):
                    raise ValueError(f"where the answers are xq1 and xq3, it marks {marked!r:.80}")
    except (ValueError, jinja2.TemplateError) as error:
        raise InputError(
            f"model.name: the chat template of {name} does not determine which tokens are the assistant's "
            f"({one_line(error)}); put {{% generation %}} marks around them, in a file for data.chat_template"
        ) from error


def use_template(tokenizer: Any, file: str | None) -> None:
    """Give a tokenizer the chat template in the file that `data.chat_template` names, if it names one."""
    if file is None:
        return
    if not Path(file).is_file():
        raise InputError(f"data.chat_template: no file {file!r}; give one, or null")
    tokenizer.chat_template = Path(file).read_text(encoding="utf-8")


def tokenize_chat(
    tokenizer: Any, messages: Messages, max_length: int, tools: Any = None, learned_from: int = 0
) -> Tokens:
    """Return the first `max_length` tokens of a chat, with labels for the assistant's tokens.

    The assistant's turns from message `learned_from` on have labels. A chat that raises an error in the
    template, or that the template does not write, has no tokens and a `problem`.
    """
    learns = [
        is_learned(message) and turn >= learned_from
        for turn, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    try:
        tools, messages = as_tools(tools), for_template(messages, tokenizer)
        text, spans = write_chat(tokenizer, messages, tools)
        if problem := _unwritten(tokenizer, messages, tools, text, spans):
            return {**NO_TOKENS, "problem": problem}
        if not all(learns) and len(spans) != len(learns):
            raise ValueError(
                f"it marks {len(spans)} of {len(learns)} assistant turns, and some are not learned"
            )
        ids, places = _tokens_of(tokenizer, text, spans, ends=not _is_marked(tokenizer, tools))
    except (ValueError, TypeError, jinja2.TemplateError) as error:
        return {**NO_TOKENS, "problem": f"the chat template refuses it: {one_line(error)}"}
    if len(spans) == len(learns):
        places = list(itertools.compress(places, learns))
    labels = [IGNORED] * len(ids)
    for i in itertools.chain(*places):
        labels[i] = ids[i]
    lost = sum(bool(turn) and min(turn) >= max_length for turn in places)
    return {**_truncated(ids, labels, max_length), "lost_turns": lost}


def assistant_tokens(tokenizer: Any, messages: Messages, tools: Any = None) -> tuple[list[int], list[int]]:
    """Return the tokens of a chat, and for each 1 if it is the assistant's, else 0.

    Raises:
        ValueError: If the template does not determine the assistant's tokens.
        jinja2.TemplateError: If the chat raises an error in the template.
    """
    text, spans = write_chat(tokenizer, messages, tools)
    ids, places = _tokens_of(tokenizer, text, spans, ends=not _is_marked(tokenizer, tools))
    learned = {*itertools.chain(*places)}
    return ids, [int(i in learned) for i in range(len(ids))]


def _is_marked(tokenizer: Any, tools: Any) -> bool:
    """Whether the template marks the assistant's text."""
    return bool(re.search(r"{%-?\s*generation\s*-?%}", tokenizer.get_chat_template(tools=tools)))


def write_chat(tokenizer: Any, messages: Messages, tools: Any) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a chat, and the assistant's spans: (first character, last character + 1).

    Raises:
        ValueError: If the template does not determine the assistant's tokens.
        jinja2.TemplateError: If the chat raises an error in the template.
    """
    if not _is_marked(tokenizer, tools):
        text = _write(tokenizer, messages, tools)
        return text, _assistant_spans(tokenizer, messages, tools, text)
    render: Any = render_jinja_template  # declared to return a text
    [text], [spans] = render(
        conversations=[list(messages)],
        tools=tools,
        chat_template=tokenizer.get_chat_template(tools=tools),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return text, [(start, stop) for start, stop in spans]


def _tokens_of(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]], ends: bool
) -> tuple[list[int], list[list[int]]]:
    """Return the tokens of a text, and the places of the tokens of each span.

    A token is in a span if any of its characters is. With `ends`, a span ends with its last special token:
    templates put a line break after it, which the assistant does not write.
    """
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = found["input_ids"], found["offset_mapping"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special and ends}
    places = []
    for start, stop in spans:
        tokens = [i for i, (first, last) in enumerate(offsets) if first < stop and last > start]
        last = [place for place, i in enumerate(tokens, 1) if ids[i] in special]
        places.append(tokens[: last[-1] if last else None])
    return ids, places


def _unwritten(
    tokenizer: Any, messages: Messages, tools: Any, text: str, spans: Sequence[tuple[int, int]]
) -> str | None:
    """Return a line about the first message that the template does not write, or None."""
    for turn, message in enumerate(messages):
        part, name = _part(messages, turn, text, spans), f"message {turn + 1} ({message['role']})"
        said, longer = message["content"].strip(), {**message, "content": f"{message['content']} A"}
        if said and said not in part and not _changes(tokenizer, messages, tools, turn, longer, part):
            return f"the chat template does not write {name}; set data.chat_template to another"
        for call, others in _other_calls(message):
            if not _has_words(call, part.replace(said, "")) and not all(
                _changes(tokenizer, messages, tools, turn, other, part) for other in others
            ):
                found = f"{name} calls {call.get('name')}"
                return f"{found}, which the chat template does not write; set data.chat_template to another"
    return None


def _has_words(call: Mapping[str, Any], text: str) -> bool:
    """Whether a text has the name of a call and all of its arguments, as words."""
    arguments = call.get("arguments") or {}
    if not isinstance(arguments, dict) or any(isinstance(value, dict | list) for value in arguments.values()):
        return False
    words = [call.get("name"), *arguments, *arguments.values()]
    forms = [{str(word), json.dumps(word, ensure_ascii=False).strip('"')} for word in words]
    found = (any(re.search(rf"(?<!\w){re.escape(f)}(?!\w)", text) for f in form) for form in forms)
    return all(found)


def _part(messages: Messages, turn: int, text: str, spans: Sequence[tuple[int, int]]) -> str:
    """Return the text of an assistant's turn; of other turns, the text of the chat."""
    turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if turn not in turns or len(spans) != len(turns):
        return "".join(text[a:b] for a, b in spans) if turn in turns else text
    start, stop = spans[turns.index(turn)]
    return text[start:stop]


def _other_calls(message: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], list[dict[str, Any]]]]:
    """Yield each call of a message, with copies of the message in which its name or its arguments differ."""
    for number, call in enumerate(_calls(message)):
        given = call.get("arguments")
        changes: list[dict[str, Any]] = [{"name": f"{call.get('name')}_A"}]
        if given and isinstance(given, dict):
            changes.append({"arguments": {f"{key}_A": value for key, value in given.items()}})
            changes += [{"arguments": {**given, key: f"{value} A"}} for key, value in given.items()]
        elif given:
            changes.append({"arguments": f"{given} A"})
        others = [copy.deepcopy(dict(message)) for _ in changes]
        for other, change in zip(others, changes, strict=True):
            _calls(other)[number].update(change)
        yield call, others


def _changes(
    tokenizer: Any, messages: Messages, tools: Any, turn: int, other: Mapping[str, Any], part: str
) -> bool:
    """Whether this part of the chat has another text if this turn is another message."""
    changed = [*messages[:turn], other, *messages[turn + 1 :]]
    try:
        if other["role"] != "assistant":
            return _write(tokenizer, changed, tools) != part
        return _part(changed, turn, *write_chat(tokenizer, changed, tools)) != part
    except (ValueError, TypeError, jinja2.TemplateError):
        return True


def note_chats(reading: Reading, tokenizer: Any, rows: Iterable[Mapping[str, Any]]) -> None:
    """Note what the loss or the template ignores in chats: turns, weights, keys of messages, and tools."""
    unlearned, earlier, others, unwritten, tools_unused, nulls = 0, 0, 0, 0, 0, 0
    unused: Counter[str] = Counter()
    written: dict[str, bool] = {}  # key of messages, or tools as text: whether the template writes it
    for row in rows:
        messages, tools = for_template(row["messages"], tokenizer), as_tools(row.get("tools"))
        for turn, (given, message) in enumerate(zip(row["messages"], messages, strict=True)):
            own = given["role"] == "assistant"
            unlearned += own and not is_learned(given)
            earlier += own and is_learned(given) and turn < row.get("learned_from", 0)
            calls = [_as_object(call.get("arguments")) for call in _calls(given)]
            nulls += sum(isinstance(one, dict) and None in one.values() for one in calls)
            others += not own and any(given.get(key) for key in LEARNED_BY)
            for key in message.keys() - {"role", "content", *CALLS}:
                if key not in written or (not written[key] and unused[key] < TRIED):
                    written[key] = _writes_key(tokenizer, messages, tools, turn, key)
                unused[key] += 1
        if reasonings := [text for message in messages if (text := _reasoning(message, written))]:
            text = _write_or_none(tokenizer, messages, tools) or ""
            unwritten += sum(reasoning not in text for reasoning in reasonings)
        if tools:
            name = json.dumps(tools, sort_keys=True)
            if name not in written:
                written[name] = _write_or_none(tokenizer, messages, tools) != _write_or_none(
                    tokenizer, messages, None
                )
            tools_unused += not written[name]
    if unlearned:
        reading.note("not learned", f"{counted(unlearned, 'assistant turn')}, of weight 0 or train false")
    if earlier:
        reading.note("not learned", f"{counted(earlier, 'assistant turn')}, before the turns to learn")
    if others:
        reading.note("ignored", f"weight or train of {counted(others, 'message')} of other roles")
    if unwritten:
        found = counted(unwritten, "assistant turn")
        reading.note(
            "ignored", f"reasoning of {found}: the chat template writes reasoning in other turns only"
        )
    if nulls:
        reading.note("ignored", f"arguments that are null, in {counted(nulls, 'call')}")
    for key, number in unused.items():
        if not written[key]:
            reading.note(
                "ignored", f"{key} of {counted(number, 'message')}: the chat template does not write it"
            )
    if tools_unused:
        reading.note(
            "ignored", f"tools of {counted(tools_unused, 'row')}: the chat template does not write them"
        )


def _reasoning(message: Mapping[str, Any], written: Mapping[str, bool]) -> str:
    """Return the reasoning in an assistant's content, or under a key that the template writes."""
    own = (
        message[key].strip() for key in REASONING if written.get(key) and isinstance(message.get(key), str)
    )
    begun, _, rest = message["content"].partition("<think>")
    inside, closed, _ = rest.partition("</think>")
    is_own = message["role"] == "assistant" and not begun.strip() and closed
    return next(own, "") or (inside.strip() if is_own else "")


def _writes_key(tokenizer: Any, messages: Messages, tools: Any, turn: int, key: str) -> bool:
    """Whether the text of the chat has a key of this message."""
    without = {name: value for name, value in messages[turn].items() if name != key}
    changed = [*messages[:turn], without, *messages[turn + 1 :]]
    return _write_or_none(tokenizer, messages, tools) != _write_or_none(tokenizer, changed, tools)


def _write_or_none(tokenizer: Any, messages: Messages, tools: Any) -> str | None:
    """Return the text of a chat, or None if the template refuses it."""
    try:
        return _write(tokenizer, messages, tools)
    except (ValueError, TypeError, jinja2.TemplateError):
        return None


def _assistant_spans(tokenizer: Any, messages: Messages, tools: Any, text: str) -> list[tuple[int, int]]:
    """Return the assistant's spans in the text of the chat: (first character, last character + 1)."""
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            until = _write(tokenizer, messages[: turn + 1], tools)
            if turn:
                before = _write(tokenizer, messages[:turn], tools, add_generation_prompt=True)
            else:  # the first turn: the text that the template writes before the assistant's turn
                user = [{"role": "user", "content": "A"}]
                asked = _write(tokenizer, user, tools, add_generation_prompt=True)
                opening = asked.removeprefix(_write(tokenizer, user, tools))
                before = until[: until.find(opening) + len(opening)] if opening in until else asked
            if text.startswith(until) and until.startswith(before):
                spans.append((len(before), len(until)))
            elif span := _span_between_marks(tokenizer, messages, tools, turn, text):
                spans.append(span)
            else:
                raise ValueError(f"it changes earlier text after turn {turn + 1}")
    return spans


def _span_between_marks(
    tokenizer: Any, messages: Messages, tools: Any, turn: int, text: str
) -> tuple[int, int] | None:
    """Return the span of an assistant's turn in the text of a chat whose template changes earlier text.

    Templates that leave out earlier reasoning do so. A mark replaces the content of this turn, or of the turn
    before. Earlier text does not change the text after the mark. None: the span cannot be found.
    """

    def between_marks(places: Sequence[int], chat: Messages, **options: Any) -> list[str] | None:
        marked = [{**m, "content": MARK} if place in places else m for place, m in enumerate(chat)]
        parts = _write(tokenizer, marked, tools, **options).split(MARK)
        return parts[1:] if len(parts) == len(places) + 1 else None

    if not turn or MARK in text:
        return None
    opening = between_marks([turn - 1], messages[:turn], add_generation_prompt=True)
    closing = between_marks([turn], messages[: turn + 1])
    from_before, from_turn = between_marks([turn - 1], messages), between_marks([turn], messages)
    if not (opening and closing and from_before and from_turn):
        return None
    [begin], [end], [first], [last] = opening, closing, from_before, from_turn
    if not first.startswith(begin):  # this turn is without reasoning, with which the prompt ends
        header = between_marks([turn - 1, turn], messages)
        if not header or not begin.startswith(header[0]) or not first.startswith(header[0]):
            return None
        begin = header[0]
    rest = last.removeprefix(end)
    start, stop = len(text) - len(first) + len(begin), len(text) - len(rest)
    is_found = text.endswith(first) and text.endswith(rest) and last.startswith(end)
    return (start, stop) if is_found and start <= stop else None


def _write(tokenizer: Any, messages: Messages, tools: Any, **options: Any) -> str:
    return tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **options)


def tokenize_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the tokens of a prompt without a chat template, after the token that begins a text, if any."""
    begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] * begins + tokenizer(prompt, add_special_tokens=False)["input_ids"]


def tokenize_completion(tokenizer: Any, prompt: str, completion: str, max_length: int) -> Tokens:
    """Return the first `max_length` tokens of a prompt and completion, with labels for the completion."""
    before = tokenize_prompt(tokenizer, prompt)
    after = tokenizer(completion, add_special_tokens=False)["input_ids"]
    if not after:
        return {**NO_TOKENS, "problem": "it has no text to learn"}
    after += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return _truncated(before + after, [IGNORED] * len(before) + after, max_length)


def _truncated(ids: Sequence[int], labels: Sequence[int], max_length: int) -> Tokens:
    """Return the first `max_length` tokens, with a problem if no token after the first has a label."""
    problem = ""
    if all(label == IGNORED for label in labels[1:max_length]):
        first = next((place for place, label in enumerate(labels) if place and label != IGNORED), None)
        problem = "it has no token to learn after its first token"
        if first is not None:
            problem = (
                f"the text to learn begins at token {first + 1:,}, and data.max_length is {max_length:,}"
            )
    beyond = sum(label != IGNORED for label in labels[max_length:])
    lost = {"lost_tokens": max(0, len(ids) - max_length), "lost_labels": beyond, "lost_turns": 0}
    kept = {"input_ids": list(ids[:max_length]), "labels": list(labels[:max_length])}
    return {**kept, **lost, "problem": problem}


def tokens_problem(row: Mapping[str, Any]) -> str | None:
    """Return the problem that was found when a row was tokenised, or None."""
    return row["problem"] or None
