"""The loader that yields windows.

`WindowLoader` combines the examples of each window (`sampler.py`, `streaming.py`), the split of a window
(`splitting.py`), collated micro-batches (`collation.py`) and item counts (`loss_items.py`). A `Window`
(`window.py`) yields the micro-batches of this process and weighs the losses.
"""

import copy
import pickle
import sys
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
    LocalSplit,
    LocalWindows,
    MicroBatch,
    PadTo,
    Split,
    Transform,
)
from gradacc_hf.accumulation.lengths import Lengths, measure_lengths
from gradacc_hf.accumulation.loader_state import (
    COUNTERS,
    device_name,
    is_other_data,
    sizes_of,
    upgrade_state,
)
from gradacc_hf.accumulation.mixture import Sources, plan_of
from gradacc_hf.accumulation.noise_scale import NoiseScale
from gradacc_hf.accumulation.padding_layout import GROUPS_ON_CPU, GROUPS_ON_GPU
from gradacc_hf.accumulation.reference import as_number
from gradacc_hf.accumulation.same_data import SAME_DATA, check_same_data, checksum_of_split
from gradacc_hf.accumulation.sample_examples import different_examples, read_alone
from gradacc_hf.accumulation.sampler import EffectiveBatchSize, WindowPlan
from gradacc_hf.accumulation.splitting import Bound, Cost, usual_cost
from gradacc_hf.accumulation.streaming import BUFFER_SIZE, Stream, is_stream
from gradacc_hf.accumulation.validation import (
    check_arguments,
    check_padding_free,
    check_sizes,
    check_sources,
    check_stream,
    refuse_engine,
)
from gradacc_hf.accumulation.window import Window
from gradacc_hf.utils.logs import get_logger
from gradacc_hf.utils.signals import ignore_signals

logger = get_logger(__name__)


class WindowLoader:
    """Yield windows: `for window in loader: for batch in window: ...`. One pass is one epoch.

    Args:
        dataset: A `datasets.Dataset`, any sequence of examples, or a stream (below).
        effective_batch_size: Examples per optimizer step over all processes. A number, a function of the
            number of the window in the run (such as `ScheduledBatch`), or a `GrowingBatch`.
        accelerator: The Accelerator of the run. DeepSpeed and Megatron-LM are refused, as they accumulate by
            themselves.
        collate_fn: Examples → mapping of tensors. Called as `collate_fn(examples, pad_to=n)` if `pad_to`
            requires a length.
        max_tokens: Maximum padded tokens per micro-batch.
        micro_batch_size: Maximum examples per micro-batch, instead of `max_tokens`.
        bound: A `Bound` instead of the two above, such as a bound of predicted bytes. The split has the least
            predicted cost under the bound.
        num_items: The number of terms of the mean loss: "labels", "next_token" or `batch -> number`. For
            several losses, a mapping with the number of each: `{"mlm": "labels", "nsp": count_rows}`.
        lengths: Tokens of each example: a column name, a sequence, or a function of an example. By default
            the size of `input_ids`, or else of the main input, such as audio samples. Use an array (examples,
            columns) if an example has separately padded inputs, such as source and target.
        pad_to: "micro_batch" pads to the longest example of a micro-batch, "window" to the longest of a
            window, a number to this many tokens. "nothing" declares that the collate function packs the
            examples into one row. If padding changes the loss (question answering), only "window" and a
            number are exact.
        pad_to_multiple_of: Declares that the collate function pads to a multiple of this many tokens, like
            the same argument of transformers' collators. Planned sizes include it.
        columns_padded_together: Declares that the collate function pads all columns of `lengths` to one
            length, such as both answers of a preference pair.
        shuffle: Whether to draw the order of epoch e from (seed, e). Otherwise the order is the data set's.
        drop_last: Whether to leave out a partial last window.
        seed: Seed of the order and of `transform`.
        num_workers: Processes that collate in parallel with training.
        transform: `(example, numpy Generator) -> example`, for random masking, augmentation or cropping. The
            generator is seeded by (seed, epoch, index). The split, the number of processes and resuming
            therefore do not change the result. `lengths` are measured before the transform.
        cost: Predicted cost of a micro-batch; by default the cost model of the device.
        leave_out: Indices of examples to leave out. All other examples stay in their windows.
        whole_gradients: With FSDP, whether to accumulate unsharded gradients on every process and reduce them
            once per window. This needs less communication and more memory. By default the gradients of each
            micro-batch are reduced.
        buffer_size: Examples of a stream that are shuffled together; 1000 by default.
        padding_free: Whether the model computes no padding, after `gradacc_hf.remove_padding`. Micro-batches
            are then limited by tokens without padding, and are not sorted by length. Needs the default
            `pad_to`.
        noise_every: Measure the gradient noise scale every `noise_every` windows, starting with the first of
            each epoch; 0 disables it. The loop must call `record_gradient_norm` for each window.
        sources: The name of each example's source, for the loss of each source (`Window.source_losses`).
        shares: The share of each source by name, as numbers in any scale. Every window then holds these
            shares, to the nearest example. A source without further examples starts again. An epoch has as
            many windows as all examples fill. Not for streams.
        weights: The weight of each example in the loss, 0 or more. The loss is the mean over items, each with
            the weight of the example. The loss functions of torch are replaced while the loop body runs.

    Raises:
        ValueError: An argument cannot work. The message is one line.

    A stream is a `datasets.IterableDataset`, or any iterable without a length. Each iteration must start from
    the beginning and give the same examples in every process. Each process reads the whole stream, and
    collates only its own micro-batches. Reading and tokenizing therefore take as long on many processes as
    on one. The loader calls `set_epoch` of the stream, if it exists, before reading. It measures lengths
    block by block. The index of an example is its position in the stream.

    Resuming starts at the current block if a `datasets.IterableDataset` can store this position, and
    otherwise at the beginning of the epoch. A data set with its own shuffle buffer cannot store it. Examples
    of earlier windows are not available, and `len()` raises TypeError.

    Attributes:
        epoch, window: Position in the run. In the body of the loop, the current window counts as done.
        noise: The gradient noise scale measured so far.
        empty_micro_batches, empty_windows: Numbers of skipped micro-batches and windows without items.
        replays: Number of windows that were run again because memory ran out.
        seconds_to_collate: Seconds that the loop waited for the latest window.
        tuned: Whether the bound and the cost model come from trials (`training/autotune.py`).
        example_losses: For each example, the sum of the losses and the number of items (examples, 2), which
            `evaluate` adds; None: they are not recorded.
    """

    example_losses: np.ndarray | None = None
    _trial_bound: Bound | None = None

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
        num_items: items.NumItems = "labels",
        lengths: Lengths = None,
        pad_to: PadTo = "micro_batch",
        pad_to_multiple_of: int | None = None,
        columns_padded_together: bool = False,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        transform: Transform | None = None,
        cost: Cost | None = None,
        leave_out: Collection[int] = (),
        whole_gradients: bool = False,
        buffer_size: int | None = None,
        padding_free: bool = False,
        noise_every: int = 0,
        sources: Sequence[str] | None = None,
        shares: Mapping[str, float | str] | None = None,
        weights: Sequence[float] | np.ndarray | None = None,
    ):
        refuse_engine(accelerator)
        check_stream(dataset, lengths, num_workers, buffer_size)
        check_arguments(dataset, effective_batch_size, collate_fn, pad_to, pad_to_multiple_of)
        check_sizes(bound, max_tokens, micro_batch_size, noise_every)
        checked_weights = check_sources(dataset, sources, shares, weights, num_items)
        if padding_free:
            check_padding_free(pad_to)
        self.accelerator, self.num_workers, self.whole_gradients = accelerator, num_workers, whole_gradients
        self.seed, self.epoch, self.window, self.seconds_to_collate = seed, 0, 0, 0.0
        self.empty_micro_batches = self.empty_windows = self.replays = 0
        self.noise, self.tuned = NoiseScale(), False
        self._is_started = self._has_stepped = self._pass_is_open = False
        self._warned_too_large = self._warned_dropped = False
        self._compares_rows = accelerator.num_processes > 1
        self._completed_costs = (0.0,) * accelerator.num_processes
        bound = bound or Bound(max_tokens, micro_batch_size)
        measure = partial(measure_lengths, lengths=lengths, bounds=bound.micro_batch_size is None)
        self._budget, self._device = sizes_of(bound), device_name(accelerator)  # `bound` may be lowered later
        found = Sources.of(sources, shares, len(dataset)) if sources is not None else None
        if is_stream(dataset):
            size = int(buffer_size or BUFFER_SIZE)
            plan = Stream(dataset, effective_batch_size, seed, shuffle, drop_last, size, measure)
            plan.check, dataset, tokens = self._check_lengths, plan, plan.tokens
        else:
            plan = plan_of(found, len(dataset), effective_batch_size, seed, shuffle, drop_last)
            tokens = measure(dataset)
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
            columns_padded_together=columns_padded_together,
            leave_out=leave_out,
            noise_every=noise_every,
            padding_free=padding_free,
            layout_cost=GROUPS_ON_GPU if accelerator.device.type == "cuda" else GROUPS_ON_CPU,
            sources=found,
            weights=checked_weights,
        )
        if isinstance(tokens, np.ndarray):
            self._check_lengths(tokens)
        self._warn_dropped()

    def __len__(self) -> int:
        """Return the number of windows in the current epoch. Raise TypeError for a stream."""
        return self.plan.num_windows(self.epoch)

    def __iter__(self) -> Iterator[Window]:
        if self._is_started:
            self.epoch, self.window = self.epoch + 1, 0
        self._is_started, asked = True, time.perf_counter()
        self._windows.compare_at = (self.epoch, self.window) if self._compares_rows else None
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
        ended = self._gather(
            [0] * (6 + len(self._names_of_losses))
        )  # pairs with `_gather` of a process that has another window
        _check_alike(ended[:, 3], self.epoch, self.window)
        self._warn_dropped()

    # The settings of the windows

    @property
    def plan(self) -> WindowPlan | Stream:
        """The plan that assigns examples to windows."""
        return self._windows.plan

    @property
    def tokens(self) -> Any:
        """Tokens of each example (examples, columns). A stream has only the examples in memory."""
        return self._windows.tokens

    @property
    def lengths(self) -> Any:
        """Tokens of each example, summed over columns (examples,)."""
        return self._windows.lengths

    @property
    def bound(self) -> Bound:
        """The upper limit of one micro-batch. It is lowered when memory runs out."""
        return self._windows.bound

    @property
    def cost(self) -> Cost:
        """Predicted cost of a micro-batch."""
        return self._windows.cost

    @property
    def pad_to(self) -> PadTo:
        """The padding of micro-batches."""
        return self._windows.pad_to

    @property
    def pad_to_multiple_of(self) -> int:
        """The divisor of all padded lengths, in tokens."""
        return self._windows.pad_to_multiple_of

    @property
    def count_items(self) -> items.CountItems:
        """The function that counts the items of a batch."""
        return self._windows.count_items

    @count_items.setter
    def count_items(self, count: items.CountItems) -> None:
        self._windows.count_items = count

    @property
    def limit(self) -> str:
        """The bound for a message, after the words "at most"."""
        return self.bound.text("tokens" if self.padding_free else "padded tokens")

    @property
    def padding_free(self) -> bool:
        """Whether windows are split for a model that computes no padding."""
        return self._windows.padding_free

    @property
    def sources(self) -> Sources | None:
        """The sources of the examples, if they were given."""
        return self._windows.sources

    @property
    def weighs_examples(self) -> bool:
        """Whether examples have weights in the loss."""
        return self._windows.weights is not None

    @property
    def noise_every(self) -> int:
        """Windows from one measurement of the gradient noise scale to the next; 0 measures none."""
        return self._windows.noise_every

    @property
    def num_growths(self) -> int:
        """The number of times that the effective batch size has grown."""
        size = self.plan.effective_batch_size
        return len(size.sizes) - 1 if isinstance(size, GrowingBatch) else 0

    @property
    def next_position(self) -> tuple[int, int]:
        """The next window, as (epoch, window)."""
        over = self.plan.is_over(self.epoch, self.window)
        return (self.epoch + 1, 0) if over else (self.epoch, self.window)

    # Reading windows

    def split(self, epoch: int, window: int) -> Split:
        """Split a window from lengths alone, without reading or collating examples."""
        return self._windows.split(epoch, window)

    def split_lengths(self, tokens: np.ndarray) -> list[np.ndarray]:
        """Split a window with these tokens (examples, columns), and return the tokens by micro-batch."""
        split = self._windows.split_examples(np.arange(len(tokens)), tokens, epoch=0, window=0)
        return [tokens[positions] for process in split.processes for positions in process]

    def collate_window(
        self, epoch: int, window: int, process: int | None = None, num_processes: int | None = None
    ) -> list[MicroBatch]:
        """Collate the micro-batches of a window on the host, for any process of any number of processes."""
        own = replace(
            self._windows,
            process=self._windows.process if process is None else process,
            num_processes=num_processes or self._windows.num_processes,
        ).apart(epoch, window)
        return own.collate_split(own.split(epoch, window))

    def shape(self, indices: np.ndarray, pad_to: int | None = None) -> tuple[int, list[int]]:
        """Return the rows of a micro-batch of these examples, and the padded tokens of each column."""
        return self._windows.shape(indices, pad_to)

    def half_bytes(self, indices: np.ndarray) -> int:
        """Return the predicted bytes of half of a micro-batch without padding; 0 where none are predicted."""
        return self._windows.half_bytes(indices)

    def spread_splits(self, number: int, end: int | None = None) -> list[Split]:
        """Split windows of the first epoch, evenly spaced: at most `number` of the first `end` windows."""
        last = min(self.plan.num_windows(0), end or sys.maxsize) - 1
        return [self.split(0, int(window)) for window in np.unique(np.linspace(0, last, number).astype(int))]

    def predicted_cost(self, split: Split) -> float:
        """Return the predicted cost of a window, in tokens, of the process with the highest cost."""
        return self._windows.total_cost(split)

    def micro_batches(self) -> Iterator[tuple[MicroBatch, dict[str, Any]]]:
        """Iterate the micro-batches of this process in one pass over the data, with batches on the device.

        The pass is for evaluation. It includes micro-batches without items. Neither Accelerate's accumulation
        state nor the position of the loader changes. If forwards are collective (FSDP), all processes get the
        same number of micro-batches.
        """
        windows, compares = self._windows.apart(epoch=0, window=0), self._compares_rows
        windows.compare_at = (0, 0) if compares else None
        for split, micro_batches in self._collated_windows(windows, epoch=0, start=0):
            if compares and not split.window:
                self._check_same_data(windows, split, self._gather([checksum_of_split(split)])[:, 0])
                windows.compare_at = None
            most = max(map(len, split.processes))
            while forwards_are_collective(self.accelerator) and len(micro_batches) < most:
                micro_batches.append(windows.collate(split.indices[:1], 0, split.pad_to, counts=False))
            for micro_batch in micro_batches:
                yield micro_batch, micro_batch.batch_on_device(self.accelerator)

    def collated(self, indices: Sequence[int] | np.ndarray, pad_to: int | None = None) -> MicroBatch:
        """Collate examples of the current epoch into one batch on the device, without their weights."""
        windows = replace(self._windows, weights=None)
        return windows.collate(np.asarray(indices), self.epoch, pad_to).on_device(self.accelerator)

    def examples(self, indices: Sequence[int] | np.ndarray) -> list[Any]:
        """Return examples of the current epoch, not collated."""
        return self._windows.examples(np.asarray(indices), self.epoch)

    def sample(self, most: int = 16, bounds: int = 1) -> tuple[list[MicroBatch], MicroBatch, int | None]:
        """Return different examples of the first windows, each alone, and all together, to test a loss.

        The examples have labels, item counts and lengths that are as different as possible, and no weights.
        The third value is the length to which they are padded, or None for the longest.

        Args:
            most: Largest number of examples. It is lower if more would exceed the bounds.
            bounds: Micro-batches that fit into memory at once: several, if no gradients are computed.
        """
        self.plan.ahead(self.epoch, self.window, 1)  # a stream reads the next window and keeps it
        windows = replace(self._windows.apart(epoch=0, window=0), weights=None)
        alone, pad_to = read_alone(windows)
        if not alone:
            raise ValueError("no example of the data set has an item: every label is ignored")
        longest = windows.padded(np.concatenate([windows.tokens[each.indices] for each in alone])).max(0)
        packed = self.pad_to == "nothing"
        rows = 2 if packed else max(2, min(most, bounds * self.bound.max_rows(longest)))
        alone = different_examples(alone, rows)
        together = windows.collate(np.concatenate([each.indices for each in alone]), 0, pad_to)
        alone = [each.on_device(self.accelerator) for each in alone]
        return alone, together.on_device(self.accelerator), pad_to

    # Other loaders of the same windows

    def copy(self, num_windows: int) -> "WindowLoader":
        """Return a copy at the same position, to test a model, without weights of examples and noise scale.

        If each of the next `num_windows` windows would be one micro-batch, the copy splits finer.
        """
        bound, windows = self.bound, replace(self._windows, noise_every=0)
        splits = [windows.split(*number) for number in self.plan.ahead(self.epoch, self.window, num_windows)]
        if all(max(map(len, split.processes)) == 1 for split in splits):
            bound = Bound(micro_batch_size=max(1, min(len(split.indices) for split in splits) // 3))
        other = self.with_bound(bound, noise_every=0)
        other._windows = replace(other._windows.apart(self.epoch, self.window), weights=None)
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
        """Return a copy at the same position that splits under another bound.

        Args:
            bound: The upper limit of one micro-batch.
            num_processes: Processes to plan for; by default the processes of the run.
            cost: Predicted cost of a micro-batch; by default as in this loader.
            noise_every: Windows between measurements of the noise scale; by default as in this loader.
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

    def without_padding(self) -> None:
        """Split later windows for a model that computes no padding, after `gradacc_hf.remove_padding`."""
        check_padding_free(self.pad_to)
        self._windows.padding_free = True
        self._windows.revision += 1

    def measure_noise(self, every: int) -> None:
        """Measure the gradient noise scale every `every` windows from now on."""
        self._windows.noise_every = every
        self._windows.revision += 1

    def record_gradient_norm(self, window: Window, grad_norm: float | torch.Tensor) -> None:
        """Record the gradient norm of a window, for the noise scale and for a `GrowingBatch`.

        Call it in the body of the loop over windows, in all processes, before the scheduler's step.

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
        scale = broadcast_object_list([self.noise.scale])[0]  # the same decision in all processes
        if size.grow(self.plan.number(self.epoch, self.window), scale):
            self._windows.replan(self.plan.resized(self.epoch, self.window))

    def rewind_to(self, window: Window) -> None:
        """Go back to the start of the current window, with the random state from this point."""
        self.window = window.number
        window.restore_rng_state()

    def resplit(self, bound: Bound, cost: Cost | None = None) -> None:
        """Split later windows under another bound, and with another cost model."""
        if cost is not None and cost != self.cost:  # costs of different models cannot be compared
            self._completed_costs = (0.0,) * len(self._completed_costs)
        self._windows.resplit(bound, cost or self.cost)

    def begin_trials(self) -> None:
        """Begin trials of sizes. Until `end_trials`, `state_dict()` has the present bound."""
        self._trial_bound = self.bound

    def end_trials(self, tuned: bool) -> None:
        """End the trials. With `tuned`, the present bound and cost model are the result."""
        self._trial_bound, self.tuned = None, tuned

    @property
    def trial_bound(self) -> Bound | None:
        """The bound from before the trials; None outside trials."""
        return self._trial_bound

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the loader as plain data, which JSON can store.

        The state is the position of the next window, the settings of the split, the counters, and a checksum
        of the lengths of the examples. It includes a bound that was lowered or tuned. With `noise_every`, it
        has the noise scale. With a `GrowingBatch`, it has the sizes.
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
        state["data"] = self._windows.identity
        return state

    def load_state_dict(self, state: Mapping[str, Any], *, same_budget: bool | None = None) -> None:
        """Restore a state. The next pass runs the rest of the epoch.

        Warn if the data have another length or examples of other lengths.

        The windows are the same with any budget. With the same budget and device, the split is the same, too,
        including a bound that was lowered when memory ran out. With another budget, the split follows it.

        Args:
            state: From `state_dict()`, also of version 0.1.0.
            same_budget: Whether budget and device are the same as in the state. By default, the bound that
                was given to this loader and the device are compared.
        """
        state = upgrade_state(state)
        if isinstance(size := self.plan.effective_batch_size, GrowingBatch):
            size.load_state_dict(state["growth"])
        if "noise" in state:
            self.noise = NoiseScale.of(state["noise"])
        self._windows.replan(self.plan.at(state))
        if is_other_data(state.get("data"), self._windows.identity):
            logger.warning(
                "the state is from other data: examples were added, removed, changed or moved since, so that "
                "some may come twice and others never. Load a state of the same data"
            )
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
            most = saved["bound"]["max_tokens"]  # keep the tuned size, up to this budget
            most = min(most, self.bound.max_tokens or most)
            self.resplit(replace(self.bound, max_tokens=most), Cost(**saved["cost"]))
            self.tuned = True

    # The interface for windows (`window.WindowSource`)

    def begin_pass(self) -> bool:
        """Record the start of a pass. Return whether an earlier pass was left before the end."""
        was_open, self._pass_is_open = self._pass_is_open, True
        return was_open

    def end_pass(self, split: LocalSplit, trained: bool) -> None:
        """Record the end of a pass, and whether all micro-batches gave gradients (`trained`).

        The costs of the first window do not count, as the optimizer allocates its states in the first step.
        """
        self._pass_is_open = False
        if trained and self._has_stepped:
            self._completed_costs = tuple(map(max, self._completed_costs, split.costs))

    def has_fitted(self, split: LocalSplit) -> bool:
        """Whether each process has completed a micro-batch as expensive as the most expensive one here.

        False once memory has run out in a run, as a micro-batch that fitted before may not fit again.
        """
        fitted = (cost <= done for cost, done in zip(split.costs, self._completed_costs, strict=True))
        return not self.replays and all(fitted)

    def idle_micro_batch(self, split: LocalSplit) -> MicroBatch:
        """Return a small micro-batch that counts no items."""
        return self._windows.idle(split.plan)

    def resplit_window(self, split: LocalSplit, bound: Bound) -> LocalSplit:
        """Split this window and all later windows under a lower bound, after memory ran out."""
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
                if windows.revision != revision:  # workers have prepared windows with the old bound
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
        """Count the items of a window over all processes, and give every process a micro-batch to run.

        Return None for a window without items.
        """
        with_items = [micro_batch for micro_batch in micro_batches if micro_batch.num_items]
        empty = len(micro_batches) - len(with_items)
        here = [sum(m.num_items for m in with_items), len(with_items), empty, plan.tokens]
        several = self.accelerator.num_processes > 1
        here += [self._can_measure(plan, micro_batches), checksum_of_split(plan) if several else 0]
        names = self._names_of_losses
        here += [sum(m.items[name] for m in with_items) for name in names]
        counts = self._gather(here)
        _check_alike(counts[:, 3], plan.epoch, plan.window)
        self._check_same_data(self._windows, plan, counts[:, 5])
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
            items=dict(zip(names, counts[:, 6:].sum(0).tolist(), strict=True)),
            accumulation_steps=most,
            costs=self._windows.most_expensive(plan),
            bound=self.bound,
            noise_size=sum(
                len(micro_batch.indices) for micro_batch in micro_batches[: plan.noise_micro_batches]
            )
            if counts[:, 4].all()
            else 0,
        )

    @property
    def _names_of_losses(self) -> list[str]:
        """Names of several losses, each with items of its own; none for a single loss."""
        count = self.count_items
        return list(count.counts) if isinstance(count, items.CountSeveral) else []

    def _check_same_data(self, windows: LocalWindows, split: Split, checksums: np.ndarray) -> None:
        """Raise ValueError in all processes if their checksums of a window show other data."""
        differ = len(set(checksums.tolist())) > 1
        if differ:
            check_same_data(windows, split)
        if differ or (split.rows and not isinstance(self.plan, Stream)):  # cannot be compared, or is alike
            self._compares_rows, self._windows.compare_at = False, None

    def _can_measure(self, plan: Split, micro_batches: list[MicroBatch]) -> bool:
        """Whether the gradient of the first micro-batches, drawn at random, can be read separately."""
        whole = forwards_are_collective(self.accelerator) and self.whole_gradients
        with_items = [micro_batch.num_items > 0 for micro_batch in micro_batches]
        first = plan.noise_micro_batches
        return first > 0 and all(with_items[:first]) and sum(with_items) > first and not whole

    def _pinned(self, micro_batch: MicroBatch) -> MicroBatch:
        """Return a micro-batch in pinned memory, which a GPU can copy while computing. No change on a CPU."""
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
        """Gather (numbers,) of this process → (processes, numbers): the only exchange per window."""
        if self.accelerator.num_processes == 1:
            return np.array([numbers], dtype=np.float64)
        local = torch.tensor([numbers], dtype=torch.float64, device=self.accelerator.device)
        gathered: Any = send_to_device(self.accelerator.gather(local), "cpu")
        return gathered.numpy()

    # Warnings

    def _check_lengths(self, tokens: np.ndarray, first: int = 0) -> None:
        """Warn once of examples that exceed the bound: in the data set, or in the next block of a stream."""
        too_large = self._windows.too_large(tokens, first)
        if too_large and not self._warned_too_large:
            logger.warning(too_large)
            self._warned_too_large = True

    def _warn_dropped(self) -> None:
        """Warn once of examples that `drop_last` leaves out. For a stream, warn after the first epoch."""
        if (left := self.plan.dropped(self.epoch)) and not self._warned_dropped:
            total = self.plan.num_examples
            logger.warning(f"drop_last: {left} of {total} examples are left out of each epoch")
            self._warned_dropped = True

    def _count_empty(self, split: Split, empty_micro_batches: int, window_is_empty: bool) -> None:
        if empty_micro_batches and not self.empty_micro_batches:
            why = "every label is ignored" + " or has weight 0" * self.weighs_examples
            logger.warning(f"some micro-batches have no item ({why}): they are skipped and counted")
        if window_is_empty and not self.empty_windows:
            logger.warning(
                f"window {split.window} of epoch {split.epoch} has no item: it is skipped and counted"
            )
        self.empty_micro_batches += empty_micro_batches
        self.empty_windows += int(window_is_empty)


def _check_alike(tokens: np.ndarray, epoch: int, window: int) -> None:
    """Raise ValueError in all processes if the tokens of a window differ by process; 0 means no window."""
    different = sorted(set(tokens.astype(int).tolist()))
    if len(different) > 1:
        raise ValueError(
            f"window {window} of epoch {epoch} has {' and '.join(map(str, different))} tokens, by process: "
            f"{SAME_DATA}"
        )


def _identity(local: Any) -> Any:
    return local


def _warn_of_prepared_schedulers(accelerator: Accelerator) -> None:
    for scheduler in prepared_schedulers(accelerator):
        logger.warning_once(
            f"{type(scheduler).__name__} was prepared by Accelerate, which steps it once per process: do not "
            "pass the scheduler to accelerator.prepare(), and step it once per window"
        )
