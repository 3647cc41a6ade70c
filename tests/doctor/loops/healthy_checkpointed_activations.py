import torch
import torch.nn.functional as F
from tiny import loader, net
from torch.utils.checkpoint import checkpoint


class Checkpointed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = net(8), net(3, inputs=8)

    def forward(self, x):
        return self.second(checkpoint(self.first, x, use_reentrant=False))


model, steps = Checkpointed(), 4
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(2):
    for step, (x, y) in enumerate(loader(), start=1):
        (F.cross_entropy(model(x), y) / steps).backward()
        if step % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
