"""recipes/image_classification.py: through its command line, its loss, its images and its answers."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import datasets.config
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from accelerate import Accelerator
from PIL import Image

from gradacc_hf import verify
from gradacc_hf.config.schema import with_settings
from gradacc_hf.embedded import load
from gradacc_hf.errors import InputError
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.run.runner import run
from gradacc_hf.run.setup import make_model, make_windows
from gradacc_hf.utils.paths import bundle_root

RECIPE = bundle_root() / "recipes/image_classification.py"
OFFLINE = bundle_root() / "configs/image_classification_offline.yaml"
ImageClassification = runpy.run_path(str(RECIPE))["ImageClassification"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")


def words(flags):
    settings = {"model.name": "embedded:tiny_vit", "batch.effective": 8, "output.tracker": "none"}
    settings |= {key.replace("__", "."): value for key, value in flags.items()}
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


@pytest.fixture
def start(capfd):
    """The recipe's command line in this process: its exit code, output and errors."""

    def start(**flags):
        code = 0
        try:
            run(ImageClassification, words(flags))
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()

    return start


@pytest.fixture
def refused(start):
    def refused(**flags):
        code, _, err = start(**flags, check="true")
        assert code == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return refused


def draw(path, brightness, seed=0, size=(12, 10)):
    noise = np.random.default_rng(seed).integers(-30, 30, (*size, 3))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((brightness + noise).astype("uint8")).save(path)
    return path


@pytest.fixture
def folder():
    """A folder of images, dark and light ones, in PNG and JPEG and of several sizes."""
    for label, brightness in (("dark", 40), ("light", 200)):
        for i in range(20):
            kind = "png" if i % 2 else "jpg"
            draw(f"my images [1]/{label}/{i}.{kind}", brightness, i, size=(8 + i, 30))
    return "my images [1]"


def recipe_of(**flags):
    return load_recipe(["--config", str(OFFLINE), *words(flags)])


def loaders(recipe, **more):
    return make_windows(recipe, *recipe.datasets(), Accelerator(cpu=True), **more)


# A run


@pytest.mark.slow
def test_the_offline_config_learns_and_its_model_answers_as_a_pipeline_does(tmp_path):
    command = [sys.executable, RECIPE, "--config", OFFLINE, "--train.max_windows", "60"]
    command += ["--output.dir", "out", "--output.tracker", "none", "--data.crop", "1"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "from scratch" in found.stdout
    assert "tokens                patches of 2 × 2 pixels, 16 an image" in found.stdout
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["baseline"]["accuracy"] < 0.13
    assert summary["eval"]["accuracy"] > 0.3
    assert summary["tokens"] == 16 * summary["examples"] == summary["padded_tokens"]
    assert "patches of 2 × 2 pixels" in Path("out/report.html").read_text()

    files = []
    for i, row in enumerate(load("digits")[1].select(range(20))):
        row["image"].save(path := f"digit{i}.png")
        files.append(path)
    pipeline = transformers.pipeline("image-classification", "out/best", device="cpu", top_k=1)
    recipe = recipe_of(model__name="out/best")
    answers = recipe.answer(recipe.model_class.from_pretrained("out/best").eval(), files)
    for answer, (expected,) in zip(answers, pipeline(files), strict=True):
        assert answer["label"] == expected["label"]
        assert answer["score"] == pytest.approx(expected["score"], rel=1e-4)
        assert sum(answer["scores"].values()) == pytest.approx(1)


@pytest.mark.parametrize("size", [3, 5])
def test_the_gradient_of_a_window_is_exact_in_unequal_micro_batches(size):
    recipe = recipe_of(batch__effective=16, budget__micro_batch_size=size)
    windows, _ = loaders(recipe)
    found = verify(make_model(recipe), windows, recipe.loss, num_windows=2, trainer=False)
    assert found.loop.error <= 1e-5
    assert found.exact
    assert set(found.accumulation_steps) == {-(-16 // size)}


def test_a_window_s_items_are_its_examples():
    windows, _ = loaders(recipe_of(batch__effective=10))
    window = next(iter(windows))
    list(window.batches())
    assert window.num_items == 10
    assert window.tokens == window.padded_tokens == 160


# Randomness belongs to the example


def pixels_by_example(windows):
    """(epoch, example) → its pixels, of one epoch."""
    found = {}
    for window in windows:
        for batch in window.batches():
            indices = window.micro_batch.indices.tolist()
            found |= {(window.epoch, i): x for i, x in zip(indices, batch["pixel_values"], strict=True)}
    return found


def test_an_image_is_cut_alike_for_any_split_number_of_processes_and_resuming(folder):
    flags = {"data__train": folder, "data__crop": 0.3, "data__flip": "true"}
    recipe = recipe_of(**flags, budget__micro_batch_size=8)
    training, validation = recipe.datasets()

    def fresh(size, workers=0):
        changes = {"budget.micro_batch_size": size, "budget.num_workers": workers}
        changed = recipe.with_config(with_settings(recipe.config, changes))
        accelerator = Accelerator(cpu=True)
        windows, _ = make_windows(changed, training, validation, accelerator)
        return windows

    def half(process):
        """The pixels that one of two processes collates."""
        windows = fresh(3)
        return {
            (0, i): x
            for window in range(len(windows))
            for micro_batch in windows.collate_window(0, window, process, num_processes=2)
            for i, x in zip(micro_batch.indices.tolist(), micro_batch.batch["pixel_values"], strict=True)
        }

    first = pixels_by_example(fresh(8))
    assert len(first) == len(training) == 36
    halves = {**half(0), **half(1)}
    in_workers, resumed = pixels_by_example(fresh(1, workers=2)), fresh(5)
    resumed.load_state_dict({"seed": 0, "epoch": 0, "window": 2})
    resumed = pixels_by_example(resumed)
    assert len(resumed) == 20
    for other in (halves, in_workers, resumed):
        assert all(torch.equal(pixels, first[key]) for key, pixels in other.items())
    assert halves.keys() == in_workers.keys() == first.keys()
    later = fresh(8)
    later.load_state_dict({"seed": 0, "epoch": 1, "window": 0})
    changed = [not torch.equal(x, first[0, i]) for (_, i), x in pixels_by_example(later).items()]
    assert np.mean(changed) > 0.9, "another epoch, other cuts"


def test_validation_images_are_neither_cut_nor_mirrored(folder):
    flags = {"data__train": folder, "data__validation": folder, "data__flip": "true", "data__crop": 0.3}
    recipe = recipe_of(**flags)
    _, validation = loaders(recipe)
    plain = recipe.pixels([Image.open(file).convert("RGB") for file in Path(folder).rglob("*.*g")])
    found = [x.sum().item() for _, batch in validation.micro_batches() for x in batch["pixel_values"]]
    assert sorted(found) == pytest.approx(sorted(x.sum().item() for x in plain), rel=1e-4)


def test_augmentation_does_what_it_says(folder):
    def changed(**flags):
        recipe = recipe_of(data__train=folder, **flags)
        training, _ = recipe.datasets()
        plain = recipe.transform({**training[0], "augment": False}, None)["pixel_values"]
        found = [recipe.transform(training[0], np.random.default_rng(i))["pixel_values"] for i in range(20)]
        return plain, [x for x in found if not torch.equal(x, plain)]

    assert changed(data__crop=1)[1] == []
    plain, mirrored = changed(data__crop=1, data__flip="true")
    assert 5 <= len(mirrored) <= 15
    assert all(torch.allclose(x, plain.flip(-1), atol=0.05) for x in mirrored)
    assert len(changed(data__crop=0.5)[1]) == 20


# What is read


def test_a_folder_of_images_with_a_folder_for_each_label_trains(start, folder):
    code, out, err = start(data__train=folder, output__dir="out", train__epochs=3, optim__lr=3e-3)
    assert code == 0, err
    assert "36 to train on, 4 to validate" in out
    assert json.loads(Path("out/summary.json").read_text())["eval"]["accuracy"] == 1
    config = transformers.AutoConfig.from_pretrained("out/best")
    assert config.id2label == {0: "dark", 1: "light"}


def test_folders_may_name_splits(start, folder):
    Path(folder).rename("train")
    Path("set").mkdir()
    Path("train").rename("set/train")
    for label, brightness in (("dark", 40), ("light", 200)):
        draw(f"set/test/{label}/a.png", brightness)
    code, out, err = start(data__train="set", check="true")
    assert code == 0, err
    assert "40 to train on, 2 to validate" in out


def test_a_file_may_name_images_by_their_paths(start, folder):
    rows = [{"file": str(file), "kind": file.parent.name} for file in sorted(Path(folder).rglob("*.*g"))]
    pd.DataFrame(rows).to_csv("images.csv", index=False)
    columns = {"data__image_column": "file", "data__label_column": "kind"}
    code, out, err = start(data__train="images.csv", **columns, check="true")
    assert code == 0, err
    assert "36 to train on, 4 to validate" in out


def make_table(suffix, columns=("file_name", "label"), number=20):
    """A folder of images with a table in it, as `datasets` reads it."""
    rows = []
    for i in range(number):
        draw(f"pets/{i}.png", 40 + 8 * i, i)
        rows.append(dict(zip(columns, (f"{i}.png", "even" if i % 2 == 0 else "odd"), strict=True)))
    frame = pd.DataFrame(rows)
    path = Path(f"pets/metadata{suffix}")
    frame.to_csv(path, index=False) if suffix == ".csv" else frame.to_json(path, orient="records", lines=True)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_folder_with_a_metadata_file_is_read_by_it(suffix):
    make_table(suffix)
    draw("pets/more.png", 40)
    Path("pets/notes.pdf").write_text("x")
    recipe = recipe_of(data__train="pets")
    rows = [row for split in recipe.datasets() for row in split]
    found = {Path(row["image"]["path"]): recipe.target.names[row["labels"]] for row in rows}
    assert found == {Path(f"pets/{i}.png"): "odd" if i % 2 else "even" for i in range(20)}
    assert recipe.reading.notes["format"] == ["paths in 'file_name', 20 relative to the folder of the table"]
    assert recipe.reading.notes["not read"] == [
        f"pets/more.png: in no row of pets/metadata{suffix}",
        "pets/notes.pdf: not an image",
    ]


def test_metadata_in_folders_named_for_splits_makes_splits():
    make_table(".csv")
    Path("set").mkdir()
    Path("pets").rename("set/train")
    make_table(".csv", number=4)
    Path("pets").rename("set/test")
    train, validation = recipe_of(data__train="set").datasets()
    assert (len(train), len(validation)) == (20, 4)


def test_a_missing_image_of_a_metadata_file_is_one_line_and_so_is_a_missing_column(refused):
    make_table(".csv")
    Path("pets/3.png").unlink()
    line = refused(data__train="pets")
    assert "data.image_column: pets/metadata.csv line 5: image 3.png cannot be read: No such file" in line
    assert "(a path starts at the folder of its table, or at the current folder, " in line
    make_table(".csv", columns=("name", "label"))
    assert "pets/metadata.csv has no column 'file_name'; found name, label; name" in refused(
        data__train="pets"
    )


def test_a_path_starts_at_the_folder_of_the_table_first_and_the_plan_states_which(start, folder):
    rows = [("a/1.png", "x"), ("b/2.png", "y"), ("a/3.png", "x"), ("a/4.png", "y")]
    for at, _ in rows[:3]:
        draw(f"tables/{at}" if at.startswith("a") else at, 90)
    draw("a/1.png", 90)  # the one beside the table counts
    draw("a/4.png", 90)
    pd.DataFrame(rows, columns=["path", "label"]).to_csv("tables/t.csv", index=False)
    settings = {"data__train": "tables/t.csv", "data__validation": "tables/t.csv", "batch__effective": 2}
    train, _ = recipe_of(**settings).datasets()
    assert [row["image"]["path"] for row in train] == [
        "tables/a/1.png",
        "b/2.png",
        "tables/a/3.png",
        "a/4.png",
    ]
    _, out, _ = start(**settings, check="true")
    assert (
        "paths in 'path', 2 relative to the folder of the table and 2 relative to the current folder"
        in " ".join(out.split())
    )


# Bad input


@pytest.mark.parametrize("damage", ["no image", "", "truncated", "missing"])
def test_an_image_that_cannot_be_read_is_a_row_and_not_the_end_of_a_run(start, refused, folder, damage):
    files = sorted(Path(folder).rglob("*.*g"))
    bad = files[0]
    assert bad.suffix == ".jpg"
    rows = [{"image": str(file), "label": file.parent.name} for file in files]
    pd.DataFrame(rows).to_csv("images.csv", index=False)
    if damage == "missing":
        bad.unlink()
    elif damage == "truncated":
        draw(bad, 40, size=(300, 300))
        bad.write_bytes(bad.read_bytes()[:-1000])
    else:
        bad.write_bytes(damage.encode())
    line = refused(data__train="images.csv")
    assert "data.image_column: " in line
    assert f"images.csv line 2: image {bad} cannot be read: " in line
    assert "--data.on_bad_row skip" in line
    _, out, err = start(data__train="images.csv", data__on_bad_row="skip", check="true")
    assert err == ""
    assert "left out              1 row that cannot be used, the first: " in out


def test_bytes_that_are_no_image_are_a_row_too(refused):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = [{"image": {"bytes": b"nothing", "path": None}, "label": label} for label in "abab"]
    datasets.Dataset.from_list(rows, features=features).to_parquet("a.parquet")
    line = refused(data__train="a.parquet", data__validation="a.parquet", batch__effective=1)
    assert "a.parquet row 1: image of 7 bytes cannot be read: it is not an image" in line


def test_a_row_without_a_label_is_refused_or_left_out(start, refused, folder):
    files = sorted(Path(folder).rglob("*.*g"))
    rows = [{"image": str(f), "label": f.parent.name if i != 6 else None} for i, f in enumerate(files)]
    pd.DataFrame(rows).to_csv("images.csv", index=False)
    assert "images.csv line 8: column 'label' is empty; correct it" in refused(data__train="images.csv")
    _, out, _ = start(data__train="images.csv", data__on_bad_row="skip", check="true")
    assert "left out              1 row that cannot be used" in out


def test_what_holds_no_images_is_refused(refused):
    pd.DataFrame([{"image": i, "label": "a"} for i in range(9)]).to_parquet("a.parquet")
    line = refused(data__train="a.parquet")
    assert "data.image_column: column 'image' holds int64; name a column of images, or of paths" in line
    assert "no column 'picture'; found image, label" in refused(
        data__train="a.parquet", data__image_column="picture"
    )
    Path("empty").mkdir()
    assert "or images in a folder for each label" in refused(data__train="empty")


def test_one_folder_only_has_no_labels(refused):
    for i in range(4):
        draw(f"flat/{i}.png", 40)
    line = refused(data__train="flat")
    assert "data.label_column: no column 'label'; found image" in line


def test_a_model_without_image_processor_is_refused(refused):
    line = refused(data__train="embedded:digits", model__name="embedded:minilm")
    assert "model.name: the image processor of embedded:minilm cannot be loaded" in line


def test_a_crop_of_nothing_is_refused(refused):
    assert "data.crop: found 0.0, allowed is a share" in refused(data__train="x", data__crop=0)


def test_an_input_that_cannot_be_read_is_named_by_its_number(folder):
    recipe = recipe_of()
    with pytest.raises(InputError, match=r"input 2: image gone\.png cannot be read: No such file"):
        recipe.answer(None, [str(next(Path(folder).rglob("*.png"))), "gone.png"])
