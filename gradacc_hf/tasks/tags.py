"""Rows of tokens with one tag per token: the names of the tags, and the problem of a row.

Tags are strings, whole numbers or ids of a ClassLabel, whose names and order are kept. A token with −100
has no label. The recipe makes the labels of the model from the tags.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, List, Value
from seqeval.metrics.sequence_labeling import get_entities

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.data.columns import (
    class_names,
    file_rows,
    is_list,
    labels_as_text,
    replace_columns,
    require_column,
)
from gradacc_hf.data.files import FAULT
from gradacc_hf.data.places import places
from gradacc_hf.data.reading import SPLITS, counted
from gradacc_hf.data.tagged_text import TAGS, TOKENS
from gradacc_hf.errors import listed, refuse
from gradacc_hf.metrics.sequence_labelling import as_iobes, is_scheme

NO_TAG = str(IGNORED)
SPANS = ("entities", "spans", "label", "labels", "annotations")
"""Usual names of columns of character spans."""
OF_SPANS = "character spans"
"""The beginning of the line about this format."""
STARTS, ENDS = ("start", "start_offset", "start_char", "begin"), ("end", "end_offset", "end_char")
TYPES = ("label", "labels", "entity", "entity_group", "entity_type", "type", "tag", "category")
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|[^\w\s]"
)
SHOWN = 6  # tags of a message


def check_tokens_and_tags(dataset: Dataset, tokens_column: str, tags_column: str) -> None:
    """Raise InputError unless tokens are lists of strings, and tags lists of strings, integers or ids."""
    tokens = _element(dataset, tokens_column, "data.tokens_column")
    if not _is(tokens, "string"):
        refuse("data.tokens_column", f"column {tokens_column!r} has lists of {_kind(tokens)}", "of strings")
    tags = _element(dataset, tags_column, "data.tags_column")
    if not (isinstance(tags, ClassLabel) or _is(tags, "string") or _is(tags, "int")):
        found = f"column {tags_column!r} has lists of {_kind(tags)}"
        refuse("data.tags_column", found, "a tag is a string, a whole number or a class id")


def as_tokens(rows: Dataset, tokens_column: str, tags_column: str) -> tuple[Dataset, str | None]:
    """Return rows of tokens and tags, and the format that they were in; None if the rows stay as they are.

    The format is character spans of a text, or tokens and tags in columns with other usual names.
    """
    names, given = rows.column_names, (tokens_column, tags_column)
    if {*given} <= {*names} and not _has_spans(rows, tags_column):
        return rows, None
    span_column = next(
        (name for name in (tags_column, *SPANS) if name in names and _has_spans(rows, name)), None
    )
    text = next((name for name in (tokens_column, "text", "sentence") if _is_text(rows, name)), None)
    if span_column is not None and text is not None and tags_column in (span_column, TAGS[0]):
        return _from_spans(rows, text, span_column, given), f"{OF_SPANS} in {span_column!r} of {text!r}"
    lists = [
        name for name in names if is_list(rows.features[name]) and isinstance(_first(rows, name), str | int)
    ]
    tokens = [name for name in (TOKENS if tokens_column == TOKENS[0] else ()) if name in lists]
    tags = [name for name in (*TAGS, "pos_tags", "chunk_tags") if name in lists and name not in tokens]
    moved = {tokens_column: tokens[:1] or [tokens_column], tags_column: tags[:1] or [tags_column]}
    if tags_column in names or tags_column != TAGS[0]:
        moved[tags_column] = [tags_column]
    renamed = {old: new for new, (old,) in moved.items() if old != new and old in names and new not in names}
    if not renamed:
        return rows, None
    others = [name for name in tags if name not in moved[tags_column]]
    more = f" (others: {listed(others)}; data.tags_column names one)" if others else ""
    found = f"tokens in {moved[tokens_column][0]!r}, tags in {moved[tags_column][0]!r}{more}"
    return rows.rename_columns(renamed), found


def split_words(text: str) -> list[tuple[int, int]]:
    """Return the places of the words and punctuation marks of a text."""
    return [match.span() for match in _WORD.finditer(text)]


def spans_to_tags(text: Any, spans: Any) -> tuple[list[str], list[str], str | None]:
    """Return the tokens of a text, their tags O, B-TYPE and I-TYPE, and the problem of the row, or None."""
    if not isinstance(text, str) or not text.strip():
        return (
            [],
            [],
            "its text is empty" if text is None or isinstance(text, str) else "its text is not text",
        )
    places, tags = split_words(text), {}
    starts, ends = ({place[side]: number for number, place in enumerate(places)} for side in (0, 1))
    spans = spans or []
    for number, span in enumerate(spans, start=1):
        found = _span(span)
        if found is None:
            allowed = '[start, end, label] or {"start": 0, "end": 3, "label": "PER"}'
            return [], [], f"entity {number} of {len(spans)} is {span!r:.80}; allowed: {allowed}"
        start, end, of_type = found
        if not 0 <= start < end <= len(text):
            return (
                [],
                [],
                f"entity {number} of {len(spans)}, {start} to {end}, is outside its {len(text):,} characters",
            )
        inside = text[start:end]
        start, end = start + len(inside) - len(inside.lstrip()), start + len(inside.rstrip())
        if start not in starts or end not in ends:
            return [], [], f"entity {inside!r} at {start} begins or ends within a word"
        for token in range(starts[start], ends[end] + 1):
            if token in tags:
                return [], [], f"entity {inside!r} at {start} overlaps another"
            tags[token] = f"{'B' if token == starts[start] else 'I'}-{of_type}"
    tokens = [text[start:end] for start, end in places]
    return tokens, [tags.get(token, "O") for token in range(len(tokens))], None


def _from_spans(rows: Dataset, text: str, spans: str, columns: tuple[str, str]) -> Dataset:
    found = [spans_to_tags(*row) for row in zip(rows[text], rows[spans], strict=True)]
    types = sorted({tag[2:] for _, tags, _ in found for tag in tags if tag != "O"})
    names = ["O", *(f"{place}-{of_type}" for of_type in types for place in "BI")]
    ids = {name: number for number, name in enumerate(names)}
    tags = [[ids[tag] for tag in tags] for _, tags, _ in found]
    added: dict[str, tuple[list[Any], Any]] = {
        columns[0]: ([tokens for tokens, *_ in found], List(Value("string"))),
        columns[1]: (tags, List(ClassLabel(names=names))),
        FAULT: ([fault for *_, fault in found], Value("string")),
    }
    return replace_columns(rows, {text, spans}, added)


def _span(span: Any) -> tuple[int, int, str] | None:
    """Return the start, the end and the type of an entity, or None."""
    if isinstance(span, Mapping):
        span = span["value"] if isinstance(span.get("value"), Mapping) else span
        of_type = next((span[name] for name in TYPES if span.get(name)), None)
        start, end = (
            next((span[n] for n in names if span.get(n) is not None), None) for names in (STARTS, ENDS)
        )
        span = [start, end, of_type[0] if isinstance(of_type, list) else of_type]
    if not isinstance(span, Sequence) or isinstance(span, str) or len(span) != 3:
        return None
    start, end, of_type = span
    is_valid = type(start) is int and type(end) is int and isinstance(of_type, str) and of_type
    return (start, end, of_type) if is_valid else None


def _is_text(rows: Dataset, column: str) -> bool:
    return column in rows.column_names and _is(rows.features[column], "string")


def _has_spans(rows: Dataset, column: str) -> bool:
    """Whether a column has lists of [start, end, label] or of objects, or only empty lists."""
    first = _first(rows, column)
    return isinstance(first, list | Mapping) or (first is None and is_list(rows.features[column]))


def _first(rows: Dataset, column: str) -> Any:
    """Return the first element of the first list with elements in a column; None without one."""
    return next((value[0] for value in rows[column] if isinstance(value, list) and value), None)


def tag_names(train: Dataset, tags_column: str) -> list[str]:
    """Return the tags in the order of their ids: of the ClassLabel, or of the training rows, sorted.

    Raise InputError for fewer than two tags.
    """
    names = class_names(train, tags_column)
    if names is None:
        present = {tag for tags in train[tags_column] for tag in tags or () if tag is not None}
        names = [str(tag) for tag in sorted(present) if str(tag) != NO_TAG]
        begun = {name[2:] for name in names if name.startswith("B-")}
        if any(name.startswith("I-") and name[2:] in begun for name in names):
            names = [name for name in names if is_scheme([name])]  # rows with other tags are bad rows
    if len(names) < 2:
        found = f"{len(names)} different tags in the training rows{_first_fault(train)}"
        refuse("data.tags_column", found, "allowed: two or more")
    return names


def _first_fault(rows: Dataset) -> str:
    """Return the first row that could not be converted, in brackets; "" without one."""
    faults = zip(file_rows(rows).tolist(), rows[FAULT] if FAULT in rows.column_names else (), strict=False)
    number, fault = min((pair for pair in faults if pair[1]), default=(0, ""))
    return f" ({places(rows, [number])[0]}: {fault})" if fault else ""


def entities(
    tokens: Sequence[str], tags: Sequence[str], places: Sequence[tuple[int, int]] = ()
) -> list[dict[str, Any]]:
    """Return the entities that tags mark: type, tokens, and the number of the first token, from 0.

    With the `places` of the tokens in a text, `characters` are the start and the end of an entity in it.
    """
    found = []
    for of_type, start, end in get_entities(as_iobes(tags)) if is_scheme(tags) else []:
        found.append({"type": of_type, "tokens": list(tokens[start : end + 1]), "start": start})
        if places:
            found[-1]["characters"] = [places[start][0], places[end][1]]
    return found


def row_problem(
    tokens: Any,
    tags: Any,
    known: Collection[str],
    names: Sequence[str] | None = None,
    in_training: bool = True,
) -> str | None:
    """Return the problem of a row's tokens and tags, or None.

    Args:
        tokens: The tokens.
        tags: The tags.
        known: The tags of the training rows, as text.
        names: The names of the class ids; None if the tags have none.
        in_training: Whether it is a training row.
    """
    if not tokens:
        return "no tokens"
    if None in tokens:
        return f"token {tokens.index(None) + 1} of {len(tokens)} is null"
    tags = tags or []
    if None in tags:
        return f"tag {tags.index(None) + 1} of {len(tags)} is null; −100 marks a token without a tag"
    if len(tags) != len(tokens):
        return f"{len(tags)} tags for {len(tokens)} tokens"
    texts = labels_as_text(tags, list(names or ()))
    unknown = next((tag for tag in texts if tag not in known and tag != NO_TAG), None)
    if unknown is None:
        return None if {*texts} - {NO_TAG} else f"all of its {len(texts)} tags are −100, so it has no label"
    some = listed([*known][:SHOWN]) + ", …" * (len(known) > SHOWN)
    if not in_training:
        return f"tag {unknown!r} is not one of the {len(known)} tags of the training rows ({some})"
    if names is not None:
        return f"tag {unknown!r} is the id of none of the {len(names)} classes ({some})"
    return f"tag {unknown!r} is not in the form of the others ({some})"


def ignored_note(splits: Sequence[Dataset], tags_column: str) -> str | None:
    """Return a line about the tokens of training and validation rows whose tag is −100, or None."""
    parts = []
    for split, name in zip(splits, SPLITS, strict=True):
        tags = [str(tag) for row in split[tags_column] for tag in row or ()]
        if number := tags.count(NO_TAG):
            parts.append(f"{number:,} of {counted(len(tags), f'{name} token')}")
    return f"{' and '.join(parts)} have the tag −100, so no label" if parts else None


def _element(dataset: Dataset, column: str, key: str) -> Any:
    """Return the feature of the elements of a list column."""
    require_column(dataset, column, key)
    feature = dataset.features[column]
    if not is_list(feature):
        rows = list(zip(file_rows(dataset).tolist(), dataset[column], strict=True))
        odd = [(row, value) for row, value in rows if not isinstance(value, list | None)]
        if 0 < len(odd) < len(rows):
            number, value = min(odd, key=lambda one: one[0])
            place = places(dataset, [number], "")[0]
            refuse(key, f"{place} has {value!r} in column {column!r}", "lists, as in the others")
        cure = 'in a JSONL or Parquet file rows have lists: {"tokens": ["a", "b"], "tags": ["X", "O"]}'
        refuse(key, f"column {column!r} has {_kind(feature)}, not lists", cure)
    return feature.feature


def _kind(feature: Any) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__


def _is(feature: Any, kind: str) -> bool:
    return isinstance(feature, Value) and kind in feature.dtype
