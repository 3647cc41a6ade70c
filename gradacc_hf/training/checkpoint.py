"""Checkpoints: what a run needs to go on as if it had never been stopped. Saved between windows only.

One is a folder, `checkpoints/window-00000040` in the run's: the trained weights and the optimizer's tensors
in safetensors, which each process writes its part of and any number of processes can read
(`torch.distributed.checkpoint`); the optimizer's, scheduler's and loader's numbers; each process's random
numbers; what the run was, for people and for `check_same`; a checksum of every file. No file of it is read as
a pickle that could run code. Weights that are not trained stay out: they are those of the base model.

`fine_tune` (`finetune.py`) decides when to save; `utils/signals.py` asks a run to stop.
"""

import hashlib
import io
import json
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object, set_seed
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.tensor import DTensor

from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.loader_state import device_name, sizes_of
from gradacc_hf.errors import InputError, one_line
from gradacc_hf.training.run_log import versions
from gradacc_hf.utils.files import flush, put_in_place
from gradacc_hf.utils.logs import get_logger
from gradacc_hf.utils.rng import rng_states, set_rng_states

logger = get_logger(__name__)

FOLDER = "checkpoints"
ABOUT, NUMBERS, SUMS = "about.json", "numbers.pt", "sha256.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is complete: its folder, and what is known of its run."""

    folder: Path
    about: Mapping[str, Any]

    @property
    def window(self) -> int:
        """The window that the checkpoint was saved after, counted over the run from 1."""
        return self.about["window"]


@dataclass(frozen=True)
class Checkpoints:
    """When a run saves checkpoints, and what it must have in common with one to go on from it.

    Args:
        every: Windows from one checkpoint to the next; 0 saves only when the run is asked to stop.
        keep: Newest checkpoints to keep; that of the best evaluation stays, too.
        same: Settings and fingerprints by key that must equal the checkpoint's, else resuming is refused.
        budget: By default the loader's bound. If it equals the checkpoint's, the split into micro-batches is
            reproduced exactly; otherwise only the result is.
        resume_from: The checkpoint to go on from; None starts from the beginning.
    """

    every: int = 100
    keep: int = 2
    same: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)
    resume_from: Checkpoint | None = None


def newest_checkpoint(run: Path, accelerator: Accelerator) -> Checkpoint | None:
    """Return the newest complete checkpoint of a run. Call it in all processes.

    A damaged checkpoint is left out with a warning.

    Args:
        run: The run's folder.
        accelerator: The run's Accelerator.

    Returns:
        The checkpoint; None where the run has none.

    Raises:
        InputError: Where all checkpoints are damaged.
    """
    if accelerator.is_main_process:
        _put_back_old(run / FOLDER)
    folders = broadcast_object_list([_folders(run / FOLDER)])[0]
    problems = []
    for _, folder in reversed(folders):
        problem = _damage(folder, accelerator)
        if problem is None:
            return Checkpoint(folder, json.loads((folder / ABOUT).read_text(encoding="utf-8")))
        problems.append(f"{folder.name}: {problem}")
        logger.warning(f"checkpoint {folder} is damaged ({problem}): left out")
    if problems:
        raise InputError(
            f"{run / FOLDER}: no checkpoint is whole ({'; '.join(problems)}): start again, in another folder "
            "or with --output.overwrite true"
        )
    return None


def check_same(checkpoint: Checkpoint, same: Mapping[str, Any]) -> None:
    """Raise InputError for the first key whose value is not that of the checkpoint's run."""
    before = checkpoint.about["same"]
    for key, value in json.loads(json.dumps(same)).items():
        if key in before and before[key] != value:
            fingerprint = isinstance(value, str) and value.startswith("sha256:")
            found = (
                "not those of before" if fingerprint else f"found {value!r}, and the run had {before[key]!r}"
            )
            raise InputError(
                f"{key}: {found}; to go on from {checkpoint.folder} it must be the same: set it back, or "
                "start a new run in another --output.dir"
            )


def _folders(parent: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder with their windows, the newest last."""
    if not parent.is_dir():
        return []
    found = [(re.fullmatch(r"window-([0-9]{8,12})", path.name), path) for path in parent.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match and not path.is_symlink())


def _put_back_old(parent: Path) -> None:
    """A checkpoint whose place another was about to take, when the run was killed."""
    for old in parent.glob(".window-*.old"):
        if not (folder := parent / old.name[1 : -len(".old")]).exists():
            old.rename(folder)


def _damage(folder: Path, accelerator: Accelerator) -> str | None:
    """What is wrong with a checkpoint, in a few words; None where it is as it was written."""
    try:
        expected = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        found = {path.name for path in folder.iterdir()} - {SUMS}
        if not isinstance(expected, dict) or ABOUT not in expected:
            problem = f"{SUMS} does not say what is in it"
        elif missing := sorted(expected.keys() - found):
            problem = f"{missing[0]} is missing"
        elif strange := sorted(found - expected.keys()):
            problem = f"{strange[0]} is none of its files"
        elif any(path.is_symlink() or not path.is_file() for path in folder.iterdir()):
            problem = "it holds a link or a folder"
        else:
            problem = None
    except (OSError, ValueError) as error:
        expected, problem = {}, one_line(error)
    if problem := _first(problem):
        return problem
    sums: dict[str, str] = {}
    problem = _together(lambda: sums.update(_checksums(folder, accelerator)))
    differ = (name for name in sorted(expected) if sums.get(name) != expected[name])
    return problem or next((f"{name} is not as it was written" for name in differ), None)


class Checkpointer:
    """Saves a run of these objects, as Accelerate has prepared them, and brings them to where one was saved.

    `folder` is the run's.
    """

    def __init__(
        self,
        folder: Path,
        settings: Checkpoints,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: Any,
        scheduler: Any,
        windows: WindowLoader,
    ):
        self.folder, self.settings, self.accelerator = folder / FOLDER, settings, accelerator
        self.scheduler, self.windows = scheduler, windows
        self.budget = dict(settings.budget) or sizes_of(windows.bound)
        self.model: torch.nn.Module = accelerator.unwrap_model(model)
        self.optimizer: torch.optim.Optimizer = optimizer.optimizer

    def save(self, window: int, best_window: float | None, progress: Mapping[str, Any]) -> str | None:
        """Save a checkpoint after this window of the run; give what went wrong, in a line.

        `best_window`: after which the best evaluation was. `progress`: plain numbers that `load` gives back.
        Where it goes wrong (a full disk), what was there stays as it was. Collective.
        """
        folder = self.folder / f"window-{window:08d}"
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        about = {
            "window": window,
            "processes": self.accelerator.num_processes,
            "same": dict(self.settings.same),
            "budget": self.budget,
            "device": device_name(self.accelerator),
            "versions": versions(),
        }
        steps = (
            partial(self._begin, unfinished),
            partial(self._see, unfinished),
            partial(self._write_tensors, unfinished),
            partial(self._write_numbers, unfinished, about, progress),
            partial(self._end, unfinished, folder, window, best_window),
        )
        for step in steps:
            if problem := _together(step):
                if self.accelerator.is_main_process:
                    shutil.rmtree(unfinished, ignore_errors=True)
                return problem
        return None

    def load(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Bring all objects to where the checkpoint was saved; gives the `progress` that was. Collective."""
        folder, about = checkpoint.folder, checkpoint.about
        numbers = read_plain(folder / NUMBERS)
        with _alone_too():
            reader = HuggingFaceStorageReader(str(folder))
            of_optimizer = self._empty_like_saved(reader.read_metadata().state_dict_metadata)
            flat = {key: tensor for key, _, _, tensor in of_optimizer}
            load_tensors(self._weights() | flat, storage_reader=reader)
        states: dict[int, dict[str, Any]] = {index: dict(plain) for index, plain in numbers["states"].items()}
        for _, index, name, tensor in of_optimizer:
            states.setdefault(index, {})[name] = tensor
        self.optimizer.load_state_dict({"state": states, "param_groups": self._groups(numbers["groups"])})
        if self.scheduler is not None:
            self.scheduler.load_state_dict(numbers["scheduler"])
        if self.accelerator.scaler is not None and numbers["scaler"]:
            self.accelerator.scaler.load_state_dict(numbers["scaler"])
        # On other hardware, or with another budget, windows are split by that, and sizes tried again.
        same_budget = about["budget"] == self.budget and about["device"] == device_name(self.accelerator)
        self.windows.load_state_dict(numbers["windows"], same_budget=same_budget)
        process = self.accelerator.process_index
        if about["processes"] == self.accelerator.num_processes:
            set_rng_states(read_plain(folder / f"random-{process}.pt"), self.accelerator.device)
        else:  # other processes draw other numbers; not again those of the beginning
            set_seed((self.windows.seed + checkpoint.window + 1_000_003 * process) % 2**32)
        return numbers["progress"]

    def _begin(self, unfinished: Path) -> None:
        if self.accelerator.is_main_process:
            _put_back_old(unfinished.parent)
            for left in unfinished.parent.glob(".window-*"):  # by a run that was killed while it saved
                shutil.rmtree(left)
            unfinished.mkdir(parents=True)

    def _see(self, unfinished: Path) -> None:
        if not unfinished.is_dir():
            process = self.accelerator.process_index
            raise OSError(f"process {process} does not see {unfinished}: all machines must share the folder")

    def _write_tensors(self, unfinished: Path) -> None:
        states = self.optimizer.state_dict()["state"]
        of_optimizer = {
            _key(index, name): value
            for index, state in states.items()
            for name, value in state.items()
            if isinstance(value, torch.Tensor)
        }
        if self.accelerator.num_processes > 1:  # as DDP does before each forward
            saved = self.model.state_dict().keys()
            for buffer in (buffer for name, buffer in self.model.named_buffers() if name in saved):
                buffer.copy_(broadcast(buffer.clone()))
        with _alone_too():
            writer = HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
            save_tensors(self._weights() | of_optimizer, storage_writer=writer)

    def _write_numbers(self, folder: Path, about: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
        process = self.accelerator.process_index
        write_plain(folder / f"random-{process}.pt", rng_states(self.accelerator.device))
        if not self.accelerator.is_main_process:
            return
        state, scaler = self.optimizer.state_dict(), self.accelerator.scaler
        numbers = {
            "states": {
                index: {name: value for name, value in of_one.items() if not isinstance(value, torch.Tensor)}
                for index, of_one in state["state"].items()
            },
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]],
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "windows": self.windows.state_dict(),
            "progress": dict(progress),
        }
        write_plain(folder / NUMBERS, numbers)
        (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    def _end(self, unfinished: Path, folder: Path, window: int, best_window: float | None) -> None:
        sums = _checksums(unfinished, self.accelerator)
        if not self.accelerator.is_main_process:
            return
        (unfinished / SUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
        flush(unfinished / SUMS)
        flush(unfinished)
        put_in_place(unfinished, folder)
        kept = _folders(self.folder)
        for _, later in kept[kept.index((window, folder)) + 1 :]:  # damaged: the run went back behind them
            shutil.rmtree(later)
        for of_window, old in kept[: kept.index((window, folder)) + 1][: -self.settings.keep]:
            if of_window != best_window:
                shutil.rmtree(old)

    def _weights(self) -> dict[str, torch.Tensor]:
        """What training changes in the model: trained parameters, and buffers that are part of its state."""
        saved = self.model.state_dict().keys()
        found = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        found |= {name: buffer for name, buffer in self.model.named_buffers() if name in saved}
        return {f"model.{name}": tensor.detach() for name, tensor in found.items()}

    def _empty_like_saved(self, saved: Mapping[str, Any]) -> list[tuple[str, int, str, torch.Tensor]]:
        """For each tensor of the optimizer in a checkpoint: key, number of its parameter, name, a place."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        found = []
        for key, tensor in saved.items():
            if not (match := re.fullmatch(r"optimizer\.([0-9]+)\.(.+)", key)):
                continue
            index = int(match[1])
            if index >= len(parameters):
                raise InputError(
                    f"the checkpoint's optimizer has more than the {len(parameters)} weights trained here: "
                    "go on with the model and settings of its run"
                )
            found.append((key, index, match[2], _place(parameters[index], tensor)))
        return found

    def _groups(self, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The optimizer's groups as they were saved, with the parameters' numbers in them again."""
        now = self.optimizer.state_dict()["param_groups"]
        return [{**group, "params": here["params"]} for group, here in zip(saved, now, strict=True)]


def _key(index: int, name: str) -> str:
    return f"optimizer.{index}.{name}"


def _place(parameter: torch.Tensor, saved: Any) -> torch.Tensor:
    """An empty tensor for a state of the optimizer, sharded as its parameter is."""
    size, dtype = saved.size, saved.properties.dtype
    if not isinstance(parameter, DTensor):
        device = parameter.device if len(size) else None  # counts of steps are on the host
        return torch.empty(size, dtype=dtype, device=device)
    if size == parameter.size():
        return torch.empty_like(parameter.detach(), dtype=dtype)
    if len(size):
        raise InputError(
            "a checkpoint of this optimizer, whose states are not of the weights' shapes, cannot be "
            "resharded: go on without FSDP, or use --optim.name adamw"
        )
    return torch.empty(size, dtype=dtype)


def write_plain(path: Path, values: Any) -> None:
    """Write numbers, text, tensors, and lists and dicts of these; raises InputError for anything else."""
    buffer = io.BytesIO()
    try:
        torch.save(values, buffer)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        why = one_line(error)[:200]
        raise InputError(f"{path.name}: {why}; allowed are numbers, text and tensors") from error
    buffer.seek(0)
    _load_plain(buffer, path)  # what could not be read back must not be found out when it is needed
    path.write_bytes(buffer.getvalue())


def read_plain(path: Path) -> Any:
    """Read what `write_plain` wrote; raises InputError for what would run code, which it does not."""
    return _load_plain(path, path)


def _load_plain(source: Any, path: Path) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = one_line(error).partition(". ")[0][:200]
        raise InputError(
            f"{path}: refused, as it holds more than numbers, text and tensors ({reason}): take a "
            "checkpoint that you trust"
        ) from None


def _checksums(folder: Path, accelerator: Accelerator) -> dict[str, str]:
    """Of every file but the list of them, which the processes share out and flush to the disk. Collective."""
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS)
    names = broadcast_object_list([names])[0]  # a shared disk may show each machine another list
    here, problem = {}, None
    try:
        for path in [folder / name for name in names][accelerator.process_index :: accelerator.num_processes]:
            with path.open("rb") as file:
                here[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
            flush(path)
    except OSError as error:
        problem = one_line(error)
    if problem := _first(problem):
        raise OSError(problem)
    return {name: digest for part in gather_object([here]) for name, digest in part.items()}


def _together(step: Callable[[], None]) -> str | None:
    """Do a step in all processes; what went wrong in the first of those where something did, in a line."""
    problem = None
    try:
        step()
    except CheckpointException as error:
        problem = one_line(next(iter(error.failures.values()))[0])
    except (OSError, SafetensorError, InputError) as error:  # of the last: a scheduler's odd state
        problem = one_line(error)
    return _first(problem)


def _first(problem: str | None) -> str | None:
    return next((found for found in gather_object([problem]) if found), None)


@contextmanager
def _alone_too() -> Iterator[None]:
    """One process needs no torch.distributed, and no warning of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
