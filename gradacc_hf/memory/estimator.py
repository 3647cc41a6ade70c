"""What a micro-batch costs, without a GPU and without weights: the bytes and operations of a training step.

`estimate` traces real steps (`trace.py`) of a model built from its config alone, with few of its equal
layers, on examples of the data in a few sizes. From these, `extrapolate.py` has the moments of a step of any
size. Predicted is a step in the midst of a run: gradients of earlier micro-batches and the optimizer's
states are there.
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

from gradacc_hf.accumulation.fp32_accumulation import accumulate_in_float32
from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.accumulation.memory_model import MicroBatchMemory
from gradacc_hf.errors import NotTraceableError, one_line
from gradacc_hf.memory import extrapolate
from gradacc_hf.memory.trace import Trace, trace
from gradacc_hf.training.lora import FOUR_BIT_DTYPES
from gradacc_hf.training.optimizer import make_optimizer
from gradacc_hf.training.settings import OptimConfig

LEAN_OPTIMIZERS = ("adafactor", "adamw_8bit")
LAYERS_TRACED = 2  # equal layers in most traces, as the first may differ; some traces have one more
WORKSPACE_BYTES = 600 * 2**20  # on a GPU, CUDA's context and libraries; on a CPU, Python's
FRAGMENTED_SHARE = 0.05  # of the transient memory: gaps between the blocks of the allocator
ROWS_MULTIPLE = 16  # rows of a traced batch: a share of its positions is then a whole number
PRIMES = (3, 5, 7, 11, 13, 17)
EIGHT_BITS, QUANTIZED_FROM = 1 + 4 / 256, 4096  # of bitsandbytes: bytes, with a scale for each 256; numbers
BYTES_PER_4BIT_WEIGHT = 0.516  # with its scales: QLoRA, section 3, 0.127 bits a weight


@dataclass(frozen=True)
class Point:
    """A batch to trace a step on: of `rows` examples, padded to `lengths` tokens (a number a column)."""

    rows: int
    lengths: tuple[int, ...]
    batch: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class StepEstimate:
    """Of one process that runs alone. `flops`: factors of the terms of `memory.exponents`."""

    memory: MicroBatchMemory
    flops: np.ndarray
    total_parameters: int
    trained_parameters: int
    largest_layer: int  # bytes of the parameters that FSDP gathers at once
    lean_optimizers: Mapping[str, tuple[int, int]]  # bytes of the states of others, and of their step

    def with_optimizer(self, name: str) -> "StepEstimate":
        """With one of `lean_optimizers` instead of its own."""
        states, step = self.lean_optimizers[name]
        activations = self.memory.activations.copy()
        activations[-1] = _constant(step, activations.shape[1])  # the step is the last moment
        return replace(self, memory=replace(self.memory, optimizer=states, activations=activations))

    def flops_of(self, rows: int, lengths: Any) -> float:
        """Floating-point operations of forward and backward of `rows` examples padded to `lengths`."""
        return float(self.flops @ self.memory.terms(rows, lengths))

    def to_json(self) -> dict[str, Any]:
        """As plain numbers and lists."""
        return {**vars(self), "memory": self.memory.to_json(), "flops": self.flops.tolist()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "StepEstimate":
        """What `to_json` gave."""
        memory = MicroBatchMemory.from_json(values["memory"])
        return cls(**{**values, "memory": memory, "flops": np.array(values["flops"])})


def terms_of(lengths: np.ndarray) -> np.ndarray:
    """The powers (terms, 1 + columns) of rows and lengths that an estimate of such lengths stands on.

    `lengths` (examples, columns), no more of them than are to be traced. Rows to the power of 0 and 1, ×
    products of up to two lengths, as far as there are different lengths to tell these apart.
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
    """What decides how a step goes, beside the model and its batch.

    `on_gpu`: as CUDA's kernels go about it, not a CPU's. `four_bit`: frozen weights are to be in 4 bits.
    """

    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: str = "fp32"
    on_gpu: bool = False
    four_bit: bool = False


def estimate(
    build: Callable[[], torch.nn.Module],
    points: Sequence[Point],
    exponents: np.ndarray,
    compute_loss: Callable[[Any, Mapping[str, Any]], torch.Tensor],
    settings: StepSettings,
) -> StepEstimate:
    """Trace and fit. `build` makes the model that is trained, with torch's meta device as the default.

    `points`: one for each of the terms of `exponents` (`extrapolate.Fit`). Raises NotTraceableError.
    """
    try:
        with torch.device("meta"):
            whole = build().train()
        if settings.four_bit:
            for weight in _to_be_quantized(whole):  # from which a layer's is made when it computes
                weight.data = weight.data.to(FOUR_BIT_DTYPES[settings.precision])
        layers = equal_layers(whole)
        few = [
            _with_layers(whole, {n: LAYERS_TRACED + (n == more) for n in layers}) for more in (None, *layers)
        ]
        selected = max(_learned(point.batch) for point in points)
        with FakeTensorMode(allow_non_fake_inputs=True):
            traced = _trace(few, layers, points, exponents, compute_loss, settings, selected)
    except Exception as error:  # a model of any kind, which may raise anything
        raise NotTraceableError(f"{type(error).__name__}: {one_line(error)[:200]}") from error
    found, flops, used = traced
    parameters = list(whole.named_parameters())
    trained = [p for name, p in parameters if _in_few(name, layers) in used]
    optimizers = {
        name: (_state_bytes(whole, trained, other), _step_bytes(trained, other))
        for name in (settings.optim.name, *LEAN_OPTIMIZERS)
        for other in [replace(settings, optim=replace(settings.optim, name=name))]
    }
    states, step = optimizers[settings.optim.name]
    activations = np.vstack([found[..., 0], _constant(step, len(exponents))])
    memory = MicroBatchMemory(
        parameters=tensor_bytes([*(p for _, p in parameters), *whole.buffers()])
        - (_saved_by_four_bit(whole) if settings.four_bit else 0),
        gradients=sum(p.numel() * _gradient_dtype(p).itemsize for p in trained),
        optimizer=states,
        exponents=exponents,
        activations=activations,
        loss=np.vstack([found[..., 1], _constant(0, len(exponents))]),
        workspace=WORKSPACE_BYTES,
        workspace_share=FRAGMENTED_SHARE,
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
    """A polynomial of so many terms, the first of which has no size in it."""
    return np.array([number, *[0] * (terms - 1)], dtype=np.float64)


def _trace(
    models: Sequence[Any],
    layers: Mapping[str, int],
    points: Sequence[Point],
    exponents: np.ndarray,
    compute_loss: Callable[[Any, Mapping[str, Any]], torch.Tensor],
    settings: StepSettings,
    selected: float,
) -> tuple[np.ndarray, np.ndarray, set[str]]:
    """Moments, operations, and the names of what has a gradient.

    models: with few layers, and with one more of each kind.
    """
    batches = [
        {k: _fake(v) if isinstance(v, torch.Tensor) else v for k, v in p.batch.items()} for p in points
    ]
    few, *longer_ones = models
    _make_fake(few)

    def run(model: torch.nn.Module, point: int) -> Trace:
        how = {"precision": settings.precision, "on_gpu": settings.on_gpu}
        return trace(model, batches[point], compute_loss, selected=selected, **how)

    used: set[str] = set()  # what a gradient comes to
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
    """The share of the labels that are learned, rounded up to sixteenths; 1 where there are none."""
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return 1.0
    return math.ceil(float((labels != IGNORED).float().mean()) * ROWS_MULTIPLE) / ROWS_MULTIPLE


def equal_layers(model: torch.nn.Module) -> dict[str, int]:
    """The lists of layers with the same class and parameters (names, shapes, dtypes): name → how many.

    The first may differ from the others. Layers that alternate in what they attend to count as the same.
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
    """The name of a weight in the model of few layers: of a layer that is not there, that of the last."""
    for prefix in layers:
        if match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name):
            return f"{prefix}.{min(int(match[1]), LAYERS_TRACED - 1)}.{name[match.end() :]}"
    return name


def _with_layers(whole: torch.nn.Module, kept: Mapping[str, int]) -> torch.nn.Module:
    """A copy of a model with so many layers in these lists."""
    few = copy.deepcopy(whole)
    for name, number in kept.items():
        parent, _, last = name.rpartition(".")
        setattr(few.get_submodule(parent), last, few.get_submodule(name)[:number])  # type: ignore[index]
    return few


def _make_fake(model: torch.nn.Module) -> None:
    """Put fake tensors, as if on a CPU, in place of those on the meta device."""
    made: dict[int, Any] = {}  # so that tied weights stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    made[id(tensor)] = tensor, _fake(tensor)
                if tensor is not None:
                    tensors[name] = made[id(tensor)][1]
    accumulate_in_float32(model, torch.optim.SGD(model.parameters(), lr=1.0))  # what steps is no matter


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    """Its shape without its numbers, as if on a CPU, in the fake mode at hand."""
    fake = torch.empty_like(tensor, device="cpu")
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake


def _fill_gradients(model: torch.nn.Module, used: Collection[str], layers: Mapping[str, int]) -> None:
    """As they are in the midst of a window."""
    for name, p in model.named_parameters():
        if p.requires_grad and _in_few(name, layers) in used:
            p.grad = torch.zeros_like(p, dtype=_gradient_dtype(p))


def _gradient_dtype(weight: torch.Tensor) -> torch.dtype:
    """`accumulation/fp32_accumulation.py` has gradients of half precision accumulate in float32."""
    return torch.promote_types(weight.dtype, torch.float32)


def _kind(weight: torch.Tensor) -> tuple[Any, ...]:
    return tuple(weight.shape), weight.dtype


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Return the bytes of the tensors among these values."""
    return sum(t.numel() * t.itemsize for t in tensors if isinstance(t, torch.Tensor))


def _state_bytes(model: torch.nn.Module, weights: Sequence[torch.Tensor], settings: StepSettings) -> int:
    """What the optimizer keeps of these weights of a model.

    It is asked with small stand-ins, whose sides are primes: its states then show which sides they have. One
    in 8 bits runs on GPUs alone; it keeps two states, in 32 bits of embeddings and small weights.
    """
    if settings.optim.name == "adamw_8bit":
        embeddings = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        whole = [w for w in weights if w in embeddings or w.numel() < QUANTIZED_FROM]
        numbers, in_32_bits = (sum(w.numel() for w in some) for some in (weights, whole))
        return round(2 * (4 * in_32_bits + EIGHT_BITS * (numbers - in_32_bits)))
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


def _step_bytes(weights: Sequence[torch.Tensor], settings: StepSettings) -> int:
    """What the optimizer's step holds beside its states: nothing where it is fused; else, on a GPU, a copy of
    all weights, and on a CPU of one after the other."""
    name = settings.optim.name
    fused = name == "adamw_8bit" or (
        name != "adafactor" and not (settings.on_gpu and settings.precision == "fp16")
    )
    sizes = [weight.numel() * _gradient_dtype(weight).itemsize for weight in weights]
    return 0 if fused else sum(sizes) if settings.on_gpu else 2 * max(sizes, default=0)


def _saved_by_four_bit(model: torch.nn.Module) -> int:
    """Bytes of the weights that will be in 4 bits, less what they take then."""
    weights = _to_be_quantized(model)
    return tensor_bytes(weights) - round(BYTES_PER_4BIT_WEIGHT * sum(w.numel() for w in weights))


def _to_be_quantized(model: torch.nn.Module) -> list[torch.Tensor]:
    """Of the linear layers that are not trained, but for the output layer."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = (m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    return [m.weight for m in linear if not m.weight.requires_grad]


def _largest_layer(model: torch.nn.Module) -> int:
    """Bytes of the largest element of a list of layers, or of all that is in none."""
    lists = [m for m in model.modules() if type(m) is torch.nn.ModuleList]
    layers = [list(layer.parameters()) for layers in lists for layer in layers]
    inside = {id(p) for layer in layers for p in layer}
    outside = [p for p in model.parameters() if id(p) not in inside]
    return max(tensor_bytes(layer) for layer in [*layers, outside])
