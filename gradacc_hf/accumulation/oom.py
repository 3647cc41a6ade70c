"""Recover from running out of memory: split the window into smaller micro-batches and run it again.

Every split of a window has the same gradient, so nothing else changes. A loop puts `retry_on_oom` around the
micro-batches.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel

from gradacc_hf.accumulation.oom_exchange import PeerOutOfMemoryError, Shortage
from gradacc_hf.accumulation.window import Window
from gradacc_hf.errors import GradaccError, OutOfMemoryError, OutOfMemoryWhileSyncingError, one_line
from gradacc_hf.utils.logs import get_logger
from gradacc_hf.utils.memory import free_memory, release_memory
from gradacc_hf.utils.modeling import BufferSnapshot

logger = get_logger(__name__)

# Messages of torch's CPU allocator, of C++, and of oneDNN, which does not mention memory.
OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", "bad_alloc", "could not create a", "std::length_error")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch or Python means that memory ran out, on a GPU or a CPU.

    False for `OutOfMemoryError` of gradacc, which quotes such an exception and is final.
    """
    if isinstance(error, GradaccError):
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY_MESSAGES)


class _CountSteps:
    """Count the steps that an optimizer begins. It may be prepared."""

    def __init__(self, optimizer: Any):
        self.count = 0
        bare = getattr(optimizer, "optimizer", optimizer)
        self._hook = bare.register_step_pre_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1

    def __enter__(self) -> "_CountSteps":
        return self

    def __exit__(self, *_: Any) -> None:
        self._hook.remove()


@contextmanager
def retry_on_oom(window: Window, model: torch.nn.Module, optimizer: Any) -> Iterator[None]:
    """Run a pass over the micro-batches of a window. If memory runs out, prepare another pass.

        while not window.done:
            with retry_on_oom(window, model, optimizer):
                for batch in window:
                    ...

    The gradients of a failed pass are dropped. This window and all later windows are split into smaller
    micro-batches.

    Args:
        window: The window to train.
        model: The prepared model.
        optimizer: The prepared optimizer.

    Raises:
        OutOfMemoryError: One example alone does not fit, or the states of the optimizer do not fit.
        OutOfMemoryWhileSyncingError: Other processes already wait for the gradients of this process.
    """
    window.separate_synchronisation()
    window.buffers = BufferSnapshot(model)
    shortage = message = None
    with _CountSteps(optimizer) as steps:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, PeerOutOfMemoryError):
                shortage = error.shortage
            elif out_of_memory(error):
                message = one_line(error)[:200]
            else:
                raise
            traceback.clear_frames(error.__traceback__)  # the frames hold activations
    if shortage is None and message is None:
        return
    _drop_pass(window, model, optimizer)
    if steps.count:
        raise OutOfMemoryError(
            f"out of memory in the optimizer step ({message}): its states do not fit. No split helps: use "
            "--optim.name adafactor, --model.lora.rank 8, or more memory"
        )
    shortage = shortage or _report_failure(window, message or "")
    if shortage.alone is not None:
        raise OutOfMemoryError(
            f"out of memory on example {shortage.alone} alone, of {shortage.needs}, with "
            f"{free_memory() / 2**20:,.0f} MiB free ({shortage.message or 'in another process'}): shorten it "
            "(--data.max_length), or set --budget.gradient_checkpointing true or --budget.precision bf16"
        )
    bound = window.split.bound.halved(shortage.examples, shortage.rows, shortage.lengths, shortage.half_bytes)
    window.split_finer(bound)
    logger.warning(
        f"window {window.number} of epoch {window.epoch}: out of memory in a micro-batch of "
        f"{shortage.examples} examples, {shortage.needs}. From now on a micro-batch has at most {bound}. "
        "This window runs again"
    )


def _drop_pass(window: Window, model: torch.nn.Module, optimizer: Any) -> None:
    """Drop the gradients and activations of a failed pass, and restore the buffers."""
    optimizer.zero_grad()
    window.restore_buffers()
    window.release_graph()
    if isinstance(model, DistributedDataParallel):
        # Otherwise a process that failed in the forward would wait alone for buffers from the first process.
        model.require_forward_param_sync = False
    release_memory()


def _report_failure(window: Window, message: str) -> Shortage:
    """Report to the other processes that memory ran out here, and return the smallest failure of all.

    Raise OutOfMemoryWhileSyncingError if the others already wait for the gradients of this process.
    """
    accelerator, position = window.accelerator, window.latest_position
    failed = window.micro_batches[position].indices
    before_sync = window.split.ends_idle and position < len(window) - 1
    in_forward = accelerator.num_processes == 1 and not window.is_weighed(position)
    if accelerator.distributed_type != DistributedType.NO and not (before_sync or in_forward):
        rows, lengths = window.oom_exchange.shape(failed)
        tokens = rows * sum(lengths)
        finer = max(1, tokens // 2)
        raise OutOfMemoryWhileSyncingError(
            f"out of memory in a micro-batch of {tokens:,} padded tokens ({message}), while other processes "
            f"wait for its gradients: run again with --budget.max_tokens {finer}",
            finer,
        )
    return replace(window.oom_exchange.report_failure(failed), message=message)
