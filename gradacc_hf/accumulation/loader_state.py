"""Plain data for `WindowLoader.state_dict()`: sizes of a bound, the device, and layouts of version 0.1.0."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

from gradacc_hf.accumulation.splitting import Bound

COUNTERS = ("empty_micro_batches", "empty_windows", "replays")


def sizes_of(bound: Bound) -> dict[str, int | None]:
    """Return the numbers of a bound, without its memory model."""
    values = {name: getattr(bound, name) for name in ("max_tokens", "micro_batch_size", "max_bytes")}
    return {name: None if value is None else int(value) for name, value in values.items()}


def device_name(accelerator: Accelerator) -> str:
    """Return the name of the GPU, or the type of any other device."""
    device = accelerator.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def is_other_data(saved: Mapping[str, Any] | None, here: Mapping[str, Any] | None) -> bool:
    """Whether two data sets have known and unequal numbers or lengths of examples."""
    pairs = [(saved[name], here[name]) for name in here] if saved and here else []
    return any(None not in pair and pair[0] != pair[1] for pair in pairs)


def upgrade_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state of version 0.1.0 in the present layout, and any other state unchanged.

    In 0.1.0 a loader wrote `max_tokens` and `cost` beside the position if sizes were tuned. A checkpoint
    wrote the state of the loader as `place`, beside `bound`, `cost` and `counts`.
    """
    place = dict(state.get("place", state))
    if "split" in place or ("place" not in state and "cost" not in place):
        return place
    max_tokens, cost = place.pop("max_tokens", None), place.pop("cost", None)
    split = {
        "bound": state.get("bound", {"max_tokens": max_tokens, "micro_batch_size": None, "max_bytes": None}),
        "cost": state["cost"],
        "tuned": cost is not None,
        "budget": None,
        "device": None,
    }
    counts = dict(zip(COUNTERS, state.get("counts", ()), strict=False))
    return {**place, "split": split, **({"counts": counts} if counts else {})}
