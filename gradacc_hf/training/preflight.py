"""Check a model before a run, with two short steps, for what would silently make it inexact.

`fine_tune` calls it on the model before Accelerate wraps it; a copied loop can do the same.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from gradacc_hf.accumulation.accelerate_state import find_unused_parameters
from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.loss_items import ComputeLoss, as_window_loss, model_loss
from gradacc_hf.accumulation.reference import SEPARABLE_RTOL
from gradacc_hf.training.compile import uncompiled
from gradacc_hf.utils.logs import get_logger
from gradacc_hf.utils.modeling import BATCH_NORMS

logger = get_logger(__name__)


def preflight_check(
    model: torch.nn.Module, windows: WindowLoader, compute_loss: ComputeLoss = model_loss
) -> None:
    """Warn of BatchNorm and of a loss that does not separate; tell DDP of parameters outside the loss.

    Call it before `accelerator.prepare(model)`. The model is moved to the device, and else left as it is.

    Args:
        model: The unprepared model.
        windows: The loader of the run.
        compute_loss: The loss of the run.
    """
    norms = [name for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)]
    if norms:
        logger.warning(
            f"{len(norms)} modules normalise over the micro-batch (BatchNorm: {norms[0]}, …): no "
            "accumulation is exact with them; use a model with LayerNorm or GroupNorm"
        )
    accelerator = windows.accelerator
    placed_already = hasattr(model, "hf_device_map")
    if accelerator.distributed_type == DistributedType.FSDP or placed_already:  # may not fit on one device
        return
    training = model.training
    model.to(accelerator.device).eval()
    with uncompiled(model), torch.random.fork_rng():  # a run draws the same numbers with and without this
        notice_inseparable_loss(model, windows, compute_loss)
        expect_unused_parameters(model, windows, compute_loss, accelerator)
    model.train(training)


@torch.no_grad()
def notice_inseparable_loss(model: torch.nn.Module, windows: WindowLoader, compute_loss: ComputeLoss) -> None:
    """Warn when the loss of two examples is not the mean of theirs, over the items that are counted.

    Then no split is exact: padding reaches the loss, or the loss is a mean over something else.
    """
    if as_window_loss(compute_loss) is not None:  # a loss of all examples together is no mean of means
        return
    short, long, both = windows.probe()
    if short.num_items + long.num_items != both.num_items:  # masked at random: nothing to compare
        return
    losses = [float(compute_loss(model(**found.batch), found.batch)) for found in (short, long, both)]
    mean = (losses[0] * short.num_items + losses[1] * long.num_items) / both.num_items
    if abs(losses[2] - mean) > SEPARABLE_RTOL * abs(mean):
        logger.warning(
            f"two examples have the loss {losses[2]:.4f}, and the mean over their items is {mean:.4f}: no "
            "split is exact. If padding reaches the loss, pad windows alike (pad_to='window'); if it is "
            "a mean over other items, say which (num_items='next_token' where the head shifts its labels)"
        )


def expect_unused_parameters(
    model: torch.nn.Module, windows: WindowLoader, compute_loss: ComputeLoss, accelerator: Accelerator
) -> None:
    """Let DDP look for unused parameters each window, where any parameter takes no part in the loss.

    Otherwise DDP silently leaves their whole bucket unreduced in the first window, and raises in the next.
    """
    if accelerator.distributed_type == DistributedType.NO:
        return
    batch = windows.probe()[0].batch
    compute_loss(model(**batch), batch).backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad()
    settings = vars(getattr(model, "config", None) or model)
    if unused or any("layerdrop" in name and value for name, value in settings.items()):
        if unused:
            logger.warning(
                f"{len(unused)} parameters take no part in the loss ({unused[0]}, …): DDP will look for them"
            )
        find_unused_parameters(accelerator)
