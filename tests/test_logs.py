"""Warnings name the process only if there are several."""

import logging

from accelerate import Accelerator, PartialState

from gradacc_hf.utils.logs import get_logger


def test_a_single_process_has_no_rank_in_its_log(caplog, monkeypatch):
    Accelerator(cpu=True)
    with caplog.at_level(logging.WARNING, logger="one"):
        get_logger("one").warning("three windows were empty")
        monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
        get_logger("one").warning("three windows were empty")
    assert [record.message for record in caplog.records] == [
        "three windows were empty",
        "[RANK 0] three windows were empty",
    ]
