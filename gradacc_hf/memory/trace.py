"""Trace the memory and operations of a forward and backward, without weights and without a GPU.

`trace` runs forward, loss and backward on fake tensors, which have shapes but no numbers. After each
operation it records the bytes of the tensors created since the start. torch's MemTracker records only the
peak, which is the maximum of many polynomials in the size of the step. `trace` records every moment: the
memory at one moment is a single polynomial. `estimator.py` uses the traces.
"""

import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch._subclasses.fake_tensor import is_fake
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import modeling_utils

from gradacc_hf.accumulation.loss_items import ComputeLoss, total_loss
from gradacc_hf.padding.removal import layers_by_owner
from gradacc_hf.training.distillation import distillation_of

REST, LAYERS, ATTENTION, LOSS = range(4)  # labels of transient tensors; embeddings belong to the rest
LABELS = 4
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
SDPA = "scaled_dot_product_attention"
_ATEN = torch.ops.aten
_INDEXING = (_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._index_put_impl_)
_DEVICE = torch.ops.prim.device.default  # called all the time on fake tensors; no operation of the step
_FLASH = _ATEN._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Phase:
    """The forward pass with the loss, or the backward pass."""

    operations: list[Any]
    """The operations in order."""
    held: np.ndarray
    """Bytes of each label after each operation, (operations, labels)."""


@dataclass(frozen=True)
class Trace:
    """The trace of one step."""

    phases: tuple[Phase, Phase]
    """The forward with the loss, and the backward."""
    flops: int
    """Floating-point operations of both phases."""


def trace(
    model: torch.nn.Module,
    batch: Mapping[str, Any],
    compute_loss: ComputeLoss,
    *,
    precision: str = "fp32",
    on_gpu: bool = False,
    selected: float = 1.0,
) -> Trace:
    """Trace one step of a fake model, inside the fake mode that created it.

    The weights, buffers and existing gradients of the model are not counted, nor the weights of a teacher.
    The batch is.

    Args:
        model: the fake model; it may have gradients.
        batch: fake inputs by name.
        compute_loss: computes the loss from (outputs, batch).
        precision: "fp32", or the type of autocast: "bf16" or "fp16".
        on_gpu: whether to imitate CUDA's kernels where a CPU's kernels allocate differently.
        selected: the assumed share of true values in a mask that decides a shape, such as labelled positions.
    """
    tracer = _Tracer(selected)
    for tensor in tree_leaves([list(model.parameters()), [p.grad for p in model.parameters()]]):
        tracer.ignore(tensor)
    distillation = distillation_of(model)
    teacher = [] if distillation is None else [*distillation.teacher.state_dict(keep_vars=True).values()]
    for tensor in (*model.buffers(), *teacher):
        tracer.ignore(tensor)
    for tensor in tree_leaves(dict(batch)):
        tracer.count(tensor)
    forward: Any = model.__call__
    if precision in AUTOCAST:
        forward = convert_outputs_to_fp32(torch.autocast("cpu", AUTOCAST[precision])(forward))

    def weighed_loss(outputs: Any) -> torch.Tensor:  # returning frees the outputs, as in the loop
        tracer.label = LOSS
        return total_loss(compute_loss(outputs, batch)) * 1.0

    phases = []
    on_device = _as_on_gpu() if on_gpu else nullcontext()
    with _labelling(model, tracer), tracer, on_device, _labelling_attention(tracer), _offloading():
        loss = weighed_loss(forward(**batch))
        phases.append(tracer.take())
        loss.backward()
        phases.append(tracer.take())
    return Trace((phases[0], phases[1]), tracer.flops)


class _Tracer(TorchDispatchMode):
    """Counts the bytes of every storage, from the operation that returns it until it is freed."""

    def __init__(self, selected: float) -> None:
        super().__init__()
        self.selected = selected
        self.label = REST
        self.flops = 0
        self._bytes = [0] * LABELS
        self._known: dict[int, Any] = {}  # address of a storage → weak reference to it, label and size
        self._operations: list[Any] = []
        self._held: list[tuple[int, ...]] = []

    def ignore(self, tensor: Any) -> None:
        """Leave out a tensor that existed before the step."""
        if isinstance(tensor, torch.Tensor):
            self._follow(tensor, size=0)

    def count(self, tensor: Any) -> None:
        """Count a tensor that comes with the step, as part of the batch."""
        if isinstance(tensor, torch.Tensor):
            self._follow(tensor)

    def move(self, tensor: torch.Tensor, label: int) -> None:
        """Give a tensor another label."""
        if known := self._known.get(tensor.untyped_storage()._cdata):
            self._bytes[known[1]] -= known[2]
            self._bytes[label] += known[2]
            known[1] = label

    def take(self) -> Phase:
        """Return what was recorded since the last call."""
        phase = Phase(self._operations, np.array(self._held, dtype=np.float64).reshape(-1, LABELS))
        self._operations, self._held = [], []
        return phase

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._run(func, args, kwargs or {})
        if func is _DEVICE:
            return result
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor)
        self._operations.append(func)
        self._held.append(tuple(self._bytes))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        elif packet is _FLASH:
            self.flops += sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape)
        elif packet is _FLASH_BACKWARD:
            self.flops += sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation. If a fake mask decides the shape, the share `selected` of it counts as true."""
        packet = func._overloadpacket
        if not any(is_fake(tensor) for tensor in tree_leaves(args)):  # the values are known
            return func(*args, **kwargs)
        if packet is _ATEN.nonzero:
            found = math.ceil(self.selected * args[0].numel())
            return args[0].new_empty((found, args[0].ndim), dtype=torch.int64)
        if packet not in _INDEXING or all(i is None or i.dtype is not torch.bool for i in args[1]):
            return func(*args, **kwargs)
        if packet is not _ATEN.index:  # it writes into an existing tensor
            return torch.empty_like(args[0]) if packet is _ATEN.index_put else args[0]
        places: list[Any] = []
        for index in args[1]:
            if index is None or index.dtype is not torch.bool:
                places.append(index)
                continue
            place = index.new_empty(math.ceil(self.selected * index.numel()), dtype=torch.int64)
            places += [place] * index.ndim
        return func(args[0], places)

    def _follow(self, tensor: torch.Tensor, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if size is None else size
        self._bytes[self.label] += size

        def gone(_: Any) -> None:
            _, label, size = self._known.pop(key)
            self._bytes[label] -= size

        self._known[key] = [weakref.ref(storage, gone), self.label, size]


@contextmanager
def _labelling(model: Any, tracer: _Tracer) -> Iterator[None]:
    """Label tensors as layers, loss or rest; `_labelling_attention` adds attention.

    The loss begins with the output layer or, without one, after the body. In the backward it ends where the
    gradient reaches the same place.
    """
    tracer.label, hooks = REST, _label_layers(model, tracer)

    def body_begins(*_: Any) -> None:
        tracer.label = REST

    def loss_begins(tensors: Any) -> None:
        tracer.label = LOSS
        first = _first_state(tensors)
        if first is not None and first.requires_grad:
            first.register_hook(loss_ends)

    def loss_ends(_: Any) -> None:
        if tracer.label == LOSS:  # not yet in the last layer
            tracer.label = REST

    inner = next((m for m in model.modules() if hasattr(m, "get_output_embeddings")), model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    body = getattr(inner, "base_model", inner)
    if isinstance(head, torch.nn.Module):
        hooks.append(head.register_forward_pre_hook(lambda module, inputs: loss_begins(inputs)))
    elif body is not model:
        hooks.append(body.register_forward_pre_hook(body_begins))
        hooks.append(body.register_forward_hook(lambda module, inputs, outputs: loss_begins(outputs)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _label_layers(model: torch.nn.Module, tracer: _Tracer) -> list[Any]:
    """Add hooks that label the tensors of repeated layers, and return the hooks.

    `remove_padding` computes these tensors without padding. What a stack of layers returns, and the gradient
    that it returns, are part of the rest, as they are padded.
    """
    output: Any = None  # of the latest layer

    def begin(module: Any, args: Any, kwargs: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # checkpointing computes the layer again
            return
        tracer.label, states = LAYERS, _first_state((args, kwargs))
        if states is not None and states is output:
            tracer.move(states, LAYERS)
        elif states is not None and states.requires_grad:
            states.register_hook(leave)

    def end(module: Any, args: Any, result: Any) -> None:
        nonlocal output
        if torch._C._current_graph_task_id() != -1:
            return
        tracer.label, output = REST, _first_state(result)
        if output is not None:
            tracer.move(output, REST)
            if output.requires_grad:
                output.register_hook(enter)

    def enter(_: Any) -> None:
        tracer.label = LAYERS

    def leave(gradient: torch.Tensor) -> None:
        tracer.label = REST
        tracer.move(gradient, REST)

    hooks: list[Any] = []
    for layer in itertools.chain.from_iterable(layers_by_owner(model).values()):
        hooks.append(layer.register_forward_pre_hook(begin, with_kwargs=True))
        hooks.append(layer.register_forward_hook(end))
    return hooks


@contextmanager
def _labelling_attention(tracer: _Tracer) -> Iterator[None]:
    """Label what torch's attention in a layer gets, computes and returns. Without padding, it runs by groups.

    Attention in the code of a model ("eager") keeps the label of the layer.
    """
    attend = getattr(F, SDPA)

    def labelled(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if tracer.label != LAYERS:
            return attend(query, key, value, *args, **kwargs)
        for tensor in (query, key, value):
            tracer.move(tensor, ATTENTION)
        label_as(ATTENTION)
        output = attend(query, key, value, *args, **kwargs)
        label_as(LAYERS)
        if output.requires_grad:
            output.register_hook(lambda _: label_as(ATTENTION))
        if query.requires_grad:
            query.register_hook(lambda _: label_as(LAYERS))
        return output

    def label_as(label: int) -> None:
        tracer.label = label

    setattr(F, SDPA, labelled)
    try:
        yield
    finally:
        setattr(F, SDPA, attend)


def _first_state(values: Any) -> torch.Tensor | None:
    """Return the first floating-point tensor among these values: the hidden states of a layer."""
    tensors = (v for v in tree_leaves(values) if isinstance(v, torch.Tensor) and v.is_floating_point())
    return next(tensors, None)


@contextmanager
def _as_on_gpu() -> Iterator[None]:
    """Imitate CUDA where it differs from a CPU.

    CUDA's autocast computes norms and softmax in float32. CUDA's attention kernel stores no matrix of scores,
    with or without dropout. Functions are replaced in the module, because a torch function mode misses what
    gradient checkpointing recomputes in the backward.
    """
    own = {name: getattr(F, name) for name in ("layer_norm", "group_norm", "softmax", "log_softmax")}
    replaced = {name: _in_float32(function) for name, function in own.items()}
    own[SDPA], replaced[SDPA] = getattr(F, SDPA), _efficient_attention
    try:
        for name, function in replaced.items():
            setattr(F, name, function)
        yield
    finally:
        for name, function in own.items():
            setattr(F, name, function)


class _OnHost(torch.autograd.graph.saved_tensors_hooks):
    """Stands for torch's `save_on_cpu`: what is saved takes no memory until the backward pass."""

    def __init__(self, pin_memory: bool = False, device_type: str = "cuda") -> None:
        super().__init__(
            lambda tensor: (tensor.size(), tensor.dtype),
            lambda packed: torch.empty(packed[0], dtype=packed[1], device="cpu"),
        )


@contextmanager
def _offloading() -> Iterator[None]:
    """Let transformers offload the inputs of checkpointed layers (`budget.offload_activations`)."""
    own = getattr(modeling_utils, "save_on_cpu", None)  # absent before transformers 5.23
    modeling_utils.save_on_cpu = _OnHost  # type: ignore[assignment]
    try:
        yield
    finally:
        modeling_utils.save_on_cpu = own  # type: ignore[assignment]


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    def computed(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(a.float() if isinstance(a, torch.Tensor) else a for a in args)
            kwargs = {n: v.float() if isinstance(v, torch.Tensor) else v for n, v in kwargs.items()}
        return function(*args, **kwargs)

    return computed


def _efficient_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Call torch's memory-efficient attention by name: on a CPU, torch does not select it."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
    if attn_mask is not None:  # as a bias in the type of the query, one view for all heads
        bias = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = bias.expand(*query.shape[:2], query.shape[-2], key.shape[-2])
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
