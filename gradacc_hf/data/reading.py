"""The record of what was read: the files with their rows, and what was changed or left out.

The plan of a run prints its lines, `summary.json` has them, and the report shows them.
"""

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from gradacc_hf.errors import listed, refuse

SPLITS = ("training", "validation")
SHOWN = 20  # lines of one name in a plan
LOST = {
    "lost_tokens": "tokens",
    "lost_labels": "of them with a label",
    "lost_turns": "whole assistant turns",
}
"""Columns with the number of things that truncation removed from a row, and the name of these things."""


@dataclass(frozen=True)
class Source:
    """The splits of a file, a folder or a data set, and the files of each split with their rows."""

    name: str
    splits: dict[str, Dataset]
    files: dict[str, list["FileRows"]] = field(default_factory=dict)

    def files_of(self, split: str) -> list["FileRows"]:
        """Return the files of a split with their rows, or the split itself if they are not known."""
        return self.files.get(split) or [FileRows(f"{self.name}, split {split}", len(self.splits[split]))]


@dataclass(frozen=True)
class FileRows:
    """A file or a split of a data set that was read, its number of rows, their use, and the file's form."""

    name: str
    rows: int
    use: str = ""
    form: str = ""

    def __str__(self) -> str:
        found = f" ({self.form})" if self.form else ""
        return f"{self.name}: {counted(self.rows, 'row')}{', ' * bool(self.use)}{self.use}{found}"


@dataclass(frozen=True)
class Truncation:
    """The rows that a setting truncated, and the things that they lost.

    setting: the setting, with its value.
    rows: the truncated rows of each split.
    of_rows: all rows of each split.
    lost: the number of lost things by name, such as "tokens".
    """

    setting: str
    rows: dict[str, int]
    of_rows: dict[str, int]
    lost: dict[str, int]

    def __str__(self) -> str:
        where = " and ".join(counted(n, f"{split} row") for split, n in self.rows.items() if n)
        what = ", ".join(f"{number:,} {what}" for what, number in self.lost.items() if number)
        return f"{where} lost {what}, by {self.setting}"


@dataclass
class Reading:
    """The record of what a recipe read.

    files: the files, in the order in which they were read.
    notes: lines about rows and columns that were changed or left out, by the name of the line.
    columns: the columns of all files.
    used: the columns that the recipe uses; None if it does not state them.
    truncated: the truncated rows.
    merged: lines about columns that differ from file to file, or from row to row.
    refused: columns that are left out, with the setting, the reason and the cure.
    kept_together: the column whose equal values kept rows together when rows were held out; None without one.
    weight_column: the column of the weights of rows; None without one.
    of_sources: the columns of each source of a mixture.
    """

    files: list[FileRows] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    used: list[str] | None = None
    truncated: list[Truncation] = field(default_factory=list)
    merged: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    kept_together: str | None = None
    weight_column: str | None = None
    of_sources: dict[str, list[str]] = field(default_factory=dict)

    def begin(self, other: "Reading") -> None:
        """Become a copy of another record."""
        vars(self).update(copy.deepcopy(vars(other)))

    def use_split(self, source: Source, split: str, use: str) -> None:
        """Add the files of a split that is used for training or validation."""
        self.files += [replace(file, use=use) for file in source.files_of(split)]

    def leave_splits(self, source: Source, used: Collection[str]) -> None:
        """Note the files of the splits that are not used."""
        for split in (name for name in source.splits if name not in used):
            for file in source.files_of(split):
                self.note("not used", str(file))

    def note(self, name: str, text: str) -> None:
        """Add a line, unless it is there already."""
        if text not in (lines := self.notes.setdefault(name, [])):
            lines.append(text)

    def note_not_read(self, files: Iterable[tuple[Path, str]]) -> None:
        """Note files with the reason why they are not read: one line for each suffix and reason."""
        alike: dict[tuple[str, str], list[Path]] = {}
        for path, why in files:
            alike.setdefault((path.suffix.lower(), why), []).append(path)
        for (suffix, why), paths in alike.items():
            kind = f"{suffix} files" if suffix else "files without suffix"
            found = f"{len(paths):,} {kind}, such as {paths[0]}" if len(paths) > 1 else paths[0]
            self.note("not read", f"{found}: {why}")

    def use(self, columns: Iterable[str]) -> None:
        """Record the columns that are used. Note the others, and where used columns differ.

        A column inside another, such as translation.de, uses both. Raise InputError for a refused column.
        """
        used = {name.partition(".")[0] for name in columns} | {*columns, self.weight_column}
        used |= {name for name in self.columns if name == self.kept_together}
        for name in used & self.refused.keys():
            refuse(*self.refused[name])
        self.used = [name for name in self.columns if name in used]
        for source, names in (self.of_sources or {"": self.columns}).items():
            if unused := [name for name in names if name not in used]:
                line = f"{counted(len(unused), 'column')} that nothing uses: {listed(unused)}"
                self.note("ignored", f"{source}: {line}" if source else line)
        for line in (line for name, lines in self.merged.items() if name in used for line in lines):
            self.note("merged", line)

    def make_column(self, column: str, parts: Sequence[str]) -> None:
        """Record that a column was made of `parts`, which are the columns in the file."""
        for names in (self.columns, *self.of_sources.values()):
            if column in names:
                place = names.index(column)
                names[place : place + 1] = parts

    def note_parts(self, rows: Sequence[Dataset], parts: Sequence[Dataset], what: str) -> None:
        """Note the splits whose rows became several examples: "chunks"."""
        for split, of_rows, of_parts in zip(SPLITS, rows, parts, strict=True):
            if len(of_parts) > len(of_rows):
                self.note("split", f"{counted(len(of_rows), f'{split} row')} into {len(of_parts):,} {what}")

    def lines(self) -> list[tuple[str, str]]:
        """Return (name, text) of the lines of a plan, the files first. Of many lines, the first are shown."""
        found = {"read": [*map(str, self.files)], **self.notes}
        lines = [(name, text) for name, texts in found.items() for text in texts[:SHOWN]]
        more = {name: len(texts) - SHOWN for name, texts in found.items() if len(texts) > SHOWN}
        return lines + [(name, f"{number:,} more, in summary.json") for name, number in more.items()]

    def summary(self) -> dict[str, Any]:
        """Return the files with their rows, all notes, and the lines of the plan, for `summary.json`."""
        lines = [list(line) for line in self.lines()]
        return {"files": [asdict(file) for file in self.files], "notes": self.notes, "lines": lines}


def counted(number: int, noun: str) -> str:
    """Return "1 row" or "12 rows"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def tokens_lost(
    tokenizer: Any,
    texts: Sequence[Sequence[Any]] | Mapping[str, Sequence[Any]],
    found: Any,
    max_length: int,
    **settings: Any,
) -> list[int]:
    """Return the number of tokens that truncation removed from each row.

    The rows of a slow tokenizer, and pairs of texts, are tokenised again if they are at the limit.

    Args:
        tokenizer: The tokenizer.
        texts: One column of texts, or two for pairs; or columns by the tokenizer's name of the argument.
        found: The rows as the tokenizer returns them, after truncation.
        max_length: The most tokens of a row.
        settings: Further arguments of the tokenizer.
    """
    lost = [0] * len(ids := found["input_ids"])
    full = [row for row, tokens in enumerate(ids) if len(tokens) >= max_length]
    if found.encodings and len(texts) == 1:
        for row in full:  # further parts of the row, each with special tokens
            lost[row] = sum(part.special_tokens_mask.count(0) for part in found.encodings[row].overflowing)
    elif full:
        named = texts if isinstance(texts, Mapping) else dict(zip(("text", "text_pair"), texts, strict=False))
        settings |= {name: [column[row] for row in full] for name, column in named.items()}
        again = tokenizer(verbose=False, **settings)
        for row, tokens in zip(full, again["input_ids"], strict=True):
            lost[row] = len(tokens) - len(ids[row])
    return lost


def find_truncation(splits: Sequence[Dataset], columns: Mapping[str, str], setting: str) -> Truncation | None:
    """Return the rows that were truncated, or None if there are none.

    Args:
        splits: Training and validation rows.
        columns: Columns with the number of things that each row lost, and the name of these things: "tokens".
            The first is above 0 in every truncated row.
        setting: The setting that truncates, with its value.
    """
    lost = {name: [np.asarray(split[name][:], np.int64) for split in splits] for name in columns}
    rows = [int((of_split > 0).sum()) for of_split in lost[next(iter(columns))]]
    if not any(rows):
        return None
    return Truncation(
        setting,
        rows=dict(zip(SPLITS, rows, strict=True)),
        of_rows=dict(zip(SPLITS, map(len, splits), strict=True)),
        lost={what: sum(int(one.sum()) for one in lost[name]) for name, what in columns.items()},
    )
