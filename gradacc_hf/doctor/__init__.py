"""What is wrong with my loop? `diagnose` watches anybody's for a few windows, and says.

    with gradacc_hf.diagnose(model, optimizer):
        train(...)                                   # hand-written, Accelerate's, Fabric's

For transformers' Trainer: `trainer.add_callback(gradacc_hf.DoctorCallback())`. What is seen comes from
`watch.py`, each window's gradient beside that of the window at once from `replay.py`, the rules are
`findings.py`'s.
"""

import gc
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from gradacc_hf.doctor.observer import Watch, Window
from gradacc_hf.doctor.reference import LossOf, Replay, replay, work
from gradacc_hf.doctor.rules import COUPLED, Finding, Seen, findings
from gradacc_hf.utils.modeling import disable_dropout

__all__ = ["Diagnosis", "Finding", "diagnose"]

MOST_WORK = 1.7  # of replays, by that of the windows that are watched: with all else it is less than 2
NOTHING_SEEN = "gradacc doctor: no step of this optimizer was seen after a backward of this model"


class Diagnosis:
    """What was seen of a loop; `str` of it is the report. `findings` are empty for a healthy one."""

    def __init__(
        self,
        watch: Watch,
        windows: int,
        loss_fn: LossOf | None,
        intended: int | None,
        say: Callable[[str], Any],
    ):
        self._watch, self._loss_fn, self._say = watch, loss_fn, say
        self.is_over = False
        self._to_replay, self._intended = windows, intended
        self.logged: list[tuple[int, float]] = []
        self._dropout: list[tuple[Any, str, float]] = []
        self._left: list[Any] = []
        self._horizon: int | None = None
        self._of_loop = self._of_replays = 0.0  # work of all windows, and of those replayed

    @property
    def seen(self) -> Seen:
        """All that findings are made from."""
        lengths = [length for length in self._watch.lengths if length]
        return Seen(
            windows=self._watch.windows,
            left=self._left,
            intended=self._intended,
            horizon=self._horizon,
            pass_length=lengths[0] if lengths else None,
            logged=self.logged,
            driver=self._watch.driver,
        )

    @property
    def findings(self) -> list[Finding]:
        """What is wrong, errors first."""
        return findings(self.seen)

    @property
    def healthy(self) -> bool:
        """Is nothing wrong, as far as could be seen?"""
        return bool(self._watch.windows) and not any(f.kind == "error" for f in self.findings)

    def __str__(self) -> str:
        return report(self.seen, self.findings)

    # While it is watched

    def _at_step(self, window: Window) -> None:
        watch, ends = self._watch, self._watch.at_end
        steps = max(len(w.micro_batches) for w in watch.windows)
        of_loop, at_once = work(window)
        self._of_loop += of_loop
        would_be = self._of_replays + of_loop + at_once / 3  # of a step, a forward is a third
        to_come = max(0, self._to_replay - len(watch.windows)) * of_loop
        affordable = would_be <= MOST_WORK * (self._of_loop + to_come)
        if len(watch.windows) == 1 and not affordable:
            times = f"{at_once / of_loop:.0f} × the work, most of it padding"
            window.replay = Replay(why_not=f"its examples in one batch would be {times}")
        elif affordable and (len(watch.windows) <= self._to_replay or ends or len(window) < steps):
            window.replay = replay(watch, window, self._loss_fn)
            again = (window.replay.means, window.replay.swamped)  # its micro-batches, once more for each
            times = 1 + sum(each is not None for each in again)
            self._of_replays += at_once / 3 + of_loop * times
        if len(watch.windows) < self._to_replay:
            return
        passes = [m.data_pass for m in window.micro_batches]
        length = watch.lengths[-1] if watch.lengths else None
        if len(watch.windows) > self._to_replay and (passes[0] > 1 or ends or len(window) < steps):
            self._end()  # the end of the data has been seen
        elif length is None or steps == 1 or not (length % steps or watch.ends_short):
            self._end()
        elif watch.heard_in_pass < length - 2 * steps:  # the last window will be partial, or unequal
            watch.doze(length - 2 * steps)
            self._give_back_dropout()

    def _take_dropout(self) -> None:
        self._dropout = disable_dropout(self._watch.model)

    def _give_back_dropout(self) -> None:
        for holder, name, value in self._dropout:
            setattr(holder, name, value)
        self._dropout = []

    def _end(self, broken_off: bool = False) -> None:
        """It is over, and said."""
        if self.is_over:
            return
        self.is_over = True
        self._give_back_dropout()
        if self._watch.listening and not broken_off:
            self._left = self._watch.pending
        self._watch.doze(sys.maxsize)
        self._horizon = _horizon(self._watch.optimizer)
        self._say(str(self))


@contextmanager
def diagnose(
    model: torch.nn.Module,
    optimizer: Any,
    *,
    loss_fn: LossOf | None = None,
    accumulation_steps: int | None = None,
    windows: int = 3,
    say: Callable[[str], Any] = print,
    begun: Sequence[DataLoader] = (),
) -> Iterator[Diagnosis]:
    """Watch the training loop in here, and say what is wrong with its accumulation.

    `model` and `optimizer` as the loop uses them. Of the first `windows` windows, each step's gradient is
    compared with that of the window at once, which needs the loss: the model's own, a function of torch on
    its output, or `loss_fn(outputs, inputs by name)`. Where the data end in a partial window, that is watched
    too. Dropout is off as long as it watches. `accumulation_steps`: what the loop is meant to do, where
    neither Accelerate nor its own divided loss says so. `say` is given the report, as soon as there is one.
    `begun`: loaders that the loop is reading already.
    """
    for name, number in (("windows", windows), ("accumulation_steps", accumulation_steps)):
        if number is not None and number < 1:
            raise ValueError(f"{name}: found {number}; allowed: 1 or more")
    stepped = getattr(optimizer, "optimizer", optimizer)  # Accelerate's has torch's in it
    if not isinstance(model, torch.nn.Module) or not isinstance(stepped, torch.optim.Optimizer):
        raise ValueError(
            f"diagnose(model, optimizer): found {type(model).__name__} and {type(optimizer).__name__}; "
            "allowed: a torch.nn.Module, and an optimizer of torch or what accelerator.prepare made of it"
        )
    diagnosis: Diagnosis
    watch = Watch(
        model,
        optimizer,
        at_step=lambda window: diagnosis._at_step(window),
        woken=lambda: diagnosis._take_dropout(),
        begun=begun,
    )
    diagnosis = Diagnosis(watch, windows, loss_fn, accumulation_steps, say)
    diagnosis._take_dropout()
    try:
        with watch.entered():
            yield diagnosis
    except BaseException:
        diagnosis._end(broken_off=True)  # what is left over came to no step for that
        raise
    diagnosis._end()


def _horizon(optimizer: torch.optim.Optimizer) -> int | None:
    """The steps that the optimizer's scheduler was made for, where it says so."""
    kind = torch.optim.lr_scheduler.LRScheduler
    for found in gc.get_objects():
        if issubclass(type(found), kind) and getattr(found, "optimizer", None) is optimizer:
            for name in ("T_max", "total_steps", "total_iters"):
                if isinstance(steps := getattr(found, name, None), int):
                    return steps
            for function in getattr(found, "lr_lambdas", ()):
                if isinstance(steps := getattr(function, "keywords", {}).get("num_training_steps"), int):
                    return steps
    return None


def report(seen: Seen, found: list[Finding]) -> str:
    """What was watched, each finding with its evidence, and what was found right."""
    windows = seen.windows
    if not windows:
        return NOTHING_SEEN
    counts = sorted(Counter(len(window.micro_batches) for window in windows).items(), reverse=True)
    cut = ", ".join(f"{many} with {size} micro-batch{'es' * (size > 1)}" for size, many in counts)
    if len(counts) == 1:
        cut = f"{'each ' * (len(windows) > 1)}with {cut.partition(' with ')[2]}"
    begins = windows[0].micro_batches[0].place
    where = f", the loop at {begins}" if begins is not None else ""
    lines = [f"gradacc doctor{where}: {len(windows)} window{'s' * (len(windows) > 1)} watched, {cut}"]
    for finding in found:
        sign = "✗" if finding.kind == "error" else "·"
        lines.append(f"{sign} {finding.name}: {finding.what}{' (advice)' * (finding.kind == 'advice')}")
        if finding.place is not None:
            lines.append(f"    at      {finding.place}: {finding.place.code}")
        lines += [f"    seen    {finding.evidence}", f"    so      {finding.effect}"]
        first, *more = finding.fix.splitlines()
        lines += [f"    instead {first}", *(f"            {line}" for line in more)]
    lines += [f"✓ {line}" for line in _right(seen, {finding.name for finding in found})]
    why_not = {w.replay.why_not for w in windows if w.replay is not None and w.replay.why_not}
    lines += [f"? the gradient was not compared with that of the window at once: {why}" for why in why_not]
    return "\n".join(lines)


def _right(seen: Seen, wrong: set[str]) -> Iterator[str]:
    """What was looked at and found right."""
    replays: list[Replay] = [r for _, r in seen.replays]
    errors = [r.whole.error() for r in replays if r.whole is not None]
    if errors and max(errors) <= max(r.tolerance for r in replays) and not wrong & set(COUPLED.values()):
        items = next((f", items: {r.counted}" for r in replays if r.counted), "")
        to = f"to {max(errors):.0e}" if max(errors) else "to the last bit"
        yield f"each gradient is that of its window at once, {to}{items}"
    if seen.steps > 1 and not wrong & {"zeroed_inside_the_window", "never_zeroed"}:
        yield "gradients are zeroed once a window"
    if seen.steps > 1 and not any("clipped" in name or "unscaled" in name for name in wrong):
        yield "no gradient is changed before its window is complete"
    rates = {m.lr for w in seen.windows for m in w.micro_batches}
    if len(rates) > 1 and "scheduler_per_micro_batch" not in wrong:
        yield "the learning rate moves with the steps"
    if seen.steps == 1 and not wrong:
        yield "nothing is accumulated: each step has one micro-batch"
    if not math.isfinite(sum(w.norm_at_step for w in seen.windows)):
        yield "some gradients are not finite, which says nothing of the loop"
