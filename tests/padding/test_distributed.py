"""DDP and FSDP2 over gloo: the gradient without padding is the mean over the processes of the padded ones."""

import os
import subprocess
import sys

import padding_worker
import pytest
import torch.distributed as dist
from conftest import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")  # the logits


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("model_type", ["bert", "deberta-v2"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_one_process(one_process, engine, when, model_type):
    padding_worker.check(engine, model_type, when, checkpointing=when == "before")


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [[], ["checkpointing"]])
def test_two_processes(checkpointing):
    assert len(run_two(*checkpointing).splitlines()) == 8


def test_two_processes_remove_padding_together_or_not_at_all_and_reduce_16_bit_gradients():
    run_two("agreement")


def run_two(*arguments):
    """Run the worker in two processes, and return what it printed."""
    script = ROOT / "tests/helpers/padding_worker.py"
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", str(script), *arguments]
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
