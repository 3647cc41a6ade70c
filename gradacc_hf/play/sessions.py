"""Browser sessions: each has a worker process, settings, and a state of playing or paused."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gradacc_hf.errors import one_line
from gradacc_hf.play.session import Picture, To
from gradacc_hf.play.settings import PlaySettings, starts_new_run
from gradacc_hf.play.workers import Worker, WorkerGoneError, Workers

SPEEDS: dict[str, tuple[To, float]] = {  # the next stop, and seconds between pictures
    "lines": ("line", 0.4),
    "micro-batches": ("micro-batch", 0.08),
    "windows": ("window", 0.08),
}
MAX_PLAY_SECONDS = 600.0  # playing pauses after this time without a click


@dataclass(frozen=True)
class PageUpdate:
    """The answer to a click.

    message: text to show; "" for none.
    is_wrong: whether the message is an error.
    has_ended: whether playing has stopped.
    picture: the picture to draw; None to keep the present one.
    """

    message: str = ""
    is_wrong: bool = False
    has_ended: bool = False
    picture: Picture | None = None


@dataclass
class BrowserSession:
    """One browser session.

    worker: the worker process.
    settings: the latest settings of the controls.
    speed: key of `SPEEDS`.
    playing: token of the `play` call that is active; another token, or None, ends that call.
    refused: the error in the values of the controls; "" for none.
    """

    worker: Worker
    settings: PlaySettings = field(default_factory=PlaySettings)
    speed: str = "micro-batches"
    playing: object | None = None
    refused: str = ""

    def take(self, settings: PlaySettings) -> None:
        """Set these settings."""
        self.settings, self.refused = settings, ""


class BrowserSessions:
    """All browser sessions, by name. Each error is returned as a message."""

    def __init__(self, workers: Workers):
        self._workers, self._lock = workers, threading.Lock()
        self._by_name: dict[str, BrowserSession] = {}
        self._left: deque[str] = deque(maxlen=1000)  # a late click of a closed page must not start a worker

    def enter(self, name: str) -> PageUpdate:
        """Return the first picture, for a page that was opened."""
        return self._ask(name, "picture")

    def leave(self, name: str) -> None:
        """End the session and the training of a page that was closed."""
        with self._lock:
            self._left.append(name)
            person = self._by_name.pop(name, None)
        if person is not None:
            person.playing = None
        self._workers.leave(name)

    def pause(self, name: str) -> PageUpdate:
        """Stop playing."""
        return self._ask(name, "picture", first=_pause)

    def go_on(self, name: str, to: To) -> PageUpdate:
        """Stop playing and advance to the next stop of this kind."""
        return self._ask(name, "advance", to, first=_pause)

    def play(self, name: str) -> Iterator[PageUpdate]:
        """Advance and yield pictures until a pause, the end of the run, or the end of the session."""
        token, until = object(), time.monotonic() + MAX_PLAY_SECONDS
        seen = self._ask(name, "picture", first=lambda person: setattr(person, "playing", token))
        person = self._by_name.get(name)
        if seen.picture is None or person is None:
            yield seen
            return
        while person.playing is token:
            begun = time.monotonic()
            if begun > until:
                yield PageUpdate("Paused after ten minutes. Press Play to continue.", has_ended=True)
                return
            to, pace = SPEEDS[person.speed]
            seen = self._ask(name, "advance", to)
            if person.playing is not token:
                return  # the click that stopped this call has drawn a later picture
            yield seen
            if seen.has_ended:
                return
            time.sleep(max(0.0, pace - (time.monotonic() - begun)))

    def set_speed(self, name: str, speed: str) -> PageUpdate:
        """Set the speed of playing."""
        return self._ask(name, "picture", first=lambda person: setattr(person, "speed", speed))

    def change(self, name: str, settings: PlaySettings) -> PageUpdate:
        """Use these settings from the next window on."""
        return self._ask(name, "change", settings, first=lambda person: person.take(settings))

    def refuse(self, name: str, why: str) -> PageUpdate:
        """Show an error until the values of the controls are allowed. The run is not affected."""
        return self._ask(name, "picture", first=lambda person: setattr(person, "refused", why))

    def restart(self, name: str, settings: PlaySettings) -> PageUpdate:
        """Begin a new run with these settings, in a new process if the training process has ended."""

        def first(person: BrowserSession) -> None:
            _pause(person)
            person.take(settings)
            if not person.worker.is_alive:
                self._workers.leave(name)
                person.worker = self._workers.of(name)

        with self._lock:
            if name in self._left:
                self._left.remove(name)
        return self._ask(name, "begin", settings, first=first)

    def _session(self, name: str) -> BrowserSession:
        with self._lock:
            if name in self._left:
                raise WorkerGoneError("this page was closed")
            if name not in self._by_name:
                self._by_name[name] = BrowserSession(self._workers.of(name))
            return self._by_name[name]

    def _ask(
        self, name: str, what: str, *given: Any, first: Callable[[BrowserSession], None] = lambda person: None
    ) -> PageUpdate:
        try:
            person = self._session(name)
            first(person)
            picture = person.worker.ask(what, *given)
        except WorkerGoneError as error:
            return PageUpdate(f"{error}: press Restart", is_wrong=True, has_ended=True)
        except Exception as error:
            return PageUpdate(one_line(error), is_wrong=True, has_ended=True)
        if person.refused:
            return PageUpdate(person.refused, is_wrong=True, picture=picture)
        if picture.is_over:
            return PageUpdate(
                "The run has ended. Press Restart to begin a new run.", has_ended=True, picture=picture
            )
        if picture.settings == person.settings:
            return PageUpdate(picture=picture)
        new_run = " and begins a new run" * starts_new_run(picture.settings, person.settings)
        return PageUpdate(f"The change takes effect at the next window{new_run}.", picture=picture)


def _pause(person: BrowserSession) -> None:
    person.playing = None
