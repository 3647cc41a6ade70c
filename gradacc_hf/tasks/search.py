"""Search for texts by embeddings: the tokens of several columns, equal texts, and what a search found.

A pair has the columns `anchor_text` and `positive_text`, with token ids beside them. The module
`accumulation/gradient_cache.py` embeds texts and searches; `recipes/contrastive.py` trains with it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset

from gradacc_hf.accumulation.gradient_cache import COLUMNS, right_answers, search
from gradacc_hf.data.reading import SPLITS, Reading, tokens_lost


def features(
    rows: Mapping[str, Any], tokenizer: Any, columns: Mapping[str, str], max_length: int
) -> dict[str, list]:
    """Return the texts and token ids of each column, and the tokens that truncation removed.

    Args:
        rows: A batch of rows.
        tokenizer: The tokenizer.
        columns: Columns of the batch to return → columns of the rows.
        max_length: The most tokens of a text.
    """
    found = {}
    for column, name in columns.items():
        texts = [text if isinstance(text, str) else "" for text in rows[name]]
        tokens = tokenizer(texts, truncation=True, max_length=max_length)
        found |= {f"{column}_text": texts, f"{column}_input_ids": tokens["input_ids"]}
        found[f"{column}_lost"] = tokens_lost(tokenizer, [texts], tokens, max_length)
    return found


def note_equal_texts(splits: Sequence[Dataset], reading: Reading) -> None:
    """Note the splits with equal texts, which are not negatives of each other."""
    for split, pairs in zip(SPLITS, splits, strict=True):
        different = {f"{column}s": len(set(pairs[f"{column}_text"])) for column in COLUMNS[:2]}
        equal = [f"{count:,} different {name}" for name, count in different.items() if count < len(pairs)]
        if equal:
            found = f"{len(pairs):,} {split} pairs have {' and '.join(equal)}"
            reading.note("equal texts", f"{found}: equal texts are not negatives")


def chance(pairs: Dataset) -> dict[str, float]:
    """Return the expected scores of a random order of all different positives."""
    from gradacc_hf.metrics import retrieval  # slow to import, so not before it is needed

    anchors, positives = ([tuple(ids) for ids in pairs[f"{column}_input_ids"]] for column in COLUMNS[:2])
    right = right_answers(anchors, positives)
    return retrieval.chance(len(set().union(*right)), list(map(len, right)))


def sample(
    pair: Mapping[str, Any], found: Sequence[Mapping[str, Any]], ids: Sequence[int], right: Sequence[int]
) -> dict[str, str]:
    """Return a search for the report: the anchor, the nearest texts, and the rank of the right one.

    Args:
        pair: The pair of the anchor.
        found: The pairs whose texts are the nearest, the nearest first.
        ids: The numbers of all pairs that were found, the nearest first.
        right: The numbers of the right pairs.
    """
    rank = next((str(rank) for rank, row in enumerate(ids, 1) if row in right), f"beyond {len(ids)}")
    texts = {
        f"found {name}": "✓ " * (row in right) + other["positive_text"]
        for name, other, row in zip(("first", "second", "third"), found, ids, strict=False)
    }
    return {"anchor": pair["anchor_text"], **texts, "rank of the right one": rank}


def nearest(
    texts: Sequence[str],
    embeddings: torch.Tensor,
    candidates: Sequence[str],
    searched: torch.Tensor,
    number: int = 5,
) -> list[dict[str, Any]]:
    """Return each text with the nearest candidates and their scores, the nearest first."""
    scores, ids = search(embeddings, searched, number)
    return [
        {"text": text, "found": [{"score": s, "text": candidates[i]} for s, i in zip(*hits, strict=True)]}
        for text, *hits in zip(texts, scores.tolist(), ids.tolist(), strict=True)
    ]
