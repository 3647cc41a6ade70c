"""Runs without padding (`budget.padding_free`): the same training in fewer micro-batches."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from recipe_runs import make_recipe
from text_classification_runs import (
    TextClassification,
    datasets_cache,  # noqa: F401
    empty_folder,  # noqa: F401
    history,
    make_rows,
    start,  # noqa: F401
    write,
)

from gradacc_hf import WindowLoader
from gradacc_hf.accumulation.loss_items import model_loss
from gradacc_hf.accumulation.splitting import Cost
from gradacc_hf.errors import InputError
from gradacc_hf.padding.removal import is_removed
from gradacc_hf.run.padding import choose_padding
from gradacc_hf.verification.tiny_models import build_head

LENGTHS = [3, 40, 7, 22, 5, 9, 31, 4] * 4


def choose(model_type="bert", setting="auto", change=lambda model: None, fixed=128.0, flags=(), **of_batch):
    """Return the line of the run about padding, the model and the training windows."""
    head = build_head("sequence_classification", model_type)
    change(head.model)
    windows = WindowLoader(
        head.examples(LENGTHS),
        16,
        accelerator=Accelerator(cpu=True),
        collate_fn=lambda examples: head.collate(examples) | of_batch,
        max_tokens=96,
        noise_every=16,
        cost=Cost(fixed=fixed),
    )
    flags = ("--budget.padding_free", setting, *flags)
    recipe = make_recipe(TextClassification, "--data.train", "a.csv", *flags)
    recipe.loss = model_loss
    choose_padding(recipe, head.model, windows)
    return recipe.model_notes["padding in layers"], head.model, windows


def test_a_run_without_padding_is_the_same_training(start, monkeypatch):  # noqa: F811
    split, changed = WindowLoader.without_padding, []
    monkeypatch.setattr(WindowLoader, "without_padding", lambda self: (changed.append(self), split(self)))
    rows = write("rows.csv", make_rows())
    shared = {"data__train": rows, "budget__max_tokens": 96, "train__max_windows": 4}
    printed = {}
    for setting in ("off", "auto"):
        ran = start(**shared, budget__padding_free=setting, output__dir=setting)
        assert (ran.code, ran.err) == (0, "")
        printed[setting] = ran.out
    assert "padding in layers     none in the layers: " in printed["auto"]
    assert printed["auto"].count("\npadding  ") == 1, "each line has a name of its own"
    assert "; the last layer ends with the tokens that the loss reads" in printed["auto"]
    assert "none in the layers" not in printed["off"]
    padded, removed = history("off"), history("auto")
    for one, other in zip(padded, removed, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert other["padded_tokens"] == other["tokens"] < one["padded_tokens"]
    steps = [sum(row["accumulation_steps"] for row in rows) for rows in (padded, removed)]
    assert steps[1] < steps[0]
    config = json.loads(Path("auto/best/config.json").read_text())
    assert "gradacc" not in json.dumps(config)
    assert {loader.plan.shuffle for loader in changed} == {True}, "the validation windows stay padded"


def test_windows_stay_sorted_by_length_where_attention_runs_padded():
    note, model, windows = choose("mpnet")
    assert note.startswith("none in the layers, except in attention; the last layer ends with")
    assert is_removed(model)
    assert not windows.padding_free
    note, model, windows = choose("bert")
    assert note == "none in the layers; the last layer ends with the tokens that the loss reads"
    assert windows.padding_free


def test_the_noise_scale_is_measured_more_often_where_that_costs_little():
    assert choose(fixed=0.1)[-1].noise_every == 1
    assert choose(fixed=4096.0)[-1].noise_every == 16
    assert choose(fixed=0.1, flags=("--train.noise_every", "16"))[-1].noise_every == 16
    grows = ("--batch.effective", "noise_scale")
    assert choose(fixed=0.1, flags=grows)[-1].noise_every == 16
    assert choose("mpnet", fixed=0.1)[-1].noise_every == 16, "windows are sorted by length"


def run_out(module, args):
    if module.training:
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("change", "of_batch", "reason"),
    [
        (lambda model: model.register_forward_pre_hook(run_out), {}, "memory runs out"),
        (
            lambda model: None,
            {"inputs_embeds": torch.zeros(())},
            "the padded model fails on a sample (ValueError",
        ),
        (lambda model: vars(model).update(hf_device_map={"": "cpu"}), {}, "the model is placed on devices"),
        (lambda model: vars(model).update(is_quantized=True), {}, "the weights are quantised"),
    ],
)
def test_a_check_that_fails_does_not_stop_a_run(change, of_batch, reason):
    note, model, windows = choose(change=change, **of_batch)
    assert note.startswith("kept: ")
    assert reason in note
    assert not is_removed(model)
    assert not windows.padding_free


def test_short_examples_and_large_models_keep_padding(monkeypatch):
    monkeypatch.setitem(globals(), "LENGTHS", [3] * 32)
    assert "kept: " in choose()[0]
    monkeypatch.setitem(globals(), "LENGTHS", [3, 30] * 16)
    monkeypatch.setattr("gradacc_hf.run.padding.MOST_PARAMETERS", 1_000)
    assert "parameters, more than 1,000" in choose()[0]
    assert is_removed(choose(setting="on")[1])


def test_a_model_that_mixes_neighbours_keeps_padding_or_is_refused():
    note, model, windows = choose("convbert")
    assert note.startswith("kept: padding cannot be removed from ConvBertForSequenceClassification")
    assert not is_removed(model)
    assert not windows.padding_free
    with pytest.raises(InputError, match=r"budget\.padding_free: found on"):
        choose("convbert", setting="on")
