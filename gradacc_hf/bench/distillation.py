"""`gradacc bench distillation`: a student of two layers, trained with a teacher and without.

The teacher is the text classifier of configs/text_classification_offline.yaml, MiniLM with six layers. The
student has the first two of them. Each run is a separate process, one after another. The students of a seed
see the same windows. Accuracy is of the best evaluation.
"""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gradacc_hf.bench.progress import Progress
from gradacc_hf.embedded import minilm_path
from gradacc_hf.errors import InputError, one_line
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.utils.files import whole_folder
from gradacc_hf.utils.paths import bundle_root

LAYERS = 2


@dataclass(frozen=True)
class DistilledRun:
    """One run.

    Attributes:
        name: "teacher", "alone" or "with a teacher".
        seed: Of the run.
        parameters: Of the model.
        accuracy: On the validation examples.
        examples_per_second: In training.
    """

    name: str
    seed: int
    parameters: int
    accuracy: float
    examples_per_second: float


@dataclass(frozen=True)
class DistillationResult:
    """All runs, the number of validation examples, and the settings of the teacher's part."""

    runs: tuple[DistilledRun, ...]
    validation_examples: int
    temperature: float
    weight: float
    measured_with: dict[str, str]

    def of(self, name: str) -> list[DistilledRun]:
        """Return the runs of this name."""
        return [run for run in self.runs if run.name == name]


def measure_distillation(
    seeds: int,
    epochs: int,
    temperature: float,
    weight: float,
    folder: Path,
    windows: int | None = None,
    progress: Progress = iter,
) -> DistillationResult:
    """Train the teacher, and students with this many seeds and epochs, for at most `windows` windows each.

    The runs are written into a folder. Runs that have ended there with the same settings are not repeated.
    """
    teacher, student = folder / "teacher", folder / "student"
    if not student.is_dir():
        with whole_folder(student) as unfinished:
            few_layers(unfinished)
    teaching = {"model.teacher": teacher, "model.teacher_temperature": temperature}
    teaching["model.teacher_weight"] = weight
    names: dict[str, dict[str, Any]] = {"alone": {}, "with a teacher": teaching}
    plans = [("teacher", 0, {}), *((name, seed, names[name]) for seed in range(seeds) for name in names)]
    runs, examples = [], 0
    for name, seed, settings in progress(plans):
        run = teacher if name == "teacher" else folder / f"{name.split()[0]}-{seed}"
        own = {"model.name": student, "train.epochs": epochs} if name != "teacher" else {}
        limit = {} if windows is None else {"train.max_windows": windows}
        found = _run(run, {**own, **limit, **settings, "train.seed": seed})
        examples = found["card"]["validation_examples"]
        speed = found["examples"] / found["seconds"]
        runs.append(DistilledRun(name, seed, _parameters(run), found["best"]["accuracy"], speed))
    return DistillationResult(tuple(runs), examples, temperature, weight, measured_with("cpu"))


def few_layers(folder: Path) -> None:
    """Write MiniLM with the first `LAYERS` layers into a folder."""
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(minilm_path(), num_hidden_layers=LAYERS).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm_path()).save_pretrained(folder)


def _run(run: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the summary of a run of the offline config."""
    words = [f"--{key}={value}" for key, value in settings.items()]
    root = bundle_root()
    command = [sys.executable, str(root / "recipes/text_classification.py")]
    command += ["--config", str(root / "configs/text_classification_offline.yaml"), "--output.dir", str(run)]
    command += ["--output.tracker", "none", "--train.noise_every", "0", "--resume", "auto", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{run.name}: {one_line(ValueError(done.stderr))[-300:]}")
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def _parameters(run: Path) -> int:
    from safetensors import safe_open

    with safe_open(run / "best" / "model.safetensors", framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def print_distillation(result: DistillationResult, console: Console) -> None:
    """Print a row for each kind of run: means over seeds, with minimum and maximum."""
    [teacher] = result.of("teacher")
    table = Table("model", box=SIMPLE)
    for column in ("parameters", "accuracy", "min to max", "of the teacher's", "examples/s in training"):
        table.add_column(column, justify="right")
    for name in ("teacher", "alone", "with a teacher"):
        runs = result.of(name)
        values = [run.accuracy for run in runs]
        table.add_row(
            name if name == "teacher" else f"student {name}",
            f"{runs[0].parameters:,}",
            f"{mean(values):.3f}",
            f"{min(values):.3f} to {max(values):.3f}",
            f"{mean(values) / teacher.accuracy:.1%}",
            f"{mean(run.examples_per_second for run in runs):.0f}",
        )
    console.print(table)
    console.print(
        f"{result.validation_examples} validation examples, {len(result.of('alone'))} seeds of each student; "
        f"temperature {result.temperature:g}, {result.weight:g} of the loss"
    )
    console.print("with a teacher − alone, by seed: " + ", ".join(f"{d:+.3f}" for d in differences(result)))


def differences(result: DistillationResult) -> Sequence[float]:
    """Return the accuracy with a teacher minus the accuracy alone, for each seed."""
    pairs = zip(result.of("with a teacher"), result.of("alone"), strict=True)
    return [taught.accuracy - alone.accuracy for taught, alone in pairs]
