"""`gradacc bench cpu`: what a CPU's settings do for the speed of a recipe.

Threads, malloc, how waiting threads wait, padding to a multiple, bf16 and torch.compile; each run in a
process of its own, as the first three are read where a process starts. All train the same windows and take
turns; what counts is the ratio to the default in the same turn.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from ctypes.util import find_library
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gradacc_hf.errors import GradaccError, InputError, listed
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.utils.hardware import Device, find_device

DEFAULT = "default"
KEEP = 4 * 2**30  # bytes that glibc does not give back to the kernel
MEASUREMENTS_NEEDED = 0.9  # confidence below which nothing is called faster or slower: 5 turns give it
WARM_UP = 1  # windows of each run that are not timed: compiling, the allocator's blocks


@dataclass(frozen=True)
class Variant:
    """What is set for a run: in its environment, and on its command line."""

    environment: dict[str, str] = field(default_factory=dict)
    settings: tuple[str, ...] = ()


def variants(device: Device | None = None) -> dict[str, Variant]:
    """All that this machine can run, by name; the default first."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = {DEFAULT: Variant()}
    for threads in sorted({1, max(1, cores // 2), cores, 2 * cores}):
        found[f"threads_{threads}"] = Variant({"OMP_NUM_THREADS": str(threads)})
    found["wait_passive"] = Variant({"OMP_WAIT_POLICY": "PASSIVE"})
    found["wait_active"] = Variant({"OMP_WAIT_POLICY": "ACTIVE"})
    if sys.platform == "linux":
        tunables = f"glibc.malloc.mmap_threshold={KEEP}:glibc.malloc.trim_threshold={KEEP}"
        found["malloc_keep"] = Variant({"GLIBC_TUNABLES": tunables})
        found["malloc_one_arena"] = Variant({"MALLOC_ARENA_MAX": "1"})
        found["malloc_huge_pages"] = Variant({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
        for name in ("tcmalloc_minimal", "jemalloc"):
            if library := find_library(name):
                found[name.removesuffix("_minimal")] = Variant({"LD_PRELOAD": library})
    for multiple in (8, 16, 32):
        setting = ("--budget.pad_to_multiple_of", str(multiple))
        found[f"pad_to_multiple_of_{multiple}"] = Variant(settings=setting)
    found["bf16"] = Variant(settings=("--budget.precision", "bf16"))
    if (device or find_device()).compiler:
        found["compile"] = Variant(settings=("--budget.compile", "true"))
    return found


@dataclass(frozen=True)
class Ratio:
    """Seconds of a variant / seconds of the default, turn by turn: below 1 is faster."""

    variant: str
    median: float
    low: float
    high: float
    seconds: tuple[float, ...]  # of the timed windows, by turn
    first_window_seconds: float  # median: compiling is in it

    @property
    def clear(self) -> bool:
        """Does the interval leave out 1?"""
        return not self.low <= 1 <= self.high


@dataclass(frozen=True)
class CpuSpeed:
    """All variants. The intervals hold the median with the probability `confidence`."""

    config: str
    windows: int
    repeats: int
    confidence: float
    ratios: tuple[Ratio, ...]
    failed: dict[str, str]
    measured_with: dict[str, str]


def cpu(
    config: str,
    only: Sequence[str] = (),
    windows: int = 6,
    repeats: int = 6,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> CpuSpeed:
    """Time the first windows of a config's run, each variant once a turn; raises InputError.

    only: names of variants; all by default. windows: those timed, after one that is not. repeats: turns.
    The interval is from the least to the most of n ratios: one of n draws is below and one above the median
    with the probability 1 − 2^(1 − n).
    """
    known = variants()
    for name in only:
        if name not in known:
            raise InputError(f"--only: found {name!r}; allowed: {listed(known)}")
    chosen = {name: known[name] for name in known if name == DEFAULT or name in only or not only}
    names = list(chosen)
    turns = [(turn, names[(turn + i) % len(names)]) for turn in range(repeats) for i in range(len(names))]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for _, name in progress(turns):
        if name not in failed:
            try:
                found[name].append(run_windows(config, windows, chosen[name]))
            except VariantFailedError as error:
                if name == DEFAULT:
                    raise InputError(f"{config}: {error}") from error
                failed[name] = str(error)
    default = [run["seconds"] for run in found[DEFAULT]]
    ratios = [_ratio(name, found[name], default) for name in names if name not in failed]
    return CpuSpeed(
        config=config,
        windows=windows,
        repeats=repeats,
        confidence=1 - 2.0 ** (1 - repeats),
        ratios=tuple(ratios),
        failed=failed,
        measured_with=measured_with("cpu") | {"threads": str(found[DEFAULT][0]["threads"])},
    )


def _ratio(name: str, runs: Sequence[dict[str, Any]], default: Sequence[float]) -> Ratio:
    seconds = tuple(run["seconds"] for run in runs)
    by_turn = [ours / theirs for ours, theirs in zip(seconds, default, strict=True)]
    first = median(run["first"] for run in runs)
    return Ratio(name, median(by_turn), min(by_turn), max(by_turn), seconds, first)


class VariantFailedError(GradaccError):
    """What a run said at its end."""


def run_windows(config: str, windows: int, variant: Variant) -> dict[str, Any]:
    """Train windows of a config in a process, after one to warm up. Raises VariantFailedError."""
    command = [sys.executable, "-m", "gradacc_hf.bench.cpu_speed", str(windows), "--config", config]
    done = subprocess.run(
        [*command, *variant.settings],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **variant.environment},
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise VariantFailedError(last.removeprefix("error: ")[:200])
    return json.loads(done.stdout.splitlines()[-1])


def _measure(windows: int, settings: Sequence[str]) -> None:
    """In a process of its own: train, and print the seconds as JSON."""
    import torch
    import transformers
    from datasets import disable_progress_bars

    from gradacc_hf.recipe.loading import load_recipe_to_run
    from gradacc_hf.run.setup import load_data, make_accelerator, make_model, make_windows
    from gradacc_hf.training.loop import train
    from gradacc_hf.training.optimizer import make_optimizer
    from gradacc_hf.training.run_log import peak_memory_bytes

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    recipe = load_recipe_to_run([*settings, "--output.tracker", "none"])
    accelerator = make_accelerator(recipe.config)
    recipe, training, validation = load_data(recipe)
    loader, _ = make_windows(recipe, training, validation, accelerator)
    if not 1 <= windows <= len(loader) - WARM_UP:
        raise InputError(f"--windows: found {windows}; allowed: 1 to {len(loader) - WARM_UP}")
    model = make_model(recipe)
    optimizer = make_optimizer(model, recipe.config.optim, accelerator.mixed_precision)
    model, optimizer = accelerator.prepare(model, optimizer)
    shared: dict[str, Any] = {"accelerator": accelerator, "compute_loss": recipe.loss}
    records = list(train(model, optimizer, loader, max_windows=windows + WARM_UP, **shared))
    seconds = [record.seconds for record in records]
    found = {"first": sum(seconds[:WARM_UP]), "seconds": sum(seconds[WARM_UP:])}
    peak = peak_memory_bytes(accelerator.device)
    print(json.dumps({**found, "threads": torch.get_num_threads(), "peak_memory_bytes": peak}))


def print_cpu(result: CpuSpeed, console: Console) -> None:
    """A row a variant, the fastest first."""
    table = Table(box=SIMPLE, padding=(0, 2, 0, 0))
    for header in ("variant", "seconds", "ratio", f"{result.confidence:.0%} interval", "", "first window"):
        whole = header != ""  # a name that is cut short says nothing
        table.add_column(header, justify="left" if header in ("variant", "") else "right", no_wrap=whole)
    for ratio in sorted(result.ratios, key=lambda ratio: ratio.median):
        verdict = ("faster" if ratio.median < 1 else "slower") if ratio.clear else "no difference seen"
        verdict = verdict if result.confidence >= MEASUREMENTS_NEEDED else "too few turns to say"
        table.add_row(
            ratio.variant,
            f"{median(ratio.seconds):.2f}",
            f"{ratio.median:.2f}",
            f"{ratio.low:.2f}–{ratio.high:.2f}",
            "" if ratio.variant == DEFAULT else verdict,
            f"{ratio.first_window_seconds:.1f} s",
        )
    console.print(f"{result.config}: {result.windows} windows, {result.repeats} turns")
    console.print(table)
    for name, why in result.failed.items():
        console.print(f"{name}: not measured: {why}")


if __name__ == "__main__":
    try:
        _measure(int(sys.argv[1]), sys.argv[2:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
