import torch
import torch.nn.functional as F
from tiny import loader, net


def endless(batches):
    while True:
        yield from batches


model, steps, stream = net(), 4, endless(loader(40))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(8):
    for _ in range(steps):
        x, y = next(stream)
        loss = F.cross_entropy(model(x), y) / steps
        loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
