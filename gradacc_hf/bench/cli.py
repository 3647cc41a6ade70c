"""The command line of `gradacc bench`: a table of benchmarks.

A benchmark is a function that returns a frozen result, and a function that prints the result. `--json` prints
the result as JSON instead.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from gradacc_hf.bench.all_recipes import measure_recipes, print_recipes
from gradacc_hf.bench.balance import measure_balance, print_balance
from gradacc_hf.bench.budgets import measure_budgets, print_budgets
from gradacc_hf.bench.cpu_speed import measure_cpu_settings, print_cpu_settings
from gradacc_hf.bench.crash_recovery import measure_damages, measure_kills, print_damages, print_kills
from gradacc_hf.bench.distillation import measure_distillation, print_distillation
from gradacc_hf.bench.exactness import HEADS, measure_exactness, print_exactness
from gradacc_hf.bench.experts import measure_experts, print_experts
from gradacc_hf.bench.gpu import FULL, TINY, measure_gpu, print_gpu
from gradacc_hf.bench.lean_memory import measure_lean_loss, print_lean_loss
from gradacc_hf.bench.micro_batch_size import measure_micro_batch_sizes, print_micro_batch_sizes
from gradacc_hf.bench.monitoring_overhead import measure_monitoring, print_monitoring
from gradacc_hf.bench.offline import offline_recipe
from gradacc_hf.bench.oom import measure_memory_limits, print_memory_limits
from gradacc_hf.bench.planning import measure_planning, print_planning
from gradacc_hf.bench.predicted_memory import cases_with, compare_memory, print_memory
from gradacc_hf.bench.preference import LOSSES, measure_preference, print_preference
from gradacc_hf.bench.progress import Progress, progress_bar
from gradacc_hf.bench.schedules import measure_schedules, print_schedules
from gradacc_hf.bench.sentence_transformers import measure_contrastive, print_contrastive
from gradacc_hf.bench.stream import measure_stream, print_stream
from gradacc_hf.bench.throughput import measure_speed, print_speed
from gradacc_hf.bench.ui_latency import measure_page, print_page
from gradacc_hf.bench.window_profile import measure_profile, print_profile
from gradacc_hf.errors import InputError, one_line
from gradacc_hf.run.folder import next_folder
from gradacc_hf.utils.commands import Parser
from gradacc_hf.utils.paths import bundle_root
from gradacc_hf.utils.verbosity import silence_libraries

Option = tuple[str, dict[str, Any]]
"""A flag, and the keyword arguments of `ArgumentParser.add_argument` for the flag."""


@dataclass(frozen=True)
class Benchmark:
    """A subcommand: the line in `--help`, the functions that measure and print, and the options."""

    help: str
    measure: Callable[[argparse.Namespace, Progress], Any]
    show: Callable[[Any, Console], None]
    options: tuple[Option, ...] = ()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: 1 or more")
    return int(text)


def _number(flag: str, default: int, what: str) -> Option:
    return flag, {"type": _positive, "default": default, "help": f"{what} (default: %(default)s)"}


def _names(what: str, metavar: str = "NAME") -> Option:
    return "--only", {"nargs": "+", "metavar": metavar, "default": [], "help": what}


BENCHMARKS = {
    "exactness": Benchmark(
        "errors of accumulated gradients, for each way to train",
        lambda given, progress: measure_exactness(HEADS, progress),
        print_exactness,
    ),
    "distillation": Benchmark(
        "accuracy of a student of two layers, with a teacher and without",
        lambda given, progress: measure_distillation(
            given.seeds,
            given.epochs,
            given.temperature,
            given.weight,
            given.output or next_folder("distillation"),
            given.windows,
            progress,
        ),
        print_distillation,
        (
            _number("--seeds", 3, "seeds of each student"),
            _number("--epochs", 2, "epochs of each student"),
            ("--temperature", {"type": float, "default": 2.0, "help": "model.teacher_temperature"}),
            ("--weight", {"type": float, "default": 0.5, "help": "model.teacher_weight"}),
            ("--windows", {"type": _positive, "help": "windows per run (default: all)"}),
            ("--output", {"type": Path, "help": "folder of the runs; existing runs are not repeated"}),
        ),
    ),
    "experts": Benchmark(
        "errors of gradients of mixtures of experts, by the router loss, and its cost",
        lambda given, progress: measure_experts(given.only, given.repeats, progress),
        print_experts,
        (_names("only these model types"), _number("--repeats", 5, "turns to time")),
    ),
    "speed": Benchmark(
        "time of the loop, compared with dense micro-batches and without a loop",
        lambda given, progress: measure_speed(offline_recipe(), given.windows, given.repeats, progress),
        print_speed,
        (_number("--windows", 4, "windows per run"), _number("--repeats", 5, "turns")),
    ),
    "profile": Benchmark(
        "operators of one window, with padding and without",
        lambda given, progress: measure_profile(given.repeats, progress),
        print_profile,
        (_number("--repeats", 3, "turns"),),
    ),
    "planning": Benchmark(
        "time and memory of planning a window",
        lambda given, progress: measure_planning(offline_recipe()),
        print_planning,
    ),
    "balance": Benchmark(
        "balance over simulated processes, and growth with data and processes",
        lambda given, progress: measure_balance(progress),
        print_balance,
    ),
    "lean_loss": Benchmark(
        "memory of the loss of a large vocabulary, with and without logits",
        lambda given, progress: measure_lean_loss(given.tokens),
        print_lean_loss,
        (_number("--tokens", 2048, "tokens of the micro-batch"),),
    ),
    "memory": Benchmark(
        "predicted and measured peak memory of a step",
        lambda given, progress: compare_memory(cases_with(given.only), progress),
        print_memory,
        (_names("only cases with one of these words in the name", "WORD"),),
    ),
    "budgets": Benchmark(
        "memory of each offline config under each budget file",
        lambda given, progress: measure_budgets(given.only, progress),
        print_budgets,
        (_names("only these recipes"),),
    ),
    "contrastive": Benchmark(
        "the gradient cache, compared with sentence-transformers",
        lambda given, progress: measure_contrastive(
            (), given.windows, given.repeats, given.max_tokens, progress
        ),
        print_contrastive,
        (
            _number("--windows", 4, "windows per run"),
            _number("--repeats", 3, "runs of each contender"),
            _number("--max-tokens", 2048, "padded tokens of a micro-batch"),
        ),
    ),
    "preference": Benchmark(
        "the losses of preferences, compared with TRL",
        lambda given, progress: measure_preference(
            (), given.only, given.windows, given.repeats, given.micro_batch_size, progress
        ),
        print_preference,
        (
            _names(f"only these losses, of {', '.join(LOSSES)}", "LOSS"),
            _number("--windows", 2, "windows per run"),
            _number("--repeats", 3, "runs of each contender"),
            _number("--micro-batch-size", 4, "examples of an accumulated micro-batch of TRL"),
        ),
    ),
    "recipes": Benchmark(
        "metric, baseline and time of each offline config",
        lambda given, progress: measure_recipes(given.only, given.windows, progress),
        print_recipes,
        (
            _names("only these recipes"),
            ("--windows", {"type": _positive, "help": "windows per run (default: all)"}),
        ),
    ),
    "sizes": Benchmark(
        "the micro-batch size that a run finds, compared with fixed sizes",
        lambda given, progress: measure_micro_batch_sizes(given.only, given.windows, progress),
        print_micro_batch_sizes,
        (_names("only these recipes"), _number("--windows", 16, "windows to time with each size")),
    ),
    "cpu": Benchmark(
        "speed of a recipe on a CPU: threads, malloc, padding, bf16, compilation",
        lambda given, progress: measure_cpu_settings(
            given.config, given.only, given.windows, given.repeats, progress
        ),
        print_cpu_settings,
        (
            (
                "--config",
                {
                    "default": str(bundle_root() / "configs/text_classification_offline.yaml"),
                    "help": "a recipe's config file (default: %(default)s)",
                },
            ),
            _names("only these settings, and the default"),
            _number("--windows", 6, "windows to time"),
            _number("--repeats", 6, "turns"),
        ),
    ),
    "out_of_memory": Benchmark(
        "the same training under real memory limits",
        lambda given, progress: measure_memory_limits(given.processes, given.limits, progress=progress),
        print_memory_limits,
        (
            _number("--processes", 1, "processes per run"),
            _number("--limits", 20, "number of random limits"),
        ),
    ),
    "kills": Benchmark(
        "a run that is killed and resumed, compared with an undisturbed run",
        lambda given, progress: measure_kills(given.kills, progress=progress),
        print_kills,
        (_number("--kills", 50, "total number of kills"),),
    ),
    "damages": Benchmark(
        "resuming a run whose newest checkpoint is damaged",
        lambda given, progress: measure_damages(progress),
        print_damages,
    ),
    "schedules": Benchmark(
        "examples that a run needs, with fixed and changing sizes of windows",
        lambda given, progress: measure_schedules(
            given.only, given.seeds, given.output or next_folder("schedules"), progress
        ),
        print_schedules,
        (
            _names("only these recipes"),
            _number("--seeds", 3, "runs of each schedule"),
            ("--output", {"type": Path, "help": "folder of the runs; existing runs are not repeated"}),
        ),
    ),
    "watching": Benchmark(
        "cost of measuring the noise scale, and of the doctor",
        lambda given, progress: measure_monitoring(given.repeats, progress),
        print_monitoring,
        (_number("--repeats", 12, "turns"),),
    ),
    "stream": Benchmark(
        "memory of reading a large stream, and the time that training waits for it",
        lambda given, progress: measure_stream(
            given.rows, given.workers, given.windows, given.repeats, progress
        ),
        print_stream,
        (
            _number("--rows", 10_000_000, "rows of the stream, which are written into this folder"),
            _number("--workers", 1, "processes that tokenise"),
            _number("--windows", 24, "windows to time"),
            _number("--repeats", 3, "turns"),
        ),
    ),
    "gpu": Benchmark(
        "speed and memory with and without padding on a GPU, within a time limit",
        lambda given, progress: measure_gpu(given.seconds, TINY if given.tiny else FULL, progress),
        print_gpu,
        (
            _number("--seconds", 480, "time limit"),
            ("--tiny", {"action": "store_true", "help": "tiny models, which a CPU runs in seconds"}),
        ),
    ),
    "play": Benchmark(
        "speed of the page of `gradacc play`, in a browser",
        lambda given, progress: measure_page(given.repeats, progress),
        print_page,
        (_number("--repeats", 6, "turns"),),
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a benchmark. An InputError ends the command with one line and exit code 2."""
    console = Console(highlight=False)
    try:
        given = _parser().parse_args(argv)
        silence_libraries()
        benchmark = BENCHMARKS[given.benchmark]
        result = benchmark.measure(given, progress_bar(given.benchmark))
    except InputError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    if given.json:
        print(json.dumps(asdict(result), indent=2))
        return
    benchmark.show(result, console)
    console.print("measured with " + ", ".join(f"{k} {v}" for k, v in result.measured_with.items()))


def _parser() -> Parser:
    parser = Parser(prog="gradacc bench", description="Measure the figures in the guides.")
    subcommands = parser.add_subparsers(dest="benchmark", required=True)
    for name, benchmark in BENCHMARKS.items():
        subcommand = subcommands.add_parser(name, help=benchmark.help)
        for flag, settings in benchmark.options:
            subcommand.add_argument(flag, **settings)
        subcommand.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser
