"""Images in rows, read one by one, so that a run can skip a row whose image cannot be read.

A row has the bytes or the path of an image, as with `datasets.Image(decode=False)`. The model's image
processor converts the pixels.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Image, Value
from PIL import Image as pillow
from PIL import UnidentifiedImageError
from transformers.image_utils import load_image

from gradacc_hf.data.columns import require_column
from gradacc_hf.errors import one_line, refuse

Picture = pillow.Image


def undecoded(dataset: Dataset, column: str, key: str = "data.image_column") -> Dataset:
    """Return the data set with images as bytes or paths. Raise InputError if the column holds neither."""
    require_column(dataset, column, key)
    feature = dataset.features[column]
    is_path = isinstance(feature, Value) and feature.dtype in ("string", "large_string")
    if not isinstance(feature, Image) and not is_path:
        found = getattr(feature, "dtype", None) or type(feature).__name__
        refuse(key, f"column {column!r} holds {found}", "name a column of images, or of paths of image files")
    return dataset.cast_column(column, Image(decode=False))


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
                why += f" (paths are relative to the current folder, {Path.cwd()})"
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
