"""What do several processes exchange? Two over gloo reduce gradients after each micro-batch or once a window.

Run it: gradacc lessons synchronise_once. The doctor finds: synchronised_every_micro_batch.
"""

import os
import sys
import tempfile
from contextlib import nullcontext
from subprocess import run

import torch
from accelerate import Accelerator
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from gradacc_hf import WindowLoader

torch.manual_seed(0)
X = torch.randn(64, 8)
Y = X.sum(dim=1, keepdim=True)
EXAMPLES = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
MODEL = torch.nn.Linear(8, 1)


def counted(calls, bucket):  # DDP's own all-reduce, with a record of it
    calls.append(bucket.index())
    return allreduce_hook(None, bucket)


def plain(once):  # this process's half of 64 examples, in 4 micro-batches of 8
    MODEL.zero_grad()
    ddp, mine = DistributedDataParallel(MODEL), slice(torch.distributed.get_rank(), None, 2)
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=0.0)
    ddp.register_comm_hook(calls := [], counted)
    for i, (x, y) in enumerate(zip(X[mine].split(8), Y[mine].split(8), strict=True), start=1):
        with ddp.no_sync() if once and i < 4 else nullcontext():
            (mse_loss(ddp(x), y) / 4).backward()
    optimizer.step()
    return len(calls), MODEL.weight.grad


def gradacc():  # `accumulate` synchronises at the end of the window
    MODEL.zero_grad()
    ddp = (accelerator := Accelerator(cpu=True)).prepare(MODEL)
    ddp.register_comm_hook(calls := [], counted)
    for window in WindowLoader(EXAMPLES, 64, micro_batch_size=8, accelerator=accelerator):
        for batch in window:
            with accelerator.accumulate(ddp):
                accelerator.backward(window.weigh(mse_loss(ddp(batch["x"]), batch["labels"])))
    return len(calls), MODEL.weight.grad


def process(folder):  # the program of each process, which saves its results
    torch.distributed.init_process_group("gloo")
    torch.save([plain(once=False), plain(once=True), gradacc()], f"{folder}/{torch.distributed.get_rank()}")
    torch.distributed.destroy_process_group()


def main():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with tempfile.TemporaryDirectory() as folder:
        run([*torchrun, __file__, folder], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        both = [torch.load(f"{folder}/{rank}", weights_only=True) for rank in (0, 1)]
    (truth,), found = torch.autograd.grad(mse_loss(MODEL(X), Y), MODEL.weight), {}  # at once, in one process
    for name, *seen in zip(("each micro-batch", "once", "gradacc"), *both, strict=True):
        error = max((torch.dist(gradient, truth) / truth.norm()).item() for _, gradient in seen)
        found[name] = {"reduces": seen[0][0], "error": error}
        print(f"{name:<16} {seen[0][0]} gradient all-reduces; error {error:.0e}, against one process")
    print("In gradacc: `accumulate` reduces the gradient once per window (and a few numbers).")
    return found


def draw(axes, found):
    axes.bar(list(found), [way["reduces"] for way in found.values()])
    axes.set(title="Gradient all-reduces of a window of 4 micro-batches", yticks=range(5))


if __name__ == "__main__":
    main() if len(sys.argv) == 1 else process(sys.argv[1])
