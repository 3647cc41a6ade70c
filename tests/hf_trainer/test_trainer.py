"""ExactTrainer gives the gradient of the whole window. If Trainer does too, the results are bitwise equal."""

import copy
import json
import logging
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_pt_utils import LabelSmoother

from gradacc_hf import ExactTrainer, ExactTrainerMixin, PaddingNotRemovableError
from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.accumulation.reference import EXACT, RecordGradients, relative_error, whole_window_gradient
from gradacc_hf.padding.removal import is_removed
from gradacc_hf.verification.all_heads import LENGTHS
from gradacc_hf.verification.baselines import CustomLossMixin
from gradacc_hf.verification.tiny_models import build_head

HEADS = {  # whether Trainer is exact with 4 × 4 and with 5 + 5 + 5 + 1
    ("sequence_classification", "bert", "single_label"): (False, False),
    ("sequence_classification", "roberta", "multi_label"): (False, False),
    ("sequence_classification", "distilbert", "regression"): (False, False),
    ("token_classification", "electra", "single_label"): (False, False),
    ("masked_lm", "modernbert", "single_label"): (True, True),
    ("causal_lm", "gpt2", "single_label"): (False, False),
    ("causal_lm", "llama", "single_label"): (True, True),
    ("causal_lm", "bart", "single_label"): (False, False),
    ("seq2seq_lm", "t5", "single_label"): (False, False),
    ("question_answering", "distilbert", "single_label"): (True, False),
    ("multiple_choice", "roberta", "single_label"): (False, False),
    ("image_classification", "vit", "single_label"): (True, True),
    ("ctc", "wav2vec2", "single_label"): (False, False),
}


def make(trainer_class, head, folder, examples, size=4, steps=4, recorder=True, pad_to=None, **more):
    """Return a Trainer on the examples in order. A `recorder` replaces the optimizer and stores gradients."""
    known = {key: more.pop(key) for key in list(more) if key in TrainingArguments.__dataclass_fields__}
    settings = {"train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": "none"}
    settings |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "use_cpu": True}
    settings |= {"num_train_epochs": 1, "logging_steps": 1, "disable_tqdm": True, "max_grad_norm": 0}
    settings |= {"remove_unused_columns": False}
    arguments = TrainingArguments(str(folder), **{**settings, **known})
    if recorder:
        more["optimizers"] = (RecordGradients(head.model), None)
    collate = partial(head.collate, pad_to=pad_to)
    trainer = trainer_class(head.model, arguments, collate, train_dataset=examples, **more)
    trainer.remove_callback(PrinterCallback)
    return trainer


def gradients(*arguments, **more):
    trainer = make(*arguments, **more)
    trainer.train()
    return trainer.optimizer.optimizer.gradients


def logged(trainer, key="loss"):
    return [row[key] for row in trainer.state.log_history if key in row]


@pytest.mark.parametrize(("kind", "model_type", "problem"), HEADS)
def test_it_is_exact_and_the_same_bits_as_trainer_where_trainer_is(kind, model_type, problem, tmp_path):
    head = build_head(kind, model_type, problem=problem)
    examples = head.examples(LENGTHS)
    pad_to = {"question_answering": max(LENGTHS), "ctc": 40 * 320}.get(kind)  # padding changes their loss
    whole = whole_window_gradient(head.model, head.collate(examples, pad_to=pad_to))
    for size, trainer_is_exact in zip((4, 5), HEADS[kind, model_type, problem], strict=True):
        [ours] = gradients(ExactTrainer, head, tmp_path, examples, size, pad_to=pad_to)
        [theirs] = gradients(Trainer, head, tmp_path, examples, size, pad_to=pad_to)
        assert relative_error(ours, whole) < EXACT
        assert (relative_error(theirs, whole) < EXACT) == trainer_is_exact
        if trainer_is_exact:
            assert all(torch.equal(ours[name], theirs[name]) for name in whole)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama"])
def test_windows_of_any_size_are_exact_and_so_is_what_is_logged(model_type, tmp_path):
    head = build_head("token_classification" if model_type == "bert" else "causal_lm", model_type)
    examples = head.examples([*LENGTHS, 5, 21, 3])  # 9 + 9 + 1 in micro-batches of 3
    trainer = make(ExactTrainer, head, tmp_path, examples, size=3, steps=3)
    trainer.train()
    found = trainer.optimizer.optimizer.gradients
    windows = [examples[:9], examples[9:18], examples[18:]]
    norms = logged(trainer, "grad_norm")
    for window, gradient, loss, norm in zip(windows, found, logged(trainer), norms, strict=True):
        batch = head.collate(window)
        whole = whole_window_gradient(head.model, batch)
        assert relative_error(gradient, whole) < EXACT
        assert loss == pytest.approx(head.model(**batch).loss.item(), rel=1e-6)
        assert norm == pytest.approx(float(torch.stack([g.norm() for g in whole.values()]).norm()), rel=1e-5)


class Stream(IterableDataset):
    """Examples of unknown number."""

    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        return iter(self.examples)


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_the_partial_window_at_the_end_of_a_stream_is_stepped_and_not_left_to_the_next_epoch(
    model_type, tmp_path
):
    head = build_head("token_classification" if model_type == "bert" else "causal_lm", model_type)
    examples = head.examples(LENGTHS)[:14]  # 8 + 6
    windows = [examples[:8], examples[8:]] * 2
    more = {"size": 2, "steps": 4, "max_steps": 4, "train_sampling_strategy": "random"}
    ours = gradients(ExactTrainer, head, tmp_path, Stream(examples), **more)
    theirs = gradients(Trainer, head, tmp_path, Stream(examples), **more)
    whole = [whole_window_gradient(head.model, head.collate(window)) for window in windows]
    assert [relative_error(*pair) < EXACT for pair in zip(ours, whole, strict=True)] == [True] * 4
    assert relative_error(theirs[1], whole[1]) > 0.1


@pytest.mark.parametrize(("kind", "model_type"), [("token_classification", "bert"), ("causal_lm", "gpt2")])
def test_label_smoothing_is_that_of_the_whole_window(kind, model_type, tmp_path):
    head = build_head(kind, model_type)
    examples = head.examples(LENGTHS)
    [ours] = gradients(ExactTrainer, head, tmp_path, examples, size=5, label_smoothing_factor=0.1)

    def smoothed(outputs, batch):
        return LabelSmoother(0.1)(outputs, batch["labels"], shift_labels=kind == "causal_lm")

    whole = whole_window_gradient(head.model, head.collate(examples), smoothed)
    assert relative_error(ours, whole) < EXACT


def heeding(outputs, labels, num_items_in_batch=None):
    return ForCausalLMLoss(outputs.logits, labels, 128, num_items_in_batch)


def insisting(outputs, labels, num_items_in_batch):
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return cross_entropy(logits, labels, reduction="sum") / num_items_in_batch.item()


def ignoring(outputs, labels, num_items_in_batch=None):
    return ForCausalLMLoss(outputs.logits, labels, 128)


@pytest.mark.parametrize("compute_loss_func", [heeding, insisting, ignoring])
def test_a_loss_function_is_exact_whether_or_not_it_heeds_the_number_of_items(compute_loss_func, tmp_path):
    head = build_head("causal_lm", "gpt2")
    examples = head.examples(LENGTHS)
    whole = whole_window_gradient(head.model, head.collate(examples))
    more = {"size": 5, "compute_loss_func": compute_loss_func}
    [ours] = gradients(ExactTrainer, head, tmp_path, examples, **more)
    [theirs] = gradients(Trainer, head, tmp_path, examples, **more)
    assert relative_error(ours, whole) < EXACT
    assert relative_error(theirs, whole) > 100 * EXACT


@pytest.fixture
def capture_warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("gradacc_hf.hf_trainer.trainer"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("gradacc_hf"), "propagate", True)
    with caplog.at_level("WARNING"):
        yield caplog


WEIGHTS = torch.tensor([0.2, 1.0, 5.0])


def weighted(outputs, batch):
    """Return a mean weighted by class."""
    return cross_entropy(outputs.logits, batch["labels"], WEIGHTS)


class WithWeights(CustomLossMixin, Trainer):
    custom_loss = staticmethod(weighted)


class Below(CustomLossMixin, ExactTrainer):
    custom_loss = staticmethod(weighted)


class Above(ExactTrainerMixin, WithWeights):
    pass


@pytest.mark.parametrize("trainer_class", [Below, Above])
def test_it_composes_with_subclasses_that_have_a_loss_of_their_own(trainer_class, tmp_path):
    head = build_head("sequence_classification", "bert")
    examples = head.examples(LENGTHS)
    [ours] = gradients(
        trainer_class,
        head,
        tmp_path,
        examples,
        size=5,
        num_items=lambda batch: float(WEIGHTS[batch["labels"]].sum()),
    )
    assert relative_error(ours, whole_window_gradient(head.model, head.collate(examples), weighted)) < EXACT


def rows_loss(outputs, batch):
    """Return the mean over examples of the mean over labels."""
    each = cross_entropy(outputs.logits.transpose(1, 2), batch["labels"], reduction="none")
    return (each.sum(1) / (batch["labels"] != IGNORED).sum(1)).mean()


class ExactMeanOfRows(CustomLossMixin, ExactTrainer):
    custom_loss = staticmethod(rows_loss)


@pytest.mark.parametrize(("size", "lengths"), [(1, LENGTHS), (4, [12] * 4 + LENGTHS[4:])])
def test_means_over_rows_are_told_from_means_over_labels_by_one_row_or_equal_ones(size, lengths, tmp_path):
    head = build_head("token_classification", "bert")
    examples = head.examples(lengths)
    for example in examples[:4]:  # the same number of labels in all rows of the first micro-batch
        example["labels"] = [label if label != IGNORED else 0 for label in example["labels"]]
    whole = whole_window_gradient(head.model, head.collate(examples), rows_loss)
    [ours] = gradients(ExactMeanOfRows, head, tmp_path, examples, size=size, steps=16 // size)
    assert relative_error(ours, whole) < EXACT


@pytest.mark.parametrize(
    ("kind", "model_type"), [("token_classification", "bert"), ("causal_lm", "gpt2"), ("seq2seq_lm", "bart")]
)
def test_micro_batches_of_one_example_are_exact(kind, model_type, tmp_path):
    head = build_head(kind, model_type)
    examples = head.examples(LENGTHS)
    [ours] = gradients(ExactTrainer, head, tmp_path, examples, size=1, steps=16)
    assert relative_error(ours, whole_window_gradient(head.model, head.collate(examples))) < EXACT


@pytest.mark.parametrize("weight", [1e-4, 1.0])
def test_a_mean_beside_a_sum_that_heeds_the_number_of_items_is_noticed(weight, tmp_path):
    """The z-loss is an example. Treated as a sum, it would be multiplied by the accumulation steps."""
    head = build_head("causal_lm", "llama")
    examples = head.examples(LENGTHS)

    def with_z_loss(outputs, labels, num_items_in_batch=None):
        there = labels[:, 1:] != IGNORED
        z_loss = outputs.logits[:, :-1].logsumexp(-1)[there].square().mean()
        return ForCausalLMLoss(outputs.logits, labels, 128, num_items_in_batch) + weight * z_loss

    def truth(outputs, batch):
        return with_z_loss(outputs, batch["labels"])

    [ours] = gradients(
        ExactTrainer,
        head,
        tmp_path,
        examples,
        size=5,
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: with_z_loss(
            outputs, labels, num_items_in_batch
        ),
    )
    assert relative_error(ours, whole_window_gradient(head.model, head.collate(examples), truth)) < EXACT


def test_a_first_loss_of_0_says_nothing_and_the_next_window_is_asked(tmp_path):
    head = build_head("token_classification", "bert")
    examples = head.examples(LENGTHS)
    for example in examples[:8]:
        example["labels"] = [IGNORED] * len(example["labels"])

    def clamped(outputs, batch):
        each = cross_entropy(outputs.logits.transpose(1, 2), batch["labels"], reduction="sum")
        return each / (batch["labels"] != IGNORED).sum().clamp(min=1)

    class Clamped(CustomLossMixin, ExactTrainer):
        custom_loss = staticmethod(clamped)

    _, second = gradients(Clamped, head, tmp_path, examples, size=2, steps=4)
    assert relative_error(second, whole_window_gradient(head.model, head.collate(examples[8:]))) < EXACT


def test_a_router_loss_does_not_hide_that_labels_are_shifted(tmp_path):
    head = build_head("causal_lm", "mixtral")
    head.model.config.output_router_logits = True
    head.model.config.router_aux_loss_coef = head.model.router_aux_loss_coef = 1e-8
    trainer = make(ExactTrainer, head, tmp_path, head.examples(LENGTHS))
    trainer.train()
    assert trainer.items_found == "next_token"


def test_labels_that_are_no_tensor_count_examples(tmp_path):
    head = build_head("image_classification", "vit")
    examples, stack = head.examples(LENGTHS), head.collate

    def collate(examples):
        batch = stack(examples)
        return {"pixel_values": batch["pixel_values"], "labels": [{"class": int(c)} for c in batch["labels"]]}

    class Detection(ExactTrainerMixin, Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            classes = torch.tensor([label["class"] for label in inputs["labels"]])
            return cross_entropy(model(pixel_values=inputs["pixel_values"]).logits, classes)

    trainer = make(Detection, head, tmp_path, examples, size=5)
    trainer.data_collator = collate
    trainer.train()
    [ours] = trainer.optimizer.optimizer.gradients
    assert relative_error(ours, whole_window_gradient(head.model, stack(examples))) < EXACT


def test_a_loss_that_insists_on_the_number_of_items_is_evaluated_too(tmp_path):
    head = build_head("causal_lm", "gpt2")

    class Insisting(ExactTrainerMixin, Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = insisting(outputs, inputs["labels"], num_items_in_batch)
            return (loss, outputs) if return_outputs else loss

    examples = head.examples(LENGTHS)
    trainer = make(Insisting, head, tmp_path, examples, size=5, eval_dataset=examples[:3])
    trainer.train()
    expected = head.model(**head.collate(examples[:3])).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_what_the_loss_is_is_asked_anew_in_each_training(tmp_path):
    head = build_head("causal_lm", "llama")
    examples = head.examples(LENGTHS)
    whole = whole_window_gradient(head.model, head.collate(examples))
    trainer = make(ExactTrainer, head, tmp_path, examples, size=5, compute_loss_func=heeding)
    trainer.train()
    trainer.compute_loss_func = ignoring
    trainer.train()
    assert [relative_error(found, whole) < EXACT for found in trainer.optimizer.optimizer.gradients] == [
        True
    ] * 2


def test_micro_batches_that_are_no_mappings_are_refused(tmp_path):
    head = build_head("causal_lm", "llama")
    trainer = make(ExactTrainer, head, tmp_path, head.examples(LENGTHS))
    with pytest.raises(ValueError, match="mappings; ExactTrainer makes lists: use ExactTrainer without"):
        trainer.get_batch_samples(iter([[1], [2]]), 2, torch.device("cpu"))


def test_items_that_do_not_fit_the_loss_are_warned_of(tmp_path, capture_warnings):
    head = build_head("sequence_classification", "bert")
    make(Below, head, tmp_path, head.examples(LENGTHS)).train()
    assert "is not a mean over its items, counted as 'labels'" in capture_warnings.text


def test_batch_norm_is_warned_of_and_its_statistics_are_left_alone(tmp_path, capture_warnings):
    head = build_head("image_classification", "resnet")
    examples = head.examples(LENGTHS)
    buffers = {name: buffer.clone() for name, buffer in head.model.named_buffers()}
    trainer = make(ExactTrainer, head, tmp_path, examples)
    trainer.accelerator.prepare(head.model)
    trainer.get_batch_samples(iter([head.collate(examples[:4])]), 1, torch.device("cpu"))
    assert "BatchNorm" in capture_warnings.text
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in head.model.named_buffers())


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_micro_batches_and_windows_without_items_leave_the_gradient_exact_and_finite(model_type, tmp_path):
    head = build_head("token_classification" if model_type == "bert" else "causal_lm", model_type)
    examples = head.examples(LENGTHS)
    for i in (4, 5, 6, 7, *range(12, 16)):  # a micro-batch of the first window, and all of the last
        examples[i]["labels"] = [IGNORED] * len(examples[i]["labels"])
    trainer = make(ExactTrainer, head, tmp_path, examples, size=2, steps=4)
    trainer.train()
    first, _ = trainer.optimizer.optimizer.gradients
    assert relative_error(first, whole_window_gradient(head.model, head.collate(examples[:8]))) < EXACT
    trainer = make(ExactTrainer, head, tmp_path, examples[12:], size=2, steps=2)
    trainer.train()
    [empty] = trainer.optimizer.optimizer.gradients
    assert all((gradient == 0).all() for gradient in empty.values())
    assert logged(trainer) == [0.0]


@pytest.mark.parametrize("kind", ["causal_lm", "image_classification"])
def test_a_run_that_trainer_gets_right_ends_in_the_same_weights_dropout_and_all(kind, tmp_path):
    head = build_head(kind, "llama" if kind == "causal_lm" else "vit")
    for module in head.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    before = copy.deepcopy(head.model.state_dict())
    weights = []
    for trainer_class in (ExactTrainer, Trainer):
        head.model.load_state_dict(before)
        more = {"num_train_epochs": 2, "learning_rate": 1e-3, "max_grad_norm": 1.0, "recorder": False}
        more["train_sampling_strategy"] = "random"
        make(trainer_class, head, tmp_path, head.examples(LENGTHS), size=2, **more).train()
        weights.append(copy.deepcopy(head.model.state_dict()))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in before)
    assert not torch.equal(*(next(iter(state.values())) for state in (weights[0], before)))


def test_evaluation_callbacks_checkpoints_and_resume_work_as_in_trainer(tmp_path):
    head = build_head("sequence_classification", "bert")
    examples, before = head.examples(LENGTHS), copy.deepcopy(head.model.state_dict())

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 2

    def train(callbacks, resume=None):
        head.model.load_state_dict(before)
        trainer = make(
            ExactTrainer,
            head,
            tmp_path,
            examples,
            size=2,
            recorder=False,
            num_train_epochs=2,
            learning_rate=1e-3,
            train_sampling_strategy="random",
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            eval_dataset=examples[:5],
            callbacks=callbacks,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    train([Stop(), EarlyStoppingCallback(3)])
    resumed = train([EarlyStoppingCallback(3)], resume=str(tmp_path / "checkpoint-2"))
    assert [row["step"] for row in resumed.state.log_history if "eval_loss" in row] == [1, 2, 3, 4]
    losses = logged(resumed)
    state = json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())
    assert state["global_step"] == 4
    whole = train([EarlyStoppingCallback(3)])
    assert losses == logged(whole)
    evaluated = head.model(**head.collate(examples[:5])).loss.item()
    assert whole.evaluate()["eval_loss"] == pytest.approx(evaluated, rel=1e-5)


def test_several_gpus_in_one_process_and_an_old_transformers_are_refused(tmp_path, monkeypatch):
    head = build_head("sequence_classification", "bert")
    arguments = TrainingArguments(str(tmp_path), report_to="none")
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match="2 GPUs in one process") as refused:
        ExactTrainer(head.model.to("cpu"), arguments)
    assert "torchrun" in str(refused.value)
    monkeypatch.delattr(Trainer, "loss_is_scaled_for_ga")
    with pytest.raises(ValueError, match="transformers whose Trainer has loss_is_scaled_for_ga; found"):
        ExactTrainer(head.model, TrainingArguments(str(tmp_path), report_to="none"))


def test_the_loss_is_probed_in_windows_1_and_4_and_at_epochs_1_and_2(tmp_path):
    head = build_head("sequence_classification", "bert")
    seen = []
    head.model.register_forward_hook(lambda model, inputs, outputs: seen.append(outputs.loss.dtype))
    make(ExactTrainer, head, tmp_path, head.examples(LENGTHS), size=2, steps=2, num_train_epochs=3).train()
    first_try, *probes_and_micro_batches = seen
    assert first_try == torch.float32
    assert probes_and_micro_batches.count(torch.float32) == 3 * 8
    first_probe = probes_and_micro_batches.index(torch.float32)
    assert 0 < first_probe < probes_and_micro_batches.count(torch.float64) <= 4 * first_probe + 8


class Counting(torch.nn.Module):
    """A classifier that counts its forwards in training, and keeps a list and a tensor."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = torch.nn.Linear(3, 2), []
        self.register_buffer("number", torch.tensor(0))

    def forward(self, x, labels):
        self.number += self.training
        self.calls.append(len(x))
        self.latest = x.mean()
        return {"loss": cross_entropy(self.layer(x), labels)}


class Logging(ExactTrainer):
    def compute_loss(self, *args, **kwargs):
        self.log({"computed": 1.0})
        return super().compute_loss(*args, **kwargs)


def test_the_probe_leaves_no_trace(tmp_path):
    torch.manual_seed(0)
    model = Counting()
    examples = [{"x": torch.randn(3), "labels": torch.tensor(i % 2)} for i in range(32)]
    settings = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": 2}
    settings |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    settings |= {"save_strategy": "no", "dataloader_pin_memory": False}
    trainer = Logging(model, TrainingArguments(str(tmp_path), **settings), train_dataset=examples)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert model.number == len(model.calls) == len(logged(trainer, "computed")) == 4
    assert model.latest.dtype == torch.float32


class OutOfMemory(ExactTrainer):
    """Runs out of memory in every probe but the first."""

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step and not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().compute_loss(*args, **kwargs)


def test_a_later_probe_without_memory_ends_the_probes_and_not_the_training(tmp_path, caplog):
    head = build_head("sequence_classification", "bert")
    trainer = make(OutOfMemory, head, tmp_path, head.examples(LENGTHS), size=2, steps=2, num_train_epochs=3)
    trainer.train()
    assert trainer.state.global_step == 12
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        "The loss is not checked again, as memory ran out in a check"
    ]


def test_padding_to_one_length_in_encoder_and_decoder_is_exact(tmp_path, caplog):
    head = build_head("seq2seq_lm", "t5")
    make(ExactTrainer, head, tmp_path, head.examples(LENGTHS), pad_to=max(LENGTHS) + 2).train()
    assert "padding changes it" not in caplog.text


@pytest.mark.parametrize("strategy", ["sequential", "batch_rebalance"])
def test_without_padding_the_gradients_are_those_of_the_padded_model(strategy, tmp_path):
    found, lengths = [], [3, 40, 7, 22, 5, 9, 31, 4] * 4
    for padding_free in (False, True):
        head = build_head("sequence_classification", "bert")
        settings = {"train_sampling_strategy": strategy, "padding_free": padding_free}
        found.append(gradients(ExactTrainer, head, tmp_path, head.examples(lengths), **settings))
        assert is_removed(head.model) == padding_free
    for padded, removed in zip(*found, strict=True):
        assert relative_error(removed, padded) <= EXACT


def test_a_loss_that_reads_padding_is_refused_in_training(tmp_path):
    head = build_head("question_answering", "distilbert")
    trainer = make(ExactTrainer, head, tmp_path, head.examples(LENGTHS), padding_free=True)
    with pytest.raises(PaddingNotRemovableError, match="the loss reads"):
        trainer.train()


# ---- the assertions of transformers' TrainerGradientAccumulationTest, on models that need no download ----


class Line(torch.nn.Module):
    """y = a x + b."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))

    def forward(self, x, labels=None, **kwargs):
        y = x * self.a + self.b
        return {"loss": torch.nn.functional.mse_loss(y, labels), "logits": y}


def fit_line(folder, size, steps, epochs=3, length=64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(length, generator=generator)
    y = 2 * x + 3 + 0.1 * torch.randn(length, generator=generator)
    examples = [{"x": x, "labels": y} for x, y in zip(x.tolist(), y.tolist(), strict=True)]
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "use_cpu": True}
    settings |= {"learning_rate": 0.1, "num_train_epochs": epochs, "report_to": "none", "save_strategy": "no"}
    arguments = TrainingArguments(str(folder), disable_tqdm=True, **settings)
    trainer = ExactTrainer(Line(), arguments, train_dataset=examples)
    trainer.remove_callback(PrinterCallback)
    return trainer


def test_half_the_batch_size_and_two_accumulation_steps_fit_the_same_line(tmp_path):
    at_once, accumulated = fit_line(tmp_path, 8, 1), fit_line(tmp_path, 4, 2)
    at_once.train()
    accumulated.train()
    torch.testing.assert_close(accumulated.model.a, at_once.model.a)
    torch.testing.assert_close(accumulated.model.b, at_once.model.b)
    assert not math.isclose(at_once.model.a.item(), 0)


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("length", [123, 120])
def test_every_window_has_the_micro_batches_that_it_should_and_none_is_lost(epochs, length, tmp_path):
    trainer = fit_line(tmp_path, 4, 5, epochs, length)
    seen, read = [], trainer.get_batch_samples

    def watched(epoch_iterator, num_batches, device):
        micro_batches, items = read(epoch_iterator, num_batches, device)
        assert len(micro_batches) == num_batches > 0
        seen.append(num_batches)
        return micro_batches, items

    trainer.get_batch_samples = watched
    trainer.train()
    assert sum(seen) == len(trainer.get_train_dataloader()) * epochs


@pytest.mark.parametrize("compute_loss_func", [None, pytest.param(heeding, marks=pytest.mark.slow), ignoring])
def test_logged_losses_are_those_of_the_run_without_accumulation(compute_loss_func, tmp_path):
    losses = {}
    for size, steps in ((8, 1), (4, 2)):
        head = build_head("causal_lm", "llama")
        more = {"learning_rate": 3e-4, "max_steps": 5, "compute_loss_func": compute_loss_func}
        trainer = make(ExactTrainer, head, tmp_path, head.examples(LENGTHS), size, steps, False, **more)
        trainer.train()
        losses[steps] = logged(trainer)
    assert len(losses[1]) == 5
    assert losses[1] == pytest.approx(losses[2], rel=1e-4)  # transformers uses 0.01


def test_a_batch_whose_pixels_are_not_by_row_trains_as_in_trainer(tmp_path, capture_warnings):
    """As in Qwen2-VL: all patches of a micro-batch are in one tensor. The loss divides by the number."""

    class Patches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(4, 3)

        def forward(self, pixels, counts, labels, **kwargs):
            rows = torch.stack([part.mean(0) for part in pixels.split(counts.tolist())])
            loss = cross_entropy(self.layer(rows), labels, reduction="sum")
            return {"loss": loss / kwargs.get("num_items_in_batch", len(labels))}

    def collate(examples):
        batch = {"pixels": torch.cat([example["pixels"] for example in examples])}
        batch["counts"] = torch.tensor([len(example["pixels"]) for example in examples])
        return {**batch, "labels": torch.tensor([example["label"] for example in examples])}

    generator = torch.Generator().manual_seed(0)
    examples = [{"pixels": torch.randn(2 + i % 3, 4, generator=generator), "label": i % 3} for i in range(16)]
    gradients = []
    for trainer_class in (ExactTrainer, Trainer):
        model = Patches()
        trainer = make(
            trainer_class, SimpleNamespace(model=model, collate=collate), tmp_path, examples, size=3
        )
        trainer.data_collator = collate
        trainer.train()
        gradients.append(trainer.optimizer.optimizer.gradients)
    assert all(relative_error(*pair) < EXACT for pair in zip(*gradients, strict=True))
    assert capture_warnings.text == ""
