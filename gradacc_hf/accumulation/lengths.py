"""The tokens of each example, measured before a split.

By default a length is the size of `input_ids`. Without `input_ids`, the length is the size of the main input:
samples of audio, frames of features, positions of embeddings.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gradacc_hf.accumulation.validation import name_example
from gradacc_hf.utils.logs import get_logger

logger = get_logger(__name__)

Lengths = str | Sequence[int] | np.ndarray | Callable[[Any], int] | None
Keys = tuple[Any, ...]  # the way from an example to a value in it

# The main inputs of the models of transformers, before any other input.
MAIN_INPUTS = ("input_values", "input_features", "inputs_embeds", "past_values", "pixel_values")
NO_INPUTS = ("label", "target")  # beginnings of the names of answers


def measure_lengths(dataset: Any, lengths: Lengths, bounds: bool = False) -> np.ndarray:
    """Measure the tokens of every example.

    Args:
        dataset: A sequence of examples.
        lengths: A column name, a sequence of numbers, (examples, columns) for inputs that are padded
            separately, or a function of an example. None for the size of `input_ids`. Nested `input_ids`
            (choices) count as rows × the longest row. Without `input_ids`, see `bounds`.
        bounds: Whether lengths bound micro-batches. Without `input_ids`, the main input is then measured,
            with a warning for examples that have no sequence of numbers. Otherwise each example counts as 1.

    Returns:
        Tokens, int32 (examples, columns).
    """
    examples = _examples(dataset)
    if isinstance(lengths, str) and hasattr(dataset, "select_columns"):
        measured = dataset.select_columns(lengths)[lengths][:]
    elif isinstance(lengths, str):
        measured = [example[lengths] for example in examples]
    elif callable(lengths):
        measured = [lengths(example) for example in examples]
    elif lengths is not None:
        measured = lengths
    elif hasattr(dataset, "with_format") and "input_ids" in getattr(dataset, "column_names", ()):
        tables = dataset.select_columns("input_ids").with_format("arrow").iter(100_000)
        measured = np.concatenate([_column_lengths(table["input_ids"]) for table in tables])
    elif isinstance(first := next(_examples(dataset)), Mapping) and "input_ids" in first:
        measured = [_padded_size(example["input_ids"]) for example in examples]
    else:
        measured = _measure_main_input(dataset, first, examples) if bounds else np.ones(len(dataset))
    array = np.asarray(measured)
    if array.ndim not in (1, 2) or len(array) != len(dataset) or not array.size:
        raise ValueError(
            f"lengths has the shape {array.shape}, but the data set has {len(dataset)} examples: give one "
            "number per example, or one per example and separately padded input"
        )
    if not np.issubdtype(array.dtype, np.number) or not (np.isfinite(array) & (array >= 0)).all():
        raise ValueError(
            f"lengths must be numbers of tokens, 0 or more; found {array.dtype}: {array[:3].tolist()} …"
        )
    return array.astype(np.int32).reshape(len(dataset), -1)


def _examples(dataset: Any) -> Iterator[Any]:
    """Yield the examples. Raise InputError with the index of an example that cannot be read."""
    # A torch data set without __iter__ may raise no IndexError at the end, so iterate by index.
    rows = iter(dataset) if hasattr(dataset, "__iter__") else (dataset[i] for i in range(len(dataset)))
    for index in range(len(dataset)):
        with name_example(index):
            example = next(rows)
        yield example


def _column_lengths(column: Any) -> np.ndarray:
    import pyarrow as pa  # late: only columns of datasets need it, and datasets installs it
    import pyarrow.compute

    if pa.types.is_nested(column.type.value_type):
        return np.array([_padded_size(row) for row in column.to_pylist()])
    return np.asarray(pyarrow.compute.list_value_length(column))  # type: ignore[attr-defined]


def _padded_size(ids: Any) -> int:
    """Return the tokens of one example: its length, or for nested rows (choices) rows × the longest."""
    if isinstance(ids, torch.Tensor):
        return ids.numel()
    nested = len(ids) > 0 and np.ndim(ids[0]) > 0
    return len(ids) * max(len(row) for row in ids) if nested else len(ids)


def _measure_main_input(dataset: Any, first: Any, examples: Iterable[Any]) -> np.ndarray:
    """Return the length of the main input of each example, or 1 with a warning without a sequence.

    The first example determines the input.
    """
    keys = _main_input(first)
    if keys is not None and len(keys) == 1 and _is_column_of_lists(dataset, keys[0]):
        tables = dataset.select_columns(keys[0]).with_format("arrow").iter(100_000)
        return np.concatenate([_column_lengths(table[keys[0]]) for table in tables])
    if keys is None or len(_shape(_value(first, keys)) or ()) not in (1, 2):  # such as images
        shapes: list[tuple[int, ...] | None] = [None] * len(dataset)
    else:
        shapes = [_shape(_value(example, keys)) for example in examples]
    is_measured = np.array([shape is not None and len(shape) in (1, 2) for shape in shapes])
    if not is_measured.all():
        logger.warning_once(
            f"{(~is_measured).sum()} of {len(shapes)} examples have no input_ids and no other sequence of "
            "numbers, and count as 1 token each: nothing else bounds a micro-batch. Give lengths=, or "
            "micro_batch_size= instead of max_tokens="
        )
    sizes = np.array([(*shape, 1)[:2] for shape in shapes if shape is not None and len(shape) in (1, 2)])
    measured = np.ones(len(shapes))
    if len(sizes):
        measured[is_measured] = _along_the_sequence(sizes)
    return measured


def _along_the_sequence(sizes: np.ndarray) -> np.ndarray:
    """Return lengths from sizes (examples, 2): of the axis that varies, or else of the longer one."""
    first_varies, second_varies = sizes.min(0) != sizes.max(0)
    if first_varies and second_varies:
        return sizes.prod(1)
    if first_varies or second_varies:
        return sizes[:, 0 if first_varies else 1]
    return sizes.max(1)


def _main_input(example: Any) -> Keys | None:
    """Return the keys of the main input in an example: a known name, or else the largest sequence."""
    found = _sequences(example)
    for name in ("input_ids", *MAIN_INPUTS):
        for keys, _ in found:
            if keys and keys[-1] == name:
                return keys
    return max(found, key=lambda each: each[1], default=(None, 0))[0]


def _sequences(value: Any) -> list[tuple[Keys, int]]:
    """Return the keys and number of elements of each sequence of numbers that may be an input."""
    if isinstance(value, Mapping):
        inputs = [key for key in value if not (str(key).startswith(NO_INPUTS) or str(key).endswith("mask"))]
        return [((key, *keys), size) for key in inputs for keys, size in _sequences(value[key])]
    if (shape := _shape(value)) is not None:
        return [((), int(np.prod(shape)))] if shape else []
    for position, part in enumerate(value if isinstance(value, tuple | list) else ()):
        if found := _sequences(part):  # (x, y): the answers come last
            return [((position, *keys), size) for keys, size in found]
    return []


def _shape(value: Any) -> tuple[int, ...] | None:
    """Return the shape of numbers, () for one number; None for anything else."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, np.ndarray):
        return value.shape if value.dtype.kind in "biuf" else None
    if isinstance(value, int | float | np.number):
        return ()
    if not isinstance(value, list):
        return None
    if not value or _shape(value[0]) == ():
        return (len(value),)
    rows = [_shape(row) for row in value]
    shapes = [row for row in rows if row is not None and len(row) == len(rows[0] or ())]
    return (len(rows), *np.max(shapes, axis=0).tolist()) if len(shapes) == len(rows) else None


def _value(example: Any, keys: Keys) -> Any:
    try:
        for key in keys:
            example = example[key]
    except (KeyError, IndexError, TypeError):
        return None
    return example


def _is_column_of_lists(dataset: Any, name: Any) -> bool:
    """Whether a column of a `datasets.Dataset` has lists of numbers, which arrow measures at once."""
    arrow = sys.modules.get("pyarrow")  # without import, as datasets may be missing
    if arrow is None or not hasattr(dataset, "with_format") or name not in dataset.column_names:
        return False
    kind = dataset.features.arrow_schema.field(name).type
    is_list = arrow.types.is_list(kind) or arrow.types.is_large_list(kind)
    return is_list and not arrow.types.is_nested(kind.value_type) and dataset.format["type"] != "custom"
