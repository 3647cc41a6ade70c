"""The folder of a sweep, and sweep.json in it: the command, and the points that optuna has chosen so far.

The folder may come from someone else. Its command is compared with the command line of the user, and never
run. Its points are used only if they are in the space of the user.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradacc_hf.errors import refuse
from gradacc_hf.run.folder import next_folder, refuse_links
from gradacc_hf.sweep.space import Point, Space, number
from gradacc_hf.utils.files import write_whole
from gradacc_hf.utils.redaction import without_tokens

STATE = "sweep.json"


def open_folder(output: Path | None, resume: str | None, command: Sequence[str]) -> Path:
    """Return the folder of the sweep: a new one, or the folder of a sweep with the same command.

    Raises InputError for a folder that exists, and for a sweep with another command.
    """
    command = without_tokens([*command])
    if resume == "auto":
        states = [(path, _read(path.parent)) for path in Path("runs").glob(f"sweep-*/{STATE}")]
        if same := [path for path, state in states if state and state["command"] == command]:
            return max(same, key=lambda path: path.stat().st_mtime).parent
    elif resume is not None:
        state = _read(Path(resume))
        if state is None:
            refuse("--resume", f"found {resume}, which holds no sweep", "give the folder of a sweep, or auto")
        if state["command"] != command:
            before = shlex.join(map(str, state["command"]))
            refuse("--resume", f"{resume} is a sweep with other settings", f"its settings: {before}")
        refuse_links(Path(resume), "--resume")
        return Path(resume)
    if output is not None and output.exists():
        refuse("--output", f"{output} exists", "give a new folder, or --resume to continue that sweep")
    folder = output or next_folder("sweep")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, {"command": command, "points": []})
    return folder


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
