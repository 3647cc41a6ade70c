import torch
import torch.nn.functional as F
from tiny import loader, net

model, steps = net(), 4
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
for _ in range(2):
    for step, (x, y) in enumerate(loader(), start=1):
        loss = F.cross_entropy(model(x), y) / steps
        loss.backward()
        scheduler.step()  # fault: scheduler_per_micro_batch
        if step % steps == 0:
            optimizer.step()
            optimizer.zero_grad()
