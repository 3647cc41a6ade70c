import torch
import torch.nn.functional as F
from tiny import loader, net

model, accum = net(), 4
for p in model.parameters():
    p.register_hook(lambda g: torch.clamp(g, -0.01, 0.01))  # fault: clipped_too_early
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    for i, (x, y) in enumerate(loader(), start=1):
        (F.cross_entropy(model(x), y) / accum).backward()
        if i % accum == 0:
            optimizer.step()
            optimizer.zero_grad()
