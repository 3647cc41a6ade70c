"""The benchmarks measure what their names promise; the command line reports errors in one line."""

import json
import math
from dataclasses import asdict
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from preference_pairs import write_pairs as write_preferences
from rich.console import Console

from gradacc_hf.accumulation.batch_schedule import ScheduledBatch
from gradacc_hf.accumulation.reference import EXACT
from gradacc_hf.bench import cli
from gradacc_hf.bench.distillation import measure_distillation, print_distillation
from gradacc_hf.bench.exactness import CONTENDERS, measure_exactness, print_exactness
from gradacc_hf.bench.experts import measure_experts, print_experts
from gradacc_hf.bench.offline import MAX_TOKENS, offline_recipe
from gradacc_hf.bench.preference import LOSSES, measure_preference, print_preference
from gradacc_hf.bench.schedules import TASKS, examples_until, schedule_flags
from gradacc_hf.bench.sentence_transformers import measure_contrastive, print_contrastive
from gradacc_hf.bench.throughput import measure_speed, print_speed
from gradacc_hf.config.batch_size import effective_batch_size
from gradacc_hf.config.parser import read_command_line
from gradacc_hf.config.schema import BatchConfig, Config
from gradacc_hf.embedded import minilm_path
from gradacc_hf.errors import InputError
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.verification.all_heads import SPLITS
from gradacc_hf.verification.tiny_models import build_head

HEADS = {"sequence_classification": ["bert"], "question_answering": ["distilbert"]}


class TinyRecipe(Recipe):
    """Label the tokens of 32 examples, in windows of 16, with a tiny random model."""

    def __init__(self, config):
        super().__init__(config)
        self.head, self.models, self.collated = build_head("token_classification", "bert"), [], []

    def datasets(self):
        examples = self.head.examples([5, 30] * 16)
        return Dataset.from_list(examples), Dataset.from_list(examples[:4])

    def model(self):
        self.models.append("made")  # a list, which copies of the recipe share
        return build_head("token_classification", "bert").model

    def collate(self, examples, pad_to=None):
        self.collated += [tuple(example["input_ids"]) for example in examples]
        return self.head.collate(examples, pad_to)


def tiny_recipe(effective=16):
    return TinyRecipe(Config(batch=BatchConfig(effective=effective)))


@pytest.fixture(scope="module")
def result():
    return measure_exactness(HEADS)


@pytest.fixture
def console():
    return Console(record=True, width=80)


def test_the_loader_is_exact_where_a_mean_of_means_is_not(result):
    measured = {(e.kind, e.split, e.contender): e.error for e in result.errors}
    assert len(measured) == len(HEADS) * len(SPLITS) * len(CONTENDERS)
    for kind in HEADS:
        for split in SPLITS.values():
            assert measured[kind, split, "ours"] <= EXACT
            assert measured[kind, split, "exact_trainer"] <= EXACT
        assert measured[kind, "5 + 5 + 5 + 1", "accelerate"] > 0.01


def test_equal_micro_batches_of_one_item_an_example_are_exact_for_everybody(result):
    """Else a contender would be wrong because it got other examples."""
    equal = [e for e in result.errors if (e.kind, e.split) == ("question_answering", "4 + 4 + 4 + 4")]
    assert all(e.error <= EXACT for e in equal)
    assert all(e.norm_ratio == pytest.approx(1, abs=1e-4) for e in equal)


def test_the_table_of_exactness_is_whole_in_80_columns_and_the_result_is_json(result, console):
    print_exactness(result, console)
    text = console.export_text()
    assert "…" not in text
    assert "sequence" in text
    assert json.loads(json.dumps(asdict(result)))["measured_with"].keys() >= {
        "torch",
        "transformers",
        "accelerate",
    }


def test_the_loop_is_measured_beside_its_own_micro_batches_and_dense_ones(console):
    recipe = tiny_recipe()
    result = measure_speed(recipe, num_windows=2, repeats=2)
    assert len(recipe.models) == 1  # each way trains a copy
    assert result.padding == 0
    assert (result.windows, result.examples) == (2, 32)
    assert len(result.seconds) == len(result.of_dense_limit) == len(result.overhead) == 2
    assert list(result.dense_tokens_per_second) == [8, 16, 30]
    assert min(result.of_dense_limit + result.of_dense_limit_padded) > 0
    assert result.median_overhead == sum(result.overhead) / 2
    json.dumps(asdict(result))
    print_speed(result, console)
    assert "Speed relative to dense micro-batches: " in console.export_text()


def test_windows_that_there_are_not_are_refused():
    with pytest.raises(InputError, match="--windows: found 3; allowed: 1 to 2"):
        measure_speed(tiny_recipe(), num_windows=3)


@pytest.mark.parametrize(
    "argv", [[], ["sped"], ["speed", "--windows", "0"], ["speed", "--repeats", "many"], ["exactness", "--x"]]
)
def test_a_wrong_command_line_ends_with_2_and_one_line(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_the_command_prints_the_result_and_the_versions(monkeypatch, capsys, result, flags):
    monkeypatch.setattr(cli, "measure_exactness", lambda heads, progress: result)
    cli.main(["exactness", *flags])
    out = capsys.readouterr().out
    assert transformers.__version__ in out
    if flags:
        assert len(json.loads(out)["errors"]) == len(result.errors)


def test_speed_is_measured_on_the_offline_config():
    config = offline_recipe().config
    assert (config.model.name, config.data.train) == ("embedded:minilm", "embedded:docstrings")
    assert config.budget.max_tokens == MAX_TOKENS


@pytest.mark.slow
def test_our_gradient_cache_and_that_of_sentence_transformers_come_to_the_same_model(tmp_path, console):
    write_pairs(tmp_path / "pairs.jsonl")
    settings = {
        "model.name": tiny_encoder(tmp_path / "bert"),
        "data.train": tmp_path / "pairs.jsonl",
        "data.anchor_column": "anchor",
        "data.positive_column": "positive",
        "data.negative_column": "negative",
        "batch.effective": 20,
    }
    flags = [f"--{key}={value}" for key, value in settings.items()]
    result = measure_contrastive(flags, num_windows=2, repeats=1, max_tokens=160)
    ours = result.contenders["ours"]
    for contender in result.contenders.values():
        assert contender.gradient_error <= EXACT
        assert contender.losses == pytest.approx(ours.losses, rel=1e-4)
        assert contender.metrics == pytest.approx(ours.metrics, abs=0.01)
    print_contrastive(result, console)
    text = console.export_text()
    assert "…" not in text
    assert "× the pairs per second of CachedMultipleNegativesRankingLoss" in text
    with pytest.raises(InputError, match="--windows: found 9; allowed: 1 to 4"):
        measure_contrastive(flags, num_windows=9, repeats=1, max_tokens=160)


def test_sentence_transformers_is_named_where_it_is_absent(monkeypatch, capsys):
    monkeypatch.setattr("gradacc_hf.bench.sentence_transformers.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as caught:
        cli.main(["contrastive"])
    assert caught.value.code == 2
    message = "bench contrastive: sentence-transformers is not installed: pip install sentence-transformers"
    assert capsys.readouterr().err == f"error: {message}\n"


def write_pairs(file):
    draw = np.random.default_rng(0)
    words = ["tea", "garden", "letter", "morning", "river", "bread", "window", "music"]
    texts = [" ".join(draw.choice(words, draw.integers(1, 12))) for _ in range(300)]
    rows = zip(texts[:100], texts[100:200], texts[200:], strict=True)
    names = ("anchor", "positive", "negative")
    file.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))


def tiny_encoder(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_examples_until_a_loss_are_read_off_a_line_between_evaluations():
    curve = [(0.0, 4.0), (100.0, 2.0), (200.0, 3.0), (300.0, 1.0)]
    assert examples_until(4.0, curve) == 0
    assert examples_until(3.0, curve) == 50
    assert examples_until(2.0, curve) == 100
    assert examples_until(1.5, curve) == 275
    assert math.isnan(examples_until(0.5, curve))


@pytest.mark.parametrize("task", TASKS)
def test_each_schedule_that_is_compared_is_one_that_a_run_takes_and_sees_as_many_examples(task):
    ways = schedule_flags(TASKS[task][0], 2400)
    assert len(ways) == 4
    for flags in ways.values():
        config = read_command_line([*flags, "--data.train", "x.csv"])
        sizes = effective_batch_size(config.batch, 2400)
        if isinstance(sizes, ScheduledBatch):
            (_, first), (later, second), (last, third) = sorted(sizes.sizes.items())
            assert (4 * first, 2 * second) == (third, third)
            assert later * first == (last - later) * second == 800
        assert 6 <= 2400 / (config.train.eval_every * config.batch.least) <= 18


def test_router_losses_over_windows_are_exact_and_those_of_micro_batches_are_not(capsys):
    result = measure_experts(["mixtral"], repeats=1)
    print_experts(result, Console())
    [head] = result.heads
    assert head.micro_batch > 100 * EXACT
    assert max(head.window, head.checkpointed, head.exact_trainer) < EXACT
    assert "1 of 1 heads are exact" in capsys.readouterr().out
    with pytest.raises(InputError, match="llama has no router loss"):
        measure_experts(["llama"], repeats=1)


def test_trl_is_named_where_it_is_absent(monkeypatch, capsys):
    monkeypatch.setattr("gradacc_hf.bench.preference.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as caught:
        cli.main(["preference"])
    assert caught.value.code == 2
    message = "bench preference: TRL is not installed: pip install trl==1.16.0"
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
@pytest.mark.parametrize("loss", LOSSES)
def test_preferences_have_the_loss_and_the_gradient_of_trl(tmp_path, console, loss):
    settings = write_preferences(tmp_path)[2:]
    flags = [f"{name}={value}" for name, value in zip(settings[::2], settings[1::2], strict=True)]
    flags = [flag for flag in flags if not flag.startswith("--model.lora")]
    result = measure_preference(flags, [loss], num_windows=1, repeats=1)
    ours, accumulated = (result.contenders[loss][name] for name in ("ours", "accumulated"))
    assert ours.gradient_error <= EXACT < accumulated.gradient_error  # of 4, 4 and 3 examples
    assert ours.loss_error <= 1e-5
    print_preference(result, console)
    assert f"{loss}: gradacc" in console.export_text()


@pytest.mark.slow
def test_a_student_is_trained_with_a_teacher_and_without(capsys, tmp_path):
    settings = {"temperature": 2, "weight": 0.5, "folder": tmp_path}
    result = measure_distillation(seeds=1, epochs=1, windows=2, **settings)  # warmup: the first has lr 0
    [teacher], [alone], [taught] = (result.of(name) for name in ("teacher", "alone", "with a teacher"))
    assert alone.parameters == taught.parameters < teacher.parameters
    files = (tmp_path / f"{name}-0/summary.json" for name in ("alone", "with"))
    of_alone, of_taught = (json.loads(file.read_text()) for file in files)
    assert of_alone["teacher"] is None
    assert of_taught["teacher"]["metrics"]["accuracy"] == teacher.accuracy
    assert (of_alone["best"]["accuracy"], of_taught["best"]["accuracy"]) == (alone.accuracy, taught.accuracy)
    assert of_alone["best"]["loss"] != of_taught["best"]["loss"]
    print_distillation(result, Console())
    assert f"by seed: {taught.accuracy - alone.accuracy:+.3f}" in capsys.readouterr().out
