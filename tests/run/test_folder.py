"""A run that ends before a window is trained leaves no folder."""

from pathlib import Path

import pytest
from recipe_runs import load_recipe, write_rows

TextClassification = load_recipe("text_classification").TextClassification


class Failing(TextClassification):
    """A recipe whose loss fails, in the first window or later."""

    losses = 0
    fails_in = 1  # the number of losses

    def loss(self, outputs, batch):
        type(self).losses += 1
        if self.losses >= self.fails_in:
            raise KeyError("a mistake in a loss")
        return super().loss(outputs, batch)


@pytest.fixture
def settings(tmp_path):
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(40)]
    )
    return "--data.train", rows, "--budget.micro_batch_size", 16, "--train.noise_every", 0


@pytest.mark.parametrize("output", [(), ("--output.dir", "mine")])
def test_a_failed_start_leaves_no_folder(start, settings, monkeypatch, output):
    monkeypatch.setattr(Failing, "losses", 0)
    with pytest.raises(KeyError):
        start(Failing, *settings, *output)
    assert [*Path("runs").glob("*")] == []
    assert not Path("mine").exists()


def test_a_run_that_fails_later_keeps_its_folder_and_a_folder_of_the_user_stays(start, settings, monkeypatch):
    monkeypatch.setattr(Failing, "losses", 0)
    monkeypatch.setattr(Failing, "fails_in", 20)  # checks before the first window also compute the loss
    with pytest.raises(KeyError):
        start(Failing, *settings, "--train.epochs", 20)
    assert [path.name for path in Path("runs").iterdir()] == ["run-1"]
    Path("mine").mkdir()
    with pytest.raises(KeyError):
        start(Failing, *settings, "--output.dir", "mine")
    assert Path("mine").is_dir()


def test_a_first_window_that_is_not_finite_names_the_command_that_starts_again(start, settings):
    class NotFinite(TextClassification):
        def loss(self, outputs, batch):
            return super().loss(outputs, batch) * float("nan")

    outcome = start(NotFinite, *settings)
    assert outcome.code == 1
    assert "; to start again: python " in outcome.err
    assert [*Path("runs").glob("*")] == []
