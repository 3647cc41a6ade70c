"""The first pass over a window, for losses that are not a mean over micro-batches."""

import torch

from gradacc_hf.accumulation.loss_items import ComputeLoss, as_window_loss
from gradacc_hf.accumulation.router_loss import router_loss_of
from gradacc_hf.accumulation.window import Window


def look_ahead(compute_loss: ComputeLoss, model: torch.nn.Module, window: Window) -> None:
    """Run the first pass of a `WindowLoss` and of the `RouterLoss` of a model. Do nothing without them."""
    if (window_loss := as_window_loss(compute_loss)) is not None:
        window_loss.look_ahead(model, window)
    if (router_loss := router_loss_of(model)) is not None:
        router_loss.look_ahead(model, window)
