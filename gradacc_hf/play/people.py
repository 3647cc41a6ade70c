"""Who looks at the page, and what their clicks do: each has a worker, settings, and plays or pauses."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gradacc_hf.errors import BadInput, one_line
from gradacc_hf.play.session import Picture, To
from gradacc_hf.play.settings import Settings
from gradacc_hf.play.workers import Gone, Worker, Workers

SPEEDS: dict[str, tuple[To, float]] = {  # to where, and seconds from one picture to the next
    "lines": ("line", 0.4),
    "micro-batches": ("micro-batch", 0.08),
    "windows": ("window", 0.08),
}
LONGEST_PLAY = 600.0  # seconds without a click


@dataclass(frozen=True)
class Seen:
    """What a click comes to: a message, "" for none, whether it is of something wrong, and a picture."""

    message: str = ""
    is_wrong: bool = False
    picture: Picture | None = None


@dataclass
class Person:
    """One of them. `playing`: a token; who plays goes on as long as it is theirs."""

    worker: Worker
    settings: Settings = field(default_factory=Settings)
    speed: str = "micro-batches"
    playing: object | None = None


class People:
    """All of them, by the name of their browser's session. Whatever goes wrong is a message."""

    def __init__(self, workers: Workers):
        self._workers, self._lock = workers, threading.Lock()
        self._by_name: dict[str, Person] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def enter(self, name: str) -> Seen:
        """Somebody opens the page, or clicks first."""
        return self._ask(name, "picture")

    def leave(self, name: str) -> None:
        """The page is closed: their training ends."""
        self._pause(name)
        with self._lock:
            self._by_name.pop(name, None)
        self._workers.leave(name)

    def pause(self, name: str) -> Seen:
        """Stop where it is."""
        self._pause(name)
        return self._ask(name, "picture")

    def go_on(self, name: str, to: To) -> Seen:
        """Go on by so much, and pause there."""
        self._pause(name)
        return self._ask(name, "advance", to)

    def play(self, name: str) -> Iterator[Seen]:
        """Go on and on, until there is a pause, the end, or nobody."""
        try:
            person = self._person(name)
        except BadInput as error:
            yield Seen(str(error), is_wrong=True)
            return
        person.playing = token = object()
        until = time.monotonic() + LONGEST_PLAY
        while person.playing is token:
            begun = time.monotonic()
            to, pace = SPEEDS[person.speed]
            seen = self._ask(name, "advance", to)
            if seen.picture is None or seen.picture.is_over or begun > until:
                person.playing = None
                yield seen if begun < until else Seen("paused after ten minutes: press play to go on")
                return
            yield seen
            time.sleep(max(0.0, pace - (time.monotonic() - begun)))

    def set_speed(self, name: str, speed: str) -> None:
        """How fast it plays, from now on."""
        self._person(name).speed = speed

    def change(self, name: str, settings: Settings) -> Seen:
        """Go on with these settings, from the next window on."""
        self._person(name).settings = settings
        return self._ask(name, "change", settings)

    def restart(self, name: str, settings: Settings | None = None) -> Seen:
        """Begin anew, with these settings or those that are; also where the training process has ended."""
        self._pause(name)
        person = self._person(name)
        person.settings = settings or person.settings
        if not person.worker.is_alive:
            self._workers.leave(name)
            person.worker = self._workers.of(name)
        return self._ask(name, "begin", person.settings)

    def _person(self, name: str) -> Person:
        with self._lock:
            if name not in self._by_name:
                self._by_name[name] = Person(self._workers.of(name))
            return self._by_name[name]

    def _pause(self, name: str) -> None:
        if (person := self._by_name.get(name)) is not None:
            person.playing = None

    def _ask(self, name: str, what: str, *given: Any) -> Seen:
        try:
            person = self._person(name)
            picture = person.worker.ask(what, *given)
        except Gone as error:
            return Seen(f"{error}: press restart", is_wrong=True)
        except Exception as error:
            return Seen(one_line(error), is_wrong=True)
        if picture.is_over:
            return Seen("The run is over. Restart begins a new one.", picture=picture)
        waits = picture.settings != person.settings
        return Seen("The change takes effect at the next window." * waits, picture=picture)
