"""`gradacc plan`: what a recipe's run will take, before any money is spent: memory, steps, operations, cost.

Needs the model's config, its tokenizer and the data; no weights and no GPU.
"""

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import transformers
from accelerate import Accelerator
from datasets import Dataset, disable_progress_bars
from rich.bar import Bar
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gradacc_hf.config import tokens_per_micro_batch
from gradacc_hf.errors import BadInput, Parser, refuse
from gradacc_hf.memory.estimate import NotTraceable, StepEstimate
from gradacc_hf.memory.levers import Lever, levers
from gradacc_hf.memory.micro_batch import MicroBatchMemory, Parts
from gradacc_hf.memory.of_recipe import longest_example, recipe_memory, usable_memory
from gradacc_hf.open_recipe import load_recipe, open_run
from gradacc_hf.recipe import Recipe
from gradacc_hf.run import make_model, make_windows, total_windows
from gradacc_hf.split import Bound, usual_cost
from gradacc_hf.windows import WindowLoader

GIB = 2**30
SAMPLE = 200  # windows of the first epoch that are cut, evenly spaced


@dataclass(frozen=True)
class Steps:
    """How the windows are cut, from a sample of the first epoch's. Operations are floating-point ones."""

    windows: int
    epochs: int
    accumulation_steps: tuple[int, float, int]  # min, mean, max over windows, of the process with most
    padding: float  # share of the tokens
    largest: tuple[int, list[int]]  # rows, and length of each column, of the micro-batch that takes most
    flops_per_window: float


@dataclass(frozen=True)
class Plan:
    """What a run will take; bytes are of one process."""

    model: str
    parameters: int
    trained: int
    device: str
    processes: int
    precision: str
    memory: int  # bytes there are
    parts: Parts  # at the largest micro-batch
    fits: bool
    longest: list[int]  # tokens of the longest example
    longest_bytes: int  # that it takes alone
    bound: str
    why: str
    steps: Steps
    processes_change: dict[str, int]  # bytes of the same micro-batch under DDP and FSDP2
    seconds: float | None
    price: float | None
    levers: list[Lever]


def main(argv: Sequence[str]) -> None:
    """The command line. Exits with 1 where the run does not fit."""
    parser = Parser(
        prog="gradacc plan",
        description="What a run will take: memory, accumulation steps, operations. Needs no GPU, no weights. "
        "The exit code is 1 where it does not fit.",
        epilog="Any setting of the recipe can follow, as on its own command line: --data.max_length 512",
    )
    parser.add_argument("--config", required=True, help="the recipe's config file")
    parser.add_argument("--budget", default="auto", help="a budget's name or file (auto)")
    parser.add_argument("--processes", type=int, default=1, help="processes, each on a device (%(default)s)")
    parser.add_argument(
        "--tflops", type=float, help="10¹² operations a second that a device reaches: the time"
    )
    parser.add_argument(
        "--rate-of", metavar="RUN", type=Path, help="instead: what the devices of a run reached"
    )
    parser.add_argument("--price", type=float, help="of one device for an hour, with the rate: the cost")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    arguments, settings = parser.parse_known_args(argv)
    for name in ("processes", "tflops", "price"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            refuse(f"--{name}", f"found {value:g}", "allowed: a number above 0")
    if arguments.tflops is not None and arguments.rate_of is not None:
        raise BadInput("--rate-of: found beside --tflops, which says the rate too; give one of the two")
    if arguments.price is not None and arguments.tflops is None and arguments.rate_of is None:
        raise BadInput("--price: found one without --tflops or --rate-of, by which the hours are told")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    recipe = load_recipe(["--config", arguments.config, "--budget", arguments.budget, *settings])
    tflops = rate_of(arguments.rate_of) if arguments.rate_of is not None else arguments.tflops
    found = make_plan(recipe, arguments.processes, tflops, arguments.price)
    if arguments.json:
        print(json.dumps(asdict(found), indent=2))
    else:
        show(found, Console(highlight=False))
    if not found.fits:
        sys.exit(1)


def rate_of(run: Path) -> float:
    """10¹² operations a second that each device of a run has reached, by its plan and its seconds."""
    recipe = open_run(run)
    file = run / "summary.json"
    if not file.is_file():
        refuse(str(run), "found no summary.json in it, so this run has not ended", "give one that has")
    summary = json.loads(file.read_text(encoding="utf-8"))
    tuned: dict[str, Any] = summary.get("tuning") or {"max_tokens": None}
    if tuned["max_tokens"] is not None:  # as most of its windows were cut
        recipe.config.budget.max_tokens = tuned["max_tokens"]
    planned = make_plan(recipe, summary["processes"], with_levers=False).steps.flops_per_window
    return planned * summary["windows"] / summary["seconds"] / summary["processes"] / 1e12


def make_plan(
    recipe: Recipe,
    processes: int = 1,
    tflops: float | None = None,
    price: float | None = None,
    with_levers: bool = True,
    data: tuple[Dataset, Dataset] | None = None,
) -> Plan:
    """The plan of a recipe's run over so many processes: on GPUs, but for the budget `cpu` and where nothing
    says how much memory there is.

    `tflops`: 10¹² floating-point operations a second of one device; `price`: of one for an hour. `data`: what
    `recipe.datasets()` gives, where it is there already. Raises BadInput where no step of the model can be
    traced.
    """
    recipe = copy.copy(recipe)
    recipe.without_weights = True
    recipe.__dict__.pop("model_path", None)  # it may have been asked for with weights
    config, is_cpu = recipe.config, Path(recipe.config.budget_file or "").stem == "cpu"
    given = usable_memory(config.budget, on_gpu=not is_cpu)
    device = "cpu" if is_cpu or given is None else "cuda"
    memory = given or psutil.virtual_memory().total
    training, validation = data or recipe.datasets()
    windows, _ = make_windows(recipe, training, validation, Accelerator(cpu=True), Bound(micro_batch_size=1))
    try:
        found = recipe_memory(recipe, training, windows.tokens, make_model, device == "cuda")
    except NotTraceable as error:
        raise BadInput(
            f"model.name: no step of {config.model.name} could be traced ({error}); run it with --check, and "
            "a number for budget.max_tokens"
        ) from error
    per_process = found.memory.over_processes(processes, sharded=False)
    bound, why = _bound(recipe, per_process, memory, bool(given), device)
    steps = _steps(recipe, windows.with_bound(bound, processes, usual_cost(device)), found)
    parts = per_process.parts(*steps.largest)
    longest = windows.tokens[longest_example(windows.tokens)].tolist()
    alone = per_process.bytes(1, longest)
    room = {"found": found, "available": memory, "processes": processes}
    seconds = steps.flops_per_window * steps.windows / (tflops * 1e12 * processes) if tflops else None
    return Plan(
        model=config.model.name,
        parameters=found.total_parameters,
        trained=found.trained_parameters,
        device=device,
        processes=processes,
        precision=config.budget.precision,
        memory=memory,
        parts=parts,
        fits=parts.total <= memory,
        longest=longest,
        longest_bytes=alone,
        bound=str(bound),
        why=why,
        steps=steps,
        processes_change={
            name: found.memory.over_processes(
                max(2, processes), sharded, found.largest_layer, recipe.config.budget.whole_gradients
            ).bytes(*steps.largest)
            for name, sharded in (("DDP", False), ("FSDP2", True))
        },
        seconds=seconds,
        price=seconds * processes * price / 3600 if seconds is not None and price else None,
        levers=levers(recipe, training, windows.tokens, make_model, device == "cuda", **room)
        if with_levers and alone > memory
        else [],
    )


def _bound(
    recipe: Recipe, memory: MicroBatchMemory, there_are: int, is_given: bool, device: str
) -> tuple[Bound, str]:
    """What bounds a micro-batch, and why."""
    budget = recipe.config.budget
    if budget.micro_batch_size is not None:
        return Bound(micro_batch_size=budget.micro_batch_size), "budget.micro_batch_size says so"
    if budget.max_tokens != "auto":
        return Bound(max_tokens=budget.max_tokens), "budget.max_tokens says so"
    if is_given:
        return Bound(max_bytes=there_are, memory=memory), "what budget.memory holds, by the bytes predicted"
    tokens = tokens_per_micro_batch(budget, device)
    return Bound(max_tokens=tokens), "more is not faster on a CPU; budget.memory would bound it by bytes"


def _steps(recipe: Recipe, windows: WindowLoader, found: StepEstimate) -> Steps:
    plan = windows.plan
    numbers = np.unique(np.linspace(0, plan.num_windows(0) - 1, SAMPLE).astype(int))
    splits = [windows.split(0, int(number)) for number in numbers]
    shapes = [
        (rows, tuple(lengths))
        for split in splits
        for process in split.processes
        for rows, lengths in (windows.shape(piece, split.pad_to) for piece in process)
    ]
    different = sorted(set(shapes))
    steps = [max(map(len, split.processes)) for split in splits]
    tokens, padded = (sum(getattr(split, name) for split in splits) for name in ("tokens", "padded_tokens"))
    flops = {shape: found.flops_of(*shape) for shape in different}
    largest = max(different, key=lambda shape: (found.memory.bytes(*shape), shape[0] * sum(shape[1])))
    return Steps(
        windows=total_windows(recipe.config, windows),
        epochs=recipe.config.train.epochs,
        accumulation_steps=(min(steps), sum(steps) / len(steps), max(steps)),
        padding=1 - tokens / padded,
        largest=(largest[0], list(largest[1])),
        flops_per_window=sum(flops[shape] for shape in shapes) / len(splits),
    )


def show(plan: Plan, console: Console) -> None:
    """Memory as bars, then how the run is cut and what it takes, then what would make it fit."""
    rows, lengths = plan.steps.largest
    console.print(
        f"{plan.model}: {plan.parameters:,} parameters, {plan.trained:,} trained, {plan.precision}, on "
        f"{plan.processes} × {plan.device} with {plan.memory / GIB:.1f} GiB",
        soft_wrap=True,
    )
    table = Table("memory of a process", box=SIMPLE, title_justify="left")
    table.add_column("GiB", justify="right")
    table.add_column(f"of {plan.memory / GIB:.1f} GiB", width=40)
    scale, begin = max(plan.memory, plan.parts.total), 0
    names = {"optimizer": "optimizer states", "activations": "activations or step", "loss": "logits and loss"}
    for name, size in asdict(plan.parts).items():
        bar = Bar(scale, begin, begin + size, width=40)
        table.add_row(names.get(name, name), f"{size / GIB:.2f}", bar)
        begin += size
    style = "green" if plan.fits else "red"
    table.add_row("together", f"{begin / GIB:.2f}", Bar(scale, 0, begin, width=40, color=style), style=style)
    console.print(table)
    least, mean, most = plan.steps.accumulation_steps
    lines = {
        "largest micro-batch": f"{rows} × {_listed(lengths)} tokens",
        "micro-batches": f"at most {plan.bound} ({plan.why})",
        "accumulation steps": f"{least} / {mean:.1f} / {most} (min / mean / max)",
        "padding": f"{plan.steps.padding:.1%} of the tokens",
        "windows": f"{plan.steps.windows:,}, over {plan.steps.epochs} epoch{'s' * (plan.steps.epochs > 1)}",
        "operations": f"{plan.steps.flops_per_window / 1e12:,.2f} TFLOP a window, "
        f"{plan.steps.flops_per_window * plan.steps.windows / 1e15:,.2f} PFLOP in all",
    }
    if plan.seconds is not None:
        lines["time"] = f"{timedelta(seconds=round(plan.seconds))}" + (
            f", cost {plan.price:,.2f}" if plan.price is not None else ""
        )
    else:
        lines["time"] = "give --tflops or --rate-of, and --price for the cost"
    lines[f"on {max(2, plan.processes)} processes"] = ", ".join(
        f"{name} {size / GIB:.2f} GiB each" for name, size in plan.processes_change.items()
    )
    for name, value in lines.items():
        console.print(f"{name:<22}{value}", soft_wrap=True)
    if plan.fits:
        console.print("It fits.", style="green")
        return
    takes, there_are = f"takes {plan.longest_bytes / GIB:.2f} GiB alone", f"{plan.memory / GIB:.2f}"
    why = f"the longest example, of {_listed(plan.longest)} tokens, {takes}, and there are {there_are}."
    if plan.longest_bytes <= plan.memory:
        why = (
            f"such a micro-batch takes {plan.parts.total / GIB:.2f} GiB; --budget.max_tokens auto cuts finer."
        )
    console.print(f"It does not fit: {why}", style="red", soft_wrap=True)
    for lever in plan.levers:
        verdict = "fits" if lever.fits else "does not fit yet"
        console.print(
            f"  {lever.flags:<64} {lever.bytes / GIB:6.2f} GiB ({lever.saved / GIB:.2f} less): {verdict}",
            soft_wrap=True,
        )


def _listed(lengths: Sequence[int]) -> str:
    return " + ".join(map(str, lengths))
