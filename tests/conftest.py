"""Settings of all tests: no Hub, one thread, a new Accelerate state for each test."""

import gc
import os
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # test files run in parallel, and waiting threads use the CPU

import pytest
import torch

from gradacc_hf.accumulation.accelerate_state import reset_accelerate
from gradacc_hf.training.lora import installed_mismatch

ROOT = Path(__file__).parents[1]
"""The root of the repository."""

LONGEST = (
    "test_packaging",
    "distributed/test_distributed",
    "test_guides",
    "recipe/test_recipe",
    "play/test_play",
    "hf_trainer/test_trainer",
    "test_launch",
)
"""Files that take the longest, which start first: a file that starts last runs beside idle processes."""

pytest_plugins = ["recipe_runs"]


def pytest_collection_modifyitems(items):
    first = {ROOT / f"tests/{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path, len(first)))


def pytest_collection_finish():
    """Leave modules out of garbage collections: each end of a Trainer collects, and looks at all objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_accelerate():
    torch.set_num_threads(1)
    yield
    reset_accelerate()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Skip a test of LoRA if the installed transformers does not support the installed peft.

    Only failures that contain the message about these versions are skipped.
    """
    report = yield
    if report.failed and (mismatch := installed_mismatch()) and mismatch in report.longreprtext:
        path, line, _ = item.location
        report.outcome, report.longrepr = "skipped", (path, (line or 0) + 1, mismatch)
    return report
