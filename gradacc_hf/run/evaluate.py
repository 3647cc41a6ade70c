"""Evaluate the model of a saved run on labelled data, for `gradacc evaluate`.

The recipe of the run reads the data, maps labels as in training, and computes the metrics and the baseline.
`metrics/intervals.py` computes the intervals of the metrics.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from gradacc_hf.config.schema import with_settings
from gradacc_hf.data.reading import counted
from gradacc_hf.errors import listed, refuse
from gradacc_hf.hub.model_card import refresh_cards
from gradacc_hf.metrics.intervals import RESAMPLES, Interval, intervals, mean_interval
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.recipe.loading import on_this_machine
from gradacc_hf.run.decoded import label_names
from gradacc_hf.run.fingerprint import duplicates_note
from gradacc_hf.run.predict import load_model
from gradacc_hf.run.setup import check_inputs, load_data, make_accelerator, make_validation_windows
from gradacc_hf.training.run_log import finite, versions
from gradacc_hf.utils.files import write_new
from gradacc_hf.utils.sample_size import small_set_note

FOLDER = "evaluations"
ALL_ROWS = 10**9
"""Rows of a stream's validation data to read, which is all of them."""
SAME_LOSS = 1e-3
"""Relative difference up to which the losses of examples add up to the loss of the evaluation."""
SAME_RECORDED = 1e-3
"""Relative difference from the metric that the run recorded, above which a note states both."""


@dataclass(frozen=True)
class ScoredMetric:
    """A metric with the bounds of its 95 % interval, and the metric of the recipe's baseline, if known."""

    value: float
    low: float | None = None
    high: float | None = None
    baseline: float | None = None


@dataclass(frozen=True)
class RunEvaluation:
    """The evaluation of a model of a run.

    model: "best" or "last".
    window: the window after which the model was saved; None if the run has not ended.
    data: what was evaluated: "the run's validation data", or files or a Hub name, with the split.
    examples: the number of examples.
    metrics: by name.
    headline: the metric that the run ranks evaluations by.
    baseline_is: the baseline in words.
    notes: lines about the data and the intervals.
    details, samples: tables and answers for the report.
    """

    model: str
    window: int | None
    data: str
    examples: int
    metrics: dict[str, ScoredMetric]
    headline: str
    baseline_is: str
    notes: list[str] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    resamples: int = RESAMPLES
    precision: str = "fp32"
    versions: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> str:
        """Return the evaluation as JSON text."""
        return json.dumps(finite(asdict(self)), indent=2, ensure_ascii=False)


def evaluate_run(
    recipe: Recipe,
    run: Path,
    which: str = "best",
    data: str | None = None,
    split: str | None = None,
    resamples: int = RESAMPLES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> RunEvaluation:
    """Evaluate a saved model on labelled data.

    Args:
        recipe: the recipe of the run, as `open_run` returns it.
        run: the folder of the run.
        which: "best" or "last".
        data: files or a Hub name; None for the validation data of the run.
        split: the split of `data`, or else of the run's training data.
        resamples: resamples of the bootstrap.
        on_progress: called with the resamples that are done, and all of them.

    Raises:
        InputError: for data that the recipe cannot use, such as an unknown label.
    """
    recipe = on_this_machine(on_data(recipe, data, split))
    accelerator = make_accelerator(recipe.config)
    model = load_model(recipe, run, which)
    recipe, training, validation = load_data(recipe)
    _check_labels(recipe, model)
    check_inputs(recipe, model, training, validation)
    recipe.read_run_files(run)
    windows = make_validation_windows(recipe, validation, accelerator)
    windows.example_losses = np.zeros((len(validation), 2))
    model = accelerator.prepare_model(model, evaluation_mode=True)
    scores = recipe.validate(model, windows, accelerator)
    bounds = find_intervals(recipe, scores, windows.example_losses, resamples, on_progress)
    baseline = recipe.baseline(training, validation) or {}
    metrics = {
        name: ScoredMetric(value, *bounds.get(name, (None, None)), baseline.get(name))
        for name, value in scores.items()
    }
    recorded = _recorded(run, which)
    if data is None and split is None:
        notes = _other_than_recorded(recorded, scores)
    else:
        notes = _notes_of_data(recipe, training, validation)
    headline = recipe.config.train.best_metric
    if headline in metrics and (small := _small_set(headline, metrics[headline], len(validation))):
        notes.append(small)
    missing = [name for name in metrics if name not in bounds]
    if missing:
        why = "not computed row by row" if len(validation) > 1 else "one example has none"
        notes.append(f"no interval of {', '.join(missing)}: {why}")
    return RunEvaluation(
        model=which,
        window=recorded.get("window"),
        data=_described(recipe, data, split),
        examples=len(validation),
        metrics=metrics,
        headline=headline,
        baseline_is=recipe.baseline_is,
        notes=notes,
        details=recipe.details,
        samples=recipe.samples,
        resamples=resamples,
        precision=recipe.config.budget.precision,
        versions=versions(),
    )


def _small_set(name: str, metric: ScoredMetric, examples: int) -> str | None:
    width = None if metric.low is None or metric.high is None else metric.high - metric.low
    return small_set_note(name, metric.value, examples, metric.baseline, width)


def on_data(recipe: Recipe, data: str | None, split: str | None) -> Recipe:
    """Return the recipe with other validation data. The training data stay: they decide labels and baseline.

    A mixture has the new data as the validation data of every source.
    """
    changes: dict[str, Any] = {"output.tracker": "none", "budget.num_workers": 0, "model.teacher": None}
    if data is None and split is None:
        return recipe.with_config(with_settings(recipe.config, changes))
    given = {"data.validation": data, "data.validation_split": split}
    changes |= given if data is not None else {"data.validation": split, "data.validation_split": None}
    if recipe.data.streaming:
        changes["data.validation_rows"] = ALL_ROWS
    if recipe.data.mixture:
        sources = [{key: one[key] for key in one if key != "validation"} for one in recipe.data.mixture]
        changes["data.train"] = sources
    return recipe.with_config(with_settings(recipe.config, changes))


def _check_labels(recipe: Recipe, model: Any) -> None:
    """Raise InputError if the training data have other labels than the model."""
    labels, of_model = label_names(recipe), getattr(model.config, "id2label", {})
    own = [of_model[number] for number in sorted(of_model)]
    if labels not in (None, own):
        found = f"found the labels {listed(labels or ())}, and the model has {listed(own)}"
        refuse("data.train", found, "set the training data back to the data of the run")


def find_intervals(
    recipe: Recipe,
    scores: Mapping[str, float],
    example_losses: np.ndarray,
    resamples: int = RESAMPLES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Interval]:
    """Return the intervals of the metrics whose rows are known.

    Args:
        recipe: the recipe after its `validate`.
        scores: what `validate` returned.
        example_losses: for each example, the sum of the losses and the number of items.
        resamples: resamples of the bootstrap.
        on_progress: called with the resamples that are done, and all of them.
    """
    found: dict[str, Interval] = {}
    steps, total = count(1), 2 * resamples

    def after_resample() -> None:
        on_progress(next(steps), total)

    loss, items = example_losses.sum(0)
    if items and math.isclose(loss / items, scores.get("loss", math.nan), rel_tol=SAME_LOSS, abs_tol=1e-6):
        interval = mean_interval(example_losses, resamples, after_resample)
        found |= {} if interval is None else {"loss": interval}
    if "loss" in found and math.isclose(scores.get("perplexity", 0), math.exp(min(scores["loss"], 700))):
        low, high = (math.exp(min(bound, 700)) for bound in found["loss"])
        found["perplexity"] = low, high
    rows = recipe.scored
    if rows is not None and len(rows) and _is_by_row(rows.score, len(rows), scores):
        found |= intervals(rows.score, len(rows), resamples, after_resample)
    on_progress(total, total)
    return {name: bounds for name, bounds in found.items() if name in scores}


def _is_by_row(score: Callable[[np.ndarray], Mapping], number: int, scores: Mapping[str, float]) -> bool:
    """Whether rows can be scored in another order, with the same result. A user's recipe may not allow it."""
    try:
        found = score(np.arange(number)[::-1])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return False
    return all(math.isclose(value, scores.get(name, math.nan), abs_tol=1e-6) for name, value in found.items())


def _notes_of_data(recipe: Recipe, training: Any, validation: Any) -> list[str]:
    """Return lines about rows that were left out, and examples that are also training examples."""
    notes = []
    if recipe.skipped_rows:
        left_out = counted(len(recipe.skipped_rows), "row")
        notes.append(f"{left_out} of data.train and the data left out, the first: {recipe.skipped_rows[0]}")
    if recipe.opened is None and (text := duplicates_note(training, validation)):
        notes.append(text.replace("validation example", "example"))
    return notes


def _recorded(run: Path, which: str) -> dict[str, Any]:
    """Return the metrics that an ended run recorded for a model, and the model's window; else nothing."""
    file = run / "summary.json"
    if not file.is_file():
        return {}
    return json.loads(file.read_text(encoding="utf-8")).get({"best": "best", "last": "eval"}[which]) or {}


def _other_than_recorded(recorded: Mapping[str, Any], scores: Mapping[str, float]) -> list[str]:
    """Return a line if a metric differs from the metric that the run recorded for the same model."""
    for name, value in scores.items():
        before = recorded.get(name, value)
        if before is not None and not math.isclose(value, before, rel_tol=SAME_RECORDED, abs_tol=1e-6):
            found = f"{name} is {value:.4f}, and the run recorded {before:.4f}"
            return [f"{found}: the data, the precision or the device differ"]
    return []


def _described(recipe: Recipe, data: str | None, split: str | None) -> str:
    if data is None and split is None:
        return "the run's validation data"
    given = data or f"{recipe.data.train}"
    return given if split is None else f"{given}, split {split}"


def write_evaluation(run: Path, evaluation: RunEvaluation, name: str) -> list[Path]:
    """Write an evaluation into the folder of its run, and its cards and report again. Return the files.

    Args:
        run: the folder of the run.
        evaluation: the evaluation.
        name: the name of the data, which the file gets with a number.
    """
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    paths = (folder / f"{name}-{number}.json" for number in count(1))
    written = [write_new(paths, evaluation.as_json() + "\n")]
    if not (run / "summary.json").is_file():  # the run has not ended
        return written
    written += refresh_cards(run)
    if (run / "report.html").is_file():
        from gradacc_hf.report import write_report  # late: it loads matplotlib

        written.append(write_report([run]))
    return written


def name_of(data: str | None, split: str | None) -> str:
    """Return a name for the file of an evaluation: the data without folders and suffixes, and the split."""
    given = "validation" if data is None else Path(data.split(",")[0]).name.partition(".")[0]
    name = "-".join(filter(None, [given if data or not split else "", split]))
    return "".join(sign if sign.isalnum() or sign in "-_" else "_" for sign in name).strip("_") or "data"
