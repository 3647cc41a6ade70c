"""What holds for every recipe with its offline config: it is exact, plain and with what saves memory."""

from pathlib import Path

import pytest
from accelerate import Accelerator

from gradacc_hf.run import load_recipe, make_model, make_windows
from gradacc_hf.verify import verify

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*_offline.yaml"))
SMALL = ["--batch.effective", "9", "--data.max_length", "48", "--budget.max_tokens", "160"]
SMALL += ["--data.on_bad_row", "skip"]  # where so few tokens hold nothing that is learned
WAYS = {
    "plain": [],
    "checkpointing": ["--budget.gradient_checkpointing", "true"],
    "LoRA": ["--model.lora.rank", "4"],
    "LoRA and checkpointing": ["--model.lora.rank", "4", "--budget.gradient_checkpointing", "true"],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_recipe_is_exact(config, way):
    recipe = load_recipe(["--config", str(ROOT / "configs" / f"{config}.yaml"), *SMALL, *WAYS[way]])
    windows, _ = make_windows(recipe, *recipe.datasets(), Accelerator(cpu=True))
    found = verify(make_model(recipe), windows, recipe.loss, trainer=False)
    assert found.exact, found.verdict
    assert found.accumulation_steps[0] > 1
