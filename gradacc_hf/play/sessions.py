"""Who looks at the page, and what their clicks do: each has a worker, settings, and plays or pauses."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gradacc_hf.errors import one_line
from gradacc_hf.play.session import Picture, To
from gradacc_hf.play.settings import Settings, begins_anew
from gradacc_hf.play.workers import Worker, WorkerGoneError, Workers

SPEEDS: dict[str, tuple[To, float]] = {  # to where, and seconds from one picture to the next
    "lines": ("line", 0.4),
    "micro-batches": ("micro-batch", 0.08),
    "windows": ("window", 0.08),
}
LONGEST_PLAY = 600.0  # seconds without a click


@dataclass(frozen=True)
class Seen:
    """What a click comes to: a message, "" for none, and a picture. `is_wrong`: it says what is wrong;
    `has_ended`: nothing plays any more.
    """

    message: str = ""
    is_wrong: bool = False
    has_ended: bool = False
    picture: Picture | None = None


@dataclass
class Person:
    """One of them. `playing`: a token; who plays goes on as long as it is theirs."""

    worker: Worker
    settings: Settings = field(default_factory=Settings)
    speed: str = "micro-batches"
    playing: object | None = None
    refused: str = ""  # why what stands in a control is not taken

    def take(self, settings: Settings) -> None:
        """They have set these."""
        self.settings, self.refused = settings, ""


class People:
    """All of them, by the name of their browser's session. Whatever goes wrong is a message."""

    def __init__(self, workers: Workers):
        self._workers, self._lock = workers, threading.Lock()
        self._by_name: dict[str, Person] = {}
        self._left: deque[str] = deque(maxlen=1000)  # what they have clicked last may come later

    def enter(self, name: str) -> Seen:
        """Somebody opens the page."""
        return self._ask(name, "picture")

    def leave(self, name: str) -> None:
        """The page is closed: their training ends."""
        with self._lock:
            self._left.append(name)
            person = self._by_name.pop(name, None)
        if person is not None:
            person.playing = None
        self._workers.leave(name)

    def pause(self, name: str) -> Seen:
        """Stop where it is."""
        return self._ask(name, "picture", first=_pause)

    def go_on(self, name: str, to: To) -> Seen:
        """Go on by so much, and pause there."""
        return self._ask(name, "advance", to, first=_pause)

    def play(self, name: str) -> Iterator[Seen]:
        """Go on and on, until there is a pause, the end, or nobody."""
        token, until = object(), time.monotonic() + LONGEST_PLAY
        seen = self._ask(name, "picture", first=lambda person: setattr(person, "playing", token))
        person = self._by_name.get(name)
        if seen.picture is None or person is None:
            yield seen
            return
        while person.playing is token:
            begun = time.monotonic()
            if begun > until:
                yield Seen("Paused after ten minutes: press play to go on.", has_ended=True)
                return
            to, pace = SPEEDS[person.speed]
            seen = self._ask(name, "advance", to)
            if person.playing is not token:
                return  # what came in between has shown what there is to see
            yield seen
            if seen.has_ended:
                return
            time.sleep(max(0.0, pace - (time.monotonic() - begun)))

    def set_speed(self, name: str, speed: str) -> Seen:
        """How fast it plays, from now on."""
        return self._ask(name, "picture", first=lambda person: setattr(person, "speed", speed))

    def change(self, name: str, settings: Settings) -> Seen:
        """Go on with these settings, from the next window on."""
        return self._ask(name, "change", settings, first=lambda person: person.take(settings))

    def refuse(self, name: str, why: str) -> Seen:
        """What stands in a control cannot be, which is said until it can; all goes on as it was."""
        return self._ask(name, "picture", first=lambda person: setattr(person, "refused", why))

    def restart(self, name: str, settings: Settings) -> Seen:
        """Begin anew, with these settings; also where the training process has ended."""

        def first(person: Person) -> None:
            _pause(person)
            person.take(settings)
            if not person.worker.is_alive:
                self._workers.leave(name)
                person.worker = self._workers.of(name)

        with self._lock:
            if name in self._left:
                self._left.remove(name)
        return self._ask(name, "begin", settings, first=first)

    def _person(self, name: str) -> Person:
        with self._lock:
            if name in self._left:
                raise WorkerGoneError("this page was closed")
            if name not in self._by_name:
                self._by_name[name] = Person(self._workers.of(name))
            return self._by_name[name]

    def _ask(
        self, name: str, what: str, *given: Any, first: Callable[[Person], None] = lambda person: None
    ) -> Seen:
        try:
            person = self._person(name)
            first(person)
            picture = person.worker.ask(what, *given)
        except WorkerGoneError as error:
            return Seen(f"{error}: press restart", is_wrong=True, has_ended=True)
        except Exception as error:
            return Seen(one_line(error), is_wrong=True, has_ended=True)
        if person.refused:
            return Seen(person.refused, is_wrong=True, picture=picture)
        if picture.is_over:
            return Seen("The run is over. Restart begins a new one.", has_ended=True, picture=picture)
        if picture.settings == person.settings:
            return Seen(picture=picture)
        anew = " and begins a new run" * begins_anew(picture.settings, person.settings)
        return Seen(f"The change takes effect at the next window{anew}.", picture=picture)


def _pause(person: Person) -> None:
    person.playing = None
