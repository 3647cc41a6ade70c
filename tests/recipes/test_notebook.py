"""recipes/finetune_on_a_t4.ipynb runs from top to bottom: here on the CPU, offline, for two windows."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "recipes" / "finetune_on_a_t4.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Its cells by name, after they ran in an empty folder."""
    folder = tmp_path_factory.mktemp("notebook")
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": programs, "HF_HUB_OFFLINE": "1"}
    environment["GRADACC_FLAGS"] = "--train.max_windows 2 --batch.effective 8 --data.max_length 16"
    notebook = nbformat.read(NOTEBOOK, 4)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    client.execute(env=environment)
    return folder, {cell["id"]: cell for cell in notebook.cells}


def printed(cell):
    return "".join(output["text"] for output in cell["outputs"] if output["output_type"] == "stream")


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(executed):
    folder, cells = executed
    assert printed(cells["install"]) == ""  # the kit is there: nothing is installed
    assert "text_classification_offline · cpu" in printed(cells["settings"])
    assert "check: this would run" in printed(cells["recipe"])
    assert "Exact: " in printed(cells["verify"])
    assert "2 windows, 16 examples" in printed(cells["train"])
    assert any("image/png" in output.get("data", {}) for output in cells["curves"]["outputs"])
    assert printed(cells["predict"]).startswith('{"label": ')
    assert (folder / "run/best/README.md").is_file()


def test_it_is_kept_without_outputs_and_as_nbformat_writes_it():
    """So that a change of it can be read."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, 4)
    nbformat.validate(notebook)
    assert text == nbformat.writes(notebook) + "\n"
    for cell in notebook.cells:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


def test_it_says_that_no_gpu_has_run_it():
    assert "has not been run on a GPU yet" in NOTEBOOK.read_text(encoding="utf-8")
