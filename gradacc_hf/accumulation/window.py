"""One window in hand: it says how long it is, puts its micro-batches on the device and weighs their losses.

This is where every split is made to give the gradient of the whole window at once. `windows.py` makes the
windows.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device

from gradacc_hf.accumulation.collation import MicroBatch
from gradacc_hf.accumulation.noise_scale import SmallBatch
from gradacc_hf.accumulation.reference import grad_norm
from gradacc_hf.accumulation.splitting import Bound
from gradacc_hf.errors import OutOfMemoryError, OutOfMemoryWhileSyncingError
from gradacc_hf.utils.rng import random_state, set_random_state


@dataclass(frozen=True)
class Shortage:
    """The smallest micro-batch, of those of all processes, that memory did not suffice for."""

    examples: int
    rows: int
    lengths: list[int]  # padded, of each column
    alone: int | None  # the example that was all of it
    needs: str  # in tokens, and in bytes where they are predicted
    said: str = ""  # by torch, to this process


class PeerOutOfMemoryError(OutOfMemoryError):
    """Raised in a process that had enough memory, when another has not."""

    def __init__(self, shortage: Shortage):
        super().__init__("another process is out of memory")
        self.shortage = shortage


@dataclass(frozen=True)
class Recutting:
    """What a window asks of the loader that made it, when memory runs out."""

    cut: Callable[["Window", Bound], "Window"]  # the same window, and all to come, under this bound
    idle: Callable[[], MicroBatch]  # a small one, that is run at weight 0
    shape: Callable[[np.ndarray], tuple[int, list[int]]]  # of a micro-batch of these examples
    bound: Bound  # that it was cut under
    costs: list[float]  # the dearest micro-batch of each process, as predicted
    completed: list[float]  # the dearest one of each process that has had its memory; of the loader
    is_short: bool  # has memory run out before in this run? Then what has fitted may not fit again


@dataclass(eq=False, repr=False)
class Window:
    """One optimizer step: iterate it for this process's micro-batches, and `weigh` each loss.

    Held on the host, it can be iterated again; one micro-batch at a time is put on the device. Each then
    meets the random numbers (dropout) that it met the first time.
    """

    epoch: int
    number: int  # in its epoch, from 0
    indices: np.ndarray  # its examples, over all processes
    num_items: float  # over all processes
    tokens: int  # planned from the lengths, over all processes
    padded_tokens: int
    pad_to: int | None  # what its micro-batches are padded to; None for the longest of each
    accumulation_steps: int  # micro-batches of the process that has most
    _micro_batches: list[MicroBatch]  # of this process
    _accelerator: Accelerator
    _half_way: list[int]  # of the loader: windows whose latest pass has not come to its end
    _recutting: Recutting
    _whole_gradients: bool = False  # under FSDP
    _noise_size: int = 0  # examples of the first micro-batch, where the noise scale is measured by it
    done: bool = False  # have all its micro-batches come to the step?

    def __post_init__(self):
        self._current: int | None = None  # the micro-batch handed out last
        self._latest = 0  # that one, also when the pass has ended
        self._synchronises_alone = False  # is the last micro-batch there only to synchronise gradients?
        self._random_states: list[Any] = []  # as each micro-batch met them first
        self._weighed: set[int] = set()
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._loss: Any = None
        self._handed: torch.Tensor | None = None  # to weigh(), the last
        self._small = [0.0, 0.0, 0.0]  # of the first micro-batch: ‖gradient‖², is it known?, share of items
        self.small: SmallBatch | None = None  # known after the last micro-batch, where noise is measured

    def __len__(self) -> int:
        """This process's accumulation steps in this window."""
        return len(self._micro_batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        accelerator, settings = self._accelerator, self._accelerator.gradient_state.plugin_kwargs
        before = dict(settings), accelerator.step
        if self._half_way:  # an earlier pass was left before its step: drop what it has accumulated
            for optimizer in accelerator._optimizers:
                optimizer.optimizer.zero_grad()
        self._half_way[:] = [self.number]
        self._loss, self._weighed, self._loss_here = None, set(), 0.0
        self._small, self.small = [0.0, 0.0, 0.0], None
        try:
            for self._current, micro_batch in enumerate(self._micro_batches):  # noqa: B020
                self._latest = self._current
                if self._synchronises_alone and self._current == len(self) - 1:
                    self._exchange(None)  # nobody waits for gradients of a process that is out of memory
                # Said anew each time, as another loader may have been run in between. And breaking out of a
                # prepared loader on its last batch leaves its end set, so that every accumulate() would
                # synchronise: here the window alone says where it ends.
                settings.update(num_steps=len(self), sync_with_dataloader=False)
                # Under FSDP, no_sync would hold whole gradients on every process.
                settings["sync_each_batch"] = (
                    forwards_are_collective(accelerator) and not self._whole_gradients
                )
                accelerator.step = self._current
                if self._current < len(self._random_states):
                    set_random_state(self._random_states[self._current], accelerator.device)
                else:
                    self._random_states.append(random_state(accelerator.device))
                yield to_device(micro_batch.batch, accelerator)
                if self.measures_noise and self._current == 0 and self._weighed:
                    self._measure_small()
        finally:
            self._current = None
            settings.clear()
            settings.update(before[0])
            accelerator.step = before[1]
        if self._weighed and not accelerator.sync_gradients:
            raise RuntimeError("the window's last micro-batch did not go through accelerator.accumulate()")
        self._half_way.clear()
        self._finish()

    def prepare_for_oom(self) -> None:
        """See to it that all processes know of a shortage of memory before any gradient is synchronised.

        DDP synchronises in the last micro-batch's backward, and one that breaks off there cannot be mended.
        So, until each process has completed a micro-batch that was predicted to cost as much, all of them
        accumulate on their own, tell each other that they could, and synchronise in a small one at weight 0.
        """
        recutting, accelerator = self._recutting, self._accelerator
        if accelerator.num_processes == 1 or forwards_are_collective(accelerator):
            return
        known = all(cost <= done for cost, done in zip(recutting.costs, recutting.completed, strict=True))
        known = known and not recutting.is_short
        if not known and not self._synchronises_alone:
            self._synchronises_alone = True
            self._micro_batches.append(recutting.idle())

    def snapshot_buffers(self, model: torch.nn.Module) -> None:
        """Note a model's buffers as they are: forwards change those of BatchNorm."""
        self._buffers = [(b, b.clone()) for b in model.buffers() if b.is_floating_point()]

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Let the model's buffers be as they were when this window was begun."""
        for buffer, before in self._buffers:
            buffer.copy_(before)

    def restore_rng_state(self) -> None:
        """Go back to the random numbers that the first micro-batch met."""
        set_random_state(self._random_states[0], self._accelerator.device)

    def release_graph(self) -> None:
        """Free the activations behind the loss that was weighed last, which its loop may hold still."""
        if self._handed is not None and not self._handed.is_leaf:
            self._handed.detach_()
        self._handed = None

    def share_oom(self, said: str) -> Shortage:
        """Out of memory in the micro-batch handed out last: tell the other processes, and hear from them.

        Raises OutOfMemoryWhileSyncingError where they are waiting for its gradients already.
        """
        failed = self._micro_batches[self._latest]
        on_its_own = self._synchronises_alone and self._latest < len(self) - 1
        in_forward = self._accelerator.num_processes == 1 and self._latest not in self._weighed
        if self._accelerator.distributed_type != DistributedType.NO and not (on_its_own or in_forward):
            rows, lengths = self._recutting.shape(failed.indices)
            tokens = rows * sum(lengths)
            finer = max(1, tokens // 2)
            raise OutOfMemoryWhileSyncingError(
                f"out of memory in a micro-batch of {tokens:,} padded tokens ({said}), while other processes "
                f"wait for its gradients: run again with --budget.max_tokens {finer}",
                finer,
            )
        shortage = self._exchange(failed)
        assert shortage is not None
        return replace(shortage, said=said)

    def split_finer(self, shortage: Shortage) -> Bound:
        """Start anew, with micro-batches of half the size that was too large; the bound from here on."""
        bound = self._recutting.bound.halved(shortage.examples, shortage.rows, shortage.lengths)
        again = self._recutting.cut(self, bound)
        vars(self).update(vars(again))
        return bound

    def _exchange(self, failed: MicroBatch | None) -> Shortage | None:
        """Exchange whether memory sufficed. Raises PeerOutOfMemoryError where it sufficed here only."""
        indices = self.indices[:1] if failed is None else failed.indices
        rows, lengths = self._recutting.shape(indices)
        examples = 0 if failed is None else max(1, len(indices))
        alone = int(indices[0]) if len(indices) == 1 else -1
        here = [examples, rows * sum(lengths), alone, rows, *lengths]
        everywhere: Any = torch.tensor([here], device=self._accelerator.device)
        if self._accelerator.num_processes > 1:
            everywhere = self._accelerator.gather(everywhere)
        found = [row for row in everywhere.tolist() if row[0]]
        if not found:
            return None
        examples, _, alone, rows, *lengths = min(found)
        needs = self._recutting.bound.needs(rows, lengths)
        shortage = Shortage(examples, rows, lengths, alone if alone >= 0 else None, needs)
        if failed is None:
            raise PeerOutOfMemoryError(shortage)
        return shortage

    def _finish(self) -> None:
        """Add up the loss over processes; all of them come here, also one that did not weigh."""
        loss = self._loss_here if len(self._weighed) == len(self) else math.nan
        square, known, share = self._small
        if self._accelerator.num_processes > 1:
            here = torch.as_tensor(loss, dtype=torch.float32, device=self._accelerator.device)
            everything = torch.stack([here, *here.new_tensor(self._small)])
            loss, square, known, share = self._accelerator.reduce(everything, reduction="sum")
        if known and forwards_are_collective(self._accelerator):  # then it is that of all processes together
            norm = math.sqrt(float(square) / float(known)) / float(share)
            self.small = SmallBatch(self._noise_size * self._accelerator.num_processes, norm)
        elif known:
            self.small = SmallBatch(self._noise_size, math.sqrt(float(square) / float(known)))
        self._loss = loss if self._weighed else None
        self._handed = None
        if self._weighed:
            self.done = True
            completed, costs = self._recutting.completed, self._recutting.costs
            completed[:] = map(max, completed, costs)

    def _measure_small(self) -> None:
        """The gradient of the first micro-batch alone, as the mean over its items."""
        accelerator, share = self._accelerator, self._micro_batches[0].num_items / self.num_items
        groups = [group for optimizer in accelerator._optimizers for group in optimizer.param_groups]
        parameters = {id(p): p for group in groups for p in group["params"]}
        if all(p.grad is None for p in parameters.values()):  # of an optimizer that was not prepared
            return
        norm = grad_norm(parameters.values())
        if not forwards_are_collective(accelerator):
            norm /= share * accelerator.num_processes  # by which DDP will divide
        if accelerator.scaler is not None:
            norm /= accelerator.scaler.get_scale()
        if math.isfinite(norm):
            self._small = [norm**2, 1.0, share]

    def weigh(self, loss: torch.Tensor) -> torch.Tensor:
        """What `accelerator.backward` must be given for this micro-batch's mean loss, a scalar; in float32.

        × the share of the window's items that the last micro-batch holds; × accumulation steps and ×
        processes, because `accelerator.backward` divides by the one and DDP's or FSDP's mean over processes
        by the other.
        """
        if self._current is None:
            raise RuntimeError(
                "weigh() weighs the micro-batch handed out last: call it inside `for batch in window`"
            )
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            is_tensor = isinstance(loss, torch.Tensor)
            found = f"a tensor of shape {tuple(loss.shape)}" if is_tensor else type(loss).__name__
            raise ValueError(f"weigh() takes the micro-batch's mean loss, a scalar tensor; found {found}")
        self._handed = loss
        loss = loss.reshape(()).to(torch.promote_types(loss.dtype, torch.float32))
        # The gradient of a loss that is not finite may well be: NaN it must be, so that all processes see it.
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
        share = self._micro_batches[self._current].num_items / self.num_items
        self._loss_here = self._loss_here + loss.detach() * share
        self._weighed.add(self._current)
        divided_by = self._accelerator.gradient_accumulation_steps * self._accelerator.num_processes
        return loss * (share * divided_by)

    @property
    def measures_noise(self) -> bool:
        """Is its first micro-batch drawn at random, to measure the gradient noise scale by?"""
        return self._noise_size > 0

    @property
    def accelerator(self) -> Accelerator:
        """The run's."""
        return self._accelerator

    @property
    def position(self) -> int | None:
        """Place of the micro-batch handed out last among this process's, from 0; None outside their loop."""
        return self._current

    @property
    def micro_batch(self) -> MicroBatch:
        """The one handed out last, as it lies on the host, with its examples and items."""
        if self._current is None:
            raise RuntimeError("a window has a micro-batch at hand only inside `for batch in window`")
        return self._micro_batches[self._current]

    @property
    def loss(self) -> float:
        """The exact mean over the window's items, over all processes; known after the last micro-batch."""
        if self._loss is None or len(self._weighed) < len(self):
            raise RuntimeError(
                "window.loss is known after the last micro-batch, if each one's loss went through weigh()"
            )
        return float(self._loss)


def forwards_are_collective(accelerator: Accelerator) -> bool:
    """Do all processes have to go through each forward together?"""
    return accelerator.distributed_type == DistributedType.FSDP


def to_device(batch: Mapping[str, Any], accelerator: Accelerator) -> Any:
    """A host batch as a plain dict on the accelerator's device."""
    return send_to_device(dict(batch), accelerator.device, non_blocking=accelerator.device.type == "cuda")
