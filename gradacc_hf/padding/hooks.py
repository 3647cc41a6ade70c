"""Hooks that feed the layers of a model real tokens only, and give the rest of the model padded tensors.

    forward of a model ──► EnterForward     reads the padding mask, and starts a `PackedForward`
      embeddings           padded, or without padding where that is exact (`embeddings.py`)
      first layer      ──► PackInputs       (batch, length, …) → (1, real tokens, …)
      later layers     ──► PackInputs       replaces masks and positions, which the model passes to each layer
      last layer       ──► UnpackOutput     (1, real tokens, …) → (batch, length, …), zeros at padding
      head                 padded, as before
    end of the forward ──► LeaveForward

A stack is all layers of one model class, such as `BertModel` or the decoder of BART. Two ways keep examples
apart. By groups: attention runs through transformers' attention interface (`attention.py`). Otherwise the
attention modules of the layers run padded (`PadInputs`, `PackOutput`), and only the rest without padding.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch._subclasses import FakeTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from gradacc_hf.accumulation.padding_layout import (
    PaddingLayout,
    attach_layout,
    attached_layout,
    pack,
    padding_layout,
    row_layout,
    target_mask,
    unpack,
)
from gradacc_hf.accumulation.router_loss import adds_router_loss
from gradacc_hf.errors import PaddingNotRemovableError
from gradacc_hf.padding.attention import CURRENT, PackedForward

# Attributes of tensors, which reach an attention module also when checkpointing recomputes a layer.
_FORWARD = "_gradacc_packed_forward"  # of masks and biases among the arguments of a layer
_INPUTS = ("input_ids", "inputs_embeds")
_PADDED = "_gradacc_padded_in_forward"  # of hidden states that `PadInputs` has padded


@dataclass(eq=False)
class Stack:
    """The layers of one model class, in the order of their calls.

    Attributes:
        name: Class name of the model.
        calls: Calls of layers in one forward. A layer may be called repeatedly, as in ALBERT.
        by_group: Whether attention runs through the attention interface. Otherwise it runs padded.
        caches: Whether the model returns a cache unless `use_cache` is False.
    """

    name: str
    calls: int
    by_group: bool
    caches: bool
    sides: set[str] = field(default_factory=set)
    """Sides of padding in the forwards that were checked. Batches with padding elsewhere stay padded."""
    arguments: dict[str, bool] = field(default_factory=dict)
    """Argument of the layers → whether it was packed while the check ran."""
    given: set[str] = field(default_factory=set)
    """Names of tensors by token that models around the layers got in the check."""
    checking: bool = True
    """Whether the check still runs."""
    reads: str = ""
    """Tokens at which the end of the last layer runs (`PaddingLayout.read_positions`); "" for all."""
    read_queries: bool = False
    """Whether the attention of the last layer computes one query per example, where the loss reads one."""


@dataclass(eq=False)
class Hook:
    """Base class of all hooks of this package. `handle` removes the hook."""

    stack: Stack
    handle: Any = field(default=None, init=False)

    def add(self, register: Callable[..., Any], **options: bool) -> None:
        """Add the hook to a module with a method of it, such as `module.register_forward_hook`."""
        self.handle = register(self, **options)


def stack_of(layer: torch.nn.Module) -> Stack | None:
    """Return the stack of a layer that is computed without padding, or None."""
    return next((hook.stack for hook in layer._forward_pre_hooks.values() if isinstance(hook, Hook)), None)


@dataclass(eq=False)
class EnterForward(Hook):
    """Start a forward without padding where the batch and the arguments allow it."""

    embeddings: dict[str, list[tuple]] = field(default_factory=dict, init=False)
    """Name of the module that computes embeddings without padding → its state in the check."""

    @torch.compiler.disable
    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if CURRENT.keeps_padding:
            return None
        given = arguments_by_name(module, args, kwargs)
        mask = given.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            mask = None
        around = CURRENT.forward
        if around is not None and around.stack is self.stack:  # started by a model around this one
            if mask is None or mask is around.mask:
                return self._without_cache(module, args, kwargs)
            around = None  # this one replaces it
        CURRENT.around.append((module, around))
        CURRENT.forward = None
        positions = self._positions_of_row(module, args, given)
        if positions is not None:
            mask = torch.ones_like(positions)
        if mask is None or not self._is_ordinary(module, given):
            return None
        layout = self._layout(module, given, mask, positions)
        if layout is None:
            return None
        encoder_mask = given.get("encoder_attention_mask")
        is_padding = isinstance(encoder_mask, torch.Tensor) and encoder_mask.ndim == 2
        CURRENT.forward = PackedForward(
            self.stack, layout, mask, encoder_mask if is_padding else None, self._read(module, layout)
        )
        CURRENT.forward.is_packed = layout.is_row
        CURRENT.forward.embeds = given.get("inputs_embeds") is None and self._embeds_as_checked(module)
        if positions is not None:
            # Without a mask, transformers would build a mask (tokens, tokens) to keep the examples apart.
            kwargs = kwargs | {"attention_mask": mask}
        return self._without_cache(module, args, kwargs) or (args, kwargs)

    def note_embeddings(self, module: torch.nn.Module, embeddings: torch.nn.Module) -> None:
        """Store the modules that compute the embeddings of a model, as they are now."""
        [name] = [name for name, part in module.named_modules() if part is embeddings]
        self.embeddings = {name: _module_state(embeddings)}

    def _embeds_as_checked(self, module: torch.nn.Module) -> bool:
        """Whether no module of the embeddings was replaced, or got or lost a hook, since the check."""
        for name, state in self.embeddings.items():
            try:
                if _module_state(module.get_submodule(name)) != state:
                    return False
            except AttributeError:
                return False
        return True

    def _positions_of_row(self, module: Any, args: tuple, given: Mapping[str, Any]) -> torch.Tensor | None:
        """Return the positions of examples that are packed into one row, or None for other batches."""
        positions, names = given.get("position_ids"), _names(module)
        if given.get("attention_mask") is not None or "attention_mask" not in names[len(args) :]:
            return None
        if not self.stack.by_group or not isinstance(positions, torch.Tensor):
            return None
        return positions if positions.ndim == 2 and len(positions) == 1 else None

    def _layout(
        self, module: Any, given: Mapping[str, Any], mask: torch.Tensor, positions: torch.Tensor | None
    ) -> PaddingLayout | None:
        """Return the layout, or None if the batch stays as it is.

        Args:
            module: The model.
            given: Its arguments.
            mask: The padding mask.
            positions: Positions of packed examples, or None.
        """
        inputs = next((given[n] for n in ("inputs_embeds", "input_ids") if given.get(n) is not None), None)
        if inputs is None or inputs.shape[:2] != mask.shape:
            return None  # prompts of peft, or a cache
        if mask.is_meta or isinstance(mask, FakeTensor):
            return None  # a prediction of memory, without values
        if positions is None:
            layout = attached_layout(mask) or padding_layout(mask)
        else:
            layout = attached_layout(positions) or row_layout(positions)
        if layout is None or (len(mask) == 1 and given.get("encoder_hidden_states") is not None):
            return None
        if layout.num_tokens == layout.shape[1] and not layout.is_row:
            return None  # packed tokens would have the shape of one example
        if not self.stack.checking and layout.side not in self.stack.sides:
            return None
        names = {name for name, value in given.items() if _is_of_tokens(name, value)}
        if self.stack.checking:
            self.stack.given |= names
        elif names - self.stack.given:  # such as positions, which a layer did not get in the check
            return None
        if module.training and _recomputes_hooks(module, self.stack.by_group):
            return None
        return layout

    def _read(self, module: Any, layout: PaddingLayout) -> torch.Tensor | None:
        """Return the packed positions that the loss reads, or None for all."""
        if not self.stack.reads or not module.training or CURRENT.labels is None:
            return None
        if any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
            return None  # the backward pass calls the parts of a layer again
        return layout.read_positions(self.stack.reads, CURRENT.labels)

    def _without_cache(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if not self.stack.caches or "use_cache" not in _names(module):
            return None
        return args, kwargs | {"use_cache": False}

    def _is_ordinary(self, module: Any, given: Mapping[str, Any]) -> bool:
        """Whether the forward neither uses a cache nor returns anything of each layer."""
        if given.get("past_key_values") is not None:
            return False
        names = {"use_cache"} if self.stack.caches and not module.training else set()
        names |= {name for name in (*vars(module.config), *given) if name.startswith("output_")}
        if adds_router_loss():  # it counts tokens of any shape
            names.discard("output_router_logits")
        wanted = {name: given.get(name) for name in names | {"use_cache"}}
        wanted |= {name: getattr(module.config, name, False) for name in names if wanted[name] is None}
        return not any(value is True for value in wanted.values())


@dataclass(eq=False)
class MaskDecoder(Hook):
    """Give a sequence-to-sequence model the mask of its targets, which collate functions leave out.

    Tokens after the last label are padding: they have no item, and no earlier token attends to them.
    """

    @torch.compiler.disable
    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        given = arguments_by_name(module, args, kwargs)
        labels, tokens = given.get("labels"), given.get("decoder_input_ids")
        if not module.training or labels is None or given.get("decoder_attention_mask") is not None:
            return None
        if given.get("decoder_inputs_embeds") is not None or (
            tokens is not None and tokens.shape != labels.shape
        ):
            return None
        mask = target_mask(labels)
        layout = attached_layout(labels)
        if layout is not None:
            attach_layout(mask, layout)
        return args, kwargs | {"decoder_attention_mask": mask}


@dataclass(eq=False)
class LeaveForward(Hook):
    """End the forward, also after an exception, and continue the forward of a model around this one."""

    @torch.compiler.disable
    def __call__(self, module: Any, args: Any, output: Any) -> None:
        forward = CURRENT.forward
        if forward is not None and forward.stack is self.stack:
            CURRENT.forward = None
        else:
            forward = None
        if CURRENT.around and CURRENT.around[-1][0] is module:
            CURRENT.forward = CURRENT.around.pop()[1]
        if forward is None:
            return
        if self.stack.checking and forward.is_packed and forward.calls == self.stack.calls:
            self.stack.sides.add(forward.layout.side)
        if output is not None and forward.calls != self.stack.calls:
            found = f"{forward.calls} layers ran, but {self.stack.calls} while it was checked"
            raise PaddingNotRemovableError(f"{self.stack.name}: {found}")


@dataclass(eq=False)
class PackInputs(Hook):
    """Give a layer packed arguments."""

    @torch.compiler.disable
    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        forward = CURRENT.forward
        if forward is None or forward.stack is not self.stack:
            return None
        forward.calls += 1
        given = arguments_by_name(module, args, kwargs)
        if forward.standin is not None and not any(v is forward.standin for v in given.values()):
            raise PaddingNotRemovableError(
                f"{self.stack.name} changes its embeddings before the first layer, but did not in the check"
            )
        forward.standin = None
        packed = {n: self._packed_as_checked(module, forward, n, value) for n, value in given.items()}
        encoder, standin = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if self.stack.by_group and isinstance(encoder, torch.Tensor):
            if id(encoder) not in forward.packed:
                forward.packed[id(encoder)] = (encoder, _packed_encoder(forward, encoder, standin))
            packed["encoder_hidden_states"] = forward.packed[id(encoder)][1]
        forward.is_packed |= any(
            isinstance(value, torch.Tensor) and value.ndim == 3 and packed[name] is not value
            for name, value in given.items()
        )
        return tuple(packed[name] for name in list(given)[: len(args)]), {n: packed[n] for n in kwargs}

    def _packed_as_checked(self, module: Any, forward: PackedForward, name: str, value: Any) -> Any:
        """Return an argument packed if it was packed in the check: its shape may match by chance."""
        checked = self.stack.arguments
        if not self.stack.checking and checked.get(name) is False:
            return self._attached(forward, value)
        pack_one = self._pack_by_group if self.stack.by_group else self._pack_hidden
        packed = pack_one(forward, name, value)
        if not isinstance(value, torch.Tensor):
            return packed
        if self.stack.checking:
            checked[name] = checked.get(name, False) or packed is not value
        elif packed is not value and name not in checked:
            raise PaddingNotRemovableError(
                f"{type(module).__name__} gets the argument {name}, which it did not get in the check"
            )
        return packed

    def _attached(self, forward: PackedForward, value: Any) -> Any:
        """Return an argument that stays padded, with the forward attached if attention modules need it."""
        if isinstance(value, torch.Tensor) and not self.stack.by_group:
            setattr(value, _FORWARD, forward)
        return value

    def _pack_by_group(self, forward: PackedForward, name: str, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._pack_by_group(forward, name, part) for part in value)
        if isinstance(value, dict):
            return {key: self._pack_by_group(forward, name, part) for key, part in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        mask = forward.mask_of(value)
        if mask is not None or _is_of_encoder(name):
            return value if mask is None else mask
        if id(value) in forward.packed:
            packed = forward.packed[id(value)][1]
            if name.startswith("hidden"):  # embeddings: only the first layer gets their stand-in
                del forward.packed[id(value)]
            if value.requires_grad and packed.is_leaf:  # frozen embeddings before checkpointed layers
                packed.requires_grad_()
            return packed
        packed = packed_tensor(value, forward.layout)
        if packed is not value and not name.startswith("hidden"):  # only one layer gets these hidden states
            forward.packed[id(value)] = (value, packed)
        return packed

    def _pack_hidden(self, forward: PackedForward, name: str, value: Any) -> Any:
        """Pack hidden states, and attach the forward to other tensors, which attention modules get."""
        if not isinstance(value, torch.Tensor):
            return value
        if value.is_floating_point() and not _is_of_encoder(name):
            packed = _packed_hidden(value, forward.layout)
            if packed is not value:
                return packed
        return self._attached(forward, value)


@dataclass(eq=False)
class UnpackOutput(Hook):
    """Put the tokens back into a padded tensor after the last layer."""

    @torch.compiler.disable
    def __call__(self, module: Any, args: tuple, output: Any) -> Any:
        forward = CURRENT.forward
        if forward is None or forward.stack is not self.stack or forward.calls != self.stack.calls:
            return output
        shape = forward.layout, forward.read
        return each_tensor(output, lambda value: self._guarded(_unpacked(value, *shape), value, *shape))

    def _guarded(
        self, padded: torch.Tensor, packed: torch.Tensor, layout: PaddingLayout, read: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the padded output. Its gradient must be zero where nothing was computed."""
        if padded is packed or not padded.requires_grad or self.stack.checking:
            return padded
        computed = layout.tokens if read is None else layout.tokens[read]
        is_skipped = torch.ones(layout.shape, dtype=torch.bool, device=padded.device)
        is_skipped.view(-1).index_fill_(0, computed, False)
        padded.register_hook(partial(_check_gradient, is_skipped))
        return padded


def _check_gradient(is_skipped: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor | None:
    """Raise if a loss reads tokens that were not computed. On a GPU, which must not wait, return NaN."""
    found = gradient if gradient.is_cuda else gradient[is_skipped]
    is_read = (found != 0) & found.isfinite()  # an overflow in fp16 gives NaN everywhere
    if gradient.is_cuda:
        lost = (is_read.any(-1) & is_skipped).any()
        return torch.where(lost, torch.nan, gradient)
    if is_read.any():
        raise PaddingNotRemovableError(
            "the loss reads tokens that it did not read in the check: padding, or tokens without a label; "
            "restore_padding(model) computes all tokens"
        )
    return None


@dataclass(eq=False)
class PadInputs(Hook):
    """Give an attention module padded hidden states."""

    @torch.compiler.disable
    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        forward = _forward_of((*args, *kwargs.values()), self.stack)
        if forward is None:
            return None

        def padded(value: Any) -> Any:
            wide = _unpacked(value, forward.layout)
            if wide is not value:
                setattr(wide, _PADDED, forward)
            return wide

        return tuple(map(padded, args)), {name: padded(value) for name, value in kwargs.items()}


@dataclass(eq=False)
class PackOutput(Hook):
    """Pack the output of an attention module."""

    @torch.compiler.disable
    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        attached = (getattr(value, _PADDED, None) for value in (*args, *kwargs.values()))
        forward = next((found for found in attached if found is not None), None)
        if forward is None:
            return output
        return each_tensor(output, lambda value: _packed_hidden(value, forward.layout))


def _recomputes_hooks(model: torch.nn.Module, by_group: bool) -> bool:
    """Whether the backward pass calls hooks again or replaces the tensors in which they find the forward.

    transformers' checkpointing leaves the hooks of a layer outside. Wrappers of layers do not, nor do
    versions of transformers whose layers have a `__call__`. Reentrant checkpointing replaces tensors.
    """
    inside = "__call__" in vars(GradientCheckpointingLayer)
    for module in model.modules():
        if type(module).__name__ == "CheckpointWrapper":
            return True
        if getattr(module, "gradient_checkpointing", False) and isinstance(
            module, GradientCheckpointingLayer
        ):
            options = getattr(module._gradient_checkpointing_func, "keywords", {})
            if inside or (not by_group and options.get("use_reentrant", True)):
                return True
    return False


def _module_state(module: torch.nn.Module) -> list[tuple]:
    """Return the name, the class, whether it is patched, and the number of hooks of each part of a module."""
    return [
        (name, type(part), "forward" in vars(part), len(part._forward_hooks), len(part._forward_pre_hooks))
        for name, part in module.named_modules()
    ]


def _is_of_tokens(name: str, value: Any) -> bool:
    """Whether an argument of a model may change what the layers compute for a token."""
    return isinstance(value, torch.Tensor) and value.ndim > 1 and "label" not in name and name not in _INPUTS


def _is_of_encoder(name: str) -> bool:
    """Whether an argument of a decoder layer belongs to the encoder, whose tokens stay padded there."""
    return name.startswith("encoder_")


def arguments_by_name(module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward by name."""
    return dict(zip(_names(module), args, strict=False)) | dict(kwargs)


def _names(module: torch.nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of a forward."""
    own = vars(module).get("forward")  # Accelerate's wrapper
    return _names_of(type(module).forward)[1:] if own is None else tuple(inspect.signature(own).parameters)


@cache
def _names_of(function: Callable) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _forward_of(values: tuple, stack: Stack) -> PackedForward | None:
    """Return the forward that is attached to a tensor, or the current one."""
    attached = (getattr(value, _FORWARD, None) for value in values if isinstance(value, torch.Tensor))
    forward = next((found for found in attached if found is not None), CURRENT.forward)
    return forward if forward is not None and forward.stack is stack else None


def packed_tensor(value: torch.Tensor, layout: PaddingLayout) -> torch.Tensor:
    """Return (batch or 1, length, …) as (1, real tokens, …); other tensors unchanged."""
    batch, length = layout.shape
    if layout.is_row:
        return value
    if value.ndim < 2 or value.shape[1] != length or value.shape[0] not in (1, batch):
        if value.ndim == 4 and value.shape[-1] == length:
            shape = tuple(value.shape)
            raise PaddingNotRemovableError(f"a layer gets a mask or bias of shape {shape} from its own code")
        return value
    if value.shape[0] != batch:
        return value[0].index_select(0, layout.tokens % length)[None]
    return pack(value.flatten(0, 1), layout.tokens)[None]


def _packed_encoder(forward: PackedForward, value: torch.Tensor, standin: Any) -> torch.Tensor:
    """Return the encoder's hidden states packed, if the mask of a decoder layer for them is known."""
    mask, padding = forward.mask_of(standin), forward.encoder_mask
    if mask is None or mask.kind != "full" or mask.keys is None or padding is None or value.ndim != 3:
        return value
    if value.shape[:2] != padding.shape or mask.keys.shape != padding.shape:
        return value
    mask.key_layout = attached_layout(padding) or padding_layout(padding)
    if mask.key_layout is None:
        return value
    return pack(value.flatten(0, 1), mask.key_layout.tokens)[None]


def _packed_hidden(value: torch.Tensor, layout: PaddingLayout) -> torch.Tensor:
    return packed_tensor(value, layout) if value.ndim == 3 and value.shape[:2] == layout.shape else value


def _unpacked(value: Any, layout: PaddingLayout, read: torch.Tensor | None = None) -> Any:
    """Return (1, real or read tokens, …) as (batch, length, …), else zeros; other values unchanged."""
    if not isinstance(value, torch.Tensor) or value.ndim != 3 or len(value) != 1:
        return value
    if value.shape[1] == layout.num_tokens:
        return value if layout.is_row else unpack(value[0], layout.tokens, *layout.shape)
    if read is not None and value.shape[1] == len(read):
        return unpack(value[0], layout.tokens[read], *layout.shape)
    return value


def each_tensor(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return an output of a layer with each tensor changed: a tensor, or a tuple with tensors."""
    if isinstance(output, torch.Tensor):
        return change(output)
    if type(output) in (tuple, list):
        return type(output)(change(part) if isinstance(part, torch.Tensor) else part for part in output)
    return output
