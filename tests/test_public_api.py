"""The public names load, and are documented and typed. The list of names is complete."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT
from transformers import Trainer

import gradacc_hf

PUBLIC = [
    "Best",
    "Bound",
    "Checkpoints",
    "ContrastiveLoss",
    "Diagnosis",
    "DoctorCallback",
    "Evaluation",
    "ExactTrainer",
    "ExactTrainerMixin",
    "GradaccError",
    "GrowingBatch",
    "InputError",
    "LogitsNeededError",
    "LoopError",
    "MissingExtraError",
    "NonFiniteError",
    "OutOfMemoryError",
    "PaddingNotRemovableError",
    "ScheduledBatch",
    "Verification",
    "Window",
    "WindowLoader",
    "WindowRecord",
    "__version__",
    "accumulate_in_float32",
    "diagnose",
    "evaluate",
    "fine_tune",
    "iter_windows",
    "newest_checkpoint",
    "preflight_check",
    "remove_padding",
    "restore_logits",
    "restore_padding",
    "retry_on_oom",
    "router_loss_over_window",
    "skip_unlabelled_logits",
    "train",
    "verify",
]


def test_the_public_names_are_these():
    assert gradacc_hf.__all__ == PUBLIC
    assert [name for name in dir(gradacc_hf) if name == "__version__" or name[:2] != "__"] == PUBLIC


def test_every_public_name_is_imported_for_editors_from_the_module_that_it_loads():
    tree = ast.parse((ROOT / "gradacc_hf/__init__.py").read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    typed = {name.name: node.module for node in block.body for name in node.names}
    [exports] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_LAZY"
    ]
    lazy = {name: f"gradacc_hf.{module}" for name, module in ast.literal_eval(exports).items()}
    assert typed == lazy
    assert sorted([*lazy, "__version__"]) == sorted(PUBLIC)


ALL_MODULES = """
import importlib, pkgutil, types, gradacc_hf
names = [m.name for m in pkgutil.walk_packages(gradacc_hf.__path__, "gradacc_hf.")]
modules = [importlib.import_module(name) for name in names if not name.endswith(".__main__")]
for name in gradacc_hf.__all__:
    assert not isinstance(getattr(gradacc_hf, name), types.ModuleType), name
for package in modules:
    for name in getattr(package, "__all__", ()):
        assert not isinstance(getattr(package, name), types.ModuleType), (package, name)
print(len(modules))
"""


@pytest.mark.slow
def test_no_submodule_hides_an_export_once_all_submodules_are_imported():
    done = subprocess.run([sys.executable, "-c", ALL_MODULES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 100


def test_a_wrong_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'gradacc_hf' has no attribute 'WindowLoder'"):
        gradacc_hf.WindowLoder  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'WindowLoder'"):
        from gradacc_hf import WindowLoder  # noqa: F401


@pytest.mark.parametrize(
    ("old", "new"),
    [("BadInput", "InputError"), ("replayed", "retry_on_oom"), ("try_out", "preflight_check")],
)
def test_a_name_of_version_0_1_0_gives_the_new_one_with_a_warning(old, new):
    with pytest.warns(DeprecationWarning, match=f"gradacc_hf.{old} is now gradacc_hf.{new}") as warned:
        assert getattr(gradacc_hf, old) is getattr(gradacc_hf, new)
    assert [each.filename for each in warned] == [__file__], "it names the line of the user"
    assert old not in dir(gradacc_hf)


def test_every_name_of_version_0_1_0_is_still_there():
    names = """Best Checkpoints Diagnosis DoctorCallback Evaluation ExactTrainer ExactTrainerMixin Window
        WindowLoader accumulate_in_float32 diagnose evaluate fine_tune newest_checkpoint train verify"""
    assert {*names.split()} <= {*PUBLIC}


def test_the_version_is_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", gradacc_hf.__version__)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["project"]["dynamic"] == ["version", "readme"]
    assert "version" not in settings["project"]
    assert settings["tool"]["hatch"]["version"]["path"] == "gradacc_hf/__init__.py"


def test_exact_trainer_shows_the_signature_of_trainer():
    exact, trainer = inspect.signature(gradacc_hf.ExactTrainer), inspect.signature(Trainer)
    *same, items, padding_free = exact.parameters.values()
    assert same == [*trainer.parameters.values()]
    assert (items.name, padding_free.name) == ("num_items", "padding_free")
    assert {items.kind, padding_free.kind} == {inspect.Parameter.KEYWORD_ONLY}


# ---- docstrings ----

MADE_BY_GRADACC = {"Diagnosis", "Window"}
"""Classes that a user gets and does not construct: their arguments are private."""


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "__version__"])
def test_a_public_name_says_what_it_takes_and_gives(name):
    export = getattr(gradacc_hf, name)
    text = inspect.cleandoc(export.__doc__ or "")
    assert len(text.partition("\n")[0]) > 20, "no first line"
    if inspect.isclass(export) and issubclass(export, Exception):
        return
    described = re.findall(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \([^)]*\))?: ", text, re.MULTILINE)
    described = {word.lstrip("*") for words in described for word in words.split(", ")}
    arguments = [name for name in inspect.signature(export).parameters if not name.startswith("_")]
    if name not in MADE_BY_GRADACC and arguments:
        assert re.search(r"^(Args|Attributes):$", text, re.MULTILINE), "no section Args:"
        assert {*arguments} <= described
    gives = None if inspect.isclass(export) else inspect.signature(export).return_annotation
    if str(gives) not in ("None", "collections.abc.Iterator[None]"):
        assert re.search(r"^(Returns|Yields):$", text, re.MULTILINE), "no section Returns:"
    if not inspect.isclass(export) and re.search(r"^ +raise \w+\(", inspect.getsource(export), re.MULTILINE):
        assert re.search(r"^Raises:$", text, re.MULTILINE), "no section Raises:"
