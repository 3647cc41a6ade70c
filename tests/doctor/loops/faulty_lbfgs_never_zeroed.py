import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps, window = net(), 4, []
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)


def closure():
    total = 0.0
    for x, y in window:
        loss = F.cross_entropy(model(x), y) / steps
        loss.backward()
        total += loss.detach()
    return total


for _ in range(2):
    for batch in loader():
        window.append(batch)
        if len(window) == steps:
            optimizer.step(closure)  # fault: never_zeroed
            window.clear()
