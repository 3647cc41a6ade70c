"""configs/*.yaml: every one that the kit carries, of whatever recipe."""

import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from gradacc_hf.config.parser import recipe_file
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.run.folder import settings
from gradacc_hf.run.runner import run
from gradacc_hf.utils.paths import bundle_root

CONFIGS = sorted((bundle_root() / "configs").glob("*.yaml"))
OFFLINE = [path for path in CONFIGS if path.stem.endswith("_offline")]
each = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
COMMAND = r"#   \./launch\.sh (recipes/\w+\.py) --config (configs/\w+\.yaml)( --budget (\w+))?"


def test_there_are_configs_to_look_at():
    assert len(CONFIGS) > len(OFFLINE) > 0


@each
def test_a_config_fits_its_recipe(path):
    """Every key is one of the recipe's, every value possible, and all that a run needs is there."""
    recipe = load_recipe(["--config", str(path)])
    assert isinstance(recipe, Recipe)
    assert type(recipe.data) is type(recipe).Data
    assert recipe.config.data.train
    assert recipe.config.model.name
    assert recipe.model_class is not None


@each
def test_what_a_run_keeps_as_its_config_is_one_that_runs_it_again(path, tmp_path):
    recipe = load_recipe(["--config", str(path)])
    (tmp_path / "config.yaml").write_text(settings(recipe.config), encoding="utf-8")
    again = load_recipe(["--config", str(tmp_path / "config.yaml")]).config
    assert settings(again) == settings(recipe.config)


@each
def test_a_config_names_a_recipe_of_the_kit_as_gradacc_cp_copies_it(path):
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))["recipe"]
    assert re.fullmatch(r"\.\./recipes/\w+\.py", recipe)
    assert Path(recipe_file(["--config", str(path)])) == (path.parent / recipe).resolve()


@each
def test_a_config_s_first_lines_say_what_it_trains_and_the_command_that_runs_it(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = [line for line in lines if line.startswith("#")]
    assert lines[: len(comment)] == comment
    assert comment[0].startswith("# ")
    [command] = [found for line in comment if (found := re.match(COMMAND, line))]
    recipe, config, _, budget = command.groups()
    assert bundle_root() / recipe == Path(recipe_file(["--config", str(path)]))
    assert bundle_root() / config == path
    assert budget is None or (bundle_root() / f"configs/budgets/{budget}.yaml").exists()


@each
def test_a_config_s_best_metric_is_not_ranked_the_wrong_way_round(path):
    train = load_recipe(["--config", str(path)]).config.train
    is_error = train.best_metric in ("loss", "mse", "perplexity")
    assert (train.best_direction == "min") == is_error


@pytest.mark.parametrize("path", OFFLINE, ids=lambda path: path.stem)
def test_an_offline_config_would_run_without_the_hub(path, tmp_path, monkeypatch, capfd):
    """`conftest.py` keeps the Hub out of reach."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(["--config", str(path)])
    for name in (recipe.config.model.name, recipe.config.data.train):
        assert name.startswith("embedded:")
    run(type(recipe), ["--config", str(path), "--check"])
    assert "check: this would run" in capfd.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["max_lenght: 9", "train: null", "validation_fraction: 2"])
def test_a_config_that_does_not_fit_would_be_noticed(path_of, change):
    with pytest.raises(ValueError, match=change.partition(":")[0]):
        load_recipe(["--config", path_of(change)])


@pytest.fixture
def path_of(tmp_path):
    def path_of(change):
        key = change.partition(":")[0]
        kept = [
            line for line in OFFLINE[0].read_text().splitlines() if not line.strip().startswith(f"{key}:")
        ]
        text = "\n".join(kept).replace("data:\n", f"data:\n  {change}\n")
        (tmp_path / "changed.yaml").write_text(text)
        return str(tmp_path / "changed.yaml")

    return path_of


@pytest.mark.parametrize(
    "path", sorted((bundle_root() / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.name
)
def test_accelerate_reads_a_topology_which_says_its_command(path):
    config = load_config_from_file(str(path))
    assert config.num_machines == (2 if "nodes" in path.name else 1)
    assert (config.distributed_type == DistributedType.FSDP) == path.name.startswith("fsdp2")
    assert not config.fsdp_config or config.fsdp_config["fsdp_version"] == 2
    assert f"accelerate launch --config_file configs/accelerate/{path.name} " in path.read_text()
