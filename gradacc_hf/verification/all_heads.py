"""The conformance table: the heads of the installed transformers with an exact accumulated gradient.

A head is a model class such as `BertForSequenceClassification`. Every head that can be built tiny
(`tiny_models.py`) is verified (`exactness.py`) with both `SPLITS`: equal micro-batches alone would hide a
mean of means. All micro-batches of a window are padded to one length, because padding reaches the loss of
many heads. All runs use the CPU and float32, without dropout.

Then padding is removed from the head (`gradacc_hf.remove_padding`), and its gradients are compared with the
padded head on other batches than the checked one.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.reference import EXACT, compare, whole_window_gradient
from gradacc_hf.accumulation.splitting import Cost
from gradacc_hf.errors import HeadUnavailableError, InputError, PaddingNotRemovableError, one_line
from gradacc_hf.padding.removal import is_grouped, remove_padding, skips_unread
from gradacc_hf.verification.exactness import verify
from gradacc_hf.verification.tiny_models import KINDS, Head, build_head, model_types

SPLITS = {4: "4 + 4 + 4 + 4", 5: "5 + 5 + 5 + 1"}
"""Examples of a micro-batch → the split of a window of 16."""
LENGTHS = np.random.default_rng(3).integers(3, 40, size=16).tolist()
WAYS = ("gradacc loop", "ExactTrainer", "Trainer")
HEADS_OF_A_KIND = 4
"""Heads of each kind in the short table."""
CHECKED_LENGTHS = [17, 9, 26, 9, 12, 5]
OTHER_LENGTHS = [[31, 4, 14, 14, 8], [22, 20, 21], [3, 40, 3, 3], [12, 12, 12]]
"""Lengths of batches after the check of a head without padding. The last has padding in every row."""


@dataclass(frozen=True)
class HeadVerdict:
    """The result of verifying one head."""

    kind: str
    """A key of the auto-mappings, such as "causal_lm"."""
    model_type: str
    """The model type of transformers, such as "bert"."""
    errors: tuple[tuple[float, ...], ...]
    """Relative errors of all `WAYS`, for each split; empty without a head, NaN if `verify` raised."""
    reason: str
    """The reason why the loop is not exact, or why there is no error."""
    padding: str = ""
    """The result of removing padding, from `padding_outcome`."""

    def exact(self, way: int) -> bool:
        """Whether a way is exact with both splits; `way` is the index in `WAYS`."""
        return bool(self.errors) and all(error[way] <= EXACT for error in self.errors)

    @property
    def unexplained(self) -> bool:
        """Whether the loop is not exact for an unknown reason, or the head without padding is wrong."""
        raised = 0 < len(self.errors) < len(SPLITS)
        inexact = bool(self.errors) and not self.exact(0) and not self.reason
        return raised or inexact or self.padding.startswith("WRONG")


def heads(every: bool) -> list[tuple[str, str]]:
    """Return (kind, model type) of every head, or of a few heads of each kind, spread over the alphabet."""
    found = []
    for kind in KINDS:
        types = model_types(kind)
        chosen = (
            types
            if every
            else [types[i] for i in np.linspace(0, len(types) - 1, HEADS_OF_A_KIND).astype(int)]
        )
        found += [(kind, model_type) for model_type in chosen]
    return found


def conformance(
    which: Sequence[tuple[str, str]], progress: Callable[[Iterable], Iterable] = iter
) -> list[HeadVerdict]:
    """Verify these heads, one after another; `progress` wraps the iterable."""
    return [_verdict(kind, model_type) for kind, model_type in progress(which)]


def _verdict(kind: str, model_type: str) -> HeadVerdict:
    try:
        head = build_head(kind, model_type)
    except HeadUnavailableError as error:
        return HeadVerdict(kind, model_type, (), one_line(error))
    try:
        results = [verify(head.model, _windows(head, size)) for size in SPLITS]
    except Exception as error:  # hundreds of model types may raise anything
        return HeadVerdict(
            kind, model_type, ((math.nan,) * len(WAYS),), f"{type(error).__name__}: {one_line(error)[:200]}"
        )
    errors = tuple(
        tuple(math.nan if way is None else way.error for way in (r.loop, r.exact_trainer, r.trainer))
        for r in results
    )
    reasons = [reason.what for result in results for reason in result.reasons]
    return HeadVerdict(kind, model_type, errors, reasons[0] if reasons else "", padding_outcome(head))


def padding_outcome(head: Head, others: Sequence[Sequence[int]] = OTHER_LENGTHS) -> str:
    """Remove padding from a head. Return whether its gradients equal the padded head's.

    Args:
        head: A head, which is changed.
        others: Lengths of examples in batches whose gradients are compared.

    Returns:
        "exact by groups", "exact with padded attention", "refused: …", or "WRONG: …". A head that also skips
        tokens which the loss does not read has ", read tokens" at the end.
    """

    def loss(outputs: Any, batch: Any) -> Any:
        return outputs["loss"]

    padded, checked = copy.deepcopy(head.model), head.collate(head.examples(CHECKED_LENGTHS))
    try:
        remove_padding(head.model, checked, loss)
    except (PaddingNotRemovableError, InputError) as error:
        return f"refused: {one_line(error)}"
    for seed, lengths in enumerate(others, start=1):
        width = max(lengths) + 3 * (min(lengths) == max(lengths))
        batch = head.collate(head.examples(lengths, seed), pad_to=width)
        reference = whole_window_gradient(padded, batch)
        found = compare("without padding", whole_window_gradient(head.model, batch), reference)
        if not found.exact:
            return f"WRONG: the gradient is off by {found.error:.0e} for lengths {lengths}"
    way = "by groups" if is_grouped(head.model) else "with padded attention"
    return f"exact {way}" + ", read tokens" * skips_unread(head.model)


def _windows(head: Head, size: int) -> WindowLoader:
    """Return a window of 16 examples of unequal length, padded to one length unless they are images."""
    examples = head.examples(LENGTHS)
    tokens = "input_ids" in examples[0]
    name = "input_ids" if tokens else head.model.main_input_name
    widths = [np.shape(example[name])[-1 if tokens else 0] for example in examples]
    return split_by_count(head, examples, size, None if head.kind == "image_classification" else max(widths))


def split_by_count(head: Head, examples: list, size: int, pad_to: int | None) -> WindowLoader:
    """Return a loader of all examples as one window, split in their order by `size` examples."""
    return WindowLoader(
        examples,
        len(examples),
        accelerator=Accelerator(cpu=True),
        collate_fn=head.collate,
        micro_batch_size=size,
        num_items=head.num_items,
        pad_to=pad_to or "micro_batch",
        shuffle=False,
        lengths=[1] * len(examples),  # equal lengths give a split by the number of examples
        cost=Cost(quadratic=math.inf),
    )


def print_conformance(verdicts: Sequence[HeadVerdict], console: Console) -> None:
    """Print the table by kind, then every head for which the loop is not exact."""
    table = Table("heads", box=SIMPLE)
    for header in ("verified", *(f"exact: {way}" for way in WAYS), "without padding", "cannot be built"):
        table.add_column(header, justify="right")
    for kind in (*dict.fromkeys(verdict.kind for verdict in verdicts), "all"):
        chosen = [verdict for verdict in verdicts if kind in (verdict.kind, "all")]
        tried = [verdict for verdict in chosen if verdict.errors]
        counts = [sum(verdict.exact(way) for verdict in tried) for way in range(len(WAYS))]
        counts.append(sum(verdict.padding.startswith("exact") for verdict in tried))
        table.add_row(kind.replace("_", " "), *map(str, (len(tried), *counts, len(chosen) - len(tried))))
    console.print(table)
    splits = " and with ".join(SPLITS.values())
    console.print(f"exact: relative error at most {EXACT:.0e} with micro-batches of {splits} examples")
    for outcome, number in Counter(v.padding.split(": ")[0] for v in verdicts if v.padding).most_common():
        console.print(f"padding removed: {outcome}: {number}")
    for verdict in verdicts:
        if verdict.padding.startswith("WRONG"):
            console.print(f"wrong without padding: {verdict.kind} of {verdict.model_type}: {verdict.padding}")
        if verdict.errors and not verdict.exact(0):
            worst = max(error[0] for error in verdict.errors)
            reason = verdict.reason or "the reason is unknown"
            console.print(
                f"not exact: {verdict.kind} of {verdict.model_type}, relative error {worst:.0e}: {reason}"
            )
