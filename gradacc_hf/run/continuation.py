"""`gradacc continue`: train a run that has ended further, from its last state, in its folder.

A run keeps its last state in `checkpoints/`. A continuation is a resumed run with a larger `train.epochs` or
`train.max_windows`. `continued.json` in the folder of the run lists the continuations, so that a continuation
that was stopped can be resumed.

Without a setting of the schedule, the recorded schedule is stretched over the longer run. The learning rate
of each further window is then the rate that a run of this length has there. With one of `SCHEDULE`, a new
schedule runs over the further windows alone.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from gradacc_hf.accumulation.batch_schedule import GrowingBatch
from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.sampler import WindowPlan
from gradacc_hf.config.batch_size import effective_batch_size
from gradacc_hf.config.schema import Config
from gradacc_hf.errors import InputError, refuse
from gradacc_hf.training.checkpoint import Checkpoint
from gradacc_hf.training.optimizer import learning_rate
from gradacc_hf.training.run_log import HISTORY, read_history
from gradacc_hf.utils.files import write_whole
from gradacc_hf.utils.redaction import redact

FILE = "continued.json"
LENGTHS = ("train.epochs", "train.max_windows")
SCHEDULE = (
    "optim.lr",
    "optim.scheduler",
    "optim.warmup_ratio",
    "optim.decay_ratio",
    "optim.min_lr_ratio",
)
FREE = (*LENGTHS, *SCHEDULE, "train.eval_every", "train.early_stopping", "optim.max_grad_norm")
"""Settings that a continuation may change, beside the settings that a resumed run may change."""


@dataclass(frozen=True)
class Part:
    """One continuation of a run.

    after: windows of the run before it.
    schedule_after: windows of the run before its learning rate schedule begins; 0 for a stretched schedule.
    settings: the values of `FREE`.
    flags: the flags of its command.
    """

    after: int
    schedule_after: int
    settings: Mapping[str, Any]
    flags: Sequence[str]


@dataclass(frozen=True)
class Continuations:
    """All continuations of a run, and the command that started the run."""

    command: str = ""
    parts: tuple[Part, ...] = ()

    @property
    def after(self) -> int:
        """The windows of the run before the latest continuation; 0 without one."""
        return self.parts[-1].after if self.parts else 0

    @property
    def schedule_after(self) -> int:
        """The windows of the run before the present schedule begins."""
        return self.parts[-1].schedule_after if self.parts else 0

    def commands(self, run: Path) -> str:
        """Return the command lines that started the run and continued it."""
        again = [shlex.join(["gradacc", "continue", str(run), *part.flags]) for part in self.parts]
        return " && ".join([self.command, *again])


def read_continuations(run: Path) -> Continuations:
    """Return the continuations of the run in this folder; none if there is no run."""
    file = run / FILE
    if not file.is_file():
        return Continuations()
    found = json.loads(file.read_text(encoding="utf-8"))
    return Continuations(found["command"], tuple(Part(**part) for part in found["parts"]))


def write_continuation(run: Path, continuations: Continuations) -> None:
    """Mark an ended run as continued. A kill at any place leaves a run that can be resumed."""
    (run / "summary.json").unlink(missing_ok=True)  # its presence means that the run has ended
    write_whole(run / FILE, json.dumps(asdict(continuations), indent=2) + "\n")


def with_absolute_lengths(argv: Sequence[str]) -> list[str]:
    """Return the words of a command line. With --continue, +2 epochs and +100 windows become totals.

    Where only one of epochs and windows is given, the other does not limit the run.
    """
    words = _split(argv)
    run = next((Path(value) for flag, value in words if flag == "--continue" and value), None)
    if run is None or not (run / "config.yaml").is_file():
        return [*argv]
    for flag, _ in words:
        if flag in ("--output.dir", "--output.overwrite"):
            refuse(flag, f"{run} is continued in its folder", "leave it out")
    had = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["train"]
    rows = read_history(run / HISTORY, 10**12)
    done, begun = len(rows), rows[-1].epoch + 1 if rows else 0
    totals = {"--train.epochs": min(had["epochs"], begun), "--train.max_windows": done}
    given = [flag for flag, _ in words if flag in totals]
    if not given:
        found = f"{run} has ended after {done} windows, and no length is given"
        refuse("--continue", found, "add --train.epochs +1, or --train.max_windows +100")
    for number, (flag, value) in enumerate(words):
        if flag in totals and value and value.startswith("+"):
            words[number] = flag, _sum(flag, totals[flag], value)
    if "--train.max_windows" not in given:
        words.append(("--train.max_windows", "null"))
    return [word for flag, value in words for word in ([flag] if value is None else [flag, value])]


def _split(argv: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return (flag, value) of each flag, where --flag=value counts as --flag value."""
    words = list[tuple[str, str | None]]()
    for word in argv:
        if words and not word.startswith("--") and words[-1][1] is None:
            words[-1] = words[-1][0], word
        else:
            flag, equals, value = word.partition("=")
            words.append((flag, value) if equals and word.startswith("--") else (word, None))
    return words


def _sum(flag: str, total: int, value: str) -> str:
    if not value[1:].isdecimal():
        refuse(flag, f"found {value!r}", "allowed: a total such as 3, or a number to add such as +2")
    return str(total + int(value))


def begin(run: Path, has_ended: bool, checkpoint: Checkpoint | None, argv: Sequence[str]) -> Continuations:
    """Return the continuations of a run, with a new one that has no settings yet.

    Raises:
        InputError: for a run that has not ended, or without its last state.
    """
    if not has_ended:
        cure = f"resume it first: --resume {run}"
        refuse("--continue", f"{run} has not ended", cure)
    done = len(read_history(run / HISTORY, 10**12))
    if checkpoint is None or not checkpoint.is_at_end or checkpoint.window != done:
        found = f"{run / 'checkpoints'} does not hold the state after the last window, {done}"
        refuse("--continue", found, f"start a new run from its model: --model.name {run}")
    before = read_continuations(run)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    given = [(flag, value) for flag, value in _split(argv) if flag != "--continue" and value != "null"]
    flags = [word for flag, value in given for word in (flag, value) if word]
    is_new = any(flag[2:] in SCHEDULE for flag, _ in _split(argv))
    part = Part(done, done if is_new else before.schedule_after, {}, redact(flags))
    return Continuations(before.command or summary.get("command") or "", (*before.parts, part))


def with_settings_of(continuations: Continuations, same: Mapping[str, Any]) -> Continuations:
    """Return the continuations, with the settings of the latest."""
    *parts, latest = continuations.parts
    latest = replace(latest, settings={key: same[key] for key in FREE})
    return replace(continuations, parts=(*parts, latest))


def with_free_settings(checkpoint: Checkpoint, continuations: Continuations) -> Checkpoint:
    """Return the checkpoint as a run with these continuations compares its settings.

    At the start of a continuation, the checkpoint has the settings from before.
    """
    if not continuations.parts or checkpoint.window != continuations.after:
        return checkpoint
    same = {key: value for key, value in checkpoint.about["same"].items() if key not in FREE}
    same |= continuations.parts[-1].settings
    return replace(checkpoint, about={**checkpoint.about, "same": same})


def epochs_that_suffice(config: Config, num_examples: int, argv: Sequence[str]) -> int:
    """Return `train.epochs`, or as many as `train.max_windows` needs where only this is given.

    The length of a stream is unknown, so that its epochs stay.
    """
    most, epochs = config.train.max_windows, config.train.epochs
    if most is None or config.data.streaming or any(flag == "--train.epochs" for flag, _ in _split(argv)):
        return epochs
    sizes = effective_batch_size(config.batch, num_examples)
    plan = WindowPlan(num_examples, sizes, config.train.seed, shuffle=True, drop_last=config.batch.drop_last)
    total = sum(map(plan.num_windows, range(epochs)))
    while total < most and plan.num_windows(epochs):
        total, epochs = total + plan.num_windows(epochs), epochs + 1
    return epochs


def check_longer(continuations: Continuations, num_windows: int | None) -> None:
    """Raise InputError if a continuation adds no window. The length of a stream is unknown."""
    done = continuations.after
    if num_windows is not None and num_windows <= done:
        found = f"the run would have {num_windows} windows, and it has ended after {done}"
        refuse("--continue", found, "give more: --train.epochs +1, or --train.max_windows +100")


def lines_of(
    config: Config, continuations: Continuations, windows: WindowLoader, num_windows: int | None
) -> list[tuple[str, str]]:
    """Return (name, text) of the lines of a plan about the latest continuation."""
    done, start, optim = continuations.after, continuations.schedule_after, config.optim
    end = "the last" if num_windows is None else f"{num_windows:,}"
    stretched = f"stretched over windows {start + 1:,} to {end}"
    how = f"{optim.scheduler}, {'new from window ' + format(done + 1, ',') if start == done else stretched}"
    sizes = windows.plan.effective_batch_size
    if isinstance(sizes, GrowingBatch) and start:
        found = "a new schedule needs windows of known sizes, and batch.effective is noise_scale"
        raise InputError(f"optim.lr: {found}; leave out {', '.join(f'--{key}' for key in SCHEDULE)}")
    if not callable(sizes):
        first = learning_rate(optim, done + 1, num_windows, start)
        last = learning_rate(optim, num_windows or done + 1, num_windows, start)
        how += f"; learning rate {first:.3g} at window {done + 1:,}, {last:.3g} at window {end}"
    return [("continue", f"windows {done + 1:,} to {end}"), ("schedule", how)]
