"""`gradacc bench gpu` at a tiny size: rows as it goes, failures as rows, and an end in time."""

import json
import re
import signal
import time
from dataclasses import replace

import pytest
import torch

from gradacc_hf.bench import cli, predicted_memory
from gradacc_hf.bench.gpu import TINY, measure_gpu
from gradacc_hf.bench.gpu_cells import cells_of, peak_of
from gradacc_hf.bench.gpu_contenders import CONTENDERS, GpuModel, Turn

ENCODER, DECODER = TINY.models
WITH_PREDICTION = {"ours", "ours_padded", "dense"}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rows(file="runs/gpu-1/rows.jsonl"):
    return [json.loads(line) for line in open(file, encoding="utf-8")]


def of(kind, found):
    return [row for row in found if row["row"] == kind]


def test_the_command_writes_a_row_for_each_cell_and_prints_a_table(monkeypatch, capsys):
    monkeypatch.setattr(cli, "TINY", replace(TINY, models=(DECODER,), precisions=("fp32",)))
    cli.main(["gpu", "--tiny"])
    found = rows()
    assert found[0]["row"] == "environment"
    split, refused = of("check", found)
    assert max(split["split"], split["without_padding"], refused["split"]) <= 1e-5
    assert "the loss reads hidden states of padding" in refused["refused"]
    cells = {cell["contender"]: cell for cell in of("cell", found)}
    assert list(cells) == list(CONTENDERS)
    assert [turn["contender"] for turn in of("turn", found)] != list(cells)  # the order rotates
    for name, cell in cells.items():
        assert cell["failed"] is None
        assert (cell["turns"], cell["model"], cell["precision"]) == (1, DECODER.name, "fp32")
        assert min(cell["tokens_per_second"], cell["of_dense_limit"], cell["mfu"]) > 0
        assert (cell["predicted_bytes"] is not None) == (name in WITH_PREDICTION)
    assert cells["dense"]["of_dense_limit"] == 1
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert all(re.search(rf"^ *{name} .*\d%", printed, re.MULTILINE) for name in CONTENDERS.values())
    assert "ended early" not in printed


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run in which one contender fails, and which ends with Ctrl-C before the second model."""

    def interrupt(groups):
        yield groups[0]
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the run continues")

    sizes = {**predicted_memory.TINY, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
    mixes = GpuModel("mixes examples", "mixes", 6, 64)
    plan = replace(
        TINY, models=(mixes, ENCODER), heads=(), precisions=("fp32",), contenders=("ours", "dense")
    )
    before = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("interrupted"))
        patch.setitem(predicted_memory.SIZES, "mixes", ("AutoModelForCausalLM", "lfm2", sizes))
        result = measure_gpu(60, replace(plan, turns=2), interrupt)
        assert signal.getsignal(signal.SIGINT) is before
        return result, rows(result.file)


def test_a_cell_that_fails_is_a_row_with_the_reason(interrupted):
    result, found = interrupted
    ours, dense = result.cells
    assert (ours.turns, ours.tokens_per_second) == (0, None)
    assert ours.failed.startswith("PaddingNotRemovableError: padding cannot be removed from Lfm2")
    assert (dense.turns, dense.failed) == (2, None)
    assert [row["failed"] for row in of("cell", found)] == [ours.failed, None]
    assert [row["contender"] for row in of("turn", found)] == ["dense", "ours", "dense"]  # one attempt


def test_an_interrupted_run_has_complete_lines_and_the_cells_so_far(interrupted):
    result, found = interrupted
    assert result.stopped == "Ctrl-C"
    assert [row["row"] for row in found] == ["environment", *3 * ["turn"], *2 * ["cell"]]
    assert len(result.cells) == 2


def test_the_time_limit_ends_the_run():
    plan = replace(TINY, heads=(), precisions=("fp32",), contenders=("dense",), windows=2, turns=100_000)
    started = time.monotonic()
    result = measure_gpu(1, replace(plan, models=(DECODER,)))
    assert time.monotonic() - started < 3
    assert result.stopped == "time limit of 1 s" or "of 100000 turns" in result.notes[0].text
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert rows()[0]["row"] == "environment"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_is_one_line_and_no_folder(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        cli.main(["gpu"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "error: bench gpu: found no CUDA GPU; allowed without one: --tiny, which runs on the CPU\n"
    )
    assert list(tmp_path.iterdir()) == []


def turn(contender, number, tokens, flops=None, failed=None):
    return Turn("m", "bf16", contender, number, 1, tokens, 2.0, flops, 7, None, failed)


def test_a_cell_is_the_median_of_turns_that_count():
    turns = [turn("ours", 0, 1), turn("dense", 0, 1)]  # the warm-up
    for number, tokens in enumerate((80, 100, 60), start=1):
        turns += [turn("ours", number, tokens, flops=4e12), turn("dense", number, 100)]
    turns += [turn("trainer", 1, 50), turn("trainer", 2, 0, failed="out of memory")]
    ours, trainer, dense = cells_of(turns, {"bf16": (10e12, "a source")})
    assert (ours.turns, ours.tokens_per_second, ours.of_dense_limit, ours.mfu) == (3, 40, 0.8, 0.2)
    assert (trainer.turns, trainer.of_dense_limit, trainer.failed) == (1, 0.5, "out of memory")
    assert (dense.of_dense_limit, dense.mfu) == (1, None)
    [cell] = cells_of([turn("ours", 0, 1)], {})
    assert cell.failed == "stopped before a turn that counts"


@pytest.mark.parametrize(("name", "tflops"), [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756)])
def test_the_peak_of_a_known_gpu_is_from_the_data_sheet(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak, source = peak_of("bf16", torch.device("cuda"))
    assert peak == tflops * 1e12
    assert source.startswith("data sheet")
