"""The doctor finds each planted fault of a loop by name, and no fault in a correct loop."""

import contextlib
import gc
import itertools
import os
import re
import subprocess
import sys
import tempfile
import types

import pytest
import torch
import transformers
from accelerate import Accelerator
from conftest import ROOT
from recipe_runs import load_recipe, write_rows
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader

from gradacc_hf import DoctorCallback, ExactTrainer, WindowLoader, diagnose
from gradacc_hf.cli import main as cli
from gradacc_hf.doctor.script import every_loop
from gradacc_hf.training.loop import train
from gradacc_hf.verification.tiny_models import build_head

N = 4  # micro-batches of a window


def regression(rows=64, batch_norm=False):
    """A model of one hidden layer, SGD, and a loader of micro-batches of 4 rows."""
    torch.manual_seed(0)
    x = torch.randn(rows, 6)
    y = x @ torch.randn(6, 1) + torch.randn(rows, 1)
    norm = torch.nn.BatchNorm1d(8) if batch_norm else torch.nn.LayerNorm(8)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), norm, torch.nn.Dropout(0.1), torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return model, optimizer, DataLoader(list(zip(x, y, strict=True)), 4)


def accumulated(model, optimizer, batches, share=lambda loss: loss / N):
    """The classic loop, as it should be."""
    for step, (x, y) in enumerate(batches, start=1):
        share(mse_loss(model(x), y)).backward()
        if step % N == 0:
            optimizer.step()
            optimizer.zero_grad()


def plain(fault=None, rows=64, passes=1, batch_norm=False, max_norm=1e-3, read="mean", **settings):
    """The classic loop, with one fault; what the doctor found."""
    model, optimizer, loader = regression(rows, batch_norm)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, passes * len(loader) // (1 if fault == "long schedule" else N)
    )

    def clip():
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    losses, running = [], torch.zeros(())
    with diagnose(model, optimizer, say=lambda said: None, **settings) as diagnosis:
        for _ in range(passes):
            for step, (x, y) in enumerate(loader, start=1):
                if fault == "zeroed early":
                    optimizer.zero_grad()
                loss = mse_loss(model(x), y)
                if fault != "not divided":
                    loss = loss / N
                if fault == "divided twice":
                    loss = loss / N
                loss.backward()
                running += N * loss.detach()
                if read == "mean":
                    losses.append(loss.item())
                if fault == "clipped early":
                    clip()
                if fault == "scheduled early":
                    scheduler.step()
                last = step == len(loader) and fault != "leaked"
                if step % N == 0 or fault == "stepped early" or (last and fault not in ("dropped", "leaked")):
                    if fault != "clipped late":
                        clip()
                    optimizer.step()
                    if fault == "clipped late":
                        clip()
                    if fault != "never zeroed":
                        optimizer.zero_grad()
                    if fault != "scheduled early":
                        scheduler.step()
                    if read == "last":
                        print(f"{loss.item():.4f}")
                    if read == "inflated":
                        print(f"{running.item():.4f}")
                    running = torch.zeros(())
            if fault == "dropped":
                optimizer.zero_grad()
    return diagnosis


def names(diagnosis):
    return {finding.name for finding in diagnosis.findings}


def test_a_healthy_loop_gets_a_clean_bill_with_figures():
    diagnosis = plain(passes=2)
    assert diagnosis.findings == []
    assert diagnosis.healthy
    said = str(diagnosis)
    assert "✓ each gradient equals the gradient of the window in one batch, to" in said
    assert "✗" not in said


def test_a_replay_holds_no_activations_of_more_than_a_micro_batch_and_costs_less_than_two_steps():
    model, optimizer, loader = regression()
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append((len(inputs[0]), torch.is_grad_enabled())))
    with diagnose(model, optimizer, say=lambda said: None) as diagnosis:
        accumulated(model, optimizer, loader)
    assert diagnosis.findings == []
    assert {rows for rows, keeps in seen if keeps} == {4}
    assert seen.count((4 * N, False)) == 3  # each of the first windows, at once
    assert len(seen) == len(loader) + 3 * (1 + N)


FAULTS = {
    "zeroed early": "zeroed_inside_the_window",
    "stepped early": "stepped_on_every_micro_batch",
    "not divided": "not_divided",
    "divided twice": "divided_twice",
    "clipped early": "clipped_too_early",
    "clipped late": "clipped_too_late",
    "scheduled early": "scheduler_per_micro_batch",
    "never zeroed": "never_zeroed",
    "long schedule": "schedule_sized_in_micro_batches",
}


@pytest.mark.parametrize(("fault", "name"), FAULTS.items(), ids=FAULTS)
def test_each_fault_of_a_loop_is_found_by_its_name(fault, name):
    diagnosis = plain(fault)
    assert names(diagnosis) == {name}, str(diagnosis)
    [finding] = diagnosis.findings
    assert finding.place.file == __file__
    assert str(finding.place).endswith(f":{finding.place.line}")


def test_stepping_on_every_micro_batch_is_an_error_where_more_were_asked_for():
    asked = plain("stepped early", accumulation_steps=N)
    assert {finding.name: finding.kind for finding in asked.findings} == {
        "stepped_on_every_micro_batch": "error"
    }
    assert not asked.healthy
    assert plain("stepped early").healthy  # a divided loss may be a weighed one


@pytest.mark.parametrize(
    ("fault", "name"), [("dropped", "partial_window_dropped"), ("leaked", "partial_window_leaked")]
)
def test_what_becomes_of_the_last_window_is_found(fault, name):
    assert names(plain(fault, rows=72, passes=2)) == {name}  # 18 micro-batches


def test_a_partial_window_that_is_scaled_as_a_full_one_is_found():
    assert names(plain(rows=72, passes=2)) == {"partial_window_mis_scaled"}


def test_a_short_last_micro_batch_of_a_partial_window_is_found():
    """As Accelerate's loop has it: 4, 4, 2 examples, each divided by 4."""
    assert names(plain(rows=74, passes=2)) == {"partial_window_mis_scaled"}


def test_a_short_last_micro_batch_of_a_full_window_is_found():
    """16 micro-batches, the last of 2 examples: each counts as much as one of 4."""
    assert names(plain(rows=62, passes=2)) == {"mean_of_means"}


def test_a_schedule_that_does_not_step_with_the_windows_is_none_of_theirs():
    model, optimizer, loader = regression()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(loader))  # in passes
    with diagnose(model, optimizer, say=lambda said: None) as diagnosis:
        accumulated(model, optimizer, loader)
        scheduler.step()
    assert diagnosis.findings == [], str(diagnosis)


def test_a_loop_that_breaks_off_has_dropped_nothing():
    model, optimizer, loader = regression()

    def broken():
        yield from itertools.islice(loader, N + 2)
        raise KeyError

    with pytest.raises(KeyError), diagnose(model, optimizer, say=lambda said: None, windows=9) as diagnosis:
        accumulated(model, optimizer, broken())
    assert diagnosis.findings == [], str(diagnosis)


def test_diagnoses_overlap_in_any_order_and_no_class_is_patched(monkeypatch):
    """Two loops take turns; the diagnosis that began first ends first."""
    for name in ("get_objects", "get_referrers", "get_referents"):
        monkeypatch.setattr(gc, name, None)  # a call would fail
    before = {kind: dict(vars(kind)) for kind in (DataLoader, torch.optim.Optimizer, torch.nn.Module)}
    loops = [regression() for _ in range(2)]
    opened, diagnoses = [contextlib.ExitStack() for _ in loops], []
    for (model, optimizer, _), stack in zip(loops, opened, strict=True):
        diagnoses.append(stack.enter_context(diagnose(model, optimizer, say=lambda said: None)))
        assert all(dict(vars(kind)) == attributes for kind, attributes in before.items())
    (first, first_optimizer, first_data), (second, second_optimizer, second_data) = loops
    for step, ((x, y), (u, v)) in enumerate(zip(first_data, second_data, strict=True), start=1):
        (mse_loss(first(x), y) / N).backward()
        mse_loss(second(u), v).backward()  # a fault
        if step % N == 0:
            for optimizer in (first_optimizer, second_optimizer):
                optimizer.step()
                optimizer.zero_grad()
        if step == 2 * N:
            opened[0].close()
    opened[1].close()
    assert [names(diagnosis) for diagnosis in diagnoses] == [set(), {"not_divided"}]
    assert [len(diagnosis.record.windows) for diagnosis in diagnoses] == [2, 3]
    assert [first[2].p, second[2].p] == [0.1, 0.1]
    assert all(dict(vars(kind)) == attributes for kind, attributes in before.items())


def test_a_script_s_loops_are_found_without_a_patch():
    before = {kind: dict(vars(kind)) for kind in (DataLoader, torch.optim.Optimizer, torch.nn.Module)}
    with every_loop(say=lambda said: None) as diagnoses:
        model, optimizer, loader = regression()
        assert all(dict(vars(kind)) == attributes for kind, attributes in before.items())
        accumulated(model, optimizer, loader, share=lambda loss: loss)
        accumulated(*regression())
    assert [names(diagnosis) for diagnosis in diagnoses] == [{"not_divided"}, set()]


def test_a_pass_of_a_loader_with_persistent_workers_is_counted():
    model, optimizer, loader = regression(rows=72)  # 18 micro-batches
    loader = DataLoader(loader.dataset, 4, num_workers=1, persistent_workers=True)
    with diagnose(model, optimizer, say=lambda said: None) as diagnosis:
        accumulated(model, optimizer, itertools.chain(*(loader for _ in range(2))))
    assert names(diagnosis) == {"partial_window_leaked"}, str(diagnosis)


class Holder:
    """A trainer that keeps its scheduler in a wrapper, in a list."""

    def __init__(self, optimizer, steps):
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        self.schedulers = [types.SimpleNamespace(scheduler=scheduler)]

    def fit(self, model, optimizer, loader):
        for step, (x, y) in enumerate(loader, start=1):
            (mse_loss(model(x), y) / N).backward()
            if step % N == 0:
                optimizer.step()
                optimizer.zero_grad()
                self.schedulers[0].scheduler.step()


@pytest.mark.parametrize("is_given", [True, False])
def test_a_scheduler_is_taken_from_the_loop_or_as_given(is_given):
    model, optimizer, loader = regression()
    holder = [Holder(optimizer, len(loader))]
    given = {"scheduler": holder[0].schedulers[0].scheduler} if is_given else {}
    with diagnose(model, optimizer, say=lambda said: None, **given) as diagnosis:
        holder.pop().fit(model, optimizer, loader)
    assert names(diagnosis) == {"schedule_sized_in_micro_batches"}, str(diagnosis)


def test_a_number_of_times_is_written_out():
    [finding] = plain("zeroed early", rows=16, windows=1).findings
    assert "3 times" in finding.evidence
    model, optimizer, loader = regression(rows=8)
    with diagnose(model, optimizer, say=lambda said: None) as diagnosis:
        for x, y in loader:
            optimizer.zero_grad()
            (mse_loss(model(x), y) / 2).backward()
        optimizer.step()
    assert "of a window (once, first from norm" in diagnosis.findings[0].evidence


@pytest.mark.parametrize("outside", [True, False])
def test_a_regulariser_is_no_finding(outside):
    model, optimizer, loader = regression()

    def regularised(loss):
        beside = 1e-2 * sum(p.square().sum() for p in model.parameters())
        return loss / N + beside / N if outside else (loss + beside) / N

    with diagnose(model, optimizer, say=lambda said: None) as diagnosis:
        accumulated(model, optimizer, loader, regularised)
    assert diagnosis.findings == [], str(diagnosis)
    assert "the backward starts from more than one loss" in str(diagnosis)
    assert "the weights of the losses were judged" in str(diagnosis)


def test_batch_norm_is_found():
    assert names(plain(batch_norm=True)) == {"examples_coupled"}


@pytest.mark.parametrize(
    ("read", "name"),
    [("last", "logged_loss_of_the_last_micro_batch"), ("inflated", "logged_loss_inflated")],
)
def test_a_logged_loss_that_is_not_the_window_s_is_found(read, name):
    [finding] = plain(read=read).findings
    assert finding.name == name
    assert finding.place.code.startswith("print")


LENGTHS = [5, 9, 30, 12, 7, 7, 21, 30, 14, 3, 8, 22, 17, 4, 11, 9]


def head(kind, model_type, lengths=LENGTHS):
    made = build_head(kind, model_type)
    examples = made.examples(lengths)
    if kind == "causal_lm":
        examples = [{**example, "labels": example["input_ids"]} for example in examples]
    return made, examples


def accelerated(kind, model_type, lengths=LENGTHS, passes=3, clip=1.0):
    """The loop of Accelerate's guide."""
    made, examples = head(kind, model_type, lengths)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = DataLoader(examples, 4, collate_fn=made.collate)
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=1e-3)
    scheduler = transformers.get_scheduler("linear", optimizer, 1, passes * 2)
    model, optimizer, loader, scheduler = accelerator.prepare(made.model, optimizer, loader, scheduler)
    with diagnose(model, optimizer, say=lambda said: None) as diagnosis:
        for _ in range(passes):
            for batch in loader:
                with accelerator.accumulate(model):
                    loss = model(**batch).loss
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), clip)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
    return diagnosis


def test_accelerate_s_loop_on_equal_sizes_is_healthy():
    diagnosis = accelerated("sequence_classification", "bert")
    assert diagnosis.healthy, str(diagnosis)
    assert diagnosis.findings == []


def test_a_mean_of_means_is_found_with_the_items_of_each_micro_batch():
    diagnosis = accelerated("token_classification", "bert")
    assert names(diagnosis) == {"mean_of_means"}, str(diagnosis)
    assert "labels that are not −100" in diagnosis.findings[0].evidence


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [("sequence_classification", "bert"), ("token_classification", "roberta"), ("causal_lm", "gpt2")],
)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_our_loop_is_healthy(kind, model_type, precision):
    made, examples = head(kind, model_type)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    windows = WindowLoader(
        examples, 7, accelerator=accelerator, collate_fn=made.collate, num_items=made.num_items, max_tokens=60
    )
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(made.model, optimizer)
    with diagnose(model, optimizer, say=lambda said: None) as diagnosis:
        train(model, optimizer, windows, accelerator=accelerator, epochs=2, max_grad_norm=0.5)
    assert diagnosis.healthy, str(diagnosis)
    assert "✓ each gradient equals the gradient of the window in one batch" in str(diagnosis)


@pytest.mark.parametrize("divided_by", [N, 1])
def test_a_last_backward_inside_the_closure_of_a_step_is_its_window_s(divided_by):
    """The order of Lightning's Trainer."""
    model, optimizer, loader = regression()
    with diagnose(model, optimizer, say=lambda said: None) as diagnosis:
        for step, (x, y) in enumerate(loader, start=1):

            def closure(x=x, y=y, first=step % N == 1):
                loss = mse_loss(model(x), y) / divided_by
                if first:
                    optimizer.zero_grad()
                loss.backward()
                return loss

            if step % N:
                closure()
            else:
                optimizer.step(closure)
    assert names(diagnosis) == (set() if divided_by == N else {"not_divided"}), str(diagnosis)
    assert {len(window.micro_batches) for window in diagnosis.record.windows} == {N}


def by_tokens(weigh, reduction="mean"):
    """A loop that lays the tokens of padded micro-batches end to end, whose losses it weighs itself."""
    made, examples = head("token_classification", "bert")
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.1)
    loader = DataLoader(examples, 2, collate_fn=made.collate)
    windows = list(zip(*[iter(loader)] * N, strict=True))
    with diagnose(made.model, optimizer, say=lambda said: None) as diagnosis:
        for window in windows:
            items = [int((batch["labels"] != -100).sum()) for batch in window]
            for batch, n in zip(window, items, strict=True):
                inputs = {key: value for key, value in batch.items() if key != "labels"}
                logits = made.model(**inputs).logits
                loss = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction=reduction)
                (loss * weigh(n, sum(items))).backward()
            optimizer.step()
            optimizer.zero_grad()
    return diagnosis


@pytest.mark.parametrize(
    ("weigh", "reduction", "found"),
    [
        (lambda n, total: n / total, "mean", set()),
        (lambda n, total: 1 / total, "sum", set()),  # as it is often written, and right
        (lambda n, total: 1 / N, "mean", {"mean_of_means"}),
        (lambda n, total: 1 / N, "sum", {"loss_is_a_sum"}),
    ],
)
def test_a_loss_of_tokens_laid_end_to_end_is_compared(weigh, reduction, found):
    diagnosis = by_tokens(weigh, reduction)
    assert names(diagnosis) == found, str(diagnosis)
    assert ("items: targets" in str(diagnosis)) == (not found)


def class_weighted(weigh):
    """A classifier with a weight for each class, in windows of 4 micro-batches of 4."""
    torch.manual_seed(0)
    model, weight = torch.nn.Linear(6, 3), torch.tensor([1.0, 4.0, 0.25])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of, random = torch.nn.CrossEntropyLoss(weight=weight), torch.Generator().manual_seed(1)
    with diagnose(model, optimizer, say=lambda said: None) as diagnosis:
        for _ in range(3):
            x, y = torch.randn(16, 6, generator=random), torch.randint(3, (16,), generator=random)
            for some in range(0, 16, 4):
                loss = loss_of(model(x[some : some + 4]), y[some : some + 4])
                share = weight[y[some : some + 4]].sum() / weight[y].sum() if weigh else 1 / 4
                (loss * share).backward()
            optimizer.step()
            optimizer.zero_grad()
    return diagnosis


def test_a_loss_with_weights_of_classes_is_compared_as_it_is():
    right = class_weighted(weigh=True)
    assert right.findings == [], str(right)
    assert "items: weights of the targets' classes" in str(right)
    assert names(class_weighted(weigh=False)) == {"mean_of_means"}


@pytest.mark.parametrize("seed", range(4))
def test_losses_that_are_all_alike_do_not_mislead_about_what_is_counted(seed):
    """A head of zeros gives ln C for each token, whatever counts."""
    torch.manual_seed(seed)
    made, examples = head("token_classification", "bert")
    torch.nn.init.zeros_(made.model.classifier.weight)
    torch.nn.init.zeros_(made.model.classifier.bias)
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.1)
    batches = list(DataLoader(examples, 2, collate_fn=made.collate))
    items = [int((batch["labels"] != -100).sum()) for batch in batches]
    with diagnose(made.model, optimizer, say=lambda said: None) as diagnosis:
        for batch, n in zip(batches, items, strict=True):
            (made.model(**batch).loss * (n / sum(items))).backward()
        optimizer.step()
    assert diagnosis.findings == [], str(diagnosis)
    assert "each gradient equals the gradient of the window in one batch" in str(diagnosis)


def test_a_window_that_would_be_padding_at_once_is_not_replayed():
    made, examples = head("sequence_classification", "bert", [3] * 30 + [500])
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.1)
    pieces = [examples[i : i + 10] for i in range(0, 30, 10)] + [examples[30:]]
    with diagnose(made.model, optimizer, say=lambda said: None) as diagnosis:
        for piece in pieces:
            (made.model(**made.collate(piece)).loss * len(piece) / 31).backward()
        optimizer.step()
    assert "the window in one batch would be 26 × the work, mostly padding" in str(diagnosis)


def test_in_batch_negatives_that_are_cut_are_found():
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(32, 8)

    def info_nce(outputs, inputs):
        scores = torch.nn.functional.normalize(outputs) @ torch.nn.functional.normalize(inputs["input"]).T
        return cross_entropy(10 * scores, torch.arange(len(scores)))

    with diagnose(model, optimizer, loss_fn=info_nce, say=lambda said: None) as diagnosis:
        for step, batch in enumerate(x.split(4), start=1):
            (info_nce(model(batch), {"input": batch}) / 2).backward()
            if step % 2 == 0:
                optimizer.step()
                optimizer.zero_grad()
    assert names(diagnosis) == {"in_batch_negatives_cut"}, str(diagnosis)


def test_gradients_that_add_up_in_bf16_are_found():
    model, _, loader = regression(256)
    model.bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with diagnose(model, optimizer, windows=1, say=lambda said: None) as diagnosis:
        for x, y in loader:
            (mse_loss(model(x.bfloat16()), y.bfloat16()) / len(loader)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert names(diagnosis) == {"swamped_in_16_bits"}, str(diagnosis)


def fp16(unscaled_early):
    model, optimizer, loader = regression()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with diagnose(model, optimizer, say=lambda said: None) as diagnosis:
        for step, (x, y) in enumerate(loader, start=1):
            scaler.scale(mse_loss(model(x), y) / N).backward()
            if unscaled_early or step % N == 0:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if unscaled_early and step % N:
                scaler._per_optimizer_states.clear()  # else torch itself refuses to unscale twice
            if step % N == 0:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    return diagnosis


def test_gradients_that_are_unscaled_early_are_found_and_a_scaler_used_well_is_healthy():
    assert names(fp16(unscaled_early=True)) == {"unscaled_too_early"}
    assert fp16(unscaled_early=False).findings == []


def test_what_is_no_model_or_optimizer_is_refused():
    model, optimizer, _ = regression()
    for given in ((None, optimizer), (model, None), (model, torch.optim.lr_scheduler.LambdaLR)):
        with pytest.raises(ValueError, match=r"diagnose\(model, optimizer\): found"), diagnose(*given):
            pass


def test_a_default_learning_rate_for_a_large_window_is_advice():
    made, examples = head("sequence_classification", "bert", LENGTHS * 8)
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=5e-5)
    with diagnose(made.model, optimizer, windows=1, say=lambda said: None) as diagnosis:
        for batch in DataLoader(examples, 32, collate_fn=made.collate):
            (made.model(**batch).loss / 4).backward()
        optimizer.step()
    assert names(diagnosis) == {"learning_rate_unchanged"}, str(diagnosis)
    assert diagnosis.healthy


def by_trainer(kind, exact=False, model_type="bert", lengths=[12] * 32, **settings):
    made, examples = head(kind, model_type, lengths)
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        num_train_epochs=2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **settings,
    )
    trainer_class = ExactTrainer if exact else transformers.Trainer
    trainer = trainer_class(made.model, arguments, made.collate, train_dataset=examples)
    trainer.remove_callback(transformers.PrinterCallback)
    reports = []
    trainer.add_callback(doctor := DoctorCallback(say=reports.append))
    trainer.train()
    assert [report.splitlines()[1:] for report in reports] == [str(doctor.diagnosis).splitlines()[1:]]
    return doctor.diagnosis


def test_today_s_trainer_does_not_divide_a_bert_classifier_s_loss_and_logs_it_inflated():
    diagnosis = by_trainer("sequence_classification")
    assert names(diagnosis) == {"not_divided", "logged_loss_inflated"}, str(diagnosis)
    not_divided = next(f for f in diagnosis.findings if f.name == "not_divided")
    assert "4 × as long" in not_divided.evidence
    assert "ExactTrainer(model, args, …)" in not_divided.fix


def test_batch_rebalance_is_named_where_a_head_ignores_the_item_count():
    settings = {"train_sampling_strategy": "batch_rebalance"}
    diagnosis = by_trainer("sequence_classification", lengths=[9, 5, 30, 12, 7, 4, 22, 3] * 6, **settings)
    found = next(finding for finding in diagnosis.findings if finding.name == "mean_of_means")
    assert 'train_sampling_strategy="batch_rebalance" makes micro-batches of unequal size' in found.evidence
    exact = by_trainer("sequence_classification", exact=True, lengths=[9, 5, 30, 12] * 6, **settings)
    assert "mean_of_means" not in names(exact)


def test_today_s_trainer_takes_a_mean_of_means_of_tokens():
    diagnosis = by_trainer("token_classification", lengths=LENGTHS * 2)
    assert {"not_divided", "mean_of_means"} <= names(diagnosis), str(diagnosis)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_model_that_trainer_hands_the_items_of_the_window_is_healthy(model_type):
    diagnosis = by_trainer("causal_lm", model_type=model_type, lengths=LENGTHS * 2)
    assert diagnosis.findings == [], str(diagnosis)
    assert "each gradient equals the gradient of the window in one batch" in str(diagnosis)


def test_where_trainer_divides_nothing_is_found_and_exact_trainer_is_healthy():
    assert by_trainer("question_answering").findings == []
    for kind in ("sequence_classification", "token_classification"):
        diagnosis = by_trainer(kind, exact=True)
        assert diagnosis.findings == [], str(diagnosis)


SCRIPT = """
import sys
import torch
from contextlib import nullcontext
from torch.nn.parallel import DistributedDataParallel

torch.manual_seed(0)
steps, no_sync = int(sys.argv[1]), "--no-sync" in sys.argv
model = torch.nn.Linear(4, 1)
if "--ddp" in sys.argv:
    torch.distributed.init_process_group("gloo")
    model = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(1, 13):
    x, y = torch.randn(8, 4), torch.randn(8, 1)
    with model.no_sync() if no_sync and step % steps else nullcontext():
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
    if step % steps == 0:
        optimizer.step()
        optimizer.zero_grad()
print("done", __name__)
"""


def run_doctor(tmp_path, *arguments, launcher=(), text=SCRIPT):
    script = tmp_path / "train.py"
    script.write_text(text)
    words = [str(script) if word == "SCRIPT" else word for word in arguments]
    return subprocess.run(
        [sys.executable, *launcher, "-m", "gradacc_hf", "doctor", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def test_a_script_is_run_as_it_is_and_diagnosed(tmp_path):
    ran = run_doctor(tmp_path, "SCRIPT", "4")
    assert ran.returncode == 1, ran.stderr
    assert "✗ not_divided: the loss is not divided by the accumulation steps" in ran.stdout
    assert "at      train.py:18: loss.backward()" in ran.stdout
    assert "done __main__" in ran.stdout
    healthy = run_doctor(tmp_path, "--stop", "--windows", "1", "SCRIPT", "1")
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr
    assert "done" not in healthy.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.py"], "doctor: no file nowhere.py; give the Python file that trains"),
        (["--windows", "0", "SCRIPT"], "--windows: found 0; allowed: 1 or more"),
        (["--accumulation-steps", "0", "SCRIPT"], "--accumulation-steps: found 0; allowed: 1 or more"),
        ([], "gradacc doctor needs a Python file that trains"),
    ],
)
def test_a_bad_command_line_is_one_line(tmp_path, words, said, monkeypatch, capsys):
    (tmp_path / "SCRIPT").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gradacc", "doctor", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


BESIDE = """
import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

torch.manual_seed(0)
rows = [(torch.randn(4), torch.randn(1)) for _ in range(72)]
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
training, validation = DataLoader(rows[:64], 4), DataLoader(rows[64:], 4)


@torch.no_grad()
def evaluate():
    return sum(float(mse_loss(model(x), y)) for x, y in validation)


for epoch in range(2):
    batches = iter(training)
    evaluate()
    for step, (x, y) in enumerate(batches, start=1):
        (mse_loss(model(x), y) / 4).backward()
        if step % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
            evaluate()
"""


def test_data_to_evaluate_on_are_not_taken_for_those_to_train_on(tmp_path):
    ran = run_doctor(tmp_path, "SCRIPT", text=BESIDE)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "✗" not in ran.stdout


@pytest.mark.slow
def test_under_ddp_it_is_found_when_every_micro_batch_synchronises(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
    ran = run_doctor(tmp_path, "SCRIPT", "4", "--ddp", launcher=launcher)
    assert "✗ synchronised_every_micro_batch" in ran.stdout, ran.stderr
    assert "DDP reduced the gradients in 12 backwards of 3 windows" in ran.stdout
    ran = run_doctor(tmp_path, "SCRIPT", "4", "--ddp", "--no-sync", launcher=launcher)
    assert "observed 3 windows" in ran.stdout, ran.stderr
    assert set(re.findall(r"✗ (\w+)", ran.stdout)) == {"not_divided"}, "the weights need no second process"
    assert "there are several processes" in ran.stdout


@pytest.mark.parametrize("name", ["text_classification", "token_classification", "masked_lm", "contrastive"])
def test_our_recipes_are_healthy(name, start, tmp_path):
    text = "".join(f"def f{i}():\n    return {i}\n\n\n" for i in range(80))
    rows = {
        "text_classification": [{"text": f"some {i} words" * (1 + i % 5), "label": i % 2} for i in range(80)],
        "token_classification": [
            {"tokens": ["a", "word"] * (1 + i % 4), "tags": ["O", "X"] * (1 + i % 4)} for i in range(80)
        ],
        "masked_lm": [{"text": line} for line in text.splitlines() if line],
        "contrastive": [{"anchor": f"what is {i}", "positive": f"the number {i}"} for i in range(80)],
    }[name]
    recipe = next(c for c in vars(load_recipe(name)).values() if isinstance(c, type) and c.__module__ == name)
    with every_loop(say=lambda said: None) as diagnoses:
        data = write_rows(tmp_path / "rows.jsonl", rows)
        outcome = start(recipe, "--data.train", data, "--train.max_windows", 4, "--budget.max_tokens", 60)
        assert outcome.code == 0, outcome.err
    [diagnosis] = [d for d in diagnoses if d.record.windows]
    assert diagnosis.findings == [], str(diagnosis)
    compared = "equals the gradient of the window in one batch" in str(diagnosis)
    # Not masked_lm, whose loss is of chosen positions, and not contrastive, whose is of the whole window.
    assert compared == (name in ("text_classification", "token_classification"))


def test_a_loss_of_the_loop_s_own_is_not_taken_for_the_model_s():
    """As in the question answering recipe: the model computes a loss too, and padding reaches it."""
    made, examples = head("question_answering", "bert")
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.1)
    with diagnose(made.model, optimizer, say=lambda said: None) as diagnosis:
        for batch in DataLoader(examples, 4, collate_fn=made.collate):
            outputs = made.model(**batch)
            starts = cross_entropy(outputs.start_logits.clamp(-9, 9), batch["start_positions"])
            ends = cross_entropy(outputs.end_logits.clamp(-9, 9), batch["end_positions"])
            ((starts + ends) / 8).backward()
        optimizer.step()
    assert diagnosis.findings == [], str(diagnosis)
    assert "diagnose(model, optimizer, loss_fn=…)" in str(diagnosis)


def test_a_loss_beside_the_model_s_is_not_overlooked():
    made, examples = head("sequence_classification", "bert")
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.1)
    with diagnose(made.model, optimizer, say=lambda said: None) as diagnosis:
        for number, batch in enumerate(DataLoader(examples, 4, collate_fn=made.collate)):
            outputs = made.model(**batch)
            ((outputs.loss + number * outputs.logits.square().mean()) / 4).backward()
        optimizer.step()
    assert diagnosis.findings == [], str(diagnosis)
    assert "the backward starts from more than one loss" in str(diagnosis)
    assert "the weights of the losses were judged" in str(diagnosis)
