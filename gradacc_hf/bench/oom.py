"""`gradacc bench out_of_memory`: training under real memory limits, compared with no limit.

On a CPU, the process is limited (RLIMIT_AS). On a GPU, torch's allocator is limited. `measure_memory_limits`
starts each run in separate processes, under a random limit. A window that does not fit is split finer and
replayed, so the results must agree. `python -m gradacc_hf.bench.oom` is one such run.
"""

import json
import sys
import time
from collections.abc import Iterator
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
from gradacc_hf.bench.progress import Progress
from gradacc_hf.training.loop import train
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.utils.hardware import set_up_allocator
from gradacc_hf.utils.verbosity import silence_libraries

WINDOWS, EXAMPLES = 3, 24  # examples in each window
MIN_LIMIT_MIB, MAX_LIMIT_MIB = 80, 140  # above the memory at the start; one example needs about 40
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536"
}  # glibc then returns freed tensors, which would otherwise count towards the limit


@dataclass(frozen=True)
class LimitedRun:
    """One run. `limit`: the memory in MiB that the last process may add; None for no limit."""

    limit: int | None
    replays: int
    losses: tuple[float, ...]  # of each window
    norms: tuple[float, ...]  # of the gradient of each window
    each_once: bool  # whether each example is in exactly one window
    seconds: float

    def error(self, other: "LimitedRun") -> float:
        """Return the largest relative difference of a loss or norm."""
        pairs = zip((*self.losses, *self.norms), (*other.losses, *other.norms), strict=True)
        return max(abs(mine / theirs - 1) for mine, theirs in pairs)


@dataclass(frozen=True)
class MemoryLimitsResult:
    """A run without a limit, and the runs with limits."""

    processes: int
    unlimited: LimitedRun
    limited: tuple[LimitedRun, ...]
    measured_with: dict[str, str]


def measure_memory_limits(
    processes: int = 1, limits: int = 20, seed: int = 0, progress: Progress = iter
) -> MemoryLimitsResult:
    """Train under `limits` random limits. Raises InputError if a run fails or hangs."""
    drawn = np.random.default_rng(seed).integers(MIN_LIMIT_MIB, MAX_LIMIT_MIB, size=limits).tolist()
    device = "cpu" if processes > torch.cuda.device_count() else None
    runs = [run_limited(processes, limit) for limit in progress([None, *drawn])]
    return MemoryLimitsResult(processes, runs[0], tuple(runs[1:]), measured_with(device))


def run_limited(processes: int, limit: int | None) -> LimitedRun:
    """Run once, in separate processes. Raises InputError if the run fails or hangs."""
    started = time.perf_counter()
    what = f"bench out_of_memory, with a limit of {limit} MiB"
    printed = launch(what, processes, __name__, str(limit or 0), environment=MALLOC)
    found: Any = json.loads(printed)
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    return LimitedRun(limit=limit, seconds=time.perf_counter() - started, **found)


def print_memory_limits(result: MemoryLimitsResult, console: Console) -> None:
    """Print a row for each limit, and a summary."""
    headers = "limit, MiB", "replays", "largest relative difference", "each example once", "seconds"
    table = Table(*headers, box=SIMPLE)
    for run in (result.unlimited, *result.limited):
        limit = "none" if run.limit is None else f"{run.limit:,}"
        error = "" if run.limit is None else f"{run.error(result.unlimited):.1e}"
        table.add_row(limit, str(run.replays), error, "yes" if run.each_once else "NO", f"{run.seconds:.0f}")
    console.print(table)
    replays = sum(run.replays for run in result.limited)
    worst = max((run.error(result.unlimited) for run in result.limited), default=0.0)
    console.print(
        f"{len(result.limited)} runs, with a limit on process {result.processes} of {result.processes}: "
        f"{replays} replays. Losses and gradient norms differ by at most {worst:.1e} (relative) from the run "
        "without a limit."
    )


@contextmanager
def limited(more: int, device: torch.device) -> Iterator[None]:
    """Limit the process to `more` bytes on this device, above the bytes that it holds now."""
    if device.type == "cuda":
        _ = torch.ones(8, 8, device=device) @ torch.ones(
            8, 8, device=device
        )  # cuBLAS allocates its workspace
        whole = torch.cuda.get_device_properties(device).total_memory
        most = min(1.0, (torch.cuda.memory_reserved(device) + more) / whole)
        torch.cuda.set_per_process_memory_fraction(most)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    else:
        import resource  # absent on Windows

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class RecordingLoader:
    """The windows of a loader. `indices` records the examples of each window."""

    def __init__(self, windows: WindowLoader):
        self.windows, self.state_dict = windows, windows.state_dict
        self.record_gradient_norm, self.noise = windows.record_gradient_norm, windows.noise
        self.indices: list[list[int]] = []

    def __iter__(self) -> Iterator[Window]:
        for window in self.windows:
            self.indices.append(window.indices.tolist())
            yield window


def _train(limit: int) -> None:
    """Train in this process. The last process may add `limit` MiB to its memory; 0 disables the limit."""
    torch.set_num_threads(1)
    set_up_allocator()
    silence_libraries()
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
    recorded: Any = RecordingLoader(windows)
    is_limited = limit and accelerator.is_last_process
    with limited(limit * 2**20, accelerator.device) if is_limited else nullcontext():
        records = train(model, optimizer, recorded, accelerator=accelerator)
    found = {
        "replays": windows.replays,
        "losses": [record.loss for record in records],
        "norms": [record.grad_norm for record in records],
        "each_once": sorted(index for window in recorded.indices for index in window) == [*range(len(data))],
    }
    if accelerator.is_main_process:
        print(json.dumps(found), flush=True)
    accelerator.end_training()
    # DDP's destructor joins gloo's thread while holding the GIL. The thread needs the GIL to free the last
    # tensors, which is a deadlock. The pause lets the thread free them first.
    time.sleep(0.5)


if __name__ == "__main__":
    _train(int(sys.argv[1]))
