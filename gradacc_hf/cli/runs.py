"""`gradacc runs`: the runs below a folder, finished or not.

Any file may be half-written, and any folder may be someone else's. A broken file becomes a note of its run.
The command starts without torch.
"""

import json
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradacc_hf.errors import one_line, refuse
from gradacc_hf.utils.commands import Parser
from gradacc_hf.utils.redaction import redact

NOT_BELOW = {"best", "checkpoints", "last", "logs", "merged"}  # folders inside a run
SECTIONS = {"batch", "optim", "train"}  # of the config of a run
WIDE = 140  # columns of a terminal that hold the table
LONGEST_NAME = 32  # characters of a model or a data set in the table


@dataclass(frozen=True)
class ListedRun:
    """A run, as its files describe it. Unknown values are None.

    run: the folder.
    recipe: the name of the recipe.
    script: the recipe's file.
    model, data: as in the config.
    metric: the metric that ranks evaluations.
    best: the best value of `metric`.
    effective_batch: examples per optimizer step, or their schedule.
    windows: optimizer steps so far.
    seconds: time of these steps.
    state: "finished", "running", "resumable", or "unfinished" for a run whose files do not allow to resume.
    note: problems with the files; "" for none.
    """

    run: str
    recipe: str | None
    script: str | None
    model: str | None
    data: str | None
    metric: str | None
    best: float | None
    effective_batch: Any
    windows: int
    seconds: float | None
    state: str
    note: str


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    given = make_parser().parse_args(argv)
    if not given.folder.is_dir():
        refuse(
            str(given.folder), "found no such folder", "give a folder that holds runs: gradacc runs FOLDER"
        )
    runs = list_runs(given.folder)
    if given.json:
        print(json.dumps([asdict(run) for run in runs], indent=2))
        return
    console = Console(highlight=False)
    if not runs:
        console.print(f"no runs in {given.folder}", markup=False)
        return
    show(runs, given.folder, console)


def make_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        prog="gradacc runs", description="List the runs in a folder and below, finished or resumable."
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), help="a folder of runs (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    return parser


def list_runs(folder: Path) -> list[ListedRun]:
    """Return the runs in a folder and below, in natural order. Links and hidden folders are left out.

    Folders that cannot be read are named on stderr.
    """
    found = []
    for place, below, files in os.walk(folder, onerror=_print_unreadable):
        run = _read(Path(place), {*files})
        left_out = NOT_BELOW if run else set()
        below[:] = [name for name in below if not name.startswith(".") and name not in left_out]
        if run:
            found.append(run)
    return sorted(found, key=lambda run: _natural(run.run))


def _print_unreadable(error: OSError) -> None:
    print(_printable(f"{error.filename}: cannot be read ({error.strerror})"), file=sys.stderr)


def _read(folder: Path, files: set[str]) -> ListedRun | None:
    """Return the run in a folder; None if its files are not of a run."""
    notes: list[str] = []
    config = _mapping(folder / "config.yaml", yaml.safe_load, notes) if "config.yaml" in files else {}
    summary = _mapping(folder / "summary.json", json.loads, notes) if "summary.json" in files else {}
    rows = list(_rows(folder / "history.jsonl")) if "history.jsonl" in files else []
    has_config = len(SECTIONS & config.keys()) == len(SECTIONS)
    if not (has_config or rows or "windows" in summary):
        return None
    train, model, data = (_section(config, name) for name in ("train", "model", "data"))
    metric = _text(train.get("best_metric")) or "loss"
    best = _number(_section(summary, "best").get(metric))
    seconds = [_number(row.get("seconds")) for row in rows]
    recipe, name = _text(config.get("recipe")), _text(model.get("name"))
    batch = _section(config, "batch").get("effective", summary.get("effective_batch_size"))
    if "windows" in summary:
        state = "finished"
    elif _is_locked(folder / ".lock"):
        state = "running"
    else:
        state = "resumable" if has_config and "summary.json" not in files else "unfinished"
    return ListedRun(
        run=redact(str(folder)),
        recipe=Path(recipe).stem if recipe else None,
        script=redact(recipe) if recipe else None,
        model=redact(name) if name else None,
        data=redact(_sources(data.get("train"))) or None,
        metric=metric if best is not None else None,
        best=best,
        effective_batch=_batch_setting(batch),
        windows=int(_number(summary.get("windows")) or len(rows)),
        seconds=_number(summary.get("seconds")) or math.fsum(s for s in seconds if s) or None,
        state=state,
        note="; ".join(notes),
    )


def _mapping(file: Path, parse: Any, notes: list[str]) -> dict[Any, Any]:
    """Return the mapping in a file; {} with a note if there is none."""
    try:
        found = parse(file.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        notes.append(f"{file.name}: no mapping")
    except OSError as error:
        notes.append(f"{file.name}: {error.strerror}")
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        notes.append(f"{file.name}: {one_line(error)[:80]}")
    return {}


def _rows(history: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the windows of a history. Other lines, such as a half-written last one, are left out."""
    with suppress(OSError), history.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and "loss" in row:
                    yield row


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _text(value: Any) -> str | None:
    """Return a text without control characters; None for anything else, such as a list that YAML repeats."""
    return _printable(value) if isinstance(value, str) and value else None


def _printable(text: str) -> str:
    """Return a text without control characters, which would reach the terminal."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def _sources(data: Any) -> str:
    """Return the training data as text: a name, or the sources of a mixture."""
    sources = data if isinstance(data, list) else [data]
    names = [_text(one.get("source") if isinstance(one, dict) else one) for one in sources]
    return ", ".join(name for name in names if name)


def _batch_setting(value: Any) -> Any:
    """Return an effective batch size, a schedule of sizes by window, or the text "noise_scale"."""
    if isinstance(value, dict):
        return {key: size for key, size in value.items() if isinstance(key, int) and isinstance(size, int)}
    return value if isinstance(value, int | float) else _text(value)


def _is_locked(lock: Path) -> bool:
    """Whether a process writes into the folder of this lock."""
    import fcntl  # not on Windows

    try:
        with lock.open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, or one that this user may not open
        return False
    return False


def _natural(name: str) -> list[Any]:
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


def show(runs: Sequence[ListedRun], folder: Path, console: Console) -> None:
    """Print a table, or three lines for each run on a narrow terminal, and how to continue a run."""
    if console.width >= WIDE:
        _show_table(runs, folder, console)
    else:
        for run in runs:
            console.print(Text.assemble((_name(run, folder), "bold"), "  ", _state(run)), soft_wrap=True)
            what = ", ".join(map(_short, (run.recipe, run.model, run.data)))
            console.print(f"  {what}", markup=False, emoji=False)
            trained = f"{run.windows:,} window{'s' * (run.windows != 1)}"
            trained += f" in {_seconds(run)} s" * (run.seconds is not None)
            parts = [_best(run)] * (run.best is not None) + [f"batch {_batch(run)}", trained]
            console.print(f"  {' · '.join(parts)}", markup=False)
            if run.note:
                console.print(Text(f"  {run.note}", "yellow"))
    if waiting := [run for run in runs if run.state == "resumable"]:
        run = waiting[-1]
        command = shlex.join(["python", _script(run), "--resume", run.run])
        console.print(_printable(f"to continue a resumable run: {command}"), soft_wrap=True, markup=False)


def _script(run: ListedRun) -> str:
    """Return the file of a run's recipe, unless it came with the run: a foreign file is not to be run."""
    place, folder = Path(run.script or ""), Path(run.run).resolve()
    if not place.is_absolute() or place.resolve().is_relative_to(folder):
        return f"recipes/{run.recipe or 'RECIPE'}.py"
    here = Path.cwd()
    return str(place.relative_to(here) if place.is_relative_to(here) else place)


def _show_table(runs: Sequence[ListedRun], folder: Path, console: Console) -> None:
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("run", no_wrap=True)
    for title in ("recipe", "model", "data", "best"):
        table.add_column(title)
    for title in ("batch", "windows", "seconds"):
        table.add_column(title, justify="right")
    table.add_column("state")
    for run in runs:
        texts = _name(run, folder), _short(run.recipe), _short(run.model), _short(run.data), _best(run)
        figures = _batch(run), f"{run.windows:,}", _seconds(run)
        table.add_row(*map(Text, (*texts, *figures)), _state(run))
    console.print(table)
    for run in runs:
        if run.note:
            console.print(Text(f"{_name(run, folder)}: {run.note}", "yellow"), soft_wrap=True)


def _name(run: ListedRun, folder: Path) -> str:
    """Return the folder of a run, relative to the folder that is listed."""
    name = os.path.relpath(run.run, folder)
    return _printable(Path(run.run).resolve().name if name == "." else name)


def _state(run: ListedRun) -> Text:
    return Text(run.state, "green" if run.state == "finished" else "yellow")


def _best(run: ListedRun) -> str:
    if run.best is None:
        return "–"
    figure = f"{run.best:.2g}" if 0 < abs(run.best) < 1e-3 else f"{run.best:,.4f}"
    return f"{(run.metric or '').replace('_', ' ')} {figure}"


def _seconds(run: ListedRun) -> str:
    return "–" if run.seconds is None else f"{run.seconds:,.0f}"


def _batch(run: ListedRun) -> str:
    size = run.effective_batch
    if isinstance(size, dict):
        return " → ".join(map(str, size.values()))
    return "–" if size is None else str(size).replace("_", " ")


def _short(text: str | None) -> str:
    """Return a name, or the end of a long path."""
    if text is None:
        return "–"
    end = text if len(text) <= LONGEST_NAME else Path(text).name
    return end if len(end) <= LONGEST_NAME else f"…{end[1 - LONGEST_NAME :]}"
