"""`run`: the command line of a recipe file.

`_run` is the sequence of its phases. Cheap checks come first: settings, folder, data, windows, model. Then
come `training.fine_tune` and the report.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from datasets import Dataset, disable_progress_bars

from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.streaming import Stream
from gradacc_hf.config.schema import Config, OutputConfig, with_settings
from gradacc_hf.data.columns import integers_as_text
from gradacc_hf.errors import InputError, NonFiniteError, OutOfMemoryWhileSyncingError, one_line
from gradacc_hf.hub.model_card import RunCard, facts, refresh_cards
from gradacc_hf.hub.push import push
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.recipe.teacher import fingerprint_of_teacher
from gradacc_hf.run import continuation
from gradacc_hf.run.continuation import Continuations
from gradacc_hf.run.ending import result_lines, training_lines
from gradacc_hf.run.fingerprint import (
    check_same_settings,
    duplicates_note,
    fingerprint_of_mixture,
    what_must_stay,
)
from gradacc_hf.run.folder import has_trained, open_output
from gradacc_hf.run.overview import PlannedSteps, print_head, print_plan, rate_note
from gradacc_hf.run.padding import choose_padding
from gradacc_hf.run.resolve import (
    ResumedRun,
    check_settings,
    find_run_to_resume,
    resolve_config,
    resolve_output,
)
from gradacc_hf.run.samples import keep_before, with_before
from gradacc_hf.run.setup import (
    check_best_metric,
    check_inputs,
    load_data,
    make_accelerator,
    make_model,
    make_windows,
    stream_windows,
    total_windows,
    tries_sizes,
)
from gradacc_hf.run.teacher import teacher_facts
from gradacc_hf.training.checkpoint import Checkpoint, Checkpoints, check_same, newest_checkpoint
from gradacc_hf.training.finetune import Best, fine_tune
from gradacc_hf.training.lora import write_merged
from gradacc_hf.training.optimizer import make_optimizer, make_scheduler
from gradacc_hf.utils.commands import command
from gradacc_hf.utils.files import write_pretrained, write_whole
from gradacc_hf.utils.hardware import say, set_up_allocator
from gradacc_hf.utils.memory import release_freed_memory_at_once
from gradacc_hf.utils.modeling import uncompiled
from gradacc_hf.utils.redaction import redact, without_tokens
from gradacc_hf.utils.signals import MARKER, end_with_launcher, lost_contact


def run(recipe_class: type[Recipe], argv: Sequence[str] | None = None) -> None:
    """Run the command line of a recipe file: train, evaluate, save and report.

    A mistake in the settings or the data ends the program with one line on stderr and exit code 2. Exit code
    1 stands for a loss that is not finite, for a lack of memory, and for a process that ended early.

    Args:
        recipe_class: the recipe.
        argv: the words after the program's name; by default `sys.argv[1:]`.

    Raises:
        SystemExit: with exit code 1 or 2.
    """
    try:
        with command():
            _run(recipe_class, sys.argv[1:] if argv is None else list(argv))
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        why = one_line(error).partition("] ")[2].partition(". ")[0] or one_line(error)
        print(
            f"error: process {os.environ.get('RANK')}: another process or machine has ended ({why[:200]}): "
            "start all processes again with --resume auto",
            file=sys.stderr,
        )
        sys.exit(1)


def _run(recipe_class: type[Recipe], argv: list[str]) -> None:
    set_up_process()
    argv = continuation.with_absolute_lengths(argv)
    config, lines = resolve_config(recipe_class, argv)
    for line in lines:
        say(line)
    check_settings(recipe_class, config)
    resumed = find_run_to_resume(config)
    config = resolve_output(config, resumed)
    quieten_libraries()
    accelerator = make_accelerator(config)
    check_same_view(resumed)
    if resumed is not None and resumed.has_ended and config.continues is None:
        check_same_settings(config, resumed.folder)
        tell_nothing_to_resume(resumed, accelerator)
        return
    checkpoint, continued = find_state(resumed, config, accelerator, argv)
    task = load_task(recipe_class, config, accelerator, checkpoint)
    if config.continues is not None:
        task, continued = lengthen(task, continued, argv)
    if checkpoint is not None and resumed is not None:
        task.recipe.read_run_files(resumed.folder)
    config = task.recipe.config
    baseline = task.recipe.baseline(task.training, task.validation)
    check_best_metric(config, baseline)
    plan = plan_run(task, accelerator, continued)
    tell_resumed(resumed, checkpoint, accelerator)
    windows_done = checkpoint.window if checkpoint else 0
    if config.check:
        task.recipe.check_model()
        print_head(task.recipe, accelerator, windows_done)
        accelerator.print("check: this would run")
        return
    plan, parts = build(task, plan, accelerator)
    print_head(task.recipe, accelerator, windows_done)
    first = partial(continuation.write_continuation, continuations=continued) if config.continues else None
    with open_output(config, accelerator, windows_done, first) as folder:
        if accelerator.is_main_process:
            task.recipe.write_run_files(folder)
        commands = commands_of(folder, config, argv, resumed, accelerator.num_processes, continued)
        summary = train(task, plan, parts, folder, checkpoint, baseline, commands)
        accelerator.end_training()
        if summary["stopped_after"] is not None:
            tell_stopped(summary["stopped_after"], config, plan, folder, commands)
            return
        if accelerator.is_main_process:
            tell_ended(task, plan, summary, folder)
            if config.output.push_to_hub is not None:
                push(folder, config.output.push_to_hub)


@dataclass(frozen=True)
class Task:
    """A recipe with its data. All later phases read the resolved config, `recipe.config`.

    recipe: the recipe.
    training, validation: the examples.
    same: settings and data fingerprints that a checkpoint to resume from must share.
    """

    recipe: Recipe
    training: Dataset
    validation: Dataset
    same: dict[str, Any]


@dataclass(frozen=True)
class RunPlan:
    """The windows of a run.

    windows, validation_windows: the loaders.
    num_windows: windows of the whole run; for a stream the most, or None if unknown.
    accumulation_steps: of the windows as they are split before training.
    continued: the continuations of the run.
    """

    windows: WindowLoader
    validation_windows: WindowLoader
    num_windows: int | None
    accumulation_steps: PlannedSteps
    continued: Continuations


@dataclass(frozen=True)
class TrainingParts:
    """The model, the optimizer, the schedule, the card beside the saved model, and the facts of a teacher."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    card: RunCard
    teacher: dict[str, Any] | None


@dataclass(frozen=True)
class Commands:
    """The command lines that repeat this run, and that continue it."""

    again: str
    resume: str


def set_up_process() -> None:
    """Set up signals and memory. Call it before CUDA starts."""
    end_with_launcher()
    set_up_allocator()


def quieten_libraries() -> None:
    """Print only errors of transformers, and no progress bars into a file."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()


def check_same_view(resumed: ResumedRun | None) -> None:
    """Raise InputError if the processes found different runs to resume."""
    views = set(gather_object(["none" if resumed is None else str(resumed)]))
    if len(views) > 1:
        raise InputError(
            f"output.dir: the processes found different runs there ({'; '.join(sorted(views))}): all "
            "machines must share the folder"
        )


def find_state(
    resumed: ResumedRun | None, config: Config, accelerator: Accelerator, argv: Sequence[str]
) -> tuple[Checkpoint | None, Continuations]:
    """Return the checkpoint that a run starts from, and the continuations of the run."""
    if resumed is None:
        return None, Continuations()
    checkpoint = newest_checkpoint(resumed.folder, accelerator)
    if config.continues is not None:
        continued = continuation.begin(resumed.folder, resumed.has_ended, checkpoint, argv)
    else:
        continued = continuation.read_continuations(resumed.folder)
    return checkpoint and continuation.with_free_settings(checkpoint, continued), continued


def lengthen(task: "Task", continued: Continuations, argv: Sequence[str]) -> tuple["Task", Continuations]:
    """Return the task of a continuation, with enough epochs, and the continuation with its settings."""
    recipe, same = task.recipe, task.same
    epochs = continuation.epochs_that_suffice(recipe.config, len(task.training), argv)
    same = {**same, "train.epochs": epochs}
    recipe = recipe.with_config(with_settings(recipe.config, {"train.epochs": epochs}))
    return replace(task, recipe=recipe, same=same), continuation.with_settings_of(continued, same)


def load_task(
    recipe_class: type[Recipe], config: Config, accelerator: Accelerator, checkpoint: Checkpoint | None = None
) -> Task:
    """Read the data sets, and compute the settings and fingerprints that a resumed run must share.

    Labels have the order of the run that is resumed. Raise InputError if that run has other data, or other
    settings that change the computation.
    """
    task = _load_task(recipe_class, config, accelerator)
    if checkpoint is None:
        return task
    before = checkpoint.about["same"].get("data.train")
    if before not in (None, task.same["data.train"]):
        with integers_as_text():
            other = _load_task(recipe_class, config, accelerator)
        task = other if other.same["data.train"] == before else task
    check_same(checkpoint, task.same)
    return task


def _load_task(recipe_class: type[Recipe], config: Config, accelerator: Accelerator) -> Task:
    with accelerator.main_process_first():  # the other processes read its cache
        recipe, training, validation = load_data(recipe_class(config))
    found: list[dict[str, Any]] = [{}]
    if accelerator.is_main_process:
        mixed = fingerprint_of_mixture(recipe.sources, recipe.shares, recipe.example_weights)
        found = [without_tokens(what_must_stay(config, training, validation)) | mixed]
        if config.model.teacher is not None:
            found[0]["model.teacher (weights)"] = fingerprint_of_teacher(recipe.distillation.teacher)
        if recipe.opened is not None:
            found[0]["data.train (bytes of the files)"] = recipe.opened.rows.sizes()
        elif text := duplicates_note(training, validation, "truncated" in recipe.reading.notes):
            recipe.reading.note("duplicates", text)
    return Task(recipe, training, validation, broadcast_object_list(found)[0])


def plan_run(task: Task, accelerator: Accelerator, continued: Continuations) -> RunPlan:
    """Split the data into windows, and print the plan of the run before anything takes long."""
    recipe = task.recipe
    windows, validation_windows = make_windows(recipe, task.training, task.validation, accelerator)
    if windows.bound.max_bytes is not None and accelerator.device.type == "cpu":
        release_freed_memory_at_once()  # the predicted bytes assume it
    empty = recipe.empty_model()
    check_inputs(recipe, empty, task.training, task.validation)
    num_windows = total_windows(recipe.config, windows)
    if recipe.config.continues is not None:
        continuation.check_longer(continued, num_windows)
    tried = tries_sizes(recipe.config.budget, num_windows)
    steps = print_plan(recipe, windows, empty, num_windows, len(task.validation), tried)
    if note := rate_note(recipe.config.optim, num_windows, continued.schedule_after):
        accelerator.print(f"{'learning rate':<22}{note}")
    if continued.parts:
        for name, text in continuation.lines_of(recipe.config, continued, windows, num_windows):
            accelerator.print(f"{name:<22}{text}")
    return RunPlan(windows, validation_windows, num_windows, steps, continued)


def build(task: Task, plan: RunPlan, accelerator: Accelerator) -> tuple[RunPlan, TrainingParts]:
    """Load the model, and make the optimizer and the schedule.

    The windows of a stream replace the windows of its sample.
    """
    recipe = task.recipe
    optim = recipe.config.optim
    model = make_model(recipe)
    choose_padding(recipe, model, plan.windows)
    recipe.before_training(model, (task.training, task.validation), accelerator)
    if recipe.opened is not None:
        plan = replace(plan, windows=stream_windows(recipe, task.training, plan.windows))
    optimizer = make_optimizer(
        model, optim, accelerator.mixed_precision, recipe.config.model.lora.plus_lr_ratio
    )
    start = plan.continued.schedule_after
    scheduler = make_scheduler(optimizer, optim, plan.windows, plan.num_windows, start)
    card = RunCard(recipe, facts(recipe, task.training, task.validation), plan.windows)
    teacher = teacher_facts(recipe, plan.validation_windows)
    return plan, TrainingParts(model, optimizer, scheduler, card, teacher)


def train(
    task: Task,
    plan: RunPlan,
    parts: TrainingParts,
    folder: Path,
    checkpoint: Checkpoint | None,
    baseline: dict[str, float] | None,
    commands: Commands,
) -> dict[str, Any]:
    """Fine-tune the model, and return the summary. An error names the command that continues or repeats."""
    recipe, config = task.recipe, task.recipe.config
    set_seed(config.train.seed, device_specific=True)  # dropout differs by process
    try:
        return fine_tune(
            parts.model,
            parts.optimizer,
            plan.windows,
            accelerator=plan.windows.accelerator,
            scheduler=parts.scheduler,
            epochs=config.train.epochs,
            max_windows=config.train.max_windows,
            max_grad_norm=config.optim.max_grad_norm,
            compute_loss=recipe.compute_loss,
            validate=partial(
                validate, recipe=recipe, windows=plan.validation_windows, card=parts.card, folder=folder
            ),
            eval_every=config.train.eval_interval,
            eval_on_start=config.train.eval_on_start,
            on_nonfinite=config.train.on_nonfinite,
            best=Best(
                config.train.best_metric,
                config.train.best_direction,
                config.train.early_stopping,
                patient_after=plan.continued.after,
            ),
            tune=tries_sizes(config.budget, plan.num_windows),
            output_dir=folder,
            checkpoints=Checkpoints(
                config.checkpoint.every,
                config.checkpoint.keep,
                task.same,
                asdict(config.budget),
                checkpoint,
                config.checkpoint.at_end,
            ),
            save_with=[*recipe.processors(), parts.card],
            write_model=write_merged if config.model.lora.merge else write_pretrained,
            summary={
                "baseline": baseline,
                "teacher": parts.teacher,
                "planned_accumulation_steps": plan.accumulation_steps._asdict(),
                "seed": config.train.seed,
                "command": commands.again,
                "resumed_after": checkpoint.window if checkpoint is not None else None,
                "continued_after": [part.after for part in plan.continued.parts],
                "skipped_rows": skipped_rows(recipe, plan.windows),
                "reading": recipe.reading.summary(),
                "samples": recipe.samples,
                "details": recipe.details,
                "tokens_are": recipe.tokens_are,
                "of_chats": recipe.of_chats,
                "card": asdict(parts.card.facts),
            },
        )
    except (NonFiniteError, OutOfMemoryWhileSyncingError) as error:
        go_on = f"to start again: {commands.again}"  # the folder is removed
        if has_trained(folder):
            go_on = f"to continue from the last checkpoint: {commands.resume}"
        finer = (
            f" --budget.max_tokens {error.max_tokens}"
            if isinstance(error, OutOfMemoryWhileSyncingError)
            else ""
        )
        line = f"{error}; {go_on}{finer}"
        raise type(error)(line, *error.args[1:]) from None


def skipped_rows(recipe: Recipe, windows: WindowLoader) -> dict[str, Any]:
    """Return the count of rows that were left out. A stream counts training rows while it is read."""
    if isinstance(windows.plan, Stream):
        return windows.plan.dataset.read  # type: ignore[attr-defined]
    return {"count": len(recipe.skipped_rows), "first": recipe.skipped_rows[:10]}


def validate(
    model: torch.nn.Module, recipe: Recipe, windows: WindowLoader, card: RunCard, folder: Path
) -> dict[str, float]:
    """Return the validation metrics of a prepared model, and record them in the card.

    The samples get the answers of the model before training, if it was evaluated then.
    """
    with uncompiled(model):
        metrics = card.evaluated(recipe.validate(model, windows, windows.accelerator))
    if windows.accelerator.is_main_process:
        if card.windows.next_position == (0, 0):
            keep_before(folder, recipe.samples)
        else:
            recipe.samples[:] = with_before(folder, recipe.samples)
    return metrics


def tell_nothing_to_resume(resumed: ResumedRun, accelerator: Accelerator) -> None:
    """Print that the run to resume has ended."""
    run = resumed.folder
    accelerator.print(f"{run} has ended: there is nothing to resume (report: {run}/report.html)")


def tell_resumed(resumed: ResumedRun | None, checkpoint: Checkpoint | None, accelerator: Accelerator) -> None:
    """Print which run is resumed, and from where."""
    if resumed is not None:
        after = f"after window {checkpoint.window}" if checkpoint else "from the start: no checkpoint found"
        accelerator.print(f"{'resume':<22}{resumed.folder}, {after}")


def tell_stopped(window: int, config: Config, plan: RunPlan, folder: Path, commands: Commands) -> None:
    """Print the command that continues a run which was stopped after this window, and write it to a file."""
    accelerator = plan.windows.accelerator
    if accelerator.is_main_process:
        write_whole(folder / MARKER, f"cd {shlex.quote(os.getcwd())} && {commands.resume}\n")
    total = total_windows(config, plan.windows)  # fewer than planned if windows grew
    of_all = f"{window} of {total}" if total else str(window)
    accelerator.print(f"stopped after window {of_all}, which is saved; to continue: {commands.resume}")


def tell_ended(task: Task, plan: RunPlan, summary: dict[str, Any], folder: Path) -> None:
    """Print the figures of a run that has ended, and write its cards and report."""
    for line in training_lines(summary, plan.windows):
        print(line)
    report = write_cards_and_report(folder)
    for line in result_lines(task.recipe, summary, len(task.validation), folder, report):
        print(line)


def write_cards_and_report(folder: Path) -> Path | None:
    """Write the model cards and report.html of a run, and return the report.

    Prints a line instead of any error, and returns None.
    """
    try:
        refresh_cards(folder)
        from gradacc_hf.report import write_report  # late: it loads matplotlib, of another extra

        return write_report([folder])
    except Exception as error:  # the run is saved, with or without cards and report
        print(f"no report: {one_line(error)}; to write it: gradacc report {folder}", file=sys.stderr)
        return None


def commands_of(
    folder: Path,
    config: Config,
    argv: Sequence[str],
    resumed: ResumedRun | None,
    processes: int,
    continued: Continuations,
) -> Commands:
    """Return the command lines that repeat a run and that continue it."""
    again = argv
    if resumed is not None:  # a command with --resume does not start a run from the beginning
        again = ["--config", str(folder / "config.yaml"), "--output.dir", f"{folder}-again"]
    resume = ["--resume", str(folder), *_destination_flags(config.output)]
    # `gradacc continue` is another program than the recipe
    program = config.recipe if config.continues and config.recipe else sys.argv[0]
    repeat = continued.commands(folder) if continued.parts else _command(program, again, processes)
    return Commands(repeat, _command(program, resume, processes))


def _destination_flags(output: OutputConfig) -> list[str]:
    """Return the flags that a resumed run needs to send data to the Hub or to a remote tracker."""
    words = [] if output.push_to_hub is None else ["--output.push_to_hub", output.push_to_hub]
    return (
        words if output.tracker in ("none", "tensorboard") else [*words, "--output.tracker", output.tracker]
    )


def _command(recipe: str, words: Sequence[str], processes: int) -> str:
    """Return the command that runs a recipe with these words in this folder, without secrets."""
    program = redact(shlex.join([recipe, *words]))
    if launcher := os.environ.get("GRADACC_LAUNCHER"):
        return f"{launcher} {program} --processes {processes}"
    return f"{'python' if processes == 1 else f'accelerate launch --num_processes {processes}'} {program}"
