import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps = net(), 4
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
for _ in range(2):
    for step, (x, y) in enumerate(loader(), start=1):
        x.requires_grad_(True)
        loss = F.cross_entropy(model(x), y)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        loss = loss + 0.1 * slope.square().sum(dim=1).mean()
        (loss / steps).backward()
        if step % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
