import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps, weight = net(), 4, torch.tensor([1.0, 5.0, 0.5])
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    batches = list(loader())
    for first in range(0, len(batches), steps):
        window = batches[first : first + steps]
        total = sum(weight[y].sum() for _, y in window)
        for x, y in window:
            loss = F.cross_entropy(model(x), y, weight=weight)
            (loss * weight[y].sum() / total).backward()
        optimizer.step()
        optimizer.zero_grad()
