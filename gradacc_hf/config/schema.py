"""The settings of a run, typed, with a line of help each.

`--config` names a file of what is trained, `--budget` a file of what it runs on. Settings are frozen:
`with_settings` returns a changed copy. `parser.py` reads them from files and flags.
"""

import re
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass, field, replace
from typing import Annotated, Any, Literal, TypeVar

import tyro

from gradacc_hf.errors import InputError
from gradacc_hf.training.settings import ModelConfig, OptimConfig, Rules

SIZES = "a size such as 8GiB (units: GiB, GB, MiB, MB)"

# Under each field: its line of --help. `rules` says what the types alone do not: (field, possible, allowed).


@dataclass
class DataConfig:
    """The examples. A recipe adds its own fields in a subclass.

    The decorator is not `frozen=True`, because recipes of version 0.1.0 subclass this with a plain
    `@dataclass`, which Python refuses for a frozen base. Assignment raises FrozenInstanceError all the same.
    """

    _is_frozen = False

    train: str = ""
    """Training examples: CSV, JSONL or Parquet file, folder, Hub name, or embedded:NAME (no download)."""
    validation: str | None = None
    """Validation examples, written like train; without it, a share of train is held out."""
    validation_fraction: float = 0.1
    """Share of the training examples that is held out when there is no validation set (between 0 and 1)."""
    config_name: str | None = None
    """Which configuration of the Hub's data set, where it has several."""
    max_length: int = 256
    """Where an example is cut off (tokens)."""
    leave_out: list[int] = field(default_factory=list)
    """Training examples that are in no window, by the numbers that a message has named: [17]. The other
    examples stay in theirs, so that a run may go on (--resume) without these."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that the task cannot use: stop and name it, or leave it out, counted and said."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_is_frozen", True)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_frozen:
            raise FrozenInstanceError(f"cannot assign to field {name!r}: use with_settings()")
        super().__setattr__(name, value)

    def rules(self) -> Rules:
        sources = "a CSV, JSONL or Parquet file, a folder, a Hub name, or embedded:NAME"
        yield "train", self.train != "", sources
        yield "validation_fraction", 0 < self.validation_fraction < 1, "a number above 0 and below 1"
        yield "max_length", self.max_length >= 1, "1 token or more"


@dataclass(frozen=True)
class BatchConfig:
    """What one optimizer step sees, whatever the hardware."""

    effective: int | dict[int, int] | Literal["noise_scale"] = 64
    """Size of a window: examples per optimizer step, over all processes. Or sizes, each with the windows done
    when it begins: {0: 32, 500: 64}; or noise_scale: doubled when the gradient noise scale stays as large."""
    smallest: int = 16
    """With effective: noise_scale, the size of the first window."""
    largest: int = 512
    """With effective: noise_scale, the most that a window may have."""
    drop_last: bool = False
    """Leave out the last window of an epoch when it is not full."""

    @property
    def least(self) -> int:
        """Examples of the smallest windows."""
        if isinstance(self.effective, dict):
            return min(self.effective.values())
        return self.smallest if self.effective == "noise_scale" else self.effective

    def rules(self) -> Rules:
        sizes = self.effective
        if isinstance(sizes, int):
            yield "effective", sizes >= 1, "1 example or more, {0: 32, 500: 64}, or noise_scale"
        elif isinstance(sizes, dict):
            begins = "sizes of 1 or more by window, the first of which is 0: {0: 32, 500: 64}"
            yield "effective", min(sizes, default=-1) == 0 and min(sizes.values(), default=0) >= 1, begins
        yield "smallest", self.smallest >= 1, "1 example or more"
        yield "largest", self.largest >= self.smallest, f"batch.smallest ({self.smallest}) or more"
        for name in ("smallest", "largest"):
            default, grows = getattr(BatchConfig, name), sizes == "noise_scale"
            only = f"{default}, its default, unless batch.effective is noise_scale"
            yield name, grows or getattr(self, name) == default, only


@dataclass(frozen=True)
class TrainConfig:
    """How long to train and when to look."""

    epochs: int = 1
    """Passes over the training examples."""
    max_windows: int | None = None
    """Stop after this many windows (optimizer steps), whatever epochs says."""
    eval_every: int = 0
    """Windows between evaluations (0: only at the end)."""
    eval_on_start: bool = False
    """Also evaluate before the first window."""
    seed: int = 0
    """Seed of everything random."""
    early_stopping: int = 0
    """Evaluations in a row without improvement after which the run stops (0 is off)."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do with a window whose loss or gradient is NaN or infinite: stop before its step and say where
    that comes from, or leave it out. Under fp16, overflows of gradients are the scaler's to skip."""
    noise_every: int = 16
    """Windows between measurements of the gradient noise scale, for advice on the batch size; 0 is off. Runs
    of fewer than 256 windows measure more often. It changes no gradient. Every 16 windows it takes less than
    1 % of the time."""
    best_metric: str = "loss"
    """Validation metric that says which evaluation is the best."""
    best_direction: Literal["min", "max"] = "min"
    """Whether the best value of best_metric is the lowest or the highest."""

    def rules(self) -> Rules:
        yield "epochs", self.epochs >= 1, "1 or more"
        yield "max_windows", self.max_windows is None or self.max_windows >= 1, "1 window or more, or null"
        yield "eval_every", self.eval_every >= 0, "0 windows (only at the end) or more"
        yield "seed", 0 <= self.seed < 2**32, "an integer from 0 to 4294967295"
        yield "noise_every", self.noise_every >= 0, "0 windows (off) or more"
        yield "early_stopping", self.early_stopping >= 0, "0 evaluations (off) or more"


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run that is killed or stopped goes on from (--resume)."""

    every: int = 100
    """Windows between checkpoints; 0 saves one only when the run is asked to stop (SIGTERM, Ctrl-C)."""
    keep: int = 2
    """Checkpoints that are kept, the newest; that of the best evaluation stays too."""

    def rules(self) -> Rules:
        yield "every", self.every >= 0, "0 windows (only when asked to stop) or more"
        yield "keep", self.keep >= 1, "1 checkpoint or more"


@dataclass(frozen=True)
class OutputConfig:
    """What a run leaves behind."""

    dir: str | None = None
    """Folder of the run; by default the next free numbered folder under runs/."""
    overwrite: bool = False
    """Write into a folder that holds a run already."""
    tracker: str = "tensorboard"
    """Where the curves go: the name of any tracker of Accelerate, or none."""
    push_to_hub: str | None = None
    """Hub repository (NAME or USER/NAME) that best/, else last/, goes to at the end; a new one is public."""


@dataclass(frozen=True)
class BudgetConfig:
    """What the hardware allows. It changes the split and the rounding of its precision, never the windows."""

    memory: str | None = None
    """Memory per device, such as 8GiB (units: GiB, GB, MiB, MB)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the forward and backward pass."""
    max_tokens: int | Literal["auto"] = "auto"
    """Padded tokens per micro-batch; auto finds the fastest that fit: by predicted bytes where the memory is
    known, and by the time that a run's first windows take."""
    micro_batch_size: int | None = None
    """Examples per micro-batch, instead of max_tokens."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile the model's layers by torch.compile: slower to start, then faster."""
    attention: Literal["sdpa", "flash_attention_2", "eager"] | None = None
    """How attention is computed; null is the model's own choice: sdpa, but for some models eager."""
    pad_to_multiple_of: int | None = None
    """Pad micro-batches to a multiple of so many tokens, so that there are fewer shapes; null pads least."""
    cpu_offload: bool = False
    """Hold weights, gradients and optimizer states in main memory (FSDP2 only): less memory, much slower."""
    whole_gradients: bool = False
    """Under FSDP, accumulate whole gradients on every process: less communication, more memory."""
    lean_loss: bool | Literal["auto"] = "auto"
    """Compute a causal language model's logits in chunks, never all at once: auto is where they allow it."""
    num_workers: int = 0
    """Processes that collate beside training (0: the training process itself)."""

    def rules(self) -> Rules:
        tokens, examples = self.max_tokens, self.micro_batch_size
        one_of_two = (
            "null beside a number for budget.max_tokens: set one of the two, the other to null or auto"
        )
        yield "memory", self.memory is None or _bytes(self.memory) > 0, f"{SIZES}, or null"
        too_few = "auto, or 1 and more: this is a micro-batch budget smaller than one token"
        yield "max_tokens", tokens == "auto" or tokens >= 1, too_few
        yield "micro_batch_size", examples is None or examples >= 1, "1 example or more, or null"
        yield "micro_batch_size", examples is None or tokens == "auto", one_of_two
        multiple = self.pad_to_multiple_of
        yield "pad_to_multiple_of", multiple is None or multiple >= 1, "1 token or more (8, say), or null"
        yield "num_workers", self.num_workers >= 0, "0 processes or more"


@dataclass(frozen=True)
class Config:
    """Everything that a run is told. Files hold `recipe` and the sections; the first four are flags only."""

    config: str | None = None
    """YAML file that says what is trained."""
    budget_file: Annotated[str | None, tyro.conf.arg(name="budget")] = None
    """YAML file that says what it runs on, the name of one in configs/budgets, or auto (ask the machine)."""
    check: bool = False
    """Say whether this would run, print the plan, and stop. Needs no value."""
    resume: str | None = None
    """Go on from the newest checkpoint: of the run in this folder; or auto: of --output.dir, or of the latest
    run of this config, where there is one that has not ended."""
    recipe: str | None = None
    """Recipe file; a relative path starts at the config file, then at the kit."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)


FLAGS_ONLY = ("config", "budget_file", "check", "resume")


SettingsT = TypeVar("SettingsT")


def with_settings(settings: SettingsT, changes: Mapping[str, Any]) -> SettingsT:
    """Return a copy of a config, or of one of its sections, with some values changed.

    Args:
        settings: a `Config` or a section; it stays as it is.
        changes: the new values by their key: `{"optim.lr": 1e-4, "check": True}`. Their types and `rules` are
            not checked.

    Returns:
        An object of the same class.
    """
    own: dict[str, Any] = {}
    of_sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        name, _, rest = key.partition(".")
        if rest:
            of_sections.setdefault(name, {})[rest] = value
        else:
            own[name] = value
    sections = {name: with_settings(getattr(settings, name), inner) for name, inner in of_sections.items()}
    return replace(settings, **own, **sections)  # type: ignore[type-var]


def _bytes(size: str) -> int:
    """Return the bytes of a size such as "8GiB"; 0 for any other text."""
    units = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]+)?) ?(GiB|GB|MiB|MB)", size, re.IGNORECASE)
    return int(float(match[1]) * units[match[2].lower()]) if match else 0


def parse_bytes(size: str) -> int:
    """Return the bytes of a size such as "8GiB": a number and GiB, GB, MiB or MB. Raises `InputError`."""
    if not (number := _bytes(size)):
        raise InputError(f"found {size!r}, allowed is {SIZES}")
    return number


def detect_budget() -> BudgetConfig:
    """Return the budget of this machine: memory of the smallest visible GPU, and bf16 where all have it.

    Without a GPU it is the default budget. torch is imported here alone.
    """
    import torch

    if not torch.cuda.is_available():
        return BudgetConfig()
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    smallest = min(device.total_memory for device in devices)
    has_bf16 = all(device.major >= 8 for device in devices)  # Ampere was the first
    return BudgetConfig(memory=f"{smallest // 2**20}MiB", precision="bf16" if has_bf16 else "fp16")


def tokens_per_micro_batch(budget: BudgetConfig, device_type: str) -> int | None:
    """Return the padded tokens per micro-batch; None where `micro_batch_size` limits it instead.

    "auto" gives a rule of thumb: 2048 on a CPU, 1024 per GiB of a GPU's memory. It is for a model that cannot
    be traced, and for a CPU without `budget.memory`.

    Args:
        device_type: "cpu" or "cuda".

    Raises:
        InputError: where the memory of the GPU is not known.
    """
    if budget.micro_batch_size is not None:
        return None
    if budget.max_tokens != "auto":
        return budget.max_tokens
    if device_type == "cpu":
        return 2048
    memory = budget.memory or detect_budget().memory
    if memory is None:
        raise InputError(f"--budget.memory (not set): found null, allowed is {SIZES}, for max_tokens: auto")
    return max(1, 1024 * parse_bytes(memory) // 2**30)
