import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps, batches, seen = net(), 4, loader(), 0
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    for step, (x, y) in enumerate(batches, start=1):
        logits, share = model(x), min(1.0, seen / 10)
        seen += 1
        loss = F.cross_entropy(logits, y) + share * logits.abs().mean()
        (loss / steps).backward()
        if step % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
