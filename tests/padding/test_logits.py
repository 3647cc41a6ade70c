"""Logits at labelled positions alone give the loss and gradients of all logits."""

import copy
import io

import numpy as np
import peft
import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer, TrainingArguments

import gradacc_hf
from gradacc_hf import LogitsNeededError, WindowLoader
from gradacc_hf.accumulation.loss_items import IGNORED
from gradacc_hf.accumulation.reference import EXACT, read_gradient, relative_error, whole_window_gradient
from gradacc_hf.padding import logits
from gradacc_hf.padding.logits import skips_logits
from gradacc_hf.padding.removal import skips_unread
from gradacc_hf.utils.modeling import checkpoint_activations
from gradacc_hf.verification.tiny_models import build_head

LENGTHS = [17, 9, 30, 9, 12, 3, 21]
T5, BART = ("seq2seq_lm", "t5"), ("seq2seq_lm", "bart")
MARIAN, JOINED = ("seq2seq_lm", "marian"), ("seq2seq_lm", "encoder-decoder")
LLAMA, BERT = ("causal_lm", "llama"), ("masked_lm", "bert")
ALL = [T5, BART, MARIAN, ("seq2seq_lm", "pegasus"), JOINED, LLAMA, ("causal_lm", "gemma2"), BERT]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces a better way"),  # two encoders joined
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),  # MobileBERT
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),  # LoRA of a head
]


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(logits, "TOKENS_PER_CHUNK", 5)


def make(kind, model_type):
    """Return a model, and a function that makes batches with unequal labels."""
    head = build_head(kind, model_type)
    for name, buffer in head.model.named_buffers():
        if name == "final_logits_bias":
            buffer.normal_()

    def batch_of(lengths):
        return head.collate(examples(head, lengths))

    return head, batch_of


def examples(head, lengths=LENGTHS):
    """Return examples with labels at few tokens. The last one has none."""
    found = head.examples(lengths)
    for i, example in enumerate(found):
        example["labels"] = np.array(example["labels"])
        example["labels"][:: i + 2] = IGNORED
    if len(lengths) > 1:
        found[-1]["labels"][:] = IGNORED
    return found


def rows_of_head(model, batch):
    """Return the numbers of positions whose logits a forward computes."""
    rows, head = [], model.get_output_embeddings()

    def count(module, args, output):
        if output.stride(-1):  # not the first call, which computes nothing
            rows.append(output.shape[:-1].numel())

    handle = head.register_forward_hook(count)
    model(**batch)
    handle.remove()
    return rows


WITHOUT_PADDING = [(*model, True) for model in ALL if model != JOINED]


@pytest.mark.parametrize(("kind", "model_type", "removed"), [(*m, False) for m in ALL] + WITHOUT_PADDING)
def test_micro_batches_have_the_gradient_of_the_whole_window_with_all_logits(kind, model_type, removed):
    head, batch_of = make(kind, model_type)
    model, batch = head.model, batch_of(LENGTHS)
    expected, loss = whole_window_gradient(model, batch), float(model(**batch).loss)
    gradacc_hf.skip_unlabelled_logits(model)
    if removed:
        gradacc_hf.remove_padding(model, batch, lambda outputs, batch: outputs.loss)
        assert skips_unread(model) == (kind != "seq2seq_lm")
    assert model(**batch).logits is None
    assert float(model(**batch).loss) == pytest.approx(loss, rel=EXACT)
    assert relative_error(whole_window_gradient(model, batch), expected) <= EXACT
    labelled = batch["labels"][:, int(kind == "causal_lm") :] != IGNORED
    assert sum(rows_of_head(model, batch)) == labelled.sum()
    accelerator = Accelerator(cpu=True)
    windows = WindowLoader(
        examples(head), len(LENGTHS), accelerator=accelerator, collate_fn=head.collate, micro_batch_size=2,
        num_items=head.num_items,
    )  # fmt: skip
    (window,) = windows
    assert len(window) > 2
    for batch in window:
        with accelerator.accumulate(model):
            accelerator.backward(window.weigh(model(**batch).loss))
    assert relative_error(read_gradient(model), expected) <= EXACT


@pytest.mark.parametrize(("kind", "model_type"), [T5, LLAMA])
def test_a_batch_without_labels_has_the_loss_of_all_logits(kind, model_type):
    head, batch_of = make(kind, model_type)
    batch = batch_of([9, 5])
    batch["labels"][:] = IGNORED
    other = copy.deepcopy(head.model)
    gradacc_hf.skip_unlabelled_logits(other)
    assert head.model(**batch).loss.isnan()
    assert other(**batch).loss.isnan()
    if kind == "causal_lm":
        loss = other(**batch, num_items_in_batch=7).loss
        assert loss == head.model(**batch, num_items_in_batch=7).loss == 0
        loss.backward()
        assert all((p.grad == 0).all() for p in other.parameters())


@pytest.mark.parametrize(("kind", "model_type"), [T5, BART, LLAMA, BERT])
def test_the_number_of_items_counts_where_it_counted_before(kind, model_type):
    head, batch_of = make(kind, model_type)
    batch, other = batch_of(LENGTHS), copy.deepcopy(head.model)
    gradacc_hf.skip_unlabelled_logits(other)
    expected = float(head.model(**batch, num_items_in_batch=40).loss)
    assert float(other(**batch, num_items_in_batch=40).loss) == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize(("kind", "model_type"), [T5, BART, JOINED, LLAMA])
def test_generate_and_logits_without_labels_are_as_before(kind, model_type):
    head, batch_of = make(kind, model_type)
    model, batch = head.model.eval(), batch_of([9, 5])
    ids = batch["input_ids"]
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if kind == "seq2seq_lm" else {"input_ids": ids}
    written, before = model.generate(ids, max_new_tokens=6), model(**inputs).logits
    gradacc_hf.skip_unlabelled_logits(model)
    assert torch.equal(model.generate(ids, max_new_tokens=6), written)
    assert torch.equal(model(**inputs).logits, before)


def test_restored_copied_and_saved(tmp_path):
    head, batch_of = make(*T5)
    model, batch = head.model, batch_of(LENGTHS)
    attributes, state = set(vars(model)), copy.deepcopy(model.state_dict())
    loss = float(model(**batch).loss)
    gradacc_hf.skip_unlabelled_logits(model)
    gradacc_hf.skip_unlabelled_logits(model)  # again
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert float(twin(**batch).loss) != pytest.approx(loss, rel=1e-2)
    assert float(model(**batch).loss) == pytest.approx(loss, rel=EXACT)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    assert float(torch.load(buffer, weights_only=False)(**batch).loss) == pytest.approx(loss, rel=EXACT)
    gradacc_hf.restore_logits(twin)
    gradacc_hf.restore_logits(model)
    assert set(vars(model)) == set(vars(twin)) == attributes
    assert model(**batch).logits is not None
    assert skips_logits(model) is False


@pytest.mark.parametrize("before", [True, False], ids=["before prepare", "after prepare"])
def test_autocast_of_accelerate(before):
    head, batch_of = make(*T5)
    batch, accelerator = batch_of(LENGTHS), Accelerator(cpu=True, mixed_precision="bf16")
    other = accelerator.prepare(copy.deepcopy(head.model))
    expected, loss = whole_window_gradient(other, batch), other(**batch).loss
    if before:
        gradacc_hf.skip_unlabelled_logits(head.model)
    model = accelerator.prepare(head.model)
    if not before:
        gradacc_hf.skip_unlabelled_logits(model)
    assert model(**batch).logits is None
    assert model(**batch).loss.dtype == loss.dtype == torch.float32
    assert float(model(**batch).loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-4)
    assert relative_error(whole_window_gradient(model, batch), expected) <= 2e-2
    rows = rows_of_head(model, batch)
    assert sum(rows) <= (batch["labels"] != IGNORED).sum() + 2  # one position shows the type
    gradacc_hf.restore_logits(model)
    assert model(**batch).logits is not None
    assert float(model(**batch).loss.detach()) == pytest.approx(float(loss.detach()), rel=EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits_have_a_loss_in_float32(dtype):
    head, batch_of = make(*LLAMA)
    batch, exact = batch_of(LENGTHS), float(head.model(**batch_of(LENGTHS)).loss)
    model = head.model.to(dtype)
    gradacc_hf.skip_unlabelled_logits(model)
    loss = model(**batch).loss
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(exact, rel=2e-2)


@pytest.mark.parametrize("first", [True, False], ids=["before LoRA", "after LoRA"])
@pytest.mark.parametrize("of_head", [False, True], ids=["layers", "layers and head"])
def test_lora_with_checkpointing(first, of_head):
    head, batch_of = make(*T5)
    checkpoint_activations(head.model)
    batch, other = batch_of(LENGTHS), copy.deepcopy(head.model)
    modules = ["q", "v"] + ["lm_head"] * of_head
    config = peft.LoraConfig(r=4, target_modules=modules, init_lora_weights=False, task_type="SEQ_2_SEQ_LM")
    if first:
        gradacc_hf.skip_unlabelled_logits(head.model)
    torch.manual_seed(0)
    model = peft.get_peft_model(head.model, config)
    torch.manual_seed(0)
    other = peft.get_peft_model(other, config)
    if not first:
        gradacc_hf.skip_unlabelled_logits(model)
    assert model(**batch).logits is None
    expected = whole_window_gradient(other, batch)
    assert relative_error(whole_window_gradient(model, batch), expected) <= EXACT


def test_a_head_with_dropout_drops_the_same_in_the_backward_pass():
    head, batch_of = make(*LLAMA)
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, lora_dropout=0.5)
    model = peft.get_peft_model(head.model, config)
    gradacc_hf.skip_unlabelled_logits(model)
    weight = model.get_submodule("base_model.model.lm_head.lora_A.default").weight
    batch, step = batch_of(LENGTHS), 1e-3 * torch.randn_like(weight)

    def loss():
        torch.manual_seed(0)
        return model(**batch).loss

    loss().backward()
    with torch.no_grad():
        weight += step
        above = loss()
        weight -= 2 * step
        below = loss()
    assert float((weight.grad * step).sum()) == pytest.approx(float(above - below) / 2, rel=2e-2)


def with_another_loss():
    model = build_head(*LLAMA).model
    model.loss_function = lambda logits, labels, **kwargs: logits.logsumexp(-1).mean()
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (with_another_loss, r"LlamaForCausalLM needs all logits: its loss reads all logits \(logsumexp\)"),
        (lambda: build_head("masked_lm", "mobilebert").model, "not the cross-entropy of the outputs"),
        (lambda: build_head("sequence_classification", "bert").model, "it has no vocabulary head"),
        (lambda: torch.nn.Linear(2, 2), "Linear is not a model of transformers"),
    ],
)
def test_a_refused_model_is_as_before(build, reason):
    model = build()
    model.requires_grad_(True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(LogitsNeededError, match=reason) as raised:
        gradacc_hf.skip_unlabelled_logits(model)
    assert "\n" not in str(raised.value)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all((parameter.grad == 1).all() for parameter in model.parameters())
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys()
        assert vars(module)["training"] == attributes[name]["training"]


def test_an_accepted_model_has_its_gradients_and_random_state_as_before():
    model, random = build_head(*T5).model, torch.get_rng_state()
    model.get_parameter("shared.weight").grad = before = torch.ones_like(model.shared.weight)
    gradacc_hf.skip_unlabelled_logits(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.shared.weight.grad is before
    assert (before == 1).all()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["shared.weight"]


@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_trainer_takes_the_same_steps(model_type, tmp_path):
    kind = "seq2seq_lm" if model_type == "t5" else "causal_lm"
    weights = []
    for skips in (False, True):
        head, _ = make(kind, model_type)
        if skips:
            gradacc_hf.skip_unlabelled_logits(head.model)
        settings = TrainingArguments(
            tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
            learning_rate=1e-2, report_to="none", save_strategy="no", disable_tqdm=True, optim="sgd",
        )  # fmt: skip
        data = examples(head)[:-1]
        trainer = Trainer(head.model, settings, head.collate, data, data)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0
        weights.append(dict(head.model.named_parameters()))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-6)


def test_tensors_indexed_by_a_mask_and_other_functions_are_computed_as_usual():
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(4, 7), torch.randn(2, 3, 4)
    mask, whole = torch.tensor([[True, False, True], [False, True, True]]), head(hidden)
    targets = torch.tensor([2, IGNORED, 6, 1])
    with logits.deferred(head, 2) as reading:
        found = head(hidden)
        assert found.shape == (2, 3, 7)
        assert (found.size(-1), found.dim(), found.dtype) == (7, 3, torch.float32)
        loss = torch.nn.functional.cross_entropy((2 * found.float() - 1)[mask], targets)
        assert (reading.at_labels, reading.others) == (True, [])
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy((2 * whole - 1)[mask], targets))
        for change in (
            lambda x: x.flatten(0, 1),
            lambda x: x.flatten(),
            lambda x: x[..., :-1, :],
            lambda x: x[:, 1:, 2:5],
            lambda x: x[0],
            lambda x: x.view(-1, 7),
            lambda x: x.reshape(7, -1),
            lambda x: torch.tanh(x / 3) * 3,
            lambda x: torch.arange(7.0) - x,
            lambda x: x + torch.arange(3.0)[:, None],
            lambda x: x.add(other=torch.arange(3.0)[:, None]),
            lambda x: x.mT,
            lambda x: torch.stack([x, x]),
        ):
            torch.testing.assert_close(torch.abs(change(found)), change(whole).abs())
        with pytest.raises(AttributeError, match="mul_ would change deferred logits in place"):
            found[:, 1:].mul_(2)


@pytest.mark.parametrize("change", ["scale", "cap", "bias", "input"])
def test_hooks_that_the_head_gets_later_count_once(change):
    head, batch_of = make(*LLAMA)
    whole = copy.deepcopy(head.model)
    gradacc_hf.skip_unlabelled_logits(head.model)
    changes = {
        "scale": lambda module, args, output: output * 0.5,
        "cap": lambda module, args, output: 3 * torch.tanh(output / 3),
        "bias": lambda module, args, output: output + torch.linspace(-1, 1, module.out_features),
    }
    for model in (whole, head.model):
        if change == "input":
            model.lm_head.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        else:
            model.lm_head.register_forward_hook(changes[change])
    batch = batch_of(LENGTHS)
    gradients = [whole_window_gradient(model, batch) for model in (head.model, whole)]
    assert relative_error(*gradients) < EXACT
