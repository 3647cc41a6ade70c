"""`remove_padding` and `restore_padding`: switch a model to computing without padding, and back."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from gradacc_hf.accumulation.loss_items import ComputeLoss
from gradacc_hf.errors import PaddingNotRemovableError, one_line
from gradacc_hf.padding.attention import NAMES, ORIGINAL
from gradacc_hf.padding.embeddings import pack_embeddings
from gradacc_hf.padding.hooks import (
    EnterForward,
    Hook,
    LeaveForward,
    MaskDecoder,
    PackInputs,
    PackOutput,
    PadInputs,
    Stack,
    UnpackOutput,
    stack_of,
)
from gradacc_hf.padding.probe import Probe, Stacks, without_wrappers
from gradacc_hf.padding.unread import skip_unread_tokens
from gradacc_hf.utils.modeling import is_compiled


def remove_padding(
    model: torch.nn.Module, batch: Mapping[str, Any], compute_loss: ComputeLoss | None = None
) -> None:
    """Make a transformers model compute its layers without padding, in place.

    Head, loss and labels stay padded, as do collate functions. The model is checked before the
    change stays: loss and gradients on examples of `batch`, without dropout, against the padded model.
    A forward uses it if its `attention_mask` has padding. Forwards with a cache, as in `generate`, and with
    hidden states or attentions as outputs stay padded. `restore_padding` undoes the change.

    Call it before `torch.compile` of a whole model and before FSDP2 shards to 16 bits. With FSDP2, all
    processes must call it.

    Args:
        model: A transformers model, also with LoRA, or wrapped in DDP or FSDP2.
        batch: A padded batch on the device of the model, with `attention_mask` and what the loss needs. Or
            examples that are packed into one row, with `position_ids` that restart at each example: attention
            then needs no mask (tokens, tokens).
        compute_loss: The loss of the loop, (outputs, batch) → loss, or None for the model's loss. If given,
            the feed-forward part of the last layer runs only at tokens that it reads, where that is exact. In
            sequence classification, it is the first token of each example. In training with labels, other
            outputs then differ from the padded model's, such as the logits of unlabelled tokens.

    Raises:
        InputError: The batch has no attention mask, or no example of four tokens.
        PaddingNotRemovableError: The result is not exact to 1e-5, or the structure of the model is unknown.
            The model is as before.
    """
    if is_removed(model):
        return
    try:
        _remove(without_wrappers(model), batch, compute_loss)
    except PaddingNotRemovableError as error:
        name = type(without_wrappers(model)).__name__
        raise PaddingNotRemovableError(f"padding cannot be removed from {name}: {error}") from error


def _remove(model: torch.nn.Module, batch: Mapping[str, Any], compute_loss: ComputeLoss | None) -> None:
    """Install the hooks of the first way that is exact. Raises PaddingNotRemovableError if none is."""
    probe = Probe(model, batch, compute_loss)
    with probe.prepared():
        stacks = probe.record_layers(layers_by_owner(probe.model))
        reasons = {}
        for way, install in _ways(probe.model).items():
            try:
                install(probe.model, stacks)
                probe.check()
                if probe.packs:
                    probe.check_row()
                _end_check(probe.model)
                for owner, (layers, _) in stacks.items():
                    pack_embeddings(probe, owner, layers)
                if compute_loss is not None:
                    _skip_unread(probe, stacks)
                _compile_again(probe.model)
                return
            except PaddingNotRemovableError as error:
                restore_padding(probe.model)
                if not reasons and probe.reads_padding(stacks):
                    reasons = {"": "the loss reads hidden states of padding"}
                    break
                reasons[way] = one_line(error)
            except BaseException:
                restore_padding(probe.model)
                raise
    raise PaddingNotRemovableError(_joined(reasons))


def remove_padding_in_all(
    model: torch.nn.Module,
    batch: Mapping[str, Any],
    accelerator: Accelerator,
    compute_loss: ComputeLoss | None = None,
) -> None:
    """Remove padding in all processes, or in none. Every process calls it, and checks the batch of the first.

    Args:
        model: As in `remove_padding`.
        batch: As in `remove_padding`.
        accelerator: The Accelerator of the run.
        compute_loss: As in `remove_padding`.

    Raises:
        Exception: As in `remove_padding`. Processes that raise nothing themselves raise
            PaddingNotRemovableError.
    """
    if accelerator.num_processes == 1:
        return remove_padding(model, batch, compute_loss)
    device = next(model.parameters()).device
    batch = send_to_device(broadcast_object_list([send_to_device(dict(batch), "cpu")])[0], device)
    own = None
    try:
        remove_padding(model, batch, compute_loss)
    except Exception as error:
        own = error
    reasons = gather_object([None if own is None else one_line(own)])
    elsewhere = next((reason for reason in reasons if reason is not None), None)
    if own is None and elsewhere is not None:
        restore_padding(model)
        own = PaddingNotRemovableError(f"in another process, {elsewhere}")
    if own is not None:
        raise own


def _ways(model: torch.nn.Module) -> dict[str, Callable]:
    """Return the ways to install the hooks by name, the fastest first."""
    ways = {"": _install_groups, "with padded attention modules": _install_padded_attention}
    if not any(map(_has_targets, model.modules())):
        return ways
    with_targets = {
        f"{way or 'by groups'}, targets without padding": partial(_install_with_targets, install)
        for way, install in ways.items()
    }
    return with_targets | ways


def _has_targets(module: torch.nn.Module) -> bool:
    """Whether a model takes labels and a mask of decoder inputs."""
    if not isinstance(module, PreTrainedModel):
        return False
    return {"labels", "decoder_attention_mask"} <= inspect.signature(module.forward).parameters.keys()


def _joined(reasons: Mapping[str, str]) -> str:
    """Return the reason of each way, each once."""
    ways: dict[str, str] = {}
    for way, reason in reasons.items():
        ways.setdefault(reason, way)
    return "; ".join(f"{way}: {reason}" if way else reason for reason, way in ways.items())


def restore_padding(model: torch.nn.Module) -> None:
    """Undo `remove_padding`. A model without the change stays as it is.

    If layers of the model are compiled, `torch.compiler.reset` drops the compiled code of all models in the
    process. Their next forwards compile again.

    Args:
        model: The model that was given to `remove_padding`, a copy of it, or a model around it.
    """
    hooks = list(_hooks(model))
    for hook in hooks:
        hook.handle.remove()
    if hooks:
        _compile_again(model)
    for config in _configs(model):
        name = config._attn_implementation_internal
        if name in ORIGINAL:
            config._attn_implementation_internal = ORIGINAL[name]


def is_removed(model: torch.nn.Module) -> bool:
    """Whether `remove_padding` is on for a model, or for a part of it."""
    return next(_hooks(model), None) is not None


def skips_unread(model: torch.nn.Module) -> bool:
    """Whether the end of the last layer runs only at tokens that the loss reads."""
    return any(hook.stack.reads for hook in _hooks(model))


def _skip_unread(probe: Probe, stacks: Stacks) -> None:
    """Skip tokens that the loss does not read, in a model with one stack of layers."""
    changed = [layers[-1] for layers, _ in stacks.values() if stack_of(layers[-1]) is not None]
    if len(changed) == 1:
        stack = stack_of(changed[0])
        assert stack is not None
        skip_unread_tokens(probe, changed[0], stack)


def _compile_again(model: torch.nn.Module) -> None:
    """Let compiled layers be compiled again: compiled code leaves out hooks that it does not contain.

    Torch cannot drop the code of one model, so all models of the process are compiled again.
    """
    if is_compiled(model):
        torch.compiler.reset()


def _end_check(model: torch.nn.Module) -> None:
    """End the check. Remove the hooks of stacks that it did not run without padding.

    Raises:
        PaddingNotRemovableError: The check ran no stack without padding.
    """
    hooks = list(_hooks(model))
    if not any(hook.stack.sides for hook in hooks):
        raise PaddingNotRemovableError(
            "no layer gets states (batch, length, size) with a mask (batch, length)"
        )
    for hook in hooks:
        hook.stack.checking = False
        if not hook.stack.sides:
            hook.handle.remove()


def _hooks(model: torch.nn.Module) -> Iterator[Hook]:
    for module in model.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if isinstance(hook, Hook):
                yield hook


def _configs(model: torch.nn.Module) -> list[PreTrainedConfig]:
    """Return every config of a module, each once."""
    configs = (getattr(module, "config", None) for module in model.modules())
    found = {id(config): config for config in configs if isinstance(config, PreTrainedConfig)}
    return list(found.values())


def layers_by_owner(model: torch.nn.Module) -> dict[PreTrainedModel, list[torch.nn.Module]]:
    """Return the outermost layers below each innermost model class.

    transformers marks a layer by its base class. A model class without the mark has a list of like modules.
    """
    return _outermost(model, _marked) or _outermost(model, _repeated)


def _marked(module: torch.nn.Module) -> list[torch.nn.Module]:
    return [child for child in module.children() if isinstance(child, GradientCheckpointingLayer)]


def _repeated(module: torch.nn.Module) -> list[torch.nn.Module]:
    layers = list(module) if isinstance(module, torch.nn.ModuleList) else []
    return layers if len({type(layer) for layer in layers}) == 1 else []


def _outermost(
    model: torch.nn.Module, layers_in: Callable[[torch.nn.Module], list[torch.nn.Module]]
) -> dict[PreTrainedModel, list[torch.nn.Module]]:
    found: dict[PreTrainedModel, list[torch.nn.Module]] = {}

    def walk(module: torch.nn.Module, owner: PreTrainedModel | None) -> None:
        owner = module if isinstance(module, PreTrainedModel) else owner
        layers = layers_in(module) if owner is not None else []
        if owner is not None and layers:
            found.setdefault(owner, []).extend(layers)
        for child in module.children():
            if child not in layers:
                walk(child, owner)

    walk(model, None)
    return found


def _install_groups(model: torch.nn.Module, stacks: Mapping[PreTrainedModel, tuple[list, int]]) -> None:
    """Run attention by groups of examples, through transformers' attention interface."""
    for owner, (layers, calls) in stacks.items():
        configs = {id(c): c for part in (owner, *layers) for c in _configs(part)}.values()
        for config in configs:
            name = config._attn_implementation_internal or "eager"
            name = ORIGINAL.get(name, name)  # two stacks may share a config
            if name not in NAMES:
                raise PaddingNotRemovableError(
                    f"attn_implementation is {name!r}; allowed: {' or '.join(map(repr, NAMES))}"
                )
            config._attn_implementation_internal = NAMES[name]
        _install_layers(model, owner, layers, Stack(type(owner).__name__, calls, True, _caches(owner)))


def _install_padded_attention(
    model: torch.nn.Module, stacks: Mapping[PreTrainedModel, tuple[list, int]]
) -> None:
    """Run the attention modules of the layers padded, and the rest of the layers without padding."""
    for owner, (layers, calls) in stacks.items():
        stack = Stack(type(owner).__name__, calls, False, _caches(owner))
        _install_layers(model, owner, layers, stack)
        for layer in layers:
            attentions = list(_attention_modules(layer))
            if not attentions:
                raise PaddingNotRemovableError(f"{type(layer).__name__} has no attention module")
            for attention in attentions:
                before, after = PadInputs(stack), PackOutput(stack)
                before.add(attention.register_forward_pre_hook, with_kwargs=True)
                after.add(attention.register_forward_hook, with_kwargs=True)


def _install_with_targets(
    install: Callable, model: torch.nn.Module, stacks: Mapping[PreTrainedModel, tuple[list, int]]
) -> None:
    """Remove the padding of targets, too, which have labels but no mask."""
    install(model, stacks)
    for module in filter(_has_targets, model.modules()):
        stack = next(hook.stack for hook in _hooks(module))
        hook = MaskDecoder(stack)
        hook.add(module.register_forward_pre_hook, with_kwargs=True)


def _install_layers(model: torch.nn.Module, owner: PreTrainedModel, layers: list, stack: Stack) -> None:
    for layer in layers:
        before, after = PackInputs(stack), UnpackOutput(stack)
        before.add(layer.register_forward_pre_hook, with_kwargs=True)
        after.add(layer.register_forward_hook)
    for module in _models_around(model, owner):
        enter, leave = EnterForward(stack), LeaveForward(stack)
        enter.add(module.register_forward_pre_hook, with_kwargs=True)
        leave.add(module.register_forward_hook, always_call=True)


def _models_around(model: torch.nn.Module, owner: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the model classes that contain these layers and no others: the owner, and models around it."""
    around = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and list(layers_by_owner(module)) == [owner]:
            around.append(module)
    return around


def _attention_modules(layer: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for child in layer.children():
        if "attention" in type(child).__name__.lower():
            yield child
        elif not isinstance(child, torch.nn.Linear):
            yield from _attention_modules(child)


def _caches(owner: PreTrainedModel) -> bool:
    """Whether a model class returns a cache by default."""
    takes = "use_cache" in inspect.signature(owner.forward).parameters
    return takes and getattr(owner.config, "is_decoder", True) is not False


def is_grouped(model: torch.nn.Module) -> bool:
    """Whether padding is removed and attention runs by groups of examples, without any padded module."""
    return is_removed(model) and all(hook.stack.by_group for hook in _hooks(model))
