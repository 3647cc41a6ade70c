"""`run`: the command line of a recipe file.

It does what all tasks share, in the order in which it is cheapest to find out that something is wrong:
settings, output folder, data, windows, plan, weights; then `loop.fine_tune`.
"""

import inspect
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, LoggerType, broadcast_object_list, gather_object, set_seed
from datasets import Dataset, disable_progress_bars

from gradacc_hf.accumulation.batch_schedule import GrowingBatch
from gradacc_hf.accumulation.collation import measure_lengths
from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.noise_scale import MEASUREMENTS_NEEDED, in_words
from gradacc_hf.accumulation.oom import release_freed_memory_at_once
from gradacc_hf.accumulation.splitting import Bound
from gradacc_hf.config.batch_size import check_can_measure, check_sizes, effective_batch_size
from gradacc_hf.config.hardware import adapt_attention, adapt_padding, apply_budget
from gradacc_hf.config.parser import read_command_line
from gradacc_hf.config.schema import Config, OutputConfig, tokens_per_micro_batch
from gradacc_hf.errors import InputError, NonFiniteError, OutOfMemoryWhileSyncingError, one_line, refuse
from gradacc_hf.hub.model_card import RunCard, facts, refresh_cards
from gradacc_hf.hub.push import check_push, push
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.recipe.loading import check_lean_loss
from gradacc_hf.run.fingerprint import check_same_settings, what_must_stay
from gradacc_hf.run.folder import check_output, ended, folder_to_resume, open_output
from gradacc_hf.run.memory_bound import choose_bound
from gradacc_hf.run.overview import print_plan
from gradacc_hf.run.tuning import tunes
from gradacc_hf.training.checkpoint import Checkpoints, check_same, newest_checkpoint
from gradacc_hf.training.compile import compile_layers, uncompiled
from gradacc_hf.training.finetune import Best, fine_tune
from gradacc_hf.training.lora import check_four_bit, check_peft, write_merged
from gradacc_hf.training.optimizer import check_optimizer, choose_trained, make_optimizer, make_scheduler
from gradacc_hf.training.run_log import describe
from gradacc_hf.utils.commands import command
from gradacc_hf.utils.files import write_pretrained, write_whole
from gradacc_hf.utils.hardware import launched_for_several, set_up_allocator
from gradacc_hf.utils.modeling import checkpoint_activations
from gradacc_hf.utils.redaction import redact
from gradacc_hf.utils.signals import MARKER, end_with_launcher, lost_contact


def run(recipe_class: type[Recipe], argv: Sequence[str] | None = None) -> None:
    """The command line of a recipe file. A `InputError` ends it with its one line and exit code 2.

    Where another process or machine is gone, it ends with one line and exit code 1.
    """
    try:
        with command():
            _run(recipe_class, sys.argv[1:] if argv is None else list(argv))
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        why = one_line(error).partition("] ")[2].partition(". ")[0] or one_line(error)
        print(
            f"error: process {os.environ.get('RANK')}: another process or machine is gone ({why[:200]}): "
            "start all again with --resume auto",
            file=sys.stderr,
        )
        sys.exit(1)


def _run(recipe_class: type[Recipe], argv: list[str]) -> None:
    end_with_launcher()
    set_up_allocator()
    config = read_command_line(
        argv, data=recipe_class.Data, description=(recipe_class.__doc__ or "").partition("\n")[0]
    )  # fmt: skip
    config.recipe = _file_of(recipe_class) or config.recipe
    _check_dtype(config)
    apply_budget(config)
    _check_early_stopping(config)
    check_sizes(config)
    _check_dtype(config)  # again, of what is left of the budget
    check_lean_loss(recipe_class, config)
    if config.model.lora.rank:
        check_peft()
    check_four_bit(config.model)
    check_optimizer(config.optim)
    resumed = folder_to_resume(config)
    if resumed is None:
        check_output(config)
    if config.output.push_to_hub is not None:
        config.output.push_to_hub = check_push(config.output.push_to_hub)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()
    accelerator = make_accelerator(config)
    is_over = resumed is not None and ended(resumed)
    found = f"{resumed}, which has ended" if is_over else f"{resumed}" if resumed else "none"
    views = set(gather_object([found]))
    if len(views) > 1:
        raise InputError(
            f"output.dir: the processes see different runs there ({'; '.join(sorted(views))}): all machines "
            "must share the folder"
        )
    if is_over:
        assert resumed is not None
        check_same_settings(config, resumed)
        accelerator.print(
            f"{resumed} has come to its end: nothing to go on with (its report: {resumed}/report.html)"
        )
        return
    recipe = recipe_class(config)
    with accelerator.main_process_first():  # the others find what it has cached
        training, validation = recipe.datasets()
    checkpoint = None
    found = [what_must_stay(config, training, validation)] if accelerator.is_main_process else [{}]
    same = broadcast_object_list(found)[0]
    if resumed is not None:
        config.output.dir = str(resumed)
        checkpoint = newest_checkpoint(resumed, accelerator)
    if checkpoint is not None:
        check_same(checkpoint, same)
    windows, validation_windows = make_windows(recipe, training, validation, accelerator)
    if windows.bound.max_bytes is not None and accelerator.device.type == "cpu":
        release_freed_memory_at_once()  # as the prediction presumes
    adapt_attention(recipe)
    empty = recipe.empty_model()
    _check_max_length(recipe, empty, training)
    print_plan(recipe, windows, empty, total_windows(config, windows), len(validation))
    if resumed is not None:
        after = f"after window {checkpoint.window}" if checkpoint else "from the start: it has no checkpoint"
        accelerator.print(f"{'resume':<22}{resumed}, {after}")
    baseline = recipe.baseline(training, validation)
    _check_best_metric(config, baseline)
    if config.check:
        recipe.check_model()
        accelerator.print("check: this would run")
        return

    model = make_model(recipe)
    optimizer = make_optimizer(model, config.optim, accelerator.mixed_precision)
    scheduler = make_scheduler(optimizer, config.optim, windows, total_windows(config, windows))
    about = facts(recipe, training, validation)
    card = RunCard(recipe, about, windows)
    folder = open_output(config, accelerator, checkpoint.window if checkpoint else 0)
    set_seed(config.train.seed, device_specific=True)  # dropout differs by process

    def validate(model: Any) -> dict[str, float]:
        with uncompiled(model):
            return card.evaluated(recipe.validate(model, validation_windows, accelerator))

    go_on = _command(["--resume", str(folder), *_sent_elsewhere(config.output)], accelerator.num_processes)
    again = argv  # what goes on with a run that has ended by then would not begin it
    if resumed is not None:
        again = ["--config", str(folder / "config.yaml"), "--output.dir", f"{folder}-again"]
    try:
        summary = fine_tune(
            model,
            optimizer,
            windows,
            accelerator=accelerator,
            scheduler=scheduler,
            epochs=config.train.epochs,
            max_windows=config.train.max_windows,
            max_grad_norm=config.optim.max_grad_norm,
            compute_loss=recipe.loss,
            validate=validate,
            eval_every=config.train.eval_every,
            eval_on_start=config.train.eval_on_start,
            on_nonfinite=config.train.on_nonfinite,
            best=Best(config.train.best_metric, config.train.best_direction, config.train.early_stopping),
            tune=tunes(config, total_windows(config, windows)),
            output_dir=folder,
            checkpoints=Checkpoints(
                config.checkpoint.every, config.checkpoint.keep, same, asdict(config.budget), checkpoint
            ),
            save_with=[*recipe.processors(), card],
            write_model=write_merged if config.model.lora.merge else write_pretrained,
            baseline=baseline,
            seed=config.train.seed,
            command=_command(again, accelerator.num_processes),
            resumed_after=checkpoint.window if checkpoint is not None else None,
            skipped_rows={"count": len(recipe.skipped_rows), "first": recipe.skipped_rows[:10]},
            samples=recipe.samples,
            tokens_are=recipe.tokens_are,
            card=asdict(about),
        )
    except (NonFiniteError, OutOfMemoryWhileSyncingError) as error:
        finer = (
            f" --budget.max_tokens {error.max_tokens}"
            if isinstance(error, OutOfMemoryWhileSyncingError)
            else ""
        )
        raise type(error)(f"{error}; from its last checkpoint: {go_on}{finer}", *error.args[1:]) from None
    accelerator.end_training()
    if summary["stopped_after"] is not None:
        if accelerator.is_main_process:
            write_whole(folder / MARKER, f"cd {shlex.quote(os.getcwd())} && {go_on}\n")
        of_all = f"{summary['stopped_after']} of {total_windows(config, windows)}"
        accelerator.print(f"stopped after window {of_all}, which is saved; to go on: {go_on}")
        return
    accelerator.print(
        f"{summary['windows']} windows, {summary['examples']} examples in {summary['seconds']:.0f} s; "
        f"{summary['padding']:.0%} of the tokens were padding"
    )
    if summary["skipped_windows"]:
        accelerator.print(f"{summary['skipped_windows']} of these windows took no step: not finite")
    if windows.noise.measured >= MEASUREMENTS_NEEDED:
        accelerator.print(
            in_words(
                windows.noise.scale, windows.plan.size_asked(*windows.next_position), windows.noise.measured
            )
        )
    if baseline:
        accelerator.print(f"baseline: {describe(baseline)}")
    accelerator.print(f"saved in {folder}: best/ and last/ (models), history.jsonl, summary.json, logs/")
    if accelerator.is_main_process:
        try:
            refresh_cards(folder)
            from gradacc_hf.report import write_report  # late: it loads matplotlib, of another extra

            print(f"report: {write_report([folder])}")
        except Exception as error:  # the run is over and saved, whatever became of its cards and report
            print(f"no report: {one_line(error)}; gradacc report {folder} makes one", file=sys.stderr)
        if config.output.push_to_hub is not None:
            push(folder, config.output.push_to_hub)


def _file_of(recipe_class: type[Recipe]) -> str | None:
    """The file that defines a recipe; None where it is typed into a notebook, say."""
    try:
        return str(Path(inspect.getfile(recipe_class)).resolve())
    except (TypeError, OSError):
        return None


def _sent_elsewhere(output: OutputConfig) -> list[str]:
    """The flags without which a run that goes on sends nothing anywhere."""
    words = [] if output.push_to_hub is None else ["--output.push_to_hub", output.push_to_hub]
    return (
        words if output.tracker in ("none", "tensorboard") else [*words, "--output.tracker", output.tracker]
    )


def _command(words: Sequence[str], processes: int) -> str:
    """What runs this file again with these words, from this folder; without its secrets."""
    program = redact(shlex.join([sys.argv[0], *words]))
    if launcher := os.environ.get("GRADACC_LAUNCHER"):
        return f"{launcher} {program} --processes {processes}"
    return f"{'python' if processes == 1 else f'accelerate launch --num_processes {processes}'} {program}"


def make_model(recipe: Recipe) -> Any:
    """The model that is trained: as seeded, the same new weights (a classifier's) in every process."""
    config = recipe.config
    set_seed(config.train.seed)
    adapt_attention(recipe)
    model = recipe.model()
    choose_trained(recipe, model)
    if config.budget.gradient_checkpointing:
        checkpoint_activations(model)
    if config.budget.compile:
        compile_layers(model)
    return model


def make_accelerator(config: Config) -> Accelerator:
    """An Accelerator for the budget's precision and the run's tracker."""
    tracker, known = config.output.tracker, sorted(map(str, LoggerType.list()))
    if tracker != "none" and tracker not in known:
        raise InputError(
            f"output.tracker: found {tracker!r}; allowed: none, {', '.join(n for n in known if n != 'all')}"
        )
    if tracker not in ("none", *map(str, get_available_trackers())):
        raise InputError(
            f"output.tracker: {tracker} is not installed here: pip install {tracker}, or choose another"
        )
    apply_budget(config)
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(config.budget.precision, config.budget.precision),
        cpu=not torch.accelerator.is_available(),  # else several processes would each run alone
        log_with=None if tracker == "none" or config.check else tracker,
        project_dir="runs",  # until the run's own folder is there
        step_scheduler_with_optimizer=False,
    )
    expected = int(os.environ.get("GRADACC_PROCESSES") or accelerator.num_processes)
    if accelerator.num_processes != expected:
        raise InputError(
            f"{expected} processes were asked for and {accelerator.num_processes} are running: on CPUs the "
            "topology must be configs/accelerate/cpu_2.yaml, as ./launch.sh passes it"
        )
    if accelerator.num_processes == 1 and launched_for_several():
        raise InputError(
            "accelerate launch was asked for several processes and has started one (MULTI_CPU waits for "
            "mpirun): pass --config_file configs/accelerate/cpu_2.yaml --num_processes N, or use ./launch.sh"
        )
    return accelerator


def make_windows(
    recipe: Recipe,
    training: Dataset,
    validation: Dataset,
    accelerator: Accelerator,
    bound: Bound | None = None,
) -> tuple[WindowLoader, WindowLoader]:
    """The loaders of a run: training in windows, validation in the data set's order.

    `bound`: of a micro-batch; by default what the budget says, or the memory there is.
    """
    config = recipe.config
    adapt_padding(recipe)
    sizes = effective_batch_size(config.batch, len(training))
    measures = not hasattr(recipe.loss, "look_ahead")  # else no example has a gradient of its own
    if accelerator.distributed_type == DistributedType.FSDP and config.budget.whole_gradients:
        measures = False  # no micro-batch's is ever there on its own
    if isinstance(sizes, GrowingBatch):
        check_can_measure(sizes, measures, accelerator.num_processes)
    if wrong := [index for index in config.data.leave_out if not 0 <= index < len(training)]:
        raise InputError(
            f"data.leave_out: found {wrong[0]}; allowed: 0 to {len(training) - 1}, training examples"
        )
    lengths = measure_lengths(training, recipe.lengths(training))
    shared: dict[str, Any] = {
        "accelerator": accelerator,
        "collate_fn": recipe.collate,
        "num_items": recipe.num_items,
        "pad_to": recipe.pad_to,
        "pad_to_multiple_of": config.budget.pad_to_multiple_of,
        "transform": recipe.transform,
        "seed": config.train.seed,
        "bound": bound or choose_bound(recipe, training, lengths, make_model, accelerator),
        "num_workers": config.budget.num_workers,
    }
    windows = WindowLoader(
        training,
        sizes,
        noise_every=config.train.noise_every if measures else 0,
        lengths=lengths,
        drop_last=config.batch.drop_last,
        leave_out=config.data.leave_out,
        whole_gradients=config.budget.whole_gradients,
        **shared,
    )
    size, lengths = min(512, len(validation)), recipe.lengths(validation)
    if windows.bound.max_bytes is not None:  # of training; nobody has predicted what writing a text takes
        most = tokens_per_micro_batch(config.budget, accelerator.device.type)
        shared["bound"] = replace(windows.bound, max_tokens=most)
    return windows, WindowLoader(validation, size, lengths=lengths, shuffle=False, **shared)


def total_windows(config: Config, windows: WindowLoader) -> int:
    """The windows of the whole run."""
    total = sum(windows.plan.num_windows(epoch) for epoch in range(config.train.epochs))
    return min(total, config.train.max_windows or total)


def _check_early_stopping(config: Config) -> None:
    if config.train.early_stopping and not config.train.eval_every:
        raise InputError(
            f"train.early_stopping: found {config.train.early_stopping} with train.eval_every 0, an "
            "evaluation at the end only: set train.eval_every to 1 or more, or train.early_stopping to 0"
        )


def _check_dtype(config: Config) -> None:
    if config.model.dtype == "bfloat16" and config.budget.precision != "bf16":
        raise InputError(
            f"model.dtype: found bfloat16 with budget.precision {config.budget.precision}; allowed is "
            "float32, or bfloat16 with budget.precision bf16, which computes losses and norms in float32"
        )


def _check_max_length(recipe: Recipe, model: Any, training: Dataset) -> None:
    """Refuse more tokens than the model has positions for, and none but special ones."""
    if not any(name.endswith("input_ids") for name in training.column_names):
        return
    special, given = recipe.tokenizer.num_special_tokens_to_add(), recipe.config.data.max_length
    if given <= special:
        refuse("data.max_length", f"found {given}; {special} special tokens frame a text", "allow more")
    positions = getattr(model.config, "max_position_embeddings", None) or 0
    allowed = min(recipe.tokenizer.model_max_length, positions if positions > 0 else math.inf)  # XLNet: −1
    multiple = recipe.config.budget.pad_to_multiple_of or 1
    if given <= allowed < (padded := -(-given // multiple) * multiple):
        found = f"found {multiple}, which pads data.max_length {given} to {padded} tokens"
        refuse("budget.pad_to_multiple_of", found, f"the model has {allowed} positions: lower either")
    if given > allowed:
        found, name = f"found {given}", recipe.config.model.name
        refuse("data.max_length", found, f"allowed: 1 to {allowed}, the positions of {name}")


def _check_best_metric(config: Config, baseline: Mapping[str, float] | None) -> None:
    known = ["loss", *(baseline or {})]
    if baseline is not None and config.train.best_metric not in known:
        raise InputError(
            f"train.best_metric: found {config.train.best_metric!r}; allowed: {', '.join(known)}"
        )
