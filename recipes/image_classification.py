"""Label an image with the class that it shows.

    ./launch.sh recipes/image_classification.py --config configs/image_classification_offline.yaml

Your own images: `--data.train FOLDER`, with a folder for each class in it or with a metadata.csv;
or a file with a column of paths.
"""

from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification

from gradacc_hf.config import DataConfig
from gradacc_hf.data.columns import with_column
from gradacc_hf.data.sources import carried
from gradacc_hf.recipe import Recipe
from gradacc_hf.run import run
from gradacc_hf.tasks.images import as_images, image_problem, images_of, random_cut, read_image, undecoded
from gradacc_hf.tasks.targets import SingleLabel, answers


class ImageClassification(Recipe):
    """Label an image."""

    model_class = AutoModelForImageClassification
    pipeline_tag = "image-classification"
    example = "image.png"  # a file

    @dataclass
    class Data(DataConfig):
        image_column: str = "image"
        """Column of the image, or of its file path.
        A relative path starts at the folder of the table, or else at the current folder."""
        label_column: str = "label"
        """Column of the label: strings or integers.
        In a folder of images, the labels are the names of the class folders."""
        crop: float = 1.0
        """Smallest random crop, as share of the area.
        Augmentation of training images. 1: no crop."""
        flip: bool = False
        """Mirror half of the images at random.
        Augmentation of training images; wrong for digits and letters."""

        def rules(self):
            yield from super().rules()
            yield "crop", 0 < self.crop <= 1, "a share of the area above 0, up to 1"

    def datasets(self):
        data = self.data
        rows = self.rows(data.label_column, partial(as_images, column=data.image_column))
        train, validation = (undecoded(of_split, data.image_column) for of_split in rows)
        self.reading.use([data.image_column, data.label_column])
        self.target = SingleLabel(train, validation, data.label_column)
        problem = image_problem(data.image_column)
        train, validation = self.check_rows(train, validation, self.target.problem, "data.label_column")
        train, validation = self.check_rows(train, validation, problem, "data.image_column")
        train, validation = self.target.encode(train, validation, self.may_skip, self.own_labels)
        self.note_labels(self.target.labels)
        self.validation = self.examples(validation, augment=False)
        return self.examples(train, augment=True), self.validation

    def examples(self, rows, augment):
        """Return the examples: paths or bytes of images, which `transform` decodes, and labels."""
        rows = rows.select_columns([self.data.image_column, "label", *carried(rows)])
        rows = rows.rename_columns({self.data.image_column: "image", "label": "labels"})
        return with_column(rows, "augment", np.full(len(rows), augment))

    def transform(self, example, random):
        """Return the pixels of an image; a training image is cropped and mirrored at random first."""
        image = read_image(example["image"])
        if example["augment"] and self.data.crop < 1:
            image = random_cut(image, self.data.crop, random)
        if example["augment"] and self.data.flip and random.random() < 0.5:
            image = ImageOps.mirror(image)
        return {"pixel_values": self.pixels([image])[0], "labels": example["labels"]}

    def pixels(self, images):
        """Return the inputs of the model (images, channels, height, width), resized and normalised for it."""
        return self.processor(images, return_tensors="pt")["pixel_values"]

    @cached_property
    def processor(self):
        with self.loading_errors("image processor"):
            return AutoImageProcessor.from_pretrained(self.processor_path, **self.source_options())

    def processors(self):
        return [self.processor]

    @cached_property
    def patches(self):
        """The number of patches in an image, and the side of a patch in pixels."""
        height, width = self.pixels([Image.new("RGB", (64, 64))]).shape[-2:]
        side = getattr(self.model_config(), "patch_size", 16)
        return height // side * (width // side), side

    @property
    def tokens_are(self):
        """The unit of `budget.max_tokens` for images."""
        number, side = self.patches
        return f"patches of {side} × {side} pixels, {number} an image"

    def lengths(self, dataset):
        return [self.patches[0]] * len(dataset)

    def collate(self, examples, pad_to=None):
        labels = torch.tensor([example["labels"] for example in examples])
        return {"pixel_values": torch.stack([e["pixel_values"] for e in examples]), "labels": labels}

    def model_overrides(self):
        return self.target.model_overrides()

    def loss(self, outputs, batch):
        return self.target.loss(outputs.logits, batch["labels"])

    def metrics(self, predictions, references):
        return self.target.metrics(np.stack(predictions), np.stack(references))

    def describe(self, predictions, references, windows):
        logits_and_labels = np.stack(predictions), np.stack(references)
        return self.target.describe(*logits_and_labels, self.images_shown, "image")

    def images_shown(self, rows):
        """Return the files of validation images, or else their numbers in the data set."""
        images = self.validation.select(rows)["image"]
        return [image["path"] or f"number {row}" for row, image in zip(rows, images, strict=True)]

    def baseline(self, train, validation):
        """Return the scores of the most frequent training label, given as the answer to every image."""
        return self.target.baseline(train["labels"], validation["labels"])

    def example_of(self, row):
        return row[self.data.image_column]["path"]  # None for an image that is in no file

    def answer(self, model, inputs):
        pixels = self.pixels(images_of(inputs, self.data.image_column))
        with torch.no_grad():
            return answers(model(pixel_values=pixels.to(model.device)).logits, model.config)


if __name__ == "__main__":
    run(ImageClassification)
