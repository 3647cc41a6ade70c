"""Images in rows, read one by one, so that a run can skip a row whose image cannot be read.

A row has the bytes or the path of an image, as with `datasets.Image(decode=False)`. The model's image
processor converts the pixels.
"""

import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Image, Value
from PIL import Image as pillow
from PIL import UnidentifiedImageError
from transformers.image_utils import load_image

from gradacc_hf.data.columns import replace_columns, require_column
from gradacc_hf.data.loading import FILE_NAME
from gradacc_hf.data.places import folders
from gradacc_hf.errors import one_line, refuse

Picture = pillow.Image
PATHS = (FILE_NAME, "path", "file", "filename", "image_path", "filepath", "image_file_name")
"""Usual names of columns of the paths of images."""


def undecoded(dataset: Dataset, column: str, key: str = "data.image_column") -> Dataset:
    """Return the data set with images as bytes or paths. Raise InputError if the column holds neither."""
    require_column(dataset, column, key)
    feature = dataset.features[column]
    if not isinstance(feature, Image) and not _has_paths(dataset, column):
        found = getattr(feature, "dtype", None) or type(feature).__name__
        refuse(key, f"column {column!r} holds {found}", "name a column of images, or of paths of image files")
    return dataset.cast_column(column, Image(decode=False))


def as_images(rows: Dataset, column: str) -> tuple[Dataset, str | None]:
    """Return rows with the paths of images that exist in `column`, and where relative paths start.

    A path starts at the folder of the table, or else at the current folder. Rows that hold images stay as
    they are. Without `column`, a column with a usual name of paths is taken.
    """
    names = [name for name in (column, *PATHS) if name in rows.column_names]
    if not names or not _has_paths(rows, names[0]):
        return rows, None
    bases: Counter[str] = Counter()
    paths = []
    for path, folder in zip(rows[names[0]], folders(rows), strict=True):
        is_relative = bool(path) and not Path(path).is_absolute()
        own = is_relative and folder is not None and (folder / path).is_file()
        paths.append(str(folder / path) if own and folder is not None else path)
        if own or (is_relative and Path(path).is_file()):
            bases["the folder of the table" if own else "the current folder"] += 1
    where = " and ".join(f"{number:,} relative to {base}" for base, number in bases.items())
    found = f"paths in {names[0]!r}" + f", {where}" * bool(where)
    return replace_columns(rows, names[:1], {column: (paths, Value("string"))}), found


def _has_paths(rows: Dataset, column: str) -> bool:
    feature = rows.features[column]
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def read_image(image: Mapping[str, Any]) -> Picture:
    """Return a row's image in RGB, in its EXIF orientation. Raise OSError and the errors of Pillow."""
    return load_image(_open(image))


def image_problem(column: str) -> Callable[[Mapping[str, Any]], str | None]:
    """Return a function for `check_rows` that returns why a row's image cannot be read, or None.

    It decodes the whole image, a JPEG at 1/8 of the size.
    """

    def problem(row: Mapping[str, Any]) -> str | None:
        image = row[column]
        if image is None or not (image["bytes"] or image["path"]):
            return f"column {column!r} is empty"
        try:
            picture = _open(image)
            picture.draft(picture.mode, (1, 1))
            picture.load()
        except Exception as error:  # Pillow raises many kinds of errors for damaged files
            unknown = isinstance(error, UnidentifiedImageError)
            why = "it is not an image" if unknown else getattr(error, "strerror", None) or one_line(error)
            if isinstance(error, FileNotFoundError) and not Path(image["path"]).is_absolute():
                why += f" (a path starts at the folder of its table, or at the current folder, {Path.cwd()})"
            name = image["path"] or f"of {len(image['bytes']):,} bytes"
            return f"image {name} cannot be read: {why}"
        return None

    return problem


def _open(image: Mapping[str, Any]) -> Picture:
    return pillow.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"]))


def random_cut(image: Picture, smallest: float, random: np.random.Generator) -> Picture:
    """Crop a random part of the image, a share of `smallest` to 1 of the area, and resize it to the image."""
    side = math.sqrt(random.uniform(smallest, 1))  # as a share of the image's side
    width, height = side * image.width, side * image.height
    left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    return image.resize(image.size, pillow.Resampling.BILINEAR, box=box)


def images_of(inputs: Sequence[Any], column: str) -> list[Picture]:
    """Return the images of paths, or of rows with a path in this column. Raise InputError."""
    problem, images = image_problem("image"), []
    for number, given in enumerate(inputs, start=1):
        path = given.get(column) if isinstance(given, Mapping) else given
        image = {"bytes": None, "path": path}
        if found := problem({"image": image}):
            refuse(f"input {number:,}", found, f"give the path of an image file, or {{{column!r}: path}}")
        images.append(read_image(image))
    return images
