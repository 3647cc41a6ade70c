import itertools

import torch
import torch.nn.functional as F
from tiny import loader, net


def windows(data, n):
    it = iter(data)
    while chunk := list(itertools.islice(it, n)):
        yield chunk


model, accum = net(), 4
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    for chunk in windows(loader(number=40), accum):
        for x, y in chunk:
            (F.cross_entropy(model(x), y) / accum).backward()  # fault: partial_window_mis_scaled
        optimizer.step()
        optimizer.zero_grad()
