"""The preflight check warns of causes of inexact accumulation before a run starts."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from gradacc_hf import InputError, WindowLoader, evaluate, fine_tune, train, verify
from gradacc_hf.accumulation.loss_items import model_loss
from gradacc_hf.training.preflight import check_trainable, preflight_check
from gradacc_hf.verification.tiny_models import build_head


def said(caplog, kind, model_type, **arguments):
    head = build_head(kind, model_type)
    examples = head.examples([5, 9, 30, 12])
    if kind == "causal_lm":
        examples = [{**example, "labels": example["input_ids"]} for example in examples]
    accelerator = Accelerator(cpu=True)
    windows = WindowLoader(
        examples,
        4,
        accelerator=accelerator,
        collate_fn=head.collate,
        max_tokens=64,
        **arguments,
    )
    before = {name: tensor.clone() for name, tensor in head.model.state_dict().items()}
    drawn = torch.random.get_rng_state()
    preflight_check(head.model, windows, model_loss)
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.model.state_dict().items())
    assert all(parameter.grad is None for parameter in head.model.parameters())
    return caplog.text


def test_a_loss_that_padding_reaches_is_named_with_the_cure(caplog):
    assert "no split is exact. If padding changes the loss" in said(caplog, "question_answering", "bert")


def test_items_that_are_not_those_of_the_loss_are_noticed(caplog):
    assert "no split is exact" in said(caplog, "causal_lm", "gpt2", num_items="labels")


def test_nothing_is_said_of_a_causal_model_with_its_own_items(caplog):
    assert said(caplog, "causal_lm", "gpt2", num_items="next_token") == ""


@pytest.mark.parametrize("pad_to", ["window", 40])
def test_nothing_is_said_when_a_window_is_padded_alike(caplog, pad_to):
    assert said(caplog, "question_answering", "bert", pad_to=pad_to) == ""


@pytest.mark.parametrize("model_type", ["bert", "roberta", "deberta-v2", "gpt2"])
def test_nothing_is_said_of_a_padding_invariant_model(caplog, model_type):
    assert said(caplog, "token_classification", model_type) == ""


def test_batch_norm_is_named(caplog):
    assert "16 modules normalise over the micro-batch (BatchNorm: resnet.embedder" in said(
        caplog, "image_classification", "resnet"
    )


# What the loop cannot train is refused before the first window


def make_windows(**arguments):
    torch.manual_seed(0)
    examples = [{"x": torch.randn(5), "labels": torch.tensor(i % 3)} for i in range(40)]
    return WindowLoader(examples, 16, accelerator=Accelerator(cpu=True), micro_batch_size=3, **arguments)


class Classifier(torch.nn.Module):
    """A linear classifier; `form` makes the outputs of (loss, logits)."""

    def __init__(self, form=lambda loss, logits: SimpleNamespace(loss=loss, logits=logits)):
        super().__init__()
        torch.manual_seed(0)
        self.line, self.form = torch.nn.Linear(5, 3), form

    def forward(self, x, labels=None):
        logits = self.line(x)
        return self.form(torch.nn.functional.cross_entropy(logits, labels), logits)


def frozen():
    model = Classifier().requires_grad_(False)
    return model, torch.optim.SGD(model.parameters(), 0.1), None


def other_parameters():
    return Classifier(), torch.optim.SGD(Classifier().parameters(), 0.1), None


def frozen_after_the_optimizer():
    """As adapters are added after the optimizer is made."""
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters())
    model.requires_grad_(False)
    model.adapter = torch.nn.Linear(5, 3)
    return model, optimizer, None


def closure():
    model = Classifier()
    return model, torch.optim.LBFGS(model.parameters()), None


def plateau():
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return model, optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


REFUSED = {
    frozen: "model: all parameters of Classifier are frozen; set requires_grad",
    other_parameters: "optimizer: SGD holds none of the 2 trained parameters of the model; make",
    frozen_after_the_optimizer: "optimizer: AdamW holds none of the 2 trained parameters of the model",
    closure: "optimizer: LBFGS.step needs 'closure', which the loop does not pass",
    plateau: "scheduler: ReduceLROnPlateau.step needs 'metrics', which the loop does not pass",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_before_the_first_window(case):
    model, optimizer, scheduler = case()
    windows = make_windows()
    accelerator = windows.accelerator
    settings = {"accelerator": accelerator, "scheduler": scheduler}
    with pytest.raises(InputError, match=REFUSED[case]):
        fine_tune(model, optimizer, windows, **settings)
    model, optimizer = accelerator.prepare(model, optimizer)
    with pytest.raises(InputError, match=REFUSED[case]):
        train(model, optimizer, windows, **settings)
    assert windows.next_position == (0, 0)


def test_an_optimizer_of_some_of_the_parameters_and_usual_schedulers_are_accepted():
    model = Classifier()
    optimizer = torch.optim.SGD([model.line.bias], 0.1)
    check_trainable(model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3))
    check_trainable(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))


# Outputs of all usual forms

FORMS = {
    "object": lambda loss, logits: SimpleNamespace(loss=loss, logits=logits),
    "dict": lambda loss, logits: {"loss": loss, "logits": logits},
    "tuple": lambda loss, logits: (loss, logits),
    "loss": lambda loss, logits: loss,
    "loss of shape (1,)": lambda loss, logits: SimpleNamespace(loss=loss[None], logits=logits),
}


@pytest.mark.parametrize("form", FORMS)
def test_outputs_of_every_usual_form_train_alike_and_are_verified(form):
    figures = []
    for name in ("object", form):
        model, windows = Classifier(FORMS[name]), make_windows()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        fine_tune(model, optimizer, windows, accelerator=windows.accelerator)
        figures.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*figures)
    found = verify(Classifier(FORMS[form]), make_windows())
    assert found.exact
    if form in ("dict", "tuple"):  # Trainer itself takes no other form
        assert found.exact_trainer is not None, found.trainer_failed
        assert found.exact_trainer.exact
    if form != "loss":
        windows = make_windows()
        found = evaluate(Classifier(FORMS[form]), windows, accelerator=windows.accelerator)
        assert len(found.predictions) == 40


@pytest.mark.parametrize(
    ("form", "found"),
    [
        (lambda loss, logits: {"logits": logits}, "no loss for a batch"),
        (lambda loss, logits: (logits,), r"no loss but a tensor of shape \(3, 3\) for a batch"),
        (lambda loss, logits: logits, r"no loss but a tensor of shape \(3, 3\) for a batch"),
        (lambda loss, logits: SimpleNamespace(loss=0.5, logits=logits), "no loss but a float for a batch"),
        (lambda loss, logits: None, "no loss for a batch"),
    ],
)
def test_outputs_without_a_loss_are_an_error_with_the_cure(form, found):
    model, windows = Classifier(form), make_windows(shuffle=False)
    [batch, *_] = next(iter(windows)).batches()
    with pytest.raises(ValueError, match=found + r".*\['labels', 'x'\]: add labels, or pass compute_loss="):
        model_loss(model(**batch), batch)
