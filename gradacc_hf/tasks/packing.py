"""Packing: the examples of a micro-batch laid end to end in one row, without padding, and still exact.

Positions start again with each example. Where there is no attention mask, transformers sees by them where
examples begin and lets no token attend to another example's; a cache of keys and values would keep it from
looking, silently (transformers 5.23), so there is none. Not every model looks: `check_packing` asks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gradacc_hf.errors import BadInput
from gradacc_hf.items import IGNORED

LEAK = 1e-5  # of the largest logit; where nothing leaks not a bit changes


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
def check_packing(model: Any, name: str) -> None:
    """Raise BadInput where another first example changes what the model says to the second in its row."""
    vocabulary = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(vocabulary, (8,), generator=draw).tolist() for _ in range(3))
    training = model.training
    model.eval()
    try:
        rows = [pack([{"input_ids": ids, "labels": ids} for ids in (one, second)]) for one in (first, other)]
        for row in rows:
            del row["labels"]
        device = next(model.parameters()).device
        said = [model(**{k: v.to(device) if k != "use_cache" else v for k, v in row.items()}) for row in rows]
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"data.packing: {name} does not take packed examples ({type(error).__name__}: {error}); "
            "set data.packing to false"
        ) from error
    finally:
        model.train(training)
    logits = [outputs.logits[0].float() for outputs in said]
    if (logits[0] - logits[1])[len(first) :].abs().max() > LEAK * logits[0].abs().max():
        raise BadInput(
            f"data.packing: in {name} a packed example reaches the next (it attends across, or has a state "
            "that runs on), so packing would not be exact; set data.packing to false"
        )
