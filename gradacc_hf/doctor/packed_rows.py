"""Whether the examples of a packed row attend to each other.

A packed row has examples end to end, with positions that restart at each one. Many models keep the examples
apart only under a causal mask, without an attention mask and without a cache. Others mix them silently.
"""

import math
from typing import Any

import torch

from gradacc_hf.accumulation.loss_items import output_named
from gradacc_hf.doctor.gradients import Subject
from gradacc_hf.doctor.item_counts import named
from gradacc_hf.doctor.record import LOSS_RTOL_FP32, Inputs
from gradacc_hf.doctor.reference import state_kept

LEAST_CHANGE = {torch.float32: LOSS_RTOL_FP32, torch.float64: LOSS_RTOL_FP32}
LEAST_CHANGE_HALF = 1e-2


@torch.no_grad()
def change_of_later_examples(subject: Subject, inputs: Inputs) -> float:
    """Return how much a change of the first example of a packed row changes the outputs of the others.

    The change is relative to the largest output; 0 below rounding, and for other batches. It is NaN if the
    model has no outputs by token.
    """
    given = named(subject.model, inputs)
    ids, positions, mask = (given.get(name) for name in ("input_ids", "position_ids", "attention_mask"))
    if not (isinstance(ids, torch.Tensor) and isinstance(positions, torch.Tensor)):
        return 0.0
    if ids.ndim != 2 or len(ids) != 1 or positions.shape != ids.shape:
        return 0.0
    if isinstance(mask, torch.Tensor) and (mask.shape != ids.shape or not bool((mask != 0).all())):
        return 0.0  # a mask of the loop's own
    starts = (positions[0].diff() != 1).nonzero()[:, 0] + 1
    if not len(starts):
        return 0.0
    first, changed = int(starts[0]), ids.clone()
    changed[0, :first] = ids[0, first]
    if torch.equal(changed, ids):
        return 0.0
    plain = {name: value for name, value in given.items() if name != "labels"}
    try:
        with state_kept(subject):
            before, after = (
                _states(subject.model(**plain | {"input_ids": each}), ids.shape) for each in (ids, changed)
            )
    except Exception:  # any model, such as one that needs labels
        return math.nan
    if before is None or after is None:  # no outputs by token
        return math.nan
    difference = (after - before)[0, first:].abs().max() / before.abs().max()
    least = LEAST_CHANGE.get(before.dtype, LEAST_CHANGE_HALF)
    return float(difference) if difference > least else 0.0


def _states(outputs: Any, shape: torch.Size) -> torch.Tensor | None:
    for name in ("logits", "last_hidden_state"):
        value = output_named(outputs, name, position=0)
        if isinstance(value, torch.Tensor) and value.shape[:2] == shape:
            return value
    return None
