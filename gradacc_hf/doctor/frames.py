"""Read the call stack: the user's line, the library that runs the loop, the scheduler of an optimizer.

The lines of a scheduler are found in the text of the file, because torch functions do not report its calls.

Frames and objects are only read, never changed.
"""

import inspect
import linecache
import os
import re
import sys
import sysconfig
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from gradacc_hf.doctor.record import Place, ScheduleLines

PACKAGE = str(Path(__file__).parent.parent)
DOCTOR = str(Path(__file__).parent)
LIBRARIES = tuple({os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")})
LENGTH_NAMES = ("T_max", "total_steps", "total_iters")  # attributes of schedulers, in steps
MAX_ITEMS_SEARCHED = 64  # of a list, tuple or dict that may hold a scheduler


def frames(outside: str = PACKAGE) -> Iterator[FrameType]:
    """Yield the frames of the caller's stack, innermost first; files in the folder `outside` are left out."""
    frame = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(outside):
            yield frame
        frame = frame.f_back


def _is_users(frame: FrameType) -> bool:
    return _is_users_file(frame.f_code.co_filename)


@lru_cache(maxsize=4096)
def _is_users_file(file: str) -> bool:
    if file.startswith("<"):
        return False
    path = os.path.realpath(file)
    installed = {os.path.realpath(folder) for folder in sys.path if folder and _has_installed(folder)}
    return not path.startswith((*LIBRARIES, *(folder + os.sep for folder in installed)))


@lru_cache(maxsize=256)
def _has_installed(folder: str) -> bool:
    """Whether a folder of the search path has installed packages."""
    return next(Path(folder).glob("*.dist-info"), None) is not None


def user_line() -> Place | None:
    """The innermost line outside of libraries; None if there is none."""
    found = next(filter(_is_users, frames()), None)
    return None if found is None else Place(found.f_code.co_filename, found.f_lineno)


def driver() -> str:
    """The library that runs the loop: "trainer" (of transformers), "accelerate", or "" for none."""
    modules = {frame.f_globals.get("__name__", "") for frame in frames()}
    if "transformers.trainer" in modules:
        return "trainer"
    return "accelerate" if "accelerate.accelerator" in modules else ""


def sampling_strategy() -> str:
    """`train_sampling_strategy` of the Trainer that runs the loop, or ""."""
    here = (frame for frame in frames() if frame.f_globals.get("__name__") == "transformers.trainer")
    arguments = (getattr(frame.f_locals.get("self"), "args", None) for frame in here)
    found = (getattr(each, "train_sampling_strategy", "") for each in arguments)
    return next((str(strategy) for strategy in found if strategy), "")


def _caller_of_torch() -> FrameType | None:
    """The frame whose call of a torch function is being handled."""
    return next((frame for frame in frames() if frame.f_code.co_name != "__torch_function__"), None)


@dataclass(frozen=True)
class StartedLoader:
    """An iteration over a loader.

    iterator: counts the batches in `_num_yielded`.
    is_stream: whether the loop calls `iter` itself, or a generator does; windows may then continue in the
        next pass on purpose.
    """

    loader: DataLoader
    iterator: Any
    is_stream: bool = False

    @property
    def batches(self) -> int:
        """Batches fetched in this pass."""
        return getattr(self.iterator, "_num_yielded", 0)


def starting_loader() -> StartedLoader | None:
    """The iteration over a loader that begins, if the current torch function draws the workers' seed."""
    frame = _caller_of_torch()
    if frame is None or frame.f_globals.get("__name__") != "torch.utils.data.dataloader":
        return None
    found = frame.f_locals if frame.f_code.co_name == "__init__" else {}
    if not isinstance(loader := found.get("loader"), DataLoader):
        return None
    starts = next(filter(_is_users, frames()), None)
    is_stream = False
    if starts is not None:
        text = linecache.getline(starts.f_code.co_filename, starts.f_lineno)
        is_generator = bool(starts.f_code.co_flags & inspect.CO_GENERATOR)
        is_stream = is_generator or bool(re.search(r"\biter\(", text))
    return StartedLoader(loader, found.get("self"), is_stream)


def is_clipping_norm() -> bool:
    """Whether torch's clipping to a norm is running."""
    names = ("clip_grad_norm_", "clip_grads_with_norm_", "_clip_grads_with_norm_")
    return any(frame.f_code.co_name in names for frame in frames())


def is_in_optimizer() -> bool:
    """Whether code of an optimizer is running."""
    return any(frame.f_globals.get("__name__", "").startswith("torch.optim") for frame in frames())


def is_clipping() -> bool:
    """Whether one of torch's functions that clip gradients is running."""
    return any(frame.f_globals.get("__name__") == "torch.nn.utils.clip_grad" for frame in frames())


def optimizer_being_built() -> torch.optim.Optimizer | None:
    """The optimizer that is adding parameters, if the current torch function checks a parameter."""
    frame = _caller_of_torch()
    if frame is None or frame.f_code.co_name != "add_param_group":
        return None
    optimizer = frame.f_locals.get("self")
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else None


def schedule_length(optimizer: torch.optim.Optimizer) -> int | None:
    """The number of steps in the schedule of this optimizer, if the calling frames hold its scheduler.

    The search covers the variables of each frame and the module variables of the user's frames. It includes
    the attributes of these objects, and the items of lists, tuples and dicts.
    """
    examined: set[int] = set()
    for frame in frames(outside=DOCTOR):
        spaces = [frame.f_locals, frame.f_globals] if _is_users(frame) else [frame.f_locals]
        for value in [value for space in spaces for value in list(space.values())]:
            if id(value) in examined:
                continue
            examined.add(id(value))
            for scheduler in _schedulers_in(value):
                is_ours = getattr(scheduler, "optimizer", None) is optimizer
                if is_ours and (steps := length_of(scheduler)) is not None:
                    return steps
    return None


def schedule_lines(optimizer: torch.optim.Optimizer) -> ScheduleLines:
    """Find the lines of this optimizer's scheduler in the text of the user's files."""
    for frame in filter(_is_users, frames(outside=DOCTOR)):
        file, lines = frame.f_code.co_filename, linecache.getlines(frame.f_code.co_filename)
        within = {line for *_, line in frame.f_code.co_lines() if line}
        names = sorted(_scheduler_names(frame, optimizer))
        any_name = "|".join(map(re.escape, names)) or "(?!)"
        made = _first_line(lines, rf"\b({any_name})\b[^=(]*=[^=]")
        stepped = _first_line(lines, rf"\b({any_name})\b(\[[^\]]*\])?\.step\(", within)
        stepped = stepped or _first_line(lines, r"\[[\"']lr[\"']\]\s*[-+*/]?=[^=]", within)
        if made or stepped:
            places = [Place(file, line) if line else None for line in (made, stepped)]
            return ScheduleLines(made=places[0], stepped=places[1])
    return ScheduleLines()


def _scheduler_names(frame: FrameType, optimizer: torch.optim.Optimizer) -> set[str]:
    """The names of variables and attributes that hold a scheduler of this optimizer."""

    def is_held(value: Any) -> bool:
        return any(getattr(each, "optimizer", None) is optimizer for each in _unwrapped(value))

    names = set()
    for space in (frame.f_locals, frame.f_globals):
        for name, value in list(space.items()):
            if any(map(is_held, _items(value))):
                names.add(name)
            elif not isinstance(value, type | ModuleType):
                held = _attributes(value).items()
                names |= {attribute for attribute, each in held if any(map(is_held, _items(each)))}
    return names


def _first_line(lines: Sequence[str], pattern: str, within: Container[int] = range(1, sys.maxsize)) -> int:
    """The first line of code that has the pattern, preferably one of `within`; 0 if there is none."""
    found = [n for n, text in enumerate(lines, 1) if re.search(pattern, text.partition("#")[0])]
    return next((n for n in found if n in within), found[0] if found else 0)


def length_of(scheduler: Any) -> int | None:
    """The number of steps in the schedule of this scheduler, or of the one it wraps; None if unknown."""
    for each in _unwrapped(scheduler):
        for name in LENGTH_NAMES:
            if isinstance(steps := getattr(each, name, None), int):
                return steps
        for function in getattr(each, "lr_lambdas", ()):
            if isinstance(steps := getattr(function, "keywords", {}).get("num_training_steps"), int):
                return steps
    return None


def _schedulers_in(value: Any) -> Iterator[LRScheduler]:
    """The schedulers that a variable holds: itself, its items, its attributes, and the items of these."""
    for item in _items(value):
        yield from _unwrapped(item)
        if not isinstance(item, type | ModuleType):
            for attribute in list(_attributes(item).values()):
                for inner in _items(attribute):
                    yield from _unwrapped(inner)


def _items(value: Any) -> list[Any]:
    if issubclass(type(value), list | tuple | dict) and len(value) <= MAX_ITEMS_SEARCHED:
        return list(value.values() if isinstance(value, dict) else value)
    return [value]


def _attributes(value: Any) -> dict[str, Any]:
    try:
        attributes = vars(value)
    except Exception:  # the object has no attributes, or is a proxy that is not ready
        return {}
    return attributes if isinstance(attributes, dict) else {}


def _unwrapped(value: Any) -> Iterator[LRScheduler]:
    """Yield the torch scheduler: the value, or the attribute `scheduler` of a wrapper like Accelerate's."""
    for each in (value, _attributes(value).get("scheduler")):
        if each is not None and issubclass(type(each), LRScheduler):
            yield cast(LRScheduler, each)
