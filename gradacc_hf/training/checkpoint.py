"""Checkpoints: the state that a run needs to continue exactly. They are saved between windows only.

A checkpoint is a folder in the folder of the run, such as `checkpoints/window-00000040`:

| file | content |
|---|---|
| `*.safetensors` | trained weights and tensors of the optimizer (`torch.distributed.checkpoint`) |
| `numbers.pt` | numbers of the optimizer, scheduler, scaler and loader, and the evaluations |
| `random-N.pt` | random number generators of process N |
| `about.json` | settings and fingerprints of the run, for people and for `check_same` |
| `sha256.json` | checksums of all other files |

Each process writes its part of the tensors, and any number of processes can read them. No file is read as a
pickle that could run code. Frozen weights are left out, as the base model has them.

`fine_tune` (`finetune.py`) decides when to save. `utils/signals.py` requests a run to stop.
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
    """A complete checkpoint: its folder and the content of about.json."""

    folder: Path
    about: Mapping[str, Any]

    @property
    def window(self) -> int:
        """The window after which the checkpoint was saved, counted over the run from 1."""
        return self.about["window"]

    @property
    def is_at_end(self) -> bool:
        """Whether the run had ended, and its last evaluation is in the checkpoint."""
        return self.about.get("at_end", False)


@dataclass(frozen=True)
class Checkpoints:
    """Settings of saving checkpoints and of resuming from one.

    Args:
        every: Windows from one checkpoint to the next; 0 saves only when a signal stops the run.
        keep: Number of newest checkpoints to keep. The checkpoint of the best evaluation is kept, too.
        same: Settings and fingerprints by key. If they differ from the checkpoint, resuming is refused.
        budget: Settings that determine the split; by default the bound of the loader. If they equal the
            checkpoint's, the split into micro-batches is the same. Otherwise results agree up to rounding.
        resume_from: The checkpoint to resume from; None starts from the beginning.
        at_end: Whether to save a checkpoint at the end of the run, too, from which the run can continue.
    """

    every: int = 100
    keep: int = 2
    same: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)
    resume_from: Checkpoint | None = None
    at_end: bool = False


def newest_checkpoint(run: Path, accelerator: Accelerator) -> Checkpoint | None:
    """Return the newest complete checkpoint of a run. Call it in all processes.

    A damaged checkpoint is left out with a warning.

    Args:
        run: The folder of the run.
        accelerator: The Accelerator of the run.

    Returns:
        The checkpoint; None if the run has none.

    Raises:
        InputError: All checkpoints are damaged.
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
            f"{run / FOLDER}: all checkpoints are damaged ({'; '.join(problems)}): start again, in another "
            "folder or with --output.overwrite true"
        )
    return None


def check_same(checkpoint: Checkpoint, same: Mapping[str, Any]) -> None:
    """Raise InputError for the first key whose value differs from the run of the checkpoint."""
    before = checkpoint.about["same"]
    for key, value in json.loads(json.dumps(same)).items():
        if key in before and before[key] != value:
            fingerprint = isinstance(value, str) and value.startswith("sha256:")
            changed = f"found {value!r}, but the run had {before[key]!r}"
            raise InputError(
                f"{key}: {'the content has changed' if fingerprint else changed}; to resume from "
                f"{checkpoint.folder}, set it back, or start a new run in another --output.dir"
            )


def _folders(parent: Path) -> list[tuple[int, Path]]:
    """Return (window, folder) of the checkpoints in a folder, the newest last."""
    if not parent.is_dir():
        return []
    found = [(re.fullmatch(r"window-([0-9]{8,12})", path.name), path) for path in parent.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match and not path.is_symlink())


def _put_back_old(parent: Path) -> None:
    """Restore checkpoints that were being replaced when the run was killed."""
    for old in parent.glob(".window-*.old"):
        if not (folder := parent / old.name[1 : -len(".old")]).exists():
            old.rename(folder)


def _damage(folder: Path, accelerator: Accelerator) -> str | None:
    """Return the damage of a checkpoint in a few words; None if it is as it was written. Collective."""
    try:
        expected = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        found = {path.name for path in folder.iterdir()} - {SUMS}
        if not isinstance(expected, dict) or ABOUT not in expected:
            problem = f"{SUMS} does not list the files"
        elif missing := sorted(expected.keys() - found):
            problem = f"{missing[0]} is missing"
        elif strange := sorted(found - expected.keys()):
            problem = f"{strange[0]} is not listed in {SUMS}"
        elif any(path.is_symlink() or not path.is_file() for path in folder.iterdir()):
            problem = "it contains a link or a folder"
        else:
            problem = None
    except (OSError, ValueError) as error:
        expected, problem = {}, one_line(error)
    if problem := _first(problem):
        return problem
    sums: dict[str, str] = {}
    problem = _together(lambda: sums.update(_checksums(folder, accelerator)))
    differ = (name for name in sorted(expected) if sums.get(name) != expected[name])
    return problem or next((f"{name} does not match its checksum" for name in differ), None)


class Checkpointer:
    """Save and restore the state of a run. All methods are collective.

    Args:
        folder: the folder of the run.
        settings: the settings of saving and resuming.
        accelerator: the Accelerator of the run.
        model: the prepared model.
        optimizer: the prepared optimizer.
        scheduler: the scheduler, or None.
        windows: the loader of the run.
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

    def save(
        self, window: int, best_window: float | None, progress: Mapping[str, Any], at_end: bool = False
    ) -> str | None:
        """Save a checkpoint. If that fails (a full disk), earlier checkpoints are unchanged.

        Args:
            window: the window of the run after which the checkpoint is saved.
            best_window: the window after which the best evaluation was; None without one.
            progress: plain numbers that `load` returns.
            at_end: whether the run has ended.

        Returns:
            The error in one line; None if there was none.
        """
        folder = self.folder / f"window-{window:08d}"
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        about = {
            "window": window,
            "at_end": at_end,
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
        """Restore all objects from a checkpoint, and return the `progress` that was saved."""
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
        if self.accelerator.scaler is not None and numbers["scaler"]:
            self.accelerator.scaler.load_state_dict(numbers["scaler"])
        # On other hardware or with another budget, the split and the tuned size of the run do not apply.
        same_budget = about["budget"] == self.budget and about["device"] == device_name(self.accelerator)
        self.windows.load_state_dict(numbers["windows"], same_budget=same_budget)
        if self.scheduler is not None:  # after the windows, whose position may determine the rate
            self.scheduler.load_state_dict(numbers["scheduler"])
        process = self.accelerator.process_index
        if about["processes"] == self.accelerator.num_processes:
            set_rng_states(read_plain(folder / f"random-{process}.pt"), self.accelerator.device)
        else:  # with another number of processes, new seeds; the start's seeds would repeat its numbers
            set_seed((self.windows.seed + checkpoint.window + 1_000_003 * process) % 2**32)
        return numbers["progress"]

    def _begin(self, unfinished: Path) -> None:
        if self.accelerator.is_main_process:
            _put_back_old(unfinished.parent)
            for left in unfinished.parent.glob(".window-*"):  # a run was killed while saving
                shutil.rmtree(left)
            unfinished.mkdir(parents=True)

    def _see(self, unfinished: Path) -> None:
        if not unfinished.is_dir():
            process = self.accelerator.process_index
            raise OSError(f"process {process} cannot find {unfinished}: all machines must share the folder")

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
                of_main_process: Any = broadcast(buffer.clone())
                buffer.copy_(of_main_process)
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
        for _, later in kept[kept.index((window, folder)) + 1 :]:  # damaged: the run resumed before them
            shutil.rmtree(later)
        for of_window, old in kept[: kept.index((window, folder)) + 1][: -self.settings.keep]:
            if of_window != best_window:
                shutil.rmtree(old)

    def _weights(self) -> dict[str, torch.Tensor]:
        """Return the tensors that training changes: trained parameters, and buffers in the state dict."""
        saved = self.model.state_dict().keys()
        found = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        found |= {name: buffer for name, buffer in self.model.named_buffers() if name in saved}
        return {f"model.{name}": tensor.detach() for name, tensor in found.items()}

    def _empty_like_saved(self, saved: Mapping[str, Any]) -> list[tuple[str, int, str, torch.Tensor]]:
        """Return (key, index of the parameter, name, empty tensor) for each saved optimizer tensor."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        found = []
        for key, tensor in saved.items():
            if not (match := re.fullmatch(r"optimizer\.([0-9]+)\.(.+)", key)):
                continue
            index = int(match[1])
            if index >= len(parameters):
                raise InputError(
                    f"the checkpoint's optimizer has more than the {len(parameters)} weights trained here: "
                    "resume with the model and settings of its run"
                )
            found.append((key, index, match[2], _place(parameters[index], tensor)))
        return found

    def _groups(self, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the saved groups of the optimizer, with the indices of the present parameters."""
        now = self.optimizer.state_dict()["param_groups"]
        return [{**group, "params": here["params"]} for group, here in zip(saved, now, strict=True)]


def _key(index: int, name: str) -> str:
    return f"optimizer.{index}.{name}"


def _place(parameter: torch.Tensor, saved: Any) -> torch.Tensor:
    """Return an empty tensor for a state of the optimizer, sharded like the parameter."""
    size, dtype = saved.size, saved.properties.dtype
    if not isinstance(parameter, DTensor):
        device = parameter.device if len(size) else None  # step counts are scalars on the host
        return torch.empty(size, dtype=dtype, device=device)
    if size == parameter.size():
        return torch.empty_like(parameter.detach(), dtype=dtype)
    if len(size):
        raise InputError(
            "a checkpoint of this optimizer cannot be resharded, as the states have other shapes than the "
            "weights: resume without FSDP, or use --optim.name adamw"
        )
    return torch.empty(size, dtype=dtype)


def write_plain(path: Path, values: Any) -> None:
    """Write numbers, text, tensors, and lists and dicts of them. Raise InputError for anything else."""
    buffer = io.BytesIO()
    try:
        torch.save(values, buffer)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        why = one_line(error)[:200]
        raise InputError(f"{path.name}: {why}; allowed are numbers, text and tensors") from error
    buffer.seek(0)
    _load_plain(buffer, path)  # an unreadable file must be found now, not at resuming
    path.write_bytes(buffer.getvalue())


def read_plain(path: Path) -> Any:
    """Read a file of `write_plain`. Raise InputError, and run nothing, if the file contains code."""
    return _load_plain(path, path)


def _load_plain(source: Any, path: Path) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = one_line(error).partition(". ")[0][:200]
        raise InputError(
            f"{path}: refused, as it holds more than numbers, text and tensors ({reason}): use a checkpoint "
            "that you trust"
        ) from None


def _checksums(folder: Path, accelerator: Accelerator) -> dict[str, str]:
    """Return the checksums of all files except `SUMS`, and flush the files to the disk.

    Collective: the processes share the files.
    """
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS)
    names = broadcast_object_list([names])[0]  # on a shared disk, machines may list different files
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
    """Run a step in all processes. Return the error of the first process that failed, in one line."""
    problem = None
    try:
        step()
    except CheckpointException as error:
        problem = one_line(next(iter(error.failures.values()))[0])
    except (OSError, SafetensorError, InputError) as error:  # InputError: a state that is not plain
        problem = one_line(error)
    return _first(problem)


def _first(problem: str | None) -> str | None:
    return next((found for found in gather_object([problem]) if found), None)


@contextmanager
def _alone_too() -> Iterator[None]:
    """Hide the warning that a single process runs without torch.distributed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
