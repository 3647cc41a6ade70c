"""The light commands and `import gradacc_hf` load nothing but Python's standard library and gradacc_hf."""

import subprocess
import sys

import pytest

LOADED = """
import sys
before = set(sys.modules)
sys.argv = ["gradacc", *sys.argv[1:]]
{}
loaded = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(sorted(loaded - sys.stdlib_module_names))
"""
COMMAND = """
from gradacc_hf.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


def loaded_by(code, *arguments):
    """The output of `code`, and the top-level packages that it loads from outside the standard library."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(code), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *output, packages = done.stdout.splitlines()
    return output, packages


def test_the_import_loads_only_the_standard_library():
    output, packages = loaded_by(
        "import gradacc_hf; print(gradacc_hf.__version__, len(dir(gradacc_hf)) > 20)"
    )
    assert output[0].endswith(" True")
    assert packages == "['gradacc_hf']"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ls"], "minimal"),
        (["--help"], "usage: gradacc"),
        (["--version"], "gradacc "),
        (["ls", "--help"], "usage: gradacc ls"),
        (["lessons"], "eight_samples"),
    ],
)
def test_a_light_command_loads_only_the_standard_library(arguments, said):
    output, packages = loaded_by(COMMAND, *arguments)
    assert any(line.startswith(said) for line in output)
    assert packages == "['gradacc_hf']"


def test_copying_a_recipe_loads_only_the_standard_library(tmp_path):
    output, packages = loaded_by(COMMAND, "cp", "text_classification", str(tmp_path))
    assert output[-1].startswith("run it: accelerate launch ")
    assert packages == "['gradacc_hf']"


def test_an_export_loads_what_it_needs_and_not_more():
    _, packages = loaded_by("from gradacc_hf import InputError")
    assert packages == "['gradacc_hf']"
    _, packages = loaded_by("from gradacc_hf import WindowLoader")
    assert "'torch'" in packages
    assert "'accelerate'" in packages
    for heavy in ("'transformers'", "'datasets'", "'rich'", "'matplotlib'", "'tyro'"):
        assert heavy not in packages
