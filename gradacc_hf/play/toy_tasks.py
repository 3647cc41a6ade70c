"""The tasks of the page: a line through eight samples, and a small transformer on Python's docstrings.

Nothing is downloaded. A micro-batch takes milliseconds on one core.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordLevelTrainer
from torch.nn.functional import mse_loss
from torch.utils.data import default_collate
from transformers import GPT2Config, GPT2LMHeadModel

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.embedded import docstrings
from gradacc_hf.play.settings import LINE, WITH_BATCH_NORM, Lengths, ModelName

VOCABULARY_SIZE = 512  # tokens
NUM_EXAMPLES = 512
MAX_TOKENS, EQUAL_TOKENS = 96, 24  # per example: at most; with equal lengths
LINE_INPUTS = [[1.0, 2.0], [2.0, 1.0], [3.0, 4.0], [4.0, 3.0], [5.0, 6.0], [6.0, 5.0], [7.0, 8.0], [8.0, 7.0]]
LINE_TARGETS = [3.0, 3.0, 7.0, 7.0, 11.0, 11.0, 15.0, 15.0]


@dataclass(frozen=True)
class Problem:
    """A task and its model.

    examples: the data set.
    collate: function from examples to a batch.
    num_items: kind of items that the loss averages over, as in `WindowLoader`.
    make_model: function from a seed to a model.
    """

    examples: Sequence[Mapping[str, Any]]
    collate: Callable[[list[Any]], Mapping[str, torch.Tensor]]
    num_items: str
    make_model: Callable[[int], torch.nn.Module]


class Line(torch.nn.Module):
    """A linear layer from two numbers to one that returns its loss, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x, labels):
        """Return the mean squared error for a batch (rows, 2) and labels (rows,)."""
        return SimpleNamespace(loss=mse_loss(self.linear(x)[:, 0], labels))


class TokenBatchNorm(torch.nn.BatchNorm1d):
    """BatchNorm in place of LayerNorm. It normalises over all tokens of a batch, including padding."""

    def forward(self, hidden):
        """Normalise hidden states (rows, tokens, width)."""
        return super().forward(hidden.flatten(0, 1)).view_as(hidden)


def problem(model: ModelName, lengths: Lengths) -> Problem:
    """Return the task for a model and lengths of examples."""
    if model == LINE:
        examples = [
            {"x": torch.tensor(x), "labels": torch.tensor(y)}
            for x, y in zip(LINE_INPUTS, LINE_TARGETS, strict=True)
        ]
        return Problem(examples, default_collate, "labels", _line)
    make = _with_batch_norm if model == WITH_BATCH_NORM else _transformer
    return Problem(sentences(lengths), pad, "next_token", make)


@cache
def sentences(lengths: Lengths) -> list[dict[str, list[int]]]:
    """Return Python's docstrings as tokens.

    Long-tailed: up to 96 tokens of each docstring.
    Equal: all docstrings joined, then split into 24 tokens each.
    """
    texts = docstrings().shuffle(seed=0)[: 3 * NUM_EXAMPLES]["text"]
    tokenizer = Tokenizer(WordLevel(unk_token="?"))
    tokenizer.pre_tokenizer = BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.train_from_iterator(texts, WordLevelTrainer(vocab_size=VOCABULARY_SIZE, special_tokens=["?"]))
    tokens = [encoded.ids for encoded in tokenizer.encode_batch(texts)]
    if lengths == "long-tailed":
        return [{"input_ids": ids[:MAX_TOKENS]} for ids in tokens if len(ids) > 3][:NUM_EXAMPLES]
    together = list(chain.from_iterable(tokens))
    return [{"input_ids": together[i * EQUAL_TOKENS : (i + 1) * EQUAL_TOKENS]} for i in range(NUM_EXAMPLES)]


def pad(examples: list[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Return tokens padded on the right, the attention mask, and the labels of a causal language model."""
    tokens = [torch.tensor(example["input_ids"]) for example in examples]

    def padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    mask = padded([torch.ones_like(row) for row in tokens], 0)
    return {"input_ids": padded(tokens, 0), "attention_mask": mask, "labels": padded(tokens, IGNORED)}


def _line(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return Line()


def _transformer(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    sizes: Any = {
        "vocab_size": VOCABULARY_SIZE,
        "n_positions": MAX_TOKENS,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
    }
    no_dropout: Any = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens: Any = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, **tokens, use_cache=False))
    model.loss_type = "ForCausalLM"  # transformers cannot derive it from the class name
    return model


def _with_batch_norm(seed: int) -> torch.nn.Module:
    model = _transformer(seed)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.LayerNorm):
                setattr(module, name, TokenBatchNorm(child.normalized_shape[0]))
    return model
