"""Models, data and runs of other people run no code and write no files elsewhere. Files of a run are safe."""

import ast
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from conftest import ROOT
from recipe_runs import load_recipe, write_rows
from transformers import dynamic_module_utils

from gradacc_hf.cli import main as cli
from gradacc_hf.config.parser import read_command_line
from gradacc_hf.config.schema import Config, DataConfig
from gradacc_hf.errors import InputError
from gradacc_hf.hf_trainer.trainer import refuse_unsupported
from gradacc_hf.run.folder import next_folder, settings
from gradacc_hf.utils.hardware import refuse_place
from gradacc_hf.utils.redaction import HIDDEN, without_tokens

RECIPE = ROOT / "recipes" / "text_classification.py"
TextClassification = load_recipe("text_classification").TextClassification
ImageClassification = load_recipe("image_classification").ImageClassification
TOKEN = "hf_" + "Secret" * 6
ROWS = [
    {"text": f"{word} " * (1 + number % 5), "label": word} for word in ("tea", "cash") for number in range(20)
]


class LeavesAMark:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    """Return the path that foreign code would create. At the end, check that nothing is there."""
    yield (path := tmp_path / "mark")
    assert not path.exists(), "code of others was run"


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def model(tiny_bert, tmp_path):
    """Return a copy of the folder of a model, to tamper with."""
    return shutil.copytree(tiny_bert, tmp_path / "model")


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def marking_code(mark):
    return f"import pathlib\npathlib.Path({str(mark)!r}).mkdir()\n"


@pytest.fixture(scope="module")
def trained(tiny_bert, tmp_path_factory):
    """Run with a umask that allows everything, a token in the environment, and a token in a setting."""
    home = tmp_path_factory.mktemp("home")
    write_rows(home / "rows.jsonl", ROWS)
    flags = {"model.name": tiny_bert, "data.train": "rows.jsonl", "batch.effective": 16, "output.dir": "run"}
    flags |= {"data.max_length": 32, "train.max_windows": 2, "train.eval_every": 1}
    flags |= {"model.revision": f"https://me:{TOKEN}@hf.co/x?token=t0psecret"}
    command = [sys.executable, RECIPE, *(f"--{key}={value}" for key, value in flags.items())]
    environment = {**os.environ, "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=home, env=environment, umask=0, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return home / "run", done.stdout + done.stderr


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """Return a copy of the run beside the data, as received from another person."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained[0].parent / "rows.jsonl", tmp_path)
    return shutil.copytree(trained[0], tmp_path / "run")


@pytest.fixture
def gradacc(capfd, monkeypatch):
    """Run the command line in this process. Return the exit code and the output."""

    def gradacc(*words):
        monkeypatch.setattr(sys, "argv", ["gradacc", *map(str, words)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        return code, out + err

    return gradacc


def is_one_line(ended):
    code, said = ended
    return code == 2 and said.startswith("error: ") and said.count("\n") == 1


# Models


def write_zip(content, file):
    torch.save(content, file)


def write_legacy(content, file):
    torch.save(content, file, _use_new_zipfile_serialization=False)


def write_plain(content, file):
    file.write_bytes(pickle.dumps(content))


WRITERS = [write_zip, write_legacy, write_plain]


@pytest.mark.parametrize("write", WRITERS)
def test_weights_that_are_a_pickle_of_code_are_refused_and_not_run(refused, model, rows, mark, write):
    (model / "model.safetensors").unlink()
    write({"embeddings.word_embeddings.weight": LeavesAMark(mark)}, model / "pytorch_model.bin")
    line = refused(TextClassification, "--data.train", rows, "--model.name", model)
    assert "cannot be loaded: a pickle that" in line
    assert "which was not executed; use a model in *.safetensors" in line
    assert "weights_only" not in line  # the message of PyTorch explains how to load it


@pytest.mark.parametrize("write", WRITERS)
def test_that_pickle_would_leave_its_mark(tmp_path, write):
    write({"a": LeavesAMark(tmp_path / "mark")}, tmp_path / "weights.bin")
    if write is write_plain:
        pickle.loads((tmp_path / "weights.bin").read_bytes())
    else:
        torch.load(tmp_path / "weights.bin", weights_only=False)
    assert (tmp_path / "mark").exists()


def test_a_pickle_of_tensors_alone_is_loaded(start, model, rows):
    weights = transformers.BertModel.from_pretrained(model).state_dict()
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    assert start(TextClassification, "--data.train", rows, "--model.name", model, "--check").code == 0


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "model.safetensors"])
def test_shards_outside_of_a_models_folder_are_refused(refused, model, rows, mark, kind):
    write_zip(LeavesAMark(mark), model.parent / "weights.bin")
    (model / f"{kind}.index.json").write_text(json.dumps({"weight_map": {"a": "../weights.bin"}}))
    line = refused(TextClassification, "--data.train", rows, "--model.name", model)
    assert f"{kind}.index.json names '../weights.bin', which is not a file of the folder" in line


def test_adapters_that_are_a_pickle_of_code_are_refused_and_not_run(refused, model, rows, mark):
    about = {"peft_type": "LORA", "r": 2, "target_modules": ["query"], "base_model_name_or_path": str(model)}
    (model / "adapter_config.json").write_text(json.dumps(about))
    write_zip({"a": LeavesAMark(mark)}, model / "adapter_model.bin")
    assert "cannot be loaded" in refused(TextClassification, "--data.train", rows, "--model.name", model)


def test_code_that_comes_with_a_model_is_not_run(refused, start, model, rows, mark):
    (model / "mine.py").write_text(marking_code(mark))
    auto = {"AutoConfig": "mine.C", "AutoModelForSequenceClassification": "mine.M", "AutoModel": "mine.M"}
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.T", None]})
    change(model / "config.json", auto_map=auto)  # of a type that transformers has built in
    assert start(TextClassification, "--data.train", rows, "--model.name", model, "--check").code == 0
    change(model / "config.json", model_type="mine")
    line = refused(TextClassification, "--data.train", rows, "--model.name", model)
    assert "cannot be loaded without the Python code in it, which was not executed" in line
    assert "--model.trust_remote_code true" in line


def test_code_that_comes_with_an_image_processor_is_not_run(refused, tmp_path, mark):
    model = shutil.copytree(ROOT / "gradacc_hf/embedded/tiny_vit", tmp_path / "vit")
    transformers.AutoModelForImageClassification.from_config(
        transformers.AutoConfig.from_pretrained(model)
    ).save_pretrained(model)
    (model / "mine.py").write_text(marking_code(mark))
    (model / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "Mine", "auto_map": {"AutoImageProcessor": "mine.P"}})
    )
    line = refused(ImageClassification, "--data.train", "embedded:digits", "--model.name", model)
    assert "the image processor of" in line
    assert "which was not executed" in line


# Data


def test_a_pickle_named_like_data_is_refused_and_not_run(refused, tmp_path, mark):
    for suffix in ("parquet", "jsonl", "csv"):
        write_plain(LeavesAMark(mark), file := tmp_path / f"rows.{suffix}")
        assert f"rows.{suffix}" in refused(TextClassification, "--data.train", file)


def test_a_script_that_comes_with_data_is_not_run(refused, tmp_path, rows, mark):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.py").write_text(marking_code(mark))
    assert "no data file in" in refused(TextClassification, "--data.train", folder)
    assert "is a .py; allowed" in refused(TextClassification, "--data.train", folder / "mine.py")
    shutil.copy(rows, folder)
    assert "mine.py, which makes the data and is not executed" in refused(
        TextClassification, "--data.train", folder
    )


@pytest.mark.parametrize("elsewhere", ["../rows.jsonl", "{}/rows.jsonl", "http://127.0.0.1:9/rows.jsonl"])
@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
def test_a_data_folder_says_nothing_of_files_elsewhere(refused, tmp_path, rows, file, elsewhere):
    (folder := tmp_path / "data").mkdir()
    shutil.copy(rows, folder)
    named = elsewhere.format(tmp_path)
    about = yaml.safe_dump(
        {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": named}]}]}
    )
    (folder / file).write_text(f"---\n{about}---\n" if file == "README.md" else about)
    assert f"{file} names {named!r}; allowed are files in its folder" in refused(
        TextClassification, "--data.train", folder
    )


def test_the_name_of_a_kind_of_file_reads_no_files_that_happen_to_be_here(start, refused, rows, mark):
    write_plain(LeavesAMark(mark), rows.parent / "rows.pkl")
    assert "'pandas' is a kind of file" in refused(TextClassification, "--data.train", "pandas")
    (folder := rows.parent / "json").mkdir()
    shutil.copy(rows, folder)
    assert start(TextClassification, "--data.train", "json", "--check").code == 0


# Runs of other people


@pytest.mark.parametrize(
    "words", [("predict", "run", "tea"), ("verify", "--run", "run")], ids=lambda words: words[0]
)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "optimizer.pt"])
def test_a_run_with_a_pickle_among_its_models_is_refused(gradacc, run, mark, words, name):
    write_zip({"a": LeavesAMark(mark)}, run / "best" / name)
    ended = gradacc(*words)
    assert is_one_line(ended)
    found = f"found {name}, a pickle, which can execute code and which gradacc never writes"
    assert f"run/best: {found}" in ended[1]
    assert gradacc("report", run)[0] == 0  # no model is opened


@pytest.mark.parametrize("where", ["inside", "beside"])
def test_a_recipe_that_came_with_a_run_is_not_run(gradacc, run, mark, where):
    recipe = (run if where == "inside" else run.parent) / "mine.py"
    recipe.write_text(marking_code(mark))
    config = yaml.safe_load((run / "config.yaml").read_text())
    for given in (os.path.relpath(recipe, run), *([str(recipe)] if where == "inside" else [])):
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"recipe": given}))
        for words in (("predict", run, "tea"), ("verify", "--run", run)):
            ended = gradacc(*words)
            assert is_one_line(ended)
            assert "mine.py', not executed, as it may have come with the run; allowed: " in ended[1]


def test_the_code_of_a_runs_model_is_run_only_where_the_user_says_so(
    gradacc, start, model, rows, tmp_path, monkeypatch
):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (model / "mine.py").write_text(
        "from transformers import BertConfig, BertForSequenceClassification\n"
        "class C(BertConfig):\n    model_type = 'mine'\n"
        "class M(BertForSequenceClassification):\n    config_class = C\n"
    )
    auto = {"AutoConfig": "mine.C", "AutoModelForSequenceClassification": "mine.M"}
    change(model / "config.json", model_type="mine", auto_map=auto)
    flags = ["--data.train", rows, "--model.name", model, "--model.trust_remote_code", "true"]
    assert start(TextClassification, *flags, "--train.max_windows", 1, "--output.dir", "out").code == 0
    config = yaml.safe_load(Path("out/config.yaml").read_text())
    assert config["model"]["trust_remote_code"] is True
    ended = gradacc("predict", "out", "tea")
    assert is_one_line(ended)
    assert "which was not executed" in ended[1]
    assert gradacc("predict", "out", "tea", "--trust_remote_code")[0] == 0


# Names that become paths, and links


def test_a_name_leads_nowhere_else(gradacc, refused, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (
        ("cp", "../recipes/minimal", "out"),
        ("cp", "lessons/../minimal", "out"),
        ("lessons", "../minimal"),
        ("lessons", str(ROOT / "recipes/minimal")),
    ):
        assert is_one_line(gradacc(*words)), words
    for name in ("../../secrets", "a/b/c", "https://example.org/x"):
        line = refused(TextClassification, "--data.train", rows, "--output.push_to_hub", name)
        assert "allowed is NAME or USER/NAME" in line
    line = refused(TextClassification, "--data.train", rows, "--budget", "../../nowhere")
    assert "which cannot be read (No such file or directory)" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_the_folder_of_a_run_is_named_by_its_config_and_lies_under_runs(tmp_path, monkeypatch):
    (home := tmp_path / "home").mkdir()
    monkeypatch.chdir(home)
    for config in ("../up.yaml", "..yaml", "/etc/x.yaml"):
        assert next_folder(Path(config).stem).resolve().parent == home / "runs"
    assert list(tmp_path.iterdir()) == [home]


def test_an_output_folder_that_the_user_names_may_be_anywhere(start, rows, tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "big")  # as on machines with a small home folder
    here = ["--data.train", rows, "--train.max_windows", 1]
    assert start(TextClassification, *here, "--output.dir", "../elsewhere/../elsewhere/a").code == 0
    assert start(TextClassification, *here).code == 0
    assert [path.name for path in (tmp_path / "big").iterdir()] == ["run-1"]


@pytest.fixture
def precious(tmp_path):
    """Return a folder that runs must not change."""
    (folder := tmp_path / "precious").mkdir()
    for name in ("config.yaml", "history.jsonl", "model.safetensors", "README.md"):
        (folder / name).write_text("mine")
    return folder


def is_untouched(folder):
    return sorted((path.name, path.read_text()) for path in folder.iterdir()) == [
        (name, "mine") for name in ("README.md", "config.yaml", "history.jsonl", "model.safetensors")
    ]


@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_an_output_folder_that_is_a_link_is_refused(refused, rows, tmp_path, precious, overwrite):
    for target in (precious, tmp_path / "gone"):
        (link := tmp_path / "out").symlink_to(target)
        given = ["--output.dir", "out", "--output.overwrite", overwrite]
        line = refused(TextClassification, "--data.train", rows, *given)
        assert f"output.dir: out is a link to {target}; a run does not write through links" in line
        link.unlink()
    assert is_untouched(precious)
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    "place", ["best", "logs", "last/README.md", "config.yaml", ".config.yaml.unfinished"]
)
def test_a_link_in_a_run_that_is_given_up_is_refused(refused, run, tmp_path, precious, place):
    is_file = Path(place).suffix
    if (run / place).exists():
        (run / place).unlink() if is_file else shutil.rmtree(run / place)
    (run / place).symlink_to(precious / "README.md" if is_file else precious)
    given = ["--output.dir", "run", "--output.overwrite", "true"]
    line = refused(TextClassification, "--data.train", "rows.jsonl", *given)
    assert f"output.dir: run/{place} is a link to" in line
    assert is_untouched(precious)


@pytest.mark.parametrize(
    "place", ["best", "best/README.md", ".verify.json.unfinished", "last/.README.md.unfinished"]
)
def test_verifying_a_run_writes_through_no_link(gradacc, run, precious, place):
    if (run / place).is_dir():
        shutil.rmtree(run / place)
    (run / place).unlink(missing_ok=True)
    (run / place).symlink_to(precious if place == "best" else precious / "README.md")
    ended = gradacc("verify", "--run", run)
    assert is_one_line(ended)
    assert f"run/{place} is a link to" in ended[1]
    assert is_untouched(precious)


def test_a_report_is_written_through_no_link(gradacc, run, precious):
    (run / "report.html").unlink()
    (run / "report.html").symlink_to(precious / "README.md")
    assert is_one_line(gradacc("report", run))
    (run / "report.html").unlink()
    (run / ".report.html.unfinished").symlink_to(precious / "README.md")
    assert is_one_line(gradacc("report", run))
    assert is_untouched(precious)


def test_a_copy_is_written_through_no_link(gradacc, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/minimal.py").symlink_to(tmp_path / "gone")
    ended = gradacc("cp", "minimal", tmp_path)
    assert is_one_line(ended)
    assert "these files exist" in ended[1]
    assert not (tmp_path / "gone").exists()


# Files of a run


def test_no_file_of_a_run_is_everybodys_to_write(trained):
    run, _ = trained
    paths = [run, *run.rglob("*")]
    assert {"best", "last", "logs", "config.yaml", "report.html"} <= {path.name for path in paths}
    assert any(path.name.startswith("events.out.tfevents") for path in paths)
    assert [str(path) for path in paths if path.stat().st_mode & stat.S_IWOTH] == []


def test_the_users_umask_is_as_before_and_never_loosened(start, rows, tmp_path):
    for given, left in ((0o000, 0o664), (0o077, 0o600)):
        before = os.umask(given)
        try:
            folder = f"out{given}"
            flags = ["--train.max_windows", 1, "--output.dir", folder]
            assert start(TextClassification, "--data.train", rows, *flags).code == 0
            assert os.umask(given) == given
        finally:
            os.umask(before)
        assert stat.S_IMODE(Path(folder, "summary.json").stat().st_mode) == left


def test_no_token_is_written_or_said(trained):
    run, said = trained
    files = [path for path in run.rglob("*") if path.is_file()]
    for secret in (TOKEN, "t0psecret"):
        assert [str(path) for path in files if secret.encode() in path.read_bytes()] == []
        assert secret not in said
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["revision"] == (
        f"https://{HIDDEN}@hf.co/x?token={HIDDEN}"
    )


def test_no_token_is_in_the_line_of_a_bad_input(refused, rows):
    line = refused(TextClassification, "--data.train", rows, "--model.name", f"https://me:{TOKEN}@hf.co/x")
    assert TOKEN not in line
    assert f"https://{HIDDEN}@hf.co/x" in line


@pytest.mark.parametrize(
    "harmless",
    [
        "hf_classification/rows.csv",
        "data/sk-learn-digits-dataset.csv",
        "https://example.org/a@b",
        "token: {question} Basic programming --token x",
        "hf-internal-testing/tiny-random-bert",
    ],
)
def test_settings_that_hold_no_token_are_written_as_they_are(harmless):
    config = Config(data=DataConfig(train=harmless))
    assert yaml.safe_load(settings(config))["data"]["train"] == harmless


@pytest.mark.parametrize(
    "secret", [TOKEN, "ghp_" + "a1B2" * 9, "sk-proj-" + "a1B2" * 9, "glpat-" + "a1B2" * 5]
)
def test_tokens_of_known_kinds_are_hidden_in_any_text(secret):
    assert without_tokens({"a": [f"x={secret}", 1, None]}) == {"a": [f"x={HIDDEN}", 1, None]}


# Where it runs


@pytest.mark.parametrize(
    ("place", "instead"),
    [
        ({"device": "cuda", "engine": "DEEPSPEED", "system": "linux"}, "launch with DDP or FSDP"),
        ({"device": "cpu", "engine": "MEGATRON_LM", "system": "linux"}, "launch with DDP or FSDP"),
        ({"device": "xla", "system": "linux"}, "use a CUDA GPU, or the CPU (USE_TORCH_XLA=false"),
        ({"device": "mps", "system": "darwin"}, "use a CUDA GPU, or the CPU (ACCELERATE_USE_CPU=true"),
        ({"device": "xpu", "system": "linux"}, "use a CUDA GPU, or the CPU (ACCELERATE_USE_CPU=true"),
        ({"device": "npu", "system": "linux"}, "use a CUDA GPU, or the CPU (ACCELERATE_USE_CPU=true"),
        ({"device": "cuda", "system": "win32"}, "use WSL 2"),
        ({"device": "cpu", "system": "cygwin"}, "use WSL 2"),
    ],
)
def test_where_it_is_not_for_is_refused_with_what_to_use_instead(place, instead):
    with pytest.raises(InputError) as refused:
        refuse_place(**place)
    assert instead in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("system", ["linux", "darwin"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("engine", ["", "NO", "MULTI_GPU", "MULTI_CPU", "FSDP"])
def test_where_it_is_for_is_not_refused(system, device, engine):
    refuse_place(device, engine, system)


@pytest.mark.parametrize("engine", ["DEEPSPEED", "MEGATRON_LM"])
def test_a_recipe_that_is_launched_for_deepspeed_says_so_before_it_reads_anything(
    refused, monkeypatch, engine
):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")  # as `accelerate launch --use_deepspeed` does
    line = refused(TextClassification, "--data.train", "nowhere.csv", "--model.name", "nobody/nothing")
    assert line.startswith(f"error: {engine} accumulates and scales gradients by itself")


@pytest.mark.parametrize(("device", "engine"), [("cuda", "DEEPSPEED"), ("mps", "NO"), ("xla", "XLA")])
def test_exact_trainer_is_refused_there_too(device, engine):
    accelerator = SimpleNamespace(
        device=torch.device(device), distributed_type=SimpleNamespace(value=engine), parallelism_config=None
    )
    with pytest.raises(ValueError, match=r"DDP or FSDP|CUDA GPU"):
        refuse_unsupported(SimpleNamespace(args=SimpleNamespace(n_gpu=1), accelerator=accelerator))


def test_the_package_loads_where_there_is_no_posix_so_that_it_can_say_what_to_use_instead():
    absent = {"fcntl", "grp", "posix", "pwd", "resource", "syslog", "termios"}
    for file in (ROOT / "gradacc_hf").rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in getattr(node, "names", ())] + [getattr(node, "module", None)]
            assert not absent & set(names), file


def test_a_config_that_is_no_data_but_python_is_refused(tmp_path, mark):
    (config := tmp_path / "a.yaml").write_text(f"model: !!python/object/apply:os.mkdir [{mark}]\n")
    with pytest.raises(InputError, match="is not YAML"):
        read_command_line(["--config", str(config)])
