"""recipes/question_answering.py: exact though padding reaches the head's own softmax; long texts in parts."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import Accelerator
from conftest import ROOT
from recipe_runs import load_recipe as load_task
from recipe_runs import run_file

from gradacc_hf import embedded
from gradacc_hf.accumulation.loss_items import IGNORED, model_loss
from gradacc_hf.accumulation.reference import EXACT
from gradacc_hf.config.schema import with_settings
from gradacc_hf.errors import InputError
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.run.setup import make_model, make_windows
from gradacc_hf.tasks.spans import context_logits
from gradacc_hf.verification.exactness import verify

OFFLINE = ROOT / "configs/question_answering_offline.yaml"
WORDS = ["tea", "garden", "letter", "morning", "prize", "cash", "winner", "click", "river", "stone"]


GOOD_CONTEXT = "It was Ada who did."
GOOD = {
    "question": "Who?",
    "context": GOOD_CONTEXT,
    "answers": {"text": ["Ada"], "answer_start": [7]},
}


def make_rows(number=40, seed=0):
    """Contexts of 5 to 120 words; the answer is the word or two after the word that is asked for."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        words = draw.choices(WORDS, k=draw.choice([5, 8, 12, 20, 120]))
        at = draw.randrange(1, len(words) - 1)
        words[at - 1] = f"key{draw.randrange(9)}"
        answer = " ".join(words[at : at + draw.randint(1, 2)])
        start = len(" ".join(words[:at])) + 1
        question = f"What comes after {words[at - 1]}?"
        rows.append(
            {
                "question": question,
                "context": " ".join(words),
                "answers": {"text": [answer], "answer_start": [start]},
            }
        )
    return rows


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def without_answer(rows, every=3):
    """The rows; every third has no answer."""
    return [
        row | {"answers": {"text": [], "answer_start": []}} if i % every == 0 else row
        for i, row in enumerate(rows)
    ]


@pytest.fixture
def make(tiny_bert, tmp_path, monkeypatch):
    """A recipe on rows of a file, with its two data sets."""
    monkeypatch.chdir(tmp_path)

    def make(rows, model=tiny_bert, **flags):
        settings = {"max_length": 32, "doc_stride": 8, **flags}
        recipe = load_recipe(
            ["--config", str(OFFLINE), "--model.name", str(model), "--data.train", write("a.jsonl", rows)]
            + ["--data.validation", "a.jsonl", "--model.dropout", "0", "--batch.effective", "16"]
            + [word for name, value in settings.items() for word in (f"--data.{name}", str(value))]
        )
        return recipe, *recipe.datasets()

    return make


def windows_of(recipe, train, validation):
    changes = {"budget.micro_batch_size": 3, "budget.max_tokens": "auto"}
    recipe = recipe.with_config(with_settings(recipe.config, changes))
    return make_windows(recipe, train, validation, Accelerator(cpu=True))[0]


def test_the_loss_is_exact_and_the_heads_own_is_not(make):
    recipe, *data = make(make_rows())
    windows, model = windows_of(recipe, *data), make_model(recipe)
    found = verify(model, windows, recipe.loss, num_windows=2)
    assert found.exact, found.verdict
    assert found.loop.error <= EXACT
    assert min(found.accumulation_steps) > 3
    own = verify(model, windows, model_loss, trainer=False)
    assert own.loop.error > 100 * EXACT
    assert any("padding" in reason.what for reason in own.reasons)


def test_questions_without_an_answer_are_exact(make):
    recipe, *data = make(without_answer(make_rows()))
    assert recipe.no_answer
    assert IGNORED not in data[0]["start_positions"]
    assert {start for start, row in zip(data[0]["start_positions"], data[0], strict=True)} > {0}
    found = verify(make_model(recipe), windows_of(recipe, *data), recipe.loss, num_windows=2)
    assert found.exact, found.verdict
    assert found.loop.error <= EXACT
    assert min(found.accumulation_steps) > 3


def test_the_loss_of_no_answer_is_at_the_first_token(make):
    """Computed by hand: a softmax over [CLS] and the context, of all rows at once."""
    recipe, train, _ = make(without_answer(make_rows()))
    batch = recipe.collate([row for row in train if row["start_positions"] == 0][:5])
    outputs = make_model(recipe).eval()(**batch)
    expected = 0
    for row, ids in enumerate(batch["input_ids"].tolist()):
        separators = [at for at, token in enumerate(ids) if token == recipe.tokenizer.sep_token_id]
        inside = [0, *range(separators[0] + 1, separators[1])]
        for logits in (outputs.start_logits, outputs.end_logits):
            expected -= logits[row, inside].log_softmax(0)[0] / 10
    torch.testing.assert_close(recipe.loss(outputs, batch), expected)


def test_the_threshold_is_found_on_validation_rows_saved_and_used(make, tmp_path):
    rows = [GOOD, GOOD | {"question": "Why?", "answers": {"text": [], "answer_start": []}}] * 8
    recipe, train, validation = make(rows)
    places = zip(validation["start_positions"], validation["end_positions"], strict=True)
    spans = [(2.0 if last else 1.0, first or 4, last or 5) for first, last in places]
    scores = recipe.metrics(spans, None)
    assert scores.pop("no_answer_threshold") == 1.5
    kinds = ["exact_match", "f1", "no_answer_f1", "has_answer_exact_match", "has_answer_f1"]
    assert scores == dict.fromkeys(kinds, 1.0)
    assert [one["answer"] for one in recipe.samples[:2]] == ["Ada", ""]
    assert recipe.baseline(train, validation)["no_answer_f1"] == 1
    model, windows = make_model(recipe).eval(), windows_of(recipe, train, validation)
    with torch.no_grad():
        found = recipe.validate(model, windows, Accelerator(cpu=True))["no_answer_threshold"]
        assert model.config.no_answer_threshold == found
        ask = [{"question": GOOD["question"], "context": GOOD["context"]}]
        for threshold, is_answer in ((1e4, False), (-1e4, True)):
            model.config.no_answer_threshold = threshold
            model.save_pretrained(tmp_path / "saved")
            (answer,) = recipe.answer(recipe.load(tmp_path / "saved").eval(), ask)
            assert bool(answer["answer"]) == is_answer == (answer["answer_start"] is not None)
            assert 0 < answer["score"] < 1


@pytest.mark.parametrize("lora", [(), ("--model.lora.rank", 2)])
def test_a_run_saves_the_threshold_with_both_models(start, lora):
    write("a.jsonl", without_answer(make_rows(), 2))
    settings = ["--data.train", "a.jsonl", "--data.doc_stride", 8, "--train.max_windows", 2, *lora]
    outcome = start(load_task("question_answering").QuestionAnswering, *settings, "--output.dir", "out")
    assert outcome.code == 0, outcome.err
    threshold = json.loads(Path("out/summary.json").read_text())["eval"]["no_answer_threshold"]
    for folder in ("best", "last"):
        config = json.loads(Path(f"out/{folder}/{'model_config' if lora else 'config'}.json").read_text())
        assert config["no_answer_threshold"] == threshold


ONE = [{"text": "Ada", "answer_start": 7}]
ARTICLE = {
    "title": "Ada",
    "paragraphs": [
        {
            "context": GOOD_CONTEXT,
            "qas": [
                {"id": "q1", "question": "Who?", "answers": ONE, "is_impossible": False},
                {"id": "q2", "question": "Why?", "answers": [], "is_impossible": True},
            ],
        }
    ],
}  # fmt: skip
FLAT = {"question": "Who?", "context": GOOD_CONTEXT}
FORMS = {
    "SQuAD as published: 2 articles, 4 questions": [ARTICLE],
    "SQuAD rows, column 'is_impossible'": [
        FLAT | {"answers": {"text": ["Ada"], "answer_start": [7]}, "is_impossible": False},
        FLAT | {"answers": {"text": ["Ada"], "answer_start": [7]}, "is_impossible": True},
    ],
    "SQuAD rows with lists of answers in 'answers'": [FLAT | {"answers": ONE}, FLAT | {"answers": []}],
    "SQuAD rows with 'answers' as text": [FLAT | {"answers": json.dumps(ONE)}, FLAT | {"answers": "[]"}],
    "SQuAD rows with columns 'text' and 'answer_start'": [
        FLAT | {"text": "Ada", "answer_start": 7}, FLAT | {"text": None, "answer_start": None}
    ],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_squad_gives_the_same_rows(make, form):
    recipe, train, _ = make(FORMS[form] * 2)
    assert recipe.reading.notes["format"] == [form]
    assert recipe.reading.notes["no answer"] == [
        "2 of 4 training rows and 2 of 4 validation rows; validation rows give the threshold"
    ]
    spans = list(zip(train["start_positions"], train["end_positions"], strict=True))
    texts = [
        recipe.tokenizer.decode(ids[first : last + 1])
        for ids, (first, last) in zip(train["input_ids"], spans, strict=True)
    ]
    assert texts == ["ada", "[CLS]"] * 2


def test_a_published_file_with_a_single_article_is_split_by_questions(make):
    recipe, *_ = make([ARTICLE])
    recipe = recipe.with_config(with_settings(recipe.config, {"data.validation": None}))
    train, validation = recipe.datasets()
    assert len(train) == len(validation) == 1
    broken = {"title": "a", "paragraphs": [{"context": GOOD_CONTEXT, "qas": None}]}
    with pytest.raises(InputError, match=r"data.train: article 2, paragraph 1 has no list 'qas'"):
        make([ARTICLE, broken])
    wrong = json.loads(json.dumps(ARTICLE).replace('"answer_start": 7', '"answer_start": 8'))
    with pytest.raises(InputError, match=r"row 3: its context has 'da ' at 8, not .* 'Ada' \(question q1\)"):
        make([ARTICLE, wrong])


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_no_padding_and_no_word_of_the_question_is_in_the_softmax(make, tiny_bert, tmp_path, kind):
    folder = tmp_path / kind
    shutil.copytree(tiny_bert, folder)
    if kind != "bert":
        sizes, heads = {"vocab_size": 30522, "max_position_embeddings": 64}, 4
        small = {
            "roberta": transformers.RobertaConfig(
                **sizes, hidden_size=32, num_hidden_layers=1, num_attention_heads=heads, intermediate_size=64,
                type_vocab_size=1, pad_token_id=0,
            ),
            "distilbert": transformers.DistilBertConfig(**sizes, dim=32, n_layers=1, n_heads=heads),
        }[kind]  # fmt: skip
        transformers.AutoModel.from_config(small).save_pretrained(folder)
    recipe, train, _ = make(make_rows(), model=folder)
    model = make_model(recipe).eval()
    short, long = (recipe.collate(list(train.select(range(8))), pad_to=n) for n in (32, 48))
    with torch.no_grad():
        outputs = [model(**batch) for batch in (short, long)]
    ours = [recipe.loss(out, batch) for out, batch in zip(outputs, (short, long), strict=True)]
    torch.testing.assert_close(*ours)
    assert abs(outputs[0].loss - outputs[1].loss) > 1e-3
    probabilities = context_logits(outputs[0], short["input_ids"], recipe.tokenizer)[0].softmax(-1)
    for ids, of_row in zip(short["input_ids"], probabilities, strict=True):
        words = recipe.tokenizer.convert_ids_to_tokens(ids[of_row > 0])
        assert words
        assert not {"[SEP]", "[CLS]", "[PAD]", "what", "?"} & set(words)


def test_a_long_context_is_read_in_parts_and_the_best_span_of_all_counts(make):
    rows = make_rows()
    recipe, train, validation = make(rows)
    assert len(validation) > len(rows)
    inside = [example for example in validation if example["start_positions"] != IGNORED]
    assert len(train) == len(inside) >= len(rows)
    spans = [
        (float(e["start_positions"] != IGNORED), max(0, e["start_positions"]), max(0, e["end_positions"]))
        for e in validation
    ]
    assert recipe.metrics(spans, None) == {"exact_match": 1.0, "f1": 1.0}
    assert recipe.samples[0] == {
        "question": rows[0]["question"],
        "answer": rows[0]["answers"]["text"][0],
        "reference": rows[0]["answers"]["text"][0],
    }
    wrong = [(-score, first, last) for score, first, last in spans]
    assert recipe.metrics(wrong, None)["exact_match"] < 0.9


def test_a_separator_that_somebody_wrote_is_text(make):
    rows = [
        {"question": "Where [SEP] is it?", "context": "[SEP] here [PAD] it is"} | answer
        for answer in ({"answers": {"text": ["[SEP] here"], "answer_start": [0]}},) * 16
    ]
    recipe, train, validation = make(rows)
    batch = recipe.collate(list(train.select([0])))
    assert (batch["input_ids"] == recipe.tokenizer.sep_token_id).sum() == 2
    assert torch.isfinite(recipe.loss(make_model(recipe)(**batch), batch))
    spans = [(0.0, e["start_positions"], e["end_positions"]) for e in validation]
    assert recipe.metrics(spans, None)["exact_match"] == 1


def test_items_are_examples_with_an_answer(make):
    recipe, _, validation = make(make_rows())
    batch = recipe.collate(list(validation))
    inside = (batch["start_positions"] != IGNORED).sum()
    assert recipe.num_items(batch) == inside == (batch["end_positions"] != IGNORED).sum() < len(validation)


BAD = {
    "its question is empty": {"question": " "},
    "its context is empty": {"context": ""},
    "one of its answers is empty": {"answers": {"text": [""], "answer_start": [7]}},
    "its answer 'Ada' at 17 is outside its context of 19 characters": {
        "answers": {"text": ["Ada"], "answer_start": [17]}
    },
    "its context has 'was' at 3, not the answer 'Ada'": {
        "answers": {"text": ["Ada"], "answer_start": [3]}
    },
    "it has 1 answers and 2 places where they start": {"answers": {"text": ["Ada"], "answer_start": [7, 8]}},
    "its question of 30 tokens leaves no room for its context": {"question": "who " * 30},
    'its answers are not {"text": […], "answer_start": […]}': {
        "answers": {"text": None, "answer_start": None}
    },
    "its answer 'Ada' starts at None": {"answers": {"text": ["Ada"], "answer_start": [None]}},
    "no part of its context holds its whole answer: data.max_length is 32, data.doc_stride 8": {
        "context": "tea " * 60, "answers": {"text": ["tea " * 29 + "tea"], "answer_start": [40]}
    },
    "no part of its context holds its whole answer": {
        "context": "It was \u200b.", "answers": {"text": ["\u200b"], "answer_start": [7]}
    },
}  # fmt: skip


@pytest.mark.parametrize("found", BAD)
def test_a_bad_row_is_named_or_left_out(make, found):
    rows = [GOOD] * 18 + [GOOD | BAD[found]] + [GOOD]
    with pytest.raises(InputError) as caught:
        make(rows)
    message = str(caught.value)
    assert message.startswith(f"data.train: a.jsonl line 19: {found}")
    assert message.endswith("correct it, or leave such rows out: --data.on_bad_row skip")
    assert "\n" not in message
    recipe, train, _ = make(rows, on_bad_row="skip")
    assert len(train) == 19
    assert [line.partition(": ")[0] for line in recipe.skipped_rows] == [
        "a.jsonl line 19",
        "a.jsonl line 19",
    ]


def test_a_bad_validation_row_is_of_the_file_that_it_is_in(make):
    recipe, *_ = make([GOOD] * 2)
    write("b.jsonl", [GOOD, GOOD | {"question": ""}])
    recipe = recipe.with_config(with_settings(recipe.config, {"data.validation": "b.jsonl"}))
    with pytest.raises(InputError, match=r"^data\.validation: b.jsonl line 2: its question is empty"):
        recipe.datasets()


@pytest.mark.parametrize(
    "answers",
    [
        {"text": "Ada", "answer_start": 7},
        *({"text": ["Ada"], "answer_start": start} for start in (0, 7, "7", ["7"], [7.0])),
    ],
)
def test_answers_of_another_kind_are_a_bad_row(make, answers):
    with pytest.raises(
        InputError, match=r"^data.train: a.jsonl line 1: its answers? .*; correct it, or leave"
    ):
        make([GOOD | {"answers": answers}] * 4)


@pytest.mark.parametrize("answer", ["Ada\u200b", "\u200bAda", " Ada\u200b\u200b", "Ada"])
def test_an_answer_with_characters_of_no_token_is_learned_from(make, answer):
    row = GOOD | {"context": f"{answer} x {answer}"}
    for start in (0, len(answer) + 3):
        answers = {"text": [answer], "answer_start": [start]}
        recipe, train, _ = make([row | {"answers": answers}] * 2)
        assert len(train) == 2
        tokens = train[0]["input_ids"][train[0]["start_positions"] : train[0]["end_positions"] + 1]
        assert recipe.tokenizer.decode(tokens) == "ada"


def test_an_answer_longer_than_the_stride_is_learned_from_where_a_part_has_it(make):
    answers = {"text": ["tea " * 11 + "tea"], "answer_start": [0]}
    _, train, validation = make([GOOD | {"context": "tea " * 60, "answers": answers}] * 2)
    assert len(train) == 2 < len(validation)


def test_a_tokenizer_that_pads_left_is_told_to_pad_right(make, tiny_bert, tmp_path):
    shutil.copytree(tiny_bert, tmp_path / "left")
    settings = tmp_path / "left" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"padding_side": "left"}))
    recipe, train, _ = make([GOOD, GOOD | {"question": "Who was it who did?"}], model=tmp_path / "left")
    for ids, start in zip(
        *(recipe.collate(list(train))[k] for k in ("input_ids", "start_positions")), strict=True
    ):
        assert recipe.tokenizer.decode(ids[start]) == "ada"


def test_a_tokenizer_without_separator_and_impossible_settings_are_refused(make, tiny_bert, tmp_path):
    shutil.copytree(tiny_bert, tmp_path / "bare")
    settings = tmp_path / "bare" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"sep_token": None}))
    with pytest.raises(InputError, match="does not separate question and context"):
        make([GOOD] * 20, model=tmp_path / "bare")
    with pytest.raises(InputError, match=r"data\.doc_stride: found 32, allowed is 0 tokens or more, below"):
        make([GOOD] * 20, doc_stride=32)
    with pytest.raises(InputError, match=r"data\.answers_column: no column 'answer'.*did you mean 'answers'"):
        make([GOOD] * 20, answers_column="answer")


def test_the_embedded_questions_are_answered_by_spans_and_never_move():
    train, validation = embedded.load("questions")
    assert (train.column_names, validation.column_names) == (["question", "context", "answers"],) * 2
    assert len(train) > 1000
    assert len(validation) > 200
    for row in (*train, *validation):
        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
            assert row["context"][start : start + len(text)] == text
    assert not set(train["context"]) & set(validation["context"])
    assert embedded.load("questions")[0][:] == train[:]


def test_the_offline_config_trains_and_its_model_answers(tmp_path, monkeypatch):
    """Two windows through the command line; the saved model is loaded again, by hand and by the recipe."""
    settings = ["--config", str(OFFLINE), "--data.train", write(tmp_path / "a.jsonl", make_rows(60))]
    monkeypatch.chdir(tmp_path)
    here = ["--output.dir", "out", "--train.max_windows", "2", "--output.tracker", "none"]
    run_file(ROOT / "recipes/question_answering.py", *settings, *here)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["eval"].keys() == {"window", "loss", "exact_match", "f1"}
    assert summary["baseline"].keys() == {"exact_match", "f1"}
    assert len(summary["samples"]) == 5
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out/best")
    recipe = load_recipe([*settings, "--model.name", str(tmp_path / "out/best")])
    context = "Ada wrote it. " * 40 + "Then Grace did."
    (answer,) = recipe.answer(model, [{"question": "Who?", "context": context}])
    assert context[answer["answer_start"] :].startswith(answer["answer"])
    assert answer["answer"]
    assert 0 < answer["score"] <= 1
    for bad in ("Who?", {"question": "Who?"}, {"question": "who " * 200, "context": "a"}):
        with pytest.raises(InputError, match=r"input 1: .*; give rows of "):
            recipe.answer(model, [bad])
