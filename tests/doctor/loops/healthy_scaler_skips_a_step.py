import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps, batches = net(), 4, loader()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
for _ in range(50):
    for step, (x, y) in enumerate(batches, start=1):
        scaler.scale(8 * F.cross_entropy(model(x), y) / 8 / steps).backward()
        if step % steps == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
