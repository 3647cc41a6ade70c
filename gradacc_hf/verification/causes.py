"""Find the reason why accumulation is not exact for a model and its data, and a cure.

`why_not_exact` takes a model without dropout, which it may change, and the loader of the windows. It computes
losses of one example, of two examples, and with more padding, in float64 if the loss allows it.
`exactness.py` compares gradients.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.loss_items import (
    COUNTS,
    SEVERAL_LOSSES,
    ComputeLoss,
    CountItems,
    as_window_loss,
    total_loss,
)
from gradacc_hf.accumulation.probe_rows import row_of
from gradacc_hf.accumulation.reference import in_dtype_of
from gradacc_hf.accumulation.router_loss import router_loss_of, without_router_loss
from gradacc_hf.errors import listed
from gradacc_hf.utils.modeling import BATCH_NORMS

LOSS_RTOL = {torch.float32: 2e-5, torch.float64: 2e-6}
"""Relative difference of two losses up to which rounding explains it; heads compute logits in float32."""
NOT_APPLICABLE = (TypeError, ValueError, KeyError, RuntimeError, AttributeError)
"""Exceptions of a loss, a count or a collate function for an unsuitable input."""
MAX_PAIRS = 12
"""Pairs of examples to try: this many neighbours in length, and as many of a short and a long example."""


@dataclass(frozen=True)
class Reason:
    """The reason why a split is inexact, and the cure.

    Attributes:
        what: the cause, as a clause.
        cure: what to change.
    """

    what: str
    cure: str


def why_not_exact(
    model: torch.nn.Module,
    windows: WindowLoader,
    compute_loss: ComputeLoss,
    indices: Sequence[int],
    pad_to: int | None,
) -> tuple[Reason, ...]:
    """Return the first reason found on the examples of a window, or () if there is none.

    Reasons that hide others are tried first. There is no reason if the loss of every pair of examples is the
    mean over the counted items. The model may be left in float64.
    """
    if reason := _drops_examples(windows, indices, pad_to):
        return (reason,)
    probe = _Probe(model, windows, compute_loss, indices, pad_to)
    with without_router_loss(model):
        reason = (
            _batch_norm(model)
            or _random(probe)
            or _not_finite(probe)
            or (_no_mean_over_the_items(probe) if as_window_loss(compute_loss) is None else None)
        )
    return (reason,) if reason else ()


def _no_mean_over_the_items(probe: "_Probe") -> Reason | None:
    return (
        _wrong_mode(probe)
        or _grows_with_the_batch(probe)
        or _router_loss(probe)
        or _items_or_padding(probe)
        or (ROUTER_LOSS if _routers(probe) else None)  # the router loss may be too small to be measured
    )


class _Probe:
    """Computes losses of examples of a window. Only examples with items are used."""

    def __init__(
        self,
        model: torch.nn.Module,
        windows: WindowLoader,
        compute_loss: ComputeLoss,
        indices: Iterable[int],
        pad_to: int | None,
    ):
        self.model, self.windows, self.compute_loss, self.pad_to = model, windows, compute_loss, pad_to
        with_items = [int(i) for i in indices if windows.collated([int(i)], pad_to).num_items]
        self.by_length = sorted(with_items, key=lambda i: windows.lengths[i])
        try:
            model.double()
            self.loss(self.by_length[:1])
        except NOT_APPLICABLE:  # the loss works only in float32
            model.float()

    def batch(self, indices: list[int], pad_to: int | None = None) -> Mapping[str, Any]:
        return in_dtype_of(self.model, self.windows.collated(indices, pad_to or self.pad_to).batch)

    @torch.no_grad()
    def loss(self, indices: list[int], pad_to: int | None = None) -> float:
        batch = self.batch(indices, pad_to)
        return float(total_loss(self.compute_loss(self.model(**batch), batch)))

    def same(self, loss: float, other: float) -> bool:
        tolerance = LOSS_RTOL[next(self.model.parameters()).dtype]
        return abs(loss - other) <= tolerance * max(abs(loss), abs(other))

    def is_mean(self, pair: list[int], count_items: CountItems, pad_to: int | None = None) -> bool | None:
        """Whether the loss of two examples is the mean of the single losses, weighted by these items.

        None if an example has no item or the count does not apply.
        """
        try:
            a, b = (count_items(self.batch([i], pad_to)) for i in pair)
        except NOT_APPLICABLE:
            return None
        if not a or not b:
            return None
        mean = (a * self.loss(pair[:1], pad_to) + b * self.loss(pair[1:], pad_to)) / (a + b)
        return self.same(self.loss(pair, pad_to), mean)

    def separates(self, count_items: CountItems, pad_to: int | None = None) -> bool:
        """Whether the loss of every pair is the mean of the single losses, weighted by these items."""
        verdicts = [v for p in self.pairs() if (v := self.is_mean(p, count_items, pad_to)) is not None]
        return bool(verdicts) and all(verdicts)

    def pairs(self) -> list[list[int]]:
        """Return pairs of neighbours in length, and pairs of a short and a long example."""
        near = [list(pair) for pair in pairwise(self.by_length)]
        half = len(self.by_length) // 2
        far = [
            list(pair) for pair in zip(self.by_length[:half], reversed(self.by_length[half:]), strict=False)
        ]
        return [*near[:MAX_PAIRS], *far[:MAX_PAIRS]]


def _batch_norm(model: torch.nn.Module) -> Reason | None:
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BATCH_NORMS) and module.training
    ]
    if not found:
        return None
    name, module = found[0]
    channels = int(module.num_features)
    groups = max(groups for groups in (16, 8, 4, 2, 1) if channels % groups == 0 and 2 * groups <= channels)
    other = f"GroupNorm({groups}, {channels})"
    if isinstance(module, torch.nn.BatchNorm1d):
        other = f"LayerNorm({channels}) over the channels"
    return Reason(
        f"{len(found)} BatchNorm modules ({listed(name for name, _ in found[:3])} …) normalise each example "
        "with the statistics of the micro-batch",
        "no accumulation is exact with BatchNorm in training mode: freeze the modules in eval mode, or use "
        "a model with LayerNorm or GroupNorm. When training from scratch, use "
        f"torch.nn.{other} instead of {name}, and so on",
    )


def _drops_examples(windows: WindowLoader, indices: Sequence[int], pad_to: int | None) -> Reason | None:
    """Compare the items of several examples in one batch with the items of these examples one by one.

    The labels are counted, too, because a wrong count of items may include padding.
    """

    def items(chosen: Sequence[int]) -> tuple[float, float]:
        found = windows.collated(chosen, pad_to)
        return found.num_items, COUNTS["labels"](found.batch) if "labels" in found.batch else found.num_items

    sizes = {number for number in (2, 3, len(indices) // 2, len(indices)) if 2 <= number <= len(indices)}
    for number in sorted(sizes):
        chosen = [int(i) for i in indices[:number]]
        try:
            together, each = items(chosen), [items([i]) for i in chosen]
            alone = [sum(counts) for counts in zip(*each, strict=True)]
            is_random = items(chosen) != together  # `_random` finds it
        except NOT_APPLICABLE:
            return None
        if not is_random and not any(map(math.isclose, together, alone)):
            return Reason(
                f"collate_fn returns {together[0]:g} items for {number} examples in one batch, {alone[0]:g} "
                "one by one: it drops examples or labels by the rest of the micro-batch",
                "drop them before WindowLoader, or by the example alone, so that every split has equal items",
            )
    return None


def _random(probe: _Probe) -> Reason | None:
    first = probe.by_length[:1]
    batches = [probe.batch(first) for _ in range(5)]
    for name, value in batches[0].items():
        if isinstance(value, torch.Tensor) and not all(torch.equal(value, batch[name]) for batch in batches):
            return Reason(
                f"collate_fn returns a different {name} for the same example each time",
                "move random masking or cropping to transform= of WindowLoader, which seeds the generator "
                "with the example's index, so that every split gets the same numbers",
            )
    losses = [probe.loss(first) for _ in range(5)]
    if all(probe.same(losses[0], loss) or math.isnan(loss) for loss in losses):
        return None
    return Reason(
        f"the same batch has losses from {min(losses):.6g} to {max(losses):.6g}",
        "the model draws random numbers although dropout is off (sampling, noise): turn them off to verify",
    )


def _not_finite(probe: _Probe) -> Reason | None:
    for index in probe.by_length:
        if not math.isfinite(loss := probe.loss([index])):
            return Reason(
                f"the loss of example {index} alone is {loss}",
                "correct the example or the loss; a micro-batch with other examples may hide the fault",
            )
    return None


def _grows_with_the_batch(probe: _Probe) -> Reason | None:
    """Compare the loss of an example with the loss of a batch that holds it twice; a mean is unchanged."""
    first = probe.by_length[:1]
    alone, twice = probe.loss(first), probe.loss(first * 2)
    if probe.same(alone, twice):
        return None
    if probe.same(2 * alone, twice):
        return Reason(
            "the loss is a sum over the micro-batch, not a mean",
            "divide it by its items in compute_loss, or give the model reduction='mean'",
        )
    return Reason(
        f"an example has the loss {alone:.4g} alone and {twice:.4g} in a batch that holds it twice: the loss "
        "compares examples within the micro-batch (in-batch negatives)",
        "accumulation loses the negatives of the other micro-batches: use the gradient cache of "
        "gradacc_hf.accumulation.gradient_cache (see gradacc cp contrastive), or one micro-batch per window",
    )


def _wrong_mode(probe: _Probe) -> Reason | None:
    """Find the class of module that must be in evaluation mode to make the loss a mean over the items."""
    if probe.separates(probe.windows.count_items, probe.pad_to):
        return None
    training = [module for module in probe.model.modules() if module.training]
    probe.model.eval()
    separates = probe.separates(probe.windows.count_items, probe.pad_to)
    for kind in {type(module): None for module in reversed(training)} if separates else ():
        for module in training:
            module.training = not isinstance(module, kind)
        if probe.separates(probe.windows.count_items, probe.pad_to):
            modules = probe.model.named_modules()
            named = [name or "the model" for name, module in modules if isinstance(module, kind)]
            return Reason(
                f"with {len(named)} {kind.__name__} ({listed(named[:3])} …) in training mode, the loss of an "
                "example depends on the rest of the micro-batch; in evaluation mode it does not",
                "no accumulation is exact with these modules in training mode: freeze them in evaluation "
                "mode, or replace them",
            )
    for module in training:
        module.training = True
    if not separates:
        return None
    return Reason(
        "in training mode, the loss of an example depends on the other examples in the micro-batch; in "
        "evaluation mode it does not",
        "no accumulation is exact in training mode: freeze the responsible modules in evaluation mode",
    )


def _router_loss(probe: _Probe) -> Reason | None:
    """Check whether the loss is a mean over the counted items only without the router loss."""
    configs = _routers(probe)
    if not configs or probe.separates(probe.windows.count_items, probe.pad_to):
        return None
    for config in configs:
        config.output_router_logits = False
    without_it = probe.separates(probe.windows.count_items, probe.pad_to)
    for config in configs:
        config.output_router_logits = True
    if not without_it:
        return None
    return ROUTER_LOSS


def _routers(probe: _Probe) -> list[Any]:
    """Return the configs of the model and its parts that add a router loss per micro-batch."""
    if router_loss_of(probe.model) is not None:
        return []
    configs: list[Any] = [getattr(module, "config", None) for module in probe.model.modules()]
    return [config for config in configs if getattr(config, "output_router_logits", False)]


ROUTER_LOSS = Reason(
    "the router loss of the mixture of experts is computed per micro-batch and is not a mean over items",
    "call gradacc_hf.router_loss_over_window(model), or set config.output_router_logits = False",
)


def _items_or_padding(probe: _Probe) -> Reason | None:
    """Check whether padding reaches the loss and, with equal padding, over which items the loss is a mean."""
    padding, pad_to, takes_pad_to, is_ruled_out = None, probe.pad_to, True, True
    if pad_to is None:
        longest = int(probe.windows.lengths[probe.by_length[-1]])
        try:
            padding = _padding(probe, longest)
            pad_to = longest if padding else None
            is_ruled_out = padding is None
        except NOT_APPLICABLE:  # collate_fn has no argument pad_to
            takes_pad_to, is_ruled_out = False, _is_the_same_in_a_batch(probe)
    count_items = probe.windows.count_items
    if probe.separates(count_items, pad_to):
        return padding
    for setting, count in CANDIDATES.items():
        if probe.separates(count, pad_to):
            return Reason(OTHER_ITEMS, f"{setting} makes it exact")
    pairs = probe.pairs()
    equal = [pair for pair in pairs if len({int(probe.windows.lengths[i]) for i in pair}) == 1]
    if not takes_pad_to and not is_ruled_out and equal and all(probe.is_mean(p, count_items) for p in equal):
        return Reason("padding reaches the loss", PAD_ALIKE)
    what = "the loss of two examples is not the mean of the single losses over any items known to gradacc"
    if is_ruled_out and any(probe.is_mean(pair, count_items, pad_to) for pair in pairs):
        what = OTHER_ITEMS  # two examples with equally many of all items
    pad = (
        ""
        if is_ruled_out
        else "If padding reaches the loss, pad each window to one length (pad_to='window'). "
    )
    return Reason(
        what,
        f"pass num_items= a function that counts the items of a batch. {SEVERAL_LOSSES}. {pad}If the loss is "
        "not a mean, no accumulation is exact",
    )


def _is_the_same_in_a_batch(probe: _Probe) -> bool:
    """Whether the shortest example has the same loss with the padding that a batch with the longest has."""
    pair = [probe.by_length[0], probe.by_length[-1]]
    batch = row_of(probe.batch(pair), 0, 2)
    try:
        with torch.no_grad():
            padded = float(total_loss(probe.compute_loss(probe.model(**batch), batch)))
    except NOT_APPLICABLE:  # a batch that cannot be separated into rows
        return False
    return probe.same(probe.loss(pair[:1]), padded)


def _padding(probe: _Probe, longest: int) -> Reason | None:
    """Compare the loss of the shortest example alone with its loss when padded to the longest."""
    short = probe.by_length[:1]
    alone, padded = probe.loss(short), probe.loss(short, longest)
    if probe.same(alone, padded):
        return None
    tokens = int(probe.windows.lengths[short[0]])
    return Reason(
        f"padding reaches the loss: an example of {tokens} tokens has the loss {alone:.6g}, and {padded:.6g} "
        f"when padded to {longest}",
        PAD_ALIKE,
    )


OTHER_ITEMS = "the loss is a mean over different items from the counted ones"
PAD_ALIKE = (
    "mask padded positions in the loss, or pad each window to one length: pad_to='window' (collate_fn must "
    "accept pad_to=)"
)
CANDIDATES: dict[str, CountItems] = {
    "num_items='labels'": COUNTS["labels"],
    "num_items='next_token'": COUNTS["next_token"],
    "num_items=lambda batch: len(batch['labels'])": lambda batch: len(batch["labels"]),
    "num_items=lambda batch: batch['labels'].numel()": lambda batch: batch["labels"].numel(),
    "num_items=lambda batch: int(batch['attention_mask'].sum())": lambda batch: int(
        batch["attention_mask"].sum()
    ),
}
