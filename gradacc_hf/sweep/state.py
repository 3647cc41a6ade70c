"""The folder of a sweep, and sweep.json in it: command, settings, and points that optuna has chosen so far.

The folder may come from someone else. Its command is compared with the command line of the user, and never
run. Its points are used only if they are in the space of the user. Only one process at a time trains in it.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

from gradacc_hf.config.help import every_setting
from gradacc_hf.config.schema import Config
from gradacc_hf.errors import refuse
from gradacc_hf.run.folder import FolderLock, new_folder, refuse_links
from gradacc_hf.sweep.space import Point, Space, number
from gradacc_hf.utils.files import write_whole
from gradacc_hf.utils.redaction import without_tokens

STATE = "sweep.json"
MAY_CHANGE = ("budget", "checkpoint", "output")  # sections of the settings


def settings_of(config: Config) -> dict[str, str]:
    """Return the settings that all runs share, as text. Budget and checkpoints may change in a sweep."""
    names = [name for name, _, _ in every_setting(config) if name.partition(".")[0] not in MAY_CHANGE]
    return without_tokens({name: str(attrgetter(name)(config)) for name in names})


def open_folder(
    output: Path | None, resume: str | None, command: Sequence[str], settings: Mapping[str, str]
) -> Path:
    """Return the folder of the sweep: a new one, or the folder of a sweep with the same command and settings.

    Raises InputError for a folder that exists, and for a sweep with another command or other settings.
    """
    command = without_tokens([*command])
    if resume == "auto":
        states = [(path, _read(path.parent)) for path in Path("runs").glob(f"sweep-*/{STATE}")]
        if same := [path for path, state in states if state and not _changes(state, command, settings)]:
            return max(same, key=lambda path: path.stat().st_mtime).parent
    elif resume is not None:
        state = _read(Path(resume))
        if state is None:
            refuse("--resume", f"found {resume}, which holds no sweep", "give the folder of a sweep, or auto")
        if changes := _changes(state, command, settings):
            refuse("--resume", f"{resume} is a sweep with other settings", f"its settings: {changes}")
        refuse_links(Path(resume), "--resume")
        return Path(resume)
    if output is not None and output.exists():
        refuse("--output", f"{output} exists", "give a new folder, or --resume to continue that sweep")
    folder = new_folder("sweep", output)
    _write(folder, {"command": command, "settings": settings, "points": []})
    return folder


def _changes(state: Mapping[str, Any], command: Sequence[str], settings: Mapping[str, str]) -> str:
    """Return the command of a sweep, or the settings in its files, if they are not these; otherwise ""."""
    if state["command"] != command:
        return shlex.join(map(str, state["command"]))
    before = state.get("settings")
    before = before if isinstance(before, dict) else {}
    return ", ".join(
        f"--{name} {before[name]}" for name in settings if before.get(name, settings[name]) != settings[name]
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder of a sweep in this block. Raises InputError if another process trains in it."""
    lock = FolderLock(folder)
    if not lock.acquire():
        refuse("--resume", f"another sweep trains in {folder}", "wait until it ends, or stop it")
    try:
        yield
    finally:
        lock.release()


def read_points(folder: Path, space: Space) -> list[Point]:
    """Return the points that were chosen so far. Raises InputError for a point outside of the space."""
    points = (_read(folder) or {"points": []})["points"]
    if wrong := [point for point in points if not _is_in(point, space)]:
        refuse(str(folder / STATE), f"found the point {wrong[0]}", "start the sweep again, in another folder")
    return points


def write_points(folder: Path, points: Sequence[Point]) -> None:
    """Write the points that were chosen so far."""
    state = _read(folder) or {"command": []}
    _write(folder, {**state, "points": [*points]})


def _is_in(point: Any, space: Space) -> bool:
    """Whether a point has a value of the space for each setting, and no other setting."""
    if not isinstance(point, dict) or {*point} != {*space.names}:
        return False
    numbers = {name: number(str(point[name])) for name in space.ranges}
    return all(point[name] in values for name, values in space.choices.items()) and all(
        value is not None and space.ranges[name].low <= value <= space.ranges[name].high
        for name, value in numbers.items()
    )


def _read(folder: Path) -> dict[str, Any] | None:
    """Return the command and the points of a sweep; None for any other file."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        is_state = isinstance(state["command"], list) and isinstance(state["points"], list)
        return state if is_state else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, state: Mapping[str, Any]) -> None:
    write_whole(folder / STATE, json.dumps(state, indent=2) + "\n")
