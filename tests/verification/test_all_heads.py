"""The conformance table on 40 heads, or one per kind: gradacc is exact if the loss is a mean over items."""

import io
import warnings

import pytest
from rich.console import Console

from gradacc_hf.verification import all_heads as conformance
from gradacc_hf.verification.tiny_models import KINDS

FORTY = conformance.heads(every=False)


@pytest.fixture(
    scope="module",
    params=[pytest.param(FORTY[::4], id="ten"), pytest.param(FORTY, id="forty", marks=pytest.mark.slow)],
)
def verdicts(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return conformance.conformance(request.param)


def test_heads_of_all_kinds_are_tried(verdicts):
    assert len(FORTY) == 4 * len(KINDS) == 40
    assert {verdict.kind for verdict in verdicts} == set(KINDS)
    assert sum(bool(verdict.errors) for verdict in verdicts) >= 0.9 * len(verdicts)


def test_our_loop_is_exact_on_every_head_but_those_with_a_reason(verdicts):
    inexact = [verdict for verdict in verdicts if verdict.errors and not verdict.exact(0)]
    assert [verdict.model_type for verdict in inexact if "BatchNorm" not in verdict.reason] == []
    assert len(inexact) <= 2


def test_exact_trainer_is_exact_on_the_heads_that_our_loop_is_exact_on(verdicts):
    assert [v.model_type for v in verdicts if v.exact(0) != v.exact(1)] == []


def test_trainer_is_not_exact_on_most(verdicts):
    tried = [verdict for verdict in verdicts if verdict.errors]
    assert sum(verdict.exact(2) for verdict in tried) < len(tried) / 2


def test_no_head_is_wrong_without_padding(verdicts):
    outcomes = [verdict.padding for verdict in verdicts if verdict.errors]
    assert [outcome for outcome in outcomes if not outcome.startswith(("exact", "refused: "))] == []
    assert any(outcome.startswith("exact by groups") for outcome in outcomes)


def test_a_head_that_cannot_be_had_says_why(verdicts):
    assert all(verdict.reason for verdict in verdicts if not verdict.errors)


def test_all_heads_are_hundreds():
    assert len(conformance.heads(every=True)) > 600


def test_the_table_adds_up(verdicts):
    console = Console(width=120, record=True, file=io.StringIO())
    conformance.print_conformance(verdicts, console)
    lines = [line.split()[-6:] for line in console.export_text().splitlines()]
    rows = [cells for cells in lines if len(cells) == 6 and all(map(str.isdigit, cells))]
    *kinds, total = [[int(cell) for cell in row] for row in rows]
    assert [sum(column) for column in zip(*kinds, strict=True)] == total
    assert total[0] + total[5] == len(verdicts)
