"""Which examples make window t, and the loader that hands a window out in micro-batches.

`WindowPlan` is numbers only: (number of examples, seed, epoch, window) → example indices. `WindowLoader` adds the data
set, the split (`split.py`) and the item counts (`items.py`), and gives one `Window` per optimizer step. A `Window` gives
this process's micro-batches and weighs their losses, so that the accumulated gradient is that of the whole window.
"""

import inspect
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, send_to_device
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from gradacc_hf import items
from gradacc_hf.split import Bound, Cost, split_window

logger = get_logger(__name__)

EffectiveBatchSize = int | Callable[[int], int]
PadTo = Literal["micro_batch", "window"] | int


class WindowPlan:
    """The windows of every epoch, as example indices: a function of its arguments alone, never of the hardware.

    The order of epoch e is a permutation drawn from (seed, e); window t is a slice of it. `effective_batch_size` is a
    number, or a function of the window's number counted over the whole run. Memory: one permutation (4 bytes an example).
    """

    def __init__(self, num_examples: int, effective_batch_size: EffectiveBatchSize, seed: int, shuffle: bool, drop_last: bool):
        self.num_examples, self.effective_batch_size = num_examples, effective_batch_size
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self._orders: dict[int, np.ndarray] = {}  # the epoch at hand only
        self._all_starts: dict[int, Sequence[int]] = {}

    def num_windows(self, epoch: int) -> int:
        """Windows in this epoch; a partial last one counts unless `drop_last`."""
        return len(self._starts(epoch))

    def size(self, epoch: int, window: int) -> int:
        """Examples in this window."""
        return len(self.indices(epoch, window))

    def dropped(self, epoch: int) -> int:
        """Examples that `drop_last` leaves out of this epoch."""
        if not self.drop_last or not self._starts(epoch):
            return self.num_examples if self.drop_last else 0
        last = self.num_windows(epoch) - 1
        return self.num_examples - self._starts(epoch)[last] - self.size(epoch, last)

    def indices(self, epoch: int, window: int) -> np.ndarray:
        """Example indices of this window, over all processes."""
        start = self._starts(epoch)[window]
        stop = min(start + self._size_asked(self._first_number(epoch) + window), self.num_examples)
        return self._order(epoch)[start:stop].astype(np.int64)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            order = np.arange(self.num_examples, dtype=np.int32 if self.num_examples < 2**31 else np.int64)
            if self.shuffle:
                np.random.default_rng([self.seed, epoch]).shuffle(order)
            self._orders = {epoch: order}
        return self._orders[epoch]

    def _starts(self, epoch: int) -> Sequence[int]:
        if epoch not in self._all_starts:
            self._all_starts[epoch] = self._find_starts(epoch)
        return self._all_starts[epoch]

    def _find_starts(self, epoch: int) -> Sequence[int]:
        if not callable(self.effective_batch_size):
            whole = self.num_examples - self.num_examples % self.effective_batch_size
            return range(0, whole if self.drop_last else self.num_examples, self.effective_batch_size)
        starts, start, number = [], 0, self._first_number(epoch)
        while start < self.num_examples:
            size = self._size_asked(number + len(starts))
            if self.drop_last and start + size > self.num_examples:
                break
            starts.append(start)
            start += size
        return starts

    def _first_number(self, epoch: int) -> int:
        """The number, over the whole run, of this epoch's first window."""
        return sum(self.num_windows(earlier) for earlier in range(epoch))

    def _size_asked(self, number: int) -> int:
        if not callable(self.effective_batch_size):
            return self.effective_batch_size
        size = self.effective_batch_size(number)
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"effective_batch_size({number}) gave {size!r}; it must give an integer of at least 1")
        return int(size)


@dataclass(frozen=True)
class MicroBatch:
    """What one process runs forward and backward at once, on the host.

    `indices` are its examples; empty for an example that is run again only because the other processes wait for this one.
    """

    batch: Mapping[str, Any]
    indices: np.ndarray
    num_items: float


@dataclass(frozen=True)
class Split:
    """One window's split: its examples, and for every process the indices of each micro-batch, with planned sizes.

    `tokens` and `padded_tokens` are over all processes; `pad_to` is what collating must pad to, None for the longest.
    """

    indices: np.ndarray
    processes: list[list[np.ndarray]]
    tokens: int
    padded_tokens: int
    pad_to: int | None


class Window:
    """One optimizer step: iterate it for this process's micro-batches, and `weigh` each loss before its backward.

    `indices`: the examples, over all processes. `num_items`: the items, over all processes. `tokens`, `padded_tokens`:
    planned, over all processes. `accumulation_steps`: micro-batches of the process that has most. `loss`: after the last
    micro-batch. Held on the host, it can be iterated again; one micro-batch at a time is put on the device.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        split: Split,
        micro_batches: list[MicroBatch],
        num_items: float,
        epoch: int,
        number: int,
        accumulation_steps: int,
    ):
        self.indices, self.tokens, self.padded_tokens = split.indices, split.tokens, split.padded_tokens
        self.num_items, self.epoch, self.number, self.accumulation_steps = num_items, epoch, number, accumulation_steps
        self._accelerator, self._micro_batches = accelerator, micro_batches
        self._current: int | None = None  # the micro-batch handed out last
        self._weighed: set[int] = set()
        self._loss: Any = None

    def __len__(self) -> int:
        """This process's accumulation steps in this window."""
        return len(self._micro_batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        accelerator = self._accelerator
        accelerator.gradient_accumulation_steps = len(self)
        accelerator.step = 0
        # Breaking out of a prepared (evaluation) loader on its last batch leaves its end set, and every accumulate()
        # after that would synchronise; the window alone says where it ends.
        accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
        self._loss, self._weighed, self._loss_here = None, set(), 0.0
        for self._current, micro_batch in enumerate(self._micro_batches):
            yield _to_device(micro_batch.batch, accelerator)
        self._current = None
        if len(self._weighed) == len(self):
            self._loss = self._loss_here
            if accelerator.num_processes > 1:
                self._loss = accelerator.reduce(self._loss, reduction="sum")

    def weigh(self, loss: torch.Tensor) -> torch.Tensor:
        """From the micro-batch's mean loss, a scalar, what `accelerator.backward` must be given, in float32 or finer.

        × the share of the window's items that the last micro-batch holds; × accumulation steps and × processes, because
        `accelerator.backward` divides by the one and DDP's or FSDP's mean over processes by the other.
        """
        if self._current is None:
            raise RuntimeError("weigh() weighs the micro-batch handed out last: call it inside `for batch in window`")
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(f"weigh() takes the micro-batch's mean loss, a scalar tensor; found {found}")
        loss = loss.reshape(()) if loss.dtype == torch.float64 else loss.reshape(()).float()
        share = self._micro_batches[self._current].num_items / self.num_items
        self._loss_here = self._loss_here + loss.detach() * share
        self._weighed.add(self._current)
        return loss * (share * self._accelerator.gradient_accumulation_steps * self._accelerator.num_processes)

    @property
    def loss(self) -> float:
        """The exact mean over the window's items, over all processes; known once its last micro-batch has been weighed."""
        if self._loss is None:
            raise RuntimeError("window.loss is known after the last micro-batch, if each one's loss went through weigh()")
        return float(self._loss)


class WindowLoader:
    """Hands out windows: `for window in loader: for batch in window: …`. One pass is one epoch.

    Args:
        dataset: a `datasets.Dataset` or any sequence of examples.
        effective_batch_size: examples per optimizer step over all processes; or a function of the window's number.
        collate_fn: examples → mapping of tensors; `collate_fn(examples, pad_to=n)` where `pad_to` is used.
        accelerator: the run's Accelerator; not DeepSpeed or Megatron-LM, which have accumulation of their own.
        max_tokens: padded tokens per micro-batch; or `micro_batch_size`: examples per micro-batch. Bounds, not targets:
            the cut is where the predicted cost is least under them.
        num_items: "labels", "next_token" or `batch -> number`: the terms of the mean that the loss is (`items.py`).
        lengths: tokens of each example: a column's name, a sequence, or a function of an example; by default those of
            `input_ids` where there is one, else all equal.
        pad_to: "micro_batch" pads each to its own longest; "window" pads all micro-batches of a window alike; a number
            pads to so many tokens. For models whose loss padding reaches (question answering), only the last two are exact.
        shuffle, seed: the order of epoch e is drawn from (seed, e); without shuffling it is the data set's.
        drop_last: leave out a partial last window.
        num_workers: processes that collate beside training.
        cost: what a micro-batch is predicted to cost.

    `state_dict()` / `load_state_dict()`: seed, epoch and window; inside the loop's body, the window at hand counts as done.
    `empty_micro_batches` and `empty_windows` count what had no item and was not handed out (this process; all).
    Raises ValueError, in one line, for arguments that cannot work.
    """

    def __init__(
        self,
        dataset: Sequence[Any] | Any,
        effective_batch_size: EffectiveBatchSize,
        *,
        accelerator: Accelerator,
        collate_fn: Callable[..., Mapping[str, Any]] = default_collate,
        max_tokens: int | None = None,
        micro_batch_size: int | None = None,
        num_items: str | items.CountItems = "labels",
        lengths: str | Sequence[int] | np.ndarray | Callable[[Any], int] | None = None,
        pad_to: PadTo = "micro_batch",
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        cost: Cost = Cost(),
    ):
        _refuse(accelerator)
        _check_arguments(dataset, effective_batch_size, collate_fn, pad_to)
        self.accelerator, self.num_workers = accelerator, num_workers
        self.seed, self.epoch, self.window = seed, 0, 0
        self.empty_micro_batches = self.empty_windows = 0
        self.plan = WindowPlan(len(dataset), effective_batch_size, seed, shuffle, drop_last)
        bound = Bound(max_tokens, micro_batch_size)
        self._windows = _LocalWindows(
            dataset=dataset,
            collate_fn=collate_fn,
            count_items=items.resolve(num_items),
            lengths=measure_lengths(dataset, lengths),
            pad_to=pad_to,
            bound=bound,
            cost=cost,
            plan=self.plan,
            num_processes=accelerator.num_processes,
            process=accelerator.process_index,
        )
        self._started = False
        self._say_what_does_not_fit(bound, pad_to)
        if self.plan.dropped(0):
            logger.warning(f"drop_last: {self.plan.dropped(0)} of {len(dataset)} examples are left out of the first epoch")

    def __len__(self) -> int:
        """Windows in the epoch at hand."""
        return self.plan.num_windows(self.epoch)

    def split(self, epoch: int, window: int) -> Split:
        """How this window will be cut: a plan from lengths alone; nothing is read or collated."""
        return self._windows.split(epoch, window)

    def __iter__(self) -> Iterator[Window]:
        if self._started:
            self.epoch, self.window = self.epoch + 1, 0
        self._started = True
        for split, micro_batches in self._local_windows(self.epoch, self.window):
            self.window += 1
            window = self._window(split, micro_batches)
            if window is not None:
                _name_prepared_schedulers(self.accelerator)
                yield window

    def micro_batches(self) -> Iterator[tuple[MicroBatch, dict[str, Any]]]:
        """This process's micro-batches of one pass over the data, items or not, each with its batch on the device.

        For evaluation: it leaves the accelerator's accumulation state and this loader's place alone. Every process gets
        equally many where forwards are collective (FSDP).
        """
        for split, micro_batches in self._local_windows(epoch=0, start=0):
            most = max(len(process) for process in split.processes) if _forwards_are_collective(self.accelerator) else 0
            while len(micro_batches) < most:
                micro_batches.append(self._windows.collate(split.indices[:1], split.pad_to, counts=False))
            for micro_batch in micro_batches:
                yield micro_batch, _to_device(micro_batch.batch, self.accelerator)

    def probe_batch(self) -> dict[str, Any]:
        """One short example that has items, on the device: to try the model on."""
        for window in range(self.plan.num_windows(0)):
            try:
                return _to_device(self._windows.example_with_items(self.split(0, window)).batch, self.accelerator)
            except ValueError:
                continue
        raise ValueError("no example of the data set has an item: every label is ignored")

    def state_dict(self) -> dict[str, int]:
        """Where the run stands, as plain numbers: the next window to run is (epoch, window)."""
        done = self.window >= self.plan.num_windows(self.epoch)
        epoch, window = (self.epoch + 1, 0) if done else (self.epoch, self.window)
        return {"seed": self.seed, "epoch": epoch, "window": window}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to where `state_dict` was taken; the next pass runs the rest of that epoch."""
        self.seed = state["seed"]
        self.plan = self._windows.plan = WindowPlan(
            self.plan.num_examples, self.plan.effective_batch_size, self.seed, self.plan.shuffle, self.plan.drop_last
        )
        self.epoch, self.window, self._started = state["epoch"], state["window"], False

    def _local_windows(self, epoch: int, start: int) -> Iterator[tuple[Split, list[MicroBatch]]]:
        numbers = [(epoch, window) for window in range(start, self.plan.num_windows(epoch))]
        loader = DataLoader(
            self._windows,
            sampler=numbers,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_identity,
            generator=torch.Generator().manual_seed(self.seed),  # else an iterator draws from the generator of dropout
        )
        for local in loader:
            split, micro_batches = pickle.loads(local) if isinstance(local, bytes) else local
            if self.accelerator.device.type == "cuda":
                micro_batches = [_pinned(micro_batch) for micro_batch in micro_batches]
            yield split, micro_batches

    def _window(self, split: Split, micro_batches: list[MicroBatch]) -> Window | None:
        """Count the window's items over all processes, and see that every process has something to run."""
        with_items = [micro_batch for micro_batch in micro_batches if micro_batch.num_items]
        counts = self._gather([sum(m.num_items for m in with_items), len(with_items)])
        num_items, most = counts[:, 0].sum(), int(counts[:, 1].max())
        self._count_empty(len(micro_batches) - len(with_items), num_items == 0)
        if num_items == 0:
            return None
        fewest = most if _forwards_are_collective(self.accelerator) else 1
        if len(with_items) < fewest:
            with_items += [self._windows.example_with_items(split)] * (fewest - len(with_items))
        return Window(self.accelerator, split, with_items, float(num_items), self.epoch, self.window - 1, max(most, 1))

    def _gather(self, numbers: list[float]) -> np.ndarray:
        """The one exchange a window: this process's numbers → (processes, numbers)."""
        if self.accelerator.num_processes == 1:
            return np.array([numbers], dtype=np.float64)
        return self.accelerator.gather(
            torch.tensor([numbers], dtype=torch.float64, device=self.accelerator.device)
        ).cpu().numpy()  # fmt: skip

    def _count_empty(self, empty_micro_batches: int, window_is_empty: bool) -> None:
        if empty_micro_batches and not self.empty_micro_batches:
            logger.warning("some micro-batches hold no item (every label is ignored): they are not trained on, only counted")
        if window_is_empty and not self.empty_windows:
            logger.warning(f"window {self.window - 1} of epoch {self.epoch} holds no item: skipped; more of them are counted")
        self.empty_micro_batches += empty_micro_batches
        self.empty_windows += int(window_is_empty)

    def _say_what_does_not_fit(self, bound: Bound, pad_to: PadTo) -> None:
        longest = int(self._windows.lengths.max())
        if isinstance(pad_to, int) and longest > pad_to:
            where = int(self._windows.lengths.argmax())
            raise ValueError(f"example {where} has {longest} tokens, more than pad_to={pad_to}: truncate it or raise pad_to")
        if bound.max_tokens is not None and longest > bound.max_tokens:
            count = int((self._windows.lengths > bound.max_tokens).sum())
            logger.warning(
                f"{count} of {self.plan.num_examples} examples are longer than max_tokens={bound.max_tokens} "
                f"(the longest has {longest}): each goes alone in a micro-batch that exceeds it"
            )


@dataclass
class _LocalWindows(Dataset):
    """(epoch, window) → its split and this process's micro-batches, collated. Runs in the data-loading workers."""

    dataset: Any
    collate_fn: Callable[..., Mapping[str, Any]]
    count_items: items.CountItems
    lengths: np.ndarray
    pad_to: PadTo
    bound: Bound
    cost: Cost
    plan: WindowPlan
    num_processes: int
    process: int

    def __getitem__(self, number: tuple[int, int]) -> tuple[Split, list[MicroBatch]] | bytes:
        split = self.split(*number)
        local = split, [self.collate(indices, split.pad_to) for indices in split.processes[self.process]]
        # By value: tensors in shared memory cost a file descriptor each, and a window may hold thousands.
        return local if get_worker_info() is None else pickle.dumps(local)

    def split(self, epoch: int, window: int) -> Split:
        indices = self.plan.indices(epoch, window)
        lengths = self.lengths[indices]
        padded, pad_to = lengths, None
        if self.pad_to != "micro_batch":
            pad_to = int(lengths.max()) if self.pad_to == "window" else self.pad_to
            padded = np.full_like(lengths, pad_to)
        processes = split_window(padded, self.bound, self.num_processes, self.cost)
        return Split(
            indices=indices,
            processes=[[indices[positions] for positions in process] for process in processes],
            tokens=int(lengths.sum()),
            padded_tokens=sum(len(piece) * int(padded[piece].max()) for process in processes for piece in process),
            pad_to=pad_to,
        )

    def collate(self, indices: np.ndarray, pad_to: int | None, counts: bool = True) -> MicroBatch:
        fetch = getattr(self.dataset, "__getitems__", None)  # one call for a datasets.Dataset
        examples = fetch(indices.tolist()) if fetch else [self.dataset[index] for index in indices.tolist()]
        batch = self.collate_fn(examples) if pad_to is None else self.collate_fn(examples, pad_to=pad_to)
        num_items = float(self.count_items(batch)) if counts else 0.0
        if not 0 <= num_items < float("inf"):
            raise ValueError(f"num_items gave {num_items} for examples {indices.tolist()}; it must be 0 or more, and finite")
        return MicroBatch(batch, indices if counts else indices[:0], num_items)

    def example_with_items(self, split: Split) -> MicroBatch:
        """The shortest example of the window that has items, to be run at weight 0 by a process with nothing to do."""
        for index in split.indices[np.argsort(self.lengths[split.indices], kind="stable")]:
            if self.collate(np.array([index]), split.pad_to).num_items:
                return self.collate(np.array([index]), split.pad_to, counts=False)
        raise ValueError("a micro-batch has items but none of its examples alone: num_items must be a sum over examples")


def measure_lengths(dataset: Any, lengths: str | Sequence[int] | np.ndarray | Callable[[Any], int] | None) -> np.ndarray:
    """Tokens of every example, int32: from a column, a sequence, a function, or the size of `input_ids` (nested: padded)."""
    if isinstance(lengths, str):
        measured = [example[lengths] for example in dataset]
    elif callable(lengths):
        measured = [lengths(example) for example in dataset]
    elif lengths is not None:
        measured = lengths
    elif hasattr(dataset, "with_format") and "input_ids" in getattr(dataset, "column_names", ()):
        tables = dataset.select_columns("input_ids").with_format("arrow").iter(100_000)
        measured = np.concatenate([_column_lengths(table["input_ids"]) for table in tables])
    elif isinstance(dataset[0], Mapping) and "input_ids" in dataset[0]:
        measured = [_padded_size(example["input_ids"]) for example in dataset]
    else:
        measured = np.ones(len(dataset))
    array = np.asarray(measured)
    if array.shape != (len(dataset),):
        raise ValueError(f"lengths has the shape {array.shape}; the data set has {len(dataset)} examples, one number each")
    if not np.issubdtype(array.dtype, np.number) or not (np.isfinite(array) & (array >= 0)).all():
        raise ValueError(f"lengths must be numbers of tokens, 0 or more; found {array.dtype}: {array[:3].tolist()} …")
    return array.astype(np.int32)


def _column_lengths(column: Any) -> np.ndarray:
    if pa.types.is_nested(column.type.value_type):
        return np.array([_padded_size(row) for row in column.to_pylist()])
    return np.asarray(pc.list_value_length(column))  # type: ignore[attr-defined]


def _padded_size(ids: Any) -> int:
    """Tokens of one example: its length; for choices or other nested rows, rows × the longest."""
    if isinstance(ids, torch.Tensor):
        return ids.numel()
    nested = len(ids) > 0 and np.ndim(ids[0]) > 0
    return len(ids) * max(len(row) for row in ids) if nested else len(ids)


def _to_device(batch: Mapping[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    return send_to_device(dict(batch), accelerator.device, non_blocking=accelerator.device.type == "cuda")


def _pinned(micro_batch: MicroBatch) -> MicroBatch:
    pinned = {key: value.pin_memory() if isinstance(value, torch.Tensor) else value for key, value in micro_batch.batch.items()}
    return MicroBatch(pinned, micro_batch.indices, micro_batch.num_items)


def _identity(local: Any) -> Any:
    return local


def _forwards_are_collective(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def _refuse(accelerator: Accelerator) -> None:
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"{accelerator.distributed_type.value} accumulates and scales gradients by itself, so windows cannot be exact "
            "under it: launch with DDP or FSDP (--multi_gpu or --use_fsdp) instead"
        )


def _check_arguments(dataset: Any, effective_batch_size: Any, collate_fn: Callable, pad_to: Any) -> None:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(f"the data set must be a sequence with a length; found {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError("the data set has no examples")
    if not callable(effective_batch_size):
        size = effective_batch_size
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or not 1 <= size <= len(dataset):
            raise ValueError(
                f"the effective batch size is {size!r}; it must be an integer from 1 to the {len(dataset)} examples of the data set"
            )
    if pad_to != "micro_batch":
        if pad_to != "window" and (isinstance(pad_to, bool) or not isinstance(pad_to, int) or pad_to < 1):
            raise ValueError(f"pad_to is {pad_to!r}; allowed: 'micro_batch', 'window', or a number of tokens")
        parameters = inspect.signature(collate_fn).parameters.values()
        if not any(p.name == "pad_to" or p.kind is p.VAR_KEYWORD for p in parameters):
            raise ValueError(
                f"pad_to={pad_to!r} needs a collate function that takes pad_to (tokens to pad every example to); "
                f"{getattr(collate_fn, '__name__', type(collate_fn).__name__)} does not"
            )


def _name_prepared_schedulers(accelerator: Accelerator) -> None:
    for scheduler in accelerator._schedulers:
        name = type(getattr(scheduler, "scheduler", scheduler)).__name__
        logger.warning_once(
            f"{name} was prepared by Accelerate, which steps it once per process: leave the scheduler out of "
            "accelerator.prepare() and step it once per window"
        )
