"""The contrastive loss of a window is that of all its pairs together, however the window is cut."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from conftest import ROOT
from contrastive_pairs import LENGTHS, collate, embedder, num_pairs, pairs
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from gradacc_hf import WindowLoader, metrics, train, verify
from gradacc_hf.accumulation.accelerate_state import reset_accelerate
from gradacc_hf.accumulation.gradient_cache import (
    COLUMNS,
    ContrastiveLoss,
    Embedder,
    info_nce,
    right_answers,
    search,
    search_positives,
    text_numbers,
)
from gradacc_hf.accumulation.reference import (
    EXACT,
    RecordGradients,
    read_gradient,
    relative_error,
    whole_window_gradient,
)
from gradacc_hf.accumulation.splitting import bounding_lengths
from gradacc_hf.config.schema import BatchConfig, Config, with_settings
from gradacc_hf.embedded import minilm_path
from gradacc_hf.errors import InputError
from gradacc_hf.metrics.retrieval import chance
from gradacc_hf.recipe.loading import load_recipe as read_recipe
from gradacc_hf.run.runner import run
from gradacc_hf.run.setup import make_windows
from gradacc_hf.training.settings import ModelConfig
from gradacc_hf.utils.modeling import checkpoint_activations
from gradacc_hf.utils.rng import random_state, set_random_state

SETTINGS = [(True, 2), (False, 2), (True, 3), (False, 3)]  # symmetric, columns
NAMES = ["symmetric", "one way", "symmetric, hard negatives", "one way, hard negatives"]


def load_recipe():
    spec = importlib.util.spec_from_file_location("contrastive_recipe", ROOT / "recipes/contrastive.py")
    sys.modules["contrastive_recipe"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Contrastive


def window_loader(examples, size=22, **split):
    accelerator = Accelerator(cpu=True, mixed_precision=split.pop("mixed_precision", "no"))
    lengths = np.array([[len(column) for column in e.values()] for e in examples])
    settings = {"accelerator": accelerator, "collate_fn": collate, "num_items": num_pairs, "lengths": lengths}
    return WindowLoader(examples, size, **settings, **(split or {"max_tokens": 160}))


def accumulated(model, windows, loss):
    """Of each window of an epoch: the gradient that reaches the optimizer, and its loss."""
    recorder = RecordGradients(model)
    prepared, optimizer = windows.accelerator.prepare(model, recorder)
    records = train(prepared, optimizer, windows, accelerator=windows.accelerator, compute_loss=loss)
    return recorder.gradients, [record.loss for record in records]


@pytest.mark.parametrize(("symmetric", "columns"), SETTINGS, ids=NAMES)
def test_a_window_cut_unequally_has_the_gradient_and_the_loss_of_all_its_pairs_at_once(symmetric, columns):
    examples, loss = pairs(columns), ContrastiveLoss(0.1, symmetric)
    windows = window_loader(examples, size=15)
    sizes = [[len(piece) for piece in windows.split(0, t).processes[0]] for t in range(2)]
    assert all(len(set(window)) > 1 for window in sizes)  # else a mean of means would do
    gradients, losses = accumulated(embedder(), windows, loss)
    for t, (gradient, value) in enumerate(zip(gradients, losses, strict=True)):
        batch = collate([examples[i] for i in windows.plan.indices(0, t)])
        reference = embedder()
        assert relative_error(gradient, whole_window_gradient(reference, batch, loss)) <= EXACT
        assert value == pytest.approx(loss(reference(**batch), batch).item(), rel=1e-6)


def test_plain_accumulation_of_losses_with_in_batch_negatives_is_not_that():
    loss, examples = ContrastiveLoss(0.1), pairs()
    [gradient], [value] = accumulated(embedder(), window_loader(examples), lambda e, b: loss(e, b))
    batch = collate(examples)
    assert relative_error(gradient, whole_window_gradient(embedder(), batch, loss)) > 0.1
    assert value < loss(embedder()(**batch), batch).item() - 0.5


def test_info_nce_is_the_formula():
    e = torch.nn.functional.normalize(torch.randn(4, 3, 8, dtype=torch.float64), dim=-1)
    anchors, positives, negatives = e.unbind(1)
    forth, back = 0.0, 0.0
    for i in range(4):
        candidates = [anchors[i] @ other / 0.1 for other in (*positives, *negatives)]
        forth -= (candidates[i] - torch.stack(candidates).exp().sum().log()) / 4
        others = [positives[i] @ other / 0.1 for other in anchors]
        back -= (others[i] - torch.stack(others).exp().sum().log()) / 4
    torch.testing.assert_close(info_nce(e, 0.1, symmetric=False), forth)
    torch.testing.assert_close(info_nce(e, 0.1, symmetric=True), (forth + back) / 2)


def test_a_window_larger_than_a_strip_of_similarities_has_the_same_loss_and_gradient(monkeypatch):
    e = torch.randn(11, 3, 8)
    whole = ContrastiveLoss().of_all(e)
    monkeypatch.setattr("gradacc_hf.accumulation.gradient_cache.SIMILARITY_ROWS", 4)
    for part, other in zip(whole, ContrastiveLoss().of_all(e), strict=True):
        torch.testing.assert_close(part, other)


def with_equal_texts(columns=2):
    """Pairs of which some share a positive, an anchor, both, or a positive with a hard negative."""
    examples = pairs(columns)
    for to, of, column in [
        (21, 0, "positive"),
        (11, 0, "positive"),
        (20, 1, "anchor"),
        (12, 1, "anchor"),
        (12, 2, "positive"),
        (19, 3, "positive"),
        (19, 3, "anchor"),
    ]:
        examples[to][column] = examples[of][column]
    if columns == 3:
        examples[5]["negative"] = examples[0]["positive"]
        examples[0]["negative"] = examples[0]["positive"]
    return examples


def masked_by_hand(examples, embeddings, symmetric, temperature=0.1):
    """The loss pair by pair: a right answer of another pair is no candidate."""
    anchors, positives = ([tuple(e[column]) for e in examples] for column in COLUMNS[:2])
    rights, total, e = set(zip(anchors, positives, strict=True)), 0.0, embeddings
    for i, anchor in enumerate(anchors):
        candidates = [e[i, 1]]
        for c, column in enumerate(list(examples[0])[1:], 1):
            for j, other in enumerate(examples):
                if (i, 1) != (j, c) and (anchor, tuple(other[column])) not in rights:
                    candidates.append(e[j, c])
        forth = torch.stack(candidates) @ e[i, 0] / temperature
        total = total - forth.log_softmax(0)[0] / len(examples) / (1 + symmetric)
        if symmetric:
            others = [j for j in range(len(examples)) if j != i and (anchors[j], positives[i]) not in rights]
            back = e[[i, *others], 0] @ e[i, 1] / temperature
            total = total - back.log_softmax(0)[0] / len(examples) / 2
    return total


@pytest.mark.parametrize(("symmetric", "columns"), SETTINGS, ids=NAMES)
def test_equal_texts_are_not_negatives_however_a_window_is_split(symmetric, columns):
    examples, loss = with_equal_texts(columns), ContrastiveLoss(0.1, symmetric)
    windows = window_loader(examples)
    assert len(windows.split(0, 0).processes[0]) >= 3
    [gradient], [value] = accumulated(embedder(), windows, loss)
    reference, batch = embedder(), collate(examples)
    expected = masked_by_hand(examples, reference(**batch), symmetric)
    expected.backward()
    assert relative_error(gradient, read_gradient(reference)) <= EXACT
    assert value == pytest.approx(expected.item(), rel=1e-5)
    unmasked = info_nce(embedder()(**batch), 0.1, symmetric)
    assert abs(unmasked.item() - expected.item()) > 0.01


def test_strips_leave_out_equal_texts_alike(monkeypatch):
    e, texts = torch.randn(11, 3, 8), torch.randint(0, 9, (11, 3))
    whole, value = ContrastiveLoss().of_all(e, texts), ContrastiveLoss().value(e, texts)
    monkeypatch.setattr("gradacc_hf.accumulation.gradient_cache.SIMILARITY_ROWS", 4)
    for part, other in zip(whole, ContrastiveLoss().of_all(e, texts), strict=True):
        torch.testing.assert_close(part, other)
    assert ContrastiveLoss().value(e, texts) == pytest.approx(value)


def test_the_number_of_a_text_depends_on_the_tokens_and_not_on_the_padding():
    tokens = [[5, 6], [6, 5], [5, 6, 0], [0, 5, 6], [5], [11]]

    def numbers(left, width):
        def padded(row):
            padding = [0] * (width - len(row))
            return padding + row if left else row + padding

        batch = {
            "anchor_input_ids": torch.tensor([padded(row) for row in tokens]),
            "anchor_attention_mask": torch.tensor([padded([1] * len(row)) for row in tokens]),
        }
        return text_numbers(batch)[:, 0].tolist()

    assert len(set(numbers(left=False, width=3))) == len(tokens)
    assert numbers(left=False, width=3) == numbers(left=True, width=7)
    assert text_numbers({"pixel_values": torch.ones(2)}) is None


def test_all_positives_of_an_anchor_are_right_and_equal_ones_are_one_candidate():
    anchors, positives = ["a", "b", "a", "c"], ["x", "x", "y", "z"]
    assert right_answers(anchors, positives) == [[0, 2], [0], [0, 2], [3]]
    texts = torch.tensor([[10, 1], [11, 1], [10, 2], [12, 3]])
    embeddings = torch.zeros(4, 2, 3)
    embeddings[range(4), 1, [0, 0, 1, 2]] = 1  # x, x, y, z
    embeddings[:, 0] = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.2, 0.1], [0.1, 0.9, 0.5], [0.5, 0.4, 0.1]])
    ids, right = search_positives(embeddings, texts, 10)
    assert ids == [[2, 3, 0], [0, 2, 3], [2, 3, 0], [0, 2, 3]]
    assert right == [[0, 2], [0], [0, 2], [3]]
    scores = metrics.load("retrieval").compute(predictions=ids, references=right)
    assert scores["recall_at_1"] == pytest.approx(3 / 4)
    assert scores["mrr_at_10"] == pytest.approx((1 + 1 + 1 + 1 / 3) / 4)
    orders = [min(order.index(0), order.index(1)) + 1 for order in itertools.permutations(range(5))]
    assert chance(5, [2])["mrr_at_10"] == pytest.approx(np.mean([1 / rank for rank in orders]))


def test_with_dropout_both_passes_draw_the_same_masks_and_the_gradient_is_that_of_these_masks():
    examples, loss, model = pairs(), ContrastiveLoss(0.1), embedder(dropout=0.1)
    windows = window_loader(examples)
    states, seen = [], []

    class Watched(torch.nn.Module):  # the model, with a note of what each forward draws and gives
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, **batch):
            states.append((random_state(windows.accelerator.device), batch))
            seen.append(self.inner(**batch))
            return seen[-1]

    torch.manual_seed(3)
    [gradient], [value] = accumulated(Watched(), windows, loss)
    half = len(seen) // 2
    assert half >= 3
    for first, second in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(first, second)
    assert not torch.allclose(seen[0], model(**states[0][1]), atol=1e-2)  # other masks: there is dropout
    model.zero_grad()
    embeddings = []
    for state, batch in states[:half]:  # one graph of the whole window, drawing the same
        set_random_state(state, windows.accelerator.device)
        embeddings.append(model(**batch))
    reference = info_nce(torch.cat(embeddings), 0.1, symmetric=True)
    reference.backward()
    assert relative_error(gradient, {f"inner.{n}": g for n, g in read_gradient(model).items()}) <= EXACT
    assert value == pytest.approx(reference.item(), rel=1e-6)


def test_a_model_that_draws_elsewhere_than_from_torch_is_noticed():
    class Noisy(Embedder):
        def forward(self, **batch):
            noise = np.random.default_rng().normal(size=32).astype(np.float32)
            return torch.nn.functional.normalize(super().forward(**batch) + torch.from_numpy(noise), dim=-1)

    with pytest.raises(RuntimeError, match=r"embeddings of micro-batch 0 differ by .* between the two"):
        accumulated(Noisy(embedder().encoder), window_loader(pairs()), ContrastiveLoss())


def test_bf16_and_checkpointing_come_close_to_float32():
    examples, loss, model = pairs(), ContrastiveLoss(0.1), embedder()
    whole = whole_window_gradient(model, collate(examples), loss)
    checkpoint_activations(model)
    [gradient], _ = accumulated(model, window_loader(examples, mixed_precision="bf16"), loss)
    assert relative_error(gradient, whole) < 0.1
    assert relative_error(gradient, whole) > EXACT  # else it did not run in bf16


def test_the_loss_is_computed_in_float32_where_its_caller_has_autocast_on():
    embeddings = torch.randn(5, 2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce(embeddings, 0.1, True)
    assert torch.equal(inside, info_nce(embeddings, 0.1, True))


def test_a_window_of_one_micro_batch_is_embedded_once():
    model, calls = embedder(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    accumulated(model, window_loader(pairs(lengths=LENGTHS[:2]), size=2, max_tokens=512), ContrastiveLoss())
    assert len(calls) == 1


def test_verify_finds_it_exact_and_trainer_not():
    found = verify(embedder(dropout=0.1), window_loader(pairs(3)), ContrastiveLoss(0.1))
    assert found.exact
    assert found.loop.error <= EXACT
    assert found.trainer is not None
    assert not found.trainer.exact


def test_any_micro_batch_holds_its_bound_though_columns_are_padded_on_their_own():
    tokens = np.random.default_rng(2).integers(1, 200, size=(300, 2))
    lengths = bounding_lengths(tokens).sum(1)
    assert (lengths >= tokens.sum(1)).all()
    assert lengths.max() == tokens.max(0).sum()
    draw = np.random.default_rng(3)
    for _ in range(200):
        some = draw.choice(300, size=draw.integers(1, 20))
        assert tokens[some].max(0).sum() <= lengths[some].max()


def test_planned_tokens_are_those_of_the_batches_and_hold_the_bound():
    windows, columns = window_loader(pairs(3), size=22, max_tokens=160), ("anchor", "positive", "negative")
    for window in windows:
        sizes, tokens = [], 0
        for batch in window.batches():
            sizes.append(sum(batch[f"{column}_input_ids"].numel() for column in columns))
            tokens += sum(int(batch[f"{column}_attention_mask"].sum()) for column in columns)
            assert sizes[-1] <= 160 or len(window.micro_batch.indices) == 1
        assert (window.padded_tokens, window.tokens) == (sum(sizes), tokens)


def test_retrieval_metrics_by_hand():
    found = [[4, 2, 9], [1, 0, 5], [7, 8, 2], [3, 6, 0]]
    scores = metrics.load("retrieval").compute(predictions=found, references=[4, 5, 2, 1])
    assert scores["recall_at_1"] == pytest.approx(1 / 4)
    assert scores["recall_at_10"] == pytest.approx(3 / 4)
    assert scores["mrr_at_10"] == pytest.approx((1 + 1 / 3 + 1 / 3 + 0) / 4)
    with pytest.raises(InputError, match="ids of candidates"):
        metrics.load("retrieval").compute(predictions=[0.5], references=[1])


def test_search_gives_the_nearest_first(monkeypatch):
    monkeypatch.setattr("gradacc_hf.accumulation.gradient_cache.SIMILARITY_ROWS", 2)
    candidates = torch.eye(3)
    queries = torch.tensor([[0.1, 0.9, 0.3], [1.0, 0.2, 0.0], [0.0, 0.1, 0.7]])
    scores, ids = search(queries, candidates, 2)
    assert ids.tolist() == [[1, 2], [0, 1], [2, 1]]
    assert scores[0].tolist() == pytest.approx([0.9, 0.3])
    assert search(queries, candidates, 10)[1].shape == (3, 3)


# The recipe, through its command line

Contrastive = load_recipe()
NOUNS = ["tea", "garden", "letter", "morning", "river", "bread", "window", "music", "winter", "stone"]
VERBS = ["drink", "plant", "write", "see", "cross", "bake", "open", "play", "fear", "throw"]


def make_rows(number=60, seed=0):
    """A noun and a verb each; the positive has them the other way round, the negative has another verb."""
    draw, rows = np.random.default_rng(seed), []
    for i in range(number):
        noun, verb = NOUNS[i % 10], VERBS[(i // 10) % 10]
        filler = " ".join(["the"] * int(draw.integers(0, 12)))
        wrong = VERBS[int(draw.integers(10))]
        rows.append({"anchor": f"{noun} {verb}", "positive": f"to {verb} {filler} {noun}"})
        rows[-1]["negative"] = f"to {wrong} {noun}"
    return rows


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """A BERT of 2 layers with MiniLM's tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    embedder(vocab_size=len(tokenizer), initializer_range=0.02).encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def start(tiny_bert, tmp_path, monkeypatch, capfd):
    """The recipe's command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def start(**flags):
        settings = {
            "model.name": tiny_bert,
            "model.dropout": 0.1,
            "data.max_length": 32,
            "batch.effective": 20,
            "budget.max_tokens": 160,
            "optim.lr": 3e-3,
            "output.tracker": "none",
            **{key.replace("__", "."): value for key, value in flags.items()},
        }
        reset_accelerate()
        capfd.readouterr()
        code = 0
        try:
            run(Contrastive, [word for key, value in settings.items() for word in (f"--{key}", str(value))])
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()

    return start


def summary(folder):
    return json.loads(Path(folder, "summary.json").read_text())


@pytest.mark.parametrize("name", ["contrastive", "contrastive_offline"])
def test_its_configs_fit_its_settings(name):
    recipe = read_recipe(["--config", str(ROOT / "configs" / f"{name}.yaml")])
    assert type(recipe).__name__ == "Contrastive"
    assert list(recipe.columns) == ["anchor", "positive", "negative"][: 2 + (name == "contrastive")]


@pytest.mark.parametrize("columns", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_learns_to_find_and_leaves_an_encoder(start, columns):
    hard = {"data__negative_column": "negative"} if columns == 3 else {}
    train, validation = write("train.jsonl", make_rows(100)), write("validation.jsonl", make_rows(100, 1))
    settings = {"data__train": train, "data__validation": validation, "train__epochs": 8}
    code, out, err = start(**settings, **hard, train__eval_on_start="true", output__dir="out")
    assert code == 0, err
    assert "report: out/report.html" in out
    found = summary("out")
    before, after = found["evaluations"][0], found["eval"]
    assert before["window"] == 0
    assert before.keys() == after.keys() == {"window", "loss", "recall_at_1", "recall_at_10", "mrr_at_10"}
    assert found["baseline"] == pytest.approx(
        {"recall_at_1": 0.01, "recall_at_10": 0.1, "mrr_at_10": sum(1 / r for r in range(1, 11)) / 100}
    )
    assert after["recall_at_10"] > max(0.5, before["recall_at_10"])
    assert after["loss"] < before["loss"]
    assert found["accumulation_steps"]["min"] > 1
    assert found["samples"][0]["anchor"] == "tea drink"
    # what it leaves: the same embeddings in transformers, and in sentence-transformers
    encoder = AutoModel.from_pretrained("out/last")
    tokenizer = transformers.AutoTokenizer.from_pretrained("out/last")
    vector = Embedder(encoder).embed(["tea drink"], tokenizer, 32)
    assert vector.norm().item() == pytest.approx(1)
    np.testing.assert_allclose(
        SentenceTransformer("out/last", device="cpu").encode(["tea drink"]), vector, atol=1e-5
    )


def test_pairs_with_three_different_answers_are_learned_and_found(start):
    topics = {"price": "It costs a coin.", "place": "It is in Rome.", "time": "It opens at nine."}
    rows = [{"anchor": f"question {i} about {t}", "positive": topics[t]} for i in range(30) for t in topics]
    rows[0]["anchor"] = rows[1]["anchor"]  # with two right answers
    data = {"data__train": write("a.jsonl", rows), "data__validation": write("b.jsonl", rows)}
    code, out, err = start(**data, train__epochs=6, output__dir="out")
    assert code == 0, err
    found = summary("out")
    line = "90 training pairs have 89 different anchors and 3 different positives: equal texts are not"
    assert line in " ".join(out.split())
    assert ["equal texts", f"{line} negatives"] in found["reading"]["lines"]
    assert found["baseline"]["recall_at_1"] == pytest.approx((88 / 3 + 2 * 2 / 3) / 90)
    assert found["eval"]["recall_at_10"] == 1.0  # of three different candidates
    assert found["eval"]["recall_at_1"] > 0.9
    assert found["eval"]["loss"] < 0.5  # with equal texts as negatives, at least log(30)


def recipe_of(rows, tiny_bert, **data):
    settings = Contrastive.Data(train=write("rows.jsonl", rows), max_length=32, **data)
    return Contrastive(Config(model=ModelConfig(name=str(tiny_bert)), data=settings, batch=BatchConfig(20)))


def test_it_answers_a_text_and_a_row_with_the_nearest_validation_rows(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(make_rows(), tiny_bert)
    candidates = recipe.datasets()[1]["positive_text"][:]
    for model in (recipe.model(), recipe.load(tiny_bert)):
        first, second = recipe.answer(model, [candidates[2], {"anchor": "tea drink"}])
        assert first["found"][0] == {"score": pytest.approx(1, abs=1e-5), "text": candidates[2]}
        assert len(second["found"]) == 5
        scores = [hit["score"] for hit in second["found"]]
        assert scores == sorted(scores, reverse=True)


def test_verify_says_of_the_recipe_that_it_is_exact(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(make_rows(), tiny_bert, negative_column="negative")
    recipe = recipe.with_config(with_settings(recipe.config, {"budget.max_tokens": 200}))
    windows, _ = make_windows(recipe, *recipe.datasets(), Accelerator(cpu=True))
    found = verify(recipe.model(), windows, recipe.loss)
    assert found.exact
    assert found.accumulation_steps[0] >= 3


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"positive": None}, "unpaired: its positive is empty or not text"),
        ({"positive": "  "}, "unpaired: its positive is empty or not text"),
        ({"anchor": None}, "unpaired: its anchor is empty or not text"),
        ({"positive": "\u200b"}, "no token of its positive is left at data.max_length 32"),
    ],
)
def test_an_unpaired_row_is_one_line_with_its_number_or_left_out(start, row, reason):
    rows = make_rows()
    rows[0] |= row
    rows[7] |= row
    data = {"data__train": write("a.jsonl", rows), "data__validation": write("b.jsonl", make_rows())}
    code, _, err = start(**data)
    cure = "(the first of 2 bad rows); correct it, or leave such rows out: --data.on_bad_row skip"
    assert (code, err) == (2, f"error: data.train: a.jsonl line 1: {reason} {cure}\n")
    code, out, err = start(**data, data__on_bad_row="skip", output__dir="out")
    assert code == 0, err
    assert f"2 rows that cannot be used, the first: a.jsonl line 1: {reason}" in out
    assert summary("out")["skipped_rows"]["first"][1].startswith("a.jsonl line 8: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data__anchor_column": "anker"}, "data.anchor_column: no column 'anker'"),
        ({"data__negative_column": "nothing"}, "data.negative_column: no column 'nothing'"),
        ({"data__temperature": 0}, "--data.temperature"),
        ({"data__max_length": 2}, ": no token of its anchor is left at data.max_length 2"),
        ({"data__max_length": 65}, "data.max_length: found 65; allowed: 1 to 64"),
        ({"batch__effective": 1}, "batch.effective: found 1; allowed: 2 or more"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line(start, settings, message):
    code, _, err = start(**{"data__train": write("a.jsonl", make_rows()), **settings})
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
