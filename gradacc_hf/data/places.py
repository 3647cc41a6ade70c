"""The place of a row in the file that it comes from: "train.jsonl line 17".

`loading.py` records the files in the rows' `info`, which the functions of `datasets` pass on. Lines are
counted only for a message.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

from datasets import Dataset

from gradacc_hf.data.files import JSONS, TABLES, Form, open_text, suffix_of
from gradacc_hf.data.tables import records
from gradacc_hf.data.tagged_text import first_lines

_KEY, _PLACES = "gradacc", "gradacc places"


def record_files(rows: Dataset, files: Sequence[tuple[Path, int, Form]]) -> None:
    """Record the files of all rows, in their order, with the number of rows and the form of each."""
    found = [[str(path), number, asdict(form)] for path, number, form in files]  # `save_to_disk` writes it
    rows.info.download_checksums = {_KEY: found}


def join_files(rows: Dataset, parts: Sequence[tuple[str, Dataset]]) -> None:
    """Record the files of rows that consist of other rows, each with a name for rows of unknown files."""
    found = []
    for name, part in parts:
        unknown = [[name, len(part), asdict(Form())]]
        files = (part.info.download_checksums or {}).get(_KEY, unknown)
        found += files if sum(number for _, number, _ in files) == len(part) else unknown
    rows.info.download_checksums = {_KEY: found}


def record_places(rows: Dataset, names: Sequence[str]) -> None:
    """Record the place of each row, of rows that are a part of a file."""
    rows.info.download_checksums = {_PLACES: [*names]}


def folders(rows: Dataset) -> list[Path | None]:
    """Return the folder of the file of each row, in the order of the files; None where it is not known."""
    files = (rows.info.download_checksums or {}).get(_KEY, [])
    found: list[Path | None] = [Path(path).parent for path, number, _ in files for _ in range(number)]
    return found if len(found) == len(rows) else [None] * len(rows)


def other_sheets(rows: Dataset) -> str | None:
    """Return the sheets of an Excel file that were not read; None without any."""
    files = (rows.info.download_checksums or {}).get(_KEY, [])
    return next((form["other_sheets"] for _, _, form in files if form.get("other_sheets")), None)


def places(rows: Dataset, numbers: Iterable[Any], split: str = "training") -> list[str]:
    """Return the place of each row, by its number from 0.

    It is the file and the line, or else the row of the file, or else "training row 3".
    """
    recorded = rows.info.download_checksums or {}
    if _PLACES in recorded:
        return [recorded[_PLACES][int(number)] for number in numbers]
    files = recorded.get(_KEY, [])
    ends = [*accumulate(number for _, number, _ in files)]
    lines: dict[int, list[int] | None] = {}
    found = []
    for number in map(int, numbers):
        index = bisect_right(ends, number)
        if index == len(files):
            found.append(f"{split} row {number + 1:,}".lstrip())
            continue
        path, count, form = files[index]
        if index not in lines:
            lines[index] = _lines(Path(path), count, Form(**form))
        row, of_file = number - (ends[index] - count), lines[index]
        found.append(f"{path} row {row + 1:,}" if of_file is None else f"{path} line {of_file[row]:,}")
    return found


def _lines(path: Path, rows: int, form: Form) -> list[int] | None:
    """Return the line of each row, from 1. None if the file has no lines, or others than were read."""
    suffix, lines = suffix_of(path), []
    try:
        if suffix == ".xlsx":
            return [*range(2, rows + 2)]  # as Excel numbers the rows: the first is the header
        if form.layout:
            lines = first_lines(path, form)
        elif suffix in TABLES and form.separator:
            with open_text(path, form.encoding, newline="") as file:
                lines = [line for line, _ in records(file, form)][1:]
        elif suffix in JSONS and not form.rows_key:
            with open_text(path, form.encoding) as file:
                lines = [number for number, line in enumerate(file, start=1) if line.strip()]
    except (OSError, UnicodeError):
        return None
    return lines if len(lines) == rows else None
