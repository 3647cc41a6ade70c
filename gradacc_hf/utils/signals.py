"""How a run ends before its time.

SIGTERM (of a scheduler) and SIGINT (Ctrl-C) let it finish its window and save.

`StopSignals` notes the signal. `CheckpointSaving.stops_after` (`training/finetune.py`) asks for it after each
window. A second signal ends the process at once, as the first would have without this.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType

import psutil
import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO = 2.0  # seconds: torchrun passes on to its processes what the whole group got already
PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h
MARKER = "TO_BE_RESUMED"  # in the folder of a run that was stopped so; it holds the command that goes on


class StopSignals:
    """While this is entered, the first signal is noted, and said; the second one ends the process.

    In a thread that is not the main one, which gets no signals, it does nothing.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._since: float | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def asked(self) -> bool:
        """Has any process got a signal? To be called by all of them, between windows."""
        if self._since is not None:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._since is None:
            self._since = time.monotonic()
            if self.accelerator.is_main_process:  # not print, which this may break into
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: stopping after this window; once more to stop at once\n".encode())
        elif time.monotonic() - self._since > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def end_with_launcher() -> None:
    """Get a SIGTERM when the launcher that started this process ends (on Linux).

    Those of Accelerate and torchrun are not always passed a signal, do not always pass it on, and leave their
    processes running when they are killed.
    """
    launched = any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"))
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if _is_orphan():  # it ended while this process was importing
            sys.exit(128 + signal.SIGTERM)


def _is_orphan() -> bool:
    """Is the parent no launcher, which all are programs of Python, but who takes in orphans?"""
    try:
        words = " ".join(psutil.Process(os.getppid()).cmdline())
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
    return not any(name in words for name in ("python", "accelerate", "torchrun"))


def lost_contact(error: RuntimeError) -> bool:
    """Is this what is raised where another process of the run, or its machine, is gone?"""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def ignore_signals(worker: int) -> None:
    """For processes that collate beside training: they end with the one that they work for."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
