"""tasks/tags.py: character spans and columns with other names → tokens and tags."""

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from gradacc_hf.data.files import FAULT
from gradacc_hf.errors import InputError
from gradacc_hf.tasks.tags import as_tokens, spans_to_tags, split_words, tag_names

TEXT = "Ada Byron's machine, in London."


def test_spans_become_tags_of_words_and_punctuation():
    tokens, tags, problem = spans_to_tags(TEXT, [[24, 30, "LOC"], {"start": 0, "end": 9, "label": "PER"}])
    assert problem is None
    assert [f"{token}/{tag}" for token, tag in zip(tokens, tags, strict=True)] == [
        "Ada/B-PER", "Byron/I-PER", "'/O", "s/O", "machine/O", ",/O", "in/O", "London/B-LOC", "./O"
    ]  # fmt: skip
    assert spans_to_tags(TEXT, None)[1:] == (["O"] * 9, None)


BROKEN = {
    "entity 'Ad' at 0 begins or ends within a word": [[0, 2, "PER"]],
    "entity 'Byron' at 4 overlaps another": [[0, 9, "PER"], [4, 9, "PER"]],
    "entity 2 of 2, 24 to 99, is outside its 31 characters": [[0, 3, "PER"], [24, 99, "LOC"]],
    "entity 1 of 1, 5 to 5, is outside its 31 characters": [[5, 5, "PER"]],
    "entity 1 of 1 is [0, 3]; allowed: [start, end, label] or": [[0, 3]],
    "entity 1 of 1 is {'start': 0}; allowed": [{"start": 0}],
    "entity 1 of 1 is ['PER', 0, 3]; allowed": [["PER", 0, 3]],
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_broken_span_is_a_problem_of_the_row(problem):
    tokens, tags, found = spans_to_tags(TEXT, BROKEN[problem])
    assert (tokens, tags) == ([], [])
    assert found.startswith(problem)


def test_characters_without_spaces_between_words_are_tokens():
    assert split_words("東京へ3,5") == [(at, at + 1) for at in range(6)]
    assert spans_to_tags("東京へ", [[0, 2, "LOC"]])[:2] == (["東", "京", "へ"], ["B-LOC", "I-LOC", "O"])


def test_spaces_around_an_entity_do_not_count():
    assert spans_to_tags("to Rome !", [[2, 8, "LOC"]])[1] == ["O", "B-LOC", "O"]


def test_every_type_has_both_tags_also_if_one_is_not_in_the_rows():
    rows = Dataset.from_list([{"text": "Ada", "entities": [{"start": 0, "end": 3, "label": "PER"}]}] * 2)
    found, form = as_tokens(rows, "tokens", "tags")
    assert form == "character spans in 'entities' of 'text'"
    assert found.features["tags"].feature.names == ["O", "B-PER", "I-PER"]
    assert found[0] == {"tokens": ["Ada"], "tags": [1], "__fault": None}


def test_class_ids_in_a_column_with_another_name_keep_their_names_and_the_others_are_stated():
    features = Features({
        "tokens": List(Value("string")), "pos_tags": List(Value("int64")),
        "ner_tags": List(ClassLabel(names=["O", "B-PER"])),
    })  # fmt: skip
    rows = Dataset.from_list([{"tokens": ["Ada"], "pos_tags": [3], "ner_tags": [1]}], features=features)
    found, form = as_tokens(rows, "tokens", "tags")
    assert form == "tokens in 'tokens', tags in 'ner_tags' (others: pos_tags; data.tags_column names one)"
    assert found.features["tags"] == features["ner_tags"]
    assert as_tokens(rows, "tokens", "pos_tags") == (rows, None)
    assert as_tokens(rows, "tokens", "missing")[1] is None


def test_rows_of_tokens_and_tags_stay_as_they_are_beside_spans():
    rows = Dataset.from_list(
        [{"tokens": ["a"], "tags": ["O"], "text": "a", "spans": [{"start": 0, "end": 1, "label": "X"}]}]
    )
    assert as_tokens(rows, "tokens", "tags") == (rows, None)


def test_broken_rows_are_named_where_they_leave_too_few_tags():
    features = Features({"tags": List(Value("string")), FAULT: Value("string")})
    faults = [None, "line 5 has 1 column", "line 9 has no tag"]
    rows = Dataset.from_dict({"tags": [["O"], [], []], FAULT: faults}, features)
    with pytest.raises(InputError, match=r"1 different tags .*\(training row 2: line 5 has 1 column\)"):
        tag_names(rows, "tags")
