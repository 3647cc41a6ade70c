"""The training loop and its output: fp16, records, the best model, early stopping, atomic files."""

import json
import math
import subprocess
import sys
import time
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import LENGTHS, fp16_accelerator, history, no_json, run, set_up

from gradacc_hf import Best, WindowLoader, evaluate, train
from gradacc_hf.errors import InputError
from gradacc_hf.training.finetune import SUMMARY_KEYS, EvaluationLog
from gradacc_hf.training.preflight import preflight_check
from gradacc_hf.training.run_log import FIGURES, RunLog, WindowRecord
from gradacc_hf.utils.files import save_model, whole_folder, write_whole
from gradacc_hf.verification.tiny_models import build_head

ROW = ["window", "epoch", "loss", "grad_norm", "lr", "examples", "items", "tokens", "padded_tokens"]
ROW += [
    "accumulation_steps",
    "seconds",
    "skipped",
    "noise_scale",
    "noise_measured",
    "update_ratio",
    "noise_low",
    "noise_high",
]
SUMMARY = {
    "eval",
    "baseline",
    "windows",
    "examples",
    "items",
    "tokens",
    "padded_tokens",
    "padding",
    "seconds",
}
SUMMARY |= {
    "tokens_per_second",
    "peak_memory_bytes",
    "accumulation_steps",
    "effective_batch_size",
    "processes",
}
SUMMARY |= {"precision", "versions"}


def logits(model, windows):
    return np.stack(evaluate(model, windows, accelerator=windows.accelerator).predictions)


# fp16


def test_under_fp16_gradients_are_unscaled_once_a_window():
    plain = [record.grad_norm for record in train_records(Accelerator(cpu=True))]
    accelerator = fp16_accelerator()
    records = train_records(accelerator)
    assert min(record.accumulation_steps for record in records) > 1
    assert accelerator.scaler.unscaled == len(records) == 5
    assert not any(record.skipped for record in records)
    assert [record.grad_norm for record in records] == pytest.approx(plain, rel=0.02)


def train_records(accelerator):
    model, optimizer, windows = set_up(accelerator=accelerator, micro_batch_size=3)
    model, optimizer = accelerator.prepare(model, optimizer)
    return train(model, optimizer, windows, accelerator=accelerator, max_grad_norm=1.0)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_an_fp16_overflow_skips_the_window_and_leaves_the_scheduler_where_it_was(tmp_path, max_grad_norm):
    accelerator = fp16_accelerator(init_scale=2.0**40)  # 2⁴⁰ × a gradient overflows fp16
    model, optimizer, windows = set_up(accelerator=accelerator, micro_batch_size=3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    after_each = []

    def validate(model):
        after_each.append([parameter.detach().clone() for parameter in model.parameters()])
        return {"loss": evaluate(model, windows, accelerator=accelerator).loss}

    summary = run(
        model,
        optimizer,
        windows,
        scheduler=scheduler,
        max_grad_norm=max_grad_norm,
        validate=validate,
        eval_every=1,
        output_dir=tmp_path,
    )
    rows = history(tmp_path)
    assert [row["skipped"] for row in rows] == [True, False, False, False, False]
    assert summary["skipped_windows"] == 1
    assert summary["windows"] == 5
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 1e-3, 1e-3 / 2, 1e-3 / 3, 1e-3 / 4])
    assert scheduler.last_epoch == 4
    assert all(torch.equal(a, b) for a, b in zip(before, after_each[0], strict=True))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after_each[1], strict=True))
    assert rows[0]["grad_norm"] is None  # infinite
    assert all(row["grad_norm"] > 0 for row in rows[1:])
    assert accelerator.scaler.unscaled == 5


# The record of a run


def test_history_has_one_row_a_window_with_the_fields_that_everything_reads(tmp_path):
    summary = run(*set_up(), epochs=2, output_dir=tmp_path / "new" / "folder")
    rows = history(tmp_path / "new" / "folder")
    assert [list(row) for row in rows] == [ROW] * 10
    assert [field.name for field in fields(WindowRecord)] == [*ROW, "source_losses"]
    assert [row["window"] for row in rows] == list(range(1, 11))
    assert [row["epoch"] for row in rows] == [0] * 5 + [1] * 5
    assert all(row["examples"] == row["items"] == 10 and row["seconds"] > 0 for row in rows)
    assert sum(row["tokens"] for row in rows) == 2 * sum(LENGTHS) == summary["tokens"]
    assert all(row["padded_tokens"] >= row["tokens"] for row in rows)


def test_the_summary_adds_up_what_the_windows_were(tmp_path):
    model, optimizer, windows = set_up(16)
    summary = run(
        model,
        optimizer,
        windows,
        validate=lambda model: {"loss": 1.0},
        summary={"baseline": {"accuracy": 0.5}},
        output_dir=tmp_path,
    )
    written = json.loads((tmp_path / "summary.json").read_text(), parse_constant=no_json)
    assert written == summary
    assert summary.keys() >= SUMMARY
    rows = history(tmp_path)
    for key in ("examples", "items", "tokens", "padded_tokens", "seconds"):
        assert summary[key] == pytest.approx(sum(row[key] for row in rows))
    assert summary["padding"] == pytest.approx(1 - summary["tokens"] / summary["padded_tokens"])
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["seconds"])
    steps = [row["accumulation_steps"] for row in rows]
    assert summary["accumulation_steps"] == {"min": min(steps), "mean": np.mean(steps), "max": max(steps)}
    assert summary["eval"] == {"window": 4, "loss": 1.0}
    assert summary["baseline"] == {"accuracy": 0.5}
    assert summary["effective_batch_size"] == 16
    assert (summary["processes"], summary["precision"]) == (1, "fp32")
    assert summary["peak_memory_bytes"] > 2**20
    assert summary["versions"]["torch"] == version("torch")


def test_a_summary_has_its_fields_without_evaluation_and_with_windows_of_changing_size(tmp_path):
    summary = run(*set_up(lambda window: 5 + 5 * window), output_dir=tmp_path)
    assert summary.keys() >= SUMMARY
    assert summary["eval"] is summary["baseline"] is summary["effective_batch_size"] is None
    assert [row["examples"] for row in history(tmp_path)] == [5, 10, 15, 20]
    json.loads((tmp_path / "summary.json").read_text())


def test_a_run_without_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*set_up(), validate=lambda model: {"loss": 1.0})["windows"] == 5
    assert list(tmp_path.iterdir()) == []


def test_nan_is_null_in_the_files_and_a_numpy_number_is_a_number(tmp_path):
    model, optimizer, windows = set_up()
    metrics = {
        "loss": math.nan,
        "score": np.float32(math.inf),
        "rate": np.float32(0.5),
        "rows": torch.tensor(3),
    }

    def nan(outputs, batch):
        return outputs.loss * math.nan

    summary = run(
        model,
        optimizer,
        windows,
        compute_loss=nan,
        validate=lambda model: metrics,
        output_dir=tmp_path,
        on_nonfinite="skip",
    )
    assert [row["loss"] for row in history(tmp_path)] == [None] * 5
    written = json.loads((tmp_path / "summary.json").read_text(), parse_constant=no_json)
    assert (
        written["eval"]
        == summary["eval"]
        == {"window": 5, "loss": None, "score": None, "rate": 0.5, "rows": 3}
    )


def test_windows_without_items_are_counted_and_the_run_still_ends_with_an_evaluation(tmp_path):
    head = build_head("token_classification", "bert")
    examples = head.examples(LENGTHS)
    for example in examples[40:]:
        example["labels"] = [-100] * len(example["labels"])
    accelerator = Accelerator(cpu=True)
    windows = WindowLoader(
        examples, 10, accelerator=accelerator, collate_fn=head.collate, max_tokens=64, shuffle=False
    )  # fmt: skip
    optimizer = torch.optim.AdamW(head.model.parameters())
    summary = run(head.model, optimizer, windows, validate=lambda model: {"loss": 1.0}, output_dir=tmp_path)
    assert (summary["windows"], summary["empty_windows"]) == (4, 1)
    assert summary["eval"] == {"window": 4, "loss": 1.0}
    assert all(row["loss"] > 0 for row in history(tmp_path))


class ScalarReads(TorchDispatchMode):
    """Count reads of tensor values into Python (item, float, bool), which wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Line(torch.nn.Module):
    """A model that reads no values. The attention masks of transformers do."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, inputs, labels):
        return SimpleNamespace(loss=((inputs @ self.weight - labels) ** 2).mean())


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_no_value_is_read_from_the_device_for_a_micro_batch_only_for_a_window(max_grad_norm, tmp_path):
    rng = np.random.default_rng(0)
    examples = [{"inputs": rng.random(3, dtype=np.float32), "labels": np.float32(i % 2)} for i in range(24)]
    accelerator = Accelerator(cpu=True)
    reads = {}
    for size in (1, 4, 12):
        model = Line()
        windows = WindowLoader(examples, 12, accelerator=accelerator, micro_batch_size=size)
        with ScalarReads() as before:
            preflight_check(model, windows)  # it reads more of larger micro-batches
        with ScalarReads() as found:
            summary = run(
                model,
                torch.optim.SGD(model.parameters(), lr=0.1),
                windows,
                max_grad_norm=max_grad_norm,
                output_dir=tmp_path,
            )
        assert summary["accumulation_steps"]["max"] == 12 // size
        reads[size] = found.count - before.count
    assert reads[1] == reads[4] == reads[12]
    # loss, gradient norm and step norm of each of two windows, and one in reserve
    assert 2 * 3 <= reads[1] <= 2 * 4


# Evaluation, the best model, and early stopping


def test_best_and_last_reload_and_give_the_same_logits(tmp_path):
    model, optimizer, windows = set_up()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder())
    at_best, scores = [], iter([1.0, 3.0, 2.0, 2.5, 2.9])

    def validate(model):
        score = next(scores)
        if score == 3.0:
            at_best.append(logits(model, windows))
        return {"loss": 0.0, "score": score}

    best = Best("score", "max")
    summary = run(
        model,
        optimizer,
        windows,
        validate=validate,
        eval_every=1,
        best=best,
        output_dir=tmp_path,
        save_with=[tokenizer],
    )
    assert summary["best"] == {"window": 2, "loss": 0.0, "score": 3.0}
    reloaded = {}
    for name in ("best", "last"):
        saved = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        reloaded[name] = logits(saved, windows)
        assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / name)) == len(tokenizer)
        assert (tmp_path / name / "model.safetensors").is_file()
    np.testing.assert_array_equal(reloaded["best"], at_best[0])
    np.testing.assert_array_equal(reloaded["last"], logits(model, windows))
    assert not np.array_equal(reloaded["best"], reloaded["last"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best",
        "history.jsonl",
        "last",
        "summary.json",
    ]


def tokenizer_folder():
    from gradacc_hf.embedded import minilm_path

    return minilm_path()


@pytest.mark.parametrize(
    ("direction", "values", "best"),
    [
        ("min", [3, 1, 2, 1, 4], 2),
        ("max", [3, 1, 4, 4, 2], 3),
        ("min", [math.nan, 2, math.nan, 1, 3], 4),
        ("max", [math.nan, math.nan, 1, 2, math.nan], 4),
        ("min", [math.nan] * 5, 1),
    ],
)
def test_the_best_evaluation_is_the_first_of_the_best_and_never_nan_beside_a_number(direction, values, best):
    given = iter(values)
    model, optimizer, windows = set_up()
    summary = run(
        model,
        optimizer,
        windows,
        validate=lambda model: {"loss": next(given)},
        eval_every=1,
        best=Best("loss", direction),
    )
    assert summary["best"]["window"] == best


@pytest.mark.parametrize(("patience", "windows_run"), [(0, 10), (1, 3), (2, 7), (3, 8)])
def test_early_stopping_waits_for_so_many_evaluations_in_a_row_without_improvement(
    capsys, patience, windows_run
):
    given = iter([5, 4, 4.5, 3, 2, 2, 2, 2, 1, 0])
    model, optimizer, windows = set_up()
    summary = run(
        model,
        optimizer,
        windows,
        epochs=2,
        validate=lambda model: {"loss": next(given)},
        eval_every=1,
        best=Best(patience=patience),
    )
    assert summary["windows"] == summary["eval"]["window"] == windows_run
    assert ("stopped early" in capsys.readouterr().out) == (windows_run < 10)


def test_a_run_that_ends_anyway_is_not_said_to_have_stopped_early(capsys):
    model, optimizer, windows = set_up()
    run(model, optimizer, windows, validate=lambda model: {"loss": 1}, eval_every=1, best=Best(patience=4))
    assert "stopped early" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("eval_every", "max_windows", "evaluated"),
    [
        (0, None, [10]),
        (3, None, [3, 6, 9, 10]),
        (5, None, [5, 10]),
        (3, 7, [3, 6, 7]),
        (20, 4, [4]),
        (1, 2, [1, 2]),
        ("epoch", None, [5, 10]),
        ("epoch", 7, [5, 7]),
        (0.4, None, [2, 4, 5, 7, 9, 10]),
        (0.25, 8, [2, 3, 4, 5, 7, 8]),
    ],
)
def test_evaluations_come_every_so_many_windows_and_once_at_the_end(
    eval_every, max_windows, evaluated, tmp_path
):
    model, optimizer, windows = set_up()
    seen = []

    def validate(model):
        seen.append(len(history(tmp_path)))
        return {"loss": 1.0}

    summary = run(
        model,
        optimizer,
        windows,
        epochs=2,
        max_windows=max_windows,
        validate=validate,
        eval_every=eval_every,
        output_dir=tmp_path,
    )
    assert seen == evaluated
    assert summary["windows"] == evaluated[-1]


def test_a_run_with_evaluations_trains_as_one_without(tmp_path):
    """This holds with dropout, too, as an evaluation draws no random numbers."""
    losses = []
    for eval_every in (0, 1):
        model, optimizer, windows = set_up()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        torch.manual_seed(0)
        folder = tmp_path / str(eval_every)
        run(
            model,
            optimizer,
            windows,
            validate=lambda model, windows=windows: {
                "loss": evaluate(model, windows, accelerator=windows.accelerator).loss
            },
            eval_every=eval_every,
            output_dir=folder,
        )
        losses.append([row["loss"] for row in history(folder)])
    assert losses[0] == losses[1]


def test_evaluation_is_the_mean_over_all_items_with_each_prediction_once_and_dropout_off():
    head = build_head("sequence_classification", "bert")
    model, examples, accelerator = head.model, head.examples(LENGTHS), Accelerator(cpu=True)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    windows = WindowLoader(examples, 10, accelerator=accelerator, collate_fn=head.collate, max_tokens=64)
    found = evaluate(model, windows, accelerator=accelerator)
    assert model.training
    model.eval()
    with torch.no_grad():
        whole = model(**head.collate(examples))
    assert found.loss == pytest.approx(float(whole.loss), rel=1e-5)
    np.testing.assert_allclose(np.stack(found.predictions), whole.logits.numpy(), rtol=1e-4, atol=1e-5)
    assert [int(label) for label in found.references] == [example["labels"] for example in examples]


# Atomic files


WRITER = """
import sys, time
from pathlib import Path
from gradacc_hf.utils.files import whole_folder
with whole_folder(Path(sys.argv[1])) as unfinished:
    with (unfinished / "model.safetensors").open("wb") as file:
        file.write(b"half")
        file.flush()
        print("writing", flush=True)
        time.sleep(60)
"""


def test_a_save_that_is_killed_half_way_leaves_the_old_model_whole(tmp_path):
    model, _, windows = set_up()
    save_model(model, tmp_path / "best", windows.accelerator)
    before = {path.name: path.read_bytes() for path in (tmp_path / "best").iterdir()}
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "best")], stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"writing\n"
    writer.kill()
    writer.wait()
    assert {path.name: path.read_bytes() for path in (tmp_path / "best").iterdir()} == before
    with torch.no_grad():
        next(model.parameters()).add_(1)
    save_model(model, tmp_path / "best", windows.accelerator)  # the next save removes the remains
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "best")
    assert torch.equal(next(saved.parameters()), next(model.parameters()))


def test_an_error_half_way_leaves_the_old_model_whole(tmp_path):
    model, _, windows = set_up()
    save_model(model, tmp_path / "best", windows.accelerator)

    class Broken:
        def save_pretrained(self, folder):
            assert (folder / "model.safetensors").is_file()
            raise OSError("no space left on device")

    before = {path.name: path.read_bytes() for path in (tmp_path / "best").iterdir()}
    with pytest.raises(OSError, match="no space"):
        save_model(model, tmp_path / "best", windows.accelerator, Broken())
    assert {path.name: path.read_bytes() for path in (tmp_path / "best").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


@pytest.mark.parametrize("killed", [True, False])
def test_a_save_that_ends_between_its_two_renames_loses_nothing(tmp_path, monkeypatch, killed):
    folder = tmp_path / "best"
    with whole_folder(folder) as unfinished:
        (unfinished / "a").write_text("old")
    rename = Path.rename

    def fail(path, target):
        if path.name == ".best.unfinished":
            raise KeyboardInterrupt
        return rename(path, target)

    if killed:  # the state of the disk after the kill
        rename(folder, tmp_path / ".best.old")
        (tmp_path / ".best.unfinished").mkdir()
    else:
        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(KeyboardInterrupt), whole_folder(folder):
            pass
        assert (folder / "a").read_text() == "old"
        monkeypatch.undo()
    with pytest.raises(OSError, match="full"), whole_folder(folder):
        raise OSError("full")
    assert (folder / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_text_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_whole(path, "old")

    def fail(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, "new")
    assert path.read_text() == "old"


def test_history_is_on_disk_after_each_window(tmp_path):
    """A killed run leaves complete rows, one for each finished window."""
    script = tmp_path / "run.py"
    folders = [str(ROOT / "tests"), str(ROOT / "tests/helpers")]
    script.write_text(f"import sys; sys.path[:0] = {folders}\n" + KILLED)
    process = subprocess.Popen([sys.executable, script], cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "third").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert [row["window"] for row in history(tmp_path)] == [1, 2, 3]
    assert not (tmp_path / "summary.json").exists()


KILLED = """
import time
from pathlib import Path
from training_runs import run, set_up

def wait(model):
    Path("third").touch()
    time.sleep(100)

model, optimizer, windows = set_up()
run(model, optimizer, windows, validate=wait, eval_every=3, output_dir=".")
"""


# Arguments of fine_tune


def test_a_prepared_model_or_optimizer_is_refused():
    model, optimizer, windows = set_up()
    prepared = windows.accelerator.prepare(optimizer)
    with pytest.raises(InputError, match=r"^optimizer: found a prepared optimizer; fine_tune prepares"):
        run(model, prepared, windows)


def test_a_misspelt_keyword_is_an_error_and_a_key_of_the_summary_is_not_replaced():
    model, optimizer, windows = set_up()
    with pytest.raises(TypeError, match="max_window"):
        run(model, optimizer, windows, max_window=1)
    with pytest.raises(InputError, match="summary: found the key 'evaluations'"):
        run(model, optimizer, windows, max_windows=1, summary={"evaluations": []})


def test_the_best_evaluation_is_known_by_its_place_among_equal_ones_and_nan():
    log = EvaluationLog(Best("loss", patience=2))
    for window, (loss, improves) in enumerate(
        [(math.nan, True), (math.nan, False), (2.0, True), (math.nan, False), (2.0, False)]
    ):
        assert not log.is_out_of_patience
        assert log.add(window, {"loss": loss}) == improves
    assert log.best == {"window": 2, "loss": 2.0}
    assert log.is_out_of_patience
    again = EvaluationLog.from_progress(log.criterion, log.progress())
    assert (again.best, again.latest) == (log.best, log.latest)
    assert again.is_out_of_patience


def test_every_key_that_a_run_writes_into_its_summary_is_reserved():
    model, optimizer, windows = set_up()
    summary = run(model, optimizer, windows, max_windows=1)
    assert set(summary) == {*SUMMARY_KEYS, *FIGURES, "baseline"}
    for key in ("windows", "seconds"):
        with pytest.raises(InputError, match=f"^summary: found the key '{key}'"):
            run(*set_up(), max_windows=1, summary={key: 1})


def test_the_progress_bar_has_no_loss_before_the_first_window(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the output for a terminal
    monkeypatch.setenv("COLUMNS", "200")
    with RunLog(Accelerator(cpu=True), 3) as log:
        before = capsys.readouterr().out
        values = {field.name: 1 for field in fields(WindowRecord)} | {"source_losses": {}}
        log.window(WindowRecord(**{**values, "loss": 0.25}))
    assert "loss – " in before
    assert "nan" not in before
    assert "loss 0.2500 · 1.0 examples/s · 1 tokens/s" in capsys.readouterr().out
