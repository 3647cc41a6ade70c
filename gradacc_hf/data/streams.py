"""Rows of data that may be larger than the memory and the disk: read in order, a few hundred at a time.

`datasets` reads Parquet files and Hub names, and continues at a row group. JSON lines are read here: reading
continues at a byte, errors name the line, and the lines are parsed where they are tokenised.
"""

import codecs
import glob
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import datasets
from datasets import Dataset, Features, IterableDataset

from gradacc_hf.accumulation.streaming import of_its_own
from gradacc_hf.data.files import (
    BLOCK,
    COMPRESSED,
    JSONS,
    UTF8,
    is_data,
    open_bytes,
    require_library,
    require_text,
    suffix_of,
)
from gradacc_hf.data.loading import files_of_splits, is_hidden, named_files
from gradacc_hf.data.mixed import parse_json, rows_as_dataset
from gradacc_hf.data.places import record_places
from gradacc_hf.data.readers import cause_of, quiet
from gradacc_hf.data.reading import Reading
from gradacc_hf.errors import listed, refuse

ROWS = 256  # of a chunk, which one process tokenises at once
BATCH_ROWS = 1_000  # that `datasets` reads of a Parquet file at once
STREAMED = (*JSONS, ".parquet")
ALLOWED = f"JSON lines (also in {listed(COMPRESSED)}), Parquet, or a name on the Hub"
Position = Mapping[str, Any]
"""The place between two rows, as plain data: the number of the source, and a place in the source."""


@dataclass(frozen=True)
class Chunk:
    """Successive rows, not parsed.

    Attributes:
        content: The rows, or lines of JSON.
        source: The file, or the split of a data set.
        numbers: The number of each row in the source, from 1.
        start, stop: Positions before and after the rows.
        encoding: The encoding of lines.
    """

    content: list[Any]
    source: str
    numbers: list[int]
    start: Position
    stop: Position
    encoding: str | None = None

    def rows(self) -> Iterator[tuple[str, Any, str | None]]:
        """Yield the place of each row, and the row or its problem."""
        unit = "row" if self.encoding is None else "line"
        for number, content in zip(self.numbers, self.content, strict=True):
            row, problem = (content, None) if self.encoding is None else _parsed(content, self.encoding)
            yield f"{self.source} {unit} {number:,}", row, problem


def _parsed(line: bytes, encoding: str) -> tuple[dict[str, Any] | None, str | None]:
    """Return the object of a line of JSON, or the problem of the line."""
    try:
        row = parse_json(line.decode(encoding))
    except UnicodeDecodeError as error:
        return None, f"byte {error.start + 1:,} is not {'UTF-8' if encoding == UTF8 else encoding}"
    except ValueError as error:
        return None, f"not JSON: {error}"
    return (row, None) if isinstance(row, dict) else (None, "not an object")


@dataclass(frozen=True)
class JsonLines:
    """A file of JSON lines, plain or compressed."""

    path: Path
    encoding: str
    features: None = None

    @property
    def name(self) -> str:
        """The file."""
        return str(self.path)

    def chunks(self, place: Position, size: int) -> Iterator[Chunk]:
        """Yield chunks of `size` lines from a place on: the bytes and the lines before it."""
        offset, line = place.get("offset", 0), place.get("line", 0)
        with open_bytes(self.path) as opened:
            file: Any = opened if hasattr(opened, "peek") else io.BufferedReader(opened)  # type: ignore[type-var]
            can_seek = self.path.suffix.lower() not in COMPRESSED
            _skip(file, offset, can_seek)
            while lines := _next_lines(file, size, f"{self.path}: after line {line:,}"):
                start = {"offset": offset, "line": line}
                numbers = [number for number, text in enumerate(lines, line + 1) if text.strip()]
                offset, line = offset + sum(map(len, lines)), line + len(lines)
                content, stop = [text for text in lines if text.strip()], {"offset": offset, "line": line}
                yield Chunk(content, self.name, numbers, start, stop, self.encoding)


def _next_lines(file: IO[bytes], number: int, place: str) -> list[bytes]:
    """Return the next lines of a file. Raise InputError for a damaged file."""
    try:
        return list(islice(file, number))
    except Exception as error:  # libraries for compressed files have errors of several kinds
        refuse(place, f"it cannot be read: {cause_of(error)}", "give a file that you can read")


def _skip(file: IO[bytes], number: int, can_seek: bool) -> None:
    """Go to a byte of a file. A compressed file is read up to there."""
    if can_seek:
        file.seek(number)
    while not can_seek and number:
        number -= len(file.read(min(number, BLOCK))) or number


@dataclass(frozen=True)
class Streamed:
    """A Parquet file or a split on the Hub, which `datasets` reads.

    A place is a state of the data set, and the number of rows before. `datasets` reads a shard from its
    beginning, so that row groups of Parquet files become shards. It begins two of them earlier at most.
    """

    name: str
    dataset: IterableDataset

    @property
    def features(self) -> Features | None:
        """The types of the columns, if the file states them."""
        return self.dataset.features

    def chunks(self, place: Position, size: int) -> Iterator[Chunk]:
        """Yield chunks of `size` rows from a place on."""
        dataset, _ = of_its_own(self.dataset)
        if place:
            dataset.load_state_dict(place["state"])
        rows, stop = iter(dataset), place
        while content := list(islice(rows, size)):
            start, before = stop, stop.get("row", 0)
            stop = {"state": dataset.state_dict(), "row": before + len(content)}
            yield Chunk(content, self.name, [*range(before + 1, stop["row"] + 1)], start, stop)


@dataclass(frozen=True)
class RowStream:
    """The rows of one or several sources, in order."""

    sources: Sequence[JsonLines | Streamed]

    def chunks(self, start: Position, size: int | None = None) -> Iterator[Chunk]:
        """Yield the rows from a position on, in chunks of at most `size`, by default `ROWS`."""
        first, place = start.get("source", 0), {k: v for k, v in start.items() if k != "source"}
        for number in range(first, len(self.sources)):
            for chunk in self.sources[number].chunks(place, size or ROWS):
                ends = {name: {"source": number, **getattr(chunk, name)} for name in ("start", "stop")}
                if chunk.content:
                    yield replace(chunk, **ends)
            place = {}

    def take(self, number: int, start: Position) -> tuple[list[Chunk], Position]:
        """Return the next `number` rows, or all if there are fewer, and the position after them."""
        found: list[Chunk] = []
        while left := number - sum(len(chunk.content) for chunk in found):
            chunk = next(self.chunks(start, left), None)
            if chunk is None:
                break
            found.append(chunk)
            start = chunk.stop
        return found, start

    def as_dataset(self, rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> Dataset:
        """Return rows of this stream as a data set. Messages name the places."""
        features = self.sources[0].features
        dataset = (
            rows_as_dataset(rows) if features is None else Dataset.from_list([*map(dict, rows)], features)
        )
        record_places(dataset, places)
        return dataset

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file, by name without folder. Sources on the Hub have none."""
        paths = [Path(source.name) for source in self.sources if Path(source.name).is_file()]
        return {path.name: path.stat().st_size for path in paths}


def open_streams(
    given: str, key: str, reading: Reading, config_name: str | None = None, encoding: str | None = None
) -> dict[str, RowStream]:
    """Return the splits of files, of a folder or of a Hub name. No row is read.

    Args:
        given: A file, a folder, a pattern, names with commas between them, or a Hub name.
        key: The setting that messages name.
        reading: Receives a line about files that are not read.
        config_name: The configuration of a data set on the Hub.
        encoding: Of JSON lines; None is UTF-8.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        there = [p for p in sorted(path.rglob("*")) if p.is_file() and not is_hidden(p.relative_to(path))]
        files = [p for p in there if suffix_of(p) in STREAMED]
        reading.note_not_read([(p, f"data.streaming reads {ALLOWED}") for p in there if p not in files])
        if not files:
            refuse(key, f"no file in {given!r} can be streamed", f"data.streaming reads {ALLOWED}")
        of_splits = files_of_splits(path, files)
    elif given.startswith("embedded:"):
        refuse(
            key,
            f"{given!r} cannot be streamed",
            f"data.streaming reads {ALLOWED}; or set data.streaming to false",
        )
    elif _names_files(path, given):
        of_splits = {
            "train": [p for name in given.split(",") for p in named_files(name.strip(), key, reading)]
        }
    else:
        return _on_hub(given, key, config_name)
    open_one = partial(_open, key=key, encoding=encoding or UTF8)
    return {split: RowStream([open_one(p) for p in found]) for split, found in of_splits.items()}


def _names_files(path: Path, given: str) -> bool:
    """Whether a text names files, and no data set on the Hub."""
    is_pattern = "," in given or glob.has_magic(given)
    return is_pattern or path.is_file() or is_data(path) or given.count("/") > 1 or given[:1] in "./~"


def _open(path: Path, key: str, encoding: str) -> JsonLines | Streamed:
    if suffix_of(path) not in STREAMED:
        refuse(
            key,
            f"{path} cannot be streamed",
            f"data.streaming reads {ALLOWED}; or set data.streaming to false",
        )
    require_library(path, key)
    if suffix_of(path) == ".parquet":  # the default of batch_size refuses an empty file
        options = {"data_files": {"train": str(path)}, "batch_size": BATCH_ROWS}
        return Streamed(str(path), _load(key, "parquet", **options)["train"])
    if "\n".encode(encoding) != b"\n" and encoding != UTF8:
        refuse("data.encoding", f"found {encoding}, whose lines cannot be found by a byte", "use UTF-8")
    with open_bytes(path) as file:
        [line, *_] = _next_lines(file, 1, str(path)) or [b""]
    start = line[:4].removeprefix(codecs.BOM_UTF8).lstrip()
    if line:
        require_text(path, key)
    if start[:1] == b"[":
        refuse(key, f"{path} is one list, which is read whole", "write one object a line (JSON lines)")
    return JsonLines(path, encoding)


def _on_hub(given: str, key: str, config_name: str | None) -> dict[str, RowStream]:
    loaded = _load(key, given, *([config_name] if config_name else []))
    return {
        str(name): RowStream([Streamed(f"{given}, split {name},", split)]) for name, split in loaded.items()
    }


def _load(key: str, *names: str, **options: Any) -> dict[Any, IterableDataset]:
    load: Any = datasets.load_dataset
    try:
        with quiet():
            loaded = load(*names, streaming=True, **options)
    except Exception as error:
        refuse(key, f"{names[0]!r} cannot be read as a stream: {cause_of(error)}", f"give {ALLOWED}")
    return {name: split.reshard() if hasattr(split, "reshard") else split for name, split in loaded.items()}
