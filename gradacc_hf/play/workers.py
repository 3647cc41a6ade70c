"""Each person's session in a process of its own: Accelerate's state, and the doctor's ears, are a process's.

Processes are forked from a server that has imported everything, so that one is there in a moment; a spare
one waits with its session made.
"""

import gc
import multiprocessing
import os
import signal
import threading
import warnings
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from gradacc_hf.errors import GradaccError, InputError, one_line

PATIENCE = 60.0  # seconds, for one answer
IDLE = 600.0  # seconds without a question, after which a worker ends


class WorkerGoneError(GradaccError):
    """The worker has ended."""


class Worker:
    """A process with a session; `ask` is safe to call from several threads."""

    def __init__(self):
        self._here, there = _context().Pipe()
        self._asked = threading.Lock()
        self._process: Any = _context().Process(target=_serve, args=(there,), daemon=True)
        self._process.start()
        there.close()

    def ask(self, what: str, *given: Any) -> Any:
        """Return the result of a session's method, and the picture. Raises WorkerGoneError, InputError."""
        with self._asked:
            try:
                self._here.send((what, given))
                if not self._here.poll(PATIENCE):
                    self.end()
                    raise WorkerGoneError(f"no answer within {PATIENCE:.0f} s")
                answer = self._here.recv()
            except (OSError, EOFError) as error:
                raise WorkerGoneError("the training process has ended") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.join()

    @property
    def is_alive(self) -> bool:
        """Has it not ended?"""
        return self._process.is_alive()


class Workers:
    """The processes of all who look at the page, by the name of their browser's session; at most `most`."""

    def __init__(self, most: int):
        self._most, self._by_name, self._lock = most, {}, threading.Lock()
        self._spare: Worker | None = Worker()

    def of(self, name: str) -> Worker:
        """Return the worker of this session, a new one if needed. Raises InputError if all are in use."""
        with self._lock:
            if name not in self._by_name:
                alive = {who: worker for who, worker in self._by_name.items() if worker.is_alive}
                self._by_name = alive
                if len(alive) >= self._most:
                    raise InputError(
                        f"{len(alive)} people are here, all that this machine takes: come back later"
                    )
                spare = self._spare if self._spare is not None and self._spare.is_alive else Worker()
                self._by_name[name], self._spare = spare, None
                threading.Thread(target=self._keep_a_spare).start()
            return self._by_name[name]

    def leave(self, name: str) -> None:
        """This person has gone."""
        with self._lock:
            worker = self._by_name.pop(name, None)
        if worker is not None:
            worker.end()

    def end(self) -> None:
        """All have."""
        for name in list(self._by_name):
            self.leave(name)
        if self._spare is not None:
            self._spare.end()

    def first_picture(self) -> Any:
        """Of a session at its beginning, with settings as they come."""
        worker = Worker()  # of its own: the spare one waits as long as nobody has asked it
        try:
            return worker.ask("picture")
        finally:
            worker.end()

    def _keep_a_spare(self) -> None:
        with self._lock:
            if self._spare is None:
                self._spare = Worker()


def _context() -> Any:
    return multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Begin to import what workers need; from here on it is under way."""
    _context().set_forkserver_preload(["gradacc_hf.play.preload"])
    settings = {
        "CUDA_VISIBLE_DEVICES": "",  # threads that wait for a GPU do not survive a fork
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",  # shapes change with each window: else bf16 takes 1 GB
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({name: value} if value is not None else {})


def _serve(connection: Connection) -> None:
    """A worker's process: answer until nobody asks."""
    import torch

    from gradacc_hf.play.session import Session

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then ends this
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # a fault that is meant
    torch.set_num_threads(1)
    gc.freeze()  # what is known by now need not be looked through again
    session = Session()
    patience = None  # until somebody comes
    while connection.poll(patience):
        try:
            what, given = connection.recv()
        except EOFError:
            return
        patience = IDLE
        try:
            getattr(session, what)(*given)
            connection.send(session.picture())
        except Exception as error:
            connection.send(error if isinstance(error, InputError) else RuntimeError(one_line(error)))
