"""`gradacc bench cpu`: the speed of a recipe under different settings of a CPU.

The settings are threads, malloc, the wait policy of threads, padding to a multiple, bf16 and torch.compile.
Each run has a separate process, because a process reads the first three at the start. All runs train the same
windows, in turns. The result is the ratio to the default run of the same turn.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from ctypes.util import find_library
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gradacc_hf.bench.offline import check_names
from gradacc_hf.bench.progress import Progress
from gradacc_hf.errors import GradaccError, InputError
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.utils.hardware import Device, find_device
from gradacc_hf.utils.verbosity import silence_libraries

DEFAULT = "default"
MALLOC_KEPT_BYTES = 4 * 2**30  # glibc keeps smaller freed blocks, instead of returning them to the kernel
MIN_CONFIDENCE = 0.9  # for a verdict of faster or slower; reached with 5 turns
WARM_UP_WINDOWS = 1  # not timed: they compile the model and fill the allocator


@dataclass(frozen=True)
class Variant:
    """The environment variables and the command-line settings of a run."""

    environment: dict[str, str] = field(default_factory=dict)
    settings: tuple[str, ...] = ()


def variants(device: Device | None = None) -> dict[str, Variant]:
    """Return the variants that this machine can run, by name, the default first."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = {DEFAULT: Variant()}
    for threads in sorted({1, max(1, cores // 2), cores, 2 * cores}):
        found[f"threads_{threads}"] = Variant({"OMP_NUM_THREADS": str(threads)})
    found["wait_passive"] = Variant({"OMP_WAIT_POLICY": "PASSIVE"})
    found["wait_active"] = Variant({"OMP_WAIT_POLICY": "ACTIVE"})
    if sys.platform == "linux":
        tunables = (
            f"glibc.malloc.mmap_threshold={MALLOC_KEPT_BYTES}:glibc.malloc.trim_threshold={MALLOC_KEPT_BYTES}"
        )
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
class VariantRatio:
    """Seconds of a variant / seconds of the default, over all turns. Below 1, the variant is faster."""

    variant: str
    median: float
    low: float
    high: float
    seconds: tuple[float, ...]  # of the timed windows, by turn
    first_window_seconds: float  # median; includes compiling

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 1."""
        return not self.low <= 1 <= self.high


@dataclass(frozen=True)
class CpuSettingsResult:
    """All variants. The intervals contain the median with the probability `confidence`."""

    config: str
    windows: int
    repeats: int
    confidence: float
    ratios: tuple[VariantRatio, ...]
    failed: dict[str, str]
    measured_with: dict[str, str]


def measure_cpu_settings(
    config: str,
    only: Sequence[str] = (),
    windows: int = 6,
    repeats: int = 6,
    progress: Progress = iter,
) -> CpuSettingsResult:
    """Time the first windows of a config's run, each variant once per turn.

    The interval reaches from the smallest to the largest of n ratios. It contains the median with the
    probability 1 − 2^(1 − n), because each ratio is above the median with probability 1/2.

    Args:
        config: the config file.
        only: names of variants; by default all.
        windows: the number of timed windows, after one window to warm up.
        repeats: the number of turns.
        progress: wraps the runs.

    Raises:
        InputError: a name is unknown, or the default fails.
    """
    known = variants()
    check_names(only, known)
    chosen = {name: known[name] for name in known if name == DEFAULT or name in only or not only}
    names = list(chosen)
    turns = [(turn, names[(turn + i) % len(names)]) for turn in range(repeats) for i in range(len(names))]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for _, name in progress(turns):
        if name not in failed:
            try:
                found[name].append(time_windows(config, windows, chosen[name]))
            except VariantFailedError as error:
                if name == DEFAULT:
                    raise InputError(f"{config}: {error}") from error
                failed[name] = str(error)
    default = [run["seconds"] for run in found[DEFAULT]]
    ratios = [ratio_to_default(name, found[name], default) for name in names if name not in failed]
    return CpuSettingsResult(
        config=config,
        windows=windows,
        repeats=repeats,
        confidence=1 - 2.0 ** (1 - repeats),
        ratios=tuple(ratios),
        failed=failed,
        measured_with=measured_with("cpu") | {"threads": str(found[DEFAULT][0]["threads"])},
    )


def ratio_to_default(name: str, runs: Sequence[dict[str, Any]], default: Sequence[float]) -> VariantRatio:
    """Compare the runs of a variant with the seconds of the default, turn by turn."""
    seconds = tuple(run["seconds"] for run in runs)
    by_turn = [mine / reference for mine, reference in zip(seconds, default, strict=True)]
    first = median(run["first"] for run in runs)
    return VariantRatio(name, median(by_turn), min(by_turn), max(by_turn), seconds, first)


class VariantFailedError(GradaccError):
    """A run failed; the message is the last line on stderr."""


def time_windows(config: str, windows: int, variant: Variant) -> dict[str, Any]:
    """Train windows of a config in a process, after one window to warm up. Raises VariantFailedError."""
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


def time_windows_here(windows: int, settings: Sequence[str]) -> None:
    """Train windows in this process, and print the seconds as JSON."""
    import torch

    from gradacc_hf.recipe.loading import load_recipe_to_run
    from gradacc_hf.run.setup import load_data, make_accelerator, make_model, make_windows
    from gradacc_hf.training.loop import train
    from gradacc_hf.training.optimizer import make_optimizer
    from gradacc_hf.training.run_log import peak_memory_bytes

    silence_libraries()
    recipe = load_recipe_to_run([*settings, "--output.tracker", "none"])
    accelerator = make_accelerator(recipe.config)
    recipe, training, validation = load_data(recipe)
    loader, _ = make_windows(recipe, training, validation, accelerator)
    if not 1 <= windows <= len(loader) - WARM_UP_WINDOWS:
        raise InputError(f"--windows: found {windows}; allowed: 1 to {len(loader) - WARM_UP_WINDOWS}")
    model = make_model(recipe)
    optimizer = make_optimizer(model, recipe.config.optim, accelerator.mixed_precision)
    model, optimizer = accelerator.prepare(model, optimizer)
    shared: dict[str, Any] = {"accelerator": accelerator, "compute_loss": recipe.loss}
    records = train(model, optimizer, loader, max_windows=windows + WARM_UP_WINDOWS, **shared)
    seconds = [record.seconds for record in records]
    found = {"first": sum(seconds[:WARM_UP_WINDOWS]), "seconds": sum(seconds[WARM_UP_WINDOWS:])}
    peak = peak_memory_bytes(accelerator.device)
    print(json.dumps({**found, "threads": torch.get_num_threads(), "peak_memory_bytes": peak}))


def print_cpu_settings(result: CpuSettingsResult, console: Console) -> None:
    """Print a row for each variant, the fastest first."""
    table = Table(box=SIMPLE, padding=(0, 2, 0, 0))
    for header in ("variant", "seconds", "ratio", f"{result.confidence:.0%} interval", "", "first window"):
        whole = header != ""  # names are not truncated
        table.add_column(header, justify="left" if header in ("variant", "") else "right", no_wrap=whole)
    for ratio in sorted(result.ratios, key=lambda ratio: ratio.median):
        verdict = ("faster" if ratio.median < 1 else "slower") if ratio.clear else "no clear difference"
        verdict = verdict if result.confidence >= MIN_CONFIDENCE else "too few turns"
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
        console.print(f"{name} was not measured: {why}")


if __name__ == "__main__":
    try:
        time_windows_here(int(sys.argv[1]), sys.argv[2:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
