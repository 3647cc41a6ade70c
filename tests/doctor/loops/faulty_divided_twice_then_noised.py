import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps = net(), 4
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    for step, (x, y) in enumerate(loader(), start=1):
        (F.cross_entropy(model(x), y) / steps).backward()
        if step % steps == 0:
            for parameter in model.parameters():
                parameter.grad.div_(steps)  # fault: divided_twice
            for parameter in model.parameters():
                parameter.grad.add_(0.01 * torch.randn_like(parameter.grad))
            optimizer.step()
            optimizer.zero_grad()
