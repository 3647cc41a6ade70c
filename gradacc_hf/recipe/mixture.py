"""The rows of a mixture, and the sources and weights of its examples, for a recipe."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from gradacc_hf.config.schema import source_name
from gradacc_hf.data.loading import Convert, Splits
from gradacc_hf.data.sources import (
    OF_READERS,
    SOURCE,
    WEIGHT,
    carried,
    join_sources,
    mixture_note,
    no_examples,
    renamed,
    weights_note,
)
from gradacc_hf.errors import refuse

if TYPE_CHECKING:
    from gradacc_hf.recipe.base import Recipe


def read_mixture(
    recipe: "Recipe",
    label_column: str | None,
    convert: Convert | None,
    word_columns: tuple[str, str] | None,
    together: Sequence[str],
) -> Splits:
    """Read the rows of all sources of a mixture, with the arguments of `Recipe.rows`."""
    found = []
    for source in recipe.data.mixture:
        own = {key: value for key, value in source.items() if key in (*OF_READERS, "validation")}
        columns = {key: value for key, value in source.items() if key.endswith("_column")}
        renames = {value: getattr(recipe.data, key) for key, value in columns.items()}
        if None in renames.values():
            key = next(key for key, value in columns.items() if renames[value] is None)
            refuse("data.train", f"{source['source']} has {key}, and data.{key} is null", "set both")
        named = {wanted: given for given, wanted in renames.items()}
        words: Any = word_columns and tuple(named.get(column, column) for column in word_columns)
        keys = {value: f"{key} of {source['source']}" for key, value in columns.items()}
        converts = renamed(renames, keys, convert) if renames else convert
        data = replace(recipe.data, train=source["source"], **own)
        found.append(recipe.load_rows(data, label_column, converts, words, together))
    names = [source_name(source) for source in recipe.data.mixture]
    splits, recipe.source_columns, recipe.has_validation_by_source = join_sources(names, found)
    return splits


def take_sources_and_weights(
    recipe: "Recipe", train: Dataset, validation: Dataset
) -> tuple[Dataset, Dataset]:
    """Move the columns with sources and weights from examples to attributes of the recipe.

    Raise InputError if the examples do not have the columns of their rows.
    """
    data, is_mixture = recipe.data, bool(recipe.data.mixture)
    for key, wanted, column in (
        ("data.train", is_mixture, SOURCE),
        ("data.weight_column", data.weight_column is not None, WEIGHT),
    ):
        if wanted and column not in train.column_names:
            found = f"{type(recipe).__name__} does not keep the column {column!r} of rows"
            refuse(key, found, "keep it in datasets(), or give one source without weights")
    if data.weight_column is not None:
        recipe.example_weights = np.asarray(train[WEIGHT], np.float64)
        recipe.reading.note("weights", weights_note(data.weight_column, recipe.example_weights))
    if is_mixture:
        names = np.array([source_name(source) for source in data.mixture], object)
        counts = np.bincount(train[SOURCE], minlength=len(names)).tolist()
        no_examples(names.tolist(), counts)
        recipe.sources = names[np.asarray(train[SOURCE])].tolist()
        weights = [str(source.get("weight", 1)) for source in data.mixture]
        recipe.shares = dict(zip(names.tolist(), weights, strict=True))
        for line in mixture_note(names.tolist(), counts, recipe.shares):
            recipe.reading.note("mixture", line)
        if recipe.has_validation_by_source:
            recipe.validation_sources = names[np.asarray(validation[SOURCE])].tolist()
    return train.remove_columns(carried(train)), validation.remove_columns(carried(validation))
