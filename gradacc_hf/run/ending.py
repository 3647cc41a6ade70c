"""The lines that a run prints at its end: how good the model is, where it is saved, and what to do next."""

import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Image

from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.accumulation.noise_scale import MEASUREMENTS_NEEDED, in_words
from gradacc_hf.data.reading import counted
from gradacc_hf.errors import listed
from gradacc_hf.hub.model_card import read_evaluations
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.run.teacher import teacher_line
from gradacc_hf.utils.redaction import redact
from gradacc_hf.utils.sample_size import small_set_note

LENGTH, LONGEST = 60, 400  # characters of an example: the preferred number, and the most
COLUMN = 22  # characters of a line's name, as in the plan that a run prints at its start
METRICS_IN_WORDS = {
    "accuracy": "share of correct predictions",
    "bleu": "overlap with the reference text, from 0 to 100",
    "exact_match": "share of predictions that are exactly right",
    "f1": "harmonic mean of precision and recall",
    "f1_macro": "harmonic mean of precision and recall, averaged over labels",
    "f1_micro": "harmonic mean of precision and recall, over all labels together",
    "kl": "KL from the reference per answer token, 0 for an unchanged model",
    "loss": "mean loss, lower is better",
    "margin": "mean reward of better answers, minus the mean reward of worse ones",
    "matthews_correlation": "correlation with the true labels, 1 is perfect and 0 is chance",
    "mrr_at_10": "mean of 1 / rank of the right result among the first 10, 1 is perfect",
    "mse": "mean squared error, lower is better",
    "pearsonr": "linear correlation with the true values, 1 is perfect",
    "perplexity": "exp(mean loss of a token), lower is better and 1 is perfect",
    "precision": "share of predicted spans that are right",
    "recall": "share of true spans that are found",
    "recall_at_1": "share of queries whose first result is right",
    "recall_at_10": "share of queries with the right result among the first 10",
    "rougeL": "longest common subsequence with the reference text, from 0 to 1",
    "spearmanr": "rank correlation with the true values, 1 is perfect",
}
OF_LANGUAGE_MODELS = ("loss", "perplexity")
"""Metrics whose comparison is always the model before training, if it was evaluated."""


def training_lines(summary: Mapping[str, Any], windows: WindowLoader) -> list[str]:
    """Return what was trained: windows, time, padding; skipped windows; advice on the batch size."""
    trained = (
        f"{counted(summary['windows'], 'window')}, {counted(summary['examples'], 'example')} in "
        f"{summary['seconds']:,.0f} s; "
        f"{summary['padding']:.0%} of the tokens were padding"
    )
    lines = [_row("trained", trained)]
    if "rows" in (read := summary.get("skipped_rows", {})):  # of a stream
        lines.append(
            _row(
                "stream",
                f"{counted(read['rows'], 'row')} read in an epoch, {read['count']:,} of them skipped and "
                f"{read['truncated']:,} truncated",
            )
        )
    if skipped := summary["skipped_windows"]:
        lines.append(
            _row("skipped", f"{counted(skipped, 'window')} took no step: loss or gradient not finite")
        )
    noise = windows.noise
    if noise.measured >= MEASUREMENTS_NEEDED:
        size = windows.plan.size_asked(*windows.next_position)
        lines.append(_row("batch size", in_words(*noise.interval, size, noise.measured)))
    return lines


def result_lines(
    recipe: Recipe, summary: Mapping[str, Any], num_validation: int, folder: Path, report: Path | None
) -> list[str]:
    """Return lines: how good the model is and against what, also a teacher; where it is saved; what is next.

    Args:
        recipe: the recipe of the run.
        summary: the figures of the run.
        num_validation: validation examples.
        folder: the folder of the run.
        report: the report of the run; None where none was written.
    """
    saved = f"{folder}: model in best/{_after(summary)}, last weights in last/"
    saved += f"; report: {report}" if report is not None else "; no report"
    train = recipe.config.train
    of_teacher = teacher_line(summary, train.best_metric, train.best_direction)
    earlier = _earlier_evaluations(summary, folder)
    return [
        _row("result", _result(recipe, summary, num_validation)),
        *([_row("teacher", of_teacher)] if of_teacher else []),
        *([_row("evaluations", earlier)] if earlier else []),
        _row("saved", saved),
        _row("next", _next(recipe, folder)),
    ]


def _earlier_evaluations(summary: Mapping[str, Any], folder: Path) -> str | None:
    """Return a line if the evaluations of a run that continued are of earlier models, or None."""
    now = {name: (summary[key] or {}).get("window") for name, key in (("best", "best"), ("last", "eval"))}
    of_now = [(one["data"], one.get("window") == now.get(one["model"])) for one in read_evaluations(folder)]
    earlier = {data for data, is_now in of_now if not is_now} - {data for data, is_now in of_now if is_now}
    if not earlier:
        return None
    return (
        f"of an earlier model on {listed(sorted(earlier))}; of this model: gradacc evaluate {folder} --data …"
    )


def _row(name: str, text: str) -> str:
    return f"{name:<{COLUMN}}{text}"


def _after(summary: Mapping[str, Any]) -> str:
    best = summary["best"]
    return f" (after window {best['window']:,})" if best and best != summary["eval"] else ""


def _result(recipe: Recipe, summary: Mapping[str, Any], num_validation: int) -> str:
    """Return the metric of the best evaluation in words, against the baseline or the untrained model.

    Of the two, the better one is the comparison.
    """
    train = recipe.config.train
    best, baseline = summary["best"], summary["baseline"] or {}
    if not best:
        return "no evaluation"
    metric, sign = train.best_metric, -1 if train.best_direction == "min" else 1
    value, others, against = best[metric], None, ""
    first = next((row for row in summary["evaluations"] if not row["window"]), None)
    before = None if first is None else first.get(metric)
    is_stronger = before is not None and (metric not in baseline or sign * before > sign * baseline[metric])
    if first is not None and (is_stronger or metric not in baseline or metric in OF_LANGUAGE_MODELS):
        others, against = before, "the model before training"
    elif metric in baseline:
        others, against = baseline[metric], recipe.baseline_is
    name = "validation loss" if metric == "loss" else metric.replace("_", " ")
    described = f" ({METRICS_IN_WORDS[metric]})" if metric in METRICS_IN_WORDS else ""
    text = f"{name} {_number(value)}{described} on {counted(num_validation, 'validation example')}"
    if not against:
        return f"{text}; to compare with the model before training: --train.eval_on_start true"
    is_better = value is not None and (others is None or sign * value > sign * others)
    text = f"{text}; {'better' if is_better else 'no better'} than {against}: {_number(others)}"
    note = None if value is None else small_set_note(metric, value, num_validation, others)
    return f"{text}. {note[0].upper()}{note[1:]}" if note else text


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:.2g}" if 0 < abs(value) < 1e-3 else f"{value:,.4f}"


def _next(recipe: Recipe, folder: Path) -> str:
    """Return the command that applies the model to an input, or that verifies the run."""
    program = "gradacc" if shutil.which("gradacc") else f"{shlex.quote(sys.executable)} -m gradacc_hf"
    if launcher := os.environ.get("GRADACC_COMMAND"):  # launch.sh, which has gradacc in its own environment
        program = shlex.quote(launcher)
    run = shlex.quote(str(folder))
    if type(recipe).answer is Recipe.answer or recipe.example is None:
        return f"{program} verify --run {run}"
    trust = " --trust_remote_code" if recipe.config.model.trust_remote_code else ""
    example = example_input(recipe)
    if isinstance(example, str):
        return f"{program} predict {run}{trust} {shlex.quote(example)}"
    columns = {key: getattr(recipe.data, f"{key}_column", None) or key for key in example}
    row = {columns[key]: value for key, value in example.items()}
    text = shlex.quote(json.dumps(row, ensure_ascii=False))
    return f"printf '%s' {text} | {program} predict {run}{trust} --input -"  # echo may change backslashes


def example_input(recipe: Any) -> Any:
    """Return an input for the model: a short validation row without secrets, or else `recipe.example`."""
    if (rows := recipe.validation_rows_read) is None:
        return recipe.example
    for column, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(column, Image(decode=False))
    found = (redact(_example(recipe, row)) for row in rows)
    usable = [example for example in found if 0 < _length(example) <= LONGEST]
    return min(usable, key=_order, default=recipe.example)


def _example(recipe: Any, row: Any) -> Any:
    try:
        return recipe.example_of(row)
    except (AttributeError, KeyError, TypeError, ValueError):  # a bad row, which the run skipped
        return None


def _order(example: Any) -> tuple[bool, int]:
    """Return what to sort inputs by: one line first, then the difference to the preferred length."""
    is_one_line = "\\n" not in json.dumps(example)
    return not is_one_line, abs(_length(example) - LENGTH)


def _length(example: Any) -> int:
    """Return the characters of an input: a text, or several. 0 if an input is none that a shell can take."""
    texts = [*example.values()] if isinstance(example, dict) else [example]
    is_usable = all(isinstance(text, str) and text.strip() and text[0] != "-" for text in texts)
    return sum(map(len, texts)) if is_usable else 0
