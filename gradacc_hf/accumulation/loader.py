"""The loader that yields windows.

`WindowLoader` puts together which examples make a window (`sampler.py`, `streaming.py`), how a window is
split (`splitting.py`), the collated micro-batches (`collation.py`) and what losses are means over
(`loss_items.py`). A `Window` (`window.py`) yields this process's micro-batches and weighs their losses.
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
from accelerate.utils import broadcast_object_list, send_to_device
from torch.utils.data import DataLoader, default_collate

from gradacc_hf.accumulation import loss_items as items
from gradacc_hf.accumulation.accelerate_state import forwards_are_collective, prepared_schedulers
from gradacc_hf.accumulation.batch_schedule import GrowingBatch
from gradacc_hf.accumulation.collation import (
    Lengths,
    LocalSplit,
    LocalWindows,
    MicroBatch,
    PadTo,
    Split,
    Transform,
    measure_lengths,
    to_device,
)
from gradacc_hf.accumulation.loader_state import COUNTERS, device_name, sizes_of, upgrade_state
from gradacc_hf.accumulation.noise_scale import NoiseScale
from gradacc_hf.accumulation.reference import as_number
from gradacc_hf.accumulation.sampler import EffectiveBatchSize, WindowPlan
from gradacc_hf.accumulation.splitting import Bound, Cost, usual_cost
from gradacc_hf.accumulation.streaming import BUFFER_SIZE, Stream, is_stream
from gradacc_hf.accumulation.validation import check_arguments, check_sizes, check_stream, refuse_engine
from gradacc_hf.accumulation.window import Window
from gradacc_hf.utils.logs import get_logger
from gradacc_hf.utils.signals import ignore_signals

logger = get_logger(__name__)


class WindowLoader:
    """Yield windows: `for window in loader: for batch in window: ...`. One pass is one epoch.

    Args:
        dataset: A `datasets.Dataset` or any sequence of examples; or a stream (below).
        effective_batch_size: Examples per optimizer step over all processes; or a function of the window's
            number in the run, such as `ScheduledBatch`; or a `GrowingBatch`.
        accelerator: The run's Accelerator; not DeepSpeed or Megatron-LM, which accumulate by themselves.
        collate_fn: Examples → mapping of tensors. Called as `collate_fn(examples, pad_to=n)` where `pad_to`
            needs it.
        max_tokens: Padded tokens per micro-batch, at most.
        micro_batch_size: Examples per micro-batch, at most; instead of `max_tokens`.
        bound: A `Bound`, such as one of predicted bytes; instead of the two above. The split is the cheapest
            one under the bound, as predicted.
        num_items: "labels", "next_token" or `batch -> number`: how many terms the mean loss has.
        lengths: Tokens of each example: a column's name, a sequence, or a function of an example. By default
            the size of `input_ids`, or else all equal. An array (examples, columns) where an example has
            inputs that are padded on their own, such as source and target.
        pad_to: "micro_batch" pads each to its longest example; "window" pads all micro-batches of a window
            alike; a number pads to that many tokens; "nothing" says that the collate function packs its
            examples into one row. Where padding reaches the loss (question answering), only "window" and a
            number are exact.
        pad_to_multiple_of: Says that the collate function pads to a multiple of this many tokens, as the
            argument of this name of transformers' collators. Planned sizes count it.
        shuffle: Whether the order of epoch e is drawn from (seed, e); else it is the data set's.
        drop_last: Whether to leave out a partial last window.
        seed: Seed of the order and of `transform`.
        num_workers: Processes that collate beside training.
        transform: `(example, numpy Generator) -> example`, for what is random about an example: masking,
            augmentation, cropping. The generator is seeded by (seed, epoch, index), so that no split, number
            of processes or resuming changes the result. Lengths are those before.
        cost: Predicted cost of a micro-batch; None for what is usual on the device.
        leave_out: Examples, by index, to leave out of their windows; all others stay in theirs.
        whole_gradients: Under FSDP, whether to accumulate whole gradients on every process and reduce them
            once a window: less communication, more memory. By default each micro-batch's are reduced.
        buffer_size: Examples of a stream that are shuffled together; 1000 by default.
        noise_every: Measure the gradient noise scale every `noise_every` windows, starting with the first of
            each epoch; 0 disables it. The loop must call `record_gradient_norm` for each window.

    Raises:
        ValueError: In one line, for arguments that cannot work.

    A stream is a `datasets.IterableDataset`, or any iterable without a length that begins from its start
    each time, and gives the same examples in every process. Each process reads all of it, and collates only
    its own micro-batches: reading and tokenizing cost as much on many processes as on one. A stream with
    `set_epoch` is told the epoch before it is read. Its lengths are measured block by block; an example's
    index is its place in the stream. Resuming reads on from the current block where a
    `datasets.IterableDataset` can say where that is (with a shuffle buffer of its own it cannot), and else
    from the epoch's beginning. Examples of earlier windows cannot be looked up, and `len()` raises TypeError.

    Attributes:
        epoch, window: Position in the run; inside the loop's body, the current window counts as done.
        noise: The gradient noise scale measured so far.
        empty_micro_batches, empty_windows: How many had no item and were not yielded, over all processes.
        replays: How often a window was run again because memory ran out.
        seconds_to_collate: Seconds that the loop waited for the latest window.
        tuned: Whether the bound and the cost model come from trials (`training/autotune.py`).
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
        check_sizes(bound, max_tokens, micro_batch_size, noise_every)
        self.accelerator, self.num_workers = accelerator, num_workers
        self.whole_gradients = whole_gradients
        self.seed, self.epoch, self.window = seed, 0, 0
        self.empty_micro_batches = self.empty_windows = self.replays = 0
        self.seconds_to_collate = 0.0
        self.noise, self.tuned = NoiseScale(), False
        self._is_started = self._has_stepped = self._pass_is_open = False
        self._warned_too_large = self._warned_dropped = False
        self._completed_costs = (0.0,) * accelerator.num_processes
        bound = bound or Bound(max_tokens, micro_batch_size)
        self._budget = sizes_of(bound)  # as it was given
        self._device = device_name(accelerator)
        self._trial_bound: Bound | None = None
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
            pad_to=pad_to if isinstance(pad_to, str) else int(pad_to),
            bound=bound,
            cost=cost or usual_cost(accelerator.device.type),
            plan=plan,
            transform=transform,
            num_processes=accelerator.num_processes,
            process=accelerator.process_index,
            pad_to_multiple_of=pad_to_multiple_of or 1,
            leave_out=leave_out,
            noise_every=noise_every,
        )
        if isinstance(tokens, np.ndarray):
            self._check_lengths(tokens)
        self._warn_dropped()

    def __len__(self) -> int:
        """Return the windows of the current epoch. Raises TypeError for a stream."""
        return self.plan.num_windows(self.epoch)

    def __iter__(self) -> Iterator[Window]:
        if self._is_started:
            self.epoch, self.window = self.epoch + 1, 0
        self._is_started, asked = True, time.perf_counter()
        for plan, micro_batches in self._collated_windows(self._windows, self.epoch, self.window):
            self.window += 1
            split = self._local_split(plan, micro_batches)
            if split is not None:
                window = Window(split, self)
                _warn_of_prepared_schedulers(self.accelerator)
                self.seconds_to_collate = time.perf_counter() - asked
                yield window
                if window.small is not None and (self.epoch or plan.window) and not self.noise.seen:
                    logger.warning_once(
                        "The noise scale is measured but never recorded: call "
                        "windows.record_gradient_norm(window, norm) for each window, or set noise_every=0"
                    )
                self._has_stepped, asked = True, time.perf_counter()
        ended = self._gather([0, 0, 0, 0, 0])  # instead of another window
        _check_alike(ended[:, 3], self.epoch, self.window)
        self._warn_dropped()

    # What windows are made of

    @property
    def plan(self) -> WindowPlan | Stream:
        """Which examples make which window."""
        return self._windows.plan

    @property
    def tokens(self) -> Any:
        """Tokens of each example (examples, columns); of a stream, of those that are held."""
        return self._windows.tokens

    @property
    def lengths(self) -> Any:
        """Tokens of each example, summed over columns (examples,)."""
        return self._windows.lengths

    @property
    def bound(self) -> Bound:
        """The most that one micro-batch may hold; lower than given where memory ran out."""
        return self._windows.bound

    @property
    def cost(self) -> Cost:
        """Predicted cost of a micro-batch."""
        return self._windows.cost

    @property
    def pad_to(self) -> PadTo:
        """What micro-batches are padded to."""
        return self._windows.pad_to

    @property
    def pad_to_multiple_of(self) -> int:
        """The number of tokens that padded lengths are a multiple of."""
        return self._windows.pad_to_multiple_of

    @property
    def count_items(self) -> items.CountItems:
        """The function that counts a batch's items."""
        return self._windows.count_items

    @count_items.setter
    def count_items(self, count: items.CountItems) -> None:
        self._windows.count_items = count

    @property
    def noise_every(self) -> int:
        """Windows from one measurement of the gradient noise scale to the next; 0: none is measured."""
        return self._windows.noise_every

    @property
    def num_growths(self) -> int:
        """How often the effective batch size has grown."""
        size = self.plan.effective_batch_size
        return len(size.sizes) - 1 if isinstance(size, GrowingBatch) else 0

    @property
    def next_position(self) -> tuple[int, int]:
        """The next window, as (epoch, window)."""
        over = self.plan.is_over(self.epoch, self.window)
        return (self.epoch + 1, 0) if over else (self.epoch, self.window)

    # Looking at windows

    def split(self, epoch: int, window: int) -> Split:
        """Split a window, from lengths alone; nothing is read or collated."""
        return self._windows.split(epoch, window)

    def split_lengths(self, tokens: np.ndarray) -> list[np.ndarray]:
        """Split a window whose examples have these tokens (examples, columns); the tokens by micro-batch."""
        split = self._windows.split_examples(np.arange(len(tokens)), tokens, epoch=0, window=0)
        return [tokens[positions] for process in split.processes for positions in process]

    def collate_window(
        self, epoch: int, window: int, process: int | None = None, num_processes: int | None = None
    ) -> list[MicroBatch]:
        """Collate the micro-batches of a window on the host, as any process of any number would."""
        own = replace(
            self._windows,
            process=self._windows.process if process is None else process,
            num_processes=num_processes or self._windows.num_processes,
        ).apart(epoch, window)
        return own.collate_split(own.split(epoch, window))

    def shape(self, indices: np.ndarray, pad_to: int | None = None) -> tuple[int, list[int]]:
        """Return the rows of a micro-batch of these examples, and the padded tokens of each column."""
        return self._windows.shape(indices, pad_to)

    def micro_batches(self) -> Iterator[tuple[MicroBatch, dict[str, Any]]]:
        """Iterate this process's micro-batches of one pass over the data, each with its batch on the device.

        For evaluation: micro-batches without items come too. Neither Accelerate's accumulation state nor the
        loader's position changes. Where forwards are collective (FSDP) all processes get equally many.
        """
        windows = self._windows.apart(epoch=0, window=0)
        for split, micro_batches in self._collated_windows(windows, epoch=0, start=0):
            most = max(map(len, split.processes))
            while forwards_are_collective(self.accelerator) and len(micro_batches) < most:
                micro_batches.append(windows.collate(split.indices[:1], 0, split.pad_to, counts=False))
            for micro_batch in micro_batches:
                yield micro_batch, to_device(micro_batch.batch, self.accelerator)

    def collated(self, indices: Sequence[int] | np.ndarray, pad_to: int | None = None) -> MicroBatch:
        """Collate any examples into one batch on the device, as the current epoch has them."""
        return self._windows.collate(np.asarray(indices), self.epoch, pad_to).on_device(self.accelerator)

    def examples(self, indices: Sequence[int] | np.ndarray) -> list[Any]:
        """Return examples as the current epoch has them, not collated."""
        return self._windows.examples(np.asarray(indices), self.epoch)

    def probe(self) -> list[MicroBatch]:
        """Return a short example that has items, a long one, and both together, to try a model on."""
        self.plan.ahead(self.epoch, self.window, 1)  # a stream then holds what it is about to need
        windows = self._windows.apart(epoch=0, window=0)
        for split in (windows.split(*number) for number in windows.plan.walk(0, 0)):
            short, long = (windows.find_example_with_items(split, longest) for longest in (False, True))
            if short is not None and long is not None:
                both = windows.collate(np.concatenate([short.indices, long.indices]), 0, split.pad_to)
                return [micro_batch.on_device(self.accelerator) for micro_batch in (short, long, both)]
        raise ValueError("no example of the data set has an item: every label is ignored")

    # Other loaders of the same windows

    def copy(self, num_windows: int) -> "WindowLoader":
        """Return this loader at its position, to try a model on; it measures no noise.

        Windows are split finer where each of the next `num_windows` would be one micro-batch.
        """
        bound, windows = self.bound, replace(self._windows, noise_every=0)
        splits = [windows.split(*number) for number in self.plan.ahead(self.epoch, self.window, num_windows)]
        if all(max(map(len, split.processes)) == 1 for split in splits):
            bound = Bound(micro_batch_size=max(1, min(len(split.indices) for split in splits) // 3))
        other = self.with_bound(bound, noise_every=0)
        other._windows = other._windows.apart(self.epoch, self.window)
        if isinstance(other.plan, Stream):
            other.plan.keeps = True
        return other

    def with_bound(
        self,
        bound: Bound,
        num_processes: int | None = None,
        cost: Cost | None = None,
        noise_every: int | None = None,
    ) -> "WindowLoader":
        """Return this loader at its position, with its windows split under another bound.

        Args:
            bound: What one micro-batch may hold.
            num_processes: Processes to plan for; by default those of the run.
            cost: Predicted cost of a micro-batch; by default this loader's.
            noise_every: Windows between measurements of the noise scale; by default this loader's.
        """
        other = copy.copy(self)
        other._is_started = other._pass_is_open = False
        other._completed_costs = (0.0,) * len(self._completed_costs)
        other._budget = sizes_of(bound)
        other._windows = replace(
            self._windows,
            num_processes=num_processes or self._windows.num_processes,
            noise_every=self.noise_every if noise_every is None else noise_every,
        )
        other.resplit(bound, cost)
        return other

    # Changes during a run

    def record_gradient_norm(self, window: Window, grad_norm: float | torch.Tensor) -> None:
        """Record the gradient norm of a window, for the noise scale and a batch size that follows it.

        Call it in each window's body, in all processes, before the scheduler's step.

        Args:
            window: The current window.
            grad_norm: Norm before clipping, over the weights of the prepared optimizers.
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
            self._windows.replan(self.plan.resized(self.epoch, self.window))

    def rewind_to(self, window: Window) -> None:
        """Go back to before the current window: it comes next, and meets the same random numbers."""
        self.window = window.number
        window.restore_rng_state()

    def resplit(self, bound: Bound, cost: Cost | None = None) -> None:
        """Split the windows to come under another bound, and by another cost model."""
        if cost is not None and cost != self.cost:  # costs of different models do not compare
            self._completed_costs = (0.0,) * len(self._completed_costs)
        self._windows.resplit(bound, cost or self.cost)

    def begin_trials(self) -> None:
        """Begin to try sizes: `state_dict()` has the bound of now until `end_trials`."""
        self._trial_bound = self.bound

    def end_trials(self, tuned: bool) -> None:
        """End the trials; `tuned`: the bound and the cost model of now are their result, and are kept."""
        self._trial_bound, self.tuned = None, tuned

    @property
    def trial_bound(self) -> Bound | None:
        """The bound that sizes are tried under; None outside trials."""
        return self._trial_bound

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return all that a loader needs to go on, as plain data that JSON can hold.

        That is the next window's position, what windows are split by (also where memory ran out, or sizes
        were tuned), the counters, and for a growing batch its sizes and the noise scale.
        """
        epoch, window = self.next_position
        state = {"seed": self.seed, "epoch": epoch, "window": window, **self.plan.place(epoch, window)}
        if self.noise_every:
            state["noise"] = self.noise.state_dict()
        if isinstance(size := self.plan.effective_batch_size, GrowingBatch):
            state["growth"] = size.state_dict()
        state["split"] = {
            "bound": sizes_of(self.trial_bound or self.bound),
            "cost": asdict(self.cost),
            "tuned": self.tuned,
            "budget": self._budget,
            "device": self._device,
        }
        state["counts"] = {name: getattr(self, name) for name in COUNTERS}
        return state

    def load_state_dict(self, state: Mapping[str, Any], *, same_budget: bool | None = None) -> None:
        """Go to where `state_dict` was taken; the next pass runs the rest of that epoch.

        Windows are the same with any budget. Under the same budget they are also split as before, with a
        bound that was lowered when memory ran out. Under another budget they are split by that.

        Args:
            state: From `state_dict()`, also of version 0.1.0.
            same_budget: Whether this loader has the budget and device of the state's. By default they are
                compared by the loader's own bound.
        """
        state = upgrade_state(state)
        if isinstance(size := self.plan.effective_batch_size, GrowingBatch):
            size.load_state_dict(state["growth"])
        if "noise" in state:
            self.noise = NoiseScale.of(state["noise"])
        self._windows.replan(self.plan.at(state))
        if "split" in state:
            self._restore_split(state["split"], same_budget)
        for name, count in state.get("counts", {}).items():
            setattr(self, name, count)
        self.seed = state["seed"]
        self.epoch, self.window, self._is_started = state["epoch"], state["window"], False

    def _restore_split(self, saved: Mapping[str, Any], same_budget: bool | None) -> None:
        compared = same_budget is None
        if compared:
            here = self._budget, self._device
            same_budget = here == (saved["budget"], saved["device"])
        if same_budget:
            memory = self.bound.memory if saved["bound"]["max_bytes"] is not None else None
            self.resplit(Bound(**saved["bound"], memory=memory), Cost(**saved["cost"]))
            self.tuned = saved["tuned"]
        elif compared and saved["tuned"] and self.bound.micro_batch_size is None:
            most = saved["bound"]["max_tokens"]  # a speed that was measured; never above this budget
            most = min(most, self.bound.max_tokens or most)
            self.resplit(replace(self.bound, max_tokens=most), Cost(**saved["cost"]))
            self.tuned = True

    # What a window asks of its loader (`window.WindowSource`)

    def begin_pass(self) -> bool:
        """Note that a pass begins; return whether an earlier pass was left before its end."""
        was_open, self._pass_is_open = self._pass_is_open, True
        return was_open

    def end_pass(self, split: LocalSplit, trained: bool) -> None:
        """Note that a pass has come to its end; `trained`: with gradients of all micro-batches.

        The first window does not tell what fits, as the optimizer's states come with its step.
        """
        self._pass_is_open = False
        if trained and self._has_stepped:
            self._completed_costs = tuple(map(max, self._completed_costs, split.costs))

    def has_fitted(self, split: LocalSplit) -> bool:
        """Whether each process has completed a micro-batch as expensive as the most expensive one here.

        Once memory has run out in a run, what fitted before may not fit again.
        """
        fitted = (cost <= done for cost, done in zip(split.costs, self._completed_costs, strict=True))
        return not self.replays and all(fitted)

    def idle_micro_batch(self, split: LocalSplit) -> MicroBatch:
        """Return a small micro-batch that counts no items."""
        return self._windows.idle(split.plan)

    def resplit_window(self, split: LocalSplit, bound: Bound) -> LocalSplit:
        """Split a window again, and all later ones, under a lower bound, as memory ran out."""
        self.resplit(bound)
        self.replays += 1
        plan = self._windows.split(split.plan.epoch, split.plan.window)
        again = self._local_split(plan, [self._pinned(m) for m in self._windows.collate_split(plan)])
        if again is None:
            raise RuntimeError("the window had items before it was split finer, and has none now")
        return again

    # Making windows

    def _collated_windows(
        self, windows: LocalWindows, epoch: int, start: int
    ) -> Iterator[tuple[Split, list[MicroBatch]]]:
        while not windows.plan.is_over(epoch, start):
            revision = windows.revision
            for local in self._collated_beside(windows, epoch, start):
                split, micro_batches = pickle.loads(local) if isinstance(local, bytes) else local
                yield split, [self._pinned(micro_batch) for micro_batch in micro_batches]
                start += 1
                if windows.revision != revision:  # what workers hold ready is split by the old bound
                    break

    def _collated_beside(self, windows: LocalWindows, epoch: int, start: int) -> DataLoader:
        return DataLoader(
            windows,
            sampler=windows.plan.walk(epoch, start),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=self.num_workers,
            worker_init_fn=ignore_signals,
            collate_fn=_identity,
            # Without a generator, the workers' seed would be drawn from the generator of dropout.
            generator=torch.Generator().manual_seed(self._workers_seed(epoch)),
        )

    def _workers_seed(self, epoch: int) -> int:
        numbers = [self.seed, epoch, self.accelerator.process_index]
        return int(np.random.SeedSequence(numbers).generate_state(1)[0])

    def _local_split(self, plan: Split, micro_batches: list[MicroBatch]) -> LocalSplit | None:
        """Count the window's items over all processes; give every process something to run.

        None for a window without items.
        """
        with_items = [micro_batch for micro_batch in micro_batches if micro_batch.num_items]
        empty = len(micro_batches) - len(with_items)
        here = [sum(m.num_items for m in with_items), len(with_items), empty, plan.tokens]
        counts = self._gather([*here, self._can_measure(plan, micro_batches)])
        _check_alike(counts[:, 3], plan.epoch, plan.window)
        num_items, most = counts[:, 0].sum(), int(counts[:, 1].max())
        self._count_empty(plan, int(counts[:, 2].sum()), num_items == 0)
        if num_items == 0:
            return None
        fewest = most if forwards_are_collective(self.accelerator) else 1
        if len(with_items) < fewest:
            with_items += [self._windows.idle(plan)] * (fewest - len(with_items))
        return LocalSplit(
            plan=plan,
            micro_batches=tuple(with_items),
            num_items=float(num_items),
            accumulation_steps=most,
            costs=self._windows.most_expensive(plan),
            bound=self.bound,
            noise_size=len(micro_batches[0].indices) if counts[:, 4].all() else 0,
        )

    def _can_measure(self, plan: Split, micro_batches: list[MicroBatch]) -> bool:
        """Whether the gradient of this process's first micro-batch, drawn at random, is there on its own."""
        whole = forwards_are_collective(self.accelerator) and self.whole_gradients
        with_items = [micro_batch.num_items > 0 for micro_batch in micro_batches]
        return plan.measures_noise and with_items[0] and sum(with_items) > 1 and not whole

    def _pinned(self, micro_batch: MicroBatch) -> MicroBatch:
        """Return a micro-batch in memory that a GPU can copy from beside its own work; on a CPU as it is."""
        if self.accelerator.device.type != "cuda":
            return micro_batch
        pinned = {
            key: value.pin_memory()
            if isinstance(value, torch.Tensor) and value.device.type == "cpu"
            else value
            for key, value in micro_batch.batch.items()
        }
        return replace(micro_batch, batch=pinned)

    def _gather(self, numbers: list[float]) -> np.ndarray:
        """Gather this process's numbers (numbers,) → (processes, numbers): the one exchange per window."""
        if self.accelerator.num_processes == 1:
            return np.array([numbers], dtype=np.float64)
        local = torch.tensor([numbers], dtype=torch.float64, device=self.accelerator.device)
        return send_to_device(self.accelerator.gather(local), "cpu").numpy()

    # Warnings

    def _check_lengths(self, tokens: np.ndarray, first: int = 0) -> None:
        """Warn once of examples that exceed the bound, of all or of a stream's next block."""
        too_large = self._windows.too_large(tokens, first)
        if too_large and not self._warned_too_large:
            logger.warning(too_large)
            self._warned_too_large = True

    def _warn_dropped(self) -> None:
        """Warn once of examples that `drop_last` leaves out; of a stream, after its first epoch."""
        if (left := self.plan.dropped(self.epoch)) and not self._warned_dropped:
            total = self.plan.num_examples
            logger.warning(f"drop_last: {left} of {total} examples are left out of each epoch")
            self._warned_dropped = True

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
    """Raise ValueError in all processes where their windows differ in tokens; 0 stands for no window."""
    different = sorted(set(tokens.astype(int).tolist()))
    if len(different) > 1:
        raise ValueError(
            f"window {window} of epoch {epoch} has {' and '.join(map(str, different))} tokens, by process: "
            "data must be the same, in the same order, in all of them"
        )


def _identity(local: Any) -> Any:
    return local


def _warn_of_prepared_schedulers(accelerator: Accelerator) -> None:
    for scheduler in prepared_schedulers(accelerator):
        logger.warning_once(
            f"{type(scheduler).__name__} was prepared by Accelerate, which steps it once per process: leave "
            "the scheduler out of accelerator.prepare() and step it once per window"
        )
