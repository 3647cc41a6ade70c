"""Packing: the examples of a micro-batch in one row, without padding, and still exact.

Positions restart at each example. Without an attention mask, transformers finds the start of examples by
these positions and masks attention between examples. With a cache of keys and values it silently does not
(transformers 5.23), so the cache is off. Not every model supports packing: `check_packing` tests it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.errors import InputError, one_line

LEAK_RTOL = 1e-5  # of the largest logit, between rows of one shape; without leaks the logits are identical


def pack(examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
    """Return examples of `input_ids` and `labels` as one row of shape (1, tokens of all).

    The first token of an example has the label −100, as no token before it predicts it. Items are then the
    same as without packing.
    """
    ids = [token for example in examples for token in example["input_ids"]]
    labels = [label for example in examples for label in (IGNORED, *example["labels"][1:])]
    positions = [place for example in examples for place in range(len(example["input_ids"]))]
    columns = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {**{name: torch.tensor([column]) for name, column in columns.items()}, "use_cache": False}


@torch.no_grad()
def check_packing(model: Any, name: str, max_length: int = 256) -> None:
    """Raise InputError if an example has other logits as the second of a row than alone.

    The first example of the row is one of two short examples, or one of `max_length` tokens, if the model has
    that many positions. The long one shows whether a model uses the place in the row as the position (Llama
    4).
    """
    if next(model.parameters()).is_meta:  # a plan has no weights, so no logits to compare
        return
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 0
    longest = min(max_length, positions) if positions > 0 else max_length  # XLNet has −1: no limit
    draw = torch.Generator().manual_seed(0)
    lengths = 8, min(5, longest), min(5, longest), longest
    drawn = [torch.randint(config.vocab_size, (length,), generator=draw).tolist() for length in lengths]
    second, *before = ({"input_ids": tokens, "labels": tokens} for tokens in drawn)
    rows = [pack(examples) for examples in ([second], *([first, second] for first in before))]
    del rows[0]["position_ids"]  # a single example is not packed
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        said = []
        for row in rows:
            tensors = {key: row[key].to(device) for key in ("input_ids", "position_ids") if key in row}
            said.append(model(**tensors, use_cache=False).logits[0, -lengths[0] :].float())
    except Exception as error:  # any model, which can raise any error
        raise InputError(
            f"data.packing: {name} does not take packed examples ({type(error).__name__}: "
            f"{one_line(error)[:200]}); set data.packing to false"
        ) from error
    finally:
        model.train(training)
    alone, one, other, late = said
    rounding = math.sqrt(torch.finfo(model.dtype).eps)  # between rows of different lengths: 3e-4 in float32
    pairs = (one, other, LEAK_RTOL), (one, alone, rounding), (late, alone, rounding)
    if not all((a - b).abs().max() <= allowed * alone.abs().max() for a, b, allowed in pairs):
        raise InputError(
            f"data.packing: in {name} the examples before a packed example change its logits (by attention, "
            "a state, or positions that do not restart). Packing is not exact: set data.packing to false"
        )
