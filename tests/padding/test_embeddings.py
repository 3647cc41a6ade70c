"""Embeddings without padding have the gradient of the padded model, whatever makes their positions."""

import copy

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gradacc_hf
from gradacc_hf import PaddingNotRemovableError
from gradacc_hf.accumulation.reference import EXACT, compare, whole_window_gradient
from gradacc_hf.padding.removal import is_removed
from gradacc_hf.verification.tiny_models import build_head

aten = torch.ops.aten
LENGTHS = [17, 9, 30, 9, 12, 3, 21]
OTHERS = [11, 4, 4, 26, 7]
REAL = sum(OTHERS)
PADDED = len(OTHERS) * max(OTHERS)


def make(kind, model_type, lengths=OTHERS):
    """Return a padded model, a copy without padding, and a batch."""
    head = build_head(kind, model_type)
    padded = copy.deepcopy(head.model)
    gradacc_hf.remove_padding(head.model, head.collate(head.examples(LENGTHS)))
    return padded, head.model, head.collate(head.examples(lengths))


class Operator(TorchDispatchMode):
    """Records the size of the output of each call of an operator, without hooks."""

    def __init__(self, operator):
        super().__init__()
        self.operator, self.sizes = operator, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket is self.operator:
            first = output if isinstance(output, torch.Tensor) else output[0]
            self.sizes.append(first.shape[:2].numel())
        return output


def tokens_of(model, batch, operator=aten.embedding):
    """Return the tokens of the first call of an operator in a forward."""
    with Operator(operator) as seen:
        model.train()(**batch)
    return seen.sizes[0]


def error(padded, model, batch):
    reference = whole_window_gradient(padded, batch)
    return compare("without padding", whole_window_gradient(model, batch), reference).error


@pytest.mark.parametrize(
    ("kind", "model_type", "operator"),
    [
        ("sequence_classification", "bert", aten.embedding),
        ("sequence_classification", "bert", aten.native_layer_norm),
        ("masked_lm", "roberta", aten.embedding),
        ("token_classification", "distilbert", aten.native_layer_norm),
        ("masked_lm", "modernbert", aten.native_layer_norm),
        ("causal_lm", "llama", aten.embedding),
    ],
)
def test_embeddings_are_computed_at_real_tokens(kind, model_type, operator):
    padded, model, batch = make(kind, model_type)
    assert tokens_of(padded, batch, operator) == PADDED
    assert tokens_of(model, batch, operator) == REAL
    assert error(padded, model, batch) < EXACT
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).loss, padded.eval()(**batch).loss)


@pytest.mark.parametrize(("kind", "model_type"), [("causal_lm", "gpt2"), ("seq2seq_lm", "t5")])
def test_embeddings_that_the_model_changes_stay_padded(kind, model_type):
    padded, model, batch = make(kind, model_type)
    assert is_removed(model)
    assert tokens_of(model, batch) == PADDED
    assert error(padded, model, batch) < EXACT


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_token_types_positions_and_padding_on_the_left(model_type):
    head = build_head("masked_lm", model_type)
    wide, other = (head.collate(head.examples(lengths)) for lengths in (LENGTHS, OTHERS))
    for batch in (wide, other):
        mask = batch["attention_mask"] = batch["attention_mask"].flip(1)
        batch |= {name: batch[name].flip(1) for name in ("input_ids", "labels")}
        batch["token_type_ids"] = torch.arange(mask.shape[1]).expand_as(mask) % 2
        batch["token_type_ids"] %= head.model.config.type_vocab_size
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0) + 2
    padded = copy.deepcopy(head.model)
    gradacc_hf.remove_padding(head.model, wide)
    assert tokens_of(head.model, other) == REAL
    assert error(padded, head.model, other) < EXACT
    del other["position_ids"]
    assert error(padded, head.model, other) < EXACT


def test_given_embeddings_stay_padded():
    padded, model, batch = make("sequence_classification", "bert")
    batch["inputs_embeds"] = padded.get_input_embeddings()(batch.pop("input_ids")).detach()
    assert tokens_of(model, batch, aten.native_layer_norm) == PADDED
    assert error(padded, model, batch) < EXACT


@pytest.mark.parametrize("reentrant", [False, True])
def test_frozen_embeddings_before_layers_that_are_computed_again(reentrant):
    head, models = build_head("causal_lm", "llama"), []
    options = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], lora_dropout=0.0)
    for each in (copy.deepcopy(head.model), head.model):
        torch.manual_seed(0)
        enable = getattr(each, "activation_checkpointing_enable", None) or each.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        each.enable_input_require_grads()
        models.append(peft.get_peft_model(each, options))
    for each in models:
        for name, parameter in each.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape)
    gradacc_hf.remove_padding(models[1], head.collate(head.examples(LENGTHS)))
    batch = head.collate(head.examples(OTHERS))
    assert tokens_of(models[1], batch) == REAL
    assert error(*models, batch) < EXACT


def add_noise(module, args, output):
    """Change embeddings as NEFTune does, but the same way each time."""
    return output + torch.linspace(-0.1, 0.1, output.shape[-1]) / output.shape[1] ** 0.5


def adapt(model):
    torch.manual_seed(0)
    name = next(name for name, m in model.named_modules() if m is model.get_input_embeddings())
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=[name], init_lora_weights=False))
    return adapted.train()


@pytest.mark.parametrize(
    ("kind", "model_type"), [("causal_lm", "llama"), ("sequence_classification", "bert")]
)
@pytest.mark.parametrize("change", ["hook", "adapter", "replaced"])
def test_embeddings_that_are_changed_after_the_check_stay_padded(kind, model_type, change):
    padded, model, batch = make(kind, model_type)
    for each in (padded, model):
        if change == "hook":
            each.get_input_embeddings().register_forward_hook(add_noise)
        elif change == "replaced":
            table = each.get_input_embeddings()
            each.set_input_embeddings(torch.nn.Embedding(*table.weight.shape, _weight=table.weight.data))
    if change == "adapter":
        padded, model = adapt(padded), adapt(model)
    assert tokens_of(model, batch) == PADDED
    assert error(padded, model, batch) < EXACT


def test_embeddings_that_the_model_changes_later_are_an_error():
    _, model, batch = make("causal_lm", "llama")
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args: (args[0] * 1.0, *args[1:]), prepend=True
    )
    with pytest.raises(PaddingNotRemovableError, match="changes its embeddings before the first layer"):
        model(**batch)


def test_other_lookups_of_the_same_table_stay_as_they_are():
    head = build_head("sequence_classification", "bert")

    def with_names(module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        names = torch.arange(5, 5 + ids.shape[1])[None]  # as many as the padded length
        module.names = module.embeddings.word_embeddings(names).mean()

    padded = copy.deepcopy(head.model)
    gradacc_hf.remove_padding(head.model, head.collate(head.examples(LENGTHS)))
    found = []
    for each in (padded, head.model):
        each.bert.register_forward_pre_hook(with_names, with_kwargs=True)
        each.train()(**head.collate(head.examples(OTHERS)))
        found.append(each.bert.names)
    torch.testing.assert_close(*found)
