"""What all tests share: no Hub, one thread, a fresh Accelerate state for each test."""

import os
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # files run side by side, and threads that wait spin

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

ROOT = Path(__file__).parents[1]
"""The root of the repository."""

pytest_plugins = ["recipe_runs"]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    torch.set_num_threads(1)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
