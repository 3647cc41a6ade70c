"""What a causal language model answers, greedily: to chats, or to prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset

from gradacc_hf.errors import BadInput
from gradacc_hf.tasks.chat import tokenize_prompt

ROWS = 8  # prompts that are answered at once


@torch.no_grad()
def answer_prompts(model: Any, tokenizer: Any, inputs: Sequence[Any], max_new_tokens: int) -> list[str]:
    """One answer an input, at most so many tokens long, with dropout off.

    Where the model has too few positions, an answer gets half of them at most, and a prompt loses its start.
    An input is a list of messages; a row with `messages`, without its last one if that is the assistant's; a
    row with a `prompt`; or a text: what a user says to a model with a chat template, else a prompt. Every
    process answers all, so that none waits for another.
    """
    config = model.config.get_text_config(decoder=True)
    prompts = [_tokens(tokenizer, given) for given in inputs]
    if positions := getattr(config, "max_position_embeddings", None):
        max_new_tokens = min(max_new_tokens, max(positions // 2, 1))
        prompts = [prompt[-(positions - max_new_tokens) :] for prompt in prompts]
    ends = {tokenizer.eos_token_id, *_ends(model)} - {None}
    training = model.training
    model.eval()
    answers = []
    for start in range(0, len(prompts), ROWS):
        rows = prompts[start : start + ROWS]
        width = max(map(len, rows))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(ends) or None,
            pad_token_id=pad,
        )
        answers += tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
    model.train(training)
    return [answer.strip() for answer in answers]


def answer_samples(
    model: Any, tokenizer: Any, rows: Dataset, number: int, max_new_tokens: int
) -> list[dict[str, str]]:
    """What is answered to the first rows' prompts, of chats to all before the last turn of the assistant.

    Beside each `prompt` (the message before that turn) and `answer` stands the row's own, the `reference`.
    """
    prompts, shown = [], []
    for row in rows.select(range(min(number, len(rows)))).to_list():
        if messages := row.get("messages"):
            last = max(turn for turn, message in enumerate(messages) if message["role"] == "assistant")
            prompts.append(messages[:last])
            shown.append((messages[last - 1]["content"] if last else "", messages[last]["content"]))
        else:
            prompts.append({"prompt": row["prompt"]})
            shown.append((row["prompt"], row["completion"]))
    answers = answer_prompts(model, tokenizer, prompts, max_new_tokens)
    return [
        {"prompt": prompt, "answer": answer, "reference": reference}
        for (prompt, reference), answer in zip(shown, answers, strict=True)
    ]


def _ends(model: Any) -> Sequence[int]:
    found = model.generation_config.eos_token_id
    return found if isinstance(found, list) else [found]


def _tokens(tokenizer: Any, given: Any) -> list[int]:
    if isinstance(given, str):
        given = (
            {"messages": [{"role": "user", "content": given}]}
            if tokenizer.chat_template
            else {"prompt": given}
        )
    if isinstance(given, Mapping) and isinstance(given.get("prompt"), str) and "messages" not in given:
        return tokenize_prompt(tokenizer, given["prompt"])
    messages = given["messages"] if isinstance(given, Mapping) and "messages" in given else given
    if not isinstance(messages, list):
        raise BadInput(f'an input is a text, or a row with "messages" or "prompt"; found {given!r:.80}')
    if isinstance(given, Mapping) and messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
