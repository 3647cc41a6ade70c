"""The `gradacc` command: list and copy recipes, and start the other commands.

A recipe has its own command line: `gradacc_hf.run.run`.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from gradacc_hf import __version__, lessons
from gradacc_hf.errors import InputError
from gradacc_hf.utils.commands import Parser, command
from gradacc_hf.utils.paths import bundle_root

COMMANDS = {
    "verify": ("gradacc_hf.cli.verify", "check that accumulation is exact for a model and its data"),
    "compare": ("gradacc_hf.comparison.cli", "train in several ways, and compare exactness and speed"),
    "doctor": ("gradacc_hf.doctor.script", "find faults in a training script's accumulation"),
    "data": ("gradacc_hf.cli.data", "show the data that a run uses, as the model receives them"),
    "plan": ("gradacc_hf.cli.plan", "predict memory, steps and cost of a run, without a GPU"),
    "play": ("gradacc_hf.play.command", "show the loop on a web page, micro-batch by micro-batch"),
    "bench": ("gradacc_hf.bench.cli", "measure the figures in the guides"),
    "predict": ("gradacc_hf.cli.predict", "predict on new input with a saved run"),
    "evaluate": ("gradacc_hf.cli.evaluate", "compute metrics of a saved run on labelled data"),
    "merge": ("gradacc_hf.cli.merge", "write the adapters of a run into a whole model"),
    "export": ("gradacc_hf.cli.export", "write the model of a run for another library"),
    "continue": ("gradacc_hf.cli.continuation", "train a run that has ended further, from its last state"),
    "new": ("gradacc_hf.cli.new", "write a recipe of your own, with configs and a test"),
    "sweep": ("gradacc_hf.sweep.cli", "train several settings and seeds, and compare them"),
    "runs": ("gradacc_hf.cli.runs", "list runs, finished or resumable"),
    "completion": ("gradacc_hf.cli.completion", "print the completion script of a shell"),
}
"""Command → the module whose `main` gets the remaining arguments, and one line of help."""

EXTRAS = {
    "bench": ("recipes", "report"),
    "compare": ("recipes", "report"),
    "continue": ("recipes",),
    "completion": ("recipes", "report"),
    "data": ("recipes",),
    "evaluate": ("recipes",),
    "export": ("recipes",),
    "merge": ("recipes",),
    "plan": ("recipes",),
    "predict": ("recipes",),
    "report": ("report",),
    "runs": ("recipes",),
    "sweep": ("recipes", "report"),
    "verify": ("recipes",),
}
"""Command → extras to require. `gradacc play` checks for Gradio itself, because it can draw without it."""

OFFLINE = "configs/text_classification_offline.yaml"
NEEDS = {
    "bench": ("the name of a benchmark", "gradacc bench exactness"),
    "compare": ("--config FILE", f"gradacc compare --config {OFFLINE}"),
    "completion": ("the name of a shell", "gradacc completion bash"),
    "continue": (
        "the folder of a run and a length",
        "gradacc continue runs/text_classification_offline-1 --train.epochs +1",
    ),
    "cp": ("a recipe and a folder", "gradacc cp text_classification ."),
    "data": ("--config FILE", f"gradacc data --config {OFFLINE}"),
    "doctor": ("a Python file that trains", "gradacc doctor train.py"),
    "evaluate": ("the folder of a run", "gradacc evaluate runs/text_classification_offline-1"),
    "export": (
        "the folder of a run and --to FORMAT",
        "gradacc export runs/text_classification_offline-1 --to onnx",
    ),
    "merge": ("the folder of a run with adapters", "gradacc merge runs/causal_lm_offline-1"),
    "new": ("a name and --like RECIPE", "gradacc new my_task --like text_classification"),
    "plan": ("--config FILE", f"gradacc plan --config {OFFLINE} --budget gpu_8gb"),
    "predict": (
        "the folder of a run, and texts or --input FILE",
        "gradacc predict runs/text_classification_offline-1 'A text.'",
    ),
    "report": ("the folder of a run", "gradacc report runs/text_classification_offline-1"),
    "sweep": (
        "--config FILE and a setting with several values",
        f"gradacc sweep --config {OFFLINE} --optim.lr 1e-4,5e-4",
    ),
    "verify": ("--config FILE or --run RUN", f"gradacc verify --config {OFFLINE}"),
}
"""Command → the arguments that it needs, and an example."""


def main() -> None:
    """Run the `gradacc` command. A GradaccError ends the command with one line and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # for terminals without × or ±
    try:
        with command():
            _run()
            sys.stdout.flush()
    except BrokenPipeError:  # as in `gradacc … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _run() -> None:
    """Parse the command line and run the command. Slow imports happen only in the chosen command."""
    parser = make_parser()
    words = sys.argv[1:]
    if not words:
        parser.print_help(sys.stderr)
        sys.exit(InputError.exit_code)
    if len(words) == 1 and words[0] in NEEDS:
        needs, example = NEEDS[words[0]]
        raise InputError(f"gradacc {words[0]} needs {needs}; for example: {example}")
    arguments, rest = parser.parse_known_args()
    if rest and arguments.command not in COMMANDS:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    for extra in EXTRAS.get(arguments.command, ()):
        from gradacc_hf.utils.extras import require  # late: `gradacc ls` starts without it

        require(f"gradacc {arguments.command}", extra)
    if arguments.command in COMMANDS:
        module, _ = COMMANDS[arguments.command]
        import_module(module).main(rest)
    elif arguments.command == "ls":
        for name in recipes():
            print(name, *(f"configs/{path.name}" for path in configs(name)), sep="  ")
    elif arguments.command == "cp":
        copy_recipe(arguments.recipe, arguments.folder)
    elif arguments.command == "lessons":
        show_lessons(arguments.name, arguments.plot)
    else:
        from gradacc_hf.report import write_report  # late: it loads matplotlib

        print(f"wrote {write_report(arguments.runs, arguments.output)}")


def make_parser(parsers: Mapping[str, Parser] | None = None) -> argparse.ArgumentParser:
    """Return the parser of `gradacc`, with the parsers of some commands by name."""
    parsers = parsers or {}
    parser = Parser(prog="gradacc", description="Exact gradient accumulation for fine-tuning.")
    parser.add_argument("--version", action="version", version=f"gradacc {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", help="list the recipes and their configs")
    copy = commands.add_parser("cp", help="copy a recipe and its configs to a folder, for editing")
    copy.add_argument("recipe", help="a recipe from `gradacc ls`, or lessons/NAME")
    copy.add_argument("folder", type=Path, help="the folder in which recipes/ and configs/ are created")
    lesson = commands.add_parser("lessons", help="list the lessons, or run one")
    lesson.add_argument("name", nargs="?", help="the lesson to run; by default, all lessons are listed")
    lesson.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the lesson's result to this file")
    for name, (_, question) in COMMANDS.items():
        parents = [parsers[name]] if name in parsers else []
        commands.add_parser(name, help=question, add_help=False, parents=parents)
    report = commands.add_parser("report", help="write an HTML page that compares runs")
    report.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run, or a folder that holds runs"
    )
    report.add_argument(
        "--output",
        type=Path,
        metavar="FILE.html",
        help="a new page (default: report.html in the folder; for several folders, the first free of "
        "report.html, report-2.html, … here)",
    )
    return parser


def show_lessons(name: str | None, plot: Path | None) -> None:
    """Run a lesson, or list all lessons with the question that each answers."""
    if name is not None:
        lessons.run(name, plot)
        return
    if plot is not None:
        raise InputError("--plot needs the name of a lesson: gradacc lessons NAME --plot FILE.svg")
    for lesson in lessons.names():
        print(f"{lesson:<22}{lessons.question(lesson)}")


def recipes() -> list[str]:
    """Return the names of the recipes."""
    return sorted(path.stem for path in (bundle_root() / "recipes").glob("*.py"))


def configs(name: str) -> list[Path]:
    """Return the config files whose `recipe:` names this recipe."""
    files = sorted((bundle_root() / "configs").glob("*.yaml"))
    return [file for file in files if f"recipe: ../recipes/{name}.py\n" in file.read_text(encoding="utf-8")]


def copy_recipe(name: str, folder: Path) -> None:
    """Copy recipes/NAME.py and its configs to a folder. Nothing is copied if one of the files exists there.

    The name lessons/NAME copies a lesson. Raises InputError for an unknown name and for existing files.
    """
    if name not in recipes() and name not in [f"lessons/{lesson}" for lesson in lessons.names()]:
        raise InputError(f"no recipe {name!r}; allowed: {', '.join(recipes())}, and lessons/NAME")
    files = (bundle_root() / "recipes" / f"{name}.py", *configs(name))
    copies = {folder / file.relative_to(bundle_root()): file.read_text(encoding="utf-8") for file in files}
    write_files(copies, "copied")
    script, *settings = copies
    offline = next((config for config in settings if config.stem == f"{name}_offline"), None)
    for line in next_commands(script, offline):
        print(line)


def write_files(files: Mapping[Path, str], done: str) -> None:
    """Write and print new text files, or write none of them. `done` is what happens to them: "copied".

    Raises InputError if one of the files exists or cannot be written.
    """
    if existing := [str(file) for file in files if os.path.lexists(file)]:
        raise InputError(
            f"nothing was {done}, because these files exist: {', '.join(existing)}; give another folder, or "
            "move them"
        )
    opened: list[Path] = []
    try:
        for file, text in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("x", encoding="utf-8") as output:
                opened.append(file)
                output.write(text)
    except OSError as error:
        for file in opened:
            file.unlink()
        raise InputError(
            f"nothing was {done}, because {error.filename or file} cannot be written ({error.strerror}); "
            "give another folder"
        ) from None
    for file in files:
        print(file)


def next_commands(script: Path, offline: Path | None) -> list[str]:
    """Return lines with commands for a recipe and its offline config. None of them needs a network."""
    if offline is None:
        return [f"run it: {shlex.join(['python', str(script)])}"]
    config = ["--config", str(offline)]
    commands = {
        "look at the data": ["gradacc", "data", *config],
        "try it": ["python", str(script), *config, "--train.max_windows", "4"],
        "run it": ["accelerate", "launch", str(script), *config, "--budget", "auto"],
    }
    return [f"{what}: {shlex.join(command)}" for what, command in commands.items()]
