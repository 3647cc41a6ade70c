"""`gradacc bench stream`: the memory of reading a large stream, and the time that training waits for it.

The first part writes a file of JSON lines and reads it once, as a recipe with `data.streaming` does. Rows are
tokenised, shuffled, split into windows and collated. The second part trains on data read whole, and on a
stream that is tokenised in worker processes, or in the training process.
"""

import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import psutil
from accelerate import Accelerator
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gradacc_hf.accumulation.loader import WindowLoader
from gradacc_hf.bench.progress import Progress
from gradacc_hf.errors import refuse
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.run.setup import load_data, make_model, make_windows, stream_windows
from gradacc_hf.training.loop import iter_windows
from gradacc_hf.training.optimizer import make_optimizer
from gradacc_hf.training.run_log import measured_with
from gradacc_hf.utils.paths import bundle_root

CONFIG = "configs/text_classification_offline.yaml"
WORDS = ("read", "write", "list", "item", "return", "value", "file", "line", "number", "text", "table", "row")
MARKS = 20  # measurements of memory over the stream
WINDOW = 512  # examples of a window that is only read
TRAINED_WINDOW = 32
TRAINED_BLOCK = 256  # examples of a shuffle block; 24 windows read four blocks
LONGEST = {"read": 12, "trained": 120}  # words of a text
ROOM = 1.5  # times the size of the file that must be free
BYTES_PER_ROW = 80


@dataclass(frozen=True)
class Mark:
    """The memory after a number of rows: resident bytes of the training process and of the workers."""

    rows: int
    seconds: float
    own_bytes: int
    worker_bytes: int


@dataclass(frozen=True)
class Waiting:
    """The share of the training time in which the loop waits for a window; medians over turns."""

    data: str
    share: float
    examples_per_second: float


@dataclass(frozen=True)
class StreamResult:
    """Memory over a stream, and waiting times.

    `growth` is the most resident bytes of all processes after a tenth of the rows, less those at a tenth.
    """

    rows: int
    file_bytes: int
    workers: int
    marks: tuple[Mark, ...]
    growth: int
    rows_per_second: float
    waiting: tuple[Waiting, ...]
    measured_with: dict[str, str]


def measure_stream(
    rows: int, workers: int = 1, windows: int = 24, repeats: int = 3, progress: Progress = iter
) -> StreamResult:
    """Read a stream of `rows` rows, and train `windows` windows on each kind of data, `repeats` times."""
    if (free := shutil.disk_usage(".").free) < ROOM * BYTES_PER_ROW * rows:
        needed = f"found {rows:,}, about {BYTES_PER_ROW * rows / 1e9:.1f} GB in this folder"
        refuse("--rows", needed, f"{free / 1e9:.1f} GB are free: choose fewer, or another folder")
    with written(rows, LONGEST["read"]) as file:
        file_bytes = file.stat().st_size
        marks = tuple(read_all(file, rows, workers))
    block = ["--data.buffer_size", str(TRAINED_BLOCK)]
    kinds = {
        "read whole": ["--budget.num_workers", "0"],
        f"stream, {workers} worker{'s' * (workers > 1)}": [*streamed(workers), *block],
        "stream, no worker": [*streamed(0), *block],
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    with written(4 * windows * TRAINED_WINDOW, LONGEST["trained"]) as file:
        for name in progress([name for _ in range(repeats) for name in kinds]):
            found[name].append(train_on(file, windows, kinds[name]))
    later = [sum_of(mark) for mark in marks if mark.rows >= rows / 10]
    return StreamResult(
        rows=rows,
        file_bytes=file_bytes,
        workers=workers,
        marks=marks,
        growth=max(later) - later[0],
        rows_per_second=rows / marks[-1].seconds,
        waiting=tuple(
            Waiting(name, median(share for share, _ in turns), median(speed for _, speed in turns))
            for name, turns in found.items()
        ),
        measured_with=measured_with("cpu"),
    )


def sum_of(mark: Mark) -> int:
    """Return the resident bytes of all processes."""
    return mark.own_bytes + mark.worker_bytes


@contextmanager
def written(rows: int, longest: int) -> Iterator[Path]:
    """Write labelled texts of up to `longest` words as JSON lines, into a folder that is then removed."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(10_000)]
    with TemporaryDirectory(prefix="stream-", dir=".") as folder:
        path = Path(folder) / "train.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for row in range(rows):
                file.write(f'{{"text": "{texts[row % 10_000]} {row}", "label": "{"ab"[row % 2]}"}}\n')
        yield path


def streamed(workers: int) -> list[str]:
    """Return the settings of a stream."""
    return ["--data.streaming", "true", "--budget.num_workers", str(workers)]


def recipe_on(file: Path, size: int, settings: list[str]) -> Recipe:
    """Return the recipe of the offline config for a file, with windows of `size` examples."""
    columns = ["--data.text_column", "text", "--data.label_column", "label", "--data.labels", "a,b"]
    files = ["--data.train", str(file), "--data.validation", str(file)]
    steps = ["--batch.effective", str(size), "--train.max_windows", str(10**9)]
    return load_recipe(["--config", str(bundle_root() / CONFIG), *files, *columns, *steps, *settings])


def read_all(file: Path, rows: int, workers: int) -> Iterator[Mark]:
    """Read a file once, and yield the memory at equal distances."""
    windows = loader_of(recipe_on(file, WINDOW, streamed(workers)))[1]
    started, examples, distance = time.perf_counter(), 0, max(WINDOW, rows // MARKS)
    for window in windows:
        before, examples = examples, examples + len(window.indices)
        if examples // distance > before // distance or examples == rows:
            own = psutil.Process()
            of_workers = sum(child.memory_info().rss for child in own.children(recursive=True))
            seconds = time.perf_counter() - started
            yield Mark(examples, seconds, own.memory_info().rss, of_workers)


def loader_of(recipe: Recipe) -> tuple[Recipe, WindowLoader]:
    """Return the recipe after its data were read, and the loader of the training windows."""
    recipe, training, validation = load_data(recipe)
    windows, _ = make_windows(recipe, training, validation, Accelerator())
    if recipe.opened is not None:
        windows = stream_windows(recipe, training, windows)
    return recipe, windows


def train_on(file: Path, number: int, settings: list[str]) -> tuple[float, float]:
    """Return the share of waiting, and the examples per second, of windows after the first."""
    recipe, windows = loader_of(recipe_on(file, TRAINED_WINDOW, settings))
    model = make_model(recipe)
    model, optimizer = windows.accelerator.prepare(model, make_optimizer(model, recipe.config.optim))
    shared = {"accelerator": windows.accelerator, "compute_loss": recipe.loss}
    waited, started = 0.0, 0.0
    for record in iter_windows(model, optimizer, windows, max_windows=number + 1, **shared):
        if record.window == 1:
            started = time.perf_counter()
        else:
            waited += windows.seconds_to_collate
    seconds = time.perf_counter() - started
    return waited / seconds, number * TRAINED_WINDOW / seconds


def print_stream(result: StreamResult, console: Console) -> None:
    """Print the memory over the stream, and the waiting times."""
    table = Table("rows", "seconds", "training process, MiB", "workers, MiB", box=SIMPLE)
    for mark in result.marks:
        sizes = (f"{size / 2**20:,.0f}" for size in (mark.own_bytes, mark.worker_bytes))
        table.add_row(f"{mark.rows:,}", f"{mark.seconds:,.0f}", *sizes)
    console.print(table)
    console.print(
        f"{result.rows:,} rows, {result.file_bytes / 1e9:.2f} GB: {result.rows_per_second:,.0f} a second. "
        f"Growth of the memory after a tenth of the rows: at most {result.growth / 2**20:,.0f} MiB."
    )
    table = Table("data", "waiting", "examples per second", box=SIMPLE)
    for row in result.waiting:
        table.add_row(row.data, f"{row.share:.1%}", f"{row.examples_per_second:.1f}")
    console.print(table)
