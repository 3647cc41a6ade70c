import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps = net(), 4
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    for step, (x, y) in enumerate(loader(), start=1):
        if step % steps:
            loss = F.cross_entropy(model(x), y) / steps
            loss.backward()
        else:
            loss = F.cross_entropy(model(x), y) / steps
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
