"""Checkpoints: a resumed run is bitwise the same, files are complete or absent, and damage is found."""

import dataclasses
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from accelerate import Accelerator
from checkpointed_runs import cut_back, history_without_seconds, run, same_weights
from datasets import IterableDataset
from safetensors import safe_open
from safetensors.torch import load_file
from training_runs import LENGTHS, fp16_accelerator

from gradacc_hf import Best, InputError, WindowLoader, fine_tune
from gradacc_hf.accumulation.accelerate_state import reset_accelerate
from gradacc_hf.accumulation.splitting import Bound, Cost
from gradacc_hf.bench.crash_recovery import DAMAGES
from gradacc_hf.training.checkpoint import Checkpointer, Checkpoints, check_same, newest_checkpoint
from gradacc_hf.training.lora import add_lora
from gradacc_hf.training.settings import LoraConfig, OptimConfig
from gradacc_hf.verification.tiny_models import build_head


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return *run(folder), folder


@pytest.mark.parametrize("window", [1, 3, 5, 6, 10])
def test_a_run_that_goes_on_from_any_window_is_the_same_bit_for_bit(whole, tmp_path, window):
    model, summary, folder = whole
    again, resumed = run(killed := cut_back(folder, tmp_path / "run", window), resume=killed)
    assert same_weights(model, again)
    assert history_without_seconds(killed) == history_without_seconds(folder)
    assert len(history_without_seconds(folder)) == 10
    for key in ("evaluations", "best", "eval", "examples", "items", "windows", "accumulation_steps"):
        assert resumed[key] == summary[key], key
    for name in ("best", "last"):
        files = [(f / name / "model.safetensors").read_bytes() for f in (killed, folder)]
        assert files[0] == files[1], name


def in_bf16(model):
    return model.bfloat16()


def with_adapters(model):
    add_lora(model, LoraConfig(rank=4), {"classifier.weight", "classifier.bias"})
    return model


def with_principal_adapters(model):
    settings = LoraConfig(rank=4, init="pissa", dora=True)
    add_lora(model, settings, {"classifier.weight", "classifier.bias"})
    return model


SCHEDULE_FREE = OptimConfig("schedule_free_adamw", 1e-3, scheduler="constant", warmup_ratio=0.2)


@pytest.mark.parametrize(
    "how",
    [
        {"optimizer": "sgd"},
        {"optimizer": "adafactor"},
        {"make": in_bf16},
        {"make": with_adapters},
        {"accelerator": lambda: fp16_accelerator(init_scale=2.0**40)},  # the first window overflows
        {"optimizer": OptimConfig("muon", 1e-3, scheduler="wsd", decay_ratio=0.4, min_lr_ratio=0.1)},
        {"optimizer": SCHEDULE_FREE},
        {
            "optimizer": OptimConfig(lr=1e-3, scheduler="cosine", min_lr_ratio=0.1),
            "make": with_principal_adapters,
            "plus_lr_ratio": 4.0,
        },
    ],
    ids=[
        "sgd",
        "adafactor",
        "bf16 weights",
        "adapters",
        "fp16",
        "muon, wsd",
        "schedule-free",
        "pissa, cosine",
    ],
)
def test_so_it_is_with_other_optimizers_weights_and_precisions(tmp_path, how):
    if how.get("optimizer") is SCHEDULE_FREE:
        pytest.importorskip("schedulefree", reason="needs the extra schedulefree")
    model, _ = run(tmp_path / "whole", **how)
    again, _ = run(killed := cut_back(tmp_path / "whole", tmp_path / "run", 4), resume=killed, **how)
    assert same_weights(model, again)
    assert history_without_seconds(killed) == history_without_seconds(tmp_path / "whole")
    for name in ("best", "last"):
        files = [next((f / name).glob("*model.safetensors")) for f in (killed, tmp_path / "whole")]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_the_average_of_schedule_free_weights_is_evaluated_and_saved_and_trains_nothing(tmp_path):
    pytest.importorskip("schedulefree", reason="needs the extra schedulefree")
    measured = []

    def validate(model):
        measured.append(model.classifier.weight.detach().clone())
        return {"loss": 1.0}

    model, _ = run(tmp_path / "evaluated", optimizer=SCHEDULE_FREE, epochs=1, validate=validate)
    run(tmp_path / "not", optimizer=SCHEDULE_FREE, epochs=1, validate=None)
    histories = [history_without_seconds(tmp_path / name) for name in ("evaluated", "not")]
    assert histories[0] == histories[1]
    [file] = (tmp_path / "evaluated/checkpoints/window-00000005").glob("*.safetensors")
    state = load_file(file)
    names = [name for name, p in model.named_parameters() if p.ndim >= 2]  # the first group of the optimizer
    index, name = names.index("classifier.weight"), "classifier.weight"
    trained, z = state[f"model.{name}"], state[f"optimizer.{index}.z"]
    average = trained.lerp(z, 1 - 1 / SCHEDULE_FREE.betas[0])
    assert not torch.allclose(average, trained, rtol=0, atol=1e-5)
    for found in (measured[-1], load_file(tmp_path / "evaluated/last/model.safetensors")[name]):
        assert torch.equal(found, average)
    assert torch.equal(model.get_parameter(name), average)


def test_of_a_model_with_adapters_a_checkpoint_has_what_is_trained_alone(tmp_path):
    run(tmp_path, make=with_adapters, epochs=1)
    [path] = (tmp_path / "checkpoints/window-00000005").glob("*.safetensors")
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith("model.")]  # noqa: SIM118
    assert names
    assert all("lora" in name or "classifier" in name for name in names)


def test_the_newest_are_kept_and_that_of_the_best_evaluation(tmp_path):
    scores = iter([5.0, 1.0, 2.0, 3.0, 4.0])
    run(tmp_path, every=3, keep=1, best=Best("score", "max"), validate=lambda model: {"score": next(scores)})
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "window-00000003",
        "window-00000009",
    ]


def test_what_is_in_hand_when_memory_had_run_out_is_cut_as_it_was(tmp_path):
    """The same budget gives the same split; another budget gives its own split."""
    accelerator = Accelerator(cpu=True)
    head = build_head("sequence_classification", "bert")
    settings = {"accelerator": accelerator, "collate_fn": head.collate}
    model, optimizer = accelerator.prepare(head.model, torch.optim.SGD(head.model.parameters(), lr=0.1))

    def checkpointer(max_tokens, budget):
        windows = WindowLoader(head.examples(LENGTHS), 10, max_tokens=max_tokens, **settings)
        made = Checkpointer(
            tmp_path, Checkpoints(budget=budget), accelerator, model, optimizer, None, windows
        )
        return made, windows

    saved, windows = checkpointer(200, {"memory": "1GiB"})
    next(iter(windows))
    windows.resplit(Bound(max_tokens=50))
    windows.replays = 2
    assert saved.save(1, None, {}) is None
    for budget, bound in (({"memory": "1GiB"}, 50), ({"memory": "2GiB"}, 400)):
        loaded, windows = checkpointer(400, budget)
        loaded.load(newest_checkpoint(tmp_path, accelerator))
        assert windows.bound == Bound(max_tokens=bound)
        assert (windows.window, windows.replays) == (1, 2)


def test_a_damaged_one_that_a_run_went_back_behind_does_not_outlive_those_that_come(whole, tmp_path):
    _, _, folder = whole
    killed = cut_back(folder, tmp_path / "run", 6)
    DAMAGES["weights truncated"](killed / "checkpoints/window-00000006")
    for window in (1, 2, 3):
        shutil.rmtree(killed / f"checkpoints/window-{window:08d}")
    found = []

    def validate(model):
        found.append(newest_checkpoint(killed, Accelerator(cpu=True)).window)
        return {"loss": 1.0}

    run(killed, resume=killed, keep=1, validate=validate)
    assert found == [6, 9, 10]  # the checkpoint is saved before each evaluation
    assert newest_checkpoint(killed, Accelerator(cpu=True)).window == 10


def test_one_whose_place_was_about_to_be_taken_is_put_back(whole, tmp_path):
    _, _, folder = whole
    killed = cut_back(folder, tmp_path / "run", 4)
    for window in (1, 2, 3):
        shutil.rmtree(killed / f"checkpoints/window-{window:08d}")
    (killed / "checkpoints/window-00000004").rename(killed / "checkpoints/.window-00000004.old")
    assert newest_checkpoint(killed, Accelerator(cpu=True)).window == 4


def test_on_other_hardware_windows_are_cut_as_that_asks_for(tmp_path):
    accelerator = Accelerator(cpu=True)
    head = build_head("sequence_classification", "bert")
    settings = {"accelerator": accelerator, "collate_fn": head.collate}
    model, optimizer = accelerator.prepare(head.model, torch.optim.SGD(head.model.parameters(), lr=0.1))

    def checkpointer():
        windows = WindowLoader(head.examples(LENGTHS), 10, max_tokens=400, **settings)
        made = Checkpointer(
            tmp_path, Checkpoints(budget={"memory": None}), accelerator, model, optimizer, None, windows
        )
        return made, windows

    saved, windows = checkpointer()
    windows.begin_trials()
    windows.resplit(Bound(max_tokens=50), Cost(fixed=7.0))
    windows.end_trials(tuned=True)
    assert saved.save(1, None, {}) is None
    for device, bound, cost in (("cpu", 50, 7.0), ("NVIDIA H100", 400, Cost().fixed)):
        found = newest_checkpoint(tmp_path, accelerator)
        loaded, windows = checkpointer()
        loaded.load(dataclasses.replace(found, about={**found.about, "device": device}))
        assert (windows.bound.max_tokens, windows.cost.fixed) == (bound, cost)
        assert windows.tuned == (device == "cpu")


# Damage


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "a pickle that runs code"])
def test_a_damaged_checkpoint_is_left_out_with_a_line_and_the_one_before_is_taken(
    whole, tmp_path, damage, caplog
):
    _, _, folder = whole
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    DAMAGES[damage](tmp_path / "checkpoints/window-00000010")
    found = newest_checkpoint(tmp_path, Accelerator(cpu=True))
    assert re.search(r"window-00000010 is damaged \(.+\): left out", caplog.text)
    assert found.window == 9


def test_where_all_are_damaged_a_run_does_not_start_anew_by_itself(whole, tmp_path):
    _, _, folder = whole
    shutil.copytree(folder / "checkpoints/window-00000010", tmp_path / "checkpoints/window-00000010")
    DAMAGES["numbers truncated"](tmp_path / "checkpoints/window-00000010")
    with pytest.raises(
        InputError,
        match=r"all checkpoints are damaged \(window-00000010: numbers.pt does not match its checksum",
    ):
        newest_checkpoint(tmp_path, Accelerator(cpu=True))


def test_a_pickle_that_would_run_code_is_refused_without_running_it(whole, tmp_path, monkeypatch):
    _, _, folder = whole
    monkeypatch.setenv("GRADACC_MARK", str(tmp_path / "mark"))
    killed = cut_back(folder, tmp_path / "run", 4)
    DAMAGES["a pickle that runs code"](killed / "checkpoints/window-00000004")
    with pytest.raises(InputError, match=r"numbers.pt: refused, as it holds more than numbers"):
        run(killed, resume=killed)
    assert not (tmp_path / "mark").exists()
    torch.load(killed / "checkpoints/window-00000004/numbers.pt", weights_only=False)  # the code runs
    assert (tmp_path / "mark").exists()


def test_a_link_is_no_checkpoint(whole, tmp_path):
    _, _, folder = whole
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/window-00000010").symlink_to(folder / "checkpoints/window-00000010")
    assert newest_checkpoint(tmp_path, Accelerator(cpu=True)) is None


def test_what_changes_the_mathematics_is_refused_by_its_key(whole):
    _, _, folder = whole
    found = newest_checkpoint(folder, Accelerator(cpu=True))
    found.about["same"].update({"optim.lr": 1e-3, "data.train": "sha256:a"})
    check_same(found, {"optim.lr": 1e-3, "data.train": "sha256:a", "new.key": 1})
    with pytest.raises(InputError, match=r"^optim.lr: found 0.1, but the run had 0.001; to resume from"):
        check_same(found, {"optim.lr": 0.1})
    with pytest.raises(InputError, match=r"^data.train: the content has changed; to resume from"):
        check_same(found, {"data.train": "sha256:b"})


def test_on_a_full_disk_the_run_goes_on_and_the_old_checkpoint_stays_good(tmp_path, capsys):
    def fill_up(accelerator, window):
        limit = 10_000 if window == 6 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    save = Checkpointer.save

    def on_a_full_disk(self, window, *rest):
        fill_up(self.accelerator, window)
        try:
            return save(self, window, *rest)
        finally:
            fill_up(self.accelerator, 0)

    Checkpointer.save = on_a_full_disk
    try:
        run(tmp_path, every=3, keep=1)
    finally:
        Checkpointer.save = save
    assert "no checkpoint after window 6: " in (said := capsys.readouterr().out)
    assert "File too large" in said
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["window-00000009"]
    assert len(history_without_seconds(tmp_path)) == 10


class Odd:
    """An object that pickle can write, and `weights_only` cannot read."""


@pytest.mark.parametrize("odd", [Odd, lambda: None], ids=["a class", "a function"])
def test_what_could_not_be_read_back_is_not_saved_and_the_run_goes_on(tmp_path, odd):
    class Scheduler(torch.optim.lr_scheduler.LambdaLR):
        def state_dict(self):
            return super().state_dict() | {"odd": odd}

    accelerator = Accelerator(cpu=True)
    head = build_head("sequence_classification", "bert")
    optimizer = torch.optim.SGD(head.model.parameters(), lr=0.1)
    windows = WindowLoader(
        head.examples(LENGTHS), 10, accelerator=accelerator, collate_fn=head.collate, max_tokens=64
    )
    model, prepared = accelerator.prepare(head.model, optimizer)
    scheduler = Scheduler(optimizer, lambda step: 1.0)
    made = Checkpointer(tmp_path, Checkpoints(), accelerator, model, prepared, scheduler, windows)
    problem = made.save(1, None, {})
    assert "numbers.pt" in problem
    assert "numbers, text and tensors" in problem
    assert list((tmp_path / "checkpoints").iterdir()) == []


# Signals


def test_the_first_signal_is_noted_its_echo_is_not_a_second_one_and_a_second_one_ends_the_process():
    program = """
import os, signal, sys, time
from accelerate import Accelerator
from gradacc_hf.utils.signals import ECHO, StopSignals
with StopSignals(Accelerator(cpu=True)) as signals:
    assert not signals.asked()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.asked()
    assert signals.asked()
    print("goes on", flush=True)
    time.sleep(ECHO + 0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    print("never", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert done.stdout == "goes on\n"
    assert done.stderr.count("SIGTERM: stopping after this window") == 1


def test_a_run_that_is_asked_to_stop_finishes_its_window_saves_and_goes_on_as_if_nothing_had_been(
    whole, tmp_path
):
    model, _, folder = whole
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def loss(outputs, batch):
        if torch.is_grad_enabled():
            seen.append(len(batch["labels"]))
        if sum(seen) == 35:  # inside the fourth window
            os.kill(os.getpid(), signal.SIGTERM)
        return outputs.loss

    _, stopped = run(tmp_path, every=0, compute_loss=loss)
    assert signal.getsignal(signal.SIGTERM) is before
    assert 4 <= stopped["stopped_after"] <= 6
    assert not (tmp_path / "summary.json").exists()
    assert len(history_without_seconds(tmp_path)) == stopped["stopped_after"]
    again, _ = run(tmp_path, resume=tmp_path, every=0)
    assert same_weights(model, again)
    assert history_without_seconds(tmp_path) == history_without_seconds(folder)


def test_in_another_thread_there_are_no_signals_to_note(tmp_path):
    ended = []
    thread = threading.Thread(target=lambda: ended.append(run(tmp_path, epochs=1)[1]["windows"]))
    thread.start()
    thread.join()
    assert ended == [5]


def test_a_run_over_a_stream_goes_on_too(tmp_path):
    """The run continues inside the second epoch, from the position that the stream stored."""

    def stream(folder, resume=None, max_windows=None):
        reset_accelerate()
        head = build_head("sequence_classification", "bert")
        examples = head.examples(LENGTHS)
        windows = WindowLoader(
            IterableDataset.from_generator(lambda: iter(examples)),
            10,
            accelerator=(accelerator := Accelerator(cpu=True)),
            collate_fn=head.collate,
            max_tokens=64,
            buffer_size=15,
        )
        checkpoints = Checkpoints(every=7, resume_from=resume and newest_checkpoint(resume, accelerator))
        settings = {"accelerator": accelerator, "output_dir": folder, "checkpoints": checkpoints}
        optimizer = torch.optim.AdamW(head.model.parameters(), lr=1e-3)
        fine_tune(head.model, optimizer, windows, epochs=2, max_windows=max_windows, **settings)
        return head.model

    model = stream(tmp_path / "whole")
    stream(tmp_path / "cut", max_windows=8)
    again = stream(tmp_path / "cut", resume=tmp_path / "cut")
    assert same_weights(model, again)
    assert history_without_seconds(tmp_path / "cut") == history_without_seconds(tmp_path / "whole")
    assert len(history_without_seconds(tmp_path / "whole")) == 10
