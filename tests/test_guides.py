"""Every guide: its code runs, its commands run, its links lead somewhere.

A code block runs as it stands, or the HTML comment above it has the reason: `<!-- not run: reason -->`.
Commands run in a folder that looks like the repository. `SHORTENED` shortens commands that would take long.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass
from functools import cache
from types import SimpleNamespace
from urllib.parse import urlsplit

import launch_fixtures
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from guides import GUIDES, LANGUAGES, README, anchors, blocks, links, prose, read
from PIL import Image
from recipe_runs import load_recipe
from transformers import TrainingArguments

import gradacc_hf
from gradacc_hf import embedded
from gradacc_hf.bench.ui_latency import served
from gradacc_hf.cli import main as cli
from gradacc_hf.config.schema import Config
from gradacc_hf.recipe import Recipe
from gradacc_hf.verification.tiny_models import build_head

venv = launch_fixtures.venv

ONE_WINDOW = "--train.max_windows 1 --output.tracker none"
SMALL_WINDOW = f"{ONE_WINDOW} --batch.effective 8 --budget.max_tokens 512 --data.validation_fraction 0.02"
SHORTENED = {
    r"\./launch\.sh recipes/minimal\.py": "--max_windows 1",
    r"\./launch\.sh recipes/compare_trainer\.py": "",
    r"\./launch\.sh recipes/.*noise_scale": f"{ONE_WINDOW} --optim.scheduler constant --optim.warmup_ratio 0",
    r"\./launch\.sh recipes/.*--batch\.effective": ONE_WINDOW,
    r"\./launch\.sh recipes/.*--budget\.max_tokens": SMALL_WINDOW.replace("--budget.max_tokens 512 ", ""),
    r"\./launch\.sh recipes/(?!.*--help)": SMALL_WINDOW,
    r"gradacc compare": "--windows 1 --repeats 1 --contenders trainer,ours --budget.max_tokens 1024",
}
"""Pattern of a command → what is appended to it, so that it ends sooner; the first that matches."""
QUICK = re.compile(r"gradacc (ls|cp|new|lessons$|doctor|play --space)")
"""Commands of a few seconds. All others are marked slow."""
IS_PAGE = re.compile(r"(gradacc|\./launch\.sh) play$")
FINDS_FAULTS = re.compile(r"gradacc (doctor|verify|plan) |python tests/helpers/prose\.py")
"""Commands that may end with exit code 1, if they find a fault."""


# ---- code ----


def parameters(*languages):
    """The blocks that run, each as a parameter."""
    return [
        pytest.param(block, id=block.name, marks=[pytest.mark.slow] if block.note == "slow" else [])
        for block in blocks(*languages)
        if block.runs
    ]


def test_every_block_runs_or_says_why_not():
    found = blocks(*LANGUAGES)
    assert len(found) > 30
    for guide in GUIDES:
        assert read(guide).count("```") == 2 * sum(block.file == guide for block in found), guide
    for block in found:
        assert block.note in ("", "slow") or re.match(r"not run: \w.{10,}", block.note), block.name
        if block.language == "":  # the drawing of the layers, which tests/test_map.py checks
            assert block.file == ROOT / "gradacc_hf/README.md"
        if block.language == "diff":  # which tests/test_readme.py checks
            assert block.file == README
        if block.language in ("jsonl", "yaml"):  # which test_format_examples.py and test_mixtures.py read
            assert block.file == ROOT / "recipes/README.md"


def names(folder, text):
    """Return what a Python block of the guides uses: a tiny classifier, its data, a Trainer's arguments."""
    head, accelerator = build_head("sequence_classification", "bert"), Accelerator(cpu=True)
    model, optimizer = head.model, torch.optim.AdamW(head.model.parameters(), lr=1e-3)
    if re.search(r"accumulate\(|diagnose\(", text):
        model, optimizer = accelerator.prepare(model, optimizer)
    dataset = head.examples([9, 5] * 40)
    rows = [json.dumps({**example, "labels": int(example["labels"])}) for example in dataset]
    (folder / "big.jsonl").write_text("\n".join(rows))
    shared = {"max_tokens": 96, "collate_fn": head.collate, "accelerator": accelerator}
    windows = gradacc_hf.WindowLoader(dataset, 16, **shared)
    found = {"gradacc_hf": gradacc_hf, "accelerator": accelerator, "model": model, "optimizer": optimizer}
    found |= {"dataset": dataset, "windows": windows, "collate": head.collate, "output_dir": folder / "run"}
    found |= {"tokenize": lambda example: example, "train_one_epoch": lambda: None}
    found |= {"trainer": SimpleNamespace(add_callback=lambda callback: None)}
    if "args=args" in text:  # making them resets Accelerate's state
        settings = {"max_steps": 1, "gradient_accumulation_steps": 2, "report_to": "none", "use_cpu": True}
        found["args"] = TrainingArguments(str(folder), **settings)
    return found


@pytest.mark.parametrize("block", [p for p in parameters("python") if p.values[0].file != README])
def test_a_python_block_runs_as_it_stands(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = names(tmp_path, block.text)
    exec(compile(block.text, block.name, "exec"), found)
    if "big.jsonl" in block.text:
        assert found["windows"].state_dict()["epoch"] == 1
        assert len(found["windows"]) == 2


# ---- commands ----


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, venv):
    """Return a folder that looks like the repository, with a user's data, and the environment of commands."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("launch.sh", "pyproject.toml", "constraints.txt", "README.md", "gradacc_hf"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("recipes", "configs", "tests"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "copies").mkdir()
    texts = [f"{'good' if i % 3 else 'bad'} words {'and more ' * (i % 11)}" for i in range(60)]
    rows = [f"{text},{'yes' if i % 3 else 'no'}" for i, text in enumerate(texts)]
    (folder / "mine.csv").write_text("\n".join(["body,topic", *rows]))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:3]))
    labelled = embedded.docstring_modules()[1].select(range(40))
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    question = {"question": "Who sang?", "context": "Ada sang."}
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n")
    Image.new("L", (8, 8)).save(folder / "digit.png")
    environment = {
        **os.environ,
        "PATH": f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "VENV": str(venv),
        "HF_HOME": str(tmp_path_factory.mktemp("hf")),
        "COLUMNS": "120",
    }
    return SimpleNamespace(folder=folder, environment=environment)


def run(workplace, command):
    """Run a command of a guide, and return the finished process."""
    done = subprocess.run(
        shlex.split(command),
        cwd=workplace.folder / ("copies" if command.startswith("gradacc cp") else "."),
        env=workplace.environment,
        capture_output=True,
        text=True,
    )
    allowed = (0, 1) if FINDS_FAULTS.match(command) else (0,)
    assert done.returncode in allowed, done.stdout + done.stderr
    assert "Traceback" not in done.stderr  # an exception has exit code 1, too
    return done


def make_run(workplace, name):
    """Train a recipe for one window, as the run that the guides use."""
    if not (workplace.folder / f"runs/{name}_offline-1").exists():
        config = f"--config configs/{name}_offline.yaml --output.dir runs/{name}_offline-1"
        run(workplace, f"{sys.executable} recipes/{name}.py {config} {SMALL_WINDOW}")


def commands():
    """Every command of the guides' shell blocks once, as a parameter."""
    found = {command: block for block in blocks("sh") if block.runs for command in block.commands}
    return [
        pytest.param(
            command,
            id=f"{block.name} {command}",
            marks=[] if QUICK.match(command) else [pytest.mark.slow],
        )
        for command, block in found.items()
    ]


@pytest.mark.parametrize("command", commands())
def test_a_command_runs(command, workplace):
    if used := re.search(r"runs/(\w+)_offline-1", command):
        make_run(workplace, used[1])
    if IS_PAGE.match(command):
        with served(shlex.split(f"{command} --no-browser"), cwd=workplace.folder, env=workplace.environment):
            return
    more = next((more for pattern, more in SHORTENED.items() if re.match(pattern, command)), "")
    run(workplace, f"{command} {more}")


@pytest.mark.parametrize("block", parameters("console"))
def test_a_command_prints_what_the_guide_shows(block, workplace):
    """Lines that the guide shows follow each other, except where it has an ellipsis. Rounding may differ."""
    [command] = block.commands
    done = run(workplace, command)
    printed = [comparable(line) for line in done.stdout.splitlines()]
    shown, at, skips = [comparable(line) for line in block.text.splitlines()[1:]], 0, False
    for line in shown:
        if line == "…":
            skips = True
            continue
        assert line in (printed[at:] if skips else printed[at : at + 1]), done.stdout + done.stderr
        at, skips = printed.index(line, at) + 1, False
    assert skips or at == len(printed)


def comparable(line):
    """The line without trailing spaces, and with one word for errors of rounding."""
    return re.sub(r"\d(\.\d)?e-0\d", "tiny", line.rstrip())


def inline_commands():
    """Every `gradacc …` and `./launch.sh …` in the text of the guides, as words."""
    pattern = r"`((?:gradacc|\./launch\.sh) [^`\n]+)`"
    code = {code for guide in GUIDES for code in re.findall(pattern, prose(guide))}
    measurements = prose(ROOT / "gradacc_hf/bench/README.md")
    code |= {
        f"gradacc {code}" for code in re.findall(r"\| `((?:bench|verify|compare)\b[^`]*)` \|", measurements)
    }
    return [code.split() for code in sorted(code)]


@cache
def settings():
    """The settings of all recipes, as keys such as model.lora.rank."""

    def keys(config, prefix=""):
        for field in fields(config):
            value = getattr(config, field.name)
            yield from keys(value, f"{prefix}{field.name}.") if is_dataclass(value) else [prefix + field.name]

    modules = [load_recipe(name) for name in cli.recipes() if cli.configs(name)]
    found = [kind for module in modules for kind in vars(module).values() if isinstance(kind, type)]
    data = {kind.Data for kind in found if issubclass(kind, Recipe)}
    return {*keys(Config()), *(key for kind in data for key in keys(kind(), "data.")), "budget"}


def test_commands_in_the_text_exist_with_their_flags(monkeypatch, capsys):
    known, found = {"ls", "cp", "lessons", "report", *cli.COMMANDS}, inline_commands()
    launcher = (ROOT / "launch.sh").read_text(encoding="utf-8")
    assert len(found) > 30
    for program, name, *words in found:
        what = " ".join([program, name, *words])
        flags = [word for word in words if word.startswith("--") and word != "--help"]
        if program == "./launch.sh":
            is_setting = name.startswith("--")  # of the example
            assert is_setting or name in {*known, "test", "help", "RECIPE"} or (ROOT / name).is_file(), what
        else:
            assert name in {*known, "--help"}, what
        unknown = [flag for flag in flags if flag[2:] not in settings()]
        if unknown:
            topic = (name, words[0]) if name == "bench" else (name,)
            text = launcher if program == "./launch.sh" else help_of(topic, monkeypatch, capsys)
            assert [flag for flag in unknown if not re.search(rf"{flag}[\s,\])]", text)] == [], what


def help_of(topic, monkeypatch, capsys):
    """The help of a `gradacc` command."""
    monkeypatch.setattr(sys, "argv", ["gradacc", *topic, "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    return capsys.readouterr().out


# ---- links ----


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: str(guide.relative_to(ROOT)))
def test_every_link_leads_somewhere(guide):
    for link in links(read(guide)):
        url = urlsplit(link)
        if url.scheme:
            assert url.scheme == "https", link
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", url.netloc), link
            continue
        target = (guide.parent / url.path).resolve() if url.path else guide
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        if url.fragment:
            assert target.suffix == ".md", link
            assert url.fragment in anchors(target), link


def test_every_guide_can_be_reached_from_the_readme():
    reached, waiting = set(), [README]
    while waiting:
        guide = waiting.pop()
        if guide not in reached:
            reached.add(guide)
            paths = [urlsplit(link).path for link in links(read(guide)) if not urlsplit(link).scheme]
            waiting += [(guide.parent / path).resolve() for path in paths if path.endswith(".md")]
    assert set(GUIDES) - reached == set()


@pytest.mark.parametrize(
    "name",
    [
        "accumulation",
        "training",
        "padding",
        "hf_trainer",
        "doctor",
        "play",
        "bench",
        "../recipes",
        "../configs",
    ],
)
def test_every_entry_has_a_guide(name):
    assert (ROOT / "gradacc_hf" / name / "README.md").resolve() in GUIDES
