import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps = net(), 4
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    for step, (x, y) in enumerate(loader(shuffle=False), start=1):
        if step == 6:
            x = x * float("nan")
        (F.cross_entropy(model(x), y) / steps).backward()
        if step % steps == 0:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if torch.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad()
