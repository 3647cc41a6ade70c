"""Generate texts for rows of a data set, distributed over all processes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.splitting import bounding_lengths, split_window
from gradacc_hf.errors import refuse


def check_target_length(config: Any, length: int, name: str) -> None:
    """Raise InputError if the decoder of the model `name` has fewer positions than `length`."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf
    if 0 < positions < length:
        allowed = f"allowed: 1 to {positions}, the positions of the decoder of {name}"
        refuse("data.max_target_length", f"found {length}", allowed)


def truncated(model: Any, written: torch.Tensor, max_new_tokens: int) -> list[bool]:
    """Return whether each text of an encoder-decoder ends only at `max_new_tokens`, after the start token."""
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends])}
    return [len(row) > max_new_tokens and ends.isdisjoint(row[1:]) for row in written.tolist()]


def as_answer(key: str, text: str, is_truncated: bool) -> dict[str, Any]:
    """Return a written text as an answer, with `truncated` if the text ends only at the longest length."""
    answer: dict[str, Any] = {key: text.strip()}
    return answer | {"truncated": True} if is_truncated else answer


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    windows: WindowLoader,
    accelerator: Accelerator,
    rows: Sequence[int] | int,
    tokenizer: Any,
    **settings: Any,
) -> list[str]:
    """Return the texts that a prepared encoder-decoder writes for the examples `rows`, in this order.

    A number of rows stands for the first ones. The micro-batches have the loader's bound, and no `labels`.
    `settings` go to the model's `generate`.
    """
    sharded = accelerator.distributed_type == DistributedType.FSDP  # a forward is collective: all rows
    module: Any = model if sharded else accelerator.unwrap_model(model)
    training = module.training
    module.eval()
    rows = range(rows) if isinstance(rows, int) else rows
    examples, number = np.array(rows), 1 if sharded else accelerator.num_processes
    processes = split_window(bounding_lengths(windows.tokens[examples]), windows.bound, number)
    written: list[tuple[int, list[int]]] = []
    for places in processes[0 if sharded else accelerator.process_index]:
        indices = examples[places]
        batch = {name: x for name, x in windows.collated(indices).batch.items() if name != "labels"}
        written += zip(indices.tolist(), module.generate(**batch, **settings).tolist(), strict=True)
    module.train(training)
    everything = dict(gather_object(written))
    texts = tokenizer.batch_decode([everything[row] for row in rows], skip_special_tokens=True)
    return [text.strip() for text in texts]
