"""Out of memory: split the current window into smaller micro-batches and run it again.

Every split of a window has the same gradient, so nothing else changes. A loop puts `retry_on_oom` around its
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

# torch's allocator on a CPU; C++'s; oneDNN, whose messages do not name memory.
OUT_OF_MEMORY_MESSAGES = ("can't allocate memory", "bad_alloc", "could not create a", "std::length_error")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch or Python says that memory ran out, on a GPU or a CPU.

    False for `OutOfMemoryError` of gradacc, which quotes such an exception and is final.
    """
    if isinstance(error, GradaccError):
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY_MESSAGES)


class _CountSteps:
    """Count the steps that an optimizer begins, prepared or not."""

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
    """Run a pass over a window's micro-batches; when memory runs out, prepare the window for another pass.

        while not window.done:
            with retry_on_oom(window, model, optimizer):
                for batch in window:
                    ...

    The pass's gradients are dropped. This window and all later ones are split into smaller micro-batches.

    Args:
        window: The window to train.
        model: The prepared model.
        optimizer: The prepared optimizer.

    Raises:
        OutOfMemoryError: If one example alone does not fit, or the optimizer's states do not fit.
        OutOfMemoryWhileSyncingError: If other processes already wait for the gradients of this process.
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
            traceback.clear_frames(error.__traceback__)  # they hold activations
    if shortage is None and message is None:
        return
    _drop_pass(window, model, optimizer)
    if steps.count:
        raise OutOfMemoryError(
            f"out of memory in the optimizer's step ({message}): its states do not fit, whatever the split; "
            "take a leaner one (--optim.name adafactor), --model.lora.rank 8, or more memory"
        )
    shortage = shortage or _report_failure(window, message or "")
    if shortage.alone is not None:
        raise OutOfMemoryError(
            f"out of memory on example {shortage.alone} alone, of {shortage.needs}, with "
            f"{free_memory() / 2**20:,.0f} MiB free ({shortage.message or 'in another process'}): shorten it "
            "(--data.max_length), or set --budget.gradient_checkpointing true or --budget.precision bf16"
        )
    bound = window.split.bound.halved(shortage.examples, shortage.rows, shortage.lengths)
    window.split_finer(bound)
    logger.warning(
        f"window {window.number} of epoch {window.epoch}: out of memory in a micro-batch of "
        f"{shortage.examples} examples, {shortage.needs}; from here on at most {bound}, and this window is "
        "run again"
    )


def _drop_pass(window: Window, model: torch.nn.Module, optimizer: Any) -> None:
    """Drop the gradients, activations and buffers of a pass that broke off."""
    optimizer.zero_grad()
    window.restore_buffers()
    window.release_graph()
    if isinstance(model, DistributedDataParallel):
        # Else only a process whose forward broke off waits for buffers from the first process.
        model.require_forward_param_sync = False
    release_memory()


def _report_failure(window: Window, message: str) -> Shortage:
    """Tell the other processes that memory ran out here; return the smallest failure of all.

    Raises OutOfMemoryWhileSyncingError where the others already wait for this process's gradients.
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
