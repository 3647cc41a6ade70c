"""Every figure in the README, to be measured again by whoever doubts it.

    python -m gradacc_hf.bench exactness     # whose accumulated gradient is that of the whole window?
    python -m gradacc_hf.bench speed         # the same run beside transformers.Trainer: how fast?
    python -m gradacc_hf.bench planning      # what does it cost to plan a window?

Each benchmark is a function that gives a frozen result; `--json` prints that instead of a table. All get the
same model, the same examples in the same windows, and as many optimizer steps. One process.
"""

import argparse
import gc
import json
import platform
import runpy
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import disable_progress_bars
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader

from gradacc_hf.command_line import read_command_line
from gradacc_hf.config import kit
from gradacc_hf.conformance import LENGTHS, SPLITS, cut_by_count
from gradacc_hf.contenders import run_accelerate, run_trainer, run_windows
from gradacc_hf.errors import BadInput, Parser
from gradacc_hf.gradients import EXACT, RecordGradients, relative_error, whole_window_gradient
from gradacc_hf.heads import build_head
from gradacc_hf.loop import train
from gradacc_hf.optim import make_optimizer, make_scheduler
from gradacc_hf.plan import WindowPlan
from gradacc_hf.recipe import Recipe
from gradacc_hf.run import make_windows, total_windows
from gradacc_hf.split import Bound, split_window

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
CONTENDERS = {"ours": "WindowLoader", "accelerate": "accumulate()", "trainer": "Trainer"}
TRAINER_MICRO_BATCH = 8


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


@dataclass(frozen=True)
class Speed:
    """By contender: seconds of each repeat, padding as a share of the tokens, micro-batches over all windows.

    Repeat i of both ran back to back; `ratios`, one a repeat: examples per second, ours / Trainer's.
    """

    windows: int
    examples: int
    seconds: dict[str, list[float]]
    padding: dict[str, float]
    micro_batches: dict[str, int]
    ratios: list[float]
    median_ratio: float
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
            windows = cut_by_count(head, examples, size, pad_to)
            cut = windows.split(0, 0).processes[0]
            assert " + ".join(str(len(micro_batch)) for micro_batch in cut) == split
            in_order = [examples[i] for i in np.concatenate(cut)]
            for contender in CONTENDERS:
                recorder = RecordGradients(head.model)
                if contender == "ours":
                    run_windows(head.model, recorder, windows)
                elif contender == "accelerate":
                    run_accelerate(head.model, recorder, DataLoader(in_order, size, collate_fn=collate))  # type: ignore[arg-type]
                else:
                    arguments = {"gradient_accumulation_steps": len(cut), "max_grad_norm": 0, "use_cpu": True}
                    run_trainer(head.model, recorder, in_order, collate, size, **arguments)
                [gradient] = recorder.gradients  # one window, one optimizer step
                error = relative_error(gradient, whole)
                ratio = float(get_total_norm(gradient.values()) / get_total_norm(whole.values()))
                errors.append(GradientError(kind, model_type, split, contender, error, ratio))
    return Exactness(tuple(errors), _measured_with("cpu"))


def speed(recipe: Recipe, num_windows: int = 4, repeats: int = 5) -> Speed:
    """Time the first windows of a recipe's run, by our loop and by Trainer with micro-batches of 8, in turns.

    Each gets a new model every time, outside the timed part, and the same optimizer, schedule, clipping and
    padding to the longest. A first pair, to warm up, is thrown away. Raises BadInput if windows are too few.
    """
    optim, datasets = recipe.config.optim, recipe.datasets()
    windows, _ = make_windows(recipe, *datasets, Accelerator())
    if num_windows > len(windows):
        raise BadInput(
            f"--windows: found {num_windows}; allowed: 1 to {len(windows)}, the windows of an epoch"
        )
    in_order = datasets[0].select(np.concatenate([windows.plan.indices(0, t) for t in range(num_windows)]))
    steps, rest = divmod(effective := recipe.config.batch.effective, TRAINER_MICRO_BATCH)
    if rest:
        raise BadInput(f"batch.effective: found {effective}; allowed: a multiple of {TRAINER_MICRO_BATCH}")

    def run(contender: str) -> float:
        gc.collect()
        set_seed(recipe.config.train.seed)
        windows, _ = make_windows(recipe, *datasets, Accelerator())
        model = recipe.model()
        optimizer = make_optimizer(model, optim)
        scheduler = make_scheduler(optimizer, recipe.config.optim, total_windows(recipe.config, windows))
        shared: dict[str, Any] = {"scheduler": scheduler, "max_grad_norm": optim.max_grad_norm}
        if contender == "ours":
            shared |= {"compute_loss": recipe.loss, "max_windows": num_windows}
            return run_windows(model, optimizer, windows, **shared)
        shared |= {"gradient_accumulation_steps": steps}
        return run_trainer(model, optimizer, in_order, recipe.collate, TRAINER_MICRO_BATCH, **shared)

    seconds: dict[str, list[float]] = {"ours": [], "trainer": []}
    for repeat in _progress(range(repeats + 1), "speed"):
        for contender in sorted(seconds, reverse=repeat % 2 == 1):  # who goes first alternates
            seconds[contender].append(run(contender))
    seconds = {contender: times[1:] for contender, times in seconds.items()}
    ratios = [trainer / ours for ours, trainer in zip(seconds["ours"], seconds["trainer"], strict=True)]

    splits = [windows.split(0, t) for t in range(num_windows)]
    lengths = [len(ids) for ids in in_order["input_ids"]]
    eights = [lengths[i : i + TRAINER_MICRO_BATCH] for i in range(0, len(lengths), TRAINER_MICRO_BATCH)]
    padded = {"ours": sum(s.padded_tokens for s in splits), "trainer": sum(len(e) * max(e) for e in eights)}
    return Speed(
        windows=num_windows,
        examples=len(in_order),
        seconds=seconds,
        padding={contender: 1 - sum(lengths) / tokens for contender, tokens in padded.items()},
        micro_batches={"ours": sum(len(s.processes[0]) for s in splits), "trainer": len(eights)},
        ratios=ratios,
        median_ratio=median(ratios),
        measured_with=_measured_with(windows.accelerator.device.type),
    )


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
    windows, _ = make_windows(recipe, *recipe.datasets(), Accelerator())
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
        measured_with=_measured_with(windows.accelerator.device.type),
    )


def _milliseconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - started)


def offline_recipe() -> Recipe:
    """The recipe of configs/text_classification_offline.yaml: MiniLM on the standard library's docstrings."""
    recipe_class = runpy.run_path(str(kit() / "recipes/text_classification.py"))["TextClassification"]
    config = ["--config", str(kit() / "configs/text_classification_offline.yaml")]
    settings = read_command_line(config, data=recipe_class.Data)
    settings.budget.max_tokens = TRAINER_MICRO_BATCH * settings.data.max_length  # as large as Trainer's
    return recipe_class(settings)


def _progress(steps: Sequence[Any], name: str) -> Iterable[Any]:
    return track(steps, name, console=Console(stderr=True), transient=True)


def _measured_with(device: str) -> dict[str, str]:
    versions = {name: version(name) for name in ("gradacc-hf", "transformers", "accelerate", "torch")}
    threads = str(torch.get_num_threads())
    return {**versions, "python": platform.python_version(), "device": device, "threads": threads}


def print_exactness(result: Exactness, console: Console) -> None:
    """A table a split; by kind: exact heads, the worst error, median ‖g‖ / ‖g whole‖ of Trainer."""
    for split in SPLITS.values():
        table = Table(
            title=f"Exact heads and worst relative error, micro-batches of {split}",
            box=SIMPLE,
            padding=(0, 1, 0, 0),
        )
        for header in ("kind", *CONTENDERS.values(), "‖g‖ ratio"):
            table.add_column(header, justify="left" if header == "kind" else "right", no_wrap=True)
        rows = [row for row in result.errors if row.split == split]
        for kind in [*dict.fromkeys(row.kind for row in rows), "all"]:
            chosen = [row for row in rows if kind in (row.kind, "all")]
            by = {name: [row for row in chosen if row.contender == name] for name in CONTENDERS}
            exact = {name: sum(row.error <= EXACT for row in by[name]) for name in by}
            cells = [f"{exact[n]}/{len(by[n])} {max(row.error for row in by[n]):.0e}" for n in by]
            table.add_row(kind, *cells, f"{median(row.norm_ratio for row in by['trainer']):.3f}")
        console.print(table)


def print_speed(result: Speed, console: Console) -> None:
    """The ratio first; then the seconds, which say nothing away from the machine that took them."""
    console.print(
        f"{result.median_ratio:.2f} × as many examples per second as transformers.Trainer (median of "
        f"{len(result.ratios)} paired runs of {result.windows} windows, {result.examples} examples; "
        f"{min(result.ratios):.2f}–{max(result.ratios):.2f})"
    )
    table = Table("", "seconds: median (range)", "padding", "micro-batches", box=SIMPLE)
    for name, times in result.seconds.items():
        seconds = f"{median(times):.2f} ({min(times):.2f}–{max(times):.2f})"
        table.add_row(
            CONTENDERS[name], seconds, f"{result.padding[name]:.1%}", str(result.micro_batches[name])
        )
    console.print(table)


def print_planning(result: Planning, console: Console) -> None:
    """Two lines: the offline config, and many examples."""
    console.print(
        f"offline config: {result.window_ms:.2f} ms a window, {result.share_of_step:.3%} of its step\n"
        f"{result.examples:,} examples: {result.large_window_ms:.2f} ms a window of 64, after "
        f"{result.permutation_seconds:.1f} s an epoch for the permutation; it takes "
        f"{result.permutation_bytes / 1e6:.0f} MB, the lengths {result.lengths_bytes / 1e6:.0f} MB"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: 1 or more")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. A `BadInput` ends it with its one line and exit code 2."""
    parser = Parser(prog="gradacc bench", description="Measure the figures in the README.")
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    benchmarks.add_parser("exactness", help="whose accumulated gradient is that of the whole window")
    benchmarks.add_parser("planning", help="what it costs to plan a window")
    timing = benchmarks.add_parser("speed", help="the same windows by our loop and by Trainer")
    timing.add_argument("--windows", type=_positive, default=4, help="windows in a run (%(default)s)")
    timing.add_argument("--repeats", type=_positive, default=5, help="pairs of runs (%(default)s)")
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
        else:
            result, show = speed(offline_recipe(), arguments.windows, arguments.repeats), print_speed
    except BadInput as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    if arguments.json:
        print(json.dumps(asdict(result), indent=2))
        return
    show(result, console)  # type: ignore[arg-type]
    console.print("measured with " + ", ".join(f"{k} {v}" for k, v in result.measured_with.items()))


if __name__ == "__main__":
    main()
