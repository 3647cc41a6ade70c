"""A loss or gradient that is not finite: no step is taken, and it is said where it comes from."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from training_runs import LENGTHS, fp16_accelerator, history

from gradacc_hf import WindowLoader, fine_tune, train
from gradacc_hf.accumulation.accelerate_state import reset_accelerate
from gradacc_hf.accumulation.loss_items import model_loss
from gradacc_hf.errors import NonFiniteError
from gradacc_hf.training.checkpoint import Checkpoints, newest_checkpoint
from gradacc_hf.verification.tiny_models import build_head

BAD = 17  # the example that spoils its window


class Root(torch.autograd.Function):
    """Finite itself; its gradient is not, at 0."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


def run(folder, cause, accelerator=None, spoilt=True, resume=False, leave_out=(), **more):
    reset_accelerate()
    accelerator = accelerator() if accelerator else Accelerator(cpu=True)
    head = build_head("sequence_classification", "bert")
    examples = head.examples(LENGTHS)

    def is_bad(input_ids):
        rows = input_ids[:, : len(examples[BAD]["input_ids"])]
        whole = torch.tensor(examples[BAD]["input_ids"])
        return spoilt and rows.shape[1] == len(whole) and bool((rows == whole).all(1).any())

    here = []

    def note(module, inputs, named):
        here[:] = [is_bad(named["input_ids"])]

    def spoil(module, inputs, outputs):
        if here[0] and cause == "module":
            return outputs * math.nan
        return Root.apply(outputs) if here[0] and cause == "gradient" else outputs

    def compute_loss(outputs, batch):
        loss = model_loss(outputs, batch)
        return loss + math.inf if is_bad(batch["input_ids"]) and cause == "loss" else loss

    head.model.register_forward_pre_hook(note, with_kwargs=True)
    head.model.bert.encoder.layer[1].output.dense.register_forward_hook(spoil)
    windows = WindowLoader(
        examples,
        10,
        accelerator=accelerator,
        collate_fn=head.collate,
        max_tokens=64,
        shuffle=False,
        leave_out=leave_out,
    )
    optimizer = torch.optim.AdamW(head.model.parameters(), lr=1e-3)
    weights = []
    optimizer.register_step_post_hook(lambda *_: weights.append([p.clone() for p in head.model.parameters()]))
    found = newest_checkpoint(folder, accelerator) if resume else None
    try:
        summary = fine_tune(
            head.model,
            optimizer,
            windows,
            accelerator=accelerator,
            scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
            compute_loss=compute_loss,
            output_dir=folder,
            checkpoints=Checkpoints(every=0, resume_from=found),
            **more,
        )
    except NonFiniteError as error:
        summary = str(error)
    return summary, weights, head.model


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        ("module", "first in the output of bert.encoder.layer.1.output.dense (Linear)"),
        ("loss", "their loss is inf"),
        ("gradient", "first in the gradient of bert.encoder.layer.1.output.dense.bias"),
    ],
)
def test_it_stops_before_the_step_and_names_window_examples_and_module(tmp_path, cause, said):
    line, weights, model = run(tmp_path, cause)
    assert line.startswith("window 2: the loss or gradient is not finite: examples [")
    assert said in line
    named = json.loads(line[line.index("[") : line.index("]") + 1])
    assert BAD in named
    assert set(named) <= set(range(10, 20))
    assert all(torch.equal(a, b) for a, b in zip(weights[0], model.parameters(), strict=True))
    assert len(history(tmp_path)) == 1
    assert (tmp_path / "checkpoints/window-00000001").is_dir()  # though none was due


def test_from_there_it_goes_on_as_if_nothing_had_been(tmp_path):
    _, _, undisturbed = run(tmp_path / "whole", "module", spoilt=False)
    run(tmp_path / "run", "module")
    _, _, again = run(tmp_path / "run", "module", spoilt=False, resume=True)
    pairs = zip(undisturbed.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("cause", ["module", "loss", "gradient"])
def test_or_leaves_that_window_out_and_goes_on(tmp_path, cause, caplog):
    summary, weights, model = run(tmp_path, cause, on_nonfinite="skip")
    assert [row["skipped"] for row in history(tmp_path)] == [False, True, False, False, False]
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[1], weights[2], strict=True))
    assert summary["skipped_windows"] == 1
    assert [row["lr"] for row in history(tmp_path)] == pytest.approx([1e-3, 5e-4, 5e-4, 1e-3 / 3, 2.5e-4])
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert "no step was taken, and the run continues" in caplog.text


def test_under_fp16_the_scaler_judges_gradients_and_a_loss_that_is_nan_stops_the_run(tmp_path):
    summary, _, _ = run(tmp_path / "a", None, accelerator=lambda: fp16_accelerator(init_scale=2.0**40))
    assert summary["skipped_windows"] == 1  # the first: an overflow, which is no reason to stop
    line, _, _ = run(tmp_path / "b", "module", accelerator=lambda: fp16_accelerator(init_scale=1.0))
    assert "first in the output of bert.encoder.layer.1.output.dense" in line


def test_or_without_that_example_while_all_others_stay_in_their_windows(tmp_path):
    line, _, _ = run(tmp_path, "module")
    named = json.loads(line[line.index("[") : line.index("]") + 1])
    summary, _, _ = run(tmp_path, "module", resume=True, leave_out=[BAD])
    assert BAD in named
    assert [row["examples"] for row in history(tmp_path)] == [10, 9, 10, 10, 10]
    assert summary["skipped_windows"] == 0


def test_what_batch_norm_has_counted_of_that_window_is_forgotten(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    x = torch.randn(24, 4)
    x[9] = math.nan
    examples = [{"x": row, "labels": row[:1]} for row in x]
    accelerator = Accelerator(cpu=True)
    windows = WindowLoader(examples, 8, micro_batch_size=4, shuffle=False, accelerator=accelerator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, labels):
            return self.inner(x)

    def loss(outputs, batch):
        return torch.nn.functional.mse_loss(outputs, batch["labels"])

    net, optimizer = accelerator.prepare(Net(), optimizer)
    settings = {"accelerator": accelerator, "compute_loss": loss, "on_nonfinite": "skip"}
    records = train(net, optimizer, windows, **settings)
    assert [record.skipped for record in records] == [False, True, False]
    assert model[1].running_mean.isfinite().all()
    assert model[1].num_batches_tracked >= 4


def test_where_every_micro_batch_is_bad_it_is_not_these_examples(tmp_path):
    head = build_head("sequence_classification", "bert")
    accelerator = Accelerator(cpu=True)
    windows = WindowLoader(
        head.examples(LENGTHS), 10, micro_batch_size=4, accelerator=accelerator, collate_fn=head.collate
    )
    optimizer = torch.optim.SGD(head.model.parameters(), lr=1e30)
    model, optimizer = accelerator.prepare(head.model, optimizer)
    with pytest.raises(NonFiniteError, match=r"the cause is the weights or --optim\.lr, not the examples"):
        train(model, optimizer, windows, accelerator=accelerator)
