"""One window in hand: it says how long it is, puts its micro-batches on the device and weighs their losses.

This is where every split is made to give the gradient of the whole window at once. `windows.py` makes the
windows.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from gradacc_hf.micro_batches import MicroBatch


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

    def __post_init__(self):
        self._current: int | None = None  # the micro-batch handed out last
        self._random_states: list[Any] = []  # as each micro-batch met them first
        self._weighed: set[int] = set()
        self._loss: Any = None

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
        try:
            for self._current, micro_batch in enumerate(self._micro_batches):  # noqa: B020
                # Said anew each time, as another loader may have been run in between. And breaking out of a
                # prepared loader on its last batch leaves its end set, so that every accumulate() would
                # synchronise: here the window alone says where it ends.
                settings.update(num_steps=len(self), sync_with_dataloader=False)
                accelerator.step = self._current
                if self._current < len(self._random_states):
                    set_random_state(self._random_states[self._current], accelerator.device)
                else:
                    self._random_states.append(random_state(accelerator.device))
                yield to_device(micro_batch.batch, accelerator)
        finally:
            self._current = None
            settings.clear()
            settings.update(before[0])
            accelerator.step = before[1]
        if self._weighed and not accelerator.sync_gradients:
            raise RuntimeError("the window's last micro-batch did not go through accelerator.accumulate()")
        self._half_way.clear()
        self._finish()

    def _finish(self) -> None:
        """Add up the loss over processes; all of them come here, also one that did not weigh."""
        loss = self._loss_here if len(self._weighed) == len(self) else math.nan
        if self._accelerator.num_processes > 1:
            here = torch.as_tensor(loss, dtype=torch.float32, device=self._accelerator.device)
            loss = self._accelerator.reduce(here, reduction="sum")
        self._loss = loss if self._weighed else None

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
        loss = loss.reshape(()).to(torch.promote_types(loss.dtype, torch.float32))
        share = self._micro_batches[self._current].num_items / self.num_items
        self._loss_here = self._loss_here + loss.detach() * share
        self._weighed.add(self._current)
        divided_by = self._accelerator.gradient_accumulation_steps * self._accelerator.num_processes
        return loss * (share * divided_by)

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


def random_state(device: torch.device) -> list[torch.Tensor]:
    """What dropout draws from: torch's generator on the host, and the device's."""
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


def set_random_state(state: list[torch.Tensor], device: torch.device) -> None:
    """Go back to a `random_state`."""
    torch.set_rng_state(state[0])
    for on_device in state[1:]:
        torch.cuda.set_rng_state(on_device, device)


def to_device(batch: Mapping[str, Any], accelerator: Accelerator) -> Any:
    """A host batch as a plain dict on the accelerator's device."""
    return send_to_device(dict(batch), accelerator.device, non_blocking=accelerator.device.type == "cuda")
