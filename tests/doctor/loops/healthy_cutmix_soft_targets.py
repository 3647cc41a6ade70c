import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps = net(), 4
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    for step, (x, y) in enumerate(loader(), start=1):
        kind = F.one_hot(y, 3).float()
        target = 0.7 * kind + 0.3 * kind.flip(0)
        loss = F.cross_entropy(model(0.7 * x + 0.3 * x.flip(0)), target, label_smoothing=0.1)
        (loss / steps).backward()
        if step % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
