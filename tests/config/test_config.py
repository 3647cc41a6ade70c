"""What a user may write, what they get for it, and the line that they read when it is wrong."""

import ast
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
from conftest import ROOT

from gradacc_hf.config import parser as command_line
from gradacc_hf.config import schema
from gradacc_hf.config.parser import read_command_line
from gradacc_hf.config.schema import (
    BudgetConfig,
    Config,
    DataConfig,
    detect_budget,
    parse_bytes,
    tokens_per_micro_batch,
    with_settings,
)
from gradacc_hf.errors import InputError
from gradacc_hf.training import settings
from gradacc_hf.training.settings import ModelConfig
from gradacc_hf.utils.paths import BUNDLE_ROOTS

TRAIN = ["--data.train", "embedded:modules"]
BUDGETS = sorted((ROOT / "configs" / "budgets").glob("*.yaml"))

MIXTURE = " or a list of sources: [{source: a.jsonl, weight: 3}]"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def line(*words: str, **options) -> str:
    """The one line that `words` are refused with."""
    with pytest.raises(InputError) as error:
        read_command_line(words, **options)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def line_of_file(text: str, *words: str) -> str:
    return line("--config", write("a.yaml", text), *words)


# Precedence.


def test_without_files_the_dataclass_defaults_hold():
    run = read_command_line(TRAIN)
    assert (run.optim.lr, run.batch.effective, run.budget.precision) == (2e-5, 64, "fp32")
    assert (run.config, run.budget_file, run.check, run.recipe) == (None, None, False, None)


def test_each_source_overrides_the_one_before_it():
    defaults = {
        "data": {"train": "x.csv"},
        "optim": {"lr": 1, "eps": 1, "momentum": 0.1},
        "budget": {"num_workers": 1},
    }
    write(
        "a.yaml", "optim: {lr: 2, eps: 2}\nbudget: {num_workers: 2, micro_batch_size: 2, precision: fp16}\n"
    )
    write("b.yaml", "num_workers: 3\nmicro_batch_size: 3\n")
    words = ["--config", "a.yaml", "--budget", "b.yaml", "--optim.lr", "4", "--budget.num_workers", "4"]
    run = read_command_line(words, defaults=defaults)
    assert (run.optim.momentum, run.optim.eps, run.optim.lr) == (0.1, 2, 4)
    assert (run.budget.precision, run.budget.micro_batch_size, run.budget.num_workers) == ("fp16", 3, 4)
    assert (run.config, run.budget_file) == ("a.yaml", "b.yaml")


def test_the_order_of_flags_does_not_matter():
    write("a.yaml", "optim: {lr: 2}")
    assert read_command_line([*TRAIN, "--optim.lr", "4", "--config", "a.yaml"]).optim.lr == 4


def test_one_run_does_not_leak_into_the_next():
    read_command_line([*TRAIN, "--optim.lr", "4", "--model.freeze", "[a]"])
    run = read_command_line(TRAIN)
    assert (run.optim.lr, run.model.freeze) == (2e-5, [])


def test_only_final_values_have_to_be_possible():
    write("a.yaml", "optim: {lr: -1}")
    assert read_command_line([*TRAIN, "--config", "a.yaml", "--optim.lr", "1"]).optim.lr == 1


# Values.


def test_values_take_both_forms_of_a_flag():
    run = read_command_line(["--data.train=a=b.csv", "--optim.lr=1e-5", "--optim.weight_decay", "0"])
    assert (run.data.train, run.optim.lr, run.optim.weight_decay) == ("a=b.csv", 1e-5, 0)


def test_lists_are_yaml_on_the_command_line():
    run = read_command_line([*TRAIN, "--optim.betas", "[0.9,95e-2]", "--model.freeze", '["*.bias", emb]'])
    assert (run.optim.betas, run.model.freeze) == ([0.9, 0.95], ["*.bias", "emb"])


def test_null_unsets_a_value():
    write("a.yaml", "model: {dropout: 0.1}\ntrain: {max_windows: 3}\ndata: {train: x.csv}")
    run = read_command_line(["--config", "a.yaml", "--model.dropout", "null", "--train.max_windows=null"])
    assert (run.model.dropout, run.train.max_windows) == (None, None)


def test_booleans_are_true_and_false_and_a_bare_flag_is_true():
    assert read_command_line([*TRAIN, "--batch.drop_last", "true"]).batch.drop_last
    assert read_command_line([*TRAIN, "--batch.drop_last", "--check"]).batch.drop_last
    assert not read_command_line([*TRAIN, "--batch.drop_last", "False"]).batch.drop_last


def test_check_is_handed_back():
    assert read_command_line(["--check", *TRAIN]).check


@pytest.mark.parametrize("number", ["2e-5", "2.0e-5", "0.00002", "'2e-5'"])
def test_numbers_in_every_notation_are_numbers(number):
    run = read_command_line([*TRAIN, "--config", write("a.yaml", f"optim: {{lr: {number}}}")])
    assert run.optim.lr == 2e-5


def test_text_that_looks_like_something_else_stays_text():
    write("a.yaml", "model: {revision: 0123}\ndata: {train: 2024-01-01, validation: 12:30:00}")
    run = read_command_line(["--config", "a.yaml", "--output.dir", "no"])
    assert (run.model.revision, run.output.dir) == ("0123", "no")
    assert (run.data.train, run.data.validation) == ("2024-01-01", "12:30:00")


def test_interpolation_is_plain_text(monkeypatch):
    monkeypatch.setenv("SECRET", "hidden")
    write("a.yaml", "data: {train: '${oc.env:SECRET}', validation: '${'}")
    run = read_command_line(["--config", "a.yaml", "--output.dir", "${oc.env:SECRET}"])
    assert (run.data.train, run.data.validation) == ("${oc.env:SECRET}", "${")
    assert run.output.dir == "${oc.env:SECRET}"
    assert "hidden" not in line(*TRAIN, "--optim.lr", "${oc.env:SECRET}")


def test_a_recipe_adds_its_own_fields_rules_and_defaults():
    @dataclass
    class Data(DataConfig):
        """Texts."""

        train: str = "embedded:modules"
        mode: Literal["a", "b"] = "a"
        ratios: list[int] | None = None

        def rules(self):
            yield from super().rules()
            yield "mode", self.mode == "a" or self.ratios is not None, "a while data.ratios is null"

    @dataclass(frozen=True)
    class Model(ModelConfig):
        rank: int = 8

    run = read_command_line(["--data.ratios", "[1, 2]", "--model.rank", "4"], data=Data, model=Model)
    assert (run.data, run.model) == (Data(ratios=[1, 2]), Model(rank=4))
    assert (
        line("--data.mode", "b", data=Data)
        == "--data.mode: found 'b', allowed is a while data.ratios is null"
    )
    assert "allowed is a or b" in line("--data.mode", "c", data=Data)


def test_help_shows_the_values_so_far_and_exits_0(capsys):
    write("a.yaml", "optim: {lr: 0.125}")
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as error:
            read_command_line([flag, "--config", "a.yaml"], description="Label a text.")
        assert error.value.code == 0
        shown = capsys.readouterr().out
        for text in (
            "Label a text.",
            "0.125",
            "--budget ",
            "--check",
            "--optim.max_grad_norm",
            "Examples per optimizer",
        ):
            assert text in shown


def test_every_field_has_its_line_of_help():
    modules = [ast.parse(Path(module.__file__).read_text(encoding="utf-8")) for module in (schema, settings)]
    sections = [
        node
        for module in modules
        for node in module.body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
    ]
    assert len(sections) == 10
    for section in sections:
        for field, after in zip(section.body, [*section.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and not ast.unparse(field.annotation).endswith("Config"):
                assert isinstance(after, ast.Expr), ast.unparse(field)


def test_config_imports_neither_torch_nor_transformers():
    code = """
import sys, types
package = types.ModuleType("gradacc_hf")  # without what its __init__ imports
package.__path__ = [sys.argv[1]]
sys.modules["gradacc_hf"] = package
import gradacc_hf.config.parser
print({"torch", "transformers"} & set(sys.modules))
"""
    command = [sys.executable, "-c", code, str(ROOT / "gradacc_hf")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


# Files.


def test_a_recipe_path_is_relative_to_the_config_file():
    recipe = write("here/recipes/r.py", "")
    write("here/configs/a.yaml", "recipe: ../recipes/r.py\ndata: {train: x.csv}")
    assert read_command_line(["--config", "here/configs/a.yaml"]).recipe == str(Path(recipe).resolve())


def test_a_config_file_that_is_absent_is_named_with_the_closest_one():
    write("mine/my_run.yaml", "data: {train: x.csv}")
    assert "did you mean mine/my_run.yaml? " in line("--config", "mine/my_rnu.yaml")
    assert "configs/text_classification.yaml? " in line("--config", "text_clasification.yaml")
    assert "did you mean" not in line("--config", "xyz.yaml")


@pytest.mark.parametrize("written", ["../recipes/r.py", "recipes/r.py"])
def test_a_recipe_path_is_then_relative_to_the_kit(written, tmp_path, monkeypatch):
    recipe = tmp_path / write("kit/recipes/r.py", "")
    (tmp_path / "kit" / "configs").mkdir()
    monkeypatch.setattr(command_line, "BUNDLE_ROOTS", (tmp_path / "kit",))
    write("here/a.yaml", f"recipe: {written}\ndata: {{train: x.csv}}")
    assert read_command_line(["--config", "here/a.yaml"]).recipe == str(recipe)


def test_a_recipe_given_as_a_flag_is_relative_to_here():
    write("configs/a.yaml", "data: {train: x.csv}")
    recipe = write("r.py", "")
    run = read_command_line(["--config", "configs/a.yaml", "--recipe", "r.py"])
    assert run.recipe == str(Path(recipe).resolve())


def test_a_recipe_that_does_not_exist_is_refused():
    message = line_of_file("recipe: nowhere.py\ndata: {train: x.csv}")
    assert message.startswith("recipe in a.yaml: found 'nowhere.py', allowed is a recipe file")


@pytest.mark.parametrize("path", BUDGETS, ids=lambda path: path.stem)
def test_every_budget_of_the_kit_is_found_by_name_and_possible(path):
    run = read_command_line([*TRAIN, "--budget", path.stem])
    assert run.budget_file == path.stem
    assert tokens_per_micro_batch(run.budget, "cuda" if run.budget.memory else "cpu")


def test_a_budget_beside_the_user_comes_before_the_kit_s():
    write("configs/budgets/cpu.yaml", "num_workers: 7")
    assert read_command_line([*TRAIN, "--budget", "cpu"]).budget.num_workers == 7


def test_an_installed_package_finds_its_budgets_inside_itself():
    assert BUNDLE_ROOTS[1] == ROOT / "gradacc_hf/_kit"


def test_an_unknown_budget_names_the_closest():
    message = line(*TRAIN, "--budget", "gpu_8g")
    assert message.startswith(
        "--budget: found 'gpu_8g', allowed is a file or a name: did you mean gpu_8gb? (auto, cpu,"
    )


@pytest.mark.parametrize("flag", ["--config", "--budget"])
def test_files_that_cannot_be_read_are_refused(flag, tmp_path):
    Path("latin.yaml").write_bytes("a: é".encode("latin-1"))
    Path("binary.yaml").write_bytes(b"a: \x00")
    cases = {
        "missing.yaml": "cannot be read (No such file or directory)",
        str(tmp_path): "cannot be read (Is a directory)",
        "latin.yaml": "is not UTF-8 text (byte 4)",
        "binary.yaml": "is not YAML (it cannot be read)",
        write("empty.yaml", ""): "is empty",
        write("comments.yaml", "# nothing\n"): "is empty",
        write("list.yaml", "- 1\n- 2\n"): "holds ['1', '2']",
        write("text.yaml", "hello"): "holds 'hello'",
        write("broken.yaml", "a: 1\nb: ]\n"): "is not YAML (line 2: ",
        write("tab.yaml", "a:\n\tb: 1\n"): "is not YAML (line 2: ",
        write("two.yaml", "a: 1\n---\nb: 2\n"): "is not YAML (line 2: ",
        write("object.yaml", "a: !!python/object:os.system {}\n"): "is not YAML (line 1: ",
        write("date.yaml", "a: !!timestamp never\n"): "is not YAML (it cannot be read)",
        write("deep.yaml", "[" * 5000): "is not YAML (",
        write("twice.yaml", "a: 1\nb: 2\na: 3\n"): "is not YAML (line 3: 'a' is given twice)",
    }
    for file, problem in cases.items():
        assert line(*TRAIN, flag, file).startswith(f"{flag}: found {file!r}, which {problem}"), file


def test_a_byte_order_mark_and_unix_or_windows_lines_are_fine():
    Path("a.yaml").write_bytes(b"\xef\xbb\xbfoptim:\r\n  lr: 1\r\n")
    assert read_command_line([*TRAIN, "--config", "a.yaml"]).optim.lr == 1


def test_the_same_key_in_one_section_twice_is_refused():
    assert "line 2: 'lr' is given twice" in line_of_file("optim: {lr: 1,\n lr: 2}")
    assert (
        line_of_file("optim: {lr: 1}\noptim.lr: 2")
        == "optim.lr in a.yaml is given twice: keep one of the two"
    )


# Keys.


def test_an_unknown_key_names_the_closest_and_all_of_its_section():
    assert line_of_file("optim: {lrr: 1}") == (
        "unknown key optim.lrr in a.yaml: did you mean optim.lr? "
        "(optim has: betas, decay_ratio, eps, lr, lr_reference_batch, lr_scaling, max_grad_norm, "
        "min_lr_ratio, momentum, name, scheduler, warmup_ratio, weight_decay)"
    )


def test_an_unknown_section_names_the_closest():
    message = line_of_file("optm: {lr: 1}")
    assert message.startswith("unknown key optm in a.yaml: did you mean optim? (a run has: batch, budget,")


def test_a_known_name_in_the_wrong_place_names_the_right_one():
    assert "unknown key lr in a.yaml: did you mean optim.lr?" in line_of_file("lr: 1")
    assert "unknown key --optm.name: did you mean --optim.name?" in line("--optm.name", "sgd")
    assert "unknown key model.max_length in a.yaml: did you mean data.max_length?" in line_of_file(
        "model: {max_length: 1}"
    )


def test_an_unknown_flag_names_the_closest():
    assert "unknown key --optim.max-grad-norm: did you mean --optim.max_grad_norm?" in line(
        "--optim.max-grad-norm", "1"
    )
    assert "unknown key --chek: did you mean --check?" in line("--chek")
    assert "unknown key --confg: did you mean --config?" in line("--confg", "a.yaml")


def test_an_unknown_key_like_nothing_names_what_there_is():
    assert line(*TRAIN, "--train.zzz", "1").startswith("unknown key --train.zzz: (train has: best_direction,")


def test_an_unknown_key_of_a_budget_file_names_the_closest():
    message = line(*TRAIN, "--budget", write("b.yaml", "memry: 8GiB"))
    assert message.startswith(
        "unknown key memry in b.yaml: did you mean memory? (budget has: attention, compile,"
    )


@pytest.mark.parametrize("text", ["optim: {lr: 1}", "lr: 1", "budget: {memory: 8GiB}"])
def test_a_budget_file_holds_budget_keys_only(text):
    message = line(*TRAIN, "--budget", write("b.yaml", text))
    assert message.startswith(f"unknown key {text.split(':')[0]} in b.yaml: (budget has:")


@pytest.mark.parametrize(
    "key", ["check: true", "config: b.yaml", "budget_file: cpu", "1: 2", "no: 2", "? [a, b]\n: 1"]
)
def test_what_is_no_key_of_a_run_is_refused_in_a_file(key):
    assert line_of_file(key).startswith(("unknown key", "--config: found 'a.yaml', which is not YAML"))


def test_an_unknown_key_of_a_recipe_is_named_as_the_recipe_s():
    assert "unknown key optim.lrr in the recipe's defaults" in line(*TRAIN, defaults={"optim": {"lrr": 1}})


def test_a_key_with_a_line_break_stays_on_one_line():
    assert "unknown key 'a\\nb' in a.yaml" in line_of_file('"a\\nb": 1')
    assert "unknown key 'a\\nb'" in line("--a\nb", "1").replace("--", "")


@pytest.mark.parametrize("value", ["3", "", "[1]", "no"])
def test_a_section_is_no_value(value):
    assert (
        line_of_file(f"optim: {value}") == "optim in a.yaml is a section: set its keys, such as optim.betas"
    )


def test_a_section_is_no_flag():
    assert line("--optim", "3") == "--optim is a section: set its keys, such as --optim.betas"


# The command line.


def test_a_flag_without_its_value_is_refused():
    assert line(*TRAIN, "--optim.lr") == "--optim.lr: found no value, allowed is a number"
    assert (
        line("--data.train", "--check")
        == '--data.train: found no value, allowed is text or a list: ["a", "b"]' + MIXTURE
    )
    assert line("--config") == "--config: found no value, allowed is text"
    assert line("--budget", "--check") == "--budget: found no value, allowed is text"
    assert line("--config=") == "--config: found '', allowed is text"


@pytest.mark.parametrize("word", ["a.yaml", "-lr", "--", "-", ""])
def test_positional_arguments_are_refused(word):
    assert line(word) == f"found {word!r} on the command line, allowed are flags: --optim.lr 1e-5"


def test_the_same_flag_twice_is_refused():
    assert line("--optim.lr", "1", "--optim.lr=2") == "--optim.lr is given twice: keep one of the two"
    assert line("--config", "a", "--config", "b") == "--config is given twice: keep one of the two"


def test_a_value_after_check_is_refused():
    assert line(*TRAIN, "--check", "a.yaml") == "--check: found 'a.yaml', allowed is true or false"


# Types.

SIZES = "an integer or numbers by number: {0: 32, 500: 64} or noise_scale"


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("batch.effective", "true", SIZES),
        ("batch.effective", "1.5", SIZES),
        ("batch.effective", "64.0", SIZES),
        ("batch.effective", "many", SIZES),
        ("batch.effective", "null", SIZES),
        ("batch.effective", "[64]", SIZES),
        ("batch.effective", "{a: 1}", SIZES),
        ("batch.drop_last", "1", "true or false"),
        ("optim.lr", "fast", "a number"),
        ("optim.lr", "yes", "a number"),
        ("optim.lr", ".nan", "a number"),
        ("optim.lr", "nan", "a number"),
        ("optim.lr", "inf", "a number"),
        ("optim.lr", "1e999", "a number"),
        ("optim.betas", "0.9", "a list of numbers: [0.9, 0.95]"),
        ("optim.betas", "[0.9, x]", "a list of numbers: [0.9, 0.95]"),
        ("optim.betas", "[0.9, .inf]", "a list of numbers: [0.9, 0.95]"),
        ("optim.name", "lion", "adamw, adamw_8bit, adam, sgd, adafactor, muon or schedule_free_adamw"),
        ("optim.scheduler", "step", "linear, cosine, wsd, constant or constant_with_warmup"),
        ("budget.precision", "fp8", "fp32, bf16 or fp16"),
        ("budget.max_tokens", "some", "an integer or auto"),
        ("budget.max_tokens", "true", "an integer or auto"),
        ("train.max_windows", "true", "an integer or null"),
        ("train.best_direction", "up", "min or max"),
        ("model.freeze", "bias", 'a list: ["a", "b"]'),
        ("model.dropout", "much", "a number or null"),
        ("data.train", "{a: b.csv}", 'text or a list: ["a", "b"]' + MIXTURE),
        ("output.dir", "''", "text or null"),
    ],
)
def test_a_wrong_type_is_refused(key, value, allowed):
    section, name = key.split(".")
    message = line_of_file(f"{section}: {{{name}: {value}}}")
    assert message.startswith(f"{key} in a.yaml: found ")
    assert message.endswith(f"allowed is {allowed}")


def test_a_list_that_is_not_yaml_is_refused():
    assert line(*TRAIN, "--optim.betas", "[0.9").endswith(
        "found '[0.9', allowed is a list of numbers: [0.9, 0.95]"
    )
    assert line(*TRAIN, "--model.freeze", "[*.bias]").endswith(
        """found '[*.bias]', allowed is a list: ["a", "b"]"""
    )


def test_an_unquoted_no_is_explained():
    assert line_of_file("data: {train: no}") == (
        "data.train in a.yaml: found false (YAML reads yes, no, on and off as true or false, unless quoted), "
        'allowed is text or a list: ["a", "b"]' + MIXTURE
    )


def test_integers_of_any_size_are_read():
    assert "found " in line(*TRAIN, "--train.seed", "1" + "0" * 400)
    assert line(*TRAIN, "--train.seed", "1" + "0" * 5000).endswith("allowed is an integer")


def test_a_recipe_s_default_of_the_wrong_type_is_refused():
    message = line(*TRAIN, defaults={"batch": {"effective": True}})
    assert message.startswith("batch.effective in the recipe's defaults: found true")
    assert "found 1.5, allowed is an integer" in line(*TRAIN, defaults={"batch": {"effective": 1.5}})
    assert "found nan, allowed is a number" in line(*TRAIN, defaults={"optim": {"lr": float("nan")}})


# Impossible values.


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.dropout", "-0.1"),
        ("model.dropout", "1.1"),
        ("data.validation_fraction", "0"),
        ("data.validation_fraction", "1"),
        ("data.max_length", "0"),
        ("data.separator", "ab"),
        ("data.separator", "a"),
        ("data.encoding", "utf-9"),
        ("data.encoding", "base64"),
        ("batch.effective", "0"),
        ("optim.lr", "0"),
        ("optim.lr", "-1"),
        ("optim.betas", "[0.9]"),
        ("optim.betas", "[0.9, 1]"),
        ("optim.betas", "[-0.1, 0.9]"),
        ("optim.eps", "0"),
        ("optim.momentum", "1"),
        ("optim.weight_decay", "-1"),
        ("optim.warmup_ratio", "1.5"),
        ("optim.warmup_ratio", "-0.5"),
        ("optim.max_grad_norm", "-1"),
        ("train.epochs", "0"),
        ("train.max_windows", "0"),
        ("train.eval_every", "-1"),
        ("train.eval_every", "1.5"),
        ("train.seed", "-1"),
        ("train.seed", "4294967296"),
        ("train.early_stopping", "-1"),
        ("budget.memory", "8"),
        ("budget.memory", "0GiB"),
        ("budget.max_tokens", "0"),
        ("budget.micro_batch_size", "0"),
        ("budget.num_workers", "-1"),
    ],
)
def test_an_impossible_value_is_refused_wherever_it_is_from(key, value):
    assert line(*TRAIN, f"--{key}", value).startswith(f"--{key}: found ")
    section, name = key.split(".")
    assert line_of_file(f"{section}: {{{name}: {value}}}", *TRAIN).startswith(f"{key} in a.yaml: found ")


def test_a_separator_and_an_encoding_are_characters_or_names():
    found = line(*TRAIN, "--data.separator", "::")
    characters = "one character, or comma, semicolon, tab, pipe or none"
    assert found == f"--data.separator: found '::', allowed is {characters}"
    found = line(*TRAIN, "--data.encoding", "utf-9")
    encodings = "an encoding of Python, such as utf-8, utf-16, latin-1, cp1252 or shift_jis"
    assert found == f"--data.encoding: found 'utf-9', allowed is {encodings}"
    for separator in ("^", "\t", "\\t", "tab", "none"):
        assert read_command_line([*TRAIN, "--data.separator", separator]).data.separator == separator


def test_several_files_are_a_list_or_one_text():
    write("a.yaml", "data: {train: [a.csv, b.csv]}")
    assert read_command_line(["--config", "a.yaml"]).data.train == "a.csv,b.csv"
    words = ["--data.train", "a.csv,b.csv", "--data.validation", "v/*.csv"]
    assert read_command_line(words).data.validation == "v/*.csv"


def test_values_at_the_edge_of_the_possible_are_accepted():
    edges = {"model.dropout": 1, "optim.warmup_ratio": 1, "optim.betas": "[0, 0]", "optim.max_grad_norm": 0}
    edges |= {"train.seed": 2**32 - 1, "train.max_windows": 1, "budget.max_tokens": 1, "batch.effective": 1}
    read_command_line([*TRAIN, *(f"--{key}={value}" for key, value in edges.items())])


def test_an_impossible_value_of_a_budget_file_is_named_as_written_there():
    message = line(*TRAIN, "--budget", write("b.yaml", "max_tokens: 0"))
    assert message.startswith("max_tokens in b.yaml: found 0, allowed is auto, or 1 or more:")
    assert message.endswith("a micro-batch budget smaller than one token")


def test_tokens_and_examples_cannot_both_bound_a_micro_batch():
    message = line(*TRAIN, "--budget.max_tokens", "512", "--budget.micro_batch_size", "8")
    assert message.startswith(
        "--budget.micro_batch_size: found 8, allowed is null beside a number for budget.max_tokens"
    )


def test_a_run_without_training_examples_is_refused():
    assert line().startswith("--data.train (not set): found '', allowed is a CSV,")


# The budget.


@pytest.mark.parametrize(
    ("size", "number"),
    [("8GiB", 2**33), ("8GB", 8 * 10**9), ("512MiB", 2**29), ("1.5 gib", 3 * 2**29), ("16mb", 16 * 10**6)],
)
def test_sizes_are_bytes(size, number):
    assert parse_bytes(size) == number


@pytest.mark.parametrize(
    "size", ["", "8", "GiB", "8G", "-8GiB", "8 bananas", "0GiB", "nanGiB", "1e3GiB", "8GiB\n"]
)
def test_what_is_no_size_is_refused(size):
    with pytest.raises(InputError, match=r"allowed is a size such as 8GiB \(units: GiB, GB, MiB, MB\)"):
        parse_bytes(size)


def fake_gpus(monkeypatch, *gpus):
    import torch

    devices = [SimpleNamespace(total_memory=memory, major=major) for memory, major in gpus]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: devices[index])


def test_without_a_gpu_the_budget_is_fp32(monkeypatch):
    fake_gpus(monkeypatch)
    assert detect_budget() == BudgetConfig(memory=None, precision="fp32")


def test_the_smallest_gpu_says_the_memory_and_the_oldest_the_precision(monkeypatch):
    fake_gpus(monkeypatch, (24 * 2**30, 8), (16 * 2**30, 9))
    assert detect_budget() == BudgetConfig(memory="16384MiB", precision="bf16")
    fake_gpus(monkeypatch, (24 * 2**30, 8), (16 * 2**30, 7))
    assert detect_budget() == BudgetConfig(memory="16384MiB", precision="fp16")


def test_an_automatic_budget_sets_memory_and_precision_only(monkeypatch):
    fake_gpus(monkeypatch, (8 * 2**30, 7))
    write("a.yaml", "budget: {memory: 1GiB, num_workers: 2}")
    budget = read_command_line([*TRAIN, "--config", "a.yaml", "--budget", "auto"]).budget
    assert budget == BudgetConfig(memory="8192MiB", precision="fp16", num_workers=2)


def test_tokens_per_micro_batch_follow_the_budget(monkeypatch):
    fake_gpus(monkeypatch)
    assert tokens_per_micro_batch(BudgetConfig(), "cpu") == 2048
    assert tokens_per_micro_batch(BudgetConfig(memory="8GiB"), "cuda") == 8192
    assert tokens_per_micro_batch(BudgetConfig(memory="512MiB"), "cuda") == 512
    assert tokens_per_micro_batch(BudgetConfig(max_tokens=300), "cuda") == 300
    assert tokens_per_micro_batch(BudgetConfig(micro_batch_size=8), "cuda") is None
    with pytest.raises(InputError, match=r"--budget.memory \(not set\)"):
        tokens_per_micro_batch(BudgetConfig(), "cuda")
    fake_gpus(monkeypatch, (2**30, 8))
    assert tokens_per_micro_batch(BudgetConfig(), "cuda") == 1024


# Frozen settings.


def test_settings_are_frozen_and_changed_in_a_copy():
    @dataclass
    class Data(DataConfig):
        """As recipes of version 0.1.0 define it."""

        column: str = "text"

    config = Config(data=Data(train="a.csv"))
    for section, name in (
        (config, "recipe"),
        (config.optim, "lr"),
        (config.model.lora, "rank"),
        (config.budget, "max_tokens"),
        (config.data, "train"),
        (config.data, "column"),
    ):
        with pytest.raises(FrozenInstanceError):
            setattr(section, name, 1)
    changed = with_settings(config, {"model.lora.rank": 8, "data.column": "body", "check": True})
    assert (changed.model.lora.rank, changed.data, changed.check) == (8, Data("a.csv", column="body"), True)
    assert asdict(config) == asdict(Config(data=Data(train="a.csv")))
