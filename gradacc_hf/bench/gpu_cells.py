"""The cells of `gradacc bench gpu`, and the peak speed of the device."""

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from gradacc_hf.bench.gpu_contenders import CONTENDERS, Turn
from gradacc_hf.memory.trace import AUTOCAST

PEAKS = {  # part of a GPU's name → 10¹² operations per second in bf16 and fp32; the first match counts
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H200 NVL": (835, 60),
    "H100": (989, 67),
    "H200": (989, 67),
    "A100": (312, 19.5),
}
"""NVIDIA's data sheets: dense bf16 on tensor cores, and fp32 without TF32, torch's default."""


@dataclass(frozen=True)
class Cell:
    """Medians over the turns of a contender, without the warm-up. `failed`: why there are none or no more."""

    model: str
    precision: str
    contender: str
    turns: int
    tokens_per_second: float | None = None  # real tokens
    of_dense_limit: float | None = None
    mfu: float | None = None
    peak_bytes: int | None = None  # the largest
    predicted_bytes: int | None = None
    failed: str | None = None


def peak_of(precision: str, device: torch.device) -> tuple[float, str]:
    """Return the operations per second that a device can reach, and the source of the number.

    A device that is not in `PEAKS` computes a large matrix product instead.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for part, (bf16, fp32) in PEAKS.items():
        if part in name:
            return (bf16 if precision == "bf16" else fp32) * 1e12, f"data sheet, {part}"
    size = 8192 if device.type == "cuda" else 256
    matrix = torch.randn(size, size, device=device, dtype=AUTOCAST.get(precision, torch.float32))
    seconds = []
    for _ in range(5):  # the first one warms up
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[1:]), f"measured, a product of {size} × {size}"


def group_of(row: Any) -> tuple[str, str]:
    return row.model, row.precision


def cells_of(turns: list[Turn], peaks: dict[str, tuple[float, str]]) -> list[Cell]:
    """Return the cell of each contender of each model and precision, in the order of the first run.

    A share of the dense limit is the median of the shares in each turn.
    """
    speeds = {
        (*group_of(row), row.contender, row.turn): row.tokens / row.seconds
        for row in turns
        if row.turn and not row.failed
    }
    found = []
    for model, precision in dict.fromkeys(map(group_of, turns)):
        own = [row for row in turns if group_of(row) == (model, precision)]
        for contender in [name for name in CONTENDERS if any(row.contender == name for row in own)]:
            runs = [row for row in own if row.contender == contender]
            done = [row for row in runs if row.turn and not row.failed]
            failed = next((row.failed for row in runs if row.failed), None)
            cell = (model, precision, contender, len(done))
            if not done:
                found.append(Cell(*cell, failed=failed or "stopped before a turn that counts"))
                continue
            shares = [
                speeds[model, precision, contender, row.turn] / speeds[model, precision, "dense", row.turn]
                for row in done
                if (model, precision, "dense", row.turn) in speeds
            ]
            flops = [row.flops / row.seconds for row in done if row.flops is not None]
            found.append(
                Cell(
                    *cell,
                    tokens_per_second=median(row.tokens / row.seconds for row in done),
                    of_dense_limit=median(shares) if shares else None,
                    mfu=median(flops) / peaks[precision][0] if flops else None,
                    peak_bytes=max(row.peak_bytes for row in done),
                    predicted_bytes=done[0].predicted_bytes,
                    failed=failed,
                )
            )
    return found
