"""Settings of the model, the adapters and the optimizer.

The text below a field is its help. The first line is complete in itself: `config/help.py` prints it in 80
columns. `config/schema.py` has the other sections of settings.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from gradacc_hf.accumulation.batch_schedule import LrScaling

Rules = Iterator[tuple[str, bool, str]]
"""Limits of a section beyond its types: (field, whether the value is possible, what is allowed)."""

OptimizerName = Literal["adamw", "adamw_8bit", "adam", "sgd", "adafactor", "muon", "schedule_free_adamw"]
CONSTANT = ("constant", "constant_with_warmup")
"""The schedules whose learning rate stays after warmup."""


@dataclass(frozen=True)
class LoraConfig:
    """LoRA adapters, trained instead of the weights of the model."""

    rank: int = 0
    """Rank of LoRA adapters (0: train all weights)."""
    alpha: int | None = None
    """Scale of the adapters: their output is multiplied by alpha / rank; null is 2 × rank."""
    dora: bool = False
    """Also train the length of each row of an adapted weight (DoRA).
    More memory and time than plain adapters. https://arxiv.org/abs/2402.09353"""
    rslora: bool = False
    """Multiply the output by alpha / √rank instead (rsLoRA).
    For high ranks. https://arxiv.org/abs/2312.03732"""
    plus_lr_ratio: float = 1.0
    """Learning rate of matrices B, relative to optim.lr (LoRA+).
    1: the same. 16 is usual, with a lower optim.lr. https://arxiv.org/abs/2402.12354"""
    init: Literal["default", "pissa"] = "default"
    """default: adapters start at 0. pissa: at the largest singular values.
    The base model keeps the rest of each weight. One singular value decomposition a layer, before training.
    Saved as plain adapters of twice the rank. https://arxiv.org/abs/2404.02948"""
    dropout: float = 0.0
    """Dropout probability of an adapter's input (from 0, below 1)."""
    targets: list[str] = field(default_factory=list)
    """Linear layers with an adapter, by name or pattern: [q_proj, "*.layer.0.*"].
    []: peft's choice for this kind of model, or all layers but the head."""
    merge: bool = False
    """Save a plain model with the adapters added to the weights, instead of the adapters alone."""

    def __str__(self) -> str:
        name = f"{'DoRA' if self.dora else 'LoRA'} rank {self.rank}"
        given = {"rsLoRA": self.rslora, "LoRA+": self.plus_lr_ratio > 1, "PiSSA": self.init == "pissa"}
        return ", ".join([name, *(kind for kind, is_on in given.items() if is_on)])

    def rules(self) -> Rules:
        off = self.rank == 0
        yield "rank", self.rank >= 0, "0 (off) or more; 8 and 16 are usual"
        yield "alpha", self.alpha is None or self.alpha >= 1, "1 or more, or null"
        yield "dropout", 0 <= self.dropout < 1, "a probability from 0 to below 1"
        yield "plus_lr_ratio", self.plus_lr_ratio >= 1, "1 (off) or more"
        for name in ("dora", "rslora", "plus_lr_ratio", "init"):
            default = getattr(LoraConfig, name)
            shown = str(default).lower() if isinstance(default, bool) else default
            only = f"{shown} without adapters: set model.lora.rank"
            yield name, not off or getattr(self, name) == default, only
        pissa = self.init == "pissa"
        yield "rslora", not (pissa and self.rslora), "false with model.lora.init pissa, which sets the scale"
        principal = "0 with model.lora.init pissa, whose adapters hold the main part of the weights"
        yield "dropout", not (pissa and self.dropout), principal
        yield "targets", not (off and self.targets), "[] without adapters: set model.lora.rank"
        yield "merge", not (off and self.merge), "false without adapters: set model.lora.rank"


@dataclass(frozen=True)
class ModelConfig:
    """The model, and the part of it that is trained."""

    name: str = "embedded:minilm"
    """Hub name, folder or embedded:NAME.
    embedded:NAME needs no download."""
    dropout: float | None = None
    """Dropout probability everywhere in the model.
    It replaces all dropout probabilities in the model's config (0 to 1)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the weights.
    bfloat16 takes half the memory, but loses updates below 1/256 of a weight.
    Gradients accumulate in float32. budget.precision sets only the format of the computation."""
    freeze: list[str] = field(default_factory=list)
    """Name patterns of parameters that are not trained, as in fnmatch: ["*.embeddings.*"]."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    load_in_4bit: bool = False
    """Base model in 4 bits below the adapters (QLoRA).
    Needs bitsandbytes and a CUDA GPU."""
    router_loss: Literal["window", "micro_batch", "none"] = "window"
    """Router loss of a mixture of experts: window, micro_batch or none.
    window balances the experts over the whole window, exactly, by one more forward pass.
    micro_batch is transformers' own, which depends on the split. The model's config has its factor."""
    teacher: str | None = None
    """Teacher of a distillation: Hub name, folder, embedded:NAME or a run.
    The model also learns the outputs of the teacher, which has the same tokens and the same labels. For
    text_classification, token_classification and causal_lm."""
    teacher_temperature: float = 2.0
    """Divisor of the logits of both models in the teacher's part.
    Higher: the student learns more of what the teacher finds unlikely."""
    teacher_weight: float = 0.5
    """Share of the teacher's part in the loss, up to 1.
    The loss is (1 − share) · task loss + share · temperature² · KL(teacher ‖ student)."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def rules(self) -> Rules:
        adapters, frozen_by_lora = (
            self.lora.rank > 0,
            "[] with model.lora, which trains no weight of the base model",
        )
        yield "freeze", not (adapters and self.freeze), frozen_by_lora
        needs = "false without adapters, as 4-bit weights cannot be trained: set model.lora.rank"
        yield "load_in_4bit", adapters or not self.load_in_4bit, needs
        whole = "false with model.lora.merge, which needs full weights: save the adapter, merge it later"
        yield "load_in_4bit", not (self.lora.merge and self.load_in_4bit), whole
        rounded = "float32 with model.lora.init pissa: bfloat16 would round what is left of the weights"
        pissa = self.lora.init == "pissa"
        yield "dtype", not (pissa and self.dtype == "bfloat16"), rounded
        decomposed = "false with model.lora.init pissa, which decomposes full weights"
        yield "load_in_4bit", not (pissa and self.load_in_4bit), decomposed
        yield "dropout", self.dropout is None or 0 <= self.dropout <= 1, "a probability from 0 to 1, or null"
        yield "teacher_temperature", self.teacher_temperature > 0, "a number above 0, such as 2"
        yield "teacher_weight", 0 < self.teacher_weight <= 1, "a share above 0, up to 1"


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: OptimizerName = "adamw"
    """The optimizer, such as adamw.
    adamw, adamw_8bit, adam, sgd, adafactor, muon or schedule_free_adamw.
    adamw_8bit holds the states of AdamW in 8 bits, and needs bitsandbytes and a CUDA GPU.
    adafactor holds one number per row and column of a weight. Both take less memory.
    muon trains the matrices of hidden layers with Muon, and the other weights with adamw.
    schedule_free_adamw evaluates and saves an average of the weights, with scheduler constant."""
    lr: float = 2e-5
    """Learning rate after warmup."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay rates of Adam's two running means, each from 0 to below 1."""
    eps: float = 1e-8
    """Term that keeps Adam's denominator above 0."""
    momentum: float = 0.9
    """Momentum of SGD, from 0 to below 1."""
    weight_decay: float = 0.01
    """Weight decay (0: off)."""
    scheduler: Literal["linear", "cosine", "wsd", "constant", "constant_with_warmup"] = "linear"
    """linear, cosine, wsd or constant, after warmup.
    linear and cosine decay to 0 over the run, cosine to min_lr_ratio if that is set. wsd
    (warmup-stable-decay) is constant, and decays over decay_ratio of the windows at the end.
    constant_with_warmup is another name of constant."""
    warmup_ratio: float = 0.0
    """Share of the windows in which lr rises from 0.
    With wsd and min_lr_ratio, it rises from min_lr_ratio × lr."""
    decay_ratio: float = 0.1
    """Share of the windows in which wsd decays, at the end."""
    min_lr_ratio: float = 0.0
    """Lowest learning rate of cosine and wsd, relative to lr."""
    max_grad_norm: float = 1.0
    """Norm at which gradients are clipped (0: off)."""
    lr_scaling: LrScaling = "none"
    """Scale lr with the window size / lr_reference_batch: linear, or sqrt (by the square root).
    linear suits SGD, sqrt suits Adam."""
    lr_reference_batch: int | None = None
    """Window size that lr is meant for, in examples; needed with lr_scaling."""

    @property
    def is_constant(self) -> bool:
        """Whether all windows have one learning rate, so that the length of the run can be unknown."""
        return self.scheduler in CONSTANT and not self.warmup_ratio

    def rules(self) -> Rules:
        unit_interval = "from 0 to below 1"
        betas_possible = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        yield "lr", self.lr > 0, "a number above 0"
        yield "betas", betas_possible, f"two numbers {unit_interval}, such as [0.9, 0.999]"
        yield "eps", self.eps > 0, "a number above 0"
        yield "momentum", 0 <= self.momentum < 1, f"a number {unit_interval}"
        yield "weight_decay", self.weight_decay >= 0, "0 (off) or more"
        yield "warmup_ratio", 0 <= self.warmup_ratio <= 1, "a share of the windows from 0 to 1"
        share, wsd = 0 <= self.decay_ratio <= 1, self.scheduler == "wsd"
        yield "decay_ratio", share, "a share of the windows from 0 to 1"
        default = OptimConfig.decay_ratio
        yield (
            "decay_ratio",
            wsd or self.decay_ratio == default,
            f"{default}, its default, without scheduler wsd",
        )
        fits = self.warmup_ratio + self.decay_ratio <= 1
        yield "decay_ratio", fits or not wsd, f"at most 1 − optim.warmup_ratio ({self.warmup_ratio})"
        yield "min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "a share of lr from 0 to 1"
        floors = self.scheduler in ("cosine", "wsd")
        yield "min_lr_ratio", floors or not self.min_lr_ratio, "0, or scheduler cosine or wsd"
        averages = self.name == "schedule_free_adamw"
        constant = "constant with optim.name schedule_free_adamw, whose average replaces the decay"
        yield "scheduler", not averages or self.scheduler in CONSTANT, constant
        above = "a first number above 0 with optim.name schedule_free_adamw"
        yield "betas", not (averages and betas_possible and not self.betas[0]), above
        yield "max_grad_norm", self.max_grad_norm >= 0, "0 (off) or more"
        reference, scales = self.lr_reference_batch, self.lr_scaling != "none"
        size = f"the window size that lr is meant for, with lr_scaling {self.lr_scaling}"
        yield "lr_reference_batch", (reference is not None) or not scales, size
        yield "lr_reference_batch", reference is None or reference >= 1, "1 example or more"
        yield "lr_reference_batch", reference is None or scales, "null without lr_scaling: linear or sqrt"
