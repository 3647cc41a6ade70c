"""Answers of a causal language model to chats or prompts."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import jinja2
import torch

from gradacc_hf.errors import one_line, refuse
from gradacc_hf.tasks.chat import as_tools, for_template, is_learned, messages_problem, tokenize_prompt
from gradacc_hf.tasks.chat_formats import as_input

PROMPTS_PER_BATCH = 8  # prompts answered at once
CURE = 'give a text, or a row with "messages" or "prompt"'


class WrittenText(NamedTuple):
    """A text that a model wrote, and whether it ended only at the longest length."""

    text: str
    is_truncated: bool


def answer_prompts(
    model: Any, tokenizer: Any, inputs: Sequence[Any], max_new_tokens: int, of_chats: bool | None = None
) -> list[str]:
    """Return the texts of the greedy answers to prompts, as `write_answers` does."""
    return [text for text, _ in write_answers(model, tokenizer, inputs, max_new_tokens, of_chats=of_chats)]


@torch.no_grad()
def write_answers(
    model: Any,
    tokenizer: Any,
    inputs: Sequence[Any],
    max_new_tokens: int,
    batch_size: int = PROMPTS_PER_BATCH,
    of_chats: bool | None = None,
    **options: Any,
) -> list[WrittenText]:
    """Return one answer for each input, with dropout off.

    If the model has too few positions, an answer gets at most half of them, and a prompt loses its start.
    Every process answers all inputs, so no process waits for another.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        inputs: Lists of messages, rows of chats, rows with a `prompt` (a text or messages), or texts. A last
            message of the assistant in a row is left out.
        max_new_tokens: The longest answer.
        batch_size: Prompts that are answered at once.
        of_chats: Whether a text, also as a `prompt`, is a user's message and not plain text. With None, it
            is if the model has a chat template.
        options: Options of the model's `generate`; by default a greedy search.

    Raises:
        InputError: With the number of the first input that cannot be answered.
    """
    of_chats = bool(tokenizer.chat_template) if of_chats is None else of_chats
    named = ((given, f"input {number:,}") for number, given in enumerate(inputs, start=1))
    prompts = [_tokens(tokenizer, given, name, of_chats) for given, name in named]
    config = model.config.get_text_config(decoder=True)
    limits = tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 0
    positions = int(min(limit for limit in limits if limit > 0))  # XLNet has −1: no limit
    max_new_tokens = min(max_new_tokens, max(positions // 2, 1))
    prompts = [prompt[max_new_tokens - positions :] for prompt in prompts]
    ends = {tokenizer.eos_token_id, *_ends(model)} - {None}
    training = model.training
    model.eval()
    answers = list[WrittenText]()
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        width = max(map(len, rows))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(ends) or None,
            pad_token_id=pad,
            **({"do_sample": False} | options),
        )
        new = written[:, width:]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        cut = [len(row) >= max_new_tokens and ends.isdisjoint(row) for row in new.tolist()]
        answers += [WrittenText(text.strip(), is_cut) for text, is_cut in zip(texts, cut, strict=True)]
    model.train(training)
    return answers


def answer_samples(
    model: Any, tokenizer: Any, rows: Iterable[Mapping[str, Any]], number: int, max_new_tokens: int
) -> list[dict[str, str]]:
    """Answer the prompts of the first rows; in a chat, the messages before the last turn that is learned.

    Return for each row the `prompt` (in a chat, the last message before that turn), the `answer` and the
    `reference` of the row. If a chat has a system message, each has the `system` message of the row. Rows
    without a prompt are left out.
    """
    prompts, shown, systems = [], [], []
    for row in islice(rows, number):
        if given := row.get("messages"):
            learned = [turn for turn, m in enumerate(given) if m["role"] == "assistant" and is_learned(m)]
            messages, last = for_template(given, tokenizer), learned[-1]
            if last:
                prompts.append({"messages": messages[:last], "tools": row.get("tools")})
                shown.append(tuple(map(as_shown, messages[last - 1 : last + 1])))
                systems.append(as_shown(messages[0]) if messages[0]["role"] == "system" else "")
        elif row["prompt"]:
            prompts.append({"prompt": row["prompt"]})
            shown.append((row["prompt"], row["completion"]))
            systems.append("")
    answers = answer_prompts(model, tokenizer, prompts, max_new_tokens, of_chats=False)
    found = [
        {"system": system, "prompt": prompt, "answer": answer, "reference": reference}
        for system, (prompt, reference), answer in zip(systems, shown, answers, strict=True)
    ]
    return found if any(systems) else [{key: row[key] for key in row if key != "system"} for row in found]


def _ends(model: Any) -> Sequence[int]:
    found = model.generation_config.eos_token_id
    return found if isinstance(found, list) else [found]


def _tokens(tokenizer: Any, given: Any, name: str, of_chats: bool) -> list[int]:
    if isinstance(given, str):
        given = [{"role": "user", "content": given}] if of_chats else {"prompt": given}
    try:
        given = as_input(given)
    except ValueError as error:
        refuse(name, str(error), CURE)
    row = given if isinstance(given, Mapping) else {"messages": given} if isinstance(given, list) else {}
    prompt = row.get("prompt")
    if "messages" not in row and prompt and isinstance(prompt, str | list if of_chats else list):
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        row = {"messages": messages, "tools": row.get("tools")}
    if "messages" in row:
        text = _written(tokenizer, row, row is given, name)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    if not isinstance(prompt, str):
        refuse(name, f"found {given!r:.80}", CURE)
    return tokenize_prompt(tokenizer, prompt) or refuse(name, "its prompt is empty", "give one")


def as_shown(message: Mapping[str, Any]) -> str:
    """Return the text of a message, and its tool calls as JSON."""
    calls = json.dumps(message["tool_calls"], ensure_ascii=False) if message.get("tool_calls") else ""
    return " ".join(filter(None, [message["content"], calls]))


def _written(tokenizer: Any, row: Mapping[str, Any], is_row: bool, name: str) -> str:
    """Return the chat as its template writes it, up to the assistant's turn."""
    messages = row["messages"]
    if problem := messages_problem(messages):
        refuse(name, problem, CURE)
    if not tokenizer.chat_template:
        refuse(name, "it has messages, and the model has no chat template", "give texts")
    if is_row and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        refuse(name, "it has no message but the assistant's", CURE)
    try:
        options = {"tools": as_tools(row.get("tools")), "add_generation_prompt": True}
        return tokenizer.apply_chat_template(for_template(messages, tokenizer), tokenize=False, **options)
    except (ValueError, TypeError, jinja2.TemplateError) as error:
        refuse(name, f"the chat template refuses it: {one_line(error)}", "give another chat")
