"""Training under a real memory limit, beside the same training without one.

On a CPU the limit is the process's (RLIMIT_AS), on a GPU that of torch's allocator.

`shortage` starts each run in processes of its own and draws a limit for each. What must come out is the same:
a window that does not fit is cut finer and run again. `python -m gradacc_hf.bench.oom` is one such run.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.window import Window
from gradacc_hf.bench.launch import launch
from gradacc_hf.training.loop import train
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.utils.hardware import set_up_allocator

WINDOWS, EXAMPLES = 3, 24  # examples in each window
LEAST, MOST = 80, 140  # MiB above what is there when training starts: one example needs about 40
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives tensors back; else freed ones count for the limit


@dataclass(frozen=True)
class Limited:
    """One run: `limit` MiB for the last process, above what it had; None for none."""

    limit: int | None
    replays: int
    losses: tuple[float, ...]  # of each window
    norms: tuple[float, ...]  # of its gradient
    each_once: bool  # was every example in one window, and in one only?
    seconds: float

    def error(self, other: "Limited") -> float:
        """The largest relative difference of a loss or norm."""
        pairs = zip((*self.losses, *self.norms), (*other.losses, *other.norms), strict=True)
        return max(abs(mine / theirs - 1) for mine, theirs in pairs)


@dataclass(frozen=True)
class MemoryLimits:
    """A run without limit, and those with one."""

    processes: int
    unlimited: Limited
    limited: tuple[Limited, ...]
    measured_with: dict[str, str]


def shortage(
    processes: int = 1,
    limits: int = 20,
    seed: int = 0,
    progress: Callable[..., Iterable[Any]] = iter,
) -> MemoryLimits:
    """Train under so many limits, drawn at random. Raises InputError where a run fails, or hangs."""
    drawn = np.random.default_rng(seed).integers(LEAST, MOST, size=limits).tolist()
    device = "cpu" if processes > torch.cuda.device_count() else None
    runs = [run_limited(processes, limit) for limit in progress([None, *drawn])]
    return MemoryLimits(processes, runs[0], tuple(runs[1:]), measured_with(device))


def run_limited(processes: int, limit: int | None) -> Limited:
    """One run in processes of its own. Raises InputError where it fails, or hangs."""
    started = time.perf_counter()
    what = f"bench out_of_memory, with a limit of {limit} MiB"
    printed = launch(what, processes, __name__, str(limit or 0), environment=MALLOC)
    found: Any = json.loads(printed)
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    return Limited(limit=limit, seconds=time.perf_counter() - started, **found)


def print_shortage(result: MemoryLimits, console: Console) -> None:
    """A row for each limit."""
    table = Table("limit, MiB", "replays", "largest difference", "each example once", "seconds", box=SIMPLE)
    for run in (result.unlimited, *result.limited):
        limit = "none" if run.limit is None else f"{run.limit:,}"
        error = "" if run.limit is None else f"{run.error(result.unlimited):.1e}"
        table.add_row(limit, str(run.replays), error, "yes" if run.each_once else "NO", f"{run.seconds:.0f}")
    console.print(table)
    replays = sum(run.replays for run in result.limited)
    worst = max((run.error(result.unlimited) for run in result.limited), default=0.0)
    console.print(
        f"{len(result.limited)} limits on process {result.processes} of {result.processes}: {replays} "
        f"windows run again; losses and gradient norms within {worst:.1e} of those of the run without limit"
    )


@contextmanager
def limited(more: int, device: torch.device) -> Iterator[None]:
    """In here the process has so many bytes on this device, above what it holds now."""
    if device.type == "cuda":
        _ = torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)  # cuBLAS takes its share
        whole = torch.cuda.get_device_properties(device).total_memory
        most = min(1.0, (torch.cuda.memory_reserved(device) + more) / whole)
        torch.cuda.set_per_process_memory_fraction(most)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    else:
        import resource  # there is none on Windows

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class Watched:
    """The windows of a loader, with a note of the examples in each."""

    def __init__(self, windows: WindowLoader):
        self.windows, self.state_dict = windows, windows.state_dict
        self.record_gradient_norm, self.noise = windows.record_gradient_norm, windows.noise
        self.indices: list[list[int]] = []

    def __iter__(self) -> Iterator[Window]:
        for window in self.windows:
            self.indices.append(window.indices.tolist())
            yield window


def _train(limit: int) -> None:
    """In a process of its own, the last of which may take `limit` MiB more than it has; 0 is no limit."""
    torch.set_num_threads(1)
    set_up_allocator()
    transformers.utils.logging.set_verbosity_error()
    accelerator, draw = Accelerator(), np.random.default_rng(0)
    torch.manual_seed(0)
    settings: Any = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    settings |= {"intermediate_size": 256, "vocab_size": 500, "attn_implementation": "eager"}
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**settings)
    model = transformers.BertForSequenceClassification(config)
    lengths = draw.integers(180, 200, size=WINDOWS * EXAMPLES)
    data = [{"ids": draw.integers(1, 500, n), "label": int(draw.integers(2))} for n in lengths]

    def collate(examples: list[Any]) -> dict[str, torch.Tensor]:
        rows = [torch.as_tensor(example["ids"]) for example in examples]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels = torch.tensor([example["label"] for example in examples])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}

    windows = WindowLoader(
        data,
        EXAMPLES,
        accelerator=accelerator,
        collate_fn=collate,
        lengths=lengths,
        max_tokens=EXAMPLES * 200,
    )
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    watched: Any = Watched(windows)
    is_limited = limit and accelerator.is_last_process
    with limited(limit * 2**20, accelerator.device) if is_limited else nullcontext():
        records = train(model, optimizer, watched, accelerator=accelerator)
    found = {
        "replays": windows.replays,
        "losses": [record.loss for record in records],
        "norms": [record.grad_norm for record in records],
        "each_once": sorted(index for window in watched.indices for index in window) == [*range(len(data))],
    }
    if accelerator.is_main_process:
        print(json.dumps(found), flush=True)
    accelerator.end_training()
    # What DDP leaves behind joins gloo's thread and holds the GIL meanwhile, which that thread needs for its
    # last tensors: torch then waits for itself. So it has some time to let go of them.
    time.sleep(0.5)


if __name__ == "__main__":
    _train(int(sys.argv[1]))
