"""A model without padding has the loss and gradients of the padded model, whatever is done with it."""

import copy
import weakref

import peft
import pytest
import torch
from accelerate import Accelerator
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import gradacc_hf
from gradacc_hf import PaddingNotRemovableError
from gradacc_hf.accumulation.padding_layout import attach_layout, padding_layout, target_mask
from gradacc_hf.accumulation.reference import EXACT, compare, read_gradient, whole_window_gradient
from gradacc_hf.padding.removal import is_removed
from gradacc_hf.verification.tiny_models import build_head

LENGTHS = [17, 9, 30, 9, 12, 3, 21]


def make(kind="sequence_classification", model_type="bert", lengths=LENGTHS, remove=True):
    """Return a padded model, a copy without padding, and a batch."""
    head = build_head(kind, model_type)
    batch = head.collate(head.examples(lengths))
    padded = copy.deepcopy(head.model)
    if remove:
        gradacc_hf.remove_padding(head.model, head.collate(head.examples(LENGTHS)))
    return padded, head.model, batch


def layer_tokens(model, batch):
    """Return the tokens that the feed-forward part of the last layer computes."""
    seen = []
    dense = [
        module
        for name, module in model.named_modules()
        if ".layer" in name and isinstance(module, torch.nn.Linear) and "lora" not in name
    ]
    handle = dense[-1].register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    model(**batch)
    handle.remove()
    return seen[0][:-1].numel()


def assert_same(padded, removed, batch):
    reference = whole_window_gradient(padded, batch)
    found = compare("without padding", whole_window_gradient(removed, batch), reference)
    assert found.error < EXACT
    assert found.worst[0][1] < 100 * EXACT
    with torch.no_grad():
        torch.testing.assert_close(removed(**batch).loss, padded(**batch).loss, rtol=EXACT, atol=0)


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [
        ("sequence_classification", "bert"),
        ("token_classification", "distilbert"),
        ("masked_lm", "albert"),
        ("masked_lm", "modernbert"),
        ("multiple_choice", "roberta"),
        ("causal_lm", "llama"),
        ("causal_lm", "gemma2"),
        ("causal_lm", "gpt_oss"),
        ("sequence_classification", "mistral"),
        ("sequence_classification", "deberta-v2"),
        ("masked_lm", "mpnet"),
        ("seq2seq_lm", "bart"),
        ("seq2seq_lm", "t5"),
    ],
)
def test_loss_and_gradients_are_those_of_the_padded_model(kind, model_type):
    assert_same(*make(kind, model_type))


def test_layers_compute_real_tokens_only():
    padded, removed, batch = make()
    assert layer_tokens(padded, batch) == len(LENGTHS) * max(LENGTHS)
    assert layer_tokens(removed, batch) == sum(LENGTHS)


@pytest.mark.parametrize("lengths", [[9], [9, 9, 9], [12, 5], [30] * 3 + [4]])
@pytest.mark.parametrize("pad_to", [None, 32])
@pytest.mark.parametrize("model_type", ["bert", "llama", "mpnet"])
def test_batches_of_one_and_of_equal_lengths(model_type, lengths, pad_to):
    kind = "causal_lm" if model_type == "llama" else "masked_lm"
    padded, removed, _ = make(kind, model_type)
    head = build_head(kind, model_type)
    assert_same(padded, removed, head.collate(head.examples(lengths), pad_to=pad_to))


@pytest.mark.parametrize(("lengths", "pad_to"), [([6, 4], 10), ([3, 3, 3], 9)])
@pytest.mark.parametrize("model_type", ["bert", "llama", "mpnet"])
def test_as_many_tokens_as_the_padded_length(model_type, lengths, pad_to):
    kind = "causal_lm" if model_type == "llama" else "masked_lm"
    padded, removed, _ = make(kind, model_type)
    head = build_head(kind, model_type)
    batch = head.collate(head.examples(lengths), pad_to=pad_to)
    assert_same(padded, removed, batch)
    real = batch["attention_mask"] != 0
    torch.testing.assert_close(removed(**batch).logits[real], padded(**batch).logits[real])
    if max(lengths) >= 4:
        gradacc_hf.restore_padding(removed)
        gradacc_hf.remove_padding(removed, batch)
        assert_same(padded, removed, head.collate(head.examples(LENGTHS)))


def test_as_many_tokens_as_attention_heads():
    padded, removed, _ = make("masked_lm", "mpnet")
    heads, head = padded.config.num_attention_heads, build_head("masked_lm", "mpnet")
    assert_same(padded, removed, head.collate(head.examples([heads]), pad_to=heads + 3))


def test_an_argument_of_the_layers_is_packed_as_in_the_check():
    padded, removed, batch = make(remove=False)
    size, layers = batch["input_ids"].shape[1] + 3, removed.base_model.encoder.layer
    condition, seen = torch.randn(len(LENGTHS), size), []

    def add_condition(module, args, kwargs):
        return args, kwargs | {"condition": condition}

    handle = layers[0].register_forward_pre_hook(add_condition, with_kwargs=True)
    gradacc_hf.remove_padding(removed, batch)
    layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("condition")), with_kwargs=True
    )
    wide = {
        name: torch.nn.functional.pad(value, (0, 3)) if value.ndim == 2 else value
        for name, value in batch.items()
    }
    assert_same(padded, removed, wide)
    assert all(one is condition for one in seen)
    handle.remove()
    gradacc_hf.restore_padding(removed)
    gradacc_hf.remove_padding(removed, batch)
    layers[0].register_forward_pre_hook(add_condition, with_kwargs=True, prepend=True)
    with pytest.raises(PaddingNotRemovableError, match="condition, which it did not get in the check"):
        removed(**wide)


@pytest.mark.parametrize("lengths", [[9, 5, 5], [6, 6]])
def test_a_layer_that_calls_another_model_without_padding(lengths):
    padded, removed, batch = make()
    expected, other, _ = make("masked_lm", "distilbert")
    head = build_head("masked_lm", "distilbert")
    inner, losses = head.collate(head.examples(lengths)), []
    removed.base_model.encoder.layer[1].register_forward_pre_hook(
        lambda module, args: losses.append(other(**inner).loss), prepend=True
    )
    assert layer_tokens(removed, batch) == sum(LENGTHS)
    assert_same(padded, removed, batch)
    torch.testing.assert_close(losses[0], expected(**inner).loss)
    handle = removed.base_model.encoder.layer[0].register_forward_pre_hook(
        lambda module, args: module.attention(torch.ones(1, 2, 3)), prepend=True
    )
    with pytest.raises(RuntimeError):  # an exception ends all forwards
        removed(**batch)
    handle.remove()
    assert_same(padded, removed, batch)


def test_hidden_states_are_not_kept_until_the_forward_ends():
    _, removed, batch = make()
    kept, packed = [], []
    for layer in removed.base_model.encoder.layer:
        layer.register_forward_pre_hook(lambda module, args: packed.append(weakref.ref(args[0])))
    last = removed.base_model.encoder.layer[-1]
    last.register_forward_hook(lambda *_: kept.extend(one() is not None for one in packed[:-1]))
    with torch.no_grad():
        removed(**batch)
    assert len(kept) == len(removed.base_model.encoder.layer) - 1
    assert not any(kept)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt_oss"])
def test_padding_on_the_left_and_holes(model_type):
    padded, removed, right = make("causal_lm", model_type)
    left = {name: value.flip(1) for name, value in right.items()}
    holes = {name: value.clone() for name, value in right.items()}
    holes["attention_mask"][0, 3] = 0
    for batch in (left, holes):
        first = batch["attention_mask"].diff(dim=1, prepend=batch["attention_mask"][:, :1] * 0) == 1
        batch["labels"][first] = -100  # predicted from padding
        assert layer_tokens(removed, batch) == 7 * 30
        assert_same(padded, removed, batch)  # not checked on such padding, so padded
        gradacc_hf.restore_padding(removed)
        gradacc_hf.remove_padding(removed, batch)
        tokens = layer_tokens(removed, batch)
        assert tokens == batch["attention_mask"].sum()
        assert_same(padded, removed, batch)


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_an_equal_batch_to_check_on(model_type):
    kind = "causal_lm" if model_type == "llama" else "masked_lm"
    padded, removed, batch = make(kind, model_type, remove=False)
    head = build_head(kind, model_type)
    for lengths in ([8, 8, 8], [8]):
        gradacc_hf.remove_padding(removed, head.collate(head.examples(lengths)))
        assert_same(padded, removed, batch)
        gradacc_hf.restore_padding(removed)


def test_a_decoder_computes_real_tokens_of_both_sequences():
    padded, removed, batch = make("seq2seq_lm", "bart")
    decoder = removed.model.decoder.layers[-1]
    tokens = []
    for module in (decoder.fc1, decoder.encoder_attn.k_proj):
        module.register_forward_hook(lambda module, args, output: tokens.append(args[0].shape[:2].numel()))
    removed(**batch)
    targets = target_mask(batch["labels"]).sum().item()
    assert targets < batch["labels"].numel()
    assert sorted(tokens) == sorted([sum(LENGTHS), targets])
    batch["decoder_attention_mask"] = target_mask(batch["labels"])
    assert_same(padded, removed, batch)
    del batch["decoder_attention_mask"]
    attach_layout(batch["labels"], padding_layout(target_mask(batch["labels"])))
    assert_same(padded, removed, batch)


def test_a_batch_with_an_example_without_tokens_stays_padded():
    padded, removed, batch = make("masked_lm")
    batch["attention_mask"][1] = 0
    assert layer_tokens(removed, batch) == batch["input_ids"].numel()
    assert_same(padded, removed, batch)


def test_a_layout_of_a_loader_is_used_and_a_changed_mask_makes_it_void():
    padded, removed, batch = make()
    mask = batch["attention_mask"]
    other = mask.clone()
    other[0, 2:] = 0  # so that the layouts differ
    attach_layout(mask, padding_layout(other))
    assert layer_tokens(removed, batch) == sum(LENGTHS) - LENGTHS[0] + 2
    mask[0, 0] = 1
    assert layer_tokens(removed, batch) == sum(LENGTHS)
    attach_layout(mask, padding_layout(mask))
    assert_same(padded, removed, batch)


@pytest.mark.parametrize("model_type", ["bert", "llama", "deberta-v2", "t5"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_other_forwards_before_the_backward(model_type, reentrant):
    kind = {"bert": "masked_lm", "llama": "causal_lm", "t5": "seq2seq_lm"}.get(model_type, "masked_lm")
    padded, removed, batch = make(kind, model_type)
    reference = whole_window_gradient(padded, batch)
    (getattr(removed, "activation_checkpointing_enable", None) or removed.gradient_checkpointing_enable)(
        {"use_reentrant": reentrant}
    )
    if reentrant:
        removed.enable_input_require_grads()
    loss = removed(**batch).loss
    short = {name: value[:2].clone() for name, value in batch.items()}
    removed(**short)  # another layout
    short["attention_mask"][:] = 1
    removed(**short)  # padded
    loss.backward()
    assert compare("", read_gradient(removed), reference).error < EXACT


def test_checkpoint_wrappers_around_layers_stay_padded():
    padded, removed, batch = make("masked_lm")
    apply_activation_checkpointing(removed, check_fn=lambda module: type(module).__name__ == "BertLayer")
    assert layer_tokens(removed, batch) == batch["input_ids"].numel()
    reference = whole_window_gradient(padded, batch)
    gradient = whole_window_gradient(removed, batch)
    names = {name.replace("_checkpoint_wrapped_module.", ""): name for name in gradient}
    assert compare("", {name: gradient[names[name]] for name in reference}, reference).error < EXACT


@pytest.mark.parametrize("model_type", ["bert", "deberta-v2"])
def test_lora_before_and_after(model_type):
    gradients = []
    for order in ("lora first", "padding first", "padded"):
        torch.manual_seed(0)
        _, model, batch = make(model_type=model_type, remove=order == "padding first")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
        if order == "lora first":
            gradacc_hf.remove_padding(model, batch)
        assert (layer_tokens(model, batch) == sum(LENGTHS)) == (order != "padded")
        gradients.append(whole_window_gradient(model, batch))
    assert compare("", gradients[0], gradients[2]).error < EXACT
    assert compare("", gradients[1], gradients[2]).error < EXACT


@pytest.mark.parametrize("model_type", ["bert", "mpnet"])
def test_copies_and_their_restoring_are_independent(model_type):
    padded, removed, batch = make("masked_lm", model_type)
    twin = copy.deepcopy(removed)
    gradacc_hf.restore_padding(removed)
    assert is_removed(twin)
    assert not is_removed(removed)
    assert layer_tokens(removed, batch) == batch["input_ids"].numel()
    assert layer_tokens(twin, batch) < batch["input_ids"].numel()
    assert_same(padded, twin, batch)
    assert_same(padded, removed, batch)
    gradacc_hf.restore_padding(twin)
    assert traces(twin) == traces(padded)


def test_restoring_leaves_nothing_behind():
    padded, removed, _ = make()
    gradacc_hf.restore_padding(removed)
    assert traces(removed) == traces(padded)


def test_the_check_leaves_the_problem_type_to_the_first_forward():
    """transformers sets it from the labels. A model that is trained on other labels would keep it."""
    _, model, batch = make("sequence_classification", "bert", remove=False)
    model.config.problem_type = None
    gradacc_hf.remove_padding(model, batch)
    assert model.config.problem_type is None


def traces(model):
    """Return what `remove_padding` might leave in a model."""
    return [
        (
            name,
            module.training,
            sorted(vars(module)),
            [len(value) for key, value in sorted(vars(module).items()) if "hooks" in key],
            vars(module.config).copy() if hasattr(module, "config") else None,
            getattr(module, "p", None),
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize(("kind", "model_type"), [("question_answering", "bert"), ("masked_lm", "convbert")])
def test_a_refused_model_is_as_before(kind, model_type):
    padded, model, batch = make(kind, model_type, remove=False)
    model.eval()
    padded.eval()
    model(**batch).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    values = [None if grad is None else grad.clone() for grad in gradients]
    random_state = torch.get_rng_state()
    with pytest.raises(PaddingNotRemovableError):
        gradacc_hf.remove_padding(model, batch)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert traces(model) == traces(padded)
    for name, tensor in padded.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    for parameter, gradient, value in zip(model.parameters(), gradients, values, strict=True):
        assert parameter.grad is gradient
        assert gradient is None or torch.equal(gradient, value)


def test_a_model_in_bf16_is_checked_in_float32_and_is_as_before():
    head = build_head("masked_lm", "bert")
    model = head.model.bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = head.collate(head.examples(LENGTHS))
    gradacc_hf.remove_padding(model, batch)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "deberta-v2"])
def test_autocast(dtype, model_type):
    kind = "causal_lm" if model_type == "llama" else "masked_lm"
    padded, removed, batch = make(kind, model_type)
    with torch.autocast("cpu", dtype):
        expected, loss = padded(**batch).loss, removed(**batch).loss
        assert layer_tokens(removed, batch) > 0
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)


@pytest.mark.parametrize("prepared_first", [True, False])
def test_accelerate_with_autocast(prepared_first):
    padded, model, batch = make(remove=not prepared_first)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    forward = prepared.forward
    if prepared_first:
        gradacc_hf.remove_padding(prepared, batch)
    assert prepared.forward == forward
    assert layer_tokens(prepared, batch) == sum(LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        expected = padded(**batch).loss
    torch.testing.assert_close(prepared(**batch).loss, expected, rtol=2e-2, atol=0)
    assert prepared(**batch).logits.dtype == torch.float32


def test_trainer_takes_the_same_steps(tmp_path):
    padded, removed, _ = make("token_classification")
    head = build_head("token_classification", "bert")
    rows = head.examples(LENGTHS * 2)
    settings = dict(max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, optim="sgd", use_cpu=True)
    for model in (padded, removed):
        args = TrainingArguments(str(tmp_path), report_to="none", save_strategy="no", **settings)
        Trainer(model, args, train_dataset=rows, data_collator=head.collate).train()
    assert is_removed(removed)
    for name, tensor in padded.state_dict().items():
        torch.testing.assert_close(removed.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_with_and_without_an_attached_layout(mode):
    padded, removed, batch = make("masked_lm")
    padded.eval()
    removed.eval()
    with mode():
        mask = batch["attention_mask"] = batch["attention_mask"].clone()
        attach_layout(mask, padding_layout(mask))
        real = mask != 0
        assert layer_tokens(removed, batch) == sum(LENGTHS)
        torch.testing.assert_close(removed(**batch).logits[real], padded(**batch).logits[real])


def test_generate_and_evaluation_take_the_ordinary_path():
    padded, removed, batch = make("causal_lm", "llama")
    prompts = {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
    padded.eval()
    removed.eval()
    kwargs = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(removed.generate(**prompts, **kwargs), padded.generate(**prompts, **kwargs))
    with torch.no_grad():
        cached = removed(**prompts, use_cache=True)
        assert cached.past_key_values.get_seq_length() == max(LENGTHS)
        hidden = removed(**prompts, output_hidden_states=True).hidden_states
        assert all(one.shape[:2] == prompts["input_ids"].shape for one in hidden)
        without_mask = {"input_ids": batch["input_ids"]}
        assert torch.equal(removed(**without_mask).logits, padded(**without_mask).logits)


def test_a_saved_model_does_not_name_the_attention(tmp_path):
    padded, removed, batch = make()
    removed.save_pretrained(tmp_path)
    assert "gradacc" not in (tmp_path / "config.json").read_text()
    padded.save_pretrained(tmp_path / "padded")
    assert (tmp_path / "padded/config.json").read_text() == (tmp_path / "config.json").read_text()
    assert removed.state_dict().keys() == padded.state_dict().keys()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).train()
    assert not is_removed(loaded)
    assert_same(padded, removed, batch)


class Products(TorchDispatchMode):
    """Records the rows of each matrix product with a bias."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.addmm.default:
            self.rows.append(len(args[1]))
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.rows = []
        return super().__enter__()


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "compiled_first"), [("bert", False), ("mpnet", True)])
def test_compiled_layers(model_type, compiled_first):
    padded, removed, batch = make("sequence_classification", model_type, remove=False)
    torch.compiler.reset()
    counter = CompileCounter()

    def compile_layers():
        for layer in removed.base_model.encoder.layer:
            layer.compile(backend=counter, dynamic=True)

    if compiled_first:
        compile_layers()
        removed(**batch)
    gradacc_hf.remove_padding(removed, batch)
    if not compiled_first:
        compile_layers()
    assert_same(padded, removed, batch)
    compiled = counter.frame_count
    assert compiled > 0
    for examples in (3, 5, 6):
        assert_same(padded, removed, {name: value[:examples] for name, value in batch.items()})
    assert counter.frame_count == compiled
    with Products() as products:
        removed(**batch)
    assert products.rows.count(sum(LENGTHS)) >= 4


@pytest.mark.parametrize("model_type", ["llama", "mpnet"])
@pytest.mark.parametrize("given", ["argument", "config"])
def test_hidden_states_as_outputs_are_those_of_the_padded_model(model_type, given):
    kind = "causal_lm" if model_type == "llama" else "token_classification"
    padded, removed, batch = make(kind, model_type)
    more = {"output_hidden_states": True} if given == "argument" else {}
    real = batch["attention_mask"] != 0
    for training in (True, False):
        outputs = []
        for model in (padded, removed):
            model.config.use_cache = False
            model.config.output_hidden_states = given == "config"
            outputs.append(model.train(training)(**batch, **more).hidden_states)
        for expected, found in zip(*outputs, strict=True):
            torch.testing.assert_close(found[real], expected[real])


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_positions_that_the_check_did_not_get_keep_the_padding(model_type):
    padded, removed, batch = make("token_classification", model_type)
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]) // 2
    assert_same(padded, removed, batch)


def test_chunks_of_the_padded_length_are_refused():
    padded, model, batch = make(remove=False)
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 2
    with pytest.raises(PaddingNotRemovableError, match="chunk_size_feed_forward splits the padded length"):
        gradacc_hf.remove_padding(model, batch)
    assert not is_removed(model)
    assert not is_removed(padded)
