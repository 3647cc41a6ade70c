"""The folder of a run: find, check, create and lock it.

A run is overwritten only with `--output.overwrite true`. `training/checkpoint.py` finds the checkpoint that a
run continues from.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import IO, Any

import yaml
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list

from gradacc_hf.config.schema import FLAGS_ONLY, Config
from gradacc_hf.errors import InputError, refuse
from gradacc_hf.training.checkpoint import FOLDER
from gradacc_hf.training.run_log import HISTORY
from gradacc_hf.utils.files import write_whole
from gradacc_hf.utils.redaction import without_tokens
from gradacc_hf.utils.signals import MARKER

LOCK = ".lock"
RUN_FILES = (
    "config.yaml",
    "history.jsonl",
    "summary.json",
    "best",
    "last",
    "logs",
    "report.html",
    FOLDER,
    "continued.json",  # by `gradacc continue`
    "merged",  # by `gradacc merge`
    "onnx",  # by `gradacc export`
    "sentence-transformers",
    MARKER,
    LOCK,
    "samples_before.json",
    "evaluations",  # by `gradacc evaluate`, after the run
    "verify.json",  # by `gradacc verify --run`, after the run
)


def folder_to_resume(config: Config) -> Path | None:
    """Return the folder of the run that `--resume` continues; None if a new run starts.

    Raises InputError if the named folder holds no run.
    """
    if config.resume is None:
        return None
    if config.resume != "auto":
        folder = Path(config.resume)
        if not _is_run(folder):
            flag, others = ("--continue", "") if config.continues else ("--resume", ", or auto")
            refuse(flag, f"found {folder}, which holds no run", f"give the folder of a run{others}")
    elif config.output.dir:
        folder = Path(config.output.dir)
    else:
        _, folder = max(_folders_of(_name(config)), default=(0, None))
        if folder is None or ended(folder):
            return None
    if not _is_run(folder):
        return None
    refuse_links(folder, "--resume")
    return folder


def ended(run: Path) -> bool:
    """Whether the run in this folder has ended."""
    return (run / "summary.json").is_file()


def _is_run(folder: Path) -> bool:
    if not (folder / "config.yaml").is_file():
        return False
    return (folder / HISTORY).is_file() or {path.name for path in folder.iterdir()} <= {*RUN_FILES}


def check_output(config: Config) -> None:
    """Raise InputError for a folder that cannot be written, or whose files this run would overwrite."""
    folder = Path(config.output.dir or "runs")
    if config.output.dir:
        refuse_links(folder, "output.dir")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output.dir: {folder} is a file; give a folder")
    if config.output.dir and folder.is_dir() and any(folder.iterdir()):
        if not _is_run(folder):
            raise InputError(
                f"output.dir: {folder} holds files that do not belong to a run; give a new or empty folder"
            )
        if not config.output.overwrite:
            raise InputError(
                f"output.dir: {folder} already holds a run; give a new name, --resume auto to continue it, "
                "or --output.overwrite true to delete it"
            )
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"output.dir: {existing} is a file, so {folder} cannot be made; give a folder")
    if not os.access(existing, os.W_OK):
        raise InputError(f"output.dir: {existing} cannot be written; give a folder elsewhere")


def refuse_links(folder: Path, key: str) -> None:
    """Raise InputError for a run's folder that is a link, or that has a link where a run writes.

    A run must not write outside its folder.
    """
    of_a_run = (path for name in RUN_FILES for path in (folder / name).rglob("*"))
    for path in chain((folder,), folder.glob("*"), of_a_run):
        if path.is_symlink():
            raise InputError(
                f"{key}: {path} is a link to {os.readlink(path)}; a run does not write through links. Give "
                "the folder itself, or remove the link"
            )


@contextmanager
def open_output(
    config: Config,
    accelerator: Accelerator,
    windows_done: int = 0,
    first: Callable[[Path], None] | None = None,
) -> Iterator[Path]:
    """Make the folder of the run with its config, and lock it inside this block. Call it on every process.

    A new folder is removed if the block raises an exception before the first window is trained.

    Args:
        config: the settings of the run, which are written as config.yaml.
        accelerator: the main process makes the folder; the trackers write there.
        windows_done: windows of a run that continues. If there are any, its files stay.
        first: what the main process does in the folder before it writes config.yaml.

    Raises:
        InputError: for a folder that cannot be made, or that another run is writing into.
    """
    accelerator.wait_for_everyone()  # another process may still read a model of the overwritten run
    lock = None
    chosen: list[Any] = [None, False, None]
    if accelerator.is_main_process:
        lock, *chosen = _make_and_lock(config)
    folder, is_new, problem = broadcast_object_list(chosen)
    try:
        if problem is not None:
            raise InputError(f"output.dir: {problem}")
        if accelerator.is_main_process:
            if not windows_done:
                _remove_run(folder)
            (folder / MARKER).unlink(missing_ok=True)
            if first is not None:
                first(folder)
            write_whole(folder / "config.yaml", settings(config))
        if accelerator.log_with:
            accelerator.project_configuration = ProjectConfiguration(str(folder), str(folder))
            purged = {"tensorboard": {"purge_step": windows_done + 1}} if windows_done else {}
            accelerator.init_trackers("logs", init_kwargs=purged)
        yield folder
    except BaseException:
        if accelerator.is_main_process and is_new and not has_trained(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            lock.release()


def has_trained(run: Path) -> bool:
    """Whether the run in this folder has trained a window."""
    history = run / HISTORY
    return any((run / FOLDER).glob("window-*")) or (history.is_file() and history.stat().st_size > 0)


def _make_and_lock(config: Config) -> tuple["FolderLock | None", Any, bool, Any]:
    """Return (lock, folder, whether it is new, None); with a problem (None, None, False, problem)."""
    try:
        is_new = not config.output.dir or not Path(config.output.dir).exists()
        folder = Path(config.output.dir) if config.output.dir else next_folder(_name(config))
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder)
        if lock.acquire():
            return lock, folder, is_new, None
        in_use = "another run writes into it: wait until that run ends, stop it, or give a new folder"
        return None, None, False, f"{folder}: {in_use}"
    except OSError as error:
        return (
            None,
            None,
            False,
            f"{config.output.dir} cannot be made ({error.strerror}); give a folder elsewhere",
        )


def _remove_run(folder: Path) -> None:
    """Remove the files of an earlier run, for `--output.overwrite true`."""
    for path in (folder / name for name in RUN_FILES if name != LOCK):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class FolderLock:
    """Locks the folder of a run for this process, until `release` or the end of the process."""

    def __init__(self, folder: Path):
        self._path = folder / LOCK
        self._file: IO[str] | None = None

    def acquire(self) -> bool:
        """Lock the folder. Returns False if another process holds the lock."""
        import fcntl  # not on Windows, which an earlier check refuses

        self._file = self._path.open("a")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # any other error: a file system without locks
                self.release()
                return False
        return True

    def release(self) -> None:
        """Unlock the folder."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _name(config: Config) -> str:
    return Path(config.config or "run").stem


def _folders_of(name: str) -> list[tuple[int, Path]]:
    """Return the numbered folders of runs with this name: (number, folder)."""
    pattern = re.compile(re.escape(name) + r"-([0-9]+)")
    found = [(pattern.fullmatch(path.name), path) for path in Path("runs").glob("*")]
    return [(int(match[1]), path) for match, path in found if match]


def settings(config: Config) -> str:
    """Return all settings of a run, without secrets, as the text of a config file that repeats the run."""
    values = {name: value for name, value in asdict(config).items() if name not in FLAGS_ONLY}
    return yaml.safe_dump(without_tokens(values), sort_keys=False)


def next_folder(name: str) -> Path:
    """Make the next free numbered folder under runs/."""
    Path("runs").mkdir(exist_ok=True)
    number = 1
    while True:
        try:
            (folder := Path("runs") / f"{name}-{number}").mkdir()
            return folder
        except FileExistsError:
            number += 1


def new_folder(name: str, output: Path | None) -> Path:
    """Make a new folder for several runs: `output`, or else the next free numbered folder under runs/.

    Raises InputError for a folder that exists or cannot be made.
    """
    try:
        if output is None:
            return next_folder(name)
        output.mkdir(parents=True)
        return output
    except FileExistsError:
        refuse("--output", f"{output or 'runs'} exists", "give a new folder")
    except OSError as error:
        problem = f"{output or 'runs'} cannot be made ({error.strerror})"
        refuse("--output", problem, "give a folder elsewhere")
