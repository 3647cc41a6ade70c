"""Small changes to a model: dropout, gradient checkpointing, BatchNorm; the kind and the ids of a model."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gradacc_hf.errors import refuse
from gradacc_hf.utils.rng import preserve_rng_state

BATCH_NORMS = torch.nn.modules.batchnorm._BatchNorm
# Fields of modules and configs that hold a probability, but not the weight of a loss.
RANDOM = r"^(?!.*(alpha|weight|coef|loss|lambda)).*(drop|jitter|mask_(time|feature)_prob)"
DROPOUTS = (
    functional.dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
    torch.dropout,
)


def checkpoint_activations(model: Any, offload: bool = False) -> None:
    """Recompute the activations of a model in the backward pass (`budget.gradient_checkpointing`).

    Args:
        model: the model, changed in place.
        offload: whether the inputs of the layers, which are kept, are in main memory.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)  # the name since transformers 5.23
    if offload and enable is None:
        found = f"found true with transformers {version('transformers')}"
        refuse("budget.offload_activations", found, "allowed is false, or transformers 5.23 and newer")
    more = {"offload": True} if offload else {}
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False}, **more)


def disable_dropout(model: torch.nn.Module) -> list[tuple[Any, str, float]]:
    """Set every probability to drop, mask or jitter to 0, in the modules and in their configs.

    Return (object, attribute name, previous value) for each change.
    """
    removed = []
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    for holder in (*model.modules(), *configs):
        for name, value in list(vars(holder).items()):
            of_dropout = name == "p" and isinstance(holder, torch.nn.modules.dropout._DropoutNd)
            if isinstance(value, float) and value and (of_dropout or re.search(RANDOM, name)):
                removed.append((holder, name, value))
                setattr(holder, name, 0.0)
    return removed


def set_dropout(config: Any, probability: float) -> dict[str, float]:
    """Set every dropout probability of a model's config, but dropout of whole layers or paths only to 0.

    Return the earlier value of each that changes, by name.
    """
    changed: dict[str, float] = {}
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            changed |= set_dropout(value, probability)
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        of_layers = "layerdrop" in name or "drop_path" in name
        if numeric and ("drop" in name) and (probability == 0 or not of_layers):
            if value != probability:
                changed[name] = value
            setattr(config, name, probability)
    return changed


def is_compiled(model: torch.nn.Module) -> bool:
    """Whether any part of a model is compiled. A copy of a compiled model is not."""
    return any(module._compiled_call_impl is not None for module in model.modules())


@contextmanager
def uncompiled(model: torch.nn.Module) -> Iterator[None]:
    """Run a model uncompiled in the block: for a single step, or for generated text that grows."""
    if is_compiled(model):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


@contextmanager
def preserve_problem_type(model: torch.nn.Module) -> Iterator[None]:
    """Restore `config.problem_type` after the block. transformers sets it in a forward with labels."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    before = [(config, config.problem_type) for config in configs if hasattr(config, "problem_type")]
    try:
        yield
    finally:
        for config, problem_type in before:
            config.problem_type = problem_type


@contextmanager
def without_autocast(model: Any) -> Iterator[None]:
    """Run a model without the autocast that Accelerate adds to the forward, in the block."""
    original, wrapped = (vars(model).get(name) for name in ("_original_forward", "forward"))
    if original is None or wrapped is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = wrapped


def smallest_parameters(model: torch.nn.Module, most: int) -> dict[str, torch.nn.Parameter]:
    """Return trained parameters by name, the smallest first, with at most `most` numbers; at least one.

    The biases of all layers are among them, so that a gradient of few numbers depends on the whole backward.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found, numbers = dict[str, torch.nn.Parameter](), 0
    for name in sorted(trained, key=lambda name: trained[name].numel()):
        numbers += trained[name].numel()
        if found and numbers > most:
            break
        found[name] = trained[name]
    return found


@contextmanager
def without_dropout(model: torch.nn.Module, training: bool) -> Iterator[bool]:
    """Set training or evaluation mode without dropout in the block. BatchNorm is in evaluation mode.

    Yield whether any module or config has dropout.
    """
    modes = [(module, module.training) for module in model.modules()]
    removed = disable_dropout(model)
    try:
        model.train(training)
        for module, _ in modes:
            module.training &= not isinstance(module, BATCH_NORMS)
        with _NoDropout():
            yield bool(removed)
    finally:
        for module, before in modes:
            module.training = before
        for holder, name, value in removed:
            setattr(holder, name, value)


class _NoDropout(TorchFunctionMode):
    """Return the input of dropout functions unchanged."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is functional.scaled_dot_product_attention:
            kwargs |= {"dropout_p": 0.0} if len(args) < 5 else {}
        return func(*args, **kwargs)


def train_batch_norms(model: torch.nn.Module) -> list[str]:
    """Return the names of BatchNorm modules that train. A model may freeze them in its method `train`."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        named = list(model.named_modules())
        return [name for name, module in named if isinstance(module, BATCH_NORMS) and module.training]
    finally:
        for module, before in modes:
            module.training = before


def nonlinear_hooks(model: torch.nn.Module) -> list[str]:
    """Return the names of parameters whose gradient hooks are not linear, such as clipping.

    Such hooks change the gradient of each micro-batch separately. The hooks are called with random gradients.
    """
    found = []
    for name, parameter in model.named_parameters():
        for hook in (parameter._backward_hooks or {}).values():
            with preserve_rng_state():
                one, two = (100 * torch.randn_like(parameter) for _ in range(2))
            gradients = [one, two, one + two]
            try:
                returned = [hook(gradient) for gradient in gradients]  # or changed in place
                first, second, both = (
                    gradient if after is None else after
                    for gradient, after in zip(gradients, returned, strict=True)
                )
                size = 1e-3 * float(both.abs().max())
                if not torch.allclose(first + second, both, rtol=0, atol=size):
                    found.append(name)
            except Exception:  # a hook that needs more than a gradient
                continue
    return found


def is_decoder(config: Any) -> bool:
    """Whether a model of this config only predicts next tokens, such as Llama."""
    from transformers.models.auto import modeling_auto as known  # slow to import

    masked = known.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return config.model_type in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and config.model_type not in masked


def num_positions(model: Any) -> int:
    """Return the most tokens that the positions of a model allow; 0 if there is no limit.

    RoBERTa counts from the padding token on, so the first rows of its table belong to no token.
    """
    configs = (model.config, *(getattr(model.config, part, None) for part in ("encoder", "text_config")))
    limits = [getattr(config, "max_position_embeddings", None) or 0 for config in configs]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min((limit for limit in limits if limit > 0), default=0)  # XLNet has −1


class BufferSnapshot:
    """A copy of the buffers of a model. Forwards of BatchNorm change them."""

    def __init__(self, model: torch.nn.Module):
        self._buffers = [(b, b.clone()) for b in model.buffers()]

    @torch.no_grad()
    def restore(self) -> None:
        """Set the buffers back to their values at the time of the copy."""
        for buffer, before in self._buffers:
            buffer.copy_(before)


@contextmanager
def small_instead_of_zero(model: torch.nn.Module) -> Iterator[None]:
    """Set parameters that are all 0, as in a new head, to small random numbers in the block."""
    parameters = [getattr(p, "_local_tensor", p) for p in model.parameters()]
    with torch.no_grad():
        zeros = [p for p in parameters if p.numel() and p.is_floating_point() and not p.any()]
        torch.manual_seed(0)
        try:
            for parameter in zeros:
                parameter.normal_(std=0.02)
            yield
        finally:
            for parameter in zeros:
                parameter.zero_()
