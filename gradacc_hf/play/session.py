"""One person's training run, micro-batch by micro-batch, and what it is seen beside.

A `Session` trains up to three copies of a model on the same windows: by the loop that is shown, at once (each
window as one batch), and, where the loop shown has a fault, by the kit's. It knows no page: `advance` goes on
to a stop of the loop shown, `picture` is what there is to see there, as plain data.
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

from gradacc_hf.accumulation.accelerate_state import forget_prepared_optimizers
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
from gradacc_hf.play.settings import Settings, begins_anew
from gradacc_hf.play.toy_tasks import problem

CUT = Cost(fixed=1e9)  # into as few micro-batches as there can be
LOOKED_AT = 3  # windows, by the doctor
WARM = 5  # windows, before times are said
TOLERANCE = {"fp32": EXACT, "bf16": 2e-2}  # relative error of a gradient that is right
To = Literal["line", "micro-batch", "window"]
Who = Literal["shown", "at once", "ours"]


@dataclass(frozen=True)
class Cell:
    """One micro-batch of a window: the tokens of each example, and what they are padded to."""

    tokens: tuple[int, ...]
    padded_to: int


@dataclass(frozen=True)
class Memory:
    """Bytes that a step holds, measured: weights, gradients, the optimizer's states, and the activations that
    a forward keeps for its backward, of the largest micro-batch so far and of the largest window at once.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    activations_at_once: int = 0


@dataclass(frozen=True)
class Picture:
    """What there is to see at a stop.

    `cells`: the window's micro-batches, of which so many are `done`. `norms`: of the accumulated gradient
    after each one's backward; `is_empty`: there is none by now. `whole_norm`: of the window at once, the
    `largest` so far; `error`: how far the gradient was from it after the latest backward, relative.
    `losses`: of each window, by whose loop. `changes`: windows with which settings changed. `seconds`: of a
    window's forwards and backwards, by the loop shown and at once, medians so far; 0 before there are some.
    What is not finite is as it is.
    """

    settings: Settings
    code: tuple[str, ...]
    line: int | None
    stop: Stop | None
    window: int
    cells: tuple[Cell, ...]
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
        """Is the accumulated gradient that of the window at once, to the rounding of the precision?

        Near a minimum, where gradients vanish, rounding is that of the `largest` norm that there was.
        """
        allowed = TOLERANCE[self.settings.precision]
        return self.error <= allowed or self.error * self.whole_norm <= allowed * self.largest / 10

    @property
    def has_diverged(self) -> bool:
        """Is the gradient, or that of the window at once, not finite?"""
        return not all(map(math.isfinite, (*self.norms, self.whole_norm)))


class Session:
    """A run of one person's, at its beginning when it is made."""

    def __init__(self, settings: Settings = Settings()):
        self._accelerator = Accelerator(cpu=True)
        self.begin(settings)

    def change(self, settings: Settings) -> None:
        """Go on with these from the next window on; with another model, lengths or seed begin anew there."""
        if settings == self._wanted:
            return
        self._wanted = settings
        if self._stop is None:
            self.restart()

    def begin(self, settings: Settings) -> None:
        """Begin anew, with these."""
        self._wanted = settings
        self.restart()

    def restart(self) -> None:
        """Begin anew, with the settings that are wanted."""
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
        """Go on: to the next line of the loop's, its next backward, or the last backward of a window."""
        while not self.is_over:
            self._go_on()
            backward = self._stop == "backward"
            if to == "line" or (backward and (to == "micro-batch" or self._done == len(self._cells))):
                return

    @property
    def is_over(self) -> bool:
        """Has it come to the end of its windows?"""
        return self._window_number == WINDOWS - 1 and self._stop == "end"

    @property
    def loop(self) -> Loop:
        """The one that is shown."""
        return FAULTS.get(self.settings.fault, ours)

    def picture(self) -> Picture:
        """What there is to see."""
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
            seconds=(median(by_loop), median(at_once)) if len(by_loop) >= WARM else (0.0, 0.0),
            lr=self._shown.lr,
            doctor=self._doctor_says,
            is_healthy=self._is_healthy,
            is_over=self.is_over,
        )

    # Windows of these settings

    def _prepare(self) -> None:
        """A loader, the loops, and what the doctor says of the one that is shown."""
        for player in self._players:
            player.take(self.settings)
        in_precision(self._scratch, self.settings)
        self._memory, self._seconds = Memory(), ([], [])
        self._doctor_says, self._is_healthy = self._ask_the_doctor()
        self._loader = self._new_loader()
        self._windows = _endless(self._loader)
        forget_prepared_optimizers(self._accelerator)
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
            cost=CUT,
            seed=self.settings.seed + len(self._changes),  # else the same examples would come again
            accelerator=self._accelerator,
        )

    def _run(self, player: Player, loop: Loop, windows: Iterator[Any]) -> Iterator[Stop]:
        optimizer: Any = player.optimizer
        if loop is ours:
            optimizer = self._accelerator.prepare_optimizer(optimizer)
        max_norm = self.settings.max_grad_norm or math.inf
        return loop(player.model, optimizer, player.scheduler, windows, self._accelerator, max_norm)

    def _feed(self, loop: Loop) -> Iterator[Any]:
        """The window at hand, whenever a loop asks for the next."""
        while True:
            yield self._window if loop is ours else self._classic

    def _ask_the_doctor(self) -> tuple[str, bool]:
        """What it says of the loop shown, which trains a copy for a few windows. Is it healthy?"""
        copied = Player(self._new_model(), self.settings, like=self._shown)
        loader = self._new_loader()
        windows: Iterator[Any] = islice(_endless(loader), LOOKED_AT)
        if self.loop is not ours:
            windows = (_classic(loader, window) for window in windows)
        forget_prepared_optimizers(self._accelerator)
        asked: Any = {"windows": LOOKED_AT, "accumulation_steps": self.settings.steps}
        with diagnose(copied.model, copied.optimizer, say=lambda report: None, **asked) as diagnosis:
            for _ in self._run(copied, self.loop, windows):
                pass
        if not all(map(math.isfinite, copied.heard)):
            return "the training has diverged: no gradient of it can be compared", False
        return in_a_sentence(diagnosis), diagnosis.healthy

    def _take_what_is_wanted(self) -> None:
        before, self.settings = self.settings, self._wanted
        if begins_anew(before, self.settings):
            self.restart()
            return
        self._changes.append(self._window_number)
        if self.settings.fault != before.fault:
            self._go_on_from_ours()
        self._prepare()

    def _go_on_from_ours(self) -> None:
        """Another loop is to be shown: it begins where the kit's is."""
        right = self._ours or self._shown
        losses = self._losses.get("ours", self._losses["shown"])
        self._shown, self._ours, self._losses["shown"] = right, None, losses
        self._losses.pop("ours", None)
        if self.settings.fault != "none":
            self._ours, self._losses["ours"] = right, list(losses)
            self._shown = Player(self._new_model(), self.settings, like=right)

    # One window

    def _begin_window(self) -> None:
        """Take the next one; train at once on it, and know the gradient that the loop shown is to come to."""
        self._window: Window = next(self._windows)
        self._classic = _classic(self._loader, self._window)
        self._cells = tuple(map(self._cell, _pieces(self._loader, self._window)))
        self._stop: Stop | None = None
        self._done, self._norms, self._error, self._busy = 0, [], math.nan, 0.0
        whole = self._loader.collated(self._window.indices).batch
        self._scratch.load_state_dict(self._shown.model.state_dict())
        self._whole = whole_window_gradient(self._scratch, whole)
        for player in self._players:
            player.heard = []
        begun = time.perf_counter()
        self._at_once.model(**whole).loss.backward()
        self._seconds[1].append(time.perf_counter() - begun)
        clip_grad_norm_(self._at_once.model.parameters(), self.settings.max_grad_norm or math.inf)
        self._at_once.optimizer.step()
        self._at_once.optimizer.zero_grad()
        self._at_once.scheduler.step()

    def _cell(self, piece: Any) -> Cell:
        tokens = tuple(len(self._problem.examples[i].get("input_ids", [0])) for i in piece)
        return Cell(tokens, max(tokens))

    def _go_on(self) -> None:
        """To the next stop of the loop shown; the kit's, where there is one beside it, keeps up."""
        if self._stop == "end":
            self._window_number += 1
            if self._wanted != self.settings:
                self._take_what_is_wanted()
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
            self._losses["at once"].append(self._at_once.heard[0])
            trained: tuple[tuple[Who, Player | None], ...] = (("shown", self._shown), ("ours", self._ours))
            for who, player in trained:
                if player is not None:
                    shares = [share for _, share in self._classic]
                    mean = sum(n * loss for n, loss in zip(shares, player.heard, strict=True))
                    self._losses[who].append(mean)

    def _look(self) -> None:
        """At the gradient, and what is held."""
        self._done += 1
        gradient = read_gradient(self._shown.model)
        self._norms.append(norm(gradient))
        self._largest = max(self._largest, norm(self._whole))
        self._error = relative_error(gradient, self._whole)
        held = self._shown.bytes_held()
        held["optimizer"] = self._at_once.bytes_held()[
            "optimizer"
        ]  # the same, and there before the first step
        self._memory = replace(
            self._memory,
            **held,
            activations=max(self._memory.activations, self._shown.activations),
            activations_at_once=max(self._memory.activations_at_once, self._at_once.activations),
        )


def in_a_sentence(diagnosis: Diagnosis) -> str:
    """What the doctor says: the first finding with its evidence, or what it found right."""
    if found := diagnosis.findings:
        return f"{found[0].what}: {re.sub(r' [(][^)]*[)]', '', found[0].evidence)}"
    right = [said.removeprefix("✓ ") for said in str(diagnosis).splitlines() if said.startswith("✓ ")]
    return right[0].partition(", to ")[0] if right else "nothing was seen"


def _endless(loader: WindowLoader) -> Iterator[Window]:
    while True:
        yield from loader


def _pieces(loader: WindowLoader, window: Window) -> Any:
    return loader.split(window.epoch, window.number).processes[0]


def _classic(loader: WindowLoader, window: Window) -> list[tuple[Any, float]]:
    """A window for a loop without the kit: its micro-batches, each with its share of the items."""
    collated = [loader.collated(piece) for piece in _pieces(loader, window)]
    return [(each.batch, each.num_items / window.num_items) for each in collated]
