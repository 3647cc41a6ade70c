"""Create the optimizer and the learning rate schedule, and freeze parameters."""

import fnmatch
import math
import os
from collections.abc import Callable, Collection, Sequence
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
from gradacc_hf.training.muon import MuonWithAdamW, hidden_matrices
from gradacc_hf.training.settings import ModelConfig, OptimConfig
from gradacc_hf.utils.extras import require


def make_optimizer(
    model: torch.nn.Module, optim: OptimConfig, precision: str = "no", plus_lr_ratio: float = 1.0
) -> Optimizer:
    """Return the optimizer of these settings.

    Parameters with fewer than two dimensions, such as biases and norms, have no weight decay. The optimizer
    is fused, which is 4 × as fast for 22 M parameters on a CPU. In fp16 it is not fused: Accelerate does not
    detect that a fused step was skipped after an overflow, and the scheduler would step.

    Args:
        model: the model, with its trained parameters chosen.
        optim: the settings.
        precision: the mixed precision of the Accelerator.
        plus_lr_ratio: learning rate of the matrices B of adapters, relative to `optim.lr`.
    """
    fused = precision != "fp16"
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    raised = {id(p) for name, p in model.named_parameters() if plus_lr_ratio != 1 and ".lora_B." in name}
    matrices = {id(p) for p in hidden_matrices(model)} if optim.name == "muon" else set()
    groups = [
        {"params": [p for p in trained if p.ndim >= 2 and id(p) not in raised | matrices]},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in trained if id(p) in raised], "lr": optim.lr * plus_lr_ratio},
    ]
    groups = [{"weight_decay": optim.weight_decay, **group} for group in groups]
    groups = [*groups[:2], *(group for group in groups[2:] if group["params"])]
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
        case "muon":
            hidden = {"params": [p for p in trained if id(p) in matrices], "weight_decay": optim.weight_decay}
            if not matrices:
                refuse("optim.name", "found muon, and no matrix of a hidden layer is trained", "use adamw")
            others = [group for group in groups if group["params"]]
            return MuonWithAdamW([hidden], others, optim.lr, betas=betas, eps=optim.eps, fused=fused)
        case "schedule_free_adamw":
            return _schedule_free_adamw(groups, lr=optim.lr, betas=betas, eps=optim.eps)


def _schedule_free_adamw(groups: list[dict[str, Any]], **settings: Any) -> Optimizer:
    """Return AdamW of the library schedulefree, ready to train."""
    require("optim.name schedule_free_adamw", "schedulefree", "schedulefree")
    from schedulefree import AdamWScheduleFree  # late: an extra

    optimizer = AdamWScheduleFree(groups, **settings)
    optimizer.train()
    return optimizer


def _adamw_8bit(model: torch.nn.Module, groups: list[dict[str, Any]], **settings: Any) -> Optimizer:
    """Return AdamW with 8-bit states. States of embeddings have 32 bits, as rare rows make them too uneven.

    Source: Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", section 2.3.
    """
    from bitsandbytes.optim import AdamW8bit, GlobalOptimManager  # type: ignore[import-not-found]  # a heavy extra

    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    return AdamW8bit(groups, **settings)


def check_optimizer(optim: OptimConfig, rank: int = 0) -> None:
    """Raise InputError if the optimizer `optim.name` cannot run here.

    Args:
        optim: the settings.
        rank: the rank of adapters; 0 without.
    """
    others = "allowed here: adamw, adam, sgd, adafactor"
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if optim.name in ("adamw_8bit", "muon") and sharded:
        refuse("optim.name", f"found {optim.name} with FSDP, which cannot shard it", others)
    check_optimizer_of_adapters(optim, rank)
    if optim.name == "muon" and not hasattr(torch.optim, "Muon"):
        refuse("optim.name", f"torch {torch.__version__} has no Muon", "install torch 2.9 or newer")
    if optim.name == "schedule_free_adamw":
        require("optim.name schedule_free_adamw", "schedulefree", "schedulefree")
    if optim.name != "adamw_8bit":
        return
    if not torch.cuda.is_available():
        refuse("optim.name", "found adamw_8bit without a CUDA GPU", others)
    if find_spec("bitsandbytes") is None:
        refuse("optim.name", "adamw_8bit needs bitsandbytes", "pip install bitsandbytes, or use adafactor")


def check_optimizer_of_adapters(optim: OptimConfig, rank: int) -> None:
    """Raise InputError if the optimizer cannot train adapters of this rank, on any machine."""
    if optim.name == "muon" and rank:
        found = "found muon with adapters, whose low-rank matrices it is not made for"
        refuse("optim.name", found, "use adamw, or model.lora.rank 0")


class Schedule(LambdaLR):
    """A learning rate that follows from the settings and the number of steps.

    Args:
        optimizer: the optimizer.
        factor: the number of steps → the factor of the learning rate.
        by_examples: whether the factor depends on the examples so far. `counts_examples` reads it: a window
            without a step advances the schedule, too.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float], by_examples: bool):
        self.by_examples = by_examples
        super().__init__(optimizer, factor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of steps. The rate is the rate of the present settings."""
        bases = self.base_lrs
        super().load_state_dict(state_dict)
        self.base_lrs = bases
        self._last_lr = [
            base * factor(self.last_epoch) for base, factor in zip(bases, self.lr_lambdas, strict=True)
        ]
        for group, base, rate in zip(self.optimizer.param_groups, bases, self._last_lr, strict=True):
            group["initial_lr"], group["lr"] = base, rate


def make_scheduler(
    optimizer: Optimizer,
    optim: OptimConfig,
    windows: WindowLoader,
    total_windows: int | None,
    start: int = 0,
) -> LRScheduler:
    """Return the learning rate schedule of a whole run. Step it once per window.

    If the size of windows changes, warmup and decay follow the number of examples so far, not of windows.
    None for `total_windows`, which is unknown for a stream, needs a constant schedule without warmup.
    `optim.lr_scaling` scales the learning rate by the size of the next window.

    Args:
        optimizer: the optimizer.
        optim: the settings.
        windows: the loader of the training windows.
        total_windows: windows of the whole run.
        start: windows of the run before the schedule begins.
    """
    plan: Any = windows.plan  # for data of known length
    by_examples = callable(plan.effective_batch_size) and hasattr(plan, "examples_of")
    count = plan.examples_of if by_examples else int
    before = count(start)
    shape = _shape(optim, (count(total_windows or 1) - before))

    def factor(windows_done: int) -> float:
        plan: Any = windows.plan
        coming = windows.next_position
        done = plan.examples_before(*coming) if by_examples else windows_done
        size = plan.size_asked(*coming)
        return shape(done - before) * lr_factor(optim.lr_scaling, size, optim.lr_reference_batch)

    return Schedule(optimizer, factor, by_examples)


def learning_rate(optim: OptimConfig, window: int, total_windows: int | None, start: int = 0) -> float:
    """Return the learning rate of a window (from 1) of a run whose windows have one size.

    Args:
        optim: the settings.
        window: the window.
        total_windows: windows of the whole run; None for a stream.
        start: windows of the run before the schedule begins.
    """
    return optim.lr * _shape(optim, (total_windows or start + 1) - start)(window - 1 - start)


def _shape(optim: OptimConfig, total: int) -> Callable[[int], float]:
    """Return the factor of the learning rate by the windows, or the examples, before a window."""
    name, more = optim.scheduler, dict[str, Any]()
    warmup = math.ceil(total * optim.warmup_ratio)
    if name == "constant":
        name = "constant_with_warmup"
    elif name == "wsd":  # 1-sqrt decays best in Hägele et al. 2024, https://arxiv.org/abs/2405.18392
        decay = min(math.ceil(total * optim.decay_ratio), total - warmup)  # both are rounded up
        name, more = "warmup_stable_decay", {"num_decay_steps": decay}
        more |= {"decay_type": "1-sqrt", "min_lr_ratio": optim.min_lr_ratio}
    elif name == "cosine" and optim.min_lr_ratio:
        name, more = "cosine_with_min_lr", {"min_lr_rate": optim.min_lr_ratio}
    some = SGD([torch.zeros(1)], lr=1.0)
    scheduler: Any = transformers.get_scheduler(name, some, warmup, total, more)
    return scheduler.lr_lambdas[0]


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
