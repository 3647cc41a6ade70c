"""tasks/spans.py: the token and the threshold of "no answer"; tasks/squad.py: malformed answers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from gradacc_hf.tasks.spans import answers_or_none, find_threshold, no_answer_tokens
from gradacc_hf.tasks.squad import as_questions


def test_the_token_of_no_answer_is_cls_wherever_the_model_has_it():
    ids = torch.tensor([[5, 7, 8, 9, 0], [9, 7, 5, 0, 0]])
    assert no_answer_tokens(ids, SimpleNamespace(cls_token_id=5)).tolist() == [0, 2]  # XLNet: at the end
    assert no_answer_tokens(ids, SimpleNamespace(cls_token_id=None)).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("margins", "with_span", "without", "threshold", "f1"),
    [
        ([3, 1, -1], [1, 1, 0], [0, 0, 1], 0, 3),
        ([3, 1, -1], [1, 0, 0], [0, 1, 1], 2, 3),
        ([3, 1, -1], [0, 0, 0], [1, 1, 1], 3.5, 3),  # none is answered
        ([3, 1, -1], [1, 1, 0.5], [0, 0, 0], -1.5, 2.5),  # all are answered
        ([3, 1, 1, -1], [1, 1, 0, 0], [0, 0, 1, 1], 0, 3),  # rows with equal margins are alike
        ([-5, -3, -4], [0, 1, 0], [1, 0, 1], -3.5, 3),
    ],
)
def test_the_threshold_has_the_best_f1(margins, with_span, without, threshold, f1):
    margins, with_span, without = (np.array(values, float) for values in (margins, with_span, without))
    found = find_threshold(margins, with_span, without)
    assert found == threshold
    assert np.where(margins >= found, with_span, without).sum() == f1


def test_answers_below_the_threshold_are_empty():
    found = answers_or_none(np.array([2.0, 0.0]), ["tea", "cake"], [["tea"], []])
    assert found == (["tea", ""], 1.0)


@pytest.mark.parametrize("answers", ["none", "7", '[{"text": 3}]', '[{"text": "a", "answer_start": "x"}]'])
def test_answers_as_text_of_another_form_are_left_to_the_check_of_the_rows(answers):
    rows = Dataset.from_list([{"question": "q", "context": "c", "answers": answers}])
    assert as_questions(rows)[0][0]["answers"] == {"text": None, "answer_start": None}


def test_a_start_may_have_the_decimals_of_a_column_with_empty_cells():
    columns = {"question": ["who?", "why?"], "context": ["it was Ada"] * 2, "text": ["Ada", None]}
    rows, _ = as_questions(Dataset.from_dict({**columns, "answer_start": ["7.0", None]}))
    assert rows["answers"][:] == [{"text": ["Ada"], "answer_start": [7]}, {"text": [], "answer_start": []}]
