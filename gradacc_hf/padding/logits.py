"""Compute vocabulary logits only at labelled positions, a few hundred positions at a time.

Logits are tokens × vocabulary, by far the largest tensor of a small model with a large vocabulary. The loss
reads them only where there are labels. In a forward with labels, the head returns `DeferredLogits`, which
compute nothing. The model's own code casts, scales, caps or slices them, and passes them to
`torch.nn.functional.cross_entropy`. This call selects the labelled rows. It computes logits and loss in
chunks, and all but the last again in the backward pass (torch.utils.checkpoint). Any other function gets all
logits. The gradient equals the gradient of the model's own loss, to rounding.

Torch 2.13's linear_cross_entropy computes the gradient in the forward pass. It is not used: the loss has the
precision of the inputs (11.625 for 11.507 in bf16), and older versions lack it.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from types import MethodType
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.accumulation.reference import EXACT, Gradient, full_float32, relative_error
from gradacc_hf.errors import LogitsNeededError, one_line
from gradacc_hf.utils.attributes import Attributes
from gradacc_hf.utils.modeling import preserve_problem_type, uncompiled, without_autocast, without_dropout
from gradacc_hf.utils.rng import preserve_rng_state

TOKENS_PER_CHUNK = 256  # logits in memory at a time; 50 MB in float32 with a vocabulary of 49,152
ROUNDING = 2e-2  # relative error that 16 bits allow
RowLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(losses, logits, positions) → losses, of some positions: (rows,), (rows, vocabulary) and (rows,). Positions
are of the flattened batch."""
_FORWARDS = "_gradacc_forwards"

# Functions by the name without underscores. `to` and the like take no tensor of another shape.
_OF_ELEMENTS = {"add", "radd", "sub", "rsub", "mul", "rmul", "div", "truediv", "tanh", "neg"}
_OF_DTYPE = {"float", "to", "double"}
_OF_POSITIONS = {"view", "reshape", "flatten", "contiguous", "getitem"}
_OPERATORS = (
    "lt",
    "le",
    "gt",
    "ge",
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "truediv",
    "neg",
    "getitem",
)


def skip_unlabelled_logits(model: torch.nn.Module) -> None:
    """Make a language model compute vocabulary logits only at labelled positions, in place.

    It works for causal, masked and sequence-to-sequence models. With `labels`, the outputs then hold no
    logits. Without labels, as in `generate`, nothing changes. The model is checked before the change stays:
    loss and gradients on random tokens, without dropout. `restore_logits` undoes the change.

    Args:
        model: A transformers model, also with LoRA, or wrapped in DDP. Call it before `torch.compile` of a
            whole model and before FSDP2 shards the weights.

    Raises:
        LogitsNeededError: The loss reads other logits, or loss and gradients are not the same. The model is
            as before.
    """
    inner = _language_model(model)
    if not skips_logits(inner):
        check_logits(inner)
        install(inner)


def restore_logits(model: torch.nn.Module) -> None:
    """Undo `skip_unlabelled_logits`. A model without the change stays as it is.

    Args:
        model: The model that was given to `skip_unlabelled_logits`, a copy of it, or a model around it.
    """
    for module in model.modules():
        if not skips_logits(module):
            continue
        forwards = vars(module)[_FORWARDS]
        if vars(module).get("forward") != forwards.new:  # Accelerate's wrapper, which calls the new one
            vars(module)[_FORWARDS] = replace(forwards, skips=False)
            continue
        del vars(module)[_FORWARDS]
        if forwards.is_of_class:
            del module.forward
        else:
            module.forward = forwards.own


def skips_logits(module: torch.nn.Module) -> bool:
    """Whether `skip_unlabelled_logits` is on for this module."""
    forwards = vars(module).get(_FORWARDS)
    return forwards is not None and forwards.skips


@dataclass(frozen=True)
class _Forwards:
    """The forwards of a model: the one before the change, and the one after it."""

    own: Any
    new: Any
    is_of_class: bool
    skips: bool = True
    row_loss: Callable[[], RowLoss | None] | None = None


def install(model: Any) -> None:
    """Replace the forward of a model. `check_logits` must have accepted the model or a model like it."""
    own, new = model.forward, MethodType(_forward_of(type(model)), model)
    vars(model)[_FORWARDS] = _Forwards(own, new, "forward" not in vars(model))  # bound to a deep copy, too
    model.forward = new


def add_row_loss(model: torch.nn.Module, row_loss: Callable[[], RowLoss | None]) -> None:
    """Change the loss of each labelled position in a model that skips logits. Other models stay as they are.

    Args:
        model: The model.
        row_loss: Called once a forward. Returns a function of losses, logits and positions, or None.
    """
    if skips_logits(model):
        vars(model)[_FORWARDS] = replace(vars(model)[_FORWARDS], row_loss=row_loss)


@cache
def _forward_of(model_class: type) -> Any:
    """Return a forward that computes no logits if there are labels.

    The signature stays: generate and Trainer read the names of a model's inputs from it.
    """

    @wraps(model_class.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        forwards = vars(self)[_FORWARDS]
        if inputs.get("labels") is None or not forwards.skips:
            return forwards.own(*args, **inputs)
        row_loss = forwards.row_loss and forwards.row_loss()
        with deferred(self.get_output_embeddings(), TOKENS_PER_CHUNK, row_loss):
            outputs = forwards.own(*args, **inputs)
        return _without_logits(outputs)

    return forward


def _without_logits(outputs: Any) -> Any:
    if isinstance(outputs, Mapping):
        kept = {n: v for n, v in outputs.items() if not isinstance(v, DeferredLogits)}
        return type(outputs)(**kept)
    if isinstance(outputs, tuple):
        return tuple(value for value in outputs if not isinstance(value, DeferredLogits))
    return outputs


@dataclass
class LogitReads:
    """A record of what reads the logits in a forward.

    Attributes:
        tokens_per_chunk: Positions whose logits are computed at once.
        row_loss: Changes the loss of each labelled position.
        at_labels: Whether a loss read only labelled positions.
        others: Functions that read all logits.
    """

    tokens_per_chunk: int
    row_loss: RowLoss | None = None
    at_labels: bool = False
    others: list[str] = field(default_factory=list)


@contextmanager
def deferred(head: Any, tokens_per_chunk: int, row_loss: RowLoss | None = None) -> Iterator[LogitReads]:
    """Defer the next call of a head inside this block. Yield how the logits are read."""
    reading = LogitReads(tokens_per_chunk, row_loss)
    own = vars(head).get("forward")  # Accelerate's, if the model is spread over devices

    inputs: list[torch.Tensor] = []

    def note(module: Any, args: tuple) -> None:
        inputs.append(args[0])

    def defer(module: Any, args: tuple, output: torch.Tensor) -> DeferredLogits:
        restore()  # the loss calls the head, with its other hooks
        hidden = inputs[0]
        positions = torch.arange(hidden.shape[:-1].numel(), device=hidden.device)
        return DeferredLogits(head, hidden, positions.view(hidden.shape[:-1]), (), reading)

    def restore() -> None:
        before.remove()
        handle.remove()
        vars(head).pop("forward", None)
        if own is not None:
            head.forward = own

    before = head.register_forward_pre_hook(note, prepend=True)
    # Other hooks of the head run here and again in the loss. They get a view of the right shape. FSDP2's
    # hooks need the input itself, as its gradient gathers the weights.
    is_sharded, size = isinstance(head, FSDPModule), (head.out_features,)
    handle = head.register_forward_hook(defer)
    head.forward = lambda hidden: hidden if is_sharded else hidden[..., :1].expand(hidden.shape[:-1] + size)
    try:
        yield reading
    finally:
        restore()


class DeferredLogits:
    """The logits of a head, which are computed when a function reads them.

    It is not a tensor, but functions of torch take it (`__torch_function__`). It has a tensor's methods,
    except methods in place.

    Args:
        head: Module, (positions, size) → (positions, vocabulary).
        hidden: Its input, (batch, length, size).
        positions: Positions of these logits in the flattened input, of any shape.
        changes: Functions to apply to logits (positions, vocabulary).
        reading: Gets what reads the logits.
    """

    def __init__(
        self,
        head: Any,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        changes: tuple[Callable[[torch.Tensor], torch.Tensor], ...],
        reading: LogitReads,
    ):
        self._head, self._hidden, self._positions = head, hidden, positions
        self._changes, self._reading = changes, reading
        self.shape = torch.Size((*positions.shape, head.out_features))
        self.device, self.ndim = hidden.device, len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the logits, from the logits of one position."""
        with torch.no_grad():
            return _logits(self._head, self._changes, self._hidden.flatten(0, -2)[:1]).dtype

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or the size of a dimension."""
        return self.shape if dim is None else self.shape[dim]

    def __getattr__(self, name: str) -> Any:
        method = getattr(torch.Tensor, name)
        if name.endswith("_") and not name.startswith("_"):
            raise AttributeError(f"{name} would change deferred logits in place")
        if not callable(method):  # such as T
            return getattr(self._computed(name), name)
        return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("an assignment would change deferred logits in place")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, given = func.__name__.strip("_"), [a for a in args if isinstance(a, cls)]
        found = given[0]._read(name, func, args, kwargs) if len(given) == 1 else None
        if found is not None:
            return found
        args, kwargs = tree_map_only(cls, lambda logits: logits._computed(name), (args, kwargs))
        return func(*args, **kwargs)

    def _read(self, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
        """Return the result of a function that needs no logits, or few at a time; None for others."""
        if getattr(func, "replaces", func) is cross_entropy:  # `ExampleLosses` may have replaced it
            return self._cross_entropy(*args[1:], **kwargs) if args[0] is self else None
        if name in _OF_POSITIONS and args[0] is self:
            return self._moved(name, args[1:]) if not kwargs else None
        if name in _OF_DTYPE and args[0] is self:
            return self._changed(lambda logits: func(logits, *args[1:], **kwargs))
        if name not in _OF_ELEMENTS or any(isinstance(value, torch.Tensor) for value in kwargs.values()):
            return None
        others = [a for a in args if isinstance(a, torch.Tensor)]
        if any(other.numel() not in (1, *other.shape[-1:]) for other in others):
            return None  # not the same for all positions
        flat = [a.reshape(-1) if isinstance(a, torch.Tensor) and a.ndim else a for a in args]
        return self._changed(lambda logits: func(*(logits if a is self else a for a in flat), **kwargs))

    def _changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "DeferredLogits":
        changes = (*self._changes, change)
        return DeferredLogits(self._head, self._hidden, self._positions, changes, self._reading)

    def _moved(self, name: str, args: tuple) -> "DeferredLogits | None":
        """Return the logits at other positions, or None if the function may touch the vocabulary."""
        positions, last = self._positions, self.ndim - 1
        if name == "getitem":
            key = args[0] if isinstance(args[0], tuple) else (args[0],)
            is_mask = isinstance(key[0], torch.Tensor) and key[0].dtype == torch.bool
            if is_mask and len(key) == 1 and key[0].ndim <= last:
                key = (key[0],)
            elif not all(isinstance(part, int | slice) or part is Ellipsis for part in key):
                return None
            if len(key) == self.ndim or Ellipsis in key:
                if key[-1] != slice(None):
                    return None
                key = key[:-1]
            positions = positions[key]
        elif name == "flatten":
            start, end = (part % self.ndim for part in (*args, *(0, -1)[len(args) :]))
            if end == last:
                return None
            positions = positions.flatten(start, end)
        elif name != "contiguous":
            sizes = tuple(args[0]) if isinstance(args[0], tuple | list) else args
            if sizes[-1] != self.shape[-1]:
                return None
            positions = positions.reshape(sizes[:-1])
        return DeferredLogits(self._head, self._hidden, positions, self._changes, self._reading)

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the logits at some flattened positions (rows, vocabulary)."""
        rows = self._hidden.flatten(0, -2).index_select(0, self._positions.flatten()[positions])
        return _logits(self._head, self._changes, rows)

    def _computed(self, reader: str) -> torch.Tensor:
        """Return all logits, for a function of this name."""
        self._reading.others.append(reader)
        rows = self._hidden.flatten(0, -2).index_select(0, self._positions.flatten())
        return _logits(self._head, self._changes, rows).view(self.shape)

    def _cross_entropy(
        self,
        target: torch.Tensor,
        weight: torch.Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = IGNORED,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> torch.Tensor | None:
        """Return the loss from the labelled positions, or None if this needs more."""
        if weight is not None or size_average is not None or reduce is not None:
            return None
        if target.shape != self._positions.shape or target.ndim != 1 or target.is_floating_point():
            return None
        if reduction == "none" and is_fake(self._hidden):
            return None
        self._reading.at_labels = True
        hidden, most, size = self._hidden.flatten(0, -2), self._reading.tokens_per_chunk, len(target)
        if is_fake(hidden):
            # Labels without values (`memory/estimator.py`): all count, and two chunks stand for all chunks.
            chosen, count = self._positions[: 2 * most], len(target)
            target = target[: 2 * most]
        else:
            labelled = (target != ignore_index).nonzero()[:, 0]
            count = len(labelled)
            labelled = labelled if count else labelled.new_zeros(min(1, len(target)))  # its loss is 0
            chosen, target = self._positions[labelled], target[labelled]
        rows = hidden[chosen].split(most)
        parts = list(zip(rows, target.split(most), chosen.split(most), strict=True))
        options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
        options["reduction"] = "none" if reduction == "none" else "sum"
        recompute = [True] * (len(parts) - 1) + [False]  # the backward pass starts with the last part
        losses = [
            _loss_of_rows(self._head, self._changes, *part, options, again, self._reading.row_loss)
            for part, again in zip(parts, recompute, strict=True)
        ]
        if reduction == "none":
            of_labelled = torch.cat(losses)
            return of_labelled.new_zeros(size).index_put((labelled,), of_labelled)
        total = torch.stack(losses).sum()
        return total / count if reduction == "mean" else total


def _operator(name: str) -> Any:
    method = getattr(torch.Tensor, f"__{name}__")
    return lambda self, *args: self.__torch_function__(method, (), (self, *args))


for _name in _OPERATORS:
    setattr(DeferredLogits, f"__{_name}__", _operator(_name))


def _logits(head: Any, changes: tuple[Callable, ...], rows: torch.Tensor) -> torch.Tensor:
    logits = head(rows)
    for change in changes:
        logits = change(logits)
    return logits


def _loss_of_rows(
    head: Any,
    changes: tuple[Callable, ...],
    rows: torch.Tensor,
    target: torch.Tensor,
    positions: torch.Tensor,
    options: dict[str, Any],
    recompute: bool,
    row_loss: RowLoss | None = None,
) -> torch.Tensor:
    """Return the losses of some rows, or their sum. `recompute` drops the logits until the backward pass."""

    def loss(rows: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = _logits(head, changes, rows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if row_loss is None:
            return cross_entropy(logits, target, **options)
        apart: dict[str, Any] = {**options, "reduction": "none"}
        losses = cross_entropy(logits, target, **apart)
        losses = row_loss(losses, logits, positions) * (target != options["ignore_index"])
        return losses if options["reduction"] == "none" else losses.sum()

    if not recompute:
        return loss(rows, target)
    has_dropout = type(head) is not torch.nn.Linear  # such as a head with LoRA
    result: Any = checkpoint(loss, rows, target, use_reentrant=False, preserve_rng_state=has_dropout)
    return result


def _language_model(model: torch.nn.Module) -> PreTrainedModel:
    """Return the transformers model inside wrappers."""
    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise LogitsNeededError(f"{type(model).__name__} is not a model of transformers")
    return found


def check_logits(model: Any) -> None:
    """Compare the loss and gradients of random tokens with all logits and with few at a time.

    The gradients of the head's input and of its parameters are compared. All others follow from these, as
    the layers before the head run the same code. The comparison is to 1e-5 in float32, and to the rounding of
    weights in 16 bits.

    Raises:
        LogitsNeededError: They differ, or the loss reads other logits than labelled ones.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise _needed(model, "it has no vocabulary head")
    if not hasattr(head, "out_features"):
        raise _needed(model, f"its head is not a linear layer ({type(head).__name__})")
    with _prepared(model, head.weight.device):
        try:
            batch = _random_batch(model, head)
            expected = _loss_and_gradient(model, head, batch)
            with deferred(head, tokens_per_chunk=3) as reading:
                found = _loss_and_gradient(model, head, batch)
        except Exception as error:  # a model of unknown structure may raise anything
            what = f"{type(error).__name__}: {one_line(error)[:150]}"
            raise _needed(model, f"its loss cannot be tested ({what})") from error
    if reading.others:
        raise _needed(model, f"its loss reads all logits ({reading.others[0]})")
    if not reading.at_labels:
        raise _needed(model, "its loss is not the cross-entropy of the outputs of its head")
    in_16_bits = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    allowed = ROUNDING if in_16_bits else EXACT
    if not math.isclose(found[0], expected[0], rel_tol=allowed):
        raise _needed(model, f"the loss is {found[0]:.6g}, but {expected[0]:.6g} with all logits")
    error = relative_error(found[1], expected[1])
    if not error <= allowed:
        raise _needed(model, f"the gradient is off by {error:.0e}")


def _needed(model: Any, reason: str) -> LogitsNeededError:
    return LogitsNeededError(f"{type(model).__name__} needs all logits: {reason}")


@contextmanager
def _prepared(model: Any, device: torch.device) -> Iterator[None]:
    """Make a model ready for the comparison in the block, and restore it bit for bit."""
    with ExitStack() as stack:
        stack.enter_context(preserve_rng_state())
        stack.enter_context(full_float32())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(without_dropout(model, training=True))
        stack.enter_context(uncompiled(model))
        stack.enter_context(without_autocast(model))
        for module in model.modules():
            stack.callback(Attributes(module).restore)
        stack.enter_context(preserve_problem_type(model))
        stack.enter_context(torch.enable_grad())
        yield


def _random_batch(model: Any, head: Any) -> dict[str, torch.Tensor]:
    """Return random tokens with labels. The rows differ in labelled tokens."""
    draw = torch.Generator().manual_seed(0)
    vocabulary = min(head.out_features, model.get_input_embeddings().num_embeddings)
    tokens = torch.randint(vocabulary, (2, 6), generator=draw)
    targets = torch.randint(vocabulary, (2, 5), generator=draw)
    labels = targets if model.config.is_encoder_decoder else tokens.clone()
    labels[0, :3] = IGNORED
    labels[1, -1] = IGNORED
    batch = {"input_ids": tokens, "labels": labels}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        batch["attention_mask"] = torch.ones_like(tokens)
    return {name: value.to(head.weight.device) for name, value in batch.items()}


def _loss_and_gradient(
    model: Any, head: torch.nn.Module, batch: Mapping[str, torch.Tensor]
) -> tuple[float, Gradient]:
    """Return the loss, and the gradients of the head's input and of the head's parameters."""
    inputs = {name: p for name, p in head.named_parameters() if p.requires_grad}

    def detach(module: torch.nn.Module, args: tuple) -> tuple | None:
        """Detach the head's input at the first call."""
        if "input" in inputs:
            return None
        inputs["input"] = args[0].detach().requires_grad_()
        return (inputs["input"], *args[1:])

    torch.manual_seed(0)  # for noise of routers
    handle = head.register_forward_pre_hook(detach, prepend=True)
    try:
        loss = model(**batch).loss
    finally:
        handle.remove()
    found = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
    return float(loss.detach()), dict(zip(inputs, found, strict=True))
