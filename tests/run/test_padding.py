"""Runs without padding (`budget.padding_free`): the same training in fewer micro-batches."""

import json
from pathlib import Path

import pytest
from recipe_runs import load_recipe, run_recipe
from text_classification_runs import (
    arguments,
    datasets_cache,  # noqa: F401
    empty_folder,  # noqa: F401
    history,
    make_rows,
    start,  # noqa: F401
    write,
)


def test_a_run_without_padding_is_the_same_training(start):  # noqa: F811
    rows = write("rows.csv", make_rows())
    shared = {"data__train": rows, "budget__max_tokens": 96, "train__max_windows": 4}
    printed = {}
    for setting in ("off", "auto"):
        ran = start(**shared, budget__padding_free=setting, output__dir=setting)
        assert (ran.code, ran.err) == (0, "")
        printed[setting] = ran.out
    assert "padding               none in the layers: " in printed["auto"]
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


def test_padding_that_the_loss_reads_stays_or_is_refused(tiny_bert, capfd):
    recipe = load_recipe("question_answering").QuestionAnswering
    flags = {
        "data__train": "embedded:questions",
        "data__doc_stride": 4,
        "data__on_bad_row": "skip",
        "budget__padding_free": "on",
    }
    ran = run_recipe(recipe, arguments(tiny_bert, flags), capfd)
    assert ran.code == 2
    assert "budget.padding_free: found on" in ran.err
