"""What a Hub config loads: data sets and models as they lie in repositories of the Hub and in its cache."""

import json
import shutil
from pathlib import Path

import datasets
import datasets.config
import pytest
import torch
import transformers
import yaml
from huggingface_hub import constants

from gradacc_hf import embedded
from gradacc_hf.data.loading import load_data
from gradacc_hf.embedded import minilm_path, models
from gradacc_hf.errors import InputError
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.run.runner import run
from gradacc_hf.utils.paths import bundle_root

SIZES = {"train": 24, "validation": 8, "test": 4}
CARD = {
    "license": "apache-2.0",
    "configs": [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": f"{name}/{split}-*"} for split in SIZES],
        }
        for name in ("sst2", "stsb")
    ],
}


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(embedded, "hub_has", lambda name, repo_type: None)
    monkeypatch.setattr(models, "hub_has", lambda name, repo_type: None)


def rows(name, number):
    if name == "sst2":
        features = {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
        columns = {"sentence": ["good", "bad"] * (number // 2), "label": [1, 0] * (number // 2)}
    else:
        features = {name: datasets.Value("string") for name in ("sentence1", "sentence2")}
        features["label"] = datasets.Value("float32")
        columns = {"sentence1": ["a cup"] * number, "sentence2": ["a cup", "rain"] * (number // 2)}
        columns["label"] = [5.0, 0.4] * (number // 2)
    columns["idx"] = list(range(number))
    features["idx"] = datasets.Value("int32")
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


@pytest.fixture
def repository(tmp_path):
    """A data set's repository: a card with its configurations, and the shards of their splits."""
    folder = tmp_path / "glue"
    for name in ("sst2", "stsb"):
        (folder / name).mkdir(parents=True)
        for split, number in SIZES.items():
            for shard in range(2):
                part = rows(name, number).shard(2, shard, contiguous=True)
                part.to_parquet(folder / name / f"{split}-{shard:05d}-of-00002.parquet")
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(CARD)}---\n# GLUE, a little of it\n")
    return folder


@pytest.fixture
def model(tmp_path):
    """A model's repository: config, weights of a bare encoder, tokenizer."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    sizes = {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 128}
    config = transformers.DistilBertConfig(vocab_size=len(tokenizer), **sizes)
    transformers.DistilBertModel(config).save_pretrained(folder := tmp_path / "distilbert")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["sst2", "stsb"])
def test_a_configuration_s_splits_are_read_from_their_shards(repository, name):
    found = load_data(str(repository), config_name=name, validation_fraction=0.1, seed=0)
    assert (len(found.train), len(found.validation), found.held_out) == (24, 8, False)
    assert found.train.features == rows(name, 2).features
    assert found.train["idx"][:] == list(range(24))
    test = load_data(str(repository), "test", config_name=name, validation_fraction=0.1, seed=0)
    assert len(test.validation) == 4


def test_a_configuration_must_be_named_where_there_are_several(repository):
    with pytest.raises(InputError, match="sst2"):
        load_data(str(repository), validation_fraction=0.1, seed=0)
    with pytest.raises(InputError, match="cola"):
        load_data(str(repository), config_name="cola", validation_fraction=0.1, seed=0)


def to_cache(repository, tmp_path, name, as_name):
    """What `datasets` keeps of a data set from the Hub, made from the same files here."""
    datasets.load_dataset(str(repository), name)
    [info] = (tmp_path / "cache").rglob(f"glue/{name}*/0.0.0/*/dataset_info.json")
    target = tmp_path / "cache" / as_name.replace("/", "___") / name / "0.0.0" / info.parent.name
    shutil.copytree(info.parent, target)
    shutil.rmtree(repository)


@pytest.mark.parametrize(("config", "name"), [("text_classification", "sst2"), ("text_regression", "stsb")])
def test_a_hub_config_runs_on_what_the_caches_hold(repository, model, tmp_path, config, name, capfd):
    """The shipped config itself, its own names: only that the repositories are small."""
    path = bundle_root() / "configs" / f"{config}.yaml"
    recipe = load_recipe(["--config", str(path)])
    assert recipe.config.data.config_name == name
    to_cache(repository, tmp_path, name, recipe.config.data.train)
    snapshot = Path(constants.HF_HUB_CACHE) / f"models--{recipe.config.model.name.replace('/', '--')}"
    shutil.copytree(model, snapshot / "snapshots" / "0")
    (snapshot / "refs").mkdir()
    (snapshot / "refs" / "main").write_text("0")
    settings = ["--batch.effective", "8", "--train.max_windows", "2", "--output.tracker", "none"]
    run(type(recipe), ["--config", str(path), *settings, "--output.dir", "out"])
    found = json.loads(Path("out/summary.json").read_text())
    assert found["windows"] == 2
    assert "24 to train on, 8 to validate" in capfd.readouterr().out
    metric = "accuracy" if name == "sst2" else "pearsonr"
    assert metric in found["eval"]
    saved = transformers.AutoModelForSequenceClassification.from_pretrained("out/best")
    assert saved.config.id2label == ({0: "neg", 1: "pos"} if name == "sst2" else {0: "label"})
