"""The same run in several ways, side by side: how exact, how fast, how much memory, how good.

    gradacc compare --config configs/text_classification_offline.yaml

`compare` starts each contender of `contend.py` in a process of its own, in turns, with the same examples in
the same windows, the same optimizer, schedule, clipping, dropout and precision, and micro-batches of the same
memory: those who cut by count get as many examples as fit the budget padded to the longest. Every run logs
each window's loss; what ExactTrainer asks of its first micro-batch is in its time. It leaves a folder of
runs, with a report.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import transformers
from accelerate import Accelerator
from datasets import disable_progress_bars
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gradacc_hf.accumulation.reference import EXACT
from gradacc_hf.comparison.worker import CONTENDERS, DOES_NOT_FIT, micro_batch_size, window_size
from gradacc_hf.errors import InputError, listed
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.run.folder import next_folder
from gradacc_hf.run.setup import load_data, make_windows
from gradacc_hf.utils.commands import Parser
from gradacc_hf.utils.files import write_whole
from gradacc_hf.utils.redaction import redact


@dataclass(frozen=True)
class Contender:
    """One way over all repeats: a tuple has a figure of each; `gradient_errors` has those of the first."""

    name: str
    gradient_errors: tuple[float, ...]
    examples_per_second: tuple[float, ...]
    tokens_per_second: tuple[float, ...]
    seconds: tuple[float, ...]
    padding: float  # the median
    training_memory_bytes: tuple[int, ...]  # the most held while training, above what was held before
    losses: tuple[float, ...]  # logged for the last window
    metrics: dict[str, tuple[float, ...]]  # of the evaluation


def compare(
    settings: Sequence[str],
    folder: Path,
    contenders: Sequence[str] = tuple(CONTENDERS),
    num_windows: int = 8,
    repeats: int = 3,
    on_run: Callable[[str], None] = lambda name: None,
    command: str = "",
) -> dict[str, Contender | str]:
    """Run all contenders `repeats` times with other seeds; one that failed has the reason instead.

    `settings` are a recipe's command line. Repeat i of all runs one after another, who is first taking turns.
    `on_run` is told before each run. Raises InputError where none can run.
    """
    recipe = load_recipe(settings)
    failed: dict[str, str] = {}
    for repeat in range(repeats):
        seed = recipe.config.train.seed + repeat
        turn = repeat % len(contenders)
        for name in (*contenders[turn:], *contenders[:turn]):
            if name in failed:
                continue
            on_run(f"{CONTENDERS[name]}, seed {seed}")
            run = folder / name / f"seed_{seed}"
            arguments = [name, str(run), str(num_windows), "no_errors" if repeat else "errors"]
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "gradacc_hf.comparison.worker",
                    *arguments,
                    *settings,
                    f"--train.seed={seed}",
                ],
                capture_output=True,
                text=True,
            )
            if done.returncode == 2:
                raise InputError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                failed[name] = "does not fit the memory" if done.returncode == DOES_NOT_FIT else last
            else:
                _add_command(run, command)
    if len(failed) == len(contenders):
        each = "; ".join(f"{CONTENDERS[name]}: {reason}" for name, reason in failed.items())
        raise InputError(f"no contender could run: {each}")
    found = {name: read_contender(folder / name) for name in contenders if name not in failed}
    return {name: failed.get(name) or found[name] for name in contenders}


def _add_command(run: Path, command: str) -> None:
    file = run / "summary.json"
    write_whole(file, json.dumps(json.loads(file.read_text()) | {"command": command}, indent=2) + "\n")


def read_contender(folder: Path) -> Contender:
    """A contender's runs, from the files that they left."""
    runs = sorted(folder.iterdir())
    summaries: list[dict[str, Any]] = [json.loads((run / "summary.json").read_text()) for run in runs]
    histories = [
        [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()] for run in runs
    ]
    metrics = [key for key in summaries[0]["eval"] if key != "window"]
    return Contender(
        name=summaries[0]["contender"],
        gradient_errors=tuple(
            row["gradient_error"] for rows in histories for row in rows if "gradient_error" in row
        ),
        examples_per_second=tuple(s["examples"] / s["seconds"] for s in summaries),
        tokens_per_second=tuple(s["tokens_per_second"] for s in summaries),
        seconds=tuple(s["seconds"] for s in summaries),
        padding=median(s["padding"] for s in summaries),
        training_memory_bytes=tuple(s["training_memory_bytes"] for s in summaries),
        losses=tuple(history[-1]["loss"] for history in histories),
        metrics={key: tuple(s["eval"][key] for s in summaries) for key in metrics},
    )


def ratios(ours: Contender, other: Contender) -> list[float]:
    """Examples per second, ours over the other's, repeat by repeat: those ran next to each other."""
    return [a / b for a, b in zip(ours.examples_per_second, other.examples_per_second, strict=True)]


def show(found: dict[str, Contender | str], console: Console) -> None:
    """A row a contender, medians over their range; then how many times as fast ours is."""
    narrow: Any = {"box": SIMPLE, "padding": (0, 2, 0, 0), "pad_edge": False}
    table = Table("", **narrow)
    for header in ("gradient\noff by", "examples\na second", "tokens\na second", "padding", "MiB", "seconds"):
        table.add_column(header, justify="right")
    ran = {name: contender for name, contender in found.items() if isinstance(contender, Contender)}
    for contender in ran.values():
        table.add_row(
            contender.name,
            _error(contender),
            _spread(contender.examples_per_second, "{:.1f}"),
            _spread(contender.tokens_per_second, "{:,.0f}"),
            f"{contender.padding:.0%}",
            _spread([size / 2**20 for size in contender.training_memory_bytes], "{:,.0f}"),
            _spread(contender.seconds, "{:.1f}"),
        )
    console.print(table)
    metrics = list(next(iter(ran.values())).metrics)
    after = Table("after\ntraining", "logged\nloss", **narrow)
    for name in metrics:
        after.add_column("validation\n" + name.replace("_", "\n"), justify="right")
    for contender in ran.values():
        cells = [_spread(contender.metrics[name], "{:.3f}") for name in metrics]
        after.add_row(contender.name, _spread(contender.losses, "{:.2f}"), *cells)
    console.print(after)
    for name, reason in found.items():
        if isinstance(reason, str):
            console.print(f"{CONTENDERS[name]}: not compared: {reason}")
    for name, other in ran.items():
        if name != "ours" and "ours" in ran:
            times = ratios(ran["ours"], other)
            console.print(
                f"{ran['ours'].name}: {median(times):.1f} × the examples per second of {other.name} "
                f"(median of {len(times)} pairs of runs: {min(times):.1f}–{max(times):.1f})"
            )


def _error(contender: Contender) -> str:
    if not contender.gradient_errors:
        return "not measured"
    worst = max(contender.gradient_errors)
    return f"{worst:.0e} {'exact' if worst <= EXACT else '     '}"


def _spread(values: Sequence[float], form: str) -> str:
    middle = form.format(median(values))
    return middle if len(values) == 1 else f"{middle}\n{form.format(min(values))}–{form.format(max(values))}"


def main(argv: Sequence[str]) -> None:
    """The command line: exits with 1 where a contender failed."""
    parser = Parser(
        prog="gradacc compare",
        description="Train the same windows in several ways and compare them: how exact, how fast.",
        epilog="Any setting of the recipe can follow, as on its own command line: --batch.effective 32. "
        f"Contenders: {', '.join(f'{key} ({name})' for key, name in CONTENDERS.items())}.",
    )
    parser.add_argument("--config", required=True, help="the recipe's config file")
    parser.add_argument("--budget", default="auto", help="a budget's name or file (%(default)s)")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="which, by commas (%(default)s)")
    parser.add_argument("--windows", type=int, default=8, help="windows in a run (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, with other seeds (%(default)s)")
    parser.add_argument("--output", type=Path, help="a new folder for the runs and the report")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments, settings = parser.parse_known_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    contenders = _chosen(arguments.contenders)
    if arguments.repeats < 1:
        raise InputError(f"--repeats: found {arguments.repeats}; allowed: 1 or more")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("gradacc compare runs on one process: start it without a launcher")
    settings = ["--config", arguments.config, "--budget", arguments.budget, *settings]
    recipe = load_recipe(settings)
    if hasattr(recipe.loss, "look_ahead"):
        raise InputError(
            f"recipe: the loss of {type(recipe).__name__} is of all examples of a window together, which no "
            "other way of accumulating has; see gradacc bench contrastive"
        )
    recipe, training, validation = load_data(recipe)
    windows, _ = make_windows(recipe, training, validation, Accelerator())
    size = window_size(recipe)
    full = len(training) // size
    if not 1 <= arguments.windows <= full:
        raise InputError(
            f"--windows: found {arguments.windows}; allowed: 1 to {full}, the full ones of an epoch"
        )
    folder = arguments.output or next_folder("compare")
    if arguments.output and folder.exists():
        raise InputError(f"--output: {folder} is there already; give a new folder")
    console = Console(highlight=False, stderr=arguments.json)
    rows, command = micro_batch_size(recipe, windows), redact(f"gradacc compare {shlex.join(argv)}")
    console.print(
        f"{arguments.windows} windows of {size} examples, {arguments.repeats} "
        f"times; in micro-batches of {rows} examples, ours of as many tokens as these padded; "
        f"runs in {folder}"
    )
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:

        def told(name: str) -> None:
            progress.update(task, advance=1, description=name)
            if not progress.console.is_terminal:
                print(f"running {name}", file=sys.stderr)

        task = progress.add_task("", total=arguments.repeats * len(contenders), completed=-1)
        found = compare(
            settings,
            folder,
            contenders,
            arguments.windows,
            arguments.repeats,
            told,
            command,
        )
    if arguments.json:
        print(json.dumps({k: v if isinstance(v, str) else asdict(v) for k, v in found.items()}, indent=2))
    else:
        show(found, console)
    if any(isinstance(contender, Contender) for contender in found.values()):
        from gradacc_hf.report import write_report  # late: it loads matplotlib

        console.print(f"report: {write_report([folder])}")
    sys.exit(1 if any(isinstance(contender, str) for contender in found.values()) else 0)


def _chosen(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown or len(set(names)) < len(names):
        raise InputError(f"--contenders: found {text!r}; allowed: some of {listed(CONTENDERS)}, each once")
    return names
