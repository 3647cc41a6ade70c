"""The package as pip installs it: sdist and wheel, plain and with extras, and a Space from the requirements.

Each environment is new and has no development tools. The plain environment is used first. Then the extras are
installed into it. Run the whole file, which takes some minutes.
"""

import os
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from guides import check_absolute

from gradacc_hf.bench.ui_latency import served

pytestmark = pytest.mark.packaging

LOOP = """
import sys
import torch
import gradacc_hf
from accelerate import Accelerator
from gradacc_hf import ExactTrainer, WindowLoader, diagnose, fine_tune, verify

dataset = [{"x": torch.tensor([float(i), 1.0]), "labels": torch.tensor(2.0 * i)} for i in range(8)]
accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
model, optimizer = accelerator.prepare(model, optimizer)
windows = WindowLoader(dataset, 8, micro_batch_size=3, accelerator=accelerator, seed=0)
(window,) = windows
for batch in window:
    with accelerator.accumulate(model):
        loss = ((model(batch["x"]).squeeze(-1) - batch["labels"]) ** 2).mean()
        accelerator.backward(window.weigh(loss))
        optimizer.step()
        optimizer.zero_grad()
print("window", window.number, "loss", round(float(window.loss), 4))
print(gradacc_hf.__file__)
"""


NOT_KEPT = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")  # a module is compiled once


class Environment:
    """A new virtual environment. Programs run in an empty folder."""

    def __init__(self, folder):
        self.bin, self.home = folder / "bin", folder.parent / f"{folder.name}-home"
        self.home.mkdir()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)

    def run(self, program, *arguments, check=True, cwd=None):
        kept = {key: value for key, value in os.environ.items() if key not in NOT_KEPT}
        done = subprocess.run(
            [self.bin / program, *map(str, arguments)],
            cwd=cwd or self.home,
            env={**kept, "PATH": f"{self.bin}{os.pathsep}{kept['PATH']}", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def install(self, *what):
        """Install the tested versions, without bytecode: most modules are never imported."""
        pip = ("-m", "pip", "--python", self.bin / "python", "install", "--no-compile")
        self.run(sys.executable, *pip, "-c", ROOT / "constraints.txt", *what)

    def has(self, module):
        found = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
        return self.run("python", "-c", found, check=False).returncode == 0


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build the sdist of this checkout, and a wheel from the sdist."""
    folder = tmp_path_factory.mktemp("built")
    builder = Environment(folder / "builder")
    builder.install("hatchling", "hatch-fancy-pypi-readme")
    builder.run("python", "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # from Python 3.11.4 on
        archive.extractall(folder)
    source = folder / sdist.name.removesuffix(".tar.gz")
    builder.run("python", "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def plain(built, tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp("plain") / "venv")
    environment.install(built[1])
    return environment


@pytest.fixture(scope="module")
def with_extras(plain, built):
    plain.install(f"gradacc-hf[recipes,offline] @ {built[1].as_uri()}")
    return plain


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_the_recipes(built):
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        fields = message_from_bytes(archive.read(metadata))
    check_absolute(fields.get_payload(decode=True).decode(), homepage_of(fields))
    for name in (
        "__init__.py",
        "CHANGELOG.md",
        "README.md",
        "accumulation/README.md",
        "bench/README.md",
        "_kit/recipes/minimal.py",
        "_kit/recipes/finetune_on_a_t4.ipynb",
        "_kit/configs/text_classification_offline.yaml",
        "_kit/configs/budgets/cpu.yaml",
    ):
        assert f"gradacc_hf/{name}" in names
    assert not [name for name in names if not name.startswith("gradacc_hf")]
    packaged = {f"gradacc_hf/{path.relative_to(ROOT / 'gradacc_hf')}" for path in sources()}
    assert packaged <= names
    assert {"Homepage", "Issues", "Changelog"} <= {url.split(",")[0] for url in fields.get_all("Project-URL")}
    assert {"3.11", "3.12", "3.13"} <= {c.rpartition(" ")[2] for c in fields.get_all("Classifier")}
    base = [line for line in fields.get_all("Requires-Dist") if "extra ==" not in line]
    assert len(base) <= 9, base
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "constraints.txt", "launch.sh", "tests/conftest.py"} <= inside


def homepage_of(fields):
    """The address of the repository in the metadata of a wheel."""
    [url] = [url for url in fields.get_all("Project-URL") if url.startswith("Homepage, ")]
    return url.removeprefix("Homepage, ")


def sources():
    """Return the files of the package that git tracks."""
    listed = subprocess.run(["git", "ls-files", "gradacc_hf"], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / line for line in listed.stdout.splitlines()]
    return [file for file in files if file.is_file()] or list((ROOT / "gradacc_hf").rglob("*.py"))


@pytest.mark.slow
def test_a_plain_install_trains_a_window(plain):
    printed = plain.run("python", "-c", LOOP).stdout.splitlines()
    assert printed[-2].startswith("window 0 loss ")
    assert Path(printed[-1]).is_relative_to(plain.bin.parent)  # and not the checkout


@pytest.mark.slow
def test_a_plain_install_lists_the_recipes(plain):
    listed = plain.run("gradacc", "ls").stdout
    assert "text_classification  configs/text_classification.yaml" in listed
    assert "positional arguments" in plain.run("gradacc", "--help").stdout


@pytest.mark.slow
def test_a_plain_install_has_what_it_needs_and_no_more(plain):
    absent = ["datasets", "evaluate", "gradio", "matplotlib", "peft", "pyarrow", "pytest", "ruff", "tyro"]
    assert [name for name in absent if plain.has(name)] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "needs", "extra"),
    [
        (["data", "--config", "x.yaml"], "gradacc data needs datasets, evaluate, ", "recipes"),
        (["plan", "--config", "x.yaml"], "gradacc plan needs datasets, evaluate, ", "recipes"),
        (["verify", "--config", "x.yaml"], "gradacc verify needs datasets, evaluate, ", "recipes"),
        (["report", "runs"], "gradacc report needs matplotlib, ", "report"),
        (["play"], "gradacc play needs datasets, gradio and pyarrow, ", "play"),
        (["play", "--space", "space"], "gradacc play needs datasets, gradio and pyarrow, ", "play"),
        (["lessons", "eight_samples", "--plot", "a.svg"], "--plot needs matplotlib, ", "report"),
    ],
)
def test_a_missing_extra_is_one_line_that_names_it(plain, arguments, needs, extra):
    done = plain.run("gradacc", *arguments, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {needs}")
    assert line.endswith(f", not installed here: pip install 'gradacc-hf[{extra}]'")


@pytest.mark.slow
def test_a_missing_extra_is_an_import_error_for_a_program(plain):
    code = """
try:
    import gradacc_hf.report
except ImportError as error:
    print(type(error).__name__, error)
"""
    printed = plain.run("python", "-c", code).stdout
    assert printed.startswith("MissingExtraError gradacc_hf.report needs ")
    assert printed.endswith(" not installed here: pip install 'gradacc-hf[report]'\n")


@pytest.mark.slow
def test_a_copied_recipe_trains_two_windows(with_extras):
    with_extras.run("gradacc", "cp", "text_classification", ".")
    done = with_extras.run(
        *("python", "recipes/text_classification.py", "--budget", "cpu"),
        *("--config", "configs/text_classification_offline.yaml", "--train.max_windows", 2),
        *("--batch.effective", 8, "--data.max_length", 16, "--output.dir", "run"),
    )
    assert "2 windows, 16 examples" in done.stdout
    assert (with_extras.home / "run/last/model.safetensors").is_file()
    # Without [report], the run completes and names the missing extra.
    assert "pip install 'gradacc-hf[report]'" in done.stderr
    assert not (with_extras.home / "run/report.html").exists()


@pytest.mark.slow
def test_extras_bring_no_development_tools(with_extras):
    assert with_extras.has("datasets")
    assert [name for name in ("gradio", "pyright", "pytest", "ruff") if with_extras.has(name)] == []


@pytest.mark.slow
def test_a_space_lists_what_it_needs(tmp_path):
    """An environment with the packages of requirements.txt serves the page."""
    space = tmp_path / "space"
    subprocess.run(
        [sys.executable, "-m", "gradacc_hf", "play", "--space", space],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    head = (space / "README.md").read_text(encoding="utf-8").split("---")[1]
    requirements = (space / "requirements.txt").read_text().split()
    assert f"gradio=={yaml.safe_load(head)['sdk_version']}" in requirements
    environment = Environment(tmp_path / "venv")
    environment.install("-r", space / "requirements.txt")
    assert not environment.has("tyro")
    environment.run("python", "-c", "import gradio, gradacc_hf.play.preload", cwd=space)  # compiles modules
    alone = {key: value for key, value in os.environ.items() if key not in NOT_KEPT}
    python = str(environment.bin / "python")
    with (
        served([python, "app.py"], cwd=space, env=alone) as (address, _),
        urllib.request.urlopen(address) as page,
    ):
        assert "svg" in page.read().decode()  # the first picture: a session has trained
