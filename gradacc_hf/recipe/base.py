"""The base class of recipes: a recipe file defines the data, the model and the metrics of a task.

`run/runner.py` has the part that all tasks share, from the command line to the saved model.
"""

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset

from gradacc_hf.accumulation.collation import PadTo, Transform
from gradacc_hf.accumulation.lengths import Lengths
from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.loss_items import IGNORED, ComputeLoss, CountItems, model_loss
from gradacc_hf.config.earlier_run import EarlierRun
from gradacc_hf.config.schema import Config, DataConfig
from gradacc_hf.data.bad_rows import Problem, check_rows
from gradacc_hf.data.columns import file_rows, select_rows
from gradacc_hf.data.files import Form
from gradacc_hf.data.loading import Convert, Splits, key_by_code, load_data
from gradacc_hf.data.reading import LOST, Reading, find_truncation
from gradacc_hf.data.sources import CARRIED, SOURCE, weighed
from gradacc_hf.embedded import FROM_SCRATCH, cure_of_misfit, resolve_model
from gradacc_hf.errors import InputError, one_line, refuse
from gradacc_hf.recipe.labels import Labels, labels_of_config, parameters_of_labels, renew
from gradacc_hf.recipe.labels_per import find_labels_per, labels_per, note_on_tokens
from gradacc_hf.recipe.mixture import read_mixture, take_sources_and_weights
from gradacc_hf.recipe.scoring import ScoredRows
from gradacc_hf.recipe.streaming import ExampleStream, OpenRows, open_rows
from gradacc_hf.recipe.teacher import Teacher, make_distillation
from gradacc_hf.training.distillation import Distillation
from gradacc_hf.training.experts import set_router_loss
from gradacc_hf.training.loop import Rows, evaluate, logits_and_labels
from gradacc_hf.training.lora import (
    check_four_bit,
    check_peft,
    four_bit,
    installed_mismatch,
    load_adapter_weights,
    pretrained,
)
from gradacc_hf.training.run_log import by_source
from gradacc_hf.utils.files import MODEL_CONFIG
from gradacc_hf.utils.modeling import set_dropout

ROWS_READ = 50  # from which the example for the model card is chosen


@dataclass(frozen=True)
class Generation:
    """The settings with which `gradacc predict` lets a model write.

    max_new_tokens: the longest answer; None for the setting of the recipe.
    temperature: divisor of the logits of a sample; 0 always takes the likeliest token.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0

    @property
    def options(self) -> dict[str, Any]:
        """The options of transformers' `generate`, without a length."""
        if not self.temperature:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}


class Recipe:
    """A task: data → features → model → metrics. The first line of its docstring heads `--help`.

    A recipe defines `model_class`, `datasets` and `metrics`. The defaults of the other methods suit inputs of
    tokens.

    Args:
        config: All settings of a run. They are frozen: `with_config` returns a recipe with other settings.

    Raises:
        InputError: In most methods, for settings or files that the task cannot use.
    """

    Data: ClassVar[type[DataConfig]] = DataConfig
    model_class: ClassVar[Any]
    tokenizer_settings: ClassVar[Mapping[str, Any]] = {}  # options of the tokenizer's from_pretrained
    padding_side: str | None = None  # "right" or "left"; None: the tokenizer's own
    saves_padding_side: ClassVar[bool] = True  # False: the saved tokenizer keeps the side of its own
    pipeline_tag: ClassVar[str | None] = None  # the Hub's name of the task: "text-classification"
    example: ClassVar[Any] = "A text."  # an input for the example code of the model card; or None
    num_items: str | CountItems = "labels"
    labels_per: Literal["token", "example"] | None = None  # of lists of integers; None: by their lengths
    pad_to: PadTo = "micro_batch"  # "window" if padding changes the loss
    columns_padded_together: bool = False  # whether the columns of `lengths` have one padded length
    has_router_loss: ClassVar[bool] = (
        True  # whether the loss of a mixture of experts includes its router loss
    )
    transform: Transform | None = None  # the random part of an example: masking, cropping, augmentation
    tokens_are: str | None = None  # the unit of inputs other than texts: "patches of 16 × 16 pixels"
    baseline_is: ClassVar[str] = "a baseline that ignores the input"  # `baseline`, in words
    lean_loss: ClassVar[bool] = False  # whether model() reads budget.lean_loss
    writes_texts: ClassVar[bool] = False  # whether `answer` reads `generation`
    takes_teacher: ClassVar[bool] = False  # whether `item_logits` suits the loss, for `model.teacher`
    labels_are_several = False  # whether any number of an example's labels holds
    generation = Generation()  # set by `gradacc predict`
    validation_source: str = "validation"
    held_out = False  # whether the validation rows are a share of the training file
    of_chats: bool | None = False  # whether inputs are chats; None: unknown
    of_rewards: bool = False  # whether the model gives a score to a text, as a reward model does
    sources: Sequence[str] | None = None  # of each training example in a mixture
    shares: Mapping[str, str] | None = None  # weight of each source by name
    example_weights: np.ndarray | None = None  # of each training example, if data.weight_column is set
    validation_sources: Sequence[str] | None = None  # of each validation example in a mixture
    source_columns: Sequence[Sequence[str]] = ()  # columns of the rows of each source
    has_validation_by_source = False
    validation_rows_read: Dataset | None = None  # the first, before they become examples

    def __init__(self, config: Config):
        self.config = config
        self.data: Any = config.data  # with the recipe's own fields
        self.skipped_rows: list[str] = []  # one line for each row, of both data sets
        self.reading = Reading()  # the files, and what was changed or left out
        self.opened: OpenRows | None = None  # the training rows, with data.streaming
        self.samples: list[dict[str, str]] = []  # the model's answers to a few rows, for the report
        self.details: list[dict[str, Any]] = []  # tables about the latest evaluation, for the report
        self.scored: ScoredRows | None = None  # of the latest evaluation, for the intervals of metrics
        self.new_parameters: set[str] | None = None  # parameters without saved weights; None: all
        self.model_notes: dict[str, str] = {}  # for the plan: each change of the user's model, by name
        self.own_padding_side: str | None = None  # of the tokenizer, before `padding_side`
        self.has_new_labels = False  # whether the model has labels, and the data have others
        self.without_weights = False  # set by weightless()
        self._own_tokenizing: tuple[Any, Any] = None, None  # truncation and padding in the tokenizer's file
        self.earlier = EarlierRun.of(config.model.name)  # the run that this one starts from
        self._saved_config: Any = None  # the config beside a loaded adapter, with the task's settings

    def with_config(self, config: Config) -> Self:
        """Return a copy of this recipe with other settings. Both share the data."""
        other = copy.copy(self)
        other.config, other.data = config, config.data
        return other

    def weightless(self) -> Self:
        """Return a copy of this recipe whose `model()` is made from the config, without saved weights."""
        other = copy.copy(self)
        other.without_weights = True
        for name in ("model_path", "teacher", "distillation"):  # computed for a model with weights
            vars(other).pop(name, None)
        return other

    def datasets(self) -> tuple[Dataset, Dataset]:
        """Return training and validation examples, tokenised, with `labels`.

        With `data.streaming`, they are made of the first rows, and `stream` makes the examples of all rows.
        """
        raise TypeError(f"{type(self).__name__} has no data sets: define datasets()")

    def rows(
        self,
        label_column: str | None = None,
        convert: Convert | None = None,
        word_columns: tuple[str, str] | None = None,
        together: Sequence[str] = (),
    ) -> tuple[Dataset, Dataset]:
        """Read the training and validation rows that `data.train` and `data.validation` name.

        With `data.streaming`, they are the first rows of a stream.

        Args:
            label_column: If rows are held out, the first row of every label in it stays in training.
            convert: Converts rows from the format of a file, before rows are held out.
            word_columns: The columns of tokens and tags. With them, text files with a token a line are read.
            together: Columns whose equal values keep rows together when rows are held out.
        """
        if self.data.streaming:
            if type(self).examples_of is Recipe.examples_of:
                refuse("data.streaming", f"{type(self).__name__} needs all rows at once", "set it to false")
            self.reading.begin(Reading())
            self.opened, train, validation = open_rows(self, convert)
            self.validation_rows_read = _first(validation)
            return train, validation
        if self.data.mixture:
            splits = read_mixture(self, label_column, convert, word_columns, together)
        else:
            splits = self.load_rows(self.data, label_column, convert, word_columns, together)
        self.validation_source, self.held_out = splits.source, splits.held_out
        self.reading.begin(splits.reading)
        train, validation = (key_by_code(rows, *self._file()) for rows in (splits.train, splits.validation))
        self.validation_rows_read = _first(validation)
        if (column := self.data.weight_column) is not None:
            train, left_out = weighed(train, column, self.data.on_bad_row)
            self.skipped_rows += left_out
            self.reading.weight_column = column
        return train, validation

    def _file(self) -> list[Path]:
        """Return the file of the recipe; none for a recipe in a notebook."""
        try:
            return [Path(inspect.getfile(type(self)))]
        except (OSError, TypeError):
            return []

    def load_rows(
        self,
        data: Any,
        label_column: str | None,
        convert: Convert | None,
        word_columns: tuple[str, str] | None,
        together: Sequence[str],
    ) -> Splits:
        """Read the rows that the settings `data` name."""
        return load_data(
            data.train,
            data.validation,
            validation_fraction=data.validation_fraction,
            seed=self.config.train.seed,
            validation_split=data.validation_split,
            config_name=data.config_name,
            label_column=label_column,
            convert=convert,
            form=Form(data.separator, data.encoding, data.rows_key, data.sheet, word_columns=word_columns),
            together=together,
        )

    def rows_of_sources(self, splits: Sequence[Dataset]) -> list[list[Dataset]]:
        """Return training and validation rows by source, with the columns of the source."""
        if not self.source_columns:
            return [list(splits)]
        found = []
        for number, columns in enumerate(self.source_columns):
            chosen = [np.flatnonzero(np.asarray(rows[SOURCE]) == number).tolist() for rows in splits]
            pairs = [(rows, part) for rows, part in zip(splits, chosen, strict=True) if part]
            found.append([select_rows(rows, part).select_columns([*columns]) for rows, part in pairs])
        return found

    def setting_of_source(self, number: int, key: str) -> Any:
        """Return a setting of `data` for a source of a mixture, or for all data."""
        given = self.data.mixture[number] if self.data.mixture else {}
        return given.get(key, getattr(self.data, key))

    def read_examples(self) -> tuple[Dataset, Dataset]:
        """Return the examples of `datasets()`. Weights and sources of rows become attributes of the recipe.

        Raise InputError for a recipe that does not keep them.
        """
        training, validation = take_sources_and_weights(self, *self.datasets())
        if self.labels_per is None and type(self).collate is Recipe.collate:
            self.labels_per = find_labels_per(training)
            if self.labels_per == "token" and (note := note_on_tokens(training)):
                self.model_notes["labels per token"] = note
        if self.config.model.teacher is not None:
            self.model_notes["teacher"] = self.teacher.check(self)
        return training, validation

    def stream(self, sample: Dataset) -> ExampleStream | None:
        """Return the examples of all training rows, with the columns of a sample; None for data read whole.

        Call it after `datasets`.
        """
        return None if self.opened is None else ExampleStream(self, sample.column_names)

    def row_problem(self, row: Mapping[str, Any]) -> str | None:
        """Return the problem of a row of a stream, which is then not among `examples_of`, or None."""
        return None

    def examples_of(self, rows: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        """Return the examples of a batch of rows of a stream, by column.

        They equal the examples of `datasets`, which is called before. Further columns are optional: `problem`
        is the problem of each row, or "". Columns with "lost" in the name are above 0 for truncated rows.
        `row` is the number of the row of each example, if a row has several.
        """
        raise NotImplementedError

    def check_rows(
        self,
        training: Dataset,
        validation: Dataset,
        problem: Problem,
        key: str,
        numbers: Sequence[Any] = (None, None),
    ) -> tuple[Dataset, Dataset]:
        """Return both data sets without bad rows; raise InputError for the file's first unless skipped.

        Args:
            training: Training rows.
            validation: Validation rows.
            problem: Returns the problem of a row, or None.
            key: The setting that messages name. For "data.train", messages about the rows of
                `data.validation` name that setting instead.
            numbers: For both data sets, the number of each row in the file.
        """
        kept = []
        of_validation = "data.validation" if key == "data.train" and self.data.validation else key
        splits = (
            ("training", key, training, numbers[0]),
            ("training" if self.held_out else "validation", of_validation, validation, numbers[1]),
        )
        others = (validation, numbers[1]) if self.held_out else None  # rows of the same file
        for split, named, dataset, of_file in splits:
            settings = {"key": named, "on_bad_row": self.data.on_bad_row, "split": split, "numbers": of_file}
            dataset, bad = check_rows(dataset, problem, **settings, others=others)
            self.skipped_rows += bad
            kept.append(dataset)
            others = None
        return kept[0], kept[1]

    @property
    def may_skip(self) -> list[str] | None:
        """The list that receives a line about each skipped row; None if bad rows are errors."""
        return self.skipped_rows if self.data.on_bad_row == "skip" else None

    def map_rows(
        self,
        splits: Sequence[Dataset],
        features: Callable[..., Mapping[str, Any]],
        key: str,
        keep: Sequence[str] = (),
        **settings: Any,
    ) -> tuple[Dataset, Dataset]:
        """Map training and validation rows through `features(rows, tokenizer=…, **settings)`, in batches.

        Args:
            splits: Training and validation rows.
            features: Returns the new columns, with `problem`: "" or the problem of a row (see `check_rows`).
                Columns of `reading.LOST` are counted as truncated by data.max_length, and removed.
            key: The setting that messages about bad rows name.
            keep: Columns of the rows to keep.
            settings: Further arguments of `features`.
        """
        settings["tokenizer"] = self.tokenizer
        mapped = [
            dataset.map(
                features,
                batched=True,
                fn_kwargs=settings,
                remove_columns=[c for c in dataset.column_names if c not in (*keep, *CARRIED)],
            )
            for dataset in splits
        ]
        numbers = [file_rows(dataset) for dataset in splits]
        train, validation = self.check_rows(
            mapped[0], mapped[1], lambda row: row["problem"] or None, key, numbers
        )
        train, validation = self.note_truncated((train, validation))
        return train.remove_columns("problem"), validation.remove_columns("problem")

    def note_truncated(
        self, splits: Sequence[Dataset], lost: Mapping[str, str] = LOST, setting: str = "data.max_length"
    ) -> tuple[Dataset, Dataset]:
        """Note the rows that were truncated, and return training and validation rows without these columns.

        Args:
            splits: Training and validation rows.
            lost: Columns with the number of things that truncation removed from a row, and their name.
            setting: The setting that truncates.
        """
        names = {name: what for name, what in lost.items() if name in splits[0].column_names}
        value = getattr(self.data, setting.removeprefix("data."))
        if names and (found := find_truncation(splits, names, f"{setting} {value}")):
            self.reading.truncated.append(found)
            self.reading.note("truncated", str(found))
        train, validation = (dataset.remove_columns([*names]) for dataset in splits)
        return train, validation

    def lengths(self, dataset: Dataset | Sequence[Any]) -> Lengths:
        """Return the tokens of each example, as `WindowLoader` takes them; None counts `input_ids`."""
        return None

    def before_training(
        self, model: torch.nn.Module, datasets: Sequence[Dataset], accelerator: Accelerator
    ) -> None:
        """Compute what the loss needs of the model from which training starts, in all processes.

        Args:
            model: The model, before Accelerate wraps it.
            datasets: Training and validation examples.
            accelerator: The Accelerator of the run.
        """

    def write_run_files(self, folder: Path) -> None:
        """Write what a resumed run or an evaluation needs of `before_training`. The main process calls it."""

    def read_run_files(self, folder: Path) -> None:
        """Read what `write_run_files` wrote into the folder of a run, if it is there."""

    def validate(
        self, model: torch.nn.Module, windows: WindowLoader, accelerator: Accelerator
    ) -> dict[str, float]:
        """Return the loss of a prepared model, and the `metrics` of all predictions."""
        settings = {"accelerator": accelerator, "compute_loss": self.loss, "predict": self.predict}
        found = evaluate(model, windows, sources=self.validation_sources, **settings)
        self.scored = ScoredRows(found.predictions, found.references, self.metrics)
        metrics = self.metrics(found.predictions, found.references)
        plain = {n: value.item() if isinstance(value, np.generic) else value for n, value in metrics.items()}
        scores = {"loss": found.loss, **plain}  # no numbers of numpy, which JSON and YAML do not have
        self.details[:] = self.describe(found.predictions, found.references, windows)
        return scores | by_source("loss", found.source_losses) | self.source_metrics()

    def describe(
        self, predictions: Sequence[Any], references: Sequence[Any], windows: WindowLoader
    ) -> list[dict[str, Any]]:
        """Return tables about an evaluation for the report, as `tasks/details.py` makes them.

        Args:
            predictions, references: As for `metrics`.
            windows: The loader of the examples, for the inputs of some.
        """
        return []

    def texts(self, windows: WindowLoader) -> Callable[[Sequence[int]], list[str]]:
        """Return a function: numbers of examples → their texts, as the model receives them."""

        def texts_of(rows: Sequence[int]) -> list[str]:
            tokens = [example["input_ids"] for example in windows.examples(rows)] if len(rows) else []
            return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]

        return texts_of

    def source_metrics(self) -> dict[str, float]:
        """Return the metrics of the rows of each source in the latest evaluation: "accuracy/chats"."""
        return self.scored.by_source(self.validation_sources or ()) if self.scored else {}

    def answer(self, model: Any, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """Return one answer of a saved model to each input: a text, or a row as in a data file.

        An answer that ends only at `generation.max_new_tokens` has `truncated`: True.
        """
        raise InputError(f"{type(self).__name__} has no answers to inputs: define answer() in the recipe")

    def example_of(self, row: Mapping[str, Any]) -> Any:
        """Return the input of `answer` in a row of data, in the form of `example`; None if it has none."""
        return row.get(getattr(self.data, "text_column", ""))

    def processors(self) -> list[Any]:
        """Return the objects that prepare inputs and are saved beside the model: the tokenizer.

        A fast tokenizer saves the truncation and the padding of the latest call, so they are set back.
        """
        tokenizer = copy.deepcopy(self.tokenizer)
        if tokenizer.is_fast:
            backend, (truncation, padding) = tokenizer.backend_tokenizer, self._own_tokenizing
            backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
            backend.enable_padding(**padding) if padding else backend.no_padding()
        if not self.saves_padding_side:
            tokenizer.padding_side = self.own_padding_side
        return [tokenizer]

    def metrics(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """Return the metrics of an evaluation, from the rows of `predict` in the order of the data set."""
        return {}

    def baseline(self, train: Dataset, validation: Dataset) -> dict[str, float] | None:
        """Return the metrics of an answer that ignores the input. The training rows decide the answer."""
        return None

    def model_overrides(self) -> dict[str, Any]:
        """Return the task's settings in the model's config. Call it after `datasets`."""
        return {}

    loss = staticmethod(model_loss)
    """Return the mean loss over the items of a micro-batch, of (outputs, batch): the model's own."""

    @property
    def compute_loss(self) -> ComputeLoss:
        """The loss of training: `loss`, or with `model.teacher` the loss of the distillation."""
        return self.loss if self.config.model.teacher is None else self.distillation

    def item_logits(
        self, logits: torch.Tensor, batch: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits of each item (items, classes), and the weight of each item, or None."""
        labels = batch["labels"]
        if self.num_items == "next_token":
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        return (logits, None) if labels.ndim == logits.ndim else (logits[labels != IGNORED], None)

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher that `model.teacher` names."""
        return Teacher(self)

    @cached_property
    def distillation(self) -> Distillation:
        """The loss with the teacher. Call it after `read_examples`, which decides the order of labels."""
        return make_distillation(self)

    def padded_part(self, model: Any, batch: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        """Return the model whose layers compute padding, and its inputs: a part of the recipe's model."""
        return model, batch

    def predict(self, outputs: Any, batch: Mapping[str, Any]) -> tuple[Rows, Rows]:
        """Return the predictions and references of a micro-batch, row by row."""
        return logits_and_labels(outputs, batch)

    def collate(self, examples: Sequence[Mapping[str, Any]], pad_to: int | None = None) -> dict[str, Any]:
        """Return examples as a batch, padded to the longest or to `pad_to` tokens.

        Labels that are lists of integers are one label per token, which is padded with −100. Or they are the
        same number of labels for each example, such as of two questions about a text. `labels_per` states
        which; without it, the lengths do. Raises InputError for lists that are neither.
        """
        settings = {"padding": "longest" if pad_to is None else "max_length", "max_length": pad_to}
        settings["pad_to_multiple_of"] = self.config.budget.pad_to_multiple_of if pad_to is None else None
        if (self.labels_per or labels_per(examples)) == "token":
            return dict(
                transformers.DataCollatorForTokenClassification(self.tokenizer, **settings)(list(examples))
            )
        return dict(self.tokenizer.pad(list(examples), return_tensors="pt", **settings))

    @cached_property
    def model_path(self) -> str:
        """The folder or Hub name that the model and its tokenizer are loaded from."""
        name = self.config.model.name
        if self.earlier is not None:
            if not self.earlier.model.is_dir():
                refuse("model.name", f"found no {self.earlier.model.name}/ in {name}", "name another model")
            name = self.earlier.base if self.earlier.has_adapters else str(self.earlier.model)
            self.model_notes["start"] = f"{self.earlier.model.name} model of {self.earlier.folder}"
            if self.earlier.has_adapters:
                self.model_notes["start"] = f"adapters of {self.earlier.folder} on {name}, trained further"
        return resolve_model(name, weights=not self.without_weights)

    @cached_property
    def processor_path(self) -> str:
        """The folder or Hub name that the tokenizer or processor is loaded from."""
        has_adapters = self.earlier is not None and self.earlier.has_adapters
        return str(self.earlier.model) if has_adapters and self.earlier else self.model_path

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        with self.loading_errors("tokenizer"):
            settings = {**self.source_options(), **self.tokenizer_settings}
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.processor_path, **settings)
        # Without tokenizer files, transformers makes a tokenizer of special tokens only.
        if tokenizer.vocab_size <= len(tokenizer.all_special_tokens):
            raise InputError(
                f"model.name: {self.config.model.name} has no tokenizer; save it beside the model"
            )
        if tokenizer.pad_token is None:
            self._choose_pad_token(tokenizer)
        self._note_settings(tokenizer)
        self.own_padding_side = tokenizer.padding_side
        if tokenizer.is_fast:
            backend = tokenizer.backend_tokenizer
            self._own_tokenizing = backend.truncation, backend.padding
        if self.padding_side not in (None, self.own_padding_side):
            tokenizer.padding_side = self.padding_side
            note = f"{self.padding_side}, so that the first token of a text is at position 0"
            saved = self.padding_side if self.saves_padding_side else self.own_padding_side
            note += f"; the tokenizer's is {self.own_padding_side}, and it is saved with {saved}"
            self.model_notes["padding side"] = note
        return tokenizer

    def _note_settings(self, tokenizer: Any) -> None:
        """Note each setting of the recipe that changes the tokenizer, and save no other."""
        from transformers.models.auto.tokenization_auto import get_tokenizer_config  # slow to import

        saved = get_tokenizer_config(self.processor_path, **self.source_options())
        for name, value in self.tokenizer_settings.items():
            was = saved.get(name, "no value")
            if was == value:
                continue
            if tokenizer.is_fast and not _has_word_starts(tokenizer):
                tokenizer.init_kwargs.pop(name, None)
            else:
                self.model_notes[name] = f"{value}; {was} in the saved tokenizer"

    def _choose_pad_token(self, tokenizer: Any) -> None:
        """Set the padding token of a tokenizer without one.

        It is the token of the model's config if that is a special token, not a word. Else it is the
        end-of-text token.
        """
        own = getattr(self.own_config, "pad_token_id", None)
        known = getattr(tokenizer.added_tokens_decoder.get(own), "special", False)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(own) if known else tokenizer.eos_token
        if tokenizer.pad_token is None:
            found = (
                f"the tokenizer of {self.config.model.name} has neither a padding nor an end-of-text token"
            )
            refuse("model.name", found, "set its pad_token, and save it again")
        source = "the padding token of the model's config" if known else "the end-of-text token"
        note = f"{tokenizer.pad_token}, {source}; the tokenizer had none, and it is saved with this one"
        self.model_notes["padding token"] = note

    def tokens_of_batches(self) -> list[str]:
        """Return the tokens that batches have and examples may not have: the padding token."""
        return [self.tokenizer.pad_token]

    @cached_property
    def own_config(self) -> Any:
        """The config of `model.name`, or of loaded adapters, as it was saved."""
        with self.loading_errors("config"):
            return (
                self._saved_config
                or self._earlier_config()
                or transformers.AutoConfig.from_pretrained(self.model_path, **self.source_options())
            )

    def _earlier_config(self, **changes: Any) -> Any:
        """Return the config beside the adapters that training starts from, with changes; None without."""
        if self.earlier is None or not self.earlier.has_adapters:
            return None
        file = self.earlier.model / MODEL_CONFIG
        return transformers.AutoConfig.from_pretrained(file, **self._trust(), **changes)

    @property
    def own_labels(self) -> list[str] | None:
        """The label names in the saved config of the model, by id; None if it has no labels of its own."""
        if self.from_scratch:
            return None
        return labels_of_config(self.own_config, self.model_class.__name__.removeprefix("AutoModel"))

    def note_labels(self, labels: Labels) -> None:
        """Note for the plan where the labels come from, and a change of the problem that the model solves.

        The head of a model is new if the labels are.
        """
        self.has_new_labels = labels.are_new
        if labels.are_new and self.earlier is not None and self.earlier.has_adapters:
            run = self.earlier.folder
            found = f"the data have other labels than {run}, whose head is saved with its adapters"
            refuse("model.name", found, f"gradacc merge {run}, and start from {run}/merged")
        if labels.note is not None:
            self.model_notes["labels"] = labels.note
        was, now = getattr(self.own_config, "problem_type", None), self.model_overrides().get("problem_type")
        if was not in (None, now) and now is not None:
            self.model_notes["problem"] = f"{now} instead of {was} in the model's config"

    def model_config(self) -> Any:
        """Return the model's config, with the task's settings and `model.dropout`."""
        if self._saved_config is not None:
            return self._saved_config
        with self.loading_errors("config"):
            config = self._earlier_config(**self.model_overrides())
        config = config or self.base_config()
        dropout, saved = self.config.model.dropout, getattr(config, "dtype", None)
        if saved not in (None, self.dtype) and not self.from_scratch:
            was, now = (str(dtype).removeprefix("torch.") for dtype in (saved, self.dtype))
            self.model_notes["number format"] = f"{now}, as model.dtype sets; {was} in the model's config"
        if dropout is not None and (changed := set_dropout(config, dropout)):
            was = ", ".join(f"{name} was {value}" for name, value in changed.items())
            self.model_notes["dropout"] = f"{dropout}, as model.dropout sets; {was}"
        if self.config.budget.attention is not None:
            config._attn_implementation = self.config.budget.attention
        return config

    def base_config(self) -> Any:
        """Return the config of `model.name`, with the task's settings."""
        with self.loading_errors("config"):
            return transformers.AutoConfig.from_pretrained(
                self.model_path, **self.source_options(), **self.model_overrides()
            )

    def empty_model(self) -> Any:
        """Return the model without weights, to count and name parameters."""
        if self.config.model.lora.rank:  # the trained parameters depend on the saved weights
            return self._with_router_loss(self.load_pretrained(device_map="meta"))
        with self.loading_errors("config"), torch.device("meta"):
            return self._with_router_loss(self.model_class.from_config(self.model_config(), **self._trust()))

    def model(self) -> Any:
        """Return the model to fine-tune. A recipe that makes another one sets `new_parameters`."""
        return self._with_router_loss(self._loaded())

    def _with_router_loss(self, model: Any) -> Any:
        """Apply `model.router_loss` to a model, and return it."""
        setting = self.config.model.router_loss if self.has_router_loss else "none"
        if note := set_router_loss(model, setting):
            self.model_notes["router loss"] = note
        return model

    def _loaded(self) -> Any:
        whole = self._saved_config is not None or self.without_weights
        if not self.config.model.load_in_4bit or whole:
            return self.load_pretrained()
        check_four_bit(self.config.model)
        self.load_pretrained(device_map="meta")  # finds the new parameters, which must not be in 4 bits
        return self.load_pretrained(**four_bit(self.config.budget.precision, self.new_parameters or ()))

    def load(self, folder: Path | str) -> Any:
        """Load a model from a run's folder: a whole one, or adapters on the base model of the run."""
        if not (Path(folder) / "adapter_config.json").exists():
            with self.loading_errors("weights", folder):
                return self.model_class.from_pretrained(folder, **self._trust())
        check_peft()
        with self.loading_errors("config", folder):
            saved = transformers.AutoConfig.from_pretrained(Path(folder) / MODEL_CONFIG, **self._trust())
        self._saved_config = saved
        model = self.model()
        with self.loading_errors("adapters", folder):
            pretrained(model).load_adapter(str(folder))
        return model

    def load_earlier_adapters(self, model: Any) -> None:
        """Load the adapters that training starts from into a model with adapters, if there are any."""
        if self.earlier is None or not self.earlier.has_adapters or self.without_weights:
            return
        with self.loading_errors("adapters", self.earlier.model):
            load_adapter_weights(model, self.earlier.model)
        if self.model_notes.get("head", "").startswith("new"):
            self.model_notes["head"] = f"kept: saved with the adapters of {self.earlier.folder}"

    def check_model(self) -> None:
        """Raise InputError if the weights do not fit the config. Only names and sizes are read."""
        self.load_pretrained(device_map="meta")

    @property
    def from_scratch(self) -> bool:
        """Whether training starts from random weights, because the model has no others."""
        return self.config.model.name in FROM_SCRATCH

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the weights: `model.dtype`."""
        return getattr(torch, self.config.model.dtype)

    def load_pretrained(self, **options: Any) -> Any:
        """Load the model with its weights; set `new_parameters`.

        Args:
            options: Options of transformers' `from_pretrained`.

        Raises:
            InputError: If the weights do not fit the config.
        """
        options |= {"config": self.model_config(), "dtype": self.dtype, "ignore_mismatched_sizes": True}
        if self.without_weights or self.from_scratch:
            model = self.model_class.from_config(options["config"], dtype=self.dtype, **self._trust())
            if self.without_weights and not self.from_scratch:
                self.new_parameters = _of_the_task(model)
            return model
        with self.loading_errors("weights"):
            model, info = self.model_class.from_pretrained(
                self.model_path, output_loading_info=True, **options, **self.source_options()
            )  # fmt: skip
        name, prefix = self.config.model.name, f"{model.base_model_prefix}."
        for tensor, found, expected in info["mismatched_keys"]:
            if tensor.startswith(prefix):  # a head may have another size, for other labels
                sizes = f"{tensor} is {list(found)}, and {list(expected)} in config.json"
                raise InputError(
                    f"model.name: the weights of {name} do not fit: {sizes}; {cure_of_misfit(name)}"
                )
        unknown = [tensor.removeprefix(prefix) for tensor in info["unexpected_keys"]]
        for tensor in info["missing_keys"]:  # transformers initialises these at random
            if near := get_close_matches(tensor.removeprefix(prefix), unknown, 1, cutoff=0.9):
                raise InputError(
                    f"model.name: the weights of {name} are damaged: {near[0]!r} for {tensor}; "
                    "copy or save them again"
                )
        mismatched = {tensor for tensor, _, _ in info["mismatched_keys"]}
        self.new_parameters = {*info["missing_keys"], *mismatched} & dict(model.named_parameters()).keys()
        why = [f"{list(found)} is saved, {list(now)} needed" for _, found, now in info["mismatched_keys"]]
        if self.has_new_labels and (same := self._head_of_other_labels(options["config"])):
            renew(model, same)
            self.new_parameters |= same
            why.append(
                "the saved ones are for other labels; to keep them, give the label names or ids of the model"
            )
        self.note_head(model, why[0] if why else "not among the saved weights")
        return model

    def _head_of_other_labels(self, config: Any) -> set[str]:
        """Return the parameters that were saved for other labels, although their sizes fit the config."""

        def make(config: Any) -> torch.nn.Module:
            return self.model_class.from_config(config, **self._trust())

        return parameters_of_labels(make, config) - (self.new_parameters or set())

    def note_head(self, model: Any, why: str) -> None:
        """Note for the plan whether the head of a loaded model is new or kept, and why it is new."""
        if new := sorted(self.new_parameters or ()):
            more = f", … ({len(new)} parameters)" if len(new) > 4 else ""
            self.model_notes["head"] = f"new: {', '.join(new[:4])}{more}; {why}"
        elif getattr(model, "base_model", model) is not model:
            self.model_notes["head"] = "kept: all weights are the saved ones"

    @contextmanager
    def loading_errors(self, what: str, folder: Path | str | None = None) -> Iterator[None]:
        """Turn any error about the files of `model.name`, or of a run's folder, into an InputError.

        Args:
            what: The object that is loaded, for the message: "image processor".
            folder: The folder of a run, if the object is loaded from there.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # such a pickle raises an error
            try:
                yield
            except InputError:
                raise
            except Exception as error:
                given = f"model.name: the {what} of {self.config.model.name}"
                of = given if folder is None else f"{folder}: its {what}"
                raise InputError(f"{of} {_why(error)}") from error

    def _trust(self) -> dict[str, Any]:
        return {"trust_remote_code": self.config.model.trust_remote_code}

    def source_options(self) -> dict[str, Any]:
        """Return the options with which `from_pretrained` loads the files of `model.name`."""
        return {"revision": self.config.model.revision or "main", **self._trust()}

    # The names in recipes of version 0.1.0:
    _loading = loading_errors
    _source = source_options


def _first(rows: Dataset) -> Dataset:
    return rows.select(range(min(ROWS_READ, len(rows))))


def _has_word_starts(tokenizer: Any) -> bool:
    """Whether a fast tokenizer writes the space before a word into the tokens."""
    parts = tokenizer.backend_tokenizer.pre_tokenizer, tokenizer.backend_tokenizer.normalizer
    state = b"".join(part.__getstate__() for part in parts if part is not None)
    return any(name in state for name in (b"add_prefix_space", b"prepend_scheme", b'"Prepend"'))


def _why(error: Exception) -> str:
    """Return why a model's files cannot be loaded, and what to do. Code in these files was not executed."""
    text = one_line(error)
    if isinstance(error, UnpicklingError):
        wanted = re.search(r"GLOBAL (\S+)", text)
        what = f"refers to {wanted[1]}" if wanted else "holds more than tensors"
        return f"cannot be loaded: a pickle that {what}, which was not executed; use a model in *.safetensors"
    if "trust_remote_code" in text:
        return (
            "cannot be loaded without the Python code in it, which was not executed; if you trust the "
            "author: --model.trust_remote_code true (gradacc predict RUN --trust_remote_code)"
        )
    if "version of PEFT" in text and (mismatch := installed_mismatch()):
        return f"cannot be loaded: {mismatch}"
    return f"cannot be loaded: {text[:300]}; correct it, or name another model"


def _of_the_task(model: Any) -> set[str]:
    """Return the parameters that saved weights of the body usually lack, such as a classifier's."""
    head = model.get_output_embeddings()
    known = {*model.base_model.parameters(), *(head.parameters() if head is not None else ())}
    return {name for name, parameter in model.named_parameters() if parameter not in known}
