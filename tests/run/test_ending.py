"""The last lines of a run: how good the model is, where it is saved, and the next command."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from recipe_runs import load_recipe

from gradacc_hf.config.schema import TrainConfig
from gradacc_hf.run.ending import METRICS_IN_WORDS, result_lines, training_lines

FOLDER = Path("runs/my run")
RESULTS = {"window": 30, "loss": 1.2, "accuracy": 0.75}


def lines(recipe=None, report=FOLDER / "report.html", train=None, columns=None, rows=None, folder=FOLDER,
          number=3, **summary):  # fmt: skip
    """The lines for a recipe and a summary, by their names."""
    train = train or TrainConfig(best_metric="accuracy", best_direction="max")
    recipe = recipe or load_recipe("text_classification").TextClassification
    made = object.__new__(recipe)
    made.config = SimpleNamespace(train=train, model=SimpleNamespace(trust_remote_code=False))
    made.data = SimpleNamespace(text_column="text", text_pair_column=None, **columns or {})
    made.validation_rows_read = rows and Dataset.from_list(rows)
    summary = {
        "baseline": {"accuracy": 0.5},
        "best": RESULTS,
        "eval": RESULTS,
        "evaluations": [RESULTS],
        **summary,
    }
    found = result_lines(made, summary, 429, folder, report)
    assert len(found) == number
    return {line[:22].strip(): line[22:] for line in found}


def test_one_window_is_one_window():
    windows = SimpleNamespace(noise=SimpleNamespace(measured=0))
    summary = {"windows": 1, "examples": 1, "seconds": 2.0, "padding": 0.25, "skipped_windows": 1}
    trained, skipped = training_lines(summary, windows)
    assert trained.endswith(" 1 window, 1 example in 2 s; 25% of the tokens were padding")
    assert " 1 window took no step" in skipped


def test_the_result_is_the_metric_in_words_against_the_baseline():
    assert lines()["result"] == (
        "accuracy 0.7500 (share of correct predictions) on 429 validation examples; better than a baseline "
        "that ignores the input: 0.5000"
    )
    worse = lines(baseline={"accuracy": 0.75})["result"]
    assert worse.endswith(
        "no better than a baseline that ignores the input: 0.7500. The 95 % interval of accuracy is 0.0820 "
        "wide, and the baseline is 0.0000 away: 429 examples show no difference"
    )


def test_evaluations_of_an_earlier_model_are_named(tmp_path):
    (tmp_path / "evaluations").mkdir()
    for number, data in enumerate(("a.csv", "b.csv")):
        found = {"model": "best", "window": 24, "data": data}
        (tmp_path / f"evaluations/{number}.json").write_text(json.dumps(found))
    said = lines(folder=tmp_path, number=4)["evaluations"]
    assert said == f"of an earlier model on a.csv, b.csv; of this model: gradacc evaluate {tmp_path} --data …"
    for number, data in enumerate(("a.csv", "b.csv"), 2):
        found = {"model": "best", "window": RESULTS["window"], "data": data}
        (tmp_path / f"evaluations/{number}.json").write_text(json.dumps(found))
    assert "evaluations" not in lines(folder=tmp_path)


def test_without_a_baseline_the_untrained_model_is_the_comparison():
    before = {"window": 0, "loss": 3.0, "accuracy": 0.1}
    train = TrainConfig(best_metric="loss", best_direction="min")
    found = lines(baseline=None, evaluations=[before, RESULTS], train=train)["result"]
    assert found == (
        "validation loss 1.2000 (mean loss, lower is better) on 429 validation examples; better than the "
        "model before training: 3.0000"
    )
    alone = lines(baseline=None, train=train)["result"]
    assert alone.endswith("; to compare with the model before training: --train.eval_on_start true")
    assert lines(best=None)["result"] == "no evaluation"
    diverged = lines(baseline=None, evaluations=[{**before, "loss": None}, RESULTS], train=train)["result"]
    assert diverged.endswith("better than the model before training: not finite")


def test_of_the_untrained_model_and_the_baseline_the_better_one_is_the_comparison():
    before = {"window": 0, "loss": 3.0, "accuracy": 0.6}
    found = lines(evaluations=[before, RESULTS])["result"]
    assert found.endswith("better than the model before training: 0.6000")
    found = lines(evaluations=[{**before, "accuracy": 0.1}, RESULTS])["result"]
    assert found.endswith("better than a baseline that ignores the input: 0.5000")
    # a chat model is always compared with the untrained model
    train = TrainConfig(best_metric="perplexity", best_direction="min")
    both = [{"window": 0, "perplexity": 900.0}, {"window": 3, "perplexity": 20.0}]
    found = lines(baseline={"perplexity": 500.0}, evaluations=both, best=both[1], train=train)["result"]
    assert found.endswith("better than the model before training: 900.0000")


def test_small_figures_keep_two_digits():
    train = TrainConfig(best_metric="loss", best_direction="min")
    found = lines(best={**RESULTS, "loss": 1e-5}, baseline={"loss": 2e-5}, train=train)["result"]
    assert found.startswith("validation loss 1e-05 ")
    assert found.endswith("better than a baseline that ignores the input: 2e-05")


def test_the_folder_names_the_best_window_where_it_is_not_the_last():
    assert lines()["saved"] == (
        "runs/my run: model in best/, last weights in last/; report: runs/my run/report.html"
    )
    best = lines(best={**RESULTS, "window": 1200}, report=None)["saved"]
    assert best == "runs/my run: model in best/ (after window 1,200), last weights in last/; no report"


def test_the_next_command_predicts_an_example_of_the_task(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    assert shlex.split(lines()["next"])[:3] == ["gradacc", "predict", "runs/my run"]
    columns = {"question_column": "asked", "context_column": "context"}
    answering = lines(load_recipe("question_answering").QuestionAnswering, columns=columns)["next"]
    assert answering.startswith("printf '%s' '{\"asked\": ")
    assert answering.endswith("| gradacc predict 'runs/my run' --input -")
    rows = [
        {"text": text} for text in (None, "ok", "--help me with it", "my token=abc123 and this", "long " * 99)
    ]
    assert lines(rows=rows)["next"] == "gradacc predict 'runs/my run' 'my token=[hidden] and this'"
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert " -m gradacc_hf predict 'runs/my run' " in lines()["next"]
    monkeypatch.setenv("GRADACC_COMMAND", "./launch.sh")
    assert shlex.split(lines()["next"])[:3] == ["./launch.sh", "predict", "runs/my run"]


@pytest.mark.parametrize(
    "name",
    ["accuracy", "perplexity", "f1", "f1_macro", "rougeL", "bleu", "mrr_at_10", "pearsonr", "loss"],
)
def test_the_metrics_that_configs_choose_the_best_model_by_have_words(name):
    assert name in METRICS_IN_WORDS
    train = replace(TrainConfig(), best_metric=name)
    found = lines(train=train, best={"window": 1, name: 0.5}, eval={"window": 1}, baseline=None)
    assert METRICS_IN_WORDS[name] in found["result"]
