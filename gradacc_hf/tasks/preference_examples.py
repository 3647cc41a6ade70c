"""Examples of preferences, and batches: a pair of answers, or an answer beside an answer to another prompt.

An answer is the token ids of a prompt and an answer, and as labels the tokens of the answer. A pair has the
columns `chosen_…` and `rejected_…`. A single answer, for KTO, has `desirable`, and the columns `kl_…` with
the same prompt and the answer of another row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.data.columns import list_lengths
from gradacc_hf.data.sources import carried
from gradacc_hf.errors import refuse
from gradacc_hf.tasks import chat
from gradacc_hf.tasks.answer_scores import KL_ROWS, REFERENCE, ROWS, TOKENS
from gradacc_hf.tasks.preference_formats import PAIR, MixedPreferences, answers_to_score, is_desirable
from gradacc_hf.tasks.references import Answer, References

PARTS = ("input_ids", "labels")
OF_ROWS = ("desirable", "is_single")
PREFIXES = {False: ("chosen_", "rejected_"), True: ("", "kl_")}
"""Whether an example is a single answer → the beginnings of the columns of both of its answers."""


def features(row: Any, tokenizer: Any, forms: MixedPreferences, max_length: int) -> dict[str, Any]:
    """Return the tokens of each answer of a row, the tokens that truncation removed, and the problem.

    `desirable` is whether the first answer is. Beside pairs of other sources, a single answer comes twice.
    """
    form = forms.of(row)
    tokenize = chat.tokenize_chat if form.is_chat else chat.tokenize_completion
    desirable = not form.is_single or bool(is_desirable(row["label"]))
    found: dict[str, Any] = {"problem": "", "desirable": desirable, "is_single": form.is_single}
    for name, answer in zip(PAIR, form.read(row), strict=False):
        tokens = tokenize(tokenizer, **answer, max_length=max_length)
        found |= {f"{name}_{part}": tokens[part] for part in PARTS}
        found[f"{name}_lost"] = tokens["lost_tokens"]
        if tokens["problem"] and not found["problem"]:
            found["problem"] = f"{name}: {tokens['problem']}"
    is_equal = all(found[f"chosen_{part}"] == found.get(f"rejected_{part}") for part in PARTS)
    if is_equal and not found["problem"]:
        found["problem"] = f"its answers are equal within data.max_length {max_length}"
    if form.is_single and forms.have_pairs:
        found |= {f"rejected_{part}": found[f"chosen_{part}"] for part in PARTS} | {"rejected_lost": 0}
    return found


def examples_of(rows: Dataset, single: bool, max_length: int) -> Dataset:
    """Return the examples of rows with `features`: pairs, or every answer for itself."""
    columns = [name for name in rows.column_names if name.endswith(("_input_ids", "_labels"))]
    if not single:
        return rows.select_columns([*columns, *carried(rows)])
    previous = rows.select(rows_of_other_prompts(rows)).select_columns(columns)
    previous = previous.rename_columns({name: f"previous_{name}" for name in columns})
    kept = [*columns, *OF_ROWS, *carried(rows)]
    both = concatenate_datasets([rows.select_columns(kept), previous], axis=1)
    settings = {"max_length": max_length}
    return both.map(_single_answers, batched=True, fn_kwargs=settings, remove_columns=both.column_names)


def rows_of_other_prompts(rows: Dataset) -> list[int]:
    """Return for each row the nearest row before it with another prompt. The last row precedes the first.

    If all rows have one prompt, return the row before each row.
    """
    columns: Any = rows.select_columns(["chosen_input_ids", "chosen_labels"])
    prompts = [tuple(row["chosen_input_ids"][: answer_span(row["chosen_labels"])[0]]) for row in columns]
    first = next((row for row in range(len(prompts)) if prompts[row] != prompts[row - 1]), None)
    if first is None:
        return [len(prompts) - 1, *range(len(prompts) - 1)]
    found = [0] * len(prompts)
    for place in range(first, first + len(prompts)):
        row, before = place % len(prompts), (place - 1) % len(prompts)
        found[row] = before if prompts[row] != prompts[before] else found[before]
    return found


def _single_answers(rows: Any, max_length: int) -> dict[str, list[Any]]:
    """Return each answer of a batch of rows as an example, with an answer to another prompt for the KL."""
    names = [name for name in PAIR if f"{name}_labels" in rows]
    kept = [name for name in rows if not name.startswith(("chosen_", "rejected_", "previous_", *OF_ROWS))]
    new = ("input_ids", "labels", "kl_input_ids", "kl_labels", "desirable")
    found: dict[str, list[Any]] = {name: [] for name in (*new, *kept)}
    for number in range(len(rows["chosen_labels"])):
        for name in names[: 1 if rows["is_single"][number] else 2]:
            ids, labels = (rows[f"{name}_{part}"][number] for part in PARTS)
            other_ids, other_labels = (rows[f"previous_{name}_{part}"][number] for part in PARTS)
            (start, _), (begins, ends) = answer_span(labels), answer_span(other_labels)
            values = {
                "input_ids": ids,
                "labels": labels,
                "kl_input_ids": [*ids[:start], *other_ids[begins:ends]][:max_length],
                "kl_labels": [*[IGNORED] * start, *other_labels[begins:ends]][:max_length],
                "desirable": name == "chosen" and rows["desirable"][number],
                **{key: rows[key][number] for key in kept},
            }
            for key, value in values.items():
                found[key].append(value)
    return found


def answer_span(labels: Sequence[int]) -> tuple[int, int]:
    """Return the first token of an answer, and the last token + 1."""
    places = [place for place, label in enumerate(labels) if label != IGNORED]
    return places[0], places[-1] + 1


def answers_in(example: Mapping[str, Any], single: bool) -> list[Answer]:
    """Return the token ids and labels of both answers of an example."""
    first, second = PREFIXES[single]
    return [(example[f"{p}input_ids"], example[f"{p}labels"]) for p in (first, second)]


def lengths_of(dataset: Dataset | Sequence[Any], single: bool) -> np.ndarray:
    """Return the tokens of each answer with its prompt; of a pair, the longer one is the second."""
    if single:
        return list_lengths(dataset, "input_ids")
    columns = [list_lengths(dataset, f"{prefix}input_ids") for prefix in PREFIXES[False]]
    return np.sort(np.stack(columns, axis=1), axis=1)


def answer_lengths(examples: Any, single: bool) -> dict[str, np.ndarray]:
    """Return the tokens of the chosen and of the rejected answers, as `accuracy_of_length` takes them."""

    def count(rows: Any) -> np.ndarray:
        return np.array([sum(label != IGNORED for label in row) for row in rows])

    if single:
        lengths, good = count(examples["labels"]), np.array(examples["desirable"], dtype=bool)
        return {"chosen": lengths[good], "rejected": lengths[~good]}
    return {**{name: count(examples[f"{name}_labels"]) for name in PAIR}, "paired": np.array(True)}


def collate(
    examples: Sequence[Mapping[str, Any]],
    single: bool,
    references: References | None,
    pad_token_id: int,
    multiple: int = 1,
) -> dict[str, torch.Tensor]:
    """Return examples as a batch: pairs, chosen before rejected; or answers, and answers to other prompts.

    Args:
        examples: The examples.
        single: Whether an example is a single answer.
        references: Reference log-probabilities; None for a loss without a reference.
        pad_token_id: The token of padding.
        multiple: Padded lengths are multiples of it.
    """
    answers = [answers_in(example, single) for example in examples]
    settings = {"pad_token_id": pad_token_id, "multiple": multiple}
    if single:
        batch = padded_rows([first for first, _ in answers], **settings)
        others = padded_rows([second for _, second in answers], **settings)
        batch |= zip(KL_ROWS, others.values(), strict=True)
        batch["desirable"] = torch.tensor([float(example["desirable"]) for example in examples])
    else:
        batch = padded_rows([answer for pair in answers for answer in pair], **settings)
    known = [[0.0 if references is None else references[answer] for answer in pair] for pair in answers]
    tokens = [[sum(label != IGNORED for label in labels[1:]) for _, labels in pair] for pair in answers]
    return batch | {REFERENCE: torch.tensor(known), TOKENS: torch.tensor(tokens)}


def padded_rows(answers: Sequence[Answer], pad_token_id: int, multiple: int = 1) -> dict[str, torch.Tensor]:
    """Return answers as the rows of a batch, padded on the right."""
    ids, labels = ([torch.tensor(part) for part in parts] for parts in zip(*answers, strict=True))
    missing = -max(map(len, ids)) % multiple
    columns = ids, [torch.ones_like(row) for row in ids], labels
    return {
        name: pad(pad_sequence(rows, True, filler), (0, missing), value=filler)
        for name, rows, filler in zip(ROWS, columns, (pad_token_id, 0, IGNORED), strict=True)
    }


def tokens_to_score(inputs: Sequence[Any], tokenizer: Any, max_length: int) -> list[dict[str, Answer]]:
    """Return the tokens of texts, chats and rows that a reward model scores, by the name of the score.

    Raises:
        InputError: With the number of the first input that cannot be scored.
    """
    found = []
    for number, given in enumerate(inputs, start=1):
        name, tokens = f"input {number:,}", {}
        for key, answer in answers_to_score(given, name).items():
            tokenize = chat.tokenize_chat if "messages" in answer else chat.tokenize_completion
            one = tokenize(tokenizer, **answer, max_length=max_length)
            if one["problem"]:
                refuse(name, one["problem"], "give another")
            tokens[key] = one["input_ids"], one["labels"]
        found.append(tokens)
    return found
