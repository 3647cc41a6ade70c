"""The settings of a run on the page, and their allowed values."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from gradacc_hf.accumulation.batch_schedule import LrScaling, lr_factor
from gradacc_hf.errors import InputError

ModelName = Literal["line through eight samples", "small transformer", "small transformer with BatchNorm"]
Lengths = Literal["equal", "long-tailed"]
Precision = Literal["fp32", "bf16"]
Fault = Literal[
    "none",
    "zeroed too early",
    "step on every micro-batch",
    "not divided",
    "divided by steps, not items",
    "scheduler on every micro-batch",
]
LINE, TRANSFORMER, WITH_BATCH_NORM = get_args(ModelName)
REFERENCE_EXAMPLES = 16  # of the window to which the learning rate refers
MAX_SETTING = {"micro_batch": 32, "steps": 16, "seed": 9999, "lr": 10.0, "max_grad_norm": 1000.0}
MAX_WINDOW_EXAMPLES = {LINE: 8, TRANSFORMER: 64, WITH_BATCH_NORM: 64}  # of a window


@dataclass(frozen=True)
class PlaySettings:
    """The settings of a run.

    model: the model to train.
    micro_batch: examples per micro-batch.
    steps: micro-batches per window.
    lr: learning rate for windows of 16 examples.
    lr_scaling: rule that scales the learning rate with the size of the window.
    max_grad_norm: norm at which gradients are clipped; 0 for no clipping.
    precision: precision of the forward pass.
    lengths: lengths of the examples.
    fault: the mistake in the shown loop.
    seed: seed of the weights and of the order of examples.

    Raises:
        InputError: if a value is not allowed.
    """

    model: ModelName = "small transformer"
    micro_batch: int = 4
    steps: int = 4
    lr: float = 0.2
    lr_scaling: LrScaling = "none"
    max_grad_norm: float = 0.0
    precision: Precision = "fp32"
    lengths: Lengths = "long-tailed"
    fault: Fault = "none"
    seed: int = 0

    def __post_init__(self):
        for name, kind in (
            ("model", ModelName),
            ("lr_scaling", LrScaling),
            ("precision", Precision),
            ("lengths", Lengths),
            ("fault", Fault),
        ):
            if getattr(self, name) not in get_args(kind):
                _refuse(name, getattr(self, name), f"one of: {', '.join(get_args(kind))}")
        for name in ("micro_batch", "steps", "seed"):
            least = int(name != "seed")
            if not _is_whole(value := getattr(self, name)) or not least <= value <= MAX_SETTING[name]:
                _refuse(name, value, f"a whole number from {least} to {MAX_SETTING[name]}")
        for name in ("lr", "max_grad_norm"):
            value, least = getattr(self, name), "above 0" if name == "lr" else "from 0 (off)"
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not (0 < value <= MAX_SETTING[name] or (value == 0 and name != "lr")):
                _refuse(name, value, f"a number {least} to {MAX_SETTING[name]:g}")
        if self.effective > (most := MAX_WINDOW_EXAMPLES[self.model]):
            product = f"{self.micro_batch} × {self.steps} = {self.effective}"
            _refuse("effective", product, f"up to {most} examples per window with the model '{self.model}'")

    @property
    def effective(self) -> int:
        """Effective batch size: examples per window."""
        return self.micro_batch * self.steps

    @property
    def lr_in_use(self) -> float:
        """Initial learning rate, scaled by `lr_scaling`."""
        return self.lr * lr_factor(self.lr_scaling, self.effective, REFERENCE_EXAMPLES)


def fitting(model: ModelName) -> dict[str, Any]:
    """Return the sizes and the learning rate that suit a model."""
    if model == LINE:
        return {"micro_batch": 2, "steps": 2, "lr": 0.01}
    return {name: getattr(PlaySettings, name) for name in ("micro_batch", "steps", "lr")}


def starts_new_run(before: PlaySettings, after: PlaySettings) -> bool:
    """Whether this change of settings begins a new run."""
    return any(getattr(before, name) != getattr(after, name) for name in ("model", "lengths", "seed"))


def steps_of(effective: Any, micro_batch: Any) -> int:
    """Return the accumulation steps for an effective batch size.

    Raises:
        InputError: if the effective batch size is not a multiple of the micro-batch size.
    """
    if not _is_whole(micro_batch) or micro_batch < 1:
        _refuse("micro_batch", micro_batch, f"a whole number from 1 to {MAX_SETTING['micro_batch']}")
    if not _is_whole(effective) or not 1 <= effective <= max(MAX_WINDOW_EXAMPLES.values()):
        _refuse("effective", effective, f"a whole number from 1 to {max(MAX_WINDOW_EXAMPLES.values())}")
    if effective % micro_batch:
        _refuse("effective", effective, f"a multiple of the micro-batch size, {micro_batch}")
    return effective // micro_batch


DISPLAY_NAMES = {
    "micro_batch": "micro-batch size",
    "steps": "accumulation steps",
    "effective": "effective batch size",
    "lr": "learning rate",
    "lr_scaling": "learning rate scaling",
    "max_grad_norm": "clipping",
}


def _refuse(name: str, value: Any, allowed: str) -> None:
    found = "nothing" if value is None else value
    raise InputError(f"{DISPLAY_NAMES.get(name, name)}: found {found}; allowed: {allowed}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
