"""Ctrl-C ends a command with one line."""

import signal
import subprocess
import sys

WAITING = """
import signal
import time
signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes of a shell ignore it
from gradacc_hf.utils.commands import command
with command():
    print("ready", flush=True)
    time.sleep(60)
"""


def test_ctrl_c_ends_a_command_with_one_line_that_names_the_signal():
    with subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout.readline() == "ready\n"
        running.send_signal(signal.SIGINT)
        assert running.communicate(timeout=60)[1] == "SIGINT: stopped at once\n"
    assert running.returncode == 128 + signal.SIGINT
