"""The loader that hands out windows.

`WindowLoader` puts together which examples make a window (`plan.py`, `stream.py`), how it is cut
(`split.py`), the collated micro-batches (`micro_batches.py`) and what their losses are means over
(`items.py`). A `Window` (`window.py`) gives this process's micro-batches and weighs their losses.
"""

import copy
import pickle
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, send_to_device
from torch.utils.data import DataLoader, default_collate

from gradacc_hf.accumulation import loss_items as items
from gradacc_hf.accumulation.batch_schedule import GrowingBatch
from gradacc_hf.accumulation.collation import (
    Lengths,
    LocalWindows,
    MicroBatch,
    PadTo,
    Split,
    Transform,
    measure_lengths,
)
from gradacc_hf.accumulation.noise_scale import NoiseScale
from gradacc_hf.accumulation.reference import as_number
from gradacc_hf.accumulation.sampler import EffectiveBatchSize, WindowPlan
from gradacc_hf.accumulation.splitting import Bound, Cost, usual_cost
from gradacc_hf.accumulation.streaming import BUFFER_SIZE, Stream, is_stream
from gradacc_hf.accumulation.validation import check_arguments, check_stream, refuse_engine
from gradacc_hf.accumulation.window import Recutting, Window, forwards_are_collective, to_device
from gradacc_hf.utils.signals import ignore_signals

logger = get_logger(__name__)


class WindowLoader:
    """Hands out windows: `for window in loader: for batch in window: …`. One pass is one epoch.

    Args:
        dataset: a `datasets.Dataset` or any sequence of examples; or a stream (below).
        effective_batch_size: examples per optimizer step over all processes; or a function of the window's
            number, such as a `dynamics.ScheduledBatch`; or a `dynamics.GrowingBatch`.
        collate_fn: examples → mapping of tensors; `collate_fn(examples, pad_to=n)` where `pad_to` is used.
        accelerator: the run's Accelerator; not DeepSpeed or Megatron-LM, which have accumulation of their
            own.
        max_tokens: padded tokens per micro-batch; or `micro_batch_size`: examples per micro-batch; or
            `bound`: a `split.Bound`, such as one of predicted bytes. Bounds, not targets: the cut is where
            the predicted cost is least under them.
        num_items: "labels", "next_token" or `batch -> number`: the terms of the mean that the loss is
            (`items.py`).
        lengths: tokens of each example: a column's name, a sequence, or a function of an example; by default
            those of `input_ids` where there is one, else all equal. An array (examples, columns) where an
            example has inputs that are padded on their own, such as source and target.
        pad_to: "micro_batch" pads each to its own longest; "window" pads all micro-batches of a window alike;
            a number pads to so many tokens; "nothing" says that the collate function lays its examples end to
            end in one row (packing). For models whose loss padding reaches (question answering), only
            "window" and a number are exact.
        pad_to_multiple_of: says that the collate function pads to a multiple of so many tokens, as
            transformers' collators do by an argument of this name: the cut and the planned sizes count it.
        shuffle, seed: the order of epoch e is drawn from (seed, e); without shuffling it is the data set's.
        drop_last: leave out a partial last window.
        num_workers: processes that collate beside training.
        transform: `(example, numpy Generator) -> example`, for what is random about an example: masking,
            augmentation, cropping. The generator is seeded by (seed, epoch, index), so that no split, number
            of processes or resuming changes what it draws. Its lengths are those before.
        cost: what a micro-batch is predicted to cost; None for what is usual on the device.
        leave_out: examples, by index, that are in no window; all others stay in theirs.
        whole_gradients: under FSDP, accumulate whole gradients on every process, and reduce them once a
            window: less communication, more memory. By default each micro-batch's are reduced to shards.
        buffer_size: examples of a stream that are shuffled together; 1000 by default.
        noise_every: measure the gradient noise scale in every so manieth window of an epoch, from the first;
            0 never. The loop must tell the loader of each window's gradient: `record_gradient_norm`.

    A stream is a `datasets.IterableDataset`, or any iterable without a length that begins anew each time, and
    gives the same examples in every process. Each process reads all of it, and collates its own micro-batches
    only: reading and tokenizing cost as much on many processes as on one. One with a `set_epoch` is told each
    epoch before it is read. Its lengths are measured block by block; an example's index is its place in it.
    Resuming reads on from the block at hand where a `datasets.IterableDataset` can say where that is (with a
    shuffle buffer of its own it cannot), and else from the epoch's beginning. What has gone by cannot be
    looked up, and `len()` raises TypeError.

    `state_dict()` / `load_state_dict()`: seed, epoch and window, and where a stream is; inside the loop's
    body, the window at hand counts as done. `empty_micro_batches` and `empty_windows` count what had no item
    and was not handed out, over all processes; `replays`, how often a window was run again as memory did not
    suffice. Raises ValueError, in one line, for arguments that cannot work.
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
        bound: Bound | None = None,
        num_items: str | items.CountItems = "labels",
        lengths: Lengths = None,
        pad_to: PadTo = "micro_batch",
        pad_to_multiple_of: int | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        transform: Transform | None = None,
        cost: Cost | None = None,
        leave_out: Collection[int] = (),
        whole_gradients: bool = False,
        buffer_size: int | None = None,
        noise_every: int = 0,
    ):
        refuse_engine(accelerator)
        check_stream(dataset, lengths, num_workers, buffer_size)
        check_arguments(dataset, effective_batch_size, collate_fn, pad_to, pad_to_multiple_of)
        if noise_every < 0:
            raise ValueError(f"noise_every is {noise_every}; allowed: 1 window or more, or 0 for never")
        pad_to = pad_to if isinstance(pad_to, str) else int(pad_to)
        self.accelerator, self.num_workers = accelerator, num_workers
        self.whole_gradients = whole_gradients
        self.seed, self.epoch, self.window = seed, 0, 0
        self.empty_micro_batches = self.empty_windows = self.replays = 0
        self.seconds_to_collate = 0.0  # that the latest window was waited for
        self._completed, self._stepped = [0.0] * accelerator.num_processes, False
        self.noise = NoiseScale()
        if bound is not None and (max_tokens, micro_batch_size) != (None, None):
            raise ValueError("give bound=, or max_tokens or micro_batch_size: one of the three")
        bound = bound or Bound(max_tokens, micro_batch_size)
        cost = cost or usual_cost(accelerator.device.type)
        if is_stream(dataset):
            measure, size = partial(measure_lengths, lengths=lengths), int(buffer_size or BUFFER_SIZE)
            plan = Stream(dataset, effective_batch_size, seed, shuffle, drop_last, size, measure)
            plan.check, dataset, tokens = self._check_lengths, plan, plan.tokens
        else:
            plan = WindowPlan(len(dataset), effective_batch_size, seed, shuffle, drop_last)
            tokens = measure_lengths(dataset, lengths)
        self._windows = LocalWindows(
            dataset=dataset,
            collate_fn=collate_fn,
            count_items=items.resolve(num_items),
            tokens=tokens,
            pad_to=pad_to,
            bound=bound,
            cost=cost,
            plan=plan,
            transform=transform,
            num_processes=accelerator.num_processes,
            process=accelerator.process_index,
            pad_to_multiple_of=pad_to_multiple_of or 1,
            leave_out=leave_out,
            noise_every=noise_every,
        )
        self._started = False
        self._half_way: list[int] = []
        self._said_too_large = self._said_dropped = False
        if isinstance(tokens, np.ndarray):
            self._check_lengths(tokens)
        self.pad_to = pad_to
        self.bound, self.cost, self.tuned = bound, cost, False
        self.trial_bound: Bound | None = None  # while a run tries sizes (tune.py): what it may take
        self.count_items = self._windows.count_items
        self._say_dropped()

    def __len__(self) -> int:
        """Windows in the epoch at hand. Raises TypeError for a stream."""
        return self.plan.num_windows(self.epoch)

    @property
    def plan(self) -> WindowPlan | Stream:
        """Which examples make which window."""
        return self._windows.plan

    @property
    def tokens(self) -> Any:
        """Tokens of each example, (examples, columns); of a stream, of those at hand."""
        return self._windows.tokens

    @property
    def lengths(self) -> Any:
        """Tokens of each example, over its columns."""
        return self._windows.lengths

    def split(self, epoch: int, window: int) -> Split:
        """How this window will be cut: a plan from lengths alone; nothing is read or collated."""
        return self._windows.split(epoch, window)

    def split_lengths(self, tokens: np.ndarray) -> list[np.ndarray]:
        """How a window of examples of so many tokens, (examples, columns), is cut; of each micro-batch."""
        split = self._windows.split_examples(np.arange(len(tokens)), tokens, epoch=0, window=0)
        return [tokens[piece] for process in split.processes for piece in process]

    def shape(self, indices: np.ndarray, pad_to: int | None = None) -> tuple[int, list[int]]:
        """Rows of a micro-batch of these examples, and tokens that each column is padded to."""
        return self._windows.shape(indices, pad_to)

    def __iter__(self) -> Iterator[Window]:
        if self._started:
            self.epoch, self.window = self.epoch + 1, 0
        self._started, asked = True, time.perf_counter()
        for split, micro_batches in self._local_windows(self._windows, self.epoch, self.window):
            self.window += 1
            window = self._window(split, micro_batches)
            if window is not None:
                _name_prepared_schedulers(self.accelerator)
                self.seconds_to_collate = time.perf_counter() - asked
                yield window
                if window.small is not None and (self.epoch or split.window) and not self.noise.seen:
                    logger.warning_once(
                        "The noise scale is measured but never recorded: call "
                        "windows.record_gradient_norm(window, norm) for each window, or set noise_every=0"
                    )
                self._stepped, asked = True, time.perf_counter()
        ended = self._gather([0, 0, 0, 0, 0])  # instead of another window
        _check_alike(ended[:, 3], self.epoch, self.window)
        self._say_dropped()

    @property
    def noise_every(self) -> int:
        """Of how many windows of an epoch the first measures the gradient noise scale; 0: none does."""
        return self._windows.noise_every

    @property
    def num_growths(self) -> int:
        """How often its windows have grown."""
        size = self.plan.effective_batch_size
        return len(size.sizes) - 1 if isinstance(size, GrowingBatch) else 0

    @property
    def next_position(self) -> tuple[int, int]:
        """The window that comes next, as (epoch, window)."""
        over = self.plan.is_over(self.epoch, self.window)
        return (self.epoch + 1, 0) if over else (self.epoch, self.window)

    def record_gradient_norm(self, window: Window, grad_norm: float | torch.Tensor) -> None:
        """The norm of this window's gradient before clipping: for the noise scale, and what follows from it.

        Of the weights that the prepared optimizers have. To be called in each window's body, in all
        processes, before the scheduler's step.
        """
        norm = as_number(grad_norm) if isinstance(grad_norm, torch.Tensor) else grad_norm
        if norm < 0:
            raise ValueError(f"record_gradient_norm: found a gradient norm of {norm:g}; allowed: 0 or more")
        measured, size = self.noise.measured, self.plan.effective_batch_size
        self.noise.record(len(window.indices), norm, window.small)
        if not isinstance(size, GrowingBatch) or self.noise.measured == measured:
            return
        scale = broadcast_object_list([self.noise.scale])[0]  # all processes decide alike
        if size.grow(self.plan.number(self.epoch, self.window), scale):
            self._windows.plan = self.plan.resized(self.epoch, self.window)

    def micro_batches(self) -> Iterator[tuple[MicroBatch, dict[str, Any]]]:
        """This process's micro-batches of one pass over the data, each with its batch on the device.

        For evaluation: micro-batches without items come too, and neither the accelerator's accumulation state
        nor this loader's place changes. Where forwards are collective (FSDP) all processes get equally many.
        """
        windows = self._windows.apart(epoch=0, window=0)
        for split, micro_batches in self._local_windows(windows, epoch=0, start=0):
            most = max(map(len, split.processes))
            while forwards_are_collective(self.accelerator) and len(micro_batches) < most:
                micro_batches.append(windows.collate(split.indices[:1], 0, split.pad_to, counts=False))
            for micro_batch in micro_batches:
                yield micro_batch, to_device(micro_batch.batch, self.accelerator)

    def collated(self, indices: Sequence[int] | np.ndarray, pad_to: int | None = None) -> MicroBatch:
        """Any examples as one batch on the device, with their items, as they are in the epoch at hand."""
        found = self._windows.collate(np.asarray(indices), self.epoch, pad_to)
        return MicroBatch(to_device(found.batch, self.accelerator), found.indices, found.num_items)

    def examples(self, indices: Sequence[int] | np.ndarray) -> list[Any]:
        """Examples as they are in the epoch at hand, not collated."""
        return self._windows.examples(np.asarray(indices), self.epoch)

    def copy(self, num_windows: int) -> "WindowLoader":
        """This loader at its place, to try a model on; cut finer where all would be one micro-batch.

        Its windows are cut by length, as most are: none measures noise.
        """
        bound, windows = self.bound, replace(self._windows, noise_every=0)
        splits = [windows.split(*number) for number in self.plan.ahead(self.epoch, self.window, num_windows)]
        if all(max(map(len, split.processes)) == 1 for split in splits):
            bound = Bound(micro_batch_size=max(1, min(len(split.indices) for split in splits) // 3))
        other = self.with_bound(bound)
        other._windows = replace(other._windows, noise_every=0).apart(self.epoch, self.window)
        if isinstance(other.plan, Stream):
            other.plan.keeps = True
        return other

    def with_bound(
        self, bound: Bound, num_processes: int | None = None, cost: Cost | None = None
    ) -> "WindowLoader":
        """This loader at its place, with its windows cut under another bound; to plan, for more processes."""
        other = copy.copy(self)
        other._started, other._half_way = False, []
        other._completed = [0.0] * len(self._completed)
        other._windows = replace(self._windows, num_processes=num_processes or self._windows.num_processes)
        other.resplit(bound, cost)
        return other

    def rewind_to(self, window: Window) -> None:
        """The window at hand counts as not done: it is to come next, and to meet the same random numbers."""
        self.window = window.number
        window.restore_rng_state()

    def resplit(self, bound: Bound, cost: Cost | None = None) -> None:
        """Cut the windows to come under another bound, and by another cost model."""
        if cost is not None and cost != self.cost:  # costs of before compare with none to come
            self._completed[:] = [0.0] * len(self._completed)
        self.bound, self.cost = bound, cost or self.cost
        self._windows.bound, self._windows.cost = self.bound, self.cost

    def probe(self) -> list[MicroBatch]:
        """A short example that has items, a long one, and both together: to try a model on."""
        self.plan.ahead(self.epoch, self.window, 1)  # a stream then holds what it is about to need
        windows = self._windows.apart(epoch=0, window=0)
        for split in (windows.split(*number) for number in windows.plan.walk(0, 0)):
            alone = [windows.find_example_with_items(split, longest) for longest in (False, True)]
            if alone[0] is not None and alone[1] is not None:
                both = np.concatenate([micro_batch.indices for micro_batch in alone])  # type: ignore[union-attr]
                found = [*alone, windows.collate(both, 0, split.pad_to)]
                return [
                    MicroBatch(to_device(m.batch, self.accelerator), m.indices, m.num_items) for m in found
                ]
        raise ValueError("no example of the data set has an item: every label is ignored")

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, as plain data: the next window to run is (epoch, window).

        And how windows are cut, where a run has found that out (`tune.py`).
        """
        epoch, window = self.next_position
        place = self.plan.place(epoch, window)
        state = {"seed": self.seed, "epoch": epoch, "window": window, **place}
        if self.noise_every:
            state["noise"] = self.noise.state_dict()
        if isinstance(size := self.plan.effective_batch_size, GrowingBatch):
            state["growth"] = size.state_dict()
        return state | (
            {"max_tokens": self.bound.max_tokens, "cost": asdict(self.cost)} if self.tuned else {}
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where `state_dict` was taken; the next pass runs the rest of that epoch."""
        if isinstance(size := self.plan.effective_batch_size, GrowingBatch):
            size.load_state_dict(state["growth"])
        if "noise" in state:
            self.noise = NoiseScale.of(state["noise"])
        self._windows.plan = self.plan.at(state)
        if "cost" in state and self.bound.micro_batch_size is None:
            most = min(state["max_tokens"], self.bound.max_tokens or state["max_tokens"])
            self.resplit(replace(self.bound, max_tokens=most), Cost(**state["cost"]))
            self.tuned = True
        self.seed = state["seed"]
        self.epoch, self.window, self._started = state["epoch"], state["window"], False

    def _check_lengths(self, tokens: np.ndarray, first: int = 0) -> None:
        """Say that examples exceed the bound, of all or of a stream's next block."""
        too_large = self._windows.too_large(tokens, first)
        if too_large and not self._said_too_large:
            logger.warning(too_large)
            self._said_too_large = True

    def _say_dropped(self) -> None:
        """Of a stream, at the end of its first epoch."""
        if (left := self.plan.dropped(self.epoch)) and not self._said_dropped:
            total = self.plan.num_examples
            logger.warning(f"drop_last: {left} of {total} examples are left out of each epoch")
            self._said_dropped = True

    def _local_windows(
        self, windows: LocalWindows, epoch: int, start: int
    ) -> Iterator[tuple[Split, list[MicroBatch]]]:
        while not windows.plan.is_over(epoch, start):
            loader, bound, plan = self._collated_beside(windows, epoch, start), windows.bound, windows.plan
            for local in loader:
                split, micro_batches = pickle.loads(local) if isinstance(local, bytes) else local
                yield split, [self._pinned(micro_batch) for micro_batch in micro_batches]
                start += 1
                # Cut finer or larger by now: what workers hold ready is not.
                if windows.bound is not bound or windows.plan is not plan:
                    break

    def _collated_beside(self, windows: LocalWindows, epoch: int, start: int) -> DataLoader:
        return DataLoader(
            windows,
            sampler=windows.plan.walk(epoch, start),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=self.num_workers,
            worker_init_fn=ignore_signals,
            collate_fn=_identity,
            # The workers' seed; of its own, else it is drawn from the generator of dropout.
            generator=torch.Generator().manual_seed(self._workers_seed(epoch)),
        )

    def _workers_seed(self, epoch: int) -> int:
        numbers = [self.seed, epoch, self.accelerator.process_index]
        return int(np.random.SeedSequence(numbers).generate_state(1)[0])

    def _window(self, split: Split, micro_batches: list[MicroBatch]) -> Window | None:
        """Count the window's items over all processes, and see that every process has something to run."""
        with_items = [micro_batch for micro_batch in micro_batches if micro_batch.num_items]
        empty = len(micro_batches) - len(with_items)
        here = [sum(m.num_items for m in with_items), len(with_items), empty, split.tokens]
        counts = self._gather([*here, self._can_measure(split, micro_batches)])
        _check_alike(counts[:, 3], split.epoch, split.window)
        num_items, most = counts[:, 0].sum(), int(counts[:, 1].max())
        self._count_empty(split, int(counts[:, 2].sum()), num_items == 0)
        if num_items == 0:
            return None
        fewest = most if forwards_are_collective(self.accelerator) else 1
        if len(with_items) < fewest:
            with_items += [self._windows.idle(split)] * (fewest - len(with_items))
        return Window(
            epoch=split.epoch,
            number=split.window,
            indices=split.indices,
            num_items=float(num_items),
            tokens=split.tokens,
            padded_tokens=split.padded_tokens,
            pad_to=split.pad_to,
            accumulation_steps=most,
            _micro_batches=with_items,
            _accelerator=self.accelerator,
            _half_way=self._half_way,
            _recutting=Recutting(
                cut=self._cut_again,
                idle=lambda: self._windows.idle(split),
                shape=lambda indices: self._windows.shape(indices, split.pad_to),
                bound=self._windows.bound,
                costs=self._windows.dearest(split),
                # The first window says nothing: with its step come the optimizer's states.
                completed=self._completed if self._stepped else list(self._completed),
                is_short=self.replays > 0,
            ),
            _whole_gradients=self.whole_gradients,
            _noise_size=len(micro_batches[0].indices) if counts[:, 4].all() else 0,
        )

    def _can_measure(self, split: Split, micro_batches: list[MicroBatch]) -> bool:
        """Has this process a first micro-batch whose gradient, drawn at random, is ever there on its own?"""
        whole = forwards_are_collective(self.accelerator) and self.whole_gradients
        with_items = [micro_batch.num_items > 0 for micro_batch in micro_batches]
        return split.measures_noise and with_items[0] and sum(with_items) > 1 and not whole

    def _cut_again(self, window: Window, bound: Bound) -> Window:
        """The window and all to come under a lower bound."""
        self.resplit(bound)
        self.replays += 1
        split = self._windows.split(window.epoch, window.number)
        pieces = split.processes[self.accelerator.process_index]
        collated = [self._windows.collate(indices, split.epoch, split.pad_to) for indices in pieces]
        again = self._window(split, [self._pinned(micro_batch) for micro_batch in collated])
        if again is None:
            raise RuntimeError("the window had items before it was cut finer, and has none now")
        return again

    def _pinned(self, micro_batch: MicroBatch) -> MicroBatch:
        """In memory that a GPU can copy from beside its own work; where there is none, as it is."""
        if self.accelerator.device.type != "cuda":
            return micro_batch
        pinned = {
            key: value.pin_memory()
            if isinstance(value, torch.Tensor) and value.device.type == "cpu"
            else value
            for key, value in micro_batch.batch.items()
        }
        return MicroBatch(pinned, micro_batch.indices, micro_batch.num_items)

    def _gather(self, numbers: list[float]) -> np.ndarray:
        """The one exchange a window: this process's numbers → (processes, numbers)."""
        if self.accelerator.num_processes == 1:
            return np.array([numbers], dtype=np.float64)
        local = torch.tensor([numbers], dtype=torch.float64, device=self.accelerator.device)
        return send_to_device(self.accelerator.gather(local), "cpu").numpy()

    def _count_empty(self, split: Split, empty_micro_batches: int, window_is_empty: bool) -> None:
        if empty_micro_batches and not self.empty_micro_batches:
            logger.warning(
                "some micro-batches hold no item (every label is ignored): they are skipped and counted"
            )
        if window_is_empty and not self.empty_windows:
            logger.warning(
                f"window {split.window} of epoch {split.epoch} holds no item: skipped, and counted"
            )
        self.empty_micro_batches += empty_micro_batches
        self.empty_windows += int(window_is_empty)


def _check_alike(tokens: np.ndarray, epoch: int, window: int) -> None:
    """Raise ValueError in all processes where they do not have the same tokens in a window, or 0 for none."""
    different = sorted(set(tokens.astype(int).tolist()))
    if len(different) > 1:
        raise ValueError(
            f"window {window} of epoch {epoch} has {' and '.join(map(str, different))} tokens, by process: "
            "data must be the same, in the same order, in all of them"
        )


def _identity(local: Any) -> Any:
    return local


def _name_prepared_schedulers(accelerator: Accelerator) -> None:
    for scheduler in accelerator._schedulers:
        name = type(getattr(scheduler, "scheduler", scheduler)).__name__
        logger.warning_once(
            f"{name} was prepared by Accelerate, which steps it once per process: leave the scheduler out of "
            "accelerator.prepare() and step it once per window"
        )
