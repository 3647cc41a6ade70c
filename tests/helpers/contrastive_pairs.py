"""Pairs of short texts as tokens, a collate function, and a tiny embedding model."""

import numpy as np
import torch
from transformers import BertConfig, BertModel

from gradacc_hf.accumulation.gradient_cache import Embedder

LENGTHS = np.random.default_rng(0).integers(3, 30, size=(22, 3))


def embedder(dropout=0.0, vocab_size=100, initializer_range=0.3):
    """Return a tiny embedding model, whose embeddings differ by default."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=initializer_range,
    )
    return Embedder(BertModel(config)).train()


def pairs(columns=2, lengths=LENGTHS):
    draw = np.random.default_rng(1)
    names = ("anchor", "positive", "negative")[:columns]
    return [
        {name: draw.integers(1, 100, size=n).tolist() for name, n in zip(names, row, strict=False)}
        for row in lengths
    ]


def collate(examples):
    batch = {}
    for column in examples[0]:
        longest = max(len(example[column]) for example in examples)
        rows = [example[column] + [0] * (longest - len(example[column])) for example in examples]
        batch[f"{column}_input_ids"] = torch.tensor(rows)
        batch[f"{column}_attention_mask"] = (batch[f"{column}_input_ids"] > 0).long()
    return batch


def num_pairs(batch):
    return len(batch["anchor_input_ids"])
