"""Real processes over gloo: the gradient is that of the whole window, whatever a process is given of it."""

import functools
import itertools
import json
import os
import re
import select
import signal
import subprocess
import sys

import pytest
from accelerate.utils.other import get_free_port
from conftest import ROOT

from gradacc_hf.accumulation.reference import EXACT

WORKER = ROOT / "tests/helpers/distributed_worker.py"


SECONDS_OF_A_LAUNCH = 280


class Ranks:
    """Servers of `distributed_worker.py`, one for each rank, with a hash seed each as torchrun has them.

    A launch runs in forks of the servers, so that modules are imported once and not in each launch.
    """

    def __init__(self, folder):
        self._servers, self._folder, self._launches = [], folder, itertools.count()

    def launch(self, num_processes, engine, *cases, fails=False, **variables):
        """Run cases on that many processes, with the environment variables that torchrun sets."""
        servers = [self._server(rank) for rank in range(num_processes)]
        name, outputs = f"launch-{next(self._launches)}", []
        variables |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
        for rank, server in enumerate(servers):
            outputs.append(self._folder / f"{name}-rank-{rank}")
            own = variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            print(json.dumps([own, str(outputs[-1]), [engine, *cases]]), file=server.stdin, flush=True)
        ended = [self._exit_code(server, outputs) for server in servers]
        if fails:
            assert set(ended) == {1}
            return "".join(output.read_text() for output in outputs)
        assert set(ended) == {0}, "".join(output.read_text()[-4000:] for output in outputs)
        lines = outputs[0].read_text().splitlines()
        rows = [json.loads(line) for line in lines if line.startswith('{"case"')]
        return {row.pop("case"): row for row in rows}

    def _server(self, rank):
        if rank == len(self._servers):
            environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
            environment |= {"HF_HUB_OFFLINE": "1"}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            command = [sys.executable, WORKER, "serve"]
            self._servers.append(subprocess.Popen(command, env=environment, start_new_session=True, **pipes))
        return self._servers[rank]

    def _exit_code(self, server, outputs):
        ready, _, _ = select.select([server.stdout], [], [], SECONDS_OF_A_LAUNCH)
        assert ready, "".join(output.read_text()[-4000:] for output in outputs)
        return int(server.stdout.readline())

    def close(self):
        for server in self._servers:
            os.killpg(server.pid, signal.SIGKILL)  # and forks that wait for each other
            server.communicate()


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield functools.cache(ranks.launch)
    ranks.close()


@pytest.fixture(scope="module", params=[*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 3])
def ddp(request, launch):
    return request.param, launch(request.param, "ddp")


def test_every_case_is_exact_on_1_2_and_3_processes(ddp):
    _, found = ddp
    exact = {name: row for name, row in found.items() if "error" in row}
    assert len(exact) == 26
    for name, row in exact.items():
        assert row["error"] < EXACT, name
        assert row["loss_error"] < 1e-5, name
        assert row["same_windows"], name
    assert found["noise"]["measured"] >= found["noise"]["windows"] - 1 >= 1


def test_a_label_that_one_process_alone_gets_late_is_probed_by_all(ddp):
    _, found = ddp
    (level, first), (warning, second) = found["exact_trainer_late_label"]["lines"]
    assert (level, warning) == ("INFO", "WARNING")
    assert "a mean over items (counted as 'labels')" in first
    assert "is not a mean over its items, counted as 'labels'" in second
    assert found["exact_trainer_late_label"]["trained"] == 4


def test_processes_have_unequal_accumulation_steps_and_none_has_none(ddp):
    num_processes, found = ddp
    steps = [row["steps"] for row in found.values() if "steps" in row]
    assert all(min(process) >= 1 for case in steps for process in case)
    if num_processes > 1:
        assert any(len(set(window)) > 1 for case in steps for window in zip(*case, strict=True))


def test_bf16_weights_are_refused_on_several_processes_in_one_line_that_says_what_to_use(ddp):
    num_processes, found = ddp
    refused = found["bf16_weights"]["refused"]
    assert found["bf16_weights"]["processes"] == num_processes
    if num_processes == 1:
        assert not refused
    else:
        assert "allowed there is float32, which computes in bf16 with budget.precision bf16" in refused


def test_a_call_that_a_loop_leaves_out_is_an_error_on_all_processes(ddp):
    num_processes, found = ddp
    found = found["calls_left_out"]
    assert found["none"] == [""] * num_processes
    lines = {
        "accumulate": "with accelerator.accumulate(model):",
        "weigh": "accelerator.backward(window.weigh(loss))",
        "weigh_on_the_last": "accelerator.backward(window.weigh(loss))",
        "prepare": "model, optimizer = accelerator.prepare(model, optimizer)",
    }
    for call, line in lines.items():
        assert len(found[call]) == num_processes
        assert all(f"write `{line}`" in message for message in found[call]), call


def test_a_contrastive_window_is_exact_where_processes_hold_unequal_numbers_of_pairs_or_none(ddp):
    num_processes, found = ddp
    planned = found["contrastive"]["planned"] + found["contrastive_fewer_pairs_than_processes"]["planned"]
    assert num_processes == 1 or any(len(set(window)) > 1 for window in planned)
    assert num_processes < 3 or any(0 in window for window in planned)


def test_when_one_process_runs_out_of_memory_all_run_the_window_again(ddp):
    _, found = ddp
    found = found["out_of_memory"]
    assert found["gradient_error"] < EXACT
    assert found["losses"][1] == pytest.approx(found["losses"][0], rel=1e-5)
    assert found["examples"] == 23
    assert min(found["replays"]) == max(found["replays"]) >= 1


def test_gradients_cross_processes_once_a_window_however_many_micro_batches_it_has(ddp):
    num_processes, found = ddp
    many, one = found["collectives"]["of 1"], found["collectives"]["of 10"]
    assert max(many["steps"]) >= 3
    assert min(one["steps"]) == 1
    for counted in (many, one):
        crossed = [window["gradient buckets"] for window in counted["counts"]]
        assert crossed == [counted["buckets"]] * 6  # 0 on one process
        assert num_processes == 1 or counted["buckets"] >= 1
    # Beside them (which all_reduce has counted too): items are counted, losses added up, and, where a
    # micro-batch may not fit, processes tell each other that it did.
    for counted in (many, one):
        others = [sum(window.values()) - 2 * window["gradient buckets"] for window in counted["counts"]]
        assert set(others) == ({0} if num_processes == 1 else {2, 3})
        assert others[-1] == (0 if num_processes == 1 else 2)


def test_a_window_without_items_is_skipped_by_all_processes(ddp):
    _, found = ddp
    assert found["no_items_here_and_there"]["windows"] == 4  # of 5


def test_parameters_that_take_no_part_in_the_loss_are_noticed_and_only_then_looked_for(ddp):
    _, found = ddp
    assert found["unused_parameters"]["looks_for_unused"]
    assert not found["unequal"]["looks_for_unused"]


def test_a_collate_function_that_masks_at_random_leaves_no_loss_nan_and_no_process_waiting(ddp):
    _, found = ddp
    assert found["masked_at_random"]["finite"]
    assert found["masked_at_random"]["windows"] >= 6  # of 8: a window may happen to hold no mask


def test_predictions_come_back_once_each_in_order(ddp):
    _, found = ddp
    assert found["evaluation"]["each_once"] == [True] * 6
    assert found["sizes"]["same"]
    assert "the fastest" in found["sizes"]["said"]


def test_the_windows_hold_the_same_examples_on_any_number_of_processes(ddp, launch):
    _, found = ddp
    for name, row in launch(1, "ddp").items():
        assert found[name].get("indices") == row.get("indices"), name


def test_a_stream_gives_each_example_once_an_epoch_over_all_processes_and_goes_on_where_it_was(ddp):
    num_processes, found = ddp
    found = found["stream"]
    assert found["same_windows"]
    assert found["over_processes"] == [sorted(window) for window in found["indices"]]
    assert [len(window) for window in found["indices"]] == 2 * [4, 4, 4, 4, 4, 3]
    for epoch in (found["indices"][:6], found["indices"][6:]):
        assert sorted(itertools.chain(*epoch)) == list(range(23))
    assert found["indices"][:6] != found["indices"][6:]
    assert found["rest"] == found["indices"][8:]
    assert found["labels"] == 2 * [found["expected_labels"]]
    for refused in found["refused"]:
        assert len(refused) == (0 if num_processes == 1 else 2)
        assert all("all processes must have the same data in the same order" in said for said in refused)


def test_other_data_or_another_order_stops_all_processes_in_the_first_window(ddp):
    num_processes, found = ddp
    raised = found["other_data"]["raised"]
    ends = {
        "alike": "",
        "rounded": "",
        "drawn by numpy": "",
        "drawn by the data set": "",
        "stream alike": "",
        "stream drawn": "",
        "stream drawn by numpy": "",
        "moved": "all processes must have the same data in the same order",
        "moved, drawn by numpy": "all processes must have the same data in the same order",
        "stream moved, drawn by numpy": "all processes must have the same data in the same order",
        "moved, with a worker": "all processes must have the same data in the same order",
        "swapped": "all processes must have the same data in the same order",
        "changed, evaluated": "all processes must have the same data in the same order",
        "changed": "all processes must have the same data in the same order",
        "stream moved": "all processes must have the same data in the same order",
        "stream changed": "all processes must have the same data in the same order",
        "seed": "give all processes the same seed",
        "bound": "give all processes one bound",
    }
    assert raised.keys() == ends.keys()
    for name, end in ends.items():
        assert len(raised[name]) == num_processes, name
        for said, windows in raised[name]:
            if num_processes == 1 or not end:
                assert (said, windows > 0) == ("", True), name
            else:
                assert (said.endswith(end), "\n" in said) == (True, False), (name, said)
                assert windows <= (1 if name.startswith("stream changed") else 0), name


def test_a_fine_tuning_does_not_depend_on_the_number_of_processes(ddp, launch):
    _, found = ddp
    loss = launch(1, "ddp")["evaluation"]["loss"]
    assert found["evaluation"]["loss"] == pytest.approx(loss, rel=1e-5)


def test_accelerates_own_suite_of_accumulate_passes_beside_our_windows_which_do_as_it_asks(ddp):
    """Gradients of all processes are the same after a window's last micro-batch, and only then."""
    num_processes, found = ddp
    for key in ("in_sync", "in_sync_after"):
        *before, last = found["beside_test_sync"][key]
        assert last
        assert len(before) >= 2
        assert all(before) if num_processes == 1 else not any(before)


def test_fsdp2_is_exact_with_equal_accumulation_steps_on_all_processes(launch):
    cases = [
        "unequal",
        "streamed",
        "no_items_here_and_there",
        "fewer_examples_than_processes",
        "clipped",
        "packed_and_lean",
        "router_loss",
        "taught",
        "evaluation",
    ]
    contrastive = ["contrastive", "contrastive_fewer_pairs_than_processes"]
    found = launch(2, "fsdp2", *cases, *contrastive, "sharded_gradients", "noise")
    # After each micro-batch a process holds its half of the gradients, and no whole ones beside it.
    assert all(0.45 < share < 0.55 for share in found["sharded_gradients"]["shards"])
    assert found["sharded_gradients"]["whole"][:-1] == [0.0] * (len(found["sharded_gradients"]["whole"]) - 1)
    for name in (*contrastive, "noise"):
        assert found[name]["error"] < EXACT, name
        assert found[name]["loss_error"] < 1e-5, name
    for name in cases[:-1]:
        assert found[name]["error"] < EXACT, name
        assert all(len(set(window)) == 1 for window in zip(*found[name]["steps"], strict=True)), name
    assert found["evaluation"]["each_once"] == [True] * 6


def test_a_run_stops_on_one_number_of_processes_and_goes_on_on_another_sharded_or_not(tmp_path, launch):
    undisturbed = launch(1, "ddp", "goes_on", RUN=str(tmp_path / "whole"), STOP="99")["goes_on"]
    assert undisturbed["stopped_after"] is None
    assert undisturbed["examples"] == 2 * 23
    parts = [(2, "ddp", 3), (1, "ddp", 6), (3, "fsdp2", 9), (2, "fsdp2", 99)]
    for processes, engine, stop in parts:
        found = launch(processes, engine, "goes_on", RUN=str(tmp_path / "parts"), STOP=str(stop))["goes_on"]
        assert found["stopped_after"] == (stop if stop < 99 else None)
    for key in ("losses", "norms"):
        assert found[key] == pytest.approx(undisturbed[key], rel=1e-5), key
    assert found["examples"] == 2 * 23


@pytest.mark.slow
def test_out_of_memory_under_fsdp_ends_the_run_in_a_line_and_it_goes_on_cut_finer(tmp_path, launch):
    run = {"RUN": str(tmp_path), "STOP": "99", "SHORT": "5"}
    said = launch(2, "fsdp2", "goes_on", fails=True, **run)
    assert re.search(
        r"OutOfMemoryWhileSyncingError: out of memory in a micro-batch of \d+ padded tokens", said
    )
    assert "while other processes wait for its gradients: run again with --budget.max_tokens " in said
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir())[-1] == "window-00000004"
    found = launch(2, "fsdp2", "goes_on", **run, MAX_TOKENS="40")["goes_on"]
    undisturbed = launch(1, "ddp", "goes_on", RUN=str(tmp_path / "whole"), STOP="99")["goes_on"]
    assert found["losses"] == pytest.approx(undisturbed["losses"], rel=1e-5)
    assert found["examples"] == 2 * 23
