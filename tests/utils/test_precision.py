import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForMaskedLM, MixtralConfig, MixtralForCausalLM

from gradacc_hf.utils.precision import in_float64

SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16}
SMALL |= {"num_hidden_layers": 1, "num_attention_heads": 2}


def batch():
    ids = torch.randint(1, 40, (4, 6))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_in_float64_and_the_model_is_as_it_was(dtype):
    model = BertForMaskedLM(BertConfig(**SMALL)).to(dtype).eval()  # with tied weights
    parameters = dict(model.named_parameters())
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = batch()
    with in_float64(model):
        loss = model(**inputs).loss
        (gradient,) = torch.autograd.grad(loss, [model.get_input_embeddings().weight])
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert loss.dtype == gradient.dtype == torch.float64
    in_place = dict(model.named_parameters())
    assert all(in_place[name] is p for name, p in parameters.items())
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    model.double()
    torch.testing.assert_close(loss, model(**inputs).loss, rtol=1e-12, atol=0)


def test_casts_weights_of_losses_and_new_tensors_are_in_float64():
    weight = torch.tensor([1.0, 3.0])
    model = torch.nn.Linear(3, 2)
    with in_float64(model):
        logits = model(torch.randn(4, 3)).float()
        new = torch.zeros(4)
        new[0] = 1 / 3
        loss = cross_entropy(logits, torch.tensor([0, 1, 1, 0]), weight=weight)
    assert logits.dtype == new.dtype == loss.dtype == torch.float64
    assert float(new[0]) == 1 / 3


def test_kernels_without_float64_compute_in_float32():
    model = MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)).eval()
    inputs = batch()
    usual = model(**inputs).loss
    with in_float64(model):
        loss = model(**inputs).loss
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss.float(), usual)


def test_weights_that_are_no_floats_are_refused():
    model = torch.nn.Linear(3, 2)
    model.weight = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="weight has no values in float64"), in_float64(model):
        pass
