"""The preflight check warns of causes of inexact accumulation before a run starts."""

import copy
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
import transformers
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import default_collate

from gradacc_hf import ExactTrainer, InputError, WindowLoader, evaluate, fine_tune, train, verify
from gradacc_hf.accumulation.loss_items import model_loss
from gradacc_hf.training.bad_index import name_bad_index
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


def scheduler_of_another_optimizer():
    model = Classifier()
    optimizer, other = (torch.optim.SGD(model.parameters(), 0.1) for _ in range(2))
    return model, optimizer, torch.optim.lr_scheduler.StepLR(other, 1)


class SharpnessAware(torch.optim.SGD):
    """SAM as its authors wrote it: the closure of `step` has a default, and is needed nevertheless."""

    def first_step(self):
        raise NotImplementedError


def two_steps():
    model = Classifier()
    return model, SharpnessAware(model.parameters(), 0.1), None


REFUSED = {
    frozen: "model: all parameters of Classifier are frozen; set requires_grad",
    other_parameters: "optimizer: SGD holds none of the 2 trained parameters of the model; make",
    frozen_after_the_optimizer: "optimizer: AdamW holds none of the 2 trained parameters of the model",
    closure: "optimizer: LBFGS.step needs 'closure', which the loop does not pass",
    plateau: "scheduler: ReduceLROnPlateau.step needs 'metrics', which the loop does not pass",
    scheduler_of_another_optimizer: "scheduler: StepLR was made for another optimizer, so it would not",
    two_steps: r"optimizer: SharpnessAware takes two steps a window \(first_step, second_step\)",
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


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        model = Classifier()
    with pytest.raises(InputError, match=r"line\.weight is on the meta device and has no values; load"):
        check_trainable(model, torch.optim.SGD(model.parameters(), 0.1))


def part_of_the_parameters(model):
    return torch.optim.SGD([model.line.bias], 0.1)


def replaced_after_the_optimizer(model):
    """As by `resize_token_embeddings`."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.line.weight = torch.nn.Parameter(model.line.weight.detach().clone())
    return optimizer


@pytest.mark.parametrize(
    ("case", "line"),
    [
        (part_of_the_parameters, "SGD has 1 of 2 trained parameters, so line.weight will not change; make"),
        (
            replaced_after_the_optimizer,
            "SGD has 1 of 2 trained parameters and 1 that are not in the model, so",
        ),
        (lambda model: torch.optim.SGD(model.parameters(), 0.1), None),
    ],
)
def test_an_optimizer_of_some_trained_parameters_is_warned_of_once(case, line, caplog):
    model, windows = Classifier(), make_windows()
    optimizer, before = case(model), model.line.weight.detach().clone()
    fine_tune(model, optimizer, windows, accelerator=windows.accelerator)
    assert torch.equal(before, model.line.weight) == (line is not None)
    assert [line in record.getMessage() for record in caplog.records] == [True] * (line is not None)


def test_a_tied_weight_that_the_optimizer_holds_is_not_warned_of(caplog):
    model, windows = Classifier(), make_windows()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.other = torch.nn.Linear(5, 3)
    model.other.weight, model.other.bias = model.line.weight, model.line.bias
    fine_tune(model, optimizer, windows, accelerator=windows.accelerator)
    assert not caplog.records


def test_integers_among_the_parameters_are_warned_of(caplog):
    model, windows = Classifier(), make_windows()
    model.packed = torch.nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    optimizer = torch.optim.SGD(model.line.parameters(), 0.1)
    fine_tune(model, optimizer, windows, accelerator=windows.accelerator)
    assert (
        "1 of 3 parameters are integers and will not change (packed, …): the model is quantised"
        in caplog.text
    )


# Ids without a row


class Words(torch.nn.Module):
    """A classifier of the user's own, with 20 words and 6 positions."""

    def __init__(self):
        super().__init__()
        self.words, self.positions = torch.nn.Embedding(20, 4), torch.nn.Embedding(6, 4)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, input_ids, labels):
        places = self.positions(torch.arange(input_ids.shape[1]))
        return torch.nn.functional.cross_entropy(self.head((self.words(input_ids) + places).mean(1)), labels)


def bert():
    return build_head("sequence_classification", "bert").model


def windows_of(ids=(3, 4), label=1, **arguments):
    """The last example of 40 has these ids and this label; it is in the last window."""
    examples = [{"input_ids": torch.tensor([3, 4, 5]), "labels": torch.tensor(i % 2)} for i in range(39)]
    examples += [{"input_ids": torch.tensor(ids), "labels": torch.tensor(label)}]
    settings = {"micro_batch_size": 1, "shuffle": False, **arguments}
    return WindowLoader(examples, 16, accelerator=Accelerator(cpu=True), **settings)


BEYOND = {
    "a token": (Words, {"ids": [3, 20]}, "words has the rows 0 to 19, and the batch has 20; change"),
    "a token of BERT": (
        bert,
        {"ids": [3, 9999]},
        "and the batch has 9999; the tokenizer has tokens that the",
    ),
    "a negative token": (Words, {"ids": [3, -100]}, "and the batch has -100; .* only labels have -100"),
    "a position": (
        Words,
        {"ids": [3] * 7},
        "positions has the rows 0 to 5, .* has 6; .*: shorten the examples",
    ),
    "a label": (
        Words,
        {"label": 3},
        "labels: the loss has the label 3, and the model has 3 outputs; allowed: 0",
    ),
}


@pytest.mark.parametrize("case", BEYOND)
def test_an_id_without_a_row_is_named_in_training_and_evaluation(case):
    make, settings, found = BEYOND[case]
    model, windows = make(), windows_of(**settings)
    model, optimizer = windows.accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(InputError, match=found):
        train(model, optimizer, windows, accelerator=windows.accelerator)
    assert windows.window == 3
    with pytest.raises(InputError, match=found):
        evaluate(model, windows_of(**settings), accelerator=windows.accelerator, predict=None)


def test_the_failed_assertion_of_a_gpu_is_explained():
    found = r"beyond the rows of the model\. .* run the same on the CPU to find it"
    with pytest.raises(InputError, match=found), name_bad_index(Words()):
        raise RuntimeError("CUDA error: device-side assert triggered")
    with pytest.raises(RuntimeError, match="another"), name_bad_index(Words()):
        raise RuntimeError("another")


def test_tokens_beyond_the_embeddings_are_refused_before_the_first_window():
    model, windows = bert(), windows_of(ids=[3, 9999])
    windows.load_state_dict({**windows.state_dict(), "window": 2})
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        InputError, match=r"examples \[39\]: input_ids has the id 9999, and the model has .*resize"
    ):
        fine_tune(model, torch.optim.SGD(model.parameters(), 0.1), windows, accelerator=windows.accelerator)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


# Outputs of all usual forms

FORMS = {
    "object": lambda loss, logits: SimpleNamespace(loss=loss, logits=logits),
    "dict": lambda loss, logits: {"loss": loss, "logits": logits},
    "tuple": lambda loss, logits: (loss, logits),
    "tuple with the loss at the end": lambda loss, logits: (logits, loss),
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


@pytest.mark.parametrize(
    ("form", "found"),
    [
        (
            lambda loss, logits: SimpleNamespace(loss=loss.repeat(3)),
            "a loss for each of 3 items .*: return the mean",
        ),
        (
            lambda loss, logits: (loss[None], loss),
            "several single numbers, and any may be the loss: return a",
        ),
    ],
)
def test_a_loss_that_is_not_clear_is_an_error_with_the_cure(form, found):
    model, windows = Classifier(form), make_windows()
    with pytest.raises(ValueError, match=found):
        fine_tune(model, torch.optim.SGD(model.parameters(), 0.1), windows, accelerator=windows.accelerator)


def test_logits_alone_are_evaluated_with_a_loss_of_the_users_own():
    model, windows = Classifier(lambda loss, logits: logits), make_windows(shuffle=False)
    found = evaluate(
        model,
        windows,
        accelerator=windows.accelerator,
        compute_loss=lambda outputs, batch: torch.nn.functional.cross_entropy(outputs, batch["labels"]),
    )
    inputs = torch.stack([example["x"] for example in windows.examples(range(40))])
    assert torch.allclose(torch.tensor(np.stack(found.predictions)), model.line(inputs), atol=1e-6)


# Data and batches of other forms


def test_arrays_of_numpy_in_a_batch_train_as_tensors():
    weights = []
    for kind in (torch.as_tensor, np.asarray):

        def collate(examples, kind=kind):
            return {name: kind(tensor) for name, tensor in default_collate(examples).items()}

        model, windows = Classifier(), make_windows(collate_fn=collate)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        fine_tune(model, optimizer, windows, accelerator=windows.accelerator)
        weights.append(model.line.weight.detach())
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("dataset", "found"),
    [
        (
            pandas.DataFrame({"x": [1.0], "labels": [0]}),
            r"a pandas DataFrame: give datasets\.Dataset\.from_pandas",
        ),
        ({"x": [1.0], "labels": [0]}, r"a mapping with \['x', 'labels'\]: give datasets\.Dataset\.from_dict"),
        ({"train": [{"x": 1.0}]}, r"a mapping with \['train'\]"),
    ],
)
def test_tables_of_other_libraries_are_refused_with_the_cure(dataset, found):
    with pytest.raises(ValueError, match=found):
        WindowLoader(dataset, 1, accelerator=Accelerator(cpu=True), micro_batch_size=1)


def test_tuples_of_a_tensor_data_set_need_a_collate_function():
    dataset = torch.utils.data.TensorDataset(torch.randn(8, 5), torch.arange(8) % 3)
    windows = WindowLoader(dataset, 4, accelerator=Accelerator(cpu=True), micro_batch_size=2)
    with pytest.raises(ValueError, match=r"returned a list; it must return a mapping .* pass a collate_fn="):
        next(iter(windows))


@pytest.mark.parametrize("form", FORMS)
def test_exact_trainer_trains_and_evaluates_outputs_of_every_usual_form(form, tmp_path):
    examples = make_windows().examples(range(40))
    weights, losses = [], []
    for name in ("dict", form):
        model = Classifier(FORMS[name])
        arguments = transformers.TrainingArguments(
            tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=4, learning_rate=0.1,
            num_train_epochs=1, optim="sgd", use_cpu=True, report_to="none", save_strategy="no",
        )  # fmt: skip
        trainer = ExactTrainer(model=model, args=arguments, train_dataset=examples, eval_dataset=examples)
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
        weights.append(model.line.weight.detach())
        batch = default_collate(examples[:3])
        assert type(model(**batch)) is type(Classifier(FORMS[name])(**batch))  # the outputs are as before
    assert torch.equal(*weights)
    assert losses[0] == losses[1]
    assert not torch.equal(weights[0], Classifier().line.weight)


class LabelWeights(torch.nn.Module):
    """A classifier whose loss may weigh labels. Its head may be all zeros."""

    def __init__(self, weight=None, zeros=False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.weight = torch.nn.Linear(5, 8), torch.nn.Linear(8, 3), weight
        if zeros:
            torch.nn.init.zeros_(self.head.weight)
            torch.nn.init.zeros_(self.head.bias)

    def forward(self, x, labels):
        logits = self.head(torch.tanh(self.body(x)))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels, self.weight)}


def line_about(model, labels, caplog, loss=model_loss, **arguments):
    generator = torch.Generator().manual_seed(0)
    examples = [{"x": torch.randn(5, generator=generator), "labels": torch.tensor(label)} for label in labels]
    accelerator = Accelerator(cpu=True)
    before = copy.deepcopy(model.state_dict())
    windows = WindowLoader(examples, 16, accelerator=accelerator, micro_batch_size=4, **arguments)
    preflight_check(model, windows, loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return caplog.text


WEIGHTS = torch.tensor([1.0, 12.0, 1.0])
RARE = [0] * 40 + [1] + [0] * 200 + [1] + [0] * 20


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("labels", [[0, 1, 2] * 10, RARE])
def test_class_weights_are_noticed(labels, zeros, caplog):
    assert "no split is exact" in line_about(LabelWeights(WEIGHTS, zeros), labels, caplog)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("labels", [[0, 1, 2] * 10, RARE])
def test_nothing_is_said_of_labels_that_count_alike(labels, zeros, caplog):
    assert line_about(LabelWeights(zeros=zeros), labels, caplog) == ""


def test_one_label_alone_cannot_tell(caplog):
    said = line_about(LabelWeights(WEIGHTS), [1] * 40, caplog)
    assert (
        "cannot tell whether the loss is a mean over its items: all labels of the first examples are 1"
        in said
    )


def test_a_loss_that_weighs_no_labels_is_not_doubted_for_them(caplog):
    def loss(outputs, batch):
        return outputs["loss"]

    assert "all labels of the first examples are 1" in line_about(LabelWeights(), [1] * 40, caplog, loss)
    caplog.clear()
    loss.weighs_labels = False  # as of preferences
    assert line_about(LabelWeights(), [1] * 40, caplog, loss) == ""


def test_losses_that_are_all_alike_cannot_tell(caplog):
    class Constant(LabelWeights):
        def forward(self, x, labels):
            return {"loss": super().forward(x, labels)["loss"] * 0 + 1}

    assert "examples are all alike" in line_about(Constant(), [0, 1, 2] * 10, caplog)


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (
            lambda logits, labels: (logits / (logits - logits.mean(0))).square().mean(),
            "of an example alone is not finite",
        ),
        (lambda logits, labels: logits.sum() * 0, "the loss is 0"),
    ],
)
def test_losses_that_are_not_finite_or_0_cannot_tell(loss, why, caplog):
    class Other(LabelWeights):
        def forward(self, x, labels):
            return {"loss": loss(self.head(torch.tanh(self.body(x))), labels)}

    said = line_about(Other(), [0, 1, 2] * 10, caplog)
    assert (
        f"cannot tell whether the loss is a mean over its items: the loss {why.removeprefix('the loss ')}"
        in said
    )


@pytest.mark.parametrize("seed", range(8))
def test_two_rows_of_one_length_differ_by_their_items(seed, caplog):
    """The loader counts one label less in each row than the loss: rows of equal counts do not show it."""

    class Tagger(LabelWeights):
        def forward(self, x, labels):
            return super().forward(x.flatten(0, 1), labels.flatten())

    torch.manual_seed(seed)
    examples = []
    for length in torch.randint(2, 9, (20,)).tolist():
        labels = torch.where(torch.arange(8) < length, torch.randint(3, (8,)), -100)
        examples.append({"x": torch.randn(8, 5), "labels": labels})
    settings = {"accelerator": Accelerator(cpu=True), "micro_batch_size": 2, "num_items": "next_token"}
    preflight_check(Tagger(), WindowLoader(examples, 8, **settings))
    assert "no split is exact" in caplog.text


@pytest.mark.parametrize("size", [1, 2])
def test_small_micro_batches_hide_no_ignored_label(size, caplog):
    class Pixels(LabelWeights):
        def forward(self, x, labels):
            logits = self.head(torch.tanh(self.body(x))).flatten(0, 1)
            return torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=255)

    def counted(batch):
        return int((batch["labels"] != 255).sum())

    for seed in range(12):
        torch.manual_seed(seed)
        labels = torch.where(torch.rand(60, 4) < 0.4, 255, torch.randint(3, (60, 4)))
        labels[:, 0] = 1
        examples = [{"x": torch.randn(4, 5), "labels": row} for row in labels]
        for num_items in ("labels", counted):
            settings = {
                "accelerator": Accelerator(cpu=True),
                "micro_batch_size": size,
                "num_items": num_items,
            }
            caplog.clear()
            preflight_check(Pixels(), WindowLoader(examples, 8, seed=seed, **settings))
            assert bool(caplog.text) == (num_items == "labels"), seed


@pytest.mark.parametrize("lora", [False, True])
def test_nothing_is_asked_about_labels_of_a_model_of_transformers(lora, caplog):
    """Its own loss weighs no labels. All labels are 1, so that a weight would not show."""
    head = build_head("sequence_classification", "bert")
    examples = [{**example, "labels": 1} for example in head.examples([3, 9, 5, 7] * 4)]
    model = get_peft_model(head.model, LoraConfig(target_modules=["query"])) if lora else head.model
    settings = {"accelerator": Accelerator(cpu=True), "collate_fn": head.collate, "micro_batch_size": 4}
    windows = WindowLoader(examples, 8, **settings)
    preflight_check(model, windows, loss_like_the_model_s)
    assert "all labels of the first examples are 1" in caplog.text
    caplog.clear()
    preflight_check(model, windows)
    assert caplog.text == ""


def loss_like_the_model_s(outputs, batch):
    return model_loss(outputs, batch)


@pytest.mark.parametrize("seed", range(5))
def test_random_masks_cannot_tell(seed, caplog):
    def mask(examples):
        batch = default_collate(examples)
        batch["labels"] = torch.where(torch.rand(batch["labels"].shape) < 0.5, batch["labels"], -100)
        return batch

    class Tagger(LabelWeights):
        def forward(self, x, labels):
            return super().forward(x.flatten(0, 1), labels.flatten())

    torch.manual_seed(seed)
    examples = [{"x": torch.randn(8, 5), "labels": torch.randint(3, (8,))} for _ in range(20)]
    settings = {"accelerator": Accelerator(cpu=True), "micro_batch_size": 4, "collate_fn": mask}
    preflight_check(Tagger(), WindowLoader(examples, 16, **settings))
    assert "the items of the same examples change, as with random masks" in caplog.text


def test_a_stream_is_checked_by_the_examples_of_one_window(caplog):
    examples = [{"x": torch.randn(5), "labels": torch.tensor(i % 3)} for i in range(40)]
    accelerator = Accelerator(cpu=True)
    stream = type("Stream", (), {"__iter__": lambda self: iter(examples)})()
    windows = WindowLoader(stream, 8, accelerator=accelerator, micro_batch_size=3, buffer_size=8)
    preflight_check(LabelWeights(), windows)
    assert caplog.text == ""
    preflight_check(LabelWeights(WEIGHTS), windows)
    assert "no split is exact" in caplog.text
    assert [len(window.indices) for window in windows] == [8] * 5


@pytest.mark.parametrize(("factor", "is_warned_of"), [(1.0, False), (torch.tensor([1.0, 3.0, 1.0]), True)])
def test_sums_of_class_weights_are_counts_although_they_round(factor, is_warned_of, caplog):
    weight = torch.tensor([0.1, 0.7, 1.3])

    def sum_of_weights(batch):
        return float((factor * weight)[batch["labels"]].sum())

    said = line_about(LabelWeights(weight), [0, 1, 2] * 20, caplog, num_items=sum_of_weights)
    assert ("no split is exact" in said) == is_warned_of
    assert is_warned_of or said == ""


class TagWeights(LabelWeights):
    """The same for tags of positions."""

    def forward(self, x, labels):
        return super().forward(x.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize(("weight", "is_warned_of"), [(None, False), (WEIGHTS, True)])
def test_an_example_with_another_share_of_a_tag_is_among_the_examples(weight, is_warned_of, caplog):
    tags = torch.zeros(40, 6, dtype=torch.long)
    tags[:, 0] = 1  # the same share in all examples
    tags[[21, 33], 1] = 1  # except two
    examples = [{"x": torch.randn(6, 5), "labels": tags[i]} for i in range(40)]
    windows = WindowLoader(examples, 16, accelerator=Accelerator(cpu=True), micro_batch_size=4)
    preflight_check(TagWeights(weight), windows)
    assert ("no split is exact" in caplog.text) == is_warned_of
    assert is_warned_of or caplog.text == ""
