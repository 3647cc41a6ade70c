import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps = net(), 4
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
for _ in range(2):
    for step, (x, y) in enumerate(loader(), start=1):
        moved = x.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(F.cross_entropy(model(moved), y), moved)
        loss = F.cross_entropy(model(x + 0.1 * slope.sign()), y)
        (loss / steps).backward()
        if step % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
