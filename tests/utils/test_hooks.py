import pytest
import torch

from gradacc_hf.utils.modeling import nonlinear_hooks

HOOKS = {
    "scaled": (lambda gradient: 3 * gradient, False),
    "masked in place": (lambda gradient: gradient.mul_(torch.tensor([1.0, 0.0, 1.0])), False),
    "read": (lambda gradient: None, False),
    "clipped": (lambda gradient: gradient.clamp(-1e-3, 1e-3), True),
    "clipped in place": (lambda gradient: gradient.clamp_(-1.0, 1.0), True),
    "normalised": (lambda gradient: gradient / gradient.norm(), True),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_that_change_the_gradient_of_each_micro_batch_are_found(kind):
    hook, is_found = HOOKS[kind]
    model = torch.nn.Linear(3, 2)
    model.weight.register_hook(hook)
    state = torch.get_rng_state()
    assert nonlinear_hooks(model) == (["weight"] if is_found else [])
    assert torch.equal(torch.get_rng_state(), state)
