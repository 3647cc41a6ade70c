"""Estimate the bytes and operations of a training step, without a GPU and without weights.

`estimate` builds the model from its config alone and keeps a few of its equal layers. It traces steps
(`trace.py`) of this model on batches of a few sizes. `extrapolate.py` derives the moments of a step of any
size from the traces. The estimate is of a step in the middle of a run: it includes the gradients of earlier
micro-batches and the states of the optimizer.
"""

import copy
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from gradacc_hf.accumulation.fp32_accumulation import accumulate_in_float32
from gradacc_hf.accumulation.loss_items import IGNORED, ComputeLoss
from gradacc_hf.accumulation.memory_model import MicroBatchMemory
from gradacc_hf.accumulation.padding_layout import GROUPS_ON_CPU, GROUPS_ON_GPU
from gradacc_hf.errors import NotTraceableError, one_line
from gradacc_hf.memory import extrapolate
from gradacc_hf.memory.trace import ATTENTION, LAYERS, LOSS, Trace, trace
from gradacc_hf.training.distillation import distillation_of
from gradacc_hf.training.lora import FOUR_BIT_DTYPES
from gradacc_hf.training.muon import hidden_matrices
from gradacc_hf.training.optimizer import make_optimizer
from gradacc_hf.training.settings import OptimConfig

LEAN_OPTIMIZERS = ("adafactor", "adamw_8bit")
LAYERS_TRACED = 2  # equal layers in most traces: the first layer may differ; some traces have one layer more
WORKSPACE_BYTES = 600 * 2**20  # of CUDA's context and libraries on a GPU, of Python on a CPU
FRAGMENTED_SHARE = 0.05  # share of the transient memory lost in gaps between the blocks of the allocator
ROWS_MULTIPLE = 16  # of the rows of a traced batch, so that a share of the positions is a whole number
PRIMES = (3, 5, 7, 11, 13, 17)  # sides of the stand-ins of `_state_bytes`
EIGHT_BITS = 1 + 4 / 256  # bytes of a number in bitsandbytes' 8-bit states: 256 numbers share a scale
QUANTIZED_FROM = 4096  # elements of the smallest weight whose states bitsandbytes keeps in 8 bits
MUON_BYTES = 12  # of a step of Muon, for each number of the largest matrix
BYTES_PER_4BIT_WEIGHT = 0.516  # scales included: 0.127 bits a weight (QLoRA, section 3)


@dataclass(frozen=True)
class Point:
    """A batch on which a step is traced."""

    rows: int
    """Examples in the batch."""
    lengths: tuple[int, ...]
    """Tokens to which the examples are padded, one number per column."""
    batch: Mapping[str, Any]
    """The inputs of the model by name."""


@dataclass(frozen=True, eq=False)
class StepEstimate:
    """The memory and operations of a step, in a run of one process."""

    memory: MicroBatchMemory
    """Bytes of a micro-batch of any size."""
    flops: np.ndarray
    """Floating-point operations: factors of the terms of `memory.exponents`."""
    total_parameters: int
    """Numbers in all parameters."""
    trained_parameters: int
    """Numbers in the parameters that are trained."""
    largest_layer: int
    """Bytes of the parameters that FSDP gathers at once."""
    lean_optimizers: Mapping[str, tuple[int, int]]
    """Name of an optimizer → bytes of the states and of the step."""

    def with_optimizer(self, name: str) -> "StepEstimate":
        """Return the estimate with another optimizer, one of `lean_optimizers`."""
        states, step = self.lean_optimizers[name]
        activations = self.memory.activations.copy()
        activations[-1] = _constant(step, activations.shape[1])  # the step is the last moment
        return replace(self, memory=replace(self.memory, optimizer=states, activations=activations))

    def flops_of(self, rows: int, lengths: Any) -> float:
        """Return the floating-point operations of forward and backward.

        The micro-batch has `rows` examples, padded to `lengths` tokens.
        """
        return float(self.flops @ self.memory.terms(rows, lengths))

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers and lists."""
        return {**vars(self), "memory": self.memory.to_json(), "flops": self.flops.tolist()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "StepEstimate":
        """Return the estimate that `to_json` wrote."""
        memory = MicroBatchMemory.from_json(values["memory"])
        return cls(**{**values, "memory": memory, "flops": np.array(values["flops"])})


def terms_of(lengths: np.ndarray) -> np.ndarray:
    """Return the exponents of rows and lengths in the polynomials of an estimate: (terms, 1 + columns).

    Each term is the rows to the power of 0 or 1, times a product of at most two lengths. A product is left
    out if these lengths do not distinguish it from the products before.

    Args:
        lengths: the lengths to trace, (examples, columns).
    """
    scaled = lengths / lengths.max(axis=0)
    chosen: list[tuple[int, ...]] = []
    for powers in sorted(itertools.product(range(3), repeat=lengths.shape[1]), key=sum):
        columns = [np.prod(scaled ** np.array(p), axis=1) for p in (*chosen, powers)]
        if sum(powers) <= 2 and np.linalg.matrix_rank(np.stack(columns), tol=1e-6) > len(chosen):
            chosen.append(powers)
    return np.array([(rows, *powers) for rows in (0, 1) for powers in chosen])


@dataclass(frozen=True)
class StepSettings:
    """The settings of a step, apart from the model and the batch."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    precision: str = "fp32"
    """"fp32", "bf16" or "fp16": the type of autocast."""
    on_gpu: bool = False
    """Whether the step runs on CUDA, whose kernels allocate differently from CPU kernels."""
    four_bit: bool = False
    """Whether frozen weights will be in 4 bits."""


def estimate(
    build: Callable[[], torch.nn.Module],
    points: Sequence[Point],
    exponents: np.ndarray,
    compute_loss: ComputeLoss,
    settings: StepSettings,
) -> StepEstimate:
    """Trace steps at a few sizes, and return the estimate for any size.

    Args:
        build: builds the model to train; torch's meta device is the default device.
        points: the batches to trace, as many as `exponents` has terms. `extrapolate.Fit` states the sizes.
        exponents: the terms of the polynomials, from `terms_of`.
        compute_loss: computes the loss from (outputs, batch).
        settings: the optimizer, the precision and the device.

    Raises:
        NotTraceableError: building or tracing the model failed.
    """
    try:
        with torch.device("meta"):
            whole = build().train()
        if settings.four_bit:
            for weight in _to_be_quantized(whole):  # the type to which a layer dequantises a weight for use
                weight.data = weight.data.to(FOUR_BIT_DTYPES[settings.precision])
        layers = equal_layers(whole)
        few = [
            _with_layers(whole, {n: LAYERS_TRACED + (n == more) for n in layers}) for more in (None, *layers)
        ]
        selected = max(_learned(point.batch) for point in points)
        with FakeTensorMode(allow_non_fake_inputs=True), _ExpertsInAnyFormat():
            traced = _trace(few, layers, points, exponents, compute_loss, settings, selected)
    except Exception as error:  # a user's model may raise anything
        raise NotTraceableError(f"{type(error).__name__}: {one_line(error)[:200]}") from error
    found, flops, used = traced
    parameters = list(whole.named_parameters())
    trained = [p for name, p in parameters if _in_few(name, layers) in used]
    optimizers = {
        name: (_state_bytes(whole, trained, other), _step_bytes(whole, trained, other))
        for name in (settings.optim.name, *LEAN_OPTIMIZERS)
        for other in [replace(settings, optim=replace(settings.optim, name=name))]
    }
    states, step = optimizers[settings.optim.name]
    nothing = _constant(0, len(exponents))
    if not found[..., ATTENTION].any():  # eager attention, in the layers
        found[..., [LAYERS, ATTENTION]] = found[..., [ATTENTION, LAYERS]]
    distillation = distillation_of(whole)
    teacher = 0 if distillation is None else tensor_bytes(distillation.teacher.state_dict().values())
    activations = np.vstack([found[..., :LOSS].sum(axis=2), _constant(step, len(exponents))])
    memory = MicroBatchMemory(
        parameters=tensor_bytes([*(p for _, p in parameters), *whole.buffers()])
        + teacher
        - (_saved_by_four_bit(whole) if settings.four_bit else 0),
        gradients=sum(p.numel() * _gradient_dtype(p).itemsize for p in trained),
        optimizer=states,
        exponents=exponents,
        activations=activations,
        loss=np.vstack([found[..., LOSS], nothing]),
        layers=np.vstack([found[..., LAYERS], nothing]),
        attention=np.vstack([found[..., ATTENTION], nothing]),
        group_cost=(GROUPS_ON_GPU if settings.on_gpu else GROUPS_ON_CPU).fixed,
        workspace=WORKSPACE_BYTES,
        workspace_share=FRAGMENTED_SHARE,
        unsharded=teacher,
    )
    return StepEstimate(
        memory=memory,
        flops=flops,
        total_parameters=sum(p.numel() for _, p in parameters),
        trained_parameters=sum(p.numel() for _, p in parameters if p.requires_grad),
        largest_layer=_largest_layer(whole),
        lean_optimizers=optimizers,
    )


def _constant(number: int, terms: int) -> np.ndarray:
    """Return a polynomial of this many terms that is the same number at every size: the first term."""
    return np.array([number, *[0] * (terms - 1)], dtype=np.float64)


class _ExpertsInAnyFormat(TorchFunctionMode):
    """Trace the matrix products of experts in any number format, which torch traces in bf16 only."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("grouped_mm", "_grouped_mm") and "offs" in kwargs:
            return torch.ops.transformers.grouped_mm_fallback(*args[:2], kwargs["offs"])
        return func(*args, **kwargs)


def _trace(
    models: Sequence[Any],
    layers: Mapping[str, int],
    points: Sequence[Point],
    exponents: np.ndarray,
    compute_loss: ComputeLoss,
    settings: StepSettings,
    selected: float,
) -> tuple[np.ndarray, np.ndarray, set[str]]:
    """Return the moments, the operations, and the names of the parameters that get a gradient.

    models: the model with few layers, then one model per list of equal layers, with one layer more in it.
    """
    batches = [
        {k: _fake(v) if isinstance(v, torch.Tensor) else v for k, v in p.batch.items()} for p in points
    ]
    few, *longer_ones = models
    _make_fake(few)
    if (distillation := distillation_of(few)) is not None:  # the models share it
        _make_fake(distillation.teacher)

    def run(model: torch.nn.Module, point: int) -> Trace:
        how = {"precision": settings.precision, "on_gpu": settings.on_gpu}
        return trace(model, batches[point], compute_loss, selected=selected, **how)

    used: set[str] = set()  # parameters that get a gradient
    for name, parameter in few.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: used.add(name))
    _fill_gradients(few, dict(few.named_parameters()), layers)
    traces = [run(few, point) for point in range(len(points))]
    fit = extrapolate.Fit(exponents, np.array([(point.rows, *point.lengths) for point in points]))
    more = []
    for number, longer in zip(layers.values(), longer_ones, strict=True):
        _make_fake(longer)
        _fill_gradients(longer, used, layers)
        more.append((number - LAYERS_TRACED, [run(longer, int(point)) for point in fit.few]))
    found = extrapolate.largest(extrapolate.moments(fit, traces, more), fit)
    return found, extrapolate.flops(fit, traces, more), used


def _learned(batch: Mapping[str, Any]) -> float:
    """Return the share of labels that are not ignored, rounded up to sixteenths; 1 without integer labels."""
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return 1.0
    return math.ceil(float((labels != IGNORED).float().mean()) * ROWS_MULTIPLE) / ROWS_MULTIPLE


def equal_layers(model: torch.nn.Module) -> dict[str, int]:
    """Return the lists of equal layers: name → number of layers.

    Layers are equal if the class and the parameters (names, shapes, dtypes) are the same. The first layer of
    a list may differ. Layers that alternate between local and global attention count as equal.
    """
    lists = {name: m for name, m in model.named_modules() if type(m) is torch.nn.ModuleList}
    outermost = {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}

    def shape(layer: torch.nn.Module) -> list[Any]:
        return [type(layer), *((name, *_kind(p), p.requires_grad) for name, p in layer.named_parameters())]

    return {
        name: len(layers)
        for name, layers in outermost.items()
        if len(layers) > LAYERS_TRACED + 1 and all(shape(layer) == shape(layers[1]) for layer in layers[2:])
    }


def _in_few(name: str, layers: Mapping[str, int]) -> str:
    """Return the name of a weight in the model of few layers; a layer left out maps to the last one kept."""
    for prefix in layers:
        if match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name):
            return f"{prefix}.{min(int(match[1]), LAYERS_TRACED - 1)}.{name[match.end() :]}"
    return name


def _with_layers(whole: torch.nn.Module, kept: Mapping[str, int]) -> torch.nn.Module:
    """Return a copy of a model that keeps the first layers of these lists: name → number kept."""
    few = copy.deepcopy(whole)
    for name, number in kept.items():
        parent, _, last = name.rpartition(".")
        setattr(few.get_submodule(parent), last, few.get_submodule(name)[:number])  # type: ignore[index]
    return few


def _make_fake(model: torch.nn.Module) -> None:
    """Replace the tensors on the meta device by fake tensors on a CPU."""
    made: dict[int, Any] = {}  # keeps tied weights tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    made[id(tensor)] = tensor, _fake(tensor)
                if tensor is not None:
                    tensors[name] = made[id(tensor)][1]
    if trained := [p for p in model.parameters() if p.requires_grad]:  # a teacher has none
        accumulate_in_float32(model, torch.optim.SGD(trained, lr=1.0))  # it never steps


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    """Return a fake tensor of the same shape on a CPU, in the active fake mode."""
    fake = torch.empty_like(tensor, device="cpu")
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake


def _fill_gradients(model: torch.nn.Module, used: Collection[str], layers: Mapping[str, int]) -> None:
    """Allocate gradients, as in the middle of a window."""
    for name, p in model.named_parameters():
        if p.requires_grad and _in_few(name, layers) in used:
            p.grad = torch.zeros_like(p, dtype=_gradient_dtype(p))


def _gradient_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the type of a weight's gradient: `accumulation/fp32_accumulation.py` sums 16 bits in float32."""
    return torch.promote_types(weight.dtype, torch.float32)


def _kind(weight: torch.Tensor) -> tuple[Any, ...]:
    return tuple(weight.shape), weight.dtype


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Return the bytes of the tensors among these values."""
    return sum(t.numel() * t.itemsize for t in tensors if isinstance(t, torch.Tensor))


def _state_bytes(model: torch.nn.Module, weights: Sequence[torch.Tensor], settings: StepSettings) -> int:
    """Return the bytes of the optimizer's states for these weights of a model.

    One step runs on small stand-ins, whose sides are distinct primes. The primes in the shape of a state show
    which sides of the weight the state has. Two optimizers are computed instead. The 8-bit optimizer runs
    only on GPUs: it has two states, in 32 bits for embeddings and small weights. Muon depends on the place of
    a weight in the model.
    """
    if settings.optim.name == "adamw_8bit":
        embeddings = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        whole = [w for w in weights if w in embeddings or w.numel() < QUANTIZED_FROM]
        numbers, in_32_bits = (sum(w.numel() for w in some) for some in (weights, whole))
        return round(2 * (4 * in_32_bits + EIGHT_BITS * (numbers - in_32_bits)))
    if settings.optim.name == "muon":  # one momentum for each matrix
        matrices = {id(w) for w in hidden_matrices(model)}
        of_muon, others = ([w for w in weights if (id(w) in matrices) == part] for part in (True, False))
        adamw = replace(settings, optim=replace(settings.optim, name="adamw"))
        return tensor_bytes(of_muon) + _state_bytes(model, others, adamw)
    kinds = {(w.ndim, w.dtype) for w in weights}
    stand_ins = {kind: torch.nn.Parameter(torch.ones(PRIMES[: kind[0]], dtype=kind[1])) for kind in kinds}
    for stand_in in stand_ins.values():
        stand_in.grad = torch.ones_like(stand_in)
    optimizer = make_optimizer(torch.nn.ParameterList(stand_ins.values()), settings.optim)
    optimizer.step()
    total = 0
    for weight in weights:
        sides: dict[int, int] = dict(zip(PRIMES, weight.shape, strict=False))
        for state in optimizer.state[stand_ins[weight.ndim, weight.dtype]].values():
            if isinstance(state, torch.Tensor):
                total += state.itemsize * math.prod(sides.get(side, side) for side in state.shape)
    return total


def _step_bytes(model: torch.nn.Module, weights: Sequence[torch.Tensor], settings: StepSettings) -> int:
    """Return the bytes that the optimizer's step holds in addition to the states.

    A fused step holds nothing. Otherwise the step holds one copy of all weights on a GPU, and two copies of
    the largest weight on a CPU. schedulefree always holds one copy of all weights. Muon updates one matrix
    after the other: it holds the update, and in bf16 two versions of it and two squares of its smaller side.
    """
    name = settings.optim.name
    if name == "muon":
        return MUON_BYTES * max((w.numel() for w in hidden_matrices(model)), default=0)
    if name == "schedule_free_adamw":
        return sum(w.numel() * w.itemsize for w in weights)
    fused = name == "adamw_8bit" or (
        name != "adafactor" and not (settings.on_gpu and settings.precision == "fp16")
    )
    sizes = [weight.numel() * _gradient_dtype(weight).itemsize for weight in weights]
    return 0 if fused else sum(sizes) if settings.on_gpu else 2 * max(sizes, default=0)


def _saved_by_four_bit(model: torch.nn.Module) -> int:
    """Return the bytes that storing the frozen weights in 4 bits saves."""
    weights = _to_be_quantized(model)
    return tensor_bytes(weights) - round(BYTES_PER_4BIT_WEIGHT * sum(w.numel() for w in weights))


def _to_be_quantized(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return the weights of the linear layers that are not trained, without the output layer."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = (m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    return [m.weight for m in linear if not m.weight.requires_grad]


def _largest_layer(model: torch.nn.Module) -> int:
    """Return the bytes of the largest layer of all lists, or of everything outside the lists if larger."""
    lists = [m for m in model.modules() if type(m) is torch.nn.ModuleList]
    layers = [list(layer.parameters()) for layers in lists for layer in layers]
    inside = {id(p) for layer in layers for p in layer}
    outside = [p for p in model.parameters() if id(p) not in inside]
    return max(tensor_bytes(layer) for layer in [*layers, outside])
