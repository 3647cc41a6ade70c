"""Text files with a token and its tags on a line, and blank lines between sentences: CoNLL and similar files.

Columns are numbered from 1. CoNLL-U and a header name them. Only a recipe that tags tokens reads such files.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

from datasets import Dataset, Features, List, Value

from gradacc_hf.data.files import FAULT, Form, open_text
from gradacc_hf.errors import listed, refuse

TOKENS = ("tokens", "token", "words", "word", "form", "text")
TAGS = ("tags", "tag", "ner_tags", "ner", "labels", "label", "upos", "pos")
"""Usual names of columns of tokens and of tags, the more likely first."""

_UNIVERSAL = ("ID", "FORM", "LEMMA", "UPOS", "XPOS", "FEATS", "HEAD", "DEPREL", "DEPS", "MISC")  # CoNLL-U
_OF_2003 = ("word", "pos", "chunk", "ner")
_DOCUMENT = "-DOCSTART-"
_COMMENT = re.compile(r"#\s")
_SAMPLE = 1_000  # lines


@dataclass(frozen=True)
class Layout:
    """The columns of a file.

    kind: the name of the format.
    separator: between the columns. None: white space.
    width: the number of columns.
    names: the names of the columns; none if they are not known.
    has_header: whether the first line with columns has their names.
    first: the number of the first line with columns.
    has_comments: whether most sentences begin with a comment, such as "# id 3", of as many fields as columns.
    """

    kind: str
    separator: str | None
    width: int
    names: tuple[str, ...]
    has_header: bool
    first: int
    has_comments: bool = False

    @property
    def is_universal(self) -> bool:
        """Whether some lines are ranges of tokens or empty nodes, which are left out."""
        return self.kind.startswith("CoNLL-U")


def read_tagged(path: Path, key: str, form: Form) -> tuple[Dataset, str]:
    """Return a row for each sentence, and the layout of the file for the plan.

    The columns of the rows have the names that `form.word_columns` states. A sentence with a broken line has
    no tokens, and the reason in the column FAULT.
    """
    assert form.word_columns is not None
    layout = find_layout(path, key, form)
    tokens_at, tags_at = _places(path, layout, form.word_columns)
    rows: dict[str, list] = {name: [] for name in (*form.word_columns, FAULT)}
    for sentence in sentences(path, form, layout):
        fault = next(filter(None, (_fault(*line, layout, tags_at) for line in sentence)), None)
        fields = [] if fault else [found for _, found in sentence]
        tags = [found[tags_at].strip() for found in fields]
        if layout.is_universal:
            tags = ["-100" if tag == "_" else tag for tag in tags]
        for column, values in zip(rows, ([found[tokens_at] for found in fields], tags, fault), strict=True):
            rows[column].append(values)
    texts = List(Value("string"))
    features = Features({**dict.fromkeys(form.word_columns, texts), FAULT: Value("string")})
    shown = [
        f"column {at + 1}" + (f" ({layout.names[at]})" if layout.names else "") for at in (tokens_at, tags_at)
    ]
    more = f" of {layout.width}; data.tags_column names another" if layout.width > 2 else ""
    return Dataset.from_dict(rows, features), f"{layout.kind}: tokens in {shown[0]}, tags in {shown[1]}{more}"


def find_layout(path: Path, key: str, form: Form) -> Layout:
    """Return the layout of a file, from the first lines. Raise InputError without two columns."""
    with open_text(path, form.encoding) as file:
        lines = [(number, line.rstrip("\r\n")) for number, line in enumerate(islice(file, _SAMPLE), start=1)]
    named = [line for _, line in lines if line.startswith("# global.columns")]
    given = [(number, line) for number, line in lines if line.strip() and not line.startswith(_DOCUMENT)]
    data = [(number, line) for number, line in given if not line.startswith("#")] or given
    if not data:
        refuse(key, f"{path}: no rows", "give at least one sentence")
    tabs = sum("\t" in line for _, line in data)
    separator = form.separator or ("\t" if 2 * tabs > len(data) else None)
    fields = [line.split(separator) for _, line in data]
    width = Counter(map(len, fields)).most_common(1)[0][0]
    first, names, header = data[0][0], tuple(field.strip().lower() for field in fields[0]), False
    if width < 2:
        cure = "a line has a token and a tag, with a tab or spaces between them"
        refuse(key, f"{path} line {first:,} has one column", cure)
    numbered = sum(bool(re.fullmatch(r"\d+([-.]\d+)?", found[0])) for found in fields)
    if named:
        kind, names = "CoNLL-U Plus", tuple(named[0].partition("=")[2].split())
    elif width == len(_UNIVERSAL) and numbered == len(fields):
        kind, names = "CoNLL-U", _UNIVERSAL
    elif {*names} & {*TOKENS} and {*names} & {*TAGS} and len(names) == width:
        kind, header = f"{width} columns with a header", True
    elif width == len(_OF_2003):
        kind, names = "CoNLL-2003", _OF_2003
    else:
        kind, names = f"{width} columns", ()
    pairs = pairwise(["", *(line for _, line in lines)])
    begins = [line for before, line in pairs if line.strip() and not before.strip()]
    comments = sum(bool(_COMMENT.match(line)) and len(line.split(separator)) == width for line in begins)
    return Layout(kind, separator, width, names, header, first, 2 * comments > len(begins))


def sentences(path: Path, form: Form, layout: Layout) -> Iterator[list[tuple[int, list[str]]]]:
    """Yield the tokens of each sentence: the number of the line, and the columns."""
    sentence: list[tuple[int, list[str]]] = []
    with open_text(path, form.encoding) as file:
        for number, line in enumerate(file, start=1):
            fields = line.rstrip("\r\n").split(layout.separator)
            if not line.strip() or line.startswith(_DOCUMENT):
                if sentence:
                    yield sentence
                sentence = []
            elif number == layout.first and layout.has_header:
                continue
            elif line.startswith("#") and (layout.is_universal or len(fields) != layout.width):
                continue  # a comment
            elif layout.has_comments and not sentence and _COMMENT.match(line):
                continue
            elif layout.is_universal and re.fullmatch(r"\d+[-.]\d+", fields[0]):
                continue  # a range of tokens, or an empty node
            else:
                sentence.append((number, fields))
    if sentence:
        yield sentence


def first_lines(path: Path, form: Form) -> list[int]:
    """Return the number of the first line of each sentence."""
    return [sentence[0][0] for sentence in sentences(path, form, find_layout(path, "data.train", form))]


def _fault(line: int, fields: Sequence[str], layout: Layout, tags_at: int) -> str | None:
    """Return the problem of a line, or None."""
    if len(fields) != layout.width:
        columns = f"{len(fields)} column{'s' * (len(fields) > 1)}"
        return f"line {line:,} has {columns}, other lines have {layout.width}"
    return None if fields[tags_at].strip() else f"line {line:,} has no tag"


def _places(path: Path, layout: Layout, columns: tuple[str, str]) -> tuple[int, int]:
    """Return the places, from 0, of the columns of tokens and of tags."""
    last = "upos" if layout.is_universal else None
    tokens = _place(path, layout, columns[0], "data.tokens_column", TOKENS, 0)
    tags = _place(path, layout, columns[1], "data.tags_column", (last,) if last else TAGS, layout.width - 1)
    return tokens, tags


def _place(
    path: Path, layout: Layout, given: str, key: str, usual: Iterable[str | None], otherwise: int
) -> int:
    names = [name.lower() for name in layout.names]
    if given.isdigit() and 1 <= int(given) <= layout.width:
        return int(given) - 1
    if given.lower() in names:
        return names.index(given.lower())
    if given != (TOKENS if key == "data.tokens_column" else TAGS)[0]:
        allowed = f"a number from 1 to {layout.width}" + f", or {listed(layout.names)}" * bool(names)
        refuse(key, f"{path} has no column {given!r}", f"allowed: {allowed}")
    if layout.kind == "CoNLL-2003":
        return otherwise
    return next((names.index(name) for name in usual if name in names), otherwise)
