"""Read runs from disk for a report: history.jsonl, summary.json, config.yaml, verify.json.

`read_runs` returns a `RecordedRun` for each folder, without secrets. `contenders` groups the repeats of one
way of training. An interrupted run is read up to its last complete window. The figures of a run come from its
summary or, without a summary, from its rows.
"""

import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from gradacc_hf.errors import one_line, refuse
from gradacc_hf.training.run_log import WindowRecord
from gradacc_hf.utils.redaction import redact
from gradacc_hf.utils.sample_size import small_set_note

NUMBER_KEYS = ("windows", "examples", "items", "tokens", "padded_tokens", "seconds", "peak_memory_bytes")
NUMBER_KEYS += ("training_memory_bytes", "effective_batch_size", "processes")
FIRST_CONTENDERS = ("gradacc", "ours")  # labels of `gradacc compare`; the latter by version 0.1
OBJECT_KEYS = (
    "eval",
    "best",
    "baseline",
    "teacher",
    "accumulation_steps",
    "planned_accumulation_steps",
    "versions",
)
OBJECT_KEYS += ("card",)


@dataclass(frozen=True)
class HistoryRow(WindowRecord):
    """A row of history.jsonl. A missing or null value is NaN."""

    gradient_error: float | None = None  # against the whole window; None if not measured


@dataclass(frozen=True)
class ScoredData:
    """An evaluation by `gradacc evaluate`, of a file in evaluations/.

    name: the name of the file.
    window: the window after which the model was saved; None if the run had not ended.
    metrics: name → value, low, high, baseline; NaN where one is not known.
    """

    name: str
    model: str
    window: int | None
    data: str
    examples: int
    metrics: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...] = ()
    headline: str = "loss"
    details: tuple[dict[str, Any], ...] = ()
    samples: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class RecordedRun:
    """One run, as read from its folder."""

    folder: Path
    name: str  # of the folder, relative to the folder that holds all runs of the report
    contender: str  # the way of training; by default the name
    rows: tuple[HistoryRow, ...]
    summary: Mapping[str, Any]  # summary.json; empty if the run is unfinished
    config: Mapping[str, Any]  # config.yaml; empty if there is none
    notes: tuple[str, ...]  # problems with the files
    verification: str | None = None  # the verdict of verify.json
    scored: tuple[ScoredData, ...] = ()  # by gradacc evaluate

    @property
    def seed(self) -> Any:
        """The seed in the summary, else in the config."""
        return self.summary.get("seed", self.setting("train", "seed"))

    def setting(self, section: str, key: str) -> Any:
        """Return a value of the config; None if it is missing."""
        values = self.config.get(section)
        return values.get(key) if isinstance(values, dict) else None

    def total(self, name: str) -> float:
        """Return a sum over the windows: of `examples`, `tokens`, `padded_tokens` or `seconds`."""
        return (
            number(self.summary[name]) if name in self.summary else sum(getattr(r, name) for r in self.rows)
        )

    @property
    def windows(self) -> int:
        """The number of trained windows."""
        return int(self.summary.get("windows") or len(self.rows))

    @property
    def examples_per_second(self) -> float:
        """Examples per second; NaN if no time is known."""
        return _ratio(self.total("examples"), self.total("seconds"))

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second, without padding; NaN if no time is known."""
        return _ratio(self.total("tokens"), self.total("seconds"))

    @property
    def padding(self) -> float:
        """The share of padding in all tokens."""
        return 1 - _ratio(self.total("tokens"), self.total("padded_tokens"))

    @property
    def loss(self) -> float:
        """The loss of the last window."""
        return self.rows[-1].loss if self.rows else math.nan

    @property
    def gradient_error(self) -> float | None:
        """The largest error of all windows: NaN if one is not finite, None if none was measured."""
        errors = [row.gradient_error for row in self.rows if row.gradient_error is not None]
        return max(errors, key=lambda error: math.inf if math.isnan(error) else error) if errors else None

    @property
    def accumulation_steps(self) -> tuple[float, float, float]:
        """Minimum, mean and maximum; NaN if no window was trained."""
        if steps := self.summary.get("accumulation_steps"):
            least, mean, most = (number(steps.get(key)) for key in ("min", "mean", "max"))
            return least, mean, most
        steps = [row.accumulation_steps for row in self.rows] or [math.nan]
        return min(steps), sum(steps) / len(steps), max(steps)

    @property
    def window_size(self) -> float:
        """Examples of the larger of the last two windows, as the last one may be partial."""
        return max((row.examples for row in self.rows[-2:]), default=math.nan)

    @property
    def noise_measurements(self) -> int:
        """The number of measurements of the gradient noise scale."""
        measured = self.rows[-1].noise_measured if self.rows else 0
        return int(measured) if math.isfinite(measured) else 0

    @property
    def noise_scale(self) -> float:
        """The final gradient noise scale, in examples; infinite if too large, NaN if not measured."""
        if not self.noise_measurements:
            return math.nan
        scale = self.rows[-1].noise_scale
        return scale if math.isfinite(scale) else math.inf

    @property
    def noise_interval(self) -> tuple[float, float]:
        """The bounds of the final noise scale; NaN if they are not recorded, as by version 0.1."""
        if not self.noise_measurements:
            return math.nan, math.nan
        return self.rows[-1].noise_low, self.rows[-1].noise_high

    @property
    def update_ratio(self) -> float:
        """Median ‖step‖ / ‖weights‖."""
        known = [row.update_ratio for row in self.rows if math.isfinite(row.update_ratio)]
        return statistics.median(known) if known else math.nan

    @property
    def clipped(self) -> float:
        """The share of windows whose gradient was clipped; NaN if unknown."""
        most, norms = self.setting("optim", "max_grad_norm"), [row.grad_norm for row in self.rows]
        if not isinstance(most, int | float) or not any(map(math.isfinite, norms)):
            return math.nan
        return sum(0 < most < norm for norm in norms) / len(norms)

    @property
    def skipped(self) -> float:
        """The share of windows without a step."""
        return _ratio(sum(row.skipped == 1 for row in self.rows), len(self.rows))

    @property
    def evaluations(self) -> list[dict[str, float]]:
        """All evaluations in order: the metrics, and "window", the number of windows before."""
        found = self.summary.get("evaluations") or []
        return [{k: number(v) for k, v in one.items()} for one in found if isinstance(one, dict)]

    @property
    def before_training(self) -> dict[str, float]:
        """The metrics of the model before training; empty if it was not evaluated."""
        first = next((row for row in self.evaluations if row.get("window") == 0), {})
        return {name: value for name, value in first.items() if name != "window"}

    @property
    def small_set(self) -> str | None:
        """A line if the validation set is too small for the final metrics, or None."""
        metric, examples = self.setting("train", "best_metric") or "loss", self.num_validation
        value = self.metrics("eval").get(metric, math.nan)
        baseline = self.metrics("baseline").get(metric, self.before_training.get(metric))
        return small_set_note(metric, value, examples, baseline) if examples else None

    @property
    def num_validation(self) -> int:
        """The number of validation examples; 0 if it is unknown."""
        found = (self.summary.get("card") or {}).get("validation_examples")
        return found if isinstance(found, int) else 0

    @property
    def samples(self) -> list[dict[str, str]]:
        """Outputs of the model for a few rows: name to text, the same names in each. Often empty."""
        return self.summary.get("samples") or []

    @property
    def details(self) -> list[dict[str, Any]]:
        """Tables about the final evaluation, as `tasks/details.py` makes them. Often empty."""
        return self.summary.get("details") or []

    @property
    def teacher(self) -> dict[str, Any]:
        """The teacher of a distillation: name, temperature, weight and metrics. Empty without one."""
        return self.summary.get("teacher") or {}

    @property
    def reading(self) -> str:
        """The files that were read, and what was changed or left out, in lines. Empty for version 0.1."""
        lines = [f"{name}: {text}" for name, text in (self.summary.get("reading") or {}).get("lines", ())]
        left_out = self.summary.get("skipped_rows") or {}
        if count := left_out.get("count"):
            lines.append(f"left out: {count:,} row{'s' * (count > 1)}, the first: {left_out['first'][0]}")
        return "\n".join(lines)

    def metrics(self, which: str) -> dict[str, float]:
        """Return the metrics of the final ("eval") or best evaluation ("best"), or of the "baseline"."""
        found = self.summary.get(which) or {}
        return {
            name: number(value)
            for name, value in found.items()
            if name != "window" and not isinstance(value, str | list | dict)
        }


@dataclass(frozen=True)
class RunGroup:
    """The repeats of one way of training, in the order of their seeds."""

    label: str
    runs: tuple[RecordedRun, ...]

    @property
    def is_padded(self) -> bool:
        """Whether a repeat computed padding."""
        return any(run.padding != 0 for run in self.runs)

    def first_window(self) -> list[list[int]] | None:
        """Return the first window that a repeat records: tokens of each example, by micro-batch."""
        found = [run.summary["first_window"] for run in self.runs if run.summary.get("first_window")]
        return found[0] if found else None


def read_runs(folders: Sequence[Path]) -> list[RecordedRun]:
    """Return the runs in these folders or below.

    Raises InputError for a folder without a run, and for a broken file.
    """
    found: dict[Path, None] = {}  # in order, each once
    for folder in map(Path, folders):
        if not folder.is_dir():
            refuse(str(folder), "found no such folder", "give the folder of a run, or one that holds runs")
        below = list(_run_folders(folder))
        if not below:
            refuse(
                str(folder),
                "found no history.jsonl in it or below it",
                "give the folder of a run, or one that holds runs",
            )
        found |= dict.fromkeys(below)
    resolved = [folder.resolve() for folder in found]
    above = resolved[0].parent if len(found) == 1 else Path(os.path.commonpath(resolved))
    names = [str(path.relative_to(above)).replace(os.sep, "/") for path in resolved]
    names = [above.name if name == "." else name for name in names]  # a run that holds others
    unique = dict(zip(resolved, zip(found, names, strict=True), strict=True))
    return [_read_run(folder, name) for folder, name in unique.values()]


def contenders(runs: Sequence[RecordedRun]) -> list[RunGroup]:
    """Return the ways of training in the order of the runs, gradacc first."""
    order = dict.fromkeys(run.contender for run in runs)
    labels = sorted(order, key=lambda label: label not in FIRST_CONTENDERS)
    return [
        RunGroup(label, tuple(sorted((run for run in runs if run.contender == label), key=_by_seed)))
        for label in labels
    ]


def number(value: Any) -> float:
    """Return a number of a JSON file; null is NaN. Raises ValueError or OverflowError for anything else."""
    if value is None:
        return math.nan
    if not isinstance(value, int | float):
        raise ValueError(f"found {value!r}")
    return float(value)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _by_seed(run: RecordedRun) -> tuple[bool, Any]:
    known = isinstance(run.seed, int | float)
    return not known, run.seed if known else 0  # sorting is stable


def _run_folders(folder: Path) -> Iterator[Path]:
    """Yield the folders with a history.jsonl or a run's summary.json, in natural order (seed_2, seed_10)."""
    files = [path for name in ("history.jsonl", "summary.json") for path in folder.rglob(name)]
    candidates = {
        path.parent for path in files if not any(p.startswith(".") for p in path.relative_to(folder).parts)
    }
    for candidate in sorted(candidates, key=_natural):
        if (candidate / "history.jsonl").exists() or "windows" in _read_summary(candidate / "summary.json"):
            yield candidate


def _natural(path: Path) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def _read_run(folder: Path, name: str) -> RecordedRun:
    rows, notes = _read_rows(folder / "history.jsonl")
    summary = _read_summary(folder / "summary.json")
    if not summary:
        notes.append(
            f"unfinished: {_windows(len(rows))} and no summary.json; the run was killed or has not ended"
        )
    elif summary.get("windows") not in (None, len(rows)):
        notes.append(f"summary.json counts {summary['windows']} windows, history.jsonl has {len(rows)}")
    if missing := sum(not math.isfinite(row.loss) for row in rows):
        notes.append(f"no finite loss in {missing} of {_windows(len(rows))}")
    return RecordedRun(
        folder=folder,
        name=redact(name),
        contender=str(summary.get("contender") or redact(name)),
        rows=tuple(rows),
        summary=summary,
        config=_read_config(folder / "config.yaml"),
        notes=tuple(notes),
        verification=_read_verdict(folder / "verify.json"),
        scored=_newest(map(_read_scored, sorted((folder / "evaluations").glob("*.json"), key=_natural))),
    )


def _newest(scored: Iterable[ScoredData]) -> tuple[ScoredData, ...]:
    """Return the last evaluation of each model after a window on the same data."""
    return tuple({(one.data, one.model, one.window): one for one in scored}.values())


def _checked(value: Any, is_right: Callable[[Any], bool]) -> tuple[Any, ...]:
    if not is_right(value or []):
        raise ValueError("tables or samples of another form")
    return tuple(value or ())


def _read_scored(path: Path) -> ScoredData:
    """Return an evaluation by `gradacc evaluate`. Raise InputError for any other file."""
    try:
        found = redact(json.loads(_read_text(path)))
        parts = ("value", "low", "high", "baseline")
        return ScoredData(
            name=path.stem,
            model=str(found["model"]),
            window=None if found.get("window") is None else int(found["window"]),
            data=str(found["data"]),
            examples=int(found["examples"]),
            metrics={
                str(name): {part: number(metric[part]) for part in parts}
                for name, metric in found["metrics"].items()
            },
            notes=tuple(map(str, found["notes"])),
            headline=str(found["headline"]),
            details=_checked(found.get("details"), _are_details),
            samples=_checked(found.get("samples"), _are_samples),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        refuse(str(path), f"found no evaluation ({one_line(error)})", "remove it, or evaluate again")


def _read_verdict(path: Path) -> str | None:
    try:
        return str(json.loads(_read_text(path))["verdict"]) if path.exists() else None
    except (ValueError, KeyError, TypeError) as error:
        refuse(str(path), f"found no verdict ({one_line(error)})", "run gradacc verify --run again")


def _windows(count: int) -> str:
    return f"{count:,} window{'s' * (count != 1)}"


def _read_rows(path: Path) -> tuple[list[HistoryRow], list[str]]:
    """The rows of a history, and notes on its problems. Only the last line may be half-written."""
    if not path.exists():
        return [], ["no history.jsonl"]
    lines = [line for line in _read_text(path).split("\n") if line.strip(" \r\0")]
    rows = []
    for position, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"found {line!r}")
        except ValueError:
            if position == len(lines):
                return rows, ["the last line of history.jsonl is half-written and was left out"]
            refuse(
                f"{path}, line {position}",
                "found no JSON object",
                "one is allowed in each line; fix or delete it",
            )
        try:
            by_source = row.pop("source_losses", None) or {}
            if not isinstance(by_source, dict):
                raise ValueError(f"found {by_source!r}")
            values: Any = {field.name: number(row.get(field.name)) for field in fields(WindowRecord)}
            values["source_losses"] = {name: number(loss) for name, loss in by_source.items()}
            if not math.isfinite(values["window"]):
                values["window"] = position
            if "gradient_error" in row:
                values["gradient_error"] = number(row["gradient_error"])
            for bound in ("noise_low", "noise_high"):  # null is infinite; version 0.1 has no such column
                if values["noise_measured"] > 0 and row.get(bound, math.nan) is None:
                    values[bound] = math.inf
            rows.append(HistoryRow(**values))
        except (ValueError, OverflowError) as wrong:
            refuse(
                f"{path}, line {position}", one_line(wrong), "numbers and null are allowed; fix or delete it"
            )
    return rows, []


def _read_summary(path: Path) -> dict[str, Any]:
    """The checked summary, without secrets; empty if there is none."""
    if not path.exists():
        return {}
    try:
        summary = json.loads(_read_text(path))
    except ValueError as error:
        refuse(
            str(path), f"found no JSON ({one_line(error)})", "fix it, or delete it to report the other files"
        )
    if not isinstance(summary, dict):
        refuse(str(path), f"found {type(summary).__name__}", "a JSON object is allowed")
    for key in OBJECT_KEYS:
        if not isinstance(summary.get(key), dict | None):
            refuse(f"{path}, {key}", f"found {summary[key]!r}", "an object or null is allowed")
    numbers = {key: summary.get(key) for key in NUMBER_KEYS} | {
        f"{key}.{name}": value
        for key in ("accumulation_steps", "planned_accumulation_steps")
        for name, value in (summary.get(key) or {}).items()
    }
    for key, value in numbers.items():
        try:
            number(value)
        except (ValueError, OverflowError) as wrong:
            refuse(f"{path}, {key}", one_line(wrong), "a number or null is allowed")
    if not _are_samples(summary.get("samples") or []):
        refuse(f"{path}, samples", "found something else", "a list of objects, name to text, is allowed")
    if not _are_details(summary.get("details") or []):
        refuse(f"{path}, details", "found something else", "what a run writes, or null, is allowed")
    if not _is_window(summary.get("first_window") or []):
        refuse(f"{path}, first_window", "found something else", "[[tokens of each example, …], …] is allowed")
    if not _is_reading(summary.get("reading"), summary.get("skipped_rows")):
        refuse(f"{path}, reading", "found something else", "what a run writes, or null, is allowed")
    if not _is_tuning(summary.get("tuning")):
        refuse(f"{path}, tuning", "found something else", "what a run writes, or null, is allowed")
    return redact(summary)


def _is_tuning(value: Any) -> bool:
    """Whether the value is the result of trying sizes, or None."""
    if value is None:
        return True
    trials = value.get("trials") if isinstance(value, dict) else None
    return isinstance(trials, list) and all(
        isinstance(trial, dict)
        and all(isinstance(trial.get(key), int | float) for key in ("max_tokens", "seconds_per_token"))
        for trial in trials
    )


def _is_reading(reading: Any, skipped: Any) -> bool:
    """Whether the values are pairs of texts, and the number of skipped rows with lines about some."""
    pairs = reading.get("lines") if isinstance(reading, dict) else [] if reading is None else None
    skipped = {"count": 0} if skipped is None else skipped
    if not isinstance(pairs, list) or not isinstance(skipped, dict):
        return False
    first = skipped.get("first") if skipped.get("count") else [""]
    return (
        isinstance(skipped.get("count", 0), int)
        and isinstance(first, list)
        and first != []
        and all(isinstance(pair, list) and [*map(type, pair)] == [str, str] for pair in pairs)
    )


def _is_window(value: Any) -> bool:
    """Whether the value is a list of micro-batches, each a list of the token counts of its examples."""
    return isinstance(value, list) and all(
        isinstance(lengths, list)
        and lengths
        and all(isinstance(length, int | float) and length >= 0 for length in lengths)
        for lengths in value
    )


def _are_details(value: Any) -> bool:
    """Whether the value is a list of tables with a title, columns and rows of texts and numbers."""
    return isinstance(value, list) and all(
        isinstance(one, dict)
        and all(isinstance(one.get(key), str) for key in ("title", "kind", "note"))
        and isinstance(columns := one.get("columns"), list)
        and isinstance(one.get("rows"), list)
        and all(isinstance(row, list) and len(row) == len(columns) for row in one["rows"])
        and all(isinstance(cell, str | int | float | None) for row in (columns, *one["rows"]) for cell in row)
        for one in value
    )


def _are_samples(value: Any) -> bool:
    """Whether the value is a list of objects that map the same names to texts."""
    return isinstance(value, list) and all(
        isinstance(one, dict)
        and one.keys() == value[0].keys()
        and all(isinstance(t, str) for t in one.values())
        for one in value
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = yaml.safe_load(_read_text(path))
    except yaml.YAMLError as error:
        refuse(str(path), f"found no YAML ({one_line(error)})", "fix it, or delete it")
    if not isinstance(config, dict | None):
        refuse(str(path), f"found {type(config).__name__}", "keys and values are allowed")
    return redact(config or {})


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        refuse(str(path), f"cannot be read ({error.strerror})", "give a run that you may read")
