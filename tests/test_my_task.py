"""The recipe my_task: its configs are valid, it trains, and its accumulation is exact."""

import json
import math
import subprocess
import sys
from pathlib import Path

from gradacc_hf.recipe.loading import load_recipe

ROOT = Path(__file__).parents[1]
RECIPE, CONFIG, HUB_CONFIG = (
    ROOT / file for file in ("recipes/my_task.py", "configs/my_task_offline.yaml", "configs/my_task.yaml")
)
SMALL = ["--batch.effective", "8", "--data.validation_fraction", "0.02"]


def test_the_settings_of_both_configs_are_valid():
    for config in (CONFIG, HUB_CONFIG):
        assert type(load_recipe(["--config", str(config)])).__name__ == "MyTask"


def test_it_trains_and_evaluates(tmp_path):
    run = tmp_path / "run"
    settings = ["--config", CONFIG, *SMALL, "--train.max_windows", "2", "--output.dir", run]
    subprocess.run([sys.executable, RECIPE, *settings], check=True)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["windows"] == 2
    assert math.isfinite(summary["eval"]["loss"])


def test_accumulation_is_exact():
    command = [sys.executable, "-m", "gradacc_hf", "verify", "--config", CONFIG, *SMALL]
    subprocess.run(command, check=True)
