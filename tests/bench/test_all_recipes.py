"""`gradacc bench recipes` reports the figures that the runs wrote."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console

from gradacc_hf.bench import all_recipes, offline
from gradacc_hf.bench.all_recipes import measure_recipes, print_recipes
from gradacc_hf.bench.offline import offline_configs
from gradacc_hf.embedded import minilm_path
from gradacc_hf.errors import InputError
from gradacc_hf.utils.paths import bundle_root


@pytest.fixture
def small_bundle(tmp_path, monkeypatch):
    """A bundle of one recipe and its offline config, with a tiny model and a few rows."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **sizes))
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    rows = [{"text": text, "label": text} for text in ("tea", "tea", "cash")] * 20
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for folder in ("recipes", "configs"):
        (tmp_path / folder).mkdir()
    shutil.copy(bundle_root() / "recipes/text_classification.py", tmp_path / "recipes/mine.py")
    (tmp_path / "configs/mine_offline.yaml").write_text(
        f"recipe: ../recipes/mine.py\nmodel:\n  name: {tmp_path / 'bert'}\nbatch:\n  effective: 6\n"
        f"data:\n  train: {tmp_path / 'rows.jsonl'}\noptim:\n  lr: 1e-2\n"
        "train:\n  best_metric: accuracy\n  best_direction: max\n"
    )
    for module in (all_recipes, offline):
        monkeypatch.setattr(module, "bundle_root", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_row_is_measured_in_a_run_of_its_own_that_leaves_nothing(small_bundle):
    before = sorted(small_bundle.rglob("*"))
    result = measure_recipes(windows=7)
    [row] = result.results
    assert (row.recipe, row.metric, row.windows, row.training_examples) == ("mine", "accuracy", 7, 54)
    assert row.baseline is not None
    assert 0.5 < row.baseline <= row.value <= 1  # two rows in three are tea
    assert row.answer["label"] in ("tea", "cash")
    assert sorted(small_bundle.rglob("*")) == before
    console = Console(file=io.StringIO(), width=40)
    print_recipes(result, console)
    lines = console.file.getvalue().splitlines()
    assert lines[2].startswith("| `mine` | ")
    assert (
        f"accuracy {row.value:.3f} after 7 windows | {row.baseline:.3f} | {row.seconds:.0f} s |" in lines[2]
    )
    assert json.loads(lines[-1]) == row.answer


@pytest.mark.slow
def test_a_recipe_that_fails_is_named_with_its_reason(small_bundle):
    config = Path("configs/mine_offline.yaml")
    config.write_text(config.read_text().replace("effective: 6", "effective: 600"))
    with pytest.raises(InputError, match=r"mine: error: batch.effective: found 600"):
        measure_recipes()


def test_an_unknown_recipe_is_refused_with_those_that_there_are():
    with pytest.raises(InputError, match=r"--only: found 'nonsense'; allowed: .*text_classification"):
        measure_recipes(["nonsense"])


def test_every_offline_config_is_of_a_recipe():
    for name, config in offline_configs().items():
        assert f"recipe: ../recipes/{name}.py\n" in config.read_text(encoding="utf-8")
