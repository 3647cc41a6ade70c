"""metrics/: evaluate metrics that need no download."""

from concurrent.futures import ThreadPoolExecutor

import evaluate
import numpy as np
import pytest
import sacrebleu
import scipy.stats
import torch
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import f1_score, matthews_corrcoef

from gradacc_hf import metrics
from gradacc_hf.errors import InputError
from gradacc_hf.tasks.tags import entities

PREDICTIONS, REFERENCES = [0, 1, 2, 1, 0], [0, 1, 1, 1, 2]
EXPECTED = {
    "accuracy": 0.6,
    "f1": f1_score(REFERENCES, PREDICTIONS, average="macro"),
    "matthews_correlation": matthews_corrcoef(REFERENCES, PREDICTIONS),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "metrics"))
    return tmp_path / "metrics"


@pytest.mark.parametrize("name", EXPECTED)
def test_a_metric_gives_scikit_learns_figure_and_writes_nothing(name, cache):
    metric = metrics.load(name)
    assert isinstance(metric, evaluate.Metric)
    assert metric.name == name
    for kind in (list, np.array, torch.tensor):
        assert metric.compute(predictions=kind(PREDICTIONS), references=kind(REFERENCES)) == {
            name: pytest.approx(EXPECTED[name])
        }
    assert not cache.exists()


@pytest.mark.parametrize("name", EXPECTED)
def test_batches_added_one_by_one_give_the_same_figure(name):
    metric = metrics.load(name)
    metric.add_batch(predictions=PREDICTIONS[:3], references=REFERENCES[:3])
    for prediction, reference in zip(PREDICTIONS[3:], REFERENCES[3:], strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute() == {name: pytest.approx(EXPECTED[name])}


def test_evaluate_combines_them():
    combined = evaluate.combine([metrics.load(name) for name in EXPECTED])
    assert combined.compute(predictions=PREDICTIONS, references=REFERENCES) == pytest.approx(EXPECTED)


def test_f1_averages_as_told():
    f1 = metrics.load("f1")
    result = f1.compute(predictions=PREDICTIONS, references=REFERENCES, average=None)
    assert result == {"f1": pytest.approx(f1_score(REFERENCES, PREDICTIONS, average=None).tolist())}


@pytest.mark.filterwarnings("error")
def test_one_class_only_is_scored_without_a_warning():
    assert metrics.load("matthews_correlation").compute(predictions=[1, 1], references=[1, 1]) == {
        "matthews_correlation": 0.0
    }
    assert metrics.load("f1").compute(predictions=[1, 1], references=[0, 0]) == {"f1": 0.0}


@pytest.mark.parametrize("predictions", [[0.2, 0.9], [[1, 2], [3, 4]], [], ["a", "b"]])
def test_what_is_not_one_class_id_a_row_is_refused(predictions):
    metric = metrics.load("accuracy")
    with pytest.raises(InputError, match="argmax of the logits"):
        metric.compute(predictions=predictions, references=[0, 1])
    assert metric.compute(predictions=[0, 1], references=[0, 1]) == {"accuracy": 1.0}


def test_an_unknown_metric_names_the_closest():
    with pytest.raises(InputError, match="did you mean 'accuracy'"):
        metrics.load("accuracy1")
    with pytest.raises(InputError, match=r"allowed: accuracy, f1, matthews_correlation, "):
        metrics.load("bleu")


def test_entities_are_right_where_type_and_both_ends_are():
    true = [["B-PER", "I-PER", "O", "B-ORG"], ["O", "B-PER"]]
    predicted = [["B-PER", "O", "O", "B-ORG"], ["B-ORG", "B-PER"]]  # one too short, two right, one too many
    found = metrics.load("seqeval").compute(predictions=predicted, references=true)
    assert found == pytest.approx({"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7})
    nothing = metrics.load("seqeval").compute(predictions=[["O", "O"]], references=[["O", "O"]])
    assert nothing == {"precision": 0, "recall": 0, "f1": 0}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("unit", "last"), ["SE", "UL"])
def test_entities_of_schemes_that_mark_their_ends_are_kept_apart(unit, last):
    true = [[f"{unit}-PER", f"{unit}-PER", "O", "B-ORG", f"{last}-ORG", "I-ORG"]]
    predicted = [[f"{unit}-PER", f"{unit}-PER", "O", "B-ORG", "I-ORG", f"{last}-ORG"]]
    found = metrics.load("seqeval").compute(predictions=predicted, references=true)
    assert found == pytest.approx({"precision": 2 / 3, "recall": 2 / 4, "f1": 4 / 7})
    spans = entities(list("abcdef"), true[0])
    assert [span["tokens"] for span in spans] == [["a"], ["b"], ["d", "e"], ["f"]]


@pytest.mark.parametrize(
    ("predicted", "line"), [(["O"], "sequence 0: found 1 tags; allowed: 2"), (["O", "NOUN"], "found 'NOUN'")]
)
def test_what_is_no_sequence_of_tags_is_refused(predicted, line):
    with pytest.raises(InputError, match=line):
        metrics.load("seqeval").compute(predictions=[predicted], references=[["O", "B-PER"]])


def test_many_compute_at_once():
    def score(number: int) -> float:
        metric = metrics.load("accuracy")
        result = metric.compute(predictions=[0] * 10, references=[0] * number + [1] * (10 - number))
        return result["accuracy"] if result else -1.0

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(score, range(10))) == [number / 10 for number in range(10)]


def test_several_labels_a_row_are_scored_together_and_by_label():
    predictions = [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]]
    references = [[1, 0, 0], [0, 1, 0], [0, 0, 0], [1, 1, 0]]
    found = metrics.load("multi_label").compute(predictions=predictions, references=references)
    both = {"y_true": np.array(references)[:, :2], "y_pred": np.array(predictions)[:, :2]}
    assert found == {
        "exact_match": 0.5,
        "f1_micro": pytest.approx(f1_score(**both, average="micro")),
        "f1_macro": pytest.approx(f1_score(**both, average="macro")),  # of the third label, nothing is known
    }


def test_one_label_alone_is_scored_as_a_label_not_as_two_classes():
    predictions, references = [[1], [1], [0], [0]], [[1], [0], [0], [0]]
    expected = {"exact_match": 0.75, "f1_micro": pytest.approx(2 / 3), "f1_macro": pytest.approx(2 / 3)}
    for none in ([], [0]):  # the only label there is, or the only one that occurs
        rows = {"predictions": [row + none for row in predictions]}
        rows["references"] = [row + none for row in references]
        assert metrics.load("multi_label").compute(**rows) == expected


@pytest.mark.filterwarnings("error")
def test_no_label_at_all_is_scored_without_a_warning():
    found = metrics.load("multi_label").compute(predictions=[[0, 0]], references=[[0, 0]])
    assert found == {"exact_match": 1.0, "f1_micro": 0.0, "f1_macro": 0.0}


def test_numbers_are_scored_as_scipy_does():
    rng = np.random.default_rng(0)
    references = rng.normal(size=50)
    predictions = np.exp(references) + rng.normal(size=50)
    for name, function in (("pearsonr", scipy.stats.pearsonr), ("spearmanr", scipy.stats.spearmanr)):
        found = metrics.load(name).compute(predictions=predictions, references=references)
        assert found == {name: pytest.approx(function(predictions, references).statistic)}
    found = metrics.load("mse").compute(predictions=predictions, references=references)
    assert found == {"mse": pytest.approx(((predictions - references) ** 2).mean())}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("constant", [0.0, 2.1, 1e6 + 0.1])
@pytest.mark.parametrize("name", ["pearsonr", "spearmanr"])
def test_predictions_that_are_all_alike_correlate_with_nothing(name, constant):
    varied, same = [0.1, 0.5, 0.3], [constant] * 3
    assert metrics.load(name).compute(predictions=same, references=varied) == {name: 0.0}
    assert metrics.load(name).compute(predictions=varied, references=same) == {name: 0.0}


@pytest.mark.filterwarnings("error")
def test_predictions_that_are_no_numbers_correlate_with_nothing():
    numbers = {"predictions": [0.1, float("nan"), 0.3], "references": [0.1, 0.5, 0.3]}
    assert metrics.load("pearsonr").compute(**numbers) == {"pearsonr": 0.0}
    assert metrics.load("spearmanr").compute(**numbers) == {"spearmanr": 0.0}
    assert np.isnan(metrics.load("mse").compute(**numbers)["mse"])


@pytest.mark.parametrize(
    ("name", "predictions", "cure"),
    [
        ("multi_label", [0.2, 0.9], "compare the logits with 0 first"),
        ("multi_label", [[0.2, 0.9]], "compare the logits with 0 first"),
        ("pearsonr", [[0.2], [0.9]], "the only column of the logits"),
        ("mse", ["a"], "the only column of the logits"),
    ],
)
def test_what_is_not_of_a_metric_s_shape_is_refused(name, predictions, cure):
    with pytest.raises(InputError, match=cure):
        metrics.load(name).compute(predictions=predictions, references=predictions)


TEXTS = ["The cat, sat!", "a dog", "nothing"]
SEVERAL = [["cat sat", "sat"], ["the dog ran"], ["something else", "nothing at all", "Nothing."]]


def test_squad_v2_gives_the_figures_of_its_definition_by_kind_of_question():
    rows = [
        ("", []),
        ("tea", []),
        ("The cold tea!", ["a", "cold tea"]),
        ("tea", ["cold tea"]),
        ("", ["tea"]),
    ]
    predictions, references = zip(*rows, strict=True)
    squad = metrics.load("squad_v2")
    found = squad.compute(predictions=predictions, references=references)
    assert found == pytest.approx({
        "exact_match": 2 / 5, "f1": (1 + 0 + 1 + 2 / 3 + 0) / 5, "no_answer_f1": 1 / 2,
        "has_answer_exact_match": 1 / 3, "has_answer_f1": 5 / 9,
    })  # fmt: skip
    assert squad.compute(predictions=[""], references=[["the"]])["no_answer_f1"] == 1  # as in its script
    assert squad.compute(predictions=["a"], references=[["b"]]).keys() & {"no_answer_f1"} == set()


def test_squad_takes_the_best_reference_and_ignores_case_articles_and_punctuation():
    squad = metrics.load("squad")
    found = squad.compute(predictions=TEXTS, references=SEVERAL)
    assert found == {"exact_match": pytest.approx(2 / 3), "f1": pytest.approx((1 + 2 / 3 + 1) / 3)}
    assert squad.compute(predictions=["the"], references=[["a"]]) == {"exact_match": 1.0, "f1": 1.0}
    assert squad.compute(predictions=["the"], references=[["b"]]) == {"exact_match": 0.0, "f1": 0.0}
    twice = squad.compute(predictions=["tea tea"], references=[["tea"]])
    assert twice == {"exact_match": 0.0, "f1": pytest.approx(2 / 3)}


def test_rouge_and_bleu_are_their_libraries_figures():
    rouge = metrics.load("rouge").compute(predictions=TEXTS, references=SEVERAL)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    rows = [scorer.score_multi(texts, text) for text, texts in zip(TEXTS, SEVERAL, strict=True)]
    kinds = ("rouge1", "rouge2", "rougeL")
    assert rouge == {kind: pytest.approx(np.mean([row[kind].fmeasure for row in rows])) for kind in kinds}
    assert metrics.load("rouge").compute(predictions=["it walks"], references=[["it walked"]]) == {
        "rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0
    }  # fmt: skip
    predictions, references = (
        ["the cat sat on the mat today", "a dog ran by"],
        [
            ["the cat sat on a mat today"],
            ["a dog ran off", "the dog ran by"],
        ],
    )
    expected = sacrebleu.corpus_bleu(
        predictions, [["the cat sat on a mat today", "a dog ran off"], [None, "the dog ran by"]]
    )
    assert metrics.load("sacrebleu").compute(predictions=predictions, references=references) == {
        "bleu": pytest.approx(expected.score)
    }
    assert 10 < expected.score < 90


@pytest.mark.parametrize("name", ["squad", "rouge", "sacrebleu"])
def test_texts_come_with_a_list_of_texts_each(name, cache):
    for predictions, references in ((["a"], ["a"]), ([1], [["a"]]), (["a"], [[]]), ([], [])):
        with pytest.raises(InputError, match="a list of one text or more"):
            metrics.load(name).compute(predictions=predictions, references=references)
    metrics.load(name).compute(predictions=["a"], references=[["a"]])
    assert not cache.exists()
