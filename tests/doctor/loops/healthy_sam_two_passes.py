import torch
import torch.nn.functional as F
from tiny import SAM, loader, net

model, steps = net(), 4
optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
for _ in range(2):
    batches = list(loader())
    for first in range(0, len(batches), steps):
        window = batches[first : first + steps]
        for x, y in window:
            (F.cross_entropy(model(x), y) / steps).backward()
        optimizer.first_step(zero_grad=True)
        for x, y in window:
            (F.cross_entropy(model(x), y) / steps).backward()
        optimizer.second_step(zero_grad=True)
