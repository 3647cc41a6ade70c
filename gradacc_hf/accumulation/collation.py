"""Collate a window: (epoch, window) → the micro-batches of this process, on the host.

The input is the plan of windows (`sampler.py`), the data set with lengths, the bound and the item count. The
code runs in the worker processes of the loader, if there are any. `window.py` moves micro-batches to the
device and weighs the losses.
"""

import math
import pickle
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import Dataset, default_collate, get_worker_info

from gradacc_hf.accumulation.example_losses import ExampleItems
from gradacc_hf.accumulation.loss_items import CountItems, CountSeveral
from gradacc_hf.accumulation.mixture import Sources
from gradacc_hf.accumulation.padding_layout import (
    GROUPS_ON_CPU,
    PaddingLayout,
    attach_layout,
    layouts_of,
)
from gradacc_hf.accumulation.same_data import checksum, checksum_of_rows
from gradacc_hf.accumulation.sampler import WindowPlan
from gradacc_hf.accumulation.splitting import (
    SHARE_ROUNDING,
    Bound,
    Cost,
    bounding_lengths,
    padded_alone,
    padded_size,
    split_window,
    split_without_padding,
)
from gradacc_hf.accumulation.streaming import Held, Stream
from gradacc_hf.accumulation.validation import name_example

PadTo = Literal["micro_batch", "window", "nothing"] | int
Transform = Callable[[Any, np.random.Generator], Any]
EXAMPLE_STREAM, WINDOW_STREAM = 1, 2  # seed parts: other random numbers than the order's (seed, epoch)
NOISE_WINDOW_PART, NOISE_MIN_EXAMPLES = 8, 4  # noise is measured on 1/8 of a window, at least 4 examples


@dataclass(frozen=True)
class MicroBatch:
    """The examples that one process runs forward and backward at once.

    Attributes:
        batch: The result of the collate function.
        indices: Dataset indices. Empty for an idle micro-batch, which runs with weight 0 because other
            processes wait.
        num_items: Terms of the mean loss; their sum, if there are several losses.
        items: Terms of each of several losses by name. Not empty also for an idle micro-batch.
        layouts: Positions of the real tokens by the name of the mask, or "labels", without padding.
        examples: Items of each example, if examples have weights or sources.
    """

    batch: Mapping[str, Any]
    indices: np.ndarray
    num_items: float
    items: Mapping[str, float] = field(default_factory=dict)
    layouts: Mapping[str, PaddingLayout] = field(default_factory=dict)
    examples: ExampleItems | None = None

    def on_device(self, accelerator: Accelerator) -> "MicroBatch":
        """Return a copy with the batch on the device of the accelerator."""
        return replace(self, batch=self.batch_on_device(accelerator))

    def batch_on_device(self, accelerator: Accelerator) -> Any:
        """Return the batch on the device of the accelerator, a dict, with the layouts attached."""
        batch = to_device(self.batch, accelerator)
        for name, layout in self.layouts.items():
            attach_layout(batch[name], layout)
        return batch


def to_device(batch: Mapping[str, Any], accelerator: Accelerator) -> Any:
    """Return a host batch as a plain dict of tensors on the device of the accelerator."""
    batch = {
        name: torch.from_numpy(np.array(value))
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
        else value
        for name, value in batch.items()
    }
    return send_to_device(batch, accelerator.device, non_blocking=accelerator.device.type == "cuda")


@dataclass(frozen=True)
class Split:
    """The split of one window over all processes, planned from lengths.

    Attributes:
        indices: Example indices of the window.
        processes: For each process, the example indices of each micro-batch.
        epoch: Number of the epoch.
        window: Number of the window in the epoch.
        tokens: Tokens without padding, over all processes.
        padded_tokens: Tokens with padding, over all processes.
        pad_to: Tokens to which collating pads; None for the longest example of the micro-batch.
        noise_micro_batches: Number of the first micro-batches of each process that measure the noise scale,
            or 0. Their examples are random, and equally many in all processes.
        rows: Checksum of lengths and contents of examples, to compare processes; 0 where none is compared.
    """

    indices: np.ndarray
    processes: list[list[np.ndarray]]
    epoch: int
    window: int
    tokens: int
    padded_tokens: int
    pad_to: int | None
    noise_micro_batches: int = 0
    rows: int = 0

    @property
    def measures_noise(self) -> bool:
        """Whether the window measures the noise scale."""
        return self.noise_micro_batches > 0


@dataclass(frozen=True)
class LocalSplit:
    """The collated part of one process in the split of a window, with the numbers common to all processes.

    Attributes:
        plan: The split over all processes.
        micro_batches: The micro-batches of this process that have items.
        num_items: Items of the window over all processes.
        items: Items of each of several losses by name, over all processes.
        accumulation_steps: Micro-batches of the process with the most micro-batches.
        costs: For each process, the predicted cost of the most expensive micro-batch.
        bound: The bound of the split.
        noise_size: Examples of the micro-batches that measure the noise scale; 0 if it cannot be measured.
        ends_idle: Whether the last micro-batch is idle and only synchronises gradients.
    """

    plan: Split
    micro_batches: tuple[MicroBatch, ...]
    num_items: float
    items: Mapping[str, float]
    accumulation_steps: int
    costs: tuple[float, ...]
    bound: Bound
    noise_size: int = 0
    ends_idle: bool = False

    def with_idle_end(self, idle: MicroBatch) -> "LocalSplit":
        """Return this split with an idle micro-batch at the end."""
        return replace(self, micro_batches=(*self.micro_batches, idle), ends_idle=True)


@dataclass
class LocalWindows(Dataset):
    """(epoch, window) → the split and the collated micro-batches of this process. Runs in worker processes.

    It owns the settings of the split: `bound`, `cost`, `plan` and `pad_to`. `revision` counts the changes of
    `bound` and `plan`. After a change, the windows that workers have prepared are outdated. The window
    `compare_at` has a checksum of examples, and all windows of a stream from there on.
    """

    dataset: Any
    collate_fn: Callable[..., Mapping[str, Any]]
    count_items: CountItems
    tokens: np.ndarray | Held  # (examples, columns padded on their own)
    pad_to: PadTo
    bound: Bound
    cost: Cost
    plan: WindowPlan | Stream
    num_processes: int
    process: int
    transform: Transform | None = None
    pad_to_multiple_of: int = 1
    columns_padded_together: bool = False
    leave_out: Collection[int] = ()
    noise_every: int = 0
    padding_free: bool = False
    layout_cost: Cost = GROUPS_ON_CPU
    revision: int = 0
    compare_at: tuple[int, int] | None = None
    sources: Sources | None = None
    weights: np.ndarray | None = None

    def resplit(self, bound: Bound, cost: Cost) -> None:
        """Split later windows under another bound or cost model."""
        self.revision += bound is not self.bound
        self.bound, self.cost = bound, cost

    def replan(self, plan: WindowPlan | Stream) -> None:
        """Take later windows from another plan."""
        self.revision += plan is not self.plan
        self.plan = plan

    def __getitem__(self, number: tuple[int, int]) -> tuple[Split, list[MicroBatch]] | bytes:
        split = self.split(*number)
        if self.compare_at and (self.compare_at == number or isinstance(self.plan, Stream)):
            split = replace(split, rows=checksum_of_rows(self, split))
        local = split, self.collate_split(split)
        # As bytes: tensors in shared memory need a file descriptor each, and a window may have thousands.
        return local if get_worker_info() is None else pickle.dumps(local)

    def collate_split(self, split: Split) -> list[MicroBatch]:
        """Collate the micro-batches of this process in a split."""
        own = split.processes[self.process]
        return [self.collate(indices, split.epoch, split.pad_to) for indices in own]

    @cached_property
    def lengths(self) -> Any:
        """Tokens of each example, summed over columns; a view if there is one column."""
        if not isinstance(self.tokens, np.ndarray):
            return self.tokens.sum(1)
        return self.tokens[:, 0] if self.tokens.shape[1] == 1 else self.tokens.sum(1, dtype=np.int32)

    @cached_property
    def identity(self) -> dict[str, int | None] | None:
        """Number of examples and checksum of the lengths, None if they are all 1; None for a stream."""
        if not isinstance(self.tokens, np.ndarray):
            return None
        lengths = checksum(self.tokens) if self.tokens.max() > 1 else None
        return {"examples": len(self.tokens), "lengths": lengths}

    def apart(self, epoch: int, window: int) -> "LocalWindows":
        """Return windows that can be read from this window on without moving the position of `self`.

        A stream gets a separate reader.
        """
        if not isinstance(self.plan, Stream):
            return self
        stream = self.plan.apart(epoch, window)
        return replace(self, plan=stream, dataset=stream, tokens=stream.tokens)

    def split(self, epoch: int, window: int) -> Split:
        """Split a window, from lengths alone."""
        indices = self.plan.indices(epoch, window)
        if self.leave_out:
            indices = indices[~np.isin(indices, list(self.leave_out))]
        measures = self.noise_every > 0 and window % self.noise_every == 0
        return self.split_examples(indices, self.tokens[indices], epoch, window, measures)

    def split_examples(
        self, indices: np.ndarray, tokens: np.ndarray, epoch: int, window: int, measures_noise: bool = False
    ) -> Split:
        """Split a window of these examples, whose tokens are (examples, columns)."""
        padded, pad_to = self.padded(tokens), None
        if self.pad_to not in ("micro_batch", "nothing"):
            pad_to = int(tokens.max(initial=0)) if self.pad_to == "window" else self.pad_to
            padded = np.full_like(tokens, pad_to)
        small = self._noise_micro_batches(tokens, padded, epoch, window) if measures_noise else []
        drawn = [positions for process in small for positions in process]
        rest = np.setdiff1d(np.arange(len(indices)), np.concatenate(drawn) if drawn else [])
        processes = self._split(tokens, padded, rest)
        if small:
            processes = [[*first, *process] for first, process in zip(small, processes, strict=True)]
        total = int(tokens.sum())
        return Split(
            indices=indices,
            processes=[[indices[positions] for positions in process] for process in processes],
            epoch=epoch,
            window=window,
            tokens=total,
            padded_tokens=total
            if self.padding_free or self.pad_to == "nothing"
            else sum(padded_size(padded[positions]) for process in processes for positions in process),
            pad_to=pad_to,
            noise_micro_batches=len(small[0]) if small else 0,
        )

    def _split(self, tokens: np.ndarray, padded: np.ndarray, positions: np.ndarray) -> list[list[np.ndarray]]:
        """Split these positions of a window: for each process, the positions in each micro-batch."""
        settings = self.bound, self.num_processes, self.cost
        if self.padding_free:
            processes = split_without_padding(tokens[positions], *settings)
        else:
            processes = split_window(bounding_lengths(padded[positions]), *settings, self.pad_to == "nothing")
        return [[positions[part] for part in process] for process in processes]

    def _random_examples(self, tokens: np.ndarray) -> int:
        """Return the number of random examples in the first micro-batches of a window without padding, or 0.

        The window is split into these examples and the rest. The number leaves both parts the same room to
        spare. It follows from the sum of the shares, as a choice by the draw would be biased. With several
        processes, each gets about the same tokens, and therefore no random sample.
        """
        number = len(tokens)
        if not self.padding_free or self.num_processes > 1 or number < 2:
            return 0
        share = float(self.bound.shares(tokens).sum())
        parts, first = math.ceil(share - SHARE_ROUNDING), math.ceil(NOISE_MIN_EXAMPLES * share / number)
        spare = (parts - share) / 2
        size = min(max(1, round(number * (first - spare) / share)), number // 2)
        return size if parts > first else 0

    def _noise_micro_batches(
        self, tokens: np.ndarray, padded: np.ndarray, epoch: int, window: int
    ) -> list[list[np.ndarray]]:
        """Draw the positions of the first micro-batches of each process at random; [] for too small a window.

        The number of examples does not depend on the draw, as a choice by length would be biased. Where it is
        not of `_random_examples`, it is small, and fits the bound for any examples.
        """
        random = np.random.default_rng([self.plan.seed, epoch, window, WINDOW_STREAM])
        if size := self._random_examples(tokens):
            return self._split(tokens, padded, np.sort(random.permutation(len(tokens))[:size]))
        size = max(NOISE_MIN_EXAMPLES, len(padded) // NOISE_WINDOW_PART)
        size = max(1, size // self.num_processes)
        size = min(size, len(padded) // 2 // self.num_processes)
        longest = padded.max(0, initial=0)
        size = min(size, self.bound.max_rows(longest))
        while self.pad_to == "nothing" and size > 1 and self.bound.exceeded_by(size * longest):
            size //= 2
        if size < 1:
            return []
        drawn = random.permutation(len(padded))[: size * self.num_processes]
        return [[part] for part in np.split(drawn, self.num_processes)]

    def padded(self, tokens: np.ndarray) -> np.ndarray:
        """Return tokens (examples, columns) rounded up to the padded length of an example alone."""
        return padded_alone(tokens, self.pad_to_multiple_of, self.columns_padded_together)

    def too_large(self, tokens: np.ndarray, first: int = 0) -> str | None:
        """Return a line with the number of examples that alone exceed the bound; None if there are none.

        Args:
            tokens: Tokens of the examples, (examples, columns).
            first: Index of the first of these examples.

        Raises:
            ValueError: An example is longer than `pad_to`.
        """
        padded = self.padded(tokens)
        if isinstance(self.pad_to, int):
            if (longest := tokens.max()) > self.pad_to:
                raise ValueError(
                    f"example {first + int(tokens.max(1).argmax())} has {longest} tokens, more than "
                    f"pad_to={self.pad_to}: truncate the example, or raise pad_to"
                )
            padded = np.full_like(padded, self.pad_to)
        longest = int(padded.sum(1, dtype=np.int32).argmax())
        if not self.bound.exceeded_by(padded[longest]):
            return None
        different, counts = np.unique(padded, return_counts=True, axis=0)
        count = sum(n for n, each in zip(counts, different, strict=True) if self.bound.exceeded_by(each))
        return (
            f"{count} of {len(padded)} examples exceed {self.bound} (the longest, example {first + longest}, "
            f"has {self.bound.needs(1, padded[longest].tolist())}): each runs alone in a micro-batch that "
            "exceeds the bound"
        )

    def shape(self, indices: np.ndarray, pad_to: int | None) -> tuple[int, list[int]]:
        """Return the rows of a micro-batch of these examples, and the padded tokens of each column.

        Without padding, the tokens are the mean of the examples.
        """
        tokens = self.padded(self.tokens[indices])
        if self.pad_to == "nothing":
            return 1, tokens.sum(0).tolist()
        if self.padding_free:
            return len(tokens), np.ceil(self.tokens[indices].mean(0)).astype(int).tolist()
        return len(tokens), (tokens if pad_to is None else np.full_like(tokens, pad_to)).max(
            0, initial=0
        ).tolist()

    def half_bytes(self, indices: np.ndarray) -> int:
        """Return the predicted bytes of half of a micro-batch without padding; 0 where none are predicted."""
        if not self.padding_free or self.bound.memory is None:
            return 0
        by_length = indices[np.argsort(-self.tokens[indices].sum(1), kind="stable")]
        return self.bound.memory.bytes_without_padding(self.tokens[by_length[::2]])

    def most_expensive(self, split: Split) -> tuple[float, ...]:
        """Return the predicted cost of the most expensive micro-batch of each process."""
        return tuple(
            max((self._cost(indices, split.pad_to) for indices in process), default=0.0)
            for process in split.processes
        )

    def total_cost(self, split: Split) -> float:
        """Return the predicted cost of the process with the highest cost."""
        return max(
            sum(self._cost(indices, split.pad_to) for indices in process) for process in split.processes
        )

    def _cost(self, indices: np.ndarray, pad_to: int | None) -> float:
        if self.padding_free:
            alone = self.cost(1, self.tokens[indices].sum(1)) - self.cost.fixed
            return float(self.cost.fixed + alone.sum())
        rows, lengths = self.shape(indices, pad_to)
        return float(self.cost(rows, sum(lengths)))

    def examples(self, indices: np.ndarray, epoch: int) -> list[Any]:
        """Return the examples of this epoch. `transform` draws from (seed, epoch, index)."""
        examples = self.read(indices)
        if self.transform is None:
            return examples
        numbers = ([self.plan.seed, epoch, index, EXAMPLE_STREAM] for index in indices.tolist())
        found = []
        for index, example, seed in zip(indices.tolist(), examples, numbers, strict=True):
            with name_example(index):
                found.append(self.transform(example, np.random.default_rng(seed)))
        return found

    def read(self, indices: np.ndarray) -> list[Any]:
        """Return examples as the data set has them. Raise InputError with the index if one cannot be read."""
        if fetch := getattr(self.dataset, "__getitems__", None):  # faster for a datasets.Dataset
            try:
                return fetch(indices.tolist())
            except Exception:  # read one by one below, to name the example
                if not hasattr(self.dataset, "__getitem__"):
                    raise
        found = []
        for index in indices.tolist():
            with name_example(index):
                found.append(self.dataset[index])
        return found

    def collate(self, indices: np.ndarray, epoch: int, pad_to: int | None, counts: bool = True) -> MicroBatch:
        """Collate examples into one micro-batch. Without `counts`, it is idle and has no items."""
        examples = self.examples(indices, epoch)
        try:
            batch = self.collate_fn(examples) if pad_to is None else self.collate_fn(examples, pad_to=pad_to)
        except RuntimeError as error:
            if self.collate_fn is not default_collate:
                raise
            raise ValueError(
                "examples of unequal length cannot be stacked: pass a collate_fn= that pads"
            ) from error
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"collate_fn returned a {type(batch).__name__}; it must return a mapping for model(**batch), "
                'such as {"input_ids": …, "labels": …}: pass a collate_fn= that makes one'
            )
        width = batch["input_ids"].shape[-1] if pad_to and "input_ids" in batch else pad_to or 0
        if width < (pad_to or 0):
            raise ValueError(
                f"collate_fn got pad_to={pad_to}, but padded to {width} tokens: it must pad to pad_to"
            )
        each = self.count_items.each(batch) if isinstance(self.count_items, CountSeveral) else {}
        num_items = (sum(each.values()) if each else float(self.count_items(batch))) if counts else 0.0
        by_example = self._items_of_examples(batch, indices) if counts and not each else None
        if self.weights is not None and by_example is not None:
            num_items = float(by_example.items.sum())
        if not 0 <= num_items < float("inf"):
            raise ValueError(
                f"num_items returned {num_items} for examples {indices.tolist()}; "
                "it must be 0 or more, and finite"
            )
        layouts = layouts_of(batch, self.layout_cost) if self.padding_free or self.pad_to == "nothing" else {}
        return MicroBatch(batch, indices if counts else indices[:0], num_items, each, layouts, by_example)

    def _items_of_examples(self, batch: Mapping[str, Any], indices: np.ndarray) -> ExampleItems | None:
        """Return the items of each example; None without weights and sources."""
        if self.weights is None and self.sources is None:
            return None
        weights = np.ones(len(indices)) if self.weights is None else self.weights[indices]
        sources = np.zeros(len(indices), np.int32)
        if self.sources is not None:
            sources = self.sources.of_examples[indices]
        lengths = self.tokens[indices].sum(1) if self.pad_to == "nothing" else None
        return ExampleItems.of(batch, self.count_items, weights, sources, lengths)

    def find_example_with_items(self, split: Split) -> MicroBatch | None:
        """Return the shortest example of the window that has items when collated alone."""
        for index in split.indices[np.argsort(self.tokens[split.indices].sum(1), kind="stable")]:
            micro_batch = self.collate(np.array([index]), split.epoch, split.pad_to)
            if micro_batch.num_items:
                return micro_batch
        return None

    def idle(self, split: Split) -> MicroBatch:
        """Return the micro-batch with weight 0 that a process without work runs: an example with items."""
        for _ in range(10):  # a collate function that masks at random may leave an example without items
            if found := self.find_example_with_items(split):
                return replace(found, indices=found.indices[:0], num_items=0.0)
        raise ValueError(
            "a micro-batch has items, but its examples alone have none: num_items must be a sum over examples"
        )
