"""Runs a module in processes of its own, as torchrun starts them."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import torch

from gradacc_hf.errors import InputError, one_line

SECONDS = 180  # after which a run hangs


def launch(
    what: str, processes: int, module: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> str:
    """The line of JSON that it prints. Raises InputError, beginning with `what`, where it fails or hangs."""
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
        printed, said = child.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # the processes that it launched, too
        raise InputError(f"{what}: hangs after {SECONDS} s") from None
    lines = [line for line in printed.splitlines() if line.startswith(("{", "["))]
    if child.returncode or not lines:
        errors = [line for line in said.splitlines() if "Error:" in line or "InputError:" in line] or [said]
        raise InputError(f"{what}: failed: {one_line(errors[0])}")
    return lines[0]
