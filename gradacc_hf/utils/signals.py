"""Stop a run early, on SIGTERM from a scheduler or SIGINT from Ctrl-C.

`StopSignals` records the first signal. `CheckpointSaving.stops_after` (`training/finetune.py`) checks for it
after each window, saves a checkpoint and stops the run. A second signal ends the process at once.
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
ECHO = 2.0  # seconds: torchrun forwards a signal that the whole process group has already received
PR_SET_PDEATHSIG = 1  # from sys/prctl.h of Linux
MARKER = "TO_BE_RESUMED"  # file in the folder of a stopped run, with the command that resumes it


class StopSignals:
    """Context manager that records the first signal and prints a line. The second one ends the process.

    It has no effect outside the main thread, as other threads receive no signals.
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
        """Whether any process has received a signal. Call it on all processes, between windows."""
        if self._since is not None:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._since is None:
            self._since = time.monotonic()
            if self.accelerator.is_main_process:  # no print: the signal may arrive in the middle of another
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: stopping after this window; send it again to stop at once\n".encode())
        elif time.monotonic() - self._since > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def end_with_launcher() -> None:
    """Make Linux send a SIGTERM to this process when the launcher that started it ends.

    The launchers of Accelerate and torchrun do not always receive a signal or forward it. When they are
    killed, their processes continue to run.
    """
    launched = any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"))
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if _is_orphan():  # the launcher ended while this process was importing
            sys.exit(128 + signal.SIGTERM)


def _is_orphan() -> bool:
    """Whether the launcher has exited and this process has a new parent, such as init.

    All launchers are Python programs, so any other parent is the new one.
    """
    try:
        words = " ".join(psutil.Process(os.getppid()).cmdline())
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
    return not any(name in words for name in ("python", "accelerate", "torchrun"))


def lost_contact(error: RuntimeError) -> bool:
    """Whether the error means that another process of the run, or its machine, has ended."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def ignore_signals(worker: int) -> None:
    """Ignore the stop signals in a data-loading worker, which ends with its training process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
