"""Rows of tokens with one tag per token: the names of the tags, and the problem of a row.

Tags are strings, whole numbers or ids of a ClassLabel, whose names and order are kept. A token with −100
has no label. The recipe makes the labels of the model from the tags.
"""

from collections.abc import Collection, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, Value
from seqeval.metrics.sequence_labeling import get_entities

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.data.columns import class_names, file_rows, is_list, labels_as_text, require_column
from gradacc_hf.data.places import places
from gradacc_hf.data.reading import SPLITS, counted
from gradacc_hf.errors import listed, refuse
from gradacc_hf.metrics.sequence_labelling import as_iobes, is_scheme

NO_TAG = str(IGNORED)
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
        found = f"{len(names)} different tags in the training rows"
        refuse("data.tags_column", found, "allowed: two or more")
    return names


def entities(tokens: Sequence[str], tags: Sequence[str]) -> list[dict[str, Any]]:
    """Return the entities that tags mark: type, tokens, and the number of the first token, from 0."""
    spans = get_entities(as_iobes(tags)) if is_scheme(tags) else []
    return [{"type": of, "tokens": list(tokens[start : end + 1]), "start": start} for of, start, end in spans]


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
