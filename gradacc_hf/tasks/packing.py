"""Packing: the examples of a micro-batch laid end to end in one row, without padding, and still exact.

Positions start again with each example. Where there is no attention mask, transformers sees by them where
examples begin and lets no token attend to another example's; a cache of keys and values would keep it from
looking, silently (transformers 5.23), so there is none. Not every model looks: `check_packing` asks.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.errors import InputError, one_line

LEAK_RTOL = 1e-5  # of the largest logit, between rows of one shape; where nothing leaks not a bit changes


def pack(examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Any]:
    """Examples of `input_ids` and `labels` → one row of shape (1, tokens of all).

    The first token of an example is predicted by none before it: its label is −100, so that items are counted
    as they are without packing.
    """
    ids = [token for example in examples for token in example["input_ids"]]
    labels = [label for example in examples for label in (IGNORED, *example["labels"][1:])]
    positions = [place for example in examples for place in range(len(example["input_ids"]))]
    columns = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {**{name: torch.tensor([column]) for name, column in columns.items()}, "use_cache": False}


@torch.no_grad()
def check_packing(model: Any, name: str, max_length: int = 256) -> None:
    """Raise InputError where an example that comes second in a row has other logits than it has alone.

    Before it come two short examples, in turn, and one of `max_length` tokens, if the model has positions for
    so many: as far as that it shows whether the place in the row counts instead of the position (Llama 4).
    """
    if next(model.parameters()).is_meta:  # a plan is made without weights: no logits to compare
        return
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 0
    longest = min(max_length, positions) if positions > 0 else max_length  # XLNet says −1: without end
    draw = torch.Generator().manual_seed(0)
    lengths = 8, min(5, longest), min(5, longest), longest
    drawn = [torch.randint(config.vocab_size, (length,), generator=draw).tolist() for length in lengths]
    second, *before = ({"input_ids": tokens, "labels": tokens} for tokens in drawn)
    rows = [pack(examples) for examples in ([second], *([first, second] for first in before))]
    del rows[0]["position_ids"]  # alone it is as without packing
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        said = []
        for row in rows:
            tensors = {key: row[key].to(device) for key in ("input_ids", "position_ids") if key in row}
            said.append(model(**tensors, use_cache=False).logits[0, -lengths[0] :].float())
    except Exception as error:  # a model of any kind, which may raise anything
        raise InputError(
            f"data.packing: {name} does not take packed examples ({type(error).__name__}: "
            f"{one_line(error)[:200]}); set data.packing to false"
        ) from error
    finally:
        model.train(training)
    alone, one, other, late = said
    rounding = math.sqrt(torch.finfo(model.dtype).eps)  # rows of other lengths: 3e-4 in float32
    pairs = (one, other, LEAK_RTOL), (one, alone, rounding), (late, alone, rounding)
    if not all((a - b).abs().max() <= allowed * alone.abs().max() for a, b, allowed in pairs):
        raise InputError(
            f"data.packing: in {name} a packed example depends on what comes before it in its row (it "
            "attends across, has a state that runs on, or takes places in the row for positions), so "
            "packing would not be exact; set data.packing to false"
        )
