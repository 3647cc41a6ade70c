"""Why is accumulation not exact for this model and data, and what to do about it.

Takes a model without dropout and the loader of its windows; tries the loss on one example, on two, and on
more padding. The gradients are `verify.py`'s.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch

from gradacc_hf.errors import listed
from gradacc_hf.items import COUNTS, ComputeLoss, CountItems
from gradacc_hf.tryout import BATCH_NORMS
from gradacc_hf.windows import WindowLoader

SAME = 2e-5  # relative difference of two float32 losses that are the same but for rounding


@dataclass(frozen=True)
class Reason:
    """What makes a split inexact, and what to do."""

    what: str
    cure: str


def diagnose(model: torch.nn.Module, windows: WindowLoader, compute_loss: ComputeLoss) -> tuple[Reason, ...]:
    """The reasons found, those that hide others first; none where losses separate as the items say."""
    probe = _Probe(model, windows, compute_loss)
    return (
        _batch_norm(model)
        or _random(probe)
        or _grows_with_the_batch(probe)
        or (*_router_loss(probe), *_padding(probe))
        or _other_items(probe)
    )


class _Probe:
    """The losses of any examples of the first window that have items."""

    def __init__(self, model: torch.nn.Module, windows: WindowLoader, compute_loss: ComputeLoss):
        self.model, self.windows, self.compute_loss = model, windows, compute_loss
        indices = [int(i) for i in windows.split(0, 0).indices if windows.collated([i]).num_items]
        self.by_length = sorted(indices, key=lambda i: windows.lengths[i])

    @torch.no_grad()
    def loss(self, indices: list[int], pad_to: int | None = None) -> float:
        batch = self.windows.collated(indices, pad_to).batch
        return float(self.compute_loss(self.model(**batch), batch))

    def is_mean(self, pair: list[int], count_items: CountItems) -> bool | None:
        """Is the loss of two examples the mean of theirs over these items? None where they say nothing."""
        try:
            a, b = (count_items(self.windows.collated([i]).batch) for i in pair)
        except (ValueError, KeyError):
            return None
        if not a or not b:
            return None
        mean = (a * self.loss(pair[:1]) + b * self.loss(pair[1:])) / (a + b)
        return _same(self.loss(pair), mean)


def _same(loss: float, other: float) -> bool:
    return abs(loss - other) <= SAME * max(abs(loss), abs(other))


def _batch_norm(model: torch.nn.Module) -> tuple[Reason, ...]:
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)]
    if not found:
        return ()
    name, module = found[0]
    groups = next(groups for groups in (32, 16, 8, 4, 2, 1) if module.num_features % groups == 0)
    return (
        Reason(
            f"{len(found)} BatchNorm modules ({listed(name for name, _ in found[:3])} …) normalise each "
            "example by its micro-batch",
            "no accumulation is exact with them: take a model with LayerNorm, put "
            f"torch.nn.GroupNorm({groups}, {module.num_features}) in the place of {name}, and so on, or "
            "freeze them in eval mode",
        ),
    )


def _random(probe: _Probe) -> tuple[Reason, ...]:
    first = probe.by_length[:1]
    losses = probe.loss(first), probe.loss(first)
    if _same(*losses):
        return ()
    return (
        Reason(
            f"the same example has the loss {losses[0]:.6g} and then {losses[1]:.6g}",
            "something is drawn at random although dropout is off: masking in collate_fn, sampling or noise "
            "in the model; draw it from the example's index, or turn it off to verify",
        ),
    )


def _grows_with_the_batch(probe: _Probe) -> tuple[Reason, ...]:
    """An example beside itself has the same mean loss; as a term of a sum, or a negative, another."""
    first = probe.by_length[:1]
    alone, twice = probe.loss(first), probe.loss(first * 2)
    if _same(alone, twice):
        return ()
    if _same(2 * alone, twice):
        return (
            Reason(
                "the loss is a sum over the micro-batch, not a mean",
                "divide it by its items in compute_loss, or give the model reduction='mean'",
            ),
        )
    return (
        Reason(
            f"an example has the loss {alone:.4g} alone and {twice:.4g} beside itself: examples are compared "
            "within the micro-batch (in-batch negatives)",
            "accumulation loses the negatives of the other micro-batches: use a gradient cache "
            "(gradacc lessons contrastive), or one micro-batch a window",
        ),
    )


def _router_loss(probe: _Probe) -> tuple[Reason, ...]:
    config = getattr(probe.model, "config", None)
    names = [name for name in ("router_aux_loss_coef", "aux_loss_alpha") if getattr(config, name, 0)]
    if not names or not getattr(config, "output_router_logits", True):
        return ()
    return (
        Reason(
            f"the router loss of the mixture of experts ({names[0]} {getattr(config, names[0])}) is that of "
            "each micro-batch, which is no mean over items",
            "config.output_router_logits = False leaves it out; with it, no accumulation is exact",
        ),
    )


def _padding(probe: _Probe) -> tuple[Reason, ...]:
    """The shortest example alone, and padded as far as the longest."""
    if probe.windows.pad_to != "micro_batch":
        return ()
    short, long = probe.by_length[0], probe.by_length[-1]
    lengths = [int(probe.windows.lengths[i]) for i in (short, long)]
    if lengths[0] == lengths[1]:
        return ()
    alone = probe.loss([short])
    try:
        padded = probe.loss([short], pad_to=lengths[1])
    except TypeError:  # a collate_fn that takes no pad_to: the longest pads it
        near = [list(pair) for pair in pairwise(probe.by_length)]
        count = probe.windows.count_items
        if probe.is_mean([short, long], count) is not False or not any(probe.is_mean(p, count) for p in near):
            return ()
        padded = None
    if padded is not None and _same(alone, padded):
        return ()
    seen = "" if padded is None else f": one of {lengths[0]} tokens has the loss {alone:.6g}, padded to "
    seen += "" if padded is None else f"{lengths[1]} {padded:.6g}"
    return (
        Reason(
            f"padding reaches the loss{seen}",
            "mask padded positions in the loss, or pad each window alike: pad_to='window' (a collate_fn "
            "that takes pad_to=)",
        ),
    )


def _other_items(probe: _Probe) -> tuple[Reason, ...]:
    """Which denominator makes the loss of two examples the mean of theirs?"""
    counts: dict[str, CountItems] = {
        "num_items='labels'": COUNTS["labels"],
        "num_items='next_token'": COUNTS["next_token"],
        "num_items=lambda batch: len(batch['labels'])": lambda batch: len(batch["labels"]),
        "num_items=lambda batch: batch['labels'].numel()": lambda batch: batch["labels"].numel(),
        "num_items=lambda batch: int(batch['attention_mask'].sum())": lambda batch: int(
            batch["attention_mask"].sum()
        ),
    }
    pairs = [list(pair) for pair in pairwise(probe.by_length)]
    if all(probe.is_mean(pair, probe.windows.count_items) for pair in pairs):
        return ()
    for setting, count in counts.items():
        verdicts = [verdict for pair in pairs if (verdict := probe.is_mean(pair, count)) is not None]
        if verdicts and all(verdicts):
            return (
                Reason("the loss is a mean over other items than those counted", f"{setting} makes it exact"),
            )
    return (
        Reason(
            "the loss of two examples is not the mean of theirs, over any items known here",
            "say what it is a mean over: num_items= a function of the batch; if it is no mean, no "
            "accumulation is exact",
        ),
    )
