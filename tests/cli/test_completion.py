"""`gradacc completion`: real shells complete commands, flags, settings, values and files."""

import re
import shutil
import subprocess

import pytest

pytest.importorskip("shtab", reason="needs the extra completion")

from conftest import ROOT

from gradacc_hf.cli import completion
from gradacc_hf.cli.main import COMMANDS, NEEDS, make_parser
from gradacc_hf.utils.commands import parser_of

CASES = {
    "gradacc pl": ["plan", "play"],
    "gradacc cp text_c": ["text_classification"],
    "gradacc bench exa": ["exactness"],
    "gradacc plan --optim.lr_": ["--optim.lr_reference_batch", "--optim.lr_scaling"],
    "gradacc data --data.label_se": ["--data.label_separator"],
    "gradacc plan --optim.lr 1e-4 --budget.precision b": ["bf16"],
    "gradacc plan --config configs/text_m": ["configs/text_multi_label.yaml"],
}
BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_gradacc; printf '%s\\n' "${COMPREPLY[@]}"
"""
FISH = 'source $argv[1]; complete --do-complete "$argv[2]" | cut -f 1'
ZSH = """
fpath=("$1" $fpath); autoload -U compinit; compinit -u -D
autoload +X _gradacc; print -r -- $_comps[gradacc]
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The scripts of all shells, as files."""
    folder, parser = tmp_path_factory.mktemp("scripts"), completion.whole_parser()
    for shell in completion.SHELLS:
        (folder / shell).write_text(completion.script_of(parser, shell))
    return folder


def output(*command):
    return sorted(
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    )


@pytest.mark.parametrize("line", CASES)
def test_bash_completes(scripts, line):
    assert output("bash", "-c", BASH, "bash", scripts / "bash", *line.split(" ")) == CASES[line]


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
def test_script_and_guide_name_the_same_file(scripts):
    for text in ((scripts / "bash").read_text(), (ROOT / "recipes/README.md").read_text()):
        assert set(re.findall(r"~/\.local\S*/gradacc", text)) == {completion.BASH_FILE}


@pytest.mark.parametrize("line", CASES)
def test_fish_completes(scripts, line):
    assert output("fish", "-c", FISH, scripts / "fish", line) == CASES[line]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_zsh_reads_the_script(scripts):
    (scripts / "functions").mkdir()
    shutil.copy(scripts / "zsh", scripts / "functions/_gradacc")
    assert output("zsh", "-f", "-c", ZSH, "zsh", scripts / "functions") == ["_gradacc"]


def test_every_command_that_requires_arguments_has_an_example():
    parsers = {
        name: parser_of(completion.import_module(module).main) for name, (module, _) in COMMANDS.items()
    }
    (commands,) = (action for action in completion.actions(make_parser(parsers)) if action.dest == "command")
    for name, parser in commands.choices.items():
        if name in NEEDS:
            assert NEEDS[name][1].startswith(f"gradacc {name} ")
        else:
            parser.parse_args([])  # raises InputError where an argument is required
