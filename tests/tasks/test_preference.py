"""Losses, formats, references and metrics of preferences."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from chat_templates import byte_tokenizer
from datasets import Dataset
from torch.nn.functional import log_softmax
from transformers import LlamaConfig, LlamaForCausalLM

from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.data.sources import SOURCE
from gradacc_hf.errors import InputError
from gradacc_hf.tasks import kl, references
from gradacc_hf.tasks.answer_scores import log_probabilities, score_rows, scores_of
from gradacc_hf.tasks.chat import tokenize_chat, tokenize_completion
from gradacc_hf.tasks.kl import mean_kl
from gradacc_hf.tasks.lean_loss import make_lean
from gradacc_hf.tasks.preference_examples import examples_of, features
from gradacc_hf.tasks.preference_formats import MixedPreferences, answers_to_score, find_format
from gradacc_hf.tasks.preference_losses import KtoLoss, PairLoss, log_one_minus_exp
from gradacc_hf.tasks.preference_metrics import accuracy_of_length, answer_metrics, pair_metrics
from gradacc_hf.tasks.references import References
from gradacc_hf.training.lora import add_lora
from gradacc_hf.training.settings import LoraConfig

SCORES = np.array([[-9.0, -14.0], [-20.0, -3.5], [-6.0, -6.5]])
REFERENCE = np.array([[-10.0, -11.0], [-19.0, -3.0], [-7.0, -6.0]])
TOKENS = np.array([[4, 7], [9, 2], [3, 3]])


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def one_by_one(name, variant="sigmoid", beta=0.1, gamma=0.5, smoothing=0.0):
    """The loss of each pair, written out from the formula of its paper."""
    for (w, r), (ref_w, ref_r), (n_w, n_r) in zip(SCORES, REFERENCE, TOKENS, strict=True):
        ratio = beta * ((w - ref_w) - (r - ref_r))
        odds_w, odds_r = (math.exp(p / n) / (1 - math.exp(p / n)) for p, n in ((w, n_w), (r, n_r)))
        yield {
            "dpo sigmoid": -(1 - smoothing) * math.log(sigmoid(ratio))
            - smoothing * math.log(sigmoid(-ratio)),
            "dpo hinge": max(0.0, 1 - ratio),
            "dpo ipo": ((w - ref_w) / n_w - (r - ref_r) / n_r - 1 / (2 * beta)) ** 2,
            "orpo sigmoid": -w / n_w - beta * math.log(sigmoid(math.log(odds_w / odds_r))),
            "simpo sigmoid": -math.log(sigmoid(beta * w / n_w - beta * r / n_r - gamma)),
            "reward sigmoid": -math.log(sigmoid(w - r)),
        }[f"{name} {variant}"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dpo", {}),
        ("dpo", {"label_smoothing": 0.2, "beta": 0.5}),
        ("dpo", {"variant": "hinge", "beta": 0.3}),
        ("dpo", {"variant": "ipo", "beta": 0.2}),
        ("orpo", {"beta": 0.7}),
        ("simpo", {"beta": 2.0, "gamma": 1.1}),
        ("reward", {}),
    ],
)
def test_a_loss_of_pairs_is_the_mean_of_its_formula(name, settings):
    given = (torch.from_numpy(np.asarray(each, float)) for each in (SCORES, REFERENCE, TOKENS))
    found = PairLoss(name, **settings).mean(*given)
    others = {"smoothing" if key == "label_smoothing" else key: value for key, value in settings.items()}
    assert float(found) == pytest.approx(np.mean([*one_by_one(name, **others)]), rel=1e-12)


def test_kto_weighs_both_kinds_of_answers_around_the_reference_point():
    loss, ratios, desirable = KtoLoss(0.3, 2.0, 0.5), [1.0, -2.0, 0.4], [1, 0, 0]
    assert float(loss.reference_point(torch.tensor([-3.0, 1.0]), torch.zeros(2))) == 0  # never below 0
    point = loss.reference_point(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0]))
    assert float(point) == 0.5
    wanted = [2.0 * (1 - sigmoid(0.3 * 0.5)), 0.5 * (1 - sigmoid(0.3 * 2.5)), 0.5 * (1 - sigmoid(0.3 * 0.1))]
    found = loss.mean(torch.tensor(ratios), torch.tensor(desirable), point)
    assert float(found) == pytest.approx(np.mean(wanted), rel=1e-6)


def test_log_one_minus_exp_is_exact_near_0_and_has_a_finite_gradient():
    values = torch.tensor([-1e-3, -0.5, -5.0, -80.0], dtype=torch.float64)
    wanted = [math.log(-math.expm1(value)) for value in values.tolist()]
    assert log_one_minus_exp(values).tolist() == pytest.approx(wanted, rel=1e-12)
    at_ends = torch.tensor([0.0, -1e-8, -200.0], requires_grad=True)
    log_one_minus_exp(at_ends).sum().backward()
    assert at_ends.grad.isfinite().all()


@pytest.fixture(scope="module")
def llama():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=259, pad_token_id=258, initializer_range=0.3, **sizes))


@pytest.mark.parametrize("lean", [False, True])
def test_the_score_of_a_row_is_the_log_probability_of_its_labelled_tokens(llama, lean):
    ids, labels = torch.randint(0, 250, (3, 9)), torch.full((3, 9), IGNORED)
    labels[0, 4:7], labels[1, 0:2] = (
        ids[0, 4:7],
        ids[1, 0:2],
    )  # the first token is not predicted; row 2 has none
    logits = log_softmax(llama(input_ids=ids).logits.double(), -1)
    chosen = logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    wanted = torch.stack([chosen[0, 3:6].sum(), chosen[1, 0], torch.tensor(0.0).double()])
    model = type(llama)(llama.config)
    model.load_state_dict(llama.state_dict())
    assert make_lean(model, lean) == lean
    score_rows(model)
    outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, answer_tokens=labels)
    assert torch.allclose(scores_of(outputs).double(), wanted, rtol=1e-5)
    assert (outputs.logits is None) == lean
    assert torch.equal(log_probabilities(llama(input_ids=ids).logits, labels)[2:], torch.zeros(1))


def said(role, *texts):
    return [{"role": role, "content": text} for text in texts]


TOOLS = said("user", "hi")
MULTI = [*said("user", "a"), *said("assistant", "b"), *said("user", "c")]


@pytest.mark.parametrize(
    ("row", "single", "answers"),
    [
        ({"prompt": "q ", "chosen": "a", "rejected": "b"}, False, ["a</s>", "b</s>"]),
        (
            {
                "prompt": said("user", "q"),
                "chosen": said("assistant", "a"),
                "rejected": said("assistant", "b"),
            },
            False,
            ["a</s>", "b</s>"],
        ),
        (  # the answers repeat the prompt, as in HuggingFaceH4/ultrafeedback_binarized
            {
                "prompt": "q",
                "chosen": [*said("user", "q"), *said("assistant", "a")],
                "rejected": said("assistant", "b"),
            },
            False,
            ["a</s>", "b</s>"],
        ),
        (  # an implicit prompt of several turns, whose answers are not learned
            {"chosen": [*MULTI, *said("assistant", "d")], "rejected": [*MULTI, *said("assistant", "e")]},
            False,
            ["d</s>", "e</s>"],
        ),
        (
            {"chosen": "Human: x Assistant: yes", "rejected": "Human: x Assistant: you"},
            False,
            [" yes</s>", " you</s>"],
        ),
        (  # a line end before the answers
            {"chosen": "### Question:\nyes", "rejected": "### Question:\nno"},
            False,
            ["\nyes</s>", "\nno</s>"],
        ),
        ({"prompt": "q", "completion": "a", "label": True}, True, ["a</s>"]),
        ({"prompt": "q", "completion": "a", "label": "False"}, True, ["a</s>"]),  # of a CSV file
        ({"prompt": "q", "completion": "a", "label": 1.0}, True, ["a</s>"]),
        (
            {"prompt": said("user", "q"), "completion": said("assistant", "a"), "label": False},
            True,
            ["a</s>"],
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, True, ["a</s>", "b</s>"]),
    ],
)
def test_every_format_is_read_and_answers_alone_are_learned(row, single, answers):
    form = find_format([Dataset.from_list([row])], single)
    tokenizer = byte_tokenizer()
    assert form.problem(row) is None
    assert form.unpairs == (single and "chosen" in row)
    tokenize = tokenize_chat if form.is_chat else tokenize_completion
    found = [tokenize(tokenizer, **each, max_length=99)["labels"] for each in form.read(row)]
    assert [tokenizer.decode([i for i in labels if i != IGNORED]) for labels in found] == answers


def test_single_answers_and_pairs_are_examples_of_kto_together():
    pair = {
        "prompt": "p",
        "chosen": "good",
        "rejected": "bad",
        "label": "0",
    }  # the label is of something else
    single = {"prompt": "q", "completion": "fine", "label": "true"}
    rows = [
        pair | {"completion": None},
        single | dict.fromkeys(("chosen", "rejected")),
        single | {"label": "0"},
    ]
    rows = Dataset.from_list([row | {SOURCE: int(row is not rows[0])} for row in rows])
    forms = MixedPreferences(tuple(find_format([Dataset.from_list([row])], True) for row in (pair, single)))
    given = {"tokenizer": byte_tokenizer(), "forms": forms, "max_length": 99}
    found = examples_of(rows.map(features, fn_kwargs=given), True, 99)
    answers = [byte_tokenizer().decode(row["input_ids"]).removesuffix("</s>")[1:] for row in found]
    assert answers == ["good", "bad", "fine", "fine"]
    assert found["desirable"] == [True, False, True, False]
    others = [byte_tokenizer().decode(row["kl_input_ids"]).removesuffix("</s>")[1:] for row in found]
    assert others == ["fine", "fine", "good", "good"]


@pytest.mark.parametrize(
    ("row", "single", "problem"),
    [
        (
            {"prompt": "q", "chosen": "a", "rejected": "a"},
            False,
            "its chosen and its rejected answer are equal",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, False, "column 'rejected' is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, False, "column 'rejected': None is not text"),
        ({"chosen": "a", "rejected": "b"}, False, "share no prompt, and it has no column 'prompt'"),
        (
            {"chosen": said("user", "q"), "rejected": said("user", "q", "b")},
            False,
            "chosen: it has no assistant turn",
        ),
        ({"prompt": "q", "completion": "a", "label": 2}, True, "its label is 2; allowed: true or false"),
    ],
)
def test_the_problem_of_a_bad_row_is_named(row, single, problem):
    assert problem in find_format([Dataset.from_list([row])], single).problem(row)


@pytest.mark.parametrize(
    ("columns", "single", "line"),
    [
        (["text"], False, "found the columns text; allowed: chosen and rejected, with or without prompt"),
        (["prompt", "completion", "label"], False, "answers without pairs; allowed: --data.loss kto"),
        (["completion", "label"], True, "allowed: prompt, completion and label"),
    ],
)
def test_other_columns_are_refused_in_one_line(columns, single, line):
    with pytest.raises(InputError, match=line):
        find_format([Dataset.from_dict({name: ["x"] for name in columns})], single)


def test_inputs_of_a_reward_model_are_texts_chats_and_rows():
    assert answers_to_score("x", "input 1") == {"score": {"prompt": "", "completion": "x"}}
    chat = [*said("user", "q"), *said("assistant", "a")]
    assert answers_to_score(chat, "input 1")["score"]["messages"] == chat
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert [*answers_to_score(row, "input 1")] == ["chosen_score", "rejected_score"]
    with pytest.raises(InputError, match=r"input 3: found \{'a': 1\}; give a text, or a row"):
        answers_to_score({"a": 1}, "input 3")


def kto_examples(*sources):
    """The examples of KTO from rows of each source: answer, answer for the KL, whether it is desirable."""
    tokenizer = byte_tokenizer()
    forms = MixedPreferences(tuple(find_format([Dataset.from_list(rows)], True) for rows in sources))
    rows = [{**row, SOURCE: number} for number, rows in enumerate(sources) for row in rows]
    columns = {
        name: [row.get(name) for row in rows] for name in dict.fromkeys(n for row in rows for n in row)
    }
    settings = {"tokenizer": tokenizer, "forms": forms, "max_length": 99}
    tokens = Dataset.from_dict(columns).map(features, fn_kwargs=settings)
    found = examples_of(tokens, True, 99)
    texts = [
        [tokenizer.decode(row[f"{p}input_ids"]).removesuffix("</s>") for row in found] for p in ("", "kl_")
    ]
    return [*zip(*texts, found["desirable"], strict=True)]


def test_kto_pairs_each_answer_with_an_answer_to_the_nearest_other_prompt():
    rows = [{"prompt": p, "completion": a, "label": a > "b"} for p, a in zip("qqrs", "abcd", strict=True)]
    expected = [("qa", "qd", False), ("qb", "qd", False), ("rc", "rb", True), ("sd", "sc", True)]
    assert kto_examples(rows) == expected
    one_prompt = [{**row, "prompt": "q"} for row in rows]
    assert [other for _, other, _ in kto_examples(one_prompt)] == ["qd", "qa", "qb", "qc"]


def test_a_pair_of_kto_has_no_use_for_a_label_and_mixes_with_single_answers():
    pairs = [{"prompt": p, "chosen": p + "+", "rejected": p + "-", "label": False} for p in "qr"]
    of_pairs = [("qq+", "qr+", True), ("qq-", "qr-", False), ("rr+", "rq+", True), ("rr-", "rq-", False)]
    assert kto_examples(pairs) == of_pairs
    single = [{"prompt": "s", "completion": "a", "label": True}]
    found = kto_examples([{**row, "label": None} for row in pairs], single)
    assert found == [("qq+", "qa", True), ("qq-", "qa", False), *of_pairs[2:], ("sa", "sr+", True)]


ANSWERS = [(list(range(5, 5 + size)), [IGNORED, *range(6, 5 + size)]) for size in (3, 9, 4, 9, 6)]


def test_references_are_computed_once_and_read_from_the_cache(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    accelerator, calls = Accelerator(cpu=True), []
    model = type(llama)(llama.config)
    model.load_state_dict(llama.state_dict())
    score_rows(model)
    model.register_forward_pre_hook(lambda *_, **__: calls.append(1))

    def values(answers):
        found = References()
        found.compute(model, answers, accelerator, max_tokens=18, pad_token_id=258)
        return [found[answer] for answer in answers]

    first = values(ANSWERS)
    assert len(calls) == 2  # two of 9 tokens, and those of 6, 4 and 3
    alone = [
        float(model(**{k: torch.tensor([v]) for k, v in zip(("input_ids", "labels"), a, strict=True)}).loss)
        for a in ANSWERS
    ]
    assert first == pytest.approx(alone, rel=1e-5)
    calls.clear()
    assert values(ANSWERS[::-1]) == first[::-1]
    assert not calls
    [file] = (tmp_path / "gradacc_hf").iterdir()
    file.write_bytes(file.read_bytes()[:50])
    assert (
        values(ANSWERS) == first
    )  # a damaged file is as none, and the same micro-batches give the same bits
    assert len(calls) == 2
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert values(ANSWERS) != first
    assert len([*(tmp_path / "gradacc_hf").iterdir()]) == 2
    assert math.isnan(References()[ANSWERS[0]])


def test_cached_references_depend_on_the_config_and_on_the_scale_of_adapters(llama):
    def key(alpha=None, name="llama", **changes):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**llama.config.to_dict(), **changes, "_name_or_path": name}))
        if alpha:
            add_lora(model, LoraConfig(rank=2, alpha=alpha), set())
        if alpha and alpha > 1:
            torch.nn.init.ones_(model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
        return references.fingerprint(model, Accelerator(cpu=True))

    assert key() == key(name="elsewhere") == key(alpha=1)  # new adapters change nothing
    assert len({key(), key(rms_norm_eps=0.1), key(alpha=2), key(alpha=4)}) == 4


def test_micro_batches_of_references_do_not_exceed_the_tokens_unless_one_answer_does():
    lengths = [3, 50, 7, 7, 8, 3, 2]
    answers = {bytes([number]): ([1] * length, []) for number, length in enumerate(lengths)}
    found = references.split(answers, max_tokens=16)
    assert sorted(key for part in found for key in part) == sorted(answers)
    sizes = [len(part) * max(lengths[key[0]] for key in part) for part in found]
    assert sizes == [50, 16, 14, 8] or max(sizes[1:]) <= 16


def test_metrics_of_pairs():
    rows = np.stack([SCORES, REFERENCE, TOKENS], axis=2)
    found = pair_metrics(PairLoss("dpo", beta=0.5), rows)
    margins = 0.5 * np.diff(SCORES - REFERENCE, axis=1)[:, 0] * -1
    assert margins.tolist() == [2.0, -0.25, 0.75]
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["margin"] == pytest.approx(margins.mean())
    untrained = np.stack([SCORES, SCORES * (1 + 1e-7), TOKENS], axis=2)
    assert pair_metrics(PairLoss("dpo"), untrained)["accuracy"] == 0.5


def test_metrics_of_single_answers_compare_any_desirable_with_any_undesirable_one():
    rewards, desirable = np.array([3.0, 1.0, 2.0, -1.0]), [1, 1, 0, 0]
    rows = np.zeros((4, 2, 3))
    rows[:, 0, 0], rows[:, 1, 0] = rewards - 10, -2.0
    rows[:, 0, 1], rows[:, 1, 1] = -10, -2.5
    found = answer_metrics(KtoLoss(), rows, desirable)
    assert found["accuracy"] == 3 / 4
    assert found["reference_point"] == 0.5
    assert found["margin"] == pytest.approx(0.1 * (2.0 - 0.5))
    assert math.isnan(answer_metrics(KtoLoss(), rows, [1, 1, 1, 1])["accuracy"])


@pytest.mark.parametrize("lean", [True, False])
def test_kl_is_over_the_whole_vocabulary_at_the_tokens_of_answers(llama, lean, monkeypatch):
    monkeypatch.setattr(kl, "TOKENS_AT_ONCE", 1)
    torch.manual_seed(0)
    model, reference = (LlamaForCausalLM(llama.config) for _ in range(2))
    if lean:
        make_lean(model)
    score_rows(model, None)
    answers = [([5, 6, 7, 8, 9], [IGNORED, IGNORED, 7, IGNORED, 9]), ([3, 4, 5], [IGNORED, 4, 5])]
    expected = []
    with torch.no_grad():
        for ids, labels in answers:
            ours, theirs = (each(torch.tensor([ids])).logits[0].softmax(1) for each in (model, reference))
            of_token = (ours * (ours / theirs).log()).sum(1)
            expected += [of_token[place - 1] for place, label in enumerate(labels) if label != IGNORED]
    found = mean_kl(model.train(), lambda: nullcontext(reference), answers, Accelerator(cpu=True))
    assert len(expected) == 4
    assert found == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)
    assert model.training
    assert mean_kl(model, lambda: nullcontext(model), answers, Accelerator(cpu=True)) == 0


def test_the_baseline_by_length_learns_its_direction_from_training_pairs():
    def lengths(chosen, rejected, **more):
        return {"chosen": np.array(chosen), "rejected": np.array(rejected), **more}

    paired = {"paired": np.array(True)}
    train, validation = lengths([9, 8, 1], [2, 2, 2], **paired), lengths([9, 1, 5, 4], [2, 2, 2, 4], **paired)
    assert accuracy_of_length(train, validation) == 2.5 / 4
    shorter = lengths([1, 1], [2, 2], **paired)
    assert accuracy_of_length(shorter, validation) == 0.5  # 1.5 / 4 is below chance
    assert accuracy_of_length(lengths([5, 6], [1]), lengths([7], [3, 9])) == 0.5
