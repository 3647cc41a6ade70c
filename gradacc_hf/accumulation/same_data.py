"""Whether all processes of a run have the same examples in the same order.

Each process reads the data by itself. Other data, or another order, would repeat some examples and leave out
others. Each window therefore compares a checksum: of the examples and the split of the window, and in the
first window of lengths and contents, too. The contents are a sample of the data set. Each later window of a
stream compares its lengths and its first example. The checksum travels with the item counts. Only after a
difference do the processes exchange more.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object

from gradacc_hf.accumulation.streaming import Stream
from gradacc_hf.utils.logs import get_logger
from gradacc_hf.utils.rng import seed_host_generators

if TYPE_CHECKING:
    from gradacc_hf.accumulation.collation import LocalWindows, Split

logger = get_logger(__name__)

SAMPLE = 64  # examples of the first window, and as many spread over the data set
EXAMINED = 4  # examples that differ and are read again
READINGS = {False: 8, True: 2}  # of such examples; by whether they are from a stream
DEPTH = 8  # levels of an example that are compared
RTOL = 1e-3  # features of equal audio may differ by rounding between machines
SAME_DATA = "all processes must have the same data in the same order"


def checksum(*values: Any) -> int:
    """Return a checksum of values, exact in float64."""
    digest = hashlib.blake2b(digest_size=6)
    for leaf in _leaves(values):
        content = leaf if isinstance(leaf, bytes) else repr(leaf.shape).encode() + leaf.tobytes()
        digest.update(len(content).to_bytes(8, "little") + content)
    return int.from_bytes(digest.digest(), "little")


def checksum_of_split(split: "Split") -> int:
    """Return a checksum of a window: the examples, and the micro-batches of each process."""
    return checksum(split.rows, split.indices, split.processes)


def checksum_of_rows(windows: "LocalWindows", split: "Split") -> int:
    """Return a checksum of the data, from a sample that includes examples of this window."""
    is_first = windows.compare_at == (split.epoch, split.window)
    return checksum(*_facts(windows, split, SAMPLE if is_first else 1).values())


def check_same_data(windows: "LocalWindows", split: "Split") -> None:
    """Determine why the checksums of a window differ by process. All processes must call it.

    Return without an error if examples differ by rounding, or change at every reading. Examples that change
    cannot be compared, which is a warning.

    Raises:
        ValueError: The processes have other data, another order or other settings. The same in all processes.
    """
    found = gather_object([{**_facts(windows, split), **_settings(windows, split)}])
    place = f"window {split.window} of epoch {split.epoch}"
    lines = {
        "examples": "the data set has {0} examples on process 0 and {1} on process {2}: " + SAME_DATA,
        "seed": "the seed is {0} on process 0 and {1} on process {2}: give all processes the same seed",
        "indices": place + " has other examples on process {2} than on process 0: give all processes the "
        "same effective_batch_size, shuffle, drop_last, leave_out and buffer_size",
        "lengths": "examples have other lengths on process {2} than on process 0: " + SAME_DATA,
        "rows": "",
        "bound": "a micro-batch has at most {0} on process 0 and {1} on process {2}: give all processes one "
        "bound",
        "split": place + " is split in another way on process {2} than on process 0: give all processes the "
        "same settings of WindowLoader",
    }
    for name, line in lines.items():
        values = [facts[name] for facts in found]
        other = next((process for process, value in enumerate(values) if value != values[0]), None)
        if other is not None and name == "rows":
            _compare_rows(windows, split, values)
        elif other is not None:
            raise ValueError(line.format(values[0], values[other], other))


def _facts(windows: "LocalWindows", split: "Split", most: int = SAMPLE) -> dict[str, Any]:
    """Return what must be alike in all processes, with checksums of the first examples of the window."""
    is_stream = isinstance(windows.plan, Stream)
    sample = _sample(windows, split, most)
    with seed_host_generators():  # random crops and the like are then alike
        rows = [checksum(row) for row in windows.read(sample)]
    return {
        "examples": None if is_stream else len(windows.dataset),
        "lengths": checksum(windows.tokens[split.indices] if is_stream else windows.tokens),
        "rows": rows,
    }


def _settings(windows: "LocalWindows", split: "Split") -> dict[str, Any]:
    return {
        "seed": windows.plan.seed,
        "indices": checksum(split.indices, sorted(windows.leave_out)),
        "bound": str(windows.bound),
        "split": checksum(split.processes),
    }


def _sample(windows: "LocalWindows", split: "Split", most: int = SAMPLE) -> np.ndarray:
    """Return the first examples of the window and, of a data set with a length, examples spread over it."""
    sample = split.indices[:most]
    if not isinstance(windows.plan, Stream):
        spread = np.linspace(0, len(windows.dataset) - 1, SAMPLE).astype(np.int64)
        sample = np.union1d(sample, spread)
    return sample[~np.isin(sample, list(windows.leave_out))]


def _compare_rows(windows: "LocalWindows", split: "Split", checksums: list[list[int]]) -> None:
    """Raise ValueError unless the examples differ by rounding, or change. All processes must call it.

    Each reading starts with seeded generators. Examples that are drawn from the generators of torch, numpy or
    Python are then alike at every reading, and in all processes.
    """
    sample = _sample(windows, split)
    differ = [i for i, values in enumerate(zip(*checksums, strict=True)) if len(set(values)) > 1][:EXAMINED]
    chosen, readings, is_stream = sample[differ], [], isinstance(windows.plan, Stream)
    read = windows.plan.read_again if isinstance(windows.plan, Stream) else windows.read
    for _ in range(READINGS[is_stream]):
        with seed_host_generators():
            readings.append(read(chosen))
    changes = len({checksum(reading) for reading in readings}) > 1
    held = windows.read(chosen) if is_stream else readings[0]  # a stream was first read without seeds
    found = gather_object([(changes, *([_leaves(row) for row in rows] for rows in (readings[0], held)))])
    changes, again, held = zip(*found, strict=True)
    other = _first_unlike(again)
    if other is not None and not any(changes):
        process, row = other
        raise ValueError(
            f"example {chosen[row]} differs between process 0 and process {process}: {SAME_DATA}"
        )
    if any(changes) or _first_unlike(held) is not None:
        logger.warning_once(
            f"example {chosen[0]} changes at every reading, so the data of the processes cannot be compared: "
            f"{SAME_DATA}. Give random changes to WindowLoader as transform="
        )


def _first_unlike(contents: Sequence[list[Any]]) -> tuple[int, int] | None:
    """Return the first process and row that differ from process 0 by more than rounding; None without one."""
    return next(
        (
            (process, row)
            for process, rows in enumerate(contents)
            for row in range(max(len(rows), len(contents[0])))
            if len(rows) != len(contents[0]) or not _are_close(contents[0][row], rows[row])
        ),
        None,
    )


def _are_close(row: list[Any], other: list[Any]) -> bool:
    return len(row) == len(other) and all(
        a == b
        if isinstance(a, bytes) or isinstance(b, bytes)
        else a.shape == b.shape
        and np.allclose(a, b, rtol=RTOL, atol=RTOL * float(np.abs(a).max(initial=0)), equal_nan=True)
        for a, b in zip(row, other, strict=True)
    )


def _leaves(value: Any, depth: int = 0) -> list[bytes | np.ndarray]:
    """Return the content of a value: real numbers as arrays, and all else as bytes.

    An object of an unknown kind is its class alone. A path is the name of the file, as folders differ by
    machine.
    """
    if isinstance(value, Mapping):
        keys = sorted((key for key in value if not _is_place_of_bytes(key, value)), key=str)
        return [b"{", *(leaf for key in keys for leaf in _leaves((str(key), value[key]), depth + 1)), b"}"]
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().to_dense()
        return _of_array((value.double() if value.is_floating_point() else value).numpy(), depth)
    if isinstance(value, list | tuple):
        if (array := _as_numbers(value)) is not None:
            return _of_array(array, depth)
        return [b"[", *(leaf for part in value for leaf in _leaves(part, depth + 1)), b"]"]
    if isinstance(value, str | PurePath):
        is_file = isinstance(value, PurePath) or (os.path.isabs(value) and os.path.exists(value))
        return [f"str:{os.path.basename(value) if is_file else value}".encode("utf-8", "surrogatepass")]
    if isinstance(value, float) or hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        return _of_array(np.asarray(value), depth)
    if isinstance(value, bytes):
        return [value]
    if isinstance(value, set | frozenset):
        return [repr(sorted(map(repr, value))).encode()]
    if depth < DEPTH and getattr(value, "__dict__", None) and not isinstance(value, type):
        return [type(value).__name__.encode(), *_leaves(vars(value), depth + 1)]
    text = repr(value)
    return [(type(value).__name__ if " at 0x" in text else text).encode()]


def _is_place_of_bytes(key: Any, value: Mapping[Any, Any]) -> bool:
    """Whether a key is the path of a file whose content is there, too, as in the images of `datasets`."""
    return key == "path" and isinstance(value.get("bytes"), bytes)


def _as_numbers(values: list[Any] | tuple[Any, ...]) -> np.ndarray | None:
    if not values or not isinstance(values[0], int | float | list | np.number):
        return None
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError):  # of unequal lengths
        return None
    return array if array.dtype.kind in "biuf" else None


def _of_array(array: np.ndarray, depth: int) -> list[bytes | np.ndarray]:
    if array.dtype.kind == "O":
        return _leaves(array.tolist(), depth + 1)
    if array.dtype.kind == "f":
        return [array.astype(np.float64)]
    return [f"{array.dtype.kind}{array.shape}".encode(), array.tobytes()]
