"""The `Recipe` that a recipe file fills in, and `run`: its command line.

A recipe says what makes a task that task: its data, its model, its metric. `run` does what all tasks share,
in the order in which it is cheapest to find out that something is wrong: settings, output folder, data,
windows, plan, weights.
"""

import fnmatch
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration, broadcast_object_list, set_seed
from datasets import Dataset, disable_progress_bars
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer

from gradacc_hf.checkpoint import write_whole
from gradacc_hf.config import Config, DataConfig, OptimConfig, read_command_line, tokens_per_micro_batch
from gradacc_hf.embedded import resolve_model
from gradacc_hf.errors import BadInput
from gradacc_hf.loop import Best, evaluate, fine_tune, logits_and_labels, model_loss
from gradacc_hf.runlog import describe
from gradacc_hf.windows import WindowLoader

RUN_FILES = ("config.yaml", "history.jsonl", "summary.json", "best", "last", "logs")


class Recipe:
    """A task: data → features → model → metric. Its docstring's first line is what `--help` says.

    A recipe gives `model_class`, `datasets` and `metrics`; the rest has defaults that suit token inputs.
    """

    Data: ClassVar[type[DataConfig]] = DataConfig
    model_class: ClassVar[Any]
    num_items: Any = "labels"
    validation_source: str = "validation"

    def __init__(self, config: Config):
        self.config = config
        self.data: Any = config.data  # with the recipe's own fields

    def datasets(self) -> tuple[Dataset, Dataset]:
        """Training and validation examples, tokenised, with `labels`."""
        raise TypeError(f"{type(self).__name__} does not say what its data sets are: define datasets()")

    def metrics(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """What an evaluation says of a model, from `predict`'s rows in the data set's order."""
        return {}

    def baseline(self, train: Dataset, validation: Dataset) -> dict[str, float] | None:
        """The metrics of the best answer that looks at no input, for comparison."""
        return None

    def model_overrides(self) -> dict[str, Any]:
        """What the task sets in the model's config; known once `datasets` has run."""
        return {}

    def loss(self, outputs: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        """The mean over the micro-batch's items."""
        return model_loss(outputs, batch)

    def predict(self, outputs: Any, batch: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """Predictions and references of a micro-batch, row by row."""
        return logits_and_labels(outputs, batch)

    def collate(self, examples: Sequence[Mapping[str, Any]], pad_to: int | None = None) -> dict[str, Any]:
        """Examples → a batch, padded to the longest or to `pad_to` tokens."""
        padding = "longest" if pad_to is None else "max_length"
        return dict(
            self.tokenizer.pad(list(examples), padding=padding, max_length=pad_to, return_tensors="pt")
        )

    @cached_property
    def model_path(self) -> str:
        """The folder or Hub name that the model and its tokenizer are loaded from."""
        return resolve_model(self.config.model.name)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        with self._loading("tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.model_path, **self._source())
        if tokenizer.vocab_size <= len(
            tokenizer.all_special_tokens
        ):  # what transformers makes up where there is none
            raise BadInput(f"model.name: {self.config.model.name} has no tokenizer; save it beside the model")
        return tokenizer

    def model_config(self) -> Any:
        """The model's config, with the task's settings and `model.dropout`."""
        with self._loading("config"):
            config = transformers.AutoConfig.from_pretrained(
                self.model_path, **self._source(), **self.model_overrides()
            )
        if self.config.model.dropout is not None:
            set_dropout(config, self.config.model.dropout)
        return config

    def empty_model(self) -> Any:
        """The model without weights, to count and name its parameters."""
        with self._loading("config"), torch.device("meta"):
            return self.model_class.from_config(self.model_config(), **self._trust())

    def model(self) -> Any:
        """The model that is fine-tuned, in float32."""
        return self._load_model()

    def check_model(self) -> None:
        """Raise BadInput where the weights do not fit the config; reads their names and sizes only."""
        self._load_model(device_map="meta")

    def _load_model(self, **options: Any) -> Any:
        options |= {"config": self.model_config(), "dtype": torch.float32, "ignore_mismatched_sizes": True}
        with self._loading("weights"):
            model, info = self.model_class.from_pretrained(
                self.model_path, output_loading_info=True, **options, **self._source()
            )  # fmt: skip
        name, prefix = self.config.model.name, f"{model.base_model_prefix}."
        for tensor, found, expected in info["mismatched_keys"]:
            if tensor.startswith(prefix):  # a new head is fine: other labels
                sizes = f"{tensor} is {list(found)}, and {list(expected)} by its config.json"
                raise BadInput(
                    f"model.name: the weights of {name} do not fit: {sizes}; copy or save both again"
                )
        unknown = [tensor.removeprefix(prefix) for tensor in info["unexpected_keys"]]
        for tensor in info["missing_keys"]:  # transformers would draw it at random
            if near := get_close_matches(tensor.removeprefix(prefix), unknown, 1, cutoff=0.9):
                raise BadInput(
                    f"model.name: the weights of {name} are damaged: {near[0]!r} for {tensor}; "
                    "copy or save them again"
                )
        return model

    @contextmanager
    def _loading(self, what: str) -> Iterator[None]:
        """Whatever transformers raises about a model's files, in one line."""
        try:
            yield
        except BadInput:
            raise
        except Exception as error:
            raise BadInput(
                f"model.name: the {what} of {self.config.model.name} cannot be loaded: "
                f"{_one_line(error)[:300]}; mend it, or name another model"
            ) from error

    def _trust(self) -> dict[str, Any]:
        return {"trust_remote_code": self.config.model.trust_remote_code}

    def _source(self) -> dict[str, Any]:
        return {"revision": self.config.model.revision or "main", **self._trust()}


def run(recipe_class: type[Recipe], argv: Sequence[str] | None = None) -> None:
    """The command line of a recipe file. A `BadInput` ends it with its one line and exit code 2."""
    try:
        _run(recipe_class, sys.argv[1:] if argv is None else list(argv))
    except BadInput as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _run(recipe_class: type[Recipe], argv: list[str]) -> None:
    config = read_command_line(
        argv, data=recipe_class.Data, description=(recipe_class.__doc__ or "").partition("\n")[0]
    )  # fmt: skip
    _check_early_stopping(config)
    _check_output(config)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()
    accelerator = make_accelerator(config)
    recipe = recipe_class(config)
    with accelerator.main_process_first():  # the others find what it has cached
        training, validation = recipe.datasets()
    windows, validation_windows = make_windows(recipe, training, validation, accelerator)
    empty = recipe.empty_model()
    _check_max_length(recipe, empty, training)
    trained = [name for name, _ in empty.named_parameters()]
    frozen = frozen_parameters(trained, config.model.freeze)
    print_plan(recipe, windows, empty, frozen, len(validation))
    baseline = recipe.baseline(training, validation)
    _check_best_metric(config, baseline)
    if config.check:
        recipe.check_model()
        accelerator.print("check: this would run")
        return

    set_seed(config.train.seed)  # the same new weights (a classifier's) on every process
    model = recipe.model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if config.budget.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(model, config.optim)
    scheduler = make_scheduler(optimizer, config, windows)
    folder = _open_output(config, accelerator)
    set_seed(config.train.seed, device_specific=True)  # dropout differs by process

    def validate(model: torch.nn.Module) -> dict[str, float]:
        evaluation = evaluate(
            model,
            validation_windows,
            accelerator=accelerator,
            compute_loss=recipe.loss,
            predict=recipe.predict,
        )
        return {"loss": evaluation.loss, **recipe.metrics(evaluation.predictions, evaluation.references)}

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
        best=Best(config.train.best_metric, config.train.best_direction, config.train.early_stopping),
        output_dir=folder,
        save_with=[recipe.tokenizer],
        baseline=baseline,
    )
    accelerator.end_training()
    accelerator.print(
        f"{summary['windows']} windows, {summary['examples']} examples in {summary['seconds']:.0f} s; "
        f"{summary['padding']:.0%} of the tokens were padding"
    )
    if baseline:
        accelerator.print(f"baseline: {describe(baseline)}")
    accelerator.print(f"saved in {folder}: best/ and last/ (models), history.jsonl, summary.json, logs/")


def make_accelerator(config: Config) -> Accelerator:
    """An Accelerator for the budget's precision and the run's tracker."""
    tracker, known = config.output.tracker, sorted(map(str, LoggerType.list()))
    if tracker != "none" and tracker not in known:
        raise BadInput(
            f"output.tracker: found {tracker!r}; allowed: none, {', '.join(n for n in known if n != 'all')}"
        )
    if tracker not in ("none", *map(str, get_available_trackers())):
        raise BadInput(
            f"output.tracker: {tracker} is not installed here: pip install {tracker}, or choose another"
        )
    precision = {"fp32": "no"}.get(config.budget.precision, config.budget.precision)
    if precision == "fp16" and not torch.cuda.is_available():
        print("budget.precision: fp16 needs a GPU, and none is here: training in fp32", file=sys.stderr)
        precision = "no"
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=not torch.accelerator.is_available(),  # else several processes would each run alone
        log_with=None if tracker == "none" or config.check else tracker,
        project_dir="runs",  # until the run's own folder is there
        step_scheduler_with_optimizer=False,
    )
    expected = int(os.environ.get("GRADACC_PROCESSES") or accelerator.num_processes)
    if accelerator.num_processes != expected:
        raise BadInput(
            f"{expected} processes were asked for and {accelerator.num_processes} are running: on CPUs the "
            "topology must be configs/accelerate/cpu_processes.yaml, as ./launch.sh passes it"
        )
    return accelerator


def make_windows(
    recipe: Recipe, training: Dataset, validation: Dataset, accelerator: Accelerator
) -> tuple[WindowLoader, WindowLoader]:
    """The loaders of a run: training in windows, validation in the data set's order."""
    config = recipe.config
    if config.batch.effective > len(training):
        raise BadInput(
            f"batch.effective: found {config.batch.effective}; allowed: 1 to {len(training)}, "
            "the training examples there are"
        )
    shared: dict[str, Any] = {
        "accelerator": accelerator,
        "collate_fn": recipe.collate,
        "num_items": recipe.num_items,
        "max_tokens": tokens_per_micro_batch(config.budget, accelerator.device.type),
        "micro_batch_size": config.budget.micro_batch_size,
        "num_workers": config.budget.num_workers,
    }
    windows = WindowLoader(
        training, config.batch.effective, seed=config.train.seed, drop_last=config.batch.drop_last, **shared
    )  # fmt: skip
    return windows, WindowLoader(validation, min(512, len(validation)), shuffle=False, **shared)


def make_optimizer(model: torch.nn.Module, optim: OptimConfig) -> Optimizer:
    """The optimizer by name; no weight decay on biases, norms and all else with fewer than two dimensions."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (optim.betas[0], optim.betas[1])
    match optim.name:
        case "adamw":
            return AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps)
        case "adam":
            return Adam(groups, lr=optim.lr, betas=betas, eps=optim.eps)
        case "sgd":
            return SGD(groups, lr=optim.lr, momentum=optim.momentum)
        case "adafactor":
            return Adafactor(groups, lr=optim.lr)


def make_scheduler(optimizer: Optimizer, config: Config, windows: WindowLoader) -> Any:
    """The learning rate's schedule, by window, over the whole run."""
    total = sum(windows.plan.num_windows(epoch) for epoch in range(config.train.epochs))
    total = min(total, config.train.max_windows or total)
    name = {"constant": "constant_with_warmup"}.get(config.optim.scheduler, config.optim.scheduler)
    warmup = math.ceil(total * config.optim.warmup_ratio)
    return transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)


def set_dropout(config: Any, probability: float) -> None:
    """Set every dropout probability of a model's config; of whole layers or paths, only to 0."""
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            set_dropout(value, probability)
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        of_layers = "layerdrop" in name or "drop_path" in name
        if numeric and ("drop" in name) and (probability == 0 or not of_layers):
            setattr(config, name, probability)


def frozen_parameters(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """The parameters whose names match `model.freeze`."""
    frozen: set[str] = set()
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise BadInput(
                f"model.freeze: {pattern!r} matches no parameter; "
                f"there are {names[0]}, {names[1]}, … {names[-1]}"
            )
        frozen.update(matching)
    if len(frozen) == len(names):
        raise BadInput(
            f"model.freeze: {', '.join(map(repr, patterns))} leave no parameter to train: freeze fewer"
        )
    return frozen


def print_plan(
    recipe: Recipe, windows: WindowLoader, empty: torch.nn.Module, frozen: set[str], num_validation: int
) -> None:
    """What is about to happen, before anything heavy does."""
    config, plan, accelerator = recipe.config, windows.plan, windows.accelerator
    epochs = config.train.epochs
    total = sum(plan.num_windows(epoch) for epoch in range(epochs))
    sample = [
        windows.split(0, int(t))
        for t in np.linspace(0, plan.num_windows(0) - 1, min(100, plan.num_windows(0)))
    ]
    steps = [max(map(len, split.processes)) for split in sample]
    padding = 1 - sum(split.tokens for split in sample) / sum(split.padded_tokens for split in sample)
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    still = sum(parameter.numel() for name, parameter in empty.named_parameters() if name in frozen)
    bound = recipe.config.budget.micro_batch_size
    tokens = tokens_per_micro_batch(config.budget, accelerator.device.type)
    rows = (
        ("recipe", (type(recipe).__doc__ or type(recipe).__name__).partition("\n")[0]),
        (
            "model",
            f"{config.model.name}, {parameters:,} parameters"
            + (f", {still:,} of them frozen" if still else ""),
        ),
        (
            "examples",
            f"{plan.num_examples:,} to train on, {num_validation:,} to validate ({recipe.validation_source})",
        ),
        ("effective batch size", f"{config.batch.effective} examples a window"),
        (
            "windows",
            f"{min(total, config.train.max_windows or total):,}, over {epochs} epoch{'s' * (epochs > 1)}",
        ),
        ("micro-batches", f"at most {bound} examples" if bound else f"at most {tokens:,} padded tokens"),
        (
            "accumulation steps",
            f"{min(steps)} / {sum(steps) / len(steps):.1f} / {max(steps)} (min / mean / max)",
        ),
        ("padding", f"{padding:.1%} of the tokens"),
        ("precision", {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)),
        ("processes", f"{accelerator.num_processes} on {accelerator.device.type}"),
    )
    for name, value in rows:
        accelerator.print(f"{name:<22}{value}")


def _check_early_stopping(config: Config) -> None:
    if config.train.early_stopping and not config.train.eval_every:
        raise BadInput(
            f"train.early_stopping: found {config.train.early_stopping} with train.eval_every 0, an "
            "evaluation at the end only: set train.eval_every to 1 or more, or train.early_stopping to 0"
        )


def _check_max_length(recipe: Recipe, model: Any, training: Dataset) -> None:
    """Refuse more tokens than the model has positions for."""
    if "input_ids" not in training.column_names:
        return
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    allowed = min(recipe.tokenizer.model_max_length, positions)
    if recipe.config.data.max_length > allowed:
        raise BadInput(
            f"data.max_length: found {recipe.config.data.max_length}; allowed: 1 to {allowed}, "
            f"the positions of {recipe.config.model.name}"
        )


def _check_best_metric(config: Config, baseline: Mapping[str, float] | None) -> None:
    known = ["loss", *(baseline or {})]
    if baseline is not None and config.train.best_metric not in known:
        raise BadInput(f"train.best_metric: found {config.train.best_metric!r}; allowed: {', '.join(known)}")


def _check_output(config: Config) -> None:
    """Refuse a folder that cannot be written, or that holds what this run would overwrite."""
    folder = Path(config.output.dir or "runs")
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"output.dir: {folder} is a file; give a folder")
    if config.output.dir and folder.is_dir() and any(folder.iterdir()):
        if not any((folder / name).exists() for name in RUN_FILES):
            raise BadInput(f"output.dir: {folder} holds files that are no run's; give a new or empty folder")
        if not config.output.overwrite:
            raise BadInput(
                f"output.dir: {folder} already holds a run; give a new name, or --output.overwrite true"
            )
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise BadInput(f"output.dir: {existing} cannot be written; give a folder elsewhere")


def _open_output(config: Config, accelerator: Accelerator) -> Path:
    """Make the run's folder on the main process, with its config; every process gets its name."""
    chosen: list[Any] = [None]
    if accelerator.is_main_process:
        folder = (
            Path(config.output.dir) if config.output.dir else _next_folder(Path(config.config or "run").stem)
        )
        folder.mkdir(parents=True, exist_ok=True)
        for name in RUN_FILES:
            (shutil.rmtree if (folder / name).is_dir() else Path.unlink)(folder / name) if (
                folder / name
            ).exists() else None
        write_whole(folder / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
        chosen = [str(folder)]
    folder = Path(broadcast_object_list(chosen)[0])
    if accelerator.log_with:
        accelerator.project_configuration = ProjectConfiguration(str(folder), str(folder))
        accelerator.init_trackers("logs")
    return folder


def _next_folder(name: str) -> Path:
    """Make the next free numbered folder under runs/."""
    Path("runs").mkdir(exist_ok=True)
    number = 1
    while True:
        try:
            (folder := Path("runs") / f"{name}-{number}").mkdir()
            return folder
        except FileExistsError:
            number += 1


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
