"""One training run on the page, micro-batch by micro-batch, beside reference runs.

A `Session` trains up to three copies of a model on the same windows:

- `"shown"`: with the shown loop;
- `"at once"`: each window as one batch;
- `"ours"`: with gradacc's loop, if the shown loop has a fault.

A session does not depend on the page. `advance` runs the shown loop to the next stop. `picture` returns the
state at this stop as plain data.
"""

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from statistics import median
from typing import Any, Literal

from accelerate import Accelerator
from torch.nn.utils import clip_grad_norm_

from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.reference import (
    EXACT,
    norm,
    read_gradient,
    relative_error,
    whole_window_gradient,
)
from gradacc_hf.accumulation.splitting import Cost
from gradacc_hf.accumulation.window import Window
from gradacc_hf.doctor import Diagnosis, diagnose
from gradacc_hf.play.loops import FAULTS, Loop, Stop, line, ours, shown
from gradacc_hf.play.model_runner import WINDOWS, Player, in_precision
from gradacc_hf.play.settings import PlaySettings, starts_new_run
from gradacc_hf.play.toy_tasks import problem

FEWEST_MICRO_BATCHES = Cost(fixed=1e9)  # gives the fewest micro-batches
DIAGNOSED_WINDOWS = 3  # windows that the doctor diagnoses
MIN_TIMED_WINDOWS = 5  # times are shown after this number of windows
GRADIENT_RTOL = {"fp32": EXACT, "bf16": 2e-2}  # largest relative error of a correct gradient
To = Literal["line", "micro-batch", "window"]
Who = Literal["shown", "at once", "ours"]


@dataclass(frozen=True)
class MicroBatchShape:
    """One micro-batch of a window.

    tokens: number of tokens of each example.
    padded_to: length of each example after padding.
    """

    tokens: tuple[int, ...]
    padded_to: int


@dataclass(frozen=True)
class Memory:
    """Measured bytes of a training step.

    parameters: of the weights.
    gradients: of the gradients.
    optimizer: of the optimizer states.
    activations: of the largest micro-batch so far.
    activations_at_once: of the largest window as one batch so far.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    activations_at_once: int = 0


@dataclass(frozen=True)
class Picture:
    """The state of a session at a stop, as plain data. Numbers may be infinite or NaN.

    settings: settings of the run.
    code: lines of the shown loop.
    line: index of the latest line; None before the first line.
    stop: kind of the stop; None at the beginning of a window.
    window: number of the window, from 0.
    cells: micro-batches of the window.
    done: number of micro-batches whose backward pass is complete.
    norms: norm of the accumulated gradient after each backward pass.
    is_empty: whether the model holds no gradient.
    whole_norm: norm of the gradient of the whole window.
    largest: largest `whole_norm` so far.
    error: relative error of the accumulated gradient after the latest backward pass.
    memory: measured bytes.
    losses: loss of each window, by loop.
    changes: windows in which settings changed.
    seconds: median times of a window, in the shown loop and as one batch; 0 before enough windows were timed.
    lr: learning rate of the next step.
    doctor: verdict of the doctor.
    is_healthy: whether the doctor found no fault.
    is_over: whether the run has ended.
    """

    settings: PlaySettings
    code: tuple[str, ...]
    line: int | None
    stop: Stop | None
    window: int
    cells: tuple[MicroBatchShape, ...]
    done: int
    norms: tuple[float, ...]
    is_empty: bool
    whole_norm: float
    largest: float
    error: float
    memory: Memory
    losses: dict[Who, tuple[float, ...]]
    changes: tuple[int, ...]
    seconds: tuple[float, float]
    lr: float
    doctor: str
    is_healthy: bool
    is_over: bool

    @property
    def is_right(self) -> bool:
        """Whether the accumulated gradient equals the gradient of the whole window, up to rounding.

        Gradients vanish near a minimum. There, rounding is relative to the `largest` norm so far.
        """
        allowed = GRADIENT_RTOL[self.settings.precision]
        return self.error <= allowed or self.error * self.whole_norm <= allowed * self.largest / 10

    @property
    def has_diverged(self) -> bool:
        """Whether the accumulated gradient, or the gradient of the whole window, is not finite."""
        return not all(map(math.isfinite, (*self.norms, self.whole_norm)))


class Session:
    """A training run. A new session is at the beginning of a run."""

    def __init__(self, settings: PlaySettings = PlaySettings()):
        self._accelerator = Accelerator(cpu=True)
        self.begin(settings)

    def change(self, settings: PlaySettings) -> None:
        """Use these settings from the next window on. A new model, lengths or seed begin a new run."""
        if settings == self._wanted:
            return
        self._wanted = settings
        if self._stop is None:
            self.restart()

    def begin(self, settings: PlaySettings) -> None:
        """Begin a new run with these settings."""
        self._wanted = settings
        self.restart()

    def restart(self) -> None:
        """Begin a new run with the latest settings."""
        self.settings = settings = self._wanted
        self._problem = problem(settings.model, settings.lengths)
        self._shown, self._at_once = (Player(self._new_model(), settings) for _ in range(2))
        self._ours = None if settings.fault == "none" else Player(self._new_model(), settings)
        self._scratch = self._new_model()
        self._window_number, self._changes, self._largest = 0, [], 0.0
        self._losses: dict[Who, list[float]] = {"shown": [], "at once": []}
        if self._ours is not None:
            self._losses["ours"] = []
        self._prepare()

    def advance(self, to: To = "line") -> None:
        """Run the shown loop to the next line, the next backward pass, or the last backward pass of a window.

        Args:
            to: "line", "micro-batch" or "window".
        """
        while not self.is_over:
            self._go_on()
            backward = self._stop == "backward"
            if to == "line" or (backward and (to == "micro-batch" or self._done == len(self._cells))):
                return

    @property
    def is_over(self) -> bool:
        """Whether the last window is complete."""
        return self._window_number == WINDOWS - 1 and self._stop == "end"

    @property
    def loop(self) -> Loop:
        """The shown loop."""
        return FAULTS.get(self.settings.fault, ours)

    def picture(self) -> Picture:
        """Return the state at this stop."""
        by_loop, at_once = self._seconds
        return Picture(
            settings=self.settings,
            code=tuple(shown(self.loop)),
            line=line(self.loop, self._shown.running),
            stop=self._stop,
            window=self._window_number,
            cells=self._cells,
            done=self._done,
            norms=tuple(self._norms),
            is_empty=self._shown.is_empty,
            whole_norm=norm(self._whole),
            largest=self._largest,
            error=self._error,
            memory=self._memory,
            losses={who: tuple(losses) for who, losses in self._losses.items()},
            changes=tuple(self._changes),
            seconds=(median(by_loop), median(at_once)) if len(by_loop) >= MIN_TIMED_WINDOWS else (0.0, 0.0),
            lr=self._shown.lr,
            doctor=self._verdict,
            is_healthy=self._is_healthy,
            is_over=self.is_over,
        )

    # Windows of these settings

    def _prepare(self) -> None:
        """Make a loader and the loops, and diagnose the shown loop."""
        for player in self._players:
            player.take(self.settings)
        in_precision(self._scratch, self.settings)
        self._memory, self._seconds = Memory(), ([], [])
        self._verdict, self._is_healthy = self._diagnose_loop()
        self._loader = self._new_loader()
        self._windows = _endless(self._loader)
        self._accelerator.free_memory()  # forget models and optimizers of earlier loops
        self._shown.running = self._run(self._shown, self.loop, self._feed(self.loop))
        if self._ours is not None:
            self._ours.running = self._run(self._ours, ours, self._feed(ours))
        self._begin_window()

    @property
    def _players(self) -> list[Player]:
        return [player for player in (self._shown, self._at_once, self._ours) if player is not None]

    def _new_model(self) -> Any:
        return self._problem.make_model(self.settings.seed)

    def _new_loader(self) -> WindowLoader:
        return WindowLoader(
            self._problem.examples,
            self.settings.effective,
            micro_batch_size=self.settings.micro_batch,
            collate_fn=self._problem.collate,
            num_items=self._problem.num_items,
            cost=FEWEST_MICRO_BATCHES,
            seed=self.settings.seed + len(self._changes),  # after a change of settings, new windows
            accelerator=self._accelerator,
        )

    def _run(self, player: Player, loop: Loop, windows: Iterator[Any]) -> Iterator[Stop]:
        optimizer: Any = player.optimizer
        if loop is ours:  # a window then counts only steps of this model, not of the loop beside
            _, optimizer = self._accelerator.prepare(player.model, optimizer)
        max_norm = self.settings.max_grad_norm or math.inf
        return loop(player.model, optimizer, player.scheduler, windows, self._accelerator, max_norm)

    def _feed(self, loop: Loop) -> Iterator[Any]:
        """Yield the present window each time that a loop takes the next window."""
        while True:
            yield self._window if loop is ours else self._classic

    def _diagnose_loop(self) -> tuple[str, bool]:
        """Diagnose a copy of the shown loop for a few windows. Return the verdict and whether it is good."""
        copied = Player(self._new_model(), self.settings, like=self._shown)
        loader = self._new_loader()
        windows: Iterator[Any] = islice(_endless(loader), DIAGNOSED_WINDOWS)
        if self.loop is not ours:
            windows = (_classic(loader, window) for window in windows)
        self._accelerator.free_memory()  # forget models and optimizers of earlier loops
        asked: Any = {"windows": DIAGNOSED_WINDOWS, "accumulation_steps": self.settings.steps}
        with diagnose(copied.model, copied.optimizer, say=lambda report: None, **asked) as diagnosis:
            for _ in self._run(copied, self.loop, windows):
                pass
        if not all(map(math.isfinite, copied.losses)):
            return "the training has diverged, so gradients cannot be compared", False
        return in_a_sentence(diagnosis), diagnosis.healthy

    def _apply_settings(self) -> None:
        before, self.settings = self.settings, self._wanted
        if starts_new_run(before, self.settings):
            self.restart()
            return
        self._changes.append(self._window_number)
        if self.settings.fault != before.fault:
            self._switch_loop()
        self._prepare()

    def _switch_loop(self) -> None:
        """Switch to another loop. The new loop begins with the state of gradacc's loop."""
        right = self._ours or self._shown
        losses = self._losses.get("ours", self._losses["shown"])
        self._shown, self._ours, self._losses["shown"] = right, None, losses
        self._losses.pop("ours", None)
        if self.settings.fault != "none":
            self._ours, self._losses["ours"] = right, list(losses)
            self._shown = Player(self._new_model(), self.settings, like=right)

    # One window

    def _begin_window(self) -> None:
        """Take the next window, train on the window as one batch, and compute the reference gradient."""
        self._window: Window = next(self._windows)
        self._classic = _classic(self._loader, self._window)
        self._cells = tuple(map(self._shape, _micro_batches(self._loader, self._window)))
        self._stop: Stop | None = None
        self._done, self._norms, self._error, self._busy = 0, [], math.nan, 0.0
        whole = self._loader.collated(self._window.indices).batch
        self._scratch.load_state_dict(self._shown.model.state_dict())
        self._whole = whole_window_gradient(self._scratch, whole)
        for player in self._players:
            player.losses = []
        begun = time.perf_counter()
        self._at_once.model(**whole).loss.backward()
        self._seconds[1].append(time.perf_counter() - begun)
        clip_grad_norm_(self._at_once.model.parameters(), self.settings.max_grad_norm or math.inf)
        self._at_once.optimizer.step()
        self._at_once.optimizer.zero_grad()
        self._at_once.scheduler.step()

    def _shape(self, indices: Any) -> MicroBatchShape:
        tokens = tuple(len(self._problem.examples[i].get("input_ids", [0])) for i in indices)
        return MicroBatchShape(tokens, max(tokens))

    def _go_on(self) -> None:
        """Run the shown loop to the next stop, and gradacc's loop, if there are two, to the same stop."""
        if self._stop == "end":
            self._window_number += 1
            if self._wanted != self.settings:
                self._apply_settings()
            else:
                self._begin_window()
        begun = time.perf_counter()
        self._stop = next(self._shown.running)
        if self._stop in ("forward", "backward"):
            self._busy += time.perf_counter() - begun
        if self._stop == "backward":
            self._look()
        if self._ours is not None and self._stop in ("backward", "end"):
            while next(self._ours.running) != self._stop:
                pass
        if self._stop == "backward" and self._done == len(self._cells):
            self._seconds[0].append(self._busy)
            self._losses["at once"].append(self._at_once.losses[0])
            trained: tuple[tuple[Who, Player | None], ...] = (("shown", self._shown), ("ours", self._ours))
            for who, player in trained:
                if player is not None:
                    shares = [share for _, share in self._classic]
                    mean = sum(n * loss for n, loss in zip(shares, player.losses, strict=True))
                    self._losses[who].append(mean)

    def _look(self) -> None:
        """Measure the gradient and the memory."""
        self._done += 1
        gradient = read_gradient(self._shown.model)
        self._norms.append(norm(gradient))
        self._largest = max(self._largest, norm(self._whole))
        self._error = relative_error(gradient, self._whole)
        held = self._shown.bytes_held()
        # Optimizer states have the same size in both runs. The run "at once" has them before the first step.
        held["optimizer"] = self._at_once.bytes_held()["optimizer"]
        self._memory = replace(
            self._memory,
            **held,
            activations=max(self._memory.activations, self._shown.activations),
            activations_at_once=max(self._memory.activations_at_once, self._at_once.activations),
        )


def in_a_sentence(diagnosis: Diagnosis) -> str:
    """Return the first finding with its evidence, or the first check that passed."""
    if found := diagnosis.findings:
        return f"{found[0].what}: {re.sub(r' [(][^)]*[)]', '', found[0].evidence)}"
    right = [said.removeprefix("✓ ") for said in str(diagnosis).splitlines() if said.startswith("✓ ")]
    return right[0].partition(", to ")[0] if right else "no check was possible"


def _endless(loader: WindowLoader) -> Iterator[Window]:
    while True:
        yield from loader


def _micro_batches(loader: WindowLoader, window: Window) -> Any:
    return loader.split(window.epoch, window.number).processes[0]


def _classic(loader: WindowLoader, window: Window) -> list[tuple[Any, float]]:
    """Return the micro-batches of a window for the classic loop, each with its share of the items."""
    collated = [loader.collated(indices) for indices in _micro_batches(loader, window)]
    return [(each.batch, each.num_items / window.num_items) for each in collated]
