"""The `gradacc` command: list and copy recipes, and start the other commands.

A recipe has its own command line: `gradacc_hf.run.run`.
"""

import argparse
import os
import shlex
import shutil
import sys
from importlib import import_module
from pathlib import Path

from gradacc_hf import __version__, lessons
from gradacc_hf.errors import InputError
from gradacc_hf.utils.commands import Parser, command
from gradacc_hf.utils.paths import bundle_root

COMMANDS = {
    "verify": ("gradacc_hf.cli.verify", "is accumulation exact on my model and data?"),
    "compare": ("gradacc_hf.comparison.cli", "train in several ways and compare them"),
    "doctor": ("gradacc_hf.doctor.script", "what is wrong with a script's accumulation"),
    "plan": ("gradacc_hf.cli.plan", "memory, steps and cost of a run, without a GPU"),
    "play": ("gradacc_hf.play.command", "a page to watch the loop on, micro-batch by micro-batch"),
    "bench": ("gradacc_hf.bench.cli", "measure what the README says (gradacc bench --help)"),
    "predict": ("gradacc_hf.cli.predict", "what a saved run says to new input"),
}
"""Command → the module whose `main` gets the remaining arguments, and one line of help."""

EXTRAS = {
    "bench": ("recipes", "report"),
    "compare": ("recipes", "report"),
    "plan": ("recipes",),
    "predict": ("recipes",),
    "report": ("report",),
    "verify": ("recipes",),
}
"""The extras that a command needs; `gradacc play` names its own, as it can draw a film without Gradio."""


def main() -> None:
    """Run the `gradacc` command. A GradaccError ends it with one line and its exit code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal without × or ±
    try:
        with command():
            _run()
            sys.stdout.flush()
    except BrokenPipeError:  # of `gradacc … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _run() -> None:
    """Parse the command line and run its command. Only the chosen command imports what is slow to import."""
    parser = _make_parser()
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
        copy_recipe(arguments.name, arguments.folder)
    elif arguments.command == "lessons":
        show_lessons(arguments.name, arguments.plot)
    else:
        from gradacc_hf.report import write_report  # late: it loads matplotlib

        print(write_report(arguments.runs, arguments.output))


def _make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="gradacc", description="Exact gradient accumulation for fine-tuning.")
    parser.add_argument("--version", action="version", version=f"gradacc {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", help="list the recipes and their configs")
    copy = commands.add_parser("cp", help="copy a recipe and its configs into a folder, to edit")
    copy.add_argument("name", help="a recipe, as `gradacc ls` names it, or lessons/NAME")
    copy.add_argument("folder", type=Path, help="where recipes/ and configs/ go")
    lesson = commands.add_parser("lessons", help="list the lessons, or run one")
    lesson.add_argument("name", nargs="?", help="a lesson; without it, all are listed")
    lesson.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw what the lesson shows")
    for name, (_, question) in COMMANDS.items():
        commands.add_parser(name, help=question, add_help=False)
    report = commands.add_parser("report", help="one HTML page about runs, side by side")
    report.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or one that holds runs"
    )
    report.add_argument(
        "--output",
        type=Path,
        metavar="FILE.html",
        help="where it goes; by default report.html in the folder of the run, or here if there are several",
    )
    return parser


def show_lessons(name: str | None, plot: Path | None) -> None:
    """Run a lesson, or list all lessons with the question that each answers."""
    if name is not None:
        lessons.run(name, plot)
        return
    if plot is not None:
        raise InputError("--plot: which lesson? Give its name: gradacc lessons NAME --plot FILE.svg")
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
    """Copy recipes/NAME.py and its configs into a folder, or nothing if one of the files exists there.

    `name` lessons/NAME copies a lesson. Raises InputError for an unknown name and for existing files.
    """
    if name not in recipes() and name not in [f"lessons/{lesson}" for lesson in lessons.names()]:
        raise InputError(f"no recipe {name!r}; there are: {', '.join(recipes())}, and lessons/NAME")
    copies = {
        path: folder / path.relative_to(bundle_root())
        for path in (bundle_root() / "recipes" / f"{name}.py", *configs(name))
    }
    existing = [str(target) for target in copies.values() if os.path.lexists(target)]
    if existing:
        raise InputError(
            f"{', '.join(existing)} exist already; nothing was copied: give another folder, or move them"
        )
    for source, target in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        print(target)
    script, *settings = copies.values()
    if settings:
        command = ["accelerate", "launch", str(script), "--config", str(settings[-1]), "--budget", "auto"]
        print(f"run it: {shlex.join(command)}")
