"""A model with its optimizer and scheduler, and measurements of forward passes."""

import copy
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.lr_scheduler import LambdaLR

from gradacc_hf.play.settings import PlaySettings

WINDOWS = 200  # of a run; the learning rate falls to 0 over the run
MOMENTUM = 0.9


class Player:
    """A model that is trained by SGD with momentum.

    running: the generator of the loop; set by the session.
    losses: losses of the forward passes of this window.
    activations: bytes that the latest forward pass keeps for the backward pass.

    Args:
        model: the model to train.
        settings: learning rate and precision.
        like: another player, whose state is copied.
    """

    def __init__(self, model: torch.nn.Module, settings: PlaySettings, like: "Player | None" = None):
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr_in_use, momentum=MOMENTUM)
        self.scheduler = LambdaLR(self.optimizer, lambda step: max(0.0, 1 - step / WINDOWS))
        self.running: Any = None
        self.losses: list[float] = []
        self.activations = 0
        self._kept: dict[int, int] = {}
        self._listening = ExitStack()
        if like is not None:
            model.load_state_dict(like.model.state_dict())
            self.optimizer.load_state_dict(copy.deepcopy(like.optimizer.state_dict()))
            self.scheduler.load_state_dict(like.scheduler.state_dict())
        self.take(settings)
        model.register_forward_pre_hook(self._before)
        model.register_forward_hook(self._after)

    def take(self, settings: PlaySettings) -> None:
        """Change the learning rate and the precision."""
        self.scheduler.base_lrs = [settings.lr_in_use]
        by = self.scheduler.lr_lambdas[0](self.scheduler.last_epoch)
        self.optimizer.param_groups[0].update(initial_lr=settings.lr_in_use, lr=settings.lr_in_use * by)
        self.optimizer.zero_grad()  # a faulty loop may leave gradients behind
        in_precision(self.model, settings)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def is_empty(self) -> bool:
        """Whether there is no gradient."""
        return all(p.grad is None for p in self.model.parameters())

    def bytes_held(self) -> dict[str, int]:
        """Return the bytes of weights, gradients and optimizer states."""
        weights = list(self.model.parameters())
        states = [s for p in weights for s in self.optimizer.state[p].values()]
        return {
            "parameters": _bytes(weights),
            "gradients": _bytes(p.grad for p in weights),
            "optimizer": _bytes(states),
        }

    def _before(self, *_: Any) -> None:
        self._kept = {}
        self._listening.enter_context(saved_tensors_hooks(self._keep, lambda saved: saved))

    def _keep(self, saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        self._kept[storage.data_ptr()] = storage.nbytes()
        return saved

    def _after(self, model: Any, inputs: Any, outputs: Any) -> None:
        self._listening.close()
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        self.activations = sum(size for where, size in self._kept.items() if where not in weights)
        self.losses.append(float(outputs.loss.detach()))


def in_precision(model: torch.nn.Module, settings: PlaySettings) -> torch.nn.Module:
    """Return the model with its forward pass in the precision of the settings, as Accelerate prepares it."""
    vars(model).pop("forward", None)
    if settings.precision == "bf16":
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # type: ignore[method-assign]
    return model


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
