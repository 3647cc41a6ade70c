"""A loop that leaves out a call of a window gets an error with the line to add."""

import re

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from gradacc_hf import WindowLoader, evaluate, fine_tune, iter_windows, train
from gradacc_hf.accumulation.accelerate_state import check_unprepared, reset_accelerate
from gradacc_hf.accumulation.gradient_cache import ContrastiveLoss
from gradacc_hf.accumulation.loss_items import as_window_loss, model_loss
from gradacc_hf.accumulation.reference import EXACT, RecordGradients, relative_error, whole_window_gradient
from gradacc_hf.errors import InputError, LoopError
from gradacc_hf.verification.tiny_models import build_head

LENGTHS = np.random.default_rng(3).integers(3, 40, size=10).tolist()
ACCUMULATE = "write `with accelerator.accumulate(model):`"
WEIGH = "write `accelerator.backward(window.weigh(loss))`"


def set_up():
    """A head, its examples, a loader of one window in 4 micro-batches, and the prepared objects."""
    head, accelerator = build_head("sequence_classification", "bert"), Accelerator(cpu=True)
    examples = head.examples(LENGTHS)
    windows = WindowLoader(examples, 10, accelerator=accelerator, collate_fn=head.collate, micro_batch_size=3)
    model, optimizer = accelerator.prepare(head.model, RecordGradients(head.model))
    return head, examples, windows, model, optimizer


def one_window(accumulates, weighs):
    """The loop over a window that accumulates and weighs at these positions; window, gradients, whole."""
    head, examples, windows, model, optimizer = set_up()
    accelerator = windows.accelerator
    [window] = windows
    assert len(window) == 4
    for position, batch in enumerate(window):
        loss = model(**batch).loss
        loss = window.weigh(loss) if position in weighs else loss
        if position in accumulates:
            with accelerator.accumulate(model):
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        else:
            accelerator.backward(loss)
    whole = head.collate([examples[i] for i in window.indices])
    return window, optimizer.optimizer.gradients, whole_window_gradient(head.model, whole)


def test_with_both_calls_the_gradient_is_exact():
    window, [gradient], whole = one_window(range(4), range(4))
    assert window.done
    assert relative_error(gradient, whole) < EXACT


@pytest.mark.parametrize(
    ("accumulates", "weighs", "problem", "line"),
    [
        ([], range(4), "micro-batch 1 of 4 did not go through accelerator.accumulate", ACCUMULATE),
        ([0, 1], range(4), "micro-batch 3 of 4 did not go through accelerator.accumulate", ACCUMULATE),
        ([], [], "micro-batch 1 of 4 did not go through accelerator.accumulate", ACCUMULATE),
        (range(4), [], "the loss of micro-batch 1 of 4 was not weighed", WEIGH),
        (range(4), [0, 2, 3], "the loss of micro-batch 2 of 4 was not weighed", WEIGH),
    ],
)
def test_a_call_that_is_left_out_is_an_error_with_the_line_to_add(accumulates, weighs, problem, line):
    with pytest.raises(LoopError, match=f"^{re.escape(f'{problem}: {line}')}"):
        one_window(accumulates, weighs)


def test_a_pass_that_was_left_may_end_in_the_middle_of_the_next():
    """A loop that keeps the iterator of a window lets Python collect it at any later time."""
    head, examples, windows, model, optimizer = set_up()
    accelerator = windows.accelerator
    before = dict(accelerator.gradient_state.plugin_kwargs), accelerator.step
    [window] = windows
    left = iter(window)
    next(left)
    with accelerator.accumulate(model):
        pass
    for position, batch in enumerate(window):
        with accelerator.accumulate(model):
            accelerator.backward(window.weigh(model(**batch).loss))
            optimizer.step()
            optimizer.zero_grad()
        if position == 1:
            left.close()
    whole = head.collate([examples[i] for i in window.indices])
    [gradient] = optimizer.optimizer.gradients
    assert relative_error(gradient, whole_window_gradient(head.model, whole)) < EXACT
    assert (accelerator.gradient_state.plugin_kwargs, accelerator.step) == before


def test_accumulate_twice_in_a_micro_batch_is_an_error():
    _, _, windows, model, _ = set_up()
    accelerator = windows.accelerator
    [window] = windows

    def loop():
        for batch in window:
            for _ in range(2):
                with accelerator.accumulate(model):
                    accelerator.backward(window.weigh(model(**batch).loss))

    with pytest.raises(LoopError, match="entered 2 times for micro-batch 1 of 4"):
        loop()


def copied_loop(model, optimizer, windows, other=None):
    """The loop of the README; `other` is an optimizer that steps for each micro-batch."""
    accelerator = windows.accelerator
    for window in windows:
        for batch in window:
            with accelerator.accumulate(model):
                accelerator.backward(window.weigh(model(**batch).loss))
                if other is not None:
                    other.step()
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("prepares_model", [True, False])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_an_unprepared_optimizer_is_an_error_at_the_end_of_the_first_window(prepares_model, options):
    head, _, windows, model, _ = set_up()
    if not prepares_model:
        windows.accelerator.free_memory()
        model = head.model
    optimizer = torch.optim.AdamW(head.model.parameters(), **options)
    with pytest.raises(LoopError, match=r"AdamW took 3 steps before the last micro-batch .*: write `mod"):
        copied_loop(model, optimizer, windows)


def test_optimizers_that_take_no_early_step_of_the_model_are_no_error():
    """An optimizer of other weights may step at any time, and an unprepared one at the window's end."""
    head, _, windows, model, optimizer = set_up()
    other = torch.optim.SGD([torch.zeros(2, requires_grad=True)])
    copied_loop(model, optimizer, windows, other)
    for prepared in (model, optimizer):
        windows.accelerator.free_memory()
        windows.accelerator.prepare(prepared)  # one alone tells which weights are trained
        copied_loop(model, optimizer, windows, other)
    unprepared = torch.optim.SGD(head.model.parameters(), lr=0.1)
    before = [weight.detach().clone() for weight in head.model.parameters()]
    accelerator = windows.accelerator
    for window in windows:
        for batch in window:
            with accelerator.accumulate(model):
                accelerator.backward(window.weigh(model(**batch).loss))
                if accelerator.sync_gradients:
                    unprepared.step()
                    unprepared.zero_grad()
    assert any((old != new).any() for old, new in zip(before, head.model.parameters(), strict=True))


def test_a_second_optimizer_may_step_at_any_time_where_the_first_waits():
    """A critic with an optimizer of its own, and a loop that prepares nothing and steps by itself."""
    _, _, windows, model, optimizer = set_up()
    critic = windows.accelerator.prepare(torch.nn.Linear(2, 1))
    copied_loop(model, optimizer, windows, torch.optim.SGD(critic.parameters(), lr=0.0))
    head, _, windows, _, _ = set_up()
    accelerator = windows.accelerator
    accelerator.free_memory()
    main, other = (torch.optim.SGD(m.parameters(), lr=0.0) for m in (head.model, torch.nn.Linear(2, 1)))
    for window in windows:
        for batch in window:
            with accelerator.accumulate(head.model):
                accelerator.backward(window.weigh(head.model(**batch).loss))
                other.step()
                if accelerator.sync_gradients:
                    main.step()
                    main.zero_grad()


def test_an_optimizer_steps_after_a_pass_was_left_and_accelerates_state_was_reset():
    _, _, windows, _, _ = set_up()
    [window] = windows
    left = iter(window)
    next(left)
    reset_accelerate()
    weight = torch.zeros(2, requires_grad=True)
    weight.sum().backward()
    torch.optim.SGD([weight], lr=1.0).step()
    assert weight.tolist() == [-1.0, -1.0]
    left.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, inside torch.compile
def test_a_compiled_optimizer_is_compiled_once_for_all_windows():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    head, accelerator = build_head("sequence_classification", "bert"), Accelerator(cpu=True)
    windows = WindowLoader(
        head.examples(LENGTHS), 2, accelerator=accelerator, collate_fn=head.collate, micro_batch_size=1
    )
    counter, bare = CompileCounter(), torch.optim.SGD(head.model.parameters(), lr=0.0)
    bare.step = torch.compile(bare.step, backend=counter)
    model, optimizer = accelerator.prepare(head.model, bare)
    copied_loop(model, optimizer, windows)
    compiled = counter.frame_count
    copied_loop(model, optimizer, windows)  # ten windows in all
    assert counter.frame_count == compiled > 0


def test_batches_are_read_without_a_trace_and_a_window_can_be_trained_after_an_error():
    head, examples, windows, model, optimizer = set_up()
    accelerator = windows.accelerator
    [window] = windows
    before = dict(accelerator.gradient_state.plugin_kwargs), accelerator.step
    assert len(list(window.batches())) == len(window)
    assert (dict(accelerator.gradient_state.plugin_kwargs), accelerator.step) == before
    assert not window.done

    def loop(weigh):
        for batch in window:
            with accelerator.accumulate(model):
                accelerator.backward(weigh(model(**batch).loss))
                optimizer.step()
                optimizer.zero_grad()

    with pytest.raises(LoopError):
        loop(lambda loss: loss)
    loop(window.weigh)
    whole = whole_window_gradient(head.model, head.collate([examples[i] for i in window.indices]))
    assert relative_error(optimizer.optimizer.gradients[-1], whole) < EXACT


class Noisy(torch.nn.Module):
    """A line with dropout; `masks` has the dropout of each training forward, `looked` of all others."""

    def __init__(self):
        super().__init__()
        self.line, self.dropout = torch.nn.Linear(64, 1), torch.nn.Dropout(0.5)
        self.masks, self.looked = [], []

    def forward(self, x, labels):
        kept = self.dropout(torch.ones_like(x))
        (self.masks if torch.is_grad_enabled() else self.looked).append(kept.tolist())
        return {"loss": ((self.line(x * kept) - labels) ** 2).mean()}


@torch.no_grad()
def read(window, model):
    for batch in window.batches():
        model(**batch)
        np.random.random()


def train_noisy(when=None, look=read):
    """Train two windows with dropout, reading each of them at a moment; return the model and the losses."""
    torch.manual_seed(0)
    accelerator, model = Accelerator(cpu=True), Noisy()
    generator = torch.Generator().manual_seed(1)
    data = [
        {"x": torch.randn(64, generator=generator), "labels": torch.randn(1, generator=generator)}
        for _ in range(16)
    ]
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    losses = []
    windows = WindowLoader(data, 8, accelerator=accelerator, micro_batch_size=2)
    for window in windows:
        if when == "before":
            look(window, model)
        if when == "idle at the end":
            window.split = window.split.with_idle_end(windows.idle_micro_batch(window.split))
        for position, batch in enumerate(window):
            with accelerator.accumulate(model):
                if when == "inside" and position == 1:
                    look(window, model)
                accelerator.backward(window.weigh(model(**batch)["loss"]))
                optimizer.step()
                optimizer.zero_grad()
        if when == "after":
            look(window, model)
        losses.append(window.loss)
    return model, losses


@pytest.mark.parametrize("when", ["before", "inside", "after"])
def test_a_window_that_is_read_meets_the_dropout_of_one_that_is_not(when):
    (unread, losses), (model, again) = train_noisy(), train_noisy(when)
    assert len({str(mask) for mask in unread.masks}) == 8
    assert model.masks == unread.masks
    assert again == losses
    assert len(model.looked) == 8


def test_an_idle_micro_batch_changes_no_later_dropout():
    """Which windows end with one differs after a resume."""
    (plain, losses), (model, again) = train_noisy(), train_noisy("idle at the end")
    assert (len(plain.masks), len(model.masks)) == (8, 10)
    assert again == losses


@pytest.mark.parametrize("when", ["before", "inside", "after"])
def test_a_reading_that_is_left_early_changes_no_dropout_either(when):
    open_iterators = []

    def look(window, model):
        for batch in window.batches():
            with torch.no_grad():
                model(**batch)
            break
        open_iterators[:] = [window.batches()]  # closes the one of the window before
        next(open_iterators[0])

    assert train_noisy(when, look)[0].masks == train_noisy()[0].masks


@pytest.mark.parametrize("own", [True, False])
def test_a_look_ahead_meets_the_dropout_of_the_training_pass(own):
    """With `own` false as one of version 0.1.0 did, which iterated the window itself."""

    @torch.no_grad()
    def look(window, model):
        for batch in window.forward_pass() if own else window:
            model(**batch)

    model, _ = train_noisy("before", look)
    assert model.looked == model.masks == train_noisy()[0].masks


def test_a_pass_without_gradients_needs_no_calls_and_gives_the_loss():
    _, _, windows, model, _ = set_up()
    [window] = windows
    with torch.no_grad():
        assert len([batch["labels"] for batch in window]) == 4  # as a look_ahead of 0.1.0 does
        for batch in window:
            window.weigh(model(**batch).loss)
    assert np.isfinite(window.loss)


def trained_window():
    """A window after its step, and the model."""
    _, _, windows, model, optimizer = set_up()
    [window] = windows
    for batch in window:
        with windows.accelerator.accumulate(model):
            windows.accelerator.backward(window.weigh(model(**batch).loss))
            optimizer.step()
            optimizer.zero_grad()
    return window, model


def test_a_window_that_is_trained_is_read_again_with_batches():
    window, _ = trained_window()
    loss = window.loss
    with pytest.raises(LoopError, match=r"already trained: to read .* `for batch in window\.batches\(\):`"):
        list(window)
    window, model = trained_window()
    with torch.no_grad():
        for batch in window:
            model(**batch)
        assert window.loss == pytest.approx(loss)
        for _ in window:
            break
    assert window.done
    assert window.loss == pytest.approx(loss)


def test_a_loader_goes_back_to_a_window_before_it_is_run():
    _, _, windows, _, _ = set_up()
    for window in windows:
        state = torch.get_rng_state()
        windows.rewind_to(window)
        assert torch.equal(torch.get_rng_state(), state)
        assert windows.next_position == (window.epoch, window.number)
        break


def test_an_unprepared_model_or_optimizer_is_refused():
    _, _, windows, model, optimizer = set_up()
    accelerator, other = windows.accelerator, build_head("sequence_classification", "bert").model
    bare = torch.optim.SGD(model.parameters(), lr=0.1)
    line = r"write `model, optimizer = accelerator\.prepare\(model, optimizer\)` before the loop"
    for loop in (train, lambda *objects, **named: next(iter_windows(*objects, **named))):
        with pytest.raises(InputError, match=f"^optimizer: found an unprepared SGD; {line}"):
            loop(model, bare, windows, accelerator=accelerator)
        with pytest.raises(InputError, match=f"^model: found an unprepared BertFor.*; {line}"):
            loop(other, optimizer, windows, accelerator=accelerator)
    check_unprepared(accelerator, other, bare)
    with pytest.raises(InputError, match=r"^optimizer: found a prepared optimizer; fine_tune prepares"):
        check_unprepared(accelerator, model, optimizer)


def test_a_model_that_was_prepared_on_one_process_is_refused_where_it_shall_not_be():
    _, _, windows, model, _ = set_up()
    with pytest.raises(InputError, match=r"^model: found a prepared BertFor.*; fine_tune prepares"):
        check_unprepared(windows.accelerator, model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_model_may_be_fine_tuned_twice():
    head, accelerator = build_head("sequence_classification", "bert"), Accelerator(cpu=True)
    for _ in range(2):
        windows = WindowLoader(
            head.examples(LENGTHS), 10, accelerator=accelerator, collate_fn=head.collate, micro_batch_size=3
        )
        optimizer = torch.optim.SGD(head.model.parameters(), lr=0.1)
        assert fine_tune(head.model, optimizer, windows, accelerator=accelerator)["windows"] == 1


def test_prepared_objects_stay_prepared_when_accelerate_frees_its_memory():
    _, _, windows, model, optimizer = set_up()
    windows.accelerator.free_memory()
    assert len(train(model, optimizer, windows, accelerator=windows.accelerator)) == 1


@pytest.fixture
def compiling():
    """An Accelerator that compiles, a head, and a function that makes loaders of the head's examples."""
    AcceleratorState._reset_state(reset_partial_state=True)
    head = build_head("sequence_classification", "bert")
    accelerator = Accelerator(cpu=True, dynamo_backend="eager", mixed_precision="bf16")
    examples = head.examples(LENGTHS)

    def loader():
        return WindowLoader(
            examples, 10, accelerator=accelerator, collate_fn=head.collate, micro_batch_size=5, pad_to=40
        )

    yield accelerator, head, loader
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_model_that_accelerate_compiles_is_trained_and_evaluated(compiling):
    accelerator, head, loader = compiling
    optimizer = torch.optim.SGD(head.model.parameters(), lr=0.1)
    model, prepared = accelerator.prepare(head.model, optimizer)
    assert type(model).__name__ == "OptimizedModule"
    assert len(train(model, prepared, loader(), accelerator=accelerator)) == 1
    assert np.isfinite(evaluate(model, loader(), accelerator=accelerator).loss)
    with pytest.raises(InputError, match=r"^model: found a prepared OptimizedModule; fine_tune prepares"):
        check_unprepared(accelerator, model, optimizer)


def test_a_model_that_accelerate_compiles_is_fine_tuned(compiling):
    accelerator, head, loader = compiling
    optimizer = torch.optim.SGD(head.model.parameters(), lr=0.1)
    summary = fine_tune(head.model, optimizer, loader(), accelerator=accelerator)
    assert summary["windows"] == 1


def test_an_unprepared_model_is_not_evaluated_where_precision_would_differ():
    head = build_head("sequence_classification", "bert")
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    windows = WindowLoader(
        head.examples(LENGTHS), 10, accelerator=accelerator, collate_fn=head.collate, max_tokens=64
    )
    try:
        with pytest.raises(InputError, match=r"^model: found an unprepared BertFor"):
            evaluate(head.model, windows, accelerator=accelerator)
        prepared = accelerator.prepare(head.model)
        assert np.isfinite(evaluate(prepared, windows, accelerator=accelerator).loss)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_train_runs_to_the_end_and_calls_back():
    _, _, windows, model, optimizer = set_up()
    seen = []
    records = train(
        model, optimizer, windows, accelerator=windows.accelerator, epochs=2, on_window=seen.append
    )
    assert seen == records
    assert [record.window for record in records] == [1, 2]


def test_a_window_loss_is_told_by_its_methods():
    class Own:
        def look_ahead(self, model, window):
            pass

        def __call__(self, outputs, batch):
            return outputs.loss

    assert as_window_loss(model_loss) is None
    for loss in (Own(), ContrastiveLoss()):
        assert as_window_loss(loss) is loss
