"""Checks of the arguments of a `WindowLoader`. Each raises a ValueError with one line.

`refuse_engine` checks the engine and the device.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from gradacc_hf.accumulation.streaming import is_stream
from gradacc_hf.errors import GradaccError, InputError, one_line
from gradacc_hf.utils.hardware import refuse_place

OF_LOADER = "its data set (loader.dataset) with collate_fn=loader.collate_fn"


@contextmanager
def name_example(index: int) -> Iterator[None]:
    """Turn an exception of a data set or a transform into an InputError with the index of the example."""
    try:
        yield
    except (GradaccError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(
            f"example {index} of the data set cannot be read ({found}): correct it, or remove it"
        ) from error


def check_windows(windows: Any) -> None:
    """Raise InputError for a DataLoader in place of a WindowLoader."""
    if isinstance(windows, DataLoader):
        raise InputError(
            f"windows is a {type(windows).__name__}, which makes batches of its own: make a WindowLoader of "
            f"{OF_LOADER}, and an effective batch size"
        )


def refuse_engine(accelerator: Accelerator) -> None:
    """Raise ValueError for an engine that accumulates by itself, a shared model, or an untested device."""
    parallelism = getattr(accelerator, "parallelism_config", None)
    if getattr(parallelism, "non_data_parallel_size", 1) > 1:
        raise ValueError(
            "processes that share a model (tensor, context or sequence parallel) need the same examples: use "
            "data parallelism (DDP or FSDP) only"
        )
    refuse_place(accelerator.device.type, accelerator.distributed_type.value)


def check_arguments(
    dataset: Any, effective_batch_size: Any, collate_fn: Callable, pad_to: Any, pad_to_multiple_of: Any = None
) -> None:
    """Raise ValueError for impossible data, sizes and padding."""
    if isinstance(dataset, Mapping):
        columns = any(isinstance(column, list | tuple | np.ndarray) for column in dataset.values())
        cure = "datasets.Dataset.from_dict(…) of it" if columns else "one split, such as dataset['train']"
        raise ValueError(f"the data set is a mapping with {list(dataset)[:5]}: give {cure}")
    if isinstance(dataset, DataLoader):
        raise ValueError(
            f"the data set is a {type(dataset).__name__}, whose items are batches: give {OF_LOADER} instead"
        )
    if hasattr(dataset, "iloc"):  # a pandas DataFrame or Series, whose items are columns
        raise ValueError(
            f"the data set is a pandas {type(dataset).__name__}: give datasets.Dataset.from_pandas(…) of it, "
            "or its .to_dict('records')"
        )
    stream = is_stream(dataset)
    if not stream and not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            "the data set must be a sequence with a length, or a stream of examples to iterate over; found "
            f"{type(dataset).__name__}"
        )
    if not stream and len(dataset) == 0:
        raise ValueError("the data set has no examples")
    if not callable(effective_batch_size):
        size, most = effective_batch_size, np.inf if stream else len(dataset)
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or not 1 <= size <= most:
            allowed = "of at least 1" if stream else f"from 1 to the {most} examples of the data set"
            raise ValueError(f"the effective batch size is {size!r}; it must be an integer {allowed}")
    multiple = pad_to_multiple_of
    if multiple is not None and (
        isinstance(multiple, bool) or not isinstance(multiple, int | np.integer) or multiple < 1
    ):
        raise ValueError(f"pad_to_multiple_of is {multiple!r}; allowed: 1 token or more, or None")
    if multiple is not None and pad_to != "micro_batch":
        raise ValueError(
            f"pad_to_multiple_of={multiple} rounds the padded length of each micro-batch, but "
            f"pad_to={pad_to!r} already sets it: use one of the two"
        )
    if pad_to not in ("micro_batch", "nothing"):
        if pad_to != "window" and (
            isinstance(pad_to, bool) or not isinstance(pad_to, int | np.integer) or pad_to < 1
        ):
            raise ValueError(
                f"pad_to is {pad_to!r}; allowed: 'micro_batch', 'window', 'nothing', or a number of tokens"
            )
        if not _takes_pad_to(collate_fn):
            raise ValueError(
                f"pad_to={pad_to!r} needs a collate function that takes pad_to (the tokens to pad to); "
                f"{getattr(collate_fn, '__name__', type(collate_fn).__name__)} does not"
            )


def check_padding_free(pad_to: Any) -> None:
    """Raise ValueError for a padding that a split without padding would not bound."""
    if pad_to != "micro_batch":
        raise ValueError(
            f"pad_to is {pad_to!r}; allowed with padding_free=True: 'micro_batch', which pads to the longest "
            "example of a micro-batch"
        )


def check_sizes(bound: Any, max_tokens: Any, micro_batch_size: Any, noise_every: int) -> None:
    """Raise ValueError for two sizes of a micro-batch at once, or for a negative interval."""
    if noise_every < 0:
        raise ValueError(f"noise_every is {noise_every}; allowed: 1 window or more, or 0 for never")
    if bound is not None and (max_tokens, micro_batch_size) != (None, None):
        raise ValueError("set bound=, max_tokens or micro_batch_size: only one of the three")


def check_sources(
    dataset: Any, sources: Any, shares: Any, weights: Any, num_items: Any = None
) -> np.ndarray | None:
    """Return the weights of examples, or None. Raise ValueError for weights and shares that cannot work."""
    if shares is not None and sources is None:
        raise ValueError("shares needs sources=, the name of each example's source")
    given = [name for name, value in (("sources", sources), ("weights", weights)) if value is not None]
    if given and is_stream(dataset):
        raise ValueError(f"{given[0]}= is for data with a length, not for a stream: leave it out")
    if weights is None:
        return None
    found = np.asarray(weights, np.float64)
    if found.shape != (len(dataset),):
        raise ValueError(
            f"weights has shape {found.shape}: give a number for each of {len(dataset)} examples"
        )
    if wrong := np.flatnonzero(~np.isfinite(found) | (found < 0)).tolist():
        raise ValueError(f"the weight of example {wrong[0]} is {found[wrong[0]]}: allowed are 0 or more")
    if isinstance(num_items, Mapping):
        raise ValueError("weights= is for one loss, and num_items gives several: leave one of the two out")
    return found


def check_stream(dataset: Any, lengths: Any, num_workers: int, buffer_size: Any) -> None:
    """Raise ValueError for arguments that a stream does not allow, or a buffer size without a stream."""
    if not is_stream(dataset):
        if buffer_size is not None:
            raise ValueError(
                f"buffer_size={buffer_size!r} is for streams: a {type(dataset).__name__} has a length and is "
                "shuffled as a whole; leave buffer_size out"
            )
        return
    if isinstance(dataset, Iterator):
        raise ValueError(
            f"a {type(dataset).__name__} can be read only once, but each epoch reads it again: use "
            "datasets.IterableDataset.from_generator(function), or an object whose __iter__ starts again"
        )
    if getattr(dataset, "_distributed", None) is not None:
        raise ValueError(
            "the stream is split by process (split_dataset_by_node), but windows span all processes: give "
            "the whole stream, which each process reads"
        )
    if lengths is not None and not isinstance(lengths, str) and not callable(lengths):
        raise ValueError(
            f"lengths is a {type(lengths).__name__}; for a stream it must be a column name or a function of "
            "an example"
        )
    if num_workers:
        raise ValueError(f"num_workers is {num_workers}; the process itself reads a stream: set 0")
    if buffer_size is not None and (
        isinstance(buffer_size, bool) or not isinstance(buffer_size, int | np.integer) or buffer_size < 1
    ):
        raise ValueError(f"buffer_size is {buffer_size!r}; it must be an integer of at least 1 example")


def _takes_pad_to(collate_fn: Callable) -> bool:
    parameters = inspect.signature(collate_fn).parameters.values()
    return any(p.name == "pad_to" or p.kind is p.VAR_KEYWORD for p in parameters)
