"""A loader's state is whole: a copied loop that saves it goes on as `fine_tune` does."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from gradacc_hf import WindowLoader, retry_on_oom
from gradacc_hf.accumulation.loader_state import upgrade_state
from gradacc_hf.accumulation.reference import EXACT, RecordGradients, relative_error
from gradacc_hf.accumulation.splitting import Bound, Cost
from gradacc_hf.verification.tiny_models import build_head

LENGTHS = np.random.default_rng(3).integers(3, 40, size=40).tolist()


class CopiedLoop:
    """A loop as the README has it, with retry_on_oom, where no micro-batch above `most` tokens fits."""

    def __init__(self, most=None, **split):
        self.accelerator = Accelerator(cpu=True)
        head = build_head("sequence_classification", "bert")
        self.windows = WindowLoader(
            head.examples(LENGTHS),
            10,
            accelerator=self.accelerator,
            collate_fn=head.collate,
            **(split or {"max_tokens": 160}),
        )

        def refuse(module, inputs, named):
            if most and named["input_ids"].numel() > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

        head.model.register_forward_pre_hook(refuse, with_kwargs=True)
        recorder = RecordGradients(head.model)
        self.model, self.optimizer = self.accelerator.prepare(head.model, recorder)
        self.gradients, self.splits = recorder.gradients, []

    def run(self, windows=99):
        """Train up to this many windows of an epoch."""
        for window in self.windows:
            while not window.done:
                with retry_on_oom(window, self.model, self.optimizer):
                    for batch in window:
                        with self.accelerator.accumulate(self.model):
                            loss = self.model(**batch).loss
                            self.accelerator.backward(window.weigh(loss))
                            self.optimizer.step()
                            self.optimizer.zero_grad()
            self.splits.append([m.indices.tolist() for m in window.micro_batches])
            if len(self.splits) == windows:
                return


def test_a_copied_loop_keeps_a_bound_that_running_out_of_memory_lowered():
    undisturbed = CopiedLoop()
    undisturbed.run()
    first = CopiedLoop(most=50)
    first.run(2)
    assert first.windows.replays >= 1
    assert first.windows.bound.max_tokens < 160
    state = json.loads(json.dumps(first.windows.state_dict()))

    second = CopiedLoop(most=50)
    second.windows.load_state_dict(state)
    assert second.windows.bound == Bound(**state["split"]["bound"])
    assert second.windows.bound.max_tokens < 160
    assert second.windows.replays == state["counts"]["replays"]
    second.run()
    assert second.windows.replays == state["counts"]["replays"], "nothing runs out of memory again"
    pairs = zip(second.gradients, undisturbed.gradients[2:], strict=True)
    assert max(relative_error(*pair) for pair in pairs) < EXACT


def test_another_budget_splits_by_its_own_bound():
    first = CopiedLoop(most=50)
    first.run(2)
    state = first.windows.state_dict()
    for split, bound in (
        ({"max_tokens": 90}, Bound(max_tokens=90)),
        ({"micro_batch_size": 2}, Bound(micro_batch_size=2)),
    ):
        other = CopiedLoop(**split)
        other.windows.load_state_dict(state)
        assert other.windows.bound == bound
        assert (other.windows.epoch, other.windows.window) == (0, 2)


def test_while_sizes_are_tried_the_state_has_the_bound_that_they_are_tried_under():
    windows = CopiedLoop().windows
    windows.begin_trials()
    windows.resplit(Bound(max_tokens=40))
    assert windows.state_dict()["split"]["bound"]["max_tokens"] == 160
    windows.end_trials(tuned=True)
    again = CopiedLoop().windows
    again.load_state_dict(windows.state_dict())
    assert (again.bound, again.tuned) == (Bound(max_tokens=40), True)


@pytest.mark.parametrize("max_tokens", [160, 30])
def test_a_state_of_0_1_0_with_a_tuned_size_is_taken(max_tokens):
    cost = {"fixed": 7.0, "quadratic": 100.0}
    windows = CopiedLoop(max_tokens=max_tokens).windows
    windows.load_state_dict({"seed": 0, "epoch": 1, "window": 2, "max_tokens": 50, "cost": cost})
    assert windows.bound == Bound(max_tokens=min(50, max_tokens))
    assert (windows.cost, windows.tuned, windows.epoch, windows.window) == (Cost(**cost), True, 1, 2)


def test_what_a_checkpoint_of_0_1_0_holds_is_taken():
    bound = {"max_tokens": 50, "micro_batch_size": None, "max_bytes": None}
    cost = {"fixed": 7.0, "quadratic": 100.0}
    place = {"seed": 0, "epoch": 0, "window": 3}
    old = {"place": place, "bound": bound, "cost": cost, "counts": [1, 2, 3]}
    windows = CopiedLoop().windows
    windows.load_state_dict(old, same_budget=True)
    assert (windows.bound, windows.cost, windows.tuned) == (Bound(max_tokens=50), Cost(**cost), False)
    assert (windows.empty_micro_batches, windows.empty_windows, windows.replays) == (1, 2, 3)
    windows = CopiedLoop().windows
    windows.load_state_dict(old, same_budget=False)
    assert (windows.bound, windows.window, windows.replays) == (Bound(max_tokens=160), 3, 3)
    assert upgrade_state(place) == place


@pytest.mark.parametrize(
    ("lengths", "warns"), [(LENGTHS, False), (LENGTHS[::-1], True), ([*LENGTHS, 5], True)]
)
def test_a_state_of_other_data_is_a_warning(lengths, warns, caplog):
    state = json.loads(json.dumps(CopiedLoop().windows.state_dict()))
    head = build_head("sequence_classification", "bert")
    windows = WindowLoader(
        head.examples(lengths), 10, accelerator=Accelerator(cpu=True), collate_fn=head.collate, max_tokens=160
    )
    windows.load_state_dict(state)
    assert ("the state is from other data" in caplog.text) == warns
