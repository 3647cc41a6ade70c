"""Turn the torch functions that a loop calls into events: a backward, a loss, a changed gradient, a loader.

A thread has at most one listener, a `TorchFunctionMode` that all subscribers share. Subscribers may therefore
be added and removed in any order, and no class of torch is changed.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gradacc_hf.doctor.frames import StartedLoader, optimizer_being_built, starting_loader

NUMBER_READS = ("item", "__float__", "__format__")  # methods that read a tensor as a number
UNSCALE = "_amp_foreach_non_finite_check_and_unscale_"
LOSSES = {  # functions of (prediction, target) that a loop may call to compute a mean loss
    *("cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div"),
    *("binary_cross_entropy", "binary_cross_entropy_with_logits", "poisson_nll_loss"),
    *("triplet_margin_loss", "cosine_embedding_loss", "margin_ranking_loss", "hinge_embedding_loss"),
    *("soft_margin_loss", "multi_margin_loss", "multilabel_margin_loss", "gaussian_nll_loss"),
    *("multilabel_soft_margin_loss", "triplet_margin_with_distance_loss", "ctc_loss"),
}
REDUCTIONS = {"mean", "sum"}  # methods and functions that reduce a tensor to a loss
PRODUCTS = {"mul", "multiply", "mul_"}
QUOTIENTS = {"div", "divide", "true_divide", "div_"}
NO_CHANGES = {"requires_grad_", "detach_", "retain_grad_", "share_memory_"}  # methods that keep the values

Roots = Sequence[
    tuple[torch.Tensor, float]
]  # losses that go backward, with the gradient of each; () if unknown


class Subscriber:
    """Receives events while it is subscribed. Every event method does nothing by default.

    is_listening: whether to receive events other than `loader_started` and `optimizer_built`.
    """

    is_listening = False

    def loader_started(self, loader: StartedLoader) -> None:
        """An iteration over this loader begins, with gradients enabled."""

    def optimizer_built(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is being built, or parameters are being added to it."""

    def backward(self, roots: Roots, run: Callable[[], Any]) -> Any:
        """Call `run`, the backward of these losses, and return its result."""
        return run()

    def loss_computed(
        self, function: Callable[..., Any], args: Sequence[Any], named: Mapping[str, Any], loss: torch.Tensor
    ) -> None:
        """A torch function has computed a loss. It is one of LOSSES or REDUCTIONS."""

    def loss_scaled(self, factor: float, loss: torch.Tensor, scaled: torch.Tensor) -> None:
        """A loss was multiplied by this number."""

    def tensor_changed(self, tensor: Any, how: str) -> None:
        """A function with this name is about to change the tensor, or the list of tensors, in place."""

    def gradient_replaced(self, parameter: torch.Tensor) -> None:
        """The loop is about to set `.grad` of a parameter to another tensor."""

    def autocast_used(self, dtype: torch.dtype) -> None:
        """A linear layer computes in this type."""

    def gradients_unscaled(self) -> None:
        """The gradient scaler of fp16 has divided the gradients."""

    def number_read(self, value: float) -> None:
        """A tensor was read as a number."""


class Listener(TorchFunctionMode):
    """Turns the torch functions of one thread into events for its subscribers."""

    def __init__(self):
        super().__init__()
        self._subscribers: list[Subscriber] = []
        self._is_paused = False

    def add(self, subscriber: Subscriber) -> None:
        """Start sending events to a subscriber; the first subscriber starts the listener."""
        if not self._subscribers:
            self.__enter__()
        self._subscribers.append(subscriber)

    def remove(self, subscriber: Subscriber) -> None:
        """Stop sending events to a subscriber; removing the last subscriber stops the listener."""
        self._subscribers.remove(subscriber)
        if not self._subscribers:
            self.__exit__(None, None, None)

    @property
    def is_paused(self) -> bool:
        """Whether the code that runs now belongs to gradacc, not to the loop."""
        return self._is_paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Send no events from inside the `with` block."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_paused or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "random_" and torch.is_grad_enabled() and (loader := starting_loader()) is not None:
            self._send(Subscriber.loader_started, loader)
        elif _is_check_of_leaf(func, name) and (optimizer := optimizer_being_built()) is not None:
            self._send(Subscriber.optimizer_built, optimizer)
        active = [subscriber for subscriber in self._subscribers if subscriber.is_listening]
        if not active:
            return func(*args, **kwargs)
        if func in (torch.Tensor.backward, torch.autograd.backward):
            run = partial(func, *args, **kwargs)
            for subscriber in active:
                run = partial(subscriber.backward, _roots(args, kwargs), run)
            return run()
        for subscriber in active:
            _send_before(subscriber, func, name, args)
        result = func(*args, **kwargs)
        for subscriber in active:
            _send_after(subscriber, func, name, args, kwargs, result)
        return result

    def _send(self, event: Callable[..., None], value: Any) -> None:
        for subscriber in list(self._subscribers):
            getattr(subscriber, event.__name__)(value)


def _is_check_of_leaf(func: Any, name: str) -> bool:
    return name == "__get__" and getattr(func, "__self__", None) is torch.Tensor.is_leaf


def _roots(args: Any, kwargs: Any) -> Roots:
    """The losses that go backward; () if one of them, or a given gradient, is more than a number."""
    tensors = args[0] if args else kwargs.get("tensors")
    given = args[1] if len(args) > 1 else kwargs.get("gradient", kwargs.get("grad_tensors"))
    tensors = list(tensors) if isinstance(tensors, tuple | list) else [tensors]
    given = list(given) if isinstance(given, tuple | list) else [given] * len(tensors)
    numbers = [isinstance(each, torch.Tensor) and each.numel() == 1 for each in tensors]
    if not all(numbers) or not all(each is None or each.numel() == 1 for each in given):
        return ()
    values = [1.0 if each is None else float(each.detach()) for each in given]
    return tuple(zip(tensors, values, strict=True))


def _send_before(subscriber: Subscriber, func: Any, name: str, args: Any) -> None:
    if name == "__set__" and getattr(func, "__self__", None) is torch.Tensor.grad:
        if args[1] is None:
            subscriber.tensor_changed(args[0].grad, "zeroed")
        elif args[1] is not args[0].grad:
            subscriber.gradient_replaced(args[0])
    elif name == "__set__" and getattr(func, "__self__", None) is torch.Tensor.data:
        subscriber.tensor_changed(args[0], "replaced")
    elif name.endswith("_") and not name.startswith("__") and name not in NO_CHANGES and args:
        subscriber.tensor_changed(args[0], name)
    elif name == "linear" and torch.is_autocast_enabled(kind := args[0].device.type):
        subscriber.autocast_used(torch.get_autocast_dtype(kind))


def _send_after(subscriber: Subscriber, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
    if name == UNSCALE:
        subscriber.gradients_unscaled()
    is_loss = isinstance(result, torch.Tensor) and not result.ndim and result.requires_grad
    if is_loss and (name in LOSSES or name in REDUCTIONS):
        subscriber.loss_computed(func, args, kwargs, result)
    elif is_loss and (name in PRODUCTS or name in QUOTIENTS) and len(args) == 2:
        numbers = [float(value) for value in args if _is_number(value)]
        if numbers and numbers[0]:
            loss = args[0] if isinstance(args[0], torch.Tensor) and args[0].requires_grad else args[1]
            subscriber.loss_scaled(numbers[0] if name in PRODUCTS else 1 / numbers[0], loss, result)
    elif name in NUMBER_READS and isinstance(args[0], torch.Tensor) and args[0].numel() == 1:
        value = result if isinstance(result, float) else None
        if name == "__format__" and args[0].is_floating_point():
            value = float(args[0].detach())
        if value is not None:
            subscriber.number_read(value)


def _is_number(value: Any) -> bool:
    """Whether a value is a number, or a tensor of one number on the CPU that is not trained."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.requires_grad and value.device.type == "cpu"
    return isinstance(value, int | float)


_THREAD = threading.local()


def thread_listener() -> Listener:
    """The listener of this thread."""
    if not hasattr(_THREAD, "listener"):
        _THREAD.listener = Listener()
    return _THREAD.listener


@contextmanager
def subscribed(subscriber: Subscriber) -> Iterator[Listener]:
    """Send the events of this thread to the subscriber. Yield the listener."""
    listener = thread_listener()
    listener.add(subscriber)
    try:
        yield listener
    finally:
        listener.remove(subscriber)
