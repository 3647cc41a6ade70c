"""`gradacc report`: the page says what the files say, needs nothing but itself, and hides secrets."""

import json
import math
import re
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator

from gradacc_hf import WindowLoader, fine_tune
from gradacc_hf.cli import main as cli
from gradacc_hf.errors import InputError
from gradacc_hf.report import read_runs, write_report
from gradacc_hf.report.narrative import metric_title, noise, speed_ratios, verdict
from gradacc_hf.report.pictures import curves_of, dynamics_of, noise_curve, small_curves_of, windows_of
from gradacc_hf.report.runs import contenders
from gradacc_hf.report.tables import configurations
from gradacc_hf.utils.redaction import redact
from gradacc_hf.utils.sample_size import small_set_note
from gradacc_hf.verification.tiny_models import build_head

LENGTHS = [3, 20, 7, 31, 12, 5, 9, 26] * 4
FIRST_WINDOW = [[3, 5, 7, 9], [12, 20], [26, 31]]  # padded: 36 + 40 + 62
VOID = {"meta", "br"}


class Page(HTMLParser):
    """A page read back: its tags, its tables, its text, and what it would fetch."""

    def __init__(self, path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags, self.open, self.unclosed, self.links, self.ids = [], [], [], [], []
        self.text, self.tables, self.labels = "", {}, []
        self.feed(self.html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.links += [value for name, value in attrs.items() if name in ("src", "href", "xlink:href")]
        self.links += re.findall(r"url\(([^)]*)\)", attrs.get("style") or "")
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables[attrs["id"]] = self.table = []
        if tag == "tr":
            self.table.append([])
        if tag in ("td", "th"):
            self.table[-1].append("")
        self.labels += [attrs["aria-label"]] if tag == "svg" and "aria-label" in attrs else []

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if self.open.pop() != tag:
            self.unclosed.append(tag)

    def handle_data(self, data):
        if "style" in self.open:
            self.links += re.findall(r"url\(([^)]*)\)|@import", data)
        elif "svg" not in self.open:
            self.text += data
            if {"td", "th"} & set(self.open):
                self.table[-1][-1] += data

    def figures(self):
        """The table of figures: {contender: {column: text}}, ranges in the text."""
        head, *rows = [
            [" ".join(cell.replace("\u200b", "").split()) for cell in row] for row in self.tables["figures"]
        ]
        return {name: dict(zip(head[1:], cells, strict=True)) for name, *cells in rows}

    @property
    def titles(self):
        return re.findall(r"<h[23]>(.*?)</h", self.html)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A real run of four windows, as fine_tune leaves it, and a config.yaml as a recipe writes it."""
    folder = tmp_path_factory.mktemp("real") / "run"
    head = build_head("sequence_classification", "bert")
    windows = WindowLoader(
        head.examples(LENGTHS), 8, accelerator=Accelerator(cpu=True), collate_fn=head.collate, max_tokens=64
    )
    fine_tune(
        head.model,
        torch.optim.AdamW(head.model.parameters(), lr=1e-3),
        windows,
        accelerator=windows.accelerator,
        validate=lambda model: {"loss": 1.25, "accuracy": 0.75},
        output_dir=folder,
        summary={"baseline": {"accuracy": 0.5}},
    )
    config = {
        "config": "configs/mine.yaml",
        "model": {"name": "tiny-bert", "hub_token": "hunter2secret"},
        "train": {"best_metric": "accuracy", "seed": 0},
        "budget": {"max_tokens": 4096},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def page(real, tmp_path_factory):
    """The report of the real run."""
    return Page(write_report([real], tmp_path_factory.mktemp("report") / "page.html"))


def repeat(real, folder, seconds=1.0, errors=(), loss=1.0, **more):
    """A copy of the real run with extra keys; `seconds` and `loss` are factors."""
    shutil.copytree(real, folder, ignore=shutil.ignore_patterns("last", "best"))
    rows = [json.loads(line) for line in (real / "history.jsonl").read_text().splitlines()]
    for row in rows:
        row["loss"] *= loss
    for row, error in zip(rows, errors, strict=False):
        row["gradient_error"] = error
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = json.loads((real / "summary.json").read_text())
    summary["seconds"] *= seconds
    (folder / "summary.json").write_text(json.dumps(summary | more))
    return folder


@pytest.fixture(scope="module")
def compared(real, tmp_path_factory):
    """Two contenders with three repeats each, and their report."""
    folder = tmp_path_factory.mktemp("runs") / "compare_1"
    for seed in range(3):
        shared = {"seed": seed, "first_window": FIRST_WINDOW, "command": f"gradacc compare --seed {seed}"}
        shared["eval"] = {"window": 4, "loss": 1.25 + seed / 8, "accuracy": 0.75 - seed / 16}
        memory = 2**20 * (500 + seed)
        repeat(real, folder / f"trainer/seed_{seed}", 2.0 + seed / 2, (0.5, 4.4), 5.0, contender="Trainer",
               training_memory_bytes=memory, **shared)  # fmt: skip
        repeat(real, folder / f"kit/seed_{seed}", 1.0, (2e-7, 4e-7, 3e-7), contender="ours",
               training_memory_bytes=memory // 2, **shared)  # fmt: skip
    return SimpleNamespace(folder=folder, page=Page(write_report([folder])))


def test_a_real_run_becomes_one_page_that_fetches_nothing_and_runs_no_script(page):
    assert page.html.startswith("<!DOCTYPE html>")
    assert not page.unclosed
    assert not page.open
    assert "script" not in page.tags
    assert page.tags.count("svg") == 5, "loss, learning rate, norms of gradient and step, the first window"
    assert all(link.startswith("#") for link in page.links)
    assert "http" not in page.html
    assert not re.search(r"\son\w+=", page.html)


def test_everything_in_the_page_has_its_own_id_and_what_is_pointed_at_is_there(compared):
    page = compared.page
    assert len(set(page.ids)) == len(page.ids)
    assert {link.strip("#\"'") for link in page.links} <= set(page.ids)
    assert any(link.startswith("#window0-") for link in page.links), "hatches"


def test_pictures_follow_the_colours_of_the_page(compared):
    svgs = re.findall(r"<svg.*?</svg>", compared.page.html, flags=re.DOTALL)
    assert len(svgs) == 2 * 2 + 4 + 1 + 2 + 2 + 2, "keys, curves, dynamics, metrics, bars, windows"
    assert not [colour for svg in svgs for colour in re.findall(r"#[0-9a-f]{6}", svg)]
    assert "prefers-color-scheme: dark" in compared.page.html


def test_the_table_has_the_figures_of_the_files(real, page):
    found = page.figures()
    rows = [json.loads(line) for line in (real / "history.jsonl").read_text().splitlines()]
    summary = json.loads((real / "summary.json").read_text())
    seconds, tokens, padded = (sum(r[key] for r in rows) for key in ("seconds", "tokens", "padded_tokens"))
    assert found["run"] == {
        "accuracy": "0.7500",
        "validation loss": "1.2500",
        "loss, last window": f"{rows[-1]['loss']:.4f}",
        "examples/s": shown(32 / seconds),
        "tokens/s": shown(tokens / seconds),
        "padding": f"{100 * (1 - tokens / padded):.1f} %",
        "peak memory": f"{summary['peak_memory_bytes'] / 2**20:,.0f} MiB",
        "seconds": shown(seconds),
    }
    assert found["baseline"]["accuracy"] == "0.5000"


def shown(speed):
    return f"{speed:,.1f}" if speed < 1000 else f"{speed:,.0f}"


def test_repeats_are_one_contender_with_median_and_range(compared):
    found = compared.page.figures()
    assert list(found) == ["ours", "Trainer", "baseline"]
    seconds = json.loads((compared.folder / "kit/seed_0/summary.json").read_text())["seconds"]
    speeds = [32 / (seconds * factor) for factor in (2.0, 2.5, 3.0)]
    around = f" {shown(min(speeds))}–{shown(max(speeds))}"
    assert found["Trainer"]["examples/s"] == shown(statistics.median(speeds)) + around
    assert found["Trainer"]["accuracy"] == "0.6875 0.6250–0.7500"
    assert found["Trainer"]["memory to train"] == "501 MiB 500–502 MiB"
    assert found["Trainer"]["repeats"] == "3"
    assert found["Trainer"]["gradient error, worst"] == "4.4 ✗ off"
    assert found["ours"]["gradient error, worst"] == "4e-7 ✓ exact"


def test_the_verdict_says_who_is_exact_who_is_off_by_how_much_and_who_is_faster(compared):
    assert (
        "ours is exact: its gradients differ from the gradients of undivided windows by at most 4e-7; "
        "Trainer is not exact but off by 4.4 at worst." in compared.page.text
    )
    assert (
        "Per second, ours trains 2.5 × as many examples as Trainer (2.0–3.0) (medians of 3 pairs of runs)."
        in compared.page.text
    )
    assert "verify" not in compared.page.text


def test_the_page_has_its_sections_and_only_those_that_have_something_in_them(compared, page):
    expected = (
        "Figures, Curves, Loss, Gradient error, Learning rate, Gradient norm, "
        "Batch size, Weight change per step, Final metrics, Accuracy, "
    )
    expected += (
        "Validation loss, Speed and memory, Speed, Memory to train, One window, Plan, How to run it again"
    )
    runs = re.findall(r"<h3>(.*seed.*)</h3>", compared.page.html)
    assert compared.page.titles == [*expected.split(", "), *runs]
    assert page.titles == [
        "Figures",
        "Curves",
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Batch size",
        "Weight change per step",
        "One window",
        "Plan",
        "How to run it again",
    ]


def test_a_noise_scale_beyond_measure_is_said_and_one_measured_once_is_not(real, tmp_path):
    def said(measured, **interval):
        row = {"window": 1, "loss": 1.0, "examples": 64, "noise_scale": None, "noise_measured": measured}
        folder = tmp_path / f"{measured}{len(interval)}{interval.get('noise_low')}"
        folder.mkdir()
        (folder / "history.jsonl").write_text(json.dumps({**row, **interval}) + "\n")
        return noise(contenders(read_runs([folder])))

    unbounded = said(4, noise_low=150, noise_high=None)[0]
    assert said(0) == said(1, noise_low=0.0, noise_high=None) == []
    assert "is at least 150 examples (90% interval from 4 measurements): windows of 64 are much" in unbounded
    nothing = "cannot be determined from 4 measurements: no advice on windows of 64."
    assert nothing in said(4, noise_low=0.0, noise_high=None)[0]
    assert "the run records no interval of the gradient noise scale" in said(4)[0], "a run of version 0.1"


def test_the_noise_scale_is_drawn_from_its_first_interval_on_and_never_at_zero(real, tmp_path):
    found = [(0.0, 1), (0.0, 3), (12.0, 4), (15.0, 5)]
    rows = [json.loads(line) for line in (real / "history.jsonl").read_text().splitlines()]
    for row, (scale, measured) in zip(rows, found, strict=True):
        row |= {"noise_scale": scale, "noise_measured": measured, "noise_low": scale / 3, "noise_high": None}
    folder = repeat(real, tmp_path / "run")
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [curve] = [noise_curve(0, contender) for contender in contenders(read_runs([folder]))]
    assert [math.isnan(value) for value in curve.middle] == [True, True, False, False]
    assert list(curve.middle[2:]) == [12.0, 15.0]
    html = write_report([folder]).read_text(encoding="utf-8")
    assert "1e-9" not in html
    assert "Gradient noise scale" in html
    assert "(90% interval from 5 measurements)" in html


def test_accumulation_steps_other_than_planned_come_with_the_reason(real, tmp_path):
    def table(name, **more):
        folder = repeat(real, tmp_path / name, accumulation_steps={"min": 2, "mean": 4.7, "max": 14}, **more)
        rows = Page(write_report([folder])).tables["plan"]
        return {row[0]: row[1].replace("\xa0", " ") for row in rows}

    trial = {"max_tokens": 512, "seconds_per_token": 1.0, "counts": True}
    planned = {"min": 2, "mean": 3.3, "max": 4}
    tuned = table("a", planned_accumulation_steps=planned, tuning={"max_tokens": 256, "trials": [trial] * 9})
    assert tuned["accumulation steps: min / mean / max"] == "2 / 4.7 / 14"
    assert tuned["accumulation steps as planned"] == (
        "2 / 3.3 / 4 the first 9 windows tried micro-batch sizes, then kept 256 tokens"
    )
    split_finer = table("b", planned_accumulation_steps=planned, replays=1)
    assert "memory ran out" in split_finer["accumulation steps as planned"]
    removed = table("e", planned_accumulation_steps=planned, tokens=100, padded_tokens=100)
    assert removed["accumulation steps as planned"].endswith("with padding, and the run computes none")
    same = table("c", planned_accumulation_steps={"min": 2, "mean": 4.7, "max": 14})
    assert "accumulation steps as planned" not in same
    assert "accumulation steps as planned" not in table("d")


def test_losses_that_are_far_apart_are_on_a_logarithmic_axis(compared, real, tmp_path):
    assert "The axis is logarithmic." in compared.page.text
    repeat(real, tmp_path / "a", contender="a")
    repeat(real, tmp_path / "b", contender="b", loss=2.0)
    assert "logarithmic" not in curves_of(contenders(read_runs([tmp_path])))[0].note


def test_the_picture_of_a_window_names_its_padding_and_draws_every_example(compared):
    padding = 100 * (1 - sum(map(sum, FIRST_WINDOW)) / 138)
    assert f"ours3 micro-batches, {padding:.1f} % padding" in compared.page.text.replace("\xa0", " ")
    svg = re.search(
        r'<g id="window0-patch_\d+">\s*<path d="([^"]*)"[^>]*fill: var\(--c0\)', compared.page.html
    )
    assert svg is not None
    corners = [[float(x) for x in re.findall(r"[ML] ([\d.]+)", bar)] for bar in svg[1].split("z")[:-1]]
    lefts, rights = [min(xs) for xs in corners], [max(xs) for xs in corners]
    assert len(set(lefts)) == 1
    widths = [right - left for left, right in zip(lefts, rights, strict=True)]
    lengths = [length for lengths in FIRST_WINDOW for length in lengths]
    assert [width / widths[-1] for width in widths] == pytest.approx([n / 31 for n in lengths], abs=1e-4)


def test_the_picture_of_a_window_without_padding_has_no_hatching(real, tmp_path):
    repeat(real, tmp_path / "padded", contender="a", first_window=FIRST_WINDOW, tokens=113, padded_tokens=138)
    repeat(real, tmp_path / "packed", contender="b", first_window=FIRST_WINDOW, tokens=113, padded_tokens=113)
    figures = windows_of(contenders(read_runs([tmp_path])))
    notes = {figure.title: figure.note for figure in figures}
    hatched = {figure.title: "<pattern" in figure.svg for figure in figures}
    assert notes == {"a": "3 micro-batches, 18.1\xa0% padding", "b": "3 micro-batches, no padding computed"}
    assert hatched == {"a": True, "b": False}


def test_without_gradient_errors_it_says_so_and_names_the_command_that_measures_them(page):
    assert "Final accuracy 0.7500 (baseline 0.5000) and validation loss 1.2500." in page.text
    assert "Whether gradients are exact was not measured in this run. To measure it: gradacc verify --run" in page.text  # fmt: skip  # noqa: E501


def test_what_verify_found_is_said(real, tmp_path):
    run = repeat(real, tmp_path / "run")
    (run / "verify.json").write_text('{"verdict": "Exact: 4 micro-batches."}')
    page = Page(write_report([run]))
    assert "by gradacc verify before training: Exact: 4 micro-batches." in page.text
    assert "not measured" not in page.text


def test_a_gradient_error_that_is_null_is_not_exact(real, tmp_path):
    repeat(real, tmp_path / "run", errors=(1e-7, math.nan))
    page = Page(write_report([tmp_path]))
    assert page.figures()["run"]["gradient error, worst"] == "not finite ✗ off"
    assert "run is not exact but off by NaN or infinity at worst." in page.text


def test_contenders_whose_gradients_nobody_measured_are_named(real, tmp_path):
    for name in ("a", "b", "c", "d"):
        repeat(real, tmp_path / name, errors=(2e-6,) if name == "d" else ())
    page = Page(write_report([tmp_path]))
    assert (
        "d is exact: its gradients differ from the gradients of undivided windows by at most 2e-6"
        in page.text
    )
    assert "The gradients of a, b and c were not measured." in page.text
    assert [row["gradient error, worst"] for row in page.figures().values()][:4] == ["–"] * 3 + [
        "2e-6 ✓ exact"
    ]
    assert min(map(float, re.findall(r"stroke-width: ?([-\d.]+)", page.html))) > 0


def test_speeds_are_compared_pair_by_pair_of_the_same_seeds_or_by_medians(real, tmp_path):
    for seed, factor in enumerate((1.0, 2.0, 4.0)):
        repeat(real, tmp_path / f"ours/{seed}", factor, contender="ours", seed=seed)
        repeat(real, tmp_path / f"slow/{seed}", 3 * factor, contender="slow", seed=2 - seed)
        if seed < 2:
            repeat(real, tmp_path / f"two/{seed}", factor, contender="two", seed=seed)
    ours, slow, two = contenders(read_runs([tmp_path]))
    assert speed_ratios(ours, slow) == pytest.approx([12, 3, 0.75]), "by seed, not by folder"
    assert speed_ratios(ours, two) == pytest.approx([1 / 2 / statistics.median([1, 1 / 2])])


def test_a_killed_run_is_reported_as_far_as_it_came(real, tmp_path):
    repeat(real, tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    history = tmp_path / "run/history.jsonl"
    history.write_bytes(history.read_bytes()[:-40])
    page = Page(write_report([tmp_path / "run"]))
    assert "the last line of history.jsonl is half-written and was left out" in page.text
    assert "unfinished: 3 windows and no summary.json; the run was killed or has not ended" in page.text
    rows = [json.loads(line) for line in history.read_text().splitlines()[:3]]
    assert page.figures()["run"]["loss, last window"] == f"{rows[-1]['loss']:.4f}"
    assert page.figures()["run"]["examples/s"] == shown(24 / sum(row["seconds"] for row in rows))


def test_a_run_that_was_killed_before_its_first_window_has_a_report(tmp_path):
    (tmp_path / "history.jsonl").write_text("")
    assert "unfinished: 0 windows and no summary.json" in Page(write_report([tmp_path])).text


def test_losses_that_are_not_finite_are_counted_and_drawn_as_gaps(real, tmp_path):
    repeat(real, tmp_path / "run")
    history = tmp_path / "run/history.jsonl"
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    rows[1]["loss"], rows[3]["loss"] = None, math.nan
    history.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report([tmp_path]))
    assert "no finite loss in 2 of 4 windows" in page.text
    assert page.figures()["run"]["loss, last window"] == "not finite"


def test_metrics_are_a_curve_where_a_run_was_evaluated_more_than_once(real, tmp_path, page):
    found = [{"window": window, "loss": 2.0 / window, "accuracy": window / 8} for window in (2, 4)]
    repeat(real, tmp_path / "run", evaluations=found)
    titles = Page(write_report([tmp_path])).titles
    assert [title for title in titles if title in ("Accuracy", "Validation loss")] == [
        "Accuracy",
        "Validation loss",
    ]
    assert "Accuracy" not in page.titles


def test_metrics_have_titles_of_words_and_a_row_before_training(real, tmp_path):
    evaluations = [
        {"window": 0, "loss": 2.0, "recall_at_1": 0.25},
        {"window": 4, "loss": 1.5, "recall_at_1": 0.5},
    ]
    run = repeat(real, tmp_path / "run", evaluations=evaluations, eval=evaluations[-1])
    page = Page(write_report([run]))
    assert {"Recall at 1", "Validation loss"} <= {*page.titles}
    before = page.figures()["before training"]
    assert (before["recall_at_1"], before["validation loss"], before["examples/s"]) == (
        "0.2500",
        "2.0000",
        "",
    )
    assert metric_title("recall_at_1/my_chats") == "Recall at 1/my_chats"
    assert [metric_title(name) for name in ("kl", "chosen_logprob")] == [
        "KL from the reference",
        "Chosen log-probability",
    ]
    both = [run, repeat(run, tmp_path / "again", contender="again")]
    before = Page(write_report(both, tmp_path / "both.html")).figures()["before training"]
    assert before["recall_at_1"] == "0.2500"


def test_many_windows_share_the_points_of_a_curve(real, tmp_path):
    repeat(real, tmp_path / "run", windows=3000)
    row = json.loads((real / "history.jsonl").read_text().splitlines()[0])
    rows = [row | {"window": window + 1, "loss": 1 + window % 10} for window in range(3000)]
    (tmp_path / "run/history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_report([tmp_path])
    assert "A point is a median of 10 windows; bands" in Page(path).text
    assert path.stat().st_size < 200_000


def test_the_text_of_runs_is_escaped(real, tmp_path):
    name = '<script>alert(1)</script>"&$x_2$'
    repeat(real, tmp_path / "a", (1.0), contender=name, command="echo '<b>'", first_window=FIRST_WINDOW,
           eval={"window": 4, "<i>f1</i>": 0.5}, versions={"<u>": "</pre>"})  # fmt: skip
    repeat(real, tmp_path / "b", contender="-->", first_window=FIRST_WINDOW)
    page = Page(write_report([tmp_path]))
    assert not {"script", "i", "u"} & set(page.tags)
    assert not page.unclosed
    assert name in page.figures()
    assert "echo '<b>'" in page.text


def test_secrets_do_not_reach_the_page(real, tmp_path):
    token = "hf_" + "aB3" * 12
    folder = repeat(
        real,
        tmp_path / "run",
        contender=f"mine {token}",
        command=f"HF_TOKEN=q1w2e3 gradacc x --api-key k3y --data https://me:pa55@host/x?token=t0k {token}",
        eval={"window": 4, "loss": 1.0, "loss_per_token": 0.5},
    )
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["tracker"] = {
        "WANDB_API_KEY": "w4ndb",
        "db_password": 123456,
        "clientSecret": ["s3cret"],
        "url": "s3://u:pw9@b",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    html = Page(write_report([tmp_path])).html
    secrets = [token, "hunter2secret", "q1w2e3", "k3y", "pa55", "t0k", "w4ndb", "123456", "s3cret", "pw9"]
    assert [secret for secret in secrets if secret in html] == []
    assert "max_tokens: 4096" in html
    assert "loss_per_token" in html
    assert "0.5000" in html
    assert "host/x" in html


@pytest.mark.parametrize(
    "harmless",
    [
        {"max_tokens": "auto", "tokens": 3, "name": "hf-internal/tiny", "author": "me", "token": None},
        {"command": "python train.py --budget.max_tokens 8192 --model.name org/tokenizer"},
        {"note": "a token per word: see https://example.org/a@b"},
    ],
)
def test_what_is_no_secret_is_shown(harmless):
    assert redact(harmless) == harmless


def test_configurations_are_shown_once_and_then_where_they_differ(compared, real, tmp_path):
    assert compared.page.text.count("best_metric: accuracy") == 1
    repeat(real, tmp_path / "a")
    config = yaml.safe_load((repeat(real, tmp_path / "b") / "config.yaml").read_text())
    config["train"]["seed"] = 7
    (tmp_path / "b/config.yaml").write_text(yaml.safe_dump(config))
    assert configurations(read_runs([tmp_path]))[1:] == [("b", "same as a, except\ntrain.seed: 7")]


def test_the_report_of_a_folder_is_written_again_and_nothing_else_is_replaced(real, tmp_path):
    run = repeat(real, tmp_path / "run")
    page = write_report([run])
    page.write_text(page.read_text().replace("Figures", "Old"))
    assert "Figures" in write_report([run]).read_text()
    with pytest.raises(InputError, match=r"--output: .*report\.html exists; give another name"):
        write_report([run], page)
    page.write_text("<html>mine, not gradacc-hf's</html>")
    with pytest.raises(InputError, match="exists and is not a report of gradacc"):
        write_report([run])
    assert page.read_text() == "<html>mine, not gradacc-hf's</html>"


def test_the_report_of_several_folders_has_a_new_name_in_the_current_folder(real, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, _ = repeat(real, tmp_path / "a/run"), repeat(real, tmp_path / "b/run")
    assert write_report([a]) == a / "report.html"
    assert write_report(["a", "b", a]).resolve() == tmp_path / "report.html"
    assert list(Page(tmp_path / "report.html").figures()) == ["a/run", "b/run", "baseline"], "each once"
    (tmp_path / "report.html").write_text("mine")
    assert [str(write_report(["a", "b"])) for _ in range(2)] == ["report-2.html", "report-3.html"]
    assert (tmp_path / "report.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("history.jsonl", '{"loss": 1}\n{"lo\n{"loss": 2}\n', "history.jsonl, line 2: found no JSON object"),
        (
            "history.jsonl",
            '{"loss": "x"}\n',
            "history.jsonl, line 1: found 'x'; numbers and null are allowed",
        ),
        ("summary.json", "{", "summary.json: found no JSON"),
        ("summary.json", "[]", "summary.json: found list"),
        ("summary.json", '{"seconds": "1"}', "summary.json, seconds: found '1'; a number or null"),
        ("summary.json", '{"eval": 1}', "summary.json, eval: found 1; an object or null"),
        ("summary.json", '{"first_window": [3]}', "summary.json, first_window: found something else"),
        ("summary.json", '{"reading": {"lines": [[1, "x"]]}}', "summary.json, reading: found something else"),
        ("summary.json", '{"skipped_rows": {"count": 2, "first": []}}', "summary.json, reading: found"),
        ("config.yaml", "a: [", "config.yaml: found no YAML"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(real, tmp_path, file, text, message):
    (repeat(real, tmp_path / "run") / file).write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        write_report([tmp_path])
    assert not (tmp_path / "report.html").exists()


def test_wrong_folders_and_outputs_are_one_line(real, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, output, message in (
        (tmp_path / "nowhere", None, "found no such folder"),
        (tmp_path / "empty", None, "found no history.jsonl in it or below it"),
        (real, tmp_path / "page.pdf", "allowed: a file that ends in .html"),
        (real, tmp_path / "nowhere/page.html", "cannot be written"),
    ):
        with pytest.raises(InputError, match=message):
            write_report([folder], output)


def test_precision_is_named_where_it_is_not_fp32(real, tmp_path):
    repeat(real, tmp_path / "run", errors=(1e-3,), precision="bf16")
    assert (
        "Exact means at most 1e-5 in fp32; this ran in bf16."
        in verdict(contenders(read_runs([tmp_path]))).measure
    )


def test_the_command_prints_where_the_report_is(real, tmp_path, monkeypatch, capsys):
    folder = repeat(real, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["gradacc", "report", "run"])
    cli.main()
    assert capsys.readouterr().out == f"wrote {Path('run/report.html')}\n"
    assert (folder / "report.html").is_file()


def test_runs_and_repeats_come_in_natural_order(real, tmp_path):
    for name in ("seed_10", "seed_2", "b", "aa"):
        repeat(real, tmp_path / name)
    assert [run.name for run in read_runs([tmp_path])] == ["aa", "b", "seed_2", "seed_10"]


CONFUSION = {"title": "Confusion matrix", "kind": "matrix", "note": "A row is a true class."}
CONFUSION |= {"columns": ["true", "ham", "spam"], "rows": [["ham", 30, 10], ["spam", 1, 2]]}
MISTAKES = {"title": "Most confident mistakes", "kind": "texts", "note": ""}
MISTAKES |= {"columns": ["text", "label", "predicted"], "rows": [["<b>tea</b>", "ham", "spam"]]}


def test_predictions_and_evaluations_are_shown_and_small_sets_are_noted(real, tmp_path):
    card = {"validation_examples": 43}
    run = repeat(real, tmp_path / "run", details=[CONFUSION, MISTAKES], card=card)
    found = {
        "model": "best",
        "window": 7,
        "data": "test.csv",
        "examples": 900,
        "headline": "accuracy",
        "notes": ["a note"],
    }
    found["metrics"] = {"accuracy": {"value": 0.8, "low": 0.75, "high": 0.85, "baseline": 0.5}}
    (run / "evaluations").mkdir()
    (run / "evaluations/test-1.json").write_text(json.dumps(found))
    html = write_report([run]).read_text(encoding="utf-8")
    assert '<td style="--shade: 75%">30</td>' in html
    assert "&lt;b&gt;tea&lt;/b&gt;" in html
    assert "test-1: best model after window 7 on test.csv, 900 examples" in html
    assert "<td>0.7500 to 0.8500</td>" in html
    assert "<b>run</b>: 43 examples: fewer than 100 are too few for reliable figures" in html
    (run / "evaluations/test-1.json").write_text("{}")
    with pytest.raises(InputError, match=r"test-1.json: found no evaluation"):
        write_report([run])


def test_speeds_on_different_data_have_a_note(real, tmp_path):
    runs = [repeat(real, tmp_path / name, contender=name) for name in ("a", "b")]
    for run, length in zip(runs, (128, 64), strict=True):
        config = yaml.safe_load((run / "config.yaml").read_text())
        data = {"train": "tweets.csv", "max_length": length}
        (run / "config.yaml").write_text(yaml.safe_dump({**config, "data": data}))
    said = " ".join(map(str, verdict(contenders(read_runs(runs))).sentences))
    assert (
        "<b>a</b> and <b>b</b> cannot be compared, as their examples differ: data.max_length 128 against 64."
        in said
    )
    assert "×" not in said
    (runs[1] / "config.yaml").write_text((runs[0] / "config.yaml").read_text())
    said = " ".join(map(str, verdict(contenders(read_runs(runs))).sentences))
    assert "cannot be compared" not in said
    assert "× as many examples as <b>b</b>" in said


def test_a_set_of_examples_is_too_small_if_the_interval_exceeds_the_gain():
    assert small_set_note("accuracy", 0.75, 99) is not None
    assert small_set_note("accuracy", 0.75, 100, baseline=0.5) is None  # ±0.085, and a gain of 0.25
    at_baseline = small_set_note("accuracy", 0.75, 100, baseline=0.7)
    assert at_baseline.endswith(": 100 examples show no difference")
    near_it = small_set_note("accuracy", 0.75, 100, baseline=0.65)
    assert near_it.endswith(": evaluate more than 100 examples")
    assert small_set_note("accuracy", 0.75, 10_000, baseline=0.7) is None
    assert small_set_note("f1", 0.75, 10_000, baseline=0.7, width=0.06) is not None
    assert small_set_note("f1", 0.75, 10_000, baseline=0.7) is None  # the width is not known


@pytest.mark.parametrize(
    ("sizes", "has_picture"), [([64, 64, 60, 64, 64, 60], False), ([32, 32, 10, 64, 64, 20], True)]
)
def test_the_short_last_window_of_an_epoch_is_no_change_of_the_batch_size(sizes, has_picture, tmp_path):
    rows = [{"window": w, "loss": 1.0, "lr": 0.1, "examples": size} for w, size in enumerate(sizes, 1)]
    (tmp_path / "history.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = contenders(read_runs([tmp_path]))
    assert ("Effective batch size" in [figure.title for figure in dynamics_of(found)]) == has_picture
    [run] = found[0].runs
    run.summary["continued_after"] = [1, 3]
    assert small_curves_of(found)[0].note == "Continued after windows 1, 3."
