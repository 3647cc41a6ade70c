"""One process for each browser session, because Accelerate keeps one state per process.

Processes are forked from a server that has imported everything, so that they start quickly. One spare process
with a new session is kept ready.
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

ANSWER_TIMEOUT_SECONDS = 60.0  # time limit for one answer of a worker
IDLE_TIMEOUT_SECONDS = 600.0  # a worker without requests ends after this time


class WorkerGoneError(GradaccError):
    """Raised if a worker has ended or does not answer."""


class Worker:
    """A process with a session. `ask` is safe to call from several threads."""

    def __init__(self):
        self._here, there = _context().Pipe()
        self._asked = threading.Lock()
        self._process: Any = _context().Process(target=_serve, args=(there,), daemon=True)
        self._process.start()
        there.close()

    def ask(self, what: str, *given: Any) -> Any:
        """Call a method of the session and return the picture after the call.

        Args:
            what: name of the method.
            given: arguments of the method.

        Raises:
            WorkerGoneError: if the process has ended or does not answer in time.
            InputError: if the method raises one.
        """
        with self._asked:
            try:
                self._here.send((what, given))
                if not self._here.poll(ANSWER_TIMEOUT_SECONDS):
                    self.end()
                    raise WorkerGoneError(
                        f"the training process did not answer within {ANSWER_TIMEOUT_SECONDS:.0f} s"
                    )
                answer = self._here.recv()
            except (OSError, EOFError) as error:
                raise WorkerGoneError("the training process has ended") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.join()

    @property
    def is_alive(self) -> bool:
        """Whether the process is running."""
        return self._process.is_alive()


class Workers:
    """The workers of all browser sessions, by name of the session; at most `most`."""

    def __init__(self, most: int):
        self._most, self._by_name, self._lock = most, {}, threading.Lock()
        self._spare: Worker | None = Worker()

    def of(self, name: str) -> Worker:
        """Return the worker of a session, a new worker if needed.

        Raises:
            InputError: if all workers are in use.
        """
        with self._lock:
            if name not in self._by_name:
                alive = {who: worker for who, worker in self._by_name.items() if worker.is_alive}
                self._by_name = alive
                if len(alive) >= self._most:
                    raise InputError(f"all {len(alive)} sessions of this page are in use; try again later")
                spare = self._spare if self._spare is not None and self._spare.is_alive else Worker()
                self._by_name[name], self._spare = spare, None
                threading.Thread(target=self._keep_a_spare).start()
            return self._by_name[name]

    def leave(self, name: str) -> None:
        """End the worker of a session."""
        with self._lock:
            worker = self._by_name.pop(name, None)
        if worker is not None:
            worker.end()

    def end(self) -> None:
        """End all workers."""
        for name in list(self._by_name):
            self.leave(name)
        if self._spare is not None:
            self._spare.end()

    def first_picture(self) -> Any:
        """Return the picture of a new session with default settings."""
        worker = Worker()  # not the spare worker: after a first request, an idle worker ends
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
    """Start the server that imports the modules of the workers. Return without waiting for the server."""
    _context().set_forkserver_preload(["gradacc_hf.play.preload"])
    settings = {
        "CUDA_VISIBLE_DEVICES": "",  # threads of a GPU driver do not survive a fork
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",  # shapes vary by window: without a limit, bf16 takes 1 GB
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
    """Answer requests in a worker process, until the connection closes or the worker is idle too long."""
    import torch

    from gradacc_hf.play.session import Session

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server handles Ctrl-C and ends this process
    warnings.filterwarnings(
        "ignore", "Detected call of `lr_scheduler.step"
    )  # a deliberate fault of a shown loop
    torch.set_num_threads(1)
    gc.freeze()  # shortens later garbage collections
    session = Session()
    timeout = None  # wait for the first request
    while connection.poll(timeout):
        try:
            what, given = connection.recv()
        except EOFError:
            return
        timeout = IDLE_TIMEOUT_SECONDS
        try:
            getattr(session, what)(*given)
            connection.send(session.picture())
        except Exception as error:
            connection.send(error if isinstance(error, InputError) else RuntimeError(one_line(error)))
