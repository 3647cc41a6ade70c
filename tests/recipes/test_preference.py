"""The recipe of preferences: exactness of every loss, its command line, and what comes after a run."""

import ast
import contextlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from checkpointed_runs import cut_back
from preference_pairs import LOSSES, exactness, pairs, write_pairs
from recipe_runs import load_recipe, make_recipe, run_recipe, summary, write_rows
from safetensors.torch import load_file
from torch.nn.functional import log_softmax, softplus

from gradacc_hf.accumulation.accelerate_state import reset_accelerate
from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.accumulation.reference import EXACT, RecordGradients, read_gradient, relative_error
from gradacc_hf.run.setup import make_model, make_windows
from gradacc_hf.training.loop import evaluate, train

Preference = load_recipe("preference").Preference
SMALL = ["--budget.max_tokens", "400", "--data.sample_tokens", "3", "--data.samples", "2"]
SMALL += ["--output.tracker", "none", "--budget.num_workers", "0", "--model.lora.rank", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("preference")


@pytest.fixture(scope="module")
def settings(folder):
    return write_pairs(folder)


@pytest.fixture(autouse=True)
def own_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.chdir(tmp_path)


def merged(*groups):
    """The words of a command line. The last value of a flag counts."""
    given = {flag: value for words in groups for flag, value in zip(words[::2], words[1::2], strict=True)}
    return [word for pair in given.items() for word in pair]


@pytest.fixture
def start(settings, capfd):
    def start(*words):
        outcome = run_recipe(Preference, merged(settings, SMALL, words), capfd)
        assert outcome.code == 0, outcome.err
        assert "cannot tell" not in outcome.err
        return outcome

    return start


@pytest.mark.parametrize(
    "split", [{"max_tokens": 300}, {"micro_batch_size": 3, "padding_free": "off"}], ids=str
)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_exact_for_every_split(settings, loss, split):
    found, recipe, (model, batch) = exactness([*settings, *LOSSES[loss]], Accelerator(cpu=True), **split)
    assert found["error"] < EXACT
    assert found["loss_error"] < 1e-5
    assert max(found["steps"]) >= 2
    assert found["padding"].startswith("none in the layers") == ("max_tokens" in split)
    if loss == "kto":
        check_kto(recipe, model, batch)


@torch.no_grad()
def check_kto(recipe, model, batch):
    """Compare KTO's loss of a whole window with the formula, from all logits. z must be above 0."""
    ratios = []
    for place, prefix in enumerate(("", "kl_")):
        ids, labels = batch[f"{prefix}input_ids"], batch[f"{prefix}labels"]
        logits = model(input_ids=ids, attention_mask=batch[f"{prefix}attention_mask"]).logits
        chosen = log_softmax(logits[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]
        ratios.append((chosen * (labels[:, 1:] != IGNORED)).sum(1) - batch["reference"][:, place])
    point, sign = ratios[1].mean(), 2 * batch["desirable"] - 1
    assert point > 1
    weights = torch.where(sign > 0, 1.0, 1.5)
    wanted = (weights * (1 - torch.sigmoid(0.1 * sign * (ratios[0] - point)))).mean()
    found = recipe.loss(model.requires_grad_(True)(**batch), batch)
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


def test_kto_is_evaluated_after_a_window_that_was_left(settings):
    recipe = make_recipe(Preference, *settings, "--data.loss", "kto", "--budget.micro_batch_size", "3")
    training, validation = recipe.read_examples()
    accelerator = Accelerator(cpu=True)
    windows, others = make_windows(recipe, training, validation, accelerator)
    model = make_model(recipe)
    recipe.before_training(model, [training, validation], accelerator)
    model = accelerator.prepare(model)
    options = {"accelerator": accelerator, "compute_loss": recipe.loss, "predict": recipe.predict}
    before = evaluate(model, others, **options).predictions
    for window in windows:
        recipe.loss.look_ahead(model, window)
        for batch in window:
            recipe.loss(model(**batch), batch)
            break
        break
    assert np.array_equal(evaluate(model, others, **options).predictions, before)


def test_an_example_of_kto_has_an_answer_to_another_prompt_of_the_same_kind(settings):
    recipe = make_recipe(Preference, *settings, "--data.loss", "kto")
    training, validation = recipe.read_examples()
    assert (len(training), len(validation)) == (42, 10)
    decode = recipe.tokenizer.decode
    rows = [(decode(row["input_ids"]), decode(row["kl_input_ids"]), row["desirable"]) for row in training]
    for number, (own, other, desirable) in enumerate(rows):
        (prompt, answer), (same, wrong) = (text.split("assistant\n") for text in (own, other))
        assert prompt == same
        assert wrong.strip() == rows[number - 2][0].split("assistant\n")[1].strip()
        assert desirable == (number % 2 == 0) == (not answer.strip().endswith(".</s>"))


def test_answers_to_one_prompt_are_held_out_together(settings):
    rows = [{"prompt": f"q{i // 2}", "completion": f"a{i}", "label": i % 2 == 0} for i in range(40)]
    flags = merged(settings, ["--data.loss", "kto", "--data.train", write_rows("kto.jsonl", rows)])
    place = flags.index("--data.validation") if "--data.validation" in flags else None
    flags = flags[:place] + flags[place + 2 :] if place is not None else flags
    recipe = make_recipe(Preference, *flags)
    prompts = [
        {recipe.tokenizer.decode(row["input_ids"]).rpartition("a")[0] for row in split}
        for split in recipe.read_examples()
    ]
    assert len(prompts[1]) >= 2
    assert not prompts[0] & prompts[1]


def test_both_answers_of_a_pair_count_as_padded_to_the_longer(settings):
    recipe = make_recipe(Preference, *settings)
    training, _ = recipe.read_examples()
    batch = recipe.collate([training[0], training[1]])
    assert batch["input_ids"].shape == batch["labels"].shape == (4, recipe.lengths(training)[:2].max())
    assert (recipe.lengths(training)[:2].sum(1) == batch["attention_mask"].view(2, -1).sum(1).numpy()).all()
    assert recipe.num_items(batch) == 2
    assert batch["reference"].isnan().all()  # until they are computed


def test_weights_of_rows_weigh_pairs(settings, folder):
    write_rows(folder / "weighed.jsonl", [{**row, "weight": n % 3} for n, row in enumerate(pairs())])
    words = ["--data.train", str(folder / "weighed.jsonl"), "--data.weight_column", "weight"]
    reset_accelerate()
    recipe = make_recipe(Preference, *merged(settings, words, ["--budget.micro_batch_size", "3"]))
    training, validation = recipe.read_examples()
    accelerator = Accelerator(cpu=True)
    windows, _ = make_windows(recipe, training, validation, accelerator)
    model, reference = make_model(recipe), make_model(recipe)
    recipe.before_training(reference, [training], accelerator)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.8)
    chosen = windows.plan.indices(0, 0)
    batch = recipe.collate(windows.examples(chosen))
    scores = model(**batch).loss.view(-1, 2) - batch["reference"]
    each = softplus(-0.1 * (scores[:, 0] - scores[:, 1]))
    share = torch.tensor(recipe.example_weights[chosen]).float()
    wanted = (share * each).sum() / share.sum()
    wanted.backward()
    expected = read_gradient(model)
    model.zero_grad()
    recorder = RecordGradients(model)
    prepared = accelerator.prepare(model, recorder)
    options = {"accelerator": accelerator, "compute_loss": recipe.loss, "max_windows": 1}
    [record] = train(*prepared, windows, **options)
    assert record.loss == pytest.approx(float(wanted), rel=1e-5)
    assert relative_error(recorder.gradients[0], expected) < EXACT


def weights(run):
    return load_file(Path(run) / "last/adapter_model.safetensors")


def test_a_resumed_run_has_the_same_bits_also_without_the_cached_references(start, folder, monkeypatch):
    monkeypatch.delattr(Preference, "started_from")  # new adapters need no second model
    flags = ["--checkpoint.every", "1", "--checkpoint.keep", "9", "--train.epochs", "2"]
    outcome = start("--output.dir", "whole", *flags)
    assert "reference             the model from which training starts" in outcome.out
    before, after = summary("whole")["evaluations"][0], summary("whole")["eval"]
    assert after["loss"] < before["loss"]
    assert before["kl"] == 0 < after["kl"]
    assert {"prompt", "answer", "before training", "reference"} <= summary("whole")["samples"][0].keys()
    cut_back(Path("whole"), Path("cut"), 2)
    shutil.rmtree(folder / "cache/gradacc_hf")
    resumed = start("--output.dir", "cut", *flags, "--resume", "auto")
    assert "after window 2" in resumed.out
    assert all(
        torch.equal(a, b) for a, b in zip(weights("whole").values(), weights("cut").values(), strict=True)
    )
    assert summary("cut")["eval"] == summary("whole")["eval"]


def test_training_from_adapters_compares_with_the_model_that_they_are(start):
    start("--output.dir", "first", "--optim.lr", "0.01")
    outcome = start("--output.dir", "second", "--model.name", "first", "--train.max_windows", "1")
    assert "adapters of first on" in outcome.out
    begin = summary("second")["evaluations"][0]
    assert begin["kl"] == pytest.approx(0, abs=1e-4)
    assert begin["accuracy"] == 0.5
    assert begin["chosen_logprob"] == pytest.approx(summary("first")["best"]["chosen_logprob"], rel=1e-4)


def no_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_run_is_evaluated_on_its_own_data_without_the_model_that_it_started_from(
    start, settings, gradacc, monkeypatch
):
    model = settings[settings.index("--model.name") + 1]
    shutil.copytree(model, "model")
    whole = ["--model.name", "model", "--model.lora.rank", "0"]
    start("--output.dir", "run", *whole)
    assert summary("run")["eval"]["kl"] > 0
    with monkeypatch.context() as patch:
        patch.setattr(Preference, "started_from", no_memory)
        assert "training started: no memory is left for it" in start("--output.dir", "full", *whole).err
    assert "kl" not in summary("full")["eval"]
    shutil.rmtree("model")
    code, out, err = gradacc("evaluate", "run", "--json")
    assert code == 0, err
    assert "kl is left out, as it needs the model from which training started: " in err
    assert '"kl"' not in out
    assert '"margin"' in out


def test_a_run_answers_is_evaluated_on_other_data_verified_and_merged(start, gradacc):
    start("--output.dir", "run", "--optim.lr", "0.01")
    write_rows("other.jsonl", [{**row, "prompt": [{"role": "user", "content": "new"}]} for row in pairs(6)])
    code, out, err = gradacc("evaluate", "run", "--data", "other.jsonl", "--json")
    assert code == 0, err
    assert '"kl"' in out
    assert gradacc("predict", "run", "a question")[0] == 0
    assert gradacc("verify", "--run", "run")[0] == 0
    assert gradacc("merge", "run")[0] == 0
    assert gradacc("evaluate", "run")[1].count("the run recorded") == 0


def test_a_reward_model_scores_texts_and_rows_as_its_card_does(start, gradacc, capfd):
    start("--output.dir", "run", "--data.loss", "reward", "--optim.lr", "0.02", "--train.epochs", "3")
    found = summary("run")["best"]
    assert found["accuracy"] > 0.5
    assert found["margin"] == pytest.approx(found["chosen_score"] - found["rejected_score"])
    write_rows("rows.jsonl", pairs(3))
    code, out, err = gradacc("predict", "run", "--input", "rows.jsonl")
    assert code == 0, err
    assert out.count("chosen_score") == out.count("rejected_score") == 3
    assert '"score"' in gradacc("predict", "run", "a text")[1]
    card, given = Path("run/best/README.md").read_text(), {}
    with contextlib.chdir("run/best"):
        exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], given)
    [shown] = ast.literal_eval(capfd.readouterr().out.strip().splitlines()[-1])
    write_rows("chat.jsonl", [{"messages": given["chat"]}])
    [line] = gradacc("predict", "run", "--input", "chat.jsonl")[1].splitlines()
    assert shown["score"] == pytest.approx(json.loads(line)["score"], rel=1e-3)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--data.loss", "orpo", "--data.variant", "ipo"],
            "data.variant: found 'ipo', allowed is sigmoid, except",
        ),
        (
            ["--data.loss", "kto", "--data.label_smoothing", "0.1"],
            "data.label_smoothing: found 0.1, allowed is 0",
        ),
        (["--data.gamma", "2"], "data.gamma: found 2.0, allowed is 1, except with data.loss simpo"),
        (
            ["--data.loss", "orpo", "--data.weight_column", "w"],
            "data.weight_column: found 'w', allowed is null",
        ),
        (["--data.beta", "0"], "data.beta: found 0.0, allowed is a number above 0"),
        (["--data.streaming", "true"], "data.streaming: Preference needs all rows at once"),
        (["--data.max_length", "20"], "chosen: the text to learn begins at token"),
        (["--train.noise_every", "1", "--data.loss", "kto", "--batch.effective", "noise_scale"], "noise"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(settings, capfd, words, line):
    outcome = run_recipe(Preference, merged(settings, SMALL, words), capfd)
    assert outcome.code == 2
    assert line in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("loss", ["dpo", "ipo", "reward"])
def test_weights_of_rows_reach_the_loss_of_pairs(settings, loss):
    """The gradient of a window is that of the weighted mean, from each pair by itself."""
    rows = [{**row, "w": float(number % 3)} for number, row in enumerate(pairs())]
    write_rows("weighed.jsonl", rows)
    flags = ["--data.train", "weighed.jsonl", "--data.weight_column", "w", "--budget.micro_batch_size", "3"]
    recipe = make_recipe(Preference, *merged(settings, LOSSES[loss], flags))
    training, validation = recipe.read_examples()
    accelerator = Accelerator(cpu=True)
    windows, _ = make_windows(recipe, training, validation, accelerator)
    trained, alone = make_model(recipe), make_model(recipe)
    recipe.before_training(trained, [training, validation], accelerator)
    indices, total = windows.plan.indices(0, 0), 0.0
    weights = recipe.example_weights[indices]
    assert set(weights) == {0.0, 1.0, 2.0}
    for index, weight in zip(indices, weights, strict=True):
        batch = recipe.collate(windows.examples([index]))
        total = total + weight * recipe.loss(alone(**batch), batch)
    (total / weights.sum()).backward()
    model, optimizer = accelerator.prepare(trained, RecordGradients(trained))
    options = {"accelerator": accelerator, "compute_loss": recipe.loss, "max_windows": 1}
    [record] = train(model, optimizer, windows, **options)
    assert relative_error(optimizer.optimizer.gradients[0], read_gradient(alone)) < EXACT
    assert record.loss == pytest.approx(float(total / weights.sum()), rel=1e-5)
