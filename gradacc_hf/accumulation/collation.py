"""Collate a window: (epoch, window) → this process's micro-batches on the host.

Takes the windows (`sampler.py`), the data set with its lengths, the bound and the item count. Runs in worker
processes where the loader has some. `window.py` puts micro-batches on the device and weighs their losses.
"""

import pickle
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import Dataset, default_collate, get_worker_info

from gradacc_hf.accumulation.loss_items import CountItems
from gradacc_hf.accumulation.sampler import WindowPlan
from gradacc_hf.accumulation.splitting import (
    Bound,
    Cost,
    bounding_lengths,
    padded_size,
    rounded_up,
    split_window,
)
from gradacc_hf.accumulation.streaming import Held, Stream

PadTo = Literal["micro_batch", "window", "nothing"] | int
Lengths = str | Sequence[int] | np.ndarray | Callable[[Any], int] | None
Transform = Callable[[Any, np.random.Generator], Any]
EXAMPLE_STREAM, WINDOW_STREAM = 1, 2  # keep random numbers apart from the order's, drawn from (seed, epoch)
NOISE_WINDOW_PART, NOISE_MIN_EXAMPLES = 8, 4  # size of what noise is measured by: 1/8 of a window, at least 4


@dataclass(frozen=True)
class MicroBatch:
    """What one process runs forward and backward at once.

    `batch`: what the collate function returned. `indices`: dataset indices; empty for an idle micro-batch,
    which is run at weight 0 because other processes wait. `num_items`: terms of its mean loss.
    """

    batch: Mapping[str, Any]
    indices: np.ndarray
    num_items: float

    def on_device(self, accelerator: Accelerator) -> "MicroBatch":
        """Return a copy with its batch on the accelerator's device."""
        return replace(self, batch=to_device(self.batch, accelerator))


def to_device(batch: Mapping[str, Any], accelerator: Accelerator) -> Any:
    """Return a host batch as a plain dict on the accelerator's device."""
    return send_to_device(dict(batch), accelerator.device, non_blocking=accelerator.device.type == "cuda")


@dataclass(frozen=True)
class Split:
    """The split of one window over all processes, planned from lengths.

    `indices`: the window's examples. `processes`: for each process the example indices of each micro-batch.
    `tokens`, `padded_tokens`: over all processes. `pad_to`: tokens that collating pads to; None for the
    longest example. `measures_noise`: the first micro-batches of all processes are of one size, drawn at
    random.
    """

    indices: np.ndarray
    processes: list[list[np.ndarray]]
    epoch: int
    window: int
    tokens: int
    padded_tokens: int
    pad_to: int | None
    measures_noise: bool = False


@dataclass(frozen=True)
class LocalSplit:
    """The part of one process in a window's split, collated, with the numbers that all processes agree on.

    `plan`: the split over all processes. `micro_batches`: those of this process that have items. `num_items`:
    items of the window over all processes. `accumulation_steps`: micro-batches of the process that has most.
    `costs`: predicted cost of the most expensive micro-batch of each process. `bound`: what the window was
    split under. `noise_size`: examples of the first micro-batch, where it measures the noise scale; else 0.
    `ends_idle`: whether the last micro-batch is idle and only synchronises gradients.
    """

    plan: Split
    micro_batches: tuple[MicroBatch, ...]
    num_items: float
    accumulation_steps: int
    costs: tuple[float, ...]
    bound: Bound
    noise_size: int = 0
    ends_idle: bool = False

    def with_idle_end(self, idle: MicroBatch) -> "LocalSplit":
        """Return this split with an idle micro-batch at its end."""
        return replace(self, micro_batches=(*self.micro_batches, idle), ends_idle=True)


@dataclass
class LocalWindows(Dataset):
    """(epoch, window) → the split and this process's micro-batches, collated. Runs in worker processes.

    The one owner of what windows are split by: `bound`, `cost`, `plan` and `pad_to`. `revision` counts the
    changes of `bound` and `plan`, after which windows that workers hold ready are out of date.
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
    leave_out: Collection[int] = ()
    noise_every: int = 0
    revision: int = 0

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
        local = split, self.collate_split(split)
        # By value: tensors in shared memory cost a file descriptor each, and a window may hold thousands.
        return local if get_worker_info() is None else pickle.dumps(local)

    def collate_split(self, split: Split) -> list[MicroBatch]:
        """Collate this process's micro-batches of a split."""
        own = split.processes[self.process]
        return [self.collate(indices, split.epoch, split.pad_to) for indices in own]

    @cached_property
    def lengths(self) -> Any:
        """Tokens of each example, summed over columns; a view where there is one column."""
        if not isinstance(self.tokens, np.ndarray):
            return self.tokens.sum(1)
        return self.tokens[:, 0] if self.tokens.shape[1] == 1 else self.tokens.sum(1, dtype=np.int32)

    def apart(self, epoch: int, window: int) -> "LocalWindows":
        """Return windows that can be walked from there without moving these; a stream gets its own reader."""
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
        padded, pad_to, packed = self.padded(tokens), None, self.pad_to == "nothing"
        if self.pad_to not in ("micro_batch", "nothing"):
            pad_to = int(tokens.max(initial=0)) if self.pad_to == "window" else self.pad_to
            padded = np.full_like(tokens, pad_to)
        small = self._noise_micro_batches(padded, epoch, window) if measures_noise else []
        rest = np.setdiff1d(np.arange(len(indices)), np.concatenate(small) if small else [])
        lengths = bounding_lengths(padded[rest])
        processes = split_window(lengths, self.bound, self.num_processes, self.cost, packed)
        processes = [[rest[positions] for positions in process] for process in processes]
        if small:
            processes = [[first, *process] for first, process in zip(small, processes, strict=True)]
        total = int(tokens.sum())
        return Split(
            indices=indices,
            processes=[[indices[positions] for positions in process] for process in processes],
            epoch=epoch,
            window=window,
            tokens=total,
            padded_tokens=total
            if packed
            else sum(padded_size(padded[positions]) for process in processes for positions in process),
            pad_to=pad_to,
            measures_noise=bool(small),
        )

    def _noise_micro_batches(self, padded: np.ndarray, epoch: int, window: int) -> list[np.ndarray]:
        """Draw for each process the positions of a micro-batch at random; [] where the window is too small.

        All have one size, which fits the bound whichever examples are drawn. A choice by length is biased.
        """
        size = max(NOISE_MIN_EXAMPLES, len(padded) // NOISE_WINDOW_PART)
        size = max(1, size // self.num_processes)
        size = min(size, len(padded) // 2 // self.num_processes)
        longest = padded.max(0, initial=0)
        size = min(size, self.bound.max_rows(longest))
        while self.pad_to == "nothing" and size > 1 and self.bound.exceeded_by(size * longest):
            size //= 2
        if size < 1:
            return []
        random = np.random.default_rng([self.plan.seed, epoch, window, WINDOW_STREAM])
        return np.split(random.permutation(len(padded))[: size * self.num_processes], self.num_processes)

    def padded(self, tokens: np.ndarray) -> np.ndarray:
        """Return tokens (examples, columns) rounded up to what an example alone is padded to."""
        return tokens if self.pad_to_multiple_of == 1 else rounded_up(tokens, self.pad_to_multiple_of)

    def too_large(self, tokens: np.ndarray, first: int = 0) -> str | None:
        """Return a line that counts the examples which exceed the bound alone; None where there are none.

        `first`: index of the first of these examples. Raises ValueError for an example longer than `pad_to`.
        """
        padded = self.padded(tokens)
        if isinstance(self.pad_to, int):
            if (longest := tokens.max()) > self.pad_to:
                raise ValueError(
                    f"example {first + int(tokens.max(1).argmax())} has {longest} tokens, more than "
                    f"pad_to={self.pad_to}: truncate it, or raise that"
                )
            padded = np.full_like(padded, self.pad_to)
        longest = int(padded.sum(1, dtype=np.int32).argmax())
        if not self.bound.exceeded_by(padded[longest]):
            return None
        different, counts = np.unique(padded, return_counts=True, axis=0)
        count = sum(n for n, each in zip(counts, different, strict=True) if self.bound.exceeded_by(each))
        return (
            f"{count} of {len(padded)} examples exceed {self.bound} (the longest has "
            f"{self.bound.needs(1, padded[longest].tolist())}: example {first + longest}): each goes alone "
            "in a micro-batch that exceeds it"
        )

    def shape(self, indices: np.ndarray, pad_to: int | None) -> tuple[int, list[int]]:
        """Return the rows of a micro-batch of these examples, and the padded tokens of each column."""
        tokens = self.padded(self.tokens[indices])
        if self.pad_to == "nothing":
            return 1, tokens.sum(0).tolist()
        return len(tokens), (tokens if pad_to is None else np.full_like(tokens, pad_to)).max(
            0, initial=0
        ).tolist()

    def most_expensive(self, split: Split) -> tuple[float, ...]:
        """Return the predicted cost of the most expensive micro-batch of each process."""
        return tuple(
            max((self._cost(indices, split.pad_to) for indices in process), default=0.0)
            for process in split.processes
        )

    def _cost(self, indices: np.ndarray, pad_to: int | None) -> float:
        rows, lengths = self.shape(indices, pad_to)
        return float(self.cost(rows, sum(lengths)))

    def examples(self, indices: np.ndarray, epoch: int) -> list[Any]:
        """Return examples as this epoch has them: `transform` draws from (seed, epoch, index)."""
        fetch = getattr(self.dataset, "__getitems__", None)  # one call for a datasets.Dataset
        examples = fetch(indices.tolist()) if fetch else [self.dataset[index] for index in indices.tolist()]
        if self.transform is None:
            return examples
        numbers = ([self.plan.seed, epoch, index, EXAMPLE_STREAM] for index in indices.tolist())
        return [
            self.transform(example, np.random.default_rng(seed))
            for example, seed in zip(examples, numbers, strict=True)
        ]

    def collate(self, indices: np.ndarray, epoch: int, pad_to: int | None, counts: bool = True) -> MicroBatch:
        """Collate examples into one micro-batch; an idle one without items, unless `counts`."""
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
                f"collate_fn gave a {type(batch).__name__}; it must give a mapping for model(**batch)"
            )
        width = batch["input_ids"].shape[-1] if pad_to and "input_ids" in batch else pad_to or 0
        if width < (pad_to or 0):
            raise ValueError(
                f"collate_fn was told pad_to={pad_to} and padded to {width} tokens: it must pad to that"
            )
        num_items = float(self.count_items(batch)) if counts else 0.0
        if not 0 <= num_items < float("inf"):
            raise ValueError(
                f"num_items gave {num_items} for examples {indices.tolist()}; "
                "it must be 0 or more, and finite"
            )
        return MicroBatch(batch, indices if counts else indices[:0], num_items)

    def find_example_with_items(self, split: Split, longest: bool = False) -> MicroBatch | None:
        """Return the shortest (or longest) example of the window that has items when collated alone."""
        by_length = np.argsort(self.tokens[split.indices].sum(1), kind="stable")
        for index in split.indices[by_length[::-1] if longest else by_length]:
            micro_batch = self.collate(np.array([index]), split.epoch, split.pad_to)
            if micro_batch.num_items:
                return micro_batch
        return None

    def idle(self, split: Split) -> MicroBatch:
        """Return what a process without work runs at weight 0 as others wait: an example with items."""
        for _ in range(10):  # a collate function that masks at random may leave an example none
            if found := self.find_example_with_items(split):
                return MicroBatch(found.batch, found.indices[:0], 0.0)
        raise ValueError(
            "a micro-batch has items but none of its examples alone: num_items must be a sum over examples"
        )


def measure_lengths(dataset: Any, lengths: Lengths) -> np.ndarray:
    """Measure the tokens of every example.

    Args:
        dataset: A sequence of examples.
        lengths: A column's name, a sequence of numbers, (examples, columns) for inputs that are padded on
            their own, or a function of an example. None for the size of `input_ids`, or else 1 each. Nested
            `input_ids` (choices) count as rows × the longest row.

    Returns:
        Tokens, int32 (examples, columns).
    """
    # Not `for example in dataset`: a torch data set without __iter__ may raise no IndexError at its end.
    examples = dataset if hasattr(dataset, "__iter__") else (dataset[i] for i in range(len(dataset)))
    if isinstance(lengths, str) and hasattr(dataset, "select_columns"):
        measured = dataset.select_columns(lengths)[lengths][:]
    elif isinstance(lengths, str):
        measured = [example[lengths] for example in examples]
    elif callable(lengths):
        measured = [lengths(example) for example in examples]
    elif lengths is not None:
        measured = lengths
    elif hasattr(dataset, "with_format") and "input_ids" in getattr(dataset, "column_names", ()):
        tables = dataset.select_columns("input_ids").with_format("arrow").iter(100_000)
        measured = np.concatenate([_column_lengths(table["input_ids"]) for table in tables])
    elif isinstance(dataset[0], Mapping) and "input_ids" in dataset[0]:
        measured = [_padded_size(example["input_ids"]) for example in examples]
    else:
        measured = np.ones(len(dataset))
    array = np.asarray(measured)
    if array.ndim not in (1, 2) or len(array) != len(dataset) or not array.size:
        raise ValueError(
            f"lengths has the shape {array.shape}; the data set has {len(dataset)} examples: a number each, "
            "or one for each of its inputs that are padded on their own"
        )
    if not np.issubdtype(array.dtype, np.number) or not (np.isfinite(array) & (array >= 0)).all():
        raise ValueError(
            f"lengths must be numbers of tokens, 0 or more; found {array.dtype}: {array[:3].tolist()} …"
        )
    return array.astype(np.int32).reshape(len(dataset), -1)


def _column_lengths(column: Any) -> np.ndarray:
    import pyarrow as pa  # late: datasets brings it, and only its columns need it
    import pyarrow.compute

    if pa.types.is_nested(column.type.value_type):
        return np.array([_padded_size(row) for row in column.to_pylist()])
    return np.asarray(pyarrow.compute.list_value_length(column))  # type: ignore[attr-defined]


def _padded_size(ids: Any) -> int:
    """Return the tokens of one example: its length, or for nested rows (choices) rows × the longest."""
    if isinstance(ids, torch.Tensor):
        return ids.numel()
    nested = len(ids) > 0 and np.ndim(ids[0]) > 0
    return len(ids) * max(len(row) for row in ids) if nested else len(ids)
