"""Tiny models and data that the loops share. Each loop calls `torch.manual_seed` through `rows` or `net`."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def rows(number=48, classes=3):
    """Inputs of 5 numbers, and classes."""
    torch.manual_seed(0)
    return torch.randn(number, 5), torch.randint(classes, (number,))


def loader(number=48, size=4, shuffle=True, **options):
    """A loader of the rows."""
    return DataLoader(TensorDataset(*rows(number)), size, shuffle=shuffle, **options)


def net(outputs=3, inputs=5, middle=nn.Tanh):
    """A model of one hidden layer."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(inputs, 16), middle(), nn.Linear(16, outputs))


def tokens(windows=4, steps=4, size=4, unequal=True):
    """Windows of micro-batches (ids, labels), padded with label −100."""
    torch.manual_seed(2)
    made = []
    for _ in range(windows):
        window = []
        for _ in range(steps):
            ids = torch.randint(20, (size, 8))
            lengths = torch.randint(2, 9, (size, 1)) if unequal else torch.full((size, 1), 8)
            labels = torch.where(torch.arange(8) < lengths, ids % 5, -100)
            window.append((ids, labels))
        made.append(window)
    return made


class Tagger(nn.Module):
    """Logits of 5 tags for each token."""

    def __init__(self):
        torch.manual_seed(3)
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 5)

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation, in the form of the best-known implementation."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, dict(rho=rho, **options))
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        for p in held:
            self.state[p]["old_p"] = p.data.clone()
            p.add_(p.grad * 0.05 / (norm + 1e-12))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()
