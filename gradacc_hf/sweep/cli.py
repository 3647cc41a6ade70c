"""`gradacc sweep`: train one run for each of several settings and seeds, and compare them."""

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from gradacc_hf.accumulation.splitting import Bound
from gradacc_hf.config.help import every_setting
from gradacc_hf.config.parser import read_command_line
from gradacc_hf.config.schema import Config
from gradacc_hf.errors import InputError, refuse
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.recipe.loading import recipe_class_of
from gradacc_hf.report.narrative import metric_name
from gradacc_hf.run.folder import has_trained
from gradacc_hf.run.resolve import check_settings
from gradacc_hf.run.setup import load_data, make_windows, total_windows
from gradacc_hf.sweep.page import figures, write_page
from gradacc_hf.sweep.runs import (
    Processes,
    TrialResult,
    flags_of,
    folders_of,
    last_error,
    read_result,
    summary_of,
)
from gradacc_hf.sweep.search import check_optuna, next_point
from gradacc_hf.sweep.space import Point, Space, split_settings
from gradacc_hf.sweep.state import STATE, locked, open_folder, read_points, settings_of, write_points
from gradacc_hf.utils.commands import Parser
from gradacc_hf.utils.redaction import redact, without_tokens
from gradacc_hf.utils.verbosity import silence_libraries

INPUT_ERROR = InputError.exit_code
Start = Callable[[Sequence[str], Path, Callable[[], Any]], int]
"""Arguments of the recipe, file for its output, function to call while it trains → exit code."""


@dataclass(frozen=True)
class Sweep:
    """The settings of a sweep.

    flags: the flags that all runs share.
    space: the settings that vary.
    seeds: the seeds of each point.
    trials: points to try; None for all combinations.
    metric, direction: the metric that ranks the points, and whether "min" or "max" is best.
    """

    flags: Sequence[str]
    space: Space
    seeds: Sequence[int]
    trials: int | None
    metric: str
    direction: str

    @property
    def num_points(self) -> int:
        """The number of points."""
        return self.trials or len(self.space.grid())

    def order(self, result: TrialResult) -> tuple[bool, float]:
        """Return the sort key of a result: the best first, and last those without a value."""
        return result.mean is None, (result.mean or 0) * (1 if self.direction == "min" else -1)


def main(argv: Sequence[str]) -> None:
    """Run the command. The exit code is 1 if a run failed, and 128 + the number of a signal that ended it."""
    given, words = make_parser().parse_known_args(argv)
    for name in ("trials", "seeds"):
        if (value := getattr(given, name)) is not None and value < 1:
            refuse(f"--{name}", f"found {value}", "allowed: 1 or more")
    silence_libraries()
    flags = ["--config", given.config, "--budget", given.budget]
    recipe_class = recipe_class_of(flags)
    types = {name: kind for name, kind, _ in every_setting(Config(data=recipe_class.Data()))}
    shared, space = split_settings(words, types)
    _check_search(space, given.trials, given.seeds)
    config = read_command_line([*flags, *shared], data=recipe_class.Data)
    train = config.train
    seeds = range(train.seed, train.seed + given.seeds)
    sweep = Sweep([*flags, *shared], space, seeds, given.trials, train.best_metric, train.best_direction)
    console = Console(highlight=False, stderr=given.json)
    show_plan(sweep, windows_of(sweep, recipe_class), console)
    command = [*flags, *words]
    folder = open_folder(given.output, given.resume, command, settings_of(config))
    console.print(f"{'folder':<22}{folder}", soft_wrap=True, markup=False)
    is_new = [path.name for path in folder.iterdir()] == [STATE]
    processes = Processes(str(config.recipe))
    again = f"gradacc sweep {shlex.join(without_tokens(without_resume(argv)))}"
    try:
        with locked(folder), processes.receiving_signals(), _progress(sweep, console) as progress:
            results = train_all(
                sweep, folder, processes.start, lambda: processes.stopped_by is not None, progress
            )
    except BaseException:
        if is_new and not any(has_trained(run.parent) for run in folder.rglob("config.yaml")):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    results = sorted({run.folders: run for run in results}.values(), key=sweep.order)
    page = write_page(folder, results, sweep.metric, best_line(sweep, results), again)
    if given.json:
        print(json.dumps([{**asdict(run), "mean": run.mean} for run in results], indent=2, default=str))
    else:
        show_results(sweep, results, console)
    console.print(f"{'page':<22}{page}", soft_wrap=True, markup=False)
    if (number := processes.stopped_by) and any(
        not summary_of(run) for one in results for run in one.folders
    ):
        resume = shlex.quote(str(folder))
        console.print(f"to continue: {again} --resume {resume}", soft_wrap=True, markup=False)
        sys.exit(128 + number)
    sys.exit(1 if any(result.problem for result in results) else 0)


def without_resume(argv: Sequence[str]) -> list[str]:
    """Return a command line without `--resume FOLDER`."""
    before = ["", *argv][: len(argv)]
    return [
        word
        for word, last in zip(argv, before, strict=True)
        if "--resume" not in (last, word.partition("=")[0])
    ]


def make_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        prog="gradacc sweep",
        description="Train one run for each combination of settings and each seed. Write a table and a plot.",
        epilog="Settings of the recipe may follow. Several values have commas between them: --optim.lr "
        "1e-5,3e-5 --batch.effective 16,64. With --trials, a value may be a range: --optim.lr 1e-6..1e-4. "
        "train.best_metric ranks the runs.",
    )
    parser.add_argument("--config", required=True, help="the recipe's config file")
    parser.add_argument("--budget", default="auto", help="a budget's name or file (default: %(default)s)")
    parser.add_argument(
        "--trials", type=int, metavar="N", help="let optuna choose N points, instead of all combinations"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="number of seeds of each point (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="a new folder (default: runs/sweep-N)")
    parser.add_argument(
        "--resume",
        metavar="FOLDER",
        help="continue a sweep with the same settings: its folder, or auto for the latest one in runs/; "
        "--trials and --seeds may be larger than before",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    return parser


def _check_search(space: Space, trials: int | None, seeds: int) -> None:
    """Raise InputError for a sweep of nothing, and for a range without `--trials`."""
    if not space.names and seeds == 1:
        raise InputError(
            "gradacc sweep: no setting has several values; give some: --optim.lr 1e-5,3e-5, or --seeds 3"
        )
    if trials is not None and not space.names:
        raise InputError("--trials needs settings to choose: --optim.lr 1e-6..1e-4")
    if space.ranges and trials is None:
        name = next(iter(space.ranges))
        raise InputError(f"--{name}: found a range, which needs --trials N, the number of points to try")
    if trials is not None:
        check_optuna()


def windows_of(sweep: Sweep, recipe_class: type[Recipe]) -> list[int | None]:
    """Return the windows of a run of each combination, or of the ends of the ranges. Trains nothing.

    Raises InputError for the first combination that cannot run.
    """
    ranges = sweep.space.ranges.items()
    ends = [
        {name: one.text(one.low) for name, one in ranges},
        {name: one.text(one.high) for name, one in ranges},
    ]
    points = [{**point, **end} for point in sweep.space.grid() for end in ends[: 1 + bool(ranges)]]
    data: dict[Any, Any] = {}
    found = []
    for point in points:
        varied = [f"--{name}={value}" for name, value in point.items()]
        recipe = recipe_class(read_command_line([*sweep.flags, *varied], data=recipe_class.Data))
        check_settings(recipe_class, recipe.config)
        key = repr((recipe.config.data, recipe.config.model))
        if key not in data:
            data[key] = load_data(recipe.weightless())
        loaded, training, validation = data[key]
        loaded = loaded.with_config(recipe.config)
        loader, _ = make_windows(
            loaded, training, validation, Accelerator(cpu=True), Bound(micro_batch_size=1)
        )
        found.append(total_windows(recipe.config, loader))
    return found


def show_plan(sweep: Sweep, windows: Sequence[int | None], console: Console) -> None:
    """Print what varies, the number of runs and their windows."""
    runs = sweep.num_points * len(sweep.seeds)
    known = sorted({count for count in windows if count is not None})
    of_each = "unknown" if not known else f"{known[0]:,}" + f" to {known[-1]:,}" * (len(known) > 1)
    how = "chosen by optuna" if sweep.trials else "all combinations"
    seeds = (
        f"{len(sweep.seeds)} seeds, {sweep.seeds[0]} to {sweep.seeds[-1]}"
        if len(sweep.seeds) > 1
        else "1 seed"
    )
    points = f"{sweep.num_points} point{'s' * (sweep.num_points > 1)}"
    better = "smallest" if sweep.direction == "min" else "largest"
    lines = [
        *sweep.space.lines(),
        ("runs", f"{runs}: {points}, {how}, with {seeds}"),
        ("windows", f"{of_each} in each run"),
        ("best", f"the {better} {metric_name(sweep.metric)}, as the mean over seeds"),
    ]
    for name, text in lines:
        console.print(f"{name:<22}{text}", soft_wrap=True, markup=False)


def points_of(sweep: Sweep, folder: Path, results: Sequence[TrialResult]) -> Iterator[Point]:
    """Yield the points of a sweep. `results` grows while they are tried, and optuna reads it."""
    if sweep.trials is None:
        yield from sweep.space.grid()
        return
    points = read_points(folder, sweep.space)
    for index in range(sweep.trials):
        if index == len(points):
            pairs = [(result.point, result.mean) for result in results]
            points.append(next_point(sweep.space, pairs, sweep.direction, sweep.seeds[0]))
            write_points(folder, points)
        yield points[index]


def train_all(
    sweep: Sweep,
    folder: Path,
    start: Start,
    is_stopped: Callable[[], bool],
    on_run: Callable[[str, Path], Callable[[], Any]],
) -> list[TrialResult]:
    """Train the runs that have not ended, and return the results of all points so far.

    Args:
        sweep: the settings.
        folder: the folder of the sweep.
        start: trains a run.
        is_stopped: whether a signal ends the sweep.
        on_run: called with a description and the folder before each run; returns a function for `start`.

    Raises:
        InputError: if the first run finds a mistake in settings or data.
    """
    results: list[TrialResult] = []
    for point in points_of(sweep, folder, results):
        folders = folders_of(folder, point, sweep.seeds)
        problem = ""
        for seed, run in zip(sweep.seeds, folders, strict=True):
            what = ", ".join([*(f"{name} {value}" for name, value in point.items()), f"seed {seed}"])
            on_wait = on_run(redact(what), run)
            if summary_of(run):
                continue
            if is_stopped():
                return [*results, read_result(point, folders, sweep.metric)]
            run.parent.mkdir(parents=True, exist_ok=True)
            log = run.parent / f"{run.name}.log"
            code = start([*sweep.flags, *flags_of(point, seed, run)], log, on_wait)
            if is_stopped():
                return [*results, read_result(point, folders, sweep.metric)]
            if not summary_of(run):
                problem = f"{last_error(log)}" if code >= 0 else f"ended by signal {-code}"
                if code == INPUT_ERROR and not any(
                    summary_of(earlier) for one in results for earlier in one.folders
                ):
                    raise InputError(problem)
                break
        results.append(read_result(point, folders, sweep.metric, problem))
    return results


@contextmanager
def _progress(sweep: Sweep, console: Console) -> Iterator[Callable[[str, Path], Callable[[], Any]]]:
    """Show a bar with the windows of the run, or lines if stderr is not a terminal."""
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn(), TextColumn("left")
    texts = TextColumn("{task.description}", markup=False), *columns, TimeRemainingColumn()
    with Progress(*texts, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=sweep.num_points * len(sweep.seeds), completed=-1)

        def on_run(what: str, run: Path) -> Callable[[], Any]:
            progress.update(task, advance=1, description=what)
            if not progress.console.is_terminal:
                print(f"training {what}", file=sys.stderr)

            def on_wait() -> None:
                history = run / "history.jsonl"
                if progress.console.is_terminal and history.is_file():
                    windows = history.read_bytes().count(b"\n")
                    progress.update(task, description=f"{what}: window {windows}")

            return on_wait

        yield on_run


def show_results(sweep: Sweep, results: Sequence[TrialResult], console: Console) -> None:
    """Print a row for each point, the best first, and the best settings."""
    last = [name.rpartition(".")[2] for name in sweep.space.names]
    titles = last if len({*last}) == len(last) else sweep.space.names
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(title, overflow="fold")
    for title in (metric_name(sweep.metric), "runs", "seconds"):
        table.add_column(title, justify="left" if title not in ("runs", "seconds") else "right")
    for result in results:
        shown = Text(f"failed: {result.problem}", "red") if result.problem else Text(figures(result))
        runs = f"{len(result.values)} of {len(result.folders)}"
        table.add_row(*map(Text, result.point.values()), shown, runs, f"{result.seconds:,.0f}")
    console.print(table)
    console.print(f"{'best':<22}{best_line(sweep, results)}", soft_wrap=True, markup=False)


def best_line(sweep: Sweep, results: Sequence[TrialResult]) -> str:
    """Return the best settings with their metric, and whether seeds matter as much as the settings."""
    ranked = [result for result in results if result.mean is not None]
    if not ranked:
        return "no run has ended"
    best, others = ranked[0], ranked[1:]
    equal = sum(result.mean == best.mean for result in others)
    flags = " ".join(f"--{name} {shlex.quote(value)}" for name, value in best.point.items()) or "the settings"
    text = f"{flags}: {metric_name(sweep.metric)} {figures(best)}"
    if equal:
        text += f"; {equal} other{'s have' if equal > 1 else ' has'} the same mean"
    elif others and len(best.values) > 1:
        second = others[0]
        overlap = max(min(best.values), min(second.values)) <= min(max(best.values), max(second.values))
        if overlap:
            text += "; the ranges of the two best overlap, so these seeds do not distinguish them"
    elif others:
        text += "; one seed does not show how much of it is chance: --seeds 3"
    return text
