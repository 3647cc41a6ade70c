"""Memory that runs out changes the split, and nothing else."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from gradacc_hf import WindowLoader
from gradacc_hf.accumulation.memory_model import MicroBatchMemory
from gradacc_hf.accumulation.oom import out_of_memory
from gradacc_hf.accumulation.reference import EXACT, RecordGradients, relative_error
from gradacc_hf.accumulation.splitting import Bound
from gradacc_hf.bench.oom import RecordingLoader, run_limited
from gradacc_hf.errors import OutOfMemoryError
from gradacc_hf.padding.removal import remove_padding
from gradacc_hf.training.loop import train
from gradacc_hf.verification.tiny_models import build_head

LENGTHS = np.random.default_rng(3).integers(3, 40, size=23).tolist()


class NoMemory(torch.autograd.Function):
    """Nothing; but where memory is short, that is found out in the backward pass."""

    @staticmethod
    def forward(ctx, x, is_short):
        ctx.is_short = is_short
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.is_short:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes.")
        return gradient, None


def run(most=None, where="forward", epochs=2, **split):
    """Training where no micro-batch above `most` tokens fits: the loader, gradients, losses, indices."""
    accelerator, head = Accelerator(cpu=True), build_head("sequence_classification", "bert")
    split = split or {"max_tokens": 160}
    windows = WindowLoader(
        head.examples(LENGTHS), 10, accelerator=accelerator, collate_fn=head.collate, **split
    )

    padding_free = split.get("padding_free", False)
    if padding_free:
        remove_padding(head.model, head.collate(head.examples(LENGTHS)[:8]))

    def is_beyond(batch):
        held = batch["attention_mask"].sum() if padding_free else batch["input_ids"].numel()
        return most and held > most

    def check(module, inputs, named):
        if where == "forward" and is_beyond(named):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    head.model.register_forward_pre_hook(check, with_kwargs=True)
    recorder = RecordGradients(head.model)
    model, optimizer = accelerator.prepare(head.model, recorder)

    def loss(outputs, batch):
        is_short = where == "backward" and is_beyond(batch)
        return NoMemory.apply(outputs.loss, is_short)

    watched, settings = (
        RecordingLoader(windows),
        {"accelerator": accelerator, "epochs": epochs, "compute_loss": loss},
    )
    losses = [record.loss for record in train(model, optimizer, watched, **settings)]
    return windows, recorder.gradients, losses, watched.indices


@pytest.fixture(scope="module")
def undisturbed():
    return run()


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(
    "split", [{"max_tokens": 160}, {"micro_batch_size": 10}, {"max_tokens": 160, "num_workers": 1}]
)
def test_the_window_is_cut_finer_and_run_again_with_the_same_gradient(undisturbed, where, split):
    windows, gradients, losses, indices = run(50, where, **split)
    assert windows.replays >= 1
    assert indices == undisturbed[3]
    assert losses == pytest.approx(undisturbed[2], rel=1e-5)
    pairs = zip(gradients, undisturbed[1], strict=True)
    assert max(relative_error(*pair) for pair in pairs) < EXACT
    if "max_tokens" in split:  # windows to come are cut finer from the start
        assert windows.bound.max_tokens < 160
        assert windows.replays <= 2


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("bound", ["tokens", "bytes"])
def test_a_window_without_padding_is_cut_by_its_real_tokens(undisturbed, where, bound):
    """Twice at most: the largest micro-batch has up to 160 real tokens, and 50 fit."""
    factors = {"exponents": np.array([(1, 1)]), "activations": np.array([[2.0**20]])}
    factors["layers"] = 0.75 * factors["activations"]
    memory = MicroBatchMemory(parameters=0, gradients=0, optimizer=0, loss=np.zeros((1, 1)), **factors)
    split = {"tokens": {"max_tokens": 160}, "bytes": {"bound": Bound(max_bytes=200 * 2**20, memory=memory)}}
    windows, gradients, losses, indices = run(50, where, padding_free=True, **split[bound])
    assert 1 <= windows.replays <= 2
    assert indices == undisturbed[3]
    assert losses == pytest.approx(undisturbed[2], rel=1e-5)
    assert max(relative_error(*pair) for pair in zip(gradients, undisturbed[1], strict=True)) < EXACT
    sizes = [int(windows.lengths[part].sum()) for part in windows.split(0, 0).processes[0]]
    assert max(sizes) <= 50
    assert len(sizes) <= np.ceil(sum(sizes) / 40) + 2, "no finer than the tokens that fit"


def test_an_example_that_does_not_fit_alone_is_named(undisturbed):
    longest, tokens = int(np.argmax(LENGTHS)), max(LENGTHS)
    found = rf"out of memory on example {longest} alone, of {tokens} padded tokens%s, with [\d,]+ MiB free"
    with pytest.raises(OutOfMemoryError, match=found % r""):
        run(tokens - 1)
    factors = {"exponents": np.array([(1, 1)]), "activations": np.array([[2.0**20]])}
    memory = MicroBatchMemory(parameters=0, gradients=0, optimizer=0, loss=np.zeros((1, 1)), **factors)
    with pytest.raises(OutOfMemoryError, match=found % f", predicted to take {tokens} MiB"):
        run(tokens - 1, bound=Bound(max_bytes=160 * 2**20, memory=memory))


def test_optimizer_states_that_do_not_fit_are_no_reason_to_cut(monkeypatch):
    def step(self, closure=None):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(RecordGradients, "step", step)
    with pytest.raises(
        OutOfMemoryError, match=r"out of memory in the optimizer step .*--optim.name adafactor"
    ):
        run()


def test_other_errors_stay_what_they_are():
    accelerator, head = Accelerator(cpu=True), build_head("sequence_classification", "bert")
    windows = WindowLoader(
        head.examples(LENGTHS), 10, accelerator=accelerator, collate_fn=head.collate, max_tokens=160
    )

    def loss(outputs, batch):
        raise RuntimeError("shapes do not match")

    model, optimizer = accelerator.prepare(head.model, torch.optim.SGD(head.model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(model, optimizer, windows, accelerator=accelerator, compute_loss=loss)
    assert not out_of_memory(ValueError("can't allocate memory"))


def test_the_final_error_is_not_taken_for_the_one_it_quotes():
    message = "DefaultCPUAllocator: can't allocate memory"
    assert out_of_memory(RuntimeError(message))
    assert not out_of_memory(OutOfMemoryError(f"out of memory on example 3 alone ({message})"))


def test_a_real_limit_on_the_process_changes_no_loss():
    limited, free = run_limited(1, 90), run_limited(1, None)
    assert limited.replays >= 1
    assert limited.each_once
    assert limited.error(free) < 1e-5
