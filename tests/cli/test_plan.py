"""`gradacc plan` predicts a run without weights or GPU, and reports errors in one line."""

import json
from contextlib import nullcontext

import pytest
from recipe_runs import write_rows

from gradacc_hf.cli import main as cli
from gradacc_hf.cli import plan as plan_command
from gradacc_hf.errors import InputError
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.run.plan import make_plan
from gradacc_hf.utils.paths import bundle_root

CONFIG = str(bundle_root() / "configs/text_classification_offline.yaml")
GIB = 2**30


@pytest.fixture
def bare(tiny_bert, tmp_path, monkeypatch):
    """Settings: a model's config and tokenizer without its weights, rows, and a cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_bert.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    rows = [{"text": f"row {i} " * (1 + i % 9), "label": "ab"[i % 2]} for i in range(60)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    settings = {
        "--model.name": folder,
        "--data.train": data,
        "--batch.effective": 16,
        "--data.max_length": 32,
    }
    return [str(word) for setting in settings.items() for word in setting]


def plan(capsys, *words, fits=True):
    with nullcontext() if fits else pytest.raises(SystemExit) as end:
        plan_command.main([*map(str, words)])
    assert fits or end.value.code == 1
    return capsys.readouterr().out


def test_a_plan_needs_no_weights_and_its_parts_add_up(bare, capsys):
    words = ["--config", CONFIG, "--budget", "gpu_8gb", *bare, "--json"]
    found = json.loads(plan(capsys, *words, "--tflops", 10, "--price", 2, "--processes", 2))
    assert found["fits"]
    assert found["device"] == "cuda"
    assert sum(found["parts"].values()) < found["memory"] == 7.5 * GIB
    assert found["parts"]["gradients"] == 2 * 4 * found["trained"]  # DDP's buckets are a copy of them
    steps = found["steps"]
    assert (steps["windows"], steps["epochs"]) == (4, 1)
    assert (
        1
        <= steps["accumulation_steps"][0]
        <= steps["accumulation_steps"][1]
        <= steps["accumulation_steps"][2]
    )
    assert found["seconds"] == pytest.approx(steps["flops_per_window"] * 4 / 10e12 / 2)
    assert found["price"] == pytest.approx(found["seconds"] * 2 * 2 / 3600)
    assert found["processes_change"]["FSDP2"] != found["processes_change"]["DDP"]


def test_the_step_of_a_loss_over_the_whole_window_is_traced(bare, capsys, tmp_path):
    """With equal texts, which the loss leaves out of the negatives."""
    rows = [{"anchor": f"row {i % 7}", "positive": f"answer {i % 7}"} for i in range(60)]
    bare[bare.index("--data.train") + 1] = str(write_rows(tmp_path / "pairs.jsonl", rows))
    data = ["--data.anchor_column", "anchor", "--data.positive_column", "positive"]
    config = CONFIG.replace("text_classification", "contrastive")
    found = json.loads(plan(capsys, "--config", config, "--budget", "cpu", *bare, *data, "--json"))
    assert found["fits"]
    assert sum(found["parts"].values()) > 0


def test_the_text_shows_every_part_and_the_bound(bare, capsys):
    text = plan(capsys, "--config", CONFIG, "--budget", "cpu", *bare, "--train.max_windows", 2)
    for said in (
        "parameters",
        "optimizer states",
        "workspace",
        "total",
        "2,048 tokens",
        "It fits.",
        "activations or step   what layers keep for the backward pass",
        "workspace             600 MiB for Python and libraries",
        "%) left; 38 of 39 measured steps were within 10 %",
        "windows               2 of 4 in 1 epoch",
        "rows.jsonl: 60 rows, training",
        "6 of 60 training rows, held out by seed 0",
    ):
        assert said in text


def test_what_does_not_fit_comes_with_flags_that_make_it_fit(bare, capsys):
    small = ["--config", CONFIG, "--budget.memory", "604MiB", "--json", *bare]
    found = json.loads(plan(capsys, *small, fits=False))
    assert not found["fits"]
    saved = [lever["saved"] for lever in found["levers"] if len(lever["flags"].split()) == 2]
    assert saved == sorted(saved, reverse=True)
    text = plan(capsys, *small[: -1 - len(bare)], *bare, fits=False)
    assert "It does not fit: the longest example" in text
    for lever in found["levers"]:
        assert lever["flags"] in text
    assert "--model.lora.rank 16 --model.load_in_4bit true" in text
    best = next(lever for lever in found["levers"] if "4bit" not in lever["flags"])  # needs a GPU
    again = json.loads(plan(capsys, *small, *best["flags"].split(), fits=best["fits"]))
    assert again["longest_bytes"] == pytest.approx(best["bytes"], rel=0.01)


def test_a_size_that_does_not_fit_where_an_example_does_is_said(bare, capsys):
    words = ["--config", CONFIG, *bare, "--budget.micro_batch_size", 16, "--budget.memory"]
    found = json.loads(plan(capsys, *words, "8GiB", "--json"))
    between = (found["longest_bytes"] + sum(found["parts"].values())) / 2 / 2**20
    text = plan(capsys, *words, f"{between:.4f}MiB", fits=False)
    assert "It does not fit: the largest micro-batch needs" in text
    assert "--budget.max_tokens auto splits finer." in text


def test_a_plan_leaves_the_recipe_as_it_was(bare):
    recipe = load_recipe(["--config", CONFIG, *bare])
    make_plan(recipe, with_levers=False)
    assert not recipe.without_weights


def test_a_bound_of_ones_own_is_kept(bare, capsys):
    words = ["--config", CONFIG, *bare, "--json", "--budget", "cpu"]
    found = json.loads(plan(capsys, *words, "--budget.max_tokens", 64))
    assert (found["bound"], found["why"]) == ("64 tokens", "set by budget.max_tokens")
    assert found["steps"]["accumulation_steps"][2] > 1


def test_a_plan_states_that_it_assumes_no_padding_and_predicts_such_micro_batches(bare, capsys):
    words = ["--config", CONFIG, *bare, "--budget.memory", "8GiB"]
    found = {
        setting: json.loads(plan(capsys, *words, "--budget.padding_free", setting, "--json"))
        for setting in ("on", "off")
    }
    assert {setting: one["padding_free"] for setting, one in found.items()} == {"on": True, "off": False}
    assert found["on"]["steps"]["padding"] == 0 < found["off"]["steps"]["padding"]
    assert found["on"]["steps"]["flops_per_window"] < found["off"]["steps"]["flops_per_window"]
    text = plan(capsys, *words, "--budget.padding_free", "on")
    assert "padding in layers     none in the layers, if the check of the model passes in the run" in text
    assert " × at most " in text
    assert "padding in layers" not in plan(capsys, *words, "--budget.padding_free", "off")
    text = plan(capsys, *words, "--budget.padding_free", "auto")
    assert "padding in layers     kept: removing it would save" in text


def test_a_plan_refuses_what_the_run_refuses(capsys):
    config = CONFIG.replace("text_classification", "image_classification")
    plan(capsys, "--config", config, "--budget.padding_free", "auto")
    with pytest.raises(InputError, match=r"budget\.padding_free: found on; the inputs have no"):
        plan_command.main(["--config", config, "--budget.padding_free", "on"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--processes", "0"], "--processes: found 0; allowed: a number above 0"),
        (["--tflops", "-1"], "--tflops: found -1"),
        (["--tflops", "nan"], "--tflops: found nan; allowed: a number above 0"),
        (["--price", "2"], "--price needs --tflops or --rate-of, to estimate the run time"),
        (["--budget.memory", "8"], "--budget.memory: found '8'"),
        (["--optim.lrr", "8"], "unknown key --optim.lrr"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(bare, words, said):
    with pytest.raises(InputError) as refused:
        plan_command.main(["--config", CONFIG, *bare, *words])
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)


def test_gradacc_plan_is_a_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gradacc", "plan"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: gradacc plan needs --config FILE; for example: gradacc plan --config ")
