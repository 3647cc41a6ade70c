import torch

from gradacc_hf.utils.attributes import Attributes


class Holder(torch.nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
        self.requires_grad_(False)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(2))
        self.seen, self.by_name, self.last = [], {"a": torch.zeros(2)}, None

    def forward(self, x):
        self.steps += 1
        self.mean = 0.5 * self.mean + x.mean()
        self.seen.append(1)
        self.by_name["a"][0] = 7.0
        self.by_name["b"] = 1
        self.last = self.new = x
        return super().forward(x)


def test_everything_that_a_forward_changes_is_restored_but_parameters():
    holder, observed = Holder(), []
    weight, mean, steps = holder.weight, holder.mean, holder.steps
    attributes = Attributes(holder)
    holder(torch.randn(4, 3))
    holder.register_forward_hook(lambda *_: observed.append(1))
    with torch.no_grad():
        weight.fill_(5.0)
    attributes.restore()
    assert holder.weight is weight
    assert (weight == 5).all(), "a frozen weight is not copied"
    assert holder.mean is mean
    assert holder.steps is steps
    assert holder.steps == 0
    assert not holder.seen
    assert holder.by_name.keys() == {"a"}
    assert not holder.by_name["a"].any()
    assert holder.last is None
    assert not hasattr(holder, "new")
    holder(torch.randn(4, 3))
    assert observed, "a hook stays"
