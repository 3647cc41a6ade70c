"""The router loss of a mixture of experts over the whole window, with any split.

transformers balances the experts of one forward: the loss multiplies the tokens per expert by the mean
probability per expert. A product of two means is not a mean over items, so micro-batches balance themselves
and not the window. Every router loss is a function of sums over tokens, so two passes are exact. The first
adds up the sums of all micro-batches and processes, without a graph. It takes the derivative of the loss with
respect to each sum. In the second, the loss of a micro-batch is its sums times these derivatives. Only
the outputs of the routers are read, so that gradient checkpointing of the layers changes nothing.

Sources: Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6; Zoph et al. 2022, arXiv 2202.08906, equation 5
(z-loss); Qiu et al. 2025, arXiv 2501.11873 (balance over the global batch, with the sums of earlier
micro-batches instead of a first pass).
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, Token
from copy import deepcopy
from dataclasses import dataclass, field
from functools import wraps
from inspect import signature, unwrap
from typing import Any

import torch
from accelerate.utils import DistributedType, extract_model_from_parallel
from torch import Tensor
from torch.nn.functional import one_hot

from gradacc_hf.accumulation.padding_layout import target_mask
from gradacc_hf.accumulation.rng_replay import RngReplay
from gradacc_hf.accumulation.window import Window
from gradacc_hf.errors import InputError, LoopError

SUMS_RTOL = 0.02  # largest difference of two passes: other dropout gives about 0.1, bf16 about 0.001


# ---- the formulas of transformers, as functions of sums over tokens ----


def balance_sums(
    gate_logits: Sequence[Tensor], num_experts: int, top_k: int = 2, attention_mask: Tensor | None = None
) -> Tensor:
    """Return choices per expert, sum of probabilities per expert, and tokens × layers: (2 × experts + 1,).

    Args:
        gate_logits: Router logits of each layer (tokens, experts).
        num_experts: Number of experts.
        top_k: Experts of a token.
        attention_mask: 0 for padding (batch, length). Ignored if padding is removed from the layers.
    """
    total: Any = 0.0
    for logits in gate_logits:
        probabilities = torch.softmax(logits.to(gate_logits[0].device), dim=-1)
        chosen = probabilities.detach().topk(top_k, dim=-1).indices  # (tokens, top_k)
        probabilities = _float32_at_least(probabilities)
        counts = probabilities.new_ones(len(probabilities))
        if attention_mask is not None and attention_mask.numel() == len(probabilities):
            counts = attention_mask.reshape(-1).to(probabilities)
        choices = probabilities.new_zeros(num_experts).scatter_add(
            0, chosen.flatten(), counts.repeat_interleave(top_k)
        )
        total = total + torch.cat([choices, counts @ probabilities, counts.sum()[None]])
    return total


def balance(sums: Tensor) -> Tensor:
    """Return experts × Σ over experts of (choices / tokens) × (mean probability), from `balance_sums`."""
    num_experts = len(sums) // 2
    choices, probabilities = sums[:-1].split(num_experts)
    return num_experts * (choices @ probabilities) / sums[-1] ** 2


def row_balance_sums(router_probs: Tensor, expert_indices: Tensor) -> Tensor:
    """Return the sum of the balance losses of the rows, and rows: (2,). Padding counts, as in transformers.

    Args:
        router_probs: Probabilities (rows, length, experts).
        expert_indices: The expert of each token (rows, length).
    """
    probabilities = _float32_at_least(router_probs)
    choices = one_hot(expert_indices.long(), probabilities.shape[-1]).to(probabilities).mean(1)
    losses = probabilities.shape[-1] * (choices * probabilities.mean(1)).sum(-1)
    return torch.stack([losses.sum(), losses.new_tensor(len(losses))])


def z_sums(router_logits: Tensor) -> Tensor:
    """Return the sum of the squared log-partition functions of the tokens, and tokens: (2,).

    Args:
        router_logits: Logits (rows, length, experts).
    """
    squares = torch.logsumexp(_float32_at_least(router_logits), dim=-1) ** 2
    return torch.stack([squares.sum(), squares.new_tensor(squares.numel())])


def mean(sums: Tensor) -> Tensor:
    """Return a sum divided by its number of terms."""
    return sums[0] / sums[1]


def _float32_at_least(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True)
class Formula:
    """A router loss.

    Attributes:
        sums: Takes the arguments of the function in transformers, and returns sums over tokens (sums,).
        loss: Takes sums, and returns the loss, a scalar.
        example: Arguments for a comparison with the function in transformers.
    """

    sums: Callable[..., Tensor]
    loss: Callable[[Tensor], Tensor]
    example: Callable[[], dict[str, Any]]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


_MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
_FORMULAS = {  # parameters of the function in transformers → formula
    ("gate_logits", "num_experts", "top_k", "attention_mask"): Formula(
        balance_sums,
        balance,
        lambda: {
            "gate_logits": (_random(6, 4), _random(6, 4) + 1.0),
            "num_experts": 4,
            "top_k": 2,
            "attention_mask": _MASK,
        },
    ),
    ("router_probs", "expert_indices"): Formula(
        row_balance_sums,
        mean,
        lambda: {
            "router_probs": _random(2, 3, 4).softmax(-1),
            "expert_indices": _random(2, 3, 4).argmax(-1),
        },
    ),
    ("router_logits",): Formula(z_sums, mean, lambda: {"router_logits": _random(2, 3, 4)}),
}
_FUNCTIONS = ("load_balancing_loss_func", "router_z_loss_func")  # in the modules of transformers' models


# ---- the two passes ----


@dataclass
class _FirstPass:
    """The result of the first pass over a window.

    Attributes:
        weights: Factor of each micro-batch's loss in the gradient of the window.
        position: Returns the position of the current micro-batch; None outside the window.
        checks: Whether the loop may give other micro-batches than the first pass had.
        here: Sums of each micro-batch, by call of a formula in the forward.
        losses: Loss of the window, by call.
        derivatives: Derivative of the loss with respect to each sum, by call.
    """

    weights: Sequence[float]
    position: Callable[[], int | None]
    checks: bool
    here: list[list[Tensor]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    derivatives: list[Tensor] = field(default_factory=list)

    def part(self, position: int, call: int, sums: Tensor) -> Tensor:
        """Return the loss of the window. The gradient is this micro-batch's part, divided by its weight."""
        if not (weight := self.weights[position]):
            return sums.new_zeros(())
        if call >= len(self.derivatives):
            raise LoopError("look_ahead ran in evaluation mode: call model.train() before it")
        first = self.here[position][call]
        if self.checks and float((sums.detach() - first).norm() / first.norm()) > SUMS_RTOL:
            raise LoopError(
                f"the routers choose other experts for micro-batch {position + 1} than in look_ahead: give "
                "it the micro-batches that the loop trains on, in the same order"
            )
        through = (self.derivatives[call] @ sums) / weight
        return self.losses[call] + (through - through.detach())


class RouterLoss:
    """The router loss of a model over whole windows; `router_loss_over_window` makes it.

    Call `look_ahead` before the micro-batches of each window. Without it, the router loss of a forward is
    over its own tokens. In eval mode it is 0, so that an evaluation does not depend on its split.
    """

    def __init__(self) -> None:
        self._first_pass: _FirstPass | None = None
        self._collected: list[tuple[Formula, Tensor]] | None = None  # of a forward in the first pass
        self._is_off = False
        self._call = 0  # calls of formulas in the current forward
        self._begun = 0  # training forwards since `look_ahead`, in a loop without a Window
        self._rng: RngReplay | None = None

    def __deepcopy__(self, memo: dict) -> "RouterLoss":
        return RouterLoss()  # a copied model starts without a window

    def look_ahead(
        self,
        model: torch.nn.Module,
        micro_batches: Window | Iterable[Mapping[str, Any]],
        weights: Sequence[float] | None = None,
    ) -> None:
        """Add up the window over all processes: one forward of each micro-batch, without gradients.

        A window of a single micro-batch needs no such pass. All processes must call it.

        Args:
            model: The prepared model.
            micro_batches: A window of `WindowLoader`, or the micro-batches of a window on the device.
            weights: The factor that the loop gives the loss of each micro-batch; by default the same for all,
                with a sum of 1. A `Window` has its own. DDP also divides by the number of processes.

        Raises:
            ValueError: The window has several losses, or there are more or fewer weights than micro-batches.
        """
        self._first_pass, self._begun, self._rng = None, 0, None
        if isinstance(micro_batches, Window):
            self._look_ahead_in(micro_batches, model)
            return
        if weights is None:
            micro_batches = list(micro_batches)
            weights = [1 / len(micro_batches)] * len(micro_batches)
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if processes == len(weights) == 1:
            return
        rng = RngReplay(next(model.parameters()).device)

        def forwards() -> Iterator[Mapping[str, Any]]:
            for (position, _), batch in zip(enumerate(weights), micro_batches, strict=True):
                rng.enter(position)
                yield batch

        found = _FirstPass([weight / processes for weight in weights], self._next_position, checks=True)
        self._run(extract_model_from_parallel(model, keep_fp32_wrapper=True), forwards(), found)
        self._rng = rng

    def _look_ahead_in(self, window: Window, model: torch.nn.Module) -> None:
        accelerator = window.accelerator
        if window.split.items:
            raise ValueError("num_items: found several losses; the router loss is part of a single loss")
        if window.accumulation_steps == accelerator.num_processes == 1:
            return
        if accelerator.distributed_type != DistributedType.FSDP:
            # DDP's forward is collective, and processes have unequal numbers of micro-batches.
            model = accelerator.unwrap_model(model)
        weights = [micro_batch.num_items / window.num_items for micro_batch in window.micro_batches]
        found = _FirstPass(weights, lambda: window.position, checks=False)
        self._run(model, window.forward_pass(), found)

    @torch.no_grad()
    def _run(self, model: torch.nn.Module, batches: Iterator[Mapping[str, Any]], found: _FirstPass) -> None:
        """Run the forwards, and fill in the results."""
        formulas: list[Formula] = []
        for batch in batches:
            self._collected = []
            try:
                model(**batch)
            finally:
                collected, self._collected = self._collected, None
            formulas = [formula for formula, _ in collected]
            found.here.append([sums for _, sums in collected])
        counted = [sums for sums, weight in zip(found.here, found.weights, strict=True) if weight]
        unused = [sums * 0.0 for sums in found.here[0]]  # a process without items takes part in the sum
        for call, formula in enumerate(formulas):
            total = torch.stack([sums[call] for sums in (*counted, unused)]).sum(0)
            total = torch.cat([total, total.new_tensor([sum(found.weights)])])
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(total)
            with torch.enable_grad():
                sums = total[:-1].requires_grad_()
                loss = formula.loss(sums)
                [derivative] = torch.autograd.grad(loss, sums)
            found.losses.append(loss.detach() / total[-1])
            found.derivatives.append(derivative)
        self._first_pass = found

    def _next_position(self) -> int:
        """Return the position of the current forward in a loop without a `Window`."""
        return self._begun - 1

    def forget(self) -> None:
        """Leave the window: the router loss of later forwards is over their own tokens."""
        self._first_pass, self._rng = None, None

    @contextmanager
    def off(self) -> Iterator[None]:
        """Leave the router loss out in the block."""
        before, self._is_off = self._is_off, True
        try:
            yield
        finally:
            self._is_off = before

    # ---- called in the forward of the model ----

    def begin(self, module: torch.nn.Module) -> None:
        """Begin a forward of the model."""
        self._call = 0
        first = self._first_pass
        if self._rng is None or first is None or self._collected is not None:
            return
        if not module.training or self._is_off or not torch.is_grad_enabled():
            return
        if self._begun == len(first.weights):
            raise LoopError(
                f"look_ahead read {self._begun} micro-batches, and the loop trains on more: call it before "
                "the micro-batches of each window"
            )
        self._rng.enter(self._begun)
        self._begun += 1

    def loss(
        self, formula: Formula, module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any]
    ) -> Tensor:
        """Return the loss for a call of a function of transformers in the forward of `module`."""
        call, self._call = self._call, self._call + 1
        given = args[0] if args else next(iter(kwargs.values()))
        if self._is_off or not module.training or given is None or not len(given):  # no layer has experts
            return torch.zeros(())
        sums = formula.sums(*args, **kwargs)
        if torch.is_grad_enabled() and not sums.requires_grad and _recomputes(module):
            raise InputError(
                "with gradient checkpointing, routers get no gradient if use_reentrant is True: pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if self._collected is not None:
            self._collected.append((formula, sums))
            return sums.new_zeros(())
        first = self._first_pass
        position = None if first is None or not torch.is_grad_enabled() else first.position()
        if first is None or position is None:
            return formula.loss(sums)
        return first.part(position, call, sums)

    @property
    def is_first_pass(self) -> bool:
        """Whether the current forward belongs to the first pass."""
        return self._collected is not None


def _recomputes(model: torch.nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


# ---- the change of the model ----

_CURRENT: ContextVar[tuple[RouterLoss, torch.nn.Module] | None] = ContextVar("router_loss", default=None)


@dataclass(eq=False)
class _Enter:
    """Forward pre-hook: route the calls of router losses in this forward to a `RouterLoss`."""

    router_loss: RouterLoss
    tokens: list[Token] = field(default_factory=list)

    @torch.compiler.disable
    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        if _CURRENT.get() is None:
            self.router_loss.begin(module)
        self.tokens.append(_CURRENT.set((self.router_loss, module)))
        if not module.training:
            return args, kwargs
        kwargs = {**kwargs, "output_router_logits": True}
        names, labels = signature(module.forward).parameters, kwargs.get("labels")
        has_targets = any(
            kwargs.get(f"decoder_{name}") is not None for name in ("input_ids", "attention_mask")
        )
        if "decoder_attention_mask" in names and labels is not None and not has_targets:
            kwargs["decoder_attention_mask"] = target_mask(labels)  # else routers count padding
        if self.router_loss.is_first_pass and "logits_to_keep" in names:
            kwargs.pop("labels", None)  # the pass needs no logits
            kwargs["logits_to_keep"] = 1
        return args, kwargs

    def __deepcopy__(self, memo: dict) -> "_Enter":
        return _Enter(deepcopy(self.router_loss, memo))


@dataclass(eq=False)
class _Leave:
    """Forward hook: the end of `_Enter`. It is also called after an exception."""

    enter: _Enter

    @torch.compiler.disable
    def __call__(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        if self.enter.tokens:
            _CURRENT.reset(self.enter.tokens.pop())


def router_loss_over_window(model: torch.nn.Module) -> RouterLoss:
    """Make a mixture of experts of transformers add its router loss over the whole window, in place.

    Training forwards then include the router loss, whether or not the config sets `output_router_logits`. A
    loop calls `look_ahead` of the result before the micro-batches of each window. `train`, `fine_tune`,
    `verify` and `ExactTrainer` call it themselves. Call it before `remove_padding`.

    Args:
        model: A transformers model, also with LoRA or in a wrapper.

    Returns:
        The `RouterLoss` of the model. A second call returns the same.

    Raises:
        InputError: The model adds no router loss, or one whose formula is unknown.
    """
    if (known := router_loss_of(model)) is not None:
        return known
    heads = [module for module in model.modules() if router_functions(module)]
    if not heads:
        raise InputError(f"{type(model).__name__} adds no router loss to its loss")
    for head in heads:
        _replace_functions(head)
    router_loss = RouterLoss()
    for head in heads:
        enter: Any = _Enter(router_loss)
        head.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        leave: Any = _Leave(enter)
        head.register_forward_hook(leave, always_call=True)
    return router_loss


def router_loss_of(model: torch.nn.Module) -> RouterLoss | None:
    """Return the `RouterLoss` of a model, or None."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _Enter):
                return hook.router_loss
    return None


def adds_router_loss() -> bool:
    """Whether the forward that runs now reads the outputs of its routers for a `RouterLoss`."""
    return _CURRENT.get() is not None


def without_router_loss(model: torch.nn.Module) -> AbstractContextManager[None]:
    """Leave the router loss out in the block, if `router_loss_over_window` is on for a model."""
    router_loss = router_loss_of(model)
    return nullcontext() if router_loss is None else router_loss.off()


def router_functions(module: torch.nn.Module) -> list[str]:
    """Return the names of the functions with which the forward of a module computes router losses."""
    code = getattr(unwrap(type(module).forward), "__code__", None)
    names = code.co_names if code is not None else ()
    return [name for name in _FUNCTIONS if name in names and name in vars(_module_of(module))]


def _module_of(module: torch.nn.Module) -> Any:
    return sys.modules[type(module).__module__]


def _replace_functions(head: torch.nn.Module) -> None:
    """Let the functions of a head's Python module ask the current `RouterLoss`, if there is one."""
    namespace = _module_of(head)
    for name in router_functions(head):
        function = getattr(namespace, name)
        if hasattr(function, "_gradacc_formula"):
            continue
        formula = _formula_of(function, f"{type(head).__name__}: {name}")
        setattr(namespace, name, _asking(function, formula))


def _formula_of(function: Callable[..., Any], name: str) -> Formula:
    """Return the formula of a function in transformers. Raise InputError if it computes another."""
    parameters = tuple(signature(function).parameters)
    formula = _FORMULAS.get(parameters)
    if formula is None:
        raise InputError(f"{name}({', '.join(parameters)}): the formula of this router loss is unknown")
    with torch.device("cpu"), torch.no_grad():
        example = formula.example()
        expected, found = float(function(**example)), float(formula.loss(formula.sums(**example)))
    if not abs(found - expected) <= 1e-5 * abs(expected):
        raise InputError(f"{name} gives {expected:.6g} where the known formula gives {found:.6g}")
    return formula


def _asking(function: Callable[..., Any], formula: Formula) -> Callable[..., Any]:
    @wraps(function)
    def router_loss(*args: Any, **kwargs: Any) -> Any:
        current = _CURRENT.get()
        if current is None:
            return function(*args, **kwargs)
        return current[0].loss(formula, current[1], args, kwargs)

    router_loss._gradacc_formula = formula  # type: ignore[attr-defined]
    return router_loss
