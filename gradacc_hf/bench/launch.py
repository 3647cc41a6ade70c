"""Run a module in separate processes, with torchrun if there are several."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import torch

from gradacc_hf.errors import InputError, one_line

TIMEOUT_SECONDS = 180


def launch(
    what: str, processes: int, module: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> str:
    """Return the line of JSON that the module prints.

    Raises:
        InputError: the module fails, or hangs. The message begins with `what`.
    """
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    if processes > torch.cuda.device_count():
        environment["ACCELERATE_USE_CPU"] = "true"
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child: Any = subprocess.Popen(
        [sys.executable, *launcher, "-m", module, *arguments],
        text=True,
        env=environment,
        start_new_session=True,
        **pipes,
    )
    try:
        printed, error_output = child.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # with the processes that the child launched
        raise InputError(f"{what}: hangs after {TIMEOUT_SECONDS} s") from None
    lines = [line for line in printed.splitlines() if line.startswith(("{", "["))]
    if child.returncode or not lines:
        errors = [
            line for line in error_output.splitlines() if "Error:" in line or "InputError:" in line
        ] or [error_output]
        raise InputError(f"{what}: failed: {one_line(errors[0])}")
    return lines[0]
