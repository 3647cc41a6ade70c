"""Formats of chats: which is found, what is learned of each row, decoded, and the lines about broken rows."""

import json

import pytest
from chat_templates import learned_of_row, tokenizer_of
from datasets import Dataset

from gradacc_hf.data.reading import Reading
from gradacc_hf.errors import InputError
from gradacc_hf.tasks.chat import check_chat_template, note_chats
from gradacc_hf.tasks.chat_formats import as_input, find_format, note_format


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def of(name, value, **more):
    return {"from": name, "value": value, **more}


def form_of(rows, wanted="auto", learn="all", has_template=True):
    rows = Dataset.from_list(rows if isinstance(rows, list) else [rows])
    return find_format((rows, rows), wanted, learn, has_template)


HISTORY = [["Add one to 1.", "2"], ["And to 2?", "3"]]
ASKED = said("user", "What is 2 + 2?")
PARTS = [{"type": "text", "text": "What is"}, {"type": "text", "text": "2 + 2?"}]
ROWS = {
    "messages": (
        {
            "messages": [
                said("system", "Be brief."),
                ASKED,
                said("assistant", "4"),
                ASKED,
                said("assistant", "Four"),
            ]
        },
        ["4", "Four"],
        "OpenAI messages (messages: role, content)",
    ),
    "text parts": (
        {"messages": [said("user", PARTS), said("assistant", [{"type": "text", "text": "4"}])]},
        ["4"],
        "OpenAI messages (messages: role, content)",
    ),
    "weight": (
        {"messages": [ASKED, said("assistant", "no", weight=0), ASKED, said("assistant", "4", weight=1)]},
        ["4"],
        "OpenAI messages (messages: role, content)",
    ),
    "JSON in a column": (
        {"messages": json.dumps([ASKED, said("assistant", "4")])},
        ["4"],
        "OpenAI messages (messages: role, content)",
    ),
    "roles in conversations": (
        {"conversations": [ASKED, said("assistant", "4")], "id": "7"},
        ["4"],
        "OpenAI messages (conversations: role, content)",
    ),
    "sharegpt": (
        {
            "system": "Be brief.",
            "conversations": [of("human", "2 + 2?"), of("gpt", "4"), of("human", "3?"), of("bing", "3")],
        },
        ["4", "3"],
        "ShareGPT (conversations: from, value; system)",
    ),
    "sharegpt with train": (
        {
            "conversations": [
                of("system", "S"),
                of("user", "?"),
                of("chatgpt", "no", train=False),
                of("bard", "4"),
            ]
        },
        ["4"],
        "ShareGPT (conversations: from, value)",
    ),
    "alpaca": (
        {"instruction": "Add one.", "input": "3", "output": "4", "system": "Be brief.", "history": HISTORY},
        ["2", "3", "4"],
        "Alpaca (instruction, input, output, system, history)",
    ),
    "chats with a completion": (
        {"prompt": [ASKED, said("assistant", "no"), ASKED], "completion": [said("assistant", "4")]},
        ["4"],
        "prompt and completion, chats",
    ),
    "a preference that repeats its prompt": (
        {
            "prompt": "What is 2 + 2?",
            "chosen": [said("system", "S"), ASKED, said("assistant", "4")],
            "rejected": [ASKED, said("assistant", "5")],
        },
        ["4"],
        "prompt and chosen, chats",
    ),
    "a preference": (
        {"prompt": [ASKED], "chosen": [said("assistant", "4")], "rejected": [said("assistant", "5")]},
        ["4"],
        "prompt and chosen, chats",
    ),
}


@pytest.mark.parametrize(("model", "end"), [("smollm2", "<|im_end|>"), ("llama3", "<|eot_id|>")])
@pytest.mark.parametrize("name", ROWS)
def test_the_answers_with_their_end_are_learned_and_nothing_else(name, model, end):
    row, answers, stated = ROWS[name]
    form = form_of(row)
    assert str(form) == stated
    assert learned_of_row(tokenizer_of(model), form, row) == ([answer + end for answer in answers], "")


def test_the_prompt_of_a_row_is_what_its_format_says():
    row, tokenizer = ROWS["alpaca"][0], tokenizer_of("smollm2")
    messages = form_of(row).read(row)["messages"]
    assert tokenizer.apply_chat_template(messages[-2:], tokenize=False).endswith(
        "<|im_start|>user\nAdd one.\n3<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    )
    assert messages[:2] == [said("system", "Be brief."), said("user", "Add one to 1.")]
    for empty in ({"input": ""}, {"input": None}):
        assert form_of(row).read({**row, **empty})["messages"][-2] == said("user", "Add one.")
    row = ROWS["sharegpt"][0]
    assert form_of(row).read(row)["messages"][0] == said("system", "Be brief.")
    row = ROWS["a preference that repeats its prompt"][0]
    assert form_of(row).read(row)["messages"] == row["chosen"]


def test_texts_of_prompts_and_preferences_need_no_template():
    tokenizer = tokenizer_of("smollm2")
    tokenizer.chat_template = None
    for row, stated in (
        ({"prompt": "2 + 2 = ", "completion": "4"}, "prompt and completion, plain text"),
        ({"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}, "prompt and chosen, plain text"),
    ):
        form = form_of(row, has_template=False)
        assert (str(form), learned_of_row(tokenizer, form, row)) == (stated, (["4</s>"], ""))
    form = form_of({"text": "tea"})
    assert learned_of_row(tokenizer, form, {"text": "tea"}) == (["tea</s>"], "")


ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'
THOUGHT = "<think>\n{}\n</think>\n\n"


def test_calls_of_sharegpt_are_learned_and_tools_reach_the_template():
    items = [
        of("human", "Add to 2."),
        of("function_call", json.dumps({"name": "add", "arguments": {"a": 2}})),
        of("observation", "3"),
        of("gpt", "It is 3."),
    ]
    row, tokenizer = {"conversations": items, "tools": json.dumps([ADD])}, tokenizer_of("qwen3")
    form = form_of(row)
    assert str(form) == "ShareGPT (conversations: from, value; tools)"
    assert learned_of_row(tokenizer, form, row) == ([CALL, f"{THOUGHT.format('')}It is 3.<|im_end|>"], "")
    assert form.read(row)["tools"] == [{"type": "function", "function": ADD}]
    no_calls = learned_of_row(tokenizer_of("smollm2"), form, row)
    assert no_calls[0] == []
    assert "message 2 (assistant) calls add, which the chat template does not write" in no_calls[1]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning", None])
def test_reasoning_is_learned_where_the_template_writes_it(key):
    """The template of Qwen3 leaves out the reasoning before the last question."""

    def answer(thought, text):
        if key is None:
            return said("assistant", f"<think>\n{thought}\n</think>\n\n{text}")
        return said("assistant", text, **{key: thought})

    row = {"messages": [ASKED, answer("early", "4"), ASKED, answer("late", "Four")]}
    tokenizer, form = tokenizer_of("qwen3"), form_of(row)
    check_chat_template(tokenizer, "qwen3")
    assert learned_of_row(tokenizer, form, row) == (
        ["4<|im_end|>", f"{THOUGHT.format('late')}Four<|im_end|>"],
        "",
    )
    note_chats(reading := Reading(), tokenizer, [form.read(row)])
    left_out = "reasoning of 1 assistant turn: the chat template writes reasoning in other turns only"
    assert reading.notes == {"ignored": [left_out]}


def test_what_the_prompt_of_the_template_begins_is_not_learned():
    """Some templates begin the reasoning in the prompt. Answers without reasoning have another prompt."""
    tokenizer = tokenizer_of("qwen3")
    begin = "{{- '<|im_start|>assistant\\n' }}"
    tokenizer.chat_template = tokenizer.chat_template.replace(begin, begin.replace("\\n", "\\n<think>\\n"))
    chat = [ASKED, said("assistant", "assistant"), ASKED, said("assistant", "Four", reasoning_content="late")]
    found = learned_of_row(tokenizer, form_of({"messages": chat}), {"messages": chat})
    assert found == (["assistant<|im_end|>", "late\n</think>\n\nFour<|im_end|>"], "")


def test_the_last_turn_alone_is_learned():
    tokenizer, (row, answers, _) = tokenizer_of("smollm2"), ROWS["messages"]
    form = form_of(row, learn="last")
    assert learned_of_row(tokenizer, form, row) == ([f"{answers[-1]}<|im_end|>"], "")
    note_chats(reading := Reading(), tokenizer, [form.read(row)])
    note_format(reading, form, (Dataset.from_list([row]),), True)
    assert reading.notes["not learned"] == ["1 assistant turn, before the turns to learn"]
    assert reading.notes["learned"] == ["the last assistant turn"]
    row["messages"][-1] = {**row["messages"][-1], "weight": 0}
    assert "have weight 0 or train false, so there is nothing to learn" in form.problem(row)


TALK = [of("human", "Hi"), of("gpt", "Yo")]


@pytest.mark.parametrize(
    ("row", "broken", "line"),
    [
        (
            {"conversations": TALK},
            {"conversations": [*TALK, of("narrator", "So.")]},
            "conversations[2]: 'from' is 'narrator'; allowed: human, user, gpt, chatgpt, assistant, bing, "
            "bard, system, tool, observation, function_call",
        ),
        (
            {"conversations": TALK},
            {"conversations": [of("human", None)]},
            "conversations[0]: 'value' is None, not",
        ),
        ({"conversations": TALK}, {"conversations": ["Hi"]}, "conversations[0]: 'Hi' is not {from, value}"),
        ({"conversations": TALK}, {"conversations": None}, "column 'conversations': None is not a list of"),
        ({"conversations": TALK}, {"conversations": []}, "it has no messages"),
        (
            {"conversations": TALK},
            {"conversations": TALK[:1]},
            "it has no assistant turn, so nothing to learn; found the roles user",
        ),
        (
            {"conversations": TALK},
            {"conversations": [*TALK, of("function_call", "add(2)")]},
            "conversations[2]: a function_call is JSON, {name, arguments}; found 'add(2)'",
        ),
        (
            {"conversations": TALK, "system": "A"},
            {"conversations": [of("system", "B"), *TALK], "system": "A"},
            "column 'system' and conversations[0] are two system messages; leave one out",
        ),
        (
            {"conversations": TALK, "tools": "[]"},
            {"conversations": TALK, "tools": "add"},
            "its tools are not a list",
        ),
        (ROWS["messages"][0], {"messages": "Hi"}, "column 'messages': 'Hi' is not a list of {role, content}"),
        (
            ROWS["messages"][0],
            {"messages": [said("user", [{"type": "image_url"}])]},
            "message 1 (user) has a part of type 'image_url' in its content; allowed: text",
        ),
        (ROWS["messages"][0], {"messages": [said("user", ["Hi"])]}, "message 1 (user) has a part of 'Hi'"),
        (
            ROWS["messages"][0],
            {"messages": [ASKED, said("Assistant", "4")]},
            "message 2 has the role 'Assistant', which is 'assistant' here",
        ),
        (
            {"conversations": [*TALK, of("human", "?"), {**of("gpt", ""), "weight": 0}]},
            {"conversations": [*TALK, of("human", "?"), of("gpt", " ")]},
            "message 4 (assistant) is empty, and would be learned; weight 0 leaves it out",
        ),
        (
            ROWS["messages"][0],
            {"messages": [said("user", {"a": 1})]},
            "message 1 (user) has no text as its content: {'a': 1}",
        ),
        (ROWS["alpaca"][0], {"instruction": " ", "output": "x"}, "column 'instruction' is empty"),
        (ROWS["alpaca"][0], {"instruction": "x", "output": None}, "column 'output' is empty"),
        (ROWS["alpaca"][0], {"instruction": "x", "output": 3}, "column 'output': 3 is not text"),
        (
            ROWS["alpaca"][0],
            {"instruction": "x", "output": "y", "history": [["a"]]},
            "history[0]: ['a'] is not [instruction, output]",
        ),
        (
            ROWS["alpaca"][0],
            {"instruction": "x", "output": "y", "history": "a"},
            "column 'history': 'a' is not a list of [instruction, output]",
        ),
        (
            ROWS["a preference"][0],
            {"prompt": [ASKED], "chosen": None},
            "column 'chosen': None is not text or messages",
        ),
        (
            ROWS["a preference"][0],
            {"prompt": [ASKED, said("assistant", "x")], "chosen": [ASKED]},
            "it has no assistant turn after its prompt, so there is nothing to learn",
        ),
        ({"text": "x"}, {"text": 3}, "column 'text': 3 is not text"),
    ],
)
def test_a_broken_row_is_one_line(row, broken, line):
    form = form_of(row)
    assert form.problem(row) is None
    assert form.problem(broken).startswith(line)


ALPACA_AND_TEXT = {"instruction": "Add one.", "output": "4", "text": "Add one. 4"}


@pytest.mark.parametrize(
    ("wanted", "has_template", "lines"),
    [
        ("auto", True, "Alpaca (instruction, output); --data.format text reads plain text (text) instead"),
        ("auto", False, "plain text (text); --data.format alpaca reads Alpaca (instruction, output) instead"),
        ("text", True, "plain text (text); --data.format alpaca reads Alpaca (instruction, output) instead"),
    ],
)
def test_of_two_readings_the_plan_names_both_and_the_key(wanted, has_template, lines):
    rows = (Dataset.from_list([ALPACA_AND_TEXT]),) * 2
    form = find_format(rows, wanted, "all", has_template)
    note_format(reading := Reading(), form, rows, has_template)
    assert reading.notes["format"] == [lines]


@pytest.mark.parametrize(
    ("row", "wanted", "line"),
    [
        (
            {"turns": TALK},
            "auto",
            "data.train: found the columns turns; turns looks like ShareGPT: rename it to conversations",
        ),
        (
            {"turns": [ASKED]},
            "auto",
            "data.train: found the columns turns; turns looks like OpenAI messages: rename it to messages",
        ),
        (
            {"conversations": TALK},
            "messages",
            "data.format: found messages, and the rows are ShareGPT (conversations: from, value); set it to "
            "auto or sharegpt",
        ),
        (
            {"messages": [said("user", "Hi"), said("user", None)], **ALPACA_AND_TEXT},
            "auto",
            "data.train: its rows cannot be read as OpenAI messages (messages: role, content): message 2 "
            "(user) has no text as its content. They look like Alpaca (instruction, output); set data.format "
            "to alpaca",
        ),
        ({"text": 3}, "auto", "data.train: column 'text' holds int64, not text"),
    ],
)
def test_a_format_that_does_not_fit_is_one_line_with_the_likely_one(row, wanted, line):
    with pytest.raises(InputError) as caught:
        form_of([row] * 3, wanted)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_texts_have_no_last_turn():
    with pytest.raises(
        InputError, match=r"^data\.learn: found last, and the rows are plain text \(text\), without"
    ):
        form_of({"text": "tea"}, learn="last")


def test_a_column_that_only_one_split_has_is_used():
    training = Dataset.from_list([{"instruction": "Add one.", "input": "3", "output": "4"}])
    form = find_format((training, training.remove_columns("input")), "auto", "all", True)
    assert form.columns == ("instruction", "input", "output")
    assert form.read(training[0])["messages"][0] == said("user", "Add one.\n3")


def test_rows_of_every_chat_format_are_inputs_to_answer():
    asked = {"messages": [said("user", "Add one.\n3")], "tools": None}
    found = as_input({"instruction": "Add one.", "input": "3"})
    assert (found["messages"][:-1], found["tools"]) == (asked["messages"], None)
    assert as_input({"conversations": TALK[:1]})["messages"] == [said("user", "Hi")]
    for given in ("a text", {"prompt": "x"}, {"messages": [ASKED]}, {"other": 1}):
        assert as_input(given) is given
    with pytest.raises(ValueError, match="'from' is 'narrator'"):
        as_input({"conversations": [of("narrator", "So.")]})
