"""The messages and types that pyright reports for a script of a user."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import gradacc_hf

NAMES = sorted({*gradacc_hf.__all__} - {"__version__"})
RIGHT = f"""
import gradacc_hf
import torch
from accelerate import Accelerator
from gradacc_hf import ({", ".join(NAMES)})

model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters())
accelerator = Accelerator()
windows = WindowLoader([{{"x": 1}}], 1, accelerator=accelerator, max_tokens=64)
for window in windows:
    for batch in window:
        reveal_type(window)  # Window
        reveal_type(window.weigh(model(**batch)))  # Tensor
reveal_type(windows)  # WindowLoader
reveal_type(verify(model, windows))  # Verification
reveal_type(evaluate(model, windows, accelerator=accelerator).loss)  # float
for record in iter_windows(model, optimizer, windows, accelerator=accelerator):
    reveal_type(record)  # WindowRecord
reveal_type(gradacc_hf.__version__)  # str
reveal_type(ExactTrainer(model, compute_metrics=None, num_items="labels"))  # ExactTrainer
""" + "\n".join(f"reveal_type({name})" for name in NAMES)

WRONG = """
import gradacc_hf
import torch
from accelerate import Accelerator
from gradacc_hf import ExactTrainer, WindowLoader, fine_tune, verify
from gradacc_hf import WindowLoder  # unknown import symbol

model, accelerator = torch.nn.Linear(2, 2), Accelerator()
gradacc_hf.WindowLoder  # is not a known attribute of module
gradacc_hf.verifies(model)  # is not a known attribute of module
windows = WindowLoader([1], 1, accelerator=accelerator, max_token=64)  # No parameter named "max_token"
WindowLoader([1], 1, max_tokens=64)  # Argument missing for parameter "accelerator"
verify(model, windows, window=2)  # No parameter named "window"
fine_tune(model, torch.optim.SGD([]), windows, accelerator=accelerator, epoch=2)  # No parameter named "epoch"
ExactTrainer(models=model)  # No parameter named "models"
windows.recrd_gradient_norm  # Cannot access attribute "recrd_gradient_norm"
"""


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    """Return the messages of pyright as (file, line number from 0, severity, text)."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "right.py").write_text(RIGHT)
    (folder / "wrong.py").write_text(WRONG)
    (folder / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "standard"}))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout)["generalDiagnostics"]
    return [
        (Path(each["file"]).name, each["range"]["start"]["line"], each["severity"], each["message"])
        for each in found
    ]


def test_a_right_script_has_no_error_and_every_public_name_a_type(messages):
    assert [message for message in messages if message[0] == "right.py" and message[2] == "error"] == []
    revealed = {
        line: re.search(r'is "(.*)"$', text, re.DOTALL)[1]
        for file, line, severity, text in messages
        if file == "right.py" and severity == "information"
    }
    lines = RIGHT.split("\n")
    asked = [number for number, line in enumerate(lines) if "reveal_type(" in line]
    assert sorted(revealed) == asked
    for number in asked:
        expected = lines[number].partition("  # ")[2]
        if expected:
            assert revealed[number] == expected
        # Libraries leave some types unknown: DataLoader[Unknown].
        assert not re.search(r"(^|: |-> )Unknown", revealed[number]), lines[number]


def test_every_mistake_is_an_error_on_its_line(messages):
    errors = {
        line: text for file, line, severity, text in messages if (file, severity) == ("wrong.py", "error")
    }
    expected = {n: line.partition("  # ")[2] for n, line in enumerate(WRONG.split("\n")) if "  # " in line}
    assert sorted(errors) == sorted(expected)
    for line, text in expected.items():
        assert text in errors[line]
