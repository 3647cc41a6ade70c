"""Every figure in the README, to be measured again by whoever doubts it.

    python -m gradacc_hf.bench exactness     # whose accumulated gradient is that of the whole window?
    python -m gradacc_hf.bench speed         # how close does the loop come to what cannot be beaten?
    python -m gradacc_hf.bench planning      # what does it cost to plan a window?
    python -m gradacc_hf.bench balance       # is the slowest process close to the mean? what grows, and how?
    python -m gradacc_hf.bench lean_loss     # what memory does the loss of a large vocabulary take?
    python -m gradacc_hf.bench memory        # is the memory of a step what was predicted?
    python -m gradacc_hf.bench budgets       # what does each recipe take under each budget file?
    python -m gradacc_hf.bench contrastive   # our gradient cache beside that of sentence-transformers
    python -m gradacc_hf.bench recipes       # what does each recipe reach, and how long does it take?
    python -m gradacc_hf.bench sizes         # is the size of micro-batches that a run finds the fastest?
    python -m gradacc_hf.bench cpu           # what do threads, malloc, padding, bf16, compile do on a CPU?
    python -m gradacc_hf.bench out_of_memory # is a run the same under real memory limits?
    python -m gradacc_hf.bench kills         # is a run the same that is killed again and again, and resumed?
    python -m gradacc_hf.bench damages       # what becomes of a run whose newest checkpoint is damaged?
    python -m gradacc_hf.bench schedules     # which sizes of windows need the fewest examples?
    python -m gradacc_hf.bench watching      # what do the noise scale and the doctor cost?
    python -m gradacc_hf.bench play          # how fast is the page of `gradacc play`?

Each benchmark is a function that gives a frozen result; `--json` prints that instead of a table. All get the
same model, the same examples in the same windows, and as many optimizer steps. One process. How fast the
others are: `gradacc compare`.
"""

from gradacc_hf.utils.extras import require

require(__name__, "recipes")
require(__name__, "report")

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import transformers
from accelerate import Accelerator
from datasets import disable_progress_bars
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader

from gradacc_hf.accumulation.reference import EXACT, RecordGradients, relative_error, whole_window_gradient
from gradacc_hf.accumulation.sampler import WindowPlan
from gradacc_hf.accumulation.splitting import Bound, split_window
from gradacc_hf.bench.all_recipes import print_recipes, recipes
from gradacc_hf.bench.balance import balances, print_balances
from gradacc_hf.bench.budgets import budgets, print_budgets
from gradacc_hf.bench.cpu_speed import cpu, print_cpu
from gradacc_hf.bench.crash_recovery import damages, kills, print_damages, print_kills
from gradacc_hf.bench.lean_memory import VOCABULARY, LeanMemory, lean_memory
from gradacc_hf.bench.micro_batch_size import print_sweeps, sweeps
from gradacc_hf.bench.monitoring_overhead import print_watching, watching
from gradacc_hf.bench.oom import print_shortage, shortage
from gradacc_hf.bench.predicted_memory import CASES, compare_memory, print_memory
from gradacc_hf.bench.schedules import print_schedules, schedules
from gradacc_hf.bench.sentence_transformers import contrastive, print_contrastive
from gradacc_hf.bench.throughput import Speed, speed
from gradacc_hf.bench.ui_latency import playing, print_playing
from gradacc_hf.errors import InputError
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.run.folder import next_folder
from gradacc_hf.run.setup import load_data, make_windows
from gradacc_hf.training.loop import train
from gradacc_hf.training.optimizer import make_optimizer
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.utils.commands import Parser
from gradacc_hf.utils.paths import bundle_root
from gradacc_hf.verification.all_heads import LENGTHS, SPLITS, split_by_count
from gradacc_hf.verification.baselines import run_accelerate, run_trainer, run_windows
from gradacc_hf.verification.tiny_models import build_head

HEADS = {
    "sequence_classification": ("bert", "roberta", "llama"),
    "token_classification": ("bert", "roberta", "deberta-v2"),
    "masked_lm": ("bert", "roberta", "modernbert"),
    "causal_lm": ("gpt2", "llama", "qwen3"),
    "seq2seq_lm": ("t5", "bart", "marian"),
    "question_answering": ("bert", "roberta", "distilbert"),
    "multiple_choice": ("bert", "roberta", "deberta-v2"),
    "image_classification": ("vit", "swin", "dinov2"),
}
CONTENDERS = {
    "ours": "Window-\nLoader",
    "exact_trainer": "Exact-\nTrainer",
    "accelerate": "accu-\nmulate()",
    "trainer": "Trainer",
}
MAX_TOKENS = 1024


@dataclass(frozen=True)
class GradientError:
    """Of one head, split and contender: the relative error, and ‖g‖ / ‖g of the whole window at once‖."""

    kind: str
    model_type: str
    split: str
    contender: str
    error: float
    norm_ratio: float


@dataclass(frozen=True)
class Exactness:
    """Every head, split and contender; exact is an error of at most `EXACT`."""

    errors: tuple[GradientError, ...]
    measured_with: dict[str, str]


def exactness(heads: Mapping[str, Sequence[str]] = HEADS) -> Exactness:
    """Compare the gradient that reaches the optimizer: tiny random heads on the CPU, float32, no dropout.

    `heads`: model types by kind. Question answering is padded alike everywhere, as padding reaches its loss.
    """
    errors, named = [], [(kind, model_type) for kind, types in heads.items() for model_type in types]
    for kind, model_type in _progress(named, "exactness"):
        head = build_head(kind, model_type)
        examples = head.examples(LENGTHS)
        pad_to = max(LENGTHS) if kind == "question_answering" else None
        collate = partial(head.collate, pad_to=pad_to)
        whole = whole_window_gradient(head.model, collate(examples))
        for size, split in SPLITS.items():
            windows = split_by_count(head, examples, size, pad_to)
            cut = windows.split(0, 0).processes[0]
            assert " + ".join(str(len(micro_batch)) for micro_batch in cut) == split
            in_order = [examples[i] for i in np.concatenate(cut)]
            for contender in CONTENDERS:
                recorder = RecordGradients(head.model)
                if contender == "ours":
                    run_windows(head.model, recorder, windows)
                elif contender == "accelerate":
                    loader: Any = DataLoader(in_order, size, collate_fn=collate)  # type: ignore[arg-type]
                    run_accelerate(head.model, recorder, loader, len(loader), cpu=True)
                else:
                    arguments = {"gradient_accumulation_steps": len(cut), "max_grad_norm": 0, "use_cpu": True}
                    exact = contender == "exact_trainer"
                    run_trainer(head.model, recorder, in_order, collate, size, exact=exact, **arguments)
                [gradient] = recorder.gradients  # one window, one optimizer step
                error = relative_error(gradient, whole)
                ratio = float(get_total_norm(gradient.values()) / get_total_norm(whole.values()))
                errors.append(GradientError(kind, model_type, split, contender, error, ratio))
    return Exactness(tuple(errors), measured_with("cpu"))


@dataclass(frozen=True)
class Planning:
    """What planning costs: of the offline config's windows, and of `examples` lengths drawn at random."""

    window_ms: float  # median over an epoch of the offline config
    share_of_step: float  # of the seconds that its second window trains
    examples: int
    permutation_seconds: float  # once an epoch
    large_window_ms: float  # median
    permutation_bytes: int
    lengths_bytes: int
    measured_with: dict[str, str]


def planning(recipe: Recipe, examples: int = 10_000_000) -> Planning:
    """Time the planning of windows: their examples and their cut, from lengths alone."""
    recipe, training, validation = load_data(recipe)
    windows, _ = make_windows(recipe, training, validation, Accelerator())
    model = recipe.model()
    model, optimizer = windows.accelerator.prepare(model, make_optimizer(model, recipe.config.optim))
    records = train(model, optimizer, windows, accelerator=windows.accelerator, max_windows=2)
    step = [record.seconds for record in records][-1]
    small = median(_milliseconds(partial(windows.split, 0, t)) for t in range(len(windows)))

    lengths = np.random.default_rng(0).integers(1, 512, size=examples, dtype=np.int32)
    plan = WindowPlan(examples, 64, seed=0, shuffle=True, drop_last=False)
    first = _milliseconds(lambda: plan.indices(0, 0)) / 1000
    bound = Bound(max_tokens=4096)
    large = [_milliseconds(lambda t=t: split_window(lengths[plan.indices(0, t)], bound)) for t in range(200)]
    return Planning(
        window_ms=small,
        share_of_step=small / 1000 / step,
        examples=examples,
        permutation_seconds=first,
        large_window_ms=median(large),
        permutation_bytes=plan.memory_bytes(),
        lengths_bytes=lengths.nbytes,
        measured_with=measured_with(windows.accelerator.device.type),
    )


def _milliseconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - started)


def offline_recipe() -> Recipe:
    """The recipe of configs/text_classification_offline.yaml: MiniLM on the standard library's docstrings."""
    config = str(bundle_root() / "configs/text_classification_offline.yaml")
    return load_recipe(["--config", config, f"--budget.max_tokens={MAX_TOKENS}", "--train.noise_every=0"])


def _progress(steps: Sequence[Any], name: str) -> Iterable[Any]:
    return track(steps, name, console=Console(stderr=True), transient=True)


def print_exactness(result: Exactness, console: Console) -> None:
    """A table a split; by kind: exact heads, the worst error, median ‖g‖ / ‖g whole‖ of Trainer."""
    for split in SPLITS.values():
        table = Table(
            title=f"Exact heads and worst relative error, micro-batches of {split}",
            box=SIMPLE,
            padding=(0, 1, 0, 0),
        )
        for header in ("kind", *CONTENDERS.values(), "‖g‖"):
            table.add_column(header, justify="left" if header == "kind" else "right", no_wrap=True)
        rows = [row for row in result.errors if row.split == split]
        for kind in [*dict.fromkeys(row.kind for row in rows), "all"]:
            chosen = [row for row in rows if kind in (row.kind, "all")]
            by = {name: [row for row in chosen if row.contender == name] for name in CONTENDERS}
            exact = {name: sum(row.error <= EXACT for row in by[name]) for name in by}
            cells = [f"{exact[n]}/{len(by[n])} {max(row.error for row in by[n]):.0e}" for n in by]
            table.add_row(
                kind.replace("_", " "), *cells, f"{median(row.norm_ratio for row in by['trainer']):.3f}"
            )
        console.print(table)


def print_speed(result: Speed, console: Console) -> None:
    """The two shares; then the speed of dense micro-batches by length."""
    low, high = min(result.of_dense_limit), max(result.of_dense_limit)
    console.print(
        f"{result.median_of_dense_limit:.2f} of the dense limit ({low:.2f}–{high:.2f}, {len(result.seconds)} "
        f"repeats of {result.windows} windows, {result.examples} examples in {result.micro_batches} "
        f"micro-batches, {result.padding:.1%} padding)\n"
        f"{result.median_overhead:.1%} of the loop is neither forward nor backward nor optimizer "
        f"({min(result.overhead):.1%} to {max(result.overhead):.1%})"
    )
    table = Table("tokens of a dense micro-batch's examples", "tokens a second", box=SIMPLE)
    for length, tokens in result.dense_tokens_per_second.items():
        table.add_row(str(length), f"{tokens:,.0f}")
    console.print(table)


def print_planning(result: Planning, console: Console) -> None:
    """Two lines: the offline config, and many examples."""
    console.print(
        f"offline config: {result.window_ms:.2f} ms a window, {result.share_of_step:.3%} of its step\n"
        f"{result.examples:,} examples: {result.large_window_ms:.2f} ms a window of 64, after "
        f"{result.permutation_seconds:.1f} s an epoch for the permutation; it takes "
        f"{result.permutation_bytes / 1e6:.0f} MB, the lengths {result.lengths_bytes / 1e6:.0f} MB"
    )


def print_lean_loss(result: LeanMemory, console: Console) -> None:
    """One sentence."""
    before, after = result.bytes_before / 2**20, result.bytes_after / 2**20
    console.print(
        f"forward and backward of {result.tokens:,} tokens, vocabulary {VOCABULARY:,}: {before:,.0f} MiB "
        f"with logits, {after:,.0f} MiB without ({result.seconds_before:.1f} and "
        f"{result.seconds_after:.1f} s); the gradients differ by {result.gradient_error:.0e}"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: 1 or more")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. A `InputError` ends it with its one line and exit code 2."""
    parser = Parser(prog="gradacc bench", description="Measure the figures in the README.")
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    benchmarks.add_parser("exactness", help="whose accumulated gradient is that of the whole window")
    benchmarks.add_parser("planning", help="what it costs to plan a window")
    benchmarks.add_parser("balance", help="1,024 simulated processes and 1 billion examples")
    lean = benchmarks.add_parser("lean_loss", help="memory of a large vocabulary's loss, before and after")
    lean.add_argument("--tokens", type=_positive, default=2048, help="in the micro-batch (%(default)s)")
    predicted = benchmarks.add_parser("memory", help="predicted beside measured peaks of real steps")
    predicted.add_argument(
        "--only", nargs="+", metavar="WORD", default=[], help="cases with one of these words"
    )
    timing = benchmarks.add_parser(
        "speed", help="our loop beside the dense limit, and what the loop itself costs"
    )
    timing.add_argument("--windows", type=_positive, default=4, help="windows in a run (%(default)s)")
    timing.add_argument("--repeats", type=_positive, default=5, help="turns (%(default)s)")
    beside = benchmarks.add_parser("contrastive", help="our gradient cache beside sentence-transformers'")
    beside.add_argument("--windows", type=_positive, default=4, help="windows in a run (%(default)s)")
    beside.add_argument("--repeats", type=_positive, default=3, help="runs of each (%(default)s)")
    beside.add_argument(
        "--max-tokens", type=_positive, default=2048, help="tokens of a micro-batch (%(default)s)"
    )
    offline = benchmarks.add_parser("recipes", help="every offline config: its metric, baseline and time")
    offline.add_argument("--only", nargs="+", metavar="NAME", default=[], help="these recipes")
    offline.add_argument("--windows", type=_positive, help="stop each run after so many (default: its end)")
    planned = benchmarks.add_parser("budgets", help="every offline config under every budget file")
    planned.add_argument("--only", nargs="+", metavar="NAME", default=[], help="these recipes")
    settings = benchmarks.add_parser("cpu", help="what a CPU's settings do for the speed of a recipe")
    default = str(bundle_root() / "configs/text_classification_offline.yaml")
    settings.add_argument("--config", default=default, help="a recipe's config file (%(default)s)")
    settings.add_argument("--only", nargs="+", metavar="NAME", default=[], help="these, beside the default")
    settings.add_argument("--windows", type=_positive, default=6, help="timed windows (%(default)s)")
    settings.add_argument("--repeats", type=_positive, default=6, help="turns (%(default)s)")
    swept = benchmarks.add_parser("sizes", help="the size that a run finds, beside all fixed ones")
    swept.add_argument("--only", nargs="+", metavar="NAME", default=[], help="these recipes")
    swept.add_argument("--windows", type=_positive, default=16, help="timed with each size (%(default)s)")
    limited = benchmarks.add_parser("out_of_memory", help="the same training under real memory limits")
    limited.add_argument("--processes", type=_positive, default=1, help="(%(default)s)")
    limited.add_argument("--limits", type=_positive, default=20, help="drawn at random (%(default)s)")
    killed = benchmarks.add_parser("kills", help="a run that is killed and resumed, beside one that is not")
    killed.add_argument("--kills", type=_positive, default=50, help="(%(default)s)")
    benchmarks.add_parser("damages", help="a run that is resumed when its newest checkpoint is damaged")
    sized = benchmarks.add_parser("schedules", help="sizes of windows, fixed and changing, side by side")
    sized.add_argument("--only", nargs="+", metavar="NAME", default=[], help="these recipes")
    sized.add_argument("--seeds", type=_positive, default=3, help="runs of each (%(default)s)")
    sized.add_argument("--output", type=Path, help="folder of the runs; what is there is not run again")
    watched = benchmarks.add_parser("watching", help="what the noise scale and the doctor cost")
    watched.add_argument("--repeats", type=_positive, default=12, help="turns (%(default)s)")
    played = benchmarks.add_parser("play", help="how fast the page of `gradacc play` is, in a browser")
    played.add_argument("--repeats", type=_positive, default=6, help="turns (%(default)s)")
    for benchmark in benchmarks.choices.values():
        benchmark.add_argument("--json", action="store_true", help="print the result as JSON")
    console = Console(highlight=False)
    try:
        arguments = parser.parse_args(argv)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        disable_progress_bars()
        if arguments.benchmark == "exactness":
            result, show = exactness(HEADS), print_exactness
        elif arguments.benchmark == "planning":
            result, show = planning(offline_recipe()), print_planning
        elif arguments.benchmark == "balance":
            result, show = balances(partial(_progress, name="balance")), print_balances
        elif arguments.benchmark == "lean_loss":
            result, show = lean_memory(arguments.tokens), print_lean_loss
        elif arguments.benchmark == "memory":
            chosen = [
                case for case in CASES if not arguments.only or any(w in case.name for w in arguments.only)
            ]
            if not chosen:
                raise InputError(
                    f"--only: no case has {arguments.only}; cases: {'; '.join(c.name for c in CASES)}"
                )
            progress = partial(_progress, name="memory")
            result, show = compare_memory(chosen, progress), print_memory
        elif arguments.benchmark == "contrastive":
            sizes = (arguments.windows, arguments.repeats, arguments.max_tokens)
            beside_theirs = contrastive((), *sizes, partial(_progress, name="contrastive"))
            result, show = beside_theirs, print_contrastive
        elif arguments.benchmark == "budgets":
            result = budgets(arguments.only, partial(_progress, name="budgets"))
            show = print_budgets
        elif arguments.benchmark == "sizes":
            result = sweeps(arguments.only, arguments.windows, partial(_progress, name="sizes"))
            show = print_sweeps
        elif arguments.benchmark == "cpu":
            progress = partial(_progress, name="cpu")
            of_cpu = cpu(arguments.config, arguments.only, arguments.windows, arguments.repeats, progress)
            result, show = of_cpu, print_cpu
        elif arguments.benchmark == "out_of_memory":
            progress = partial(_progress, name="out_of_memory")
            of_limits = shortage(arguments.processes, arguments.limits, progress=progress)
            result, show = of_limits, print_shortage
        elif arguments.benchmark == "kills":
            result = kills(arguments.kills, progress=partial(_progress, name="kills"))
            show = print_kills
        elif arguments.benchmark == "watching":
            of_watching = watching(arguments.repeats, partial(_progress, name="watching"))
            result, show = of_watching, print_watching
        elif arguments.benchmark == "play":
            result, show = playing(arguments.repeats, partial(_progress, name="play")), print_playing
        elif arguments.benchmark == "schedules":
            folder, progress = arguments.output or next_folder("schedules"), partial(_progress, name="runs")
            of_sizes = schedules(arguments.only, arguments.seeds, folder, progress)
            result, show = of_sizes, print_schedules
        elif arguments.benchmark == "damages":
            result, show = damages(partial(_progress, name="damages")), print_damages
        elif arguments.benchmark == "recipes":
            progress = partial(_progress, name="recipes")
            result, show = recipes(arguments.only, arguments.windows, progress), print_recipes
        else:
            found = speed(
                offline_recipe(), arguments.windows, arguments.repeats, partial(_progress, name="speed")
            )
            result, show = found, print_speed
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    if arguments.json:
        print(json.dumps(asdict(result), indent=2))
        return
    show(result, console)  # type: ignore[arg-type]
    console.print("measured with " + ", ".join(f"{k} {v}" for k, v in result.measured_with.items()))
