"""Tokenise training texts, and mark the tokens that the loss covers: answers, never prompts.

A chat is a list of messages, {role, content}, as in transformers. The chat template renders it as one text.
The assistant's turns are found by the template's own marks ({% generation %}) or, without marks, by rendering
the chat up to each turn. The loss covers every assistant turn, with the token that ends it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.data.columns import require_fast
from gradacc_hf.errors import InputError, one_line

Messages = Sequence[Mapping[str, Any]]
Tokens = dict[str, Any]
"""`input_ids`; `labels`, −100 for tokens that the loss does not cover; `problem`, "" if there is none."""


def messages_problem(messages: Any) -> str | None:
    """Return the problem of a list of messages, or None."""
    if not isinstance(messages, list) or not messages:
        return "it has no messages"
    for turn, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"message {turn} is not {{role, content}}"
        if not isinstance(message.get("content"), str):
            return f"message {turn} ({message['role']}) has no text as its content"
    return None


def chat_problem(messages: Any) -> str | None:
    """Return the problem of a row's messages, or None."""
    if problem := messages_problem(messages):
        return problem
    if not any(message["role"] == "assistant" for message in messages):
        return "it has no assistant turn, so nothing to learn"
    return None


def check_chat_template(tokenizer: Any, name: str) -> None:
    """Raise InputError unless the template determines exactly which tokens are the assistant's."""
    if not tokenizer.chat_template:
        raise InputError(
            f"model.name: {name} has no chat template; name an instruct model, or give data.chat_template a "
            "file with one"
        )
    require_fast(tokenizer, name)
    roles = ("user", "assistant", "user", "assistant")
    chat = [{"role": role, "content": content} for role, content in zip(roles, "ABCD", strict=True)]
    try:
        for turns_kept in (2, 4):
            if not any(assistant_tokens(tokenizer, chat[:turns_kept])[1]):
                raise ValueError("it marks none")
    except (ValueError, jinja2.TemplateError) as error:
        raise InputError(
            f"model.name: the chat template of {name} does not determine which tokens are the assistant's "
            f"({one_line(error)}); put {{% generation %}} marks around them, in a file for data.chat_template"
        ) from error


def tokenize_chat(tokenizer: Any, messages: Messages, max_length: int) -> Tokens:
    """Return the first `max_length` tokens of a chat, with labels for the assistant's tokens.

    A chat that raises an error in the template has no tokens and a `problem`.
    """
    try:
        ids, learned = assistant_tokens(tokenizer, messages)
    except (ValueError, jinja2.TemplateError) as error:
        return {"input_ids": [], "labels": [], "problem": f"the chat template refuses it: {one_line(error)}"}
    labels = [token if is_learned else IGNORED for token, is_learned in zip(ids, learned, strict=True)]
    return _truncated(ids, labels, max_length)


def assistant_tokens(tokenizer: Any, messages: Messages) -> tuple[list[int], list[int]]:
    """Return the tokens of a chat, and for each 1 if it is the assistant's, else 0.

    A token is the assistant's if any of its characters is. Tokens after the last special token of a turn are
    not: templates put a line break there, which the assistant does not write.

    Raises:
        ValueError: If the template does not determine the assistant's tokens.
        jinja2.TemplateError: If the chat raises an error in the template.
    """
    if re.search(r"{%-?\s*generation\s*-?%}", tokenizer.get_chat_template()):
        found = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return found["input_ids"], found["assistant_masks"]
    text = _write(tokenizer, messages)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = found["input_ids"], found["offset_mapping"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    learned = [0] * len(ids)
    for start, stop in _assistant_spans(tokenizer, messages, text):
        tokens = [i for i, (first, last) in enumerate(offsets) if first < stop and last > start]
        ends = [place for place, i in enumerate(tokens, 1) if ids[i] in special]
        for i in tokens[: ends[-1] if ends else None]:
            learned[i] = 1
    return ids, learned


def _assistant_spans(tokenizer: Any, messages: Messages, text: str) -> list[tuple[int, int]]:
    """Return the assistant's spans in the text of the chat: (first character, last character + 1)."""
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            until = _write(tokenizer, messages[: turn + 1])
            if turn:
                before = _write(tokenizer, messages[:turn], add_generation_prompt=True)
            else:  # the first turn: the text that the template writes before the assistant's turn
                user = [{"role": "user", "content": "A"}]
                asked = _write(tokenizer, user, add_generation_prompt=True)
                opening = asked.removeprefix(_write(tokenizer, user))
                before = until[: until.find(opening) + len(opening)] if opening in until else asked
            if not (text.startswith(until) and until.startswith(before)):
                raise ValueError(f"it changes earlier text after turn {turn + 1}")
            spans.append((len(before), len(until)))
    return spans


def _write(tokenizer: Any, messages: Messages, **options: Any) -> str:
    return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)


def tokenize_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the tokens of a prompt without a chat template, after the token that begins a text, if any."""
    begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] * begins + tokenizer(prompt, add_special_tokens=False)["input_ids"]


def tokenize_completion(tokenizer: Any, prompt: str, completion: str, max_length: int) -> Tokens:
    """Return the first `max_length` tokens of a prompt and completion, with labels for the completion."""
    before = tokenize_prompt(tokenizer, prompt)
    after = tokenizer(completion, add_special_tokens=False)["input_ids"]
    if not after:
        return {"input_ids": [], "labels": [], "problem": "it has no text to learn"}
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
    return {"input_ids": list(ids[:max_length]), "labels": list(labels[:max_length]), "problem": problem}


def tokens_problem(row: Mapping[str, Any]) -> str | None:
    """Return the problem that was found when a row was tokenised, or None."""
    return row["problem"] or None
