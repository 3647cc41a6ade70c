"""One window: it yields the micro-batches of this process on the device, and weighs the losses.

With these weights, every split gives the gradient of the whole window at once. `loader.py` makes the windows.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator

from gradacc_hf.accumulation.accelerate_state import (
    AccumulationSteps,
    forwards_are_collective,
    zero_prepared_gradients,
)
from gradacc_hf.accumulation.collation import LocalSplit, MicroBatch
from gradacc_hf.accumulation.example_losses import ExampleLosses
from gradacc_hf.accumulation.loss_items import Loss, losses_by_name
from gradacc_hf.accumulation.mixture import Sources
from gradacc_hf.accumulation.noise_probe import NoiseProbe
from gradacc_hf.accumulation.noise_scale import SmallBatch
from gradacc_hf.accumulation.oom_exchange import OomExchange
from gradacc_hf.accumulation.rng_replay import RngReplay
from gradacc_hf.accumulation.splitting import Bound
from gradacc_hf.errors import LoopError
from gradacc_hf.utils.modeling import BufferSnapshot
from gradacc_hf.utils.rng import rng_states, set_rng_states

ACCUMULATE = "with accelerator.accumulate(model):"
PREPARE = "model, optimizer = accelerator.prepare(model, optimizer)"
WEIGH = "accelerator.backward(window.weigh(loss))"


class WindowSource(Protocol):
    """The interface of the loader that a window uses."""

    accelerator: Accelerator
    whole_gradients: bool

    @property
    def sources(self) -> Sources | None:
        """The sources of the examples."""
        ...

    @property
    def weighs_examples(self) -> bool:
        """Whether examples have weights in the loss."""
        ...

    def begin_pass(self) -> bool:
        """Record the start of a pass. Return whether an earlier pass was left before the end."""
        ...

    def end_pass(self, split: LocalSplit, trained: bool) -> None:
        """Record the end of a pass, and whether all micro-batches gave gradients (`trained`)."""
        ...

    def has_fitted(self, split: LocalSplit) -> bool:
        """Whether each process has completed a micro-batch as expensive as the most expensive one here."""
        ...

    def idle_micro_batch(self, split: LocalSplit) -> MicroBatch:
        """Return a small micro-batch that counts no items."""
        ...

    def resplit_window(self, split: LocalSplit, bound: Bound) -> LocalSplit:
        """Split this window and all later windows under a lower bound."""
        ...

    def shape(self, indices: np.ndarray, pad_to: int | None = None) -> tuple[int, list[int]]:
        """Return the rows of a micro-batch of these examples, and the padded tokens of each column."""
        ...

    def half_bytes(self, indices: np.ndarray) -> int:
        """Return the predicted bytes of half of a micro-batch without padding; 0 where none are predicted."""
        ...


class Window:
    """One optimizer step: iterate the micro-batches of this process, and `weigh` the loss of each.

        for batch in window:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(window.weigh(loss))
                optimizer.step()
                optimizer.zero_grad()

    The micro-batches stay on the host and move to the device one at a time. A window can be iterated again:
    each micro-batch then gets the random numbers (dropout) of the first pass. A pass with gradients enabled
    must call `accelerator.accumulate` and `weigh` for every micro-batch, and step a prepared optimizer.
    Otherwise it raises LoopError. `batches()` reads the micro-batches without any effect on training.

    Attributes:
        epoch: Epoch of the window, from 0.
        number: Number of the window in the epoch, from 0.
        indices: Dataset indices of the window's examples, over all processes (examples,).
        tokens: Tokens without padding, over all processes.
        split: The split into micro-batches. A new split replaces it when memory runs out.
        small: Gradient norm of the first micro-batches, if the loader measures the noise scale.
        done: Whether a pass is complete and the optimizer step is taken.
        latest_position: Position of the latest micro-batch.
        buffers: Copy of the model's buffers from the start of `retry_on_oom`.
    """

    def __init__(self, split: LocalSplit, source: WindowSource):
        self.split, self._source = split, source
        self.epoch, self.number = split.plan.epoch, split.plan.window
        self.indices, self.tokens = split.plan.indices, split.plan.tokens
        self.done = False
        self.small: SmallBatch | None = None
        self.latest_position = 0
        self.buffers: BufferSnapshot | None = None
        self._rng = RngReplay(self.accelerator.device)
        self._position: int | None = None
        self._pass_position: int | None = None  # position of the training pass; `batches()` may run inside it
        self._num_begun = 0  # micro-batches begun, over all passes
        self._weighed: set[int] = set()
        self._loss_here: Any = 0.0
        self._loss: Any = None
        self._latest_losses: list[torch.Tensor] = []  # argument of the latest `weigh`
        self._examples: ExampleLosses | None = None  # of the current micro-batch
        self._of_sources: Any = None  # (2, sources): sum of losses and items, over all processes at the end

    def __len__(self) -> int:
        """Return the accumulation steps of this process in this window."""
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        accelerator, checks_calls = self.accelerator, torch.is_grad_enabled()
        if self._source.begin_pass():
            zero_prepared_gradients(accelerator)  # from the pass that was left before the step
        earlier = self._loss, self._weighed, self.small, self._of_sources
        self._loss, self._loss_here, self._weighed, self.small = None, 0.0, set(), None
        self._of_sources = None
        measured = min(max(1, self.split.plan.noise_micro_batches), len(self))
        probe = NoiseProbe(accelerator, self.split.noise_size, sum(map(self._share, range(measured))))
        # With FSDP, accumulating without synchronising holds unsharded gradients on every process.
        sync_each_batch = forwards_are_collective(accelerator) and not self._source.whole_gradients
        try:
            with AccumulationSteps(accelerator, len(self), sync_each_batch) as steps:
                for position in range(len(self)):
                    self._begin_micro_batch(position)
                    steps.begin(position)
                    self._rng.enter(position)
                    with self._examples_apart(position) as batch:
                        yield batch
                    if checks_calls and (entries := steps.count_entries(position)) != 1:
                        raise self._not_accumulated(position, entries)
                    if position == measured - 1 and self._weighed:
                        probe.measure()
            if self.split.ends_idle:  # a resumed run has other idle micro-batches, and the same dropout
                self._rng.rewind(len(self) - 1)
            self._end_pass(probe, steps.early_steps, checks_calls)
        finally:
            self._position = self._pass_position = None
            if not (checks_calls or self._weighed):  # a pass that only reads keeps the earlier loss
                self._loss, self._weighed, self.small, self._of_sources = earlier

    def batches(self) -> Iterator[dict[str, Any]]:
        """Iterate the micro-batches of this process to read them, before, inside or after a training pass.

        This does not change training: gradients, Accelerate's accumulation state, `loss`, or random numbers.
        At the end, the random number generators return to their states from before.
        """
        device = self.accelerator.device
        position_before, num_begun, states = self._position, self._num_begun, rng_states(device)
        try:
            for position, micro_batch in enumerate(self.micro_batches):
                self._position = position
                yield micro_batch.batch_on_device(self.accelerator)
        finally:
            if self._num_begun == num_begun:  # an iterator may be closed late, after further training
                self._position = position_before
                set_rng_states(states, device)

    def forward_pass(self) -> Iterator[dict[str, Any]]:
        """Iterate the micro-batches of this process for forwards that belong to training, as in `look_ahead`.

        Gradients, Accelerate's accumulation state and `loss` do not change. Each micro-batch gets the same
        random numbers (dropout) as in training, even if this pass is the first.
        """
        try:
            for position in range(len(self)):
                self._begin_micro_batch(position)
                self._rng.enter(position)
                yield self.micro_batches[position].batch_on_device(self.accelerator)
        finally:
            self._position = self._pass_position = None

    def weigh(self, loss: Loss) -> torch.Tensor:
        """Weigh the loss of the latest micro-batch, for `accelerator.backward`.

        The weight is the micro-batch's share of the window's items × accumulation steps × processes.
        `accelerator.backward` divides by the accumulation steps, and DDP or FSDP by the processes.

        Args:
            loss: The mean loss over the micro-batch's items, a scalar tensor. If the loader's `num_items` is
                a mapping, a mapping of the losses with these names: each is weighed by items of its own.

        Returns:
            The weighed loss, a float32 scalar tensor (float64 for a float64 loss); several losses are added.
            NaN if a loss is not finite, as the gradient of an infinite loss can be finite.

        Raises:
            LoopError: The call is outside `for batch in window`.
            ValueError: A loss is not a scalar tensor, or the names differ from `num_items`.
        """
        position = self._position if self._pass_position is None else self._pass_position
        if position is None:
            raise LoopError("weigh() needs the micro-batch of a loop: call it inside `for batch in window`")
        parts = [(_checked(part), share) for part, share in self._parts(loss, position)]
        self._latest_losses = [part for part, _ in parts]
        divided_by = self.accelerator.gradient_accumulation_steps * self.accelerator.num_processes
        weighed: Any = 0.0
        for part, share in parts:
            part = part.reshape(()).to(torch.promote_types(part.dtype, torch.float32))
            part = part * torch.where(part.detach().isfinite(), 1.0, math.nan)
            self._loss_here = self._loss_here + part.detach() * share
            weighed = weighed + part * (share * divided_by)
        if self._examples is not None:
            self._examples.record(self._latest_losses[0], checks=position == 0)
        self._weighed.add(position)
        return weighed

    @property
    def loss(self) -> float:
        """The exact mean loss over the window's items, over all processes; the sum of several losses.

        Raise LoopError before the end of the last micro-batch.
        """
        if self._loss is None or len(self._weighed) < len(self):
            raise LoopError(
                "window.loss needs the loss of every micro-batch: pass each loss through weigh(), and read "
                "window.loss after the last micro-batch"
            )
        return float(self._loss)

    @property
    def source_losses(self) -> Mapping[str, float]:
        """The exact mean loss over the items of each source in the window, over all processes, by name.

        It is NaN for a source without items here. Empty without sources, and for a loss that is not a mean
        from a loss function of torch.
        """
        sources = self._source.sources
        if sources is None or self._of_sources is None or not self.done:
            return {}
        losses, items = np.asarray(self._of_sources.tolist())
        if not (np.isfinite(losses).any() and items.any()):
            return {}
        with np.errstate(invalid="ignore", divide="ignore"):
            return dict(zip(sources.names, (losses / items).tolist(), strict=True))

    @property
    def accelerator(self) -> Accelerator:
        """The Accelerator of the run."""
        return self._source.accelerator

    @property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        """The micro-batches of this process, on the host."""
        return self.split.micro_batches

    @property
    def num_items(self) -> float:
        """Items of the window, over all processes."""
        return self.split.num_items

    @property
    def padded_tokens(self) -> int:
        """Tokens with padding, over all processes."""
        return self.split.plan.padded_tokens

    @property
    def pad_to(self) -> int | None:
        """Tokens to which every micro-batch is padded; None if each is padded to the longest example."""
        return self.split.plan.pad_to

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of the process with the most micro-batches."""
        return self.split.accumulation_steps

    @property
    def measures_noise(self) -> bool:
        """Whether the first micro-batches are drawn at random, to measure the gradient noise scale."""
        return self.split.noise_size > 0

    @property
    def position(self) -> int | None:
        """Position of the current micro-batch in this process, from 0; None outside a loop."""
        return self._position

    @property
    def micro_batch(self) -> MicroBatch:
        """The current micro-batch, on the host. Raise LoopError outside a loop over the micro-batches."""
        if self._position is None:
            raise LoopError("a window has a current micro-batch only inside `for batch in window`")
        return self.micro_batches[self._position]

    # For the training loop and `retry_on_oom`

    def is_weighed(self, position: int) -> bool:
        """Whether the loss of this micro-batch was weighed in the latest pass."""
        return position in self._weighed

    def restore_rng_state(self) -> None:
        """Restore the random state from the start of the first micro-batch."""
        self._rng.rewind()

    def restore_buffers(self) -> None:
        """Restore the model's buffers from the start of `retry_on_oom`."""
        if self.buffers is not None:
            self.buffers.restore()

    def release_graph(self) -> None:
        """Free the activations of the latest losses, which the loop may still reference."""
        for loss in self._latest_losses:
            if not loss.is_leaf:
                loss.detach_()
        self._latest_losses = []

    @property
    def oom_exchange(self) -> OomExchange:
        """The exchange between processes on whether this split fitted in memory."""
        pad_to = self.pad_to
        return OomExchange(
            self.accelerator,
            lambda indices: self._source.shape(indices, pad_to),
            self._source.half_bytes,
            self.split.bound,
        )

    def separate_synchronisation(self) -> None:
        """Append an idle micro-batch that synchronises gradients, while memory may still run out.

        DDP synchronises in the backward of the last micro-batch. A failed synchronisation cannot be repeated.
        A window is safe once each process has completed an equally expensive micro-batch. Before this, the
        processes accumulate separately and report success. Then they synchronise in the idle micro-batch,
        which has weight 0.
        """
        accelerator, split = self.accelerator, self.split
        if accelerator.num_processes == 1 or forwards_are_collective(accelerator) or split.ends_idle:
            return
        if not self._source.has_fitted(split):
            self.split = split.with_idle_end(self._source.idle_micro_batch(split))

    def split_finer(self, bound: Bound) -> None:
        """Start again with a finer split. The loader uses the bound for all later windows, too."""
        self.split = self._source.resplit_window(self.split, bound)
        self._rng = RngReplay(self.accelerator.device)
        self._loss, self._weighed = None, set()

    # One pass

    @contextmanager
    def _examples_apart(self, position: int) -> Iterator[dict[str, Any]]:
        """Yield the batch on the device. In the block, losses have the weights of the examples."""
        micro_batch = self.micro_batches[position]
        batch, found = micro_batch.batch_on_device(self.accelerator), micro_batch.examples
        if found is None:
            yield batch
            return
        number = len(self._source.sources.names) if self._source.sources else 1
        self._examples = ExampleLosses(found, batch, number, self._source.weighs_examples)
        try:
            with self._examples.active():
                yield batch
            if len(micro_batch.indices):
                losses = self._examples.parts * micro_batch.num_items
                items = np.bincount(found.sources, found.items, number)
                sums = torch.stack([losses, torch.from_numpy(items).to(losses)])
                self._of_sources = sums if self._of_sources is None else self._of_sources + sums
        finally:
            self._examples = None

    def _share(self, position: int) -> float:
        return self.micro_batches[position].num_items / self.num_items

    def _parts(self, loss: Loss, position: int) -> list[tuple[torch.Tensor, float]]:
        """Return each loss with its share of the window's items. A loss without items here has no part."""
        micro_batch, totals = self.micro_batches[position], self.split.items
        losses = losses_by_name(loss, totals, "weigh()")
        if not totals:
            return [(losses[""], self._share(position))]
        counted = micro_batch.num_items > 0  # an idle micro-batch has weight 0
        return [(losses[n], items / totals[n] * counted) for n, items in micro_batch.items.items() if items]

    def _begin_micro_batch(self, position: int) -> None:
        self._position = self._pass_position = self.latest_position = position
        self._num_begun += 1
        if self.split.ends_idle and position == len(self) - 1:
            # No process starts to synchronise before all have reported success.
            self.oom_exchange.report_success(self.indices)

    def _end_pass(self, probe: NoiseProbe, early_steps: tuple[str, int], checks_calls: bool) -> None:
        """Add up the loss over processes. Collective: all processes raise an error together."""
        missing = len(self) - len(self._weighed)
        loss, small, missing_anywhere, early_anywhere = self._loss_here, probe.sums, missing, early_steps[1]
        if self.accelerator.num_processes > 1:
            here = torch.as_tensor(loss, dtype=torch.float32, device=self.accelerator.device)
            sums = torch.stack([here, *here.new_tensor([*probe.sums, missing, early_steps[1]])])
            if (sources := self._source.sources) is not None:
                own = self._of_sources
                own = here.new_zeros((2, len(sources.names))) if own is None else own
                sums = torch.cat([sums, own.flatten()])
            sums = self.accelerator.reduce(sums, reduction="sum")
            if sources is not None:
                sums, self._of_sources = sums[: -own.numel()], sums[-own.numel() :].view(own.shape)
            loss, *small, missing_anywhere, early_anywhere = sums
        self.small = probe.result(small)
        if missing_anywhere and checks_calls:
            raise self._not_weighed()
        if early_anywhere and checks_calls:
            raise self._stepped_early(*early_steps)
        self._latest_losses = []
        if self._weighed:
            self._loss = math.nan if missing_anywhere else loss
            self.done = True
        self._source.end_pass(self.split, trained=bool(self._weighed))

    def _trained_already(self) -> LoopError:
        return LoopError(
            "this window is already trained: to read the micro-batches again, write `for batch in "
            f"window.batches():`; to train again, write `{ACCUMULATE}` and `{WEIGH}`"
        )

    def _not_accumulated(self, position: int, entries: int) -> LoopError:
        if self.done and not entries:
            return self._trained_already()
        here = f"micro-batch {position + 1} of {len(self)}"
        if entries > 1:
            return LoopError(
                f"accelerator.accumulate was entered {entries} times for {here}: write `{ACCUMULATE}` once "
                "around the forward, the backward and the step of each micro-batch"
            )
        return LoopError(
            f"{here} did not go through accelerator.accumulate: write `{ACCUMULATE}` around its forward, "
            "its backward and the optimizer's step; to read batches without training, use window.batches()"
        )

    def _not_weighed(self) -> LoopError:
        if self.done:
            return self._trained_already()
        missing = [position for position in range(len(self)) if position not in self._weighed]
        if not missing:
            return LoopError(f"another process did not weigh the loss of a micro-batch: write `{WEIGH}`")
        return LoopError(
            f"the loss of micro-batch {missing[0] + 1} of {len(self)} was not weighed: write `{WEIGH}`; to "
            "read batches without training, use window.batches()"
        )

    def _stepped_early(self, optimizer: str, steps: int) -> LoopError:
        found = f"{optimizer} took {steps} steps" if steps else "on another process, an optimizer took steps"
        return LoopError(
            f"{found} before the last micro-batch of the window: write `{PREPARE}` before the loop, or step "
            "only `if accelerator.sync_gradients:`"
        )


def _checked(loss: Any) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        is_tensor = isinstance(loss, torch.Tensor)
        found = f"a tensor of shape {tuple(loss.shape)}" if is_tensor else type(loss).__name__
        raise ValueError(f"weigh() takes the micro-batch's mean loss, a scalar tensor; found {found}")
    return loss
