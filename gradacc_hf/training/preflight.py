"""Check a model before a run, on a few examples, for causes of inexact accumulation that raise no error.

`fine_tune` checks the model before Accelerate wraps it. A copied loop can do the same.
"""

import inspect
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from gradacc_hf.accumulation.accelerate_state import find_unused_parameters
from gradacc_hf.accumulation.collation import MicroBatch
from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.loss_items import (
    SEVERAL_LOSSES,
    ComputeLoss,
    CountSeveral,
    as_window_loss,
    model_loss,
    total_loss,
)
from gradacc_hf.accumulation.loss_modes import find_mode
from gradacc_hf.accumulation.loss_samples import LossSample
from gradacc_hf.accumulation.probe_rows import row_of
from gradacc_hf.accumulation.reference import full_float32, in_dtype_of
from gradacc_hf.accumulation.router_loss import without_router_loss
from gradacc_hf.accumulation.sample_examples import count_labels
from gradacc_hf.accumulation.sampler import WindowPlan
from gradacc_hf.errors import InputError
from gradacc_hf.training.bad_index import ids_beyond, num_embeddings
from gradacc_hf.utils.attributes import Attributes
from gradacc_hf.utils.logs import get_logger
from gradacc_hf.utils.modeling import nonlinear_hooks, small_instead_of_zero, train_batch_norms, uncompiled
from gradacc_hf.utils.rng import preserve_rng_state

logger = get_logger(__name__)

SMALL = 1e-6
"""Relative difference of losses below which no warning is worth it, such as 1e-8 added to a divisor. It is
lower where losses differ little from example to example, as a root of a mean shows little then."""
BOUNDS = 4
"""Micro-batches that fit into memory at once without gradients. Two examples show little about a loss."""
CANNOT_TELL = "cannot tell whether the loss is a mean over its items"
REMAKE = "make the optimizer after the last change of the model"


def check_trainable(model: torch.nn.Module, optimizer: Any, scheduler: Any = None) -> None:
    """Raise InputError for a model, an optimizer or a scheduler with which the loop cannot train.

    Args:
        model: The model, prepared or not.
        optimizer: The optimizer, prepared or not.
        scheduler: A learning rate scheduler, or None.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # as it was before accelerator.prepare
    name, trained = type(optimizer).__name__, [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise InputError(
            f"model: all parameters of {type(model).__name__} are frozen; set requires_grad for some, "
            "or add adapters"
        )
    _check_values(model, optimizer)
    if needed := _needed_by_step(optimizer):
        raise InputError(
            f"optimizer: {name}.step needs {needed[0]!r}, which the loop does not pass; use one such "
            "as AdamW, whose step needs no argument"
        )
    if hasattr(type(optimizer), "first_step"):  # SAM: its closure has a default, and is needed nevertheless
        raise InputError(
            f"optimizer: {name} takes two steps a window (first_step, second_step), which the loop does not; "
            "use one with a single step, such as AdamW"
        )
    if scheduler is not None and (needed := _needed_by_step(scheduler)):
        raise InputError(
            f"scheduler: {type(scheduler).__name__}.step needs {needed[0]!r}, which the loop does not pass; "
            "use one that needs no argument, or step it in a loop of your own"
        )
    of_scheduler = getattr(scheduler, "optimizer", None)
    if of_scheduler is not None and getattr(of_scheduler, "optimizer", of_scheduler) is not optimizer:
        raise InputError(
            f"scheduler: {type(scheduler).__name__} was made for another optimizer, so it would not change "
            f"the learning rate of {name}; make it with this one"
        )


def _check_values(model: torch.nn.Module, optimizer: Any) -> None:
    """Raise InputError for weights without values, and for an optimizer that holds no trained parameter."""
    empty = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if empty is not None and os.environ.get("ACCELERATE_USE_FSDP") != "true":  # FSDP sends the values later
        raise InputError(
            f"model: {empty} is on the meta device and has no values; load the weights, without "
            "device_map='meta' or torch.device('meta')"
        )
    trained, missing = _not_held(model, optimizer)
    if len(missing) == trained:
        raise InputError(
            f"optimizer: {type(optimizer).__name__} holds none of the {trained} trained parameters of the "
            f"model; {REMAKE}, such as adapters"
        )


def _not_held(model: torch.nn.Module, optimizer: Any) -> tuple[int, list[str]]:
    """Return the number of trained parameters, and the names of trained ones outside the optimizer."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return len(trained), [name for name, p in trained.items() if id(p) not in held]


def warn_of_untrained(model: torch.nn.Module, optimizer: Any) -> None:
    """Warn of parameters that stay as they are, although nothing freezes them.

    The optimizer may hold only some, as after `resize_token_embeddings`, and integers have no gradient.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # as it was before accelerator.prepare
    parameters = dict(model.named_parameters())
    trained, missing = _not_held(model, optimizer)
    if missing:
        known = {id(p) for p in parameters.values()}
        others = sum(id(p) not in known for group in optimizer.param_groups for p in group["params"])
        gone = f" and {others} that are not in the model" if others else ""
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        logger.warning(
            f"{type(optimizer).__name__} has {trained - len(missing)} of {trained} trained parameters{gone}, "
            f"so {missing[0]}{more} will not change; {REMAKE}, such as resize_token_embeddings, or set "
            "requires_grad to False"
        )
    fixed = [name for name, p in parameters.items() if not (p.is_floating_point() or p.is_complex())]
    if fixed and not any(".lora_" in name for name in parameters):
        logger.warning(
            f"{len(fixed)} of {len(parameters)} parameters are integers and will not change ({fixed[0]}, …): "
            "the model is quantised; add adapters, or load it in floating point"
        )


def check_token_ids(model: torch.nn.Module, windows: WindowLoader) -> None:
    """Raise InputError if the next window has token ids beyond the embeddings of the model.

    `name_bad_index` finds such ids in later windows, and in a stream, which would be read twice. A model
    without `get_input_embeddings` is not checked.
    """
    if (rows := num_embeddings(model)) is None or not isinstance(windows.plan, WindowPlan):
        return
    place = windows.state_dict()
    with preserve_rng_state():  # the check must not change the run's random numbers
        micro_batches = windows.collate_window(place["epoch"], place["window"])
    for micro_batch in micro_batches:
        if problem := ids_beyond(micro_batch.batch, rows):
            raise InputError(f"examples {micro_batch.indices[:4].tolist()}: {problem}")


def _needed_by_step(steps: Any) -> list[str]:
    """Return the names of the arguments of `step` without a default.

    The class has them: a scheduler replaces `step` of the optimizer by a function that counts calls.
    """
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    _, *parameters = inspect.signature(type(steps).step).parameters.values()  # without self
    return [p.name for p in parameters if p.default is p.empty and p.kind not in kinds]


def preflight_check(
    model: torch.nn.Module, windows: WindowLoader, compute_loss: ComputeLoss = model_loss
) -> None:
    """Warn of BatchNorm and of an inseparable loss, and prepare DDP for parameters outside the loss.

    Call it before `accelerator.prepare(model)`. The model is moved to the device and not changed otherwise.

    Args:
        model: The unprepared model.
        windows: The loader of the run.
        compute_loss: The loss of the run.
    """
    if norms := train_batch_norms(model):
        logger.warning(
            f"{len(norms)} modules normalise over the micro-batch (BatchNorm: {norms[0]}, …): no "
            "accumulation is exact with them; use a model with LayerNorm or GroupNorm"
        )
    accelerator = windows.accelerator
    placed_already = hasattr(model, "hf_device_map")
    if accelerator.distributed_type == DistributedType.FSDP or placed_already:  # it may not fit on one device
        return
    training = model.training
    model.to(accelerator.device)
    try:
        with uncompiled(model), without_router_loss(model), preserve_rng_state(), full_float32():
            notice_inseparable_loss(model, windows, compute_loss)
            model.eval()
            expect_unused_parameters(model, windows, compute_loss, accelerator)
    finally:
        model.train(training)


@torch.no_grad()
def notice_inseparable_loss(model: torch.nn.Module, windows: WindowLoader, compute_loss: ComputeLoss) -> None:
    """Warn if the loss of examples together is not the mean of their losses, weighted by items.

    In this case no split is exact. Either padding changes the loss, or the loss is a mean over other items.
    The warning is another one if the examples cannot show it.
    """
    if as_window_loss(compute_loss) is not None:  # a loss over the whole window has no mean over parts
        return
    alone, together, pad_to = windows.sample(bounds=BOUNDS)
    repeated = windows.collated(np.repeat(alone[0].indices, len(alone)), pad_to)
    is_half = next(model.parameters()).dtype not in (torch.float32, torch.float64)

    def loss_of(each: MicroBatch) -> Any:
        batch = in_dtype_of(model, each.batch)
        return compute_loss(model(**batch), batch)

    def losses() -> list[Mapping[str, torch.Tensor]]:
        found = [loss_of(each) for each in (*alone, together, repeated)]
        return [loss if isinstance(loss, Mapping) else {"": loss} for loss in found]

    def loss_after(seed: int) -> float:
        torch.manual_seed(seed)
        return float(total_loss(loss_of(together)))

    def is_padding_out(name: str) -> bool:
        """Whether the smallest example has the same loss alone with the padding of all together."""
        sizes = [sum(v.numel() for v in each.batch.values() if hasattr(v, "numel")) for each in alone]
        row = int(np.argmin(sizes))
        padded = replace(together, batch=row_of(together.batch, row, len(alone)))
        found = [loss_of(each) for each in (alone[row], padded)]
        losses = [float(loss[name] if isinstance(loss, Mapping) else loss) for loss in found]
        return bool(np.isclose(*losses, rtol=max(mode.rtol(is_half), SMALL), atol=0))

    def sample_of(measured: list[Mapping[str, torch.Tensor]], name: str) -> LossSample:
        *single, whole, again = (float(loss[name]) for loss in measured)
        return LossSample(np.array(single), whole, again, mode.rtol(is_half))

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(Attributes(module).restore)
        mode, changes = find_mode(model, loss_after, is_half)
        stack.enter_context(mode.of(model))
        measured = losses()
        has_no_weights = compute_loss is model_loss and _is_of_transformers(model)
        has_no_weights |= not getattr(compute_loss, "weighs_labels", True)
        asked = [] if has_no_weights else count_labels(alone)
        for name in measured[0]:
            *counts, at_once, again = (
                each.items[name] if name else each.num_items for each in (*alone, together, repeated)
            )
            items = np.array(counts)
            if not np.allclose([items.sum(), len(items) * items[0]], [at_once, again]):
                logger.warning(f"{CANNOT_TELL}: the items of the same examples change, as with random masks")
                continue
            sample = sample_of(measured, name)
            if sample.decides(items):
                problem = _problem(sample, items, asked, lambda name=name: is_padding_out(name))
            else:  # such as a head of zeros
                with small_instead_of_zero(model):
                    sample = sample_of(losses(), name)
                    problem = _problem(sample, items, asked, lambda name=name: is_padding_out(name))
            if problem:
                logger.warning(f"{name}: {problem}" if name else problem)
    if doubt := _doubt(model, changes):
        logger.warning(f"cannot tell whether accumulation is exact: {doubt}")


def _is_of_transformers(model: torch.nn.Module) -> bool:
    """Whether transformers defines the model, or the model under adapters: its losses weigh no labels."""
    whole: Any = getattr(model, "_orig_mod", model)  # compiled
    base = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    return type(base).__module__.startswith("transformers.")


def _doubt(model: torch.nn.Module, changes: bool) -> str:
    if changes:
        return "in training mode, the loss changes from call to call, although dropout is off"
    names = nonlinear_hooks(model)
    return f"a hook of {names[0]} changes the gradient of each micro-batch" if names else ""


def _problem(
    sample: LossSample,
    items: np.ndarray,
    labels: Sequence[Counter[int]],
    is_padding_out: Callable[[], bool],
) -> str:
    """Return a line if the sample shows no mean over items, or cannot tell; "" if it shows one.

    Args:
        sample: Losses of examples alone and together.
        items: Items of each example (examples,).
        labels: How often each label occurs in each example; empty if no label can have a weight.
        is_padding_out: Returns whether padding does not change the loss.
    """
    if len(items) < 2 or not np.isfinite(sample.together):  # the loop names losses that are not finite
        return ""
    cure = "set num_items, of the loader or the recipe ('next_token' if the head shifts its labels)"
    in_case = f"If the loss of your model is not a mean over its items, {cure}"
    if not sample.is_usable:
        why = "the loss of an example alone is not finite" if sample.together else "the loss is 0"
        return f"{CANNOT_TELL}: {why}. {in_case}"
    spread = float(np.nanstd(sample.alone)) / abs(sample.together)
    if not sample.fits(items) and sample.deviation(items) > min(SMALL, 1e-5 * spread):
        pad = "If padding changes the loss, pad a window to one length (pad_to='window'). "
        return (
            f"{len(items)} examples have the loss {sample.together:.6g} together, but the mean over their "
            f"items is {sample.mean(items):.6g}: no split is exact. {'' if is_padding_out() else pad}"
            f"If the loss is a mean over other items, {cure}. {SEVERAL_LOSSES}"
        )
    different, why = set[int]().union(*labels), ""
    if not sample.decides(items):
        why = f"the losses of {len(items)} examples are all alike"
    elif len(different) == 1:
        why = f"all labels of the first examples are {different.pop()}, so class weights would not show"
    for label in sorted(different) if not why else ():
        weighted = items + [counted[label] for counted in labels]
        if not sample.separates(items, weighted):
            why = f"the first examples do not show whether label id {label} has a class weight"
    return why and f"{CANNOT_TELL}: {why}. {in_case}"


def expect_unused_parameters(
    model: torch.nn.Module, windows: WindowLoader, compute_loss: ComputeLoss, accelerator: Accelerator
) -> None:
    """Make DDP search for unused parameters in each window, if any parameter is outside the loss.

    Without the search, DDP does not reduce the bucket of such a parameter in the first window, and raises in
    the next.
    """
    if accelerator.distributed_type == DistributedType.NO:
        return
    if isinstance(windows.count_items, CountSeveral):  # a micro-batch may lack the items of a loss
        find_unused_parameters(accelerator)
        return
    batch = windows.sample(2)[0][0].batch
    total_loss(compute_loss(model(**batch), batch)).backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad()
    settings = vars(getattr(model, "config", None) or model)
    if unused or any("layerdrop" in name and value for name, value in settings.items()):
        if unused:
            logger.warning(
                f"{len(unused)} parameters do not affect the loss ({unused[0]}, …): DDP will search for them"
            )
        find_unused_parameters(accelerator)
