"""What holds for every recipe with its offline config: it is exact, plain and with what saves memory."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from gradacc_hf.checkpoint import save_model
from gradacc_hf.errors import BadInput
from gradacc_hf.lora import write_merged
from gradacc_hf.run import load_recipe, make_model, make_windows
from gradacc_hf.verify import verify

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*_offline.yaml"))
SMALL = ["--batch.effective", "9", "--data.max_length", "64", "--budget.max_tokens", "200"]
SMALL += ["--data.on_bad_row", "skip", "--model.dropout", "0"]  # so short, some answers are cut off
WAYS = {
    "plain": [],
    "checkpointing": ["--budget.gradient_checkpointing", "true"],
    "LoRA": ["--model.lora.rank", "4"],
    "LoRA and checkpointing": ["--model.lora.rank", "4", "--budget.gradient_checkpointing", "true"],
}
FROM_SCRATCH = "image_classification_offline"


def recipe_of(config, *settings):
    return load_recipe(["--config", str(ROOT / "configs" / f"{config}.yaml"), *SMALL, *settings])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_recipe_is_exact(config, way):
    recipe = recipe_of(config, *WAYS[way])
    windows, _ = make_windows(recipe, *recipe.datasets(), Accelerator(cpu=True))
    if config == FROM_SCRATCH and "LoRA" in way:
        with pytest.raises(BadInput, match="starts without weights, which adapters cannot stand on"):
            make_model(recipe)
        return
    found = verify(make_model(recipe), windows, recipe.loss, trainer=False)
    assert found.exact, found.verdict
    assert found.accumulation_steps[0] > 1


@pytest.mark.parametrize("config", [config for config in CONFIGS if config != FROM_SCRATCH])
def test_adapters_come_back_alone_or_merged(config, tmp_path):
    recipe = recipe_of(config, "--model.lora.rank", "4")
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
        again = recipe_of(config, "--model.lora.rank", "4")
        again.datasets()
        loaded = again.load(tmp_path / folder).eval()
        assert answers(loaded) == pytest.approx(expected, rel=1e-4), folder
    sizes = {f: sum(p.stat().st_size for p in (tmp_path / f).rglob("*")) for f in ("adapter", "merged")}
    assert sizes["adapter"] < sizes["merged"] / 4, json.dumps(sizes)
