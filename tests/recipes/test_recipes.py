"""What holds for every recipe with its offline config: exact with what saves memory; adapters come back.

That each is exact without is in its own test file.
"""

import json
import re

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT

from gradacc_hf.errors import InputError
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.run.setup import make_model, make_windows
from gradacc_hf.training.lora import write_merged
from gradacc_hf.utils.files import save_model
from gradacc_hf.verification.exactness import verify

CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*_offline.yaml"))
SMALL = ["--batch.effective", "9", "--data.max_length", "64", "--budget.max_tokens", "200"]
SMALL += ["--data.on_bad_row", "skip", "--model.dropout", "0"]  # so short, some answers are cut off
CHECKPOINTING = ["--budget.gradient_checkpointing", "true"]
LORA = ["--model.lora.rank", "4"]
FROM_SCRATCH = "image_classification_offline"


def recipe_of(config, *settings):
    return load_recipe(["--config", str(ROOT / "configs" / f"{config}.yaml"), *SMALL, *settings])


QUICK = ("contrastive", "image_classification", "text_classification")


@pytest.mark.parametrize(
    "config",
    [pytest.param(c, marks=() if c.removesuffix("_offline") in QUICK else pytest.mark.slow) for c in CONFIGS],
)
def test_a_recipe_is_exact_with_adapters_and_checkpointing(config):
    recipe = recipe_of(config, *CHECKPOINTING, *([] if config == FROM_SCRATCH else LORA))
    windows, _ = make_windows(recipe, *(datasets := recipe.datasets()), accelerator := Accelerator(cpu=True))
    recipe.before_training(model := make_model(recipe), datasets, accelerator)
    found = verify(model, windows, recipe.loss, num_windows=1, trainer=False)
    assert found.exact, found.verdict
    assert found.accumulation_steps[0] > 1


def test_adapters_stand_on_no_model_without_weights():
    recipe = recipe_of(FROM_SCRATCH, *LORA)
    recipe.datasets()
    with pytest.raises(InputError, match="this model has no pretrained weights to adapt"):
        make_model(recipe)


def test_the_readme_says_how_long_the_recipes_are():
    readme = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| \[`(\w+)`\]\(\1\.py\)", readme, re.MULTILINE)
    lines = [len((ROOT / f"recipes/{name}.py").read_text(encoding="utf-8").splitlines()) for name in names]
    assert len(names) == len(CONFIGS)
    assert f"one file of {min(lines)} to {max(lines)} lines" in readme


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("seq2seq_offline", "masked_lm_offline")]


@pytest.mark.parametrize("config", ["contrastive_offline", *SLOW])
def test_adapters_come_back_alone_or_merged(config, tmp_path):
    recipe = recipe_of(config, *LORA)
    windows, _ = make_windows(recipe, *recipe.datasets(), accelerator := Accelerator(cpu=True))
    model = make_model(recipe).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:  # as training would, change what is trained
            torch.nn.init.normal_(parameter, std=0.05)
    batch = windows.collated([0, 1, 2]).batch

    def answers(model):
        with torch.no_grad():
            return float(recipe.loss(model(**batch), batch))

    expected = answers(model)
    save_model(model, tmp_path / "adapter", accelerator)
    save_model(model, tmp_path / "merged", accelerator, write=write_merged)
    assert answers(make_model(recipe).eval()) != pytest.approx(expected, rel=1e-3)
    for folder in ("adapter", "merged"):
        again = recipe_of(config, *LORA)
        again.datasets()
        loaded = again.load(tmp_path / folder).eval()
        assert answers(loaded) == pytest.approx(expected, rel=1e-4), folder
    sizes = {f: sum(p.stat().st_size for p in (tmp_path / f).rglob("*")) for f in ("adapter", "merged")}
    assert sizes["adapter"] < sizes["merged"] / 4, json.dumps(sizes)
