"""Before a run: one short example through the model, to notice what would silently make it inexact.

Called by `loop.fine_tune` on the model as the user gave it, before Accelerate wraps it.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, DistributedType

from gradacc_hf.windows import WindowLoader

logger = get_logger(__name__)

BATCH_NORMS = torch.nn.modules.batchnorm._BatchNorm
INVARIANT = (
    1e-3  # relative change of a loss; bf16 weights round to 2⁻⁸, a softmax over padding changes it by more
)


def try_out(
    model: torch.nn.Module, windows: WindowLoader, compute_loss: Callable[[Any, Any], torch.Tensor]
) -> None:
    """Warn of BatchNorm and of a loss that padding reaches; tell DDP of parameters outside the loss."""
    norms = [name for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)]
    if norms:
        logger.warning(
            f"{len(norms)} modules normalise over the micro-batch (BatchNorm: {norms[0]}, …): no "
            "accumulation is exact with them; use a model with LayerNorm or GroupNorm, or freeze them"
        )
    accelerator = windows.accelerator
    if accelerator.distributed_type == DistributedType.FSDP:  # may not fit on one device before it is sharded
        return
    training = model.training
    model.to(accelerator.device).eval()
    with torch.random.fork_rng():  # a run draws the same numbers with and without this
        notice_padding(model, windows, compute_loss)
        expect_unused_parameters(model, windows, compute_loss, accelerator)
    model.train(training)


def notice_padding(
    model: torch.nn.Module, windows: WindowLoader, compute_loss: Callable[[Any, Any], torch.Tensor]
) -> None:
    """Warn when the loss of an example changes as it is padded further, and micro-batches differ in that."""
    if windows.pad_to != "micro_batch" or not windows.takes_pad_to:
        return
    with torch.no_grad():
        short, padded = (
            float(compute_loss(model(**batch), batch))
            for batch in (windows.probe_batch(), windows.probe_batch(padding=8))
        )
    if abs(padded - short) > INVARIANT * abs(short):
        logger.warning(
            f"padding reaches the loss of this model ({short:.4f}, and {padded:.4f} with 8 tokens of it): "
            "no split by length is exact: pad every window alike (pad_to='window'), or mask it in the loss"
        )


def expect_unused_parameters(
    model: torch.nn.Module,
    windows: WindowLoader,
    compute_loss: Callable[[Any, Any], torch.Tensor],
    accelerator: Accelerator,
) -> None:
    """Does any parameter take no part in the loss? Then DDP must look for such parameters each window.

    Otherwise DDP leaves their whole bucket unreduced, silently, in the first window and raises in the next.
    """
    if accelerator.distributed_type == DistributedType.NO or accelerator.ddp_handler:
        return
    batch = windows.probe_batch()
    compute_loss(model(**batch), batch).backward()
    unused = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    model.zero_grad()
    settings = vars(getattr(model, "config", None) or model)
    if unused or any("layerdrop" in name and value for name, value in settings.items()):
        if unused:
            logger.warning(
                f"{len(unused)} parameters take no part in the loss ({unused[0]}, …): DDP will look for them"
            )
        handler: Any = DistributedDataParallelKwargs(find_unused_parameters=True)
        accelerator.ddp_handler = handler
