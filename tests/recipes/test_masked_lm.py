"""recipes/masked_lm.py: masks that belong to the example, a head at masked positions, its command line."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from accelerate import Accelerator
from conftest import ROOT
from recipe_runs import load_recipe, make_recipe, summary, with_defaults, write_rows

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.accumulation.reference import EXACT, read_gradient, relative_error
from gradacc_hf.errors import InputError
from gradacc_hf.run.setup import make_model, make_windows
from gradacc_hf.verification.exactness import verify

MaskedLM = load_recipe("masked_lm").MaskedLM
OFFLINE = ROOT / "configs" / "masked_lm_offline.yaml"
WORDS = ["tea", "garden", "letter", "morning", "winner", "click"]


def make_rows(number=80, seed=0):
    """Texts of 1 to 60 words, each of them one word again and again: what is hidden can be seen beside it."""
    random = np.random.default_rng(seed)
    return [{"text": " ".join([random.choice(WORDS)] * random.integers(1, 60))} for _ in range(number)]


@pytest.fixture
def recipe(tiny_bert, tmp_path):
    """A recipe of these texts and settings."""

    def recipe(*settings, rows=None):
        file = write_rows(tmp_path / "texts.jsonl", rows or make_rows())
        small = {"--data.train": file, "--model.name": tiny_bert, "--data.max_length": 32}
        small |= {"--batch.effective": 16, "--model.dropout": 0}
        return make_recipe(MaskedLM, *with_defaults(settings, small))

    return recipe


def test_it_learns_what_is_hidden_and_the_saved_model_fills_it_in(start):
    data = ["--data.train", write_rows("a.jsonl", make_rows(120))]
    data += ["--data.validation", write_rows("b.jsonl", make_rows(30, seed=1))]
    outcome = start(MaskedLM, *data, "--train.epochs", 6, "--optim.lr", 3e-3, "--output.dir", "out")
    assert outcome.code == 0, outcome.err
    found = summary("out")
    assert found["eval"].keys() == {"window", "loss", "accuracy", "perplexity"}
    assert found["baseline"].keys() == {"accuracy", "perplexity"}
    assert found["eval"]["perplexity"] == pytest.approx(math.exp(found["eval"]["loss"]))
    assert found["eval"]["perplexity"] < found["baseline"]["perplexity"] - 1
    assert found["eval"]["accuracy"] > found["baseline"]["accuracy"] + 0.3
    pipeline = transformers.pipeline("fill-mask", "out/best", device="cpu")
    text = "tea tea tea [MASK] tea tea"
    best = pipeline(text)[0]
    assert best["token_str"] == "tea"
    recipe = make_recipe(MaskedLM, *data)
    model = transformers.AutoModelForMaskedLM.from_pretrained("out/best").eval()
    one, other, two = recipe.answer(model, [text, {"text": text}, "tea [MASK] tea tea [MASK]"])
    assert one == other
    assert one["fillings"][0][0] == {"token": "tea", "score": pytest.approx(best["score"])}
    assert [len(mask) for mask in two["fillings"]] == [5, 5]
    for text in ("tea tea", "tea " * 600 + "[MASK]"):
        with pytest.raises(InputError, match=r"found no \[MASK\] in the first 256 tokens"):
            recipe.answer(model, [text])


def test_long_texts_are_cut_into_chunks_and_nothing_is_thrown_away(recipe):
    recipe = recipe("--data.max_length", 10, "--data.validation", "train")
    train, _ = recipe.datasets()
    special = set(recipe.tokenizer.all_special_ids)
    lengths = [len(ids) for ids in train["input_ids"]]
    assert max(lengths) == 10 > min(lengths)
    ids = [i for chunk in train["input_ids"] for i in chunk if i not in special]
    assert ids == [
        i for row in make_rows() for i in recipe.tokenizer(row["text"], add_special_tokens=False).input_ids
    ]


def test_a_mask_is_drawn_as_bert_draws_it(recipe):
    recipe = recipe()
    text = " ".join(WORDS * 500)
    ids = np.array(recipe.tokenizer(text).input_ids)
    masked = recipe.transform({"input_ids": ids.tolist()}, np.random.default_rng(0))
    seen, labels = np.array(masked["input_ids"]), np.array(masked["labels"])
    chosen = labels != IGNORED
    assert (labels[chosen] == ids[chosen]).all()
    assert (seen[~chosen] == ids[~chosen]).all()
    assert chosen.mean() == pytest.approx(0.15, abs=0.02)
    became_mask = seen[chosen] == recipe.tokenizer.mask_token_id
    stayed = seen[chosen] == ids[chosen]
    assert became_mask.mean() == pytest.approx(0.8, abs=0.06)
    assert stayed.mean() == pytest.approx(0.1, abs=0.05)
    random = seen[chosen][~became_mask & ~stayed]
    assert len(random) / chosen.sum() == pytest.approx(0.1, abs=0.05)
    assert len(set(random)) > 0.9 * len(random)
    assert not set(random) & set(recipe.tokenizer.all_special_ids)


def test_special_tokens_are_never_masked_and_short_chunks_weigh_no_more_than_long_ones(recipe):
    """The share of masked tokens is the same in chunks of 1 token and of 20; one of them may have no item."""
    recipe = recipe("--data.masked", 0.3)
    shares = {}
    for words in (1, 20):
        ids = recipe.tokenizer(" ".join(["tea"] * words)).input_ids
        rows = [recipe.transform({"input_ids": ids}, np.random.default_rng(i)) for i in range(2000 // words)]
        labels = np.array([row["labels"] for row in rows])
        assert (labels[:, [0, -1]] == IGNORED).all()
        shares[words] = (labels[:, 1:-1] != IGNORED).mean()
    assert shares[1] == pytest.approx(0.3, abs=0.04)
    assert shares[20] == pytest.approx(0.3, abs=0.04)


def masks(windows):
    """Every example's input and labels, as the micro-batches of one epoch hold them."""
    found = {}
    for window in windows:
        for batch in window.batches():
            for index, ids, labels, real in zip(
                window.micro_batch.indices,
                batch["input_ids"],
                batch["labels"],
                batch["attention_mask"].bool(),
                strict=True,
            ):
                assert (labels[~real] == IGNORED).all()
                found[int(index)] = (ids[real].tolist(), labels[real].tolist())
    return found


def loaders(recipe, *settings):
    recipe = recipe(*settings)
    return make_windows(recipe, *recipe.datasets(), Accelerator(cpu=True))


def test_the_masks_are_the_same_for_any_split_any_workers_and_after_resuming(recipe):
    windows, validation = loaders(recipe, "--budget.max_tokens", 64)
    first, second = masks(windows), masks(windows)  # two epochs
    assert len(first) > 60
    assert first != second
    for settings in (
        ["--budget.micro_batch_size", 1],
        ["--budget.num_workers", 2],
        ["--budget.max_tokens", 999],
    ):
        other, other_validation = loaders(recipe, *settings)
        found = masks(other)
        shared = found.keys() & first.keys()
        assert shared
        assert all(found[i] == first[i] for i in shared)
        other.load_state_dict({"seed": 0, "epoch": 1, "window": 2})
        rest = masks(other)
        assert 0 < len(rest) < len(first)
        assert all(rest[i] == second[i] for i in rest.keys() & second.keys())
        for _ in range(2):  # those of validation are the same at each evaluation
            assert drawn(other_validation) == drawn(validation)
    for epoch, expected in enumerate((first, second)):
        for process in range(2):  # as each of two processes collates its own
            micro_batches = windows.collate_window(epoch, 0, process=process, num_processes=2)
            assert micro_batches
            for micro_batch in micro_batches:
                for labels, index in zip(
                    micro_batch.batch["labels"], micro_batch.indices.tolist(), strict=True
                ):
                    if index in expected:  # not one that has no item
                        assert labels[: len(expected[index][1])].tolist() == expected[index][1]
    other_seed, _ = loaders(recipe, "--train.seed", 1)
    assert masks(other_seed) != first


def drawn(validation):
    return {
        int(index): [label for label in labels.tolist() if label != IGNORED]
        for micro_batch, batch in validation.micro_batches()
        for index, labels in zip(micro_batch.indices, batch["labels"], strict=True)
    }


def test_the_accumulated_gradient_is_that_of_the_window_at_once(recipe):
    settings = ["--budget.max_tokens", 96, "--batch.effective", 32]
    windows, _ = loaders(recipe, *settings)
    made = recipe(*settings)
    found = verify(make_model(made), windows, made.loss, num_windows=2)
    assert min(found.accumulation_steps) > 2
    assert found.exact
    assert found.loop.error < EXACT < found.trainer.error


def test_the_head_at_masked_positions_gives_the_loss_and_gradient_of_the_whole_head(recipe):
    made = recipe()
    windows, _ = loaders(recipe)
    batch = windows.collated(range(12)).batch
    model = make_model(made)
    whole = transformers.AutoModelForMaskedLM.from_pretrained(made.model_path, config=model.config)
    whole.load_state_dict(model.state_dict())
    outputs = model(**batch)
    assert outputs.logits.shape == ((batch["labels"] != IGNORED).sum(), model.config.vocab_size)
    loss, expected = made.loss(outputs, batch), whole(**batch).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    assert relative_error(read_gradient(model), read_gradient(whole)) < EXACT
    everything = SimpleNamespace(logits=whole(**batch).logits)  # of a head that cannot be cut down
    assert made.loss(everything, batch).item() == pytest.approx(expected.item(), rel=1e-6)
    without = {name: value for name, value in batch.items() if name != "labels"}
    assert model(**without).logits.shape == everything.logits.shape
    predictions, references = made.predict(outputs, batch)
    for row, labels in enumerate(batch["labels"]):
        there = labels != IGNORED
        assert references[row].tolist() == labels[there].tolist()
        assert predictions[row].tolist() == everything.logits[row][there].argmax(-1).tolist()


def test_an_example_without_masked_token_has_no_items_and_is_handled(recipe):
    rows = [{"text": "tea"}] * 40  # one token each: most have none
    made = recipe("--budget.micro_batch_size", 2, "--batch.effective", 18, rows=rows)
    windows, validation = make_windows(made, *made.datasets(), Accelerator(cpu=True))
    items = [window.num_items for window in windows]
    assert 0 < sum(items) < 18
    assert windows.empty_micro_batches > 0
    found = made.validate(make_model(made), validation, windows.accelerator)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_the_baseline_is_the_frequency_of_tokens_in_training(recipe):
    made = recipe(rows=[{"text": "tea tea tea garden"}] * 20)
    found = made.baseline(*made.datasets())
    size = made.ordinary.sum()
    of_tea, of_garden = ((n * 18 + 1) / (4 * 18 + size) for n in (3, 1))
    assert found["accuracy"] == pytest.approx(0.75)
    assert found["perplexity"] == pytest.approx(
        math.exp(-0.75 * math.log(of_tea) - 0.25 * math.log(of_garden))
    )


def test_the_hub_config_leaves_out_the_blank_lines_of_wikitext():
    recipe = make_recipe(MaskedLM, "--config", ROOT / "configs" / "masked_lm.yaml")
    assert (recipe.data.train, recipe.data.config_name) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert recipe.data.on_bad_row == "skip"


# Bad input


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"text": ""}, "a.jsonl line 7: the text is empty"),
        ({"text": " \n "}, "a.jsonl line 7: the text is empty"),
        ({"text": None}, "a.jsonl line 7: the text is empty"),
    ],
)
def test_an_empty_text_is_named_or_skipped(start, refused, row, line):
    rows = make_rows(40)
    rows[6] = row
    data = [
        "--data.train",
        write_rows("a.jsonl", rows),
        "--data.validation",
        write_rows("b.jsonl", make_rows(20)),
    ]
    message = refused(MaskedLM, *data)
    assert line in message
    assert "--data.on_bad_row skip" in message
    outcome = start(MaskedLM, *data, "--data.on_bad_row", "skip", "--check")
    assert outcome.code == 0, outcome.err
    assert f"1 row that cannot be used, the first: {line}" in outcome.out


def test_what_cannot_be_masked_is_refused(refused, tiny_bert):
    write_rows("a.jsonl", make_rows(40))
    write_rows("b.jsonl", [{"text": 12}] * 40)
    assert "b.jsonl line 1: " in (line := refused(MaskedLM, "--data.train", "b.jsonl"))
    assert "found 12, not a text" in line
    line = refused(MaskedLM, "--data.train", "a.jsonl", "--data.text_column", "texts")
    assert "data.text_column: no column 'texts'; found text; did you mean 'text'?" in line
    line = refused(MaskedLM, "--data.train", "a.jsonl", "--data.max_length", 2)
    assert "data.max_length: found 2, and 2 special tokens frame every chunk; allowed: 3 or more" in line
    line = refused(MaskedLM, "--data.train", "a.jsonl", "--data.masked", 0)
    assert "--data.masked: found 0" in line
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.mask_token = None
    transformers.AutoModel.from_pretrained(tiny_bert).save_pretrained("maskless")
    tokenizer.save_pretrained("maskless")
    line = refused(MaskedLM, "--data.train", "a.jsonl", "--model.name", "maskless")
    assert "model.name: maskless has no mask token; use a masked language model" in line
