import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps = net(), 4
optimizers = [
    torch.optim.AdamW(model[0].parameters(), lr=2e-3),
    torch.optim.SGD(model[2].parameters(), lr=0.1),
]
for _ in range(2):
    for step, (x, y) in enumerate(loader(), start=1):
        (F.cross_entropy(model(x), y) / steps).backward()
        if step % steps == 0:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
