"""Create the optimizer and the learning rate schedule, and freeze parameters."""

import fnmatch
import math
import os
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from gradacc_hf.accumulation.batch_schedule import lr_factor
from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.errors import InputError, refuse
from gradacc_hf.training.lora import add_lora
from gradacc_hf.training.settings import ModelConfig, OptimConfig


def make_optimizer(model: torch.nn.Module, optim: OptimConfig, precision: str = "no") -> Optimizer:
    """Return the optimizer of these settings.

    Parameters with fewer than two dimensions, such as biases and norms, have no weight decay. The optimizer
    is fused, which is 4 × as fast for 22 M parameters on a CPU. In fp16 it is not fused: Accelerate does not
    detect that a fused step was skipped after an overflow, and the scheduler would step.

    Args:
        model: the model, with its trained parameters chosen.
        optim: the settings.
        precision: the mixed precision of the Accelerator.
    """
    fused = precision != "fp16"
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (optim.betas[0], optim.betas[1])
    match optim.name:
        case "adamw":
            return AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=fused)
        case "adamw_8bit":
            return _adamw_8bit(model, groups, lr=optim.lr, betas=betas, eps=optim.eps)
        case "adam":
            return Adam(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=fused)
        case "sgd":
            return SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=fused)
        case "adafactor":
            return Adafactor(groups, lr=optim.lr)


def _adamw_8bit(model: torch.nn.Module, groups: list[dict[str, Any]], **settings: Any) -> Optimizer:
    """Return AdamW with 8-bit states. States of embeddings have 32 bits, as rare rows make them too uneven.

    Source: Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", section 2.3.
    """
    from bitsandbytes.optim import AdamW8bit, GlobalOptimManager  # type: ignore[import-not-found]  # a heavy extra

    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    return AdamW8bit(groups, **settings)


def check_optimizer(optim: OptimConfig) -> None:
    """Raise InputError if the optimizer `optim.name` cannot run here."""
    if optim.name != "adamw_8bit":
        return
    others = "allowed here: adamw, adam, sgd, adafactor"
    if not torch.cuda.is_available():
        refuse("optim.name", "found adamw_8bit without a CUDA GPU", others)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        refuse("optim.name", "found adamw_8bit with FSDP, which cannot shard it", others)
    if find_spec("bitsandbytes") is None:
        refuse("optim.name", "adamw_8bit needs bitsandbytes", "pip install bitsandbytes, or use adafactor")


def make_scheduler(
    optimizer: Optimizer, optim: OptimConfig, windows: WindowLoader, total_windows: int | None
) -> LRScheduler:
    """Return the learning rate schedule of a whole run. Step it once per window.

    If the size of windows changes, warmup and decay follow the number of examples so far, not of windows.
    None for `total_windows`, which is unknown for a stream, needs a constant schedule without warmup.
    `optim.lr_scaling` scales the learning rate by the size of the next window.
    """
    plan: Any = windows.plan  # for data of known length
    by_examples = callable(plan.effective_batch_size) and hasattr(plan, "examples_of")
    total = plan.examples_of(total_windows) if by_examples else total_windows or 1
    name = {"constant": "constant_with_warmup"}.get(optim.scheduler, optim.scheduler)
    warmup = math.ceil(total * optim.warmup_ratio)
    scheduler: Any = transformers.get_scheduler(name, optimizer, warmup, total)
    shape = scheduler.lr_lambdas[0]

    def factor(windows_done: int) -> float:
        plan: Any = windows.plan
        coming = windows.next_position
        done = plan.examples_before(*coming) if by_examples else windows_done
        return shape(done) * lr_factor(optim.lr_scaling, plan.size_asked(*coming), optim.lr_reference_batch)

    made = LambdaLR(optimizer, factor)
    # `counts_examples` reads this: a window without a step advances the schedule, too.
    made.by_examples = by_examples  # type: ignore[attr-defined]
    return made


def frozen_parameters(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """Return the names that match a pattern of `model.freeze`."""
    frozen: set[str] = set()
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise InputError(
                f"model.freeze: {pattern!r} matches no parameter; "
                f"the model has {names[0]}, {names[1]}, … {names[-1]}"
            )
        frozen.update(matching)
    if len(frozen) == len(names):
        raise InputError(
            f"model.freeze: {', '.join(map(repr, patterns))} leave no parameter to train: freeze fewer"
        )
    return frozen


def choose_trained(model: Any, settings: ModelConfig, new_parameters: Collection[str] | None) -> None:
    """Freeze the parameters that are not trained, and add adapters.

    Args:
        model: the model, changed in place.
        settings: `freeze` has the patterns of frozen parameters. With `lora`, only adapters and new
            parameters are trained.
        new_parameters: names of parameters without pretrained weights; None if unknown.
    """
    for name in frozen_parameters([name for name, _ in model.named_parameters()], settings.freeze):
        model.get_parameter(name).requires_grad_(False)
    if settings.lora.rank:
        add_lora(model, settings.lora, new_parameters)
