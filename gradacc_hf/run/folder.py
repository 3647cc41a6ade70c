"""The folder of a run: what may be written there, and nothing overwritten that was not given up.

Also which folder a run goes on in; from what, is `checkpoint.py`'s.
"""

import errno
import os
import re
import shutil
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

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

RUN_FILES = ("config.yaml", "history.jsonl", "summary.json", "best", "last", "logs", "report.html")
RUN_FILES += (FOLDER, MARKER)
LOCK = ".lock"
RUN_FILES += (LOCK,)
RUN_FILES += ("verify.json",)  # later, by `gradacc verify --run`


def folder_to_resume(config: Config) -> Path | None:
    """The folder of the run that `--resume` goes on with; None to start anew, as there is none.

    Raises InputError where a folder is named that holds no run.
    """
    if config.resume is None:
        return None
    if config.resume != "auto":
        folder = Path(config.resume)
        if not _is_run(folder):
            refuse("--resume", f"found {folder}, which holds no run", "give the folder of a run, or auto")
    elif config.output.dir:
        folder = Path(config.output.dir)
    else:
        _, folder = max(_numbered(_name(config)), default=(0, None))
        if folder is None or ended(folder):
            return None
    if not _is_run(folder):
        return None
    refuse_links(folder, "--resume")
    return folder


def ended(run: Path) -> bool:
    """Has the run in this folder come to its end?"""
    return (run / "summary.json").is_file()


def _is_run(folder: Path) -> bool:
    if not (folder / "config.yaml").is_file():
        return False
    return (folder / HISTORY).is_file() or {path.name for path in folder.iterdir()} <= {*RUN_FILES}


def check_output(config: Config) -> None:
    """Refuse a folder that cannot be written, or that holds what this run would overwrite."""
    folder = Path(config.output.dir or "runs")
    if config.output.dir:
        refuse_links(folder, "output.dir")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output.dir: {folder} is a file; give a folder")
    if config.output.dir and folder.is_dir() and any(folder.iterdir()):
        if not _is_run(folder):
            raise InputError(
                f"output.dir: {folder} holds files that are no run's; give a new or empty folder"
            )
        if not config.output.overwrite:
            raise InputError(
                f"output.dir: {folder} already holds a run; give a new name, --resume auto to go on with it, "
                "or --output.overwrite true to give it up"
            )
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"output.dir: {existing} is a file, and {folder} cannot be in it; give a folder")
    if not os.access(existing, os.W_OK):
        raise InputError(f"output.dir: {existing} cannot be written; give a folder elsewhere")


def refuse_links(folder: Path, key: str) -> None:
    """Refuse a run's folder that is a link, or has one where a run writes: elsewhere is not its to write."""
    of_a_run = (path for name in RUN_FILES for path in (folder / name).rglob("*"))
    for path in chain((folder,), folder.glob("*"), of_a_run):
        if path.is_symlink():
            raise InputError(
                f"{key}: {path} is a link to {os.readlink(path)}, and a run writes through none; give the "
                "folder itself, or remove the link"
            )


def open_output(config: Config, accelerator: Accelerator, windows_done: int = 0) -> Path:
    """Make the run's folder on the main process, with its config; every process gets its name.

    `windows_done`: of a run that goes on, whose files stay.
    """
    accelerator.wait_for_everyone()  # another may still read a model from the run that is given up
    chosen: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            folder = Path(config.output.dir) if config.output.dir else next_folder(_name(config))
            folder.mkdir(parents=True, exist_ok=True)
            in_use = "another run is writing into it: wait for it, stop it, or give a new folder"
            chosen = [folder, None if _lock(folder) else f"{folder}: {in_use}"]
        except OSError as error:
            chosen = [None, f"{config.output.dir} cannot be made ({error.strerror}); give a folder elsewhere"]
    folder, problem = broadcast_object_list(chosen)
    if problem is not None:
        raise InputError(f"output.dir: {problem}")
    if accelerator.is_main_process and not windows_done:
        given_up = (folder / name for name in RUN_FILES if name != LOCK)  # by --output.overwrite
        for path in given_up:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    if accelerator.is_main_process:
        (folder / MARKER).unlink(missing_ok=True)
        write_whole(folder / "config.yaml", settings(config))
    if accelerator.log_with:
        accelerator.project_configuration = ProjectConfiguration(str(folder), str(folder))
        purged = {"tensorboard": {"purge_step": windows_done + 1}} if windows_done else {}
        accelerator.init_trackers("logs", init_kwargs=purged)
    return folder


def _lock(folder: Path) -> bool:
    """Keep this folder for this process until it ends, however it does; False where another one has it."""
    import fcntl  # not on Windows, which is refused with a line elsewhere

    file = (folder / LOCK).open("a")
    _locked.append(file)  # closing it would give it up
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # a file system may have no locks
    return True


_locked: list[Any] = []


def _name(config: Config) -> str:
    return Path(config.config or "run").stem


def _numbered(name: str) -> list[tuple[int, Path]]:
    """The folders that runs of this name have got, with their numbers."""
    pattern = re.compile(re.escape(name) + r"-([0-9]+)")
    found = [(pattern.fullmatch(path.name), path) for path in Path("runs").glob("*")]
    return [(int(match[1]), path) for match, path in found if match]


def settings(config: Config) -> str:
    """All settings of a run, but for tokens, as a config file that runs it again."""
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
