"""Model cards, and pushing them to the Hub: here a server that speaks as much of its language as needed."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import transformers
import yaml
from conftest import ROOT
from datasets import Dataset
from huggingface_hub import ModelCard, constants
from recipe_runs import run_file

from gradacc_hf.cli import verify as verify_command
from gradacc_hf.errors import InputError
from gradacc_hf.hub.model_card import facts, make_card, read_licence, refresh_cards
from gradacc_hf.recipe.loading import load_recipe
from gradacc_hf.run.runner import run as run_recipe

RECIPE = ROOT / "recipes" / "text_classification.py"
TOKEN = "hf_" + "Secret" * 6
CONFIG = ["--config", str(ROOT / "configs/text_classification_offline.yaml")]
METRICS = ["accuracy", "f1", "matthews_correlation"]


@pytest.fixture(scope="session")
def mine(tmp_path_factory):
    """A folder with a tiny model and data, as a user has them."""
    from gradacc_hf.embedded import minilm_path

    folder = tmp_path_factory.mktemp("private-place")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(tokenizer), **sizes)
    transformers.BertModel(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    rng = np.random.default_rng(0)
    words = {"ham": ["tea", "garden", "letter"], "spam": ["prize", "cash", "winner"]}
    rows = [{"text": " ".join(rng.choice(words[label], 5)), "label": label} for label in words] * 40
    (folder / "confidential.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def train(mine, tmp_path, monkeypatch):
    """The recipe in a process of its own, in an empty folder, its output there as `run`."""
    monkeypatch.chdir(tmp_path)

    def train(environment=None, **flags):
        settings = {
            "model.name": mine / "bert",
            "data.train": mine / "confidential.jsonl",
            "output.dir": "run",
        }
        settings |= {"data.max_length": 16, "batch.effective": 16, "output.tracker": "none"}
        settings |= {key.replace("__", "."): value for key, value in flags.items()}
        command = [sys.executable, RECIPE, *(f"--{key}={value}" for key, value in settings.items())]
        variables = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        variables |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(mine / "hub"), **(environment or {})}
        return subprocess.run(command, capture_output=True, text=True, env=variables, check=False)

    return train


@pytest.fixture(scope="session")
def finished(mine, tmp_path_factory):
    """A run that has ended, of which tests take a copy."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    flags = {"model.name": mine / "bert", "data.train": mine / "confidential.jsonl", "output.dir": folder}
    flags |= {"data.max_length": 16, "batch.effective": 16, "output.tracker": "none", "train.eval_every": 2}
    run_file(RECIPE, *(f"--{key}={value}" for key, value in flags.items()), "--train.max_windows=3")
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(finished, tmp_path / "run")


def load(folder):
    return ModelCard.load(Path(folder) / "README.md")


def metrics(card):
    return {result.metric_type: result.metric_value for result in card.data.eval_results}


def test_the_cards_of_a_run_say_what_it_did(run):
    summary = json.loads((run / "summary.json").read_text())
    for folder, which in (("best", "best"), ("last", "eval")):
        card = load(run / folder)
        assert metrics(card) == {k: v for k, v in summary[which].items() if k != "window"}
        assert card.data.metrics == METRICS
        assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-classification")
        assert f"after window {summary[which]['window']}." in card.text
        for metric in METRICS:
            values = f"{summary[which][metric]:.4f} | {summary['baseline'][metric]:.4f}"
            assert f"| {metric} | {values} |" in card.text
        for said in (
            "| effective batch size | 16 examples per window",
            "| windows | 3, 48 examples |",
            "| precision | fp32 |",
            "| processes | 1 |",
            "micro-batches of at most 2,048 padded tokens |",
            "72 training examples and 8 validation examples (8 of 80 training rows, held out by seed 0), of "
            "at most 16 tokens.",
            f"transformers {transformers.__version__}",
            "Not verified on this run.",
            "Unknown: the base model (a local folder) has no model card with a licence.",
        ):
            assert said in card.text
        assert card.data.license == "unknown"
        assert card.data.base_model is None
        assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)[1])["optim"]["lr"] == 2e-5


def test_a_card_has_the_metrics_before_training_where_they_are_known(run):
    summary = json.loads((run / "summary.json").read_text())
    summary["evaluations"].insert(0, {"window": 0, "accuracy": 0.25})
    (run / "summary.json").write_text(json.dumps(summary))
    refresh_cards(run)
    text = load(run / "best").text
    assert "| metric | this model | before training | baseline |" in text
    accuracy, baseline = (summary[name]["accuracy"] for name in ("best", "baseline"))
    assert f"| accuracy | {accuracy:.4f} | 0.2500 | {baseline:.4f} |" in text
    assert re.search(r"^\| loss \| \d+\.\d{4} \| – \| – \|$", text, re.MULTILINE)


def test_no_card_names_a_file_a_folder_or_a_user_of_this_machine(run, mine):
    for folder in ("best", "last"):
        text = (run / folder / "README.md").read_text()
        for private in ("confidential", "private-place", "/tmp", str(ROOT), str(Path.home())):
            assert private not in text


def test_the_snippet_of_a_card_runs_as_it_stands(run):
    snippet = re.search(r"```python\n(.*?)```", load(run / "best").text, re.DOTALL)[1]
    assert len([line for line in snippet.splitlines() if line]) <= 5
    done = subprocess.run([sys.executable, "-c", snippet], cwd=run / "best", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"'label': '(ham|spam)', 'score': 0\.\d+", done.stdout)


@pytest.mark.slow
def test_the_snippet_of_adapters_runs_as_it_stands_and_knows_the_labels(train):
    assert train(train__max_windows=1, model__lora__rank=2).returncode == 0
    snippet = re.search(r"```python\n(.*?)```", load(Path("run/best")).text, re.DOTALL)[1]
    assert len([line for line in snippet.splitlines() if line]) <= 5
    done = subprocess.run([sys.executable, "-c", snippet], cwd="run/best", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"'label': '(ham|spam)', 'score': 0\.\d+", done.stdout)


@pytest.mark.slow
def test_a_card_is_there_with_the_model_before_the_run_ends(train):
    """Killed right after its first evaluation, a run has a whole best/, card included."""
    Path("sitecustomize.py").write_text(
        "import os, gradacc_hf.training.finetune as finetune\n"
        "save = finetune.save_model\n"
        "def save_and_die(model, folder, *rest, **more):\n"
        "    save(model, folder, *rest, **more)\n"
        "    os._exit(9)\n"
        "finetune.save_model = save_and_die\n"
    )
    done = train({"PYTHONPATH": f".{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}, train__eval_every=1)
    assert done.returncode == 9, done.stderr
    card = load("run/best")
    assert metrics(card).keys() == {"loss", *METRICS}
    assert "| windows | unknown: the run had not ended when this card was written |" in card.text
    assert not Path("run/summary.json").exists()


def test_a_model_that_was_not_evaluated_claims_no_metrics(run):
    summary = json.loads((run / "summary.json").read_text())
    config = yaml.safe_load((run / "config.yaml").read_text())
    for nothing in (None, {}, {"loss": None}, {"loss": float("nan")}):
        card = make_card(run / "last", config, summary, nothing)
        assert "This model was not evaluated." in card.text
        assert card.data.eval_results is None
        yaml.safe_load(card.data.to_yaml())


@pytest.mark.slow
def test_the_verdict_of_verify_comes_into_the_cards(run):
    done = subprocess.run(
        [Path(sys.executable).with_name("gradacc"), "verify", "--run", run], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    verification = json.loads((run / "verify.json").read_text())
    assert verification["exact"]
    for folder in ("best", "last"):
        assert verification["verdict"] in load(run / folder).text
        assert "Not verified" not in load(run / folder).text
    verification["verdict"] = "Not exact: made up."
    (run / "verify.json").write_text(json.dumps(verification))
    refresh_cards(run)
    assert "Not exact: made up." in load(run / "best").text


@pytest.mark.parametrize("more", [["--batch.effective", "8"], ["--budget", "cpu"]])
def test_a_run_is_verified_as_it_was(run, more):
    with pytest.raises(InputError, match=f"{more[0]}: --run uses the settings of the run"):
        verify_command.main(["--run", str(run), *more])
    assert not (run / "verify.json").exists()


def test_a_licence_is_that_of_the_base_model_s_card_and_never_invented(tmp_path):
    for header, expected in (
        ("license: mit", ("mit", None, None)),
        ("license: other\nlicense_name: odd\nlicense_link: LICENSE", ("other", "odd", "LICENSE")),
        ("tags: [a]", ("unknown", None, None)),
        ("license: [", ("unknown", None, None)),
    ):
        (tmp_path / "README.md").write_text(f"---\n{header}\n---\n# A model\n")
        found = read_licence(str(tmp_path))
        assert (found.id, found.name, found.link) == expected
    assert read_licence(str(tmp_path / "gone")).id == "unknown"


def test_the_embedded_model_s_origin_and_licence_are_known():
    recipe = load_recipe(CONFIG)
    rows = Dataset.from_dict({"input_ids": [[1]]})
    found = facts(recipe, rows, rows)
    assert found.licence.id == "apache-2.0"
    assert found.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert found.data_about.startswith("The documentation of Python's standard library")


def test_what_looks_like_a_secret_is_hidden_in_a_card(run):
    summary = json.loads((run / "summary.json").read_text())
    config = yaml.safe_load((run / "config.yaml").read_text())
    summary["card"]["data"] = f"https://me:{TOKEN}@example.com/data"
    assert TOKEN not in str(make_card(run / "best", config, summary, summary["best"]))


# Pushing


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a push needs; what it was sent lies in the server's `requests`."""

    def do_GET(self):
        self.answer(self.server.user or {"error": "no"}, 200 if self.server.user else 401)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        self.server.requests.append((self.path, body, self.headers["Authorization"]))
        if self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            self.answer({"url": f"{self.server.url}/me/{name}", "name": f"me/{name}"})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            answers = [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self.answer({"files": answers})
        elif "/commit/" in self.path:
            found = {"commitUrl": f"{self.server.url}/me/x/commit/1", "commitOid": "1", "hookOutput": ""}
            if self.server.accepts:
                self.answer(found)
            else:
                self.answer({"error": f"no room for {TOKEN}"}, 400)
        else:
            self.answer({})

    def answer(self, content, code=200):
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.requests, server.accepts = f"http://127.0.0.1:{server.server_port}", [], True
    server.user = {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": "write"}}}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.environment = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    server.environment["HF_HUB_DISABLE_XET"] = "1"
    yield server
    server.shutdown()


def no_token_in(done, *folders):
    assert TOKEN not in done.stdout + done.stderr
    for folder in folders:
        for path in Path(folder).rglob("*"):
            assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def pushed_files(hub):
    """Name → content, of all commits."""
    commits = [body for path, body, _ in hub.requests if path == "/api/models/me/x/commit/main"]
    lines = [json.loads(line) for commit in commits for line in commit.splitlines()]
    files = [line["value"] for line in lines if line["key"] == "file"]
    return {file["path"]: base64.b64decode(file["content"]) for file in files}


@pytest.mark.slow
def test_adapters_are_pushed_with_the_name_of_their_base_not_with_its_folder(train, hub, mine):
    done = train(hub.environment, output__push_to_hub="x", train__max_windows=1, model__lora__rank=2)
    assert "pushed run/best" in done.stdout, done.stderr
    files = pushed_files(hub)
    assert sorted(files) == sorted(path.name for path in Path("run/best").iterdir())
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "bert"
    here = json.loads(Path("run/best/adapter_config.json").read_text())
    assert here["base_model_name_or_path"] == str(mine / "bert")
    assert {**json.loads(files["adapter_config.json"]), **here} == here
    for content in files.values():
        assert b"private-place" not in content


def test_the_best_model_is_pushed_whole_with_its_card(train, hub, mine):
    done = train(
        hub.environment, output__push_to_hub="x", output__tracker="tensorboard", train__max_windows=2
    )
    assert done.returncode == 0, done.stderr
    assert f"pushed run/best to {hub.url}/me/x" in done.stdout
    assert {authorization for _, _, authorization in hub.requests} == {f"Bearer {TOKEN}"}
    files = pushed_files(hub)
    assert files == {path.name: path.read_bytes() for path in Path("run/best").iterdir()}
    card = files["README.md"].decode()
    assert 'model="me/x"' in card
    assert "\n# me/x\n" in card
    for content in files.values():
        assert b"private-place" not in content
    no_token_in(done, ".", mine)
    assert all(TOKEN not in body for _, body, _ in hub.requests)


@pytest.mark.slow
def test_a_push_that_fails_leaves_the_run_and_says_how_to_do_it_later(train, hub):
    hub.accepts = False
    done = train(hub.environment, output__push_to_hub="us/x", train__max_windows=1)
    assert done.returncode == 0, done.stderr
    assert "not pushed: " in done.stderr
    assert done.stderr.rstrip().endswith("push it later: hf upload us/x run/best .")
    assert "Traceback" not in done.stderr
    assert Path("run/summary.json").exists()
    assert load("run/best").data.eval_results
    no_token_in(done, ".")


@pytest.mark.parametrize(
    ("name", "changed", "user", "said"),
    [
        ("a b", {}, {}, "found 'a b'; allowed is NAME or USER/NAME"),
        ("a/b/c", {}, {}, "found 'a/b/c'; allowed is NAME or USER/NAME"),
        ("x", {"HF_HUB_OFFLINE": True}, {}, "HF_HUB_OFFLINE is set"),
        ("x", {"HF_TOKEN": ""}, {}, "found no token of the Hub; hf auth login, or push later"),
        ("x", {"ENDPOINT": "http://127.0.0.1:9"}, {}, "the Hub does not answer"),
        ("x", {}, None, "the Hub does not accept the token"),
        ("x", {}, {"auth": {"accessToken": {"role": "read"}}}, "may only read"),
        ("them/x", {}, {}, "'them' is not yours; allowed is one of me, us"),
    ],
)
def test_what_would_make_a_push_fail_is_said_in_one_line_before_the_training(
    mine, tmp_path, hub, monkeypatch, capfd, name, changed, user, said
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", changed.get("HF_TOKEN", TOKEN))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", changed.get("HF_HUB_OFFLINE", False))
    monkeypatch.setattr(constants, "ENDPOINT", changed.get("ENDPOINT", hub.url))
    hub.user = None if user is None else hub.user | user
    flags = ["--model.name", str(mine / "bert"), "--data.train", str(mine / "confidential.jsonl")]
    with pytest.raises(SystemExit) as end:
        run_recipe(type(load_recipe(CONFIG)), [*flags, "--output.push_to_hub", name])
    assert end.value.code == 2
    out, err = capfd.readouterr()
    assert err.startswith("error: output.push_to_hub: ")
    assert err.count("\n") == 1
    assert said in err
    assert TOKEN not in out + err
    assert not list(tmp_path.iterdir())
