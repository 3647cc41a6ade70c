"""Check that a model gives the same loss and gradients without padding, and leave no trace.

The sample has up to four examples of a batch (`sample.py`). Dropout is off, parameters that are zero become
small random numbers, and the arithmetic is float32.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedConfig, PreTrainedModel

from gradacc_hf.accumulation.loss_items import ComputeLoss, output_named, total_loss
from gradacc_hf.accumulation.oom import out_of_memory
from gradacc_hf.accumulation.padding_layout import (
    attach_layout,
    padding_layout,
    row_layout,
    target_mask,
)
from gradacc_hf.accumulation.reference import EXACT, Gradient, compare, full_float32, norm, read_gradient
from gradacc_hf.accumulation.splitting import Cost
from gradacc_hf.errors import PaddingNotRemovableError, one_line
from gradacc_hf.padding.sample import is_row_of_examples, make_sample, packed_row, padded_batch
from gradacc_hf.utils.attributes import Attributes
from gradacc_hf.utils.modeling import (
    BufferSnapshot,
    preserve_problem_type,
    small_instead_of_zero,
    smallest_parameters,
    uncompiled,
    without_autocast,
    without_dropout,
)
from gradacc_hf.utils.precision import weights_held_in
from gradacc_hf.utils.rng import preserve_rng_state

WORST_PARAMETER = 100 * EXACT
MOST_COMPARED = 50_000_000
"""Numbers of the gradient that is compared."""
GROUPINGS = (Cost(fixed=0.0, quadratic=1.0), Cost(fixed=1e15, quadratic=1.0))  # a group per length; one group

Layers = Mapping[PreTrainedModel, Sequence[torch.nn.Module]]
Stacks = dict[PreTrainedModel, tuple[list[torch.nn.Module], int]]


class Probe:
    """The loss and gradient of a model on a sample, with and without padding.

    Args:
        model: The model, without wrappers.
        batch: A padded batch, or a packed row.
        compute_loss: (outputs, batch) → loss, or None for the model's loss.
    """

    def __init__(
        self, model: torch.nn.Module, batch: Mapping[str, Any], compute_loss: ComputeLoss | None = None
    ):
        if not isinstance(getattr(model, "config", None), PreTrainedConfig):
            raise PaddingNotRemovableError("it has no config of transformers")
        self.model = model
        self._compared = set(smallest_parameters(model, MOST_COMPARED))
        self.packs = is_row_of_examples(batch)
        batch = padded_batch(batch) if self.packs else batch
        self.sample = make_sample(batch, getattr(model.config, "pad_token_id", None))
        self._loss, self._gradient = math.nan, {}
        self._compute_loss, self._is_alone = compute_loss, False

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 has sharded the weights."""
        return _is_sharded(self.model)

    @contextmanager
    def of_loss_alone(
        self, watch: AbstractContextManager | None = None, sample: Mapping[str, Any] | None = None
    ) -> Iterator[None]:
        """Compare the loss without other outputs in the block. Its value and gradient now are the reference.

        Args:
            watch: Is entered while the reference is computed.
            sample: The sample in the block.

        Raises:
            PaddingNotRemovableError: The loss fails.
        """
        before = self._loss, self._gradient, self.sample
        self._is_alone, self.sample = True, dict(sample or self.sample)
        try:
            with watch or nullcontext():
                self._loss, self._gradient = self._everywhere(self.run, "the loss fails on a sample")
            yield
        finally:
            self._is_alone = False
            self._loss, self._gradient, self.sample = before

    def run(self) -> tuple[float, Gradient]:
        """Return the loss and the gradient of the sample."""
        return self._run(self.sample)

    def run_forward(self) -> None:
        """Run the forward of the model on the sample."""
        with self._restored():
            self.model(**self.sample)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Make the model ready for comparisons in the block, and restore it bit for bit.

        Raises:
            PaddingNotRemovableError: The model skips layers at random, is quantised, has sharded 16-bit
                weights, or a backward pass would change it.
        """
        model = self.model
        self._refuse_skipped_layers()
        if any(getattr(module, "is_quantized", False) for module in model.modules()):
            raise PaddingNotRemovableError("the weights are quantised: their rounding hides errors of 1e-5")
        tensors = (*model.parameters(), *model.buffers())
        if any(isinstance(t, DTensor) and t.dtype in (torch.bfloat16, torch.float16) for t in tensors):
            raise PaddingNotRemovableError(
                "the weights are sharded in 16 bits; call remove_padding before sharding"
            )
        if any(parameter._post_accumulate_grad_hooks for parameter in model.parameters()):
            raise PaddingNotRemovableError(
                "parameters have hooks after the backward pass, such as an optimizer; add them later"
            )
        with ExitStack() as stack:
            stack.enter_context(preserve_rng_state())
            stack.enter_context(full_float32())
            stack.enter_context(torch.autocast(self.sample["attention_mask"].device.type, enabled=False))
            stack.enter_context(_without_gradients(model))
            stack.enter_context(without_dropout(model, training=True))
            stack.enter_context(preserve_problem_type(model))
            model.train()  # with BatchNorm, whose statistics include padding
            stack.enter_context(uncompiled(model))
            stack.enter_context(without_autocast(model))
            stack.enter_context(weights_held_in(model, torch.float32))
            stack.enter_context(small_instead_of_zero(model))
            stack.enter_context(torch.enable_grad())
            yield

    def record_layers(self, layers: Layers) -> Stacks:
        """Run the padded model, store its loss and gradient, and return the layers by the order of calls.

        Raises:
            PaddingNotRemovableError: There are no layers, or the sample decides nothing.
        """
        called: dict[PreTrainedModel, list[torch.nn.Module]] = {owner: [] for owner in layers}
        dtypes: set[torch.dtype] = set()

        def record(owner: PreTrainedModel, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            called[owner].append(module)
            values = (*args, *kwargs.values())
            dtypes.update(v.dtype for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())

        handles = [
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, owner=owner: record(owner, module, args, kwargs),
                with_kwargs=True,
            )
            for owner, stack in layers.items()
            for layer in stack
        ]
        try:
            self._loss, self._gradient = self._everywhere(
                lambda: self._run(self.sample), "the padded model fails on a sample"
            )
        finally:
            for handle in handles:
                handle.remove()
        stacks = {owner: (list(dict.fromkeys(calls)), len(calls)) for owner, calls in called.items() if calls}
        if not stacks:
            raise PaddingNotRemovableError("it calls no repeated layers")
        if dtypes & {torch.bfloat16, torch.float16}:
            raise PaddingNotRemovableError(
                "it computes in 16 bits, which cannot show 1e-5; call remove_padding before sharding"
            )
        size, error = norm(self._gradient), None
        if not (math.isfinite(self._loss) and size > 0):
            error = PaddingNotRemovableError(
                f"loss {self._loss} and gradient {size} of the sample decide nothing"
            )
        self._raise_everywhere(error)
        return stacks

    def _refuse_skipped_layers(self) -> None:
        for module in self.model.modules():
            for holder in (module, getattr(module, "config", None)):
                for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
                    if getattr(holder, name, 0):
                        raise PaddingNotRemovableError(f"{name} skips layers at random; set it to 0")

    def check(self, groupings: Sequence[Cost] = GROUPINGS) -> None:
        """Compare loss and gradient of the changed model. Raises PaddingNotRemovableError if not exact."""
        for cost in groupings:
            sample = dict(self.sample)
            sample["attention_mask"] = mask = sample["attention_mask"].clone()
            if mask.ndim == 2:
                layout = padding_layout(mask, cost)
                assert layout is not None
                attach_layout(mask, layout)
            self._everywhere(
                lambda sample=sample: self._compare(*self._run(sample)), "the layers need the padded shape"
            )

    def is_exact_with(
        self, install: Callable[[], Sequence[Any]], groupings: Sequence[Cost] = GROUPINGS[1:]
    ) -> bool:
        """Whether loss and gradient stay the same with more hooks. They are removed if not.

        One grouping is enough for hooks that do not change the attention.
        """
        hooks = install()
        try:
            self.check(groupings)
            if self.packs and self._is_alone:
                self._check_rows()
        except PaddingNotRemovableError:
            for hook in hooks:
                hook.handle.remove()
            return False
        return True

    def check_row(self) -> None:
        """Compare the loss of the examples in one row. Raises PaddingNotRemovableError if not exact."""
        with self.of_loss_alone():
            self._check_rows()

    def _check_rows(self) -> None:
        for cost in GROUPINGS:
            row = packed_row(self.sample)
            layout = row_layout(row["position_ids"], cost)
            assert layout is not None
            attach_layout(row["position_ids"], layout)
            self._everywhere(
                lambda row=row: self._compare(*self._run(row)), "the model fails on packed examples"
            )

    def _everywhere(self, compute: Callable[[], Any], failure: str) -> Any:
        """Return the result of a function, or raise PaddingNotRemovableError in all processes.

        Args:
            compute: The function. A model of unknown structure may raise anything.
            failure: What an exception means, unless memory runs out.
        """
        found = result = None
        try:
            result = compute()
        except PaddingNotRemovableError as error:
            found = error
        except Exception as error:
            what = "memory runs out" if out_of_memory(error) else failure
            found = PaddingNotRemovableError(f"{what} ({type(error).__name__}: {one_line(error)[:150]})")
        self._raise_everywhere(found)
        return result

    def _raise_everywhere(self, error: PaddingNotRemovableError | None) -> None:
        """Raise an error of any process in all processes that share the weights, which run in step."""
        if _is_sharded(self.model):
            found = torch.tensor(float(error is not None), device=self.sample["attention_mask"].device)
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
            if found and error is None:
                error = PaddingNotRemovableError("it is not exact in another process")
        if error is not None:
            raise error

    def _compare(self, loss: float, gradient: Gradient) -> None:
        off = abs(loss - self._loss) / max(abs(self._loss), 1e-30)
        if not off <= EXACT:
            raise PaddingNotRemovableError(f"examples mix, or a mask is lost: the loss is off by {off:.0e}")
        found = compare("without padding", gradient, self._gradient)
        if not found.exact:
            raise PaddingNotRemovableError(
                f"examples mix, or a mask is lost: the gradient is off by {found.error:.0e}"
            )
        name, worst = found.worst[0]
        if not worst <= WORST_PARAMETER:
            raise PaddingNotRemovableError(f"the gradient of {name} is off by {worst:.0e}")

    def reads_padding(self, stacks: Stacks) -> bool:
        """Whether the padded model's loss depends on hidden states of padding after the last layer."""

        def clear(module: torch.nn.Module, args: Any, output: Any) -> Any:
            first = output if isinstance(output, torch.Tensor) else output[0]
            mask = self.sample["attention_mask"].reshape(-1, self.sample["attention_mask"].shape[-1])
            if first.ndim != 3 or first.shape[:2] != mask.shape:
                return output
            cleared = first * (mask != 0)[..., None].to(first.dtype)
            return cleared if isinstance(output, torch.Tensor) else type(output)((cleared, *output[1:]))

        handles = [
            layers[-1].register_forward_hook(clear)
            for owner, (layers, _) in stacks.items()
            if not (getattr(self.model.config, "is_encoder_decoder", False) and _attends_to_encoder(owner))
        ]
        try:
            found = None
            try:
                self._compare(*self._run(self.sample))
            except PaddingNotRemovableError as error:
                found = error
            self._raise_everywhere(found)
        except PaddingNotRemovableError:
            return True
        finally:
            for handle in handles:
                handle.remove()
        return False

    def _run(self, sample: Mapping[str, Any]) -> tuple[float, Gradient]:
        """Return the loss, and the gradient of the loss plus a random projection of all other outputs.

        The projection makes every example and token count, also those without a label.
        """
        with self._restored():
            return self._loss_and_gradient(sample)

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Restore what a forward in the block changes in modules."""
        with ExitStack() as stack:
            if _is_sharded(self.model):  # the attributes of modules belong to FSDP
                stack.callback(BufferSnapshot(self.model).restore)
            else:
                for module in self.model.modules():
                    stack.callback(Attributes(module).restore)
            yield

    def _loss_and_gradient(self, sample: Mapping[str, Any]) -> tuple[float, Gradient]:
        self.model.zero_grad(set_to_none=True)
        handles = [
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and name not in self._compared
        ]
        try:
            loss = self._backward(sample)
        finally:
            for handle in handles:
                handle.remove()
        gradient = read_gradient(self.model, self._compared)
        self.model.zero_grad(set_to_none=True)
        return loss, gradient

    def _backward(self, sample: Mapping[str, Any]) -> float:
        outputs = self.model(**sample)
        if self._compute_loss is None:
            loss = output_named(outputs, "loss", position=0)
        else:
            loss = total_loss(self._compute_loss(outputs, sample))
        if self._is_alone:
            loss.backward()
            return float(loss.detach())
        projection = _projection(outputs, self._masks(sample))
        if not isinstance(loss, torch.Tensor) or loss.ndim:
            loss = projection
        (loss + projection).backward()
        return float(loss.detach())

    def _masks(self, sample: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return the masks of the tokens that outputs may belong to: inputs, and targets of a decoder."""
        masks, labels = [sample["attention_mask"]], sample.get("labels")
        if isinstance(sample.get("decoder_attention_mask"), torch.Tensor):
            masks.append(sample["decoder_attention_mask"])
        elif getattr(self.model.config, "is_encoder_decoder", False) and isinstance(labels, torch.Tensor):
            masks += [target_mask(labels)] if labels.ndim == 2 and not labels.is_floating_point() else []
        return masks


def _is_sharded(model: torch.nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _attends_to_encoder(owner: PreTrainedModel) -> bool:
    return "encoder_hidden_states" in inspect.signature(owner.forward).parameters


def _projection(outputs: Any, masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a random projection of outputs. Tokens count where every mask of their shape is not 0."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), device=masks[0].device)
    for value in outputs.values() if isinstance(outputs, Mapping) else outputs:
        if isinstance(value, torch.Tensor) and value.requires_grad and value.ndim:
            weights = torch.randn(value.shape, generator=generator).to(value)
            for mask in masks:
                if value.shape[: mask.ndim] == mask.shape:
                    weights = weights * (mask != 0).reshape(mask.shape + (1,) * (value.ndim - mask.ndim))
            total = total + (value * weights).sum() / value.numel() ** 0.5
    return total


def without_wrappers(model: torch.nn.Module) -> Any:
    """Return the model inside DDP and `torch.compile`."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), torch.nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


@contextmanager
def _without_gradients(model: torch.nn.Module) -> Iterator[None]:
    """Put the gradients of the model aside in the block."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
