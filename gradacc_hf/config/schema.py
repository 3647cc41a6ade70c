"""The settings of a run, typed.

`--config` names a file of what is trained, `--budget` a file of what it runs on. Settings are frozen:
`with_settings` returns a changed copy. `parser.py` reads them from files and flags.

The text under a field is its help. The first line is complete in itself: `help.py` prints it in 80 columns.
`rules` are the limits beyond the types: (field, whether its value is possible, what is allowed).
"""

import codecs
import re
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from gradacc_hf.errors import InputError
from gradacc_hf.training.settings import ModelConfig, OptimConfig, Rules

SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "\\t": "\t", "pipe": "|", "none": "\x1f"}
"""Name of a separator of a table → the character. No file has the last, so each line is one value."""
SIZES = "a size such as 8GiB (units: GiB, GB, MiB, MB)"


@dataclass
class DataConfig:
    """The examples. A recipe adds fields in a subclass.

    The decorator is not `frozen=True`, because recipes of version 0.1.0 subclass this with a plain
    `@dataclass`, which Python refuses for a frozen base. Assignment raises FrozenInstanceError anyway.
    """

    _is_frozen = False

    train: str | list[str] | list[dict[str, str]] = ""
    """Training data: files or Hub name.
    A CSV, JSONL or Parquet file, others (recipes/README.md), or a folder. Several: a list, names with commas
    between them, or a pattern such as shards/*.jsonl. embedded:NAME needs no download. A mixture: a list such
    as [{source: a.jsonl, weight: 3}, {source: b.jsonl, weight: 1}] (recipes/README.md, "Mixtures")."""
    validation: str | list[str] | None = None
    """Validation data; without it, rows of train.
    Without it: the validation split of train, or else a share of the training rows."""
    validation_split: str | None = None
    """Split of validation to use, such as test.
    null: the first of validation, valid, val, dev, test and train that it has."""
    validation_fraction: float = 0.1
    """Share of train held out for validation.
    Between 0 and 1. It is used only where there is no validation set."""
    config_name: str | None = None
    """Configuration of the Hub data set.
    Needed where the data set has several."""
    separator: str | None = None
    """Separator of a table: , ; | or tab.
    null: found in the file, and stated in the plan. Also any other character, and none for one column."""
    encoding: str | None = None
    """Encoding of text files, such as cp1252.
    null: found in each file, and stated in the plan."""
    rows_key: str | None = None
    """Key of the rows in a JSON file.
    It is needed where the file is one object with several lists of objects."""
    sheet: str | None = None
    """Sheet of an Excel file.
    null: the first."""
    max_length: int = 256
    """Most tokens of an example.
    A longer one is truncated; masked_lm and question_answering split it into several."""
    streaming: bool = False
    """Read training rows while training, not all before.
    For JSON lines, Parquet and Hub names larger than the memory. The number of rows is unknown."""
    buffer_size: int = 1000
    """Examples of a stream that are shuffled together.
    With data.streaming."""
    validation_rows: int = 1000
    """Validation rows with data.streaming: the first ones.
    Without data.validation, they are the first rows of train, and training starts after them."""
    leave_out: list[int] = field(default_factory=list)
    """Training examples to leave out, by number: [17].
    Messages name the numbers. All other examples stay in their windows, so that --resume can continue."""
    weight_column: str | None = None
    """Column with the weight of each row in the loss.
    Numbers of 0 or more. The loss is the mean over items, each with the weight of the row."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Bad rows: stop (error) or leave out (skip).
    A row is bad if the task cannot use it. Skipped rows are counted and reported."""

    def __post_init__(self) -> None:
        for name in ("train", "validation"):
            value = getattr(self, name)
            if isinstance(value, list) and all(isinstance(one, str) for one in value):
                object.__setattr__(self, name, ",".join(value))
        object.__setattr__(self, "_is_frozen", True)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_frozen:
            raise FrozenInstanceError(f"cannot assign to field {name!r}: use with_settings()")
        super().__setattr__(name, value)

    @property
    def mixture(self) -> list[dict[str, str]]:
        """The sources of a mixture; empty for a single source."""
        return [one for one in self.train if isinstance(one, dict)] if isinstance(self.train, list) else []

    def of_source(self) -> list[str]:
        """Return the settings that a source of a mixture may have for itself."""
        columns = [item.name for item in fields(self) if item.name.endswith("_column")]
        own = ["config_name", "separator", "encoding", "rows_key", "sheet", *columns]
        return own + ["format"] * hasattr(self, "format")

    def rules(self) -> Rules:
        files = "a CSV, JSONL or Parquet file, a folder, a Hub name, or embedded:NAME"
        yield "train", self.train not in ("", []), files
        if sources := self.mixture:
            known = ["source", "weight", "name", "validation", *self.of_source()]
            allowed = f"mappings with source, and any of {', '.join(known[1:])}"
            yield "train", all("source" in one and {*one} <= {*known} for one in sources), allowed
            shares = [_positive(one.get("weight", "1")) for one in sources]
            yield "train", all(shares), "a weight above 0 for each source"
            names = [source_name(one) for one in sources]
            yield "train", len({*names}) == len(names), "a different name for each source"
        separators = "one character, or comma, semicolon, tab, pipe or none"
        yield "separator", self.separator is None or _is_separator(self.separator), separators
        encodings = "an encoding of Python, such as utf-8, utf-16, latin-1, cp1252 or shift_jis"
        yield "encoding", self.encoding is None or _is_encoding(self.encoding), encodings
        yield "validation_fraction", 0 < self.validation_fraction < 1, "a number above 0 and below 1"
        yield "max_length", self.max_length >= 1, "1 token or more"
        other = "; data.validation_fraction is the share of the rows to hold out"
        for name, cure in (("buffer_size", ""), ("validation_rows", other)):
            size, default = getattr(self, name), getattr(DataConfig, name)
            yield name, size >= 1, "1 or more"
            only = f"{default}, its default, without data.streaming{cure}"
            yield name, self.streaming or size == default, only


@dataclass(frozen=True)
class BatchConfig:
    """The examples of one optimizer step, on any hardware."""

    effective: int | dict[int, int] | Literal["noise_scale"] = 64
    """Examples per optimizer step, over all processes.
    {0: 32, 500: 64}: 32 for the first 500 windows (optimizer steps), then 64.
    noise_scale: the size doubles when the gradient noise scale stays at the doubled size or above."""
    smallest: int = 16
    """Examples of the first window, with effective: noise_scale."""
    largest: int = 512
    """Most examples of a window, with effective: noise_scale."""
    drop_last: bool = False
    """Leave out the last window of an epoch if it is not full."""

    @property
    def least(self) -> int:
        """Number of examples in the smallest windows."""
        if isinstance(self.effective, dict):
            return min(self.effective.values())
        return self.smallest if self.effective == "noise_scale" else self.effective

    def rules(self) -> Rules:
        sizes = self.effective
        if isinstance(sizes, int):
            yield "effective", sizes >= 1, "1 example or more, {0: 32, 500: 64}, or noise_scale"
        elif isinstance(sizes, dict):
            begins = "sizes of 1 or more by window, the first at window 0: {0: 32, 500: 64}"
            yield "effective", min(sizes, default=-1) == 0 and min(sizes.values(), default=0) >= 1, begins
        yield "smallest", self.smallest >= 1, "1 example or more"
        yield "largest", self.largest >= self.smallest, f"batch.smallest ({self.smallest}) or more"
        for name in ("smallest", "largest"):
            default, grows = getattr(BatchConfig, name), sizes == "noise_scale"
            only = f"{default}, its default, unless batch.effective is noise_scale"
            yield name, grows or getattr(self, name) == default, only


@dataclass(frozen=True)
class TrainConfig:
    """Length of the training, and evaluations."""

    epochs: int = 1
    """Passes over the training examples."""
    max_windows: int | None = None
    """Optimizer steps (windows) after which to stop.
    It holds for any number of epochs."""
    eval_every: int | float | Literal["epoch"] | None = None
    """Windows between evaluations, or epoch, or 0.25.
    epoch: after each epoch. 0.25: after each quarter of an epoch, or another share below 1. 0: only at the
    end. null: epoch if epochs is above 1, or else 0. The end of a run is always evaluated."""
    eval_on_start: bool = False
    """Also evaluate before the first window."""
    seed: int = 0
    """Seed of all random numbers."""
    early_stopping: int = 0
    """Evaluations without improvement before stopping.
    They are counted in a row. 0: off."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A window with a NaN or infinite loss or gradient: stop before its step, or skip it.
    stop reports the examples and the module. Under fp16 the gradient scaler skips overflows in any case."""
    noise_every: int | None = None
    """Windows between measurements of the gradient noise scale (0: off).
    It is for advice on the batch size, and changes no gradient. null is 16, and less for runs of fewer than
    256 windows, or where padding is removed and a measurement takes little time."""
    best_metric: str = "loss"
    """Validation metric that ranks evaluations."""
    best_direction: Literal["min", "max"] = "min"
    """min or max: the best value of best_metric."""

    @property
    def eval_interval(self) -> "int | float | Literal['epoch']":
        """The value of `eval_every`, or else the default for this number of epochs."""
        return ("epoch" if self.epochs > 1 else 0) if self.eval_every is None else self.eval_every

    def rules(self) -> Rules:
        every = self.eval_every
        yield "epochs", self.epochs >= 1, "1 or more"
        yield "max_windows", self.max_windows is None or self.max_windows >= 1, "1 window or more, or null"
        is_share = isinstance(every, float) and 0 < every < 1
        is_number = isinstance(every, int) and every >= 0
        allowed = "0 windows (only at the end) or more, epoch, a share of an epoch such as 0.25, or null"
        yield "eval_every", every in (None, "epoch") or is_share or is_number, allowed
        yield "seed", 0 <= self.seed < 2**32, "an integer from 0 to 4294967295"
        yield "noise_every", (self.noise_every or 0) >= 0, "null, 0 windows (off) or more"
        yield "early_stopping", self.early_stopping >= 0, "0 evaluations (off) or more"


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, from which --resume continues a run that was killed or stopped."""

    every: int = 100
    """Windows between checkpoints.
    0: only when a signal stops the run (SIGTERM, Ctrl-C), and at the end."""
    keep: int = 2
    """Newest checkpoints to keep.
    The checkpoint of the best evaluation is kept too."""
    at_end: bool = True
    """Also save one at the end, for gradacc continue.
    It holds the trained weights and the states of the optimizer."""

    def rules(self) -> Rules:
        yield "every", self.every >= 0, "0 windows (only when a signal stops the run, and at the end) or more"
        yield "keep", self.keep >= 1, "1 checkpoint or more"


@dataclass(frozen=True)
class OutputConfig:
    """The files of a run, and where curves and models go."""

    dir: str | None = None
    """Run folder; null: the next free one under runs/."""
    overwrite: bool = False
    """Replace the run that dir holds."""
    tracker: str = "tensorboard"
    """Experiment tracker, or none.
    The name of any tracker of Accelerate."""
    push_to_hub: str | None = None
    """Hub repository to push the model to.
    NAME or USER/NAME. best/, or else last/, is pushed when the run ends. A new repository is public."""


@dataclass(frozen=True)
class BudgetConfig:
    """Limits of the hardware. They change micro-batches and rounding, never the windows."""

    memory: str | None = None
    """Memory per device, such as 8GiB.
    Units: GiB, GB, MiB, MB."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Compute in fp32, bf16 or fp16."""
    max_tokens: int | Literal["auto"] = "auto"
    """Padded tokens per micro-batch.
    auto: the fastest that fits, by predicted bytes (if memory is known) and by the time of first windows."""
    micro_batch_size: int | None = None
    """Examples per micro-batch.
    Instead of max_tokens."""
    gradient_checkpointing: bool = False
    """Recompute activations to save memory.
    The backward pass computes the activations a second time, which takes longer."""
    offload_activations: bool = False
    """Hold what gradient checkpointing keeps in main memory, not on the GPU.
    For long examples. Each layer then copies its input to the host and back, which takes longer. Needs
    gradient_checkpointing, a CUDA GPU and transformers 5.23 or newer."""
    compile: bool = False
    """Compile the layers with torch.compile.
    The run starts later and is then faster."""
    attention: Literal["sdpa", "flash_attention_2", "eager"] | None = None
    """Implementation of attention.
    null: the model's own choice, which is sdpa, or eager for some models."""
    pad_to_multiple_of: int | None = None
    """Multiple of tokens to which micro-batches are padded.
    There are then fewer shapes. null: the least padding."""
    cpu_offload: bool = False
    """Hold weights, gradients and optimizer states in main memory (FSDP2 only).
    Less GPU memory, and much slower."""
    whole_gradients: bool = False
    """Accumulate whole gradients on every process (FSDP only).
    Less communication, and more memory."""
    lean_loss: bool | Literal["auto"] = "auto"
    """Compute the logits of a language model at labelled tokens only, a few hundred at a time.
    auto: where the model allows it."""
    padding_free: Literal["auto", "on", "off"] = "auto"
    """Compute the layers without padding.
    auto: where that is exact, as checked on the model, and saves work. on: as auto, but the run is refused
    where padding is kept. off: never."""
    num_workers: int = 0
    """Processes that collate micro-batches (0: the training process itself).
    With data.streaming, they tokenise the stream while the model trains."""

    def rules(self) -> Rules:
        tokens, examples = self.max_tokens, self.micro_batch_size
        one_of_two = (
            "null beside a number for budget.max_tokens: set one of the two, the other to null or auto"
        )
        yield "memory", self.memory is None or _bytes(self.memory) > 0, f"{SIZES}, or null"
        too_few = "auto, or 1 or more: this is a micro-batch budget smaller than one token"
        yield "max_tokens", tokens == "auto" or tokens >= 1, too_few
        yield "micro_batch_size", examples is None or examples >= 1, "1 example or more, or null"
        yield "micro_batch_size", examples is None or tokens == "auto", one_of_two
        only = "false without budget.gradient_checkpointing: set it to true"
        yield "offload_activations", self.gradient_checkpointing or not self.offload_activations, only
        multiple = self.pad_to_multiple_of
        yield "pad_to_multiple_of", multiple is None or multiple >= 1, "1 token or more (8, say), or null"
        yield "num_workers", self.num_workers >= 0, "0 processes or more"


@dataclass(frozen=True)
class Config:
    """All settings of a run. Files hold `recipe` and the sections; the first five are flags only."""

    config: str | None = None
    """YAML file of what is trained."""
    budget_file: Annotated[str | None, tyro.conf.arg(name="budget")] = None
    """Hardware: auto, a name in configs/budgets, or a YAML file.
    auto: what the GPUs of this machine have."""
    check: bool = False
    """Check whether this would run, print the plan and stop.
    The flag needs no value."""
    resume: str | None = None
    """Continue a run: its folder, or auto for the latest one.
    It continues from the newest checkpoint.
    auto: the run in --output.dir, or else the latest run of this config unless it has ended.
    A new run starts where there is none."""
    continues: Annotated[str | None, tyro.conf.arg(name="continue")] = None
    """Train a run that has ended further: its folder.
    With --train.epochs +2 or --train.max_windows +100, as gradacc continue does."""
    recipe: str | None = None
    """Recipe file.
    A relative path starts at the folder of the config file, or else at the recipes of gradacc."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)


FLAGS_ONLY = ("config", "budget_file", "check", "resume", "continues")


SettingsT = TypeVar("SettingsT")


def with_settings(settings: SettingsT, changes: Mapping[str, Any]) -> SettingsT:
    """Return a copy of a config, or of one of its sections, with some values changed.

    Args:
        settings: a `Config` or a section; it stays as it is.
        changes: new values by key: `{"optim.lr": 1e-4, "check": True}`. Types and `rules` are not checked.

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


def source_name(source: Mapping[str, str]) -> str:
    """Return the name of a source in a mixture: its `name`, or else its file without suffixes."""
    given = source.get("source", "")
    return source.get("name") or Path(given).name.partition(".")[0] or given


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def _is_separator(text: str) -> bool:
    return text in SEPARATORS or (len(text) == 1 and not text.isalnum() and text not in '"\r\n')


def _is_encoding(name: str) -> bool:
    try:
        return codecs.lookup(name)._is_text_encoding  # type: ignore[attr-defined]
    except LookupError:
        return False


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
    """Return the budget of this machine: memory of the smallest visible GPU, and bf16 where all GPUs have it.

    Without a GPU it is the default budget. Only this function imports torch.
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

    "auto" gives a rule of thumb: 2048 on a CPU, 1024 per GiB of a GPU's memory. It holds for a model that
    cannot be traced, and for a CPU without `budget.memory`.

    Args:
        budget: The budget of the run.
        device_type: "cpu" or "cuda".

    Raises:
        InputError: If the memory of the GPU is unknown.
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
