import torch
import torch.nn.functional as F
from tiny import loader
from torch import nn


class MoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(5, 2), nn.ModuleList(nn.Linear(5, 3) for _ in range(2))

    def forward(self, x):
        gates = self.router(x).softmax(-1)
        out = sum(g[:, None] * e(x) for g, e in zip(gates.unbind(-1), self.experts, strict=False))
        importance = gates.sum(0)
        balance = importance.var() / importance.mean() ** 2
        return out, balance


torch.manual_seed(0)
model, accum = MoE(), 4
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(2):
    for i, (x, y) in enumerate(loader(), start=1):
        out, balance = model(x)
        loss = F.cross_entropy(out, y) + 0.01 * balance
        (loss / accum).backward()
        if i % accum == 0:
            optimizer.step()
            optimizer.zero_grad()
